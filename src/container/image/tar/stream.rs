//! The bytes of an archive as they come: in blocks.

use std::io::{self, Read};

use super::header::{BLOCK, Block};
use crate::container::image::budget::Budget;
use crate::container::image::content::Content;
use crate::error::{Error, ErrorKind, Result};

/// What one read asks for.
const BUFFER: usize = 1 << 20;

/// Reads any source in large pieces.
pub(in super::super) struct Stream<'a> {
    source: &'a mut dyn Read,
    budget: &'a Budget,
    buffer: Vec<u8>,
    /// What of the buffer is still to be given out.
    start: usize,
    end: usize,
}

impl<'a> Stream<'a> {
    pub(in super::super) fn new(source: &'a mut dyn Read, budget: &'a Budget) -> Self {
        Self { source, budget, buffer: vec![0; BUFFER], start: 0, end: 0 }
    }

    /// What is in the buffer; nothing at the end of the source.
    fn available(&mut self) -> Result<&[u8]> {
        if self.start == self.end {
            self.budget.check()?;
            (self.start, self.end) = (0, 0);
            while self.end < self.buffer.len() {
                match self.source.read(self.buffer.get_mut(self.end..).unwrap_or_default()) {
                    Ok(0) => break,
                    Ok(n) => self.end += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e.downcast::<Error>().unwrap_or_else(Error::from)),
                }
            }
        }
        Ok(self.buffer.get(self.start..self.end).unwrap_or_default())
    }

    /// Looks at what comes next without taking it: up to a mebibyte at the very beginning.
    pub(in super::super) fn peek(&mut self) -> Result<&[u8]> {
        self.available()
    }

    /// The next block; none at the end of the source.
    pub(super) fn block(&mut self) -> Result<Option<Block>> {
        let mut block = [0; BLOCK];
        if self.available()?.is_empty() {
            return Ok(None);
        }
        self.read(&mut block)?;
        Ok(Some(block))
    }

    fn read(&mut self, mut to: &mut [u8]) -> Result<()> {
        while !to.is_empty() {
            let piece = self.next(to.len() as u64)?;
            let (now, later) = to.split_at_mut(piece.len());
            now.copy_from_slice(piece);
            to = later;
        }
        Ok(())
    }

    /// All of a short entry's data, and what fills up its last block.
    pub(super) fn data(&mut self, len: u64) -> Result<Vec<u8>> {
        // Read piece by piece: it is not checked yet that there is as much.
        let (mut data, mut left) = (Vec::new(), len);
        while left > 0 {
            let piece = self.next(left)?;
            data.extend_from_slice(piece);
            left -= piece.len() as u64;
        }
        self.skip_padding(len)?;
        Ok(data)
    }

    pub(super) fn skip(&mut self, mut len: u64) -> Result<()> {
        while len > 0 {
            len -= self.next(len)?.len() as u64;
        }
        Ok(())
    }

    /// What fills up the last block of data of this length.
    pub(super) fn skip_padding(&mut self, len: u64) -> Result<()> {
        self.skip(len.wrapping_neg() % BLOCK as u64)
    }

    /// Reads on to the end of the source.
    pub(in super::super) fn finish(mut self) -> Result<()> {
        loop {
            self.start = self.end;
            if self.available()?.is_empty() {
                return Ok(());
            }
        }
    }
}

impl Content for Stream<'_> {
    fn next(&mut self, most: u64) -> Result<&[u8]> {
        self.available()?;
        let n = usize::try_from(most).unwrap_or(usize::MAX).min(self.end - self.start);
        if n == 0 {
            return Err(Error::new(ErrorKind::Corrupt, "the archive is cut off in it"));
        }
        let piece = self.buffer.get(self.start..self.start + n).unwrap_or_default();
        self.start += n;
        Ok(piece)
    }
}
