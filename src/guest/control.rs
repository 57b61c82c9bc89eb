//! The control stream to the host, dialed once. Frames come in, messages go out, and neither is waited for. Owned by
//! the shim's one thread.

use super::alloc::vec::Vec;
use super::poweroff;
use super::sys::{self, Errno, Fd, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, Poll};
use crate::proto::{FromGuest, FromHost, HOST_CID, MessageFrame, Stage, VERSION_MAX, VERSION_MIN};

/// With so many bytes unsent, the shim reads no further requests until the host has taken some.
const MAX_UNSENT: usize = 64 * 1024;

/// Why the shim cannot go on.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) stage: Stage,
    pub(super) errno: Errno,
    /// What exactly, for people.
    pub(super) text: Vec<u8>,
}

impl Failure {
    pub(super) fn new(stage: Stage, errno: Errno, parts: &[&[u8]]) -> Self {
        Self { stage, errno, text: parts.concat() }
    }
}

/// The stream and what waits to be sent on it.
#[derive(Debug)]
pub(super) struct Control {
    socket: Fd,
    out: Vec<u8>,
}

impl Control {
    /// Connects to the host. The transport may still be starting and the host still be about to listen, so refusals are tried again for a while.
    pub(super) fn dial(port: u32) -> Result<Self, Errno> {
        let deadline = sys::now_ns() + 5_000_000_000;
        let mut pause_ms = 1;
        loop {
            match connect(port, deadline) {
                Ok(socket) => {
                    let mut control = Self { socket, out: Vec::new() };
                    control.say(0, &FromGuest::Hello { min: VERSION_MIN, max: VERSION_MAX });
                    return Ok(control);
                }
                Err(errno) if sys::now_ns() >= deadline => return Err(errno),
                Err(_) => sys::sleep_ms(pause_ms),
            }
            pause_ms = (pause_ms * 2).min(100);
        }
    }

    #[cfg(test)]
    pub(super) fn over(socket: Fd) -> Self {
        Self { socket, out: Vec::new() }
    }

    /// Queues a message and sends what can be sent. What the host does not take now stays queued; that it is gone is noticed by reading.
    pub(super) fn say(&mut self, stream: u32, message: &FromGuest<'_>) {
        // Every message of the guest fits its limit, so this cannot fail; were it to, a silent shim is better than a dead one.
        let _ = message.encode(stream, &mut self.out);
        self.flush();
    }

