//! A DHCP server (RFC 2131) with one lease, which is the guest's for ever.
//!
//! It remembers nothing, so that there is nothing to use up: a client other than the guest gets no answer.

use std::net::{IpAddr, Ipv4Addr};

use super::core::Core;
use crate::network::wire::{AddressPair, UdpPorts};

pub(in crate::network) const SERVER: u16 = 67;
const CLIENT: u16 = 68;

/// What follows the fixed part (RFC 2131, 3), and how long that is.
const COOKIE: [u8; 4] = [99, 130, 83, 99];
const FIXED: usize = 236;

/// Kinds of messages (RFC 2132, 9.6).
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACKNOWLEDGE: u8 = 5;
const REFUSE: u8 = 6;
const INFORM: u8 = 8;

/// Options (RFC 2132).
const SUBNET_MASK: u8 = 1;
const ROUTER: u8 = 3;
const RESOLVER: u8 = 6;
const MTU: u8 = 26;
const BROADCAST: u8 = 28;
const REQUESTED: u8 = 50;
const LEASE: u8 = 51;
const KIND: u8 = 53;
const SERVER_ID: u8 = 54;
const END: u8 = 255;

/// Seconds that a lease is for.
const LEASE_TIME: u32 = 24 * 3600;

/// A message of the guest.
#[derive(Debug, PartialEq, Eq)]
struct Message {
    kind: u8,
    xid: [u8; 4],
    flags: [u8; 2],
    current: Ipv4Addr,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    mac: [u8; 6],
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

impl Message {
    /// RFC 2131, 2.
    fn parse(bytes: &[u8]) -> Option<Self> {
        // From a client, on Ethernet.
        if !bytes.starts_with(&[1, 1, 6]) || array(bytes, FIXED)? != COOKIE {
            return None;
        }
        let mut message = Self {
            kind: 0,
            xid: array(bytes, 4)?,
            flags: array(bytes, 10)?,
            current: array::<4>(bytes, 12)?.into(),
            requested: None,
            server: None,
            mac: array(bytes, 28)?,
        };
        let mut rest = bytes.get(FIXED + COOKIE.len()..)?;
        loop {
            rest = match *rest {
                [] | [END, ..] => break,
                [0, ref after @ ..] => after,
                [option, len, ref after @ ..] => {
                    let (value, after) = after.split_at_checked(len.into())?;
                    match option {
                        KIND => message.kind = *value.first()?,
                        REQUESTED => message.requested = Some(array::<4>(value, 0)?.into()),
                        SERVER_ID => message.server = Some(array::<4>(value, 0)?.into()),
                        _ => {}
                    }
                    after
                }
                _ => return None,
            };
        }
        (message.kind != 0).then_some(message)
    }
}

/// Answers a message to the server's port.
pub(in crate::network) fn message(core: &mut Core, bytes: &[u8]) {
    let Some(asked) = Message::parse(bytes) else {
        core.stats.malformed += 1;
        return;
    };
    if asked.mac != core.config.guest_mac.0 {
        core.stats.spoofed += 1;
        return;
    }
    let (ours, theirs) = (core.config.gateway4, core.config.guest4);
    let kind = match asked.kind {
        DISCOVER => OFFER,
        // Another server's offer was taken.
        REQUEST if asked.server.is_some_and(|server| server != ours) => return,
        REQUEST if asked.requested.unwrap_or(asked.current) == theirs => ACKNOWLEDGE,
        REQUEST => REFUSE,
        INFORM => ACKNOWLEDGE,
        _ => return,
    };
    // RFC 2131, 4.3.1, table 3.
    let lease = matches!(asked.kind, DISCOVER | REQUEST) && kind != REFUSE;
    let mut reply = vec![2, 1, 6, 0];
    reply.extend(asked.xid);
    reply.extend([0, 0]);
    reply.extend(asked.flags);
    reply.extend(if kind == REFUSE { [0; 4] } else { asked.current.octets() });
    reply.extend(if lease { theirs.octets() } else { [0; 4] });
    reply.extend([0; 8]);
    reply.extend(asked.mac);
    reply.resize(FIXED, 0);
    reply.extend(COOKIE);
    reply.extend([KIND, 1, kind, SERVER_ID, 4]);
    reply.extend(ours.octets());
    if lease {
        reply.extend([LEASE, 4]);
        reply.extend(LEASE_TIME.to_be_bytes());
    }
    if kind != REFUSE {
        let mask = u32::MAX.checked_shl(32 - u32::from(core.config.prefix4)).unwrap_or(0);
        for (option, value) in [
            (SUBNET_MASK, mask.to_be_bytes()),
            (ROUTER, ours.octets()),
            (RESOLVER, ours.octets()),
            (BROADCAST, core.config.broadcast4().octets()),
        ] {
            if option == ROUTER && !core.config.router {
                continue;
            }
            reply.extend([option, 4]);
            reply.extend(value);
        }
        reply.extend([MTU, 2]);
        reply.extend(core.config.mtu.to_be_bytes());
    }
    reply.push(END);
    // To a client that has no address yet, or takes only broadcasts (RFC 2131, 4.1).
    let broadcast = asked.flags.first().is_some_and(|f| f & 0x80 != 0) || kind == REFUSE;
    let dst = match asked.current {
        current if !current.is_unspecified() && kind != REFUSE => current,
        _ if broadcast => Ipv4Addr::BROADCAST,
        _ => theirs,
    };
    core.send_udp(
        AddressPair { src: IpAddr::V4(ours), dst: IpAddr::V4(dst) },
        UdpPorts { src: SERVER, dst: CLIENT },
        &reply,
    );
}
