//! [`CpuProfile`]: the processor that a guest sees.
//!
//! It is a value that can be kept, and shared by a fleet of unlike hosts.

mod bits;
mod grants;
mod leaves;
mod level;
mod names;
mod vendor;

pub use bits::{CpuidBits, CpuidRegister};
pub(super) use leaves::Leaves;

use grants::OptionalFeatures;

use super::MsrValue;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::Kvm;

/// What a processor does not suffer from, and in which ways it predicts (Intel SDM vol. 4, IA32_ARCH_CAPABILITIES).
const ARCH_CAPABILITIES: u32 = 0x10a;
/// The bits in it that are no virtue: RSBA and RRSBA.
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;
/// The interrupt controller's registers, of which KVM hides none (KVM API, 4.97).
const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;

/// Describes the processor that a guest sees; a config value.
///
/// By default this is the host's, with nearly everything that its KVM offers: the fastest, and different on every kind
/// of host. A *level* is the same on every host that can show it: instructions, model, name, caches, address sizes,
/// KVM's own interface. So guests can be moved between hosts, and behave alike on all of them.
///
/// No profile shows the means to virtualize (VMX, SVM) or performance counters by default. See
/// [`CpuProfile::nested_virtualization`] and [`CpuProfile::performance_counters`] for why.
///
/// ```
/// # fn main() -> cofferdam::Result<()> {
/// use cofferdam::cpu::CpuProfile;
///
/// let level = CpuProfile::x86_64_v3();
/// let like_here_but_older = CpuProfile::host().without("avx512f".parse()?);
/// # Ok(())
/// # }
/// ```
///
/// For a fleet, ask each host what it is ([`CpuProfile::of_host`]) and keep the answers (feature `serde`). Then give
/// what they have in common ([`CpuProfile::intersect`]) to all guests.
///
/// Three things stay the host's even at a level:
///
/// - the maker (`GenuineIntel`, `AuthenticAMD`), as each has its own instructions for system calls and for hypervisors;
/// - the frequency of the TSC;
/// - the physical speed.
///
/// A level shows none of the processor's mitigations of its own weaknesses, nor that it needs none. So the guest's
/// kernel switches on the software mitigations that it was built with. Add bits that all hosts have, such as
/// `spec_ctrl`, where programs in a guest must not trust each other.
///
/// CPUID tells; it does not forbid. Hardware stops programs that use a hidden instruction only where that needs XSAVE
/// (AVX and all after it). Registers (MSRs) can be hidden for good.
///
/// The machine numbers and groups its processors itself. So it overwrites what a profile says of topology: leaves 0xb
/// and 0x1f, and the counts and identifiers in 1, 4, 0x80000008, 0x8000001d and 0x8000001e.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct CpuProfile {
    base: Base,
    msrs: Vec<Msr>,
    #[cfg_attr(feature = "serde", serde(default))]
    grants: OptionalFeatures,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
