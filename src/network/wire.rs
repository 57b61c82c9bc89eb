//! Headers of the hot path: Ethernet, IP, TCP, UDP and ICMP. They are read from a frame's first bytes and written to
//! the guest's buffers.
//!
//! By hand, as the payload stays in guest memory, and because a frame may stand for many. Tests compare with smoltcp.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Mac;

/// Bytes of an Ethernet header (IEEE 802.3, 3.1.1).
pub(super) const ETHERNET: usize = 14;
/// The largest headers of one frame that is looked at: Ethernet, IPv6 with some extensions, TCP with all its options.
pub(super) const HEADERS: usize = 256;
/// What an IP packet is at most, without jumbograms.
pub(super) const MAX_PACKET: usize = 65535;

/// Kinds of packets in Ethernet frames (IEEE 802 numbers).
pub(super) const IPV4: u16 = 0x0800;
pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV6: u16 = 0x86dd;

/// Protocols in IP packets (IANA, protocol numbers).
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;

/// Why a packet is invalid. It is dropped and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PacketError {
    Malformed,
    Fragment,
    Checksum,
}

fn be16(bytes: &[u8], at: usize) -> Result<u16, PacketError> {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map(u16::from_be_bytes).ok_or(PacketError::Malformed)
}

fn be32(bytes: &[u8], at: usize) -> Result<u32, PacketError> {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes).ok_or(PacketError::Malformed)
}

fn byte(bytes: &[u8], at: usize) -> Result<u8, PacketError> {
    bytes.get(at).copied().ok_or(PacketError::Malformed)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], PacketError> {
    bytes.get(at..at + N).and_then(|b| b.try_into().ok()).ok_or(PacketError::Malformed)
}

/// Adds up 16-bit words for the Internet checksum (RFC 1071); `bytes` but the last piece must be even.
pub(super) fn sum(bytes: &[u8]) -> u64 {
    let chunks = bytes.chunks_exact(4);
    let mut rest = [0; 4];
    rest.iter_mut().zip(chunks.remainder()).for_each(|(to, from)| *to = *from);
    let words = chunks.filter_map(|c| c.try_into().ok()).chain([rest]);
    words.map(|word: [u8; 4]| u64::from(u32::from_be_bytes(word))).sum()
}

/// Makes 16 bits of a sum, without inverting them.
pub(super) fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The checksum of a datagram, whose zero would mean that there is none (RFC 768).
pub(super) fn udp_check(sum: u64) -> u16 {
    match !fold(sum) {
        0 => 0xffff,
        check => check,
    }
}

/// The sum of what TCP and UDP cover beyond their own bytes (RFC 9293, 3.1; RFC 8200, 8.1).
pub(super) fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> u64 {
    let address = |a: IpAddr| match a {
        IpAddr::V4(a) => sum(&a.octets()),
        IpAddr::V6(a) => sum(&a.octets()),
    };
    address(src) + address(dst) + u64::from(protocol) + len as u64
}

/// An Ethernet header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ethernet {
    pub dst: Mac,
    pub src: Mac,
    pub kind: u16,
}

impl Ethernet {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, PacketError> {
        Ok(Self { dst: Mac(array(bytes, 0)?), src: Mac(array(bytes, 6)?), kind: be16(bytes, 12)? })
    }
}

/// What an IP header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct IpPacket {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub protocol: u8,
    pub hops: u8,
    /// Bytes of the header, with extensions.
    pub header: usize,
    /// Bytes after the header.
    pub len: usize,
    /// These are part of a larger packet.
    pub fragment: Option<Fragment>,
}

/// Which part of a packet a fragment of it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fragment {
    /// The same for all fragments of one packet.
    pub id: u32,
    /// Where in the packet, behind its header, it begins.
    pub offset: usize,
    /// It is not the last.
    pub more: bool,
}

