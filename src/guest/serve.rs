//! The loop: requests of the host, streams, ends of processes, the end of the machine. The shim's one thread stays here; it waits for
//! events only, and by time only where something must end by then.

use super::alloc::vec::Vec;
use super::cgroup::{Cgroups, Group, Watch};
use super::connect::Connections;
use super::control::{Control, Failure, VersionGate};
use super::oom::OomWatch;
use super::process::{Process, ProcessState};
use super::reaper;
use super::relay::{Relay, RelayProgress};
use super::shutdown::{self, GuestShutdown, Next};
use super::spawn::{self, Report, SpawnEnv, SpawnError, StdioStreams};
use super::sys::{self, Errno, Fd, POLLIN, Poll, SIGKILL, Status};
use super::terminal::Terminal;
use crate::proto::{Decoder, End, FROM_HOST_MAX, FromGuest, FromHost, MessageFrame, Spawn, SpawnStep, Stage};

/// Programs that the shim keeps track of at the same time, with those that have exited and left something running.
const MAX_PROCESSES: usize = 1024;
/// The grace of an end that something other than the host asked for.
const OWN_GRACE_MS: u32 = 5000;

/// Signals that PID 1 gets from the kernel: children, Ctrl-Alt-Del, and what else may ask for an end.
pub(super) const SIGNALS: [u8; 4] = [sys::SIGCHLD, sys::SIGINT, sys::SIGTERM, sys::SIGPWR];

/// Why the loop was left.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Everything has ended as asked.
    End(End),
    /// The host does not listen any more.
    HostGone,
    Failed(Failure),
}

/// Everything that the shim knows while it serves.
#[derive(Debug)]
pub(super) struct Shim {
    pub(super) control: Control,
    gate: VersionGate,
    signals: Fd,
    reaper: i32,
    spawn_env: SpawnEnv,
    cgroups: Option<Cgroups>,
    oom: OomWatch,
    /// All workloads, watched while the machine ends.
    workloads: Option<Watch>,
    processes: Vec<Process>,
    relays: Vec<Relay>,
    terminals: Vec<Terminal>,
    /// `None` where the kernel cannot listen on vsock.
    connections: Option<Connections>,
    ending: Option<GuestShutdown>,
}

/// To whom an entry of the list to poll belongs.
#[derive(Debug, Clone, Copy)]
enum PollTarget {
    Control,
    Signals,
    Workloads,
    Memory,
    Process(u32),
    Connections,
}

impl Shim {
    pub(super) fn new(
        control: Control,
        signals: Fd,
        reaper: i32,
        spawn_env: SpawnEnv,
        cgroups: Option<Cgroups>,
    ) -> Self {
        Self {
            control,
            gate: VersionGate::default(),
            signals,
            reaper,
            spawn_env,
            oom: OomWatch::new(cgroups.as_ref()),
            cgroups,
            workloads: None,
            processes: Vec::new(),
            relays: Vec::new(),
            terminals: Vec::new(),
            connections: Connections::listen().ok(),
            ending: None,
        }
    }

