//! [`ProcessLimits`] and [`Resource`]: what a program may use.

use crate::error::{Error, Result};
use crate::proto;
use crate::size::Size;

/// What a program and everything that it starts may use together; see [`Exec::limits`](super::Exec::limits).
///
/// The guest's kernel keeps the limits by a cgroup of the program's own. Memory and processors that are not limited are
/// the machine's. Processes are always limited: some of the guest's are kept for other programs.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[must_use]
pub struct ProcessLimits {
    memory: Option<Size>,
    processes: Option<u32>,
    weight: Option<u32>,
    cpus: Option<f64>,
}

/// From a hundredth of a processor, which Linux can still measure out.
const CPUS: std::ops::RangeInclusive<f64> = 0.01..=1e6;

impl ProcessLimits {
    /// Returns limits of which none is set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how much memory they may use, at least 64 KiB.
    ///
    /// The page cache of their files counts. The guest's kernel first takes back what can be had again. Then it kills one of them: a program that it kills has
    /// [`ExitStatus::OomKilled`](crate::process::ExitStatus::OomKilled). Linux, cgroup v2: `memory.max`.
    pub fn memory(mut self, most: Size) -> Self {
        self.memory = Some(most);
        self
    }

    /// Sets how many processes and threads they may be; at least 1.
    ///
    /// A fork beyond fails with `EAGAIN`. Linux, cgroup v2: `pids.max`.
    pub fn processes(mut self, most: u32) -> Self {
        self.processes = Some(most);
        self
    }

    /// Sets their share of contended processors, 1 to 10,000; others have 100.
    ///
    /// Linux, cgroup v2: `cpu.weight`.
    pub fn weight(mut self, weight: u32) -> Self {
        self.weight = Some(weight);
        self
    }

    /// Sets how many processors' time they may use, 0.01 to 1,000,000.
    ///
    /// It is measured in periods of a tenth of a second. Linux, cgroup v2: `cpu.max`.
    pub fn cpus(mut self, most: f64) -> Self {
        self.cpus = Some(most);
        self
    }

    /// Returns them as the shim gets them.
    ///
    /// # Errors
    /// `InvalidConfig` for a value out of its range.
    pub(super) fn message(&self) -> Result<proto::ProcessLimits> {
        let wrong = |what: String| Error::invalid("limits", what);
        let memory = self.memory.map(Size::as_bytes);
        if let Some(bytes) = memory.filter(|bytes| *bytes < Size::kib(64).as_bytes()) {
            return Err(wrong(format!("memory: {bytes} bytes are too few for a program; at least 64 KiB are needed")));
        }
        if self.processes == Some(0) {
            return Err(wrong("processes: a program is one itself".into()));
        }
        let weight = self.weight.map(|weight| {
            let fits = u16::try_from(weight).ok().filter(|weight| proto::CPU_WEIGHTS.contains(weight));
            fits.ok_or_else(|| wrong(format!("weight: {weight} is not 1 to 10,000")))
        });
        let cpus = self.cpus.map(|cpus| match cpus {
            cpus if CPUS.contains(&cpus) => Ok((cpus * proto::CPU_PERIOD_US as f64).round() as u64),
            cpus => Err(wrong(format!("cpus: {cpus} is not 0.01 to 1,000,000"))),
        });
        Ok(proto::ProcessLimits {
            memory,
            pids: self.processes,
            cpu_weight: weight.transpose()?,
            cpu_quota_us: cpus.transpose()?,
        })
    }
}

/// A resource of a process that Linux limits (getrlimit(2)); see [`Exec::rlimit`](super::Exec::rlimit).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Resource {
    /// `RLIMIT_CPU`: processor time, in seconds.
    Cpu = 0,
    /// `RLIMIT_FSIZE`: the size of a file that it writes, in bytes.
    FileSize = 1,
    /// `RLIMIT_DATA`: its data, in bytes.
    Data = 2,
    /// `RLIMIT_STACK`: its first thread's stack, in bytes.
    Stack = 3,
    /// `RLIMIT_CORE`: a core dump, in bytes.
    Core = 4,
    /// `RLIMIT_NPROC`: processes and threads of its user; root has no such limit.
    Processes = 6,
    /// `RLIMIT_NOFILE`: one more than the highest descriptor.
    OpenFiles = 7,
    /// `RLIMIT_MEMLOCK`: locked memory, in bytes.
    LockedMemory = 8,
    /// `RLIMIT_AS`: its address space, in bytes.
    AddressSpace = 9,
    /// `RLIMIT_SIGPENDING`: queued signals of its user.
    PendingSignals = 11,
    /// `RLIMIT_MSGQUEUE`: POSIX message queues of its user, in bytes.
    MessageQueues = 12,
    /// `RLIMIT_NICE`: 20 less the nice value to which it may raise its priority.
    Nice = 13,
    /// `RLIMIT_RTPRIO`: its real-time priority.
    RealTimePriority = 14,
    /// `RLIMIT_RTTIME`: processor time without a wait at real-time priority, in microseconds.
    RealTime = 15,
}

impl Resource {
    /// No limit (`RLIM_INFINITY`).
    ///
    /// [`Resource::OpenFiles`] cannot have it: Linux takes at most `fs.nr_open`, 1,048,576 by default.
    pub const UNLIMITED: u64 = u64::MAX;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn limits_out_of_range_are_refused_by_name() {
        let limits = ProcessLimits::new;
        for (wrong, name) in [
            (limits().memory(Size::kib(63)), "memory"),
            (limits().processes(0), "processes"),
            (limits().weight(0), "weight"),
            (limits().weight(10_001), "weight"),
            (limits().cpus(0.001), "cpus"),
            (limits().cpus(f64::NAN), "cpus"),
            (limits().cpus(f64::INFINITY), "cpus"),
            (limits().cpus(-1.0), "cpus"),
        ] {
            let error = wrong.message().unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains(name), "{error}");
        }
        let all = limits().memory(Size::mib(1)).processes(3).weight(10_000).cpus(1.5).message().unwrap();
        assert_eq!(
            (all.memory, all.pids, all.cpu_weight, all.cpu_quota_us),
            (Some(1 << 20), Some(3), Some(10_000), Some(150_000))
        );
        assert!(all.is_any() && !limits().message().unwrap().is_any());
    }
}
