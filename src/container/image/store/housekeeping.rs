//! [`ImageStore`]: what is in the store, and what is taken out of it.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use super::super::oci::{Digest, Reference};
use super::super::{Image, PrepareDeadline, seal};
use super::collect::{Collected, MAX_FILES, collect};
use super::{NameRecord, Presence, Shelf, Store, layer_file, private_file};
use crate::error::{Error, ErrorKind, Result};
use crate::size::Size;

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
            let size = record.layers.iter().map(|layer| space_of(&store.layers, &layer_file(layer))).sum();
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
    /// Space of a removed layer returns once no [`Image`](crate::Image) and no container has it open.
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
        collect(&store, keep, alone.is_none())
    }

    /// Reads all that is in the store, and returns the files that are damaged. They are made or pulled anew when they are needed.
    ///
    /// Disks and layers that other releases wrote in another format are not judged.
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
                if sealed && !seal::is_foreign(&file).unwrap_or(false) && !seal::holds(&file, &deadline)? {
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

fn space_of(shelf: &Shelf, name: &str) -> u64 {
    fs::symlink_metadata(shelf.path().join(name)).map_or(0, |it| it.blocks().saturating_mul(512))
}
