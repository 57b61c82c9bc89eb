//! [`ImageStore`]: what is in the store, and what is taken out of it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::super::oci::{Digest, Reference};
use super::super::{Image, PrepareDeadline, seal};
use super::{NameRecord, Presence, Shelf, Store, name_of, private_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;

/// Files of one directory that are looked at.
const MAX_FILES: usize = 1_000_000;

/// Disks that were used within that time stay while the store is used.
const WHILE_USED: Duration = Duration::from_secs(3600);

/// Where images are kept: pulled ones with their names, unpacked layers, and disks.
///
/// Several processes may use one at once. What is taken out of it while a container runs stays there for that container.
#[derive(Debug, Clone, Default)]
pub struct ImageStore {
    dir: Option<PathBuf>,
}

/// A pulled image in an [`ImageStore`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PulledImageInfo {
    /// By which it was pulled.
    pub reference: Reference,
    /// Of its manifest.
    pub digest: Digest,
    /// What its layers take on the disk, also those that other images share.
    pub size: Size,
    /// When a container or a pull used it last.
    pub last_used: SystemTime,
    /// Whether [`ImageStore::gc`] leaves it alone.
    pub pinned: bool,
}

/// What [`ImageStore::gc`] has removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Collected {
    /// The names of pulled images.
    pub images: Vec<Reference>,
    /// Space on the disk.
    pub freed: Size,
    /// Whether others used the store, so that images, layers and documents stayed.
    pub in_use: bool,
}

