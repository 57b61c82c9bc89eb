//! [`Agent`]: speaks with the guest's shim, on a thread of its own, for everybody who holds the container.
//!
//! Nothing the guest sends is trusted: frames are bounded, what names no process of ours is ignored, and a stream that
//! cannot be followed any more ends the VM.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Weak, mpsc};
use std::time::{Duration, Instant};

use super::Startup;
use super::process::{ExitStatus, State};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event::{Handler, Interest, Loop, Remote};
use crate::proto::{
    CONTROL_PORT, Decoder, End, FROM_GUEST_MAX, FromGuest, FromHost, Spawn, Step, VERSION_MAX, VERSION_MIN, negotiate,
};
use crate::sys::Timer;
use crate::virtio::vsock::VsockStream;
use crate::vm::{Exit, Vm};

/// Sources of the loop.
const STREAM: u64 = 0;
const TIMER: u64 = 1;
/// The host's requests that may wait for a guest that does not read.
const MAX_UNSENT: usize = 16 * 1024 * 1024;
/// A guest whose shim has gone away without ending the machine is ended after this.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Told once whether a program runs.
pub(super) type Started = mpsc::SyncSender<Result<()>>;

/// The way to the shim. Dropping it ends the thread.
pub(super) struct Agent {
    looped: Loop<Client>,
    startup: Startup,
    version: u32,
}

impl Agent {
    /// Waits until the shim says that it is ready.
    ///
    /// # Errors
    /// `TimedOut` with the last stage; `GuestFailed` when the shim or the VM has failed; `Incompatible` when no version
    /// of the protocol is common.
    pub(super) fn start(vm: &Arc<Vm>, begin: Instant, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        let outcome = greet(vm, begin, deadline);
        let (stream, decoder, (startup, version)) = outcome.map_err(|error| explain(vm, timeout, error))?;
        stream.set_read_timeout(None)?;
        stream.set_nonblocking(true)?;
        let timer = Timer::new().doing(|| "creating a timer")?;
        let watched = stream.try_clone()?;
        let mut trouble = Ok(());
        let looped = Loop::start("agent", |sources| {
            let edges = Interest::IN | Interest::OUT | Interest::READ_HANG_UP | Interest::EDGE_TRIGGERED;
            trouble = sources
                .watch(watched.as_fd(), STREAM, edges)
                .and_then(|()| sources.watch(timer.as_fd(), TIMER, Interest::IN))
                .doing(|| "watching the control stream");
            Client::new(stream, decoder, timer, Arc::downgrade(vm))
        })?;
        trouble?;
        Ok(Self { looped, startup, version })
    }

    pub(super) fn startup(&self) -> Startup {
        self.startup
    }

    /// The version of the protocol that both speak.
    pub(super) fn version(&self) -> u32 {
        self.version
    }

    pub(super) fn remote(&self) -> Remote<Client> {
        self.looped.remote()
    }

    /// Asks the shim to end everything and power off.
    pub(super) fn shutdown(&self, grace: Duration) -> Result<()> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self.remote().with(move |client| client.send(0, &FromHost::Shutdown { grace_ms, end: End::PowerOff }))?
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Agent")
    }
}

/// From the shim's first connection to its "ready".
fn greet(vm: &Vm, begin: Instant, deadline: Instant) -> Result<(VsockStream, Decoder, (Startup, u32))> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut stream = vm.listen(CONTROL_PORT)?.accept_timeout(left())?;
    let mut decoder = Decoder::new(FROM_GUEST_MAX);
    let (mut buffer, mut common) = ([0; 4096], VERSION_MIN);
    loop {
        let wait = left().max(Duration::from_millis(1));
        stream.set_read_timeout(Some(wait))?;
        let read = match stream.read(&mut buffer) {
            Ok(0) => {
                return Err(Error::new(ErrorKind::GuestFailed, "the shim closed its connection"));
            }
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(Error::new(ErrorKind::TimedOut, "the shim never said that it is ready"));
            }
            Err(e) => return Err(e).doing(|| "reading the control stream"),
        };
        let mut input = buffer.get(..read).unwrap_or_default();
        while let Some(frame) = decoder.next(&mut input).map_err(|e| nonsense(&e))? {
            match FromGuest::parse(&frame).map_err(|e| nonsense(&e))? {
                Some(FromGuest::Hello { min, max }) => {
                    let version = negotiate(min, max).ok_or_else(|| {
                        let ours = (VERSION_MIN, VERSION_MAX);
                        Error::new(
                            ErrorKind::Incompatible,
                            format!(
                                "the guest's shim speaks protocol versions {min} to {max}, this library {} to {}",
                                ours.0, ours.1
                            ),
                        )
                    })?;
                    common = version;
                    let mut hello = Vec::new();
                    FromHost::Hello { version }.encode(0, &mut hello).map_err(|e| nonsense(&e))?;
                    stream.write_all(&hello).doing(|| "greeting the shim")?;
                }
                Some(FromGuest::Ready { user_space_ns, ready_ns }) => {
                    let ready = begin.elapsed();
                    let since = Duration::from_nanos(ready_ns.saturating_sub(user_space_ns));
                    let user_space = ready.saturating_sub(since);
                    let startup = Startup { user_space, ready, kernel_uptime: Duration::from_nanos(user_space_ns) };
                    return Ok((stream, decoder, (startup, common)));
                }
                Some(FromGuest::Failed { stage, errno, text }) => {
                    let text = String::from_utf8_lossy(text);
                    let os =
                        if errno == 0 { String::new() } else { format!(": {}", io::Error::from_raw_os_error(errno)) };
                    return Err(Error::new(
                        ErrorKind::GuestFailed,
                        format!("the guest could not be set up: {stage:?}: {text}{os}"),
                    ));
                }
                _ => {}
            }
        }
    }
}

