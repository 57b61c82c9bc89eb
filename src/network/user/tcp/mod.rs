//! [`TcpFlows`]: all TCP connections of a guest, found by their ends, served in turn.

mod flow;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

pub(super) use self::flow::FlowKey;
use self::flow::{Flow, Phase, SegmentOutcome, What};
use super::core::{Begun, Core, put};
use super::generational::{GenerationalMap, Id, Owner};
use super::host::exhausted;
use super::icmp::{self, Unreachable};
use crate::memory::{GuestMemory, Segment as Piece};
use crate::network::policy::{Admitted, Protocol};
use crate::network::wire::{self, ACK, Ends, FIN, Head, RST, SYN, Tcp};
use crate::network::{Csum, Gso, GsoKind, Offload, Received};
use crate::sys::{self, EventSet, Socket};

/// What a guest may send of one connection before the host has taken it.
const WINDOW: u32 = 512 << 10;

/// What an idle connection takes, but for its name and its sockets.
#[cfg(test)]
pub(super) const FLOW_SIZE: usize = size_of::<Flow>();

/// A segment of the guest.
#[derive(Debug)]
pub(super) struct Segment<'a> {
    pub ends: Ends,
    pub tcp: Tcp,
    /// Bytes of data.
    pub len: usize,
    pub memory: &'a GuestMemory,
}

/// Of the places in the guest where a service may be, those that were tried, as bits.
pub(super) type Tried = u8;

/// A client on the host that calls the guest by a published port.
#[derive(Debug)]
pub(super) struct Caller {
    pub port: Id,
    pub tried: Tried,
    pub socket: Socket,
}

/// What became of a call.
#[derive(Debug)]
pub(super) enum Called {
    /// A listener is at this address.
    Reached(Id, IpAddr),
    /// No listener is there.
    Refused(Caller),
    /// No answer came.
    Silence(Id),
}

/// What [`TcpFlows::next`] has promised.
#[derive(Debug, Clone, Copy)]
struct Plan {
    id: Id,
    what: What,
}

/// The connections. Each packet costs the same however many there are.
#[derive(Debug, Default)]
pub(super) struct TcpFlows {
    flows: GenerationalMap<Box<Flow>>,
    names: HashMap<FlowKey, Id>,
    /// Those that may have something to send.
    ready: VecDeque<Id>,
    /// Those that are over, the oldest first, of the guest's and of the callers'; some are gone.
    over: [VecDeque<Id>; 2],
    /// How many callers of published ports have begun.
    callers: usize,
    plan: Option<Plan>,
    /// For the published ports, taken after each event.
    pub called: Vec<Called>,
    /// Bytes in all flows' backlogs.
    backlog: usize,
    pieces: Vec<Piece>,
    #[cfg(test)]
    pub old_host: bool,
}

impl TcpFlows {
    pub(super) fn len(&self) -> usize {
        self.flows.len()
    }

    pub(super) fn backlog(&self) -> usize {
        self.backlog
    }

    /// Takes a segment of the guest, whose data is `payload`.
    pub(super) fn segment(&mut self, core: &mut Core, segment: &Segment<'_>, payload: &mut Vec<Piece>) {
        let (ends, tcp) = (segment.ends, &segment.tcp);
        let key = FlowKey { guest: (ends.src, tcp.src), remote: (ends.dst, tcp.dst) };
        let call = tcp.flags & (SYN | ACK | RST | FIN) == SYN;
        self.plan = None;
        let known = self.names.get(&key).copied();
        let Some(id) = known.filter(|id| !(call && self.is_over(*id))) else {
            if let Some(id) = known {
                self.remove(core, id);
            }
            return if call { self.call(core, key, tcp) } else { refuse(core, segment) };
        };
        let budget = core.config.limits.backlog.saturating_sub(self.backlog);
        let Some(flow) = self.flows.get_mut(id) else { return };
        let before = flow.backlog();
        let calling = flow.phase == Phase::Calling;
        let outcome = flow.segment(core, segment, payload, budget);
        if let (true, Phase::Open, Some((port, _))) = (calling, flow.phase, flow.caller) {
            self.called.push(Called::Reached(port, key.guest.0));
        }
        self.backlog = self.backlog + flow.backlog() - before;
        self.settle(core, id, outcome);
    }