impl ImageStore {
    /// Creates a handle of the user's own store: see [`Image::cache_dir`](crate::Image::cache_dir).
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a handle of the store in this directory.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: Some(dir.into()) }
    }

    fn store(&self) -> Result<Store> {
        Store::open(self.dir.clone())
    }

    /// Returns all pulled images, in the order of their names.
    ///
    /// # Errors
    /// As for opening a store: `PermissionDenied` for one that others can write to.
    pub fn list(&self) -> Result<Vec<PulledImageInfo>> {
        let store = self.store()?;
        let info = |(record, last_used): (NameRecord, SystemTime)| {
            let size = record.layers.iter().map(|layer| space_of(&store.layers, &name_of(layer))).sum();
            let (size, digest, pinned) = (Size::bytes(size), record.manifest, record.pinned);
            Some(PulledImageInfo { reference: record.reference.parse().ok()?, digest, size, last_used, pinned })
        };
        Ok(store.all_names()?.into_iter().filter_map(info).collect())
    }

    /// Opens a pulled image by its name. No registry is asked.
    ///
    /// # Errors
    /// `InvalidConfig` for what is no name; `NotFound` for one that was not pulled.
    pub fn image(&self, reference: impl fmt::Display) -> Result<Image> {
        let (store, name) = (self.store()?, full(&reference)?);
        let record = store.name(&name)?.ok_or_else(|| absent(&name))?;
        let image = Image::pulled(record);
        Ok(match &self.dir {
            Some(dir) => image.cache_dir(dir),
            None => image,
        })
    }

    /// Removes a name. What it alone needs may then be removed by [`ImageStore::gc`].
    ///
    /// # Errors
    /// As [`ImageStore::image`].
    pub fn remove(&self, reference: impl fmt::Display) -> Result<()> {
        let name = full(&reference)?;
        match self.store()?.remove_name(&name)? {
            true => Ok(()),
            false => Err(absent(&name)),
        }
    }

    /// Sets whether [`ImageStore::gc`] leaves a pulled image alone. It stays so when the name is pulled again.
    ///
    /// # Errors
    /// As [`ImageStore::image`].
    pub fn pin(&self, reference: impl fmt::Display, on: bool) -> Result<()> {
        let (store, name) = (self.store()?, full(&reference)?);
        let record = store.name(&name)?.ok_or_else(|| absent(&name))?;
        store.set_name(&NameRecord { pinned: on, ..record })
    }

    /// Returns how much space the store takes on the disk.
    ///
    /// # Errors
    /// What reading its directories fails with.
    pub fn disk_usage(&self) -> Result<Size> {
        let store = self.store()?;
        let files = store.files()?;
        Ok(Size::bytes(files.iter().map(|file| file.space).sum()))
    }

    /// Removes what was used least recently until the store takes at most `keep`.
    ///
    /// Pulled images with a pin stay, also beyond the limit. A pulled image goes with all that it alone needs. Layers without a name
    /// belong to images of local files, or to a name that was removed. They stay as long as there is room, as disks do. All of this
    /// is made or pulled anew when it is needed.
    ///
    /// Documents that no name needs are removed in any case. So are layers without a name that are not whole.
    ///
    /// While an image is pulled or prepared, by whatever process, only disks are removed that no process used for an hour.
    /// [`Collected::in_use`] says so.
    ///
    /// # Errors
    /// What reading its directories and names, and removing files fails with. `ResourceExhausted` for a store with too many files. When a
    /// name cannot be read nothing is removed.
    pub fn gc(&self, keep: Size) -> Result<Collected> {
        let store = Store::for_removal(self.dir.clone())?;
        let alone = Presence::alone(&store.disks)?;
        let in_use = alone.is_none();
        let mut names = store.all_names()?;
        let mut files = store.files()?;
        let mut used: u64 = files.iter().map(|file| file.space).sum();
        let mut collected = Collected { in_use, ..Collected::default() };
        // The next to go is last.
        names.sort_by_key(|(_, last_used)| std::cmp::Reverse(*last_used));
        let named: BTreeSet<String> = names.iter().flat_map(|(record, _)| needed_by(record)).collect();
        // Who needs a disk has it open. A layer that a pull has found is opened only later.
        let may_go = |file: &StoreFile, needed: &BTreeSet<String>| match file.kind {
            FileKind::Disk if in_use => file.last_used.elapsed().is_ok_and(|idle| idle >= WHILE_USED),
            FileKind::Disk => true,
            FileKind::Layer { .. } | FileKind::Document => !in_use && !needed.contains(&file.key),
        };
        loop {
            let needed: BTreeSet<String> = names.iter().flat_map(|(record, _)| needed_by(record)).collect();
            let goes_now = |file: &StoreFile| match file.kind {
                FileKind::Disk => false,
                FileKind::Document => may_go(file, &needed),
                // With its name, or as it is damaged.
                FileKind::Layer { whole } => may_go(file, &needed) && (!whole || named.contains(&file.key)),
            };
            let (gone, kept): (Vec<_>, Vec<_>) = files.into_iter().partition(goes_now);
            files = kept;
            for file in &gone {
                used = used.saturating_sub(remove(file, &mut collected)?);
            }
            if used <= keep.as_bytes() {
                break;
            }
            let next = names.iter().rposition(|(record, _)| !record.pinned && !in_use);
            let file = files.iter().enumerate().filter(|(_, file)| may_go(file, &needed));
            let file = file.min_by_key(|(_, file)| file.last_used).map(|(n, file)| (n, file.last_used));
            match (next, file) {
                (_, Some((n, last_used)))
                    if next.and_then(|next| names.get(next)).is_none_or(|(_, name)| last_used <= *name) =>
                {
                    let file = files.swap_remove(n);
                    used = used.saturating_sub(remove(&file, &mut collected)?);
                }
                (Some(next), _) => {
                    let (record, _) = names.remove(next);
                    store.remove_name(&record.reference)?;
                    collected.images.extend(record.reference.parse::<Reference>());
                }
                (None, _) => break,
            }
        }
        Ok(collected)
    }

    /// Reads all that is in the store, and returns the files that are damaged. They are made or pulled anew when they are needed.
    ///
    /// Blocks for at most `timeout` where the host's storage answers.
    ///
    /// # Errors
    /// `TimedOut`; what reading its directories fails with.
    pub fn verify(&self, timeout: Duration) -> Result<Vec<PathBuf>> {
        let store = self.store()?;
        let deadline = PrepareDeadline::fixed(timeout, "ImageStore::verify: not done");
        let mut damaged = Vec::new();
        for shelf in [&store.disks, &store.layers] {
            for name in shelf.files(MAX_FILES)? {
                deadline.check()?;
                let Ok(file) = private_file(&shelf.directory, &name) else { continue };
                let sealed = !std::ptr::eq(shelf, &store.disks) || name.ends_with(".erofs");
                if sealed && !seal::holds(&file, &deadline)? {
                    damaged.push(shelf.shown.join(name));
                }
            }
        }
        for name in store.blobs.files(MAX_FILES)? {
            deadline.check()?;
            let digest = name.replacen('-', ":", 1).parse::<Digest>();
            if !digest.is_ok_and(|digest| store.blob(&digest).is_ok_and(|bytes| bytes.is_some())) {
                damaged.push(store.blobs.shown.join(name));
            }
        }
        Ok(damaged)
    }
}

