//! [`Flow`]: one TCP connection (RFC 9293). It is a state machine between a guest and a socket of the host.
//!
//! What goes to the guest stays in the socket until it is acknowledged, so sending it again is peeking at it again.
//! There is no congestion control: the link is memory, and what is lost on it was dropped by ourselves.

mod incoming;
mod outgoing;

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Segment, Tried};
use crate::memory::Segment as Piece;
use crate::network::user::core::{Begun, Core};
use crate::network::user::generational::{Id, Owner};
use crate::network::user::host::Alarm;
use crate::network::wire::{self, ACK, FIN, RST, SYN, Tcp};
use crate::sys::{EventSet, Socket};

/// Both ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::network::user) struct FlowKey {
    pub guest: (IpAddr, u16),
    pub remote: (IpAddr, u16),
}

/// How far a connection is (RFC 9293, 3.3.2). Other fields say which sides have closed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest has called, and gets no answer until the host's socket is connected.
    Connecting,
    /// SYN-RECEIVED: the host's socket is connected, and the guest gets its answer.
    Answering,
    /// SYN-SENT: a client on the host has called the guest.
    Calling,
    /// ESTABLISHED and all that closes it.
    Open,
    /// TIME-WAIT: only the guest's last FIN may come again.
    Over,
}

/// What becomes of a flow.
#[derive(Debug)]
pub(super) enum SegmentOutcome {
    Live,
    /// Both sides are done.
    Over,
    /// Forgotten; the peer on the host gets a reset.
    Gone,
    /// As `Gone`, and the guest gets a reset.
    Reset,
    /// The host could not connect.
    Failed(io::Error),
}

/// What should be sent next, and how many bytes of data with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Syn,
    Data(usize),
    Fin,
    Ack,
}

/// Until something is sent again; doubles each time.
const RESEND: Duration = Duration::from_millis(250);
const MAX_RESEND_TIMEOUT: Duration = Duration::from_secs(30);
/// How often without an answer. About four minutes.
const MAX_RETRIES: u8 = 14;
/// How long the guest's last FIN may come again. The guest is near.
const LINGER: Duration = Duration::from_secs(2);
/// So that three times the same acknowledgement means a loss (RFC 5681, 3.2).
const DUPLICATES: u8 = 3;
/// What a guest that does not say otherwise can take (RFC 9293, 3.7.1).
const DEFAULT_MSS: (u16, u16) = (536, 1220);
/// The window scale's shift, where the guest can scale: 1 MiB fits.
pub(super) const SHIFT: u8 = 5;

#[derive(Debug)]
pub(super) struct Flow {
    pub id: Id,
    pub key: FlowKey,
    pub phase: Phase,
    /// `None` when it is over.
    socket: Option<Socket>,
    /// The other end is in this process, on a socket that cannot discard.
    pub local: bool,
    /// The guest has called.
    pub outgoing: bool,
    /// A caller of a published port, and where the service was looked for.
    pub caller: Option<(Id, Tried)>,

    // To the guest: sequence numbers (RFC 9293, 3.3.1). `sent` is where the next segment begins, `max` the highest ever sent.
    una: u32,
    sent: u32,
    max: u32,
    window: u32,
    window_seq: u32,
    window_ack: u32,
    their_shift: u8,
    pub mss: u16,
    /// Where our FIN lies, once it was sent.
    fin: Option<u32>,
    fin_acked: bool,
    duplicates: u8,
    /// Losses before this are known.
    recover: u32,
    /// The socket itself knows where peeking goes on.
    peeks: bool,

    // From the guest.
    received: u32,
    /// Up to here it may send.
    edge: u32,
    our_shift: Option<u8>,
    guest_fin: bool,
    shut: bool,
    /// What the host's socket did not take yet.
    backlog: VecDeque<u8>,

    /// The socket may have data.
    readable: bool,
    /// Its peer has closed.
    ended: bool,
    probe: bool,
    ack_due: bool,
    pub queued: bool,
    retries: u8,
    resend_at: Option<Instant>,
    active: Instant,
    pub alarm: Alarm,
}

