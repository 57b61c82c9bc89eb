//! [`Layout`]: an OCI image layout (image-spec, image-layout.md), which new `docker save` archives are too.

use std::collections::BTreeMap;
use std::io::Read;

use serde::Deserialize;

use super::{ImageFiles, LocalImages, Named, choose};
use crate::container::image::budget::{Budget, PrepareDeadline};
use crate::container::image::oci::{
    self, Descriptor, ImageSource, IndexEntry, MAX_DOCUMENT, Manifest, Platform, Resolved, json,
};
use crate::container::image::path::shown;
use crate::error::{Context, Error, ErrorKind, Result};

/// Annotations that name an image: that of the specification, and that of containerd, which is whole.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// An open layout.
pub(super) struct Layout {
    files: ImageFiles,
    /// Each for one platform or several, never for none.
    images: Vec<Named<Vec<IndexEntry>>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    image_layout_version: String,
}

impl Layout {
    /// # Errors
    /// `Unsupported` for a later version; `Corrupt` for a damaged index.
    pub(super) fn open(files: ImageFiles, budget: &Budget) -> Result<Self> {
        let read = |name: &str| files.read(name.as_bytes(), MAX_DOCUMENT, budget.deadline());
        let version: Version = json(&read("oci-layout")?).doing(|| "oci-layout")?;
        if version.image_layout_version.split('.').next() != Some("1") {
            let shown = shown(version.image_layout_version.as_bytes());
            return Err(Error::new(ErrorKind::Unsupported, format!("an OCI image layout of version {shown}")));
        }
        let index = Manifest::parse(&read("index.json")?, "").doing(|| "index.json")?;
        let Manifest::Index(entries) = index else {
            return Err(Error::new(ErrorKind::Corrupt, "index.json is no index"));
        };
        Ok(Self { files, images: grouped(entries) })
    }
}

/// The images of an index. Entries that name their platforms and have the same names, or none, are one image.
fn grouped(entries: Vec<IndexEntry>) -> Vec<Named<Vec<IndexEntry>>> {
    let (mut places, mut described) = (BTreeMap::new(), Vec::<(Vec<String>, IndexEntry)>::new());
    for entry in entries {
        let names = NAMES.iter().filter_map(|name| entry.descriptor.annotations.get(*name)).cloned();
        let place = *places.entry(entry.descriptor.digest.to_string()).or_insert(described.len());
        match described.get_mut(place) {
            // One image may have several names.
            Some((known, _)) => known.extend(names),
            None => described.push((names.collect(), entry)),
        }
    }
    let (mut places, mut images) = (BTreeMap::new(), Vec::<Named<Vec<IndexEntry>>>::new());
    for (names, entry) in described {
        let place = match entry.platform {
            Some(_) => *places.entry(names.clone()).or_insert(images.len()),
            None => images.len(),
        };
        let digest = entry.descriptor.digest.clone();
        match images.get_mut(place) {
            Some(known) => {
                known.digests.push(digest);
                known.image.push(entry);
            }
            None => images.push(Named { names, digests: vec![digest], image: vec![entry] }),
        }
    }
    images
}

impl ImageSource for Layout {
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        let path = format!("blobs/{}/{}", blob.digest.algorithm(), blob.digest.hex());
        Ok(self.files.open(path.as_bytes(), deadline)?.0)
    }
}

impl LocalImages for Layout {
    fn find(&self, select: Option<&str>, platform: &Platform, deadline: &PrepareDeadline) -> Result<Resolved> {
        let entries = choose(&self.images, select)?;
        let selected = entries.iter().find(|entry| select.is_some_and(|it| it == entry.descriptor.digest.to_string()));
        let entry = match (selected, entries.as_slice()) {
            (Some(entry), _) | (None, [entry]) => entry,
            _ => oci::for_platform(entries, platform)?,
        };
        if select.is_none() {
            // Several images without names, and not one for several platforms.
            let same = entries.iter().filter(|other| other.platform == entry.platform);
            let named =
                |it: &IndexEntry| Named { names: Vec::new(), digests: vec![it.descriptor.digest.clone()], image: () };
            choose(&same.map(named).collect::<Vec<_>>(), None)?;
        }
        oci::resolve(self, &entry.descriptor, platform, deadline)
    }
}
