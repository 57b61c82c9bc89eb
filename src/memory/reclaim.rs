//! What guest memory costs the host, and giving it back.
#![allow(unsafe_code, reason = "advises about and asks for pages; memory/ is one of the directories that may")]

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Backing, GuestMemory, Segment};
use crate::sys;

/// Pages asked about at once: 256 MiB of memory, 64 KiB of answers.
const BATCH: usize = 1 << 16;

impl GuestMemory {
    /// Gives the host back what lies in `segment`, as far as it is whole pages. The guest finds something else there
    /// afterwards: zeros, or what the kernel's image has in that place.
    pub(crate) fn discard(&self, segment: Segment) {
        let advice = match self.backing {
            Backing::Anonymous | Backing::Transparent => libc::MADV_DONTNEED,
            // Taken out of the file too.
            Backing::Memfd => libc::MADV_REMOVE,
            // Their reservation would go with them, and touching them again could be a signal.
            Backing::Huge(_) => return,
        };
        let page = sys::page_size();
        for slice in self.inner.get_slices(segment.addr().inner(), segment.len()).flatten() {
            let (at, len) = (slice.ptr_guard_mut().as_ptr(), slice.len());
            let skip = at.addr().next_multiple_of(page) - at.addr();
            let whole = len.saturating_sub(skip) / page * page;
            if whole == 0 {
                continue;
            }
            // SAFETY: the range lies inside one mapping of this guest's memory, which is only ever accessed through raw
            // pointers and by the guest, neither of which counts on its contents.
            if unsafe { libc::madvise(at.wrapping_add(skip).cast(), whole, advice) } != 0 {
                log::debug!("memory cannot be given back: {}", std::io::Error::last_os_error());
            }
        }
    }

    /// How many bytes the host has in memory for this guest, those of a kernel image that guests share included.
    pub(crate) fn resident(&self) -> std::io::Result<u64> {
        let (page, mut found) = (sys::page_size(), 0);
        let mut pages = vec![0u8; BATCH];
        for region in self.inner.iter() {
            let (start, len) = (region.as_ptr(), usize::try_from(region.len()).unwrap_or(usize::MAX));
            for at in (0..len).step_by(BATCH * page) {
                let part = (len - at).min(BATCH * page);
                // SAFETY: the range is page-aligned and inside this region's mapping; `pages` has a byte for each page.
                if unsafe { libc::mincore(start.wrapping_add(at).cast(), part, pages.as_mut_ptr()) } != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                found += pages.iter().take(part.div_ceil(page)).filter(|page| **page & 1 != 0).count();
            }
        }
        Ok((found * page) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;

    #[test]
    fn only_whole_pages_are_discarded() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)]).unwrap();
        memory.write(GuestAddress(0), &vec![7; 2 << 20]).unwrap();
        let full = memory.resident().unwrap();
        assert_eq!(full, 2 << 20);
        // Across both regions, from inside one page to inside another.
        memory.discard(memory.segment(GuestAddress(0x1800), (1 << 20) + 0x1000).unwrap());
        let byte = |at| {
            let mut byte = [0];
            memory.read(GuestAddress(at), &mut byte).unwrap();
            byte[0]
        };
        let seen = [0x1fff, 0x2000, 0xf_ffff, 0x10_1fff, 0x10_2000].map(byte);
        assert_eq!(seen, [7, 0, 0, 0, 7]);
    }
}
