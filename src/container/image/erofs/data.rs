//! [`Disk`]: the file that becomes the disk, written from its beginning to its end. Blocks of zeros are holes of it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::BLOCK;
use crate::container::image::budget::Budget;
use crate::container::image::content::{Content, SparseExtent, SparseMap};
use crate::container::image::tree::{Chunks, FileData, FileLayout};
use crate::error::{Context, Error, ErrorKind, Result};

/// What is written at once.
const BUFFER: usize = 1 << 20;

/// What one request for content asks for.
const PIECE: u64 = 1 << 20;

/// A file with holes has at least so many chunks that its map stays small beside what it describes.
const MIN_CHUNKS: u64 = 4096;
const MAX_CHUNKS: u64 = 1 << 20;

/// Written from block 1 on; block 0 is the superblock's.
pub(in super::super) struct Disk<'f> {
    file: &'f File,
    budget: &'f Budget,
    /// What goes to `at`, and is not there yet.
    buffer: Vec<u8>,
    at: u64,
    /// What of the disk lies in other files, behind block 0.
    elsewhere: u64,
}

impl<'f> Disk<'f> {
    /// # Errors
    /// `InvalidConfig` where not even a superblock is allowed.
    pub(in super::super) fn new(file: &'f File, budget: &'f Budget) -> Result<Self> {
        Self::behind(file, budget, 0)
    }

    /// Creates a disk whose content lies in other files: `elsewhere` bytes, whole blocks, behind block 0. They are charged too.
    ///
    /// # Errors
    /// `InvalidConfig` where not as much is allowed; `Unsupported` beyond what the format can number.
    pub(in super::super) fn behind(file: &'f File, budget: &'f Budget, elsewhere: u64) -> Result<Self> {
        let at = BLOCK.saturating_add(elsewhere);
        budget.space(at)?;
        block_number(at)?;
        Ok(Self { file, budget, buffer: Vec::with_capacity(BUFFER), at, elsewhere })
    }

    /// Content alone, from the file's beginning on.
    pub(in super::super) fn content(file: &'f File, budget: &'f Budget) -> Self {
        Self { file, budget, buffer: Vec::with_capacity(BUFFER), at: 0, elsewhere: 0 }
    }

    pub(super) fn budget(&self) -> &'f Budget {
        self.budget
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> u64 {
        self.at + self.buffer.len() as u64
    }

    /// Its block, where a block begins.
    pub(in super::super) fn block(&self) -> Result<u32> {
        block_number(self.position())
    }

    /// Takes room for what will be written, which is charged.
    fn reserve(&self, bytes: u64) -> Result<()> {
        let rounded = bytes.checked_next_multiple_of(BLOCK).unwrap_or(u64::MAX);
        self.budget.space(rounded)?;
        block_number(self.position().saturating_add(rounded)).map(drop)
    }

