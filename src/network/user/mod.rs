//! [`UserStack`]: a network without privileges. Owned by the network device, on the VM's event loop.
//!
//! The guest's connections end here, and ordinary sockets of the host go on.
//!
//! TCP is relayed, not buffered. What the host received stays in its socket until the guest has acknowledged it: it is
//! peeked at, straight into the guest's buffers. What the guest sends goes from its buffers straight into the socket.
//! That is one copy each way and a few hundred bytes for a connection, and each side's flow control is the other's.
//!
//! smoltcp plays the guest in tests, so that two independent implementations have to agree. ARCHITECTURE.md says why it
//! is not used here.

mod config;
pub(super) mod core;
mod datagrams;
pub(super) mod dhcp;
mod dns_tcp;
mod fragments;
pub(super) mod generational;
mod host;
pub(super) mod icmp;
pub(super) mod neighbour;
mod port_forward;
mod resolver;
mod tcp;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

pub(crate) use self::config::Config;
use self::config::Limits;
pub use self::config::{ConnectionLimit, NetStats};
use self::core::Core;
use self::datagrams::{Datagram, Datagrams, Payload};
use self::dns_tcp::DnsTcpClients;
use self::fragments::Fragments;
use self::generational::Owner;
use self::neighbour::Router;
use self::port_forward::PortForwards;
pub(crate) use self::port_forward::Published;
use self::resolver::{Requester, Resolver};
use self::tcp::{TcpFlows, TcpSegment};
use super::policy::{Cidr, Denial, Policy};
use super::wire::{self, AddressPair, IpPacket, PacketError};
use super::{Capabilities, Frame, NetBackend, Offload, Offloads, Received, RxBuffer};
use crate::error::{Context, Result};
use crate::memory::{GuestMemory, Segment};
use crate::sys::EpollEvent;

/// Events that are taken from the kernel at once, and how often in one turn.
const BATCH: usize = 64;
const BATCHES: usize = 4;
/// System calls of what is dear after which no more events are taken in a turn.
const CALLS: usize = 2000;

/// Where frames to the guest come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TxLane {
    Answers,
    Tcp,
    Datagrams,
}

/// The stack of one guest.
#[derive(Debug)]
pub(crate) struct UserStack {
    core: Core,
    router: Router,
    resolver: Resolver,
    clients: DnsTcpClients,
    tcp: TcpFlows,
    datagrams: Datagrams,
    fragments: Fragments,
    ports: PortForwards,
    /// Whose turn it is when both have something for the guest.
    datagrams_first: bool,
    /// Pieces of the frame that is being taken: kept for their room.
    payload: Vec<Segment>,
}

/// Whether an address is of none that stay on the guest's link.
fn is_beyond_link(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(a) if !a.is_unicast_link_local() && !a.is_multicast() && !a.is_unspecified())
}

impl UserStack {
    /// # Errors
    /// `InvalidConfig` for what cannot work; `ResourceExhausted` when the host has no more descriptors.
    pub(crate) fn new(config: Config) -> Result<Self> {
        config.check()?;
        let resolver = Resolver::new(config.resolvers.clone());
        let core = Core::new(config).doing(|| "making a user-mode network")?;
        Ok(Self {
            core,
            router: Router::default(),
            resolver,
            clients: DnsTcpClients::default(),
            tcp: TcpFlows::default(),
            datagrams: Datagrams::default(),
            fragments: Fragments::default(),
            ports: PortForwards::default(),
            datagrams_first: false,
            payload: Vec::new(),
        })
    }

    pub(crate) fn stats(&self) -> NetStats {
        NetStats {
            connections: self.tcp.len() as u64,
            datagram_flows: self.datagrams.len() as u64,
            backlog: self.tcp.backlog() as u64,
            ..self.core.stats
        }
    }

