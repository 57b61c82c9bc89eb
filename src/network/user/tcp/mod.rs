//! [`TcpFlows`]: all TCP connections of a guest, found by their ends, served in turn.

mod flow;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

pub(super) use self::flow::FlowKey;
use self::flow::{FlowOutcome, TcpFlow, TcpState, Transmit};
use super::core::{Core, Initiator, put};
use super::generational::{GenerationalMap, Id, Owner};
use super::host::exhausted;
use super::icmp::{self, Unreachable};
use crate::memory::{GuestMemory, Segment as Piece};
use crate::network::policy::{Admitted, Protocol};
use crate::network::wire::{self, ACK, AddressPair, FIN, FrameBuilder, RST, SYN, Tcp};
use crate::network::{Csum, Gso, GsoKind, Offload, Received};
use crate::sys::{self, EventSet, Socket};

/// The largest receive window: what a guest may send on a connection before the host has taken it.
const MAX_RCV_WND: u32 = 512 << 10;

/// What an idle connection takes, but for its name and its sockets.
#[cfg(test)]
pub(super) const FLOW_SIZE: usize = size_of::<TcpFlow>();

/// A segment of the guest.
#[derive(Debug)]
pub(super) struct TcpSegment<'a> {
    pub addrs: AddressPair,
    pub tcp: Tcp,
    /// Bytes of data.
    pub len: usize,
    pub memory: &'a GuestMemory,
}

/// Which of the guest's addresses were tried for a service, by their numbers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TriedAddresses(u8);

impl TriedAddresses {
    pub(super) fn contains(self, number: u8) -> bool {
        self.0 & 1 << number != 0
    }

    pub(super) fn insert(&mut self, number: u8) {
        self.0 |= 1 << number;
    }
}

/// The published port that a connection came through, and where its service was looked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct InboundPort {
    pub id: Id,
    pub tried: TriedAddresses,
}

/// A client on the host that connects to the guest through a published port.
#[derive(Debug)]
pub(super) struct InboundConn {
    pub port: InboundPort,
    pub socket: Socket,
}

/// The result of connecting to the guest.
#[derive(Debug)]
pub(super) enum InboundResult {
    /// A listener is at this address.
    Connected(Id, IpAddr),
    /// No listener is there.
    Refused(InboundConn),
    /// No answer came.
    TimedOut(Id),
}

/// What [`TcpFlows::next`] has promised.
#[derive(Debug, Clone, Copy)]
struct PlannedSegment {
    id: Id,
    transmit: Transmit,
}

/// The connections. Each packet costs the same however many there are.
#[derive(Debug, Default)]
pub(super) struct TcpFlows {
    flows: GenerationalMap<Box<TcpFlow>>,
    by_key: HashMap<FlowKey, Id>,
    /// Those that may have something to send.
    ready: VecDeque<Id>,
    /// Those in TIME-WAIT, the oldest first, that guest and clients have opened; some are gone.
    time_wait: [VecDeque<Id>; 2],
    /// How many came through published ports.
    inbound: usize,
    planned: Option<PlannedSegment>,
    /// For the published ports, taken after each event.
    pub inbound_results: Vec<InboundResult>,
    /// Bytes in all flows' backlogs.
    backlog: usize,
    pieces: Vec<Piece>,
    #[cfg(test)]
    pub without_peek_off: bool,
}

impl TcpFlows {
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    pub(super) fn backlog(&self) -> usize {
        self.backlog
    }

    /// Takes a segment of the guest, whose data is `payload`.
    pub(super) fn segment(&mut self, core: &mut Core, segment: &TcpSegment<'_>, payload: &mut Vec<Piece>) {
        let (addrs, tcp) = (segment.addrs, &segment.tcp);
        let key = FlowKey::of_guest(addrs, tcp);
        let opens = tcp.flags & (SYN | ACK | RST | FIN) == SYN;
        self.planned = None;
        let known = self.by_key.get(&key).copied();
        let Some(id) = known.filter(|id| !(opens && self.is_time_wait(*id))) else {
            if let Some(id) = known {
                self.remove(core, id);
            }
            return if opens { self.connect_to_host(core, key, tcp) } else { reset_unmatched(core, segment) };
        };
        let budget = core.config.limits.backlog.saturating_sub(self.backlog);
        let Some(flow) = self.flows.get_mut(id) else { return };
        let before = flow.backlog();
        let syn_sent = flow.state == TcpState::SynSent;
        let outcome = flow.segment(core, segment, payload, budget);
        if let (true, TcpState::Established, Some(port)) = (syn_sent, flow.state, flow.inbound) {
            self.inbound_results.push(InboundResult::Connected(port.id, key.guest.addr));
        }
        self.backlog = self.backlog + flow.backlog() - before;
        self.apply(core, id, outcome);
    }

