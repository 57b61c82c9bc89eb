//! [`TcpFlow`]: one TCP connection (RFC 9293). It is a state machine between a guest and a socket of the host.
//!
//! What goes to the guest stays in the socket until it is acknowledged, so sending it again is peeking at it again.
//! There is no congestion control: the link is memory, and what is lost on it was dropped by ourselves.

mod to_guest;
mod to_host;

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{InboundPort, TcpSegment};
use crate::memory::Segment as Piece;
use crate::network::user::core::{Core, Initiator};
use crate::network::user::generational::{Id, Owner};
use crate::network::user::host::TimerEntry;
use crate::network::wire::{self, ACK, AddressPair, FIN, IpEndpoint, RST, SYN, Tcp};
use crate::sys::{EventSet, Socket};

/// Both ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::network::user) struct FlowKey {
    pub guest: IpEndpoint,
    pub remote: IpEndpoint,
}

impl FlowKey {
    /// Returns the key of the connection that a guest's segment belongs to.
    pub(in crate::network::user) fn of_guest(addrs: AddressPair, tcp: &Tcp) -> Self {
        Self { guest: IpEndpoint::new(addrs.src, tcp.src), remote: IpEndpoint::new(addrs.dst, tcp.dst) }
    }
}

/// The state of a connection (RFC 9293, 3.3.2). Other fields say which sides have closed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TcpState {
    /// The guest has sent a SYN, which is answered only when the host's socket is connected.
    HostConnecting,
    /// SYN-RECEIVED: the host's socket is connected, and the guest gets a SYN-ACK.
    SynReceived,
    /// SYN-SENT: a client on the host connects to the guest.
    SynSent,
    /// ESTABLISHED, and the states of closing up to TIME-WAIT. `fin_received` and `fin_seq` tell them apart.
    Established,
    /// TIME-WAIT: only the guest's last FIN may come again.
    TimeWait,
}

/// What an event does to a flow.
#[derive(Debug)]
pub(super) enum FlowOutcome {
    Live,
    /// Both sides have closed.
    TimeWait,
    /// CLOSED: the flow is forgotten, and the peer on the host gets a reset.
    Closed,
    /// As `Closed`, and the guest gets a reset.
    Reset,
    /// The host or the guest did not connect.
    ConnectFailed(io::Error),
}

/// The segment to send next, and how many bytes of data with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transmit {
    Syn,
    Data(usize),
    Fin,
    Ack,
}

/// The first retransmission timeout. It doubles each time (RFC 6298, 5.5).
const INITIAL_RTO: Duration = Duration::from_millis(250);
const MAX_RTO: Duration = Duration::from_secs(30);
/// Retransmissions without an answer: about four minutes.
const MAX_RETRIES: u8 = 14;
/// How long the guest's last FIN may come again. The guest is near.
const TIME_WAIT_TIMEOUT: Duration = Duration::from_secs(2);
/// Duplicate acknowledgments that mean a loss (RFC 5681, 3.2).
const DUP_ACK_THRESHOLD: u8 = 3;
/// The MSS of a guest that sends no option, for IPv4 and IPv6 (RFC 9293, 3.7.1).
const DEFAULT_MSS: (u16, u16) = (536, 1220);
/// The window scale's shift, where the guest can scale: 1 MiB fits.
pub(super) const RCV_WSCALE: u8 = 5;

#[derive(Debug)]
pub(super) struct TcpFlow {
    pub id: Id,
    pub key: FlowKey,
    pub state: TcpState,
    /// `None` in TIME-WAIT.
    socket: Option<Socket>,
    /// The other end is in this process, on a socket that cannot discard.
    pub local: bool,
    /// The guest has opened the connection.
    pub opened_by_guest: bool,
    /// The published port that it came through.
    pub inbound: Option<InboundPort>,

