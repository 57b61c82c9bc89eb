//! Images of the Open Container Initiative (image-spec 1.1): digests, descriptors and their sources.
//!
//! A source gives bytes. Whatever it gives is checked here before it is believed.

mod config;
mod descriptor;
mod digest;
mod manifest;
mod platform;
mod reference;
mod resolve;
mod source;

pub use config::{Healthcheck, ImageConfig};
pub(super) use descriptor::Descriptor;
pub use digest::Digest;
pub(super) use digest::{Hasher, Verified};
#[cfg(feature = "registry")]
pub(super) use manifest::accepted;
pub(super) use manifest::{IndexEntry, MAX_DOCUMENT, MAX_LAYERS, Manifest, json};
pub use platform::Platform;
pub use reference::Reference;
#[cfg(any(test, feature = "internals"))]
pub(crate) use reference::fuzz as fuzz_reference;
#[cfg(feature = "signatures")]
pub(super) use resolve::read_document;
pub(super) use resolve::{Layer, Resolved, for_platform, from_reader, resolve, resolve_config};
pub(super) use source::{ImageSource, LayerObserver};
pub use source::{LayerPhase, LayerProgress};
