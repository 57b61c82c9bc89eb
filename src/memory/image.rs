//! A piece of guest memory that is filled once and sealed. It is mapped copy-on-write into any number of guests.
//!
//! A kernel is loaded into one when it is opened. Starting a VM maps it, so ten VMs of one kernel share its pages and
//! none waits for a copy. The file is an anonymous, sealed memfd, which cannot be truncated below a running guest.
#![allow(unsafe_code, reason = "maps a file over guest memory; memory/ is one of the directories that may")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap};

use super::{Backing, GuestAddress, GuestMemory, Segment};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys;

/// Sealed contents for parts of guest memory, starting at guest address 0.
#[derive(Debug)]
pub(crate) struct MemoryImage {
    file: File,
    /// Page-aligned ranges that hold data, sorted. Everything else is a hole.
    extents: Vec<Range<u64>>,
    /// Where what guests write at once begins, as far as its maker can tell; the end otherwise.
    data: u64,
    /// Ranges that guests write at once, as the first has shown.
    pub(super) written: OnceLock<Vec<Range<u64>>>,
}

impl MemoryImage {
    /// Lets `fill` write into empty memory of `len` bytes at guest address 0, then seals what it wrote.
    ///
    /// # Errors
    /// What `fill` returns; `ResourceExhausted` when the host has no memory or descriptors left.
    pub(crate) fn build<T>(len: u64, fill: impl FnOnce(&GuestMemory) -> Result<T>) -> Result<(Self, T)> {
        let file = sys::memfd(libc::MFD_ALLOW_SEALING).doing(|| "creating a memory image")?;
        file.set_len(len).doing(|| "creating a memory image")?;
        let backing = FileOffset::new(file.try_clone().doing(|| "creating a memory image")?, 0);
        let size = usize::try_from(len).map_err(|_| Error::invalid("memory image", "too large"))?;
        let inner = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0).inner(), size, Some(backing))])
            .map_err(|e| Error::new(ErrorKind::ResourceExhausted, format!("mapping a memory image: {e}")))?;
        let answer = fill(&GuestMemory { _guard: None, inner: Arc::new(inner), backing: Backing::Memfd })?;
        let extents = extents(&file).doing(|| "reading a memory image's layout")?;
        seal(&file).doing(|| "sealing a memory image")?;
        let data = end(&extents);
        Ok((Self { file, extents, data, written: OnceLock::new() }, answer))
    }

    /// Says that guests write at once what is from `at` on.
    pub(crate) fn with_data(self, at: GuestAddress) -> Self {
        Self { data: at.0.min(self.end()), ..self }
    }

    /// Where what guests write at once begins.
    pub(crate) fn data(&self) -> GuestAddress {
        GuestAddress(self.data)
    }

    /// The end of the last byte that holds data, rounded up to a page.
    pub(crate) fn end(&self) -> u64 {
        end(&self.extents)
    }

    /// The ranges that hold data, sorted.
    pub(crate) fn extents(&self) -> &[Range<u64>] {
        &self.extents
    }

    /// Copies from the image.
    ///
    /// # Errors
    /// `Corrupt` beyond the image's length.
    pub(crate) fn read(&self, addr: GuestAddress, to: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(to, addr.0).doing(|| "reading a memory image")
    }

    /// Where the first data is.
    pub(crate) fn start(&self) -> u64 {
        self.extents.first().map_or(0, |extent| extent.start)
    }

    /// How many bytes hold data.
    #[cfg(test)]
    pub(crate) fn data_len(&self) -> u64 {
        self.extents.iter().map(|extent| extent.end - extent.start).sum()
    }
}

impl GuestMemory {
    /// Maps the image into guest memory. What lies below its data is mapped copy-on-write. What follows is copied, as
    /// the guest writes it at once. Where others see what the guest writes, all of it is copied. What was there before
    /// is gone.
    ///
    /// # Errors
    /// `InvalidConfig` when the memory is too small for the image, `ResourceExhausted` when the host has too many
    /// mappings.
    pub(crate) fn map_image(&self, image: &MemoryImage) -> Result<()> {
        let data = if self.private() { image.data.next_multiple_of(sys::page_size() as u64) } else { 0 };
        let split = |extent: &Range<u64>| {
            let middle = data.clamp(extent.start, extent.end);
            [extent.start..middle, middle..extent.end]
        };
        for Range { start, end } in image.extents.iter().flat_map(split).filter(|part| !part.is_empty()) {
            let size = usize::try_from(end - start).map_err(|_| Error::invalid("memory", "too large"))?;
            let small = |_| {
                Error::invalid(
                    "memory",
                    format!("{} bytes cannot hold the kernel, which needs {start:#x}..{end:#x}", self.size()),
                )
            };
            let segment = self.segment(GuestAddress(start), size).map_err(small)?;
            match start < data {
                true => self.map_over(segment, image).doing(|| "mapping the kernel into guest memory")?,
                false => self.copy_over(segment, image).doing(|| "copying the kernel into guest memory")?,
            }
        }
        if data > 0 {
            self.prefault_writable(image);
        }
        Ok(())
    }

