//! The sources of files' content, and the pieces of files with holes.

use crate::error::{Error, ErrorKind, Result};

/// A source of bytes.
pub(super) trait Content {
    /// At least one of the next bytes, at most `most`.
    ///
    /// # Errors
    /// `Corrupt` when there are none left.
    fn next(&mut self, most: u64) -> Result<&[u8]>;
}

/// A piece of a file that is not a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SparseExtent {
    pub offset: u64,
    pub len: u64,
}

/// The pieces of a file that are not holes, in order, apart from each other, none empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SparseMap {
    pub size: u64,
    pub pieces: Vec<SparseExtent>,
}

/// Pieces that one file may have.
const MAX_PIECES: usize = 1 << 20;

impl SparseMap {
    /// Whether a file may have so many pieces.
    ///
    /// # Errors
    /// `Unsupported` for more.
    pub(super) fn check(pieces: usize) -> Result<()> {
        if pieces > MAX_PIECES {
            let what = format!("a sparse file of more than {MAX_PIECES} pieces");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        Ok(())
    }

    /// # Errors
    /// `Corrupt` for pieces that overlap, go back, or go beyond `size`.
    pub(super) fn new(size: u64, mut pieces: Vec<SparseExtent>) -> Result<Self> {
        // The last one often is empty, at the end of the file.
        let mut end = 0;
        for SparseExtent { offset, len } in &pieces {
            match offset.checked_add(*len) {
                Some(next) if *offset >= end && next <= size => end = next,
                _ => return Err(Error::new(ErrorKind::Corrupt, "its sparse map is damaged")),
            }
        }
        pieces.retain(|piece| piece.len > 0);
        Ok(Self { size, pieces })
    }

    /// How much of it is not holes.
    pub(super) fn stored(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len).sum()
    }
}
