//! A second implementation of the format, for tests and fuzzing. It reads everything of a disk back, and checks what it
//! meets.

#![allow(
    clippy::panic,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a disk that is not as it should be is the test's failure"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// What one path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub nid: u64,
    /// With the bits of its type.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub nlink: u32,
    pub size: u64,
    /// Of devices.
    pub rdev: u32,
    /// Of links the target; of files what is in them, as far as asked for.
    pub content: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// An open disk.
pub(crate) struct Reader<'f> {
    file: &'f File,
    meta: u64,
    root: u64,
    blocks: u64,
    inodes: u64,
}

struct RawInode {
    at: u64,
    bytes: [u8; 64],
}

impl RawInode {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    fn xattr_size(&self) -> u64 {
        match self.u16(2) {
            0 => 0,
            n => 12 + (u64::from(n) - 1) * 4,
        }
    }

    /// Behind the inode and its attributes.
    fn tail(&self) -> u64 {
        self.at + 64 + self.xattr_size()
    }
}

impl<'f> Reader<'f> {
    /// # Panics
    /// When it is no disk of this writer.
    pub(crate) fn open(file: &'f File) -> Self {
        let mut sb = [0; 128];
        file.read_exact_at(&mut sb, 1024).unwrap();
        let u32_at = |at: usize| u32::from_le_bytes(sb[at..at + 4].try_into().unwrap());
        assert_eq!(u32_at(0), 0xe0f5_e1e2, "the magic");
        assert_eq!(sb[12], 12, "the block size");
        assert_eq!(u32_at(80) & !4, 0, "features");
        let blocks = u64::from(u32_at(36));
        assert!(file.metadata().unwrap().len() >= blocks * 4096, "the disk is as long as it says");
        let root = u64::from(u16::from_le_bytes([sb[14], sb[15]]));
        Self { file, meta: u64::from(u32_at(40)) * 4096, root, blocks, inodes: u64::from(u32_at(16)) }
    }

    fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        assert!(at + len <= self.blocks * 4096, "{at} + {len} is beyond the disk");
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn inode(&self, nid: u64) -> RawInode {
        let at = self.meta + nid * 32;
        RawInode { at, bytes: self.bytes(at, 64).try_into().unwrap() }
    }

    /// At most `most` bytes of an inode's content from `offset` on.
    fn content(&self, inode: &RawInode, offset: u64, most: u64) -> Vec<u8> {
        let size = inode.u64(8);
        let end = size.min(offset.saturating_add(most));
        let mut content = Vec::new();
        let mut at = offset;
        while at < end {
            let (from, room) = match inode.u16(0) >> 1 {
                0 => (Some(u64::from(inode.u32(16)) * 4096 + at), end - at),
                2 => {
                    assert!(inode.tail() % 4096 + size <= 4096, "an inline tail crosses a block");
                    assert_eq!(inode.tail() / 4096, inode.at / 4096, "an inline tail is in its inode's block");
                    (Some(inode.tail() + at), end - at)
                }
                4 => {
                    let chunk = 4096u64 << (inode.u32(16) & 31);
                    let entry = self.bytes(inode.tail() + at / chunk * 4, 4);
                    let block = u32::from_le_bytes(entry.try_into().unwrap());
                    let here = (block != u32::MAX).then(|| u64::from(block) * 4096 + at % chunk);
                    (here, (end - at).min(chunk - at % chunk))
                }
                other => panic!("layout {other}"),
            };
            match from {
                Some(from) => content.extend(self.bytes(from, room)),
                None => content.resize(content.len() + room as usize, 0),
            }
            at += room;
        }
        content
    }

