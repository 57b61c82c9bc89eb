//! The log of a layer: its entries in their order, with where their content lies.
//!
//! All numbers are little-endian. An entry is its kind, its path, and what belongs to the kind. Whatever is read is checked as if
//! a stranger had written it.

use std::io::{self, Read};

use super::spill::{Scratch, Spill};
use crate::container::image::budget::Budget;
use crate::container::image::erofs::BLOCK;
use crate::container::image::path::{EntryPath, PATH_MAX, symlink_target};
use crate::container::image::tree::{Chunks, EntrySink, FileData, FileLayout, InodeKind, Metadata};
use crate::container::image::xattr::{self, Holder};
use crate::error::{Error, ErrorKind, Result};

/// How names of marks begin, and the mark of a directory that hides all below it (image-spec, layer.md, whiteouts).
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// How other marks of AUFS begin. They mean nothing here.
const AUFS: &[u8] = b".wh..wh.";

/// Chunks that one file may have, as the writer of disks makes them.
const MAX_CHUNKS: u64 = 1 << 20;
/// Attributes of one inode.
const MAX_XATTRS: u32 = 256 << 10;

const REMOVE: u8 = 1;
const CLEAR: u8 = 2;
const DIRECTORY: u8 = 3;
const FLAT_FILE: u8 = 4;
const CHUNKED_FILE: u8 = 5;
const SYMLINK: u8 = 6;
const CHARACTER_DEVICE: u8 = 7;
const BLOCK_DEVICE: u8 = 8;
const FIFO: u8 = 9;
const LINK: u8 = 10;

/// What an entry of a layer does.
#[derive(Debug)]
pub(super) enum LayerChange {
    /// Takes away what lower layers have of that path.
    Remove,
    /// Takes away what lower layers have in that directory.
    Clear,
    Directory(Metadata),
    /// Anything else, with the content of a file from the layer's first block on.
    Inode(InodeKind, Metadata),
    Link(EntryPath),
}

/// Collects the log of one layer. What takes away comes first, since it is meant for lower layers only.
pub(super) struct LayerLog<'a> {
    pub removals: Spill<'a>,
    pub entries: Spill<'a>,
}

impl<'a> LayerLog<'a> {
    /// Creates an empty log. `scratch` makes files for one that is large.
    pub(super) fn new(scratch: &'a Scratch<'a>) -> Self {
        Self { removals: Spill::new(scratch), entries: Spill::new(scratch) }
    }

    fn begin(&mut self, kind: u8, path: &EntryPath, budget: &Budget) -> Result<&mut Vec<u8>> {
        budget.names(path.as_bytes().len())?;
        let part = if matches!(kind, REMOVE | CLEAR) { &mut self.removals } else { &mut self.entries };
        let to = part.buffer()?;
        to.push(kind);
        put_bytes(to, path.as_bytes());
        Ok(to)
    }

    /// Takes a mark, if the path is one.
    fn mark(&mut self, path: &EntryPath, budget: &Budget) -> Result<bool> {
        let bytes = path.as_bytes();
        let mut parts = bytes.rsplitn(2, |byte| *byte == b'/');
        let (name, above) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let mut parts = above.split(|byte| *byte == b'/');
        if parts.clone().any(|part| part.starts_with(AUFS)) {
            return Ok(true);
        }
        if parts.any(|part| part.starts_with(WHITEOUT)) {
            return Err(corrupt("it lies in a mark for something that was removed"));
        }
        if name == OPAQUE {
            self.begin(CLEAR, &EntryPath::parse(above)?, budget)?;
            return Ok(true);
        }
        if name.starts_with(AUFS) {
            return Ok(true);
        }
        let Some(removed) = name.strip_prefix(WHITEOUT) else { return Ok(false) };
        if matches!(removed, b"" | b"." | b"..") {
            return Err(corrupt("it marks nothing that could be removed"));
        }
        self.begin(REMOVE, &EntryPath::parse(&[above, b"/", removed].concat())?, budget)?;
        Ok(true)
    }
}

