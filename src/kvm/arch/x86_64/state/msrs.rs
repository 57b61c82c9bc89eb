//! Model-specific registers: which ones a machine's state has, and how they are read and set.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};

use super::check_count;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::{Kvm, VcpuFd, failed};

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct MsrState {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

/// IA32_TIME_STAMP_COUNTER (Intel SDM vol. 4, 2.1).
pub(super) const TSC: u32 = 0x10;
/// IA32_APIC_BASE.
const APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_XSS.
pub(super) const XSS: u32 = 0xda0;
/// MSR_KVM_WALL_CLOCK, old and new (Linux, Documentation/virt/kvm/x86/msr.rst).
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];
/// MSR_KVM_ASYNC_PF_EN and MSR_KVM_ASYNC_PF_INT.
const ASYNC_PF: [u32; 2] = [0x4b56_4d02, 0x4b56_4d06];
/// Memory types (Intel SDM vol. 3A, 13.11.2), which KVM has and does not list.
const MEMORY_TYPES: [(u32, u32); 5] = [(0x200, 0x20f), (0x250, 0x250), (0x258, 0x259), (0x268, 0x26f), (0x2ff, 0x2ff)];
/// More than any KVM has.
const MAX_MSRS: usize = 4096;

/// Registers that belong to a vCPU's state: those that KVM lists, and some that it does not.
///
/// The time stamp counter is kept as its offset, the interrupt controller's base with the system registers. A write of the
/// wall clock's address makes KVM write there, where the guest may have something else by now.
pub(super) fn indices(kvm: &Kvm) -> Result<Vec<u32>> {
    let listed = kvm.fd.get_msr_index_list().map_err(failed).doing(|| "asking KVM for its MSRs")?;
    let unlisted = MEMORY_TYPES.into_iter().flat_map(|(first, last)| first..=last).chain([XSS]);
    let mut all: Vec<u32> = listed.as_slice().iter().copied().chain(unlisted).collect();
    all.sort_unstable();
    all.dedup();
    all.retain(|index| !kept_elsewhere(*index));
    Ok(all)
}

/// Returns those of `indices` that `vcpu` has: KVM stops at the first that it has not.
pub(super) fn readable(vcpu: &VcpuFd, indices: Vec<u32>) -> Result<Vec<u32>> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices.as_slice();
    while !rest.is_empty() {
        let (chunk, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let read = get_some(vcpu, chunk)?.len();
        found.extend_from_slice(chunk.get(..read).unwrap_or_default());
        let skipped = usize::from(read < chunk.len());
        rest = rest.get(read + skipped..).unwrap_or_default();
    }
    Ok(found)
}

/// Whether a register is no part of the list, so that a state that has it was not made here.
fn kept_elsewhere(index: u32) -> bool {
    [TSC, APIC_BASE].contains(&index) || WALL_CLOCK.contains(&index)
}

/// # Errors
/// `Corrupt` for more than there are, and for those that are never in the list.
pub(super) fn check(msrs: &[MsrState]) -> Result<()> {
    check_count("MSRs", msrs.len(), MAX_MSRS)?;
    match msrs.iter().find(|msr| kept_elsewhere(msr.index)) {
        Some(msr) => Err(Error::new(ErrorKind::Corrupt, format!("MSR {:#x} in a vCPU's state", msr.index))),
        None => Ok(()),
    }
}

fn list(entries: impl Iterator<Item = MsrState>) -> Result<Msrs> {
    let entries: Vec<_> =
        entries.map(|MsrState { index, value }| kvm_msr_entry { index, data: value, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|e| Error::new(ErrorKind::ResourceExhausted, format!("building MSRs: {e:?}")))
}

fn get_some(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrState>> {
    let mut msrs = list(indices.iter().map(|&index| MsrState { index, value: 0 }))?;
    let read = vcpu.fd.get_msrs(&mut msrs).map_err(failed).doing(|| "reading a vCPU's MSRs")?;
    Ok(msrs.as_slice().iter().take(read).map(|msr| MsrState { index: msr.index, value: msr.data }).collect())
}

fn refused(what: &str, index: u32) -> Error {
    Error::new(ErrorKind::Incompatible, format!("this host's KVM does not {what} MSR {index:#x}"))
}

/// # Errors
/// `Incompatible`, naming the first that KVM does not read.
pub(super) fn get(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrState>> {
    let mut all = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(KVM_MAX_MSR_ENTRIES) {
        let read = get_some(vcpu, chunk)?;
        if let Some(&index) = chunk.get(read.len()) {
            return Err(refused("read", index));
        }
        all.extend(read);
    }
    Ok(all)
}

pub(super) fn get_one(vcpu: &VcpuFd, index: u32) -> Result<u64> {
    get(vcpu, &[index])?.first().map(|msr| msr.value).ok_or_else(|| refused("read", index))
}

/// Sets them in their order, but for the interrupt of asynchronous page faults, which comes before these are switched on.
///
/// One that KVM refuses to set is fine where it has that value already: some can only be read.
///
/// # Errors
/// `Incompatible`, naming the first that KVM refuses.
pub(super) fn set(vcpu: &VcpuFd, msrs: &[MsrState]) -> Result<()> {
    let mut ordered: Vec<_> = msrs.to_vec();
    let [enable, interrupt] = ASYNC_PF;
    ordered.sort_by_key(|msr| if msr.index == interrupt { (enable, 0) } else { (msr.index, 1) });
    for chunk in ordered.chunks(KVM_MAX_MSR_ENTRIES) {
        let mut rest = chunk;
        while !rest.is_empty() {
            let raw = list(rest.iter().copied())?;
            let taken = vcpu.fd.set_msrs(&raw).map_err(failed).doing(|| "setting a vCPU's MSRs")?;
            let Some(stopped) = rest.get(taken) else { break };
            if get_one(vcpu, stopped.index).ok() != Some(stopped.value) {
                return Err(refused(&format!("take {:#x} for", stopped.value), stopped.index));
            }
            rest = rest.get(taken + 1..).unwrap_or_default();
        }
    }
    Ok(())
}
