//! The standard streams of a process: which of the guest's connections they are.
//!
//! Every program in the guest can connect to the host's ports. The shim's connections begin with a cookie that only host and
//! shim know; others are hung up.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::control::Agent;
use super::process::ProcessShared;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{COOKIE_SIZE, VERSION_COOKIE};
use crate::sys::{fill_random, left, wait_any};
use crate::virtio::vsock::{VsockListener, VsockStream};
use crate::vm::Vm;

/// How long the shim may take to connect all streams of a process. It has done so before it says that the program runs, so
/// they are here already.
const STREAM_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections whose first bytes have not all arrived, at once. The oldest are hung up for newer ones.
const MAX_CANDIDATES: usize = 32;

/// What the streams of one process begin with.
#[derive(Clone)]
struct Cookie(Vec<u8>);

impl Cookie {
    /// Returns a random one. It is empty for a shim of a version that knows of none.
    fn new(version: u32) -> Result<Self> {
        let mut bytes = vec![0; if version < VERSION_COOKIE { 0 } else { COOKIE_SIZE }];
        fill_random(&mut bytes).doing(|| "making the streams' cookie")?;
        Ok(Self(bytes))
    }
}

/// Where the shim connects the standard streams of one process.
pub(super) struct StdioListeners {
    /// `None` where it is `/dev/null`.
    listeners: [Option<VsockListener>; 3],
    cookie: Cookie,
}

impl StdioListeners {
    /// Listens on a new port for each stream that is `connected`.
    pub(super) fn listen(vm: &Vm, agent: &Agent, connected: [bool; 3]) -> Result<Self> {
        let ports = connected.map(|connected| connected.then(|| agent.new_port()));
        let listeners = match ports {
            [None, None, None] => [None, None, None],
            ports => vm.listen_vsock_ports(ports)?,
        };
        Ok(Self { listeners, cookie: Cookie::new(agent.version())? })
    }

    pub(super) fn ports(&self) -> [Option<u32>; 3] {
        self.listeners.each_ref().map(|it| it.as_ref().map(VsockListener::port))
    }

    pub(super) fn cookie(&self) -> Vec<u8> {
        self.cookie.0.clone()
    }

    /// The error of the first listener that could not take a connection for want of something of the host's.
    pub(super) fn refused(&self) -> Option<Error> {
        self.listeners.iter().flatten().find_map(VsockListener::refused)
    }

    /// The streams to come, which have [`STREAM_TIMEOUT`] together.
    pub(super) fn into_streams(self) -> [PendingStream; 3] {
        let (deadline, cookie) = (Instant::now() + STREAM_TIMEOUT, self.cookie);
        self.listeners.map(|listener| PendingStream { listener, cookie: cookie.clone(), deadline })
    }
}

/// One of them.
pub(super) struct PendingStream {
    listener: Option<VsockListener>,
    cookie: Cookie,
    deadline: Instant,
}

impl PendingStream {
    /// Takes the shim's connection; `None` where the stream is `/dev/null`.
    ///
    /// # Errors
    /// `TimedOut` when the guest has not connected within ten seconds; `ResourceExhausted` when its connection was
    /// refused for want of descriptors.
    pub(super) fn accept(self, state: &ProcessShared) -> Result<Option<VsockStream>> {
        self.listener.map(|it| accept(&it, &self.cookie, state, self.deadline)).transpose()
    }
}

/// A connection that may be the shim's.
struct Candidate {
    stream: VsockStream,
    read: Vec<u8>,
}

/// What is known of one.
enum Verdict {
    Shims,
    Strangers,
    Unknown,
}

impl Candidate {
    fn judge(&mut self, cookie: &Cookie) -> Verdict {
        let mut rest = [0; COOKIE_SIZE];
        let room = cookie.0.len() - self.read.len();
        if room == 0 {
            return Verdict::Shims;
        }
        match self.stream.read(rest.get_mut(..room).unwrap_or_default()) {
            Ok(0) => return Verdict::Strangers,
            Ok(n) => self.read.extend_from_slice(rest.get(..n).unwrap_or_default()),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => return Verdict::Strangers,
        }
        match () {
            () if self.read == cookie.0 => Verdict::Shims,
            () if cookie.0.starts_with(&self.read) => Verdict::Unknown,
            () => Verdict::Strangers,
        }
    }
}

/// Takes the shim's connection for one stream of the process. One that has ended already may have none: its stream is at its
/// end then.
fn accept(listener: &VsockListener, cookie: &Cookie, state: &ProcessShared, deadline: Instant) -> Result<VsockStream> {
    let mut candidates: Vec<Candidate> = Vec::new();
    loop {
        // Looked at first: what the shim connected before the end is here by then.
        let over = state.has_ended();
        while let Some(stream) = next(listener, state, deadline)?.filter(|_| !left(deadline).is_zero()) {
            stream.set_nonblocking(true)?;
            if candidates.len() >= MAX_CANDIDATES {
                candidates.remove(0);
            }
            candidates.push(Candidate { stream, read: Vec::new() });
            if let Some(stream) = shims(&mut candidates, cookie) {
                return finished(stream, state);
            }
        }
        if let Some(stream) = shims(&mut candidates, cookie) {
            return finished(stream, state);
        }
        if over {
            return VsockStream::ended().doing(|| "making a stream that has ended");
        }
        let mut fds: Vec<BorrowedFd<'_>> = vec![listener.as_fd(), state.ended()];
        fds.extend(candidates.iter().map(|it| it.stream.as_fd()));
        let ready = wait_any(&fds, Some(left(deadline))).doing(|| "waiting for the process's stream")?;
        if !ready || left(deadline).is_zero() {
            return Err(Error::new(
                ErrorKind::TimedOut,
                format!("the guest has not connected the process's stream within {STREAM_TIMEOUT:?}"),
            ));
        }
    }
}

/// The next connection that is there already.
fn next(listener: &VsockListener, state: &ProcessShared, deadline: Instant) -> Result<Option<VsockStream>> {
    match listener.try_accept() {
        Ok(stream) => Ok(stream),
        // The VM has ended, and the process with it.
        Err(e) if e.kind() == ErrorKind::InvalidState && state.wait(Some(deadline))?.is_some() => Ok(None),
        Err(e) => Err(e),
    }
}

fn shims(candidates: &mut Vec<Candidate>, cookie: &Cookie) -> Option<VsockStream> {
    let mut n = 0;
    while let Some(candidate) = candidates.get_mut(n) {
        match candidate.judge(cookie) {
            Verdict::Shims => return Some(candidates.swap_remove(n).stream),
            Verdict::Strangers => drop(candidates.swap_remove(n)),
            Verdict::Unknown => n += 1,
        }
    }
    None
}

fn finished(stream: VsockStream, state: &ProcessShared) -> Result<VsockStream> {
    stream.set_nonblocking(false)?;
    state.keep(&stream);
    Ok(stream)
}
