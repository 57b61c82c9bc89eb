//! [`DockerArchive`]: what `docker save` wrote before it wrote OCI layouts (moby, image/spec/v1.2.md).

use std::collections::BTreeMap;
use std::io::Read;

use serde::Deserialize;

use super::{ImageFiles, LocalImages, Named, choose};
use crate::container::image::budget::{Budget, PrepareDeadline};
use crate::container::image::oci::{
    Descriptor, Digest, ImageSource, Layer, MAX_DOCUMENT, MAX_LAYERS, Platform, Resolved, json, resolve_config,
};
use crate::error::{Context, Error, ErrorKind, Result};

/// Images that one archive may have.
const MAX_IMAGES: usize = 1000;
/// The annotation of a layer that names its file, as no digest does.
const FILE: &str = "file";

/// An open archive.
pub(super) struct DockerArchive {
    files: ImageFiles,
    images: Vec<Named<SavedImage>>,
}

/// One image of `manifest.json`: the names of its files.
struct SavedImage {
    config: String,
    layers: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

/// What an error is about.
fn doing() -> &'static str {
    "manifest.json"
}

impl DockerArchive {
    /// # Errors
    /// `Corrupt` for a damaged manifest; `NotFound` for one that names a configuration which is not there. `Unsupported` for one of
    /// too many images.
    pub(super) fn open(files: ImageFiles, budget: &Budget) -> Result<Self> {
        let deadline = budget.deadline();
        let entries: Vec<Entry> = json(&files.read(b"manifest.json", MAX_DOCUMENT, deadline)?).doing(doing)?;
        if entries.len() > MAX_IMAGES {
            let what = format!("an archive of {} images: at most {MAX_IMAGES} are possible", entries.len());
            return Err(Error::new(ErrorKind::Unsupported, what).doing(doing()));
        }
        let (mut images, mut digests) = (Vec::new(), BTreeMap::<String, Digest>::new());
        for Entry { config, repo_tags, layers } in entries {
            // Each is read once, and none is kept.
            let digest = match digests.get(&config) {
                Some(digest) => digest.clone(),
                None => Digest::sha256(&files.read(config.as_bytes(), MAX_DOCUMENT, deadline).doing(doing)?),
            };
            digests.insert(config.clone(), digest.clone());
            images.push(Named {
                names: repo_tags.unwrap_or_default(),
                digests: vec![digest],
                image: SavedImage { config, layers: layers.unwrap_or_default() },
            });
        }
        Ok(Self { files, images })
    }
}

impl ImageSource for DockerArchive {
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        let missing = || Error::new(ErrorKind::NotFound, format!("the archive has no layer {}", blob.digest));
        Ok(self.files.open(blob.annotations.get(FILE).ok_or_else(missing)?.as_bytes(), deadline)?.0)
    }
}

impl LocalImages for DockerArchive {
    /// Layers have only the digests of their unpacked bytes here.
    fn find(&self, select: Option<&str>, platform: &Platform, deadline: &PrepareDeadline) -> Result<Resolved> {
        let SavedImage { config, layers } = choose(&self.images, select)?;
        if layers.len() > MAX_LAYERS {
            let what = format!("an image of {} layers: at most {MAX_LAYERS} are possible", layers.len());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let config = self.files.read(config.as_bytes(), MAX_DOCUMENT, deadline).doing(doing)?;
        let (image, diff_ids) = resolve_config(&config, layers.len(), Some(platform))?;
        let layer = |(diff_id, name): (Digest, &String)| {
            let size = self.files.open(name.as_bytes(), deadline).doing(doing)?.1;
            let mut blob = Descriptor::of(diff_id.clone(), size);
            blob.annotations.insert(FILE.to_owned(), name.clone());
            Ok(Layer { blob, diff_id })
        };
        let layers = diff_ids.into_iter().zip(layers).map(layer).collect::<Result<_>>()?;
        Ok(Resolved::without_manifest(config, image, layers))
    }
}
