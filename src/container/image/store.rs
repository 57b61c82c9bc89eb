//! The cache of prepared disks and layers, found by digest. Each is made once however many callers ask, is never seen
//! half-made, and is its user's alone.

mod collect;
mod format;
mod housekeeping;
mod names;
mod presence;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};
use std::time::Duration;

use sha2::Digest;

use super::budget::PrepareDeadline;
use super::seal::{self, Seal};
use super::{begin, hex, oci};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, AtomicFile, Beneath, CloseOnFork};
pub use collect::Collected;
pub use housekeeping::{ImageStore, PulledImageInfo};
pub(super) use names::NameRecord;
use presence::Presence;

/// Of files and of directories: their user's alone, as images hold secrets.
const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// Where the bytes begin that are locked while a file is made, and those that are locked while it gets its name.
const MAKING: u64 = 0;
const NAMING: u64 = 1 << 60;

/// Bounds of the growing pauses between two tries of a lock that is held.
const MIN_PAUSE: Duration = Duration::from_millis(1);
const MAX_PAUSE: Duration = Duration::from_millis(50);

/// What changes with any write to a file: device, inode, length, and both times of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileIdentity([u64; 7]);

impl FileIdentity {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        Ok(Self::of_metadata(&file.metadata()?))
    }

    pub(super) fn of_metadata(m: &fs::Metadata) -> Self {
        let [mtime, mtime_nsec, ctime, ctime_nsec] =
            [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()].map(|n| n as u64);
        Self([m.dev(), m.ino(), m.len(), mtime, mtime_nsec, ctime, ctime_nsec])
    }

    /// By which the store remembers it.
    pub(super) fn name(self) -> String {
        let mut hash = begin();
        self.0.iter().for_each(|field| hash.update(field.to_le_bytes()));
        hex(&hash.finalize())
    }
}

/// Disks that this process has read through.
static VERIFIED: Mutex<BTreeSet<FileIdentity>> = Mutex::new(BTreeSet::new());
const MAX_VERIFIED: usize = 4096;

/// Layers that this process has open.
static OPEN_LAYERS: Mutex<BTreeMap<FileIdentity, Weak<File>>> = Mutex::new(BTreeMap::new());

/// A directory of disks. Several processes may use one.
///
/// - The disks of archives and directories: `<digest>.erofs`.
/// - The metadata of images in layers: `<digest>.layers.erofs`.
/// - Unpacked layers: `layers/<algorithm>-<digest>.<version>`, each in the format of one version ([`layer_file`]).
/// - Manifests and configurations: `blobs/<algorithm>-<digest>`.
/// - The digests of archives that were read: `known/`.
/// - The number of this arrangement: `format` ([`format::check`]).
#[derive(Debug)]
pub(super) struct Store {
    disks: Shelf,
    known: Shelf,
    layers: Shelf,
    blobs: Shelf,
    /// As long as it is held, nothing new is removed.
    _presence: Option<Presence>,
}

/// What is made once, and found by a digest.
#[derive(Debug, Clone, Copy)]
pub(super) enum Prepared<'a> {
    /// Of an archive or a directory: a whole file system.
    Disk(&'a str),
    /// Of an image in layers: a file system with their content behind it.
    Metadata(&'a str),
    /// Callers wait for others with a layer of the same origin alone: a registry that stalls holds up its own users.
    Layer { diff_id: &'a oci::Digest, origin: &'a str },
}

/// One directory of the store.
#[derive(Debug)]
struct Shelf {
    directory: Beneath,
    /// As it was given, for errors.
    shown: PathBuf,
}

impl Shelf {
    fn open(path: &Path, shown: PathBuf) -> Result<Self> {
        Ok(Self { directory: open_directory(path, &shown)?, shown })
    }

    fn within(&self, name: &str) -> Result<Self> {
        Self::open(&self.path().join(name), self.shown.join(name))
    }

    /// As long as it is open.
    fn path(&self) -> PathBuf {
        sys::path_of(self.directory.as_fd())
    }

    /// The names of all its files, in order.
    ///
    /// # Errors
    /// What reading the directory fails with; `ResourceExhausted` for one with more than `most` entries.
    fn files(&self, most: usize) -> Result<Vec<String>> {
        let doing = || format!("reading {}", self.shown.display());
        let mut names = Vec::new();
        for (n, entry) in fs::read_dir(self.path()).doing(doing)?.enumerate() {
            if n >= most {
                let what = format!("it has more than {most} entries: nothing is done with a part of them");
                return Err(Error::new(ErrorKind::ResourceExhausted, what).doing(doing()));
            }
            let entry = entry.doing(doing)?;
            match entry.file_type() {
                Ok(kind) if kind.is_file() => names.extend(entry.file_name().into_string()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).doing(doing),
            }
        }
        names.sort();
        Ok(names)
    }

    /// Gives a whole file its name. What is there now is damaged. Who has it open keeps it.
    fn publish(&self, draft: AtomicFile, name: &str) -> Result<()> {
        let path = self.path().join(name);
        let naming = || format!("naming {}", self.shown.join(name).display());
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => outcome.doing(naming)?,
        }
        match draft.publish(&path) {
            // Where the directory is shared with another machine, the lock may be known to this one alone, and the other quicker.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            outcome => outcome.doing(naming),
        }
    }
}

