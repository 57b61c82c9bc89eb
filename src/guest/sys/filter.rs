//! Filters of system calls (seccomp(2)), and the kernel's version, which they depend on.

use super::{Errno, Result, nr, syscall};
use crate::proto::FILTER_INSTRUCTION;

/// Has the kernel judge all further calls of this process by these instructions, for good.
///
/// # Errors
/// `EACCES` for a process that is neither root nor kept from new privileges, `EINVAL` for what is no filter, or where the kernel has none.
pub fn set_filter(instructions: &[u8], flags: u32) -> Result<()> {
    const SECCOMP_SET_MODE_FILTER: usize = 1;
    /// struct sock_fprog (Linux, include/uapi/linux/filter.h)
    #[repr(C)]
    struct Program {
        length: u16,
        instructions: *const u8,
    }
    let length = u16::try_from(instructions.len() / FILTER_INSTRUCTION).map_err(|_| Errno::EINVAL)?;
    let program = Program { length, instructions: instructions.as_ptr() };
    // SAFETY: the kernel reads the structure, and as many instructions as it says, which are there.
    unsafe { call!(nr::SECCOMP, SECCOMP_SET_MODE_FILTER, flags as usize, &raw const program as usize) }.map(drop)
}

/// The first two numbers of the kernel's version, 16 bits each. 0 where it says none.
pub fn kernel_version() -> u32 {
    /// The fields of struct new_utsname, of 65 bytes each (Linux, include/uapi/linux/utsname.h).
    const FIELD: usize = 65;
    const RELEASE: usize = 2;
    let mut names = [[0u8; FIELD]; 6];
    // SAFETY: the kernel writes one structure of six fields, for which there is room.
    if unsafe { call!(nr::UNAME, names.as_mut_ptr() as usize) }.is_err() {
        return 0;
    }
    names.get(RELEASE).map_or(0, |release| version(release))
}

fn version(release: &[u8]) -> u32 {
    let mut numbers = release.split(|byte| !byte.is_ascii_digit()).map(|digits| {
        digits.iter().fold(0u16, |number, digit| number.saturating_mul(10).saturating_add(u16::from(digit - b'0')))
    });
    let mut next = || u32::from(numbers.next().unwrap_or(0));
    let major = next();
    major << 16 | next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_releases() {
        for (release, known) in [
            ("6.12.57+deb13", 6 << 16 | 12),
            ("5.10", 5 << 16 | 10),
            ("7", 7 << 16),
            ("", 0),
            ("99999.x", 0xffff << 16),
        ] {
            assert_eq!(version(release.as_bytes()), known, "{release}");
        }
        assert!(kernel_version() >= 4 << 16);
    }
}