    /// Whether it is of a connection that there is.
    pub(super) fn contains(&self, addrs: AddressPair, tcp: &Tcp) -> bool {
        self.by_key.contains_key(&FlowKey::of_guest(addrs, tcp))
    }

    /// Returns whether it opens a new connection.
    pub(super) fn opens_connection(&mut self, segment: &TcpSegment<'_>) -> bool {
        let (addrs, tcp) = (segment.addrs, &segment.tcp);
        let key = FlowKey::of_guest(addrs, tcp);
        let known = self.by_key.get(&key).copied();
        tcp.flags & (SYN | ACK | RST | FIN) == SYN && known.is_none_or(|id| self.is_time_wait(id))
    }

    /// Connects the guest to a service in this process, whose `socket` is connected already.
    pub(super) fn connect_local(&mut self, core: &mut Core, segment: &TcpSegment<'_>, socket: io::Result<Socket>) {
        let (addrs, syn) = (segment.addrs, &segment.tcp);
        let key = FlowKey::of_guest(addrs, syn);
        self.planned = None;
        if let Some(id) = self.by_key.get(&key).copied() {
            self.remove(core, id);
        }
        if !self.make_room(core, Initiator::Guest) {
            core.stats.limited += 1;
            return;
        }
        let made = socket.and_then(|socket| self.insert(core, key, socket, TcpState::SynReceived, Some(syn)));
        if let Err(error) = made {
            log::debug!("the resolver cannot be reached: {error}");
            core.stats.limited += 1;
            core.send_reset(key, syn);
        }
    }

    fn is_time_wait(&mut self, id: Id) -> bool {
        self.flows.get_mut(id).is_some_and(|flow| flow.state == TcpState::TimeWait)
    }

    /// Connects the guest to a peer outside.
    fn connect_to_host(&mut self, core: &mut Core, key: FlowKey, syn: &Tcp) {
        let to = SocketAddr::from(key.remote);
        if core.config.is_gateway(to.ip()) || to.port() == 0 {
            return core.send_reset(key, syn);
        }
        if !core.may_connect() || !self.make_room(core, Initiator::Guest) {
            core.stats.limited += 1;
            // No answer, so the guest tries again later.
            return;
        }
        let Some(admitted) = core.admit(Protocol::Tcp, to) else {
            return core.send_reset(key, syn);
        };
        match connect(core, &admitted) {
            Ok(socket) => {
                if let Err(error) = self.insert(core, key, socket, TcpState::HostConnecting, Some(syn)) {
                    log::debug!("a connection is not watched: {error}");
                    core.stats.limited += 1;
                }
            }
            Err(error) if exhausted(&error) => {
                core.stats.limited += 1;
                core.refused(Protocol::Tcp, to);
                core.send_reset(key, syn);
            }
            Err(error) => {
                core.stats.unconnected += 1;
                core.report_connect_failure(key, syn, &error);
            }
        }
    }

    /// Returns whether `initiator` may open one more connection. The oldest of its own in TIME-WAIT makes room. So clients of
    /// published ports, who cost nothing but an address, take none of the guest's.
    fn make_room(&mut self, core: &mut Core, initiator: Initiator) -> bool {
        loop {
            let count = match initiator {
                Initiator::Guest => self.flows.len().saturating_sub(self.inbound),
                Initiator::Client => self.inbound,
            };
            if count < core.config.limits.connections {
                return true;
            }
            let [guests, clients] = &mut self.time_wait;
            let oldest = if initiator == Initiator::Guest { guests } else { clients };
            let Some(id) = oldest.pop_front() else { return false };
            if self.is_time_wait(id) {
                self.remove(core, id);
            }
        }
    }