/// The name of an unpacked layer's file. Releases that write layers in another way find no layer of ours under their names.
fn layer_file(diff_id: &oci::Digest) -> String {
    format!("{}.{}", name_of(diff_id), seal::VERSION)
}

/// The name of a file that is found by a digest.
fn name_of(digest: &oci::Digest) -> String {
    format!("{}-{}", digest.algorithm(), digest.hex())
}

impl Store {
    /// # Errors
    /// `NotFound` when no directory was given and the user has no cache. `PermissionDenied` for a directory that others
    /// can write to. Else what making it fails with.
    pub(super) fn open(dir: Option<PathBuf>) -> Result<Self> {
        let store = Self::for_removal(dir)?;
        Ok(Self { _presence: Presence::shared(&store.disks)?, ..store })
    }

    /// The same without a lock on what is there.
    fn for_removal(dir: Option<PathBuf>) -> Result<Self> {
        let own = dir.is_none();
        let dir = dir.or_else(|| sys::cache_dir().map(|dir| dir.join("images"))).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "no cache directory: set HOME or XDG_CACHE_HOME, or use `Image::cache_dir`")
        })?;
        if own && fs::symlink_metadata(&dir).is_ok_and(|it| it.is_dir() && it.mode() & 0o077 != 0) {
            // Earlier releases left the user's own cache as the mask of its maker had it. What is not ours stays as it is.
            let _ = fs::set_permissions(&dir, fs::Permissions::from_mode(FOLDER_MODE));
        }
        let disks = Shelf::open(&dir, dir.clone())?;
        format::check(&disks)?;
        let [known, layers, blobs] = ["known", "layers", "blobs"].map(|name| disks.within(name));
        Ok(Self { known: known?, layers: layers?, blobs: blobs?, _presence: None, disks })
    }

    /// The digest of a file that was seen before and has not changed since.
    pub(super) fn remembered(&self, identity: &str) -> Option<String> {
        let mut digest = String::new();
        let file = private_file(&self.known.directory, identity).ok()?;
        file.take(65).read_to_string(&mut digest).ok()?;
        (digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit())).then_some(digest)
    }

    /// Remembers it. A failure costs time later and nothing else.
    pub(super) fn remember(&self, identity: &str, digest: &str) {
        let known = self.known.path();
        let write = || {
            let draft = AtomicFile::new(&known, FILE_MODE)?;
            draft.file().write_all(digest.as_bytes())?;
            draft.file().sync_all()?;
            // What is there cannot be read, or it would not be said anew.
            let _ = fs::remove_file(known.join(identity));
            draft.publish(&known.join(identity))
        };
        if let Err(error) = write() {
            log::debug!("{} cannot be written: {error}", self.known.shown.join(identity).display());
        }
    }

    /// No longer believes what was remembered.
    pub(super) fn forget(&self, identity: &str) {
        let _ = fs::remove_file(self.known.path().join(identity));
    }

    /// Opens what is prepared, for reading. Where it is not there, or damaged, one caller makes it and all others wait.
    ///
    /// # Errors
    /// What `make` fails with; `TimedOut` and `Cancelled`, also while others make it.
    pub(super) fn get_or_make(
        &self,
        what: Prepared<'_>,
        deadline: &PrepareDeadline,
        make: impl FnOnce(&File) -> Result<()>,
    ) -> Result<File> {
        let (shelf, name, origin) = match what {
            Prepared::Disk(digest) => (&self.disks, format!("{digest}.erofs"), ""),
            Prepared::Metadata(key) => (&self.disks, format!("{key}.layers.erofs"), ""),
            Prepared::Layer { diff_id, origin } => (&self.layers, layer_file(diff_id), origin),
        };
        self.get_or_make_in(shelf, &name, origin, deadline, make)
    }

    /// Opens an unpacked layer, if it is there and whole. All of this process who use it share its descriptor.
    pub(super) fn layer(&self, diff_id: &oci::Digest, deadline: &PrepareDeadline) -> Result<Option<Arc<File>>> {
        let Some(file) = get(&self.layers, &layer_file(diff_id), deadline)? else { return Ok(None) };
        let identity = FileIdentity::of(&file)?;
        // Other threads hold the lock for a lookup. In a child of fork it may stay locked, and then a layer is opened once more.
        let attempt = |n: u32| {
            std::thread::sleep(MIN_PAUSE / 20 * n.min(1));
            unless_locked(&OPEN_LAYERS)
        };
        let Some(mut open) = (0..20).find_map(attempt) else { return Ok(Some(Arc::new(file))) };
        if let Some(shared) = open.get(&identity).and_then(Weak::upgrade) {
            return Ok(Some(shared));
        }
        // At doubled sizes alone, as it visits all entries.
        if open.len() >= MAX_VERIFIED && open.len().is_power_of_two() {
            open.retain(|_, file| file.strong_count() > 0);
        }
        let file = Arc::new(file);
        open.insert(identity, Arc::downgrade(&file));
        Ok(Some(file))
    }

    /// Reads a manifest or a configuration that [`Store::put_blob`] has kept. None where it is not there, or damaged.
    pub(super) fn blob(&self, digest: &oci::Digest) -> Result<Option<Vec<u8>>> {
        let doing = || format!("reading {}", self.blobs.shown.join(name_of(digest)).display());
        let file = match private_file(&self.blobs.directory, &name_of(digest)) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.doing(doing())),
        };
        let mut bytes = Vec::new();
        file.take(oci::MAX_DOCUMENT + 1).read_to_end(&mut bytes).doing(doing)?;
        let mut hasher = oci::Hasher::like(digest);
        hasher.update(&bytes);
        Ok((hasher.finish() == *digest).then_some(bytes))
    }

    /// Keeps a manifest or a configuration, durably. Its digest was checked.
    #[cfg(any(test, feature = "registry"))]
    pub(super) fn put_blob(&self, digest: &oci::Digest, bytes: &[u8]) -> Result<()> {
        if self.blob(digest)?.is_some() {
            return Ok(());
        }
        let writing = || format!("writing to {}", self.blobs.shown.display());
        let draft = AtomicFile::new(&self.blobs.path(), FILE_MODE).doing(writing)?;
        draft.file().write_all(bytes).doing(writing)?;
        draft.file().sync_all().doing(writing)?;
        self.blobs.publish(draft, &name_of(digest))
    }

    /// A file without a name beside the layers.
    pub(super) fn scratch(&self) -> Result<File> {
        sys::temp_file(&self.layers.path()).doing(|| format!("making a file in {}", self.layers.shown.display()))
    }

    fn get_or_make_in(
        &self,
        shelf: &Shelf,
        name: &str,
        origin: &str,
        deadline: &PrepareDeadline,
        make: impl FnOnce(&File) -> Result<()>,
    ) -> Result<File> {
        if let Some(file) = get(shelf, name, deadline)? {
            return Ok(file);
        }
        let _making = self.lock(MAKING, &[name, origin], deadline)?;
        // Another thread or process may have made it while this one waited.
        if let Some(file) = get(shelf, name, deadline)? {
            return Ok(file);
        }
        let writing = || format!("writing to {}", shelf.shown.display());
        let draft = AtomicFile::new(&shelf.path(), FILE_MODE).doing(writing)?;
        make(draft.file())?;
        let seal = Seal::of(draft.file(), deadline)?;
        seal.write(draft.file()).doing(writing)?;
        draft.file().sync_all().doing(writing)?;
        let inode = draft.file().metadata()?.ino();
        let _naming = self.lock(NAMING, &[name], deadline)?;
        // One of another origin may have been quicker. All containers are to share one file.
        if let Some(file) = get(shelf, name, deadline)? {
            return Ok(file);
        }
        shelf.publish(draft, name)?;
        let path = shelf.shown.join(name);
        let made = private_file(&shelf.directory, name).doing(|| format!("opening {}", path.display()))?;
        if made.metadata()?.ino() == inode {
            // It was read through just now.
            remember_verified(FileIdentity::of(&made)?);
            return Ok(made);
        }
        let made = get(shelf, name, deadline)?;
        made.ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("{} is damaged", path.display())))
    }

    /// Waits for another thread or process that makes the same. One file for all that can be locked: each has a byte of its
    /// own in it, so no lock is ever removed. It is not to be opened by other users, who could hold it.
    fn lock(&self, half: u64, of: &[&str], deadline: &PrepareDeadline) -> Result<CloseOnFork<File>> {
        let doing = || format!("locking {}", self.disks.shown.join("lock").display());
        let path = self.disks.path().join("lock");
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let mut options = File::options();
        options.write(true).create(true).truncate(false).custom_flags(flags).mode(FILE_MODE);
        let lock = options.open(&path).doing(doing)?;
        check_private(&lock).doing(doing)?;
        // A user that can read it can hold it. For one of root's the time allowed bounds the wait.
        if lock.metadata().doing(doing)?.mode() & 0o077 != 0 {
            let _ = lock.set_permissions(fs::Permissions::from_mode(FILE_MODE));
        }
        let hash = of.iter().fold(begin(), |hash, part| hash.chain_update(part).chain_update(b"\n")).finalize();
        let hash = hash.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
        let byte = half + hash % NAMING;
        let mut pause = MIN_PAUSE;
        while !sys::try_lock_byte(&lock, byte).doing(doing)? {
            deadline.check().doing(|| "waiting for another process or thread that prepares the same image")?;
            std::thread::sleep(pause);
            pause = (pause * 2).min(MAX_PAUSE);
        }
        Ok(CloseOnFork::new(lock))
    }
}

