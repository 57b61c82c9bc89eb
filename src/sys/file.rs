//! Files: locks that belong to the open file, unnamed temporary files, random bytes.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
#[cfg(test)]
use std::os::unix::ffi::OsStrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;

use super::path_of;
use crate::size::Size;

/// How a file is shared between virtual machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// Many readers, no writer.
    Shared,
    /// One writer, no other user.
    Exclusive,
}

/// Takes an open-file-description lock on the whole file without waiting. `Ok(false)` when another open file holds it.
///
/// The lock goes away with the last descriptor of this open file, however its owner ends.
pub(crate) fn try_lock(file: &File, kind: LockKind) -> io::Result<bool> {
    let l_type = match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
    };
    match lock(file, libc::F_OFD_SETLK, l_type, 0..0) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Takes an exclusive open-file-description lock on one byte, which need not exist, without waiting. `Ok(false)` when
/// another open file holds it.
pub(crate) fn try_lock_byte(file: &File, byte: u64) -> io::Result<bool> {
    let start = i64::try_from(byte).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    match lock(file, libc::F_OFD_SETLK, libc::F_WRLCK, start..start.saturating_add(1)) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// An empty range from 0 means the whole file.
fn lock(file: &File, command: libc::c_int, l_type: libc::c_int, range: Range<i64>) -> io::Result<()> {
    let (l_start, l_len) = (range.start, range.end - range.start);
    let lock = libc::flock { l_type: l_type as i16, l_whence: libc::SEEK_SET as i16, l_start, l_len, l_pid: 0 };
    // SAFETY: both commands read one `flock`, which lives on this stack across the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where the next bytes that are not a hole begin, from `offset` on.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_DATA)
}

/// Where the first hole from `offset` on begins; the end of the file is one.
pub(crate) fn next_hole(file: &File, offset: u64) -> io::Result<Option<u64>> {
    seek(file, offset, libc::SEEK_HOLE)
}

/// The ranges of a file that are not holes, in their order. The end of the file is the end of the last.
pub(crate) fn data_ranges(file: &File) -> io::Result<Vec<Range<u64>>> {
    let len = file.metadata()?.len();
    let (mut found, mut at) = (Vec::new(), 0);
    while let Some(start) = next_data(file, at)? {
        at = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(len);
        found.push(start..at);
    }
    Ok(found)
}

fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: lseek takes numbers only.
    match u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }) {
        Ok(at) => Ok(Some(at)),
        Err(_) => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(e),
        },
    }
}

/// Makes a hole, which reads as zeros. File systems that know no holes keep the space; that is no error.
pub(crate) fn punch(file: &File, offset: u64, len: u64) -> io::Result<()> {
    match allocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        outcome => outcome,
    }
}

/// Makes a range read as zeros; as a hole when its space may go. Writes them where the file system knows no other way.
pub(crate) fn zero(file: &File, offset: u64, len: u64, hole: bool) -> io::Result<()> {
    if zero_range(file, offset, len, hole)? {
        return Ok(());
    }
    let zeros = vec![0; 64 << 10];
    for at in (offset..offset.saturating_add(len)).step_by(zeros.len()) {
        let room = usize::try_from(offset + len - at).unwrap_or(usize::MAX).min(zeros.len());
        file.write_all_at(zeros.get(..room).unwrap_or_default(), at)?;
    }
    Ok(())
}

/// The same, but false where it takes writing them: the file system knows no other way, or a device has larger sectors.
pub(crate) fn zero_range(file: &File, offset: u64, len: u64, hole: bool) -> io::Result<bool> {
    let way = if hole { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
    match allocate(file, way | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => Ok(false),
        Err(e) => Err(e),
    }
}

fn allocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    loop {
        // SAFETY: fallocate takes numbers only.
        match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
            0 => return Ok(()),
            _ => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::Interrupted => {}
                e => return Err(e),
            },
        }
    }
}

