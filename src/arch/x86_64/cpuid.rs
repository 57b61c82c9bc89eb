//! What a guest's processors say of themselves: the host's CPUID as KVM offers it, with the guest's own topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::boot_msrs;
use crate::error::{Error, ErrorKind, Result};
use crate::kvm::{Kvm, VcpuFd};

/// The CPUID that every vCPU of a VM shows, but for its own identifier.
#[derive(Debug, Clone)]
pub(crate) struct Cpu {
    cpuid: CpuId,
    vcpus: u8,
}

impl Cpu {
    /// The host's processor as far as KVM supports it, with `vcpus` cores of one thread in one package.
    pub(crate) fn host(kvm: &Kvm, vcpus: u8) -> Result<Self> {
        let deadline = kvm.has_tsc_deadline();
        let entries = with_topology(kvm.supported_cpuid()?.as_slice(), vcpus, deadline);
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|e| Error::new(ErrorKind::ResourceExhausted, format!("building the CPUID: {e:?}")))?;
        Ok(Self { cpuid, vcpus })
    }

    /// Makes `vcpu` number `id` of this machine.
    pub(crate) fn apply(&self, vcpu: &VcpuFd, id: u8) -> Result<()> {
        let mut cpuid = self.cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            own(entry, id, self.vcpus);
        }
        vcpu.set_cpuid(&cpuid)?;
        vcpu.set_msrs(&boot_msrs()?)
    }
}

/// How many bits number `vcpus` cores.
fn core_bits(vcpus: u8) -> u32 {
    u8::BITS - (vcpus.max(1) - 1).leading_zeros()
}

/// Topology leaves (Intel SDM vol. 2A, CPUID leaves 0BH and 1FH), of which KVM offers an empty one at most.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// The host's leaves with the guest's topology in them.
fn with_topology(host: &[kvm_cpuid_entry2], vcpus: u8, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = host.iter().filter(|e| !TOPOLOGY.contains(&e.function)).copied().collect();
    let present = |leaf: u32| host.iter().any(|e| e.function == leaf);
    for function in TOPOLOGY.into_iter().filter(|leaf| present(*leaf)) {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        entries.extend((0..3).map(|index| kvm_cpuid_entry2 { function, index, flags, ..Default::default() }));
    }
    entries.iter_mut().for_each(|entry| shared(entry, vcpus, tsc_deadline));
    entries
}

/// Leaves that are the same on every vCPU.
fn shared(entry: &mut kvm_cpuid_entry2, vcpus: u8, tsc_deadline: bool) {
    let last = u32::from(vcpus.max(1) - 1);
    match (entry.function, entry.index) {
        // Intel SDM vol. 2A, CPUID leaf 1: HYPERVISOR, TSC-DEADLINE, HTT, logical processors, CLFLUSH size.
        (1, _) => {
            entry.ecx = entry.ecx & !(1 << 24) | 1 << 31 | u32::from(tsc_deadline) << 24;
            entry.edx = entry.edx & !(1 << 28) | u32::from(last > 0) << 28;
            entry.ebx = entry.ebx & 0xff | 8 << 8 | u32::from(vcpus) << 16;
        }
        // Leaf 4, deterministic caches: levels 1 and 2 belong to one core, level 3 to all; cores in the package.
        (4, _) if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { last } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | last.min(63) << 26;
        }
        // Leaf 0xb, topology: one thread in a core, then all cores.
        (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx) = (0, 1, 1 << 8),
        (0xb | 0x1f, 1) => (entry.eax, entry.ebx, entry.ecx) = (core_bits(vcpus), vcpus.into(), 2 << 8 | 1),
        (0xb | 0x1f, index) => (entry.eax, entry.ebx, entry.ecx) = (0, 0, index),
        // AMD APM vol. 3, Fn8000_0008: number of cores and the bits of their identifiers.
        (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | last | core_bits(vcpus) << 12,
        // Fn8000_001D: which cores share a cache.
        (0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { last } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        _ => {}
    }
}

/// Leaves that carry a vCPU's own identifier.
fn own(entry: &mut kvm_cpuid_entry2, id: u8, vcpus: u8) {
    let id = u32::from(id);
    match entry.function {
        1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
        0xb | 0x1f => entry.edx = id,
        // AMD APM vol. 3, Fn8000_001E: APIC identifier, core with one thread, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, if vcpus > 1 { id } else { 0 }, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    #[test]
    fn cores_are_numbered_with_the_fewest_bits() {
        assert_eq!([1, 2, 3, 4, 5, 254].map(core_bits), [0, 1, 2, 2, 3, 8]);
    }

    #[test]
    fn the_guest_sees_its_own_topology_and_a_hypervisor() {
        let mut leaf = entry(1, 0);
        shared(&mut leaf, 4, false);
        own(&mut leaf, 3, 4);
        assert_eq!((leaf.ebx >> 24, leaf.ebx >> 16 & 0xff, leaf.ecx >> 31, leaf.ecx >> 24 & 1), (3, 4, 1, 0));
        let mut cores = entry(0xb, 1);
        shared(&mut cores, 6, true);
        own(&mut cores, 5, 6);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        // KVM offers one empty topology leaf; the guest gets all of them.
        let all = with_topology(&[entry(0xb, 0)], 6, true);
        assert_eq!(all.iter().map(|e| e.ecx).collect::<Vec<_>>(), [0x100, 0x201, 2]);
        let mut single = entry(1, 0);
        shared(&mut single, 1, true);
        assert_eq!((single.edx >> 28 & 1, single.ecx >> 24 & 1), (0, 1));
    }
}