impl EntrySink for LayerLog<'_> {
    fn add_directory(&mut self, path: &EntryPath, metadata: Metadata, budget: &Budget) -> Result<()> {
        if !self.mark(path, budget)? {
            put_metadata(self.begin(DIRECTORY, path, budget)?, &metadata);
        }
        Ok(())
    }

    fn add(&mut self, path: &EntryPath, kind: InodeKind, metadata: Metadata, budget: &Budget) -> Result<()> {
        if self.mark(path, budget)? {
            return Ok(());
        }
        if path.is_root() {
            return Err(corrupt("the root is not a directory"));
        }
        let code = match &kind {
            InodeKind::File(FileData { layout: FileLayout::Flat(_), .. }) => FLAT_FILE,
            InodeKind::File(_) => CHUNKED_FILE,
            InodeKind::Symlink(_) => SYMLINK,
            InodeKind::CharacterDevice(_) => CHARACTER_DEVICE,
            InodeKind::BlockDevice(_) => BLOCK_DEVICE,
            InodeKind::Fifo => FIFO,
            InodeKind::Directory(_) | InodeKind::Gone => return Err(corrupt("it has no content of its own")),
        };
        let to = self.begin(code, path, budget)?;
        put_metadata(to, &metadata);
        match kind {
            InodeKind::File(FileData { size, layout }) => {
                to.extend(size.to_le_bytes());
                match layout {
                    FileLayout::Flat(block) => to.extend(block.to_le_bytes()),
                    FileLayout::Chunks(chunks) => {
                        to.push(chunks.bits);
                        to.extend(u32::try_from(chunks.present.len()).unwrap_or(u32::MAX).to_le_bytes());
                        for (number, block) in &chunks.present {
                            to.extend(number.to_le_bytes());
                            to.extend(block.to_le_bytes());
                        }
                    }
                }
            }
            InodeKind::Symlink(target) => put_bytes(to, &target),
            InodeKind::CharacterDevice(number) | InodeKind::BlockDevice(number) => to.extend(number.to_le_bytes()),
            _ => {}
        }
        Ok(())
    }

    fn add_link(&mut self, path: &EntryPath, target: &EntryPath, budget: &Budget) -> Result<()> {
        if self.mark(path, budget)? {
            return Ok(());
        }
        budget.names(target.as_bytes().len())?;
        put_bytes(self.begin(LINK, path, budget)?, target.as_bytes());
        Ok(())
    }
}

/// Paths and targets have at most 4,095 bytes.
fn put_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend(u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_le_bytes());
    to.extend_from_slice(bytes);
}

fn put_metadata(to: &mut Vec<u8>, metadata: &Metadata) {
    let Metadata { mode, uid, gid, mtime, mtime_nsec, xattrs } = metadata;
    to.extend(mode.to_le_bytes());
    to.extend(uid.to_le_bytes());
    to.extend(gid.to_le_bytes());
    to.extend(mtime.to_le_bytes());
    to.extend(mtime_nsec.to_le_bytes());
    to.extend(u32::try_from(xattrs.len()).unwrap_or(u32::MAX).to_le_bytes());
    to.extend_from_slice(xattrs);
}

/// Reads the entries of a log.
pub(super) struct LogReader<R> {
    source: R,
    /// Of the layer's content.
    blocks: u32,
}

