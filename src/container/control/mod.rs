//! The control channel: requests to the guest's shim, and its answers. [`Agent`] is the thread that owns it.
//!
//! All holders of the container share it. Nothing the guest sends is trusted. Frames are bounded, and an answer to no
//! request of ours is dropped and counted. A stream that cannot be followed any more ends the VM.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `stream` | the one reader of messages, for all three kinds of conversations |
//! | `outbox` | requests that the shim has not taken yet |
//! | `handshake` | the conversation until the shim is ready, on the thread that starts the container |
//! | `client`, `session`, `entry` | the conversation after that, on a thread of its own: programs and their time-outs |
//! | `refusal` | what the shim says of a program that it could not start, as an error |
//! | `connect` | a conversation of two messages, on a connection that a service gets then |
//!
//! Each request that a caller waits for has a number and a time-out of its own:
//!
//! | request | number | answered within |
//! | --- | --- | --- |
//! | start of a program | the process's | [`START_TIMEOUT`] and [`KILL_MARGIN`], and 10 s for a busy host |
//! | end of a killed program | the process's | [`KILL_MARGIN`] |
//! | connection to a service | the connection is its own | `CONNECT_TIMEOUT` |
//! | shutdown | 0, the VM | its grace and 2 s, then the VM is killed |

mod client;
mod connect;
mod entry;
#[cfg(any(test, feature = "internals"))]
mod fuzzing;
mod handshake;
mod outbox;
mod refusal;
mod session;
mod stream;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(super) use client::ControlClient;
pub(super) use connect::{connect, connect_within};
pub(super) use entry::KILL_MARGIN;
use entry::START_TIMEOUT;
#[cfg(any(test, feature = "internals"))]
pub(crate) use fuzzing::control_stream;
use handshake::{Handshake, StartDeadline};

use super::Startup;
use super::cancel::CancelToken;
use super::exec::{KernelVersion, PrivilegesRequest};
use super::process::ProcessShared;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event_loop::{Interest, Loop, REQUEST_TIMEOUT, Remote, Sources};
use crate::proto::{End, FromHost, Rlimits, SEED_SIZE, Spawn, Stdio, StringBuf, TerminalSize, VERSION_RESEED};
use crate::sys::{Timer, deadline};
use crate::vm::events::EventKind;
use crate::vm::{Exit, Vm};

/// How long a caller waits for the start of a program, all in all.
const SPAWN_TIMEOUT: Duration =
    Duration::from_secs(REQUEST_TIMEOUT.as_secs() + START_TIMEOUT.as_secs() + KILL_MARGIN.as_secs());
/// The first port of the host for streams of processes, and how many follow it. They are used round and round.
const STDIO_PORTS: (u32, u32) = (0x4000_0000, 0x4000_0000);

/// The way to the shim. Dropping it ends the thread.
pub(super) struct Agent {
    looped: Loop<ControlClient>,
    startup: Startup,
    version: u32,
    kernel: KernelVersion,
    ports: AtomicU32,
}

/// A program to start.
pub(super) struct StartRequest {
    pub argv: StringBuf,
    pub env: StringBuf,
    pub cwd: Option<CString>,
    pub make_cwd: bool,
    pub user: Option<CString>,
    pub privileges: PrivilegesRequest,
    /// The user's home directory is added to the environment.
    pub home: bool,
    /// What asks it to end, where that is not SIGTERM.
    pub stop_signal: Option<u8>,
    pub terminal: Option<TerminalSize>,
    /// The ports of its streams. What has none is `/dev/null`.
    pub ports: [Option<u32>; 3],
    /// What its streams begin with.
    pub cookie: Vec<u8>,
    /// When its own time is over.
    pub deadline: Option<Instant>,
    pub state: Arc<ProcessShared>,
}

impl StartRequest {
    fn message(&self) -> FromHost<'_> {
        let (argv, env, cwd) = (self.argv.as_strings(), self.env.as_strings(), self.cwd.as_deref());
        let stdio = self.ports.map(|port| port.map_or(Stdio::Null, Stdio::Port));
        let (user, home, make_cwd) = (self.user.as_deref(), self.home, self.make_cwd);
        let PrivilegesRequest { groups, limits, rlimits, no_new_privs, capabilities, seal, seccomp } = &self.privileges;
        FromHost::Spawn(Spawn {
            argv,
            env,
            cwd,
            make_cwd,
            user,
            groups: groups.as_strings(),
            home,
            stop_signal: self.stop_signal,
            stdio,
            cookie: &self.cookie,
            terminal: self.terminal,
            limits: *limits,
            rlimits: Rlimits(rlimits),
            no_new_privs: *no_new_privs,
            capabilities: *capabilities,
            seal: *seal,
            filter: seccomp.as_ref().map(|filter| filter.program.as_slice()).unwrap_or_default(),
            filter_flags: seccomp.as_ref().map_or(0, |filter| filter.flags),
        })
    }
}

