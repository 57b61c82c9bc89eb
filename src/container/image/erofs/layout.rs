//! [`ImageLayout`]: the place of every inode and directory, decided before any is written.

use std::collections::VecDeque;

use super::{BLOCK, DIRENT, Disk, INODE, SLOT, SLOT_BITS, XATTR_HEADER};
use crate::container::image::tree::{Directory, FileLayout, InodeIndex, InodeKind, InodeTree, ROOT};
use crate::error::{Error, ErrorKind, Result};

/// How much of a disk one number of an inode can reach.
const MAX_NID: u64 = u32::MAX as u64;

/// Where what belongs to an inode lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InodeTail {
    /// Behind the inode.
    Inline,
    /// In blocks of its own.
    Blocks,
    /// There is none.
    None,
}

/// Where an inode goes, and what only the whole tree tells of it.
#[derive(Debug)]
pub(super) struct InodeLayout {
    pub nid: u32,
    pub tail: InodeTail,
    /// The first of its own blocks.
    pub block: u32,
    pub size: u64,
    pub nlink: u32,
}

pub(super) struct ImageLayout {
    /// In the order in which they are written.
    places: Vec<(InodeIndex, InodeLayout)>,
    /// The numbers of inodes on the disk, by those in the tree. 0: none yet; no inode has it.
    nids: Vec<u32>,
    meta_block: u32,
    bytes: u64,
}

/// The sizes of what is written in one area after the other.
struct Cursor {
    blocks: u64,
    meta: u64,
}

impl ImageLayout {
    /// Directories before what is in them, and all of one directory together.
    ///
    /// # Errors
    /// `Unsupported` beyond what the format can number.
    pub(super) fn of(tree: &InodeTree, disk: &Disk<'_>) -> Result<Self> {
        let start = u64::from(disk.block()?);
        let mut layout = Self { places: Vec::new(), nids: vec![0; tree.len()], meta_block: 0, bytes: 0 };
        // No inode has the number 0, which some programs take for none.
        let mut cursor = Cursor { blocks: start, meta: INODE };
        layout.place(tree, ROOT, &mut cursor)?;
        let mut waiting = VecDeque::from([ROOT]);
        while let Some(index) = waiting.pop_front() {
            for child in tree.directory(index)?.children.values() {
                if layout.nid(*child) == 0 {
                    disk.budget().check()?;
                    layout.place(tree, *child, &mut cursor)?;
                    if matches!(tree.get(*child).map(|inode| &inode.kind), Some(InodeKind::Directory(_))) {
                        waiting.push_back(*child);
                    }
                }
            }
        }
        layout.meta_block = u32::try_from(cursor.blocks).map_err(|_| too_large())?;
        layout.bytes = (cursor.blocks - start) * BLOCK + cursor.meta;
        Ok(layout)
    }

    fn place(&mut self, tree: &InodeTree, index: InodeIndex, cursor: &mut Cursor) -> Result<()> {
        let inode = tree.get(index).ok_or_else(too_large)?;
        let head = match inode.metadata.xattrs.len() as u64 {
            0 => INODE,
            n => INODE + XATTR_HEADER + n,
        };
        let (size, mut tail, len, nlink) = match &inode.kind {
            InodeKind::Directory(directory) => {
                let size = directory_size(directory);
                let subdirectories = directory.children.values().filter(|child| {
                    matches!(tree.get(**child).map(|inode| &inode.kind), Some(InodeKind::Directory(_)))
                });
                let nlink = u32::try_from(subdirectories.count()).unwrap_or(u32::MAX).saturating_add(2);
                (size, InodeTail::Inline, size, nlink)
            }
            InodeKind::Symlink(target) => (target.len() as u64, InodeTail::Inline, target.len() as u64, inode.nlink),
            InodeKind::File(data) => match &data.layout {
                FileLayout::Flat(_) => (data.size, InodeTail::None, 0, inode.nlink),
                FileLayout::Chunks(chunks) => {
                    let map = 4 * data.size.div_ceil(BLOCK << chunks.bits);
                    (data.size, InodeTail::Inline, map, inode.nlink)
                }
            },
            _ => (0, InodeTail::None, 0, inode.nlink),
        };
        // What is inline must be in the inode's own block, but for a map of chunks.
        let is_file = matches!(inode.kind, InodeKind::File(_));
        if !is_file && tail == InodeTail::Inline && head + len > BLOCK {
            tail = InodeTail::Blocks;
        }
        let mut block = 0;
        let mut room = head;
        match tail {
            InodeTail::Inline => {
                room += len;
                let left = BLOCK - cursor.meta % BLOCK;
                if !is_file && room > left {
                    cursor.meta += left;
                }
            }
            InodeTail::Blocks => {
                block = u32::try_from(cursor.blocks).map_err(|_| too_large())?;
                cursor.blocks += len.div_ceil(BLOCK);
            }
            InodeTail::None => {}
        }
        let nid = cursor.meta >> SLOT_BITS;
        if nid > MAX_NID {
            return Err(too_large());
        }
        cursor.meta = (cursor.meta + room).next_multiple_of(SLOT);
        let nid = nid as u32;
        if let Some(slot) = usize::try_from(index).ok().and_then(|n| self.nids.get_mut(n)) {
            *slot = nid;
        }
        self.places.push((index, InodeLayout { nid, tail, block, size, nlink }));
        Ok(())
    }

