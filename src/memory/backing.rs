//! What of the host's a guest's memory is made of.
#![allow(
    unsafe_code,
    reason = "makes files without names and advises about pages; memory/ is one of the directories that may"
)]

use std::fs::{self, File};
use std::io;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::{GuestAddress, GuestMemory};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys::{self, ForkGuard};

/// The size of a guest's memory, and what backs it; a config value. A plain [`Size`] is [`Memory::anonymous`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct Memory {
    size: Size,
    backing: Backing,
}

/// Memory of huge pages; see [`Memory::hugetlb`]. A config value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a config value does nothing by itself"]
pub struct HugetlbMemory {
    size: Size,
    page: Size,
}

impl HugetlbMemory {
    /// Sets the size of a page, of which the memory's size is a multiple.
    ///
    /// On most hosts that is 2 MiB, which is the default, or 1 GiB.
    pub const fn page_size(mut self, page: Size) -> Self {
        self.page = page;
        self
    }
}

impl From<HugetlbMemory> for Memory {
    fn from(HugetlbMemory { size, page }: HugetlbMemory) -> Self {
        Self { size, backing: Backing::Huge(page.as_bytes()) }
    }
}

/// What a mapping is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Backing {
    Anonymous,
    Transparent,
    Memfd,
    /// In pages of so many bytes.
    Huge(u64),
}

impl Memory {
    /// Ordinary memory, in whole pages of 4 KiB.
    ///
    /// The host gives pages as they are touched, and gets back what the guest frees. Whether it uses huge pages is the
    /// host's setting.
    pub const fn anonymous(size: Size) -> Self {
        Self { size, backing: Backing::Anonymous }
    }

    /// Ordinary memory for which the host is asked to use transparent huge pages (`MADV_HUGEPAGE`).
    ///
    /// There are fewer TLB misses, and more memory is touched at once. A host that does not know them gives ordinary
    /// pages.
    pub const fn transparent_huge_pages(size: Size) -> Self {
        Self { size, backing: Backing::Transparent }
    }

    /// Memory of a file without a name (memfd), which other processes can map.
    ///
    /// See [`Vm::memory_fd`](crate::Vm::memory_fd). The kernel is copied into it instead of being shared with other
    /// guests.
    ///
    /// [`Vm::memory_fd`]: crate::Vm::memory_fd
    pub const fn memfd(size: Size) -> Self {
        Self { size, backing: Backing::Memfd }
    }

    /// Huge pages from the host's pool (hugetlbfs), of 2 MiB unless [`HugetlbMemory::page_size`] says otherwise.
    ///
    /// All of them are reserved when the VM starts and kept until it ends: neither a balloon nor what the guest frees
    /// gives any back. Other processes can map them, as with [`Memory::memfd`].
    pub const fn hugetlb(size: Size) -> HugetlbMemory {
        HugetlbMemory { size, page: Size::mib(2) }
    }

    pub(crate) fn size(&self) -> Size {
        self.size
    }

    pub(crate) fn backing(&self) -> Backing {
        self.backing
    }
}

impl From<Size> for Memory {
    fn from(size: Size) -> Self {
        Self::anonymous(size)
    }
}

impl Backing {
    /// Whether the mapping is of a file that others may map too.
    fn shared(self) -> bool {
        matches!(self, Self::Memfd | Self::Huge(_))
    }

    /// The file for `len` bytes in all.
    fn file(self, len: u64) -> Result<Option<Arc<File>>> {
        let flags = match self {
            Self::Anonymous | Self::Transparent => return Ok(None),
            Self::Memfd => 0,
            Self::Huge(page) => {
                pool_has(page, len)?;
                libc::MFD_HUGETLB | page.trailing_zeros() << libc::MFD_HUGE_SHIFT
            }
        };
        let doing = || "memory: creating a file for the guest's memory";
        let file = sys::memfd(flags).doing(doing)?;
        file.set_len(len).doing(doing)?;
        Ok(Some(Arc::new(file)))
    }