impl Fragment {
    /// Reads offset and flags as IPv6 has them (RFC 8200, 4.5): the offset is in units of eight bytes. `None`: it is all there is.
    fn parse(word: u16, id: u32) -> Option<Self> {
        let (offset, more) = (usize::from(word & !7), word & 1 != 0);
        (offset > 0 || more).then_some(Self { id, offset, more })
    }
}

/// IPv6's header of a fragment (RFC 8200, 4.5).
const FRAGMENT6: u8 = 44;
/// Bytes of it.
const FRAGMENT6_HEADER: usize = 8;

/// More extension headers than anybody needs.
const MAX_EXTENSIONS: usize = 4;

impl IpPacket {
    /// Whether the checksum in `inner`, all that follows the header, is right.
    pub(super) fn verify(&self, inner: &[u8]) -> Result<(), PacketError> {
        // No checksum at all is fine for UDP over IPv4 (RFC 768).
        if self.protocol == UDP && self.src.is_ipv4() && inner.get(6..8) == Some(&[0, 0]) {
            return Ok(());
        }
        let covered = match self.protocol {
            ICMP => 0,
            protocol => pseudo(self.src, self.dst, protocol, inner.len()),
        };
        if fold(covered + sum(inner)) == 0xffff { Ok(()) } else { Err(PacketError::Checksum) }
    }

    /// Reads the header from the first bytes of a packet that has `available` of them.
    pub(super) fn parse(kind: u16, bytes: &[u8], available: usize) -> Result<Self, PacketError> {
        if kind == IPV4 { Self::parse4(bytes, available) } else { Self::parse6(bytes, available) }
    }

    /// RFC 791, 3.1.
    fn parse4(bytes: &[u8], available: usize) -> Result<Self, PacketError> {
        let first = byte(bytes, 0)?;
        let (header, total) = (usize::from(first & 15) * 4, usize::from(be16(bytes, 2)?));
        if first >> 4 != 4 || header < 20 || total < header || total > available {
            return Err(PacketError::Malformed);
        }
        if fold(sum(bytes.get(..header).ok_or(PacketError::Malformed)?)) != 0xffff {
            return Err(PacketError::Checksum);
        }
        // Two flags, more to come the last of them, and 13 bits of offset.
        let word = be16(bytes, 6)?;
        let fragment = Fragment::parse(word << 3 | word >> 13 & 1, be16(bytes, 4)?.into());
        Ok(Self {
            src: Ipv4Addr::from(be32(bytes, 12)?).into(),
            dst: Ipv4Addr::from(be32(bytes, 16)?).into(),
            protocol: byte(bytes, 9)?,
            hops: byte(bytes, 8)?,
            header,
            len: total - header,
            fragment,
        })
    }

    /// RFC 8200, 3 and 4.
    fn parse6(bytes: &[u8], available: usize) -> Result<Self, PacketError> {
        let total = 40 + usize::from(be16(bytes, 4)?);
        if byte(bytes, 0)? >> 4 != 6 || total > available {
            return Err(PacketError::Malformed);
        }
        let (mut next, mut header, mut fragment) = (byte(bytes, 6)?, 40, None);
        for _ in 0..MAX_EXTENSIONS {
            match next {
                // Hop-by-hop options, destination options.
                0 | 60 => {
                    next = byte(bytes, header)?;
                    header += (usize::from(byte(bytes, header + 1)?) + 1) * 8;
                }
                FRAGMENT6 => {
                    next = byte(bytes, header)?;
                    fragment = Fragment::parse(be16(bytes, header + 2)?, be32(bytes, header + 4)?);
                    header += FRAGMENT6_HEADER;
                    // What follows is the packet's, which is not whole.
                    if fragment.is_some() {
                        break;
                    }
                }
                _ => break,
            }
        }
        Ok(Self {
            src: Ipv6Addr::from(array(bytes, 8)?).into(),
            dst: Ipv6Addr::from(array(bytes, 24)?).into(),
            protocol: next,
            hops: byte(bytes, 7)?,
            header,
            len: total.checked_sub(header).ok_or(PacketError::Malformed)?,
            fragment,
        })
    }
}

