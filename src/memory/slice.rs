//! [`GuestSlice`] and [`PinnedSlice`]: a piece of guest memory with fields. It is looked up once, and then read and
//! written field by field.
//!
//! The guest changes it at any time: every field is one access of its own width, and what was read is a copy.
#![allow(
    unsafe_code,
    reason = "guest memory is accessed through a pointer that was looked up before; memory/ is one of the directories that may"
)]

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::VolatileSlice;

use super::{GuestAddress, GuestMemory, OutOfBounds};

/// A piece of guest memory, borrowed. All numbers are little-endian, as the guest's are.
#[derive(Clone, Copy)]
pub(crate) struct GuestSlice<'a> {
    host: *mut u8,
    len: usize,
    memory: PhantomData<&'a GuestMemory>,
}

impl GuestMemory {
    /// Looks up `len` bytes at `addr`. `None` when they are not guest memory, or not all in one range.
    pub(crate) fn view(&self, addr: GuestAddress, len: usize) -> Option<GuestSlice<'_>> {
        self.host(addr, len).map(|host| GuestSlice { host, len, memory: PhantomData })
    }

    /// As [`GuestMemory::view`], to be kept.
    ///
    /// # Errors
    /// When they are not guest memory, or not all in one range.
    pub(crate) fn window(&self, addr: GuestAddress, len: usize) -> Result<PinnedSlice, OutOfBounds> {
        let host = self.host(addr, len).ok_or(OutOfBounds { addr, len })?;
        Ok(PinnedSlice { host, len, memory: self.clone() })
    }
}

impl GuestSlice<'_> {
    /// Where a `T` lies; `None` beyond the end, and where it is not aligned.
    #[inline]
    fn place<T>(self, at: usize) -> Option<*mut T> {
        let place = self.host.wrapping_add(at).cast::<T>();
        let fits = at <= self.len && size_of::<T>() <= self.len - at;
        (fits && place.is_aligned()).then_some(place)
    }

    /// The number at `at`; `None` beyond the end, and where it is not aligned. So it is with all of these.
    #[inline]
    pub(crate) fn load_u16(self, at: usize, order: Ordering) -> Option<u16> {
        let place = self.place(at)?;
        // SAFETY: `place` made sure that it is aligned and within the view, which lies in one mapping that is alive and
        // writable as long as the view is borrowed. All accesses of this process to it are atomic or volatile.
        Some(u16::from_le(unsafe { AtomicU16::from_ptr(place) }.load(order)))
    }

    #[inline]
    pub(crate) fn store_u16(self, at: usize, value: u16, order: Ordering) -> Option<()> {
        let place = self.place(at)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(place) }.store(value.to_le(), order);
        Some(())
    }

    #[inline]
    pub(crate) fn store_u32(self, at: usize, value: u32, order: Ordering) -> Option<()> {
        let place = self.place(at)?;
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU32::from_ptr(place) }.store(value.to_le(), order);
        Some(())
    }

    /// Sixteen bytes at `at`, aligned or not, as two numbers; each byte is read once.
    #[inline]
    pub(crate) fn load_pair(self, at: usize) -> Option<[u64; 2]> {
        let load = |at| {
            let place = self.place(at)?;
            // SAFETY: as in `load_u16`.
            Some(u64::from_le(unsafe { AtomicU64::from_ptr(place) }.load(Ordering::Relaxed)))
        };
        match (load(at), load(at.checked_add(8)?)) {
            (Some(low), Some(high)) => Some([low, high]),
            _ => self.copy_pair(at),
        }
    }

    #[cold]
    fn copy_pair(self, at: usize) -> Option<[u64; 2]> {
        let (mut low, mut high) = ([0; 8], [0; 8]);
        self.read(at, &mut low)?;
        self.read(at.checked_add(8)?, &mut high)?;
        Some([low, high].map(u64::from_le_bytes))
    }

    fn slice(&self, at: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let fits = at <= self.len && len <= self.len - at;
        // SAFETY: the bytes lie within the view, which lies in one mapping that is alive and writable as long as the view is
        // borrowed, and is accessed only as a volatile slice does it.
        fits.then(|| unsafe { VolatileSlice::new(self.host.wrapping_add(at), len) })
    }

    /// Copies from the guest.
    pub(crate) fn read(self, at: usize, to: &mut [u8]) -> Option<()> {
        self.slice(at, to.len()).map(|slice| {
            slice.copy_to(to);
        })
    }

    /// Copies to the guest.
    pub(crate) fn write(self, at: usize, from: &[u8]) -> Option<()> {
        self.slice(at, from.len()).map(|slice| slice.copy_from(from))
    }
}

/// A piece of guest memory, to be kept: it holds on to the memory.
pub(crate) struct PinnedSlice {
    host: *mut u8,
    len: usize,
    memory: GuestMemory,
}

// SAFETY: the pointer lies in a mapping that `memory` keeps alive, whatever thread it is on.
unsafe impl Send for PinnedSlice {}

impl PinnedSlice {
    #[inline]
    pub(crate) fn view(&self) -> GuestSlice<'_> {
        GuestSlice { host: self.host, len: self.len, memory: PhantomData }
    }

    /// The memory that it is a piece of.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

impl fmt::Debug for PinnedSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Window({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn fields_must_be_inside_and_aligned() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000)]).unwrap();
        memory.write(GuestAddress(0x1000), &(0..32).collect::<Vec<u8>>()).unwrap();
        let window = memory.window(GuestAddress(0x1000), 32).unwrap();
        let view = window.view();
        assert_eq!((view.load_u16(2, Relaxed), view.load_u16(30, Relaxed)), (Some(0x0302), Some(0x1f1e)));
        assert_eq!([1, 31, 32, 34, usize::MAX - 1].map(|at| view.load_u16(at, Relaxed)), [None; 5]);
        assert_eq!(
            [28, 30, 32, usize::MAX - 3].map(|at| view.store_u32(at, 0, Relaxed).is_some()),
            [true, false, false, false]
        );
        assert_eq!(view.load_pair(8).map(|pair| pair[1]), Some(0x1716_1514_1312_1110));
        assert_eq!(view.load_pair(7).map(|pair| pair[0]), Some(0x0e0d_0c0b_0a09_0807));
        assert_eq!([17, 32, usize::MAX, usize::MAX - 7].map(|at| view.load_pair(at)), [None; 4]);
        assert_eq!(view.store_u16(0, 0x1234, Relaxed), Some(()));
        let mut back = [0; 3];
        assert_eq!((view.read(0, &mut back), back), (Some(()), [0x34, 0x12, 2]));
        assert!(view.read(30, &mut back).is_none() && view.write(usize::MAX, &back).is_none());
    }

    #[test]
    fn slice_lies_in_one_region() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000)]).unwrap();
        for (addr, len, there) in [
            (0, 0x2000, true),
            (0x1fff, 2, false),
            (0x2000, 0x1000, true),
            (0x2001, 0x1000, false),
            (0x3000, 0, true),
            (u64::MAX, 1, false),
            (0, usize::MAX, false),
        ] {
            let addr = GuestAddress(addr);
            assert_eq!((memory.view(addr, len).is_some(), memory.window(addr, len).is_ok()), (there, there), "{addr}");
        }
    }
}