    fn map(self, file: Option<FileOffset>, len: usize) -> Result<MmapRegion> {
        let flags = match self {
            Self::Anonymous | Self::Transparent => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            Self::Memfd => libc::MAP_SHARED | libc::MAP_NORESERVE,
            // Reserved now, so that the pool cannot be empty when a page is touched: that would be a signal.
            Self::Huge(_) => libc::MAP_SHARED,
        };
        let mut builder = MmapRegionBuilder::new(len)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_hugetlbfs(matches!(self, Self::Huge(_)));
        if let Some(file) = file {
            builder = builder.with_file_offset(file);
        }
        builder.build().map_err(|error| {
            let why = match self {
                Self::Huge(page) => format!("; the host's pool of {} pages is used up", Size::bytes(page)),
                _ => "; see vm.overcommit_memory and this process's RLIMIT_AS".into(),
            };
            Error::new(
                ErrorKind::ResourceExhausted,
                format!("memory: mapping {}: {error}{why}", Size::bytes(len as u64)),
            )
        })
    }
}

impl GuestMemory {
    /// Maps memory for the ranges, which must be sorted and disjoint.
    ///
    /// # Errors
    /// - `ResourceExhausted` when the host has no address space or no huge pages left.
    /// - `Unsupported` for huge pages of a size that the host does not know.
    /// - `InvalidConfig` for a range that is empty, overlaps another, or is not whole pages.
    pub(crate) fn new(ranges: &[(GuestAddress, u64)], backing: Backing) -> Result<Self> {
        if let Backing::Huge(page) = backing
            && (!page.is_power_of_two() || ranges.iter().any(|(_, len)| len % page != 0))
        {
            let (page, len) = (Size::bytes(page), Size::bytes(ranges.iter().map(|(_, len)| len).sum()));
            return Err(Error::invalid("memory", format!("{len} is not whole huge pages of {page}")));
        }
        let file = backing.file(ranges.iter().map(|(_, len)| len).sum())?;
        let (mut regions, mut offset) = (Vec::with_capacity(ranges.len()), 0);
        for &(addr, len) in ranges {
            let size = usize::try_from(len).map_err(|_| Error::invalid("memory", "larger than the address space"))?;
            let part = file.as_ref().map(|file| FileOffset::from_arc(file.clone(), offset));
            let region = GuestRegionMmap::new(backing.map(part, size)?, addr.inner());
            regions.push(region.ok_or_else(|| Error::invalid("memory", "ends beyond the address space"))?);
            offset += len;
        }
        let inner = GuestMemoryMmap::from_regions(regions)
            .map_err(|error| Error::invalid("memory", format!("laying out the guest's memory: {error}")))?;
        let guard = file.as_deref().map(|file| Arc::new(ForkGuard::new(file)));
        let memory = Self { _guard: guard, inner: Arc::new(inner), backing };
        for region in memory.regions() {
            sys::keep_private(region.host.cast(), usize::try_from(region.len).unwrap_or(usize::MAX));
        }
        if backing == Backing::Transparent {
            memory.advise_all(libc::MADV_HUGEPAGE);
        }
        Ok(memory)
    }

    /// The file that this is a mapping of, from its first byte on.
    pub(crate) fn file(&self) -> Option<Arc<File>> {
        self.inner.iter().next()?.file_offset().map(|it| it.arc().clone())
    }

    /// Returns whether other processes cannot see what the guest writes.
    pub(super) fn private(&self) -> bool {
        !self.backing.shared()
    }

    fn advise_all(&self, advice: libc::c_int) {
        for region in self.regions() {
            let len = usize::try_from(region.len).unwrap_or(usize::MAX);
            // SAFETY: the range is one mapping of this guest's memory; the advice changes no contents.
            if unsafe { libc::madvise(region.host.cast(), len, advice) } != 0 {
                log::info!("the host gives no transparent huge pages: {}", io::Error::last_os_error());
            }
        }
    }
}

