//! [`Cgroup`]: a control group for a VM's threads, which divides processor time.
//!
//! It is a threaded group (Linux cgroup v2, "Threads"), since all VMs are threads of one process, so it divides
//! processor time alone. It is made before the VM, entered by each of its threads, and removed by [`CgroupGuard`]'s drop.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::spec::HostPath;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys;
use crate::sys::ProcessGeneration;

/// Names of groups begin so, followed by the process and something random.
const PREFIX: &str = "cofferdam-";
/// The period of `cpu.max`, in microseconds: the kernel's own default.
const PERIOD: u64 = 100_000;
/// Nothing of the group ran for 50 ms of a second though it wanted to. Reported once in that second.
const PRESSURE: &[u8] = b"full 50000 1000000\0";
/// Threads that were joined leave their group a moment later.
const LEAVING: Duration = Duration::from_millis(500);

/// Describes a control group (cgroup v2) for the threads of a VM; a config value.
///
/// It divides the host's processor time. Without one, a VM's threads are threads of the process like any other. With
/// one, a VM with many busy vCPUs gets no more than one with a single vCPU and the same weight.
///
/// The parent group becomes a *threaded domain* for as long as there are VMs below it. So it must be delegated to this
/// process (systemd: `Delegate=yes`), and have no other groups with processes below it.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct Cgroup {
    parent: Option<HostPath>,
    weight: u32,
    cpus: Option<f64>,
    optional: bool,
}

impl Cgroup {
    /// Makes the group below the one that this process is in.
    #[allow(clippy::new_without_default, reason = "a group is asked for, never the default")]
    pub fn new() -> Self {
        Self { parent: None, weight: 100, cpus: None, optional: false }
    }

    /// Makes the group below the one whose directory is `path`.
    ///
    /// This process must be in that group or below it: threads cannot leave their process.
    pub fn under(path: impl Into<PathBuf>) -> Self {
        Self { parent: Some(HostPath::new(path)), ..Self::new() }
    }

    /// Sets the VM's share when processors are short, 1 to 10,000; 100 by default (`cpu.weight`).
    pub fn weight(mut self, weight: u32) -> Self {
        self.weight = weight;
        self
    }

    /// Limits the VM to the time of `n` processors, such as 0.5.
    ///
    /// That holds even when processors idle.
    ///
    /// That is `cpu.max`, in periods of 100 ms. Leave room for device threads beside the vCPUs.
    pub fn cpus(mut self, n: f64) -> Self {
        self.cpus = Some(n);
        self
    }

    /// Sets whether the VM starts without a group where the host allows none.
    ///
    /// By default it does not. If it does, [`EventKind::Degraded`] then says why.
    ///
    /// [`EventKind::Degraded`]: crate::event::EventKind::Degraded
    pub fn optional(mut self, optional: bool) -> Self {
        self.optional = optional;
        self
    }

    /// Makes the group, or says in words why the VM has to do without.
    ///
    /// # Errors
    /// `InvalidConfig` for numbers that cannot be; unless it is optional, `NotFound`, `PermissionDenied` or `Unsupported`
    /// when the host has no group for it.
    pub(super) fn make(&self) -> Result<Result<CgroupGuard, String>> {
        let quota = self.quota()?;
        let made = self.parent().and_then(|parent| {
            let leaf = CgroupGuard::make(&parent)?;
            leaf.set("cpu.weight", &self.weight.to_string())?;
            leaf.set("cpu.max", &format!("{quota} {PERIOD}"))?;
            Ok(leaf)
        });
        match made {
            Ok(leaf) => Ok(Ok(leaf)),
            Err(error) if self.optional => Ok(Err(error.to_string())),
            Err(error) => Err(error.doing("cgroup")),
        }
    }

    /// Checks its numbers, and returns the quota for `cpu.max`.
    ///
    /// # Errors
    /// `InvalidConfig` for numbers that cannot be.
    fn quota(&self) -> Result<String> {
        if !(1..=10_000).contains(&self.weight) {
            return Err(Error::invalid("Cgroup::weight", format!("{} is not within 1 to 10,000", self.weight)));
        }
        match self.cpus {
            None => Ok("max".to_owned()),
            // At least the millisecond that the kernel wants.
            Some(n) if (0.01..=1e6).contains(&n) => Ok(format!("{:.0}", n * PERIOD as f64)),
            Some(n) => Err(Error::invalid("Cgroup::cpus", format!("{n} is not within 0.01 to a million"))),
        }
    }

    /// Checks its numbers, without touching the host.
    ///
    /// # Errors
    /// `InvalidConfig` for numbers that cannot be.
    pub(super) fn check(&self) -> Result<()> {
        self.quota().map(drop)
    }

