//! [`AtomicFile`]: a file that gets its name when it is whole. Until then it has none wherever the file system allows that, so that
//! nothing is left of it when its process is killed.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fill_random;

/// A new file in a directory, gone when it is dropped before it got its name.
pub(crate) struct AtomicFile {
    file: File,
    directory: PathBuf,
    /// Its name until then, where it must have one.
    name: Option<PathBuf>,
}

impl AtomicFile {
    /// Makes one in `directory`, with these permissions but what the process's mask takes away.
    pub(crate) fn new(directory: &Path, mode: u32) -> io::Result<Self> {
        let (file, name) = match unnamed(directory, mode, 0)? {
            Some(file) => (file, None),
            None => {
                remove_abandoned(directory);
                let name = new_name(directory)?;
                let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(&name)?;
                (file, Some(name))
            }
        };
        Ok(Self { file, directory: directory.to_path_buf(), name })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where it can be opened as long as it lives.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// Gives it its name, durably, which no other file may have.
    pub(crate) fn publish(mut self, to: &Path) -> io::Result<()> {
        match self.name.take() {
            None => self.link(to)?,
            Some(name) => {
                rename_new(&name, to).inspect_err(|_| {
                    let _ = fs::remove_file(&name);
                })?;
            }
        }
        sync(&self.directory)
    }

    /// Puts it, durably, in the place of the file at `old` in its directory, with the same permissions.
    pub(crate) fn replace(mut self, old: &Path) -> io::Result<()> {
        self.file.set_permissions(fs::metadata(old)?.permissions())?;
        if self.name.is_none() {
            let name = new_name(&self.directory)?;
            self.link(&name)?;
            self.name = Some(name);
        }
        if let Some(name) = &self.name {
            fs::rename(name, old)?;
        }
        self.name = None;
        sync(&self.directory)
    }

    fn link(&self, to: &Path) -> io::Result<()> {
        let from = CString::new(self.path().into_os_string().into_vec())?;
        let (to, here, how) = (CString::new(to.as_os_str().as_bytes())?, libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
        // SAFETY: both paths are NUL-terminated and live across the call.
        match unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), how) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = fs::remove_file(name);
        }
    }
}

/// A file without a name; `None` on file systems that know no such thing, as FUSE and NFS do not.
fn unnamed(directory: &Path, mode: u32, flags: libc::c_int) -> io::Result<Option<File>> {
    let flags = libc::O_TMPFILE | flags;
    match OpenOptions::new().read(true).write(true).mode(mode).custom_flags(flags).open(directory) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => Ok(None),
        outcome => outcome.map(Some),
    }
}

/// How the names of drafts begin.
const PREFIX: &str = ".cofferdam-";

fn new_name(directory: &Path) -> io::Result<PathBuf> {
    Ok(directory.join(draft_name()?))
}

/// A name for a file that is not whole.
pub(super) fn draft_name() -> io::Result<String> {
    let mut number = [0; 16];
    fill_random(&mut number)?;
    Ok(format!("{PREFIX}{:032x}", u128::from_le_bytes(number)))
}

/// Removes what killed processes have left. No live writer leaves the file unchanged for so long.
fn remove_abandoned(directory: &Path) {
    const LONG: Duration = Duration::from_secs(3600);
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let draft = entry.file_name().as_bytes().starts_with(PREFIX.as_bytes());
        let changed = entry.metadata().and_then(|it| it.modified());
        if draft
            && changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LONG))
            && let Err(error) = fs::remove_file(entry.path())
        {
            log::debug!("{} cannot be removed: {error}", entry.path().display());
        }
    }
}

fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// A file in `directory` that never gets a name and is gone when its last descriptor is closed.
pub(crate) fn temp_file(directory: &Path) -> io::Result<File> {
    match unnamed(directory, 0o600, libc::O_EXCL)? {
        Some(file) => Ok(file),
        // For a moment it has one.
        None => AtomicFile::new(directory, 0o600)?.file.try_clone(),
    }
}

/// Renames a file unless there is one of that name already.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    let c_string = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let (c_from, c_to) = (c_string(from)?, c_string(to)?);
    let (here, how) = (libc::AT_FDCWD, libc::RENAME_NOREPLACE);
    // SAFETY: both paths are NUL-terminated and live across the call.
    match unsafe { libc::renameat2(here, c_from.as_ptr(), here, c_to.as_ptr(), how) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // The file system knows no such way, as some network file systems do not: one of them has both names for a moment.
            e if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
                fs::hard_link(from, to)?;
                fs::remove_file(from)
            }
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::SystemTime;

    #[test]
    fn atomic_file_is_complete_or_absent() {
        let directory = std::env::temp_dir().join(format!("cofferdam-draft-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let names = || fs::read_dir(&directory).unwrap().count();
        let at = directory.join("it");
        for named in [false, true] {
            let draft = |text: &str| {
                let mut draft = AtomicFile::new(&directory, 0o600).unwrap();
                if named && draft.name.is_none() {
                    let name = new_name(&directory).unwrap();
                    draft.link(&name).unwrap();
                    draft.name = Some(name);
                }
                draft.file().write_all(text.as_bytes()).unwrap();
                draft
            };
            drop(draft("lost"));
            draft("first").publish(&at).unwrap();
            assert_eq!(draft("second").publish(&at).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!((names(), fs::read_to_string(&at).unwrap()), (1, "first".to_owned()));
            draft("third").replace(&at).unwrap();
            assert_eq!((names(), fs::read_to_string(&at).unwrap()), (1, "third".to_owned()));
            assert!(draft("fourth").replace(&directory.join("none")).is_err());
            assert_eq!(names(), 1);
            fs::remove_file(&at).unwrap();
        }
        fs::remove_dir(&directory).unwrap();
    }

    #[test]
    fn stale_temporary_files_are_removed() {
        let directory = std::env::temp_dir().join(format!("cofferdam-abandoned-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let long_ago = SystemTime::now() - Duration::from_secs(7200);
        let (old, new, other) = (new_name(&directory).unwrap(), new_name(&directory).unwrap(), directory.join("disk"));
        for path in [&old, &new, &other] {
            fs::write(path, "x").unwrap();
        }
        for path in [&old, &other] {
            File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
        }
        remove_abandoned(&directory);
        assert_eq!([&old, &new, &other].map(|path| path.exists()), [false, true, true]);
        fs::remove_dir_all(&directory).unwrap();
    }
}
