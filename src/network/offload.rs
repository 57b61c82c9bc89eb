//! [`Offload`]: what a frame's `virtio_net_hdr` says, as a value that was checked (Virtio 1.3, 5.1.6).

use std::fmt;
use std::ops::BitOr;

/// Bytes of the header of a modern device: with `num_buffers`, always (Virtio 1.3, 5.1.6.1).
pub(crate) const HEADER_LEN: usize = 12;

/// A set of kinds of work that one side may leave to the other.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Offloads(u8);

impl Offloads {
    /// The checksum of TCP and UDP.
    pub const CSUM: Self = Self(1);
    /// Cutting TCP over IPv4 into segments.
    pub const TSO4: Self = Self(2);
    /// Cutting TCP over IPv6 into segments.
    pub const TSO6: Self = Self(4);
    /// Cutting UDP into datagrams.
    pub const USO: Self = Self(8);

    /// Returns the empty set.
    pub const fn none() -> Self {
        Self(0)
    }

    /// Returns the set of all kinds of work that this version knows.
    pub const fn all() -> Self {
        Self(Self::CSUM.0 | Self::TSO4.0 | Self::TSO6.0 | Self::USO.0)
    }

    #[cfg(feature = "internals")]
    pub(crate) const fn from_bits(bits: u8) -> Self {
        Self(bits & Self::all().0)
    }

