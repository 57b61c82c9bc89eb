//! [`RegisterPages`]: memory that holds what guests read of their devices' registers.
//!
//! The hypervisor shows it to the guest without letting it write there, so that a read is no exit. Written by the device's thread
//! and by vCPU threads; every access is atomic for as many bytes as it has.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use super::ProcessGeneration;

/// Bytes of one device's registers: a page.
const WINDOW: usize = 4096;

struct Mapping {
    host: *mut u8,
    len: usize,
    /// Where it is mapped.
    origin: ProcessGeneration,
}

// SAFETY: the mapping has no other owner, is not moved, and is accessed by atomic operations alone.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // A child of fork has no such mapping, and may have another one there.
        if self.origin.is_current() {
            // SAFETY: `new` mapped exactly this in this process, and who could still refer to it would have kept it.
            unsafe { libc::munmap(self.host.cast(), self.len) };
        }
    }
}

/// The registers of several devices, each in a page of its own. Clones are the same.
#[derive(Clone)]
pub(crate) struct RegisterPages(Arc<Mapping>);

impl RegisterPages {
    /// All zeros, for so many devices.
    pub(crate) fn new(devices: usize) -> io::Result<Self> {
        let len = devices.max(1).checked_mul(WINDOW).ok_or(io::ErrorKind::InvalidInput)?;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, wherever the kernel likes; nothing that there is can be hurt.
        let host = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if host == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        super::keep_private(host, len);
        Ok(Self(Arc::new(Mapping { host: host.cast(), len, origin: ProcessGeneration::current() })))
    }

    /// Those of device `n`.
    pub(crate) fn device(&self, n: usize) -> Option<RegisterPage> {
        let at = n.checked_mul(WINDOW).filter(|at| *at < self.0.len)?;
        Some(RegisterPage { pages: self.0.clone(), at })
    }

    /// Where they are in this process, and how many bytes.
    pub(crate) fn host(&self) -> (*mut u8, usize) {
        (self.0.host, self.0.len)
    }
}

impl fmt::Debug for RegisterPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegisterPages({})", self.0.len / WINDOW)
    }
}

/// The registers of one device as its guest reads them, little-endian. Clones are the same; beyond the page nothing is there.
#[derive(Clone)]
pub(crate) struct RegisterPage {
    pages: Arc<Mapping>,
    at: usize,
}

impl RegisterPage {
    /// Of a device that is alone, and is not shown to a guest.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn alone() -> io::Result<Self> {
        RegisterPages::new(1)?.device(0).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn word(&self, offset: usize) -> Option<&AtomicU32> {
        let within = offset.is_multiple_of(4) && offset <= WINDOW - 4;
        // SAFETY: the page is in the mapping, which lives as long as `self`; the word is in the page and aligned, and all access
        // is atomic.
        within.then(|| unsafe { AtomicU32::from_ptr(self.pages.host.add(self.at + offset).cast()) })
    }

    fn byte(&self, offset: usize) -> Option<&AtomicU8> {
        // SAFETY: as in `word`.
        (offset < WINDOW).then(|| unsafe { AtomicU8::from_ptr(self.pages.host.add(self.at + offset)) })
    }

    pub(crate) fn load(&self, offset: usize) -> u32 {
        self.word(offset).map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    pub(crate) fn store(&self, offset: usize, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// Sets these bits; what was there before comes back.
    pub(crate) fn set(&self, offset: usize, bits: u32) -> u32 {
        self.word(offset).map_or(0, |word| u32::from_le(word.fetch_or(bits.to_le(), Ordering::SeqCst)))
    }

    /// Clears these bits.
    pub(crate) fn clear(&self, offset: usize, bits: u32) {
        if let Some(word) = self.word(offset) {
            word.fetch_and(!bits.to_le(), Ordering::SeqCst);
        }
    }

    /// Fills `to`; what lies beyond the page stays as it is.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) {
        if let (Ok(to), Some(word)) = (<&mut [u8; 4]>::try_from(&mut *to), self.word(offset)) {
            *to = word.load(Ordering::SeqCst).to_ne_bytes();
            return;
        }
        for (n, to) in to.iter_mut().enumerate() {
            let Some(byte) = offset.checked_add(n).and_then(|at| self.byte(at)) else { return };
            *to = byte.load(Ordering::SeqCst);
        }
    }

    /// Puts bytes there, by whole words where they are any.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) {
        for (n, part) in from.chunks(4).enumerate() {
            let Some(at) = offset.checked_add(4 * n) else { return };
            if let (Ok(part), Some(word)) = (<[u8; 4]>::try_from(part), self.word(at)) {
                word.store(u32::from_ne_bytes(part), Ordering::SeqCst);
                continue;
            }
            for (n, from) in part.iter().enumerate() {
                let Some(byte) = at.checked_add(n).and_then(|at| self.byte(at)) else { return };
                byte.store(*from, Ordering::SeqCst);
            }
        }
    }
}

impl fmt::Debug for RegisterPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registers({})", self.at / WINDOW)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_separate_register_pages() {
        let pages = RegisterPages::new(2).unwrap();
        let [one, two] = [0, 1].map(|n| pages.device(n).unwrap());
        assert!(pages.device(2).is_none() && pages.device(usize::MAX).is_none());
        one.store(0xffc, 0x0403_0201);
        assert_eq!((one.load(0xffc), two.load(0), two.load(0xffc)), (0x0403_0201, 0, 0));
        assert_eq!((one.set(0xffc, 0x10), one.load(0xffc)), (0x0403_0201, 0x0403_0211));
        one.clear(0xffc, 0x11);
        let mut bytes = [9; 8];
        one.read(0xffa, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 2, 3, 4, 9, 9]);
        for at in [1, 2, 0xffd, 0x1000, usize::MAX] {
            two.store(at, 7);
            assert_eq!(two.load(at), 0, "{at}");
        }
        two.write(0xff9, &[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        two.read(0xff8, &mut bytes);
        assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 7]);
        drop(pages);
        assert_eq!(one.load(0xffc), 0x0403_0200);
    }
}
