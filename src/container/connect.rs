//! Connections to services in a container.
//!
//! The shim connects, and each connection is a vsock stream of its own.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::handshake::protocol_error;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{CONNECT_PORT, Decoder, FROM_GUEST_MAX, FromGuest, FromHost, VERSION_CONNECT};
use crate::sys::left;
use crate::virtio::vsock::VsockStream;
use crate::vm::Vm;

/// How long the guest may take to find the service.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to the guest's listener on `port`, through a shim of this protocol version.
pub(super) fn connect(vm: &Vm, version: u32, port: u16) -> Result<VsockStream> {
    open(vm, version, port).doing(|| format!("connecting to port {port} of the container"))
}

fn open(vm: &Vm, version: u32, port: u16) -> Result<VsockStream> {
    check(version, port)?;
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    let mut stream = vm.connect_vsock(CONNECT_PORT).map_err(|error| match error.kind() {
        // It has been there, so it is there no more.
        _ if vm.try_wait().is_some() => Error::new(ErrorKind::InvalidState, "the container has ended"),
        ErrorKind::NotFound => error.with_kind(ErrorKind::Unsupported).doing("reaching the guest's shim"),
        _ => error.doing("reaching the guest's shim"),
    })?;
    let mut request = Vec::new();
    FromHost::Connect { port }.encode(0, &mut request).map_err(|e| protocol_error(&e))?;
    // A shim that refuses at once has hung up, and its answer can be read all the same.
    if let Err(error) = stream.write_all(&request) {
        log::debug!("a connection to the guest was closed before it was used: {error}");
    }
    let errno = read_answer(&mut stream, deadline)?;
    if errno != 0 {
        return Err(refusal(errno));
    }
    stream.set_read_timeout(None)?;
    Ok(stream.report_resets())
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
fn read_answer(stream: &mut VsockStream, deadline: Instant) -> Result<i32> {
    let mut decoder = Decoder::new(FROM_GUEST_MAX);
    let mut buffer = [0; 64];
    loop {
        let room = decoder.missing().min(buffer.len());
        stream.set_read_timeout(Some(left(deadline).max(Duration::from_millis(1))))?;
        let n = match stream.read(buffer.get_mut(..room).unwrap_or_default()) {
            Ok(0) => return Err(Error::new(ErrorKind::GuestFailed, "the guest hung up without an answer")),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let why = format!(
                    "no service has answered within {CONNECT_TIMEOUT:?}: one that listens may have too many callers waiting"
                );
                return Err(Error::new(ErrorKind::TimedOut, why));
            }
            Err(e) => return Err(e).doing(|| "reading the guest's answer"),
        };
        let mut input = buffer.get(..n).unwrap_or_default();
        if let Some(frame) = decoder.next(&mut input).map_err(|e| protocol_error(&e))? {
            return match FromGuest::parse(&frame).map_err(|e| protocol_error(&e))? {
                Some(FromGuest::Connected { errno }) => Ok(errno),
                other => Err(protocol_error(&other)),
            };
        }
        if Instant::now() >= deadline {
            return Err(Error::new(
                ErrorKind::TimedOut,
                format!("the guest has not answered within {CONNECT_TIMEOUT:?}"),
            ));
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
