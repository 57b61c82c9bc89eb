//! The capabilities of Linux by their names (capabilities(7)).

use crate::error::{Error, Result};

/// Without their `CAP_`, in the order of their numbers from 0 on.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Those that Docker leaves to a container's programs.
pub(super) const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SYS_CHROOT",
    "MKNOD",
    "AUDIT_WRITE",
    "SETFCAP",
];

/// Returns the set of these, a bit for each by its number.
///
/// A name may begin with `CAP_`, and may be in small letters.
///
/// # Errors
/// `InvalidConfig` for a name that is no capability's.
pub(super) fn set<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> Result<u64> {
    names.into_iter().try_fold(0, |set, name| Ok(set | 1 << number(name.as_ref())?))
}

fn number(name: &str) -> Result<usize> {
    let upper = name.to_ascii_uppercase();
    let plain = upper.strip_prefix("CAP_").unwrap_or(&upper);
    let unknown = || Error::invalid("capabilities", format!("{name:?} is no capability of Linux, such as \"NET_RAW\""));
    NAMES.iter().position(|known| *known == plain).ok_or_else(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn capabilities_are_known_by_name() {
        assert_eq!(set(["CAP_CHOWN", "kill", "cap_checkpoint_restore"]).unwrap(), 1 | 1 << 5 | 1 << 40);
        assert_eq!(set(["SYS_ADMIN"]).unwrap(), 1 << 21);
        assert_eq!(set::<&str>([]).unwrap(), 0);
        assert_eq!(set(DEFAULT).unwrap(), 0xa804_25fb);
        for name in ["", "CAP_", "ALL", "CAP_CAP_KILL", "SYS_ADMIN "] {
            assert_eq!(set([name]).unwrap_err().kind(), ErrorKind::InvalidConfig, "{name}");
        }
    }
}