    /// Connects a client on the host to the guest. Returns the socket when that is not possible.
    pub(super) fn connect_to_guest(&mut self, core: &mut Core, key: FlowKey, conn: InboundConn) -> Result<(), Socket> {
        if self.by_key.contains_key(&key) || !self.make_room(core, Initiator::Client) {
            core.stats.limited += 1;
            return Err(conn.socket);
        }
        if let Err(error) = self.insert(core, key, conn.socket, TcpState::SynSent, None) {
            log::debug!("a connection is not watched: {error}");
            core.stats.limited += 1;
        } else if let Some(flow) = self.by_key.get(&key).and_then(|id| self.flows.get_mut(*id)) {
            flow.inbound = Some(conn.port);
        }
        Ok(())
    }

    fn insert(
        &mut self,
        core: &mut Core,
        key: FlowKey,
        socket: Socket,
        state: TcpState,
        syn: Option<&Tcp>,
    ) -> io::Result<()> {
        let mut seed = [0; 4];
        sys::fill_random(&mut seed)?;
        let iss = u32::from_ne_bytes(seed);
        // The table gives the name, which the descriptor is watched by.
        let id = self.flows.insert(Box::new(TcpFlow::new(Id::NONE, key, socket, state, iss, core.host.now)));
        let Some(flow) = self.flows.get_mut(id) else { return Ok(()) };
        flow.id = id;
        flow.local = state == TcpState::SynReceived;
        #[cfg(test)]
        if self.without_peek_off {
            flow.disable_peek_off();
        }
        match syn {
            Some(syn) => flow.take_syn(syn, core.config.mtu),
            None => flow.offer_wscale(),
        }
        if let Err(error) = flow.watch(core) {
            self.flows.remove(id);
            return Err(error);
        }
        self.inbound += usize::from(flow.initiator() == Initiator::Client);
        self.by_key.insert(key, id);
        self.apply(core, id, FlowOutcome::Live);
        Ok(())
    }

    /// Something has happened to a flow's socket.
    pub(super) fn ready(&mut self, core: &mut Core, id: Id, events: EventSet) {
        self.planned = None;
        let Some(flow) = self.flows.get_mut(id) else { return };
        let before = flow.backlog();
        let outcome = flow.ready(core, events);
        self.backlog = self.backlog + flow.backlog() - before;
        self.apply(core, id, outcome);
    }

    /// A flow's timer has fired.
    pub(super) fn on_timer(&mut self, core: &mut Core, id: Id) {
        self.planned = None;
        let Some(flow) = self.flows.get_mut(id) else { return };
        let outcome = flow.on_timer(core);
        self.apply(core, id, outcome);
    }

    /// Resets what the policy no longer allows.
    pub(super) fn recheck_policy(&mut self, core: &mut Core) {
        self.planned = None;
        let denied = |flow: &TcpFlow| {
            let to = SocketAddr::from(flow.key.remote);
            flow.opened_by_guest && !core.config.is_gateway(to.ip()) && !core.allows(Protocol::Tcp, to)
        };
        let gone: Vec<Id> = self.flows.iter().filter(|(_, flow)| denied(flow)).map(|(id, _)| id).collect();
        for id in gone {
            self.apply(core, id, FlowOutcome::Reset);
        }
    }

