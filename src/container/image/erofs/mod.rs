//! Writes a tree as an EROFS file system (Linux, Documentation/filesystems/erofs; fs/erofs/erofs_fs.h).
//!
//! Content comes first, as it is read. When all is known, directories and inodes follow, and the superblock last. The same tree
//! from the same content gives the same bytes.

mod data;
mod layout;
#[cfg(any(test, feature = "internals"))]
pub(super) mod reader;

use super::tree::{FileLayout, InodeIndex, InodeKind, InodeTree, Metadata};
use crate::error::Result;
pub(super) use data::Disk;
use layout::{ImageLayout, InodeTail};

/// The only block size that is written.
pub(super) const BLOCK: u64 = 4096;
const BLOCK_BITS: u8 = 12;

/// Where the superblock is, and how it begins.
const SUPER_OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Features that old kernels may ignore: the checksum, and that inodes have a time of modification.
const COMPAT_SB_CHKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
/// A feature that a kernel must know: files in chunks.
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// Images are found by digest and need no unique identifier. The same content gives the same bytes.
const UUID: [u8; 16] = *b"cofferdam-image\0";

/// An inode in its long form, and the unit by which inodes are numbered.
const INODE: u64 = 64;
const SLOT: u64 = 32;
const SLOT_BITS: u8 = 5;
/// `i_format`: the long form, and how the content lies.
const EXTENDED: u16 = 1;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;
/// What stands before the attributes of an inode.
const XATTR_HEADER: u64 = 12;
/// In the map of chunks: a hole.
const NULL_ADDR: u32 = u32::MAX;
/// A directory's entry, before the names.
const DIRENT: usize = 12;

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// Writes everything but the content, which is on the disk already.
pub(super) fn finish(tree: &InodeTree, mut disk: Disk<'_>) -> Result<()> {
    let layout = ImageLayout::of(tree, &disk)?;
    disk.reserve_metadata(layout.bytes())?;
    let mut chunked = false;
    for (index, place) in layout.places() {
        if place.tail == InodeTail::Blocks {
            disk.budget().check()?;
            disk.pad(BLOCK)?;
            write_tail(tree, &layout, *index, &mut disk)?;
        }
    }
    disk.pad(BLOCK)?;
    let meta = disk.position();
    debug_assert_eq!(meta / BLOCK, u64::from(layout.meta_block()));
    for (n, (index, place)) in layout.places().iter().enumerate() {
        disk.budget().check()?;
        while disk.position() < meta + layout.offset(place.nid) {
            disk.pad(SLOT)?;
            // A gap is at most a block, and a multiple of slots.
            if disk.position() < meta + layout.offset(place.nid) {
                disk.append(&[0; SLOT as usize])?;
            }
        }
        let Some(inode) = tree.get(*index) else { continue };
        chunked |= matches!(&inode.kind, InodeKind::File(data) if matches!(data.layout, FileLayout::Chunks(_)));
        disk.append(&inode_bytes(n, &inode.kind, &inode.metadata, place))?;
        write_xattrs(&inode.metadata, &mut disk)?;
        if place.tail == InodeTail::Inline {
            write_tail(tree, &layout, *index, &mut disk)?;
        }
    }
    let incompat = if chunked { INCOMPAT_CHUNKED_FILE } else { 0 };
    let (root, inodes) = (layout.root(), layout.places().len() as u64);
    let meta_block = layout.meta_block();
    disk.finish(|blocks| superblock(root, inodes, blocks, meta_block, incompat))
}

