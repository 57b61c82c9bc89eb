//! x86_64: memory layout, devices of old, boot registers, CPUID, MSRs, ACPI and MultiProcessor tables.

mod acpi;
mod cpuid;
mod i8042;
pub(crate) mod layout;
mod mptable;
mod platform;
mod ports;
mod profile;
mod regs;

use kvm_bindings::{Msrs, kvm_msr_entry};

pub(crate) use cpuid::Cpu;
pub(crate) use platform::{Keyboard, Platform, PlatformDevices};
pub(crate) use ports::{PlatformBus, PlatformBusView};
pub use profile::{CpuProfile, CpuidBits, CpuidRegister};
pub use regs::Registers;
pub(crate) use regs::{EntryPoint, boot_vcpu, write_boot_tables};

use crate::error::{Error, ErrorKind, Result};
use crate::memory::{GuestAddress, GuestMemory};

/// The names of this module that embedders see.
pub mod embedder {
    pub use super::{CpuProfile, CpuidBits, CpuidRegister};
}

/// xAPIC identifiers are 8 bits and the last is broadcast; the I/O APIC takes one more.
pub(crate) const MAX_VCPUS: u8 = 254;

/// Fast string operations on (Intel SDM vol. 4, IA32_MISC_ENABLE bit 0).
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
/// Default memory type write-back, MTRRs enabled (Intel SDM vol. 3A, 13.11.2.1).
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;

/// By what a kernel learns of the machine. One is enough: there is nothing that only the other says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FirmwareTables {
    /// ACPI tables: what every distribution's kernel reads.
    Acpi,
    /// Intel's MultiProcessor specification 1.4: for kernels that read ACPI late or not at all, and get their devices elsewhere.
    MultiProcessor,
}

impl FirmwareTables {
    /// Where a kernel that reads these finds the machine's generation, 16 bytes. `None` when they do not say it.
    pub(crate) fn generation(self) -> Option<GuestAddress> {
        match self {
            Self::Acpi => Some(layout::VM_GENERATION),
            Self::MultiProcessor => None,
        }
    }
}

/// Writes what a kernel reads about the machine. These are its `vcpus` processors, the windows and interrupt lines of
/// virtio-mmio devices, and its `generation`, which is never the same twice.
///
/// # Errors
/// `InvalidConfig` when the tables do not fit their areas.
pub(crate) fn write_tables(
    memory: &GuestMemory,
    tables: FirmwareTables,
    vcpus: u8,
    devices: &[layout::MmioSlot],
    generation: [u8; 16],
) -> Result<()> {
    match tables {
        FirmwareTables::Acpi => {
            acpi::write(memory, vcpus, devices)?;
            Ok(memory.write(layout::VM_GENERATION, &generation)?)
        }
        FirmwareTables::MultiProcessor => mptable::write(memory, vcpus),
    }
}

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy)]
struct MsrValue {
    index: u32,
    data: u64,
}

/// The MSRs that firmware would have set, and then these.
fn boot_msrs(more: &[MsrValue]) -> Result<Msrs> {
    let own = [(MSR_IA32_MISC_ENABLE, 1), (MSR_MTRR_DEF_TYPE, 1 << 11 | 6)];
    let own = own.map(|(index, data)| MsrValue { index, data });
    let all =
        own.iter().chain(more).map(|&MsrValue { index, data }| kvm_msr_entry { index, data, ..Default::default() });
    let entries: Vec<_> = all.collect();
    Msrs::from_entries(&entries).map_err(|e| Error::new(ErrorKind::ResourceExhausted, format!("building MSRs: {e:?}")))
}
