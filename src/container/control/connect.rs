//! Connections to services in a container.
//!
//! The shim connects, and each connection is a vsock stream of its own.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::stream::{ControlStream, ReadExtent, StreamError, protocol_error};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{CONNECT_PORT, FromGuest, FromHost, VERSION_CONNECT};
use crate::sys::{left, wait_any};
use crate::virtio::vsock::VsockStream;
use crate::vm::Vm;

/// How long the guest may take to find the service.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to the guest's listener on `port`, through a shim of this protocol version.
pub(in crate::container) fn connect(vm: &Vm, version: u32, port: u16) -> Result<VsockStream> {
    open(vm, version, port).doing(|| format!("connecting to port {port} of the container"))
}

/// Bounds of the growing pauses between two tries.
const MIN_RETRY_PAUSE: Duration = Duration::from_millis(1);
const MAX_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The same for a service that may not listen yet.
pub(in crate::container) fn connect_within(vm: &Vm, version: u32, port: u16, timeout: Duration) -> Result<VsockStream> {
    let begin = Instant::now();
    let mut pause = MIN_RETRY_PAUSE;
    loop {
        match connect(vm, version, port) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let left = timeout.saturating_sub(begin.elapsed());
                if left.is_zero() {
                    let what = format!("nothing has listened for {timeout:?}");
                    return Err(error.with_kind(ErrorKind::TimedOut).doing(what));
                }
                // The next try finds out how it ended.
                let _ = vm.wait_timeout(pause.min(left));
                pause = (pause * 2).min(MAX_RETRY_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn open(vm: &Vm, version: u32, port: u16) -> Result<VsockStream> {
    check(version, port)?;
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let stream = vm.connect_vsock(CONNECT_PORT).map_err(|error| match error.kind() {
        // It has been there, so it is there no more.
        _ if vm.try_wait().is_some() => super::ended(),
        ErrorKind::NotFound => error.with_kind(ErrorKind::Unsupported).doing("reaching the guest's shim"),
        _ => error.doing("reaching the guest's shim"),
    })?;
    ask(stream, port, deadline)
}

/// Asks the shim at the other end for the service. The stream is the service's when this returns.
fn ask(stream: VsockStream, port: u16, deadline: Instant) -> Result<VsockStream> {
    // What the service says behind the answer is the caller's.
    let mut stream = ControlStream::new(stream, ReadExtent::Message)?;
    let mut request = Vec::new();
    FromHost::Connect { port }.encode(0, &mut request).map_err(|e| protocol_error(&e))?;
    // A shim that refuses at once has hung up, and its answer can be read all the same. A stream that is new takes it whole.
    if let Err(error) = stream.connection().write_all(&request) {
        log::debug!("a connection to the guest was closed before it was used: {error}");
    }
    match read_answer(&mut stream, deadline)? {
        0 => Ok(stream.into_connection()?.report_resets()),
        errno => Err(refusal(errno)),
    }
}

fn check(version: u32, port: u16) -> Result<()> {
    if port == 0 {
        return Err(Error::invalid("connect", "a port of the container is 1 or higher, not 0"));
    }
    if version < VERSION_CONNECT {
        let why = format!("the guest's shim speaks protocol version {version}, connections need {VERSION_CONNECT}");
        return Err(Error::new(ErrorKind::Incompatible, why));
    }
    Ok(())
}

/// Reads the shim's answer, and nothing of what the service says.
fn read_answer(stream: &mut ControlStream, deadline: Instant) -> Result<i32> {
    loop {
        // The answer takes two short reads; a shim may also send it byte by byte.
        let mut reads = 1;
        match stream.next(&mut reads) {
            Ok(None) => {}
            Ok(Some(received)) => {
                return match received.message {
                    Some(FromGuest::Connected { errno }) => Ok(errno),
                    other => Err(protocol_error(&other)),
                };
            }
            Err(StreamError::Closed { .. }) => {
                return Err(Error::new(ErrorKind::GuestFailed, "the guest hung up without an answer"));
            }
            Err(error) => return Err(Error::from(error).doing("reading the guest's answer")),
        }
        // A read that was made may have left something, which makes the descriptor readable at once.
        let waiting = || "waiting for the guest's answer";
        if !wait_any(&[stream.as_fd()], Some(left(deadline))).doing(waiting)? || left(deadline).is_zero() {
            let why = format!(
                "no service has answered within {CONNECT_TIMEOUT:?}: one that listens may have too many callers waiting"
            );
            return Err(Error::new(ErrorKind::TimedOut, why));
        }
    }
}

/// What the guest's error number means to who asked.
fn refusal(errno: i32) -> Error {
    let (kind, why) = match errno {
        libc::ECONNREFUSED => (
            ErrorKind::NotFound,
            "no service listens there, on any address of the container: start the service first, or try again when it is ready",
        ),
        libc::EAGAIN => {
            (ErrorKind::ResourceExhausted, "there are 512 connections to services already: close some of them first")
        }
        _ => return Error::from(io::Error::from_raw_os_error(errno)).doing("connecting, in the guest"),
    };
    Error::new(kind, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::pair;
    use std::io::Read;

    fn soon(millis: u64) -> Instant {
        Instant::now() + Duration::from_millis(millis)
    }

    /// A shim's answer, and what the service says right behind it.
    fn answered(errno: i32, behind: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        FromGuest::Connected { errno }.encode(0, &mut bytes).unwrap();
        bytes.extend_from_slice(behind);
        bytes
    }

    #[test]
    fn what_the_service_says_behind_the_answer_is_the_callers() {
        let (near, mut far) = pair();
        far.write_all(&answered(0, b"220 ready")).unwrap();
        let mut stream = ask(near, 80, soon(10_000)).unwrap();
        let mut greeting = [0; 9];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"220 ready");
        // The request was the only thing said, and the stream blocks again.
        far.set_nonblocking(true).unwrap();
        let mut request = Vec::new();
        FromHost::Connect { port: 80 }.encode(0, &mut request).unwrap();
        let mut said = vec![0; 100];
        let n = far.read(&mut said).unwrap();
        assert_eq!(said[..n], request);
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let begin = Instant::now();
        assert_eq!(stream.read(&mut said).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(begin.elapsed() >= Duration::from_millis(15), "it waits");
    }

    #[test]
    fn shims_that_answer_slowly_wrongly_or_not_at_all_are_errors() {
        let (near, mut far) = pair();
        far.write_all(&answered(libc::ECONNREFUSED, b"")).unwrap();
        assert_eq!(ask(near, 80, soon(10_000)).unwrap_err().kind(), ErrorKind::NotFound);
        // Silence, and a half answer.
        for bytes in [&[][..], &answered(0, b"")[..13]] {
            let (near, mut far) = pair();
            far.write_all(bytes).unwrap();
            let begin = Instant::now();
            assert_eq!(ask(near, 80, soon(30)).unwrap_err().kind(), ErrorKind::TimedOut);
            assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        }
        // The end in the middle, another message, one too long.
        let mut other = Vec::new();
        FromGuest::Spawned { pid: 1 }.encode(0, &mut other).unwrap();
        for bytes in [&answered(0, b"")[..13], &other, &[0xff; 12]] {
            let (near, mut far) = pair();
            far.write_all(bytes).unwrap();
            drop(far);
            assert_eq!(ask(near, 80, soon(10_000)).unwrap_err().kind(), ErrorKind::GuestFailed);
        }
        // Byte by byte, which never comes to an end in time.
        let (near, mut far) = pair();
        let talk = std::thread::spawn(move || {
            let long = [vec![255, 15, 0, 0], vec![0; 4095]].concat();
            long.iter().all(|byte| {
                std::thread::sleep(Duration::from_millis(1));
                far.write_all(&[*byte]).is_ok()
            })
        });
        assert_eq!(ask(near, 80, soon(50)).unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(!talk.join().unwrap(), "it was hung up");
    }

    #[test]
    fn invalid_ports_are_rejected_before_a_request() {
        assert_eq!(check(VERSION_CONNECT, 0).unwrap_err().kind(), ErrorKind::InvalidConfig);
        let error = check(1, 80).unwrap_err();
        assert!(error.kind() == ErrorKind::Incompatible && error.to_string().contains("version 1"), "{error}");
        check(VERSION_CONNECT, 65535).unwrap();
    }

    #[test]
    fn refusals_name_the_remedy() {
        for (errno, kind, text) in [
            (libc::ECONNREFUSED, ErrorKind::NotFound, "start the service first"),
            (libc::EAGAIN, ErrorKind::ResourceExhausted, "close some"),
            (libc::ENETUNREACH, ErrorKind::Io, "in the guest"),
        ] {
            let error = refusal(errno);
            assert!(error.kind() == kind && error.to_string().contains(text), "{error}");
        }
    }
}