/// Whether `a` lies after `b` (RFC 9293, 3.4).
fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

impl Flow {
    /// `socket` is connecting, or connected when `phase` is not that. `syn` is the guest's.
    pub(super) fn new(id: Id, key: FlowKey, socket: Socket, phase: Phase, iss: u32, now: Instant) -> Self {
        let peeks = socket.peek_from(0).is_ok();
        Self {
            id,
            key,
            phase,
            socket: Some(socket),
            local: false,
            outgoing: false,
            caller: None,
            una: iss,
            sent: iss,
            max: iss,
            window: 0,
            window_seq: 0,
            window_ack: 0,
            their_shift: 0,
            mss: if key.guest.0.is_ipv4() { DEFAULT_MSS.0 } else { DEFAULT_MSS.1 },
            fin: None,
            fin_acked: false,
            duplicates: 0,
            recover: iss,
            peeks,
            received: 0,
            edge: 0,
            our_shift: None,
            guest_fin: false,
            shut: false,
            backlog: VecDeque::new(),
            readable: true,
            ended: false,
            probe: false,
            ack_due: false,
            queued: false,
            retries: 0,
            resend_at: None,
            active: now,
            alarm: Alarm::default(),
        }
    }

    #[cfg(test)]
    pub(super) fn without_peek_offset(&mut self) {
        self.peeks = self.socket.as_ref().is_some_and(|s| s.peek_from(-1).is_err());
    }

    /// The guest's SYN, as far as it matters to those who quote it.
    pub(super) fn syn(&self) -> Tcp {
        let (seq, window) = (self.received.wrapping_sub(1), self.window as u16);
        Tcp { src: self.key.guest.1, dst: self.key.remote.1, seq, flags: SYN, window, ..Tcp::default() }
    }

    /// The guest is called, and may scale windows if it likes.
    pub(super) fn calls(&mut self) {
        self.our_shift = Some(SHIFT);
    }

    pub(super) fn begun(&self) -> Begun {
        if self.outgoing { Begun::ByGuest } else { Begun::ByCaller }
    }

    pub(super) fn watch(&self, core: &Core) -> io::Result<()> {
        self.socket.as_ref().map_or(Ok(()), |socket| core.host.watch(socket.as_fd(), Owner::Tcp(self.id)))
    }

    /// What the guest's SYN says.
    pub(super) fn called(&mut self, syn: &Tcp, mtu: u16) {
        self.outgoing |= self.phase != Phase::Calling;
        let headers = wire::ip_header_len(self.key.guest.0) as u16 + 20;
        // Less than anybody's minimum would only make small segments.
        self.mss = syn.mss.unwrap_or(self.mss).clamp(88, mtu.max(576) - headers);
        self.their_shift = syn.shift.unwrap_or(0);
        self.our_shift = syn.shift.map(|_| SHIFT);
        self.received = syn.seq.wrapping_add(1);
        self.edge = self.received;
        (self.window, self.window_seq, self.window_ack) = (u32::from(syn.window), syn.seq, syn.ack);
    }

    pub(super) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Takes a segment of the guest. What the host does not take at once may be kept, up to `budget` bytes.
    pub(super) fn segment(
        &mut self,
        core: &mut Core,
        segment: &Segment<'_>,
        payload: &mut Vec<Piece>,
        budget: usize,
    ) -> SegmentOutcome {
        let tcp = &segment.tcp;
        self.active = core.host.now;
        match self.phase {
            Phase::Connecting => return if tcp.flags & RST != 0 { SegmentOutcome::Gone } else { SegmentOutcome::Live },
            Phase::Calling => return self.answered(core, tcp),
            Phase::Over => {
                self.ack_due = tcp.flags & RST == 0;
                return SegmentOutcome::Live;
            }
            Phase::Answering | Phase::Open => {}
        }
        if tcp.flags & RST != 0 {
            // Only the exact number is believed (RFC 5961, 3.2).
            if tcp.seq == self.received {
                return SegmentOutcome::Gone;
            }
            self.ack_due |= !after(self.received, tcp.seq) && !after(tcp.seq, self.edge);
            return SegmentOutcome::Live;
        }
        if tcp.flags & SYN != 0 {
            if self.phase == Phase::Answering && tcp.seq.wrapping_add(1) == self.received {
                self.sent = self.una;
            } else {
                // RFC 5961, 4.2.
                self.ack_due = true;
            }
            return SegmentOutcome::Live;
        }
        if tcp.flags & ACK == 0 {
            return SegmentOutcome::Live;
        }
        if let Err(outcome) = self.acknowledged(core, tcp, segment.len) {
            return outcome;
        }
        if self.phase == Phase::Open
            && let Err(error) = self.data(core, segment, payload, budget)
        {
            log::debug!("a connection of the guest ends: {error}");
            return SegmentOutcome::Reset;
        }
        self.outcome()
    }

