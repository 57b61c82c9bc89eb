//! [`Agent`]: speaks with the guest's shim, on a thread of its own.
//!
//! All holders of the container share it. Nothing the guest sends is trusted. Frames are bounded, and a message for a
//! process that is not ours is ignored. A stream that cannot be followed any more ends the VM.

mod entry;
#[cfg(any(test, feature = "internals"))]
mod fuzzing;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use entry::{Expiry, KillReason, ProcessEntry, ProcessPhase, UNANSWERED_KILL};
pub(super) use entry::{KILL_MARGIN, START_TIMEOUT};
#[cfg(any(test, feature = "internals"))]
pub(crate) use fuzzing::control_stream;

use super::Startup;
use super::cancel::CancelToken;
use super::handshake::{self, Handshake, StartDeadline, protocol_error};
use super::process::{ExitStatus, ProcessShared};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event_loop::{Handler, Interest, Loop, Remote};
use crate::proto::{Decoder, End, FROM_GUEST_MAX, FromGuest, FromHost, Spawn, SpawnStep};
use crate::sys::{Timer, deadline};
use crate::virtio::vsock::VsockStream;
use crate::vm::{Exit, Vm, WeakVm};

/// Sources of the loop.
const STREAM: u64 = 0;
const TIMER: u64 = 1;
const VM_ENDED: u64 = 2;
/// The host's requests that may wait for a guest that does not read.
const MAX_UNSENT: usize = 16 * 1024 * 1024;
/// Reads, and writes, in a row before others get their turn.
const MAX_CALLS: usize = 16;
/// A guest whose shim has gone away without ending the machine is ended after this.
const SHIM_GONE_TIMEOUT: Duration = Duration::from_secs(2);

/// Carries, once, whether a program runs.
pub(super) type StartReply = mpsc::SyncSender<Result<()>>;

/// The way to the shim. Dropping it ends the thread.
pub(super) struct Agent {
    looped: Loop<ControlClient>,
    startup: Startup,
    version: u32,
}