    /// Whether it is of a connection that there is.
    pub(super) fn knows(&self, ends: Ends, tcp: &Tcp) -> bool {
        self.names.contains_key(&FlowKey { guest: (ends.src, tcp.src), remote: (ends.dst, tcp.dst) })
    }

    /// Returns whether it opens a new connection.
    pub(super) fn is_call(&mut self, segment: &Segment<'_>) -> bool {
        let (ends, tcp) = (segment.ends, &segment.tcp);
        let key = FlowKey { guest: (ends.src, tcp.src), remote: (ends.dst, tcp.dst) };
        let known = self.names.get(&key).copied();
        tcp.flags & (SYN | ACK | RST | FIN) == SYN && known.is_none_or(|id| self.is_over(id))
    }

    /// Connects the guest to a service in this process, whose `socket` is connected already.
    pub(super) fn call_local(&mut self, core: &mut Core, segment: &Segment<'_>, socket: io::Result<Socket>) {
        let (ends, syn) = (segment.ends, &segment.tcp);
        let key = FlowKey { guest: (ends.src, syn.src), remote: (ends.dst, syn.dst) };
        self.plan = None;
        if let Some(id) = self.names.get(&key).copied() {
            self.remove(core, id);
        }
        if !self.make_room(core, Begun::ByGuest) {
            core.stats.limited += 1;
            return;
        }
        let made = socket.and_then(|socket| self.insert(core, key, socket, Phase::Answering, Some(syn)));
        if let Err(error) = made {
            log::debug!("the resolver cannot be called: {error}");
            core.stats.limited += 1;
            core.send_reset(key, syn);
        }
    }

    fn is_over(&mut self, id: Id) -> bool {
        self.flows.get_mut(id).is_some_and(|flow| flow.phase == Phase::Over)
    }

