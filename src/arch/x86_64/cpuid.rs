//! CPUID of a guest's processors: a profile with the guest's own topology.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::profile::CpuProfile;
use super::{MsrValue, boot_msrs};
use crate::error::{Error, Result};
use crate::kvm::{Kvm, VcpuFd, VmFd};

/// The processor that every vCPU of a VM is, but for its own identifier.
#[derive(Debug, Clone)]
pub(crate) struct Cpu {
    cpuid: CpuId,
    address_bits: u32,
    /// Set before the first instruction.
    msrs: Vec<MsrValue>,
    hidden: Vec<u32>,
    /// Whether it shows counters of its own.
    counts: bool,
}

impl Cpu {
    /// Returns the processor of `profile`, with `vcpus` cores of one thread in one package.
    ///
    /// # Errors
    /// - `Unsupported` names each bit and register that this host cannot show.
    /// - `Incompatible` when it is of another maker.
    /// - `InvalidConfig` for a profile that no processor could be.
    pub(crate) fn new(kvm: &Kvm, profile: &CpuProfile, vcpus: u8) -> Result<Self> {
        let leaves = profile.on(kvm)?;
        // Where nothing says it, it is 36 (Intel SDM vol. 3A, 4.1.4).
        let address_bits = match leaves.registers(0x8000_0008, 0)[0] & 0xff {
            0 => 36,
            bits => bits,
        };
        let entries = with_topology(&leaves.entries(), vcpus);
        let cpuid = CpuId::from_entries(&entries)
            .map_err(|_| Error::invalid("cpu", format!("{} leaves are more than KVM takes", entries.len())))?;
        let cpu = Self {
            cpuid,
            address_bits,
            msrs: profile.values(kvm)?,
            hidden: profile.hidden()?,
            counts: leaves.counts(),
        };
        // Which values KVM takes, only KVM knows: a machine that never runs is asked, so that none has to be begun in vain.
        if !(cpu.msrs.is_empty() && cpu.hidden.is_empty()) {
            let trial = kvm.create_vm()?;
            cpu.restrict(&trial)?;
            cpu.apply(&trial.create_vcpu(0)?, 0).map_err(|e| e.doing("cpu"))?;
        }
        Ok(cpu)
    }

