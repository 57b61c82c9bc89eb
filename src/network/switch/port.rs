//! [`SwitchPort`]: one guest's port on a switch. Its network device drives it, on its VM's loop.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::pass::{DISCOVERY, Kept, Passing};
use super::queue::QueuedPacket;
use super::{AddressLease, ITSELF, PREFIX, Peer};
use crate::error::{Context, Result};
use crate::network::policy::Policy;
use crate::network::user::core::Core;
use crate::network::user::generational::Owner;
use crate::network::user::neighbour::{self, Router};
use crate::network::user::{Config, NetStats, dhcp, icmp};
use crate::network::wire::{self, AddressPair, PacketError};
use crate::network::{Capabilities, Frame, Mac, NetBackend, Offloads, Received, RxBuffer};
use crate::sys::EpollEvent;

/// Where names are asked for.
const DNS: u16 = 53;
const BATCH: usize = 16;

#[derive(Debug)]
pub(crate) struct SwitchPort {
    place: Arc<AddressLease>,
    /// What the switch itself says to this guest.
    core: Core,
    router: Router,
    /// Frames of others that were taken out of the queue.
    inbox: VecDeque<QueuedPacket>,
}

impl SwitchPort {
    /// # Errors
    /// `ResourceExhausted` when the host has no more descriptors.
    pub(crate) fn new(place: Arc<AddressLease>) -> Result<Self> {
        let (hub, peer) = (&place.switch.0, &place.peer);
        let config = Config {
            guest_mac: peer.mac,
            gateway_mac: hub.mac(),
            gateway4: hub.address4(ITSELF).into(),
            guest4: peer.address4,
            prefix4: PREFIX,
            gateway6: hub.address6(ITSELF.into()),
            guest6: peer.address6,
            mtu: peer.mtu,
            router: false,
            ..Config::new(Policy::deny_all())
        };
        let doing = || "making a switch's port";
        let core = Core::new(config).doing(doing)?;
        core.host.watch_level(peer.queue.fd(), Owner::Queue).doing(doing)?;
        Ok(Self { place, core, router: Router::default(), inbox: VecDeque::new() })
    }

    pub(crate) fn stats(&self) -> NetStats {
        let overflowed = self.core.stats.overflowed + self.place.peer.queue.dropped();
        NetStats { overflowed, ..self.core.stats }
    }

    /// Its name is free from now on.
    pub(crate) fn leave(&mut self) {
        self.place.leave();
    }

    fn take(&mut self, frame: Frame<'_>) -> Result<(), PacketError> {
        let mut head = [0; wire::HEADERS];
        let Some((ethernet, head)) = self.core.open(frame.memory(), frame.pieces(), &mut head)? else { return Ok(()) };
        let bytes = head.get(wire::ETHERNET..).unwrap_or_default();
        match ethernet.kind {
            wire::IPV4 | wire::IPV6 => {
                let packet = wire::IpPacket::parse(ethernet.kind, bytes, frame.len() - wire::ETHERNET)?;
                self.packet(frame, head, ethernet.dst, packet)
            }
            wire::ARP => {
                let hub = &self.place.switch.0;
                let own = &self.place.peer;
                neighbour::arp(&mut self.core, bytes, |asked| who(hub, own, asked.into()));
                Ok(())
            }
            _ => {
                self.core.stats.unserved += 1;
                Ok(())
            }
        }
    }

    fn packet(&mut self, frame: Frame<'_>, head: &[u8], to: Mac, packet: wire::IpPacket) -> Result<(), PacketError> {
        let inner = head.get(wire::ETHERNET + packet.header..).unwrap_or_default();
        let unspecified = packet.src.is_unspecified();
        if !unspecified && !self.place.peer.has(packet.src) {
            self.core.stats.spoofed += 1;
            return Ok(());
        }
        // Who has an address is asked of the switch, even where its card is known.
        let discovery = packet.protocol == wire::ICMPV6 && inner.first().is_some_and(|kind| DISCOVERY.contains(kind));
        if self.for_itself(packet.dst) || unspecified || discovery {
            return self.ask(frame, packet, inner);
        }
        let peer = self.place.switch.0.peer(packet.dst);
        let Some(peer) = peer.filter(|peer| peer.mac == to && !Arc::ptr_eq(peer, &self.place.peer)) else {
            self.core.stats.unserved += 1;
            return Ok(());
        };
        self.pass(frame, head, packet, &peer)
    }

    /// Passes a packet on to another guest.
    fn pass(&mut self, frame: Frame<'_>, head: &[u8], packet: wire::IpPacket, peer: &Peer) -> Result<(), PacketError> {
        // For one whose card does not run it is no work but counted there.
        let agreed = peer.queue.agreed().unwrap_or_default();
        match (Passing { packet, agreed, mtu: peer.mtu }).packets(frame, head) {
            Ok(packets) => peer.queue.push(self.place.peer.number, packets),
            Err(Kept::PacketError(bad)) => return Err(bad),
            Err(Kept::Forbidden) => self.core.stats.spoofed += 1,
            Err(Kept::TooLarge) => self.core.stats.too_large += 1,
        }
        Ok(())
    }

    /// What the switch answers itself: its own addresses, and groups in which it may be asked for something.
    fn for_itself(&self, address: IpAddr) -> bool {
        self.core.config.is_server(address) || address.is_multicast()
    }

