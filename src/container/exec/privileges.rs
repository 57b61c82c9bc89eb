//! What a program may do and use: groups, limits, capabilities.

use std::ffi::OsString;

use super::limits::{ProcessLimits, Resource};
use super::seccomp::{KernelVersion, ProgramTraits, SeccompFilter, SeccompProfile};
use super::{Exec, capabilities};
use crate::error::{Error, Result};
use crate::proto::{self, Rlimit, StringBuf};

/// As the embedder set it.
#[derive(Debug, Clone, Default)]
pub(in crate::container) struct Privileges {
    groups: Vec<OsString>,
    limits: ProcessLimits,
    rlimits: Vec<ResourceLimit>,
    no_new_privs: bool,
    /// All, unless some are named.
    capabilities: Option<Vec<String>>,
    hardened: bool,
    pub(super) seccomp: Option<SeccompProfile>,
}

/// Processes and threads of a program that is hardened.
const HARDENED_PROCESSES: u32 = 4096;

#[derive(Debug, Clone, Copy)]
struct ResourceLimit {
    resource: Resource,
    soft: u64,
    hard: u64,
}

/// As the shim gets it.
#[derive(Debug, Default)]
pub(in crate::container) struct PrivilegesRequest {
    pub groups: StringBuf,
    pub limits: proto::ProcessLimits,
    pub rlimits: Vec<u8>,
    pub no_new_privs: bool,
    pub capabilities: Option<u64>,
    /// Files of the kernel are read-only for it.
    pub seal: bool,
    pub seccomp: Option<SeccompFilter>,
}

impl PrivilegesRequest {
    /// Whether a shim before [`proto::VERSION_PRIVILEGES`] would leave something of it out.
    pub(in crate::container) fn is_any(&self) -> bool {
        let Self { groups, limits, rlimits, no_new_privs, capabilities, seal, seccomp: _ } = self;
        !groups.as_strings().is_empty()
            || limits.is_any()
            || !rlimits.is_empty()
            || *no_new_privs
            || *seal
            || capabilities.is_some()
    }
}

impl Privileges {
    /// # Errors
    /// `InvalidConfig`, naming the method, for what cannot be.
    pub(super) fn request(&self, kernel: KernelVersion) -> Result<PrivilegesRequest> {
        let (mut groups, mut rlimits) = (StringBuf::new(), Vec::new());
        for group in &self.groups {
            groups
                .push(group.as_encoded_bytes())
                .map_err(|_| Error::invalid("add_groups", format!("{group:?} has a NUL")))?;
        }
        for ResourceLimit { resource, soft, hard } in self.rlimits.iter().copied() {
            if soft > hard {
                let text = format!("{resource:?}: {soft} is above {hard}, to which the program could raise it");
                return Err(Error::invalid("rlimit", text));
            }
            Rlimit { resource: resource as u8, soft, hard }.push(&mut rlimits);
        }
        let mut limits = self.limits.message()?;
        let mut capabilities = self.capabilities.as_ref().map(capabilities::set).transpose()?;
        if self.hardened {
            limits.pids = Some(limits.pids.map_or(HARDENED_PROCESSES, |asked| asked.min(HARDENED_PROCESSES)));
            capabilities = Some(capabilities.unwrap_or(u64::MAX) & capabilities::set(capabilities::DEFAULT)?);
        }
        let no_new_privs = self.no_new_privs || self.hardened;
        let program = ProgramTraits { capabilities: capabilities.unwrap_or(u64::MAX), kernel };
        let seccomp = self.seccomp.as_ref().map(|profile| profile.filter(program)).transpose()?;
        Ok(PrivilegesRequest { groups, limits, rlimits, no_new_privs, capabilities, seal: self.hardened, seccomp })
    }
}

impl Exec {
    /// Adds supplementary groups, each a name or a number, as `docker run --group-add` does.
    ///
    /// They come on top of those that [`Exec::user`] gives. A number need not be in the container's `/etc/group`; a
    /// name that is not there is `NotFound` of [`Exec::spawn`].
    pub fn add_groups<S: Into<OsString>>(mut self, groups: impl IntoIterator<Item = S>) -> Self {
        self.privileges.groups.extend(groups.into_iter().map(Into::into));
        self
    }

