//! [`ImageSource`]: where manifests, configurations and layers come from.

use std::io::Read;

use super::{Descriptor, Digest};
use crate::container::image::budget::PrepareDeadline;
use crate::error::Result;

/// A layout, an archive or a registry. Nothing that it gives is trusted.
pub(in super::super) trait ImageSource: Send + Sync {
    /// Opens a blob at its beginning: an index, a manifest, a configuration or a layer, as it is stored or sent.
    ///
    /// Reading may block for as long as `deadline` allows, and gives up then.
    ///
    /// # Errors
    /// `NotFound` when the source has none of that digest.
    fn open(&self, blob: &Descriptor, deadline: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>>;

    /// Returns where blobs come from: callers with the same layer wait for each other where this is the same.
    fn origin(&self) -> &str {
        ""
    }

    /// Asks the servers that sent a blob no more, as its bytes are wrong. Returns whether there is another one to ask.
    fn distrust(&self, _blob: &Descriptor) -> bool {
        false
    }
}

/// Where one layer of an image stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerProgress {
    /// Which layer it is, counted from 0, the lowest.
    pub layer: usize,
    /// How many layers the image has.
    pub layers: usize,
    /// Of the layer as it is stored or sent.
    pub digest: Digest,
    /// Bytes that arrived, as they are sent.
    pub received: u64,
    /// Bytes that it has in all, as they are sent.
    pub size: u64,
    /// What is done with it.
    pub phase: LayerPhase,
}

/// What is done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerPhase {
    /// It is in the store already.
    Present,
    /// Its bytes are read, and unpacked as they come.
    Reading,
    /// It is checked and in the store.
    Done,
}

/// Receives progress, on any thread.
pub(in super::super) type LayerObserver<'a> = dyn Fn(&LayerProgress) + Send + Sync + 'a;