    /// Appends bytes that were reserved.
    pub(in super::super) fn append(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Fills up with zeros to a multiple of `align`.
    pub(in super::super) fn pad(&mut self, align: u64) -> Result<()> {
        let zeros = [0; BLOCK as usize];
        let missing = self.position().wrapping_neg() % align;
        self.append(zeros.get(..usize::try_from(missing).unwrap_or(0)).unwrap_or_default())
    }

    /// Goes on elsewhere, behind what is there. What lies between is a hole.
    fn seek(&mut self, position: u64) -> Result<()> {
        if position != self.position() {
            self.flush()?;
            self.at = position;
        }
        Ok(())
    }

    /// Writes the buffer, but for blocks of zeros: the file is new, so these are holes.
    fn flush(&mut self) -> Result<()> {
        self.budget.check()?;
        let start = self.at.saturating_sub(self.elsewhere);
        self.at += self.buffer.len() as u64;
        // A buffer may begin within a block.
        let first = usize::try_from(start.wrapping_neg() % BLOCK).unwrap_or(0).min(self.buffer.len());
        let (head, rest) = self.buffer.split_at(first);
        let mut run = None;
        let mut offset = 0;
        let write = |from: usize, to: usize| -> Result<()> {
            let bytes = self.buffer.get(from..to).unwrap_or_default();
            Ok(self.file.write_all_at(bytes, start + from as u64)?)
        };
        for block in std::iter::once(head).chain(rest.chunks(BLOCK as usize)) {
            match (is_zero(block), run) {
                (false, None) => run = Some(offset),
                (true, Some(from)) => {
                    write(from, offset)?;
                    run = None;
                }
                _ => {}
            }
            offset += block.len();
        }
        if let Some(from) = run {
            write(from, offset)?;
        }
        self.buffer.clear();
        Ok(())
    }

    /// Writes a file without holes.
    ///
    /// # Errors
    /// What `content` fails with; `InvalidConfig` beyond a limit.
    pub(in super::super) fn write_file(&mut self, size: u64, content: &mut dyn Content) -> Result<FileData> {
        self.budget.file_size(size)?;
        self.reserve(size)?;
        let layout = FileLayout::Flat(self.block()?);
        self.copy(size, content)?;
        self.pad(BLOCK)?;
        Ok(FileData { size, layout })
    }

    fn copy(&mut self, mut len: u64, content: &mut dyn Content) -> Result<()> {
        while len > 0 {
            let piece = content.next(len.min(PIECE))?;
            len -= piece.len() as u64;
            self.append(piece)?;
        }
        Ok(())
    }

    /// Writes a file with holes, which are charged as what they are: as nothing but their part of the file's size.
    ///
    /// # Errors
    /// As [`Disk::write_file`].
    pub(in super::super) fn write_sparse(&mut self, map: &SparseMap, content: &mut dyn Content) -> Result<FileData> {
        if map.pieces.iter().all(|piece| *piece == SparseExtent { offset: 0, len: map.size })
            && map.size <= map.stored()
        {
            return self.write_file(map.size, content);
        }
        self.budget.file_size(map.size)?;
        let bits = chunk_bits(map);
        let chunk = BLOCK << bits;
        let mut present: Vec<(u32, u32)> = Vec::new();
        // Where the last chunk begins and ends.
        let (mut base, mut end) = (self.position(), self.position());
        let too_large = || Error::new(ErrorKind::Unsupported, "a file with holes that is too large");
        for SparseExtent { offset, len } in &map.pieces {
            let (mut at, mut left) = (*offset, *len);
            while left > 0 {
                let number = u32::try_from(at / chunk).map_err(|_| too_large())?;
                if present.last().is_none_or(|(last, _)| *last != number) {
                    base = end;
                    let room = chunk.min((map.size - at / chunk * chunk).next_multiple_of(BLOCK));
                    end = base.saturating_add(room);
                    block_number(end)?;
                    present.push((number, block_number(base)?));
                }
                let within = at % chunk;
                let n = left.min(chunk - within);
                // Pieces in one block are charged twice, which does no harm.
                self.budget.space((within % BLOCK + n).next_multiple_of(BLOCK))?;
                self.seek(base + within)?;
                self.copy(n, content)?;
                (at, left) = (at + n, left - n);
            }
        }
        self.seek(end)?;
        Ok(FileData { size: map.size, layout: FileLayout::Chunks(Box::new(Chunks { bits, present })) })
    }

    /// Everything is in the file, which is as long as the disk: whole blocks.
    pub(super) fn finish(mut self, superblock: impl FnOnce(u32) -> Vec<u8>) -> Result<()> {
        self.pad(BLOCK)?;
        let blocks = self.block()?;
        self.flush()?;
        self.file.write_all_at(&superblock(blocks), 0)?;
        self.set_len()
    }

    /// The same of content alone.
    pub(in super::super) fn finish_content(mut self) -> Result<()> {
        self.pad(BLOCK)?;
        self.flush()?;
        self.set_len()
    }

    fn set_len(&self) -> Result<()> {
        let len = self.at.saturating_sub(self.elsewhere);
        self.file.set_len(len).doing(|| "setting the disk's length")
    }

    /// Charges the blocks that are not content.
    pub(in super::super) fn reserve_metadata(&self, bytes: u64) -> Result<()> {
        self.reserve(bytes)
    }
}

/// # Errors
/// `Unsupported` beyond what the format can number.
fn block_number(position: u64) -> Result<u32> {
    u32::try_from(position / BLOCK).map_err(|_| {
        Error::new(ErrorKind::Unsupported, "the image needs more than 16 TiB of addresses, which EROFS has not")
    })
}

/// Chunks of so many blocks that their map is in proportion to the pieces: `1 << bits`.
fn chunk_bits(map: &SparseMap) -> u8 {
    let blocks = map.size.div_ceil(BLOCK);
    let most = (map.pieces.len() as u64).saturating_mul(4).clamp(MIN_CHUNKS, MAX_CHUNKS);
    // The format has five bits for it.
    (0..31).find(|bits| blocks.div_ceil(1 << bits) <= most).unwrap_or(31)
}

fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];
    ZEROS.get(..bytes.len()).is_some_and(|zeros| bytes == zeros)
}
