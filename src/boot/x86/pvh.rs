//! The start info of a kernel that is started by its PVH entry point.
//!
//! It takes the place of Linux's boot parameters (Xen, public/arch-x86/hvm/start_info.h).

use std::ops::Range;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::load::E820_RAM;
use crate::arch::layout;
use crate::boot::initramfs::LoadedInitramfs;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const VERSION: u32 = 1;

/// Writes it for a machine with this memory map and initramfs.
pub(super) fn write(memory: &GuestMemory, map: &[Range<u64>], initramfs: Option<LoadedInitramfs>) -> Result<()> {
    let ram = |range: &Range<u64>| {
        let (addr, size) = (range.start, range.end - range.start);
        hvm_memmap_table_entry { addr, size, type_: E820_RAM, reserved: 0 }
    };
    let map: Vec<_> = map.iter().map(ram).collect();
    let module = |it: LoadedInitramfs| hvm_modlist_entry { paddr: it.addr.0, size: it.size, ..Default::default() };
    let modules: Vec<_> = initramfs.map(module).into_iter().collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: modules.len() as u32,
        modlist_paddr: layout::PVH_MODULES.0,
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: layout::ACPI.0,
        memmap_paddr: layout::PVH_MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, layout::PVH_START_INFO.inner());
    params.set_sections(&map, layout::PVH_MEMORY_MAP.inner());
    params.set_modules(&modules, layout::PVH_MODULES.inner());
    PvhBootConfigurator::write_bootparams(&params, memory.inner())
        .map_err(|e| Error::new(ErrorKind::InvalidConfig, format!("memory: writing the start info: {e}")))
}