    /// Other limits from now on; `None` is what there is by default. Connections that there are stay.
    pub(crate) fn set_connection_limit(&mut self, limit: ConnectionLimit) {
        let connections = limit.open.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let new_connections = limit.new;
        let default = Limits::default();
        self.core.config.limits.connections = connections.unwrap_or(default.connections);
        self.core.limit_connects(new_connections);
    }

    /// Another policy from now on. Connections that it denies are reset.
    ///
    /// # Errors
    /// `InvalidConfig` for a policy with a rule that means nothing; the old one stays.
    pub(crate) fn set_policy(&mut self, policy: Policy) -> Result<()> {
        policy.check()?;
        self.core.policy.change(policy);
        self.tcp.recheck_policy(&mut self.core);
        self.datagrams.recheck_policy(&mut self.core);
        self.count_held();
        Ok(())
    }

    /// Leads connections to `host` to the guest's port; port 0 is any. Only callers of these ranges are accepted, or
    /// all when there are none. Returns where it listens.
    ///
    /// # Errors
    /// `ResourceBusy`, `PermissionDenied` or `InvalidConfig` when the host's port cannot be had; the message says what to do.
    pub(crate) fn publish_tcp(
        &mut self,
        host: SocketAddr,
        guest: u16,
        callers: Vec<Cidr>,
    ) -> Result<(Published, SocketAddr)> {
        self.ports.publish(&mut self.core, true, host, guest, callers)
    }

