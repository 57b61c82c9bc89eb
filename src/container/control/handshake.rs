//! The handshake with the shim, from its first connection to its "ready".
//!
//! It runs on the thread that starts the container, with the time-out of the start as its bound.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::stream::{ControlStream, ReadExtent, protocol_error};
use crate::container::{CancelToken, Startup};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{CONTROL_PORT, FromGuest, FromHost, VERSION_MAX, VERSION_MIN, negotiate};
use crate::sys::{left, wait_any};
use crate::virtio::vsock::VsockStream;
use crate::vm::Vm;

/// How long a VM that is known to end may take to say how.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// Messages of a shim before it is ready; more are nonsense. It has two to say.
const MAX_MESSAGES: usize = 64;

/// What a shim that is ready has said.
pub(super) struct Handshake {
    /// With what came behind its last message.
    pub stream: ControlStream,
    pub startup: Startup,
    /// The version of the protocol that both speak.
    pub version: u32,
    /// The guest's kernel, as the shim says: two numbers of 16 bits each.
    pub kernel: u32,
}

/// Until when a start may go on: its deadline, `None` for none, and the token that ends it before.
pub(super) struct StartDeadline<'a> {
    pub deadline: Option<Instant>,
    pub cancel: Option<&'a CancelToken>,
}

impl StartDeadline<'_> {
    /// Waits until `it` is readable. False when the time is over.
    fn wait(&self, it: &impl AsFd) -> Result<bool> {
        let mut fds = vec![it.as_fd()];
        fds.extend(self.cancel.map(AsFd::as_fd));
        let readable = wait_any(&fds, self.deadline.map(left)).doing(|| "waiting for the shim")?;
        self.cancel.map_or(Ok(()), CancelToken::check)?;
        Ok(readable && !self.is_over())
    }

    fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| left(deadline).is_zero())
    }
}

/// Waits until the shim says that it is ready. The VM of one that does not is killed.
///
/// # Errors
/// `TimedOut` with the last stage; `Cancelled`; `GuestFailed` when the shim or the VM has failed; `Incompatible` when no
/// version of the protocol is common.
pub(super) fn handshake(
    vm: &Vm,
    begin: Instant,
    timeout: Duration,
    start_deadline: &StartDeadline<'_>,
) -> Result<Handshake> {
    let greeted = connection(vm, start_deadline).and_then(|stream| converse(stream, begin, start_deadline));
    greeted.map_err(|error| startup_error(vm, timeout, error))
}

fn connection(vm: &Vm, start_deadline: &StartDeadline<'_>) -> Result<VsockStream> {
    let listener = vm.listen_vsock(CONTROL_PORT)?;
    let outcome = match start_deadline.wait(&listener)? {
        true => listener.try_accept(),
        false => Ok(None),
    };
    // It may have tried, and the host had no descriptor for it.
    let none = || Error::new(ErrorKind::TimedOut, "the shim never connected");
    outcome.and_then(|stream| stream.ok_or_else(none)).map_err(|error| listener.refused().unwrap_or(error))
}

pub(super) fn converse(stream: VsockStream, begin: Instant, start_deadline: &StartDeadline<'_>) -> Result<Handshake> {
    let mut stream = ControlStream::new(stream, ReadExtent::Ahead)?;
    let (mut common, mut messages) = (None, 0);
    loop {
        if !start_deadline.wait(&stream)? {
            return Err(Error::new(ErrorKind::TimedOut, "the shim never said that it is ready"));
        }
        let mut reads = 1;
        while let Some(received) = stream.next(&mut reads)? {
            messages += 1;
            if messages > MAX_MESSAGES {
                return Err(protocol_error(&format_args!("more than {MAX_MESSAGES} messages before it was ready")));
            }
            match received.message {
                Some(FromGuest::Hello { .. }) if common.is_some() => return Err(protocol_error(&"a second Hello")),
                Some(FromGuest::Hello { min, max }) => {
                    let version = negotiate(min, max).ok_or_else(|| strangers(min, max))?;
                    common = Some(version);
                    let mut hello = Vec::new();
                    FromHost::Hello { version }.encode(0, &mut hello).map_err(|e| protocol_error(&e))?;
                    // The stream is new, so it has room for the few bytes of this.
                    stream.connection().write_all(&hello).doing(|| "greeting the shim")?;
                }
                Some(FromGuest::Ready { user_space_ns, ready_ns, kernel }) => {
                    let startup = startup(begin.elapsed(), user_space_ns, ready_ns);
                    let version = common.ok_or_else(|| protocol_error(&"Ready before Hello"))?;
                    return Ok(Handshake { stream, startup, version, kernel });
                }
                Some(FromGuest::Failed { stage, errno, text }) => {
                    let os =
                        if errno == 0 { String::new() } else { format!(": {}", io::Error::from_raw_os_error(errno)) };
                    return Err(Error::new(
                        ErrorKind::GuestFailed,
                        format!("the guest could not be set up: {stage:?}: {}{os}", text.escape_ascii()),
                    ));
                }
                _ => {}
            }
        }
    }
}