    fn apply(&mut self, core: &mut Core, id: Id, outcome: FlowOutcome) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        match outcome {
            FlowOutcome::Live => {
                if !flow.queued {
                    flow.queued = true;
                    self.ready.push_back(id);
                }
                let at = flow.deadline(core);
                core.host.set_timer(&mut flow.timer, Owner::Tcp(id), at);
            }
            FlowOutcome::TimeWait => {
                flow.enter_time_wait(core.host.now);
                let [guests, clients] = &mut self.time_wait;
                let list = if flow.initiator() == Initiator::Guest { guests } else { clients };
                list.push_back(id);
                self.apply(core, id, FlowOutcome::Live);
            }
            FlowOutcome::Closed => {
                core.stats.resets += u64::from(flow.state != TcpState::TimeWait);
                self.remove(core, id);
            }
            FlowOutcome::Reset => {
                core.stats.resets += 1;
                flow.reset(core);
                self.remove(core, id);
            }
            FlowOutcome::ConnectFailed(error) => {
                let refused = error.kind() == io::ErrorKind::ConnectionRefused;
                match flow.inbound {
                    Some(port) if refused => {
                        self.inbound_results.extend(flow.take_socket().map(|socket| {
                            core.host.unwatch(socket.as_fd());
                            InboundResult::Refused(InboundConn { port, socket })
                        }));
                    }
                    Some(port) => {
                        core.stats.unconnected += 1;
                        self.inbound_results.push(InboundResult::TimedOut(port.id));
                    }
                    None => {
                        core.stats.unconnected += 1;
                        let (key, syn) = (flow.key, flow.syn());
                        core.report_connect_failure(key, &syn, &error);
                    }
                }
                self.remove(core, id);
            }
        }
    }

    fn remove(&mut self, core: &mut Core, id: Id) {
        let Some(mut flow) = self.flows.remove(id) else { return };
        self.backlog -= flow.backlog();
        flow.abort();
        core.host.cancel_timer(&mut flow.timer, Owner::Tcp(id));
        self.by_key.remove(&flow.key);
        self.inbound -= usize::from(flow.initiator() == Initiator::Client).min(self.inbound);
        // Names of what is gone would pile up otherwise.
        for list in &mut self.time_wait {
            if list.len() > 2 * self.flows.len() + 64 {
                list.retain(|id| self.flows.get(*id).is_some());
            }
        }
    }

    /// How many bytes the next frame has, at most.
    pub(super) fn next(&mut self, core: &mut Core) -> Option<usize> {
        if self.planned.is_none() {
            while let Some(id) = self.ready.front().copied() {
                if let Some(flow) = self.flows.get_mut(id) {
                    if let Some(transmit) = flow.next_transmit(core) {
                        self.planned = Some(PlannedSegment { id, transmit });
                        break;
                    }
                    flow.queued = false;
                    let at = flow.deadline(core);
                    core.host.set_timer(&mut flow.timer, Owner::Tcp(id), at);
                }
                self.ready.pop_front();
            }
        }
        let PlannedSegment { id, transmit } = self.planned?;
        let flow = self.flows.get_mut(id)?;
        let data = if let Transmit::Data(n) = transmit { n } else { 0 };
        Some(flow.header_len(transmit) + data)
    }

    /// Sends what [`TcpFlows::next`] has promised.
    pub(super) fn receive(&mut self, core: &mut Core, memory: &GuestMemory, room: &[Piece]) -> Option<Received> {
        self.next(core)?;
        let PlannedSegment { id, transmit } = self.planned.take()?;
        // Each in its turn.
        self.ready.pop_front();
        self.ready.push_back(id);
        let flow = self.flows.get_mut(id)?;
        let received = send(core, flow, transmit, memory, room, &mut self.pieces);
        let at = flow.deadline(core);
        core.host.set_timer(&mut flow.timer, Owner::Tcp(id), at);
        match received {
            Ok(received) => received,
            Err(error) => {
                log::debug!("a connection's socket fails: {error}");
                self.apply(core, id, FlowOutcome::Reset);
                None
            }
        }
    }
}

fn connect(core: &mut Core, to: &Admitted) -> io::Result<Socket> {
    let socket = core.host.connect(to)?;
    // A peer that sends small pieces has a reason; guests have their own algorithm of Nagle.
    socket.relay()?;
    Ok(socket)
}

