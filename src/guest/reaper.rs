//! PID 1 of the workloads, which adopts orphans so that no zombie stays. A process of its own, forked from the shim.
//!
//! The shim itself stays outside their pid namespace: they cannot see it, and `kill -9 -1` does not reach it.

use super::alloc::vec::Vec;
use super::control::Failure;
use super::sys::{self, Errno, Fd, MS_NODEV, MS_NOEXEC, MS_NOSUID, O_PATH};
use crate::proto::{End, Stage};

/// The reaper as the shim knows it.
#[derive(Debug)]
pub(super) struct Reaper {
    pub(super) pid: i32,
    /// The workloads' `/proc`, also when one of them hides it.
    pub(super) proc: Fd,
}

/// Makes the pid namespace in which all workloads will live, and its PID 1. Mounts their `/proc`.
pub(super) fn start() -> Result<Reaper, Failure> {
    let failure = |errno, what: &[u8]| Failure { stage: Stage::Isolation, errno, text: Vec::from(what) };
    sys::new_pid_namespace().map_err(|errno| failure(errno, b"making the pid namespace"))?;
    let (reader, writer) = sys::pipe().map_err(|errno| failure(errno, b"making a pipe"))?;
    let pid = sys::fork(None, || run(&writer)).map_err(|errno| failure(errno, b"forking PID 1 of the workloads"))?;
    drop(writer);
    // It answers when it has mounted, or dies and leaves the pipe empty.
    let mut answer = [0u8; 4];
    let errno = match sys::read(&reader, &mut answer) {
        Ok(4) => i32::from_ne_bytes(answer),
        Ok(_) => Errno::EPROTO.0,
        Err(errno) => errno.0,
    };
    if errno != 0 {
        return Err(Failure::new(Stage::Mount, Errno(errno), &[b"mounting proc (proc) on /proc"]));
    }
    let proc = sys::open(None, c"/proc", O_PATH).map_err(|errno| failure(errno, b"opening /proc"))?;
    Ok(Reaper { pid, proc })
}

fn run(answer: &Fd) -> i32 {
    let _ = sys::set_sid();
    let mounted = sys::mount(c"proc", c"/proc", Some(c"proc"), MS_NOSUID | MS_NODEV | MS_NOEXEC, None);
    let errno = mounted.err().map_or(0, |errno| errno.0);
    let _ = sys::write(answer, &errno.to_ne_bytes());
    sys::keep_only(0);
    // All signals are blocked, and PID 1 gets none from inside its namespace that it does not handle.
    loop {
        while sys::reap().is_some() {}
        sys::wait_signal(sys::signal_set(&[sys::SIGCHLD]));
    }
}

/// What the end of the workloads' PID 1 means. `reboot(2)` inside a pid namespace ends its PID 1 with a signal that tells which
/// (pid_namespaces(7)); nothing else may end it.
pub(super) fn end_of_status(status: sys::Status) -> Option<End> {
    match status {
        sys::Status::Signaled(sys::SIGHUP) => Some(End::Reboot),
        sys::Status::Signaled(sys::SIGINT) => Some(End::PowerOff),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_of_a_rebooted_pid_namespace_are_mapped_to_ends() {
        assert_eq!(end_of_status(sys::Status::Signaled(sys::SIGHUP)), Some(End::Reboot));
        assert_eq!(end_of_status(sys::Status::Signaled(sys::SIGINT)), Some(End::PowerOff));
        assert_eq!(end_of_status(sys::Status::Signaled(sys::SIGKILL)), None);
        assert_eq!(end_of_status(sys::Status::Exited(0)), None);
    }
}