/// Flags of TCP (RFC 9293, 3.1).
pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const PSH: u8 = 8;
pub(super) const ACK: u8 = 16;

/// What a TCP header says, as far as we are interested.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tcp {
    pub src: u16,
    pub dst: u16,
    pub seq: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    /// Options of a SYN: largest segment, window scale (RFC 9293, 3.2; RFC 7323, 2.2).
    pub mss: Option<u16>,
    pub shift: Option<u8>,
    /// Bytes of the header.
    pub header: usize,
}

impl Tcp {
    /// Reads the header of a segment of `len` bytes from its first.
    pub(super) fn parse(bytes: &[u8], len: usize) -> Result<Self, PacketError> {
        let header = usize::from(byte(bytes, 12)? >> 4) * 4;
        if header < 20 || header > len {
            return Err(PacketError::Malformed);
        }
        let mut tcp = Self {
            src: be16(bytes, 0)?,
            dst: be16(bytes, 2)?,
            seq: be32(bytes, 4)?,
            ack: be32(bytes, 8)?,
            flags: byte(bytes, 13)?,
            window: be16(bytes, 14)?,
            header,
            ..Self::default()
        };
        if tcp.flags & SYN != 0 {
            tcp.options(bytes.get(20..header).ok_or(PacketError::Malformed)?);
        }
        Ok(tcp)
    }

    /// Bad options end the list; what came before them counts.
    fn options(&mut self, mut rest: &[u8]) {
        loop {
            let len = match *rest {
                [] | [0, ..] => return,
                [1, ..] => 1,
                [2, 4, a, b, ..] => {
                    self.mss = Some(u16::from_be_bytes([a, b]));
                    4
                }
                [3, 3, shift, ..] => {
                    self.shift = Some(shift.min(14));
                    3
                }
                [_, len, ..] if len >= 2 => usize::from(len),
                _ => return,
            };
            rest = rest.get(len..).unwrap_or_default();
        }
    }
}

/// The ports of a UDP header (RFC 768).
#[derive(Debug, Clone, Copy)]
pub(super) struct Udp {
    pub src: u16,
    pub dst: u16,
    pub len: usize,
}

/// Bytes of a UDP header.
pub(super) const UDP_HEADER: usize = 8;

impl Udp {
    /// Reads the header of a datagram of `len` bytes. One that stands for several may say anything about its length.
    pub(super) fn parse(bytes: &[u8], len: usize, cut: bool) -> Result<Self, PacketError> {
        let said = usize::from(be16(bytes, 4)?);
        let said = if cut { len } else { said };
        if said < UDP_HEADER || said > len {
            return Err(PacketError::Malformed);
        }
        Ok(Self { src: be16(bytes, 0)?, dst: be16(bytes, 2)?, len: said })
    }
}

/// A datagram with its header and checksum.
pub(super) fn datagram(addrs: AddressPair, UdpPorts { src, dst }: UdpPorts, payload: &[u8]) -> Vec<u8> {
    let len = UDP_HEADER + payload.len();
    let mut bytes = Vec::with_capacity(len);
    [src, dst, len as u16, 0].iter().for_each(|field| bytes.extend(field.to_be_bytes()));
    bytes.extend_from_slice(payload);
    let check = udp_check(pseudo(addrs.src, addrs.dst, UDP, len) + sum(&bytes));
    if let Some(place) = bytes.get_mut(6..UDP_HEADER) {
        place.copy_from_slice(&check.to_be_bytes());
    }
    bytes
}

/// The headers of a frame that is being made.
#[derive(Debug, Clone, Copy)]
pub(super) struct FrameBuilder {
    bytes: [u8; 96],
    len: usize,
}

