//! [`Host`]: what this machine can do, found out before anything is built.

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::exposure::Exposure;
use super::{arch, missing};
use crate::error::{Error, ErrorKind, Result};

/// The only KVM API version there is (KVM API, 4.1).
const API_VERSION: i32 = 12;

const DEVICE: &str = "/dev/kvm";

/// A report on this host. `Display` prints it as one sentence that says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Host {
    /// The kernel module behind `/dev/kvm`: `kvm_intel`, `kvm_amd`, `kvm_pvm`, or `None` when none is seen.
    pub module: Option<String>,
    /// How opening `/dev/kvm` ended.
    pub kvm: KvmAccess,
    /// The version of the API, when the device could be opened. Only 12 exists.
    pub api_version: Option<i32>,
    /// Capabilities this crate needs and KVM lacks, by their names in the KVM API's documentation.
    pub missing: Vec<&'static str>,
    /// Where this host is weak against its guests. Nothing of it keeps virtual machines from running.
    pub exposure: Exposure,
}

/// How opening `/dev/kvm` ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvmAccess {
    /// It can be opened for reading and writing.
    Usable,
    /// There is no such file.
    Absent,
    /// The caller may not open it.
    Forbidden,
    /// It is there and cannot be opened, with this `errno`.
    Failed {
        /// Its error number.
        errno: i32,
    },
}

impl Host {
    /// Looks at this host. Opens `/dev/kvm`, reads some files below `/sys`, changes nothing, and needs no privileges.
    pub fn probe() -> Self {
        let host = Self::examine(Path::new(DEVICE), Path::new("/sys/module"));
        let exposure = Exposure::read(Path::new("/sys"), host.module.as_deref());
        Self { exposure, ..host }
    }

    /// Looks at KVM alone: the start of a VM should not read two dozen files of the host.
    fn examine(device: &Path, modules: &Path) -> Self {
        let module = arch::MODULES.iter().find(|name| modules.join(name).exists()).map(|name| (*name).to_owned());
        let exposure = Exposure::default();
        let mut host = Self { module, kvm: KvmAccess::Usable, api_version: None, missing: Vec::new(), exposure };
        match open_at(device) {
            Err(error) => {
                host.kvm = match error.raw_os_error() {
                    Some(libc::ENOENT) => KvmAccess::Absent,
                    Some(libc::EACCES | libc::EPERM) => KvmAccess::Forbidden,
                    other => KvmAccess::Failed { errno: other.unwrap_or(libc::EIO) },
                }
            }
            Ok(kvm) => {
                host.api_version = Some(kvm.get_api_version());
                host.missing = lacking(&kvm);
            }
        }
        host
    }

    /// `Ok` when virtual machines can run here.
    ///
    /// # Errors
    /// `NotFound` without `/dev/kvm`, `PermissionDenied` when it may not be opened, `Unsupported` when it is not
    /// hardware virtualization or lacks something. Each says what to do.
    pub fn ready(&self) -> Result<()> {
        arch::check()?;
        let (kind, text) = match self.kvm {
            KvmAccess::Absent => (
                ErrorKind::NotFound,
                format!("/dev/kvm does not exist: {}", arch::REMEDY),
            ),
            KvmAccess::Forbidden => (
                ErrorKind::PermissionDenied,
                "/dev/kvm may not be opened: add this user to the group that owns it (usually `usermod -aG kvm USER`, then \
                 log in again), or run where that is allowed"
                    .into(),
            ),
            KvmAccess::Failed { errno } => (
                ErrorKind::Io,
                format!("/dev/kvm cannot be opened: {}", io::Error::from_raw_os_error(errno)),
            ),
            KvmAccess::Usable if self.unusable().is_some() => {
                (ErrorKind::Unsupported, self.unusable().unwrap_or_default().into())
            }
            KvmAccess::Usable => return match (self.api_version, self.missing.as_slice()) {
                (Some(API_VERSION), []) => Ok(()),
                (Some(API_VERSION), names) => Err(missing(names)),
                (version, _) => Err(Error::new(
                    ErrorKind::Incompatible,
                    format!("/dev/kvm speaks API version {}, this crate {API_VERSION}", version.unwrap_or(0)),
                )),
            },
        };
        Err(Error::new(kind, text))
    }
}

