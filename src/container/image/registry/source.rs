//! [`RegistrySource`]: a registry as a source of images.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::sync::{Mutex, PoisonError};

use super::blob::BlobReader;
use super::session::Session;
use crate::container::image::budget::PrepareDeadline;
use crate::container::image::oci::{Descriptor, Digest, ImageSource, Reference, accepted};
use crate::container::image::store::Store;
use crate::error::Result;

/// Documents that are kept in memory, at most 4 MiB each: an index, those between, and a manifest.
const MAX_KEPT: usize = 16;

/// Gives what a registry has of one repository. Documents that the store has are not asked for.
pub(super) struct RegistrySource<'a> {
    pub session: &'a Session,
    store: &'a Store,
    documents: Mutex<BTreeMap<Digest, Vec<u8>>>,
    origin: String,
}

impl<'a> RegistrySource<'a> {
    pub fn new(session: &'a Session, store: &'a Store) -> Self {
        Self { session, store, documents: Mutex::default(), origin: session.origin() }
    }

    /// Finds what a reference names now. This asks the registry, unless a digest is given whose document the store has.
    ///
    /// # Errors
    /// `NotFound` when there is no such image; what else asking fails with.
    pub fn root(&self, reference: &Reference, deadline: &PrepareDeadline) -> Result<Descriptor> {
        let described = |media_type, digest, bytes: &[u8]| Descriptor {
            media_type,
            digest,
            size: bytes.len() as u64,
            annotations: BTreeMap::new(),
        };
        if let Some(digest) = reference.digest() {
            if let Some(bytes) = self.store.blob(digest)? {
                return Ok(described(String::new(), digest.clone(), &bytes));
            }
            let document = self.session.manifest(&digest.to_string(), Some(digest), deadline)?;
            let root = described(document.media_type, digest.clone(), &document.bytes);
            self.keep(digest, document.bytes);
            return Ok(root);
        }
        let document = self.session.manifest(reference.tag().unwrap_or("latest"), None, deadline)?;
        // What the server says that the digest is does not count.
        let digest = Digest::sha256(&document.bytes);
        let root = described(document.media_type, digest.clone(), &document.bytes);
        self.keep(&digest, document.bytes);
        Ok(root)
    }

    fn keep(&self, digest: &Digest, bytes: Vec<u8>) {
        let mut documents = self.documents.lock().unwrap_or_else(PoisonError::into_inner);
        if documents.len() < MAX_KEPT {
            documents.insert(digest.clone(), bytes);
        }
    }

    /// A document that was read.
    pub fn kept(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.documents.lock().unwrap_or_else(PoisonError::into_inner).get(digest).cloned()
    }
}

impl ImageSource for RegistrySource<'_> {
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        if let Some(bytes) = self.kept(&blob.digest) {
            return Ok(Box::new(Cursor::new(bytes)));
        }
        if let Some(bytes) = self.store.blob(&blob.digest)? {
            return Ok(Box::new(Cursor::new(bytes)));
        }
        if accepted().any(|media_type| media_type == blob.media_type) {
            let document = self.session.manifest(&blob.digest.to_string(), Some(&blob.digest), deadline)?;
            self.keep(&blob.digest, document.bytes.clone());
            return Ok(Box::new(Cursor::new(document.bytes)));
        }
        Ok(Box::new(BlobReader::open(self.session, blob, deadline)?))
    }

    fn origin(&self) -> &str {
        &self.origin
    }

    fn distrust(&self, blob: &Descriptor) -> bool {
        self.session.servers_of(&blob.digest).distrust()
    }
}
