//! Bytes as a type, which keeps MiB and bytes apart.

use std::fmt;

/// An amount of memory or disk, in bytes.
///
/// Arithmetic that could overflow saturates: an absurd amount stays absurd and is refused where it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Size(u64);

impl Size {
    /// `n` bytes.
    pub const fn bytes(n: u64) -> Self {
        Self(n)
    }

    /// `n` KiB (1,024 bytes each).
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` MiB (1,048,576 bytes each).
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB (1,073,741,824 bytes each).
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// The amount in bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Size {
    /// The largest unit that divides the amount exactly: `256 MiB`, `1000 bytes`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.iter().find(|(shift, _)| self.0 >> shift != 0 && self.0.trailing_zeros() >= *shift) {
            Some((shift, unit)) => write!(f, "{} {unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_the_largest_exact_unit() {
        let printed: Vec<_> = [Size::gib(2), Size::mib(1536), Size::kib(4), Size::bytes(1000), Size::bytes(0)]
            .map(|s| s.to_string())
            .into();
        assert_eq!(printed, ["2 GiB", "1536 MiB", "4 KiB", "1000 bytes", "0 bytes"]);
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Size::gib(u64::MAX).as_bytes(), u64::MAX);
    }
}