    fn xattrs(&self, inode: &RawInode) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut found = BTreeMap::new();
        if inode.xattr_size() == 0 {
            return found;
        }
        let bytes = self.bytes(inode.at + 64, inode.xattr_size());
        let mut at = 12;
        while at < bytes.len() {
            let (name_len, value_len) =
                (bytes[at] as usize, u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]) as usize);
            let prefix = match bytes[at + 1] {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                other => panic!("attributes of kind {other}"),
            };
            let name = [prefix.as_bytes(), &bytes[at + 4..at + 4 + name_len]].concat();
            let value = bytes[at + 4 + name_len..at + 4 + name_len + value_len].to_vec();
            assert!(found.insert(name, value).is_none());
            at += (4 + name_len + value_len).next_multiple_of(4);
        }
        found
    }

    fn node(&self, nid: u64, most: u64) -> Node {
        let inode = self.inode(nid);
        assert_eq!(inode.u16(0) & 1, 1, "a long inode");
        let mode = inode.u16(4);
        let (is_file, is_link) = (mode & 0o170_000 == 0o100_000, mode & 0o170_000 == 0o120_000);
        let is_device = matches!(mode & 0o170_000, 0o020_000 | 0o060_000);
        Node {
            nid,
            mode,
            uid: inode.u32(24),
            gid: inode.u32(28),
            mtime: (inode.u64(32) as i64, inode.u32(40)),
            nlink: inode.u32(44),
            size: inode.u64(8),
            rdev: if is_device { inode.u32(16) } else { 0 },
            content: if is_file || is_link { self.content(&inode, 0, most) } else { Vec::new() },
            xattrs: self.xattrs(&inode),
        }
    }

    /// The entries of a directory, with their numbers and types.
    fn entries(&self, inode: &RawInode) -> Vec<(Vec<u8>, u64, u8)> {
        let content = self.content(inode, 0, u64::MAX);
        let mut found: Vec<(Vec<u8>, u64, u8)> = Vec::new();
        for block in content.chunks(4096) {
            let offset = |n: usize| u16::from_le_bytes([block[12 * n + 8], block[12 * n + 9]]) as usize;
            let count = offset(0) / 12;
            for n in 0..count {
                let end = if n + 1 < count { offset(n + 1) } else { block.len() };
                let name = &block[offset(n)..end];
                let name = name.split(|b| *b == 0).next().unwrap().to_vec();
                assert!(found.last().is_none_or(|(last, ..)| *last < name), "entries are in order");
                found.push((
                    name,
                    u64::from_le_bytes(block[12 * n..12 * n + 8].try_into().unwrap()),
                    block[12 * n + 10],
                ));
            }
        }
        found
    }

    /// Everything by its path, the root as the empty one; of files at most `most` bytes.
    pub(crate) fn tree(&self, most: u64) -> BTreeMap<Vec<u8>, Node> {
        let mut found = BTreeMap::from([(Vec::new(), self.node(self.root, most))]);
        let mut waiting = vec![(Vec::new(), self.root, self.root)];
        let mut links: BTreeMap<u64, u32> = BTreeMap::new();
        let mut numbers = BTreeSet::from([self.root]);
        while let Some((path, nid, parent)) = waiting.pop() {
            for (name, child, kind) in self.entries(&self.inode(nid)) {
                match &*name {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        let path: Vec<u8> = if path.is_empty() { name } else { [&path[..], b"/", &name].concat() };
                        let node = self.node(child, most);
                        let expected = [0, 5, 3, 0, 2, 0, 4, 0, 1, 0, 7][usize::from(node.mode >> 12)];
                        assert_eq!(kind, expected, "the type in the directory");
                        numbers.insert(child);
                        if kind == 2 {
                            waiting.push((path.clone(), child, nid));
                            *links.entry(nid).or_insert(2) += 1;
                            links.entry(child).or_insert(2);
                        } else {
                            *links.entry(child).or_default() += 1;
                        }
                        found.insert(path, node);
                    }
                }
            }
        }
        found.values().for_each(|node| assert_eq!(node.nlink, *links.get(&node.nid).unwrap_or(&2), "{node:?}"));
        assert_eq!(numbers.len() as u64, self.inodes, "the number of inodes");
        found
    }

    /// Bytes of a file from `offset` on.
    #[cfg(test)]
    pub(crate) fn read(&self, nid: u64, offset: u64, len: u64) -> Vec<u8> {
        self.content(&self.inode(nid), offset, len)
    }
}