fn superblock(root: u16, inodes: u64, blocks: u32, meta_block: u32, incompat: u32) -> Vec<u8> {
    let mut sb = Vec::from(MAGIC.to_le_bytes());
    sb.extend([0; 4]);
    sb.extend((COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
    sb.extend([BLOCK_BITS, 0]);
    sb.extend(root.to_le_bytes());
    sb.extend(inodes.to_le_bytes());
    // The time of building, which is not used.
    sb.extend([0; 12]);
    sb.extend(blocks.to_le_bytes());
    sb.extend(meta_block.to_le_bytes());
    // No attributes are shared.
    sb.extend([0; 4]);
    sb.extend(UUID);
    sb.extend([0; 16]);
    sb.extend(incompat.to_le_bytes());
    sb.resize(BLOCK as usize - SUPER_OFFSET, 0);
    let checksum = crc32c(&sb).to_le_bytes();
    sb.iter_mut().skip(4).zip(checksum).for_each(|(to, byte)| *to = byte);
    [vec![0; SUPER_OFFSET], sb].concat()
}

/// CRC-32C as the kernel has it: begun with ones, and not inverted at its end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// `struct erofs_inode_extended`.
fn inode_bytes(number: usize, kind: &InodeKind, metadata: &Metadata, place: &layout::InodeLayout) -> Vec<u8> {
    let flat = if place.tail == InodeTail::Inline { FLAT_INLINE } else { FLAT_PLAIN };
    let (format, kind_bits, union) = match kind {
        InodeKind::Directory(_) => (flat, S_IFDIR, place.block),
        InodeKind::Symlink(_) => (flat, S_IFLNK, place.block),
        InodeKind::File(data) => match &data.layout {
            FileLayout::Flat(block) => (FLAT_PLAIN, S_IFREG, *block),
            FileLayout::Chunks(chunks) => (CHUNK_BASED, S_IFREG, u32::from(chunks.bits)),
        },
        InodeKind::CharacterDevice(number) => (FLAT_PLAIN, S_IFCHR, *number),
        InodeKind::BlockDevice(number) => (FLAT_PLAIN, S_IFBLK, *number),
        InodeKind::Fifo | InodeKind::Gone => (FLAT_PLAIN, S_IFIFO, 0),
    };
    let mut bytes = Vec::with_capacity(INODE as usize);
    bytes.extend((EXTENDED | format << 1).to_le_bytes());
    bytes.extend(xattr_count(metadata).to_le_bytes());
    bytes.extend((kind_bits | metadata.mode & 0o7777).to_le_bytes());
    bytes.extend([0; 2]);
    bytes.extend(place.size.to_le_bytes());
    bytes.extend(union.to_le_bytes());
    bytes.extend(u32::try_from(number + 1).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend(metadata.uid.to_le_bytes());
    bytes.extend(metadata.gid.to_le_bytes());
    bytes.extend(metadata.mtime.to_le_bytes());
    bytes.extend(metadata.mtime_nsec.to_le_bytes());
    bytes.extend(place.nlink.to_le_bytes());
    bytes.resize(INODE as usize, 0);
    bytes
}

/// `i_xattr_icount`: of what the entries take, in units of four bytes, and one for the header.
fn xattr_count(metadata: &Metadata) -> u16 {
    match metadata.xattrs.len() {
        0 => 0,
        n => u16::try_from(n / 4 + 1).unwrap_or(u16::MAX),
    }
}

fn write_xattrs(metadata: &Metadata, disk: &mut Disk<'_>) -> Result<()> {
    if metadata.xattrs.is_empty() {
        return Ok(());
    }
    disk.append(&[0; XATTR_HEADER as usize])?;
    disk.append(&metadata.xattrs)
}

/// What stands behind an inode, or in blocks of its own: entries, a link's target, a map of chunks.
fn write_tail(tree: &InodeTree, layout: &ImageLayout, index: InodeIndex, disk: &mut Disk<'_>) -> Result<()> {
    match tree.get(index).map(|inode| &inode.kind) {
        Some(InodeKind::Directory(_)) => layout.write_directory(tree, index, &mut |bytes| disk.append(bytes)),
        Some(InodeKind::Symlink(target)) => disk.append(target),
        Some(InodeKind::File(data)) => {
            let FileLayout::Chunks(chunks) = &data.layout else { return Ok(()) };
            let count = data.size.div_ceil(BLOCK << chunks.bits);
            let mut present = chunks.present.iter().peekable();
            for number in 0..count {
                let here = present.next_if(|(chunk, _)| u64::from(*chunk) == number);
                disk.append(&here.map_or(NULL_ADDR, |(_, block)| *block).to_le_bytes())?;
            }
            Ok(())
        }
        _ => Ok(()),
    }
}
