//! [`Session`]: the programs that were asked for, the answers of the shim, and time-outs.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::entry::{Expiry, KILL_MARGIN, KillReason, ProcessEntry, ProcessPhase, START_TIMEOUT, UNANSWERED_KILL};
use super::outbox::{Outbox, Urgency};
use super::refusal::spawn_error;
use super::{StartRequest, ended, too_busy};
use crate::container::process::{ExitStatus, ProcessShared};
use crate::error::{Error, ErrorKind, Result};
use crate::event_loop::Reply;
use crate::proto::{FromGuest, FromHost, SEED_SIZE};
use crate::sys::Timer;
use crate::virtio::vsock::VsockStream;
use crate::vm::events::EventKind;
use crate::vm::{Exit, WeakVm};

/// Writes in a row before others get their turn.
const MAX_WRITES: usize = 16;
/// A guest whose shim has gone away without ending the machine is ended after this.
const SHIM_GONE_TIMEOUT: Duration = Duration::from_secs(2);
/// Answers to no request are logged so often at most.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Where the number of a program goes that runs, or why it does not.
pub(super) type StartReply = Reply<Result<u32>>;

/// The conversation with a shim that is ready.
pub(super) struct Session {
    connection: VsockStream,
    pub(super) outbox: Outbox,
    pub(super) processes: HashMap<u32, ProcessEntry>,
    /// Requests for new random numbers, by number.
    pub(super) reseeds: HashMap<u32, Reply<Result<()>>>,
    next_process: u32,
    timer: Timer,
    vm: WeakVm,
    /// The conversation is over.
    ended: bool,
    /// The shim has gone away so, and its machine has to end by then.
    pub(super) gone: Option<(Instant, String)>,
    /// There is more to read or to write than a turn allowed.
    more: bool,
    pub(super) dropped: DroppedAnswers,
}

/// Counts the answers to no request of ours: late ones, and those of a shim that makes them up.
#[derive(Debug, Default)]
pub(super) struct DroppedAnswers {
    /// All of them.
    pub(super) count: u64,
    /// Those since the last line in the log.
    suppressed: u64,
    reported: Option<Instant>,
}

