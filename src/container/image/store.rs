//! The cache of prepared disks: found by digest, made once however many ask, never seen half-made.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, Draft};

/// Of disks and what is known of them, but for what the process's mask takes away.
const PERMISSIONS: u32 = 0o666;

/// A folder of disks. Several processes may use one.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
}

impl Store {
    /// # Errors
    /// `NotFound` when no folder was given and the user has no cache, else what making it fails with.
    pub(super) fn open(dir: Option<PathBuf>) -> Result<Self> {
        let dir = dir.or_else(|| sys::cache_dir().map(|dir| dir.join("images"))).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "no cache folder: set HOME or XDG_CACHE_HOME, or use `Image::cache_dir`")
        })?;
        fs::create_dir_all(dir.join("known")).doing(|| format!("making the cache folder {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// The digest of a file that was seen before and has not changed since.
    pub(super) fn remembered(&self, identity: &str) -> Option<String> {
        let digest = fs::read_to_string(self.dir.join("known").join(identity)).ok()?;
        (digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit())).then_some(digest)
    }

    /// Remembers it. A failure costs time later and nothing else.
    pub(super) fn remember(&self, identity: &str, digest: &str) {
        let known = self.dir.join("known");
        let write = || {
            let draft = Draft::new(&known, PERMISSIONS)?;
            draft.file().write_all(digest.as_bytes())?;
            draft.file().sync_all()?;
            // What is there cannot be read, or it would not be said anew.
            let _ = fs::remove_file(known.join(identity));
            draft.publish(&known.join(identity))
        };
        if let Err(error) = write() {
            log::debug!("{} cannot be written: {error}", known.join(identity).display());
        }
    }

    /// Opens the disk of that digest for reading. Where there is none, one caller makes it and all others wait.
    pub(super) fn get_or_make(&self, digest: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<File> {
        let path = self.dir.join(format!("{digest}.ext4"));
        let opened = |path: &Path| File::open(path).doing(|| format!("opening {}", path.display()));
        if let Ok(file) = File::open(&path) {
            return Ok(file);
        }
        // One file for all digests: each has a byte of its own in it, so nobody ever has to remove a lock.
        let lock_path = self.dir.join("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.doing(|| format!("opening {}", lock_path.display()))?;
        let byte = digest.get(..15).and_then(|d| u64::from_str_radix(d, 16).ok()).unwrap_or(0);
        sys::lock_byte(&lock, byte).doing(|| format!("locking {}", lock_path.display()))?;
        // Somebody else may have made it while this one waited.
        if let Ok(file) = File::open(&path) {
            return Ok(file);
        }
        let draft = Draft::new(&self.dir, PERMISSIONS).doing(|| format!("writing to {}", self.dir.display()))?;
        make(&draft.path())?;
        draft.file().sync_all().doing(|| format!("writing to {}", self.dir.display()))?;
        match draft.publish(&path) {
            // Where the folder is shared with another machine, the lock may be known to this one alone, and the other quicker.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            outcome => outcome.doing(|| format!("naming {}", path.display()))?,
        }
        opened(&path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn makers_that_know_nothing_of_each_other_are_not_in_each_others_way() {
        let dir = std::env::temp_dir().join(format!("cofferdam-store-{}", std::process::id()));
        let store = Store::open(Some(dir.clone())).unwrap();
        let (digest, other) = ("0".repeat(64), "1".repeat(64));
        let failed = store.get_or_make(&digest, |path| {
            fs::write(path, "half")?;
            Err(Error::new(ErrorKind::Corrupt, "on purpose"))
        });
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Corrupt);
        let made = store.get_or_make(&digest, |path| Ok(fs::write(path, "disk")?)).unwrap();
        assert_eq!(made.metadata().unwrap().len(), 4);
        let made = store.get_or_make(&digest, |_| panic!("it is there")).unwrap();
        assert_eq!(made.metadata().unwrap().len(), 4);
        // As if another machine had been quicker.
        let theirs = dir.join(format!("{other}.ext4"));
        let made =
            store.get_or_make(&other, |path| Ok(fs::write(path, "ours").and_then(|()| fs::write(&theirs, "theirs"))?));
        assert_eq!(made.unwrap().metadata().unwrap().len(), 6);
        let names = fs::read_dir(&dir).unwrap().count();
        assert_eq!(names, 4, "two disks, the lock, what is known, and nothing else");
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn what_is_known_is_found_again_and_what_is_damaged_is_replaced() {
        let dir = std::env::temp_dir().join(format!("cofferdam-known-{}", std::process::id()));
        let store = Store::open(Some(dir.clone())).unwrap();
        assert_eq!(store.remembered("it"), None);
        fs::write(dir.join("known/it"), "damaged").unwrap();
        assert_eq!(store.remembered("it"), None);
        store.remember("it", &"a".repeat(64));
        assert_eq!(store.remembered("it"), Some("a".repeat(64)));
        fs::remove_dir_all(dir).unwrap();
    }
}
