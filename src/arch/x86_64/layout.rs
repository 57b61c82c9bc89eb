//! Where things lie in the guest's physical address space.
//!
//! ```text
//! 0x0000_0500  GDT                        0x0010_0000  kernel, as it asks
//! 0x0000_7000  boot parameters             ...          initramfs, as high as the kernel allows below the hole
//! 0x0000_9000  page tables                0xc000_0000  hole: no memory up to 4 GiB
//! 0x0002_0000  kernel command line        0xd000_0000  virtio-mmio windows, one page each
//! 0x0009_fc00  end of low memory          0xfec0_0000  I/O APIC, then local APIC, TSS pages
//! 0x000e_0000  ACPI tables, VM generation 0x1_0000_0000  the rest of memory
//! 0x000f_0000  MP table
//! ```

use crate::error::{Error, Result};
use crate::memory::GuestAddress;
use crate::size::Size;

pub(crate) use super::super::MmioSlot;

/// Global descriptor table of the boot vCPU.
pub(crate) const GDT: GuestAddress = GuestAddress(0x500);
/// Empty interrupt descriptor table.
pub(crate) const IDT: GuestAddress = GuestAddress(0x540);
/// `boot_params` (Linux x86 boot protocol, 1.15).
pub(crate) const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// What a kernel that is started by its PVH entry point finds in place of `boot_params`.
pub(crate) const PVH_START_INFO: GuestAddress = ZERO_PAGE;
/// Where that says that the initramfs is.
pub(crate) const PVH_MODULES: GuestAddress = GuestAddress(0x7100);
/// Where that says that memory is.
pub(crate) const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x7200);
/// Level 4, 3 and 2 page tables, one page each.
pub(crate) const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub(crate) const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// The longest command line that Linux keeps on x86 (COMMAND_LINE_SIZE), with its NUL.
pub(crate) const CMDLINE_MAX: usize = 2048;
/// End of the memory below the legacy area.
pub(crate) const LOW_MEMORY_END: GuestAddress = GuestAddress(0x9_fc00);
/// The ACPI root pointer, in the area that kernels search for it (ACPI 6.5, 5.2.5.1); the tables follow it.
pub(crate) const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// Where they must end.
pub(crate) const ACPI_END: GuestAddress = VM_GENERATION;
/// The machine's generation, in a page of its own that nothing else uses.
pub(crate) const VM_GENERATION: GuestAddress = GuestAddress(0xe_f000);
/// MultiProcessor tables, in the area that Linux searches for them.
pub(crate) const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// Where that area ends.
pub(crate) const MP_TABLE_END: GuestAddress = GuestAddress(0x10_0000);
/// Start of the memory above 1 MiB, where kernels are loaded.
pub(crate) const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
/// Below 4 GiB there is no memory from here on.
pub(crate) const HOLE: GuestAddress = GuestAddress(0xc000_0000);
/// Memory goes on here.
pub(crate) const HOLE_END: GuestAddress = GuestAddress(0x1_0000_0000);
/// The first virtio-mmio window.
pub(crate) const MMIO: GuestAddress = GuestAddress(0xd000_0000);
/// The size of each.
pub(crate) const MMIO_WINDOW: u64 = 0x1000;
/// The I/O APIC's registers.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs' registers.
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Interrupt lines free for devices: those of the ISA that nothing here uses, and the I/O APIC's own.
pub(crate) const DEVICE_IRQS: std::ops::RangeInclusive<u32> = 5..=23;
/// Lines in that range that belong to others: the real-time clock and ACPI.
pub(crate) const RESERVED_IRQS: [u32; 2] = [8, ACPI_IRQ as u32];
/// The SCI's line, which hardware-reduced ACPI does not use.
pub(crate) const ACPI_IRQ: u16 = 9;
/// The event device's line, which is the second serial port's on machines that have one.
pub(crate) const EVENT_IRQ: u32 = 3;
/// The event device's register.
pub(crate) const EVENT_PORT: u64 = 0x610;
/// The first serial port's.
pub(crate) const SERIAL_IRQ: u32 = 4;
/// The first serial port.
pub(crate) const SERIAL_PORT: u64 = 0x3f8;
/// The keyboard controller's data port; its command port is four further.
pub(crate) const I8042_PORT: u64 = 0x60;
/// The keyboard's interrupt.
pub(crate) const I8042_IRQ: u32 = 1;
/// The port by which a guest says that it has panicked.
pub(crate) const PANIC_PORT: u64 = 0x505;
/// The port by which a guest says how it ended, and that of its status.
pub(crate) const EXIT_PORT: u64 = 0x600;

/// The least memory that a kernel and its tables can live in.
const MIN_MEMORY: Size = Size::mib(2);
/// More than any host of today addresses (46 bits).
const MAX_MEMORY: Size = Size::gib(64 * 1024);

/// The ranges that `size` bytes of memory are laid out in: up to the hole, the rest above 4 GiB.
///
/// # Errors
/// `InvalidConfig` when it is not whole pages, too little to boot anything, or more than processors address.
pub(crate) fn memory_ranges(size: Size) -> Result<Vec<(GuestAddress, u64)>> {
    let bytes = size.as_bytes();
    if !bytes.is_multiple_of(4096) {
        return Err(Error::invalid("memory", format!("{size} is not a multiple of 4 KiB")));
    }
    if size < MIN_MEMORY {
        return Err(Error::invalid(
            "memory",
            format!("{size} is too little to boot a kernel; give at least {MIN_MEMORY}"),
        ));
    }
    if size > MAX_MEMORY {
        return Err(Error::invalid("memory", format!("{size} is more than a guest can address ({MAX_MEMORY})")));
    }
    let low = bytes.min(HOLE.0);
    let mut ranges = vec![(GuestAddress(0), low)];
    if bytes > low {
        ranges.push((HOLE_END, bytes - low));
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_memory_meets_the_device_window() {
        for size in [Size::mib(128), Size::gib(3), Size::mib(3584), Size::gib(8)] {
            let ranges = memory_ranges(size).unwrap();
            assert_eq!(ranges.iter().map(|r| r.1).sum::<u64>(), size.as_bytes());
            for (start, len) in ranges {
                assert!(start.0 + len <= MMIO.0 || start.0 >= HOLE_END.0, "{size}: {start}+{len:#x}");
            }
        }
    }

    #[test]
    fn invalid_memory_sizes_name_the_method() {
        for size in [Size::bytes(0), Size::kib(64), Size::bytes((4 << 20) + 1), Size::gib(1 << 30)] {
            let error = memory_ranges(size).unwrap_err();
            assert!(error.to_string().starts_with("memory: "), "{error}");
        }
    }
}
