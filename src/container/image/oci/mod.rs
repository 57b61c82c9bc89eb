//! Images of the Open Container Initiative (image-spec 1.1): digests, descriptors and their sources.
//!
//! A source gives bytes. Whatever it gives is checked here before it is believed.

mod descriptor;
mod digest;
mod source;

pub(super) use descriptor::Descriptor;
pub use digest::Digest;
pub(super) use digest::{Hasher, Verified};
pub(super) use source::{ImageSource, LayerObserver};
pub use source::{LayerPhase, LayerProgress};