    // Send sequence variables, to the guest (RFC 9293, 3.3.1). The bytes from `snd_nxt` to `snd_max` are sent again.
    snd_una: u32,
    snd_nxt: u32,
    snd_max: u32,
    snd_wnd: u32,
    snd_wl1: u32,
    snd_wl2: u32,
    snd_wscale: u8,
    pub mss: u16,
    /// The sequence number of our FIN, once it was sent.
    fin_seq: Option<u32>,
    fin_acked: bool,
    dup_acks: u8,
    /// Losses before this sequence number are known (RFC 6582, 3.2).
    recover: u32,
    /// The socket keeps the offset of the next peek (SO_PEEK_OFF, socket(7)).
    has_peek_off: bool,

    // Receive sequence variables, from the guest (RFC 9293, 3.3.1).
    rcv_nxt: u32,
    /// The right edge of the window: RCV.NXT + RCV.WND.
    rcv_wnd_edge: u32,
    rcv_wscale: Option<u8>,
    fin_received: bool,
    /// The guest's FIN has become shutdown(2) of the host's socket.
    host_shut_down: bool,
    /// What the host's socket did not take yet.
    backlog: VecDeque<u8>,

    /// The socket may have data.
    readable: bool,
    /// The peer on the host has closed.
    peer_closed: bool,
    /// The next segment probes a closed window (RFC 9293, 3.8.6.1).
    probe_due: bool,
    ack_due: bool,
    pub queued: bool,
    retries: u8,
    retransmit_at: Option<Instant>,
    last_activity: Instant,
    pub timer: TimerEntry,
}

