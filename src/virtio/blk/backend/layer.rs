//! [`Layer`]: what a copy-on-write disk lies on, which is only ever read.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::storage::{Storage, zeroes_to_guest};
use super::{Extent, front};
use crate::memory::{GuestMemory, Segment};
use crate::sys::CloseOnFork;

/// A base. It may be shorter than what lies on it: all that is beyond its end reads as zeroes.
pub(super) trait Layer: Send + fmt::Debug {
    /// Bytes.
    fn len(&self) -> u64;

    fn read(&mut self, to: &mut [u8], offset: u64) -> io::Result<()>;

    fn read_guest(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()>;

    /// Appends where the range lies; see `BlockBackend::extents`.
    fn extents(&mut self, offset: u64, len: u64, found: &mut Vec<Extent>) -> io::Result<()>;
}

/// A raw image.
#[derive(Debug)]
pub(super) struct RawLayer {
    file: CloseOnFork<File>,
    len: u64,
}

impl RawLayer {
    /// `len` is how long the file is, or the device.
    pub(super) fn new(file: File, len: u64) -> Self {
        Self { file: CloseOnFork::new(file), len }
    }
}

impl Layer for RawLayer {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&mut self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let here = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(to.len());
        let (here, beyond) = to.split_at_mut(here);
        beyond.fill(0);
        self.file.read_exact_at(here, offset)
    }

    fn read_guest(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        let mut beyond = segments.to_vec();
        let here = front(&mut beyond, usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX));
        Storage::read_guest(&*self.file, memory, &here, offset)?;
        zeroes_to_guest(memory, &beyond)
    }

    fn extents(&mut self, offset: u64, len: u64, found: &mut Vec<Extent>) -> io::Result<()> {
        let here = self.len.saturating_sub(offset).min(len);
        if here > 0 {
            push(found, Extent::File { fd: self.file.as_raw_fd(), offset, len: here });
        }
        if here < len {
            push(found, Extent::Zeroes { len: len - here });
        }
        Ok(())
    }
}

/// Appends one more, joined with the last where they touch.
pub(super) fn push(found: &mut Vec<Extent>, next: Extent) {
    match (found.last_mut(), next) {
        (Some(Extent::Zeroes { len }), Extent::Zeroes { len: more }) => *len += more,
        (Some(Extent::File { fd, offset, len }), Extent::File { fd: other, offset: at, len: more })
            if *fd == other && *offset + *len == at =>
        {
            *len += more;
        }
        _ => found.push(next),
    }
}