/// A disk or a layer that is there and whole.
fn get(shelf: &Shelf, name: &str, deadline: &PrepareDeadline) -> Result<Option<File>> {
    let path = shelf.shown.join(name);
    let file = match private_file(&shelf.directory, name) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.doing(format!("opening {}", path.display()))),
    };
    let identity = FileIdentity::of(&file)?;
    if unless_locked(&VERIFIED).is_some_and(|verified| verified.contains(&identity)) {
        return Ok(Some(file));
    }
    if !seal::holds(&file, deadline).doing(|| format!("reading {}", path.display()))? {
        log::warn!("{} is damaged, and will be made anew", path.display());
        return Ok(None);
    }
    remember_verified(identity);
    Ok(Some(file))
}

/// Locks a list, unless another thread holds it. In a child of fork that thread may not exist. Without the list a caller reads
/// a disk, or opens a layer, once more.
pub(super) fn unless_locked<T>(list: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match list.try_lock() {
        Ok(verified) => Some(verified),
        Err(TryLockError::Poisoned(verified)) => Some(verified.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

fn remember_verified(identity: FileIdentity) {
    let Some(mut verified) = unless_locked(&VERIFIED) else { return };
    if verified.len() >= MAX_VERIFIED {
        verified.clear();
    }
    verified.insert(identity);
}

/// Makes a directory where it is missing, and opens it; errors call it `shown`.
fn open_directory(path: &Path, shown: &Path) -> Result<Beneath> {
    Beneath::make_private(path).doing(|| format!("cache directory {}", shown.display()))
}

/// Opens a file of the store for reading.
///
/// # Errors
/// `PermissionDenied` for one that another user may have put there.
fn private_file(directory: &Beneath, name: &str) -> Result<File> {
    let file = directory.open_at(Path::new(name), libc::O_RDONLY)?;
    check_private(&file)?;
    Ok(file)
}

fn check_private(file: &File) -> Result<()> {
    if file.metadata()?.is_file() && sys::is_private(file)? {
        return Ok(());
    }
    let what = "it must be a file owned by this user or root, that no other user can write to";
    Err(Error::new(ErrorKind::PermissionDenied, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a child of fork it stays so.
    #[test]
    fn locked_store_index_is_not_waited_for() {
        let dir = std::env::temp_dir().join(format!("cofferdam-verified-{}", std::process::id()));
        let _held = VERIFIED.lock();
        let store = Store::open(Some(dir.clone())).unwrap();
        let deadline = PrepareDeadline::new(Duration::from_secs(60), None);
        let digest = "2".repeat(64);
        let made =
            store.get_or_make(Prepared::Disk(&digest), &deadline, |file| Ok((&*file).write_all(b"disk")?)).unwrap();
        let found = store.get_or_make(Prepared::Disk(&digest), &deadline, |_| panic!("it is there")).unwrap();
        assert_eq!(FileIdentity::of(&made).unwrap(), FileIdentity::of(&found).unwrap());
        fs::remove_dir_all(dir).unwrap();
    }
}
