//! Reports at once which programs have lost processes for want of memory. Owned by the loop.

use super::cgroup::{Cgroups, Group, Watch};
use super::control::Control;
use super::process::{Process, ProcessState};
use super::sys::Poll;
use crate::proto::FromGuest;

/// How many processes of all workloads the kernel has killed for want of memory.
#[derive(Debug)]
pub(super) struct OomWatch {
    /// `None` on a kernel that counts no memory of cgroups.
    events: Option<Watch>,
    /// Of which the host knows.
    reported: u64,
}

impl OomWatch {
    pub(super) fn new(cgroups: Option<&Cgroups>) -> Self {
        Self { events: cgroups.and_then(|cgroups| cgroups.watch_memory().ok()), reported: 0 }
    }

    pub(super) fn poll(&self) -> Option<Poll> {
        self.events.as_ref().map(Watch::poll)
    }

    /// Reports each program that has lost processes, if any has since the last time. `exited` is one that has just ended
    /// and is not among the others.
    pub(super) fn serve(&mut self, exited: Option<&mut Process>, others: &mut [Process], control: &mut Control) {
        let total = self.events.as_ref().map_or(0, Watch::oom_kills);
        if total == self.reported {
            return;
        }
        // Of one that has ended nothing can be reported later.
        if let Some(process) = exited {
            report(process, control);
        }
        // Of the others a host that does not listen now learns the next time.
        if !control.is_full() {
            others.iter_mut().for_each(|process| report(process, control));
            self.reported = total;
        }
    }
}

/// Reports one program, if it has lost processes since it was looked at.
fn report(process: &mut Process, control: &mut Control) {
    // Before, the host does not know the program, and afterwards it wants to know no more.
    let ProcessState::Running { .. } = process.life else { return };
    let count = u32::try_from(process.group.as_ref().map_or(0, Group::oom_kills)).unwrap_or(u32::MAX);
    if count > process.oom_kills {
        process.oom_kills = count;
        control.say(process.id, &FromGuest::OomKilled { count });
    }
}
