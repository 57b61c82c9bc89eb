//! [`LayerFile`]: an unpacked layer in the store.
//!
//! It begins with the content of the layer's files, in whole blocks, as they lie on disks. The log follows, and a trailer fills up the
//! last block. The same layer gives the same bytes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::log::{LayerLog, LogReader};
use crate::container::image::erofs::{BLOCK, Disk};
use crate::container::image::seal;
use crate::error::{Error, ErrorKind, Result};

const MAGIC: [u8; 16] = *b"cofferdam layer1";
const TRAILER: usize = 64;
/// What one read of the log asks for.
const BUFFER: usize = 64 << 10;

/// A layer that the store has, open for reading.
#[derive(Debug)]
pub(super) struct LayerFile {
    file: Arc<File>,
    blocks: u32,
    log_len: u64,
    removals: u64,
}

/// Appends the log to the content, and ends the file.
pub(super) fn finish(log: &LayerLog<'_>, mut disk: Disk<'_>) -> Result<()> {
    disk.pad(BLOCK)?;
    let blocks = disk.block()?;
    let LayerLog { removals, entries } = log;
    let len = removals.len() + entries.len();
    disk.reserve_metadata(len + TRAILER as u64)?;
    removals.copy_to(&mut disk)?;
    entries.copy_to(&mut disk)?;
    let (whole, trailer) = trailer(blocks, len, removals.len());
    let behind = whole.saturating_sub(len + TRAILER as u64);
    disk.append(&vec![0; usize::try_from(behind).unwrap_or(0)])?;
    disk.append(&trailer)?;
    disk.finish_content()
}

/// How long a log is with its trailer, which is the end of a block, and that trailer.
pub(super) fn trailer(blocks: u32, log_len: u64, removals: u64) -> (u64, Vec<u8>) {
    let mut trailer = Vec::from(MAGIC);
    trailer.extend(u64::from(blocks).to_le_bytes());
    trailer.extend(log_len.to_le_bytes());
    trailer.extend(removals.to_le_bytes());
    trailer.resize(TRAILER, 0);
    ((log_len + TRAILER as u64).next_multiple_of(BLOCK), trailer)
}

impl LayerFile {
    /// Opens one that is sealed.
    ///
    /// # Errors
    /// `Corrupt` for a file that is no unpacked layer.
    pub(super) fn open(file: Arc<File>) -> Result<Self> {
        let len = file.metadata()?.len().saturating_sub(seal::LEN);
        Self::of_len(file, len)
    }

    /// The same of a file whose first `len` bytes are the layer.
    pub(super) fn of_len(file: Arc<File>, len: u64) -> Result<Self> {
        let damaged = || Error::new(ErrorKind::Corrupt, "it is no unpacked layer");
        let mut trailer = [0; TRAILER];
        let at = len.checked_sub(TRAILER as u64).ok_or_else(damaged)?;
        file.read_exact_at(&mut trailer, at)?;
        let field = |at: usize| {
            let bytes = trailer.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u64::from_le_bytes)
        };
        let (blocks, log_len, removals) = (field(16), field(24), field(32));
        let blocks = u32::try_from(blocks).map_err(|_| damaged())?;
        let whole = log_len.checked_add(TRAILER as u64).and_then(|n| n.checked_next_multiple_of(BLOCK));
        let whole = whole.and_then(|n| n.checked_add(u64::from(blocks) * BLOCK));
        if !trailer.starts_with(&MAGIC) || whole != Some(len) || removals > log_len {
            return Err(damaged());
        }
        Ok(Self { file, blocks, log_len, removals })
    }

    /// How many blocks of content it begins with.
    pub(super) fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Whether it takes away anything of lower layers.
    pub(super) fn has_removals(&self) -> bool {
        self.removals > 0
    }

    /// Reads the part of the log that takes away.
    pub(super) fn removals(&self) -> LogReader<impl Read> {
        self.log(0, self.removals)
    }

    /// Reads the rest.
    pub(super) fn entries(&self) -> LogReader<impl Read> {
        self.log(self.removals, self.log_len)
    }

    fn log(&self, from: u64, to: u64) -> LogReader<impl Read> {
        let start = u64::from(self.blocks) * BLOCK;
        let range = FileRange { file: &self.file, at: start + from, end: start + to };
        LogReader::new(io::BufReader::with_capacity(BUFFER, range), self.blocks)
    }

    pub(super) fn into_file(self) -> Arc<File> {
        self.file
    }
}

/// A part of a file, read without its position.
struct FileRange<'f> {
    file: &'f File,
    at: u64,
    end: u64,
}

impl Read for FileRange<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.file.read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}
