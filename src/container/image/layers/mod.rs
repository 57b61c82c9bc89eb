//! Layers in the store, and disks that are composed of them.
//!
//! Each layer is unpacked once, however many images have it. Its file has the content of its files as it lies on disks, and a log of
//! its entries.
//!
//! Layers have no file systems of their own: a removal, or a hard link to a file of a lower layer, needs the layers below. So does an
//! entry below a symbolic link of theirs. So the logs of an image's layers are replayed, one upon the other. The tree that comes out is written as the
//! metadata of one file system. It is small, and points into the layers' content.

mod compose;
mod file;
#[cfg(any(test, feature = "internals"))]
pub(super) mod fuzzing;
mod log;
mod spill;
mod unpack;

use std::fs::File;
use std::io::Seek;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::Digest as _;

use super::budget::{Budget, PrepareDeadline, SharedSpace};
use super::limits::ImageLimits;
use super::oci::{Digest, ImageSource, Layer, LayerObserver, LayerPhase, LayerProgress, Resolved};
use super::store::{Prepared, Store};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys;
use crate::vm::disk::DiskPiece;
use compose::PlacedLayers;
use file::LayerFile;

/// Layers that are unpacked at once, and the stack of each thread that does it.
const PARALLEL: usize = 3;
const STACK: usize = 512 << 10;
/// After how many bytes an observer is called again.
const OBSERVED: u64 = 256 << 10;

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
/// What `source` fails with. `InvalidConfig` for layers that together take more than `Image::max_size`.
/// `Corrupt` names the layer that is damaged or not what its digests say.
pub(super) fn prepare_layers(
    store: &Store,
    source: &dyn ImageSource,
    image: &Resolved,
    allowed: &Allowed,
    deadline: &PrepareDeadline,
    observer: &LayerObserver<'_>,
) -> Result<()> {
    let (space, returned) = (SharedSpace::new(allowed.max_size), AtomicBool::new(false));
    let work = Work { store, source, layers: &image.layers, allowed, space, returned, deadline, observer };
    loop {
        match work.prepare_all() {
            // Wrong bytes may have taken the space of other layers. Each round excludes a server of a layer, so rounds end.
            Err(error) if error.kind() == ErrorKind::InvalidConfig && work.returned.swap(false, Ordering::Relaxed) => {}
            outcome => return outcome,
        }
    }
}

/// Whether other bytes might have no such error. The digest is known at the end alone, so wrong bytes may fail in any way before.
fn is_of_content(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::InvalidConfig | ErrorKind::Unsupported)
}

struct Work<'a> {
    store: &'a Store,
    source: &'a dyn ImageSource,
    layers: &'a [Layer],
    allowed: &'a Allowed,
    /// Of all layers together.
    space: SharedSpace,
    /// Whether some of it was taken by bytes that were wrong.
    returned: AtomicBool,
    deadline: &'a PrepareDeadline,
    observer: &'a LayerObserver<'a>,
}

impl Work<'_> {
    /// All layers, each once.
    fn prepare_all(&self) -> Result<()> {
        let (next, failed, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
        let run = || {
            while !failed.load(Ordering::Relaxed) {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(layer) = self.layers.get(n) else { return };
                // The first of a digest does it for all.
                if self.layers.iter().take(n).any(|other| other.diff_id == layer.diff_id) {
                    self.report(n, layer, 0, LayerPhase::Present);
                    continue;
                }
                if let Err(error) = self.prepare(n, layer) {
                    failed.store(true, Ordering::Relaxed);
                    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..PARALLEL.min(self.layers.len()) {
                // With fewer threads it takes longer, and nothing else.
                if let Err(error) = sys::spawn_scoped(scope, "image layer".into(), STACK, run) {
                    ::log::debug!("starting a thread for a layer: {error}");
                }
            }
            run();
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn report(&self, n: usize, layer: &Layer, received: u64, phase: LayerPhase) {
        let (layers, digest, size) = (self.layers.len(), layer.blob.digest.clone(), layer.blob.size);
        (self.observer)(&LayerProgress { layer: n, layers, digest, received, size, phase });
    }

    fn prepare(&self, n: usize, layer: &Layer) -> Result<()> {
        let mut made = false;
        let what = Prepared::Layer { diff_id: &layer.diff_id, origin: self.source.origin() };
        let file = self.store.get_or_make(what, self.deadline, |to| {
            made = true;
            loop {
                let budget = Budget::sharing(&self.allowed.limits, self.space.clone(), self.deadline);
                let Err(error) = self.unpack(n, layer, to, &budget) else { return Ok(()) };
                budget.return_space();
                if !is_of_content(&error) || !self.source.distrust(&layer.blob) {
                    return Err(error);
                }
                ::log::warn!("layer {n}, {}, is asked of another server: {error}", layer.blob.digest);
                self.returned.store(true, Ordering::Relaxed);
                to.set_len(0).and_then(|()| (&*to).rewind()).doing(|| "emptying a file for a layer")?;
            }
        });
        file.doing(|| format!("layer {n}, {}", layer.blob.digest))?;
        let (received, phase) = if made { (layer.blob.size, LayerPhase::Done) } else { (0, LayerPhase::Present) };
        self.report(n, layer, received, phase);
        Ok(())
    }

    fn unpack(&self, n: usize, layer: &Layer, to: &File, budget: &Budget) -> Result<()> {
        self.report(n, layer, 0, LayerPhase::Reading);
        let told = Mutex::new(0);
        let observe = |received: u64| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            if received >= *told + OBSERVED || received == layer.blob.size {
                *told = received;
                self.report(n, layer, received, LayerPhase::Reading);
            }
        };
        unpack::unpack(self.source, layer, to, &|| self.store.scratch(), budget, self.deadline, &observe)
    }
}

/// The disk of an image whose layers are in the store. Its metadata is written where it is not there yet.
///
/// # Errors
/// `NotFound` names a layer that is not there. `Corrupt` and `Unsupported` name layer and entry. `InvalidConfig` beyond a limit.
pub(super) fn compose(
    store: &Store,
    diff_ids: &[Digest],
    allowed: &Allowed,
    deadline: &PrepareDeadline,
) -> Result<Vec<DiskPiece<Arc<File>>>> {
    let placed = PlacedLayers::place(diff_ids, |diff_id| {
        let file = store.layer(diff_id, deadline)?;
        let missing = || Error::new(ErrorKind::NotFound, format!("layer {diff_id} is not in the store"));
        LayerFile::open(file.ok_or_else(missing)?).doing(|| format!("layer {diff_id}"))
    })?;
    let mut key = super::begin().chain_update(b"layers\n");
    diff_ids.iter().for_each(|diff_id| key.update(format!("{diff_id}\n")));
    let key = super::hex(&key.finalize());
    let metadata =
        store.get_or_make(Prepared::Metadata(&key), deadline, |to| placed.write_metadata(to, allowed, deadline))?;
    placed.pieces(metadata)
}
