//! [`Datagrams`]: UDP flows and pings of a guest. Each has a socket of the host, connected to the one peer it has, or shares
//! the one of a published port.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Instant;

use super::core::{Core, Initiator, put};
use super::generational::{GenerationalMap, Id, Owner};
use super::host::{TimerEntry, exhausted};
use super::icmp::{self, Unreachable};
use super::port_forward::PortForwards;
use super::tcp::{TriedAddresses, gateway_of};
use crate::memory::{GuestMemory, Segment};
use crate::network::policy::Protocol;
use crate::network::wire::{self, AddressPair, FrameBuilder, IpEndpoint, IpPacket, PacketError};
use crate::network::{Csum, MAX_UDP_SEGMENTS, Offload, Offloads, Received};
use crate::sys::Socket;

/// What a flow is found by. A ping's ports are its identifier and nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct DatagramKey {
    protocol: Protocol,
    guest: IpEndpoint,
    remote: IpEndpoint,
}

/// How a flow leaves.
#[derive(Debug)]
enum Via {
    Socket(Socket),
    /// A client on the host has sent to a published port.
    Port {
        port: Id,
        client: SocketAddr,
        tried: TriedAddresses,
    },
}

#[derive(Debug)]
struct DatagramFlow {
    key: DatagramKey,
    via: Via,
    active: Instant,
    /// When it was active, as far as its [`IdleOrder`] knows: not later.
    listed: Instant,
    timer: TimerEntry,
    queued: bool,
}

/// Flows by when they were active, or earlier: what moves on with every packet is written down when it matters.
type IdleOrder = BTreeSet<(Instant, Id)>;

/// Where a datagram for the guest may have arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DatagramSource {
    Flow(Id),
    Port(Id),
}

/// The next frame to the guest, with its headers.
#[derive(Debug, Default)]
struct Staged {
    frame: Vec<u8>,
    offload: Offload,
    full: bool,
}

#[derive(Debug, Default)]
pub(super) struct Datagrams {
    flows: GenerationalMap<DatagramFlow>,
    names: HashMap<DatagramKey, Id>,
    /// Flows of published ports, by port and client.
    clients: HashMap<(Id, SocketAddr), Id>,
    /// Of those that the guest has begun, and of the clients'.
    idle: [IdleOrder; 2],
    ready: VecDeque<DatagramSource>,
    staged: Staged,
    port: u16,
}

/// A datagram of the guest.
#[derive(Debug)]
pub(super) struct Datagram<'a> {
    pub addrs: AddressPair,
    pub udp: wire::Udp,
    /// Bytes of each, where it stands for several.
    pub cut: Option<usize>,
    pub payload: Payload<'a>,
}

/// The bytes of a datagram.
#[derive(Debug)]
pub(super) enum Payload<'a> {
    /// Where they are in the guest's memory.
    Guest(&'a GuestMemory, &'a [Segment]),
    /// They came in pieces and were put together.
    Whole(&'a [u8]),
}

/// Ports that clients of published ports seem to come from (RFC 6335, 6).
const EPHEMERAL: u16 = 49152;

/// The next port of those.
pub(super) fn ephemeral(port: &mut u16) -> u16 {
    *port = port.checked_add(1).filter(|port| *port >= EPHEMERAL).unwrap_or(EPHEMERAL);
    *port
}

impl DatagramFlow {
    fn initiator(&self) -> Initiator {
        match self.via {
            Via::Socket(_) => Initiator::Guest,
            Via::Port { .. } => Initiator::Client,
        }
    }
}

impl Datagrams {
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    /// Those that have a socket of their own.
    pub(super) fn sockets(&self) -> usize {
        self.flows.len().saturating_sub(self.clients.len())
    }

    fn idle_order(&mut self, initiator: Initiator) -> &mut IdleOrder {
        let [guests, clients] = &mut self.idle;
        if initiator == Initiator::Guest { guests } else { clients }
    }

    /// The one that was idle for longest. Amortized over the packets since: each flow moves once for those it had.
    fn idlest(&mut self, initiator: Initiator) -> Option<Id> {
        loop {
            let (listed, id) = self.idle_order(initiator).pop_first()?;
            let Some(flow) = self.flows.get_mut(id) else { continue };
            let active = flow.active;
            flow.listed = active;
            self.idle_order(initiator).insert((active, id));
            if active == listed {
                return Some(id);
            }
        }
    }