    /// Over when both sides have closed and know it.
    fn outcome(&self) -> SegmentOutcome {
        if self.guest_fin && self.fin_acked && self.shut { SegmentOutcome::Over } else { SegmentOutcome::Live }
    }

    /// The guest's first answer to a call (RFC 9293, 3.10.7.3).
    fn answered(&mut self, core: &mut Core, tcp: &Tcp) -> SegmentOutcome {
        let ours = tcp.flags & ACK != 0 && tcp.ack == self.una.wrapping_add(1) && self.max == tcp.ack;
        if !ours {
            return SegmentOutcome::Live;
        }
        if tcp.flags & RST != 0 {
            return SegmentOutcome::Failed(io::ErrorKind::ConnectionRefused.into());
        }
        if tcp.flags & SYN != 0 {
            self.called(tcp, core.config.mtu);
            core.stats.connected += 1;
            (self.una, self.sent) = (tcp.ack, tcp.ack);
            (self.phase, self.ack_due, self.resend_at, self.retries) = (Phase::Open, true, None, 0);
        }
        SegmentOutcome::Live
    }

    /// RFC 9293, 3.10.7.4, "fifth, check the ACK field".
    fn acknowledged(&mut self, core: &mut Core, tcp: &Tcp, len: usize) -> Result<(), SegmentOutcome> {
        if after(tcp.ack, self.max) || after(self.una, tcp.ack) {
            // Of something that was never sent, or old.
            self.ack_due |= after(tcp.ack, self.max) && self.phase == Phase::Open;
            return Ok(());
        }
        let window = u32::from(tcp.window) << self.their_shift;
        if tcp.ack != self.una {
            let mut n = tcp.ack.wrapping_sub(self.una) as usize;
            if self.phase == Phase::Answering {
                (self.phase, n) = (Phase::Open, n - 1);
                core.stats.connected += 1;
            }
            if self.fin.is_some_and(|fin| after(tcp.ack, fin)) && !self.fin_acked {
                (self.fin_acked, n) = (true, n.saturating_sub(1));
            }
            self.una = tcp.ack;
            if after(self.una, self.sent) {
                self.sent = self.una;
            }
            self.consume(n, &mut core.buffer).map_err(|_| SegmentOutcome::Reset)?;
            (self.duplicates, self.retries) = (0, 0);
            self.resend_at = (self.una != self.max).then(|| core.host.now + RESEND);
        } else {
            let again = self.una != self.max && len == 0 && tcp.flags & FIN == 0 && window == self.window;
            self.duplicates = if again { self.duplicates.saturating_add(1) } else { self.duplicates };
            if self.duplicates == DUPLICATES && !after(self.recover, self.una) {
                self.recover = self.max;
                self.rewind(core);
            }
            // The guest answers, so that a closed window may stay closed forever (RFC 9293, 3.8.6.1).
            self.retries = 0;
        }
        if after(tcp.seq, self.window_seq) || tcp.seq == self.window_seq && !after(self.window_ack, tcp.ack) {
            (self.window, self.window_seq, self.window_ack) = (window, tcp.seq, tcp.ack);
        }
        Ok(())
    }

