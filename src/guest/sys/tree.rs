//! Files by their names in a directory that is held open: owners, contents, times, links.

use core::ffi::CStr;

use super::super::alloc::vec::Vec;
use super::{Errno, Fd, Result, dir, nr, syscall, text};

const AT_SYMLINK_NOFOLLOW: usize = 0x100;
/// The path is empty: the descriptor itself is meant.
const AT_EMPTY_PATH: usize = 0x1000;
const STATX_BASIC_STATS: usize = 0x7ff;
/// struct statx (Linux, include/uapi/linux/stat.h), in words of eight bytes.
const STATX_WORDS: usize = 32;

pub const S_IFMT: u32 = 0o170_000;
pub const S_IFREG: u32 = 0o100_000;
pub const S_IFDIR: u32 = 0o040_000;
pub const S_IFLNK: u32 = 0o120_000;

/// What is known of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStatus {
    /// With its kind.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// Of 512 bytes each.
    pub blocks: u64,
    pub seconds: i64,
    pub nanoseconds: u32,
}

impl FileStatus {
    pub fn is(&self, kind: u32) -> bool {
        self.mode & S_IFMT == kind
    }
}

/// Returns what is known of a directory's entry, whose own link is not followed.
///
/// With an empty name that is the descriptor itself.
pub fn status(at: &Fd, name: &CStr) -> Result<FileStatus> {
    let mut words = [0u64; STATX_WORDS];
    let flags = AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH;
    // SAFETY: `name` is a C string, and the kernel writes one struct statx, 256 bytes, for which there is room.
    unsafe { call!(nr::STATX, at.arg(), text(name), flags, STATX_BASIC_STATS, words.as_mut_ptr() as usize) }?;
    let low = |word: usize| words[word] as u32;
    let high = |word: usize| (words[word] >> 32) as u32;
    // As the processors of all guests have them, little-endian.
    Ok(FileStatus {
        uid: high(2),
        gid: low(3),
        mode: high(3) & 0xffff,
        size: words[5],
        blocks: words[6],
        seconds: words[14] as i64,
        nanoseconds: low(15),
    })
}

/// Reads entries of a directory into `buffer`, and calls `f` with each name. False at the directory's end.
pub fn read_names(directory: &Fd, buffer: &mut [u8], mut f: impl FnMut(&CStr) -> Result<()>) -> Result<bool> {
    // SAFETY: the kernel writes at most `len` bytes into the buffer.
    let n = unsafe { call!(nr::GETDENTS64, directory.arg(), buffer.as_mut_ptr() as usize, buffer.len()) }?;
    let mut rest = buffer.get(..n).unwrap_or_default();
    // struct linux_dirent64: the record's length is at 16, the name at 19.
    while let Some([low, high]) = rest.get(16..18) {
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        let name = rest.get(19..length).and_then(|name| CStr::from_bytes_until_nul(name).ok()).ok_or(Errno::EIO)?;
        if !matches!(name.to_bytes(), b"." | b"..") {
            f(name)?;
        }
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(n > 0)
}

/// Returns the target of a directory's link.
///
/// With an empty name the descriptor itself is the link.
pub fn read_link(at: &Fd, name: &CStr) -> Result<Vec<u8>> {
    let mut target = [0u8; 4096];
    // SAFETY: `name` is a C string, and the kernel writes at most `len` bytes.
    let n = unsafe { call!(nr::READLINKAT, at.arg(), text(name), target.as_mut_ptr() as usize, target.len()) }?;
    Ok(Vec::from(target.get(..n).unwrap_or_default()))
}

/// Makes a symbolic link in a directory.
pub fn symlink_at(target: &CStr, at: &Fd, name: &CStr) -> Result<()> {
    // SAFETY: both are C strings that outlive the call.
    unsafe { call!(nr::SYMLINKAT, text(target), at.arg(), text(name)) }.map(drop)
}

/// Removes what is no directory.
pub fn unlink_at(at: &Fd, name: &CStr) -> Result<()> {
    // SAFETY: `name` is a C string that outlives the call.
    unsafe { call!(nr::UNLINKAT, at.arg(), text(name)) }.map(drop)
}

/// Renames in one directory. What has the new name is replaced.
pub fn rename_at(at: &Fd, from: &CStr, to: &CStr) -> Result<()> {
    // SAFETY: both are C strings that outlive the call.
    unsafe { call!(nr::RENAMEAT, at.arg(), text(from), at.arg(), text(to)) }.map(drop)
}

/// Gives a directory's entry, whose own link is not followed, to a user.
///
/// With an empty name that is the descriptor itself.
pub fn change_owner_at(at: &Fd, name: &CStr, uid: u32, gid: u32) -> Result<()> {
    // SAFETY: `name` is a C string that outlives the call; the rest are plain numbers.
    unsafe {
        call!(nr::FCHOWNAT, at.arg(), text(name), uid as usize, gid as usize, AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH)
    }
    .map(drop)
}

/// Sets the permissions of what is open.
pub fn change_mode(file: &Fd, mode: u32) -> Result<()> {
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::FCHMOD, file.arg(), mode as usize) }.map(drop)
}

/// Sets when the content of a directory's entry has changed last.
///
/// Without a name that is the descriptor itself, and with an empty one too, which may be a mere place.
pub fn set_modified(at: &Fd, name: Option<&CStr>, seconds: i64, nanoseconds: u32) -> Result<()> {
    const UTIME_OMIT: i64 = (1 << 30) - 2;
    let times = [0, UTIME_OMIT, seconds, nanoseconds.into()];
    let flags = if name.is_some() { AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH } else { 0 };
    // SAFETY: the kernel reads two timespecs, four words; the name is a C string or null, which is the descriptor itself.
    unsafe { call!(nr::UTIMENSAT, at.arg(), name.map_or(0, text), times.as_ptr() as usize, flags) }.map(drop)
}

pub fn set_length(file: &Fd, length: u64) -> Result<()> {
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::FTRUNCATE, file.arg(), length as usize) }.map(drop)
}

/// Where to go on in a file.
#[derive(Debug, Clone, Copy)]
pub enum Whence {
    Start = 0,
    /// The next byte that is no hole.
    Data = 3,
    /// The next hole; the end is one.
    Hole = 4,
}

/// Sets where the next read or write begins, and returns that.
pub fn seek(file: &Fd, offset: u64, whence: Whence) -> Result<u64> {
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::LSEEK, file.arg(), offset as usize, whence as usize) }.map(|at| at as u64)
}

/// Opens a directory's entry, whose own link is not followed. For what waits there is no waiting.
pub fn open_entry(at: &Fd, name: &CStr, flags: usize) -> Result<Fd> {
    super::open(Some(at), name, flags | super::O_NOFOLLOW | super::O_NONBLOCK)
}

/// Makes a file in a directory, which only root may read for now.
pub fn create_at(at: &Fd, name: &CStr) -> Result<Fd> {
    let flags = super::O_WRONLY | super::O_CREAT | super::O_EXCL | super::O_NOFOLLOW | super::O_CLOEXEC;
    // SAFETY: `name` is a C string that outlives the call.
    unsafe { call!(nr::OPENAT, dir(Some(at)), text(name), flags, 0o600) }.map(Fd::new)
}

/// Makes a socket's or a pipe's calls wait.
pub fn set_blocking(fd: &Fd) -> Result<()> {
    const F_SETFL: usize = 4;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::FCNTL, fd.arg(), F_SETFL, 0) }.map(drop)
}
