//! Bits of CPUID: where they are, and what people call them.

use std::fmt;
use std::str::FromStr;

use super::leaves;
use super::names::NAMES;
use crate::error::{Error, Result};

/// One of the four registers that CPUID answers in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl fmt::Display for CpuidRegister {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        })
    }
}

/// Some bits of one register of one CPUID leaf.
///
/// They have the names that Linux and QEMU give them: `"avx2".parse()` is leaf 7.0, EBX, bit 5. `Display` prints `avx2
/// (leaf 7.0 EBX bit 5)`; bits without a name are printed by their position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct CpuidBits {
    /// What EAX is when CPUID is asked.
    pub leaf: u32,
    /// What ECX is then; 0 for leaves that do not look at it.
    pub subleaf: u32,
    /// The register of the answer.
    pub register: CpuidRegister,
    /// The bits in it.
    pub mask: u32,
}

impl CpuidBits {
    /// The bits of `mask` in `register` of this leaf.
    pub const fn new(leaf: u32, subleaf: u32, register: CpuidRegister, mask: u32) -> Self {
        Self { leaf, subleaf, register, mask }
    }

    /// One bit. All of them below are written this way, as manuals number them.
    pub(super) const fn bit(leaf: u32, subleaf: u32, register: CpuidRegister, bit: u32) -> Self {
        Self::new(leaf, subleaf, register, 1 << bit)
    }

    /// Each bit of the mask by itself, lowest first.
    fn each(self) -> impl Iterator<Item = (u32, Option<&'static str>)> {
        let row = NAMES.iter().find(|row| (row.0, row.1, row.2) == (self.leaf, self.subleaf, self.register));
        (0..u32::BITS).filter(move |bit| self.mask >> bit & 1 == 1).map(move |bit| {
            let name = row.and_then(|row| row.3.iter().find(|(at, _)| *at == bit));
            (bit, name.map(|(_, name)| *name))
        })
    }
}

impl FromStr for CpuidBits {
    type Err = Error;

    /// # Errors
    /// `InvalidConfig` when no bit has this name.
    fn from_str(name: &str) -> Result<Self> {
        NAMES
            .iter()
            .find_map(|(leaf, subleaf, register, bits)| {
                let (bit, _) = bits.iter().find(|(_, its)| *its == name)?;
                Some(Self::bit(*leaf, *subleaf, *register, *bit))
            })
            .ok_or_else(|| Error::invalid("CpuidBits", format!("no bit of CPUID is called {name:?}")))
    }
}

/// `7.0`, `1`, `0x80000001`: as manuals write them, with the subleaf where there are several.
pub(super) fn place(leaf: u32, subleaf: u32) -> String {
    let leaf_number = if leaf < 10 { format!("{leaf}") } else { format!("{leaf:#x}") };
    if leaves::is_indexed(leaf) || subleaf > 0 {
        format!("leaf {leaf_number}.{subleaf}")
    } else {
        format!("leaf {leaf_number}")
    }
}

impl fmt::Display for CpuidBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = place(self.leaf, self.subleaf);
        for (n, (bit, name)) in self.each().enumerate() {
            f.write_str(if n > 0 { ", " } else { "" })?;
            match name {
                Some(name) => write!(f, "{name} ({place} {} bit {bit})", self.register)?,
                None => write!(f, "{place} {} bit {bit}", self.register)?,
            }
        }
        if self.mask == 0 { write!(f, "no bit of {place} {}", self.register) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use CpuidRegister::{Ebx, Ecx};

    #[test]
    fn cpuid_bits_have_names_and_positions() {
        assert_eq!("avx2".parse::<CpuidBits>().unwrap(), CpuidBits::bit(7, 0, Ebx, 5));
        assert_eq!(CpuidBits::bit(7, 0, Ebx, 5).to_string(), "avx2 (leaf 7.0 EBX bit 5)");
        assert_eq!(
            CpuidBits::new(1, 0, Ecx, 1 << 28 | 1).to_string(),
            "sse3 (leaf 1 ECX bit 0), avx (leaf 1 ECX bit 28)"
        );
        assert_eq!(CpuidBits::bit(0x8000_0005, 0, Ecx, 3).to_string(), "leaf 0x80000005 ECX bit 3");
        let error = "avx9000".parse::<CpuidBits>().unwrap_err();
        assert!(error.to_string().contains("\"avx9000\""), "{error}");
    }

    #[test]
    fn cpuid_bit_names_are_unique() {
        let names: Vec<_> = NAMES.iter().flat_map(|row| row.3.iter().map(|(_, name)| *name)).collect();
        let mut unique = names.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), names.len());
        for name in names {
            let bits: CpuidBits = name.parse().unwrap();
            assert!(bits.to_string().starts_with(&format!("{name} (leaf ")), "{bits}");
        }
    }
}