/// Writes the frame for `transmit` to `room`.
fn send(
    core: &mut Core,
    flow: &mut TcpFlow,
    transmit: Transmit,
    memory: &GuestMemory,
    room: &[Piece],
    pieces: &mut Vec<Piece>,
) -> io::Result<Option<Received>> {
    let at = flow.header_len(transmit);
    let sums = core.agreed.to_guest.contains(crate::network::Offloads::CSUM);
    let wanted = if let Transmit::Data(n) = transmit { n } else { 0 };
    let mut n = 0;
    let mut data = std::mem::take(&mut core.buffer);
    if wanted > 0 {
        super::cut(room, at, wanted, pieces);
        n = flow.peek(memory, pieces, &mut data)?;
        if n == 0 {
            core.buffer = data;
            return Ok(None);
        }
    }
    let mut head = flow.emit_header(core, transmit, n);
    let addrs = AddressPair { src: flow.key.remote.addr, dst: flow.key.guest.addr };
    let inner = wire::ETHERNET + wire::ip_header_len(addrs.src);
    let len = head.len() - inner + n;
    let sum = wire::pseudo(addrs.src, addrs.dst, wire::TCP, len);
    let mut offload = Offload::default();
    if sums && wanted > 0 {
        head.set16(inner + 16, wire::fold(sum));
        offload.csum = Some(Csum { start: inner as u16, offset: 16 });
        if n > usize::from(flow.mss) {
            let kind = if addrs.src.is_ipv4() { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
            offload.gso = Some(Gso { kind, size: flow.mss, header_len: at as u16 });
        }
    } else {
        let sum = sum + wire::sum(head.from(inner)) + sum_of(memory, pieces, n, &mut data);
        head.set16(inner + 16, !wire::fold(sum));
    }
    core.buffer = data;
    let fits = put(memory, room, head.as_slice());
    Ok(fits.then_some(Received { len: at + n, offload }))
}

/// Returns the sum of what was just put into the guest. A guest that changes it meanwhile deceives only itself.
fn sum_of(memory: &GuestMemory, pieces: &[Piece], n: usize, buffer: &mut Vec<u8>) -> u64 {
    if n == 0 {
        return 0;
    }
    buffer.resize(wire::MAX_PACKET, 0);
    let mut rest = buffer.get_mut(..n).unwrap_or_default();
    for piece in pieces {
        let (now, later) = rest.split_at_mut(piece.len().min(rest.len()));
        let _ = memory.read(piece.addr(), now);
        rest = later;
    }
    wire::sum(buffer.get(..n).unwrap_or_default())
}

/// Refuses a segment of an unknown connection (RFC 9293, 3.10.7.1).
fn reset_unmatched(core: &mut Core, segment: &TcpSegment<'_>) {
    let (addrs, tcp) = (segment.addrs, &segment.tcp);
    if tcp.flags & RST != 0 {
        return;
    }
    let key = FlowKey::of_guest(addrs, tcp);
    let len = segment.len as u32 + u32::from(tcp.flags & FIN != 0);
    core.send_reset(key, &Tcp { seq: tcp.seq.wrapping_add(len), ..*tcp });
}

impl Core {
    /// Answers `tcp`, whose last number is `seq`, with a reset.
    fn send_reset(&mut self, key: FlowKey, tcp: &Tcp) {
        let addrs = AddressPair { src: key.remote.addr, dst: key.guest.addr };
        let reset = Tcp { src: key.remote.port, dst: key.guest.port, ..Tcp::default() };
        let reset = if tcp.flags & ACK != 0 {
            Tcp { seq: tcp.ack, flags: RST, ..reset }
        } else {
            let ack = tcp.seq.wrapping_add(u32::from(tcp.flags & SYN != 0));
            Tcp { ack, flags: RST | ACK, ..reset }
        };
        let mut head = FrameBuilder::ip(self.macs(), addrs, wire::TCP, 20);
        head.tcp(&reset);
        self.send_headers(head, addrs, wire::TCP, 16);
    }

    /// Reports to the guest why it was not connected, as a network would.
    fn report_connect_failure(&mut self, key: FlowKey, syn: &Tcp, error: &io::Error) {
        match error.kind() {
            // The peer did not answer; the network does not either.
            io::ErrorKind::TimedOut => {}
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::PermissionDenied => {
                let why = Unreachable::of(error.kind());
                let addrs = AddressPair { src: key.guest.addr, dst: key.remote.addr };
                let mut head = FrameBuilder::ip(self.macs(), addrs, wire::TCP, wire::tcp_header_len(syn));
                head.tcp(&Tcp { src: key.guest.port, dst: key.remote.port, ..*syn });
                icmp::unreachable(self, why, addrs, head.from(wire::ETHERNET));
            }
            _ => self.send_reset(key, syn),
        }
    }
}

/// The gateway's address of `address`'s family.
pub(super) fn gateway_of(core: &Core, address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => core.config.gateway4.into(),
        IpAddr::V6(_) => core.config.gateway6.into(),
    }
}