impl DroppedAnswers {
    /// Counts one. Returns how many came before unreported, when this one is to be reported.
    fn add(&mut self, now: Instant) -> Option<u64> {
        self.count = self.count.saturating_add(1);
        if self.reported.is_some_and(|at| now.saturating_duration_since(at) < REPORT_INTERVAL) {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.reported = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

impl Session {
    /// Over this connection, to which the outbox writes.
    pub(super) fn new(connection: VsockStream, outbox: Outbox, timer: Timer, vm: WeakVm) -> Self {
        Self {
            connection,
            outbox,
            processes: HashMap::new(),
            reseeds: HashMap::new(),
            next_process: 1,
            timer,
            vm,
            ended: false,
            gone: None,
            more: false,
            dropped: DroppedAnswers::default(),
        }
    }

    /// Asks for a program, unless the caller is about to give up.
    pub(super) fn start(&mut self, request: &StartRequest, reply: StartReply) {
        let now = Instant::now();
        // The guest has the time that its caller has, less what it takes to give the program up.
        let by = reply.deadline().map(|it| it.checked_sub(KILL_MARGIN).unwrap_or(now));
        let by = by.map_or(now + START_TIMEOUT, |by| by.min(now + START_TIMEOUT));
        if by <= now {
            // Its caller has given up, or is about to.
            let _ = reply.send(Err(too_busy()));
            return;
        }
        let number = self.new_number();
        match self.send(number, &request.message()) {
            Ok(()) => {
                let entry = ProcessEntry::new(number, request, reply, by);
                self.processes.insert(number, entry);
            }
            Err(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    /// A number that no process and no request has.
    fn new_number(&mut self) -> u32 {
        loop {
            let number = self.next_process;
            self.next_process = number.wrapping_add(1).max(1);
            if !self.processes.contains_key(&number) && !self.reseeds.contains_key(&number) {
                return number;
            }
        }
    }

    /// Asks the guest's kernel for new random numbers, made from `seed`.
    pub(super) fn reseed(&mut self, seed: &[u8; SEED_SIZE], reply: Reply<Result<()>>) {
        // A guest that never answers makes no more of them than have callers that wait.
        self.reseeds.retain(|_, asked| !asked.is_late());
        if reply.is_late() {
            // Its caller has given up, or is about to.
            let _ = reply.send(Err(too_busy()));
            return;
        }
        let number = self.new_number();
        match self.send(number, &FromHost::Reseed { seed }) {
            Ok(()) => _ = self.reseeds.insert(number, reply),
            Err(error) => _ = reply.send(Err(error)),
        }
    }

    /// The guest says what became of a request for new random numbers.
    fn reseeded(&mut self, number: u32, errno: i32) {
        let Some(reply) = self.reseeds.remove(&number) else {
            return self.drop_answer(number, &FromGuest::Reseeded { errno });
        };
        let failed = || {
            let errno = std::io::Error::from_raw_os_error(errno);
            Error::new(ErrorKind::GuestFailed, format!("the guest's kernel does not take new random numbers: {errno}"))
        };
        let _ = reply.send(if errno == 0 { Ok(()) } else { Err(failed()) });
    }

    /// Kills the process that has this state, if there is one.
    pub(super) fn disown(&mut self, state: &Arc<ProcessShared>) {
        let found = self.processes.iter().find(|(_, entry)| Arc::ptr_eq(&entry.state, state));
        if let Some(number) = found.map(|(number, _)| *number) {
            self.kill_unowned(number);
        }
    }

    /// Kills a process and all that it started. It has ended soon after, whatever the guest does.
    pub(super) fn kill(&mut self, process: u32) -> Result<()> {
        // The first kill of a process always finds room. Without it the guest would owe an end that it is not asked for.
        let first = self.processes.get_mut(&process).is_some_and(|entry| entry.killed(KillReason::Killed));
        self.request(process, &FromHost::Kill, if first { Urgency::Cleanup } else { Urgency::Ordinary })
    }

    /// Kills a process whose caller has given up.
    fn kill_unowned(&mut self, process: u32) {
        let unkilled = self.processes.get_mut(&process).is_some_and(|entry| entry.killed(KillReason::Killed));
        if unkilled {
            self.clean_up(process);
        }
    }

    /// Asks the shim to kill a process that the host has given up, however much waits to be sent.
    fn clean_up(&mut self, process: u32) {
        if let Err(error) = self.request(process, &FromHost::Kill, Urgency::Cleanup) {
            log::debug!("a process that was given up cannot be killed: {error}");
        }
    }

    /// Says something to the shim; process 0 is the VM.
    pub(super) fn send(&mut self, process: u32, message: &FromHost<'_>) -> Result<()> {
        self.request(process, message, Urgency::Ordinary)
    }

    fn request(&mut self, process: u32, message: &FromHost<'_>, urgency: Urgency) -> Result<()> {
        if self.ended {
            return Err(ended());
        }
        self.outbox.push(process, message, urgency)?;
        self.flush();
        Ok(())
    }

    /// Writes what the shim takes.
    pub(super) fn flush(&mut self) {
        self.more |= self.outbox.flush(MAX_WRITES);
    }

    /// Acts on one message of the shim.
    ///
    /// # Errors
    /// `GuestFailed` for what a shim cannot mean, and when it says that it has failed: the conversation is over.
    pub(super) fn handle_message(&mut self, process: u32, message: &FromGuest<'_>) -> Result<()> {
        match *message {
            FromGuest::Spawned { .. } => return self.spawned(process),
            FromGuest::SpawnFailed { step, errno } => {
                let Some(mut entry) = self.processes.remove(&process) else {
                    self.drop_answer(process, message);
                    return Ok(());
                };
                match entry.phase {
                    ProcessPhase::Killed(ending) => entry.end(ending),
                    ProcessPhase::Overdue => {}
                    ProcessPhase::Starting(_) | ProcessPhase::Running => {
                        if !entry.answer(Err(spawn_error(step, errno)))? {
                            log::debug!("a program was not started, and its caller has given up");
                        }
                    }
                }
            }
            FromGuest::Exited { code } => self.finish(process, message, ExitStatus::Exited { code: code.into() }),
            FromGuest::Signaled { oom: true, .. } => self.finish(process, message, ExitStatus::OomKilled),
            FromGuest::Signaled { signo, .. } => {
                self.finish(process, message, ExitStatus::Signaled { signal: signo.into() });
            }
            FromGuest::Failed { stage, text, .. } => {
                // Said once: it ends the conversation.
                log::warn!("the guest's shim failed: {stage:?}: {}", text.escape_ascii());
                return Err(Error::new(ErrorKind::GuestFailed, format!("it failed: {}", text.escape_ascii())));
            }
            FromGuest::OomKilled { count } => self.oom_killed(process, count),
            FromGuest::Reseeded { errno } => self.reseeded(process, errno),
            // The machine tells its end itself.
            FromGuest::Ending { .. } => {}
            // Said before this conversation, or on streams of its own.
            FromGuest::Hello { .. } | FromGuest::Ready { .. } | FromGuest::Connected { .. } => {
                self.drop_answer(process, message);
            }
        }
        Ok(())
    }

    /// The guest says that a program runs.
    fn spawned(&mut self, process: u32) -> Result<()> {
        let late = FromGuest::Spawned { pid: 0 };
        let Some(entry) = self.processes.get_mut(&process) else {
            self.drop_answer(process, &late);
            return Ok(());
        };
        match entry.phase {
            ProcessPhase::Starting(_) | ProcessPhase::Running => {
                entry.phase = ProcessPhase::Running;
                entry.wait_for();
                if !entry.answer(Ok(process))? {
                    // The caller has given up, so it has no owner.
                    self.kill_unowned(process);
                }
            }
            // It has been killed by its number already, and its caller gets the answer at its end.
            ProcessPhase::Killed(_) => {}
            ProcessPhase::Overdue => self.drop_answer(process, &late),
        }
        Ok(())
    }

    /// The guest says how a process has ended.
    fn finish(&mut self, process: u32, message: &FromGuest<'_>, status: ExitStatus) {
        let Some(mut entry) = self.processes.remove(&process) else {
            return self.drop_answer(process, message);
        };
        let status = match entry.phase {
            ProcessPhase::Killed(KillReason::TimedOut) => ExitStatus::TimedOut,
            _ => status,
        };
        // It has run, and its end tells the rest.
        entry.has_run();
        entry.state.finish(status);
    }

    /// The guest says that a program has lost processes for want of memory.
    fn oom_killed(&mut self, process: u32, count: u32) {
        match self.processes.get(&process) {
            Some(entry) if entry.state.oom_killed(count) => {
                self.vm.push_event(EventKind::OutOfMemory { program: entry.program.clone(), kills: count });
            }
            Some(_) => {}
            None => self.drop_answer(process, &FromGuest::OomKilled { count }),
        }
    }

    /// An answer to no request of ours is dropped.
    fn drop_answer(&mut self, process: u32, message: &FromGuest<'_>) {
        if let Some(suppressed) = self.dropped.add(Instant::now()) {
            log::warn!(
                "the guest's shim answers no request, about process {process}: {message:?} ({suppressed} times more before)"
            );
        }
    }

    /// The timer is due.
    pub(super) fn timer_is_due(&mut self) {
        self.timer.clear();
        self.more = false;
        self.expire();
    }

    /// Acts on every deadline that has passed.
    pub(super) fn expire(&mut self) {
        let now = Instant::now();
        let due: Vec<u32> =
            self.processes.iter().filter(|(_, e)| e.due.is_some_and(|d| d <= now)).map(|(n, _)| *n).collect();
        for process in due {
            let Some(entry) = self.processes.get_mut(&process) else { continue };
            match entry.expire(now) {
                Expiry::Kill => self.clean_up(process),
                Expiry::Ended => {}
                Expiry::Unanswered => self.unanswered(process, now),
            }
        }
        if self.gone.as_ref().is_some_and(|(by, _)| *by <= now)
            && let Some((_, why)) = self.gone.take()
        {
            self.vm.give_up(format!("its shim is gone: {why}"));
        }
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

    /// The conversation is over. Everything that ran ends with the VM, which has a moment to do so by itself.
    pub(super) fn end(&mut self, why: &str) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        // The shim waits for this before it ends the machine, so that its last words are not overtaken by the end.
        if let Err(error) = self.connection.shutdown(std::net::Shutdown::Both) {
            log::debug!("the control stream was closed already: {error}");
        }
        self.outbox.clear();
        for (_, reply) in self.reseeds.drain() {
            let _ = reply.send(Err(ended()));
        }
        self.gone = Some((Instant::now() + SHIM_GONE_TIMEOUT, why.to_owned()));
    }

    /// Notifies all waiters that the VM has ended.
    pub(super) fn finish_all(&mut self, exit: &Exit) {
        self.end("its machine has ended");
        self.gone = None;
        for (_, mut entry) in self.processes.drain() {
            entry.state.finish(ExitStatus::VmEnded { exit: exit.clone() });
            entry.state.break_streams();
            entry.vm_ended(exit);
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// How the VM has ended, if it has.
    pub(super) fn exit(&self) -> Option<Exit> {
        self.vm.try_wait()
    }

    /// Goes on after others had their turn.
    pub(super) fn more(&mut self) {
        self.more = true;
    }

    /// Whether there is more to do than turns allowed. Forgets it.
    pub(super) fn take_more(&mut self) -> bool {
        std::mem::take(&mut self.more)
    }

    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Arms the timer for the next deadline. Called at the end of each turn and each request.
    pub(super) fn arm_timer(&mut self) {
        let gone = self.gone.as_ref().map(|(by, _)| *by);
        let now = self.more.then(Instant::now);
        let next = self.processes.values().filter_map(|e| e.due).chain(gone).chain(now).min();
        if let Err(error) = self.timer.set(next) {
            log::error!("time-outs of processes cannot be kept: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_answers_are_all_counted_and_seldom_reported() {
        let (mut dropped, begin) = (DroppedAnswers::default(), Instant::now());
        assert_eq!(dropped.add(begin), Some(0));
        for _ in 0..1000 {
            assert_eq!(dropped.add(begin + REPORT_INTERVAL / 2), None);
        }
        assert_eq!(dropped.add(begin + REPORT_INTERVAL), Some(1000));
        assert_eq!((dropped.add(begin + REPORT_INTERVAL), dropped.count), (None, 1003));
    }
}
