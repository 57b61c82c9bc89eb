//! What a guest's memory is made of.

// Guest physical memory is concrete, cheap to clone, and every access is bounds-checked. vm-memory lives in this directory
// only, but for the loaders that take it by reference. All threads of one VM share the memory, and the guest writes to it
// at any time. So nothing is handed out as a Rust reference, only copied or given to the kernel.

mod backing;
mod image;
mod io;
mod io_queue;
mod prefault;
mod reclaim;
mod slice;

pub(crate) use backing::Backing;
pub use backing::{HugetlbMemory, Memory};
pub(crate) use image::MemoryImage;
pub(crate) use io_queue::{IoOperation, IoQueue};
pub(crate) use slice::{GuestSlice, PinnedSlice};

use std::fmt;
use std::sync::Arc;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::ForkGuard;

/// A guest physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct GuestAddress(pub u64);

impl GuestAddress {
    /// The address `n` bytes further, or `None` beyond the end of the address space.
    pub fn checked_add(self, n: u64) -> Option<Self> {
        self.0.checked_add(n).map(Self)
    }

    pub(crate) fn inner(self) -> vm_memory::GuestAddress {
        vm_memory::GuestAddress(self.0)
    }
}

impl fmt::Display for GuestAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A piece of guest memory that is known to exist. Only [`GuestMemory::segment`] makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    addr: GuestAddress,
    len: usize,
}

impl Segment {
    /// Where it begins.
    pub fn addr(self) -> GuestAddress {
        self.addr
    }

    /// How many bytes it has.
    pub fn len(self) -> usize {
        self.len
    }

    /// Cuts the segment after `at` bytes, or after all of it.
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len);
        (Self { len: at, ..self }, Self { addr: GuestAddress(self.addr.0 + at as u64), len: self.len - at })
    }
}

/// An access outside guest memory. It is the guest's mistake or the loader's, as the caller knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {addr} are not guest memory")]
pub(crate) struct OutOfBounds {
    /// Where the access began.
    pub addr: GuestAddress,
    /// How many bytes it wanted.
    pub len: usize,
}

impl From<OutOfBounds> for Error {
    fn from(error: OutOfBounds) -> Self {
        Self::new(ErrorKind::GuestFailed, error.to_string())
    }
}

/// One contiguous range, as the hypervisor wants to know it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Region {
    pub addr: GuestAddress,
    pub len: u64,
    /// Where the range lies in this process. Valid for as long as any clone of the memory lives.
    pub host: *mut u8,
}

impl Region {
    fn of(region: &vm_memory::GuestRegionMmap<()>) -> Self {
        Self { addr: GuestAddress(region.start_addr().0), len: region.len(), host: region.as_ptr() }
    }

    /// Where `len` bytes from `addr` lie in this process; `None` when they are not all in this range.
    #[inline]
    fn at(&self, addr: GuestAddress, len: usize) -> Option<*mut u8> {
        let at = addr.0.checked_sub(self.addr.0)?;
        let fits = at <= self.len && len as u64 <= self.len - at;
        fits.then(|| self.host.wrapping_add(at as usize))
    }
}

/// A guest's RAM. Clones share it; it is unmapped with the last of them.
#[derive(Clone)]
pub(crate) struct GuestMemory {
    /// Of its file, if it has one. Goes before that.
    _guard: Option<Arc<ForkGuard>>,
    /// Shared, so that a clone is a number that is counted up.
    inner: Arc<GuestMemoryMmap<()>>,
    backing: Backing,
}

impl GuestMemory {
    /// Maps anonymous private memory for the ranges, which must be sorted and disjoint. Pages cost nothing until touched.
    ///
    /// # Errors
    /// `ResourceExhausted` when the host has no address space left, `InvalidConfig` for an empty or overlapping range.
    #[cfg(any(test, feature = "internals"))]
    pub fn anonymous(ranges: &[(GuestAddress, u64)]) -> Result<Self> {
        Self::new(ranges, Backing::Anonymous)
    }

    /// The type that loaders of the rust-vmm crates take.
    pub(crate) fn inner(&self) -> &GuestMemoryMmap<()> {
        &self.inner
    }

    pub(crate) fn regions(&self) -> Vec<Region> {
        self.inner.iter().map(Region::of).collect()
    }

    /// How many bytes there are.
    pub fn size(&self) -> u64 {
        self.inner.iter().map(|r| r.len()).sum()
    }

    /// Where `len` bytes from `addr` lie in this process; `None` when they are not guest memory, or not all in one range.
    #[inline]
    fn host(&self, addr: GuestAddress, len: usize) -> Option<*mut u8> {
        self.region(addr, len)?.at(addr, len)
    }

