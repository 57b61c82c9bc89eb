//! What a caller gets when the guest could not start a program.

use std::io;

use crate::error::{Error, ErrorKind};
use crate::proto::SpawnStep;

/// The error for the guest's error number at this step.
pub(super) fn spawn_error(step: SpawnStep, errno: i32) -> Error {
    let os = io::Error::from_raw_os_error(errno);
    let doing = match step {
        SpawnStep::Exec => "executing it",
        SpawnStep::Chdir => "changing into the working directory",
        SpawnStep::Stdio => "connecting its streams",
        SpawnStep::Cgroup => "making its cgroup",
        SpawnStep::Fork => "making the process",
        SpawnStep::User => "becoming the user",
        SpawnStep::Group => "becoming a member of the group",
        SpawnStep::Rlimit => "setting its resource limits",
        SpawnStep::Privileges => "giving up privileges",
        SpawnStep::Seccomp => "setting its filter of system calls",
        SpawnStep::Limit => "limiting what it uses",
        SpawnStep::Prepare => "preparing the process",
        SpawnStep::Request => "asking for it",
        SpawnStep::Other => "starting it",
    };
    let hint = match (step, errno) {
        (SpawnStep::Exec, libc::ENOEXEC) => " (not a program, or one for another processor architecture)",
        (SpawnStep::User, libc::ENOENT) => ", which is not in the container's /etc/passwd",
        (SpawnStep::Group, libc::ENOENT) => ", which is not in the container's /etc/group",
        (SpawnStep::Limit, libc::ENOENT) => ", for which the guest's kernel has no cgroup controller",
        (SpawnStep::Seccomp, libc::EINVAL | libc::ENOSYS) => {
            ", which the guest's kernel does not take: it needs CONFIG_SECCOMP_FILTER"
        }
        _ => "",
    };
    let error = Error::from(os);
    let kind = match (step, errno) {
        (_, libc::ENOEXEC) => ErrorKind::Incompatible,
        (SpawnStep::Seccomp, libc::EINVAL | libc::ENOSYS) => ErrorKind::Unsupported,
        _ => error.kind(),
    };
    error.with_kind(kind).doing(format!("{doing}{hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_step_and_have_the_kind_of_the_guests_errno() {
        for (step, errno, kind, text) in [
            (SpawnStep::Exec, libc::ENOENT, ErrorKind::NotFound, "executing it"),
            (SpawnStep::Exec, libc::ENOEXEC, ErrorKind::Incompatible, "processor architecture"),
            (SpawnStep::User, libc::ENOENT, ErrorKind::NotFound, "/etc/passwd"),
            (SpawnStep::Group, libc::ENOENT, ErrorKind::NotFound, "/etc/group"),
            (SpawnStep::Seccomp, libc::EINVAL, ErrorKind::Unsupported, "CONFIG_SECCOMP_FILTER"),
            (SpawnStep::Seccomp, libc::EACCES, ErrorKind::PermissionDenied, "filter of system calls"),
            (SpawnStep::Chdir, libc::EACCES, ErrorKind::PermissionDenied, "working directory"),
        ] {
            let error = spawn_error(step, errno);
            assert!(error.kind() == kind && error.to_string().contains(text), "{error}");
        }
        // Any number of a hostile guest's is an error too.
        for errno in [i32::MIN, -1, 0, i32::MAX] {
            assert!(!spawn_error(SpawnStep::Other, errno).to_string().is_empty());
        }
    }
}
