//! The cache of prepared disks: found by digest, made once however many ask, never seen half-made.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

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
        // The lock makes this name ours; what a killed process left there is written over.
        let half_made = self.dir.join(format!("{digest}.part"));
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
}