enum Base {
    /// What the host's KVM offers when the machine starts, and then these changes in their order.
    Host(Vec<Change>),
    /// These leaves, on hosts of this maker.
    Fixed {
        /// Any, when `None`.
        vendor: Option<String>,
        leaves: Leaves,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
struct Change {
    bits: CpuidBits,
    value: u32,
}

/// A model-specific register: its value at the first instruction, or none at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
struct Msr {
    index: u32,
    value: Option<u64>,
}

impl Default for CpuProfile {
    fn default() -> Self {
        Self::host()
    }
}

impl CpuProfile {
    fn of(base: Base) -> Self {
        Self { base, msrs: Vec::new(), grants: OptionalFeatures::default() }
    }

    /// Shows the host's processor, as far as its KVM offers it to guests.
    ///
    /// Each host on which a machine starts shows its own.
    pub fn host() -> Self {
        Self::of(Base::Host(Vec::new()))
    }

    /// Reads the processor of this host, so that other hosts can show it too.
    ///
    /// Frequencies are not in it, as they are no property of what the processor can do.
    ///
    /// # Errors
    /// What [`Host::ready`](crate::Host::ready) says is missing here.
    pub fn of_host() -> Result<Self> {
        let kvm = Kvm::open()?;
        let mut leaves = offered(&kvm)?;
        OptionalFeatures::withhold(&mut leaves);
        for leaf in [0x15, 0x16] {
            leaves.remove(leaf);
        }
        let vendor = Some(vendor::name(leaves.registers(0, 0)));
        let capable: CpuidBits = "arch_capabilities".parse()?;
        let value = kvm.feature_msr(ARCH_CAPABILITIES)?.filter(|_| leaves.get(capable) != 0);
        let msrs = value.map(|value| Msr { index: ARCH_CAPABILITIES, value: Some(value) });
        Ok(Self { msrs: msrs.into_iter().collect(), ..Self::of(Base::Fixed { vendor, leaves }) })
    }

    /// Shows the level x86-64-v2 of the System V ABI.
    ///
    /// It has SSE4.2 and POPCNT, which processors have since about 2009.
    pub fn x86_64_v2() -> Self {
        Self::of(Base::Fixed { vendor: None, leaves: level::v2() })
    }

    /// Shows the level x86-64-v3 of the System V ABI.
    ///
    /// It has AVX2, BMI and FMA, which processors have since about 2013.
    pub fn x86_64_v3() -> Self {
        Self::of(Base::Fixed { vendor: None, leaves: level::v3() })
    }

    /// Sets whether the guest may be a hypervisor itself; it may not by default.
    ///
    /// It then gets VMX or SVM, as far as the host's KVM offers it. A hostile guest then reaches the code of the host's KVM
    /// in which most escapes were found. Give it to guests whose kernel is trusted.
    pub fn nested_virtualization(mut self, allow: bool) -> Self {
        self.grants.nesting = allow;
        self
    }

    /// Sets whether the guest may count events of its processor, such as cycles and misses.
    ///
    /// It may not by default. If it may, it can count what the host's KVM offers. Counters are finer clocks than a guest has otherwise, which helps it to
    /// spy on what shares the processor.
    pub fn performance_counters(mut self, allow: bool) -> Self {
        self.grants.counters = allow;
        self
    }

    /// Sets all of `bits`.
    pub fn with(self, bits: CpuidBits) -> Self {
        self.cpuid(bits, u32::MAX)
    }

    /// Clears `bits`, and what needs them.
    ///
    /// With `xsave` goes AVX, with `avx` AVX2.
    pub fn without(self, bits: CpuidBits) -> Self {
        self.cpuid(bits, 0)
    }

    /// Sets a field of several bits to `value`, such as a cache's size.
    pub fn cpuid(mut self, bits: CpuidBits, value: u32) -> Self {
        let change = Change { bits, value };
        match &mut self.base {
            Base::Host(changes) => changes.push(change),
            Base::Fixed { leaves, .. } => change.apply(leaves),
        }
        self
    }

    /// Sets the value of a model-specific register at the guest's first instruction.
    pub fn msr(self, index: u32, value: u64) -> Self {
        self.register(Msr { index, value: Some(value) })
    }

    /// Hides a model-specific register.
    ///
    /// Reading and writing it is a general protection fault (#GP) in the guest.
    pub fn without_msr(self, index: u32) -> Self {
        self.register(Msr { index, value: None })
    }

    fn register(mut self, msr: Msr) -> Self {
        self.msrs.retain(|it| it.index != msr.index);
        self.msrs.push(msr);
        self.msrs.sort_by_key(|it| it.index);
        self
    }

    /// Returns the processor that can be shown wherever either of both can.
    ///
    /// It has what both have, and describes itself (model, name, caches) as the older of them. Registers that both set
    /// differently are hidden. The order of the two makes no difference, nor does that of many.
    ///
    /// # Errors
    /// `InvalidConfig` for [`CpuProfile::host`], which says nothing of any particular host: take
    /// [`CpuProfile::of_host`] there. `Incompatible` when the two are of different makers.
    pub fn intersect(&self, other: &Self) -> Result<Self> {
        let (Base::Fixed { vendor: one, leaves: a }, Base::Fixed { vendor: two, leaves: b }) =
            (&self.base, &other.base)
        else {
            let problem = "`host()` is another processor on every host; ask each with `of_host()`";
            return Err(Error::invalid("CpuProfile::intersect", problem));
        };
        if let (Some(one), Some(two)) = (one, two) {
            same_vendor(one, two)?;
        }
        let mut leaves = a.intersect(b);
        leaves.seal();
        let mut both = Self::of(Base::Fixed { vendor: one.clone().or_else(|| two.clone()), leaves });
        both.grants = self.grants.common(other.grants);
        for msr in self.msrs.iter().chain(&other.msrs) {
            let value = match [self, other].map(|profile| profile.msrs.iter().find(|it| it.index == msr.index)) {
                [Some(a), Some(b)] => a.common(*b),
                _ => msr.value,
            };
            both = both.register(Msr { index: msr.index, value });
        }
        if both.shows("arch_capabilities".parse()?) != Some(true) {
            both.msrs.retain(|msr| msr.index != ARCH_CAPABILITIES);
        }
        Ok(both)
    }

    /// Whether all of `bits` are shown; `None` where that depends on the host.
    pub fn shows(&self, bits: CpuidBits) -> Option<bool> {
        match &self.base {
            Base::Host(_) => None,
            Base::Fixed { leaves, .. } => Some(leaves.get(bits) == bits.mask),
        }
    }

    /// `Ok` when this host can show it.
    ///
    /// # Errors
    /// Those of [`VmBuilder::start`](crate::VmBuilder::start) that are about the processor.
    pub fn check(&self) -> Result<()> {
        super::Cpu::new(&Kvm::open()?, self, 1).map(drop)
    }

    /// What a guest is shown here.
    ///
    /// # Errors
    /// `Unsupported` naming each bit that this host lacks, `Incompatible` when it is of another maker, `InvalidConfig`
    /// for bits without what they need.
    pub(super) fn on(&self, kvm: &Kvm) -> Result<Leaves> {
        self.among(&offered(kvm)?).doing(|| "cpu")
    }

    fn among(&self, host: &Leaves) -> Result<Leaves> {
        let mut leaves = match &self.base {
            Base::Host(changes) => {
                let mut leaves = host.clone();
                OptionalFeatures::withhold(&mut leaves);
                changes.iter().for_each(|change| change.apply(&mut leaves));
                leaves
            }
            Base::Fixed { vendor, leaves } => {
                let here = host.registers(0, 0);
                if let Some(vendor) = vendor {
                    same_vendor(vendor, &vendor::name(here))?;
                }
                let [_, ebx, ecx, edx] = here;
                let mut leaves = leaves.clone();
                level::settle(&mut leaves, [ebx, ecx, edx]);
                leaves
            }
        };
        self.grants.give(&mut leaves, host);
        if let Some((bits, needed)) = leaves.orphan() {
            return Err(Error::new(ErrorKind::InvalidConfig, format!("{bits} means nothing without {needed}")));
        }
        leaves.seal();
        let missing = leaves.lacking(host);
        if missing.is_empty() {
            return Ok(leaves);
        }
        Err(Error::new(ErrorKind::Unsupported, format!("this host cannot show {}", missing.join(", "))))
    }

    /// Registers to set, with their values.
    ///
    /// # Errors
    /// `Unsupported` naming the bits of IA32_ARCH_CAPABILITIES that this host lacks.
    pub(super) fn values(&self, kvm: &Kvm) -> Result<Vec<MsrValue>> {
        let values = self.msrs.iter().filter_map(|msr| Some(MsrValue { index: msr.index, data: msr.value? }));
        let values: Vec<_> = values.collect();
        for MsrValue { index, data } in values.iter().filter(|msr| msr.index == ARCH_CAPABILITIES) {
            let lacking = data & !WEAKNESSES & !kvm.feature_msr(*index)?.unwrap_or(0);
            if lacking != 0 {
                let bits = (0..u64::BITS).filter(|bit| lacking >> bit & 1 == 1).map(|bit| format!("bit {bit}"));
                let bits = bits.collect::<Vec<_>>().join(", ");
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("cpu: this host lacks {bits} of MSR {index:#x}"),
                ));
            }
        }
        Ok(values)
    }