    fn parent(&self) -> Result<PathBuf> {
        if let Some(parent) = &self.parent {
            return Ok(parent.to_path_buf());
        }
        let none = || Error::new(ErrorKind::Unsupported, "this process is in no cgroup of version 2");
        let mounts = fs::read_to_string("/proc/self/mounts").doing(|| "looking for cgroups")?;
        let groups = fs::read_to_string("/proc/self/cgroup").doing(|| "looking for cgroups")?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).ok_or_else(none)?;
        let mount = mounts.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>().as_slice() {
            [_, at, "cgroup2", ..] => Some(Path::new(at).join(own)),
            _ => None,
        });
        mount.ok_or_else(none)
    }
}

/// What a group has done and had to wait for; see [`Stats`](crate::stats::Stats).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CgroupStats {
    /// Processor time of all threads of the VM.
    pub cpu_time: Duration,
    /// How often, in periods of 100 ms, they had used up what [`Cgroup::cpus`] gives them.
    pub throttled_periods: u64,
    /// How long they have waited because of that, all threads together.
    pub throttled_time: Duration,
}

/// A group that exists. Dropping it removes it once its threads are gone.
#[derive(Debug)]
pub(super) struct CgroupGuard {
    path: PathBuf,
    member: CgroupHandle,
    /// Where its threads are.
    origin: ProcessGeneration,
}

/// By which a thread enters the group. Outliving the group is harmless.
#[derive(Debug, Clone)]
pub(super) struct CgroupHandle(Arc<File>);

impl CgroupHandle {
    /// The calling thread enters.
    pub(super) fn join(&self) -> Result<()> {
        // Zero is the writing thread (Linux cgroup v2, "Threads").
        (&*self.0).write_all(b"0").doing(|| "entering the VM's cgroup")
    }
}

impl CgroupGuard {
    fn make(parent: &Path) -> Result<Self> {
        let hint = "; does this process own the group (systemd: Delegate=yes)?";
        let failed = |what: &str, error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::PermissionDenied,
                _ => ErrorKind::Unsupported,
            };
            Error::new(kind, format!("{what} {}: {error}{hint}", parent.display()))
        };
        let controllers = fs::read_to_string(parent.join("cgroup.controllers"))
            .map_err(|error| failed("reading the controllers of", error))?;
        if !controllers.split_whitespace().any(|name| name == "cpu") {
            let what = format!("the cpu controller is not enabled for {}{hint}", parent.display());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        sweep(parent);
        let mut random = [0; 8];
        sys::fill_random(&mut random).doing(|| "naming the VM's cgroup")?;
        let name = format!("{PREFIX}{}-{:016x}", std::process::id(), u64::from_le_bytes(random));
        let path = parent.join(name);
        fs::create_dir(&path).map_err(|error| failed("making a group below", error))?;
        let undo = |error| {
            remove(&path);
            error
        };
        let write =
            |path: PathBuf, text: &str| fs::OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes());
        // The first makes the parent a threaded domain, which then may hand out processor time beside having processes.
        write(path.join("cgroup.type"), "threaded")
            .map_err(|error| undo(failed("threads cannot have groups below", error)))?;
        write(parent.join("cgroup.subtree_control"), "+cpu")
            .map_err(|error| undo(failed("enabling the cpu controller below", error)))?;
        let member = fs::OpenOptions::new().write(true).open(path.join("cgroup.threads"));
        let member = member.map_err(|error| undo(failed("opening a group below", error)))?;
        Ok(Self { path, member: CgroupHandle(Arc::new(member)), origin: ProcessGeneration::current() })
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.path.join(file), value).doing(|| format!("writing {value} to {file}"))
    }

    pub(super) fn member(&self) -> CgroupHandle {
        self.member.clone()
    }

    pub(super) fn stats(&self) -> CgroupStats {
        stats(&self.path)
    }

    /// Returns a file that is urgent when the group's threads could not run for a while (Linux,
    /// Documentation/accounting/psi.rst). With it comes a function that returns whether that was for its limit. `None`
    /// without one, or where the host does not measure it.
    pub(super) fn pressure(&self) -> Option<(File, impl FnMut() -> bool + Send + 'static)> {
        if fs::read_to_string(self.path.join("cpu.max")).ok()?.starts_with("max") {
            return None;
        }
        let open = fs::OpenOptions::new().read(true).write(true).open(self.path.join("cpu.pressure"));
        let set = |mut file: File| file.write_all(PRESSURE).map(|()| file);
        let file = open.and_then(set).inspect_err(|e| log::debug!("throttling of vCPUs is not reported: {e}")).ok()?;
        let (path, mut seen) = (self.path.clone(), 0);
        let throttled = move || {
            let now = stats(&path).throttled_periods;
            std::mem::replace(&mut seen, now) < now
        };
        Some((file, throttled))
    }
}

