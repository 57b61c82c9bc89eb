//! The directory of disks that are gone with their VM.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::sys;

/// Returns the directory that was set, which may be memory; else the default.
///
/// The default is the directory for temporary files (`TMPDIR`, else `/tmp`), or `/var/tmp` where that is memory.
///
/// # Errors
/// `InvalidConfig` when both are memory of the host, which a guest's writes would take, or are no directories.
pub(crate) fn scratch_dir(set: Option<&Path>) -> Result<PathBuf> {
    match set {
        Some(dir) => Ok(dir.to_path_buf()),
        None => default_dir([std::env::temp_dir(), "/var/tmp".into()], is_usable),
    }
}

/// Returns whether a disk may lie there by default.
fn is_usable(dir: &Path) -> bool {
    dir.is_dir() && !is_memory(dir)
}

/// Returns whether the directory is in memory. Where the host does not say, it is not: making the file there then fails with
/// the reason.
fn is_memory(dir: &Path) -> bool {
    sys::is_memory(dir).unwrap_or(false)
}

/// Returns the first of the directories that is accepted.
fn default_dir(dirs: [PathBuf; 2], accepts: impl Fn(&Path) -> bool) -> Result<PathBuf> {
    let [first, second] = &dirs;
    let problem = format!(
        "scratch_dir: {} and {} are memory of the host, which the disk would take, or are missing; name a directory on a disk",
        first.display(),
        second.display()
    );
    dirs.into_iter().find(|dir| accepts(dir)).ok_or_else(|| Error::new(ErrorKind::InvalidConfig, problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_memory_is_taken_only_when_it_is_set() {
        let dirs = || [PathBuf::from("/a"), PathBuf::from("/b")];
        let chosen = |memory: &'static [&'static str]| {
            default_dir(dirs(), move |dir| memory.iter().all(|it| Path::new(it) != dir))
        };
        assert_eq!(chosen(&[]).unwrap(), Path::new("/a"));
        assert_eq!(chosen(&["/a"]).unwrap(), Path::new("/b"));
        let error = chosen(&["/a", "/b"]).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("scratch_dir"), "{error}");
        assert!(
            is_usable(Path::new("/proc")) && !is_usable(Path::new("/dev/shm")) && !is_usable(Path::new("/nonexistent"))
        );
        assert!(is_memory(Path::new("/dev/shm")) && !is_memory(Path::new("/proc")));
        assert_eq!(scratch_dir(Some(Path::new("/dev/shm"))).unwrap(), Path::new("/dev/shm"));
    }
}
