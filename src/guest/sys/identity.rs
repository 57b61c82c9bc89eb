//! User, privileges and limits of this process (credentials(7)), kind and owner of files.

use super::{Fd, Result, nr, syscall};

/// The path is empty: the descriptor itself is meant.
const AT_EMPTY_PATH: usize = 0x1000;
const STATX_TYPE: usize = 1;
/// struct statx (Linux, include/uapi/linux/stat.h): its length, and where `stx_mode` is, in units of 16 bits.
const STATX_SIZE: usize = 256;
const STATX_MODE: usize = 14;
const S_IFMT: u16 = 0o170_000;
const S_IFREG: u16 = 0o100_000;

/// Whether it is a file with content of its own: no device, pipe or directory.
pub fn is_regular(file: &Fd) -> Result<bool> {
    let mut status = [0u16; STATX_SIZE / 2];
    // SAFETY: the path is an empty C string, and the kernel writes one struct statx, for which there is room.
    unsafe {
        call!(nr::STATX, file.arg(), c"".as_ptr() as usize, AT_EMPTY_PATH, STATX_TYPE, status.as_mut_ptr() as usize)
    }?;
    Ok(status.get(STATX_MODE).is_some_and(|mode| mode & S_IFMT == S_IFREG))
}

/// Gives what this descriptor refers to to another user.
pub fn change_owner(file: &Fd, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::FCHOWN, file.arg(), uid as usize, gid as usize) }.map(drop)
}

/// Becomes another user for good: groups first, as only root may set them.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    // SAFETY: the kernel reads so many numbers from `groups`, which outlives the call.
    unsafe { call!(nr::SETGROUPS, groups.len(), groups.as_ptr() as usize) }?;
    // SAFETY: takes a plain number.
    unsafe { call!(nr::SETGID, gid as usize) }?;
    // SAFETY: takes a plain number.
    unsafe { call!(nr::SETUID, uid as usize) }.map(drop)
}

/// Whether this process is this user now.
///
/// It is asked after a filter of system calls may have answered that it is.
///
/// A filter may answer 0 to each of these calls too. That is no other user than root, and no group.
pub fn is_user(uid: u32, gid: u32, groups: &[u32]) -> bool {
    // SAFETY: takes nothing.
    let uids = [nr::GETUID, nr::GETEUID].map(|n| unsafe { call!(n) });
    // SAFETY: takes nothing.
    let gids = [nr::GETGID, nr::GETEGID].map(|n| unsafe { call!(n) });
    // SAFETY: with no room the kernel writes nothing, and returns how many there are.
    let count = unsafe { call!(nr::GETGROUPS, 0, 0) };
    uids.into_iter().all(|it| it == Ok(uid as usize))
        && gids.into_iter().all(|it| it == Ok(gid as usize))
        && count == Ok(groups.len())
}

/// Takes a capability from what this process and its children will execute.
///
/// It leaves the bounding set (capabilities(7)).
///
/// # Errors
/// `EINVAL` for a number that the kernel has no capability of.
pub fn drop_capability(number: u32) -> Result<()> {
    const PR_CAPBSET_DROP: usize = 24;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::PRCTL, PR_CAPBSET_DROP, number as usize) }.map(drop)
}

/// Keeps this process from gaining privileges by executing a file (prctl(2)).
pub fn set_no_new_privs() -> Result<()> {
    const PR_SET_NO_NEW_PRIVS: usize = 38;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::PRCTL, PR_SET_NO_NEW_PRIVS, 1) }.map(drop)
}

/// Sets a limit of this process, and how far it may raise that (prlimit(2)).
pub fn set_rlimit(resource: u8, soft: u64, hard: u64) -> Result<()> {
    let limit = [soft, hard];
    // SAFETY: the kernel reads one rlimit64, two words, and writes nothing, as the last pointer is null.
    unsafe { call!(nr::PRLIMIT64, 0, resource as usize, limit.as_ptr() as usize) }.map(drop)
}
