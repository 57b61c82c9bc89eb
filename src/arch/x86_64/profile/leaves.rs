//! A table of CPUID leaves: what a processor answers.
//!
//! Also which of it a host must have, and what two processors have in common.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::bits::{CpuidBits, CpuidRegister, place};
use super::names::{KVM_FEATURES, NEEDS};
use CpuidRegister::{Eax, Ebx, Ecx, Edx};

const REGISTERS: [CpuidRegister; 4] = [Eax, Ebx, Ecx, Edx];

/// State components of XSAVE: subleaf 0 says which, 1 how they are saved, the others where each lies.
const XSAVE_STATES: u32 = 0xd;

/// One answer of CPUID, as it is serialized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(super) struct Leaf {
    leaf: u32,
    subleaf: u32,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

/// A table of CPUID by leaf and subleaf. What is not in it is zero.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(from = "Vec<Leaf>", into = "Vec<Leaf>")
)]
pub(in super::super) struct Leaves(BTreeMap<(u32, u32), [u32; 4]>);

impl From<Vec<Leaf>> for Leaves {
    fn from(all: Vec<Leaf>) -> Self {
        Self(all.into_iter().map(|l| ((l.leaf, l.subleaf), [l.eax, l.ebx, l.ecx, l.edx])).collect())
    }
}

impl From<Leaves> for Vec<Leaf> {
    fn from(leaves: Leaves) -> Self {
        let leaf = |((leaf, subleaf), [eax, ebx, ecx, edx]): ((u32, u32), [u32; 4])| Leaf {
            leaf,
            subleaf,
            eax,
            ebx,
            ecx,
            edx,
        };
        leaves.0.into_iter().map(leaf).collect()
    }
}

/// Whether CPUID looks at ECX for this leaf.
pub(super) fn is_indexed(leaf: u32) -> bool {
    matches!(
        leaf,
        4 | 7
            | 0xb
            | 0xd
            | 0xf
            | 0x10
            | 0x12
            | 0x14
            | 0x17
            | 0x18
            | 0x1b
            | 0x1d
            | 0x1e
            | 0x1f
            | 0x20
            | 0x23
            | 0x24
            | 0x8000_001d
            | 0x8000_0020
            | 0x8000_0026
    )
}

/// What a register means, as far as two processors are compared.
enum Meaning {
    /// Each bit says that something is there.
    Bits,
    /// Each byte is a number that a processor with a greater one can do as well.
    Least,
    /// A description that any processor can give of itself, such as its model and its caches; nothing works differently.
    Description,
    /// Anything else: only the same is the same.
    Whole,
}

fn meaning(leaf: u32, subleaf: u32, register: CpuidRegister) -> Meaning {
    match (leaf, subleaf, register) {
        (1, _, Ecx | Edx)
        | (6, _, Eax)
        | (7, 0, Ebx | Ecx | Edx)
        | (7, 1.., _)
        | (XSAVE_STATES, 0, Eax | Edx)
        | (XSAVE_STATES, 1, Eax | Ecx | Edx)
        | (KVM_FEATURES, _, _)
        | (0x8000_0001, _, Ecx | Edx)
        | (0x8000_0007, _, Edx)
        | (0x8000_0008, _, Ebx)
        | (0x8000_000a, _, Edx)
        | (0x8000_0021, _, Eax) => Meaning::Bits,
        // Address sizes; SVM's revision and number of address spaces.
        (0x8000_0008, _, Eax) | (0x8000_000a, _, Eax | Ebx) => Meaning::Least,
        // Sizes of the XSAVE area, which follow from its states; highest subleaf.
        (XSAVE_STATES, 0 | 1, _) | (7, 0, Eax) => Meaning::Description,
        (0..=5 | 0xb | 0x15 | 0x16 | 0x1f | 0x4000_0000 | 0x8000_0000..=0x8000_0006 | 0x8000_0008, _, _)
        | (0x8000_001d | 0x8000_001e | 0x8000_0026, _, _) => Meaning::Description,
        _ => Meaning::Whole,
    }
}

/// The lesser of each pair of bytes.
fn least(one: u32, other: u32) -> u32 {
    let bytes = one.to_le_bytes().into_iter().zip(other.to_le_bytes());
    bytes.rev().fold(0, |all, (a, b)| all << 8 | u32::from(a.min(b)))
}

