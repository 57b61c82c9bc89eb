//! The state of one vCPU.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MAX_XCRS, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Xsave, kvm_cpuid_entry2,
    kvm_device_attr, kvm_lapic_state, kvm_mp_state, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::Cap;

use super::clock::ClockGap;
use super::events::VcpuEvents;
use super::msrs::{self, MsrState};
use super::registers::{DebugRegisters, GeneralRegisters, SystemRegisters};
use super::{check_count, check_len, mirror};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::{Kvm, VcpuFd, VmFd, failed};
use crate::version::{Version, Versioned};

mirror! {
    /// What one leaf of CPUID says (KVM API, 4.46).
    CpuidLeaf of kvm_cpuid_entry2 { function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32, }
}

/// An extended control register.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct ExtendedControl {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

/// What a vCPU is, and where it stands.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct VcpuState {
    pub(crate) version: Version<Self>,
    /// Whether it runs, has halted, or waits to be started (KVM API, 4.38).
    pub(crate) mp_state: u32,
    pub(crate) regs: GeneralRegisters,
    pub(crate) sregs: SystemRegisters,
    /// The area of XSAVE, as long as KVM says.
    pub(crate) xsave: Vec<u8>,
    pub(crate) xcrs: Vec<ExtendedControl>,
    pub(crate) debug: DebugRegisters,
    /// The registers of its interrupt controller.
    pub(crate) lapic: Vec<u8>,
    pub(crate) tsc_khz: u32,
    /// What KVM adds to the host's time stamp counter.
    pub(crate) tsc_offset: u64,
    pub(crate) msrs: Vec<MsrState>,
    /// As it was set: what KVM offers by itself is another processor.
    pub(crate) cpuid: Vec<CpuidLeaf>,
    pub(crate) events: VcpuEvents,
}

impl Versioned for VcpuState {
    const NAME: &'static str = "the state of a vCPU";
    const VERSION: u32 = 1;
}

/// What the states of all vCPUs of one host have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VcpuFormat {
    msrs: Vec<u32>,
    xsave: usize,
}

