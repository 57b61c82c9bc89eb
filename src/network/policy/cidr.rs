//! [`Cidr`]: a range of addresses, and which ranges are not the public internet.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::metadata;
use crate::error::{Error, ErrorKind};

/// A range of addresses, as `10.0.0.0/8` or `fd00::/8` (RFC 4632, 3.1).
///
/// All of them begin with the same bits. One address alone is a range, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "CidrText", into = "CidrText")
)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

/// The first `bits` of `width` as ones.
fn mask(bits: u8, width: u32) -> u128 {
    let ones = if bits == 0 { 0 } else { u128::MAX << (128 - u32::from(bits)) };
    ones >> (128 - width)
}

fn number(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(a) => (u32::from(a).into(), 32),
        IpAddr::V6(a) => (a.into(), 128),
    }
}

impl Cidr {
    /// The range whose first `bits` are those of `address`.
    ///
    /// # Errors
    /// `InvalidConfig` when there are more bits than the address has, or the address has others after them.
    pub fn new(address: IpAddr, bits: u8) -> Result<Self, Error> {
        let (value, width) = number(address);
        let invalid = |problem| Err(Error::new(ErrorKind::InvalidConfig, problem));
        if u32::from(bits) > width {
            return invalid(format!("{address}/{bits}: the address has only {width} bits"));
        }
        if value & !mask(bits, width) & mask(width as u8, width) != 0 {
            let first = value & mask(bits, width);
            let first: IpAddr =
                if width == 32 { Ipv4Addr::from(first as u32).into() } else { Ipv6Addr::from(first).into() };
            return invalid(format!("{address}/{bits}: the range begins at {first}: say {first}/{bits}"));
        }
        Ok(Self { address, bits })
    }

    /// The range of this address alone.
    pub(super) const fn one(address: IpAddr) -> Self {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        Self { address, bits }
    }

    /// Whether `address` is in the range. Addresses of the other family are not.
    pub fn contains(self, address: IpAddr) -> bool {
        let ((ours, width), (theirs, other)) = (number(self.address), number(address));
        width == other && theirs & mask(self.bits, width) == ours
    }

    /// Whether it is one address alone.
    pub(super) fn is_one(self) -> bool {
        self == Self::one(self.address)
    }

    pub(crate) fn first(self) -> IpAddr {
        self.address
    }

    /// Whether all of `other` is in the range.
    pub fn covers(self, other: Self) -> bool {
        self.bits <= other.bits && self.contains(other.address)
    }
}

impl From<IpAddr> for Cidr {
    fn from(address: IpAddr) -> Self {
        Self::one(address)
    }
}

impl FromStr for Cidr {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || {
            let problem = format!("{text:?} is no range of addresses: say 192.0.2.0/24, 2001:db8::/32 or one address");
            Error::new(ErrorKind::InvalidConfig, problem)
        };
        match text.split_once('/') {
            None => text.parse::<IpAddr>().map(Self::from).map_err(|_| bad()),
            Some((address, bits)) => {
                let plain = bits.bytes().all(|b| b.is_ascii_digit());
                let bits = bits.parse().ok().filter(|_| plain).ok_or_else(bad)?;
                Self::new(address.parse().map_err(|_| bad())?, bits)
            }
        }
    }
}

/// A range is kept as text. A loaded one is parsed and checked like one in a program.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
struct CidrText(String);

#[cfg(feature = "serde")]
impl TryFrom<CidrText> for Cidr {
    type Error = Error;

    fn try_from(CidrText(text): CidrText) -> Result<Self, Error> {
        text.parse()
    }
}

#[cfg(feature = "serde")]
impl From<Cidr> for CidrText {
    fn from(range: Cidr) -> Self {
        Self(range.to_string())
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

pub(super) const fn four(a: u8, b: u8, c: u8, d: u8, bits: u8) -> Cidr {
    Cidr { address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), bits }
}

pub(super) const fn six(start: [u16; 3], end: u16, bits: u8) -> Cidr {
    let [a, b, c] = start;
    Cidr { address: IpAddr::V6(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, end)), bits }
}

