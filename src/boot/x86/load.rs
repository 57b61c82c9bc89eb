//! Puts a kernel, its initramfs and its boot parameters into guest memory.
//!
//! Linux x86 boot protocol, 1.15; the memory map is as firmware would report it (ACPI 6.5, 15).

use std::ops::Range;

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};

use super::pvh;
use crate::arch::{self, EntryPoint, layout};
use crate::boot::initramfs::LoadedInitramfs;
use crate::boot::kernel::Loaded;
use crate::boot::{Initramfs, Kernel};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::GuestMemory;

/// Usable memory, in the firmware's numbering.
pub(super) const E820_RAM: u32 = 1;
/// "Unassigned" boot loader (Linux x86 boot protocol, 1.3, type_of_loader).
const LOADER_UNDEFINED: u8 = 0xff;
/// Fields for a kernel without its own header, as the boot protocol has them.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Kernels that do not say how high an initramfs may lie take it below 2 GiB.
const INITRAMFS_LIMIT: u64 = 0x7fff_ffff;

/// Loads everything; returns where the kernel is entered. `cmdline` is the finished text.
///
/// # Errors
/// `InvalidConfig` when something does not fit into the guest's memory, `Unsupported` when the kernel has no such entry.
pub(crate) fn load(memory: &GuestMemory, kernel: &Kernel, cmdline: &str) -> Result<EntryPoint> {
    let (loaded, entry) = (&*kernel.loaded, kernel.entry()?);
    let low_end = memory.regions().first().map_or(0, |r| r.addr.0 + r.len);
    if loaded.end > low_end {
        let (need, have) = (loaded.end.div_ceil(1 << 20), memory.size() >> 20);
        return Err(Error::invalid(
            "memory",
            format!("{have} MiB are too few for this kernel, which needs {need} MiB to unpack itself"),
        ));
    }
    memory.map_image(&loaded.image)?;
    let mut text = cmdline.as_bytes().to_vec();
    text.push(0);
    memory.write(layout::CMDLINE, &text)?;
    let initramfs = kernel.initramfs.as_ref().map(|it| place(it, memory, loaded, low_end)).transpose()?;
    let map = memory_map(memory);
    match entry {
        EntryPoint::Linux64(_) => write_zero_page(memory, &map, header(loaded, cmdline.len(), initramfs))?,
        EntryPoint::Pvh(_) => pvh::write(memory, &map, initramfs)?,
    }
    arch::write_boot_tables(memory, entry)?;
    Ok(entry)
}

/// The ranges of memory to use.
fn memory_map(memory: &GuestMemory) -> Vec<Range<u64>> {
    let mut map = vec![Range { start: 0, end: layout::LOW_MEMORY_END.0 }];
    for region in memory.regions() {
        let start = region.addr.0.max(layout::HIGH_MEMORY.0);
        map.push(start..region.addr.0 + region.len);
    }
    map
}

fn header(loaded: &Loaded, cmdline_len: usize, initramfs: Option<LoadedInitramfs>) -> setup_header {
    let mut header = loaded.entry.header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = layout::CMDLINE.0 as u32;
    header.cmdline_size = cmdline_len as u32;
    if let Some(LoadedInitramfs { addr, size }) = initramfs {
        (header.ramdisk_image, header.ramdisk_size) = (addr.0 as u32, size as u32);
    }
    header
}

fn place(initramfs: &Initramfs, memory: &GuestMemory, loaded: &Loaded, low_end: u64) -> Result<LoadedInitramfs> {
    let limit = loaded.entry.header.map_or(INITRAMFS_LIMIT, |h| u64::from(h.initrd_addr_max)) + 1;
    initramfs.load(memory, loaded.end.next_multiple_of(4096), limit.min(low_end) & !0xfff)
}

fn write_zero_page(memory: &GuestMemory, map: &[Range<u64>], header: setup_header) -> Result<()> {
    // Kernels from before boot protocol 2.14 do not know the field and search for what it points at.
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI.0, ..Default::default() };
    for (entry, range) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: E820_RAM };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, layout::ZERO_PAGE.inner()), memory.inner())
        .map_err(|e| Error::new(ErrorKind::InvalidConfig, format!("memory: writing the boot parameters: {e}")))
}

#[cfg(test)]
mod tests {
    use super::super::tiny::{elf, elf_with_pvh};
    use super::*;
    use crate::boot::kernel::tests::Temp;
    use crate::memory::GuestAddress;

    fn guest(mib: u64) -> GuestMemory {
        GuestMemory::anonymous(&[(GuestAddress(0), mib << 20)]).unwrap()
    }

    fn kernel(name: &str) -> Kernel {
        Kernel::open(&Temp::new(name, &elf(b"\xf4")).0).unwrap()
    }

    fn byte(memory: &GuestMemory, at: u64) -> u8 {
        let mut byte = [0];
        memory.read(GuestAddress(at), &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn kernel_command_line_and_initramfs_are_where_the_kernel_looks() {
        let (memory, kernel) = (guest(8), kernel("load").initramfs(Initramfs::new().file("init", 0o755, "x")));
        assert_eq!(load(&memory, &kernel, "quiet").unwrap(), EntryPoint::Linux64(GuestAddress(0x10_0000)));
        assert_eq!(byte(&memory, 0x10_0000), 0xf4);
        assert_eq!(byte(&memory, layout::CMDLINE.0 + 5), 0);
        let mut at = [0; 4];
        memory.read(GuestAddress(layout::ZERO_PAGE.0 + 0x218), &mut at).unwrap();
        assert_eq!(byte(&memory, u32::from_le_bytes(at).into()), b'0', "a cpio archive begins with its magic number");
        assert_eq!(byte(&memory, layout::ZERO_PAGE.0 + 0x1e8), 2, "memory below and above the legacy area");
        memory.read(GuestAddress(layout::ZERO_PAGE.0 + 0x70), &mut at).unwrap();
        assert_eq!(u64::from(u32::from_le_bytes(at)), layout::ACPI.0, "acpi_rsdp_addr");
    }

    #[test]
    fn pvh_start_info_matches_boot_params() {
        let kernel = Kernel::open(&Temp::new("start-info", &elf_with_pvh(b"\xf4")).0).unwrap().pvh(true);
        let (memory, kernel) = (guest(8), kernel.initramfs(Initramfs::new().file("init", 0o755, "x")));
        assert_eq!(load(&memory, &kernel, "quiet").unwrap(), EntryPoint::Pvh(GuestAddress(0x10_0000)));
        let number = |at: u64| {
            let mut number = [0; 8];
            memory.read(GuestAddress(at), &mut number).unwrap();
            u64::from_le_bytes(number)
        };
        let info = layout::PVH_START_INFO.0;
        assert_eq!((number(info), number(info + 8) >> 32), (1 << 32 | 0x336e_c578, 1), "magic, version, modules");
        assert_eq!(byte(&memory, number(number(info + 16))), b'0', "a cpio archive begins with its magic number");
        assert_eq!((byte(&memory, number(info + 24)), number(info + 32)), (b'q', layout::ACPI.0));
        let (map, entries) = (number(info + 40), number(info + 48));
        assert_eq!((entries, number(map), number(map + 8)), (2, 0, layout::LOW_MEMORY_END.0));
        assert_eq!((number(map + 24), number(map + 32), number(map + 40)), (1 << 20, 7 << 20, 1));
    }

    #[test]
    fn an_initramfs_larger_than_memory_is_refused() {
        let kernel = kernel("large").initramfs(Initramfs::new().file("x", 0o644, vec![0; 8 << 20]));
        assert_eq!(load(&guest(8), &kernel, "").unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}
