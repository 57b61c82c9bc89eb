//! Where things would lie in the guest's memory: devices first, memory from 2 GiB on.

pub(crate) use super::super::MmioSlot;
use crate::error::Result;
use crate::kvm::unsupported;
use crate::memory::GuestAddress;
use crate::size::Size;

/// The longest command line that Linux keeps (COMMAND_LINE_SIZE), with its NUL.
pub(crate) const CMDLINE_MAX: usize = 2048;
/// The first virtio-mmio window.
pub(crate) const MMIO: GuestAddress = GuestAddress(0x4000_0000);
/// The size of each.
pub(crate) const MMIO_WINDOW: u64 = 0x1000;
/// Interrupt lines free for devices.
pub(crate) const DEVICE_IRQS: std::ops::RangeInclusive<u32> = 32..=127;
/// Lines in that range that belong to others.
pub(crate) const RESERVED_IRQS: [u32; 0] = [];

/// # Errors
/// `Unsupported`.
pub(crate) fn memory_ranges(_: Size) -> Result<Vec<(GuestAddress, u64)>> {
    Err(unsupported("a memory layout"))
}