    /// As [`UserStack::publish_tcp`], for datagrams.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn publish_udp(
        &mut self,
        host: SocketAddr,
        guest: u16,
        callers: Vec<Cidr>,
    ) -> Result<(Published, SocketAddr)> {
        self.ports.publish(&mut self.core, false, host, guest, callers)
    }

    /// Closes a published port to new callers; existing connections stay. False: it was gone.
    pub(crate) fn unpublish(&mut self, published: Published) -> bool {
        self.datagrams.unpublished(&mut self.core, published.id());
        let was_there = self.ports.unpublish(&mut self.core, published);
        self.count_held();
        was_there
    }

    /// Takes what the policy has denied since this was last called. Of a flood some are only counted.
    pub(crate) fn take_denials(&mut self) -> std::vec::Drain<'_, Denial> {
        self.core.policy.take_denials()
    }

    /// System calls of what was done since this was last asked, of what is dear: the device charges its turn for them.
    pub(crate) fn take_calls(&mut self) -> usize {
        self.core.host.take_calls()
    }

    /// Descriptors that are here for the guest.
    fn held(&self) -> usize {
        self.tcp.len() + self.datagrams.sockets() + self.resolver.len() + self.clients.len()
    }

    /// Says what is held to the guest's other devices.
    fn count_held(&mut self) {
        let held = self.held();
        self.core.host.held.set(held);
    }

    fn take(&mut self, memory: &GuestMemory, frame: &[Segment], offload: Offload) -> Result<(), PacketError> {
        let mut head = [0; wire::HEADERS];
        let Some((ethernet, head)) = self.core.open(memory, frame, &mut head)? else { return Ok(()) };
        let len = frame.iter().map(|s| s.len()).sum::<usize>();
        let bytes = head.get(wire::ETHERNET..).unwrap_or_default();
        match ethernet.kind {
            wire::IPV4 | wire::IPV6 => {
                let packet = IpPacket::parse(ethernet.kind, bytes, len - wire::ETHERNET)?;
                self.packet(memory, frame, bytes, packet, offload)
            }
            wire::ARP => {
                let (gateway, mac) = (self.core.config.gateway4, self.core.config.gateway_mac);
                neighbour::arp(&mut self.core, bytes, |asked| (asked == gateway).then_some(mac));
                Ok(())
            }
            _ => {
                self.core.stats.unserved += 1;
                Ok(())
            }
        }
    }

    fn packet(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        bytes: &[u8],
        packet: IpPacket,
        offload: Offload,
    ) -> Result<(), PacketError> {
        let inner = bytes.get(packet.header..).unwrap_or_default();
        let at = wire::ETHERNET + packet.header;
        let addrs = AddressPair { src: packet.src, dst: packet.dst };
        if packet.fragment.is_some() {
            return self.fragment(memory, frame, at, packet);
        }
        let known = matches!(packet.protocol, wire::TCP | wire::UDP | wire::ICMP | wire::ICMPV6);
        if known && offload.csum.is_none() {
            self.core.verify(memory, frame, at, packet)?;
        }
        if !self.core.config.is_guest(packet.src) {
            // Who has no address yet, and what stays on the link.
            return self.unmatched(memory, frame, at, packet, inner);
        }
        if let IpAddr::V6(own) = packet.src {
            self.core.guest6 = Some(own);
        }
        match packet.protocol {
            wire::TCP => {
                let tcp = wire::Tcp::parse(inner, packet.len)?;
                return self.segment(memory, frame, at, packet, tcp);
            }
            wire::UDP => {
                let cut_up = offload.gso.map(|gso| usize::from(gso.size));
                let udp = wire::Udp::parse(inner, packet.len, cut_up.is_some())?;
                self.datagram(memory, frame, at, addrs, udp, cut_up)?;
            }
            wire::ICMP | wire::ICMPV6 => self.message(memory, frame, at, packet, inner)?,
            _ => self.core.stats.unserved += 1,
        }
        Ok(())
    }

    /// A fragment, which is `at` in the frame.
    fn fragment(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        at: usize,
        packet: IpPacket,
    ) -> Result<(), PacketError> {
        if !self.core.config.is_guest(packet.src) && !self.core.config.is_loopback(packet.src) {
            self.core.stats.spoofed += 1;
            return Ok(());
        }
        // TCP makes its segments as small as is needed.
        if !matches!(packet.protocol, wire::UDP | wire::ICMP | wire::ICMPV6) {
            return Err(PacketError::Fragment);
        }
        let now = self.core.host.now;
        let added = self.fragments.add(now, &packet, self.core.copy(memory, frame, at, packet.len)?);
        self.fragments.arm(&mut self.core);
        let Some(mut whole) = added? else { return Ok(()) };
        packet.verify(&whole)?;
        let addrs = AddressPair { src: packet.src, dst: packet.dst };
        if packet.protocol != wire::UDP {
            return self.icmp_message(addrs, packet.protocol, &mut whole);
        }
        let udp = wire::Udp::parse(&whole, whole.len(), false)?;
        let payload = Payload::Whole(whole.get(wire::UDP_HEADER..udp.len).unwrap_or_default());
        self.datagrams.datagram(&mut self.core, &mut self.ports, &Datagram { addrs, udp, cut: None, payload })
    }

    /// A segment of TCP, which is `at` in the frame.
    fn segment(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        at: usize,
        packet: IpPacket,
        tcp: wire::Tcp,
    ) -> Result<(), PacketError> {
        let addrs = AddressPair { src: packet.src, dst: packet.dst };
        cut(frame, at + tcp.header, packet.len - tcp.header, &mut self.payload);
        let segment = TcpSegment { addrs, tcp, len: packet.len - tcp.header, memory };
        if tcp.dst == resolver::PORT && self.core.config.is_gateway(addrs.dst) && self.tcp.opens_connection(&segment) {
            return self.connect_to_resolver(&segment);
        }
        self.tcp.segment(&mut self.core, &segment, &mut self.payload);
        self.ports.handle_inbound(&mut self.core, &mut self.tcp);
        Ok(())
    }

    fn unmatched(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        at: usize,
        packet: IpPacket,
        inner: &[u8],
    ) -> Result<(), PacketError> {
        match (packet.src, packet.protocol) {
            (IpAddr::V4(src), wire::UDP) if src.is_unspecified() => {
                let udp = wire::Udp::parse(inner, packet.len, false)?;
                if udp.dst == dhcp::SERVER {
                    return self.lease(memory, frame, at, udp);
                }
                self.core.stats.unserved += 1;
            }
            // What answers callers of published ports, and nothing else.
            (IpAddr::V4(src), wire::TCP) if src.is_loopback() => {
                let tcp = wire::Tcp::parse(inner, packet.len)?;
                if self.tcp.contains(AddressPair { src: packet.src, dst: packet.dst }, &tcp) {
                    return self.segment(memory, frame, at, packet, tcp);
                }
                self.core.stats.spoofed += 1;
            }
            (src, wire::UDP) if self.core.config.is_loopback(src) => {
                let udp = wire::Udp::parse(inner, packet.len, false)?;
                let addrs = AddressPair { src, dst: packet.dst };
                self.datagram(memory, frame, at, addrs, udp, None)?;
            }
            (src, wire::ICMP) if self.core.config.is_loopback(src) => {
                return self.message(memory, frame, at, packet, inner);
            }
            (IpAddr::V6(src), wire::ICMPV6) if src.is_unspecified() || src.is_unicast_link_local() => {
                return self.message(memory, frame, at, packet, inner);
            }
            // A link-local address reaches no host beyond the link: the guest has no other yet, and shall not wait.
            (IpAddr::V6(src), wire::TCP | wire::UDP) if src.is_unicast_link_local() && is_beyond_link(packet.dst) => {
                self.core.stats.unserved += 1;
                let len = (at - wire::ETHERNET + packet.len).min(48);
                let quoted = self.core.copy(memory, frame, wire::ETHERNET, len)?.to_vec();
                let addrs = AddressPair { src: packet.src, dst: packet.dst };
                icmp::unreachable(&mut self.core, icmp::Unreachable::BeyondScope, addrs, &quoted);
            }
            (IpAddr::V6(src), _) if src.is_unspecified() || src.is_unicast_link_local() => {
                self.core.stats.unserved += 1;
            }
            _ => self.core.stats.spoofed += 1,
        }
        Ok(())
    }

    /// A message to the DHCP server, whose UDP header is `at` in the frame.
    fn lease(&mut self, memory: &GuestMemory, frame: &[Segment], at: usize, udp: wire::Udp) -> Result<(), PacketError> {
        let len = udp.len - wire::UDP_HEADER;
        let bytes = self.core.copy(memory, frame, at + wire::UDP_HEADER, len)?.to_vec();
        dhcp::message(&mut self.core, &bytes);
        Ok(())
    }

    /// ICMP of either family.
    fn message(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        at: usize,
        packet: IpPacket,
        inner: &[u8],
    ) -> Result<(), PacketError> {
        if packet.src.is_ipv6() && packet.protocol == wire::ICMPV6 {
            let config = &self.core.config;
            let (gateways, mac) = ([config.gateway6, config.gateway_local()], config.gateway_mac);
            let who = |asked: Ipv6Addr| gateways.contains(&asked).then_some(mac);
            if self.router.message(&mut self.core, packet, inner, who) {
                return Ok(());
            }
        }
        let mut message = self.core.copy(memory, frame, at, packet.len)?.to_vec();
        self.icmp_message(AddressPair { src: packet.src, dst: packet.dst }, packet.protocol, &mut message)
    }

    /// Takes a message that asks for an echo, or reports a port without a listener.
    fn icmp_message(&mut self, addrs: AddressPair, protocol: u8, message: &mut [u8]) -> Result<(), PacketError> {
        let six = addrs.src.is_ipv6();
        if six != (protocol == wire::ICMPV6) {
            return Err(PacketError::Malformed);
        }
        let echo = if six { icmp::ECHO6 } else { icmp::ECHO };
        if let Some(sent) = icmp::port_unreachable(six, message) {
            return self.datagrams.refused(&mut self.core, &mut self.ports, sent);
        }
        match message.first() {
            Some(_) if self.core.config.is_loopback(addrs.src) => self.core.stats.spoofed += 1,
            Some(kind) if *kind == echo && self.core.config.is_gateway(addrs.dst) => {
                icmp::echo(&mut self.core, addrs, message);
            }
            // Only from an address that others can answer.
            Some(kind) if *kind == echo && self.core.config.is_guest(addrs.src) => {
                self.datagrams.ping(&mut self.core, addrs, message);
            }
            _ => self.core.stats.unserved += 1,
        }
        Ok(())
    }

    fn datagram(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        at: usize,
        addrs: AddressPair,
        udp: wire::Udp,
        cut_up: Option<usize>,
    ) -> Result<(), PacketError> {
        let guest = self.core.config.is_guest(addrs.src);
        if guest && udp.dst == dhcp::SERVER && self.core.config.is_server(addrs.dst) {
            return self.lease(memory, frame, at, udp);
        }
        let at = at + wire::UDP_HEADER;
        let len = udp.len - wire::UDP_HEADER;
        if guest && udp.dst == resolver::PORT && self.core.config.is_gateway(addrs.dst) {
            let query = self.core.copy(memory, frame, at, len)?.to_vec();
            self.resolver.query(&mut self.core, Requester::Udp(addrs, udp.src), &query);
            return Ok(());
        }
        cut(frame, at, len, &mut self.payload);
        let payload = Payload::Guest(memory, &self.payload);
        let datagram = Datagram { addrs, udp, cut: cut_up, payload };
        self.datagrams.datagram(&mut self.core, &mut self.ports, &datagram)
    }

    /// The guest calls the gateway's resolver over TCP.
    fn connect_to_resolver(&mut self, segment: &TcpSegment<'_>) -> Result<(), PacketError> {
        let opened = self.clients.open(&mut self.core);
        self.tcp.connect_local(&mut self.core, segment, opened);
        Ok(())
    }

    /// Where the next frame to the guest comes from.
    fn tx_lane(&mut self) -> Option<TxLane> {
        if self.core.waiting().is_some() {
            return Some(TxLane::Answers);
        }
        let lanes =
            if self.datagrams_first { [TxLane::Datagrams, TxLane::Tcp] } else { [TxLane::Tcp, TxLane::Datagrams] };
        let found = lanes.into_iter().find(|lane| match lane {
            TxLane::Datagrams => self.datagrams.next(&mut self.core, &self.ports).is_some(),
            _ => self.tcp.next(&mut self.core).is_some(),
        });
        found.or_else(|| self.core.waiting().map(|_| TxLane::Answers))
    }

    fn on_event(&mut self, owner: Owner, events: crate::sys::EventSet) {
        self.count_held();
        match owner {
            Owner::Timer => self.core.host.clear_timer(),
            Owner::Tcp(id) => self.tcp.ready(&mut self.core, id, events),
            Owner::Resolver(id) => self.resolver.ready(&mut self.core, id, events),
            Owner::Client(id) => self.clients.ready(&mut self.core, &mut self.resolver, id),
            Owner::Udp(id) => self.datagrams.ready(id),
            Owner::Listener(id) if self.ports.is_datagram(id) => self.datagrams.ready_port(id),
            Owner::Listener(id) => self.ports.accept(&mut self.core, &mut self.tcp, id),
            Owner::Router | Owner::Fragments | Owner::Queue => {}
        }
    }
}

