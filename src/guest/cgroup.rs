//! Cgroups (version 2): one for each program that was started. So it and all it started can be counted, limited and
//! killed as one.
//!
//! ```text
//!  /sys/fs/cgroup/cofferdam      all workloads: pids.max leaves the shim and the kernel room
//!  /sys/fs/cgroup/cofferdam/ID   one program
//! ```
//! Owned by the shim's one thread, which keeps descriptors: a workload that hides `/sys/fs/cgroup` changes nothing. On
//! a kernel without cgroups there is no [`Cgroups`], and programs are known by their process group only.

use core::ffi::CStr;

use super::alloc::ffi::CString;
use super::alloc::vec::Vec;
use super::files;
use super::poweroff::Decimal;
use super::spawn::SpawnError;
use super::sys::{self, Errno, Fd, O_DIRECTORY, O_RDONLY, POLLPRI, Poll};
use crate::proto::{CPU_PERIOD_US, ProcessLimits, SpawnStep};

/// Processes that no workload may have: the kernel's own, the shim, and what a few programs more need to start beside a fork bomb.
const RESERVED_PIDS: u64 = 64;

/// The parent of the groups.
#[derive(Debug)]
pub(super) struct Cgroups {
    dir: Fd,
    /// `pids.max` of each program, less than all together may have, so that another can start beside one that has used up its share.
    pids_each: u64,
}

impl Cgroups {
    /// `threads_max` is how many threads the kernel allows at all.
    pub(super) fn new(threads_max: u64) -> Result<Self, Errno> {
        let root = sys::open(None, c"/sys/fs/cgroup", O_RDONLY | O_DIRECTORY)?;
        enable_controllers(&root)?;
        match sys::mkdir(Some(&root), c"cofferdam", 0o755) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
        let dir = sys::open(Some(&root), c"cofferdam", O_RDONLY | O_DIRECTORY)?;
        enable_controllers(&dir)?;
        let (all, each) = shares(threads_max);
        let _ = files::write(Some(&dir), c"pids.max", Decimal::new(all).as_bytes());
        Ok(Self { dir, pids_each: each })
    }

    /// A group for the program `id`, which may use so much.
    pub(super) fn group(&self, id: u32, limits: &ProcessLimits) -> Result<Group, SpawnError> {
        let group = self.make(id).map_err(|errno| SpawnError::new(SpawnStep::Cgroup, errno))?;
        match group.limit(limits, self.pids_each) {
            Ok(()) => Ok(group),
            Err(errno) => {
                self.remove(&group);
                Err(SpawnError::new(SpawnStep::Limit, errno))
            }
        }
    }

    fn make(&self, id: u32) -> Result<Group, Errno> {
        let name = decimal(id.into());
        sys::mkdir(Some(&self.dir), &name, 0o755)?;
        let dir = match sys::open(Some(&self.dir), &name, O_RDONLY | O_DIRECTORY) {
            Ok(dir) => dir,
            Err(errno) => {
                let _ = sys::rmdir(Some(&self.dir), &name);
                return Err(errno);
            }
        };
        Ok(Group { dir, name })
    }

    /// Removes the group if it has no process any more.
    pub(super) fn remove(&self, group: &Group) -> bool {
        sys::rmdir(Some(&self.dir), &group.name).is_ok()
    }

    /// Tells when the last workload has gone.
    pub(super) fn watch(&self) -> Result<Watch, Errno> {
        Watch::new(&self.dir)
    }

    /// Tells when a workload runs out of memory.
    pub(super) fn watch_memory(&self) -> Result<Watch, Errno> {
        sys::open(Some(&self.dir), c"memory.events", O_RDONLY).map(Watch)
    }
}

/// The cgroup of one program.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) dir: Fd,
    name: CString,
}

impl Group {
    /// It gets no more processes than `pids_each`, with which another program can still start beside it.
    ///
    /// # Errors
    /// `ENOENT` when the kernel has no controller for one that is asked for.
    fn limit(&self, limits: &ProcessLimits, pids_each: u64) -> Result<(), Errno> {
        let ProcessLimits { memory, pids, cpu_weight, cpu_quota_us } = *limits;
        let set = |file, number: Option<u64>, rest: &[u8]| match number {
            None => Ok(()),
            Some(number) => files::write(Some(&self.dir), file, &[Decimal::new(number).as_bytes(), rest].concat()),
        };
        set(c"memory.max", memory, b"")?;
        match pids {
            Some(pids) => set(c"pids.max", Some(pids_each.min(pids.into())), b"")?,
            // A kernel without the controller limits nothing.
            None => drop(set(c"pids.max", Some(pids_each), b"")),
        }
        set(c"cpu.weight", cpu_weight.map(u64::from), b"")?;
        set(c"cpu.max", cpu_quota_us, &[b" ", Decimal::new(CPU_PERIOD_US).as_bytes()].concat())
    }

