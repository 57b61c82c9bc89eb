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

/// An open archive.
pub(super) struct DockerArchive {
    files: ImageFiles,
    images: Vec<Named<SavedImage>>,
    /// Files of layers, by the digests of what is unpacked of them.
    layers: BTreeMap<Digest, String>,
}

/// One image of `manifest.json`.
struct SavedImage {
    config: Vec<u8>,
    layers: Vec<(String, u64)>,
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

impl DockerArchive {
    /// # Errors
    /// `Corrupt` for a damaged manifest, or one that names what is not there.
    pub(super) fn open(files: ImageFiles, budget: &Budget) -> Result<Self> {
        let doing = || "manifest.json";
        let entries: Vec<Entry> = json(&files.read(b"manifest.json", MAX_DOCUMENT, budget.deadline())?).doing(doing)?;
        let (mut images, mut layers) = (Vec::new(), BTreeMap::new());
        for entry in entries {
            let config = files.read(entry.config.as_bytes(), MAX_DOCUMENT, budget.deadline()).doing(doing)?;
            let names = entry.layers.unwrap_or_default();
            if names.len() > MAX_LAYERS {
                let what = format!("an image of {} layers: at most {MAX_LAYERS} are possible", names.len());
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            let open = |name: String| {
                let len = files.open(name.as_bytes(), budget.deadline()).doing(doing)?.1;
                Ok((name, len))
            };
            let saved: Vec<(String, u64)> = names.into_iter().map(open).collect::<Result<_>>()?;
            let diff_ids = resolve_config(&config, saved.len(), None)?.1;
            layers.extend(diff_ids.into_iter().zip(saved.iter().map(|(name, _)| name.clone())));
            images.push(Named {
                names: entry.repo_tags.unwrap_or_default(),
                digests: vec![Digest::sha256(&config)],
                image: SavedImage { config, layers: saved },
            });
        }
        Ok(Self { files, images, layers })
    }
}

impl ImageSource for DockerArchive {
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        let missing = || Error::new(ErrorKind::NotFound, format!("the archive has no layer {}", blob.digest));
        Ok(self.files.open(self.layers.get(&blob.digest).ok_or_else(missing)?.as_bytes(), deadline)?.0)
    }
}

impl LocalImages for DockerArchive {
    /// Layers have no digests here but those of what is unpacked.
    fn find(&self, select: Option<&str>, platform: &Platform, _: &PrepareDeadline) -> Result<Resolved> {
        let SavedImage { config, layers } = choose(&self.images, select)?;
        let (image, diff_ids) = resolve_config(config, layers.len(), Some(platform))?;
        let layers = diff_ids
            .into_iter()
            .zip(layers)
            .map(|(diff_id, (_, size))| Layer { blob: Descriptor::of(diff_id.clone(), *size), diff_id });
        Ok(Resolved::without_manifest(config.clone(), image, layers.collect()))
    }
}
