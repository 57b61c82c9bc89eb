//! [`ComposedDisk`]: the disk of layers that was composed last, which clones of an image share.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::oci::{ImageConfig, Platform};
use super::store::{FileIdentity, unless_locked};
use super::{Image, ImageDisk, ImageKind, PreparedImage};
use crate::sys::Beneath;
use crate::vm::disk::DiskPiece;

/// Keeps a disk open, so that the next container of the image need neither read its documents nor open each layer.
#[derive(Debug, Clone, Default)]
pub(super) struct ComposedDisk(Arc<Mutex<Option<Composed>>>);

#[derive(Debug)]
struct Composed {
    of: LayersKey,
    image: ComposedImage,
}

/// An image in layers that was prepared.
#[derive(Debug, Clone, Default)]
pub(super) struct ComposedImage {
    pub(super) pieces: Vec<DiskPiece<Arc<File>>>,
    pub(super) config: ImageConfig,
    /// Of its layers. In hexadecimal digits.
    pub(super) digest: String,
}

impl From<ComposedImage> for PreparedImage {
    fn from(ComposedImage { pieces, config, digest }: ComposedImage) -> Self {
        Self { disk: ImageDisk::Pieces(pieces), config, digest }
    }
}

/// What an image in layers was made of. While it is the same, so is the disk: what it names has digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayersKey {
    store: Option<PathBuf>,
    select: Option<String>,
    platform: Platform,
    /// The archive, or the two files by which a directory is a layout. Empty for a pulled image: its record does not change.
    files: Vec<FileIdentity>,
}

impl LayersKey {
    /// Returns none where identities of files cannot show a change.
    pub(super) fn of(image: &Image) -> Option<Self> {
        let files = match image.kind {
            ImageKind::Pulled(_) => Vec::new(),
            ImageKind::Archive => vec![identity(&fs::metadata(&image.path).ok()?)?],
            ImageKind::Directory => {
                let root = Beneath::open(&image.path).ok()?;
                // They may be links or devices, so neither is opened for reading.
                let look = |name| identity(&root.open_at(Path::new(name), libc::O_PATH).ok()?.metadata().ok()?);
                vec![look("oci-layout")?, look("index.json")?]
            }
        };
        let (store, select, platform) = (image.cache.clone(), image.select.clone(), image.platform.clone());
        Some(Self { store, select, platform, files })
    }
}

fn identity(metadata: &fs::Metadata) -> Option<FileIdentity> {
    metadata.is_file().then(|| FileIdentity::of_metadata(metadata))
}

impl ComposedDisk {
    /// Returns it, if it is of this.
    pub(super) fn get(&self, of: &LayersKey) -> Option<PreparedImage> {
        let last = unless_locked(&self.0)?;
        let last = last.as_ref().filter(|last| last.of == *of)?;
        Some(last.image.clone().into())
    }

    pub(super) fn set(&self, of: LayersKey, image: ComposedImage) {
        if let Some(mut last) = unless_locked(&self.0) {
            *last = Some(Composed { of, image });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_kept_while_what_it_is_of_is_the_same() {
        let dir = std::env::temp_dir().join(format!("cofferdam-composed-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let image = Image::open(&dir).unwrap();
        assert_eq!(LayersKey::of(&image), None, "a directory that is no layout");
        fs::write(dir.join("index.json"), "{}").unwrap();
        std::os::unix::fs::symlink("/dev/null", dir.join("oci-layout")).unwrap();
        assert_eq!(LayersKey::of(&image), None, "no link is followed, and no device opened");
        fs::remove_file(dir.join("oci-layout")).unwrap();
        fs::write(dir.join("oci-layout"), "{}").unwrap();
        let key = || LayersKey::of(&image).unwrap();
        let (disk, first) = (ComposedDisk::default(), key());
        assert!(disk.get(&first).is_none());
        disk.set(first.clone(), ComposedImage::default());
        assert!(disk.clone().get(&key()).is_some(), "clones share it");
        for other in
            [image.clone().select("a"), image.clone().cache_dir("b"), image.clone().platform("c/d".parse().unwrap())]
        {
            assert!(disk.get(&LayersKey::of(&other).unwrap()).is_none());
        }
        fs::write(dir.join("index.json"), "{ }").unwrap();
        assert_ne!(key(), first);
        // A child of fork may find it locked.
        let held = disk.0.lock().unwrap();
        assert!(disk.clone().get(&first).is_none());
        drop(held);
        fs::remove_dir_all(dir).unwrap();
    }
}