impl Host {
    /// Why this kernel module is of no use, if it is not.
    fn unusable(&self) -> Option<&'static str> {
        let module = self.module.as_deref()?;
        arch::UNUSABLE.iter().find(|(name, _)| *name == module).map(|(_, why)| *why)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ready() {
            Ok(()) => write!(f, "virtual machines can run here ({})", self.module.as_deref().unwrap_or("built-in KVM")),
            Err(error) => write!(f, "{error}"),
        }
    }
}

fn open_at(device: &Path) -> io::Result<kvm_ioctls::Kvm> {
    use std::os::fd::FromRawFd;
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(device)?;
    // SAFETY: `into_raw_fd` gave up the only owner of this open descriptor. A file that is not KVM answers
    // the ioctls with an error.
    Ok(unsafe { kvm_ioctls::Kvm::from_raw_fd(file.into_raw_fd()) })
}

fn lacking(kvm: &kvm_ioctls::Kvm) -> Vec<&'static str> {
    arch::NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect()
}

/// Opens `/dev/kvm` if everything needed is there.
pub(super) fn open() -> Result<kvm_ioctls::Kvm> {
    Host::examine(Path::new(DEVICE), Path::new("/sys/module")).ready()?;
    Ok(open_at(Path::new(DEVICE))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn host(kvm: KvmAccess, module: &str) -> Host {
        let exposure = Exposure::default();
        Host { module: Some(module.into()), kvm, api_version: Some(12), missing: vec![], exposure }
    }

    #[test]
    fn each_kvm_problem_has_a_kind_and_a_remedy() {
        let cases = [
            (host(KvmAccess::Absent, "kvm_amd"), ErrorKind::NotFound, "firmware"),
            (host(KvmAccess::Forbidden, "kvm_amd"), ErrorKind::PermissionDenied, "group"),
            (host(KvmAccess::Failed { errno: libc::EIO }, "kvm_amd"), ErrorKind::Io, "os error 5"),
            (host(KvmAccess::Usable, "kvm_pvm"), ErrorKind::Unsupported, "kvm_pvm"),
            (
                Host { api_version: Some(11), ..host(KvmAccess::Usable, "kvm_amd") },
                ErrorKind::Incompatible,
                "version 11",
            ),
            (
                Host { missing: vec!["KVM_CAP_IRQFD"], ..host(KvmAccess::Usable, "kvm_amd") },
                ErrorKind::Unsupported,
                "KVM_CAP_IRQFD",
            ),
        ];
        for (host, kind, word) in cases {
            let error = host.ready().unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(word), "{error}");
            assert_eq!(host.to_string(), error.to_string());
        }
        assert!(host(KvmAccess::Usable, "kvm_intel").ready().is_ok());
    }

    #[test]
    fn other_files_are_distinguished_from_kvm() {
        let dir = std::env::temp_dir().join(format!("cofferdam-host-{}", std::process::id()));
        fs::create_dir_all(dir.join("kvm_amd")).unwrap();
        assert_eq!(Host::examine(&dir.join("kvm"), &dir).kvm, KvmAccess::Absent);
        fs::write(dir.join("kvm"), "").unwrap();
        let host = Host::examine(&dir.join("kvm"), &dir);
        assert_eq!((host.kvm, host.module.as_deref()), (KvmAccess::Usable, Some("kvm_amd")));
        assert_eq!(host.ready().unwrap_err().kind(), ErrorKind::Incompatible);
        fs::remove_dir_all(dir).unwrap();
    }
}