/// Says beforehand, and better than the system call would, that there are too few huge pages.
fn pool_has(page: u64, len: u64) -> Result<()> {
    const POOLS: &str = "/sys/kernel/mm/hugepages";
    let pool = format!("{POOLS}/hugepages-{}kB", page >> 10);
    let number = |file: &str| fs::read_to_string(format!("{pool}/{file}")).ok()?.trim().parse::<u64>().ok();
    let size = Size::bytes(page);
    let (Some(all), Some(free)) = (number("nr_hugepages"), number("free_hugepages")) else {
        let known = fs::read_dir(POOLS).map_or_else(
            |_| "none".into(),
            |dir| {
                let names = dir.flatten().filter_map(|e| e.file_name().into_string().ok());
                names.map(|n| n.trim_start_matches("hugepages-").to_owned()).collect::<Vec<_>>().join(", ")
            },
        );
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("memory: this host has no huge pages of {size} (it has {known})"),
        ));
    };
    let reserved = number("resv_hugepages").unwrap_or(0);
    let (wanted, left) = (len / page, free.saturating_sub(reserved));
    if wanted > left {
        return Err(Error::new(
            ErrorKind::ResourceExhausted,
            format!("memory: {wanted} huge pages of {size} wanted, {left} of {all} left; raise {pool}/nr_hugepages"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES: [(GuestAddress, u64); 2] = [(GuestAddress(0), 2 << 20), (GuestAddress(1 << 32), 4 << 20)];

    #[test]
    fn shared_mapping_has_guest_memory_in_address_order() {
        use std::os::unix::fs::FileExt;
        let memory = GuestMemory::new(&RANGES, Backing::Memfd).unwrap();
        memory.write(GuestAddress((1 << 32) + 5), b"there").unwrap();
        let mut back = [0; 5];
        memory.file().unwrap().read_exact_at(&mut back, (2 << 20) + 5).unwrap();
        assert_eq!(&back, b"there");
        assert!(GuestMemory::new(&RANGES, Backing::Transparent).unwrap().file().is_none());
    }

    #[test]
    fn discarded_memory_reads_as_zero_in_every_mapping() {
        let memory = GuestMemory::new(&RANGES, Backing::Memfd).unwrap();
        memory.write(GuestAddress(0x1000), &[7; 0x3000]).unwrap();
        let before = memory.resident().unwrap();
        memory.discard(memory.segment(GuestAddress(0x1000), 0x2000).unwrap());
        assert_eq!(before - memory.resident().unwrap(), 0x2000);
        let mut back = [1; 2];
        memory.read(GuestAddress(0x2fff), &mut back).unwrap();
        assert_eq!(back, [0, 7]);
    }

    #[test]
    fn missing_huge_pages_are_named() {
        let error = |page: u64, len: u64| GuestMemory::new(&[(GuestAddress(0), len)], Backing::Huge(page)).unwrap_err();
        assert_eq!(error(2 << 20, 3 << 20).to_string(), "memory: 3 MiB is not whole huge pages of 2 MiB");
        assert_eq!(error(3 << 20, 3 << 20).kind(), ErrorKind::InvalidConfig);
        let odd = error(64 << 10, 64 << 10);
        assert_eq!(odd.kind(), ErrorKind::Unsupported);
        assert!(odd.to_string().starts_with("memory: this host has no huge pages of 64 KiB (it has "), "{odd}");
        // More than any machine's pool, where there is one.
        let many = error(2 << 20, 1 << 44);
        assert!(matches!(many.kind(), ErrorKind::ResourceExhausted | ErrorKind::Unsupported), "{many}");
    }

    #[test]
    fn memory_beyond_the_address_space_is_resource_exhausted() {
        let error = GuestMemory::new(&[(GuestAddress(0), 1 << 47)], Backing::Anonymous).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        assert!(error.to_string().starts_with("memory: mapping 131072 GiB: "), "{error}");
    }
}
