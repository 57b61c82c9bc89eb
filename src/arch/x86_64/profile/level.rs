//! The levels of the x86-64 psABI.
//!
//! Each is one processor that looks the same on every host that can show it.

use super::bits::{CpuidBits, CpuidRegister};
use super::leaves::Leaves;

/// Family, model and stepping, by who made the host's processor; kernels look at them together. Ones that kernels have
/// met in virtual machines for years, and for which they wait no time when they bring up further processors.
const NEHALEM: u32 = 0x1_06a3;
const HASWELL: u32 = 0x3_06c4;
const OPTERON: u32 = 0x6_0fb1;

/// What every processor of 64 bits has, as far as kernels want it.
const BASE: &[&str] = &[
    "fpu", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "apic", "sep", "mtrr", "pge", "mca", "cmov", "pat", "pse36",
    "clflush", "mmx", "fxsr", "sse", "sse2", "syscall", "nx", "lm",
];

/// What KVM makes itself, on every host: interrupt controller and timers, and its own interface to guests.
const KVM: &[&str] = &[
    "x2apic",
    "tsc_deadline_timer",
    "hypervisor",
    "arat",
    "tsc_adjust",
    "kvm_clock_old",
    "kvm_nop_io_delay",
    "kvm_clock",
    "kvm_steal_time",
    "kvm_pv_eoi",
    "kvm_pv_unhalt",
    "kvm_pv_tlb_flush",
    "kvm_pv_ipi",
    "kvm_pv_sched_yield",
    "kvm_clock_stable",
];

const V2: &[&str] = &["cx16", "lahf_lm", "popcnt", "sse3", "sse4_1", "sse4_2", "ssse3"];

const V3: &[&str] =
    &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave", "xcr0_x87", "xcr0_sse", "xcr0_avx"];

/// x86-64-v2: what processors have since about 2009.
pub(super) fn v2() -> Leaves {
    processor("x86-64-v2 virtual processor", &[BASE, KVM, V2])
}

/// x86-64-v3: what processors have since about 2013.
pub(super) fn v3() -> Leaves {
    let mut leaves = processor("x86-64-v3 virtual processor", &[BASE, KVM, V2, V3]);
    // The upper halves of the registers of AVX (Intel SDM vol. 1, 13.5.3).
    leaves.put(0xd, 2, [0x100, 0x240, 0, 0]);
    leaves.seal();
    leaves
}

fn processor(name: &str, features: &[&[&str]]) -> Leaves {
    let mut leaves = Leaves::default();
    leaves.put(
        0x4000_0000,
        0,
        [0, u32::from_le_bytes(*b"KVMK"), u32::from_le_bytes(*b"VMKV"), u32::from_le_bytes(*b"M\0\0\0")],
    );
    // CLFLUSH writes back 8 times 8 bytes.
    leaves.put(1, 0, [0, 8 << 8, 0, 0]);
    for bits in features.iter().copied().flatten().flat_map(|name| name.parse()) {
        leaves.set(bits, u32::MAX);
    }
    // Caches are described in leaf 4. For AMD's: 32 KiB for instructions and for data, 512 KiB, 16 MiB.
    leaves.put(2, 0, [0x00fe_ff01, 0, 0, 0]);
    leaves.put(0x8000_0005, 0, [0x01ff_01ff, 0x01ff_01ff, 0x2008_0140, 0x2008_0140]);
    leaves.put(0x8000_0006, 0, [0, 0x4200_4200, 0x0200_6140, 0x0080_8140]);
    // Type and level, ways, sets; lines of 64 bytes.
    for (n, kind, ways, sets) in [(0, 0x121, 8, 64), (1, 0x122, 8, 64), (2, 0x143, 8, 1024), (3, 0x163, 16, 16384)] {
        leaves.put(4, n, [kind, (ways - 1) << 22 | 63, sets - 1, 0]);
    }
    // Topology follows when the machine is known.
    leaves.put(0xb, 0, [0; 4]);
    let mut letters = name.bytes().chain(std::iter::repeat(0));
    for leaf in 0x8000_0002..=0x8000_0004 {
        let mut word = || u32::from_le_bytes(std::array::from_fn(|_| letters.next().unwrap_or(0)));
        leaves.put(leaf, 0, [word(), word(), word(), word()]);
    }
    // 39 bits of physical and 48 of linear addresses: the least that any processor of these levels has in practice.
    leaves.put(0x8000_0008, 0, [0x3027, 0, 0, 0]);
    leaves.seal();
    leaves
}

/// What a processor of no particular maker is called where one is needed: a level's model, made by `vendor`.
pub(super) fn settle(leaves: &mut Leaves, vendor: [u32; 3]) {
    let [ebx, ecx, edx] = vendor;
    for leaf in [0, 0x8000_0000] {
        let [eax, ..] = leaves.registers(leaf, 0);
        leaves.put(leaf, 0, [eax, ebx, ecx, edx]);
    }
    let model = CpuidBits::new(1, 0, CpuidRegister::Eax, u32::MAX);
    if leaves.get(model) == 0 {
        let v3 = "avx2".parse().is_ok_and(|avx2| leaves.get(avx2) != 0);
        let intel = vendor == super::vendor::words("GenuineIntel");
        leaves.set(
            model,
            match (intel, v3) {
                (true, false) => NEHALEM,
                (true, true) => HASWELL,
                (false, _) => OPTERON,
            },
        );
    }
}
