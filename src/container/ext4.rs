//! Writes empty ext4 file systems, for containers to write to (Linux, Documentation/filesystems/ext4).
//!
//! They have no journal, as they do not outlive a crash. Only the first group and the group descriptors are written.
//! The descriptors mark the other groups' bitmaps as uninitialized, and the tables of inodes are zeroes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::size::Size;

const BLOCK: u32 = 4096;
const BLOCKS_PER_GROUP: u32 = 8 * BLOCK;
const GROUP: u64 = BLOCK as u64 * BLOCKS_PER_GROUP as u64;
/// More would need wider numbers in places.
const MAX_DISK: Size = Size::gib(512);

const INODE: u32 = 256;
/// One for each 16 KiB.
const INODES_PER_GROUP: u32 = 8192;
const TABLE_BLOCKS: u32 = INODES_PER_GROUP * INODE / BLOCK;
/// The bitmaps of blocks and of inodes, and the inodes, at the beginning of each group but the first.
const GROUP_BLOCKS: u32 = 2 + TABLE_BLOCKS;

const ROOT: u32 = 2;
/// The first that is not reserved; it is `lost+found`.
const FIRST: u32 = 11;

const MAGIC: u16 = 0xef53;
const SUPER_OFFSET: u64 = 1024;
const COMPAT: u32 = 0x8 | 0x20 | 0x200; // ext_attr, dir_index, sparse_super2
const INCOMPAT: u32 = 0x2 | 0x40 | 0x200; // filetype, extents, flex_bg
const RO_COMPAT: u32 = 0x2 | 0x8 | 0x10 | 0x20 | 0x40; // large_file, huge_file, gdt_csum, dir_nlink, extra_isize
/// Nothing on the host looks for file systems by it.
const UUID: [u8; 16] = *b"cofferdam-upper\0";

/// Of a group: its bitmap of inodes, and of blocks, is not there yet; its inodes are zeros.
const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;
const INODE_ZEROED: u16 = 4;

const S_IFDIR: u16 = 0o040_000;
const EXTENTS_FL: u32 = 0x8_0000;
const EXTENT_MAGIC: u16 = 0xf30a;
const FT_DIR: u8 = 2;

/// What is written for a disk of `size`: whole groups.
///
/// # Errors
/// `InvalidConfig` for nothing and for more than there is room to describe.
pub(super) fn whole_groups(size: Size) -> Result<Size> {
    if size.as_bytes() == 0 || size > MAX_DISK {
        return Err(Error::invalid("disk", format!("{size}: up to {MAX_DISK} are possible, and not nothing")));
    }
    Ok(Size::bytes(size.as_bytes().next_multiple_of(GROUP)))
}

/// Makes an empty file system of `size`, which is of whole groups, in an empty file.
pub(super) fn write_empty(file: &File, size: Size) -> io::Result<()> {
    file.set_len(size.as_bytes())?;
    let groups = u32::try_from(size.as_bytes() / GROUP).unwrap_or(u32::MAX);
    let disk = Ext4 { file, groups };
    disk.write_groups()?;
    disk.write_directories()?;
    file.write_all_at(&disk.superblock(), SUPER_OFFSET)
}

struct Ext4<'f> {
    file: &'f File,
    groups: u32,
}

