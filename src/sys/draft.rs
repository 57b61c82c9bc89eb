//! [`Draft`]: a file that gets its name when it is whole. Until then it has none wherever the file system allows that, so that
//! nothing is left of it when its process is killed.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::fill_random;

/// A new file in a folder, gone when it is dropped before it got its name.
pub(crate) struct Draft {
    file: File,
    folder: PathBuf,
    /// Its name until then, where it must have one.
    name: Option<PathBuf>,
}

impl Draft {
    /// Makes one in `folder`.
    pub(crate) fn new(folder: &Path) -> io::Result<Self> {
        let (file, name) = match unnamed(folder, 0)? {
            Some(file) => (file, None),
            None => {
                let name = new_name(folder)?;
                let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&name)?;
                (file, Some(name))
            }
        };
        Ok(Self { file, folder: folder.to_path_buf(), name })
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
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
        sync(&self.folder)
    }

    /// Puts it, durably, in the place of the file at `old` in its folder, with the same permissions.
    pub(crate) fn replace(mut self, old: &Path) -> io::Result<()> {
        self.file.set_permissions(fs::metadata(old)?.permissions())?;
        if self.name.is_none() {
            let name = new_name(&self.folder)?;
            self.link(&name)?;
            self.name = Some(name);
        }
        if let Some(name) = &self.name {
            fs::rename(name, old)?;
        }
        self.name = None;
        sync(&self.folder)
    }

    fn link(&self, to: &Path) -> io::Result<()> {
        let from = CString::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?;
        let (to, here, how) = (CString::new(to.as_os_str().as_bytes())?, libc::AT_FDCWD, libc::AT_SYMLINK_FOLLOW);
        // SAFETY: both paths are NUL-terminated and live across the call.
        match unsafe { libc::linkat(here, from.as_ptr(), here, to.as_ptr(), how) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = fs::remove_file(name);
        }
    }
}

/// A file without a name; `None` on file systems that know no such thing, as FUSE and NFS do not.
fn unnamed(folder: &Path, flags: libc::c_int) -> io::Result<Option<File>> {
    let flags = libc::O_TMPFILE | flags;
    match OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(flags).open(folder) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => Ok(None),
        outcome => outcome.map(Some),
    }
}

fn new_name(folder: &Path) -> io::Result<PathBuf> {
    let mut number = [0; 16];
    fill_random(&mut number)?;
    Ok(folder.join(format!(".cofferdam-{:032x}", u128::from_le_bytes(number))))
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// A file in `folder` that never gets a name and is gone when its last descriptor is closed.
pub(crate) fn temp_file(folder: &Path) -> io::Result<File> {
    match unnamed(folder, libc::O_EXCL)? {
        Some(file) => Ok(file),
        // For a moment it has one.
        None => Draft::new(folder)?.file.try_clone(),
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

    #[test]
    fn a_draft_takes_a_place_whole_or_leaves_nothing() {
        let folder = std::env::temp_dir().join(format!("cofferdam-draft-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let names = || fs::read_dir(&folder).unwrap().count();
        let at = folder.join("it");
        for named in [false, true] {
            let draft = |text: &str| {
                let mut draft = Draft::new(&folder).unwrap();
                if named && draft.name.is_none() {
                    let name = new_name(&folder).unwrap();
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
            assert!(draft("fourth").replace(&folder.join("none")).is_err());
            assert_eq!(names(), 1);
            fs::remove_file(&at).unwrap();
        }
        fs::remove_dir(&folder).unwrap();
    }
}