    /// The guest has `n` more bytes for good.
    fn consume(&mut self, mut n: usize, nowhere: &mut Vec<u8>) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        nowhere.resize(wire::MAX_PACKET, 0);
        while n > 0 {
            let taken = if self.local {
                let len = n.min(nowhere.len());
                socket.receive(nowhere.get_mut(..len).unwrap_or_default())?
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

    /// Everything that was not acknowledged is sent again.
    fn rewind(&mut self, core: &mut Core) {
        if self.sent == self.una {
            return;
        }
        core.stats.retransmitted += 1;
        (self.sent, self.readable) = (self.una, true);
        if let Some(socket) = self.socket.as_ref().filter(|_| self.peeks) {
            self.peeks = socket.peek_from(0).is_ok();
        }
    }

    /// Something has happened to the socket.
    pub(super) fn ready(&mut self, core: &mut Core, events: EventSet) -> SegmentOutcome {
        let failed = EventSet::ERROR | EventSet::HANG_UP;
        let Some(socket) = &self.socket else { return SegmentOutcome::Live };
        if self.phase == Phase::Connecting {
            if !events.intersects(failed | EventSet::OUT) {
                return SegmentOutcome::Live;
            }
            if let Some(error) = socket.error() {
                return SegmentOutcome::Failed(error);
            }
            (self.phase, self.active) = (Phase::Answering, core.host.now);
        }
        if events.intersects(failed) && socket.error().is_some() {
            return SegmentOutcome::Reset;
        }
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | failed);
        self.ended |= events.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP);
        if events.contains(EventSet::OUT) && self.phase == Phase::Open {
            match self.drain() {
                Ok(_) => return self.outcome(),
                Err(_) => return SegmentOutcome::Reset,
            }
        }
        SegmentOutcome::Live
    }

    /// When something must be done, whatever happens.
    pub(super) fn deadline(&self, core: &Core) -> Option<Instant> {
        let patience = self.patience(core);
        [self.resend_at, Some(self.active + patience)].into_iter().flatten().min()
    }

    fn patience(&self, core: &Core) -> Duration {
        let limits = &core.config.limits;
        match self.phase {
            Phase::Connecting | Phase::Answering | Phase::Calling => limits.half_open,
            Phase::Open if self.guest_fin || self.fin.is_some() => limits.half_closed,
            Phase::Open => limits.idle,
            Phase::Over => LINGER,
        }
    }

    /// Its alarm rang.
    pub(super) fn rang(&mut self, core: &mut Core) -> SegmentOutcome {
        self.alarm.rang();
        let now = core.host.now;
        if self.active + self.patience(core) <= now {
            core.stats.timed_out += u64::from(self.phase != Phase::Over);
            return match self.phase {
                Phase::Connecting | Phase::Calling => SegmentOutcome::Failed(io::ErrorKind::TimedOut.into()),
                Phase::Over => SegmentOutcome::Gone,
                _ => SegmentOutcome::Reset,
            };
        }
        if self.resend_at.is_some_and(|at| at <= now) {
            self.retries += 1;
            if self.retries > MAX_RETRIES {
                core.stats.timed_out += 1;
                return SegmentOutcome::Reset;
            }
            self.resend_at = Some(now + (RESEND * 2u32.pow(u32::from(self.retries))).min(MAX_RESEND_TIMEOUT));
            self.readable = true;
            if self.sent == self.una && self.phase == Phase::Open {
                self.probe = self.window == 0;
                self.resend_at = self.resend_at.filter(|_| self.probe);
            }
            self.recover = self.max;
            self.rewind(core);
        }
        SegmentOutcome::Live
    }

    /// Only the guest's last FIN may come now.
    pub(super) fn over(&mut self, now: Instant) {
        self.socket = None;
        (self.phase, self.resend_at, self.active) = (Phase::Over, None, now);
    }

    /// Gives away the socket of a caller that the guest has refused.
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

    /// Tells the guest.
    pub(super) fn reset(&mut self, core: &mut Core) {
        self.answer(core, RST | ACK);
    }
}