    /// Returns the union of both sets.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Returns the intersection of both sets.
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Returns whether all of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Returns the difference of this set and `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for Offloads {
    type Output = Self;

    /// Returns the union of both sets.
    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl fmt::Debug for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [(Self::CSUM, "CSUM"), (Self::TSO4, "TSO4"), (Self::TSO6, "TSO6"), (Self::USO, "USO")];
        f.write_str("Offloads")?;
        f.debug_set().entries(names.iter().filter(|(it, _)| self.contains(*it)).map(|(_, name)| name)).finish()
    }
}

/// A checksum that is still to be made. It covers all from `start` on, and is put `offset` bytes after that. Its place
/// holds the sum of the pseudo header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Csum {
    /// Bytes of the frame before what is summed up.
    pub start: u16,
    /// Where the checksum's two bytes are, from there on.
    pub offset: u16,
}

impl Csum {
    /// Describes a checksum of all from `start` on, which is put `offset` bytes after that.
    pub const fn new(start: u16, offset: u16) -> Self {
        Self { start, offset }
    }
}

/// How a frame is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GsoKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either.
    Udp,
}

/// A frame that stands for several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gso {
    /// What is cut.
    pub kind: GsoKind,
    /// Bytes of payload in each frame but the last; at least one.
    pub size: u16,
    /// Bytes of all headers, as a hint.
    pub header_len: u16,
}

impl Gso {
    /// Describes a frame of packets with `size` bytes of payload and `header_len` of headers.
    pub const fn new(kind: GsoKind, size: u16, header_len: u16) -> Self {
        Self { kind, size, header_len }
    }

    /// Whether a frame of `len` bytes becomes no more packets than a system would make of it.
    fn is_sane(&self, len: usize) -> bool {
        match self.kind {
            // Headers are no payload: a frame with as many datagrams as there may be has them beside.
            GsoKind::Udp => self.size > 0 && len <= MAX_UDP_SEGMENTS * usize::from(self.size) + MAX_UDP_HEADERS,
            GsoKind::Tcp4 | GsoKind::Tcp6 => self.size >= MIN_TCP_SEGMENT,
        }
    }
}

/// What is left to do to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Offload {
    /// A checksum.
    pub csum: Option<Csum>,
    /// Cutting it, which always comes with a checksum.
    pub gso: Option<Gso>,
}

impl Offload {
    /// Describes a frame whose checksum is left to the other side.
    pub const fn csum(csum: Csum) -> Self {
        Self { csum: Some(csum), gso: None }
    }

    /// Describes a frame that the other side cuts into packets with checksums.
    pub const fn gso(csum: Csum, gso: Gso) -> Self {
        Self { csum: Some(csum), gso: Some(gso) }
    }
}

/// Why a header means nothing. The guest's mistake: the frame is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OffloadError {
    /// The driver must have agreed to what it uses.
    #[error("the frame needs work that was not agreed to be left")]
    NotAgreed,
    /// Unknown kind, a size too small, or cutting without a checksum (Virtio 1.3, 5.1.6.2).
    #[error("the frame cannot be cut as its header demands")]
    Gso,
    /// The place of the checksum is not in the frame.
    #[error("the checksum's place is outside the frame")]
    Csum,
}

/// The most datagrams that one frame may be cut into, as in Linux (`UDP_MAX_SEGMENTS`).
pub(crate) const MAX_UDP_SEGMENTS: usize = 128;
/// More than all headers of such a frame.
const MAX_UDP_HEADERS: usize = 128;
/// The least payload of a segment of TCP, as in Linux (`TCP_MIN_GSO_SIZE`).
pub(crate) const MIN_TCP_SEGMENT: u16 = 8;

/// Flags and kinds (Virtio 1.3, 5.1.6).
const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

impl Offload {
    /// Reads the header of a frame of `len` bytes, which the driver filled by what was `agreed`.
    pub(crate) fn parse(header: &[u8; HEADER_LEN], len: usize, agreed: Offloads) -> Result<Self, OffloadError> {
        let [flags, kind, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = *header;
        let size = u16::from_le_bytes([s0, s1]);
        let kind = match kind & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some(GsoKind::Tcp4),
            GSO_TCPV6 => Some(GsoKind::Tcp6),
            GSO_UDP_L4 => Some(GsoKind::Udp),
            _ => return Err(OffloadError::Gso),
        };
        let csum = (flags & NEEDS_CSUM != 0)
            .then(|| Csum { start: u16::from_le_bytes([c0, c1]), offset: u16::from_le_bytes([o0, o1]) });
        let gso = kind.map(|kind| Gso { kind, size, header_len: u16::from_le_bytes([h0, h1]) });
        let offload = Self { csum, gso };
        if !agreed.contains(offload.needed()) {
            return Err(OffloadError::NotAgreed);
        }
        offload.check(len).map(|()| offload)
    }

    /// What must be agreed to for it.
    pub(crate) fn needed(&self) -> Offloads {
        let cut = match self.gso.map(|gso| gso.kind) {
            None => Offloads::none(),
            Some(GsoKind::Tcp4) => Offloads::TSO4,
            Some(GsoKind::Tcp6) => Offloads::TSO6,
            Some(GsoKind::Udp) => Offloads::USO,
        };
        cut | if self.csum.is_some() { Offloads::CSUM } else { Offloads::none() }
    }

    /// Whether it can be done to a frame of `len` bytes.
    pub(crate) fn check(&self, len: usize) -> Result<(), OffloadError> {
        if self.gso.is_some_and(|gso| self.csum.is_none() || !gso.is_sane(len)) {
            return Err(OffloadError::Gso);
        }
        let end = |csum: Csum| usize::from(csum.start) + usize::from(csum.offset) + 2;
        if self.csum.is_some_and(|csum| end(csum) > len) {
            return Err(OffloadError::Csum);
        }
        Ok(())
    }

    /// The header for the guest, whose frame is in `buffers` buffers.
    pub(crate) fn to_bytes(self, buffers: u16) -> [u8; HEADER_LEN] {
        let flags = if self.csum.is_some() { NEEDS_CSUM } else { 0 };
        let csum = self.csum.unwrap_or(Csum { start: 0, offset: 0 });
        let (kind, size, header_len) = match self.gso {
            None => (GSO_NONE, 0, 0),
            Some(Gso { kind: GsoKind::Tcp4, size, header_len }) => (GSO_TCPV4, size, header_len),
            Some(Gso { kind: GsoKind::Tcp6, size, header_len }) => (GSO_TCPV6, size, header_len),
            Some(Gso { kind: GsoKind::Udp, size, header_len }) => (GSO_UDP_L4, size, header_len),
        };
        let ([h0, h1], [s0, s1]) = (header_len.to_le_bytes(), size.to_le_bytes());
        let ([c0, c1], [o0, o1]) = (csum.start.to_le_bytes(), csum.offset.to_le_bytes());
        let [b0, b1] = buffers.to_le_bytes();
        [flags, kind, h0, h1, s0, s1, c0, c1, o0, o1, b0, b1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_back_as_written() {
        let csum = Some(Csum { start: 34, offset: 16 });
        for kind in [None, Some(GsoKind::Tcp4), Some(GsoKind::Tcp6), Some(GsoKind::Udp)] {
            let gso = kind.map(|kind| Gso { kind, size: 1448, header_len: 54 });
            let offload = Offload { csum, gso };
            assert_eq!(Offload::parse(&offload.to_bytes(1), 60, Offloads::all()), Ok(offload));
        }
        assert_eq!(Offload::parse(&[0; HEADER_LEN], 0, Offloads::none()), Ok(Offload::default()));
    }

    #[test]
    fn uso_segment_count_is_limited() {
        let csum = Some(Csum { start: 34, offset: 6 });
        let cut = |len: usize, size: u16| {
            Offload { csum, gso: Some(Gso { kind: GsoKind::Udp, size, header_len: 42 }) }.check(len)
        };
        assert_eq!(cut(42 + MAX_UDP_SEGMENTS * 500, 500), Ok(()));
        assert_eq!(cut(65_000, 500), Err(OffloadError::Gso));
        assert_eq!(cut(65_000, 1), Err(OffloadError::Gso));
        assert_eq!(cut(65_000, 0), Err(OffloadError::Gso));
    }

    #[test]
    fn invalid_virtio_net_headers_are_rejected() {
        let parse = |change: fn(&mut [u8; HEADER_LEN])| {
            let mut header = [1, 1, 54, 0, 0, 5, 34, 0, 16, 0, 0, 0];
            change(&mut header);
            Offload::parse(&header, 60, Offloads::all().without(Offloads::USO)).map(drop)
        };
        assert_eq!(parse(|_| ()), Ok(()));
        assert_eq!(parse(|h| h[5] = 0), Err(OffloadError::Gso));
        assert_eq!(parse(|h| h[0] = 0), Err(OffloadError::Gso));
        assert_eq!(parse(|h| h[1] = 3), Err(OffloadError::Gso));
        assert_eq!(parse(|h| (h[4], h[5]) = (MIN_TCP_SEGMENT as u8, 0)), Ok(()));
        assert_eq!(parse(|h| (h[4], h[5]) = (MIN_TCP_SEGMENT as u8 - 1, 0)), Err(OffloadError::Gso));
        assert_eq!(parse(|h| h[1] = 5), Err(OffloadError::NotAgreed));
        assert_eq!(parse(|h| h[8] = 25), Err(OffloadError::Csum));
        assert_eq!(parse(|h| h[7] = 0xff), Err(OffloadError::Csum));
    }
}
