//! One connection: what is to be sent to the guest, and what came from it. Knows sockets, not queues.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;
use std::sync::{MutexGuard, PoisonError};

use super::credit::Credit;
use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::stream::{SharedTail, Unread, VsockStream};
use crate::error::Result;
use crate::memory::{GuestMemory, Segment};
use crate::sys::{self, CloseOnFork, HeldDescriptors};

/// The ports of a connection, which identify it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct PortPair {
    pub host: u32,
    pub guest: u32,
}

/// Gives the outcome to the thread that waits in `connect`.
pub(super) type Answer = SyncSender<Result<VsockStream>>;

/// What should be said to the guest next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PendingControl {
    Request,
    Response,
    Shutdown(u32),
    /// At most so many bytes of data.
    Data(u32),
    CreditUpdate,
}

/// A connection, from the first packet to the last.
#[derive(Debug)]
pub(super) struct VsockConnection {
    pub ports: PortPair,
    pub credit: Credit,
    /// It is in the list of those that may have something to say.
    pub queued: bool,
    /// Its socket is watched.
    pub watched: bool,
    socket: CloseOnFork<UnixStream>,
    tail: SharedTail,
    /// Data of the guest that the embedder has not taken; bounded by [`super::credit::BUFFER`].
    backlog: VecDeque<u8>,
    /// Who waits for the guest's answer, and gets the stream then.
    connecting: Option<(Answer, VsockStream)>,
    /// Greeting not yet sent: REQUEST or RESPONSE.
    greet: Option<PendingControl>,
    /// The socket may have data, as far as its edges show.
    readable: bool,
    /// Directions that the embedder has closed, as flags of a shutdown packet, and those that were sent.
    closed: u32,
    closed_sent: u32,
    /// Which directions the guest has closed.
    guest_closed: u32,
    credit_asked: bool,
    /// Its descriptor, where the guest has made it.
    _held: Option<HeldDescriptors>,
}

impl VsockConnection {
    pub(super) fn accepted(ports: PortPair, socket: UnixStream, tail: SharedTail, held: HeldDescriptors) -> Self {
        Self { _held: Some(held), ..Self::new(ports, socket, tail, PendingControl::Response, None) }
    }

    pub(super) fn connecting(
        ports: PortPair,
        socket: UnixStream,
        tail: SharedTail,
        answer: Answer,
        stream: VsockStream,
    ) -> Self {
        Self::new(ports, socket, tail, PendingControl::Request, Some((answer, stream)))
    }

