//! Passes a guest's packet to another guest. It is checked, and leaves no more work than the other agreed to.

use std::net::IpAddr;

use super::queue::QueuedPacket;
use crate::network::segment::{self, HeaderOffsets};
use crate::network::wire::{self, PacketError, Tcp, Udp};
use crate::network::{Csum, Frame, Gso, GsoKind, Offload, Offloads};

/// The least payload of a segment: smaller ones are no system's, but cost as much as whole ones (Linux, TCP_MIN_SND_MSS).
const MSS_MIN: u16 = 48;

/// Ports of servers that hand out addresses (RFC 2131, RFC 8415): no guest is one.
const SERVERS: [u16; 2] = [67, 547];
/// Messages by which routers change the way that packets go (RFC 792, RFC 1256), as no guest may.
const REDIRECT: u8 = 5;
const ADVERTISEMENT: u8 = 9;
/// Neighbor discovery (RFC 4861, 4), which the switch answers for all guests, and other messages of routers and
/// neighbors. Those are inverse and secure discovery, groups and mobility (RFC 3122, RFC 3971, RFC 2710 and 3810, RFC
/// 6275).
pub(super) const DISCOVERY: std::ops::RangeInclusive<u8> = 133..=137;
const GROUPS: std::ops::RangeInclusive<u8> = 130..=132;
const LINK: std::ops::RangeInclusive<u8> = 141..=149;
/// Headers of IPv6 that are followed by another (RFC 7045, 2), but for those that were skipped. What follows is not
/// known, and may be a message as above.
const EXTENSIONS: [u8; 10] = [0, 43, 44, 51, 60, 135, 139, 140, 253, 254];

/// The largest frame that every driver which takes segments to cut has room for (Virtio 1.3, 5.1.6.3.1).
const WHOLE: usize = 65550;

/// Why a packet is not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kept {
    PacketError(PacketError),
    /// Only the network itself may say this.
    Forbidden,
    TooLarge,
}

impl From<PacketError> for Kept {
    fn from(bad: PacketError) -> Self {
        Self::PacketError(bad)
    }
}

/// What is known of a packet for another guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct Passing {
    pub packet: wire::IpPacket,
    /// What the other may be left to do, and the largest packet it takes.
    pub agreed: Offloads,
    pub mtu: u16,
}

impl Passing {
    /// What the other gets of `frame`, whose first bytes are `head`: one packet, or several.
    pub(super) fn packets(&self, frame: Frame<'_>, head: &[u8]) -> Result<Vec<QueuedPacket>, Kept> {
        let packet = self.packet;
        let at = wire::ETHERNET + packet.header;
        let inner = head.get(at..).unwrap_or_default();
        let four = packet.src.is_ipv4();
        // Where the checksum is, and the headers' end.
        let (place, headers) = match packet.protocol {
            // What must be looked at is in a packet's first fragment; TCP has no use for any.
            wire::UDP | wire::ICMP | wire::ICMPV6 if packet.fragment.is_some_and(|fragment| fragment.offset > 0) => {
                (0, at)
            }
            _ if packet.fragment.is_some() && packet.protocol == wire::TCP => return Err(PacketError::Fragment.into()),
            wire::TCP => (16, at + Tcp::parse(inner, packet.len)?.header),
            wire::UDP => {
                let udp = Udp::parse(inner, packet.len, packet.fragment.is_some())?;
                if SERVERS.contains(&udp.src) {
                    return Err(Kept::Forbidden);
                }
                (6, at + wire::UDP_HEADER)
            }
            wire::ICMP | wire::ICMPV6 => {
                let kind = *inner.first().ok_or(PacketError::Malformed)?;
                let forbidden = match packet.src {
                    IpAddr::V4(_) => kind == REDIRECT || kind == ADVERTISEMENT,
                    IpAddr::V6(_) => [DISCOVERY, GROUPS, LINK].iter().any(|kinds| kinds.contains(&kind)),
                };
                if forbidden || four != (packet.protocol == wire::ICMP) {
                    return Err(Kept::Forbidden);
                }
                (2, at)
            }
            extension if !four && EXTENSIONS.contains(&extension) => return Err(Kept::Forbidden),
            _ => (0, at),
        };
        let offload = self.offload(frame.offload(), at, place, headers)?;
        // What is behind the packet was never for the other.
        let total = at + packet.len;
        if total > WHOLE {
            return Err(Kept::TooLarge);
        }
        let mut bytes = vec![0; total];
        if frame.read_at(0, &mut bytes) < total {
            return Err(PacketError::Malformed.into());
        }
        // The guest may have changed it since it was looked at: what was checked is what is passed on.
        let kept = head.len().min(total);
        if let (Some(to), Some(from)) = (bytes.get_mut(..kept), head.get(..kept)) {
            to.copy_from_slice(from);
        }
        if self.agreed.contains(offload.needed()) {
            return Ok(vec![QueuedPacket { bytes, offload }]);
        }
        let Some(gso) = offload.gso else {
            if let Some(csum) = offload.csum {
                segment::finish_checksum(&mut bytes, csum, packet.protocol == wire::UDP);
            }
            return Ok(vec![QueuedPacket { bytes, offload: Offload::default() }]);
        };
        let layout = HeaderOffsets { ip: wire::ETHERNET, tcp: at, payload: headers, addrs: (packet.src, packet.dst) };
        let plain = |bytes| QueuedPacket { bytes, offload: Offload::default() };
        Ok(segment::cut(&bytes, layout, gso.size).map(plain).collect())
    }

    /// What is left to do, said anew: where the checksum is follows from the packet, not from what the guest says.
    fn offload(&self, said: Offload, at: usize, place: u16, headers: usize) -> Result<Offload, Kept> {
        let (packet, mtu) = (self.packet, wire::ETHERNET + usize::from(self.mtu));
        let Some(csum) = said.csum else {
            let fits = at + packet.len <= mtu;
            return if fits { Ok(Offload::default()) } else { Err(Kept::TooLarge) };
        };
        let csum_at = Csum { start: at as u16, offset: place };
        if csum != csum_at
            || packet.fragment.is_some()
            || !matches!(packet.protocol, wire::TCP | wire::UDP)
            || headers > at + packet.len
        {
            return Err(PacketError::Malformed.into());
        }
        let (size, gso) = match said.gso {
            None => (at + packet.len, None),
            Some(gso) => {
                let kind = if packet.src.is_ipv4() { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
                if gso.kind != kind || packet.protocol != wire::TCP || gso.size < MSS_MIN {
                    return Err(PacketError::Malformed.into());
                }
                let header_len = headers as u16;
                (headers + usize::from(gso.size), Some(Gso { header_len, ..gso }))
            }
        };
        if size > mtu {
            return Err(Kept::TooLarge);
        }
        Ok(Offload { csum: Some(csum), gso })
    }
}