impl Ext4<'_> {
    /// Blocks before the first group's bitmaps: the superblock, and what describes the groups.
    fn head(&self) -> u32 {
        1 + (self.groups * 32).div_ceil(BLOCK)
    }

    /// Blocks of the first group that are taken, with those of the two directories.
    fn first_used(&self) -> u32 {
        self.head() + GROUP_BLOCKS + 2
    }

    fn free_blocks(&self) -> u32 {
        BLOCKS_PER_GROUP - self.first_used() + (self.groups - 1) * (BLOCKS_PER_GROUP - GROUP_BLOCKS)
    }

    fn write_block(&self, block: u32, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, u64::from(block) * u64::from(BLOCK))
    }

    fn superblock(&self) -> Vec<u8> {
        let mut sb = FieldWriter(vec![0; 1024]);
        sb.u32(0x00, self.groups * INODES_PER_GROUP);
        sb.u32(0x04, self.groups * BLOCKS_PER_GROUP);
        sb.u32(0x0c, self.free_blocks());
        sb.u32(0x10, self.groups * INODES_PER_GROUP - FIRST);
        sb.u32(0x18, BLOCK.trailing_zeros() - 10);
        sb.u32(0x1c, BLOCK.trailing_zeros() - 10);
        sb.u32(0x20, BLOCKS_PER_GROUP);
        sb.u32(0x24, BLOCKS_PER_GROUP);
        sb.u32(0x28, INODES_PER_GROUP);
        // Never to be checked for its number of mounts; clean; errors are gone on after.
        sb.u16(0x36, u16::MAX);
        sb.u16(0x38, MAGIC);
        sb.u16(0x3a, 1);
        sb.u16(0x3c, 1);
        sb.u32(0x4c, 1);
        sb.u32(0x54, FIRST);
        sb.u16(0x58, INODE as u16);
        sb.u32(0x5c, COMPAT);
        sb.u32(0x60, INCOMPAT);
        sb.u32(0x64, RO_COMPAT);
        sb.bytes(0x68, &UUID);
        // Directories are hashed by half MD4, with signed bytes.
        sb.bytes(0xec, &UUID);
        sb.bytes(0xfc, &[1]);
        sb.u16(0x15c, 32);
        sb.u16(0x15e, 32);
        sb.u32(0x160, 1);
        sb.0
    }

    /// Describes all groups, and writes the bitmaps of the first and the last.
    fn write_groups(&self) -> io::Result<()> {
        let mut table = Vec::new();
        for group in 0..self.groups {
            let first = group == 0;
            let start = group * BLOCKS_PER_GROUP + if first { self.head() } else { 0 };
            let last = group + 1 == self.groups;
            let used = if first { self.first_used() } else { GROUP_BLOCKS };
            let used_inodes = if first { FIRST } else { 0 };
            let mut flags = INODE_ZEROED;
            if first {
                self.write_block(start + 1, &bitmap(used_inodes, INODES_PER_GROUP))?;
            } else {
                flags |= INODE_UNINIT;
            }
            // Kernels want that of the last group, which may be a part of one.
            if first || last {
                self.write_block(start, &bitmap(used, BLOCKS_PER_GROUP))?;
            } else {
                flags |= BLOCK_UNINIT;
            }
            let mut descriptor = FieldWriter(vec![0; 32]);
            descriptor.u32(0x00, start);
            descriptor.u32(0x04, start + 1);
            descriptor.u32(0x08, start + 2);
            descriptor.u16(0x0c, (BLOCKS_PER_GROUP - used) as u16);
            descriptor.u16(0x0e, (INODES_PER_GROUP - used_inodes) as u16);
            descriptor.u16(0x10, if first { 2 } else { 0 });
            descriptor.u16(0x12, flags);
            descriptor.u16(0x1c, (INODES_PER_GROUP - used_inodes) as u16);
            let checked = [&UUID[..], &group.to_le_bytes(), descriptor.0.get(..0x1e).unwrap_or_default()].concat();
            descriptor.u16(0x1e, crc16(&checked));
            table.extend(descriptor.0);
        }
        self.write_block(1, &table)
    }

    /// The root, and `lost+found` in it, which checkers want.
    fn write_directories(&self) -> io::Result<()> {
        let blocks = self.first_used() - 2;
        let entry = |inode: u32, len: u16, name: &[u8]| {
            let mut bytes = Vec::from(inode.to_le_bytes());
            bytes.extend(len.to_le_bytes());
            bytes.extend([name.len() as u8, FT_DIR]);
            bytes.extend(name);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let rest = BLOCK as u16 - 12;
        let root = [entry(ROOT, 12, b"."), entry(ROOT, 12, b".."), entry(FIRST, rest - 12, b"lost+found")].concat();
        self.write_block(blocks, &root)?;
        self.write_block(blocks + 1, &[entry(FIRST, 12, b"."), entry(ROOT, rest, b"..")].concat())?;
        self.write_inode(ROOT, 0o755, 3, blocks)?;
        self.write_inode(FIRST, 0o700, 2, blocks + 1)
    }

    fn write_inode(&self, number: u32, mode: u16, links: u16, block: u32) -> io::Result<()> {
        let mut inode = FieldWriter(vec![0; INODE as usize]);
        inode.u16(0x00, S_IFDIR | mode);
        inode.u32(0x04, BLOCK);
        inode.u16(0x1a, links);
        // In units of 512 bytes.
        inode.u32(0x1c, BLOCK / 512);
        inode.u32(0x20, EXTENTS_FL);
        // One extent of one block, where there is room for four.
        inode.u16(0x28, EXTENT_MAGIC);
        inode.u16(0x2a, 1);
        inode.u16(0x2c, 4);
        inode.u16(0x38, 1);
        inode.u32(0x3c, block);
        inode.u16(0x80, 32);
        let table = u64::from(self.head() + 2) * u64::from(BLOCK);
        self.file.write_all_at(&inode.0, table + u64::from(number - 1) * u64::from(INODE))
    }
}

/// A structure of little-endian fields.
struct FieldWriter(Vec<u8>);

impl FieldWriter {
    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        self.0.iter_mut().skip(at).zip(bytes).for_each(|(to, byte)| *to = *byte);
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }
}

/// A block with the first `used` bits set, and those beyond `of`.
fn bitmap(used: u32, of: u32) -> Vec<u8> {
    let bit = |n: u32| u8::from(n < used || n >= of) << (n % 8);
    (0..BLOCK).map(|byte| (byte * 8..byte * 8 + 8).fold(0, |bits, n| bits | bit(n))).collect()
}

/// CRC-16 as the kernel has it (lib/crc16.c), begun with ones.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(u16::MAX, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xa001 } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn empty_disks_have_the_size_asked_for_and_nearly_none_on_the_host() {
        for (asked, size) in [(Size::gib(4), 4 << 30), (Size::mib(1), 128 << 20), (Size::gib(512), 512 << 30)] {
            let disk = crate::sys::temp_file(&std::env::temp_dir()).unwrap();
            write_empty(&disk, whole_groups(asked).unwrap()).unwrap();
            let metadata = disk.metadata().unwrap();
            assert!(metadata.len() == size && metadata.blocks() * 512 < 1 << 20, "{metadata:?}");
            let path = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
            let output = std::process::Command::new("/sbin/e2fsck").arg("-fn").arg(path).output();
            let output = output.expect("e2fsprogs: run `make setup`");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        }
        assert_eq!(whole_groups(Size::bytes(0)).unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert_eq!(whole_groups(Size::gib(1 << 30)).unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}
