//! What is known of a file in a guest.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::proto::{EntryKind, FileEntry};
use crate::size::Size;

/// What a file in a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A device, a pipe or a socket.
    Special,
}

/// What is known of a file in a container.
///
/// All of it is the guest's word, which it can change at any time.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileMetadata {
    /// What it is.
    pub kind: FileKind,
    /// How long it is.
    pub size: Size,
    /// Its permissions, with the bits for other users' rights (setuid, setgid, sticky): at most 0o7777.
    pub mode: u32,
    /// The user that owns it.
    pub uid: u32,
    /// The group that owns it.
    pub gid: u32,
    /// When its content changed last, by the guest's clock.
    pub modified: SystemTime,
    /// Where it leads; `None` for what is no symbolic link.
    pub link_target: Option<PathBuf>,
}

/// An entry of a directory in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DirEntry {
    /// Its name: never empty, `.` or `..`, and without a slash.
    pub name: OsString,
    /// What is known of it. A link is not followed.
    pub metadata: FileMetadata,
}

impl FileMetadata {
    pub(super) fn new(entry: &FileEntry<'_>) -> Self {
        Self {
            kind: match entry.kind {
                EntryKind::File => FileKind::File,
                EntryKind::Directory => FileKind::Directory,
                EntryKind::Link => FileKind::Symlink,
                EntryKind::Special => FileKind::Special,
            },
            size: Size::bytes(entry.size),
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            modified: time(entry.seconds, entry.nanoseconds),
            link_target: (entry.kind == EntryKind::Link).then(|| PathBuf::from(OsStr::from_bytes(entry.target))),
        }
    }
}

impl DirEntry {
    pub(super) fn new(entry: &FileEntry<'_>) -> Self {
        Self { name: OsStr::from_bytes(entry.name).to_owned(), metadata: FileMetadata::new(entry) }
    }
}

/// A time as the guest says it. One that the host cannot express is 1970.
pub(super) fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = match seconds < 0 {
        true => SystemTime::UNIX_EPOCH.checked_sub(whole),
        false => SystemTime::UNIX_EPOCH.checked_add(whole),
    };
    base.and_then(|base| base.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_any_guest_are_times() {
        assert_eq!(time(-1, 500_000_000), SystemTime::UNIX_EPOCH - Duration::from_millis(500));
        assert_eq!(time(3, 7), SystemTime::UNIX_EPOCH + Duration::new(3, 7));
        for seconds in [i64::MIN, i64::MAX] {
            time(seconds, 999_999_999);
        }
    }
}