    /// Registers to hide, in order.
    ///
    /// # Errors
    /// `InvalidConfig` for one that cannot be hidden.
    pub(super) fn hidden(&self) -> Result<Vec<u32>> {
        let mut hidden: Vec<_> = self.msrs.iter().filter(|msr| msr.value.is_none()).map(|msr| msr.index).collect();
        // A profile that was loaded may have them in any order.
        hidden.sort_unstable();
        match hidden.iter().find(|index| X2APIC.contains(index)) {
            None => Ok(hidden),
            Some(index) => {
                Err(Error::invalid("cpu", format!("MSR {index:#x} is the interrupt controller's and cannot be hidden")))
            }
        }
    }
}

impl Change {
    fn apply(self, leaves: &mut Leaves) {
        let whole = leaves.orphan().is_none();
        leaves.set(self.bits, self.value);
        // Removing a feature removes what needs it; adding one alone is a mistake, reported at the start.
        if whole && self.value & self.bits.mask == 0 {
            leaves.drop_orphans();
        }
    }
}

impl Msr {
    /// What two hosts can both give this register; `None` is no register at all.
    fn common(self, other: Self) -> Option<u64> {
        let (one, two) = (self.value?, other.value?);
        match self.index {
            ARCH_CAPABILITIES => Some(one & two & !WEAKNESSES | (one | two) & WEAKNESSES),
            _ => (one == two).then_some(one),
        }
    }
}

