//! Who is who on the link: ARP (RFC 826), neighbours and router advertisements (RFC 4861).
//!
//! The gateway answers for itself and for known hosts, and learns of none, so that there is nothing to poison.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::core::Core;
use super::generational::Owner;
use super::host::TimerEntry;
use crate::network::Mac;
use crate::network::wire::{self, AddressPair, IpPacket};

/// Messages (RFC 4861, 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Flags of a neighbour advertisement: from a router, asked for, newer than what is known (RFC 4861, 4.4).
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// How long the gateway is a router, and how often it says so again (RFC 4861, 6.2.1).
const LIFETIME: u16 = 9000;
const AGAIN: Duration = Duration::from_secs(1800);

/// The router, which says again and again that it is one.
#[derive(Debug, Default)]
pub(in crate::network) struct Router {
    timer: TimerEntry,
}

impl Router {
    /// The guest asked for a router.
    fn asked(&mut self, core: &mut Core) {
        advertise(core);
        let at = core.host.now + AGAIN;
        core.host.set_timer(&mut self.timer, Owner::Router, Some(at));
    }

    pub(in crate::network) fn on_timer(&mut self, core: &mut Core) {
        self.timer.fired();
        self.asked(core);
    }

    /// Takes an ICMPv6 message to any address; false when it is none of ours. `who` knows the cards of the link.
    pub(in crate::network) fn message(
        &mut self,
        core: &mut Core,
        packet: IpPacket,
        bytes: &[u8],
        who: impl FnOnce(Ipv6Addr) -> Option<Mac>,
    ) -> bool {
        let [kind, 0, _, _, _, _, _, _, rest @ ..] = bytes else { return false };
        // Only what no router has forwarded (RFC 4861, 6.1.1 and 7.1.1).
        let near = packet.hops == 255;
        match *kind {
            ROUTER_SOLICITATION if near => self.asked(core),
            NEIGHBOUR_SOLICITATION if near => solicited(core, packet, rest, who),
            _ => return false,
        }
        true
    }
}

/// RFC 826, "packet reception". `who` knows the cards of the link.
pub(in crate::network) fn arp(core: &mut Core, bytes: &[u8], who: impl FnOnce(Ipv4Addr) -> Option<Mac>) {
    let Some((fixed, rest)) = bytes.split_first_chunk::<8>() else {
        core.stats.malformed += 1;
        return;
    };
    let Some([s0, s1, s2, s3, s4, s5, a, b, c, d, _, _, _, _, _, _, e, f, g, h]) = rest.first_chunk::<20>() else {
        core.stats.malformed += 1;
        return;
    };
    // A request of Ethernet for IPv4.
    if *fixed != [0, 1, 8, 0, 6, 4, 0, 1] {
        core.stats.unserved += 1;
        return;
    }
    let (mac, from) = (Mac([*s0, *s1, *s2, *s3, *s4, *s5]), Ipv4Addr::new(*a, *b, *c, *d));
    // No address at all is a probe whether another host has it (RFC 5227, 1.1).
    if mac != core.config.guest_mac || !(from == core.config.guest4 || from.is_unspecified()) {
        core.stats.spoofed += 1;
        return;
    }
    let asked = Ipv4Addr::new(*e, *f, *g, *h);
    let Some(mac) = who(asked) else { return };
    let mut frame = Vec::with_capacity(wire::ETHERNET + 28);
    frame.extend(core.config.guest_mac.0);
    frame.extend(core.config.gateway_mac.0);
    frame.extend(wire::ARP.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(mac.0);
    frame.extend(asked.octets());
    frame.extend(core.config.guest_mac.0);
    frame.extend(from.octets());
    core.send(frame);
}

/// RFC 4861, 7.2.3 and 7.2.4.
fn solicited(core: &mut Core, packet: IpPacket, rest: &[u8], who: impl FnOnce(Ipv6Addr) -> Option<Mac>) {
    let Some(target) = rest.first_chunk::<16>().map(|bytes| Ipv6Addr::from(*bytes)) else {
        core.stats.malformed += 1;
        return;
    };
    let Some(mac) = who(target) else { return };
    let router = if core.config.router && core.config.is_gateway(target.into()) { ROUTER } else { 0 };
    // A guest without an address yet asks whether another host has it.
    let (to, flags) = match packet.src {
        IpAddr::V6(a) if a.is_unspecified() => (ALL_NODES.into(), router | OVERRIDE),
        src => (src, router | SOLICITED | OVERRIDE),
    };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(mac.0);
    core.send_icmp(AddressPair { src: target.into(), dst: to }, &mut message);
}

/// RFC 4861, 4.2 and 4.6; RFC 8106, 5.1.
fn advertise(core: &mut Core) {
    let [l0, l1] = LIFETIME.to_be_bytes();
    // Router lifetime 0: not a default router (RFC 4861, 4.2).
    let [r0, r1] = if core.config.router { [l0, l1] } else { [0, 0] };
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0, 64, 0, r0, r1, 0, 0, 0, 0, 0, 0, 0, 0];
    // Source link-layer address, MTU.
    message.extend([1, 1]);
    message.extend(core.config.gateway_mac.0);
    message.extend([5, 1, 0, 0]);
    // IPv6 has no smaller links (RFC 8200, 5).
    message.extend(u32::from(core.config.mtu.max(1280)).to_be_bytes());
    // The prefix: on this link, and for addresses of the guest's choice, for ever.
    message.extend([3, 4, 64, 0xc0]);
    message.extend([0xff; 8]);
    message.extend([0; 4]);
    let prefix = u128::from(core.config.gateway6) >> 64 << 64;
    message.extend(prefix.to_be_bytes());
    // The resolver.
    message.extend([25, 3, 0, 0, 0, 0, l0, l1]);
    message.extend(core.config.gateway6.octets());
    let src = core.config.gateway_local().into();
    core.send_icmp(AddressPair { src, dst: ALL_NODES.into() }, &mut message);
}