/// Whether `a` is greater than `b`, modulo 2^32 (RFC 9293, 3.4).
fn seq_gt(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

impl TcpFlow {
    /// `socket` is connecting in `HostConnecting`, and connected in any other state.
    pub(super) fn new(id: Id, key: FlowKey, socket: Socket, state: TcpState, iss: u32, now: Instant) -> Self {
        let has_peek_off = socket.peek_from(0).is_ok();
        Self {
            id,
            key,
            state,
            socket: Some(socket),
            local: false,
            opened_by_guest: false,
            inbound: None,
            snd_una: iss,
            snd_nxt: iss,
            snd_max: iss,
            snd_wnd: 0,
            snd_wl1: 0,
            snd_wl2: 0,
            snd_wscale: 0,
            mss: if key.guest.addr.is_ipv4() { DEFAULT_MSS.0 } else { DEFAULT_MSS.1 },
            fin_seq: None,
            fin_acked: false,
            dup_acks: 0,
            recover: iss,
            has_peek_off,
            rcv_nxt: 0,
            rcv_wnd_edge: 0,
            rcv_wscale: None,
            fin_received: false,
            host_shut_down: false,
            backlog: VecDeque::new(),
            readable: true,
            peer_closed: false,
            probe_due: false,
            ack_due: false,
            queued: false,
            retries: 0,
            retransmit_at: None,
            last_activity: now,
            timer: TimerEntry::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn disable_peek_off(&mut self) {
        self.has_peek_off = self.socket.as_ref().is_some_and(|s| s.peek_from(-1).is_err());
    }

    /// Returns the guest's SYN, as a reset or an ICMP error quotes it.
    pub(super) fn syn(&self) -> Tcp {
        let (seq, window) = (self.rcv_nxt.wrapping_sub(1), self.snd_wnd as u16);
        Tcp { src: self.key.guest.port, dst: self.key.remote.port, seq, flags: SYN, window, ..Tcp::default() }
    }

    /// Offers window scaling in our SYN, which the guest may accept.
    pub(super) fn offer_wscale(&mut self) {
        self.rcv_wscale = Some(RCV_WSCALE);
    }

    pub(super) fn initiator(&self) -> Initiator {
        if self.opened_by_guest { Initiator::Guest } else { Initiator::Client }
    }

    pub(super) fn watch(&self, core: &Core) -> io::Result<()> {
        self.socket.as_ref().map_or(Ok(()), |socket| core.host.watch(socket.as_fd(), Owner::Tcp(self.id)))
    }

    /// Takes the options and the window of the guest's SYN.
    pub(super) fn take_syn(&mut self, syn: &Tcp, mtu: u16) {
        self.opened_by_guest |= self.state != TcpState::SynSent;
        let headers = wire::ip_header_len(self.key.guest.addr) as u16 + 20;
        // Less than the minimum of IPv4 would only make small segments.
        self.mss = syn.mss.unwrap_or(self.mss).clamp(88, mtu.max(576) - headers);
        self.snd_wscale = syn.shift.unwrap_or(0);
        self.rcv_wscale = syn.shift.map(|_| RCV_WSCALE);
        self.rcv_nxt = syn.seq.wrapping_add(1);
        self.rcv_wnd_edge = self.rcv_nxt;
        (self.snd_wnd, self.snd_wl1, self.snd_wl2) = (u32::from(syn.window), syn.seq, syn.ack);
    }

    pub(super) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Takes a segment of the guest. What the host does not take at once may be kept, up to `budget` bytes.
    pub(super) fn segment(
        &mut self,
        core: &mut Core,
        segment: &TcpSegment<'_>,
        payload: &mut Vec<Piece>,
        budget: usize,
    ) -> FlowOutcome {
        let tcp = &segment.tcp;
        self.last_activity = core.host.now;
        match self.state {
            TcpState::HostConnecting => {
                return if tcp.flags & RST != 0 { FlowOutcome::Closed } else { FlowOutcome::Live };
            }
            TcpState::SynSent => return self.process_syn_sent(core, tcp),
            TcpState::TimeWait => {
                self.ack_due = tcp.flags & RST == 0;
                return FlowOutcome::Live;
            }
            TcpState::SynReceived | TcpState::Established => {}
        }
        if tcp.flags & RST != 0 {
            // Only the exact number is believed (RFC 5961, 3.2).
            if tcp.seq == self.rcv_nxt {
                return FlowOutcome::Closed;
            }
            self.ack_due |= !seq_gt(self.rcv_nxt, tcp.seq) && !seq_gt(tcp.seq, self.rcv_wnd_edge);
            return FlowOutcome::Live;
        }
        if tcp.flags & SYN != 0 {
            if self.state == TcpState::SynReceived && tcp.seq.wrapping_add(1) == self.rcv_nxt {
                self.snd_nxt = self.snd_una;
            } else {
                // RFC 5961, 4.2.
                self.ack_due = true;
            }
            return FlowOutcome::Live;
        }
        if tcp.flags & ACK == 0 {
            return FlowOutcome::Live;
        }
        if let Err(outcome) = self.process_ack(core, tcp, segment.len) {
            return outcome;
        }
        if self.state == TcpState::Established
            && let Err(error) = self.process_text(core, segment, payload, budget)
        {
            log::debug!("a connection of the guest ends: {error}");
            return FlowOutcome::Reset;
        }
        self.outcome()
    }

    /// TIME-WAIT when both sides have closed and know it.
    fn outcome(&self) -> FlowOutcome {
        if self.fin_received && self.fin_acked && self.host_shut_down {
            FlowOutcome::TimeWait
        } else {
            FlowOutcome::Live
        }
    }

    /// Takes a segment in SYN-SENT (RFC 9293, 3.10.7.3).
    fn process_syn_sent(&mut self, core: &mut Core, tcp: &Tcp) -> FlowOutcome {
        let ours = tcp.flags & ACK != 0 && tcp.ack == self.snd_una.wrapping_add(1) && self.snd_max == tcp.ack;
        if !ours {
            if tcp.flags & (ACK | RST) == ACK {
                // The guest remembers another connection of these ports. It forgets that one, and takes the next SYN.
                core.send_reset(self.key, tcp);
            }
            return FlowOutcome::Live;
        }
        if tcp.flags & RST != 0 {
            return FlowOutcome::ConnectFailed(io::ErrorKind::ConnectionRefused.into());
        }
        if tcp.flags & SYN != 0 {
            self.take_syn(tcp, core.config.mtu);
            core.stats.connected += 1;
            (self.snd_una, self.snd_nxt) = (tcp.ack, tcp.ack);
            (self.state, self.ack_due, self.retransmit_at, self.retries) = (TcpState::Established, true, None, 0);
        }
        FlowOutcome::Live
    }

    /// RFC 9293, 3.10.7.4, "fifth, check the ACK field".
    fn process_ack(&mut self, core: &mut Core, tcp: &Tcp, len: usize) -> Result<(), FlowOutcome> {
        if seq_gt(tcp.ack, self.snd_max) || seq_gt(self.snd_una, tcp.ack) {
            // Of something that was never sent, or old.
            self.ack_due |= seq_gt(tcp.ack, self.snd_max) && self.state == TcpState::Established;
            return Ok(());
        }
        let window = u32::from(tcp.window) << self.snd_wscale;
        if tcp.ack != self.snd_una {
            let mut n = tcp.ack.wrapping_sub(self.snd_una) as usize;
            if self.state == TcpState::SynReceived {
                (self.state, n) = (TcpState::Established, n - 1);
                core.stats.connected += 1;
            }
            if self.fin_seq.is_some_and(|fin| seq_gt(tcp.ack, fin)) && !self.fin_acked {
                (self.fin_acked, n) = (true, n.saturating_sub(1));
            }
            self.snd_una = tcp.ack;
            if seq_gt(self.snd_una, self.snd_nxt) {
                self.snd_nxt = self.snd_una;
            }
            self.discard_acked(n, &mut core.buffer).map_err(|_| FlowOutcome::Reset)?;
            (self.dup_acks, self.retries) = (0, 0);
            self.retransmit_at = (self.snd_una != self.snd_max).then(|| core.host.now + INITIAL_RTO);
        } else {
            let again = self.snd_una != self.snd_max && len == 0 && tcp.flags & FIN == 0 && window == self.snd_wnd;
            self.dup_acks = if again { self.dup_acks.saturating_add(1) } else { self.dup_acks };
            if self.dup_acks == DUP_ACK_THRESHOLD && !seq_gt(self.recover, self.snd_una) {
                self.recover = self.snd_max;
                self.retransmit(core);
            }
            // The guest answers, so that a closed window may stay closed forever (RFC 9293, 3.8.6.1).
            self.retries = 0;
        }
        if seq_gt(tcp.seq, self.snd_wl1) || tcp.seq == self.snd_wl1 && !seq_gt(self.snd_wl2, tcp.ack) {
            (self.snd_wnd, self.snd_wl1, self.snd_wl2) = (window, tcp.seq, tcp.ack);
        }
        Ok(())
    }

    /// Takes `n` bytes from the socket, which the guest has acknowledged.
    fn discard_acked(&mut self, mut n: usize, scratch: &mut Vec<u8>) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        scratch.resize(wire::MAX_PACKET, 0);
        while n > 0 {
            let taken = if self.local {
                let len = n.min(scratch.len());
                socket.receive(scratch.get_mut(..len).unwrap_or_default())?
            } else {
                socket.discard(n)?
            };
            if taken == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            n -= taken.min(n);
        }
        Ok(())
    }

    /// Sends everything again that was not acknowledged.
    fn retransmit(&mut self, core: &mut Core) {
        if self.snd_nxt == self.snd_una {
            return;
        }
        core.stats.retransmitted += 1;
        (self.snd_nxt, self.readable) = (self.snd_una, true);
        if let Some(socket) = self.socket.as_ref().filter(|_| self.has_peek_off) {
            self.has_peek_off = socket.peek_from(0).is_ok();
        }
    }

    /// Something has happened to the socket.
    pub(super) fn ready(&mut self, core: &mut Core, events: EventSet) -> FlowOutcome {
        let failed = EventSet::ERROR | EventSet::HANG_UP;
        let Some(socket) = &self.socket else { return FlowOutcome::Live };
        if self.state == TcpState::HostConnecting {
            if !events.intersects(failed | EventSet::OUT) {
                return FlowOutcome::Live;
            }
            if let Some(error) = socket.error() {
                return FlowOutcome::ConnectFailed(error);
            }
            (self.state, self.last_activity) = (TcpState::SynReceived, core.host.now);
        }
        if events.intersects(failed) && socket.error().is_some() {
            return FlowOutcome::Reset;
        }
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | failed);
        self.peer_closed |= events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP);
        if events.contains(EventSet::OUT) && self.state == TcpState::Established {
            match self.flush_backlog() {
                Ok(_) => return self.outcome(),
                Err(_) => return FlowOutcome::Reset,
            }
        }
        FlowOutcome::Live
    }

    /// When the timer must fire.
    pub(super) fn deadline(&self, core: &Core) -> Option<Instant> {
        let timeout = self.timeout(core);
        [self.retransmit_at, Some(self.last_activity + timeout)].into_iter().flatten().min()
    }

    fn timeout(&self, core: &Core) -> Duration {
        let limits = &core.config.limits;
        match self.state {
            TcpState::HostConnecting | TcpState::SynReceived | TcpState::SynSent => limits.half_open,
            TcpState::Established if self.fin_received || self.fin_seq.is_some() => limits.half_closed,
            TcpState::Established => limits.idle,
            TcpState::TimeWait => TIME_WAIT_TIMEOUT,
        }
    }

    /// The flow's timer has fired.
    pub(super) fn on_timer(&mut self, core: &mut Core) -> FlowOutcome {
        self.timer.fired();
        let now = core.host.now;
        if self.last_activity + self.timeout(core) <= now {
            core.stats.timed_out += u64::from(self.state != TcpState::TimeWait);
            return match self.state {
                TcpState::HostConnecting | TcpState::SynSent => {
                    FlowOutcome::ConnectFailed(io::ErrorKind::TimedOut.into())
                }
                TcpState::TimeWait => FlowOutcome::Closed,
                _ => FlowOutcome::Reset,
            };
        }
        if self.retransmit_at.is_some_and(|at| at <= now) {
            self.retries += 1;
            if self.retries > MAX_RETRIES {
                core.stats.timed_out += 1;
                return FlowOutcome::Reset;
            }
            self.retransmit_at = Some(now + (INITIAL_RTO * 2u32.pow(u32::from(self.retries))).min(MAX_RTO));
            self.readable = true;
            if self.snd_nxt == self.snd_una && self.state == TcpState::Established {
                self.probe_due = self.snd_wnd == 0;
                self.retransmit_at = self.retransmit_at.filter(|_| self.probe_due);
            }
            self.recover = self.snd_max;
            self.retransmit(core);
        }
        FlowOutcome::Live
    }

    /// Closes the socket. Only the guest's last FIN may come now.
    pub(super) fn enter_time_wait(&mut self, now: Instant) {
        self.socket = None;
        (self.state, self.retransmit_at, self.last_activity) = (TcpState::TimeWait, None, now);
    }

    /// Gives away the socket of a client that the guest has refused.
    pub(super) fn take_socket(&mut self) -> Option<Socket> {
        self.socket.take()
    }

    /// Resets the connection on the host.
    pub(super) fn abort(&mut self) {
        if let Some(Err(error)) = self.socket.as_ref().map(Socket::reset_on_close) {
            log::debug!("a connection ends without a reset: {error}");
        }
        self.socket = None;
    }

    /// Sends the guest a reset.
    pub(super) fn reset(&mut self, core: &mut Core) {
        self.send_control(core, RST | ACK);
    }
}