    /// Sends what can be sent now.
    pub(super) fn flush(&mut self) {
        while !self.out.is_empty() {
            match sys::write(&self.socket, &self.out) {
                Ok(n) => drop(self.out.drain(..n.min(self.out.len()))),
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Whether the host has left so much unread that nothing more should be said unasked.
    pub(super) fn is_full(&self) -> bool {
        self.out.len() >= MAX_UNSENT
    }

    pub(super) fn poll(&self) -> Poll {
        let write = if self.out.is_empty() { 0 } else { POLLOUT };
        let read = if self.is_full() { 0 } else { POLLIN };
        Poll { fd: self.socket.raw(), events: read | write, happened: 0 }
    }

    /// Reads what has arrived. 0: the host has gone.
    pub(super) fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        sys::read(&self.socket, into)
    }

    /// Says the last words, then gives the host a moment to take them and to hang up: the machine's end would otherwise overtake them.
    pub(super) fn close(mut self) {
        let deadline = Some(sys::now_ns() + 1_000_000_000);
        self.flush();
        while !self.out.is_empty() {
            let mut polls = [Poll { fd: self.socket.raw(), events: POLLOUT, happened: 0 }];
            match sys::poll(&mut polls, deadline) {
                Ok(n) if n > 0 && polls[0].happened == POLLOUT => self.flush(),
                Err(Errno::EINTR) => {}
                _ => return,
            }
        }
        let _ = sys::shut_write(&self.socket);
        let mut rest = [0u8; 512];
        loop {
            let mut polls = [Poll { fd: self.socket.raw(), events: POLLIN | POLLRDHUP, happened: 0 }];
            match sys::poll(&mut polls, deadline) {
                Ok(n) if n > 0 && polls[0].happened & (POLLHUP | POLLRDHUP) == 0 => {
                    if matches!(self.read(&mut rest), Ok(0)) {
                        return;
                    }
                }
                Err(Errno::EINTR) => {}
                _ => return,
            }
        }
    }

    /// Tells the host and the console why it ends, and ends the machine.
    pub(super) fn fail(mut self, failure: &Failure) -> ! {
        log_failure(failure);
        let Failure { stage, errno, text } = failure;
        self.say(0, &FromGuest::Failed { stage: *stage, errno: errno.0, text });
        self.close();
        poweroff::fault()
    }
}

/// Writes a failure on the console.
pub(super) fn log_failure(failure: &Failure) {
    let errno = poweroff::Decimal::new(failure.errno.0.unsigned_abs().into());
    poweroff::say(&[&failure.text, b": error ", errno.as_bytes()]);
}

fn connect(port: u32, deadline: u64) -> Result<Fd, Errno> {
    let (socket, connected) = sys::connect_vsock(HOST_CID, port)?;
    if !connected {
        let mut polls = [Poll { fd: socket.raw(), events: POLLOUT, happened: 0 }];
        if sys::poll(&mut polls, Some(deadline))? == 0 {
            return Err(Errno::ETIMEDOUT);
        }
        sys::connect_result(&socket)?;
    }
    Ok(socket)
}

/// Who may say what when: the version comes first, and only once.
#[derive(Debug, Default)]
pub(super) struct VersionGate {
    version: Option<u32>,
}

impl VersionGate {
    /// The message of a frame, if it is one to act on. An `Err` says what the host did wrong: the stream cannot go on.
    pub(super) fn admit<'a>(&mut self, frame: &MessageFrame<'a>) -> Result<Option<FromHost<'a>>, &'static [u8]> {
        let message = FromHost::parse(frame).map_err(|malformed| malformed.0.as_bytes())?;
        match (message, self.version) {
            (Some(FromHost::Hello { version }), None) => {
                if !(VERSION_MIN..=VERSION_MAX).contains(&version) {
                    return Err(b"version that was not offered");
                }
                self.version = Some(version);
                Ok(None)
            }
            (Some(FromHost::Hello { .. }), Some(_)) => Err(b"second version"),
            (Some(_), None) => Err(b"message before the version"),
            (message, _) => Ok(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Decoder, End, FROM_HOST_MAX};

    fn admit(gate: &mut VersionGate, message: FromHost<'_>) -> Result<bool, &'static [u8]> {
        let mut bytes = Vec::new();
        message.encode(0, &mut bytes).unwrap();
        let mut decoder = Decoder::new(FROM_HOST_MAX);
        let frame = decoder.next(&mut &bytes[..]).unwrap().unwrap();
        gate.admit(&frame).map(|message| message.is_some())
    }

    #[test]
    fn the_version_comes_first_and_once() {
        let hello = FromHost::Hello { version: VERSION_MAX };
        let shutdown = FromHost::Shutdown { grace_ms: 0, end: End::PowerOff };
        let mut gate = VersionGate::default();
        assert_eq!(admit(&mut gate, shutdown), Err(&b"message before the version"[..]));
        assert_eq!(
            admit(&mut gate, FromHost::Hello { version: VERSION_MAX + 1 }),
            Err(&b"version that was not offered"[..])
        );
        assert_eq!(admit(&mut gate, hello), Ok(false));
        assert_eq!(admit(&mut gate, shutdown), Ok(true));
        assert_eq!(admit(&mut gate, hello), Err(&b"second version"[..]));
    }

    #[test]
    fn unknown_kinds_are_skipped_even_before_the_version() {
        let frame = MessageFrame { stream: 0, kind: 77, payload: &[] };
        assert_eq!(VersionGate::default().admit(&frame), Ok(None));
    }

    #[test]
    fn unsent_messages_stop_reading() {
        let (_reader, writer) = sys::pipe().unwrap();
        sys::set_nonblocking(&writer).unwrap();
        let mut control = Control::over(writer);
        let message = FromGuest::Exited { code: 0 };
        while control.out.len() < MAX_UNSENT {
            control.say(1, &message);
        }
        assert_eq!(control.poll().events, POLLOUT);
    }
}
