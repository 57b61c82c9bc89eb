//! Reports at once which programs have lost processes for want of memory. Owned by the loop.

use super::cgroup::{Cgroups, Group, Watch};
use super::control::Control;
use super::process::{Process, ProcessState};
use super::sys::Poll;
use crate::proto::FromGuest;

/// Whether the kernel has killed any process of the workloads.
#[derive(Debug)]
pub(super) struct OomWatch {
    /// `None` on a kernel that counts no memory of cgroups.
    events: Option<Watch>,
}

impl OomWatch {
    pub(super) fn new(cgroups: Option<&Cgroups>) -> Self {
        Self { events: cgroups.and_then(|cgroups| cgroups.watch_memory().ok()) }
    }

    pub(super) fn poll(&self) -> Option<Poll> {
        self.events.as_ref().map(Watch::poll)
    }

    /// Reports each program that has lost processes since it was looked at.
    pub(super) fn serve(&self, processes: &mut [Process], control: &mut Control) {
        if let Some(events) = &self.events {
            events.acknowledge();
        }
        for process in processes {
            report(process, control);
        }
    }
}

/// Reports one program, if it has lost processes since it was looked at.
pub(super) fn report(process: &mut Process, control: &mut Control) {
    // Before, the host does not know the program, and afterwards it wants to know no more.
    let ProcessState::Running { .. } = process.life else { return };
    let count = u32::try_from(process.group.as_ref().map_or(0, Group::oom_kills)).unwrap_or(u32::MAX);
    // A host that does not listen now learns of it the next time.
    if count > process.oom_kills && !control.is_full() {
        process.oom_kills = count;
        control.say(process.id, &FromGuest::OomKilled { count });
    }
}
