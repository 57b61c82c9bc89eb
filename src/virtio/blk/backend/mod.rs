//! [`BlockBackend`]: where a disk's bytes are. Owned by the disk's loop, its only caller.

mod concat;
mod direct;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod fuzzing;
mod layer;
mod overlay;
#[cfg(feature = "qcow2")]
mod qcow2;
mod raw;
mod storage;

use std::fmt;
use std::io;
use std::os::fd::RawFd;

pub(crate) use concat::{ConcatFile, FilePiece};
pub(crate) use direct::DirectFile;
pub(crate) use overlay::{BasePath, OverlayFile, compact, create, flatten, freeze, rebase};
#[cfg(feature = "qcow2")]
pub(crate) use qcow2::Qcow2;
pub(crate) use raw::RawFile;
#[cfg(feature = "container")]
pub(crate) use raw::lock_with_remedy;
pub(super) use storage::zeroes_to_guest;

use crate::memory::{GuestMemory, Segment};
use crate::sys::Space;

/// What is the same about a backend until it is grown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    /// Bytes: whole sectors, at least one.
    pub len: u64,
    pub read_only: bool,
    /// The alignment of discards in bytes; 0 when they do nothing.
    pub discard: u32,
}

/// Where one piece of a request's range lies, for I/O without the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// `len` bytes of this descriptor, which the backend keeps open until it is dropped.
    File { fd: RawFd, offset: u64, len: u64 },
    /// `len` bytes that were never written: they read as zeroes.
    Zeroes { len: u64 },
}

/// Where the bytes of a disk are. All ranges were checked against [`Geometry::len`] and are whole sectors; everything may block.
///
/// What a call has written is durable when a later [`BlockBackend::flush`] has returned `Ok`, not before. A failed call says
/// so with the host's error and leaves every other byte as it was.
pub(crate) trait BlockBackend: Send + fmt::Debug {
    fn geometry(&self) -> Geometry;

    /// Fills all of `segments`, which lie in `memory`.
    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()>;

    /// Writes all of `segments`, which lie in `memory`.
    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()>;

    /// Returns when everything written is on stable storage.
    fn flush(&mut self) -> io::Result<()>;

    /// Gives back to the host what it can of a range that is not needed. It reads as anything after.
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// The range reads as zeroes from now on; its space may be given back when `unmap` is set.
    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Makes the disk larger; what is new reads as zeroes.
    fn grow(&mut self, len: u64) -> io::Result<()>;

    /// Bytes that the disk takes up on the host.
    fn allocated(&self) -> io::Result<u64>;

    /// Appends where the range lies, in order and without gaps, so that its bytes can be moved without the backend.
    /// With `write`, it first prepares that they go there. `None` when only [`BlockBackend::read`] and
    /// [`BlockBackend::write`] can.
    ///
    /// The places of a range stay what they are while requests that use them are in flight.
    fn extents(&mut self, write: bool, offset: u64, len: u64, found: &mut Vec<Extent>) -> Option<io::Result<()>>;

    /// The bytes of a range that was asked for with `write` have arrived at its places.
    fn write_done(&mut self, offset: u64, len: u64) -> io::Result<()>;

    /// The bytes of a range that was asked for with `write` will not arrive, or not all of them.
    fn write_failed(&mut self, _offset: u64, _len: u64) {}

    /// Everything that was written through [`BlockBackend::extents`] is made durable by a sync of this descriptor alone.
    /// `None` when it takes [`BlockBackend::flush`].
    fn sync_fd(&self) -> Option<RawFd>;

    /// Bytes that the host must still give this disk, at most, before the range can be written.
    fn takes(&mut self, _offset: u64, len: u64) -> io::Result<u64> {
        Ok(len)
    }

    /// What the host can still give this disk. `None` when it needs no more, as it has all or is only read.
    fn space(&self) -> io::Result<Option<Space>> {
        Ok(None)
    }
}

/// Goes on after short transfers and interruptions until everything is done.
fn transfer(
    segments: &[Segment],
    offset: u64,
    mut step: impl FnMut(&[Segment], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let (mut rest, mut at) = (segments.to_vec(), offset);
    while !rest.is_empty() {
        match step(&rest, at) {
            Ok(0) => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter"));
            }
            Ok(n) => {
                at += n as u64;
                skip(&mut rest, n);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Takes the first `n` bytes, or all.
pub(super) fn front(segments: &mut Vec<Segment>, n: usize) -> Vec<Segment> {
    let (mut taken, mut room) = (Vec::new(), n);
    for segment in segments.iter() {
        let (now, _) = segment.split_at(room);
        if now.len() > 0 {
            taken.push(now);
        }
        room -= now.len();
        if room == 0 {
            break;
        }
    }
    skip(segments, n - room);
    taken
}

/// Drops the first `n` bytes.
fn skip(segments: &mut Vec<Segment>, mut n: usize) {
    let whole = segments
        .iter()
        .take_while(|s| {
            s.len() <= n && {
                n -= s.len();
                true
            }
        })
        .count();
    segments.drain(..whole);
    if let Some(first) = segments.first_mut() {
        *first = first.split_at(n).1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;

    #[test]
    fn short_and_interrupted_transfers_go_on() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x1000)]).unwrap();
        let segments = [memory.segment(GuestAddress(0), 10).unwrap(), memory.segment(GuestAddress(100), 10).unwrap()];
        let (mut seen, mut turn) = (Vec::new(), 0);
        transfer(&segments, 1000, |rest, at| {
            turn += 1;
            if turn == 2 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            seen.push((at, rest.iter().map(|s| s.len()).sum::<usize>()));
            Ok(7)
        })
        .unwrap();
        assert_eq!(seen, [(1000, 20), (1007, 13), (1014, 6)]);
    }
}