    /// Takes a datagram of the guest.
    pub(super) fn datagram(
        &mut self,
        core: &mut Core,
        ports: &mut PortForwards,
        it: &Datagram<'_>,
    ) -> Result<(), PacketError> {
        let (guest, remote) = (IpEndpoint::new(it.addrs.src, it.udp.src), IpEndpoint::new(it.addrs.dst, it.udp.dst));
        let key = DatagramKey { protocol: Protocol::Udp, guest, remote };
        // From its loopback it answers, and nothing else.
        if core.config.is_loopback(guest.addr) && !self.names.contains_key(&key) {
            core.stats.spoofed += 1;
            return Ok(());
        }
        let Some(id) = self.flow(core, key) else { return Ok(()) };
        let Some(flow) = self.flows.get_mut(id) else { return Ok(()) };
        if let Via::Port { port, .. } = flow.via {
            ports.remember_address(port, guest.addr);
        }
        let len = it.udp.len - wire::UDP_HEADER;
        let size = it.cut.unwrap_or(len).max(1);
        if len.div_ceil(size) > MAX_UDP_SEGMENTS {
            return Err(PacketError::Malformed);
        }
        let (mut at, mut piece) = (0, Vec::new());
        loop {
            let end = len.min(at + size);
            if let Payload::Guest(_, payload) = it.payload {
                super::cut(payload, at, end - at, &mut piece);
            }
            let sent = match (&flow.via, &it.payload) {
                (Via::Socket(socket), payload) => {
                    let send = || match payload {
                        Payload::Guest(memory, _) => memory.send(&piece, socket.as_fd()),
                        Payload::Whole(bytes) => socket.send(bytes.get(at..end).unwrap_or_default()),
                    };
                    match send() {
                        // The error is of an earlier datagram (udp(7)).
                        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => send(),
                        sent => sent,
                    }
                }
                (Via::Port { port, client, .. }, Payload::Guest(memory, _)) => {
                    ports.send(*port, *client, core.copy(memory, &piece, 0, end - at)?)
                }
                (Via::Port { port, client, .. }, Payload::Whole(bytes)) => {
                    ports.send(*port, *client, bytes.get(at..end).unwrap_or_default())
                }
            };
            if let Err(error) = sent {
                failed(core, &flow.key, &error);
            }
            at += size;
            if at >= len {
                return Ok(());
            }
        }
    }

    /// Takes an echo request of the guest to a host outside.
    pub(super) fn ping(&mut self, core: &mut Core, addrs: AddressPair, message: &mut [u8]) {
        let Some([_, _, _, _, a, b]) = message.first_chunk::<6>() else { return };
        let guest = IpEndpoint::new(addrs.src, u16::from_be_bytes([*a, *b]));
        let key = DatagramKey { protocol: Protocol::Ping, guest, remote: IpEndpoint::new(addrs.dst, 0) };
        let Some(id) = self.flow(core, key) else { return };
        if let Some(DatagramFlow { via: Via::Socket(socket), key, .. }) = self.flows.get_mut(id)
            && let Err(error) = socket.send(message)
        {
            failed(core, key, &error);
        }
    }

    /// The flow of that name, which is made if the policy admits it.
    fn flow(&mut self, core: &mut Core, key: DatagramKey) -> Option<Id> {
        let now = core.host.now;
        if let Some(flow) = self.names.get(&key).and_then(|id| self.flows.get_mut(*id)) {
            flow.active = now;
            return self.names.get(&key).copied();
        }
        let to = SocketAddr::from(key.remote);
        if core.config.is_gateway(to.ip()) || key.protocol == Protocol::Udp && (to.port() == 0 || key.guest.port == 0) {
            failed(core, &key, &io::ErrorKind::ConnectionRefused.into());
            return None;
        }
        let Some(admitted) = core.admit(key.protocol, to) else {
            failed(core, &key, &io::ErrorKind::PermissionDenied.into());
            return None;
        };
        self.make_room(core, Initiator::Guest);
        match core.host.connect(&admitted) {
            Ok(socket) => self.insert(core, key, Via::Socket(socket)),
            Err(error) if exhausted(&error) => {
                core.stats.limited += 1;
                core.refused(key.protocol, to);
                failed(core, &key, &error);
                None
            }
            Err(error) => {
                core.stats.unconnected += 1;
                failed(core, &key, &error);
                None
            }
        }
    }

