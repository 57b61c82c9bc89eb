//! A program that the host started, until the last process that it left behind ends. Owned by the shim's one thread.
//!
//! ```text
//!  Connecting --streams are there--> Starting --is the program--> Running --exit--> Left --group is empty--> Over
//!                                        `-----could not be-----> Refused --exit--> Over
//! ```

use super::alloc::vec::Vec;
use super::cgroup::{Group, Watch};
use super::spawn::{Report, StdioStreams};
use super::sys::{self, SIGKILL};

/// A program that the host started.
#[derive(Debug)]
pub(super) struct Process {
    /// The number that the host gave it.
    pub(super) id: u32,
    pub(super) life: ProcessState,
    pub(super) group: Option<Group>,
    /// The host killed it: then its SIGKILL is not the OOM killer's.
    pub(super) killed: bool,
    /// How many of its processes the kernel has killed for want of memory, as the host knows it.
    pub(super) oom_kills: u32,
    /// What asks it to end, where that is not SIGTERM.
    pub(super) stop_signal: Option<u8>,
}

#[derive(Debug)]
pub(super) enum ProcessState {
    /// Its streams are being connected; the request waits.
    Connecting {
        streams: StdioStreams,
        kind: u32,
        payload: Vec<u8>,
    },
    /// Forked, and not yet known to be the program.
    Starting {
        pid: i32,
        report: Report,
    },
    Running {
        pid: i32,
    },
    /// It never became the program, which the host knows, and still has to be reaped.
    Refused {
        pid: i32,
    },
    /// It has exited, but not all that it started.
    Left {
        watch: Watch,
    },
    /// To be forgotten.
    Over,
}

impl ProcessState {
    /// While it has one.
    pub(super) fn pid(&self) -> Option<i32> {
        match self {
            Self::Starting { pid, .. } | Self::Running { pid } | Self::Refused { pid } => Some(*pid),
            _ => None,
        }
    }
}

impl Process {
    pub(super) fn new(id: u32, stop_signal: Option<u8>) -> Self {
        Self { id, life: ProcessState::Over, group: None, killed: false, oom_kills: 0, stop_signal }
    }

    /// Its pid, while it runs and has a stop signal of its own.
    pub(super) fn own_signal(&self) -> Option<(i32, u8)> {
        self.life.pid().zip(self.stop_signal)
    }

    /// Kills it and what it started.
    pub(super) fn kill(&mut self) {
        self.killed = true;
        if self.group.as_ref().is_some_and(|group| group.kill().is_ok()) {
            return;
        }
        // Without cgroups, what stayed in its process group.
        if let Some(pid) = self.life.pid() {
            let _ = sys::kill(-pid, SIGKILL);
            let _ = sys::kill(pid, SIGKILL);
        }
    }
}