pub(super) fn nonsense(what: &dyn fmt::Debug) -> Error {
    Error::new(ErrorKind::GuestFailed, format!("the guest's shim speaks nonsense: {what:?}"))
}

/// Why a guest did not become ready, as far as the VM knows more than the control stream does.
fn explain(vm: &Vm, timeout: Duration, error: Error) -> Error {
    match error.kind() {
        ErrorKind::TimedOut => {
            vm.kill();
            // Its end tells where the guest was.
            let _ = vm.wait_timeout(LAST_WORDS);
            let trace = vm.trace();
            Error::new(ErrorKind::TimedOut, format!("the guest was not ready within {timeout:?} ({trace})"))
        }
        ErrorKind::InvalidState => match vm.wait_timeout(LAST_WORDS) {
            Ok(Some(exit)) => Error::new(ErrorKind::GuestFailed, format!("before it was ready, {exit}")),
            _ => error,
        },
        _ => {
            let lines = vm.trace().console_lines(5);
            Error::new(
                error.kind(),
                if lines.is_empty() { error.to_string() } else { format!("{error}; console: {lines}") },
            )
        }
    }
}

/// One process that was asked for.
struct Entry {
    state: Arc<State>,
    started: Option<Started>,
    deadline: Option<Instant>,
    timed_out: bool,
}

/// What the agent's thread owns.
pub(super) struct Client {
    stream: VsockStream,
    decoder: Decoder,
    unsent: Vec<u8>,
    processes: HashMap<u32, Entry>,
    next_process: u32,
    next_port: u32,
    timer: Timer,
    vm: Weak<Vm>,
    ended: bool,
}

impl Client {
    fn new(stream: VsockStream, decoder: Decoder, timer: Timer, vm: Weak<Vm>) -> Self {
        Self {
            stream,
            decoder,
            unsent: Vec::new(),
            processes: HashMap::new(),
            next_process: 1,
            next_port: 0x4000_0000,
            timer,
            vm,
            ended: false,
        }
    }

    /// A vsock port of the host for one stream of one process.
    pub(super) fn new_port(&mut self) -> u32 {
        self.next_port = self.next_port.wrapping_add(1).max(0x4000_0000);
        self.next_port
    }

    /// Asks for a program; `started` is told whether it runs. Gives its number.
    pub(super) fn spawn(
        &mut self,
        spawn: &Spawn<'_>,
        state: Arc<State>,
        timeout: Option<Duration>,
        started: Started,
    ) -> u32 {
        let number = self.next_process;
        self.next_process = number.wrapping_add(1).max(1);
        let deadline = timeout.map(|t| Instant::now() + t);
        match self.send(number, &FromHost::Spawn(*spawn)) {
            Ok(()) => {
                self.processes.insert(number, Entry { state, started: Some(started), deadline, timed_out: false });
                self.set_timer();
            }
            Err(error) => drop(started.send(Err(error))),
        }
        number
    }

    /// Says something to the shim; process 0 is the VM.
    pub(super) fn send(&mut self, process: u32, message: &FromHost<'_>) -> Result<()> {
        if self.ended {
            return Err(Error::new(ErrorKind::InvalidState, "the container has ended"));
        }
        if self.unsent.len() > MAX_UNSENT {
            return Err(Error::new(ErrorKind::ResourceExhausted, "the guest does not read its control stream"));
        }
        message
            .encode(process, &mut self.unsent)
            .map_err(|_| Error::invalid("exec", "arguments and environment are together longer than 4 MiB"))?;
        self.flush();
        Ok(())
    }

    fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                // The end is seen by reading, which is about to fail too.
                Err(_) => return self.unsent.clear(),
            }
        }
    }

    /// Reads what the shim says.
    fn listen(&mut self) {
        let mut buffer = [0; 4096];
        while !self.ended {
            match self.stream.read(&mut buffer) {
                Ok(0) => return self.end("the shim has gone away"),
                Ok(n) => {
                    if let Err(error) = self.understand(buffer.get(..n).unwrap_or_default()) {
                        return self.end(&error.to_string());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => return self.end(&e.to_string()),
            }
        }
    }

    fn understand(&mut self, mut input: &[u8]) -> Result<()> {
        // The decoder lends out its buffer, so it is set aside while a message is acted on.
        let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new(FROM_GUEST_MAX));
        let mut outcome = Ok(());
        loop {
            match decoder.next(&mut input) {
                Ok(None) => break,
                Ok(Some(frame)) => match FromGuest::parse(&frame) {
                    Ok(Some(message)) => self.act(frame.stream, &message),
                    Ok(None) => {}
                    Err(e) => outcome = Err(nonsense(&e)),
                },
                Err(e) => {
                    outcome = Err(nonsense(&e));
                    break;
                }
            }
        }
        self.decoder = decoder;
        outcome
    }

    fn act(&mut self, process: u32, message: &FromGuest<'_>) {
        match *message {
            FromGuest::Spawned { .. } => {
                if let Some(started) = self.processes.get_mut(&process).and_then(|p| p.started.take()) {
                    // Who asked may have given up; the process runs all the same.
                    let _ = started.send(Ok(()));
                }
            }
            FromGuest::SpawnFailed { step, errno } => {
                if let Some(started) = self.processes.remove(&process).and_then(|p| p.started) {
                    let _ = started.send(Err(spawn_error(step, errno)));
                }
            }
            FromGuest::Exited { code } => self.finish(process, ExitStatus::Exited(code)),
            FromGuest::Signaled { oom: true, .. } => self.finish(process, ExitStatus::OomKilled),
            FromGuest::Signaled { signo, .. } => self.finish(process, ExitStatus::Signaled(signo)),
            FromGuest::Failed { stage, text, .. } => {
                log::warn!("the guest's shim failed: {stage:?}: {}", String::from_utf8_lossy(text));
            }
            // The machine tells its end itself.
            FromGuest::Hello { .. } | FromGuest::Ready { .. } | FromGuest::Ending { .. } => {}
            // Said on streams of its own only.
            FromGuest::Connected { .. } => {}
        }
    }

    fn finish(&mut self, process: u32, status: ExitStatus) {
        if let Some(entry) = self.processes.remove(&process) {
            entry.state.finish(if entry.timed_out { ExitStatus::TimedOut } else { status });
            self.set_timer();
        }
    }

    /// Kills whose time is over: the whole process tree, in the guest.
    fn expire(&mut self) {
        let now = Instant::now();
        let due = |e: &Entry| !e.timed_out && e.deadline.is_some_and(|d| d <= now);
        let expired: Vec<u32> = self.processes.iter().filter(|(_, e)| due(e)).map(|(n, _)| *n).collect();
        for process in expired {
            if let Some(entry) = self.processes.get_mut(&process) {
                entry.timed_out = true;
            }
            if let Err(error) = self.send(process, &FromHost::Kill) {
                log::debug!("a process whose time is over cannot be killed: {error}");
            }
        }
        self.set_timer();
    }

    fn set_timer(&mut self) {
        let next = self.processes.values().filter(|e| !e.timed_out).filter_map(|e| e.deadline).min();
        if let Err(error) = self.timer.set(next) {
            log::error!("time-outs of processes cannot be kept: {error}");
        }
    }

    /// The conversation is over: everything that ran has ended with the VM.
    fn end(&mut self, why: &str) {
        self.ended = true;
        // The shim waits for this before it ends the machine, so that its last words are not overtaken by the end.
        if let Err(error) = self.stream.shutdown(std::net::Shutdown::Both) {
            log::debug!("the control stream was closed already: {error}");
        }
        let Some(exit) = self.last_words(why) else {
            return;
        };
        for (_, entry) in self.processes.drain() {
            entry.state.finish(ExitStatus::VmEnded(Box::new(exit.clone())));
            if let Some(started) = entry.started {
                let _ = started.send(Err(Error::new(ErrorKind::GuestFailed, exit.to_string())));
            }
        }
    }

    /// How the VM ended. One that goes on without its shim is of no use and is killed.
    fn last_words(&self, why: &str) -> Option<Exit> {
        let vm = self.vm.upgrade()?;
        if let Ok(Some(exit)) = vm.wait_timeout(LAST_WORDS) {
            return Some(exit);
        }
        log::warn!("ending a VM that went on without its shim: {why}");
        vm.kill();
        vm.wait().ok()
    }
}

impl Handler for Client {
    fn ready(&mut self, token: u64, _: Interest) {
        match token {
            TIMER => {
                self.timer.clear();
                self.expire();
            }
            _ => {
                self.flush();
                self.listen();
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        for (_, entry) in self.processes.drain() {
            entry.state.abandon();
        }
    }
}

fn spawn_error(step: Step, errno: i32) -> Error {
    let os = io::Error::from_raw_os_error(errno);
    let doing = match step {
        Step::Exec => "executing it",
        Step::Chdir => "changing into the working directory",
        Step::Stdio => "connecting its streams",
        Step::Cgroup => "making its cgroup",
        Step::Fork => "making the process",
        Step::Prepare => "preparing the process",
        Step::Request => "asking for it",
        Step::Other => "starting it",
    };
    let hint = match (step, errno) {
        (Step::Exec, libc::ENOEXEC) => " (not a program, or one for another processor architecture)",
        _ => "",
    };
    let error = Error::from(os);
    let kind = if errno == libc::ENOEXEC { ErrorKind::Incompatible } else { error.kind() };
    error.with_kind(kind).doing(format!("{doing}{hint}"))
}
