//! The order in which the machine ends. Programs are asked, then killed, and the host takes what is in the streams.
//! Decisions only; owned by the loop.

use super::sys;
use crate::proto::End;

/// How long killed processes may take to vanish, and the host to empty the streams.
const POWER_OFF_TIMEOUT_NS: u64 = 2_000_000_000;

/// An end of the machine that has begun.
#[derive(Debug)]
pub(super) struct GuestShutdown {
    end: End,
    phase: ShutdownPhase,
    deadline: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ShutdownPhase {
    /// Programs with a stop signal of their own got it. All others go on until these have ended.
    OwnSignals,
    /// SIGTERM was sent to all.
    Asked,
    /// SIGKILL was sent.
    Killed,
    /// Nothing runs; the host takes what is in the streams.
    Draining,
}

/// What to do now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Wait,
    /// Send SIGTERM to everything, then wait.
    Terminate,
    /// Kill everything, then wait.
    Kill,
    Leave(End),
}

impl GuestShutdown {
    /// SIGTERM was just sent, or signals of programs' own; at the deadline SIGKILL will be.
    pub(super) fn new(end: End, deadline: u64, own_signals: bool) -> Self {
        let phase = if own_signals { ShutdownPhase::OwnSignals } else { ShutdownPhase::Asked };
        Self { end, phase, deadline }
    }

    /// It shall be over by then, if not sooner.
    pub(super) fn shorten_deadline(&mut self, deadline: u64) {
        self.deadline = self.deadline.min(deadline);
    }

    /// When to ask again, if nothing happens before.
    pub(super) fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Whether programs with signals of their `own` or anything else is `alive`, or the streams are `drained`, may change it, and so
    /// may the time.
    pub(super) fn step(&mut self, own: bool, alive: bool, drained: bool, now: u64) -> Next {
        let over = now >= self.deadline;
        if self.phase == ShutdownPhase::OwnSignals {
            if own && !over {
                return Next::Wait;
            }
            self.phase = ShutdownPhase::Asked;
            if alive && !over {
                return Next::Terminate;
            }
        }
        if self.phase == ShutdownPhase::Asked && alive {
            if !over {
                return Next::Wait;
            }
            (self.phase, self.deadline) = (ShutdownPhase::Killed, now + POWER_OFF_TIMEOUT_NS);
            return Next::Kill;
        }
        if self.phase == ShutdownPhase::Killed && alive && !over {
            return Next::Wait;
        }
        if self.phase != ShutdownPhase::Draining {
            (self.phase, self.deadline) = (ShutdownPhase::Draining, now + POWER_OFF_TIMEOUT_NS);
        } else if over {
            return Next::Leave(self.end);
        }
        if drained { Next::Leave(self.end) } else { Next::Wait }
    }
}

/// Sends a signal to a process, or with -1 to everything but the shim, and the reaper, which lets only SIGKILL through. A stopped process
/// must run to receive it.
pub(super) fn signal_also_if_stopped(pid: i32, signal: u8) {
    let _ = sys::kill(pid, signal);
    let _ = sys::kill(pid, sys::SIGCONT);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shutdown_without_processes_is_immediate() {
        assert_eq!(GuestShutdown::new(End::Reboot, 100, false).step(false, false, true, 1), Next::Leave(End::Reboot));
    }

    #[test]
    fn programs_with_a_stop_signal_end_before_the_others_are_asked() {
        let mut ending = GuestShutdown::new(End::PowerOff, 100, true);
        assert_eq!(ending.step(true, true, true, 1), Next::Wait);
        assert_eq!(ending.step(false, true, true, 50), Next::Terminate);
        assert_eq!(ending.step(false, true, true, 51), Next::Wait);
        assert_eq!(ending.step(false, true, true, 100), Next::Kill);
        // Nothing else is there.
        let mut ending = GuestShutdown::new(End::PowerOff, 100, true);
        assert_eq!(ending.step(false, false, true, 50), Next::Leave(End::PowerOff));
        // It does not end.
        let mut ending = GuestShutdown::new(End::PowerOff, 100, true);
        assert_eq!(ending.step(true, true, true, 100), Next::Kill);
        assert_eq!(ending.step(true, true, true, 101), Next::Wait);
    }

    #[test]
    fn processes_that_exit_on_sigterm_are_not_killed() {
        let mut ending = GuestShutdown::new(End::PowerOff, 100, false);
        assert_eq!(ending.step(false, true, false, 1), Next::Wait);
        assert_eq!(ending.step(false, false, false, 50), Next::Wait, "the host still reads");
        assert_eq!(ending.step(false, false, true, 60), Next::Leave(End::PowerOff));
    }

    #[test]
    fn remaining_processes_are_killed_once_within_a_timeout() {
        let mut ending = GuestShutdown::new(End::PowerOff, 100, false);
        assert_eq!(ending.step(false, true, true, 100), Next::Kill);
        assert_eq!(ending.step(false, true, true, 101), Next::Wait);
        assert_eq!(ending.step(false, true, true, 100 + POWER_OFF_TIMEOUT_NS), Next::Leave(End::PowerOff));
    }

    #[test]
    fn unread_streams_do_not_delay_shutdown_forever() {
        let mut ending = GuestShutdown::new(End::Halt, 100, false);
        assert_eq!(ending.step(false, false, false, 1), Next::Wait);
        assert_eq!(ending.deadline(), 1 + POWER_OFF_TIMEOUT_NS);
        assert_eq!(ending.step(false, false, false, 1 + POWER_OFF_TIMEOUT_NS), Next::Leave(End::Halt));
    }

    #[test]
    fn second_shutdown_request_only_shortens_the_deadline() {
        let mut ending = GuestShutdown::new(End::PowerOff, 100, false);
        ending.shorten_deadline(200);
        assert_eq!(ending.deadline(), 100);
        ending.shorten_deadline(0);
        assert_eq!(ending.step(false, true, true, 1), Next::Kill);
    }
}