/// The pieces of `frame` that hold `len` bytes from `skip` on.
fn cut(frame: &[Segment], mut skip: usize, mut len: usize, to: &mut Vec<Segment>) {
    to.clear();
    for segment in frame {
        let (skipped, rest) = segment.split_at(skip);
        skip -= skipped.len();
        let (now, _) = rest.split_at(len);
        len -= now.len();
        if now.len() > 0 {
            to.push(now);
        }
    }
}

impl NetBackend for UserStack {
    fn capabilities(&self) -> Capabilities {
        let tso = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6;
        Capabilities { to_host: tso | Offloads::USO, to_guest: tso }
    }

    fn negotiated(&mut self, agreed: Capabilities) {
        self.core.agreed = agreed;
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.core.host.fd()
    }

    fn poll(&mut self) {
        self.core.host.tick();
        let mut events = [EpollEvent::default(); BATCH];
        for _ in 0..BATCHES {
            let count = self.core.host.events(&mut events);
            for event in events.iter().take(count) {
                if let Some(owner) = Owner::of(event.data()) {
                    self.on_event(owner, event.event_set());
                }
            }
            if count < BATCH || self.core.host.syscalls > CALLS {
                break;
            }
        }
        for _ in 0..BATCH * BATCHES {
            match self.core.host.due() {
                Some(Owner::Tcp(id)) => self.tcp.on_timer(&mut self.core, id),
                Some(Owner::Router) => self.router.on_timer(&mut self.core),
                Some(Owner::Fragments) => self.fragments.on_timer(&mut self.core),
                Some(Owner::Resolver(id)) => {
                    self.count_held();
                    self.resolver.on_timer(&mut self.core, id);
                }
                Some(Owner::Client(id)) => self.clients.on_timer(&mut self.core, id),
                Some(Owner::Udp(id)) => self.datagrams.on_timer(&mut self.core, id),
                Some(Owner::Listener(id)) => self.ports.on_timer(&mut self.core, id),
                Some(Owner::Timer | Owner::Queue) => {}
                None => break,
            }
        }
        self.ports.handle_inbound(&mut self.core, &mut self.tcp);
        self.clients.answered(&mut self.core, &mut self.resolver);
        // What was closed is another device's from now on.
        self.count_held();
        self.core.host.arm();
    }