    fn new(
        ports: PortPair,
        socket: UnixStream,
        tail: SharedTail,
        greet: PendingControl,
        connecting: Option<(Answer, VsockStream)>,
    ) -> Self {
        Self {
            ports,
            credit: Credit::default(),
            queued: false,
            watched: true,
            socket: CloseOnFork::new(socket),
            tail,
            backlog: VecDeque::new(),
            connecting,
            greet: Some(greet),
            readable: false,
            closed: 0,
            closed_sent: 0,
            guest_closed: 0,
            credit_asked: false,
            _held: None,
        }
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The guest has accepted.
    pub(super) fn established(&mut self) {
        if let Some((answer, stream)) = self.connecting.take() {
            // The caller may have given up; the stream is closed then, and the guest gets a shutdown.
            let _ = answer.send(Ok(stream));
        }
    }

    pub(super) fn is_connecting(&self) -> bool {
        self.connecting.is_some()
    }

    /// The guest closes directions.
    pub(super) fn guest_closes(&mut self, flags: u32) {
        if self.guest_closed & SHUTDOWN_SEND == 0 && flags & SHUTDOWN_RECEIVE != 0 && flags & SHUTDOWN_SEND != 0 {
            // Before the embedder can see the end.
            self.remains().abrupt = true;
        }
        self.guest_closed |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
        self.flush();
    }

    fn remains(&self) -> MutexGuard<'_, Unread> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest wants to know how much it may send.
    pub(super) fn ask_credit(&mut self) {
        self.credit_asked = true;
    }

    pub(super) fn socket_readable(&mut self) {
        self.readable = true;
    }

    /// The embedder has closed both directions: its stream is gone.
    pub(super) fn socket_hung_up(&mut self) {
        self.readable = true;
        self.closed |= SHUTDOWN_RECEIVE;
    }

    /// What to say now, if anything.
    pub(super) fn due(&self) -> Option<PendingControl> {
        if self.greet.is_some() {
            return self.greet;
        }
        if self.is_connecting() {
            return None;
        }
        let may_send = self.credit.may_send();
        if self.readable
            && self.closed & SHUTDOWN_SEND == 0
            && may_send > 0
            && self.guest_closed & SHUTDOWN_RECEIVE == 0
        {
            return Some(PendingControl::Data(may_send));
        }
        // The end of sending follows after everything was read (`closed` gets the flag at end of file). It comes sooner
        // when the guest would not take more anyway.
        let deaf = self.guest_closed & SHUTDOWN_RECEIVE;
        let closed = if self.closed & deaf != 0 { SHUTDOWN_RECEIVE | SHUTDOWN_SEND } else { self.closed };
        let suppressed = closed & !self.closed_sent;
        if suppressed & SHUTDOWN_SEND != 0 || suppressed != 0 && !self.readable {
            return Some(PendingControl::Shutdown(closed));
        }
        (self.credit_asked || self.credit.needs_credit_update()).then_some(PendingControl::CreditUpdate)
    }

    /// It was said.
    pub(super) fn said(&mut self, due: PendingControl) {
        match due {
            PendingControl::Request | PendingControl::Response => self.greet = None,
            PendingControl::Shutdown(flags) => self.closed_sent |= flags,
            PendingControl::Data(_) | PendingControl::CreditUpdate => {}
        }
        self.credit_asked = false;
    }

    /// Moves data of the embedder straight into the guest. `None`: there is none, for now or for ever.
    pub(super) fn receive_into(&mut self, memory: &GuestMemory, segments: &[Segment]) -> Option<u32> {
        match memory.receive(segments, self.socket.as_fd()) {
            Ok(0) => {
                self.readable = false;
                self.closed |= SHUTDOWN_SEND;
                None
            }
            Ok(n) => {
                let n = n as u32;
                self.credit.sent(n);
                Some(n)
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => None,
            Err(e) => {
                self.readable = false;
                if e.kind() != io::ErrorKind::WouldBlock {
                    self.closed |= SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
                }
                None
            }
        }
    }

    /// Takes data of the guest: straight into the embedder's socket, the rest into the backlog.
    /// False when the guest sent more than it may.
    pub(super) fn send_from(&mut self, memory: &GuestMemory, segments: &[Segment]) -> bool {
        let total: usize = segments.iter().map(|s| s.len()).sum();
        if !self.credit.received(total as u32) {
            return false;
        }
        let mut done = 0;
        if self.backlog.is_empty() {
            done = match memory.send(segments, self.socket.as_fd()) {
                Ok(n) => n,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                // The embedder does not read any more: what the guest sends goes nowhere, as with any socket.
                Err(_) => total,
            };
            self.credit.forwarded(done as u32);
        }
        let mut skip = done;
        for segment in segments {
            let (skipped, rest) = segment.split_at(skip);
            skip -= skipped.len();
            let mut bytes = vec![0; rest.len()];
            if memory.read(rest.addr(), &mut bytes).is_err() {
                return false;
            }
            self.backlog.extend(bytes);
        }
        true
    }

    /// The embedder's socket may have room again.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (first, _) = self.backlog.as_slices();
            match sys::send(self.socket.as_fd(), first, false) {
                Ok(n) => {
                    self.backlog.drain(..n);
                    self.credit.forwarded(n as u32);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.credit.forwarded(self.backlog.len() as u32);
                    self.backlog.clear();
                }
            }
        }
        if self.guest_closed & SHUTDOWN_SEND != 0 {
            // Fails only when the embedder has closed already.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        if self.guest_closed & SHUTDOWN_RECEIVE != 0 {
            let _ = self.socket.shutdown(Shutdown::Read);
        }
    }

    /// Both directions are closed by the guest and nothing waits for the embedder.
    pub(super) fn finished(&self) -> bool {
        self.guest_closed == SHUTDOWN_SEND | SHUTDOWN_RECEIVE && self.backlog.is_empty()
    }

    /// The end: what the embedder has not taken stays readable in its stream.
    pub(super) fn end(mut self, refusal: impl FnOnce() -> crate::error::Error) {
        if let Some((answer, _)) = self.connecting.take() {
            let _ = answer.send(Err(refusal()));
        }
        self.flush();
        let mut backlog = std::mem::take(&mut self.backlog);
        let abrupt = self.guest_closed & SHUTDOWN_SEND == 0 && self.closed & SHUTDOWN_RECEIVE == 0;
        let mut remains = self.remains();
        remains.unread.append(&mut backlog);
        remains.abrupt |= abrupt;
        drop(remains);
        // What is there can still be read. A copy of the descriptor, in a child of fork say, keeps no reader waiting.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