impl VcpuFormat {
    /// Asks KVM for it, by a vCPU that is set up.
    pub(crate) fn probe(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<Self> {
        // The VM is asked, as the size depends on what this process has permission for (KVM API, 4.134).
        let xsave = usize::try_from(vm.fd.check_extension_int(Cap::Xsave2)).unwrap_or_default();
        Ok(Self { msrs: msrs::readable(vcpu, msrs::indices(kvm)?)?, xsave: xsave.max(size_of::<kvm_xsave>()) })
    }
}

/// Bytes of a local interrupt controller (KVM API, 4.57).
const LAPIC: usize = size_of::<kvm_lapic_state>();
/// Two paces of a counter are the same where they differ by less: parts in a million.
const TSC_TOLERANCE: u64 = 250;

impl VcpuState {
    /// Reads the state of `vcpu`, on its own thread. It has finished its last exit, and no vCPU of the VM runs.
    ///
    /// # Errors
    /// `Unsupported` for a guest that may have guests of its own, and for a KVM without an offset of the counter.
    pub(crate) fn save(vcpu: &VcpuFd, format: &VcpuFormat) -> Result<Self> {
        // First, as it makes the interrupt controller take INIT and start-up interrupts, which change what follows.
        let mp_state = vcpu.fd.get_mp_state().map_err(failed).doing(|| "reading a vCPU's state")?.mp_state;
        let (regs, sregs) = (vcpu.regs()?.into(), vcpu.sregs()?.into());
        let xsave = xsave(vcpu, format.xsave)?;
        let xcrs = vcpu.fd.get_xcrs().map_err(failed).doing(|| "reading a vCPU's XCRs")?;
        let xcrs = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize);
        let debug = vcpu.fd.get_debug_regs().map_err(failed).doing(|| "reading a vCPU's debug registers")?;
        let lapic = vcpu.lapic()?.regs.iter().map(|byte| *byte as u8).collect();
        let (tsc_khz, tsc_offset) = (tsc_khz(vcpu)?, tsc_offset(vcpu)?);
        let msrs = msrs::get(vcpu, &format.msrs)?;
        let cpuid = vcpu.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed).doing(|| "reading a vCPU's CPUID")?;
        let cpuid: Vec<CpuidLeaf> = cpuid.as_slice().iter().copied().map(CpuidLeaf::from).collect();
        refuse_nesting(&cpuid)?;
        // Last, as reading others may change it.
        let events = vcpu.fd.get_vcpu_events().map_err(failed).doing(|| "reading a vCPU's events")?.into();
        Ok(Self {
            version: Version::OURS,
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs: xcrs.map(|it| ExtendedControl { index: it.xcr, value: it.value }).collect(),
            debug: debug.into(),
            lapic,
            tsc_khz,
            tsc_offset,
            msrs,
            cpuid,
            events,
        })
    }

    /// # Errors
    /// `Corrupt` for lengths and counts that no vCPU has, `Unsupported` for one that could be a host itself.
    pub(crate) fn check(&self, format: &VcpuFormat) -> Result<()> {
        check_len("the XSAVE area", self.xsave.len(), format.xsave)?;
        check_len("the local interrupt controller", self.lapic.len(), LAPIC)?;
        check_count("XCRs", self.xcrs.len(), KVM_MAX_XCRS as usize)?;
        check_count("leaves of CPUID", self.cpuid.len(), KVM_MAX_CPUID_ENTRIES)?;
        msrs::check(&self.msrs)?;
        refuse_nesting(&self.cpuid)
    }

    /// Gives the state to a vCPU that has not run yet, on its own thread. The VM has its memory, and all vCPUs are made.
    /// [`VcpuState::restore_counter`] gives it the rest.
    ///
    /// # Errors
    /// As [`VcpuState::check`], and `Incompatible` for what this host's KVM does not take.
    pub(crate) fn restore(&self, vcpu: &VcpuFd, format: &VcpuFormat) -> Result<()> {
        self.check(format)?;
        // What follows is checked against it.
        let cpuid: Vec<_> = self.cpuid.iter().copied().map(kvm_cpuid_entry2::from).collect();
        let cpuid = CpuId::from_entries(&cpuid)
            .map_err(|e| Error::new(ErrorKind::Corrupt, format!("leaves of CPUID: {e:?}")))?;
        vcpu.set_cpuid(&cpuid)?;
        self.restore_tsc_khz(vcpu)?;
        let mp_state = kvm_mp_state { mp_state: self.mp_state };
        vcpu.fd.set_mp_state(mp_state).map_err(failed).doing(|| "setting a vCPU's state")?;
        // Before the interrupt controller, whose mode is part of it.
        vcpu.set_sregs(&self.sregs.into())?;
        // Before the events: it clears exceptions.
        vcpu.set_regs(&self.regs.into())?;
        // Before the XSAVE area: what it does not allow there is refused.
        let (xss, others): (Vec<_>, Vec<_>) = self.msrs.iter().copied().partition(|msr| msr.index == msrs::XSS);
        msrs::set(vcpu, &xss)?;
        set_xsave(vcpu, &self.xsave)?;
        self.restore_xcrs(vcpu)?;
        vcpu.fd.set_debug_regs(&self.debug.into()).map_err(failed).doing(|| "setting a vCPU's debug registers")?;
        // Before the MSRs: a deadline is dropped unless its timer is in the mode for it.
        let mut lapic = kvm_lapic_state::default();
        lapic.regs.iter_mut().zip(&self.lapic).for_each(|(to, from)| *to = *from as _);
        vcpu.set_lapic(&lapic)?;
        let others: Vec<_> = others.into_iter().filter(|msr| msr.index != msrs::TSC_DEADLINE).collect();
        msrs::set(vcpu, &others)
    }

    /// Gives it the rest of the state, with a counter that fits the clock, once the VM has its own state.
    ///
    /// # Errors
    /// As [`VcpuState::restore`].
    pub(crate) fn restore_counter(&self, vcpu: &VcpuFd, gap: &ClockGap) -> Result<()> {
        // An offset, and not a value: KVM takes values that differ by less than a second for the same.
        set_tsc_offset(vcpu, self.tsc_offset.wrapping_add(gap.tsc_shift(self.tsc_khz)))?;
        // After the counter that it is compared with. One that has passed may not have been delivered yet, and an interrupt
        // too many is harmless: so zero becomes now.
        for msr in self.msrs.iter().filter(|msr| msr.index == msrs::TSC_DEADLINE) {
            let value = if msr.value == 0 { msrs::get_one(vcpu, msrs::TSC)? } else { msr.value };
            msrs::set(vcpu, &[MsrState { value, ..*msr }])?;
        }
        // Last, as others clear parts of it.
        vcpu.fd.set_vcpu_events(&(&self.events).into()).map_err(failed).doing(|| "setting a vCPU's events")
    }

    fn restore_tsc_khz(&self, vcpu: &VcpuFd) -> Result<()> {
        let (saved, host) = (u64::from(self.tsc_khz), u64::from(tsc_khz(vcpu)?));
        if saved.abs_diff(host) * 1_000_000 <= host * TSC_TOLERANCE {
            return Ok(());
        }
        let refused = || {
            let text = format!("the guest's time stamp counter runs at {saved} kHz, this host's at {host} kHz");
            Error::new(ErrorKind::Incompatible, text)
        };
        // A counter that KVM scales would need another offset than the one that is kept.
        Err(refused())
    }

    fn restore_xcrs(&self, vcpu: &VcpuFd) -> Result<()> {
        let mut raw = kvm_xcrs { nr_xcrs: self.xcrs.len() as u32, ..Default::default() };
        for (to, from) in raw.xcrs.iter_mut().zip(&self.xcrs) {
            *to = kvm_xcr { xcr: from.index, value: from.value, ..Default::default() };
        }
        vcpu.fd.set_xcrs(&raw).map_err(failed).doing(|| "setting a vCPU's XCRs")
    }
}