    /// Takes a call of the guest to a peer outside.
    fn call(&mut self, core: &mut Core, key: FlowKey, syn: &Tcp) {
        let (address, port) = key.remote;
        let to = SocketAddr::new(address, port);
        if core.config.is_gateway(address) || port == 0 {
            return core.send_reset(key, syn);
        }
        if !core.may_call() || !self.make_room(core, Begun::ByGuest) {
            core.stats.limited += 1;
            // Silence: the guest tries again later.
            return;
        }
        let Some(admitted) = core.admit(Protocol::Tcp, to) else {
            return core.send_reset(key, syn);
        };
        match connect(core, &admitted) {
            Ok(socket) => {
                if let Err(error) = self.insert(core, key, socket, Phase::Connecting, Some(syn)) {
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
                core.tell_failed(key, syn, &error);
            }
        }
    }

    /// Returns whether one more connection is allowed. One that is over makes room, among those that the guest has
    /// begun or among those of callers of published ports. So callers, who cost nothing but an address, take none of
    /// the guest's.
    fn make_room(&mut self, core: &mut Core, begun: Begun) -> bool {
        loop {
            let count = match begun {
                Begun::ByGuest => self.flows.len().saturating_sub(self.callers),
                Begun::ByCaller => self.callers,
            };
            if count < core.config.limits.connections {
                return true;
            }
            let [guests, callers] = &mut self.over;
            let over = if begun == Begun::ByGuest { guests } else { callers };
            let Some(id) = over.pop_front() else { return false };
            if self.is_over(id) {
                self.remove(core, id);
            }
        }
    }

    /// Calls the guest for a client on the host. Gives the socket back when that cannot be.
    pub(super) fn call_guest(&mut self, core: &mut Core, key: FlowKey, caller: Caller) -> Result<(), Socket> {
        if self.names.contains_key(&key) || !self.make_room(core, Begun::ByCaller) {
            core.stats.limited += 1;
            return Err(caller.socket);
        }
        if let Err(error) = self.insert(core, key, caller.socket, Phase::Calling, None) {
            log::debug!("a connection is not watched: {error}");
            core.stats.limited += 1;
        } else if let Some(flow) = self.names.get(&key).and_then(|id| self.flows.get_mut(*id)) {
            flow.caller = Some((caller.port, caller.tried));
        }
        Ok(())
    }

    fn insert(
        &mut self,
        core: &mut Core,
        key: FlowKey,
        socket: Socket,
        phase: Phase,
        syn: Option<&Tcp>,
    ) -> io::Result<()> {
        let mut seed = [0; 4];
        sys::fill_random(&mut seed)?;
        let iss = u32::from_ne_bytes(seed);
        // The table gives the name, which the descriptor is watched by.
        let id = self.flows.insert(Box::new(Flow::new(Id::NONE, key, socket, phase, iss, core.host.now)));
        let Some(flow) = self.flows.get_mut(id) else { return Ok(()) };
        flow.id = id;
        flow.local = phase == Phase::Answering;
        #[cfg(test)]
        if self.old_host {
            flow.without_peek_offset();
        }
        match syn {
            Some(syn) => flow.called(syn, core.config.mtu),
            None => flow.calls(),
        }
        if let Err(error) = flow.watch(core) {
            self.flows.remove(id);
            return Err(error);
        }
        self.callers += usize::from(flow.begun() == Begun::ByCaller);
        self.names.insert(key, id);
        self.settle(core, id, SegmentOutcome::Live);
        Ok(())
    }

    /// Something has happened to a flow's socket.
    pub(super) fn ready(&mut self, core: &mut Core, id: Id, events: EventSet) {
        self.plan = None;
        let Some(flow) = self.flows.get_mut(id) else { return };
        let before = flow.backlog();
        let outcome = flow.ready(core, events);
        self.backlog = self.backlog + flow.backlog() - before;
        self.settle(core, id, outcome);
    }

    /// A flow's alarm rang.
    pub(super) fn rang(&mut self, core: &mut Core, id: Id) {
        self.plan = None;
        let Some(flow) = self.flows.get_mut(id) else { return };
        let outcome = flow.rang(core);
        self.settle(core, id, outcome);
    }

    /// Resets what the policy no longer allows.
    pub(super) fn review(&mut self, core: &mut Core) {
        self.plan = None;
        let denied = |flow: &Flow| {
            let (address, port) = flow.key.remote;
            flow.outgoing
                && !core.config.is_gateway(address)
                && !core.allows(Protocol::Tcp, SocketAddr::new(address, port))
        };
        let gone: Vec<Id> = self.flows.iter().filter(|(_, flow)| denied(flow)).map(|(id, _)| id).collect();
        for id in gone {
            self.settle(core, id, SegmentOutcome::Reset);
        }
    }

    fn settle(&mut self, core: &mut Core, id: Id, outcome: SegmentOutcome) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        match outcome {
            SegmentOutcome::Live => {
                if !flow.queued {
                    flow.queued = true;
                    self.ready.push_back(id);
                }
                let at = flow.deadline(core);
                core.host.alarm(&mut flow.alarm, Owner::Tcp(id), at);
            }
            SegmentOutcome::Over => {
                flow.over(core.host.now);
                let [guests, callers] = &mut self.over;
                let over = if flow.begun() == Begun::ByGuest { guests } else { callers };
                over.push_back(id);
                self.settle(core, id, SegmentOutcome::Live);
            }
            SegmentOutcome::Gone => {
                core.stats.resets += u64::from(flow.phase != Phase::Over);
                self.remove(core, id);
            }
            SegmentOutcome::Reset => {
                core.stats.resets += 1;
                flow.reset(core);
                self.remove(core, id);
            }
            SegmentOutcome::Failed(error) => {
                let refused = error.kind() == io::ErrorKind::ConnectionRefused;
                match flow.caller {
                    Some((port, tried)) if refused => {
                        self.called.extend(flow.take_socket().map(|socket| {
                            core.host.unwatch(socket.as_fd());
                            Called::Refused(Caller { port, tried, socket })
                        }));
                    }
                    Some((port, _)) => {
                        core.stats.unconnected += 1;
                        self.called.push(Called::Silence(port));
                    }
                    None => {
                        core.stats.unconnected += 1;
                        let (key, syn) = (flow.key, flow.syn());
                        core.tell_failed(key, &syn, &error);
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
        core.host.cancel(&mut flow.alarm, Owner::Tcp(id));
        self.names.remove(&flow.key);
        self.callers -= usize::from(flow.begun() == Begun::ByCaller).min(self.callers);
        // Names of what is gone would pile up otherwise.
        for over in &mut self.over {
            if over.len() > 2 * self.flows.len() + 64 {
                over.retain(|id| self.flows.get(*id).is_some());
            }
        }
    }

    /// How many bytes the next frame has, at most.
    pub(super) fn next(&mut self, core: &mut Core) -> Option<usize> {
        if self.plan.is_none() {
            while let Some(id) = self.ready.front().copied() {
                if let Some(flow) = self.flows.get_mut(id) {
                    if let Some(what) = flow.what(core) {
                        self.plan = Some(Plan { id, what });
                        break;
                    }
                    flow.queued = false;
                    let at = flow.deadline(core);
                    core.host.alarm(&mut flow.alarm, Owner::Tcp(id), at);
                }
                self.ready.pop_front();
            }
        }
        let Plan { id, what } = self.plan?;
        let flow = self.flows.get_mut(id)?;
        let data = if let What::Data(n) = what { n } else { 0 };
        Some(flow.headers(what) + data)
    }

    /// Sends what [`TcpFlows::next`] has promised.
    pub(super) fn receive(&mut self, core: &mut Core, memory: &GuestMemory, room: &[Piece]) -> Option<Received> {
        self.next(core)?;
        let Plan { id, what } = self.plan.take()?;
        // Each in its turn.
        self.ready.pop_front();
        self.ready.push_back(id);
        let flow = self.flows.get_mut(id)?;
        let received = send(core, flow, what, memory, room, &mut self.pieces);
        let at = flow.deadline(core);
        core.host.alarm(&mut flow.alarm, Owner::Tcp(id), at);
        match received {
            Ok(received) => received,
            Err(error) => {
                log::debug!("a connection's socket fails: {error}");
                self.settle(core, id, SegmentOutcome::Reset);
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

/// Writes the frame for `what` to `room`.
fn send(
    core: &mut Core,
    flow: &mut Flow,
    what: What,
    memory: &GuestMemory,
    room: &[Piece],
    pieces: &mut Vec<Piece>,
) -> io::Result<Option<Received>> {
    let at = flow.headers(what);
    let sums = core.agreed.to_guest.contains(crate::network::Offloads::CSUM);
    let wanted = if let What::Data(n) = what { n } else { 0 };
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
    let mut head = flow.head(core, what, n);
    let ends = Ends { src: flow.key.remote.0, dst: flow.key.guest.0 };
    let inner = wire::ETHERNET + wire::ip_header_len(ends.src);
    let len = head.len() - inner + n;
    let sum = wire::pseudo(ends.src, ends.dst, wire::TCP, len);
    let mut offload = Offload::default();
    if sums && wanted > 0 {
        head.set16(inner + 16, wire::fold(sum));
        offload.csum = Some(Csum { start: inner as u16, offset: 16 });
        if n > usize::from(flow.mss) {
            let kind = if ends.src.is_ipv4() { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
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
fn refuse(core: &mut Core, segment: &Segment<'_>) {
    let (ends, tcp) = (segment.ends, &segment.tcp);
    if tcp.flags & RST != 0 {
        return;
    }
    let key = FlowKey { guest: (ends.src, tcp.src), remote: (ends.dst, tcp.dst) };
    let len = segment.len as u32 + u32::from(tcp.flags & FIN != 0);
    core.send_reset(key, &Tcp { seq: tcp.seq.wrapping_add(len), ..*tcp });
}

impl Core {
    /// Answers `tcp`, whose last number is `seq`, with a reset.
    fn send_reset(&mut self, key: FlowKey, tcp: &Tcp) {
        let ends = Ends { src: key.remote.0, dst: key.guest.0 };
        let reset = Tcp { src: key.remote.1, dst: key.guest.1, ..Tcp::default() };
        let reset = if tcp.flags & ACK != 0 {
            Tcp { seq: tcp.ack, flags: RST, ..reset }
        } else {
            let ack = tcp.seq.wrapping_add(u32::from(tcp.flags & SYN != 0));
            Tcp { ack, flags: RST | ACK, ..reset }
        };
        let mut head = Head::ip(self.macs(), ends, wire::TCP, 20);
        head.tcp(&reset);
        self.send_head(head, ends, wire::TCP, 16);
    }

    /// Tells the guest why its call failed, as a network would.
    fn tell_failed(&mut self, key: FlowKey, syn: &Tcp, error: &io::Error) {
        match error.kind() {
            // The peer did not answer; the network does not either.
            io::ErrorKind::TimedOut => {}
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::PermissionDenied => {
                let why = Unreachable::of(error.kind());
                let ends = Ends { src: key.guest.0, dst: key.remote.0 };
                let mut head = Head::ip(self.macs(), ends, wire::TCP, wire::tcp_header_len(syn));
                head.tcp(&Tcp { src: key.guest.1, dst: key.remote.1, ..*syn });
                icmp::unreachable(self, why, ends, head.from(wire::ETHERNET));
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
