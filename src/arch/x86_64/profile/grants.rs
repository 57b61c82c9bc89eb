//! What a guest gets of its processor only when the embedder asks for it.
//!
//! These are the means to virtualize, and counters of what programs do.

use super::bits::{CpuidBits, CpuidRegister};
use super::leaves::Leaves;

use CpuidRegister::{Ebx, Ecx, Edx};

/// What a profile asks for beyond the usual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(default, deny_unknown_fields))]
pub(super) struct OptionalFeatures {
    pub nesting: bool,
    pub counters: bool,
}

/// VMX and SMX (Intel SDM vol. 2A, CPUID leaf 1), SVM and SKINIT (AMD APM vol. 3, Fn8000_0001).
const NESTING: [CpuidBits; 2] =
    [CpuidBits::new(1, 0, Ecx, 1 << 5 | 1 << 6), CpuidBits::new(0x8000_0001, 0, Ecx, 1 << 2 | 1 << 12)];
/// SVM's own (AMD APM vol. 3, Fn8000_000A).
const NESTING_LEAVES: [u32; 1] = [0x8000_000a];

/// Debug stores and PDCM; processor trace; last branch records; counters of cores, of instructions retired, of the caches
/// between them, and samples by instruction.
const COUNTERS: [CpuidBits; 6] = [
    CpuidBits::new(1, 0, Ecx, 1 << 2 | 1 << 4 | 1 << 15),
    CpuidBits::new(1, 0, Edx, 1 << 21),
    CpuidBits::new(7, 0, Ebx, 1 << 25),
    CpuidBits::new(7, 0, Edx, 1 << 19),
    CpuidBits::new(0x8000_0001, 0, Ecx, 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28),
    CpuidBits::new(0x8000_0008, 0, Ebx, 1 << 1),
];
/// Performance monitoring, processor trace, last branch records and monitoring again (Intel SDM vol. 2A, leaves 0AH, 14H,
/// 1CH, 23H); samples and counters (AMD APM vol. 3, Fn8000_001B and Fn8000_0022).
const COUNTER_LEAVES: [u32; 6] = [0xa, 0x14, 0x1c, 0x23, 0x8000_001b, 0x8000_0022];

impl OptionalFeatures {
    /// Takes from `leaves` what no guest has by default.
    pub(super) fn withhold(leaves: &mut Leaves) {
        for bits in NESTING.into_iter().chain(COUNTERS) {
            leaves.clear(bits);
        }
        for leaf in NESTING_LEAVES.into_iter().chain(COUNTER_LEAVES) {
            leaves.remove(leaf);
        }
        leaves.drop_orphans();
    }

    /// Gives `leaves` what is asked for, as far as `host` has it.
    pub(super) fn give(self, leaves: &mut Leaves, host: &Leaves) {
        let mut copy = |bits: &[CpuidBits], whole: &[u32]| {
            for bits in bits.iter().filter(|bits| host.get(**bits) != 0) {
                leaves.set(*bits, leaves.get(*bits) | host.get(*bits));
            }
            whole.iter().for_each(|leaf| leaves.copy(*leaf, host));
        };
        if self.nesting {
            copy(&NESTING, &NESTING_LEAVES);
        }
        if self.counters {
            copy(&COUNTERS, &COUNTER_LEAVES);
        }
    }

    /// What two profiles both ask for.
    pub(super) fn common(self, other: Self) -> Self {
        Self { nesting: self.nesting && other.nesting, counters: self.counters && other.counters }
    }
}

impl Leaves {
    /// Whether anything of the processor's counters is shown.
    pub(in super::super) fn counts(&self) -> bool {
        COUNTERS.into_iter().any(|bits| self.get(bits) != 0)
            || COUNTER_LEAVES.into_iter().any(|leaf| self.registers(leaf, 0) != [0; 4])
    }
}