impl Agent {
    /// Waits until the shim says that it is ready.
    ///
    /// # Errors
    /// As [`handshake::handshake`].
    pub(super) fn start(vm: &Vm, begin: Instant, timeout: Duration, cancel: Option<&CancelToken>) -> Result<Self> {
        let start_deadline = StartDeadline { deadline: deadline(timeout), cancel };
        let Handshake { stream, decoder, startup, version } =
            handshake::handshake(vm, begin, timeout, &start_deadline)?;
        let timer = Timer::new().doing(|| "creating a timer")?;
        let mut trouble = Ok(());
        let looped = Loop::start("agent", |sources| {
            let edges = Interest::IN | Interest::OUT | Interest::READ_HANG_UP | Interest::EDGE_TRIGGERED;
            trouble = sources
                .watch(stream.as_fd(), STREAM, edges)
                .and_then(|()| sources.watch(timer.as_fd(), TIMER, Interest::IN))
                .and_then(|()| sources.watch(vm.as_fd(), VM_ENDED, Interest::IN | Interest::EDGE_TRIGGERED))
                .doing(|| "watching the control stream");
            ControlClient::new(stream, decoder, timer, vm.downgrade())
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

    pub(super) fn remote(&self) -> Remote<ControlClient> {
        self.looped.remote()
    }

    /// Asks the shim to end everything and power off.
    pub(super) fn shutdown(&self, grace: Duration, limit: Duration) -> Result<()> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        let ask =
            move |client: &mut ControlClient| client.send(0, &FromHost::Shutdown { grace_ms, end: End::PowerOff });
        self.remote().with_timeout(limit, ask)?
    }

    /// Notifies all waiters that the machine has ended with `exit`.
    pub(super) fn ended(&self, exit: Exit) {
        // A loop that has ended has notified all waiters.
        let _ = self.remote().post(move |client| client.finish_all(&exit));
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Agent")
    }
}

/// What the agent's thread owns.
pub(super) struct ControlClient {
    stream: VsockStream,
    decoder: Decoder,
    unsent: Vec<u8>,
    /// How much of it was sent.
    sent: usize,
    processes: HashMap<u32, ProcessEntry>,
    next_process: u32,
    next_port: u32,
    timer: Timer,
    vm: WeakVm,
    /// The conversation is over.
    ended: bool,
    /// The shim has gone away so, and its machine has to end by then.
    gone: Option<(Instant, String)>,
    /// There is more to read or to write than its turn allowed.
    more: bool,
}

impl ControlClient {
    fn new(stream: VsockStream, decoder: Decoder, timer: Timer, vm: WeakVm) -> Self {
        Self {
            stream,
            decoder,
            unsent: Vec::new(),
            sent: 0,
            processes: HashMap::new(),
            next_process: 1,
            next_port: 0x4000_0000,
            timer,
            vm,
            ended: false,
            gone: None,
            more: false,
        }
    }

    /// A vsock port of the host for one stream of one process.
    pub(super) fn new_port(&mut self) -> u32 {
        self.next_port = self.next_port.wrapping_add(1).max(0x4000_0000);
        self.next_port
    }

    /// Asks for a program and returns its number. `started` gets whether it runs; its time is over at `deadline`.
    pub(super) fn spawn(
        &mut self,
        spawn: &Spawn<'_>,
        state: Arc<ProcessShared>,
        deadline: Option<Instant>,
        started: StartReply,
    ) -> u32 {
        let number = self.next_process;
        self.next_process = number.wrapping_add(1).max(1);
        match self.send(number, &FromHost::Spawn(*spawn)) {
            Ok(()) => {
                self.processes.insert(number, ProcessEntry::new(state, started, deadline));
                self.set_timer();
            }
            Err(error) => drop(started.send(Err(error))),
        }
        number
    }

    /// Kills a process and all that it started. It has ended soon after, whatever the guest does.
    pub(super) fn kill(&mut self, process: u32) -> Result<()> {
        // Before the message to the guest, which may fail: it has ended soon after in any case.
        if let Some(entry) = self.processes.get_mut(&process) {
            entry.killed(KillReason::Killed);
            self.set_timer();
        }
        self.send(process, &FromHost::Kill)
    }

    /// Says something to the shim; process 0 is the VM.
    pub(super) fn send(&mut self, process: u32, message: &FromHost<'_>) -> Result<()> {
        if self.ended {
            return Err(Error::new(ErrorKind::InvalidState, "the container has ended"));
        }
        if self.unsent.len() - self.sent > MAX_UNSENT {
            return Err(Error::new(ErrorKind::ResourceExhausted, "the guest does not read its control stream"));
        }
        message
            .encode(process, &mut self.unsent)
            .map_err(|_| Error::invalid("exec", "arguments and environment are together longer than 4 MiB"))?;
        self.flush();
        Ok(())
    }

    fn flush(&mut self) {
        for _ in 0..MAX_CALLS {
            if self.sent == self.unsent.len() {
                (self.unsent, self.sent) = (Vec::new(), 0);
                return;
            }
            match self.stream.write(self.unsent.get(self.sent..).unwrap_or_default()) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.unsent_begins(),
                // The end is seen by reading, which is about to fail too.
                Err(_) => return (self.unsent, self.sent) = (Vec::new(), 0),
            }
        }
        self.again();
    }

    /// Forgets what was sent, when that is most of what is kept.
    fn unsent_begins(&mut self) {
        if self.sent > self.unsent.len() / 2 {
            drop(self.unsent.drain(..self.sent));
            self.sent = 0;
        }
    }

    /// Goes on after others had their turn.
    fn again(&mut self) {
        self.more = true;
        self.set_timer();
    }

    /// Reads what the shim says.
    fn listen(&mut self) {
        let mut buffer = [0; 4096];
        for _ in 0..MAX_CALLS {
            if self.ended {
                return;
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return self.end("it has closed the control stream"),
                Ok(n) => {
                    if let Err(error) = self.decode(buffer.get(..n).unwrap_or_default()) {
                        return self.end(&error.to_string());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => return self.end(&e.to_string()),
            }
        }
        self.again();
    }

    fn decode(&mut self, mut input: &[u8]) -> Result<()> {
        // The decoder lends out its buffer, so it is set aside while a message is acted on.
        let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new(FROM_GUEST_MAX));
        let mut outcome = Ok(());
        while outcome.is_ok() {
            outcome = match decoder.next(&mut input) {
                Ok(None) => break,
                Ok(Some(frame)) => match FromGuest::parse(&frame) {
                    Ok(Some(message)) => self.handle_message(frame.stream, &message),
                    Ok(None) => Ok(()),
                    Err(e) => Err(protocol_error(&e)),
                },
                Err(e) => Err(protocol_error(&e)),
            };
        }
        self.decoder = decoder;
        outcome
    }

    fn handle_message(&mut self, process: u32, message: &FromGuest<'_>) -> Result<()> {
        match *message {
            FromGuest::Spawned { .. } => {
                let Some(entry) = self.processes.get_mut(&process) else { return Ok(()) };
                if let ProcessPhase::Starting(_) = entry.phase {
                    entry.phase = ProcessPhase::Running;
                    entry.wait_for();
                }
                // For one that was killed before it ran, `started` gets the answer at its end.
                if let ProcessPhase::Running = entry.phase {
                    match entry.started.take().map(|started| started.send(Ok(()))) {
                        Some(Ok(())) => {}
                        // The caller has given up, so it has no owner.
                        Some(Err(_)) => drop(self.kill(process)),
                        None => return Err(protocol_error(&"Spawned, twice")),
                    }
                }
                self.set_timer();
            }
            FromGuest::SpawnFailed { step, errno } => {
                let Some(mut entry) = self.processes.remove(&process) else { return Ok(()) };
                match entry.phase {
                    ProcessPhase::Killed(ending) => entry.end(ending),
                    ProcessPhase::Overdue => {}
                    ProcessPhase::Starting(_) | ProcessPhase::Running => match entry.started.take() {
                        Some(started) => drop(started.send(Err(spawn_error(step, errno)))),
                        None => return Err(protocol_error(&"SpawnFailed after Spawned")),
                    },
                }
                self.set_timer();
            }
            FromGuest::Exited { code } => self.finish(process, ExitStatus::Exited { code: code.into() }),
            FromGuest::Signaled { oom: true, .. } => self.finish(process, ExitStatus::OomKilled),
            FromGuest::Signaled { signo, .. } => self.finish(process, ExitStatus::Signaled { signal: signo.into() }),
            FromGuest::Failed { stage, text, .. } => {
                // Said once: it ends the conversation.
                log::warn!("the guest's shim failed: {stage:?}: {}", text.escape_ascii());
                return Err(Error::new(ErrorKind::GuestFailed, format!("it failed: {}", text.escape_ascii())));
            }
            // The machine tells its end itself.
            FromGuest::Hello { .. } | FromGuest::Ready { .. } | FromGuest::Ending { .. } => {}
            // Said on streams of its own only.
            FromGuest::Connected { .. } => {}
        }
        Ok(())
    }

    /// The guest says how a process has ended.
    fn finish(&mut self, process: u32, status: ExitStatus) {
        let Some(mut entry) = self.processes.remove(&process) else { return };
        let status = match entry.phase {
            ProcessPhase::Killed(KillReason::TimedOut) => ExitStatus::TimedOut,
            _ => status,
        };
        if let Some(started) = entry.started.take() {
            // It has run, and its end tells the rest.
            let _ = started.send(Ok(()));
        }
        entry.state.finish(status);
        self.set_timer();
    }

    /// What is over by time alone.
    fn expire(&mut self) {
        let now = Instant::now();
        let due: Vec<u32> =
            self.processes.iter().filter(|(_, e)| e.due.is_some_and(|d| d <= now)).map(|(n, _)| *n).collect();
        for process in due {
            let kill = match self.processes.get_mut(&process) {
                Some(entry) => entry.expire(now),
                None => continue,
            };
            match kill {
                Expiry::Kill => {
                    if let Err(error) = self.send(process, &FromHost::Kill) {
                        log::debug!("a process whose time is over cannot be killed: {error}");
                    }
                }
                Expiry::Ended => {}
                Expiry::Unanswered => self.unanswered(process, now),
            }
        }
        if self.gone.as_ref().is_some_and(|(by, _)| *by <= now)
            && let Some((_, why)) = self.gone.take()
        {
            self.vm.give_up(format!("its shim is gone: {why}"));
        }
        self.set_timer();
    }

    /// The guest has had all the time there is to say that a process has ended.
    fn unanswered(&mut self, process: u32, now: Instant) {
        // One that stands still by the embedder's will or a disk's cannot answer.
        if self.vm.stands_still() {
            if let Some(entry) = self.processes.get_mut(&process) {
                entry.due = Some(now + UNANSWERED_KILL);
            }
            return;
        }
        // Its waiters were notified when it was killed.
        self.processes.remove(&process);
        self.vm.give_up(format!("it has not killed process {process} within {UNANSWERED_KILL:?}"));
    }

    fn set_timer(&mut self) {
        let gone = self.gone.as_ref().map(|(by, _)| *by);
        let now = self.more.then(Instant::now);
        let next = self.processes.values().filter_map(|e| e.due).chain(gone).chain(now).min();
        if let Err(error) = self.timer.set(next) {
            log::error!("time-outs of processes cannot be kept: {error}");
        }
    }

    /// The conversation is over. Everything that ran ends with the VM, which has a moment to do so by itself.
    fn end(&mut self, why: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // The shim waits for this before it ends the machine, so that its last words are not overtaken by the end.
        if let Err(error) = self.stream.shutdown(std::net::Shutdown::Both) {
            log::debug!("the control stream was closed already: {error}");
        }
        (self.unsent, self.sent) = (Vec::new(), 0);
        self.gone = Some((Instant::now() + SHIM_GONE_TIMEOUT, why.to_owned()));
        self.set_timer();
    }

    /// The VM has ended. What the shim said before is in the stream, which has ended with it.
    fn vm_ended(&mut self) {
        let Some(exit) = self.vm.try_wait() else { return };
        // Each turn takes something out of a stream that gets nothing more.
        while !self.ended {
            self.more = false;
            self.listen();
            if !self.more {
                break;
            }
        }
        self.finish_all(&exit);
    }

    /// Notifies all waiters that the VM has ended.
    fn finish_all(&mut self, exit: &Exit) {
        self.end("its machine has ended");
        self.gone = None;
        for (_, mut entry) in self.processes.drain() {
            entry.state.finish(ExitStatus::VmEnded { exit: exit.clone() });
            entry.state.break_streams();
            if let Some(started) = entry.started.take() {
                let _ = started.send(Err(Error::new(ErrorKind::GuestFailed, exit.to_string())));
            }
        }
        self.set_timer();
    }
}

impl Handler for ControlClient {
    fn ready(&mut self, token: u64, _: Interest) {
        match token {
            TIMER => {
                self.timer.clear();
                self.more = false;
                self.expire();
                self.flush();
                self.listen();
            }
            VM_ENDED => self.vm_ended(),
            _ => {
                self.flush();
                self.listen();
            }
        }
    }
}

fn spawn_error(step: SpawnStep, errno: i32) -> Error {
    let os = io::Error::from_raw_os_error(errno);
    let doing = match step {
        SpawnStep::Exec => "executing it",
        SpawnStep::Chdir => "changing into the working directory",
        SpawnStep::Stdio => "connecting its streams",
        SpawnStep::Cgroup => "making its cgroup",
        SpawnStep::Fork => "making the process",
        SpawnStep::Prepare => "preparing the process",
        SpawnStep::Request => "asking for it",
        SpawnStep::Other => "starting it",
    };
    let hint = match (step, errno) {
        (SpawnStep::Exec, libc::ENOEXEC) => " (not a program, or one for another processor architecture)",
        _ => "",
    };
    let error = Error::from(os);
    let kind = if errno == libc::ENOEXEC { ErrorKind::Incompatible } else { error.kind() };
    error.with_kind(kind).doing(format!("{doing}{hint}"))
}