    /// # Errors
    /// `InvalidConfig` for memory that ends beyond what the processor can address.
    pub(crate) fn addresses(&self, end: u64) -> Result<()> {
        match 1u64.checked_shl(self.address_bits) {
            Some(limit) if end > limit => Err(Error::invalid(
                "memory",
                format!(
                    "the guest's processor has {} address bits, and its memory would end at {end:#x}",
                    self.address_bits
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Hides from all vCPUs of `vm` what they shall not see. Before the first is made.
    pub(crate) fn restrict(&self, vm: &VmFd) -> Result<()> {
        if !self.counts {
            vm.disable_counters();
        }
        vm.hide_msrs(&self.hidden).map_err(|e| e.doing("cpu"))
    }

    /// Makes `vcpu` number `id` of this machine.
    pub(crate) fn apply(&self, vcpu: &VcpuFd, id: u8) -> Result<()> {
        let mut cpuid = self.cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            own(entry, id);
        }
        vcpu.set_cpuid(&cpuid)?;
        vcpu.set_msrs(&boot_msrs(&self.msrs)?)
    }
}

/// How many bits number `vcpus` cores.
fn core_bits(vcpus: u8) -> u32 {
    u8::BITS - (vcpus.max(1) - 1).leading_zeros()
}

/// Topology leaves (Intel SDM vol. 2A, CPUID leaves 0BH and 1FH), of which KVM offers an empty one at most.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// AMD's own of later processors (AMD APM vol. 3, Fn8000_0026); the others say the same.
const EXTENDED_TOPOLOGY: u32 = 0x8000_0026;

/// A processor's leaves with the guest's topology in them.
fn with_topology(leaves: &[kvm_cpuid_entry2], vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let others = |e: &&kvm_cpuid_entry2| !TOPOLOGY.contains(&e.function) && e.function != EXTENDED_TOPOLOGY;
    let mut entries: Vec<_> = leaves.iter().filter(others).copied().collect();
    let present = |leaf: u32| leaves.iter().any(|e| e.function == leaf);
    for function in TOPOLOGY.into_iter().filter(|leaf| present(*leaf)) {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        entries.extend((0..3).map(|index| kvm_cpuid_entry2 { function, index, flags, ..Default::default() }));
    }
    entries.iter_mut().for_each(|entry| shared(entry, vcpus));
    entries
}

/// Leaves that are the same on every vCPU.
fn shared(entry: &mut kvm_cpuid_entry2, vcpus: u8) {
    let last = u32::from(vcpus.max(1) - 1);
    match (entry.function, entry.index) {
        // Intel SDM vol. 2A, CPUID leaf 1: HTT, logical processors, CLFLUSH size.
        (1, _) => {
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
fn own(entry: &mut kvm_cpuid_entry2, id: u8) {
    let id = u32::from(id);
    match entry.function {
        1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
        0xb | 0x1f => entry.edx = id,
        // AMD APM vol. 3, Fn8000_001E: APIC identifier, core with one thread, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
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
    fn apic_ids_use_the_fewest_bits() {
        assert_eq!([1, 2, 3, 4, 5, 254].map(core_bits), [0, 1, 2, 2, 3, 8]);
    }

    #[test]
    fn the_guest_sees_its_own_topology_and_a_hypervisor() {
        let mut leaf = entry(1, 0);
        shared(&mut leaf, 4);
        own(&mut leaf, 3);
        assert_eq!((leaf.ebx >> 24, leaf.ebx >> 16 & 0xff, leaf.edx >> 28 & 1), (3, 4, 1));
        let mut cores = entry(0xb, 1);
        shared(&mut cores, 6);
        own(&mut cores, 5);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        // KVM offers one empty topology leaf; the guest gets all of them.
        let all = with_topology(&[entry(0xb, 0), entry(0x8000_0026, 0)], 6);
        assert_eq!(all.iter().map(|e| e.ecx).collect::<Vec<_>>(), [0x100, 0x201, 2]);
        let mut single = entry(1, 0);
        shared(&mut single, 1);
        assert_eq!(single.edx >> 28 & 1, 0);
    }

    #[test]
    fn caches_belong_to_one_core_but_the_last() {
        let cache = |function, level: u32, vcpus| {
            let mut leaf = kvm_cpuid_entry2 { eax: 1 | level << 5 | 0xffff_c000, ..entry(function, 0) };
            shared(&mut leaf, vcpus);
            leaf.eax
        };
        // Sharing less one in bits 14 to 25; cores in the package less one above, on Intel's.
        for (level, sharing) in [(1, 0), (2, 0), (3, 5)] {
            assert_eq!((cache(4, level, 6) >> 14 & 0xfff, cache(4, level, 6) >> 26), (sharing, 5));
            assert_eq!(cache(0x8000_001d, level, 6) >> 14, sharing);
        }
        assert_eq!(cache(4, 3, 254) >> 26, 63);
        let mut end = kvm_cpuid_entry2 { eax: 0, ..entry(4, 4) };
        shared(&mut end, 6);
        assert_eq!(end.eax, 0);
    }

    #[test]
    fn cores_are_counted_as_amd_does() {
        let mut leaf = entry(0x8000_0008, 0);
        shared(&mut leaf, 6);
        assert_eq!((leaf.ecx & 0xff, leaf.ecx >> 12 & 0xf), (5, 3));
        let mut core = entry(0x8000_001e, 0);
        own(&mut core, 5);
        assert_eq!((core.eax, core.ebx, core.ecx), (5, 5, 0));
    }
}