    /// Something for the switch itself.
    fn ask(&mut self, frame: Frame<'_>, packet: wire::IpPacket, inner: &[u8]) -> Result<(), PacketError> {
        if packet.fragment.is_some() {
            return Err(PacketError::Fragment);
        }
        let at = wire::ETHERNET + packet.header;
        let known = matches!(packet.protocol, wire::UDP | wire::ICMP | wire::ICMPV6);
        if known && frame.offload().csum.is_none() {
            self.core.verify(frame.memory(), frame.pieces(), at, packet)?;
        }
        let addrs = AddressPair { src: packet.src, dst: packet.dst };
        let six = packet.src.is_ipv6();
        match packet.protocol {
            wire::UDP => {
                let udp = wire::Udp::parse(inner, packet.len, frame.offload().gso.is_some())?;
                let (at, len) = (at + wire::UDP_HEADER, udp.len - wire::UDP_HEADER);
                let bytes = self.core.copy(frame.memory(), frame.pieces(), at, len)?.to_vec();
                match udp.dst {
                    dhcp::SERVER if self.core.config.is_server(addrs.dst) => dhcp::message(&mut self.core, &bytes),
                    DNS if self.core.config.is_gateway(addrs.dst) && !addrs.src.is_unspecified() => {
                        self.core.stats.questions += 1;
                        let reply = self.place.switch.resolve(&bytes);
                        let Some(reply) = reply else { return Err(PacketError::Malformed) };
                        self.core.send_udp(
                            AddressPair { src: addrs.dst, dst: addrs.src },
                            wire::UdpPorts { src: DNS, dst: udp.src },
                            &reply,
                        );
                    }
                    _ => self.core.stats.unserved += 1,
                }
            }
            wire::ICMP | wire::ICMPV6 if six == (packet.protocol == wire::ICMPV6) => {
                let (hub, own) = (&self.place.switch.0, &self.place.peer);
                let who = |asked: Ipv6Addr| who(hub, own, asked.into());
                if six && self.router.message(&mut self.core, packet, inner, who) {
                    return Ok(());
                }
                let echo = if six { icmp::ECHO6 } else { icmp::ECHO };
                let mine = self.core.config.is_gateway(addrs.dst) && !addrs.src.is_unspecified();
                if inner.first() != Some(&echo) || !mine {
                    self.core.stats.unserved += 1;
                    return Ok(());
                }
                let mut message = self.core.copy(frame.memory(), frame.pieces(), at, packet.len)?.to_vec();
                icmp::echo(&mut self.core, addrs, &mut message);
            }
            _ => self.core.stats.unserved += 1,
        }
        Ok(())
    }

    /// Looks whether others have sent something.
    fn look(&mut self) -> Option<usize> {
        loop {
            if self.inbox.is_empty() {
                self.inbox = self.place.peer.queue.take();
            }
            let QueuedPacket { bytes, offload } = self.inbox.front()?;
            if self.core.agreed.to_guest.contains(offload.needed()) {
                return Some(bytes.len());
            }
            // It was sent to a driver that has agreed to more; this one may not even have buffers of its size.
            self.inbox.pop_front();
            self.core.stats.overflowed += 1;
        }
    }
}

/// Which card has an address; not the asker's own, for which it asks to see whether another has it.
fn who(hub: &super::Hub, own: &Arc<Peer>, asked: IpAddr) -> Option<Mac> {
    let itself = match asked {
        IpAddr::V4(a) => a == Ipv4Addr::from(hub.address4(ITSELF)),
        IpAddr::V6(a) => a == hub.address6(ITSELF.into()) || a == local(),
    };
    if itself {
        return Some(hub.mac());
    }
    hub.peer(asked).filter(|peer| !Arc::ptr_eq(peer, own)).map(|peer| peer.mac)
}

/// The switch's link-local address.
fn local() -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, ITSELF.into())
}

impl NetBackend for SwitchPort {
    fn capabilities(&self) -> Capabilities {
        let tso = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6;
        Capabilities { to_host: tso, to_guest: tso }
    }

    fn negotiated(&mut self, agreed: Capabilities) {
        self.core.agreed = agreed;
        self.place.peer.queue.agree(agreed.to_guest);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.core.host.fd()
    }

    fn poll(&mut self) {
        self.core.host.tick();
        let mut events = [EpollEvent::default(); BATCH];
        let count = self.core.host.events(&mut events);
        for event in events.iter().take(count) {
            match Owner::of(event.data()) {
                Some(Owner::Timer) => self.core.host.clear_timer(),
                Some(Owner::Queue) => self.place.peer.queue.clear(),
                _ => {}
            }
        }
        while self.core.host.due().is_some() {
            self.router.on_timer(&mut self.core);
        }
        self.core.host.arm();
    }

    fn send(&mut self, frame: Frame<'_>) -> io::Result<()> {
        self.core.host.tick();
        let taken = self.take(frame);
        self.core.count(taken);
        self.core.host.arm();
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        self.core.waiting().or_else(|| self.look())
    }

    fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        let received = match self.core.waiting() {
            Some(_) => self.core.receive(buffer.memory(), buffer.pieces()),
            None => {
                let packet = self.look().and_then(|_| self.inbox.pop_front());
                packet
                    .and_then(|QueuedPacket { bytes, offload }| Some(Received { offload, ..buffer.copy_from(&bytes)? }))
            }
        };
        if let Some(received) = received {
            self.core.stats.received_frames += 1;
            self.core.stats.received_bytes += received.len as u64;
        }
        Ok(received)
    }
}