/// The extended attributes of an open file, which may be open with `O_PATH` only: all of them, or more than `most` bytes.
pub(crate) fn xattrs(fd: BorrowedFd<'_>, most: usize) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let path = CString::new(path_of(fd).into_os_string().into_vec())?;
    // SAFETY: `path` is NUL-terminated; the pointer and length describe the buffer.
    let names = read_growing(|to| unsafe { libc::listxattr(path.as_ptr(), to.as_mut_ptr().cast(), to.len()) });
    let names = match names {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(BTreeMap::new()),
        other => other?,
    };
    let (mut found, mut bytes) = (BTreeMap::new(), 0);
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let c_name = CString::new(name)?;
        // SAFETY: both strings are NUL-terminated; the pointer and length describe the buffer.
        let value = read_growing(|to| unsafe {
            libc::getxattr(path.as_ptr(), c_name.as_ptr(), to.as_mut_ptr().cast(), to.len())
        });
        match value {
            Ok(value) => {
                bytes += name.len() + value.len();
                found.insert(name.to_vec(), value);
                if bytes > most {
                    break;
                }
            }
            // It was removed in between.
            Err(e) if e.raw_os_error() == Some(libc::ENODATA) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// Makes a pipe with a name, for tests of what must not wait for one.
#[cfg(test)]
pub(crate) fn make_fifo(path: &std::path::Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is NUL-terminated and lives across the call.
    match unsafe { libc::mkfifo(path.as_ptr(), 0o600) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Repeats a call that wants a buffer until the buffer is large enough; the kernel's limit is 64 KiB.
fn read_growing(mut call: impl FnMut(&mut [u8]) -> isize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 1024];
    loop {
        match usize::try_from(call(&mut buffer)) {
            Ok(n) => {
                buffer.truncate(n);
                return Ok(buffer);
            }
            Err(_) => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ERANGE) && buffer.len() < 1 << 20 => {
                    buffer.resize(buffer.len() * 4, 0)
                }
                e => return Err(e),
            },
        }
    }
}

/// Makes an unnamed, sparse file of `size` in `dir`.
pub(crate) fn scratch_file(dir: &Path, size: Size) -> io::Result<File> {
    let file = super::temp_file(dir)?;
    file.set_len(size.as_bytes())?;
    Ok(file)
}

/// Fills `buffer` with random bytes from the host's kernel. Blocks only before the host's own pool is ready.
pub(crate) fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    let mut rest = buffer;
    while !rest.is_empty() {
        // SAFETY: the pointer and length describe `rest`, which is exclusively borrowed here.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(n) => rest = rest.get_mut(n..).unwrap_or_default(),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// The directory of this crate's cached files: `$XDG_CACHE_HOME/cofferdam`, or `~/.cache/cofferdam`.
pub(crate) fn cache_dir() -> Option<PathBuf> {
    user_dir("XDG_CACHE_HOME", ".cache")
}

/// The directory of this crate's files that are kept: `$XDG_DATA_HOME/cofferdam`, or `~/.local/share/cofferdam`.
#[cfg(feature = "container")]
pub(crate) fn data_dir() -> Option<PathBuf> {
    user_dir("XDG_DATA_HOME", ".local/share")
}

/// This crate's directory in that of a variable, or in one below the user's home (XDG Base Directory Specification).
fn user_dir(name: &str, below_home: &str) -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = variable(name).or_else(|| variable("HOME").map(|home| home.join(below_home)))?;
    Some(base.join("cofferdam"))
}

/// Whether an open file still has a name.
#[cfg(feature = "container")]
pub(crate) fn has_name(file: &File) -> io::Result<bool> {
    Ok(std::os::unix::fs::MetadataExt::nlink(&file.metadata()?) > 0)
}

/// Copies all of a file but its holes into an empty one. The blocks are shared where the file system can do that.
#[cfg(feature = "container")]
pub(crate) fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: the call takes two descriptors, which are open.
    if unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) } == 0 {
        return Ok(());
    }
    to.set_len(from.metadata()?.len())?;
    let (mut at, mut buffer) = (0, vec![0; 1 << 20]);
    while let Some(start) = next_data(from, at)? {
        let Some(end) = next_hole(from, start)? else { break };
        copy_range(from, to, start..end, &mut buffer)?;
        at = end;
    }
    Ok(())
}

/// Copies a range to the same place of another file.
#[cfg(feature = "container")]
fn copy_range(from: &File, to: &File, range: Range<u64>, buffer: &mut [u8]) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let room = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(buffer.len());
        let piece = buffer.get_mut(..room).unwrap_or_default();
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        at += room as u64;
    }
    Ok(())
}

/// The host's page size in bytes.
pub(crate) fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_belong_to_the_open_file() {
        let dir = std::env::temp_dir().join(format!("cofferdam-lock-{}", std::process::id()));
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(&dir).unwrap();
        let (a, b) = (open(), open());
        assert!(try_lock(&a, LockKind::Shared).unwrap());
        assert!(try_lock(&b, LockKind::Shared).unwrap());
        assert!(!try_lock(&b, LockKind::Exclusive).unwrap());
        drop(a);
        assert!(try_lock(&b, LockKind::Exclusive).unwrap());
        std::fs::remove_file(&dir).unwrap();
    }

    #[test]
    fn random_bytes_differ() {
        let (mut a, mut b) = ([0; 32], [0; 32]);
        fill_random(&mut a).unwrap();
        fill_random(&mut b).unwrap();
        assert_ne!(a, b);
    }
}