    /// The one that was idle for longest makes room: of those that the guest has begun, or of the clients of published ports.
    /// So clients, who cost nothing but an address, end nothing of the guest's.
    fn make_room(&mut self, core: &mut Core, initiator: Initiator) {
        if self.idle_order(initiator).len() >= core.config.limits.datagram_flows.max(1)
            && let Some(id) = self.idlest(initiator)
        {
            self.remove(core, id);
        }
    }

    fn insert(&mut self, core: &mut Core, key: DatagramKey, via: Via) -> Option<Id> {
        let (now, timer) = (core.host.now, TimerEntry::default());
        let id = self.flows.insert(DatagramFlow { key, via, active: now, listed: now, timer, queued: false });
        let flow = self.flows.get_mut(id)?;
        if let Via::Socket(socket) = &flow.via
            && let Err(error) = core.host.watch(socket.as_fd(), Owner::Udp(id))
        {
            log::debug!("a flow is not watched: {error}");
            core.stats.limited += 1;
            self.flows.remove(id);
            return None;
        }
        core.host.set_timer(&mut flow.timer, Owner::Udp(id), Some(now + core.config.limits.datagram_idle));
        let initiator = flow.initiator();
        self.names.insert(key, id);
        self.idle_order(initiator).insert((now, id));
        Some(id)
    }

    fn remove(&mut self, core: &mut Core, id: Id) {
        let Some(mut flow) = self.flows.remove(id) else { return };
        core.host.cancel_timer(&mut flow.timer, Owner::Udp(id));
        self.names.remove(&flow.key);
        self.idle_order(flow.initiator()).remove(&(flow.listed, id));
        if let Via::Port { port, client, .. } = flow.via {
            self.clients.remove(&(port, client));
        }
    }