    /// Limits what the program and everything that it starts may use together.
    ///
    /// By default only the number of processes is limited; see [`ProcessLimits`]. A program of root can write to
    /// `/sys/fs/cgroup` and lift its limits, unless it is [`Exec::hardened`]. Where the guest's kernel has no cgroup
    /// controller for a limit, [`Exec::spawn`] fails with `NotFound`.
    pub fn limits(mut self, limits: ProcessLimits) -> Self {
        self.privileges.limits = limits;
        self
    }

    /// Sets a limit of the program, which each process that it starts inherits for itself.
    ///
    /// `soft` is in force. The program may raise it up to `hard`, and beyond with the capability `SYS_RESOURCE`; see
    /// getrlimit(2). `soft` above `hard` is `InvalidConfig`. Of two calls for one resource the later counts. Without
    /// this a program may open 1,024 files, and 524,288 when it asks for more. All else is as the guest's kernel has it.
    pub fn rlimit(mut self, resource: Resource, soft: u64, hard: u64) -> Self {
        self.privileges.rlimits.push(ResourceLimit { resource, soft, hard });
        self
    }

    /// Sets whether executing a file can give the program more privileges, by set-user-ID for instance.
    ///
    /// With `true` it cannot, nor can what it starts: `PR_SET_NO_NEW_PRIVS` of prctl(2). By default it can.
    pub fn no_new_privs(mut self, on: bool) -> Self {
        self.privileges.no_new_privs = on;
        self
    }

    /// Sets the capabilities that the program can ever have; all by default.
    ///
    /// What it starts can have no others. They have the names of capabilities(7), with or without `CAP_`:
    /// `["NET_BIND_SERVICE"]`. A program of root has them all at once, one of another user gets them by files alone.
    /// Unlike those of `docker run --cap-add` these are all; `ALL` is no name. [`Exec::spawn`] fails with
    /// `InvalidConfig` for a name that Linux does not have. A program of root can still make the kernel run others with
    /// all capabilities, by `core_pattern` for instance. [`Exec::hardened`] prevents that.
    pub fn capabilities<S: AsRef<str>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        self.privileges.capabilities = Some(names.into_iter().map(|name| name.as_ref().to_owned()).collect());
        self
    }

    /// Takes from the program what few programs need of root's powers.
    ///
    /// It keeps the 14 capabilities that Docker leaves to a container's programs, or those of them that
    /// [`Exec::capabilities`] names. It cannot gain privileges, as by [`Exec::no_new_privs`]. It and what it starts are
    /// at most 4,096 processes and threads, or fewer where [`Exec::limits`] says so. It has mounts of its own, in which
    /// `/sys` and the kernel's parameters are read-only, so that it cannot undo this. As root it can still write to the
    /// container's own disks in `/dev`. The wall between guests and the host is the virtual machine, with this or
    /// without it.
    pub fn hardened(mut self) -> Self {
        self.privileges.hardened = true;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const KERNEL: KernelVersion = KernelVersion { major: 6, minor: 12 };

    #[test]
    fn privileges_that_cannot_be_are_refused_by_name() {
        let wrong = [
            (Privileges { groups: vec!["a\0".into()], ..Privileges::default() }, "add_groups"),
            (Privileges { capabilities: Some(vec!["FLY".into()]), ..Privileges::default() }, "capabilities"),
            (Privileges { limits: ProcessLimits::new().processes(0), ..Privileges::default() }, "limits"),
            (
                Privileges {
                    rlimits: vec![ResourceLimit { resource: Resource::Core, soft: 2, hard: 1 }],
                    ..Privileges::default()
                },
                "rlimit",
            ),
        ];
        for (privileges, method) in wrong {
            let error = privileges.request(KERNEL).map(drop).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains(method), "{error}");
        }
        assert!(!Privileges::default().request(KERNEL).unwrap().is_any());
    }

    #[test]
    fn hardening_adds_to_other_restrictions_and_lifts_none() {
        let hardened = Privileges { hardened: true, ..Privileges::default() };
        let request = hardened.request(KERNEL).unwrap();
        assert_eq!((request.capabilities, request.limits.pids), (Some(0xa804_25fb), Some(4096)));
        assert!(request.no_new_privs);
        let request = Privileges {
            capabilities: Some(vec!["KILL".into(), "SYS_ADMIN".into()]),
            limits: ProcessLimits::new().processes(32),
            ..hardened
        };
        let request = request.request(KERNEL).unwrap();
        assert_eq!((request.capabilities, request.limits.pids), (Some(1 << 5), Some(32)));
    }
}