fn corrupt(what: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn damaged() -> Error {
    corrupt("its log is damaged")
}

impl<R: Read> LogReader<R> {
    /// Creates a reader of a layer's log. The layer has `blocks` blocks of content.
    pub(super) fn new(source: R, blocks: u32) -> Self {
        Self { source, blocks }
    }

    /// Returns the next path and its change; `None` at the end.
    ///
    /// # Errors
    /// `Corrupt` for what no layer's log has.
    pub(super) fn next(&mut self) -> Result<Option<(EntryPath, LayerChange)>> {
        let mut kind = [0];
        loop {
            match self.source.read(&mut kind) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        let [kind] = kind;
        let path = self.path()?;
        let change = match kind {
            REMOVE => LayerChange::Remove,
            CLEAR => LayerChange::Clear,
            DIRECTORY => LayerChange::Directory(self.metadata(Holder::Directory)?),
            FLAT_FILE => {
                let metadata = self.metadata(Holder::File)?;
                let (size, block) = (self.u64()?, self.u32()?);
                self.check_blocks(block, size)?;
                LayerChange::Inode(InodeKind::File(FileData { size, layout: FileLayout::Flat(block) }), metadata)
            }
            CHUNKED_FILE => {
                let metadata = self.metadata(Holder::File)?;
                LayerChange::Inode(InodeKind::File(self.chunked()?), metadata)
            }
            SYMLINK => {
                let metadata = self.metadata(Holder::Other)?;
                let target = self.bytes()?;
                LayerChange::Inode(InodeKind::Symlink(symlink_target(&target).map_err(|_| damaged())?), metadata)
            }
            CHARACTER_DEVICE => {
                let metadata = self.metadata(Holder::Other)?;
                LayerChange::Inode(InodeKind::CharacterDevice(self.u32()?), metadata)
            }
            BLOCK_DEVICE => {
                let metadata = self.metadata(Holder::Other)?;
                LayerChange::Inode(InodeKind::BlockDevice(self.u32()?), metadata)
            }
            FIFO => LayerChange::Inode(InodeKind::Fifo, self.metadata(Holder::Other)?),
            LINK => LayerChange::Link(self.path()?),
            _ => return Err(damaged()),
        };
        Ok(Some((path, change)))
    }

    fn chunked(&mut self) -> Result<FileData> {
        let (size, [bits], count) = (self.u64()?, self.array()?, self.u32()?);
        if bits > 31 {
            return Err(damaged());
        }
        let chunk = BLOCK << bits;
        let chunks = size.div_ceil(chunk);
        if chunks > MAX_CHUNKS || u64::from(count) > chunks {
            return Err(damaged());
        }
        let mut present: Vec<(u32, u32)> = Vec::new();
        for _ in 0..count {
            let (number, block) = (self.u32()?, self.u32()?);
            // Below 2^63, as the number of chunks is what it is.
            if u64::from(number) >= chunks || present.last().is_some_and(|(last, _)| *last >= number) {
                return Err(damaged());
            }
            let start = u64::from(number).saturating_mul(chunk);
            self.check_blocks(block, chunk.min(size.saturating_sub(start)))?;
            present.push((number, block));
        }
        Ok(FileData { size, layout: FileLayout::Chunks(Box::new(Chunks { bits, present })) })
    }

    /// Whether content of this size from this block on is the layer's.
    fn check_blocks(&self, block: u32, size: u64) -> Result<()> {
        let end = u64::from(block).checked_add(size.div_ceil(BLOCK));
        if end.is_some_and(|end| end <= u64::from(self.blocks)) { Ok(()) } else { Err(damaged()) }
    }

    fn metadata(&mut self, holder: Holder) -> Result<Metadata> {
        let mode = u16::from_le_bytes(self.array()?);
        let (uid, gid) = (self.u32()?, self.u32()?);
        let (mtime, mtime_nsec) = (i64::from_le_bytes(self.array()?), self.u32()?);
        let len = self.u32()?;
        if mode > 0o7777 || mtime_nsec >= 1_000_000_000 || len > MAX_XATTRS {
            return Err(damaged());
        }
        let xattrs = self.vec(len as usize)?;
        xattr::decode(&xattrs, holder).ok_or_else(damaged)?;
        Ok(Metadata { mode, uid, gid, mtime, mtime_nsec, xattrs: xattrs.into() })
    }

    fn path(&mut self) -> Result<EntryPath> {
        let bytes = self.bytes()?;
        let path = EntryPath::parse(&bytes).map_err(|_| damaged())?;
        if path.as_bytes() == bytes { Ok(path) } else { Err(damaged()) }
    }

    fn bytes(&mut self) -> Result<Vec<u8>> {
        let len = usize::from(u16::from_le_bytes(self.array()?));
        if len > PATH_MAX {
            return Err(damaged());
        }
        self.vec(len)
    }

    fn vec(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, to: &mut [u8]) -> Result<()> {
        self.source.read_exact(to).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => damaged(),
            _ => e.into(),
        })
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }
}