    /// Kills everything in it, at once and for good (Linux 5.14).
    pub(super) fn kill(&self) -> Result<(), Errno> {
        files::write(Some(&self.dir), c"cgroup.kill", b"1")
    }

    /// How many of its processes the kernel has killed for want of memory: its own or the machine's.
    pub(super) fn oom_kills(&self) -> u64 {
        let events = files::read(Some(&self.dir), c"memory.events", 4096).unwrap_or_default();
        files::entry(&events, b"oom_kill").unwrap_or(0)
    }

    /// Tells when the last of its processes has gone.
    pub(super) fn watch(&self) -> Result<Watch, Errno> {
        Watch::new(&self.dir)
    }
}

/// `cgroup.events` of a group: ready to poll when it becomes empty. Or its `memory.events`.
#[derive(Debug)]
pub(super) struct Watch(Fd);

impl Watch {
    fn new(dir: &Fd) -> Result<Self, Errno> {
        sys::open(Some(dir), c"cgroup.events", O_RDONLY).map(Self)
    }

    /// Whether anybody is in the group or below. Only after this has been read does polling wait for the next change.
    pub(super) fn is_populated(&self) -> bool {
        let mut events = [0u8; 128];
        let length = sys::read_start(&self.0, &mut events).unwrap_or(0);
        files::entry(events.get(..length).unwrap_or_default(), b"populated").is_some_and(|populated| populated != 0)
    }

    /// How many processes the kernel has killed for want of memory. Only after this has been read does polling wait for
    /// the next change.
    pub(super) fn oom_kills(&self) -> u64 {
        let mut events = [0u8; 256];
        let length = sys::read_start(&self.0, &mut events).unwrap_or(0);
        files::entry(events.get(..length).unwrap_or_default(), b"oom_kill").unwrap_or(0)
    }

    pub(super) fn poll(&self) -> Poll {
        Poll { fd: self.0.raw(), events: POLLPRI, happened: 0 }
    }
}

/// Gives the children of a group every controller that there is. One that cannot be given is none the workloads would have anyway.
fn enable_controllers(dir: &Fd) -> Result<(), Errno> {
    let controllers = files::read(Some(dir), c"cgroup.controllers", 4096)?;
    let file = sys::open(Some(dir), c"cgroup.subtree_control", sys::O_WRONLY)?;
    let all = enabling(&controllers);
    // All in one write is one pass of the kernel over its groups; if one of them is refused, all are.
    if !all.is_empty() && sys::write(&file, &all).is_err() {
        for one in all.split_inclusive(|&byte| byte == b' ') {
            let _ = sys::write(&file, one);
        }
    }
    Ok(())
}

/// `cpu memory` becomes `+cpu +memory `.
fn enabling(controllers: &[u8]) -> Vec<u8> {
    let words = controllers.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty());
    words.flat_map(|word| [&b"+"[..], word, b" "]).flatten().copied().collect()
}

/// How many processes all workloads together, and each of them, may have.
fn shares(threads_max: u64) -> (u64, u64) {
    let all = threads_max.saturating_sub(threads_max / 8).saturating_sub(RESERVED_PIDS).max(RESERVED_PIDS);
    (all, all.saturating_sub(all / 16).max(1))
}

fn decimal(number: u64) -> CString {
    CString::new(Decimal::new(number).as_bytes()).unwrap_or_default()
}

/// `threads-max`, from a `/proc` that may be anywhere.
pub(super) fn threads_max(proc: &Fd) -> u64 {
    const PATHS: [&CStr; 2] = [c"sys/kernel/threads-max", c"sys/kernel/pid_max"];
    let limits = PATHS.iter().filter_map(|path| files::number(&files::read(Some(proc), path, 64).ok()?));
    limits.min().unwrap_or(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_controller_is_asked_for() {
        assert_eq!(enabling(b"cpuset cpu memory pids\n"), b"+cpuset +cpu +memory +pids ");
        assert_eq!(enabling(b"\n"), b"");
    }

    #[test]
    fn shares_leave_room_for_the_shim_and_for_a_neighbour() {
        for limit in [0, 10, 700, 32768, u64::MAX] {
            let (all, each) = shares(limit);
            assert!(each < all && (all < limit || limit < 200));
        }
    }

    #[test]
    fn the_kernels_limit_is_read() {
        let proc = sys::open(None, c"/proc", O_RDONLY | O_DIRECTORY).unwrap();
        assert!(threads_max(&proc) > 10);
    }
}