    fn nid(&self, index: InodeIndex) -> u32 {
        usize::try_from(index).ok().and_then(|n| self.nids.get(n)).copied().unwrap_or(0)
    }

    pub(super) fn places(&self) -> &[(InodeIndex, InodeLayout)] {
        &self.places
    }

    /// Where an inode lies from the first block of inodes.
    pub(super) fn offset(&self, nid: u32) -> u64 {
        u64::from(nid) << SLOT_BITS
    }

    /// The first block of inodes.
    pub(super) fn meta_block(&self) -> u32 {
        self.meta_block
    }

    /// What all of it takes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The root is the first, so its number is small.
    pub(super) fn root(&self) -> u16 {
        u16::try_from(self.nid(ROOT)).unwrap_or(0)
    }

    /// Gives all blocks of a directory: of each the entries, and then their names. The last one ends with its last name.
    pub(super) fn write_directory(
        &self,
        tree: &InodeTree,
        index: InodeIndex,
        to: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let directory = tree.directory(index)?;
        let mut block: Vec<(&[u8], InodeIndex)> = Vec::new();
        let mut used = 0;
        for entry in entries(directory, index) {
            let size = DIRENT + entry.0.len();
            if used + size > BLOCK as usize {
                let mut bytes = self.directory_block(tree, &block);
                bytes.resize(BLOCK as usize, 0);
                to(&bytes)?;
                block.clear();
                used = 0;
            }
            used += size;
            block.push(entry);
        }
        to(&self.directory_block(tree, &block))
    }

    fn directory_block(&self, tree: &InodeTree, entries: &[(&[u8], InodeIndex)]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(BLOCK as usize);
        let mut name_offset = entries.len() * DIRENT;
        for (name, index) in entries {
            let kind = match tree.get(*index).map(|inode| &inode.kind) {
                Some(InodeKind::File(_)) => 1,
                Some(InodeKind::Directory(_)) => 2,
                Some(InodeKind::CharacterDevice(_)) => 3,
                Some(InodeKind::BlockDevice(_)) => 4,
                Some(InodeKind::Symlink(_)) => 7,
                _ => 5,
            };
            bytes.extend(u64::from(self.nid(*index)).to_le_bytes());
            bytes.extend((name_offset as u16).to_le_bytes());
            bytes.extend([kind, 0]);
            name_offset += name.len();
        }
        entries.iter().for_each(|(name, _)| bytes.extend_from_slice(name));
        bytes
    }
}

/// All entries in the order of their bytes, `.` and `..` among them.
fn entries(directory: &Directory, index: InodeIndex) -> impl Iterator<Item = (&[u8], InodeIndex)> {
    let dots: [(&[u8], InodeIndex); 2] = [(b".", index), (b"..", directory.parent)];
    let mut dots = dots.into_iter().peekable();
    let mut children = directory.children.iter().map(|(name, child)| (&**name, *child)).peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some((dot, _)), Some((name, _))) if name < dot => children.next(),
        (Some(_), _) => dots.next(),
        _ => children.next(),
    })
}

/// What the entries take: whole blocks, but for the last.
fn directory_size(directory: &Directory) -> u64 {
    let (mut full, mut used) = (0, 0);
    for (name, _) in entries(directory, ROOT) {
        let size = (DIRENT + name.len()) as u64;
        if used + size > BLOCK {
            full += 1;
            used = 0;
        }
        used += size;
    }
    full * BLOCK + used
}

fn too_large() -> Error {
    Error::new(ErrorKind::Unsupported, "the image has more entries than EROFS can number")
}