/// # Errors
/// `Unsupported` where a processor shows VMX or SVM: what such a guest's guests have in KVM is not kept.
fn refuse_nesting(cpuid: &[CpuidLeaf]) -> Result<()> {
    let shows =
        |function: u32, bit: u32| cpuid.iter().any(|leaf| leaf.function == function && leaf.ecx >> bit & 1 != 0);
    // VMX (Intel SDM vol. 2A, CPUID leaf 1) and SVM (AMD APM vol. 3, Fn8000_0001).
    match shows(1, 5) || shows(0x8000_0001, 2) {
        true => Err(Error::new(ErrorKind::Unsupported, "the state of a guest with nested virtualization is not kept")),
        false => Ok(()),
    }
}

fn tsc_khz(vcpu: &VcpuFd) -> Result<u32> {
    vcpu.fd.get_tsc_khz().map_err(failed).doing(|| "reading the pace of a vCPU's time stamp counter")
}

/// KVM_SET_DEVICE_ATTR and KVM_GET_DEVICE_ATTR (KVM API, 4.80), as 64-bit kernels number them.
const SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// kvm-ioctls has this call for other processors only.
fn offset_call(vcpu: &VcpuFd, request: libc::c_ulong, value: &mut u64) -> Result<()> {
    let (group, attr) = (KVM_VCPU_TSC_CTRL, u64::from(KVM_VCPU_TSC_OFFSET));
    let attr = kvm_device_attr { group, attr, addr: std::ptr::from_mut(value).expose_provenance() as u64, flags: 0 };
    // SAFETY: KVM reads the structure, whose size is part of the request, and reads or writes the eight bytes of `value`.
    // Both outlive the call.
    match unsafe { libc::ioctl(vcpu.fd.as_raw_fd(), request, &raw const attr) } {
        0 => Ok(()),
        _ => {
            let error = std::io::Error::last_os_error();
            let lacking = matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOTTY));
            let error = Error::from(error).doing("the offset of a vCPU's time stamp counter (KVM_VCPU_TSC_OFFSET)");
            Err(if lacking { error.with_kind(ErrorKind::Unsupported) } else { error })
        }
    }
}

fn tsc_offset(vcpu: &VcpuFd) -> Result<u64> {
    let mut offset = 0;
    offset_call(vcpu, GET_DEVICE_ATTR, &mut offset)?;
    Ok(offset)
}

fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<()> {
    offset_call(vcpu, SET_DEVICE_ATTR, &mut offset)
}

/// An area of `len` bytes, rounded up to whole words.
fn xsave_area(len: usize) -> Result<Xsave> {
    let more = len.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(more).map_err(|e| Error::new(ErrorKind::ResourceExhausted, format!("an XSAVE area: {e:?}")))
}

fn xsave(vcpu: &VcpuFd, len: usize) -> Result<Vec<u8>> {
    let (region, more) = if len <= size_of::<kvm_xsave>() {
        let area = vcpu.fd.get_xsave().map_err(failed).doing(|| "reading a vCPU's XSAVE area")?;
        (area.region, Vec::new())
    } else {
        let mut area = xsave_area(len)?;
        // SAFETY: the area is as long as KVM said it would write.
        unsafe { vcpu.fd.get_xsave2(&mut area) }.map_err(failed).doing(|| "reading a vCPU's XSAVE area")?;
        (area.as_fam_struct_ref().xsave.region, area.as_slice().to_vec())
    };
    Ok(region.iter().chain(&more).flat_map(|word| word.to_ne_bytes()).take(len).collect())
}

/// `bytes` has the length that was checked against KVM's.
fn set_xsave(vcpu: &VcpuFd, bytes: &[u8]) -> Result<()> {
    let mut area = xsave_area(bytes.len())?;
    let mut words = bytes.chunks(size_of::<u32>()).map(|chunk| {
        let mut word = [0; size_of::<u32>()];
        word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        u32::from_ne_bytes(word)
    });
    // SAFETY: only the area's words are written; its length stays what it is.
    let region = unsafe { &mut area.as_mut_fam_struct().xsave.region };
    region.iter_mut().zip(&mut words).for_each(|(to, from)| *to = from);
    area.as_mut_slice().iter_mut().zip(words).for_each(|(to, from)| *to = from);
    // SAFETY: the area is as long as KVM says that it reads.
    unsafe { vcpu.fd.set_xsave2(&area) }.map_err(failed).doing(|| "setting a vCPU's XSAVE area")
}

#[cfg(test)]
impl VcpuFormat {
    /// Of no host, for tests.
    pub(super) fn plain() -> Self {
        Self { msrs: Vec::new(), xsave: size_of::<kvm_xsave>() }
    }
}
