//! What [`ImageStore::gc`](super::ImageStore::gc) removes, and in which order.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::super::oci::Reference;
use super::super::seal;
use super::{NameRecord, Shelf, Store, name_of};
use crate::error::{Context, Result};
use crate::size::Size;

/// Files of one directory that are looked at.
pub(super) const MAX_FILES: usize = 1_000_000;

/// Disks that were used within that time stay while the store is used.
const WHILE_USED: Duration = Duration::from_secs(3600);

/// What [`ImageStore::gc`](super::ImageStore::gc) has removed.
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

/// The keys of files that a name needs, each once.
fn needed_by(record: &NameRecord) -> BTreeSet<String> {
    let blobs = [&record.root, &record.manifest, &record.config].map(|it| format!("blobs/{}", name_of(it)));
    blobs.into_iter().chain(record.layers.iter().map(|layer| format!("layers/{}", name_of(layer)))).collect()
}

/// A file that may be removed.
#[derive(Debug)]
pub(super) struct StoreFile {
    path: PathBuf,
    key: String,
    pub space: u64,
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
    pub(super) fn files(&self) -> Result<Vec<StoreFile>> {
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
                // A layer of whatever version: names say nothing of it.
                let name = if folder == "layers/" { name.split('.').next().unwrap_or_default() } else { &name };
                let (key, space) = (format!("{folder}{name}"), metadata.blocks().saturating_mul(512));
                found.push(StoreFile { path, key, space, last_used, kind });
            }
        }
        Ok(found)
    }
}

/// Whether a layer has all its length. What cannot be read, or is of another version, counts as whole.
fn is_whole(shelf: &Shelf, name: &str) -> bool {
    // To look at it is no use of it.
    let file = shelf.directory.open_at(Path::new(name), libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOATIME);
    file.map_or(true, |file| seal::is_foreign(&file).unwrap_or(false) || seal::is_there(&file).unwrap_or(true))
}

fn remove(file: &StoreFile, collected: &mut Collected) -> Result<u64> {
    match fs::remove_file(&file.path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(file.space),
        outcome => outcome.doing(|| format!("removing {}", file.key))?,
    }
    collected.freed = Size::bytes(collected.freed.as_bytes().saturating_add(file.space));
    Ok(file.space)
}

/// The files of a store, and what keeps them there.
struct Collection<'s> {
    store: &'s Store,
    files: Vec<StoreFile>,
    /// Which files have a key: a layer has one for each version.
    places: BTreeMap<String, Vec<usize>>,
    /// How many names need a key.
    needs: BTreeMap<String, usize>,
    /// Files that go when there is no room, by their last use.
    free: BTreeSet<(SystemTime, usize)>,
    used: u64,
    collected: Collected,
}

/// Does what [`ImageStore::gc`](super::ImageStore::gc) says, in a store that is used by others or not.
pub(super) fn collect(store: &Store, keep: Size, in_use: bool) -> Result<Collected> {
    let mut names = store.all_names()?;
    let mut collection = Collection::new(store, &names, in_use)?;
    // The next to go is last.
    names.sort_by_key(|(_, last_used)| Reverse(*last_used));
    names.retain(|(record, _)| !record.pinned && !in_use);
    while collection.used > keep.as_bytes() {
        let file = collection.free.first().copied();
        match (names.last(), file) {
            (next, Some((last_used, n))) if next.is_none_or(|(_, name)| last_used <= *name) => {
                collection.free.remove(&(last_used, n));
                collection.remove_file(n)?;
            }
            (Some((record, _)), _) => {
                collection.remove_name(record)?;
                names.pop();
            }
            (None, _) => break,
        }
    }
    Ok(collection.collected)
}

impl<'s> Collection<'s> {
    /// Removes what is of no use at once.
    fn new(store: &'s Store, names: &[(NameRecord, SystemTime)], in_use: bool) -> Result<Self> {
        let (mut places, mut needs) = (BTreeMap::<String, Vec<usize>>::new(), BTreeMap::new());
        for key in names.iter().flat_map(|(record, _)| needed_by(record)) {
            *needs.entry(key).or_default() += 1;
        }
        let files = store.files()?;
        let used = files.iter().map(|file| file.space).sum();
        let (mut free, mut useless) = (BTreeSet::new(), Vec::new());
        for (n, file) in files.iter().enumerate() {
            places.entry(file.key.clone()).or_default().push(n);
            // Who needs a disk has it open. A layer that a pull has found is opened only later.
            let may_go = match file.kind {
                FileKind::Disk => !in_use || file.last_used.elapsed().is_ok_and(|idle| idle >= WHILE_USED),
                FileKind::Layer { .. } | FileKind::Document => !in_use && !needs.contains_key(&file.key),
            };
            match file.kind {
                FileKind::Document | FileKind::Layer { whole: false } if may_go => useless.push(n),
                _ if may_go => _ = free.insert((file.last_used, n)),
                _ => {}
            }
        }
        let collected = Collected { in_use, ..Collected::default() };
        let mut collection = Self { store, files, places, needs, free, used, collected };
        useless.into_iter().try_for_each(|n| collection.remove_file(n))?;
        Ok(collection)
    }

