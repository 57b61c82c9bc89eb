//! For fuzzing and tests only: layers in memory, and their disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::compose::PlacedLayers;
use super::file::{LayerFile, trailer};
use super::{Allowed, unpack};
use crate::container::image::budget::{Budget, PrepareDeadline};
use crate::container::image::erofs::BLOCK;
use crate::container::image::oci::{Descriptor, Digest, ImageSource, Layer};
use crate::container::image::seal;
use crate::error::{Error, ErrorKind, Result};
use crate::sys;
use crate::vm::disk::DiskPiece;

/// Blobs in memory.
#[derive(Debug, Default)]
pub(in super::super) struct Blobs(pub BTreeMap<Digest, Vec<u8>>);

impl Blobs {
    /// Adds a layer that is not compressed.
    pub(in super::super) fn add_layer(&mut self, tar: &[u8]) -> Layer {
        let digest = Digest::sha256(tar);
        self.0.insert(digest.clone(), tar.to_vec());
        Layer { blob: Descriptor::of(digest.clone(), tar.len() as u64), diff_id: digest }
    }
}

impl ImageSource for Blobs {
    fn open(&self, blob: &Descriptor, _: &PrepareDeadline) -> Result<Box<dyn Read + Send + '_>> {
        let missing = || Error::new(ErrorKind::NotFound, "no such blob");
        Ok(Box::new(&**self.0.get(&blob.digest).ok_or_else(missing)?))
    }
}

/// A layer's file, unpacked of an archive, without a seal.
pub(in super::super) fn unpacked(tar: &[u8], allowed: &Allowed, deadline: &PrepareDeadline) -> Result<File> {
    let mut blobs = Blobs::default();
    let layer = blobs.add_layer(tar);
    let file = sys::temp_file(&std::env::temp_dir())?;
    let budget = Budget::new(&allowed.limits, allowed.max_size, deadline);
    let scratch = || Ok(sys::temp_file(&std::env::temp_dir())?);
    unpack::unpack(&blobs, &layer, &file, &scratch, &budget, deadline, &|_| {})?;
    Ok(file)
}

/// The disk of these layers, the lowest first, in one file.
pub(in super::super) fn composed(layers: &[Vec<u8>], allowed: &Allowed, deadline: &PrepareDeadline) -> Result<File> {
    let diff_ids: Vec<Digest> = layers.iter().map(|tar| Digest::sha256(tar)).collect();
    let mut tars = layers.iter().zip(&diff_ids);
    let placed = PlacedLayers::place(&diff_ids, |diff_id| {
        let (tar, _) = tars.find(|(_, it)| *it == diff_id).ok_or_else(|| Error::new(ErrorKind::NotFound, "a layer"))?;
        let file = unpacked(tar, allowed, deadline)?;
        let len = file.metadata()?.len();
        LayerFile::of_len(Arc::new(file), len)
    })?;
    whole(placed, allowed, deadline)
}

/// The disk of one layer, whose file is of these bytes or has a log of them.
pub(in super::super) fn of_layer_file(data: &[u8], allowed: &Allowed, deadline: &PrepareDeadline) -> Result<File> {
    let file = sys::temp_file(&std::env::temp_dir())?;
    let len = match data {
        [first, blocks, removals, log @ ..] if first % 8 != 0 => {
            let start = u64::from(*blocks) * BLOCK;
            file.write_all_at(log, start)?;
            let removals = (usize::from(*removals) * 4).min(log.len());
            let (len, trailer) = trailer(u32::from(*blocks), log.len() as u64, removals as u64);
            file.write_all_at(&trailer, start + len - trailer.len() as u64)?;
            start + len
        }
        _ => {
            file.write_all_at(data, 0)?;
            data.len() as u64
        }
    };
    let mut file = Some(LayerFile::of_len(Arc::new(file), len)?);
    let open = |_: &Digest| file.take().ok_or_else(|| Error::new(ErrorKind::NotFound, "a layer"));
    whole(PlacedLayers::place(&[Digest::sha256(data)], open)?, allowed, deadline)
}

fn whole(placed: PlacedLayers, allowed: &Allowed, deadline: &PrepareDeadline) -> Result<File> {
    let metadata = sys::temp_file(&std::env::temp_dir())?;
    placed.write_metadata(&metadata, allowed, deadline)?;
    metadata.set_len(metadata.metadata()?.len() + seal::LEN)?;
    joined(&placed.pieces(metadata)?)
}

/// Copies the pieces of a disk into one file.
pub(in super::super) fn joined(pieces: &[DiskPiece<Arc<File>>]) -> Result<File> {
    let file = sys::temp_file(&std::env::temp_dir())?;
    let mut at = 0;
    for piece in pieces {
        let mut from = piece.offset;
        while let Some(data) = sys::next_data(&piece.file, from)?.filter(|data| *data < piece.offset + piece.len) {
            let end = sys::next_hole(&piece.file, data)?.unwrap_or(u64::MAX).min(piece.offset + piece.len);
            let mut bytes = vec![0; usize::try_from(end - data).unwrap_or(0).min(1 << 20)];
            piece.file.read_exact_at(&mut bytes, data)?;
            file.write_all_at(&bytes, at + (data - piece.offset))?;
            from = data + bytes.len() as u64;
        }
        at += piece.len;
    }
    file.set_len(at)?;
    Ok(file)
}
