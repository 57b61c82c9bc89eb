//! x86_64: interrupt controllers and timer in the kernel, CPUID, model-specific registers, and their states.

mod exit;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod state;
mod vcpu;

pub(crate) use exit::ArchExit;
use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, Msrs, kvm_enable_cap, kvm_msr_entry,
    kvm_pit_config,
};
use kvm_ioctls::{Cap, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::{Kvm, VmFd, failed, missing};

/// What we cannot do without, by the names of the KVM API's documentation.
pub(in crate::kvm) const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// The kernel modules that may be behind `/dev/kvm`.
pub(in crate::kvm) const MODULES: &[&str] = &["kvm_intel", "kvm_amd", "kvm_pvm"];
/// Modules that cannot do what is needed, and why.
pub(in crate::kvm) const UNUSABLE: &[(&str, &str)] = &[(
    "kvm_pvm",
    "/dev/kvm is kvm_pvm, which interprets guest kernels instead of running them on hardware and fails on ordinary ones: \
     use a machine with kvm_intel or kvm_amd",
)];
/// What to do where `/dev/kvm` is absent.
pub(in crate::kvm) const REMEDY: &str = "enable virtualization (VT-x or AMD-V) in the firmware or, inside a VM, nested \
     virtualization on its host, and load the module kvm_intel or kvm_amd";

/// Whether this crate can run guests of this processor. It can.
pub(in crate::kvm) fn check() -> Result<()> {
    Ok(())
}

/// Where the pages of KVM_SET_TSS_ADDR lie: below the BIOS area at the end of the 32-bit address space.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Makes interrupt controllers and a timer.
pub(in crate::kvm) fn set_up(vm: &VmFd) -> Result<()> {
    // Three pages that Intel hosts need below 4 GiB, outside guest memory (KVM API, 4.37).
    vm.fd.set_tss_address(TSS_ADDRESS).map_err(failed).doing(|| "reserving the TSS pages")?;
    vm.fd.create_irq_chip().map_err(failed).doing(|| "creating the interrupt controllers")?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.fd.create_pit2(pit).map_err(failed).doing(|| "creating the timer")
}

impl Kvm {
    /// What the host's KVM can show a guest (KVM API, 4.46).
    pub(crate) fn supported_cpuid(&self) -> Result<CpuId> {
        self.fd
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed)
            .doing(|| "asking KVM for its CPUID")
    }

    /// The value of an MSR that says what the processor can do, as far as KVM can show it (KVM API, 4.17).
    pub(crate) fn feature_msr(&self, index: u32) -> Result<Option<u64>> {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])
            .map_err(|e| Error::new(ErrorKind::ResourceExhausted, format!("building MSRs: {e:?}")))?;
        match self.fd.get_msrs(&mut msrs) {
            Ok(0) => Ok(None),
            Ok(_) => Ok(msrs.as_slice().first().map(|msr| msr.data)),
            Err(e) => Err(failed(e)).doing(|| format!("asking KVM for MSR {index:#x}")),
        }
    }

    /// Whether KVM emulates the timer that Linux prefers (KVM_CAP_TSC_DEADLINE_TIMER).
    pub(crate) fn has_tsc_deadline(&self) -> bool {
        self.fd.check_extension(Cap::TscDeadlineTimer)
    }
}

impl VmFd {
    /// Takes the processor's counters away from all vCPUs, where KVM can: it emulates some that CPUID does not show (KVM API,
    /// 8.35). Before the first vCPU is made.
    pub(crate) fn disable_counters(&self) {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
        cap.args[0] = KVM_PMU_CAP_DISABLE.into();
        if let Err(error) = self.fd.enable_cap(&cap) {
            log::debug!("counters that CPUID does not show may be there all the same: {error}");
        }
    }

    /// Makes reading and writing these MSRs, which are in order, a general protection fault in the guest (KVM API, 4.97).
    pub(crate) fn hide_msrs(&self, msrs: &[u32]) -> Result<()> {
        if msrs.is_empty() {
            return Ok(());
        }
        if !self.fd.check_extension(Cap::X86MsrFilter) {
            return Err(missing(&["KVM_CAP_X86_MSR_FILTER"]));
        }
        // Ranges that begin with a hidden one, and bitmaps in which only those are 0.
        let mut ranges: Vec<(u32, Vec<u8>)> = Vec::new();
        for index in msrs {
            match ranges.last_mut() {
                Some((base, bits)) if index - *base < MSR_RANGE => clear(bits, index - *base),
                _ => {
                    let mut bits = vec![0xff; MSR_RANGE as usize / 8];
                    clear(&mut bits, 0);
                    ranges.push((*index, bits));
                }
            }
        }
        let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(base, bitmap)| MsrFilterRange {
                flags,
                base: *base,
                msr_count: MSR_RANGE.min(u32::MAX - base),
                bitmap,
            })
            .collect();
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
            .map_err(failed)
            .doing(|| format!("hiding MSRs {msrs:#x?}"))
    }
}

/// How many MSRs one range of a filter speaks of. KVM allows 16 ranges.
const MSR_RANGE: u32 = 4096;

/// Clears a bit of a bitmap, counted from the lowest of its first byte.
fn clear(bitmap: &mut [u8], bit: u32) {
    if let Some(byte) = bitmap.get_mut(bit as usize / 8) {
        *byte &= !(1 << (bit % 8));
    }
}
