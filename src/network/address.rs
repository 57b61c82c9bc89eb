//! [`Mac`]: the address of a network card (IEEE 802, 8).

use std::fmt;

/// A 48-bit hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The broadcast address (IEEE 802, 8.2).
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Returns whether it is a unicast address other than zero.
    pub fn is_unicast(self) -> bool {
        let Self([first, ..]) = self;
        first & 1 == 0 && self.0 != [0; 6]
    }
}

impl From<[u8; 6]> for Mac {
    fn from(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