    /// The range that `len` bytes from `addr` are all in.
    #[inline]
    fn region(&self, addr: GuestAddress, len: usize) -> Option<Region> {
        // There are one or two.
        self.inner.iter().map(Region::of).find(|region| region.at(addr, len).is_some())
    }

    /// Checks that `len` bytes from `addr` exist and names them.
    #[inline]
    pub fn segment(&self, addr: GuestAddress, len: usize) -> Result<Segment, OutOfBounds> {
        // Nearly all segments lie in one range, and looking for more takes longer.
        let there = || addr.checked_add(len as u64).is_some() && self.inner.check_range(addr.inner(), len);
        if self.host(addr, len).is_some() || there() {
            Ok(Segment { addr, len })
        } else {
            Err(OutOfBounds { addr, len })
        }
    }

    /// Copies from the guest.
    pub fn read(&self, addr: GuestAddress, to: &mut [u8]) -> Result<(), OutOfBounds> {
        match self.view(addr, to.len()).and_then(|view| view.read(0, to)) {
            Some(()) => Ok(()),
            None => self.inner.read_slice(to, addr.inner()).map_err(|_| OutOfBounds { addr, len: to.len() }),
        }
    }

    /// Copies to the guest.
    pub fn write(&self, addr: GuestAddress, from: &[u8]) -> Result<(), OutOfBounds> {
        match self.view(addr, from.len()).and_then(|view| view.write(0, from)) {
            Some(()) => Ok(()),
            None => self.inner.write_slice(from, addr.inner()).map_err(|_| OutOfBounds { addr, len: from.len() }),
        }
    }

    /// Copies from these segments, from their `skip`th byte on, into `to`. Returns how much that was.
    pub fn gather(&self, segments: &[Segment], mut skip: usize, to: &mut [u8]) -> Result<usize, OutOfBounds> {
        let (wanted, mut rest) = (to.len(), to);
        for segment in segments {
            if rest.is_empty() {
                break;
            }
            let (skipped, segment) = segment.split_at(skip);
            skip -= skipped.len();
            let (now, later) = rest.split_at_mut(segment.len().min(rest.len()));
            self.read(segment.addr(), now)?;
            rest = later;
        }
        Ok(wanted - rest.len())
    }

    /// Copies `from` to these segments, as much as they hold. Returns how much that was.
    pub fn scatter(&self, segments: &[Segment], from: &[u8]) -> Result<usize, OutOfBounds> {
        let mut rest = from;
        for segment in segments {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(segment.len().min(rest.len()));
            self.write(segment.addr(), now)?;
            rest = later;
        }
        Ok(from.len() - rest.len())
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.inner.iter().map(|r| (GuestAddress(r.start_addr().0), r.len()));
        f.debug_list().entries(ranges).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_ranges() -> GuestMemory {
        GuestMemory::anonymous(&[
            (GuestAddress(0), 0x2000),
            (GuestAddress(0x2000), 0x1000),
            (GuestAddress(0x10000), 0x1000),
        ])
        .unwrap()
    }

    #[test]
    fn accesses_cross_touching_ranges_but_not_holes() {
        let memory = two_ranges();
        memory.write(GuestAddress(0x1ffe), b"abcd").unwrap();
        let mut back = [0; 4];
        memory.read(GuestAddress(0x1ffe), &mut back).unwrap();
        assert_eq!(&back, b"abcd");
        assert!(memory.write(GuestAddress(0x2ffe), b"abcd").is_err());
        assert_eq!(memory.size(), 0x4000);
    }

    #[test]
    fn segments_exist_or_are_refused() {
        let memory = two_ranges();
        assert!(memory.segment(GuestAddress(0x1000), 0x2000).is_ok());
        assert!(memory.segment(GuestAddress(0x1000), 0x2001).is_err());
        assert!(memory.segment(GuestAddress(u64::MAX), 2).is_err());
        assert!(memory.segment(GuestAddress(0x5000), 1).is_err());
        let (a, b) = memory.segment(GuestAddress(0), 10).unwrap().split_at(4);
        assert_eq!((a.len(), b.addr(), b.len()), (4, GuestAddress(4), 6));
    }

    #[test]
    fn overlapping_or_empty_ranges_are_refused() {
        for bad in [vec![(GuestAddress(0), 0x2000), (GuestAddress(0x1000), 0x1000)], vec![(GuestAddress(0), 0)]] {
            assert!(GuestMemory::anonymous(&bad).is_err());
        }
    }
}
