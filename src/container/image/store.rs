//! The cache of prepared disks: found by digest, made once however many ask, never seen half-made.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys;

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
        let path = self.dir.join("known").join(identity);
        let temporary = path.with_extension(std::process::id().to_string());
        if let Err(error) = fs::write(&temporary, digest).and_then(|()| fs::rename(&temporary, &path)) {
            log::debug!("{} cannot be written: {error}", path.display());
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
        // A name of our own: where the folder is shared with other machines, the lock may be known to this one alone.
        let mut number = [0; 8];
        sys::fill_random(&mut number).doing(|| "choosing a name")?;
        let half_made = self.dir.join(format!("{digest}.{:016x}.part", u64::from_ne_bytes(number)));
        self.remove_abandoned(digest);
        let made = make(&half_made).and_then(|()| {
            let file = opened(&half_made)?;
            file.sync_all().doing(|| format!("writing {}", half_made.display()))?;
            fs::rename(&half_made, &path).doing(|| format!("naming {}", path.display()))?;
            Ok(file)
        });
        if made.is_err() {
            // It may not even have been begun.
            let _ = fs::remove_file(&half_made);
        }
        made
    }

    /// Removes what killed processes have left of this disk. Nobody writes for so long without a change of the file.
    fn remove_abandoned(&self, digest: &str) {
        const LONG: Duration = Duration::from_secs(3600);
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let (name, changed) = (entry.file_name(), entry.metadata().and_then(|it| it.modified()));
            let ours = name.to_str().is_some_and(|name| name.starts_with(digest) && name.ends_with(".part"));
            if ours && changed.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > LONG)) {
                if let Err(error) = fs::remove_file(entry.path()) {
                    log::debug!("{} cannot be removed: {error}", entry.path().display());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn makers_that_know_nothing_of_each_other_are_not_in_each_others_way() {
        let dir = std::env::temp_dir().join(format!("cofferdam-store-{}", std::process::id()));
        let store = Store::open(Some(dir.clone())).unwrap();
        let digest = "0".repeat(64);
        let part = |name: &str| dir.join(format!("{digest}.{name}.part"));
        for name in ["left", "theirs"] {
            fs::write(part(name), name).unwrap();
        }
        let long_ago = SystemTime::now() - Duration::from_secs(7200);
        File::options().write(true).open(part("left")).unwrap().set_modified(long_ago).unwrap();
        let made = store.get_or_make(&digest, |path| Ok(fs::write(path, "disk")?)).unwrap();
        assert_eq!(made.metadata().unwrap().len(), 4);
        assert!(!part("left").exists(), "left by a process that was killed");
        assert_eq!(fs::read(part("theirs")).unwrap(), b"theirs");
        // As if another machine had been quicker.
        fs::rename(part("theirs"), dir.join(format!("{digest}.ext4"))).unwrap();
        let made = store.get_or_make(&digest, |_| panic!("it is there")).unwrap();
        assert_eq!(made.metadata().unwrap().len(), 6);
        fs::remove_dir_all(dir).unwrap();
    }
}
