//! Composes the disk of an image of its layers. The file system's metadata is written, and points into the layers' files.
//!
//! The disk begins with block 0 of the metadata's file. The content of each layer follows, and then the rest of that file. It is one
//! disk for the guest, and its parts are shared: a layer is in the host's page cache once, whatever images have it.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use super::Allowed;
use super::file::LayerFile;
use super::log::{LayerChange, LogReader};
use crate::container::image::budget::{Budget, PrepareDeadline};
use crate::container::image::erofs::{self, BLOCK, Disk};
use crate::container::image::oci::Digest;
use crate::container::image::path::{EntryPath, shown};
use crate::container::image::seal;
use crate::container::image::tree::{EntrySink, FileLayout, InodeKind, InodeTree, OwnDirectories};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::vm::disk::DiskPiece;

/// A layer in its place on the disk.
pub(super) struct PlacedLayer {
    pub diff_id: Digest,
    pub file: LayerFile,
    /// Where its content begins on the disk.
    pub first_block: u32,
}

/// The layers of an image, each once for its content, and in their order for what they change.
pub(super) struct PlacedLayers {
    layers: Vec<PlacedLayer>,
    order: Vec<usize>,
    /// Of all layers' content.
    blocks: u32,
}

impl PlacedLayers {
    /// Places layers, the lowest first. A layer that an image has twice has its content once.
    ///
    /// # Errors
    /// `Unsupported` for more content than the format can number.
    pub(super) fn place(diff_ids: &[Digest], mut open: impl FnMut(&Digest) -> Result<LayerFile>) -> Result<Self> {
        let (mut layers, mut order, mut next) = (Vec::<PlacedLayer>::new(), Vec::new(), 1u32);
        for diff_id in diff_ids {
            let known = layers.iter().position(|layer| layer.diff_id == *diff_id);
            order.push(known.unwrap_or(layers.len()));
            if known.is_none() {
                let file = open(diff_id)?;
                let first_block = next;
                next = next.checked_add(file.blocks()).ok_or_else(too_large)?;
                layers.push(PlacedLayer { diff_id: diff_id.clone(), file, first_block });
            }
        }
        Ok(Self { layers, order, blocks: next - 1 })
    }

    /// Writes the metadata of all layers, one upon the other.
    ///
    /// # Errors
    /// `Corrupt` and `Unsupported` name layer and entry; `InvalidConfig` beyond a limit.
    pub(super) fn write_metadata(&self, to: &File, allowed: &Allowed, deadline: &PrepareDeadline) -> Result<()> {
        let budget = Budget::new(&allowed.limits, allowed.max_size, deadline);
        let mut tree = InodeTree::new();
        for (n, layer) in self.order.iter().enumerate() {
            let Some(layer) = self.layers.get(*layer) else { continue };
            layer.replay(&mut tree, &budget).doing(|| format!("layer {n}, {}", layer.diff_id))?;
        }
        erofs::finish(&tree, Disk::behind(to, &budget, u64::from(self.blocks) * BLOCK)?)
    }

    /// The pieces of the disk whose metadata is in this sealed file.
    pub(super) fn pieces(self, metadata: File) -> Result<Vec<DiskPiece<Arc<File>>>> {
        let len = metadata.metadata()?.len().saturating_sub(seal::LEN);
        let metadata = Arc::new(metadata);
        let mut pieces = vec![DiskPiece { file: metadata.clone(), offset: 0, len: BLOCK }];
        for layer in self.layers.into_iter().filter(|layer| layer.file.blocks() > 0) {
            let len = u64::from(layer.file.blocks()) * BLOCK;
            pieces.push(DiskPiece { file: layer.file.into_file(), offset: 0, len });
        }
        pieces.push(DiskPiece { file: metadata, offset: BLOCK, len: len.saturating_sub(BLOCK) });
        Ok(pieces)
    }
}

impl PlacedLayer {
    /// Changes the tree as this layer does.
    fn replay(&self, tree: &mut InodeTree, budget: &Budget) -> Result<()> {
        if self.file.has_removals() {
            let mut own = OwnDirectories::default();
            each(self.file.entries(), budget, |path, change| {
                if matches!(change, LayerChange::Directory(_)) {
                    own.insert(path);
                }
                Ok(())
            })?;
            each(self.file.removals(), budget, |path, change| {
                budget.entry()?;
                match change {
                    LayerChange::Remove => tree.remove_lower(path, &own),
                    LayerChange::Clear => tree.clear_lower(path, &own),
                    _ => Err(Error::new(ErrorKind::Corrupt, "its log is damaged")),
                }
            })?;
        }
        each(self.file.entries(), budget, |path, change| {
            budget.entry()?;
            match change {
                LayerChange::Directory(metadata) => {
                    budget.xattrs(metadata.xattrs.len())?;
                    tree.add_directory(path, metadata, budget)
                }
                LayerChange::Inode(kind, metadata) => {
                    budget.xattrs(metadata.xattrs.len())?;
                    tree.put(path, self.placed(kind, budget)?, metadata, budget)
                }
                LayerChange::Link(target) => tree.put_link(path, &target, budget),
                LayerChange::Remove | LayerChange::Clear => Err(Error::new(ErrorKind::Corrupt, "its log is damaged")),
            }
        })
    }

    /// The same with content where it lies on the disk.
    fn placed(&self, mut kind: InodeKind, budget: &Budget) -> Result<InodeKind> {
        match &mut kind {
            InodeKind::File(data) => {
                budget.file_size(data.size)?;
                let place = |block: &mut u32| -> Result<()> {
                    *block = block.checked_add(self.first_block).ok_or_else(too_large)?;
                    Ok(())
                };
                match &mut data.layout {
                    FileLayout::Flat(block) => place(block)?,
                    FileLayout::Chunks(chunks) => {
                        chunks.present.iter_mut().try_for_each(|(_, block)| place(block))?;
                    }
                }
            }
            InodeKind::Symlink(target) => budget.names(target.len())?,
            _ => {}
        }
        Ok(kind)
    }
}

/// Calls `f` with every entry. An error names the path.
fn each(
    mut log: LogReader<impl Read>,
    budget: &Budget,
    mut f: impl FnMut(&EntryPath, LayerChange) -> Result<()>,
) -> Result<()> {
    while let Some((path, change)) = log.next()? {
        budget.check()?;
        f(&path, change).doing(|| format!("entry {}", shown(path.as_bytes())))?;
    }
    Ok(())
}

fn too_large() -> Error {
    Error::new(ErrorKind::Unsupported, "the image needs more than 16 TiB of addresses, which EROFS has not")
}