fn full(reference: &impl fmt::Display) -> Result<String> {
    Ok(reference.to_string().parse::<Reference>()?.to_string())
}

fn absent(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("{name} was not pulled into this store"))
}

/// The keys of files that a name needs.
fn needed_by(record: &NameRecord) -> Vec<String> {
    let blobs = [&record.root, &record.manifest, &record.config].map(|it| format!("blobs/{}", name_of(it)));
    blobs.into_iter().chain(record.layers.iter().map(|layer| format!("layers/{}", name_of(layer)))).collect()
}

/// A file that may be removed.
#[derive(Debug)]
struct StoreFile {
    path: PathBuf,
    key: String,
    space: u64,
    last_used: SystemTime,
    kind: FileKind,
}

#[derive(Debug, Clone, Copy)]
enum FileKind {
    Disk,
    Layer { whole: bool },
    Document,
}

impl Store {
    fn files(&self) -> Result<Vec<StoreFile>> {
        let mut found = Vec::new();
        for (folder, shelf) in [("", &self.disks), ("layers/", &self.layers), ("blobs/", &self.blobs)] {
            for name in shelf.files(MAX_FILES)? {
                let path = shelf.path().join(&name);
                let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
                let kind = match folder {
                    "" => FileKind::Disk,
                    "blobs/" => FileKind::Document,
                    _ => FileKind::Layer { whole: is_whole(shelf, &name) },
                };
                if !metadata.is_file() || matches!(kind, FileKind::Disk) && !name.ends_with(".erofs") {
                    continue;
                }
                let times = [metadata.accessed(), metadata.modified()];
                let last_used = times.into_iter().flatten().max().unwrap_or(SystemTime::UNIX_EPOCH);
                let (key, space) = (format!("{folder}{name}"), metadata.blocks().saturating_mul(512));
                found.push(StoreFile { path, key, space, last_used, kind });
            }
        }
        Ok(found)
    }
}

/// Whether a layer has all its length. What cannot be read counts as whole: it may be another time.
fn is_whole(shelf: &Shelf, name: &str) -> bool {
    // To look at it is no use of it.
    let file = shelf.directory.open_at(Path::new(name), libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOATIME);
    file.map_or(true, |file| seal::is_there(&file).unwrap_or(true))
}

fn space_of(shelf: &Shelf, name: &str) -> u64 {
    fs::symlink_metadata(shelf.path().join(name)).map_or(0, |it| it.blocks().saturating_mul(512))
}

