//! [`Directory`]: entries of a directory that is held open, by their names. No link is followed, and no call leaves it.

use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::atomic_file::draft_name;
use super::beneath::{openat, own};
use super::path_of;

/// A directory, held by its descriptor. Names are of one part: a slash in one is an error.
#[derive(Debug)]
pub(crate) struct Directory(File);

/// A name of an entry, as the kernel takes it.
fn entry(name: &[u8]) -> io::Result<CString> {
    if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(CString::new(name)?)
}

fn outcome(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Directory {
    /// Opens a directory. Its own path is followed as it is, links included.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
        Ok(Self(File::options().read(true).custom_flags(flags).open(path)?))
    }

    /// Makes a directory that only this process's user may enter.
    pub(crate) fn make(&self, name: &[u8]) -> io::Result<()> {
        let name = entry(name)?;
        // SAFETY: `name` is NUL-terminated and lives across the call.
        outcome(unsafe { libc::mkdirat(self.raw(), name.as_ptr(), 0o700) })
    }

    /// Opens a directory in it.
    pub(crate) fn enter(&self, name: &[u8]) -> io::Result<Self> {
        self.open_at(&entry(name)?, libc::O_RDONLY | libc::O_DIRECTORY).map(Self)
    }

    /// Opens an entry to be read, whatever it is. Nothing is waited for.
    pub(crate) fn open_entry(&self, name: &[u8]) -> io::Result<File> {
        self.open_at(&entry(name)?, libc::O_RDONLY)
    }

    /// Opens an entry as a mere place, a link too.
    pub(crate) fn place(&self, name: &[u8]) -> io::Result<File> {
        self.open_at(&entry(name)?, libc::O_PATH)
    }

    fn open_at(&self, name: &CStr, flags: libc::c_int) -> io::Result<File> {
        let wait = if flags & libc::O_PATH == 0 { libc::O_NONBLOCK } else { 0 };
        let flags = flags | libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NOCTTY | wait;
        openat(self.0.as_fd(), Path::new(OsStr::from_bytes(name.to_bytes())), flags)
    }

    /// Makes a file with a name of its own for now, which only this process's user may use.
    pub(crate) fn draft(&self) -> io::Result<Draft<'_>> {
        self.draft_of(|name| {
            let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_CLOEXEC;
            // SAFETY: `name` is NUL-terminated and lives across the call.
            own(unsafe { libc::openat(self.raw(), name.as_ptr(), flags, 0o600) }.into()).map(Some)
        })
    }

    /// Makes a symbolic link with a name of its own for now.
    pub(crate) fn draft_link(&self, target: &[u8]) -> io::Result<Draft<'_>> {
        let target = CString::new(target)?;
        self.draft_of(|name| {
            // SAFETY: both strings are NUL-terminated and live across the call.
            outcome(unsafe { libc::symlinkat(target.as_ptr(), self.raw(), name.as_ptr()) }).map(|()| None)
        })
    }

    fn draft_of(&self, make: impl FnOnce(&CStr) -> io::Result<Option<File>>) -> io::Result<Draft<'_>> {
        let name = CString::new(draft_name()?)?;
        let file = make(&name)?;
        Ok(Draft { directory: self, name: Some(name), file })
    }

    /// The names of all entries, in order.
    pub(crate) fn names(&self) -> io::Result<Vec<Vec<u8>>> {
        let entries = std::fs::read_dir(path_of(self.0.as_fd()))?;
        let mut names: Vec<_> =
            entries.map(|entry| Ok(entry?.file_name().as_bytes().to_vec())).collect::<io::Result<_>>()?;
        names.sort_unstable();
        Ok(names)
    }

    /// The directory itself, for its permissions and times.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    fn raw(&self) -> libc::c_int {
        self.0.as_raw_fd()
    }
}

/// A file or a link that has not got its name. It is removed when it is dropped before.
#[derive(Debug)]
pub(crate) struct Draft<'a> {
    directory: &'a Directory,
    name: Option<CString>,
    file: Option<File>,
}

impl Draft<'_> {
    /// Its content; a link has none.
    pub(crate) fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }

    /// Gives it its name. A file or a link of that name is replaced.
    pub(crate) fn publish(mut self, name: &[u8]) -> io::Result<()> {
        let to = entry(name)?;
        let Some(from) = &self.name else { return Ok(()) };
        let at = self.directory.raw();
        // SAFETY: both names are NUL-terminated and live across the call.
        outcome(unsafe { libc::renameat(at, from.as_ptr(), at, to.as_ptr()) })?;
        self.name = None;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // SAFETY: `name` is NUL-terminated and lives across the call. What cannot be removed stays.
            let _ = unsafe { libc::unlinkat(self.directory.raw(), name.as_ptr(), 0) };
        }
    }
}

/// The directory that a path is in, and its name there; `None` for a path without a name.
pub(crate) fn split_name(path: &Path) -> Option<(&Path, &OsStr)> {
    let name = path.file_name()?;
    let above = path.parent().filter(|above| !above.as_os_str().is_empty());
    Some((above.unwrap_or(Path::new(".")), name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::symlink;

    #[test]
    fn entries_stay_in_the_directory_and_drafts_go_with_their_owner() {
        let temp = std::env::temp_dir().join(format!("cofferdam-directory-{}", std::process::id()));
        fs::create_dir_all(temp.join("in/sub")).unwrap();
        fs::write(temp.join("secret"), "secret").unwrap();
        symlink("../secret", temp.join("in/link")).unwrap();
        symlink("..", temp.join("in/up")).unwrap();
        let directory = Directory::open(&temp.join("in")).unwrap();
        assert_eq!(directory.names().unwrap(), [b"link".to_vec(), b"sub".to_vec(), b"up".to_vec()]);
        for name in ["link", "up", "..", ".", "", "sub/../up", "/etc"] {
            assert!(directory.enter(name.as_bytes()).is_err(), "{name}");
            assert!(directory.open_entry(name.as_bytes()).is_err(), "{name}");
        }
        assert!(directory.make(b"up").is_err() && directory.make(b"../x").is_err());
        drop(directory.draft().unwrap());
        let draft = directory.draft().unwrap();
        draft.file().unwrap().write_all(b"new").unwrap();
        assert!(draft.publish(b"sub").is_err(), "a directory is not replaced");
        let draft = directory.draft().unwrap();
        draft.file().unwrap().write_all(b"new").unwrap();
        draft.publish(b"link").unwrap();
        directory.draft_link(b"/nowhere").unwrap().publish(b"up").unwrap();
        assert_eq!(directory.names().unwrap().len(), 3);
        assert_eq!(fs::read_to_string(temp.join("secret")).unwrap(), "secret");
        assert_eq!(fs::read_to_string(temp.join("in/link")).unwrap(), "new");
        assert_eq!(fs::read_link(temp.join("in/up")).unwrap(), Path::new("/nowhere"));
        fs::remove_dir_all(temp).unwrap();
    }
}