    fn remove_file(&mut self, n: usize) -> Result<()> {
        let Some(file) = self.files.get(n) else { return Ok(()) };
        self.used = self.used.saturating_sub(remove(file, &mut self.collected)?);
        Ok(())
    }

    /// Removes a name with all that it alone needs.
    fn remove_name(&mut self, record: &NameRecord) -> Result<()> {
        self.store.remove_name(&record.reference)?;
        self.collected.images.extend(record.reference.parse::<Reference>());
        for key in needed_by(record) {
            if let Some(count) = self.needs.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.needs.remove(&key);
                    let places = self.places.get(&key).cloned().unwrap_or_default();
                    places.into_iter().try_for_each(|n| self.remove_file(n))?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::super::super::PrepareDeadline;
    use super::super::super::oci::Digest;
    use super::super::names::tests::record;
    use super::super::{ImageStore, Prepared, layer_file};
    use super::*;
    use crate::error::ErrorKind;

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
            let file = store.get_or_make(Prepared::Layer { diff_id: &digest, origin: "" }, &deadline, make).unwrap();
            let used = SystemTime::UNIX_EPOCH + Duration::from_secs(used);
            file.set_times(fs::FileTimes::new().set_accessed(used).set_modified(used)).unwrap();
            let path = store.layers.shown.join(layer_file(&digest));
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

    #[test]
    fn gc_goes_by_use_among_names_and_unnamed_layers() {
        let temp = Temp::new("gc-order");
        let layers: Vec<_> = (1..=5).map(|n| temp.layer(&format!("layer {n}"), n * 10)).collect();
        let shared = temp.layer("shared", 1);
        // Layers 0 and 1 have names, which were used after and before layer 2.
        for (n, used) in [(0, 35), (1, 25)] {
            let name = format!("r.example/{n}:1");
            let record = NameRecord { layers: vec![layers[n].0.clone(), shared.0.clone()], ..record(&name, b"x") };
            temp.store().set_name(&record).unwrap();
            temp.store().touch_at(&name, SystemTime::UNIX_EPOCH + Duration::from_secs(used));
        }
        let there = || layers.iter().map(|(_, path)| path.exists()).collect::<Vec<_>>();
        let mut seen = vec![there()];
        while seen.last().unwrap().contains(&true) {
            let used = ImageStore::at(&temp.0).disk_usage().unwrap();
            let collected = temp.gc(Size::bytes(used.as_bytes() - 1)).unwrap();
            assert!(collected.freed > Size::bytes(0) && collected.images.len() <= 1);
            seen.push(there());
            assert_eq!(shared.1.exists(), seen.last().unwrap()[0], "while a name needs it");
        }
        let orders = [[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [1, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0; 5]];
        assert_eq!(seen, orders.map(|row| row.map(|n| n == 1).to_vec()));
    }

    /// As releases with another format would have them.
    #[test]
    fn layers_of_another_version_are_not_judged_and_go_with_their_names() {
        let temp = Temp::new("gc-versions");
        let (digest, own) = temp.layer("one", 1);
        let store = temp.store();
        let other = own.with_extension("9");
        let mut bytes = fs::read(&own).unwrap();
        let seal = bytes.windows(15).position(|it| it == b"cofferdam disk ").unwrap();
        bytes[seal + 15] = b'9';
        fs::write(&other, &bytes).unwrap();
        let disk = store.disks.shown.join("0.erofs");
        fs::write(&disk, &bytes).unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).unwrap();
        fs::set_permissions(&disk, fs::Permissions::from_mode(0o600)).unwrap();
        drop(store);
        temp.named("r.example/a:1", &digest);
        assert!(ImageStore::at(&temp.0).verify(Duration::from_secs(60)).unwrap().is_empty());
        temp.gc(Size::gib(1)).unwrap();
        assert!(own.exists() && other.exists() && disk.exists());
        assert_eq!(temp.gc(Size::bytes(0)).unwrap().images.len(), 1);
        assert!(!own.exists() && !other.exists() && !disk.exists());
        // Our own format with a seal that does not hold is damage.
        let (_, own) = temp.layer("two", 1);
        fs::write(&own, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(ImageStore::at(&temp.0).verify(Duration::from_secs(60)).unwrap(), [own]);
    }
}
