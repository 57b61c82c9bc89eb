//! What depends on the processor's architecture, as far as it takes no unsafe code.
//!
//! Each directory exports the same names:
//!
//! - `layout`: where things lie in guest memory.
//! - `MAX_VCPUS`.
//! - `Platform`, `Keyboard`: what a machine has beside processors, memory and virtio devices.
//! - `PlatformBus`: what answers beside the bus of memory-mapped devices, and serves the exits of `kvm::ArchExit`.
//! - `PlatformDevices`, `PlatformState`: those of them that have a state, and it. Its default is that of unused ones.
//! - `FirmwareTables`, `write_tables`: the tables from which the kernel learns of the machine.
//! - `Cpu`, `CpuProfile`: what a vCPU shows.
//! - `EntryPoint`, `boot_vcpu`: bring a vCPU to the kernel's first instruction.
//! - `Registers`: what is known of a vCPU when its guest ends.
//! - `embedder`: the names that embedders see.
//!
//! Their counterparts are `kvm/arch`, the directories of `boot`, and `guest/sys/arch`. ARCHITECTURE.md says what a further
//! architecture brings. `tests/layers.rs` keeps its words and `cfg(target_arch)` inside.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

/// Where a virtio-mmio device is: the address of its registers, and its interrupt line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MmioSlot {
    pub addr: u64,
    pub irq: u32,
}

impl MmioSlot {
    /// Which window it has, counted from 0.
    pub(crate) fn window(&self) -> usize {
        (self.addr.saturating_sub(layout::MMIO.0) / layout::MMIO_WINDOW) as usize
    }
}

#[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
compile_error!("cofferdam compiles for x86_64 and aarch64 hosts only");