impl Leaves {
    /// What KVM offers, without what depends on the processor that was asked, what the guest's system switches on, and
    /// what means nothing alone.
    pub(super) fn offered(entries: &[kvm_cpuid_entry2]) -> Self {
        let entry = |e: &kvm_cpuid_entry2| ((e.function, e.index), [e.eax, e.ebx, e.ecx, e.edx]);
        let mut leaves = Self(entries.iter().map(entry).collect());
        for ((leaf, _), [eax, ebx, ecx, edx]) in &mut leaves.0 {
            match leaf {
                // Identifier and number of processors; OSXSAVE.
                1 => (*ebx, *ecx) = (*ebx & 0xffff, *ecx & !(1 << 27)),
                // Who shares a cache.
                4 | 0x8000_001d => *eax &= 0x3fff,
                // OSPKE.
                7 => *ecx &= !(1 << 4),
                0x8000_0008 => *ecx = 0,
                0xb | 0x1f | 0x8000_001e | 0x8000_0026 => (*eax, *ebx, *ecx, *edx) = (0, 0, 0, 0),
                _ => {}
            }
        }
        leaves.drop_orphans();
        leaves
    }

    pub(in super::super) fn entries(&self) -> Vec<kvm_cpuid_entry2> {
        let entry = |(&(function, index), &[eax, ebx, ecx, edx]): (&(u32, u32), &[u32; 4])| kvm_cpuid_entry2 {
            function,
            index,
            flags: if is_indexed(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        self.0.iter().map(entry).collect()
    }

    pub(super) fn put(&mut self, leaf: u32, subleaf: u32, registers: [u32; 4]) {
        self.0.insert((leaf, subleaf), registers);
    }

    pub(in super::super) fn registers(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.0.get(&(leaf, subleaf)).copied().unwrap_or_default()
    }

    fn register(&self, leaf: u32, subleaf: u32, register: CpuidRegister) -> u32 {
        let [eax, ebx, ecx, edx] = self.registers(leaf, subleaf);
        match register {
            Eax => eax,
            Ebx => ebx,
            Ecx => ecx,
            Edx => edx,
        }
    }

    /// Those of `bits` that are set.
    pub(super) fn get(&self, bits: CpuidBits) -> u32 {
        self.register(bits.leaf, bits.subleaf, bits.register) & bits.mask
    }

    /// Makes `bits` those of `value`.
    pub(super) fn set(&mut self, bits: CpuidBits, value: u32) {
        let registers = self.0.entry((bits.leaf, bits.subleaf)).or_default();
        let [eax, ebx, ecx, edx] = registers;
        let register = match bits.register {
            Eax => eax,
            Ebx => ebx,
            Ecx => ecx,
            Edx => edx,
        };
        *register = *register & !bits.mask | value & bits.mask;
    }

    /// Makes `bits` zeros, where there is anything.
    pub(super) fn clear(&mut self, bits: CpuidBits) {
        if self.get(bits) != 0 {
            self.set(bits, 0);
        }
    }

    /// Makes a leaf that of `other`.
    pub(super) fn copy(&mut self, leaf: u32, other: &Self) {
        let its = other.0.iter().filter(|((it, _), _)| *it == leaf);
        self.0.extend(its.map(|(at, registers)| (*at, *registers)));
    }

    pub(super) fn remove(&mut self, leaf: u32) {
        self.0.retain(|(its, _), _| *its != leaf);
    }

    /// The first bits that are shown without what they need, and that.
    pub(super) fn orphan(&self) -> Option<(CpuidBits, CpuidBits)> {
        let orphan = |(bits, needed): &(CpuidBits, CpuidBits)| {
            let mask = self.get(*bits);
            (mask != 0 && self.get(*needed) == 0).then_some((CpuidBits { mask, ..*bits }, *needed))
        };
        NEEDS.iter().find_map(orphan)
    }

    /// Takes away all that is shown without what it needs.
    pub(super) fn drop_orphans(&mut self) {
        while let Some((bits, _)) = self.orphan() {
            self.set(bits, 0);
        }
    }

    /// What of this a host that offers `host` lacks, each in words.
    pub(super) fn lacking(&self, host: &Self) -> Vec<String> {
        let mut missing = Vec::new();
        for &(leaf, subleaf) in self.0.keys() {
            for register in REGISTERS {
                let (wanted, had) = (self.register(leaf, subleaf, register), host.register(leaf, subleaf, register));
                match meaning(leaf, subleaf, register) {
                    Meaning::Bits if wanted & !had != 0 => {
                        missing.push(CpuidBits::new(leaf, subleaf, register, wanted & !had).to_string());
                    }
                    Meaning::Least if least(wanted, had) != wanted => {}
                    Meaning::Whole if wanted != 0 && wanted != had => {}
                    _ => continue,
                }
                if !matches!(meaning(leaf, subleaf, register), Meaning::Bits) {
                    let place = place(leaf, subleaf);
                    missing.push(format!("{place} {register} = {wanted:#x} (here it is {had:#x})"));
                }
            }
        }
        missing
    }

    /// The processor that both can show: what both have, described as the one of them that sorts first.
    pub(super) fn intersect(&self, other: &Self) -> Self {
        let describing = if self.description().cmp(&other.description()) == Ordering::Greater { other } else { self };
        let mut both = Self::default();
        for &(leaf, subleaf) in self.0.keys().chain(other.0.keys()) {
            for register in REGISTERS {
                let [one, two] = [self, other].map(|table| table.register(leaf, subleaf, register));
                let value = match meaning(leaf, subleaf, register) {
                    Meaning::Bits => one & two,
                    Meaning::Least => least(one, two),
                    Meaning::Description => describing.register(leaf, subleaf, register),
                    Meaning::Whole if self.registers(leaf, subleaf) == other.registers(leaf, subleaf) => one,
                    Meaning::Whole => 0,
                };
                both.set(CpuidBits::new(leaf, subleaf, register, u32::MAX), value);
            }
        }
        both.drop_orphans();
        both.0.retain(|_, registers| *registers != [0; 4]);
        both
    }

    /// How it describes itself, beginning with family, model and stepping.
    fn description(&self) -> (u32, Vec<(u32, u32, u32)>) {
        let mut all = Vec::new();
        for &(leaf, subleaf) in self.0.keys() {
            let values = REGISTERS.into_iter().filter(|it| matches!(meaning(leaf, subleaf, *it), Meaning::Description));
            all.extend(values.map(|it| (leaf, subleaf, self.register(leaf, subleaf, it))));
        }
        // What is not in the table is zero, and so described the same.
        all.retain(|(_, _, value)| *value != 0);
        (self.register(1, 0, Eax), all)
    }

    /// Writes what follows from the rest: how far the leaves go, and how large the area of XSAVE is.
    pub(super) fn seal(&mut self) {
        for base in [0, 0x4000_0000, 0x8000_0000] {
            let last =
                self.0.range((base, 0)..=(base + 0xffff, u32::MAX)).next_back().map_or(base, |((leaf, _), _)| *leaf);
            self.set(CpuidBits::new(base, 0, Eax, u32::MAX), last);
        }
        let last = self.0.range((7, 0)..=(7, u32::MAX)).next_back().map_or(0, |((_, subleaf), _)| *subleaf);
        if self.0.contains_key(&(7, 0)) {
            self.set(CpuidBits::new(7, 0, Eax, u32::MAX), last);
        }
        if !self.0.contains_key(&(XSAVE_STATES, 0)) {
            return;
        }
        let [low, high] = [Eax, Edx].map(|it| self.register(XSAVE_STATES, 0, it));
        let states = u64::from(high) << 32 | u64::from(low);
        // Those of the supervisor are no part of the standard format.
        let supervisor = self.register(XSAVE_STATES, 1, Ecx);
        self.0.retain(|(leaf, state), _| {
            *leaf != XSAVE_STATES
                || *state < 2
                || (states | u64::from(supervisor)).checked_shr(*state).unwrap_or(0) & 1 == 1
        });
        let end = |(&(_, state), &[size, offset, ..]): (&(u32, u32), &[u32; 4])| {
            if states.checked_shr(state).unwrap_or(0) & 1 == 1 { size.saturating_add(offset) } else { 0 }
        };
        let ends = self.0.range((XSAVE_STATES, 2)..=(XSAVE_STATES, u32::MAX)).map(end).max();
        // The legacy area and the header (Intel SDM vol. 1, 13.4).
        let size = if states == 0 { 0 } else { ends.unwrap_or(0).max(0x240) };
        self.set(CpuidBits::new(XSAVE_STATES, 0, Ebx, u32::MAX), size);
        self.set(CpuidBits::new(XSAVE_STATES, 0, Ecx, u32::MAX), size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(name: &str) -> CpuidBits {
        name.parse().unwrap()
    }

    fn with(names: &[&str]) -> Leaves {
        let mut leaves = Leaves::default();
        names.iter().for_each(|name| leaves.set(bits(name), u32::MAX));
        leaves
    }

    #[test]
    fn missing_host_features_are_named() {
        let (wanted, host) = (with(&["avx2", "bmi2", "sse3"]), with(&["sse3", "rdrand"]));
        assert_eq!(wanted.lacking(&host), ["avx2 (leaf 7.0 EBX bit 5), bmi2 (leaf 7.0 EBX bit 8)"]);
        let mut larger = wanted.clone();
        larger.put(0x8000_0008, 0, [0x3027, 0, 0, 0]);
        let mut smaller = wanted.clone();
        smaller.put(0x8000_0008, 0, [0x3024, 0, 0, 0]);
        assert_eq!(larger.lacking(&smaller), ["leaf 0x80000008 EAX = 0x3027 (here it is 0x3024)"]);
        assert!(smaller.lacking(&larger).is_empty() && host.lacking(&host).is_empty());
    }

    #[test]
    fn dependent_features_are_removed_too() {
        let mut leaves = with(&["xsave", "xcr0_x87", "xcr0_sse", "xcr0_avx", "avx", "avx2", "fma", "sse4_2"]);
        assert_eq!(leaves.orphan(), None);
        leaves.set(bits("xsave"), 0);
        leaves.drop_orphans();
        for gone in ["avx", "avx2", "fma", "xcr0_x87"] {
            assert_eq!(leaves.get(bits(gone)), 0, "{gone}");
        }
        assert_ne!(leaves.get(bits("sse4_2")), 0);
    }

    #[test]
    fn intersection_has_the_features_of_both_profiles() {
        let mut one = with(&["sse3", "avx512f", "rdrand"]);
        one.put(1, 0, [0x5_0654, 0, one.registers(1, 0)[2], 0]);
        one.put(0x8000_0008, 0, [0x30_302e, 0, 0, 0]);
        one.put(0x14, 0, [1, 2, 3, 4]);
        let mut two = with(&["sse3", "rdrand", "cx16"]);
        two.put(1, 0, [0x3_06a9, 0, two.registers(1, 0)[2], 0]);
        two.put(0x8000_0008, 0, [0x3027, 0, 0, 0]);
        let both = one.intersect(&two);
        assert_eq!(both, two.intersect(&one));
        assert_eq!(both.registers(1, 0), [0x3_06a9, 0, 1 << 30 | 1, 0]);
        assert_eq!((both.registers(0x8000_0008, 0)[0], both.registers(0x14, 0)), (0x3027, [0; 4]));
        assert!(both.lacking(&one).is_empty() && both.lacking(&two).is_empty());
        assert_eq!(both.intersect(&one), both);
    }

    #[test]
    fn xsave_sizes_follow_from_visible_features() {
        let mut leaves = with(&["xsave", "xcr0_x87", "xcr0_sse", "xcr0_avx", "avx"]);
        leaves.put(0xd, 2, [0x100, 0x240, 0, 0]);
        leaves.put(0xd, 9, [8, 0xa80, 0, 0]);
        leaves.put(0x8000_0008, 0, [0x3027, 0, 0, 0]);
        leaves.seal();
        assert_eq!(leaves.registers(0xd, 0), [7, 0x340, 0x340, 0]);
        assert_eq!(leaves.registers(0xd, 9), [0; 4]);
        assert_eq!(
            [0, 0x4000_0000, 0x8000_0000].map(|base| leaves.registers(base, 0)[0]),
            [0xd, 0x4000_0000, 0x8000_0008]
        );
    }
}