    /// Serves until the end.
    pub(super) fn serve(&mut self) -> Outcome {
        let mut decoder = Decoder::new(FROM_HOST_MAX);
        let (mut polls, mut owners) = (Vec::new(), Vec::new());
        loop {
            if let Some(end) = self.ending_over() {
                return Outcome::End(end);
            }
            self.collect(&mut polls, &mut owners);
            match sys::poll(&mut polls, self.deadline()) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return Outcome::Failed(Failure::new(Stage::Loop, errno, &[b"polling"]));
                }
            }
            // The relays' entries come in pairs after those that have an owner, then those of terminals in threes.
            let (owned, rest) = polls.split_at(owners.len().min(polls.len()));
            let (paired, threes) = rest.split_at((2 * self.relays.len()).min(rest.len()));
            self.advance_relays(paired);
            self.advance_terminals(threes);
            if self.has_eager_connections() {
                self.serve_connections();
            }
            for (poll, owner) in owned.iter().zip(&owners) {
                if poll.happened == 0 {
                    continue;
                }
                let result = match owner {
                    PollTarget::Control => self.serve_host(poll.happened, &mut decoder),
                    PollTarget::Signals => self.serve_signals(),
                    PollTarget::Workloads => Ok(()),
                    PollTarget::Memory => {
                        self.oom.serve(None, &mut self.processes, &mut self.control);
                        Ok(())
                    }
                    PollTarget::Connections => {
                        self.serve_connections();
                        Ok(())
                    }
                    PollTarget::Process(id) => {
                        self.serve_process(*id, poll.fd);
                        Ok(())
                    }
                };
                if let Err(outcome) = result {
                    return outcome;
                }
            }
            self.processes.retain(|process| !matches!(process.life, ProcessState::Over));
        }
    }

    fn serve_connections(&mut self) {
        if let Some(connections) = &mut self.connections {
            connections.serve(&self.spawn_env.proc);
        }
    }

    fn has_eager_connections(&self) -> bool {
        self.connections.as_ref().is_some_and(Connections::has_backlog)
    }

    /// Until when nothing need happen.
    fn deadline(&self) -> Option<u64> {
        if self.has_eager_connections() { Some(0) } else { self.ending.as_ref().map(GuestShutdown::deadline) }
    }

    /// Lists what to wait for.
    fn collect(&self, polls: &mut Vec<Poll>, owners: &mut Vec<PollTarget>) {
        polls.clear();
        owners.clear();
        let mut add = |poll, owner| {
            polls.push(poll);
            owners.push(owner);
        };
        // Before the requests of the host: a process that it asks about may just have ended.
        add(Poll { fd: self.signals.raw(), events: POLLIN, happened: 0 }, PollTarget::Signals);
        for process in &self.processes {
            let owner = PollTarget::Process(process.id);
            match &process.life {
                ProcessState::Connecting { streams, .. } => streams.polls().for_each(|poll| add(poll, owner)),
                ProcessState::Starting { report, .. } => add(report.poll(), owner),
                ProcessState::Left { watch } => add(watch.poll(), owner),
                ProcessState::Running { .. } | ProcessState::Refused { .. } | ProcessState::Over => {}
            }
        }
        if let Some(poll) = self.oom.poll() {
            add(poll, PollTarget::Memory);
        }
        if let Some(watch) = &self.workloads {
            add(watch.poll(), PollTarget::Workloads);
        }
        if let Some(connections) = &self.connections {
            add(connections.poll(), PollTarget::Connections);
        }
        add(self.control.poll(), PollTarget::Control);
        polls.extend(self.relays.iter().flat_map(Relay::polls));
        polls.extend(self.terminals.iter().flat_map(Terminal::polls));
    }

    fn advance_relays(&mut self, polls: &[Poll]) {
        let mut pairs = polls.chunks_exact(2);
        self.relays.retain_mut(|relay| match pairs.next() {
            Some([pipe, socket]) => relay.advance([pipe.happened, socket.happened]) == RelayProgress::Going,
            _ => true,
        });
    }

    fn advance_terminals(&mut self, polls: &[Poll]) {
        let mut threes = polls.chunks_exact(3);
        self.terminals.retain_mut(|terminal| match threes.next() {
            Some([master, input, output]) => terminal.advance([master.happened, input.happened, output.happened]),
            _ => true,
        });
    }

    fn serve_host(&mut self, happened: i16, decoder: &mut Decoder) -> Result<(), Outcome> {
        self.control.flush();
        if happened & !sys::POLLOUT == 0 {
            return Ok(());
        }
        let mut buffer = [0u8; 8192];
        let n = match self.control.read(&mut buffer) {
            Ok(0) => return Err(Outcome::HostGone),
            Ok(n) => n,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(_) => return Err(Outcome::HostGone),
        };
        let broken = |what: &[u8]| {
            let text: [&[u8]; 2] = [b"the host sent an unusable ", what];
            Outcome::Failed(Failure::new(Stage::Control, Errno::EPROTO, &text))
        };
        let mut input = buffer.get(..n).unwrap_or_default();
        while let Some(frame) = decoder.next(&mut input).map_err(|_| broken(b"frame"))? {
            if let Some(message) = self.gate.admit(&frame).map_err(broken)? {
                self.handle_request(&frame, &message);
            }
        }
        Ok(())
    }

    fn handle_request(&mut self, frame: &MessageFrame<'_>, message: &FromHost<'_>) {
        match *message {
            // The latter is said on streams of its own.
            FromHost::Hello { .. } | FromHost::Connect { .. } => {}
            FromHost::Spawn(spawn) => {
                if let Err(refusal) = self.spawn(frame, &spawn) {
                    self.refuse(frame.stream, refusal);
                }
            }
            FromHost::Signal { signo, group } => self.signal(frame.stream, signo, group),
            FromHost::Kill => self.kill(frame.stream),
            FromHost::Resize(size) => {
                if let Some(terminal) = self.terminals.iter().find(|terminal| terminal.owner == frame.stream) {
                    // It refuses no size.
                    let _ = terminal.resize(size);
                }
            }
            FromHost::Reseed { seed } => {
                let errno = sys::reseed(seed).err().map_or(0, |errno| errno.0);
                self.control.say(frame.stream, &FromGuest::Reseeded { errno });
            }
            FromHost::Shutdown { grace_ms, end } => self.start_ending(end, grace_ms),
        }
    }

    fn find(&mut self, id: u32) -> Option<&mut Process> {
        self.processes.iter_mut().find(|process| process.id == id && !matches!(process.life, ProcessState::Over))
    }

    fn refuse(&mut self, id: u32, SpawnError { step, errno }: SpawnError) {
        self.control.say(id, &FromGuest::SpawnFailed { step, errno: errno.0 });
    }

    fn spawn(&mut self, frame: &MessageFrame<'_>, spawn: &Spawn<'_>) -> Result<(), SpawnError> {
        if self.ending.is_some() {
            return Err(SpawnError::new(SpawnStep::Request, Errno::ESHUTDOWN));
        }
        if self.find(frame.stream).is_some() {
            return Err(SpawnError::new(SpawnStep::Request, Errno::EEXIST));
        }
        if self.processes.len() >= MAX_PROCESSES {
            return Err(SpawnError::new(SpawnStep::Request, Errno::EAGAIN));
        }
        let streams = StdioStreams::dial(&spawn.stdio)?;
        let mut process = Process::new(frame.stream, spawn.stop_signal);
        if streams.is_connected() {
            self.start(&mut process, spawn, streams)?;
        } else {
            let mut payload = Vec::new();
            payload
                .try_reserve_exact(frame.payload.len())
                .map_err(|_| SpawnError::new(SpawnStep::Request, Errno::ENOMEM))?;
            payload.extend_from_slice(frame.payload);
            process.life = ProcessState::Connecting { streams, kind: frame.kind, payload };
        }
        self.processes.push(process);
        Ok(())
    }

    /// Its streams are connected: fork.
    fn start(&mut self, process: &mut Process, spawn: &Spawn<'_>, streams: StdioStreams) -> Result<(), SpawnError> {
        match &self.cgroups {
            Some(cgroups) => process.group = Some(cgroups.group(process.id, &spawn.limits)?),
            None if spawn.limits.is_any() => return Err(SpawnError::new(SpawnStep::Limit, Errno::ENOENT)),
            None => {}
        }
        let cgroup = process.group.as_ref().map(|group| &group.dir);
        match spawn::start(process.id, spawn, streams, cgroup, &self.spawn_env) {
            Ok(started) => {
                self.relays.extend(started.relays);
                self.terminals.extend(started.terminal);
                process.life = ProcessState::Starting { pid: started.pid, report: started.report };
                Ok(())
            }
            Err(refusal) => {
                self.dissolve(process);
                Err(refusal)
            }
        }
    }

    /// Removes the cgroup if it can be removed now.
    fn dissolve(&self, process: &mut Process) {
        if let Some(cgroups) = &self.cgroups {
            process.group = process.group.take().filter(|group| !cgroups.remove(group));
        }
    }

    /// Something happened to a descriptor of this process.
    fn serve_process(&mut self, id: u32, fd: i32) {
        let Some(index) = self.processes.iter().position(|process| process.id == id) else {
            return;
        };
        // Out of the list while it changes, so that the rest of the shim is at hand.
        let mut process = self.processes.swap_remove(index);
        match core::mem::replace(&mut process.life, ProcessState::Over) {
            ProcessState::Connecting { mut streams, kind, payload } => {
                let result = streams.advance(fd).and_then(|()| {
                    if !streams.is_connected() {
                        process.life = ProcessState::Connecting { streams, kind, payload };
                        return Ok(());
                    }
                    // It was understood when it came.
                    match FromHost::parse(&MessageFrame { stream: id, kind, payload: &payload }) {
                        Ok(Some(FromHost::Spawn(spawn))) => self.start(&mut process, &spawn, streams),
                        _ => Err(SpawnError::new(SpawnStep::Request, Errno::EPROTO)),
                    }
                });
                if let Err(refusal) = result {
                    self.refuse(id, refusal);
                }
            }
            ProcessState::Starting { pid, report } => self.started(&mut process, pid, report),
            ProcessState::Left { watch } => {
                if watch.is_populated() {
                    process.life = ProcessState::Left { watch };
                } else {
                    self.dissolve(&mut process);
                }
            }
            other => process.life = other,
        }
        if !matches!(process.life, ProcessState::Over) {
            self.processes.push(process);
        }
    }

    /// The new process has become the program, or will not.
    fn started(&mut self, process: &mut Process, pid: i32, report: Report) {
        match report.read() {
            Ok(inner) => {
                self.control.say(process.id, &FromGuest::Spawned { pid: inner });
                process.life = ProcessState::Running { pid };
            }
            Err(refusal) => {
                self.relays.retain(|relay| relay.owner != process.id);
                self.terminals.retain(|terminal| terminal.owner != process.id);
                self.refuse(process.id, refusal);
                process.life = ProcessState::Refused { pid };
            }
        }
    }

    fn serve_signals(&mut self) -> Result<(), Outcome> {
        while let Some(signal) = sys::next_signal(&self.signals) {
            match signal {
                // Many children may share one signal.
                sys::SIGCHLD => {
                    while let Some((pid, status)) = sys::reap() {
                        self.ended(pid, status)?;
                    }
                }
                // Ctrl-Alt-Del.
                sys::SIGINT => self.start_ending(End::Reboot, OWN_GRACE_MS),
                _ => self.start_ending(End::PowerOff, OWN_GRACE_MS),
            }
        }
        Ok(())
    }

    fn ended(&mut self, pid: i32, status: Status) -> Result<(), Outcome> {
        if pid == self.reaper {
            // With it go all workloads. Where the machine is ending that is meant.
            return match (&self.ending, reaper::end_of_status(status)) {
                (Some(_), _) => Ok(()),
                (None, Some(end)) => Err(Outcome::End(end)),
                (None, None) => {
                    Err(Outcome::Failed(Failure::new(Stage::Reaper, Errno(0), &[b"PID 1 of the workloads has ended"])))
                }
            };
        }
        let Some(index) = self.processes.iter().position(|process| process.life.pid() == Some(pid)) else {
            return Ok(());
        };
        let mut process = self.processes.swap_remove(index);
        match core::mem::replace(&mut process.life, ProcessState::Over) {
            ProcessState::Starting { pid, report } => self.started(&mut process, pid, report),
            other => process.life = other,
        }
        self.exited(process, status);
        Ok(())
    }

    /// Reports the program's own exit at once. What it left running and what is still in its pipes holds nothing up.
    fn exited(&mut self, mut process: Process, status: Status) {
        // Of one that never became the program the host knows already.
        if let ProcessState::Running { .. } = process.life {
            self.oom.serve(Some(&mut process), &mut self.processes, &mut self.control);
            self.relays.retain_mut(|relay| relay.owner != process.id || relay.owner_exited() == RelayProgress::Going);
            self.terminals.retain_mut(|terminal| terminal.owner != process.id || terminal.owner_exited());
            let message = match status {
                Status::Exited(code) => FromGuest::Exited { code },
                Status::Signaled(signo) => {
                    let kills = || process.group.as_ref().map_or(0, Group::oom_kills);
                    FromGuest::Signaled { signo, oom: signo == SIGKILL && !process.killed && kills() > 0 }
                }
            };
            self.control.say(process.id, &message);
        }
        self.dissolve(&mut process);
        let watch = process.group.as_ref().and_then(|group| group.watch().ok());
        if let Some(watch) = watch.filter(Watch::is_populated) {
            process.life = ProcessState::Left { watch };
            self.processes.push(process);
        }
    }

    fn signal(&mut self, id: u32, signo: u8, group: bool) {
        // One that has just ended is as good as signalled; the host learns of its end anyway.
        if let Some(pid) = self.find(id).and_then(|process| process.life.pid()) {
            let _ = sys::kill(if group { -pid } else { pid }, signo);
        }
    }

    fn kill(&mut self, id: u32) {
        let Some(process) = self.find(id) else { return };
        if let ProcessState::Connecting { .. } = process.life {
            process.life = ProcessState::Over;
            return self.refuse(id, SpawnError::new(SpawnStep::Request, Errno::ECANCELED));
        }
        process.kill();
    }

    /// Asks all workloads to end. A second request can only make it sooner.
    fn start_ending(&mut self, end: End, grace_ms: u32) {
        let deadline = sys::now_ns() + u64::from(grace_ms) * 1_000_000;
        if let Some(ending) = &mut self.ending {
            return ending.shorten_deadline(deadline);
        }
        for process in &mut self.processes {
            if let ProcessState::Connecting { .. } = process.life {
                process.life = ProcessState::Over;
                let (step, errno) = (SpawnStep::Request, Errno::ESHUTDOWN.0);
                self.control.say(process.id, &FromGuest::SpawnFailed { step, errno });
            }
        }
        self.workloads = self.cgroups.as_ref().and_then(|cgroups| cgroups.watch().ok());
        let mut own_signals = false;
        for (pid, signal) in self.processes.iter().filter_map(Process::own_signal) {
            own_signals = true;
            shutdown::signal_also_if_stopped(pid, signal);
        }
        if !own_signals {
            shutdown::signal_also_if_stopped(-1, sys::SIGTERM);
        }
        self.ending = Some(GuestShutdown::new(end, deadline, own_signals));
    }

    /// Takes the end of the machine as far as it can go now.
    fn ending_over(&mut self) -> Option<End> {
        let ending = self.ending.as_mut()?;
        let populated = self.workloads.as_ref().is_some_and(Watch::is_populated);
        let alive = populated || self.processes.iter().any(|process| process.life.pid().is_some());
        let drained = self.relays.is_empty()
            && self.terminals.is_empty()
            && self.connections.as_ref().is_none_or(Connections::is_drained);
        let own = self.processes.iter().any(|process| process.own_signal().is_some());
        match ending.step(own, alive, drained, sys::now_ns()) {
            Next::Wait => None,
            Next::Terminate => {
                shutdown::signal_also_if_stopped(-1, sys::SIGTERM);
                None
            }
            Next::Kill => {
                let _ = sys::kill(-1, SIGKILL);
                None
            }
            Next::Leave(end) => Some(end),
        }
    }
}
