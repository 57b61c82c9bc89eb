//! [`PulledImage`]: an image that is in the store, found by its digest.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};

use super::budget::PrepareDeadline;
use super::local::LocalImages;
use super::oci::{Descriptor, ImageSource, Platform, Resolved, resolve};
use super::store::{NameRecord, Store};
use crate::error::{Error, ErrorKind, Result};

/// Gives documents of the store. Layers that are not there are not got again.
pub(super) struct PulledImage {
    store: Store,
    record: NameRecord,
}

impl PulledImage {
    pub(super) fn new(store: Store, record: NameRecord) -> Self {
        Self { store, record }
    }
}

impl ImageSource for PulledImage {
    fn open(&self, blob: &Descriptor, _: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        let gone = || {
            let what = format!("{} is not in the store: pull {} again", blob.digest, self.record.reference);
            Error::new(ErrorKind::NotFound, what)
        };
        Ok(Box::new(Cursor::new(self.store.blob(&blob.digest)?.ok_or_else(gone)?)))
    }
}

impl LocalImages for PulledImage {
    fn find(&self, _: Option<&str>, platform: &Platform, deadline: &PrepareDeadline) -> Result<Resolved> {
        // What the name stood for when it was pulled, whatever lies between it and the manifest.
        let digest = self.record.manifest.clone();
        let size = self.store.blob(&digest)?.map_or(0, |bytes| bytes.len() as u64);
        let manifest = Descriptor { media_type: String::new(), digest, size, annotations: BTreeMap::new() };
        resolve(self, &manifest, platform, deadline)
    }
}
