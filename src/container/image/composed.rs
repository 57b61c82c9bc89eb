//! [`ComposedDisk`]: the disk of layers that was composed last, which clones of an image share.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, TryLockError};

use super::oci::Digest;
use crate::error::Result;
use crate::vm::disk::DiskPiece;

type Pieces = Vec<DiskPiece<Arc<File>>>;

/// Keeps a disk open, so that the next container of the image need not open each layer.
#[derive(Debug, Clone, Default)]
pub(super) struct ComposedDisk(Arc<Mutex<Option<Composed>>>);

#[derive(Debug)]
struct Composed {
    store: Option<PathBuf>,
    diff_ids: Vec<Digest>,
    pieces: Pieces,
}

impl ComposedDisk {
    /// The disk of these layers in this store, which `compose` opens where it is not the last one.
    ///
    /// # Errors
    /// What `compose` fails with.
    pub(super) fn get_or(
        &self,
        store: Option<&Path>,
        diff_ids: &[Digest],
        compose: impl FnOnce() -> Result<Pieces>,
    ) -> Result<Pieces> {
        if let Some(pieces) = self.with(|last| {
            let last = last.as_ref().filter(|it| it.store.as_deref() == store && it.diff_ids == diff_ids);
            last.map(|it| it.pieces.clone())
        }) {
            return Ok(pieces);
        }
        let pieces = compose()?;
        let composed = Composed { store: store.map(Into::into), diff_ids: diff_ids.into(), pieces: pieces.clone() };
        self.with(|last| last.replace(composed));
        Ok(pieces)
    }

    /// Does nothing while another thread has it. In a child of fork that thread may not exist.
    fn with<T>(&self, what: impl FnOnce(&mut Option<Composed>) -> Option<T>) -> Option<T> {
        match self.0.try_lock() {
            Ok(mut last) => what(&mut last),
            Err(TryLockError::Poisoned(last)) => what(&mut last.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_composed_once_for_the_same_layers_and_store() {
        let (disk, mut composed) = (ComposedDisk::default(), 0);
        let (a, b) = (Digest::sha256(b"a"), Digest::sha256(b"b"));
        let (here, there) = (Some(Path::new("here")), Some(Path::new("there")));
        let mut ask = |store, diff_ids: &[Digest]| {
            let compose = || {
                composed += 1;
                Ok(Vec::new())
            };
            disk.clone().get_or(store, diff_ids, compose).unwrap();
            composed
        };
        assert_eq!([ask(here, &[a.clone()]), ask(here, &[a.clone()])], [1, 1]);
        assert_eq!([ask(there, &[a.clone()]), ask(None, &[a.clone()]), ask(None, &[a.clone()])], [2, 3, 3]);
        assert_eq!([ask(None, &[a.clone(), b.clone()]), ask(None, &[b, a])], [4, 5]);
        // A child of fork may find it locked.
        let _held = disk.0.lock().unwrap();
        assert!(disk.clone().get_or(None, &[], || Ok(Vec::new())).unwrap().is_empty());
    }
}