    fn map_over(&self, segment: Segment, image: &MemoryImage) -> io::Result<()> {
        let (addr, len) = (segment.addr(), segment.len());
        // One slice means that the range is contiguous in this process too.
        let slice = self.inner.get_slice(addr.inner(), len).map_err(io::Error::other)?;
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE);
        let offset = i64::try_from(addr.0).map_err(io::Error::other)?;
        let at = slice.ptr_guard_mut().as_ptr();
        // SAFETY: `at..at+len` lies inside one mapping of this guest's memory, which stays mapped as long as `self`
        // and is only ever accessed through raw pointers; extents are page-aligned, as guest ranges are.
        let mapped = unsafe { libc::mmap(at.cast(), len, prot, flags, image.file.as_raw_fd(), offset) };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        sys::keep_private(mapped, len);
        Ok(())
    }

    fn copy_over(&self, segment: Segment, image: &MemoryImage) -> io::Result<()> {
        let mut rest = segment;
        while rest.len() > 0 {
            match self.read_at(&[rest], image.file.as_fd(), rest.addr().0)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => rest = rest.split_at(n).1,
            }
        }
        Ok(())
    }
}

fn end(extents: &[Range<u64>]) -> u64 {
    extents.last().map_or(0, |extent| extent.end)
}

fn seal(file: &File) -> io::Result<()> {
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_WRITE | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an integer.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The whole pages of a sparse file that hold data.
fn extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let page = sys::page_size() as u64;
    let whole = |range: Range<u64>| range.start / page * page..range.end.next_multiple_of(page);
    Ok(sys::data_ranges(file)?.into_iter().map(whole).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_share_the_image_and_keep_their_changes_to_themselves() {
        let (image, ()) = MemoryImage::build(1 << 30, |memory| {
            memory.write(GuestAddress(0x10_0000), b"kernel")?;
            Ok(())
        })
        .unwrap();
        assert!(image.end() > 0x10_0000 && image.data_len() < 1 << 20, "only what was written is kept");
        let guest = |backing| GuestMemory::new(&[(GuestAddress(0), 4 << 20)], backing).unwrap();
        let guests = [Backing::Memfd, Backing::Anonymous, Backing::Transparent].map(guest);
        for guest in &guests {
            guest.map_image(&image).unwrap();
        }
        guests[0].write(GuestAddress(0x10_0000), b"KERNEL").unwrap();
        let mut seen = [0; 6];
        guests[1].write(GuestAddress(0x10_0001), b"E").unwrap();
        guests[2].read(GuestAddress(0x10_0000), &mut seen).unwrap();
        assert_eq!(&seen, b"kernel");
    }

    #[test]
    fn written_kernel_pages_are_copied_and_the_rest_shared() {
        let bytes: Vec<u8> = (0..4 << 12).map(|at| (at % 251) as u8).collect();
        let (image, ()) =
            MemoryImage::build(1 << 30, |memory| Ok(memory.write(GuestAddress(0x10_0000), &bytes)?)).unwrap();
        // In the middle of the second page, so copying begins with the third.
        let image = image.with_data(GuestAddress(0x10_1800));
        let guest = GuestMemory::anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap();
        guest.map_image(&image).unwrap();
        let mut seen = vec![0; bytes.len()];
        guest.read(GuestAddress(0x10_0000), &mut seen).unwrap();
        assert_eq!(seen, bytes);
        let discarded = guest.segment(GuestAddress(0x10_0000), bytes.len()).unwrap();
        guest.discard(discarded);
        guest.read(GuestAddress(0x10_0000), &mut seen).unwrap();
        assert_eq!(seen[..0x2000], bytes[..0x2000], "mapped: the image shows through");
        assert!(seen[0x2000..].iter().all(|byte| *byte == 0), "copied: nothing is below");
    }

    #[test]
    fn a_guest_too_small_for_the_image_is_refused() {
        let (image, ()) = MemoryImage::build(64 << 20, |m| Ok(m.write(GuestAddress(32 << 20), b"x")?)).unwrap();
        let small = GuestMemory::anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap();
        assert_eq!(small.map_image(&image).unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}