/// Ranges that are not public, smaller ones before those they lie in (RFC 6890 and IANA's registries of special addresses).
/// What carries an IPv4 address inside is among them, as it may lead anywhere.
const SPECIAL: &[(Cidr, &str)] = &[
    (four(255, 255, 255, 255, 32), "broadcast"),
    (four(192, 0, 0, 0, 24), "reserved"),
    (four(192, 0, 2, 0, 24), "documentation"),
    (four(198, 51, 100, 0, 24), "documentation"),
    (four(203, 0, 113, 0, 24), "documentation"),
    (four(192, 88, 99, 0, 24), "reserved"),
    (four(169, 254, 0, 0, 16), "link-local"),
    (four(192, 168, 0, 0, 16), "private"),
    (four(198, 18, 0, 0, 15), "benchmarking"),
    (four(172, 16, 0, 0, 12), "private"),
    (four(100, 64, 0, 0, 10), "shared"),
    (four(0, 0, 0, 0, 8), "unspecified"),
    (four(10, 0, 0, 0, 8), "private"),
    (four(127, 0, 0, 0, 8), "loopback"),
    (four(224, 0, 0, 0, 4), "multicast"),
    (four(240, 0, 0, 0, 4), "reserved"),
    (six([0, 0, 0], 1, 128), "loopback"),
    (six([0, 0, 0], 0, 128), "unspecified"),
    (Cidr { address: IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0)), bits: 96 }, "IPv4-mapped"),
    (six([0x64, 0xff9b, 0], 0, 96), "IPv4-translated"),
    (six([0x64, 0xff9b, 1], 0, 48), "IPv4-translated"),
    (six([0x100, 0, 0], 0, 64), "discard"),
    (six([0x2001, 0xdb8, 0], 0, 32), "documentation"),
    (six([0x2001, 0, 0], 0, 23), "reserved"),
    (six([0x3fff, 0, 0], 0, 20), "documentation"),
    (six([0x2002, 0, 0], 0, 16), "IPv4-translated"),
    (six([0xfe80, 0, 0], 0, 10), "link-local"),
    (six([0xff00, 0, 0], 0, 8), "multicast"),
    (six([0xfc00, 0, 0], 0, 7), "private"),
    // Only 2000::/3 is the internet (RFC 4291, 2.4).
    (six([0, 0, 0], 0, 3), "reserved"),
    (six([0x4000, 0, 0], 0, 2), "reserved"),
    (six([0x8000, 0, 0], 0, 1), "reserved"),
];

/// The smallest range that is not public and holds `address`, and what it is called. `None`: it is a public address.
pub(crate) fn special_purpose_range(address: IpAddr) -> Option<(Cidr, &'static str)> {
    if let Some((range, whose)) = metadata::service(address) {
        log::trace!("{address} is {whose}");
        return Some((range, metadata::WHAT));
    }
    SPECIAL.iter().find(|(range, _)| range.contains(address)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidr_parses_or_names_the_remedy() {
        for good in ["10.0.0.0/8", "0.0.0.0/0", "::/0", "192.0.2.7/32", "fd00::/8"] {
            assert_eq!(good.parse::<Cidr>().unwrap().to_string(), good);
        }
        assert_eq!("192.0.2.7".parse::<Cidr>().unwrap().to_string(), "192.0.2.7/32");
        for bad in ["", "/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "::/129", "10.0.0.0/-1", "a/8", "10.0.0.0/8/8"] {
            assert_eq!(bad.parse::<Cidr>().unwrap_err().kind(), ErrorKind::InvalidConfig, "{bad}");
        }
        let error = "10.1.2.3/8".parse::<Cidr>().unwrap_err();
        assert!(error.to_string().contains("say 10.0.0.0/8"), "{error}");
    }

    #[test]
    fn cidr_contains_addresses_with_its_prefix() {
        let range: Cidr = "10.64.0.0/10".parse().unwrap();
        assert!(range.contains("10.127.255.255".parse().unwrap()) && !range.contains("10.128.0.0".parse().unwrap()));
        assert!(!range.contains("::a40:0".parse().unwrap()));
        let all: Cidr = "0.0.0.0/0".parse().unwrap();
        assert!(all.covers(range) && !range.covers(all) && range.covers(range));
    }

    #[test]
    fn special_purpose_ranges_have_names() {
        let name = |text: &str| special_purpose_range(text.parse().unwrap()).map(|(_, name)| name);
        for (address, expected) in [
            ("169.254.169.254", "metadata"),
            ("169.254.1.1", "link-local"),
            ("fd00:ec2::254", "metadata"),
            ("fd00:ec2::253", "metadata"),
            ("fd00:ec3::253", "private"),
            ("127.0.0.1", "loopback"),
            ("::1", "loopback"),
            ("::", "unspecified"),
            ("0.0.0.0", "unspecified"),
            ("::ffff:8.8.8.8", "IPv4-mapped"),
            ("100.127.0.1", "shared"),
            ("172.31.0.1", "private"),
            ("239.1.1.1", "multicast"),
            ("255.255.255.255", "broadcast"),
            ("ff02::1", "multicast"),
            ("fe80::1", "link-local"),
            ("64:ff9b::a00:1", "IPv4-translated"),
            ("2002:a00:1::", "IPv4-translated"),
            ("4000::1", "reserved"),
            ("::127.0.0.1", "reserved"),
        ] {
            assert_eq!(name(address), Some(expected), "{address}");
        }
        for public in ["8.8.8.8", "2606:4700::1111", "172.32.0.1", "100.128.0.1", "2a00::1"] {
            assert_eq!(name(public), None, "{public}");
        }
    }
}