    fn send(&mut self, frame: Frame<'_>) -> io::Result<()> {
        self.core.host.tick();
        self.count_held();
        let taken = self.take(frame.memory(), frame.pieces(), frame.offload());
        self.core.count(taken);
        self.count_held();
        self.core.host.arm();
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        let lane = self.tx_lane();
        // Looking for one may have made an answer to the guest, which goes before it.
        self.core.waiting().or(match lane? {
            TxLane::Answers => None,
            TxLane::Datagrams => self.datagrams.next(&mut self.core, &self.ports),
            TxLane::Tcp => self.tcp.next(&mut self.core),
        })
    }

    fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        let (memory, room) = (buffer.memory(), buffer.pieces());
        let lane = self.tx_lane();
        let received = match if self.core.waiting().is_some() { Some(TxLane::Answers) } else { lane } {
            Some(TxLane::Answers) => self.core.receive(memory, room),
            Some(TxLane::Datagrams) => self.datagrams.receive(memory, room),
            Some(TxLane::Tcp) => self.tcp.receive(&mut self.core, memory, room),
            None => None,
        };
        self.datagrams_first = lane == Some(TxLane::Tcp);
        if let Some(received) = received {
            self.core.stats.received_frames += 1;
            self.core.stats.received_bytes += received.len as u64;
        }
        // A flow may have ended with it.
        self.count_held();
        self.core.host.arm();
        Ok(received)
    }
}

/// For those who knock.
#[cfg(any(test, feature = "internals"))]
impl UserStack {
    /// Makes no socket from now on, and remembers where they would have gone.
    pub(super) fn pretend(&mut self) {
        self.core.host.pretended = Some(Vec::new());
    }

    /// Where sockets would have gone since this was last asked.
    pub(super) fn pretended(&mut self) -> Vec<(crate::sys::SocketKind, SocketAddr)> {
        self.core.host.pretended.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Time passes.
    pub(super) fn advance(&mut self, by: std::time::Duration) {
        self.core.host.advance(by);
        self.poll();
    }
}
