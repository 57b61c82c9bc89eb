//! [`Storage`]: the file of a disk format. Tests put something else in its place.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

#[cfg(any(test, feature = "qcow2"))]
use super::front;
use super::transfer;
use crate::memory::{GuestMemory, Segment};
use crate::sys::{self, Space};

/// Bytes at offsets, with holes that read as zeroes. All calls may block; what was written is durable after `sync`.
pub(super) trait Storage: Send + fmt::Debug {
    /// Fills all of `to`.
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()>;

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()>;

    fn sync(&self) -> io::Result<()>;

    /// The range reads as zeroes from now on and takes no space where that is possible.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeroes from now on and keeps its space.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Bytes it takes up on the host.
    fn allocated(&self) -> io::Result<u64>;

    /// What the host can still give it.
    fn space(&self) -> io::Result<Space>;

    /// The descriptor, where it is one file and the offsets are the file's.
    fn fd(&self) -> Option<RawFd>;

    fn read_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()>;

    fn write_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()>;
}

impl Storage for File {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(to, offset)
    }

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(from, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        sys::zero(self, offset, len, true)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        sys::zero(self, offset, len, false)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.metadata()?.blocks() * 512)
    }

    fn space(&self) -> io::Result<Space> {
        sys::space(self)
    }

    fn fd(&self) -> Option<RawFd> {
        Some(self.as_raw_fd())
    }

    fn read_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        transfer(segments, offset, |rest, at| memory.read_at(rest, self.as_fd(), at))
    }

    fn write_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        transfer(segments, offset, |rest, at| memory.write_at(rest, self.as_fd(), at))
    }
}

/// Gives the guest what `read` fills a buffer with, piece by piece.
#[cfg(any(test, feature = "qcow2"))]
pub(super) fn to_guest(
    memory: &GuestMemory,
    segments: &[Segment],
    offset: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    pieces(segments, offset, |buffer, piece, at| {
        read(buffer, at)?;
        memory.scatter(piece, buffer).map(drop).map_err(io::Error::other)
    })
}

/// Gives `write` what the guest has, piece by piece.
#[cfg(any(test, feature = "qcow2"))]
pub(super) fn from_guest(
    memory: &GuestMemory,
    segments: &[Segment],
    offset: u64,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    pieces(segments, offset, |buffer, piece, at| {
        memory.gather(piece, 0, buffer).map_err(io::Error::other)?;
        write(buffer, at)
    })
}

/// Fills the guest's buffers with zeroes.
pub(crate) fn zeroes_to_guest(memory: &GuestMemory, segments: &[Segment]) -> io::Result<()> {
    let zeroes = [0; 4096];
    for segment in segments {
        let mut rest = *segment;
        while rest.len() > 0 {
            let (now, later) = rest.split_at(zeroes.len());
            memory.write(now.addr(), zeroes.get(..now.len()).unwrap_or_default()).map_err(io::Error::other)?;
            rest = later;
        }
    }
    Ok(())
}

/// Cuts `segments` into pieces of at most 64 KiB, each with a buffer of its size.
#[cfg(any(test, feature = "qcow2"))]
fn pieces(
    segments: &[Segment],
    mut offset: u64,
    mut each: impl FnMut(&mut [u8], &[Segment], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut rest = segments.to_vec();
    let mut buffer = vec![0; segments.iter().map(|s| s.len()).sum::<usize>().min(64 << 10)];
    while !rest.is_empty() {
        let piece = front(&mut rest, buffer.len());
        let len = piece.iter().map(|s| s.len()).sum::<usize>();
        each(buffer.get_mut(..len).unwrap_or_default(), &piece, offset)?;
        offset += len as u64;
    }
    Ok(())
}
