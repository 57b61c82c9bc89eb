//! Writes empty ext4 file systems, for containers to write to (Linux, Documentation/filesystems/ext4).
//!
//! One that is gone with its container has no journal. One that is kept has a journal, and copies of its superblock, so
//! that it survives crashes and can grow. Of the groups only the first is written, beside these copies. The group descriptors mark
//! the other groups' bitmaps as uninitialized, and the tables of inodes are zeroes.

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
const COMPAT: u32 = 0x8 | 0x20; // ext_attr, dir_index
const HAS_JOURNAL: u32 = 0x4;
/// Copies of the superblock are where the superblock says: nowhere. Such a file system cannot grow while it is mounted.
const SPARSE_SUPER2: u32 = 0x200;
const INCOMPAT: u32 = 0x2 | 0x40 | 0x200; // filetype, extents, flex_bg
const RO_COMPAT: u32 = 0x2 | 0x8 | 0x10 | 0x20 | 0x40; // large_file, huge_file, gdt_csum, dir_nlink, extra_isize
/// Copies of the superblock are in groups 1 and the powers of 3, 5 and 7.
const SPARSE_SUPER: u32 = 0x1;
/// The journal is to be replayed before anything is read.
const NEEDS_RECOVERY: u32 = 0x4;
/// Of a file system that is gone with its container. Nothing on the host looks for file systems by it.
const UUID: [u8; 16] = *b"cofferdam-upper\0";

/// Of a group: its bitmap of inodes, and of blocks, is not there yet; its inodes are zeros.
const INODE_UNINIT: u16 = 1;
const BLOCK_UNINIT: u16 = 2;
const INODE_ZEROED: u16 = 4;

const S_IFDIR: u16 = 0o040_000;
const S_IFREG: u16 = 0o100_000;
/// The inode of the journal.
const JOURNAL: u32 = 8;
/// The first word of a journal's blocks, and the kind of its superblock (Linux, include/linux/jbd2.h).
const JOURNAL_MAGIC: u32 = 0xc03b_3998;
const JOURNAL_SUPERBLOCK: u32 = 4;
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

/// Makes an empty file system of `size`, which is of whole groups, in an empty file. It does not outlive a crash.
pub(super) fn write_empty(file: &File, size: Size) -> io::Result<()> {
    Ext4 { file, groups: groups(size), journal: 0, uuid: UUID }.write(size)
}

/// Makes the same with a journal. `uuid` names it.
pub(super) fn write_lasting(file: &File, size: Size, uuid: [u8; 16]) -> io::Result<()> {
    // As large as mke2fs(8) makes it, up to 64 MiB.
    let journal = match size {
        size if size < Size::mib(512) => 1024,
        size if size < Size::gib(4) => 4096,
        _ => 16384,
    };
    Ext4 { file, groups: groups(size), journal, uuid }.write(size)
}

/// What the superblock of a file system that is kept says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uuid: [u8; 16],
    /// Not unmounted, so that the journal is to be replayed by a writer.
    pub(super) needs_recovery: bool,
    /// In bytes.
    pub(super) size: u64,
}

/// Reads the superblock, which a guest may have written; `None` where there is no ext4.
pub(super) fn identify(file: &File) -> io::Result<Option<Identity>> {
    let mut sb = [0; 1024];
    match file.read_exact_at(&mut sb, SUPER_OFFSET) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let field = |at: usize| sb.get(at..).and_then(<[u8]>::first_chunk).map(|bytes| u32::from_le_bytes(*bytes));
    let uuid = sb.get(0x68..).and_then(<[u8]>::first_chunk::<16>);
    let (Some(magic), Some(incompat), Some(uuid)) = (field(0x38), field(0x60), uuid) else { return Ok(None) };
    let known = (magic & 0xffff) as u16 == MAGIC;
    let size = u64::from(field(0x04).unwrap_or_default()) * u64::from(BLOCK);
    Ok(known.then_some(Identity { uuid: *uuid, needs_recovery: incompat & NEEDS_RECOVERY != 0, size }))
}

