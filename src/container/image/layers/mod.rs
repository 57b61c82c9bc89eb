//! Layers in the store: each is unpacked once, however many images have it.

use super::budget::PrepareDeadline;
use super::limits::ImageLimits;
use super::oci::{ImageSource, LayerObserver, Resolved};
use super::store::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::size::Size;

/// What one layer, and a whole image, may take.
#[derive(Debug, Clone)]
pub(super) struct Allowed {
    pub limits: ImageLimits,
    /// Of the disk.
    pub max_size: Size,
}

/// Unpacks all layers of an image that the store has not, at most three at once. Blocks until all are there.
///
/// # Errors
/// What `source` fails with. `Corrupt` names the layer that is damaged or not what its digests say.
pub(super) fn prepare_layers(
    _store: &Store,
    _source: &dyn ImageSource,
    _image: &Resolved,
    _allowed: &Allowed,
    _deadline: &PrepareDeadline,
    _observer: &LayerObserver<'_>,
) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, "images in layers"))
}
