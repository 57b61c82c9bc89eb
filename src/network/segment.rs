//! What cards do for systems, done by us: checksums, and cutting TCP into segments. Of frames whose headers were checked.

use std::net::IpAddr;

use super::Csum;
use super::wire::{self, FIN, PSH};

/// A flag of TCP that only the first segment has (RFC 3168, 6.1.2).
const CWR: u8 = 0x80;

/// Makes a checksum that was left to be made.
pub(super) fn finish_checksum(frame: &mut [u8], csum: Csum, udp: bool) {
    let start = usize::from(csum.start);
    let sum = wire::sum(frame.get(start..).unwrap_or_default());
    let check = if udp { wire::udp_check(sum) } else { !wire::fold(sum) };
    set16(frame, start + usize::from(csum.offset), check);
}

fn set16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(to) = bytes.get_mut(at..at + 2) {
        to.copy_from_slice(&value.to_be_bytes());
    }
}

fn get16(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

/// Where the headers of a frame of TCP begin, and its payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeaderOffsets {
    pub ip: usize,
    pub tcp: usize,
    pub payload: usize,
    pub addrs: (IpAddr, IpAddr),
}

/// Cuts a frame into such with at most `size` bytes of payload each, with all checksums.
pub(super) fn cut(frame: &[u8], layout: HeaderOffsets, size: u16) -> impl Iterator<Item = Vec<u8>> {
    let (head, payload) = frame.split_at_checked(layout.payload).unwrap_or((frame, &[]));
    let chunks = payload.chunks(usize::from(size.max(1)));
    let last = chunks.len().saturating_sub(1);
    chunks.enumerate().map(move |(n, chunk)| {
        let mut bytes = Vec::with_capacity(head.len() + chunk.len());
        bytes.extend_from_slice(head);
        bytes.extend_from_slice(chunk);
        write_ip(&mut bytes, layout, n);
        let moved = (n * usize::from(size)) as u32;
        if let Some(seq) = bytes.get_mut(layout.tcp + 4..layout.tcp + 8) {
            let first = seq.try_into().map_or(0, u32::from_be_bytes);
            seq.copy_from_slice(&first.wrapping_add(moved).to_be_bytes());
        }
        if let Some(flags) = bytes.get_mut(layout.tcp + 13) {
            *flags &= if n < last { !(FIN | PSH) } else { 0xff };
            *flags &= if n > 0 { !CWR } else { 0xff };
        }
        set16(&mut bytes, layout.tcp + 16, 0);
        let covered = bytes.get(layout.tcp..).unwrap_or_default();
        let (src, dst) = layout.addrs;
        let check = !wire::fold(wire::pseudo(src, dst, wire::TCP, covered.len()) + wire::sum(covered));
        set16(&mut bytes, layout.tcp + 16, check);
        bytes
    })
}

/// The IP header of the `n`th segment.
fn write_ip(bytes: &mut [u8], layout: HeaderOffsets, n: usize) {
    let after = bytes.len() - layout.ip.min(bytes.len());
    if layout.addrs.0.is_ipv6() {
        return set16(bytes, layout.ip + 4, after.saturating_sub(40) as u16);
    }
    set16(bytes, layout.ip + 2, after as u16);
    let id = get16(bytes, layout.ip + 4).wrapping_add(n as u16);
    set16(bytes, layout.ip + 4, id);
    set16(bytes, layout.ip + 10, 0);
    let check = !wire::fold(wire::sum(bytes.get(layout.ip..layout.tcp).unwrap_or_default()));
    set16(bytes, layout.ip + 10, check);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Mac;
    use crate::network::wire::{ACK, AddressPair, Ethernet, FrameBuilder, IpPacket, Tcp};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_are_whole_packets_of_the_same_stream(
            len in 1usize..9000, size in 48u16..1500, four in any::<bool>(), seq in any::<u32>(),
        ) {
            let (src, dst): (IpAddr, IpAddr) = if four {
                ("10.0.3.2".parse().unwrap(), "10.0.3.3".parse().unwrap())
            } else {
                ("fd63::2".parse().unwrap(), "fd63::3".parse().unwrap())
            };
            let tcp = Tcp { src: 1, dst: 2, seq, flags: ACK | PSH | FIN | CWR, window: 9, ..Tcp::default() };
            let mut head = FrameBuilder::ip(wire::MacPair { src: Mac([2; 6]), dst: Mac([4; 6]) }, AddressPair { src, dst }, wire::TCP, 20 + len);
            head.tcp(&tcp);
            let payload: Vec<u8> = (0..len).map(|n| (n * 7) as u8).collect();
            let frame = [head.as_slice(), &payload].concat();
            let at = wire::ETHERNET + wire::ip_header_len(src);
            let layout = HeaderOffsets { ip: wire::ETHERNET, tcp: at, payload: at + 20, addrs: (src, dst) };
            let (mut back, mut ids, count) = (Vec::new(), Vec::new(), len.div_ceil(size.into()));
            for (n, bytes) in cut(&frame, layout, size).enumerate() {
                let rest = &bytes[wire::ETHERNET..];
                // Parsing looks at the IP header's checksum.
                let packet = IpPacket::parse(Ethernet::parse(&bytes).unwrap().kind, rest, rest.len()).unwrap();
                prop_assert_eq!((packet.src, packet.dst, packet.header + packet.len), (src, dst, rest.len()));
                let inner = &rest[packet.header..];
                prop_assert_eq!(wire::fold(wire::pseudo(src, dst, wire::TCP, inner.len()) + wire::sum(inner)), 0xffff);
                let tcp = Tcp::parse(inner, packet.len).unwrap();
                prop_assert_eq!(tcp.seq, seq.wrapping_add(back.len() as u32));
                prop_assert_eq!(tcp.flags & (FIN | PSH) != 0, n + 1 == count);
                prop_assert_eq!(tcp.flags & CWR != 0, n == 0);
                prop_assert!(inner.len() - 20 <= size.into());
                ids.push(get16(rest, 4));
                back.extend_from_slice(&inner[20..]);
            }
            prop_assert_eq!(back, payload);
            prop_assert!(ids.len() == count && (!four || ids.windows(2).all(|ids| ids[1] == ids[0] + 1)));
        }
    }

    #[test]
    fn offloaded_checksum_is_computed() {
        let (src, dst): (IpAddr, IpAddr) = ("10.0.3.2".parse().unwrap(), "10.0.3.3".parse().unwrap());
        let mut head = FrameBuilder::ip(
            wire::MacPair { src: Mac([2; 6]), dst: Mac([4; 6]) },
            AddressPair { src, dst },
            wire::UDP,
            13,
        );
        head.udp(7, 9, 5);
        head.set16(40, wire::fold(wire::pseudo(src, dst, wire::UDP, 13)));
        let mut frame = [head.as_slice(), b"hello"].concat();
        finish_checksum(&mut frame, Csum { start: 34, offset: 6 }, true);
        assert_eq!(wire::fold(wire::pseudo(src, dst, wire::UDP, 13) + wire::sum(&frame[34..])), 0xffff);
    }
}