/// Of a size of whole groups.
fn groups(size: Size) -> u32 {
    u32::try_from(size.as_bytes() / GROUP).unwrap_or(u32::MAX)
}

struct Ext4<'f> {
    file: &'f File,
    groups: u32,
    /// Blocks of the journal; 0 for none.
    journal: u32,
    uuid: [u8; 16],
}

impl Ext4<'_> {
    fn write(&self, size: Size) -> io::Result<()> {
        self.file.set_len(size.as_bytes())?;
        self.write_groups()?;
        self.write_directories()?;
        self.write_journal()?;
        for group in (1..self.groups).filter(|group| self.has_copy(*group)) {
            self.write_block(group * BLOCKS_PER_GROUP, &self.superblock(group))?;
        }
        self.file.write_all_at(&self.superblock(0), SUPER_OFFSET)
    }

    fn is_lasting(&self) -> bool {
        self.journal != 0
    }

    /// Whether the superblock and the group descriptors are at the beginning of this group.
    fn has_copy(&self, group: u32) -> bool {
        let power = |of: u32| {
            let mut n = of;
            while n < group {
                n *= of;
            }
            n == group
        };
        group == 0 || self.is_lasting() && (group == 1 || power(3) || power(5) || power(7))
    }

    /// Blocks before the bitmaps of this group: the superblock, and what describes the groups.
    fn head(&self, group: u32) -> u32 {
        if self.has_copy(group) { 1 + (self.groups * 32).div_ceil(BLOCK) } else { 0 }
    }

    /// Blocks of this group that are taken. In the first, those of the two directories and the journal are among them.
    fn used(&self, group: u32) -> u32 {
        self.head(group) + GROUP_BLOCKS + if group == 0 { 2 + self.journal } else { 0 }
    }

    /// The first directory's block.
    fn directories(&self) -> u32 {
        self.head(0) + GROUP_BLOCKS
    }

    fn free_blocks(&self) -> u32 {
        (0..self.groups).map(|group| BLOCKS_PER_GROUP - self.used(group)).sum()
    }

    fn write_block(&self, block: u32, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, u64::from(block) * u64::from(BLOCK))
    }

    /// The superblock, as it is in this group.
    fn superblock(&self, group: u32) -> Vec<u8> {
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
        sb.u16(0x5a, group as u16);
        sb.u32(0x5c, COMPAT | if self.is_lasting() { HAS_JOURNAL } else { SPARSE_SUPER2 });
        sb.u32(0x60, INCOMPAT);
        sb.u32(0x64, RO_COMPAT | if self.is_lasting() { SPARSE_SUPER } else { 0 });
        sb.bytes(0x68, &self.uuid);
        if self.is_lasting() {
            sb.u32(0xe0, JOURNAL);
        }
        // Directories are hashed by half MD4, with signed bytes.
        sb.bytes(0xec, &self.uuid);
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
            let start = group * BLOCKS_PER_GROUP + self.head(group);
            let last = group + 1 == self.groups;
            let used = self.used(group);
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
            let checked = [&self.uuid[..], &group.to_le_bytes(), descriptor.0.get(..0x1e).unwrap_or_default()].concat();
            descriptor.u16(0x1e, crc16(&checked));
            table.extend(descriptor.0);
        }
        for group in (0..self.groups).filter(|group| self.has_copy(*group)) {
            self.write_block(group * BLOCKS_PER_GROUP + 1, &table)?;
        }
        Ok(())
    }

    /// An empty journal (Linux, Documentation/filesystems/ext4/journal.rst), whose fields are big-endian.
    fn write_journal(&self) -> io::Result<()> {
        if !self.is_lasting() {
            return Ok(());
        }
        let start = self.directories() + 2;
        let mut sb = FieldWriter(vec![0; 1024]);
        for (at, value) in [
            (0x00, JOURNAL_MAGIC),
            (0x04, JOURNAL_SUPERBLOCK),
            (0x0c, BLOCK),
            (0x10, self.journal),
            // The first block of the log, and its first transaction; where the log begins is 0, as nothing is in it.
            (0x14, 1),
            (0x18, 1),
            // Users of it.
            (0x40, 1),
        ] {
            sb.bytes(at, &value.to_be_bytes());
        }
        sb.bytes(0x30, &self.uuid);
        self.write_block(start, &sb.0)?;
        self.write_inode(JOURNAL, S_IFREG | 0o600, 1, start, self.journal)
    }

    /// The root, and `lost+found` in it, which checkers want.
    fn write_directories(&self) -> io::Result<()> {
        let blocks = self.directories();
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
        self.write_inode(ROOT, S_IFDIR | 0o755, 3, blocks, 1)?;
        self.write_inode(FIRST, S_IFDIR | 0o700, 2, blocks + 1, 1)
    }

    /// Of a file in `blocks` blocks, from `start` on.
    fn write_inode(&self, number: u32, mode: u16, links: u16, start: u32, blocks: u32) -> io::Result<()> {
        let mut inode = FieldWriter(vec![0; INODE as usize]);
        inode.u16(0x00, mode);
        inode.u32(0x04, blocks * BLOCK);
        inode.u16(0x1a, links);
        // In units of 512 bytes.
        inode.u32(0x1c, blocks * (BLOCK / 512));
        inode.u32(0x20, EXTENTS_FL);
        // One extent, where there is room for four.
        inode.u16(0x28, EXTENT_MAGIC);
        inode.u16(0x2a, 1);
        inode.u16(0x2c, 4);
        inode.u16(0x38, blocks as u16);
        inode.u32(0x3c, start);
        inode.u16(0x80, 32);
        let table = u64::from(self.head(0) + 2) * u64::from(BLOCK);
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

    /// Fails where `e2fsck` finds anything.
    fn check(disk: &File) {
        let path = format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd());
        let output = std::process::Command::new("/sbin/e2fsck").arg("-fn").arg(path).output();
        let output = output.expect("e2fsprogs: run `make setup`");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    #[test]
    fn empty_disks_have_the_size_asked_for_and_nearly_none_on_the_host() {
        for (asked, size) in [(Size::gib(4), 4 << 30), (Size::mib(1), 128 << 20), (Size::gib(512), 512 << 30)] {
            let disk = crate::sys::temp_file(&std::env::temp_dir()).unwrap();
            write_empty(&disk, whole_groups(asked).unwrap()).unwrap();
            let metadata = disk.metadata().unwrap();
            assert!(metadata.len() == size && metadata.blocks() * 512 < 1 << 20, "{metadata:?}");
            check(&disk);
        }
        assert_eq!(whole_groups(Size::bytes(0)).unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert_eq!(whole_groups(Size::gib(1 << 30)).unwrap_err().kind(), ErrorKind::InvalidConfig);
    }

    #[test]
    fn lasting_disks_have_a_journal_and_copies_of_their_superblock() {
        let uuid = *b"sixteen bytes of";
        for size in [Size::mib(128), Size::mib(512), Size::gib(4), Size::gib(64), Size::gib(512)] {
            let disk = crate::sys::temp_file(&std::env::temp_dir()).unwrap();
            write_lasting(&disk, whole_groups(size).unwrap(), uuid).unwrap();
            assert!(disk.metadata().unwrap().blocks() * 512 < 4 << 20, "{size}");
            assert_eq!(identify(&disk).unwrap(), Some(Identity { uuid, needs_recovery: false, size: size.as_bytes() }));
            check(&disk);
        }
    }

    #[test]
    fn what_is_no_ext4_has_no_identity() {
        let disk = crate::sys::temp_file(&std::env::temp_dir()).unwrap();
        assert_eq!(identify(&disk).unwrap(), None);
        disk.set_len(1 << 20).unwrap();
        assert_eq!(identify(&disk).unwrap(), None);
    }
}