/// What KVM offers, and what it does not list although it makes it.
fn offered(kvm: &Kvm) -> Result<Leaves> {
    let mut leaves = Leaves::offered(kvm.supported_cpuid()?.as_slice());
    let deadline = if kvm.has_tsc_deadline() { u32::MAX } else { 0 };
    for (name, value) in [("hypervisor", u32::MAX), ("ht", u32::MAX), ("tsc_deadline_timer", deadline)] {
        leaves.set(name.parse()?, value);
    }
    Ok(leaves)
}

fn same_vendor(profile: &str, other: &str) -> Result<()> {
    if profile == other {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Incompatible,
        format!("the profile is of a processor by {profile}, this one is by {other}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(name: &str) -> CpuidBits {
        name.parse().unwrap()
    }

    /// A host that offers what this profile shows, and these bits.
    fn host(vendor: &str, profile: &CpuProfile, more: &[&str]) -> Leaves {
        let Base::Fixed { leaves, .. } = &profile.base else { panic!("no host") };
        let mut leaves = leaves.clone();
        level::settle(&mut leaves, vendor::words(vendor));
        more.iter().for_each(|name| leaves.set(bits(name), u32::MAX));
        leaves
    }

    #[test]
    fn level_is_the_same_on_every_host_of_a_vendor() {
        let level = CpuProfile::x86_64_v2();
        let old = host("GenuineIntel", &level, &["rdrand", "pcid"]);
        let mut new = host("GenuineIntel", &CpuProfile::x86_64_v3(), &["avx512f", "sha_ni", "invtsc"]);
        new.set(CpuidBits::new(1, 0, CpuidRegister::Eax, u32::MAX), 0x8_06f8);
        let seen = level.among(&old).unwrap();
        assert_eq!(seen, level.among(&new).unwrap());
        assert_eq!(seen.get(bits("rdrand")) | seen.get(bits("avx")) | seen.get(bits("invtsc")), 0);
        let amd = level.among(&host("AuthenticAMD", &level, &[])).unwrap();
        assert_ne!(seen.registers(0, 0), amd.registers(0, 0));
        assert_ne!(seen.registers(1, 0)[0], amd.registers(1, 0)[0]);
        assert_eq!(seen.registers(1, 0)[2..], amd.registers(1, 0)[2..]);
    }

    #[test]
    fn missing_features_of_a_level_are_named() {
        let here = host("AuthenticAMD", &CpuProfile::x86_64_v2(), &["bmi1"]);
        let error = CpuProfile::x86_64_v3().among(&here).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let text = error.to_string();
        assert!(text.starts_with("this host cannot show fma (leaf 1 ECX bit 12), movbe "), "{text}");
        assert!(text.contains("avx2 (leaf 7.0 EBX bit 5), bmi2 ") && !text.contains("bmi1"), "{text}");
        let mut small = here.clone();
        small.put(0x8000_0008, 0, [0x3024, 0, 0, 0]);
        let error = CpuProfile::x86_64_v2().among(&small).unwrap_err();
        assert!(error.to_string().contains("leaf 0x80000008 EAX = 0x3027"), "{error}");
    }

    #[test]
    fn masks_also_remove_dependent_features() {
        let here = host("GenuineIntel", &CpuProfile::x86_64_v3(), &["rdrand"]);
        let seen = CpuProfile::host().without(bits("xsave")).without(bits("rdrand")).among(&here).unwrap();
        assert_eq!(seen.get(bits("avx2")) | seen.get(bits("rdrand")) | seen.get(bits("fma")), 0);
        assert_ne!(seen.get(bits("sse4_2")), 0);
        let model = CpuidBits::new(1, 0, CpuidRegister::Eax, 0xf);
        assert_eq!(CpuProfile::x86_64_v2().cpuid(model, 7).among(&here).unwrap().get(model), 7);
        let error = CpuProfile::x86_64_v2().with(bits("avx")).among(&here).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        let error = CpuProfile::host().with(bits("sha_ni")).among(&here).unwrap_err();
        assert!(error.to_string().ends_with("cannot show sha_ni (leaf 7.0 EBX bit 29)"), "{error}");
        assert_eq!(CpuProfile::x86_64_v3().without(bits("avx")).shows(bits("avx2")), Some(false));
    }

    #[test]
    fn common_profile_of_a_fleet_fits_every_host() {
        let fixed = |vendor: &str, names: &[&str], msrs: &[(u32, u64)]| CpuProfile {
            base: Base::Fixed { vendor: Some(vendor.into()), leaves: host(vendor, &CpuProfile::x86_64_v2(), names) },
            msrs: msrs.iter().map(|(index, value)| Msr { index: *index, value: Some(*value) }).collect(),
            grants: OptionalFeatures::default(),
        };
        let one = fixed("GenuineIntel", &["rdrand", "aes", "arch_capabilities"], &[(ARCH_CAPABILITIES, 0b1011)]);
        let two = fixed("GenuineIntel", &["aes", "pcid", "arch_capabilities"], &[(ARCH_CAPABILITIES, 0b1101)]);
        let both = one.intersect(&two).unwrap();
        assert_eq!(both, two.intersect(&one).unwrap());
        assert_eq!(both.msrs, [Msr { index: ARCH_CAPABILITIES, value: Some(0b1101) }]);
        assert_eq!(
            ["aes", "rdrand", "pcid"].map(|name| both.shows(bits(name))),
            [Some(true), Some(false), Some(false)]
        );
        let older = fixed("GenuineIntel", &["aes"], &[]);
        assert!(both.intersect(&older).unwrap().msrs.is_empty());
        let error = one.intersect(&fixed("AuthenticAMD", &[], &[])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
        assert_eq!(one.intersect(&CpuProfile::host()).unwrap_err().kind(), ErrorKind::InvalidConfig);
        // A level is of any maker, and what it has in common with a host is of the host's.
        let level = CpuProfile::x86_64_v2().intersect(&one).unwrap();
        assert!(level.among(&host("AuthenticAMD", &CpuProfile::x86_64_v2(), &[])).is_err());
    }

    #[test]
    fn nested_virtualization_and_pmu_are_opt_in() {
        let names = ["vmx", "svm", "pdcm", "perfctr_core", "irperf"];
        let mut here = host("AuthenticAMD", &CpuProfile::x86_64_v3(), &names);
        here.put(0x8000_000a, 0, [1, 8, 0, 0xffff]);
        here.put(0xa, 0, [0x0830_0802, 0, 0, 0x603]);
        let shown = |profile: &CpuProfile| {
            let seen = profile.among(&here).unwrap();
            let leaves = [0xa, 0x8000_000a].map(|leaf| seen.registers(leaf, 0) != [0; 4]);
            (names.map(|name| seen.get(bits(name)) != 0), leaves, seen.counts())
        };
        for profile in [CpuProfile::host(), CpuProfile::x86_64_v2(), CpuProfile::x86_64_v3()] {
            assert_eq!(shown(&profile), ([false; 5], [false; 2], false));
            let nested = shown(&profile.clone().nested_virtualization(true));
            assert_eq!(nested, ([true, true, false, false, false], [false, true], false));
            let counting = shown(&profile.performance_counters(true));
            assert_eq!(counting, ([false, false, true, true, true], [true, false], true));
        }
    }

    #[test]
    fn hidden_msrs_are_sorted() {
        let profile = CpuProfile::host().without_msr(0x345).without_msr(0x10).msr(0x345, 1).without_msr(0x8b);
        assert_eq!(profile.hidden().unwrap(), [0x10, 0x8b]);
        assert!(CpuProfile::host().without_msr(0x808).hidden().is_err());
    }

    proptest::proptest! {
        /// Tables may come from files: whatever is in them, the answer is an error or what the host can show.
        #[test]
        fn arbitrary_cpuid_tables_are_rejected_or_subsets_of_the_host(
            tables in proptest::array::uniform2(proptest::collection::vec(
                (proptest::sample::select(vec![0u32, 1, 6, 7, 0xd, 0x14, 0x8000_0001, 0x8000_0008, u32::MAX]), 0u32..70, proptest::array::uniform4(proptest::num::u32::ANY)),
                0..12,
            ))
        ) {
            let [one, two] = tables.map(|table| {
                let mut leaves = Leaves::default();
                table.into_iter().for_each(|(leaf, subleaf, registers)| leaves.put(leaf, subleaf, registers));
                CpuProfile::of(Base::Fixed { vendor: None, leaves })
            });
            let here = host("GenuineIntel", &one, &[]);
            if let Ok(seen) = two.among(&here) {
                assert!(seen.lacking(&here).is_empty() && seen.orphan().is_none());
            }
            let both = one.intersect(&two).unwrap();
            assert_eq!(both, two.intersect(&one).unwrap());
            both.among(&here).unwrap();
        }
    }

    #[cfg(feature = "serde")]
    #[test]
    fn profiles_round_trip_as_text() {
        let profiles = [
            CpuProfile::host().without(bits("avx512f")).msr(0x10a, u64::MAX).without_msr(0x345),
            CpuProfile::x86_64_v3(),
        ];
        for profile in profiles {
            let text = serde_json::to_string(&profile).unwrap();
            assert_eq!(serde_json::from_str::<CpuProfile>(&text).unwrap(), profile, "{text}");
        }
        let kept =
            r#"{"base":{"host":[{"bits":{"leaf":7,"subleaf":0,"register":"ebx","mask":32},"value":0}]},"msrs":[]}"#;
        assert_eq!(serde_json::from_str::<CpuProfile>(kept).unwrap(), CpuProfile::host().without(bits("avx2")));
        assert!(serde_json::from_str::<CpuProfile>(&kept.replace("msrs", "more")).is_err());
        let unordered = kept.replace(
            "\"msrs\":[]",
            r#""msrs":[{"index":837,"value":null},{"index":16,"value":null},{"index":16,"value":null}]"#,
        );
        assert_eq!(serde_json::from_str::<CpuProfile>(&unordered).unwrap().hidden().unwrap(), [16, 16, 837]);
    }
}