fn remove(file: &StoreFile, collected: &mut Collected) -> Result<u64> {
    match fs::remove_file(&file.path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(file.space),
        outcome => outcome.doing(|| format!("removing {}", file.key))?,
    }
    collected.freed = Size::bytes(collected.freed.as_bytes().saturating_add(file.space));
    Ok(file.space)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::super::Prepared;
    use super::super::names::tests::record;
    use super::*;

    struct Temp(PathBuf);

    impl Temp {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("cofferdam-{name}-{}", std::process::id())))
        }

        fn store(&self) -> Store {
            Store::open(Some(self.0.clone())).unwrap()
        }

        fn gc(&self, keep: Size) -> Result<Collected> {
            ImageStore::at(&self.0).gc(keep)
        }

        /// A layer of that content, and where it lies.
        fn layer(&self, content: &str, used: u64) -> (Digest, PathBuf) {
            let (digest, deadline) = (Digest::sha256(content.as_bytes()), PrepareDeadline::fixed(Duration::MAX, ""));
            let make = |to: &fs::File| Ok((&*to).write_all(content.as_bytes())?);
            let store = self.store();
            let file = store.get_or_make(Prepared::Layer(&digest), &deadline, make).unwrap();
            let used = SystemTime::UNIX_EPOCH + Duration::from_secs(used);
            file.set_times(fs::FileTimes::new().set_accessed(used).set_modified(used)).unwrap();
            let path = store.layers.shown.join(name_of(&digest));
            (digest, path)
        }

        fn named(&self, reference: &str, layer: &Digest) {
            self.store().set_name(&NameRecord { layers: vec![layer.clone()], ..record(reference, b"x") }).unwrap();
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn gc_removes_nothing_when_a_name_cannot_be_read() {
        let temp = Temp::new("gc-unreadable");
        let (digest, layer) = temp.layer("one", 1);
        temp.named("r.example/a:1", &digest);
        let name = fs::read_dir(temp.0.join("names")).unwrap().next().unwrap().unwrap().path();
        fs::set_permissions(&name, fs::Permissions::from_mode(0o666)).unwrap();
        let error = temp.gc(Size::bytes(0)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains(name.to_str().unwrap()), "{error}");
        assert!(layer.exists());
        assert_eq!(temp.store().name("r.example/a:1").unwrap_err().kind(), ErrorKind::PermissionDenied);
        // What is no record is no name.
        fs::set_permissions(&name, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&name, "{").unwrap();
        temp.gc(Size::bytes(0)).unwrap();
        assert!(!layer.exists());
    }

    #[test]
    fn directory_with_too_many_entries_is_an_error() {
        let temp = Temp::new("gc-many");
        temp.layer("one", 1);
        temp.layer("two", 2);
        let layers = temp.store().layers;
        assert_eq!(layers.files(2).unwrap().len(), 2);
        let error = layers.files(1).unwrap_err();
        assert!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("more than 1"), "{error}");
    }

    #[test]
    fn layers_without_a_name_stay_while_there_is_room() {
        let temp = Temp::new("gc-unnamed");
        let ((_, old), (_, new), (_, damaged)) = (temp.layer("old", 1), temp.layer("new", 2), temp.layer("bad", 3));
        fs::OpenOptions::new().write(true).open(&damaged).unwrap().set_len(3).unwrap();
        assert!(!temp.gc(Size::gib(1)).unwrap().in_use);
        assert!(old.exists() && new.exists() && !damaged.exists());
        let used = ImageStore::at(&temp.0).disk_usage().unwrap();
        temp.gc(Size::bytes(used.as_bytes() - 1)).unwrap();
        assert!(!old.exists() && new.exists());
        temp.gc(Size::bytes(0)).unwrap();
        assert!(!new.exists());
    }

    #[test]
    fn names_and_layers_stay_while_the_store_is_used() {
        let temp = Temp::new("gc-used");
        let ((_, unnamed), (digest, named)) = (temp.layer("one", 1), temp.layer("two", 1));
        temp.named("r.example/a:1", &digest);
        let document = Digest::sha256(b"{}");
        temp.store().put_blob(&document, b"{}").unwrap();
        let user = temp.store();
        user.touch_at("r.example/a:1", SystemTime::UNIX_EPOCH);
        let collected = temp.gc(Size::bytes(0)).unwrap();
        assert_eq!(collected, Collected { in_use: true, ..Collected::default() });
        assert!(unnamed.exists() && named.exists() && user.blob(&document).unwrap().is_some());
        drop(user);
        assert_eq!(temp.gc(Size::bytes(0)).unwrap().images.len(), 1);
        assert!(!unnamed.exists() && !named.exists() && temp.store().blob(&document).unwrap().is_none());
    }
}
