//! [`Spill`]: bytes that are collected in memory, and in a file without a name.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::container::image::erofs::Disk;
use crate::error::{Context, Result};

/// Bytes that stay in memory before they go to the file.
const BUFFER: usize = 1 << 20;

/// Makes a file without a name.
pub(super) type Scratch<'a> = dyn Fn() -> Result<File> + Send + Sync + 'a;

pub(super) struct Spill<'a> {
    scratch: &'a Scratch<'a>,
    /// The bytes behind those in the file.
    buffer: Vec<u8>,
    file: Option<File>,
    written: u64,
}

impl<'a> Spill<'a> {
    pub(super) fn new(scratch: &'a Scratch<'a>) -> Self {
        Self { scratch, buffer: Vec::new(), file: None, written: 0 }
    }

    pub(super) fn len(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Returns the buffer to append to. A full one is written to the file first.
    pub(super) fn buffer(&mut self) -> Result<&mut Vec<u8>> {
        if self.buffer.len() >= BUFFER {
            let file = match &self.file {
                Some(file) => file,
                None => self.file.insert((self.scratch)().doing(|| "making a file for a layer's log")?),
            };
            file.write_all_at(&self.buffer, self.written).doing(|| "writing a layer's log")?;
            self.written += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(&mut self.buffer)
    }

    /// Appends all of it to a disk, where it is reserved.
    pub(super) fn copy_to(&self, disk: &mut Disk<'_>) -> Result<()> {
        if let Some(file) = &self.file {
            let mut piece = vec![0; BUFFER];
            let mut at = 0;
            while at < self.written {
                let len = usize::try_from(self.written - at).unwrap_or(BUFFER).min(BUFFER);
                let piece = piece.get_mut(..len).unwrap_or_default();
                file.read_exact_at(piece, at).doing(|| "reading a layer's log")?;
                disk.append(piece)?;
                at += len as u64;
            }
        }
        disk.append(&self.buffer)
    }
}