    /// A flow's timer has fired.
    pub(super) fn on_timer(&mut self, core: &mut Core, id: Id) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.timer.fired();
        let end = flow.active + core.config.limits.datagram_idle;
        if end <= core.host.now {
            core.stats.timed_out += 1;
            return self.remove(core, id);
        }
        core.host.set_timer(&mut flow.timer, Owner::Udp(id), Some(end));
    }

    /// Forgets what the policy no longer allows.
    pub(super) fn recheck_policy(&mut self, core: &mut Core) {
        let denied = |flow: &DatagramFlow| {
            let to = SocketAddr::from(flow.key.remote);
            matches!(flow.via, Via::Socket(_)) && !core.allows(flow.key.protocol, to)
        };
        let gone: Vec<Id> = self.flows.iter().filter(|(_, flow)| denied(flow)).map(|(id, _)| id).collect();
        for id in gone {
            self.remove(core, id);
        }
        self.staged.full = false;
    }

    /// A published port is gone.
    pub(super) fn unpublished(&mut self, core: &mut Core, port: Id) {
        let of = |flow: &DatagramFlow| matches!(flow.via, Via::Port { port: its, .. } if its == port);
        let gone: Vec<Id> = self.flows.iter().filter(|(_, flow)| of(flow)).map(|(id, _)| id).collect();
        for id in gone {
            self.remove(core, id);
        }
    }

    /// Something may have come for a flow.
    pub(super) fn ready(&mut self, id: Id) {
        if let Some(flow) = self.flows.get_mut(id).filter(|flow| !flow.queued) {
            flow.queued = true;
            self.ready.push_back(DatagramSource::Flow(id));
        }
    }

    /// Something may have come to a published port.
    pub(super) fn ready_port(&mut self, id: Id) {
        if !self.ready.contains(&DatagramSource::Port(id)) {
            self.ready.push_back(DatagramSource::Port(id));
        }
    }

    /// How many bytes the next frame has.
    pub(super) fn next(&mut self, core: &mut Core, ports: &PortForwards) -> Option<usize> {
        let mut buffer = std::mem::take(&mut core.buffer);
        // What was made into frames that wait goes first.
        while let Some(&source) = self.ready.front().filter(|_| !self.staged.full && core.waiting().is_none()) {
            buffer.resize(wire::MAX_PACKET, 0);
            let more = match source {
                DatagramSource::Flow(id) => self.take_of_flow(core, id, &mut buffer),
                DatagramSource::Port(id) => self.take_of_port(core, ports, id, &mut buffer),
            };
            self.ready.pop_front();
            match (more, source) {
                // Each in its turn.
                (true, source) => self.ready.push_back(source),
                (false, DatagramSource::Flow(id)) => {
                    if let Some(flow) = self.flows.get_mut(id) {
                        flow.queued = false;
                    }
                }
                (false, DatagramSource::Port(_)) => {}
            }
        }
        core.buffer = buffer;
        self.staged.full.then_some(self.staged.frame.len())
    }

    /// Takes the next datagram of a flow. False: there are no more.
    fn take_of_flow(&mut self, core: &mut Core, id: Id, buffer: &mut [u8]) -> bool {
        let Some(flow) = self.flows.get_mut(id) else { return false };
        let Via::Socket(socket) = &flow.via else { return false };
        match socket.receive(buffer) {
            Ok(n) => {
                flow.active = core.host.now;
                let key = flow.key;
                self.stage(core, &key, buffer.get_mut(..n).unwrap_or_default());
                true
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                failed(core, &flow.key, &error);
                true
            }
        }
    }

    /// Takes the next datagram of a published port. False: there are no more.
    fn take_of_port(&mut self, core: &mut Core, ports: &PortForwards, id: Id, buffer: &mut [u8]) -> bool {
        let (n, client, guest_port) = match ports.receive(id, buffer) {
            Ok(Some(found)) => found,
            Ok(None) => return true,
            Err(error) => return error.kind() != io::ErrorKind::WouldBlock && ports.is_there(id),
        };
        let known = self.clients.get(&(id, client)).copied();
        let flow = known.or_else(|| {
            self.make_room(core, Initiator::Client);
            let mut tried = TriedAddresses::default();
            let address = ports.next_address(core, id, &mut tried)?;
            let (guest, gateway) = (IpEndpoint::new(address, guest_port), gateway_of(core, address));
            let free = (0..=u16::MAX - EPHEMERAL).find_map(|_| {
                let remote = IpEndpoint::new(gateway, ephemeral(&mut self.port));
                let key = DatagramKey { protocol: Protocol::Udp, guest, remote };
                (!self.names.contains_key(&key)).then_some(key)
            })?;
            let it = self.insert(core, free, Via::Port { port: id, client, tried })?;
            self.clients.insert((id, client), it);
            Some(it)
        });
        if let Some(flow) = flow.and_then(|flow| self.flows.get_mut(flow)) {
            flow.active = core.host.now;
            let key = flow.key;
            self.stage(core, &key, buffer.get_mut(..n).unwrap_or_default());
        }
        true
    }

    /// Sends a datagram to the next address, after the guest has reported no listener. `packet` is what was sent, or its
    /// front.
    pub(super) fn refused(
        &mut self,
        core: &mut Core,
        ports: &mut PortForwards,
        packet: &[u8],
    ) -> Result<(), PacketError> {
        let kind = if packet.first().is_some_and(|byte| byte >> 4 == 6) { wire::IPV6 } else { wire::IPV4 };
        let parsed = IpPacket::parse(kind, packet, usize::MAX)?;
        let inner = packet.get(parsed.header..).unwrap_or_default();
        let udp = wire::Udp::parse(inner, parsed.len, false)?;
        let (guest, remote) = (IpEndpoint::new(parsed.dst, udp.dst), IpEndpoint::new(parsed.src, udp.src));
        let key = DatagramKey { protocol: Protocol::Udp, guest, remote };
        let id = self.names.get(&key).copied().filter(|_| parsed.protocol == wire::UDP && parsed.fragment.is_none());
        let Some((id, flow)) = id.and_then(|id| Some((id, self.flows.get_mut(id)?))) else { return Ok(()) };
        let Via::Port { port, tried, .. } = &mut flow.via else { return Ok(()) };
        let next = ports.next_address(core, *port, tried).map(|address| DatagramKey {
            guest: IpEndpoint::new(address, key.guest.port),
            remote: IpEndpoint::new(gateway_of(core, address), key.remote.port),
            ..key
        });
        let Some(next) = next.filter(|next| !self.names.contains_key(next)) else {
            core.stats.unconnected += 1;
            ports.forget_address(*port);
            self.remove(core, id);
            return Ok(());
        };
        flow.key = next;
        self.names.remove(&key);
        self.names.insert(next, id);
        // The guest sends back as much as would fit into the smallest packet; more is lost, as datagrams may be.
        if let Some(payload) = inner.get(wire::UDP_HEADER..udp.len) {
            let addrs = AddressPair { src: next.remote.addr, dst: next.guest.addr };
            core.send_udp(addrs, wire::UdpPorts { src: next.remote.port, dst: next.guest.port }, payload);
        }
        Ok(())
    }

    /// Makes a frame of what came; several, among those that wait for the guest, of what is too large for one.
    fn stage(&mut self, core: &mut Core, key: &DatagramKey, payload: &mut [u8]) {
        let n = payload.len();
        let addrs = AddressPair { src: key.remote.addr, dst: key.guest.addr };
        if key.protocol != Protocol::Udp {
            // The host's number of the socket takes the place of the guest's.
            let Some(number) = payload.get_mut(4..6) else { return };
            number.copy_from_slice(&key.guest.port.to_be_bytes());
            return core.send_icmp(addrs, payload);
        }
        let (header, len) = (wire::ip_header_len(addrs.src), wire::UDP_HEADER + n);
        if header + len > usize::from(core.config.mtu) {
            return core.send_udp(addrs, wire::UdpPorts { src: key.remote.port, dst: key.guest.port }, payload);
        }
        let inner = wire::ETHERNET + header;
        let mut head = FrameBuilder::ip(core.macs(), addrs, wire::UDP, len);
        let mut offload = Offload::default();
        head.udp(key.remote.port, key.guest.port, n);
        let sum = wire::pseudo(addrs.src, addrs.dst, wire::UDP, len);
        if core.agreed.to_guest.contains(Offloads::CSUM) {
            head.set16(inner + 6, wire::fold(sum));
            offload.csum = Some(Csum { start: inner as u16, offset: 6 });
        } else {
            head.set16(inner + 6, wire::udp_check(sum + wire::sum(head.from(inner)) + wire::sum(payload)));
        }
        let staged = &mut self.staged;
        staged.frame.clear();
        staged.frame.extend_from_slice(head.as_slice());
        staged.frame.extend_from_slice(payload);
        (staged.offload, staged.full) = (offload, true);
    }

    /// Hands out what [`Datagrams::next`] has found.
    pub(super) fn receive(&mut self, memory: &GuestMemory, room: &[Segment]) -> Option<Received> {
        if !std::mem::take(&mut self.staged.full) {
            return None;
        }
        let (frame, offload) = (&self.staged.frame, self.staged.offload);
        put(memory, room, frame).then_some(Received { len: frame.len(), offload })
    }
}