/// Both ends of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AddressPair {
    pub src: IpAddr,
    pub dst: IpAddr,
}

/// Source and destination of an Ethernet frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MacPair {
    pub src: Mac,
    pub dst: Mac,
}

/// Source and destination port of a UDP datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UdpPorts {
    pub src: u16,
    pub dst: u16,
}

/// An address and a port. Unlike [`SocketAddr`], it has no flow label and no scope to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct IpEndpoint {
    pub addr: IpAddr,
    pub port: u16,
}

impl IpEndpoint {
    pub(super) fn new(addr: IpAddr, port: u16) -> Self {
        Self { addr, port }
    }
}

impl From<IpEndpoint> for SocketAddr {
    fn from(endpoint: IpEndpoint) -> Self {
        Self::new(endpoint.addr, endpoint.port)
    }
}

impl FrameBuilder {
    /// An Ethernet and an IP header; `len` bytes of `protocol` follow.
    pub(super) fn ip(macs: MacPair, addrs: AddressPair, protocol: u8, len: usize) -> Self {
        let mut head = Self { bytes: [0; 96], len: 0 };
        let MacPair { src: Mac(src), dst: Mac(dst) } = macs;
        head.push(&dst);
        head.push(&src);
        match (addrs.src, addrs.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                head.push(&IPV4.to_be_bytes());
                let total = (20 + len) as u16;
                let [t0, t1] = total.to_be_bytes();
                // Never cut up, so that the identification may be anything (RFC 6864, 4.1).
                head.push(&[0x45, 0, t0, t1, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
                head.push(&src.octets());
                head.push(&dst.octets());
                let check = !fold(sum(head.bytes.get(ETHERNET..head.len).unwrap_or_default()));
                head.set16(ETHERNET + 10, check);
            }
            (src, dst) => {
                let v6 = |a: IpAddr| match a {
                    IpAddr::V6(a) => a.octets(),
                    IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
                };
                head.push(&IPV6.to_be_bytes());
                let [l0, l1] = (len as u16).to_be_bytes();
                // Neighbors believe only what no router has forwarded (RFC 4861, 7.1).
                let hops = if protocol == ICMPV6 { 255 } else { 64 };
                head.push(&[0x60, 0, 0, 0, l0, l1, protocol, hops]);
                head.push(&v6(src));
                head.push(&v6(dst));
            }
        }
        head
    }

    /// An Ethernet and an IP header of a fragment; `len` bytes of it follow.
    pub(super) fn fragment(macs: MacPair, addrs: AddressPair, protocol: u8, len: usize, fragment: Fragment) -> Self {
        let Fragment { id, offset, more } = fragment;
        if addrs.src.is_ipv4() {
            let mut head = Self::ip(macs, addrs, protocol, len);
            head.set16(ETHERNET + 4, id as u16);
            head.set16(ETHERNET + 6, (offset / 8) as u16 | u16::from(more) << 13);
            head.set16(ETHERNET + 10, 0);
            head.set16(ETHERNET + 10, !fold(sum(head.from(ETHERNET))));
            return head;
        }
        let mut head = Self::ip(macs, addrs, FRAGMENT6, FRAGMENT6_HEADER + len);
        head.push(&[protocol, 0]);
        head.push(&(offset as u16 | u16::from(more)).to_be_bytes());
        head.push(&id.to_be_bytes());
        head
    }

    /// Adds a TCP header; its checksum is left at zero.
    pub(super) fn tcp(&mut self, tcp: &Tcp) {
        let options = tcp_header_len(tcp) - 20;
        self.push(&tcp.src.to_be_bytes());
        self.push(&tcp.dst.to_be_bytes());
        self.push(&tcp.seq.to_be_bytes());
        self.push(&tcp.ack.to_be_bytes());
        self.push(&[(((20 + options) / 4) << 4) as u8, tcp.flags]);
        self.push(&tcp.window.to_be_bytes());
        self.push(&[0; 4]);
        if let Some(mss) = tcp.mss {
            let [a, b] = mss.to_be_bytes();
            self.push(&[2, 4, a, b]);
        }
        if let Some(shift) = tcp.shift {
            self.push(&[1, 3, 3, shift]);
        }
    }

    /// Adds a UDP header for `len` bytes; its checksum is left at zero.
    pub(super) fn udp(&mut self, src: u16, dst: u16, len: usize) {
        self.push(&src.to_be_bytes());
        self.push(&dst.to_be_bytes());
        self.push(&((UDP_HEADER + len) as u16).to_be_bytes());
        self.push(&[0; 2]);
    }

    fn push(&mut self, part: &[u8]) {
        let end = self.len + part.len();
        if let Some(to) = self.bytes.get_mut(self.len..end) {
            to.copy_from_slice(part);
            self.len = end;
        }
    }

    pub(super) fn set16(&mut self, at: usize, value: u16) {
        if let Some(to) = self.bytes.get_mut(at..at + 2) {
            to.copy_from_slice(&value.to_be_bytes());
        }
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// Everything from `at` on.
    pub(super) fn from(&self, at: usize) -> &[u8] {
        self.bytes.get(at..self.len).unwrap_or_default()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }
}

/// Bytes of an IP header without options.
pub(super) fn ip_header_len(address: IpAddr) -> usize {
    if address.is_ipv4() { 20 } else { 40 }
}

/// Bytes of an IP header that says which fragment follows.
pub(super) fn fragment_header_len(address: IpAddr) -> usize {
    ip_header_len(address) + if address.is_ipv4() { 0 } else { FRAGMENT6_HEADER }
}

/// Bytes that [`FrameBuilder::tcp`] writes.
pub(super) fn tcp_header_len(tcp: &Tcp) -> usize {
    20 + if tcp.mss.is_some() { 4 } else { 0 } + if tcp.shift.is_some() { 4 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn headers_are_read_back_as_written() {
        for (src, dst) in [("10.0.2.2", "10.0.2.15"), ("fd00::1", "fd00::2")] {
            let addrs = AddressPair { src: src.parse().unwrap(), dst: dst.parse().unwrap() };
            let tcp = Tcp { src: 80, dst: 4000, seq: 7, ack: 9, flags: SYN | ACK, window: 512, ..Tcp::default() };
            let tcp = Tcp { mss: Some(1460), shift: Some(7), ..tcp };
            let len = tcp_header_len(&tcp);
            let mut head = FrameBuilder::ip(MacPair { src: Mac([2; 6]), dst: Mac([4; 6]) }, addrs, TCP, len);
            head.tcp(&tcp);
            let bytes = head.as_slice();
            let ethernet = Ethernet::parse(bytes).unwrap();
            assert_eq!(ethernet.src, Mac([2; 6]));
            let packet = IpPacket::parse(ethernet.kind, &bytes[ETHERNET..], bytes.len() - ETHERNET).unwrap();
            assert_eq!((packet.src, packet.dst, packet.len), (addrs.src, addrs.dst, len));
            let back = Tcp::parse(&bytes[ETHERNET + packet.header..], packet.len).unwrap();
            assert_eq!((back.seq, back.ack, back.mss, back.shift), (7, 9, Some(1460), Some(7)));
            assert_eq!(back.header, len);
        }
    }

    #[test]
    fn checksums_match_rfc_1071() {
        // RFC 1071, 3.
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), 0xddf2);
        assert_eq!(fold(sum(&[1, 2, 3])), 0x0402);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120), len in 0usize..70000) {
            for kind in [IPV4, IPV6] {
                let _ = IpPacket::parse(kind, &bytes, len);
            }
            let _ = (Ethernet::parse(&bytes).is_ok(), Tcp::parse(&bytes, len).is_ok());
            let _ = Udp::parse(&bytes, len, len % 2 == 0);
        }
    }
}
