//! [`ImageStore`]: what is in the store, and what is taken out of it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::super::oci::{Digest, Reference};
use super::super::{Image, PrepareDeadline, seal};
use super::{NameRecord, Presence, Shelf, Store, name_of, private_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;

/// Files of one directory that are looked at.
const MAX_FILES: usize = 1_000_000;

/// What stays while the store is used: pulls take no longer by default.
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

    /// Removes a name. What it alone needs is removed by the next [`ImageStore::gc`].
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
    /// Layers and documents that no name needs are removed in any case. Pulled images with a pin stay, also beyond the limit. Disks of
    /// archives and directories are made anew when they are needed.
    ///
    /// While an image is pulled or prepared, by whatever process, nothing is removed that was used within the last hour.
    ///
    /// # Errors
    /// What reading its directories and removing files fails with.
    pub fn gc(&self, keep: Size) -> Result<Collected> {
        let store = Store::for_removal(self.dir.clone())?;
        let alone = Presence::alone(&store.disks)?;
        let age = if alone.is_some() { Duration::ZERO } else { WHILE_USED };
        let mut names = store.all_names()?;
        let mut files = store.files()?;
        let mut used: u64 = files.iter().map(|file| file.space).sum();
        let mut collected = Collected::default();
        // The next to go is last.
        names.sort_by_key(|(_, last_used)| std::cmp::Reverse(*last_used));
        // One of the future is old once no other uses the store.
        let is_old = |last_used: SystemTime| age.is_zero() || last_used.elapsed().is_ok_and(|idle| idle >= age);
        let old = |file: &StoreFile| is_old(file.last_used);
        loop {
            let needed: BTreeSet<String> = names.iter().flat_map(|(record, _)| needed_by(record)).collect();
            let (kept, gone): (Vec<_>, Vec<_>) =
                files.into_iter().partition(|file| file.is_disk || needed.contains(&file.key) || !old(file));
            files = kept;
            for file in &gone {
                used = used.saturating_sub(remove(file, &mut collected)?);
            }
            if used <= keep.as_bytes() {
                break;
            }
            let next = names.iter().rposition(|(record, last_used)| !record.pinned && is_old(*last_used));
            let disk = files.iter().enumerate().filter(|(_, file)| file.is_disk && old(file));
            let disk = disk.min_by_key(|(_, file)| file.last_used).map(|(n, file)| (n, file.last_used));
            match (next, disk) {
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
                (None, None) => break,
                (None, Some(_)) => {}
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
            for name in names_in(shelf)? {
                deadline.check()?;
                let Ok(file) = private_file(&shelf.directory, &name) else { continue };
                let sealed = !std::ptr::eq(shelf, &store.disks) || name.ends_with(".erofs");
                if sealed && !seal::holds(&file, &deadline)? {
                    damaged.push(shelf.shown.join(name));
                }
            }
        }
        for name in names_in(&store.blobs)? {
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
    is_disk: bool,
}

impl Store {
    fn files(&self) -> Result<Vec<StoreFile>> {
        let mut found = Vec::new();
        for (folder, shelf) in [("", &self.disks), ("layers/", &self.layers), ("blobs/", &self.blobs)] {
            for name in names_in(shelf)? {
                let path = shelf.path().join(&name);
                let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
                let is_disk = folder.is_empty();
                if !metadata.is_file() || is_disk && !name.ends_with(".erofs") {
                    continue;
                }
                let times = [metadata.accessed(), metadata.modified()];
                let last_used = times.into_iter().flatten().max().unwrap_or(SystemTime::UNIX_EPOCH);
                let (key, space) = (format!("{folder}{name}"), metadata.blocks().saturating_mul(512));
                found.push(StoreFile { path, key, space, last_used, is_disk });
            }
        }
        Ok(found)
    }
}

fn names_in(shelf: &Shelf) -> Result<Vec<String>> {
    let doing = || format!("reading {}", shelf.shown.display());
    let mut names = Vec::new();
    for entry in fs::read_dir(shelf.path()).doing(doing)?.take(MAX_FILES) {
        let entry = entry.doing(doing)?;
        if entry.file_type().is_ok_and(|it| it.is_file()) {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    Ok(names)
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
