//! [`Layout`]: an OCI image layout (image-spec, image-layout.md), which new `docker save` archives are too.

use std::io::Read;

use serde::Deserialize;

use super::{ImageFiles, LocalImages, Named, choose};
use crate::container::image::budget::{Budget, PrepareDeadline};
use crate::container::image::oci::{self, Descriptor, ImageSource, MAX_DOCUMENT, Manifest, Platform, Resolved, json};
use crate::error::{Context, Error, ErrorKind, Result};

/// Annotations that name an image: that of the specification, and that of containerd, which is whole.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

/// An open layout.
pub(super) struct Layout {
    files: ImageFiles,
    images: Vec<Named<Descriptor>>,
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
            let shown: String = version.image_layout_version.chars().take(50).collect();
            return Err(Error::new(ErrorKind::Unsupported, format!("an OCI image layout of version {shown:?}")));
        }
        let index = Manifest::parse(&read("index.json")?, "").doing(|| "index.json")?;
        let Manifest::Index(entries) = index else {
            return Err(Error::new(ErrorKind::Corrupt, "index.json is no index"));
        };
        let mut images: Vec<Named<Descriptor>> = Vec::new();
        for entry in entries {
            let names = NAMES.iter().filter_map(|name| entry.descriptor.annotations.get(*name)).cloned();
            // One image may have several names.
            match images.iter_mut().find(|image| image.image.digest == entry.descriptor.digest) {
                Some(known) => known.names.extend(names),
                None => images.push(Named {
                    names: names.collect(),
                    digests: vec![entry.descriptor.digest.clone()],
                    image: entry.descriptor,
                }),
            }
        }
        Ok(Self { files, images })
    }
}

impl ImageSource for Layout {
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        let path = format!("blobs/{}/{}", blob.digest.algorithm(), blob.digest.hex());
        Ok(self.files.open(path.as_bytes(), deadline)?.0)
    }
}

impl LocalImages for Layout {
    fn find(&self, select: Option<&str>, platform: &Platform, deadline: &PrepareDeadline) -> Result<Resolved> {
        oci::resolve(self, choose(&self.images, select)?, platform, deadline)
    }
}
