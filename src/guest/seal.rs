//! Makes the kernel's files read-only for a program that could undo its limits by them. As root, in the new process.

use core::ffi::CStr;

use super::sys::{self, Errno, MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT};

/// Mount points of the kernel's own.
const MOUNTS: [&CStr; 2] = [c"/sys/fs/cgroup", c"/sys"];
/// Parts of another one. `core_pattern` and `modprobe` are there: programs that the kernel runs as root.
const PARTS: [&CStr; 4] = [c"/proc/sys", c"/proc/sysrq-trigger", c"/proc/irq", c"/proc/bus"];

/// Gives this process mounts of its own, in which the kernel's files cannot be written.
///
/// Without `CAP_SYS_ADMIN` it cannot make them writable again, nor in a user namespace of its own (mount_namespaces(7)).
pub(super) fn kernel_files() -> Result<(), Errno> {
    sys::new_mount_namespace()?;
    for path in PARTS {
        match sys::mount(path, path, None, MS_BIND, None) {
            Ok(()) => freeze(path)?,
            // This kernel has none.
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    MOUNTS.into_iter().try_for_each(|path| match freeze(path) {
        // Nothing is mounted there, as on a kernel without cgroups.
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        result => result,
    })
}

fn freeze(path: &CStr) -> Result<(), Errno> {
    let flags = MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
    sys::mount(c"none", path, None, flags, None)
}