impl Drop for CgroupGuard {
    fn drop(&mut self) {
        // A child of fork has a copy of the name, and no thread in the group.
        if self.origin.is_current() {
            remove(&self.path);
        }
    }
}

/// A thread that hangs in the host's kernel keeps its group; a later VM removes it.
fn remove(path: &Path) {
    let step = Duration::from_millis(1);
    for _ in 0..LEAVING.as_millis() {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => thread::sleep(step),
            Ok(()) => return,
            Err(error) => return log::warn!("removing {}: {error}", path.display()),
        }
    }
    log::warn!("{} still has threads and is left behind", path.display());
    remember(&mut left_behind(), path);
}

fn remember(left: &mut Vec<PathBuf>, path: &Path) {
    if left.len() < MAX_LEFT_BEHIND {
        left.push(path.to_owned());
    }
}

/// Groups of this process that still had threads when their VM had gone; the next VM removes those that are empty.
static LEFT_BEHIND: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// More are not remembered: each has a thread that hangs.
const MAX_LEFT_BEHIND: usize = 1024;

fn left_behind() -> MutexGuard<'static, Vec<PathBuf>> {
    LEFT_BEHIND.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes groups that were left behind: by threads of this process, and by processes that were killed.
fn sweep(parent: &Path) {
    left_behind().retain(|path| fs::remove_dir(path).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)));
    let Ok(entries) = fs::read_dir(parent) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let process = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if process.is_some_and(|id| !Path::new("/proc").join(id.to_string()).exists()) {
            // One that is not empty is in use after all.
            let _ = fs::remove_dir(parent.join(name));
        }
    }
}

fn stats(path: &Path) -> CgroupStats {
    parse(&fs::read_to_string(path.join("cpu.stat")).unwrap_or_default())
}

/// `cpu.stat` (Linux cgroup v2, "CPU Interface Files").
fn parse(text: &str) -> CgroupStats {
    let mut stats = CgroupStats::default();
    for (key, value) in text.lines().filter_map(|line| line.split_once(' ')) {
        let Ok(value) = value.trim().parse::<u64>() else { continue };
        match key {
            "usage_usec" => stats.cpu_time = Duration::from_micros(value),
            "nr_throttled" => stats.throttled_periods = value,
            "throttled_usec" => stats.throttled_time = Duration::from_micros(value),
            _ => {}
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_cgroup_values_name_the_method() {
        for (cgroup, method) in [
            (Cgroup::new().weight(0), "Cgroup::weight: "),
            (Cgroup::new().weight(10_001).optional(true), "Cgroup::weight: "),
            (Cgroup::new().cpus(0.0), "Cgroup::cpus: "),
            (Cgroup::new().cpus(f64::NAN), "Cgroup::cpus: "),
        ] {
            let error = cgroup.make().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().starts_with(method), "{error}");
        }
    }

    #[test]
    fn non_cgroup_directory_is_an_error_unless_optional() {
        let directory = std::env::temp_dir();
        let error = Cgroup::under(&directory).make().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().starts_with("cgroup: reading the controllers of "), "{error}");
        let why = Cgroup::under(&directory).optional(true).make().unwrap().unwrap_err();
        assert!(why.contains("Delegate=yes"), "{why}");
    }

    #[test]
    fn groups_left_behind_are_bounded_and_removed_by_a_later_vm() {
        let mut left = Vec::new();
        (0..2 * MAX_LEFT_BEHIND).for_each(|_| remember(&mut left, Path::new("/group")));
        assert_eq!(left.len(), MAX_LEFT_BEHIND);
        let group = std::env::temp_dir().join(format!("cofferdam-left-behind-{}", std::process::id()));
        fs::create_dir(&group).unwrap();
        remember(&mut left_behind(), &group);
        sweep(Path::new("/nonexistent"));
        assert!(!group.exists() && !left_behind().contains(&group));
    }

    #[test]
    fn cgroup_stats_are_parsed() {
        let stats = parse("usage_usec 1500\nuser_usec 1\nnr_periods 9\nnr_throttled 4\nthrottled_usec 2000000\nodd\n");
        assert_eq!(stats.throttled_periods, 4);
        assert_eq!((stats.cpu_time, stats.throttled_time), (Duration::from_micros(1500), Duration::from_secs(2)));
    }
}
