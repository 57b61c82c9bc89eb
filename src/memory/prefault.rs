//! The pages of a kernel image that guests write at boot. Later guests get them copied beforehand.
//!
//! Linux patches the same pages at every boot, for the processor that it finds. Copying such a page on its first write
//! takes two faults and a TLB shootdown for the whole process. So the first guest shows which pages they are, and later
//! guests get private copies before they run.
#![allow(unsafe_code, reason = "advises about pages; memory/ is one of the directories that may")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::GuestMemoryBackend;

use super::{GuestAddress, GuestMemory, MemoryImage};
use crate::sys;

/// No more than so many pages are given to a guest that has not asked for them.
const MAX_PREFAULT_PAGES: usize = 1024;
/// Pages that are asked about at once, at 8 bytes each.
const BATCH: usize = 1 << 10;
/// In an entry of pagemap: the page is there, and it is one of a file (Linux, admin-guide/mm/pagemap).
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

impl GuestMemory {
    /// Looks which pages of the image below its data this guest has written; the first time for an image only.
    pub(crate) fn record_dirty_pages(&self, image: &MemoryImage) {
        if self.private() {
            image.written.get_or_init(|| {
                self.written(image).unwrap_or_else(|error| {
                    log::debug!("what a guest has written cannot be seen: {error}");
                    Vec::new()
                })
            });
        }
    }

    /// The ranges of such pages.
    fn written(&self, image: &MemoryImage) -> io::Result<Vec<Range<u64>>> {
        let (page, data) = (sys::page_size() as u64, image.data());
        let (mut found, mut count): (Vec<Range<u64>>, _) = (Vec::new(), 0);
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut entries = vec![0; BATCH * 8];
        for extent in image.extents() {
            let end = extent.end.min(data.0);
            for at in (extent.start..end).step_by(BATCH * page as usize) {
                let pages = (end - at).div_ceil(page).min(BATCH as u64);
                let slice = self.inner.get_slice(GuestAddress(at).inner(), page as usize).map_err(io::Error::other)?;
                let (first, room) = (slice.ptr_guard().as_ptr().addr() as u64 / page, pages as usize * 8);
                let entries = entries.get_mut(..room).unwrap_or_default();
                pagemap.read_exact_at(entries, first * 8)?;
                let own = |bytes: &[u8]| {
                    let entry = bytes.try_into().map_or(0, u64::from_le_bytes);
                    entry & PRESENT != 0 && entry & OF_FILE == 0
                };
                for (n, _) in (0..).zip(entries.chunks_exact(8)).filter(|(_, bytes)| own(bytes)) {
                    let at = at + n * page;
                    match found.last_mut() {
                        Some(range) if range.end == at => range.end += page,
                        _ => found.push(at..at + page),
                    }
                    count += 1;
                    if count == MAX_PREFAULT_PAGES {
                        return Ok(found);
                    }
                }
            }
        }
        Ok(found)
    }

    /// Makes those pages this guest's own, as far as the host's kernel can (Linux 5.14).
    pub(super) fn prefault_writable(&self, image: &MemoryImage) {
        for range in image.written.get().into_iter().flatten() {
            let len = (range.end - range.start) as usize;
            let Ok(slice) = self.inner.get_slice(GuestAddress(range.start).inner(), len) else { continue };
            // SAFETY: the range is page-aligned and inside one mapping of this guest's memory; the advice changes no contents.
            let advised =
                unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), len, libc::MADV_POPULATE_WRITE) };
            if advised != 0 {
                log::debug!("pages are copied when they are written: {}", io::Error::last_os_error());
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dirty_pages_of_the_first_guest_are_prefaulted_in_others() {
        let (start, page) = (GuestAddress(0x10_0000), sys::page_size() as u64);
        let at = |n: u64| GuestAddress(start.0 + n * page);
        let (image, ()) =
            MemoryImage::build(64 << 20, |memory| Ok(memory.write(start, &vec![7; 16 * page as usize])?)).unwrap();
        let image = image.with_data(at(8));
        let guest = || {
            let guest = GuestMemory::anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap();
            guest.map_image(&image).unwrap();
            guest
        };
        let first = guest();
        let mut seen = [0];
        first.read(at(1), &mut seen).unwrap();
        for n in [2, 3, 5, 9] {
            first.write(at(n), b"x").unwrap();
        }
        first.record_dirty_pages(&image);
        let learned = vec![at(2).0..at(4).0, at(5).0..at(6).0];
        assert_eq!(image.written.get(), Some(&learned), "those above were copied before");

        let second = guest();
        assert_eq!(second.written(&image).unwrap(), learned, "before it has written anything");
        second.read(at(2), &mut seen).unwrap();
        assert_eq!(seen, [7]);
        second.write(at(7), b"x").unwrap();
        second.record_dirty_pages(&image);
        assert_eq!(image.written.get(), Some(&learned), "one guest's word is enough");
    }

    #[test]
    fn prefaulted_pages_are_bounded() {
        let page = sys::page_size();
        let all = 2 * MAX_PREFAULT_PAGES * page;
        let (image, ()) =
            MemoryImage::build(64 << 20, |memory| Ok(memory.write(GuestAddress(0), &vec![7; all])?)).unwrap();
        let guest = GuestMemory::anonymous(&[(GuestAddress(0), 32 << 20)]).unwrap();
        guest.map_image(&image).unwrap();
        guest.write(GuestAddress(0), &vec![8; all]).unwrap();
        guest.record_dirty_pages(&image);
        assert_eq!(image.written.get(), Some(&vec![Range { start: 0, end: (MAX_PREFAULT_PAGES * page) as u64 }]));
    }
}
