//! [`Beneath`]: files below a directory that is held open.
//!
//! No symbolic link and no `..` leads out of it.

use std::ffi::CString;
use std::fs::File;
#[cfg(feature = "container")]
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
#[cfg(feature = "container")]
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

#[cfg(feature = "container")]
use crate::error::{Error, ErrorKind, Result};

/// A directory, held by its descriptor: what becomes of its path later changes nothing.
#[derive(Debug)]
pub(crate) struct Beneath {
    root: OwnedFd,
}

impl Beneath {
    /// Opens a directory. Its own path is followed as it is, links included.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
        let file = File::options().read(true).custom_flags(flags).open(directory)?;
        Ok(Self { root: file.into() })
    }

    /// Opens a directory that only this user, or root, can write to. It is made where it is missing, with mode 0700.
    ///
    /// # Errors
    /// `PermissionDenied` where another user can write to it, and for a link. Otherwise what making it fails with.
    #[cfg(feature = "container")]
    pub(crate) fn make_private(path: &Path) -> Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        let link = fs::symlink_metadata(path)?.is_symlink();
        let directory = Self::open(path)?;
        let itself = directory.open_at(Path::new(""), libc::O_RDONLY | libc::O_DIRECTORY)?;
        if link || !is_private(&itself)? {
            let what =
                "it must be a directory, no link to one, owned by this user or root, that no other user can write to";
            return Err(Error::new(ErrorKind::PermissionDenied, what));
        }
        Ok(directory)
    }

    /// Opens what is at `path` from the directory, with these flags of `open(2)`; an empty path is the directory itself. No link is
    /// followed, not even in the last place, and nothing is waited for.
    ///
    /// # Errors
    /// `ELOOP` or `ENOTDIR` where a link is in the way, `EXDEV` for a path that leaves the directory.
    pub(crate) fn open_at(&self, path: &Path, flags: libc::c_int) -> io::Result<File> {
        // The call refuses flags that mean nothing to a mere place.
        let wait = if flags & libc::O_PATH == 0 { libc::O_NONBLOCK } else { 0 };
        let flags = flags | libc::O_CLOEXEC | libc::O_NOFOLLOW | wait;
        let here = Path::new(".");
        let path = if path.as_os_str().is_empty() { here } else { path };
        let resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_MAGICLINKS;
        match openat2(self.root.as_fd(), path, flags, resolve) {
            // Kernels before 5.6 have no such call, and some sandboxes refuse what they do not know.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => self.step_by_step(path, flags),
            outcome => outcome,
        }
    }

    /// The same without `openat2`: each part by itself, of the directory that the last one gave.
    fn step_by_step(&self, path: &Path, flags: libc::c_int) -> io::Result<File> {
        let mut directory: Option<File> = None;
        let mut parts = path.components().peekable();
        loop {
            let name = match parts.next() {
                Some(std::path::Component::Normal(name)) => Path::new(name),
                Some(std::path::Component::CurDir) => Path::new("."),
                _ => return Err(io::Error::from_raw_os_error(libc::EXDEV)),
            };
            let at = directory.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
            if parts.peek().is_none() {
                return openat(at, name, flags);
            }
            directory = Some(openat(at, name, libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)?);
        }
    }

    /// Opens a regular file that is at `path` from the directory.
    ///
    /// # Errors
    /// As [`Beneath::open_at`]; `EINVAL` for anything but a regular file.
    pub(crate) fn open_regular(&self, path: &Path) -> io::Result<File> {
        let file = self.open_at(path, libc::O_RDONLY)?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
    }
}

impl AsFd for Beneath {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// A path by which the file of a descriptor is found as long as that is open.
pub(crate) fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// The target of a symbolic link that was opened with `O_PATH`.
pub(crate) fn link_target(link: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    // No link is longer.
    let mut target = vec![0; 4096];
    // SAFETY: the path is an empty, NUL-terminated string; the pointer and length describe the buffer.
    let n = unsafe { libc::readlinkat(link.as_raw_fd(), c"".as_ptr(), target.as_mut_ptr().cast(), target.len()) };
    target.truncate(usize::try_from(n).map_err(|_| io::Error::last_os_error())?);
    Ok(target)
}

/// Whether only this process's user, or root, can have put a file there and can change it.
pub(crate) fn is_private(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    // SAFETY: geteuid has no preconditions.
    let own = unsafe { libc::geteuid() };
    Ok((metadata.uid() == own || metadata.uid() == 0) && metadata.mode() & 0o022 == 0)
}

fn openat2(at: BorrowedFd<'_>, path: &Path, flags: libc::c_int, resolve: u64) -> io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `open_how` is plain numbers, for which zeros are valid.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from(flags.unsigned_abs());
    how.resolve = resolve;
    // SAFETY: `path` is NUL-terminated, and `how` is as large as said; both live across the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_openat2, at.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<libc::open_how>())
    };
    own(fd)
}

pub(super) fn openat(at: BorrowedFd<'_>, path: &Path, flags: libc::c_int) -> io::Result<File> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is NUL-terminated and lives across the call.
    own(unsafe { libc::openat(at.as_raw_fd(), path.as_ptr(), flags) }.into())
}

pub(super) fn own(fd: libc::c_long) -> io::Result<File> {
    match libc::c_int::try_from(fd) {
        // SAFETY: the descriptor is new, so it has no other owner.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::{Duration, Instant};

    #[test]
    fn paths_stay_beneath_and_opens_do_not_block() {
        let temp = std::env::temp_dir().join(format!("cofferdam-beneath-{}", std::process::id()));
        fs::create_dir_all(temp.join("in/sub")).unwrap();
        fs::write(temp.join("secret"), "secret").unwrap();
        fs::write(temp.join("in/sub/file"), "file").unwrap();
        symlink("../secret", temp.join("in/last")).unwrap();
        symlink("sub", temp.join("in/middle")).unwrap();
        crate::sys::make_fifo(&temp.join("in/pipe")).unwrap();
        let beneath = Beneath::open(&temp.join("in")).unwrap();
        let begin = Instant::now();
        let ways: [fn(&Beneath, &str) -> io::Result<File>; 2] = [
            |it, path| it.open_regular(Path::new(path)),
            |it, path| {
                let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW | libc::O_NONBLOCK;
                let file = it.step_by_step(Path::new(path), flags)?;
                if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
            },
        ];
        for open in ways {
            assert_eq!(io::read_to_string(open(&beneath, "sub/file").unwrap()).unwrap(), "file");
            for path in ["last", "middle/file", "../secret", "sub/../../secret", "pipe", "/etc/passwd", "sub"] {
                assert!(open(&beneath, path).is_err(), "{path}");
            }
        }
        assert!(begin.elapsed() < Duration::from_secs(5));
        let link = beneath.open_at(Path::new("last"), libc::O_PATH).unwrap();
        assert_eq!(link_target(link.as_fd()).unwrap(), b"../secret");
        assert!(beneath.open_at(Path::new(""), libc::O_PATH).unwrap().metadata().unwrap().is_dir());
        fs::remove_dir_all(temp).unwrap();
    }

    #[test]
    fn files_writable_by_others_are_not_private() {
        let file = crate::sys::temp_file(&std::env::temp_dir()).unwrap();
        let mode = |mode| file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
        mode(0o644);
        assert!(is_private(&file).unwrap());
        for open in [0o666, 0o620, 0o602] {
            mode(open);
            assert!(!is_private(&file).unwrap());
        }
    }
}