impl Agent {
    /// Waits until the shim says that it is ready.
    ///
    /// # Errors
    /// As [`handshake::handshake`].
    pub(super) fn start(vm: &Vm, begin: Instant, timeout: Duration, cancel: Option<&CancelToken>) -> Result<Self> {
        let start_deadline = StartDeadline { deadline: deadline(timeout), cancel };
        let Handshake { stream, startup, version, kernel } = handshake::handshake(vm, begin, timeout, &start_deadline)?;
        let timer = Timer::new().doing(|| "creating a timer")?;
        let client = ControlClient::new(stream, timer, vm.downgrade())?;
        let mut trouble = Ok(());
        let looped = Loop::start("agent", |sources| {
            trouble = client.watch(&sources).and_then(|()| watch_end(vm, &sources));
            client
        })?;
        trouble?;
        vm.downgrade().push_event(EventKind::Ready);
        let kernel = KernelVersion { major: (kernel >> 16) as u16, minor: kernel as u16 };
        Ok(Self { looped, startup, version, kernel, ports: AtomicU32::new(0) })
    }

    pub(super) fn startup(&self) -> Startup {
        self.startup
    }

    /// The version of the protocol that both speak.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    pub(super) fn remote(&self) -> Remote<ControlClient> {
        self.looped.remote()
    }

    /// The version of the guest's kernel, as the shim says.
    pub(super) fn kernel(&self) -> KernelVersion {
        self.kernel
    }

    /// A vsock port of the host for one stream of one process.
    pub(super) fn new_port(&self) -> u32 {
        let (first, count) = STDIO_PORTS;
        first + self.ports.fetch_add(1, Ordering::Relaxed) % count
    }

    /// Asks the shim to end everything and power off.
    pub(super) fn shutdown(&self, grace: Duration, limit: Duration) -> Result<()> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let ask =
            move |client: &mut ControlClient| client.send(0, &FromHost::Shutdown { grace_ms, end: End::PowerOff });
        self.remote().with_timeout(limit, ask)?
    }

    /// Gives the guest's kernel new random numbers, and waits until it has them, ten seconds at most.
    ///
    /// # Errors
    /// `GuestFailed` when the guest's kernel does not take them, `TimedOut` when the guest does not answer. `InvalidState` when
    /// the container has ended, `Unsupported` by a shim of another version.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is copied yet"))]
    pub(super) fn reseed(&self, seed: [u8; SEED_SIZE]) -> Result<()> {
        if self.version < VERSION_RESEED {
            return Err(Error::new(ErrorKind::Unsupported, "the guest's shim cannot make random numbers new"));
        }
        self.remote().with_reply(REQUEST_TIMEOUT, move |client, reply| client.reseed(&seed, reply))?
    }

    /// Notifies all waiters that the machine has ended with `exit`.
    pub(super) fn ended(&self, exit: Exit) {
        // A loop that has ended has notified all waiters.
        let _ = self.remote().post(move |client| client.vm_has_ended(&exit));
    }
}

/// Watches for the end of the VM.
fn watch_end(vm: &Vm, sources: &Sources) -> Result<()> {
    let edge = Interest::IN | Interest::EDGE_TRIGGERED;
    sources.watch(vm.as_fd(), client::VM_ENDED, edge).doing(|| "watching the machine's end")
}

/// Starts a program, and returns its number when it runs or its own time is over.
///
/// This is one request to the thread that owns the channel. The caller waits `limit` at most. When it has given up, a
/// program that starts all the same is killed.
///
/// # Errors
/// As [`Exec::spawn`](super::Exec::spawn).
pub(super) fn start_program(
    remote: &Remote<ControlClient>,
    request: StartRequest,
    limit: Option<Duration>,
) -> Result<u32> {
    let state = request.state.clone();
    let limit = limit.unwrap_or(SPAWN_TIMEOUT);
    // A channel that has ended answers nothing. Each request that it has taken it answers by itself.
    remote.with_reply(limit, move |client, reply| client.start(&request, reply)).unwrap_or_else(|error| {
        // Behind the request itself, so that it finds what has come of it. A loop that has ended runs nothing.
        let _ = remote.post(move |client| client.disown(&state));
        Err(match error.kind() {
            ErrorKind::TimedOut => too_busy(),
            ErrorKind::InvalidState => ended(),
            _ => error,
        })
    })
}

/// Sends a signal to a process. The caller waits `limit` at most, and nothing is sent when it has given up.
///
/// # Errors
/// As [`Process::signal`](super::Process::signal).
pub(super) fn signal_process(
    remote: &Remote<ControlClient>,
    process: u32,
    signo: u8,
    limit: Option<Duration>,
) -> Result<()> {
    remote.with_reply(limit.unwrap_or(REQUEST_TIMEOUT), move |client, reply| {
        // A caller that gives up now has a signal that it knows nothing of, and it asked for it.
        let answer = match reply.is_late() {
            true => Err(Error::new(ErrorKind::TimedOut, "the host was too busy to send it")),
            false => client.send(process, &FromHost::Signal { signo, group: false }),
        };
        let _ = reply.send(answer);
    })?
}

/// Sets the size of a process's terminal, as [`signal_process`] sends a signal.
///
/// # Errors
/// As [`Process::resize`](super::Process::resize).
pub(super) fn resize_terminal(remote: &Remote<ControlClient>, process: u32, size: TerminalSize) -> Result<()> {
    remote.with(move |client| client.send(process, &FromHost::Resize(size)))?
}

/// Returns the error of a start that the agent's thread has come to too late.
fn too_busy() -> Error {
    Error::new(ErrorKind::TimedOut, "the host was too busy to start it")
}

/// Returns the error of a request to a container that has ended.
pub(super) fn ended() -> Error {
    Error::new(ErrorKind::InvalidState, "the container has ended")
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Agent")
    }
}