/// Tells the guest what became of its datagram, where a network would.
fn failed(core: &mut Core, key: &DatagramKey, error: &io::Error) {
    let why = match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::WouldBlock, _) => return,
        (_, Some(libc::EMSGSIZE)) => Unreachable::TooBig(core.config.mtu.min(1500)),
        (kind, _) => Unreachable::of(kind),
    };
    let addrs = AddressPair { src: key.guest.addr, dst: key.remote.addr };
    // Never about what went to many (RFC 1122, 3.2.2; RFC 4443, 2.4).
    if addrs.dst.is_multicast() || addrs.dst == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return;
    }
    let mut head = FrameBuilder::ip(core.macs(), addrs, wire::UDP, wire::UDP_HEADER);
    match key.protocol {
        Protocol::Ping => {
            let (protocol, echo) =
                if addrs.src.is_ipv4() { (wire::ICMP, icmp::ECHO) } else { (wire::ICMPV6, icmp::ECHO6) };
            head = FrameBuilder::ip(core.macs(), addrs, protocol, 8);
            // Type, code and checksum; the number of the one who asked.
            head.udp(u16::from(echo) << 8, 0, 0);
            head.set16(head.len() - 4, key.guest.port);
        }
        _ => head.udp(key.guest.port, key.remote.port, 0),
    }
    icmp::unreachable(core, why, addrs, head.from(wire::ETHERNET));
}
