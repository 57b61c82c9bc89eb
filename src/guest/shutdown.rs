//! The order in which the machine ends. Programs are asked, then killed, and the host takes what is in the streams.
//! Decisions only; owned by the loop.

use crate::proto::End;

/// How long killed processes may take to vanish, and the host to empty the streams.
const POWER_OFF_TIMEOUT_NS: u64 = 2_000_000_000;

/// An end of the machine that has begun.
#[derive(Debug)]
pub(super) struct Ending {
    end: End,
    phase: Phase,
    deadline: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// SIGTERM was sent.
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
    /// Kill everything, then wait.
    Kill,
    Leave(End),
}

impl Ending {
    /// SIGTERM was just sent; at the deadline SIGKILL will be.
    pub(super) fn new(end: End, deadline: u64) -> Self {
        Self { end, phase: Phase::Asked, deadline }
    }

    /// It shall be over by then, if not sooner.
    pub(super) fn hurry(&mut self, deadline: u64) {
        self.deadline = self.deadline.min(deadline);
    }

    /// When to ask again, if nothing happens before.
    pub(super) fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Whether anything is `alive` or the streams are `drained` may change it, and so may the time.
    pub(super) fn step(&mut self, alive: bool, drained: bool, now: u64) -> Next {
        let over = now >= self.deadline;
        if self.phase == Phase::Asked && alive {
            if !over {
                return Next::Wait;
            }
            (self.phase, self.deadline) = (Phase::Killed, now + POWER_OFF_TIMEOUT_NS);
            return Next::Kill;
        }
        if self.phase == Phase::Killed && alive && !over {
            return Next::Wait;
        }
        if self.phase != Phase::Draining {
            (self.phase, self.deadline) = (Phase::Draining, now + POWER_OFF_TIMEOUT_NS);
        } else if over {
            return Next::Leave(self.end);
        }
        if drained { Next::Leave(self.end) } else { Next::Wait }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_machine_leaves_at_once() {
        assert_eq!(Ending::new(End::Reboot, 100).step(false, true, 1), Next::Leave(End::Reboot));
    }

    #[test]
    fn those_that_go_when_asked_are_not_killed() {
        let mut ending = Ending::new(End::PowerOff, 100);
        assert_eq!(ending.step(true, false, 1), Next::Wait);
        assert_eq!(ending.step(false, false, 50), Next::Wait, "the host still reads");
        assert_eq!(ending.step(false, true, 60), Next::Leave(End::PowerOff));
    }

    #[test]
    fn those_that_stay_are_killed_once_and_not_waited_for_for_ever() {
        let mut ending = Ending::new(End::PowerOff, 100);
        assert_eq!(ending.step(true, true, 100), Next::Kill);
        assert_eq!(ending.step(true, true, 101), Next::Wait);
        assert_eq!(ending.step(true, true, 100 + POWER_OFF_TIMEOUT_NS), Next::Leave(End::PowerOff));
    }

    #[test]
    fn a_host_that_never_reads_holds_nothing_up_for_ever() {
        let mut ending = Ending::new(End::Halt, 100);
        assert_eq!(ending.step(false, false, 1), Next::Wait);
        assert_eq!(ending.deadline(), 1 + POWER_OFF_TIMEOUT_NS);
        assert_eq!(ending.step(false, false, 1 + POWER_OFF_TIMEOUT_NS), Next::Leave(End::Halt));
    }

    #[test]
    fn a_second_request_only_makes_it_sooner() {
        let mut ending = Ending::new(End::PowerOff, 100);
        ending.hurry(200);
        assert_eq!(ending.deadline(), 100);
        ending.hurry(0);
        assert_eq!(ending.step(true, true, 1), Next::Kill);
    }
}