/// The guest's times, on the host's clock: it says at `ready` that it is.
fn startup(ready: Duration, user_space_ns: u64, ready_ns: u64) -> Startup {
    let since = Duration::from_nanos(ready_ns.saturating_sub(user_space_ns));
    let user_space_started = ready.saturating_sub(since);
    Startup { user_space_started, ready, kernel_uptime: Duration::from_nanos(user_space_ns) }
}

/// Converses with whatever is behind the stream, at most for a moment.
#[cfg(any(test, feature = "internals"))]
pub(super) fn converse_with(stream: VsockStream) {
    let deadline = Instant::now().checked_add(Duration::from_millis(50));
    if let Err(error) = converse(stream, Instant::now(), &StartDeadline { deadline, cancel: None }) {
        assert!(!error.to_string().contains(['\n', '\x1b']), "a shim's text is one line");
    }
}

fn strangers(min: u32, max: u32) -> Error {
    Error::new(
        ErrorKind::Incompatible,
        format!(
            "the guest's shim speaks protocol versions {min} to {max}, this library {VERSION_MIN} to {VERSION_MAX}"
        ),
    )
}

/// Why a guest did not become ready, as far as the VM knows more than the control stream does.
fn startup_error(vm: &Vm, timeout: Duration, error: Error) -> Error {
    match error.kind() {
        ErrorKind::Cancelled => {
            vm.kill();
            error
        }
        ErrorKind::TimedOut => {
            vm.kill();
            // Its end tells where the guest was.
            let _ = vm.wait_timeout(END_TIMEOUT);
            let report = vm.report().for_people();
            Error::new(ErrorKind::TimedOut, format!("the guest was not ready within {timeout:?} ({report})"))
        }
        ErrorKind::InvalidState => match vm.wait_timeout(END_TIMEOUT) {
            Some(exit) => {
                let console = exit.report().for_people();
                Error::new(ErrorKind::GuestFailed, format!("before it was ready, {exit} ({console})"))
            }
            None => error,
        },
        _ => {
            let lines = vm.report().console_lines(5);
            Error::new(
                error.kind(),
                if lines.is_empty() { error.to_string() } else { format!("{error}; console: {lines}") },
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::pair;
    use std::io::Write;

    fn soon(millis: u64) -> StartDeadline<'static> {
        StartDeadline { deadline: Some(Instant::now() + Duration::from_millis(millis)), cancel: None }
    }

    fn frame(message: &FromGuest<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        message.encode(0, &mut bytes).unwrap();
        bytes
    }

    fn greeted(near: VsockStream, start_deadline: &StartDeadline<'_>) -> Result<Handshake> {
        converse(near, Instant::now(), start_deadline)
    }

    #[test]
    fn silent_shim_handshake_times_out() {
        let (near, _far) = pair();
        assert_eq!(greeted(near, &soon(20)).err().unwrap().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn flooding_shim_handshake_times_out() {
        let (near, far) = pair();
        let talk = std::thread::spawn(move || {
            let unknown = [0u32.to_le_bytes(), 1u32.to_le_bytes(), 0xffffu32.to_le_bytes()].concat();
            while (&far).write_all(&unknown).is_ok() {}
        });
        let error = greeted(near, &StartDeadline { deadline: None, cancel: None }).err().unwrap();
        assert!(error.kind() == ErrorKind::GuestFailed && error.to_string().contains("64"), "{error}");
        talk.join().unwrap();
    }

    #[test]
    fn slow_shim_handshake_times_out() {
        let (near, far) = pair();
        let talk = std::thread::spawn(move || {
            // The beginning of a frame, byte by byte, for ever.
            while (&far).write_all(&[1]).is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        assert!(greeted(near, &soon(50)).is_err());
        talk.join().unwrap();
    }

    #[test]
    fn second_hello_is_a_protocol_error() {
        let (near, far) = pair();
        let hello = frame(&FromGuest::Hello { min: VERSION_MIN, max: VERSION_MAX });
        (&far).write_all(&[hello.clone(), hello].concat()).unwrap();
        let error = greeted(near, &soon(10_000)).err().unwrap();
        assert!(error.to_string().contains("second Hello"), "{error}");
    }

    #[test]
    fn ready_before_hello_is_a_protocol_error() {
        let (near, far) = pair();
        (&far).write_all(&frame(&FromGuest::Ready { user_space_ns: 1, ready_ns: 2, kernel: 0 })).unwrap();
        assert!(greeted(near, &soon(10_000)).err().unwrap().to_string().contains("before Hello"));
    }

    #[test]
    fn the_text_of_a_failure_is_one_line() {
        let (near, far) = pair();
        let failed = FromGuest::Failed { stage: crate::proto::Stage::Mount, errno: 0, text: b"a\n\x1b[31mred\xff" };
        (&far).write_all(&frame(&failed)).unwrap();
        let text = greeted(near, &soon(10_000)).err().unwrap().to_string();
        assert!(text.ends_with(r"a\n\x1b[31mred\xff"), "{text}");
    }

    #[test]
    fn a_start_that_is_cancelled_ends_at_once() {
        let (near, _far) = pair();
        let token = CancelToken::new().unwrap();
        let theirs = token.clone();
        let cancel = std::thread::spawn(move || theirs.cancel());
        let error = greeted(near, &StartDeadline { deadline: None, cancel: Some(&token) }).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        cancel.join().unwrap();
    }
}
