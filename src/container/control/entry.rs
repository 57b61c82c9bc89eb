//! [`ProcessEntry`]: one process as the host knows it, with its time-outs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::StartRequest;
use super::session::StartReply;
use super::stream::protocol_error;
use crate::container::process::{ExitStatus, ProcessShared};
use crate::error::{Error, ErrorKind, Result};
use crate::vm::Exit;

/// How long the guest may take to start a program before it is given up.
pub(super) const START_TIMEOUT: Duration = Duration::from_secs(60);
/// A process that was killed and whose end the guest does not tell has ended for the host after this.
pub(in crate::container) const KILL_MARGIN: Duration = Duration::from_secs(2);
/// How long a running guest may owe the end of a killed process. Then the VM is ended.
pub(super) const UNANSWERED_KILL: Duration = Duration::from_secs(30);

/// One process that was asked for.
pub(super) struct ProcessEntry {
    /// Its number, by which host and guest know it.
    number: u32,
    pub(super) state: Arc<ProcessShared>,
    /// By which it was started, for events.
    pub(super) program: String,
    /// Who waits for its start, until it is answered.
    started: Option<StartReply>,
    /// When its own time is over.
    pub(super) deadline: Option<Instant>,
    pub(super) phase: ProcessPhase,
    /// When the next thing happens by time alone.
    pub(super) due: Option<Instant>,
}

/// How far a process has come, as the host sees it.
pub(super) enum ProcessPhase {
    /// The guest has not said yet whether it runs; it must by this moment.
    Starting(Instant),
    Running,
    /// The guest was asked to kill it. It has ended so, whatever the guest says of it.
    Killed(KillReason),
    /// It has ended for all on the host. The guest still owes the answer.
    Overdue,
}

/// How the host ended a process.
#[derive(Clone, Copy)]
pub(super) enum KillReason {
    TimedOut,
    /// By [`Process::kill`](crate::Process::kill).
    Killed,
    /// It did not start in time; the caller gets an error.
    GivenUp,
}

impl KillReason {
    fn status(self) -> ExitStatus {
        match self {
            Self::TimedOut => ExitStatus::TimedOut,
            Self::Killed | Self::GivenUp => ExitStatus::Signaled { signal: SIGKILL.into() },
        }
    }
}

/// The number of SIGKILL (signal(7)).
const SIGKILL: u8 = 9;

impl ProcessEntry {
    /// One that the guest has to start by `by`.
    pub(super) fn new(number: u32, request: &StartRequest, started: StartReply, by: Instant) -> Self {
        let (state, deadline, phase) = (request.state.clone(), request.deadline, ProcessPhase::Starting(by));
        let name = request.argv.as_strings().iter().next().map(|name| name.to_string_lossy().into_owned());
        let program = name.unwrap_or_default();
        let mut entry = Self { number, state, program, started: Some(started), deadline, phase, due: None };
        entry.wait_for();
        entry
    }

    /// The guest answers the request. False when its caller has given up.
    ///
    /// # Errors
    /// `GuestFailed` when it has answered before.
    pub(super) fn answer(&mut self, outcome: Result<u32>) -> Result<bool> {
        match self.started.take() {
            Some(started) => Ok(started.send(outcome)),
            None => Err(protocol_error(&"a second answer to the same request")),
        }
    }

    /// Answers a caller that still waits; one that has given up misses nothing.
    fn answer_if_asked(&mut self, outcome: Result<u32>) {
        if let Some(started) = self.started.take() {
            let _ = started.send(outcome);
        }
    }

    /// It has ended, so it did start.
    pub(super) fn has_run(&mut self) {
        self.answer_if_asked(Ok(self.number));
    }

    /// Its VM has ended.
    pub(super) fn vm_ended(&mut self, exit: &Exit) {
        self.answer_if_asked(Err(Error::new(ErrorKind::GuestFailed, exit.to_string())));
    }

    /// Sets what it waits for next.
    pub(super) fn wait_for(&mut self) {
        self.due = match self.phase {
            ProcessPhase::Starting(by) => Some(self.deadline.map_or(by, |deadline| deadline.min(by))),
            ProcessPhase::Running => self.deadline,
            // Set by who killed it.
            ProcessPhase::Killed(_) | ProcessPhase::Overdue => self.due,
        };
    }

    /// The guest is asked to kill it. False when it was asked before.
    pub(super) fn killed(&mut self, ending: KillReason) -> bool {
        // A second one does not give it more time.
        let first = matches!(self.phase, ProcessPhase::Starting(_) | ProcessPhase::Running);
        if first {
            self.phase = ProcessPhase::Killed(ending);
            self.due = Some(Instant::now() + KILL_MARGIN);
        }
        first
    }

    /// Notifies all waiters on the host that it has ended by what the host did.
    pub(super) fn end(&mut self, ending: KillReason) {
        self.answer_if_asked(match ending {
            KillReason::GivenUp => {
                Err(Error::new(ErrorKind::TimedOut, format!("the guest did not start it within {START_TIMEOUT:?}")))
            }
            KillReason::TimedOut | KillReason::Killed => Ok(self.number),
        });
        self.state.finish(ending.status());
        self.state.break_streams();
    }
}

impl Drop for ProcessEntry {
    fn drop(&mut self) {
        // However it is forgotten, no thread waits for it forever.
        self.state.abandon();
    }
}

/// What has come of a moment that a process waited for.
pub(super) enum Expiry {
    /// The host has to ask the guest to kill it.
    Kill,
    /// It has ended for the host.
    Ended,
    /// And the guest still has not answered.
    Unanswered,
}

impl ProcessEntry {
    /// Something it waited for is due.
    pub(super) fn expire(&mut self, now: Instant) -> Expiry {
        match self.phase {
            ProcessPhase::Starting(_) | ProcessPhase::Running => {
                let timed_out = self.deadline.is_some_and(|deadline| deadline <= now);
                self.killed(if timed_out { KillReason::TimedOut } else { KillReason::GivenUp });
                Expiry::Kill
            }
            ProcessPhase::Killed(ending) => {
                self.end(ending);
                self.phase = ProcessPhase::Overdue;
                self.due = Some(now + UNANSWERED_KILL);
                Expiry::Ended
            }
            ProcessPhase::Overdue => Expiry::Unanswered,
        }
    }
}
