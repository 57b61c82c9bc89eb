//! [`Core`]: the state that all protocols of the stack share. It has addresses, policy, host, counters, and frames that
//! wait for the guest.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use super::config::{Config, NetStats};
use super::host::HostSockets;
use crate::memory::{GuestMemory, Segment};
use crate::network::policy::{Admitted, Enforcer, Protocol};
use crate::network::wire::{
    self, AddressPair, Ethernet, Fragment, FrameBuilder, IpPacket, MacPair, PacketError, UdpPorts,
};
use crate::network::{Capabilities, Offload, Received};
use crate::rate::{Bucket, Rate};

/// Frames that may wait for the guest: answers to what it sent, which it can ask for again.
const WAITING: usize = 512;

/// TCP connections that a guest opens, by default: 2,000 at once, 200 in each second.
const NEW_CONNECTIONS: Rate = Rate::per_second(200);
/// System calls by which the kernel is asked for a route.
pub(in crate::network) const ROUTE_CALLS: usize = 2;

/// Questions for names that are passed on, at most: 200 at once, and 100 in each second.
const QUESTIONS: Rate = Rate::per_second(100);

/// The party that has opened a connection or a flow: the guest, or a client of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) enum Initiator {
    Guest,
    Client,
}

#[derive(Debug)]
pub(in crate::network) struct Core {
    pub config: Config,
    pub agreed: Capabilities,
    pub stats: NetStats,
    pub policy: Enforcer,
    pub host: HostSockets,
    /// The address of the guest's own choice that it sent from last.
    pub guest6: Option<Ipv6Addr>,
    /// New connections, counted from `start` on.
    connects: Bucket,
    /// Questions for names, likewise.
    questions: Bucket,
    start: Instant,
    waiting: VecDeque<Vec<u8>>,
    /// When the lack of descriptors was reported last.
    refusal_reported: Option<Instant>,
    /// How many packets went in fragments, which identifies those of each.
    fragmented: u32,
    /// Room for a whole packet, for those that must be looked at.
    pub buffer: Vec<u8>,
}

impl Core {
    pub(in crate::network) fn new(config: Config) -> io::Result<Self> {
        let policy = Enforcer::new(config.policy.clone());
        let (agreed, stats, host) =
            (Capabilities::default(), NetStats::default(), HostSockets::new(config.descriptors.network())?);
        let start = host.now;
        let mut core = Self {
            config,
            agreed,
            stats,
            policy,
            host,
            guest6: None,
            connects: Bucket::new(NEW_CONNECTIONS, Duration::ZERO),
            questions: Bucket::keeping(Duration::from_secs(2), QUESTIONS, Duration::ZERO),
            start,
            waiting: VecDeque::new(),
            refusal_reported: None,
            fragmented: 0,
            buffer: Vec::new(),
        };
        core.limit_connects(core.config.limits.new_connections);
        Ok(core)
    }

    /// Limits the connections that the guest opens in a second. `None` is the default limit.
    pub(in crate::network) fn limit_connects(&mut self, rate: Option<Rate>) {
        let now = self.host.now.saturating_duration_since(self.start);
        self.config.limits.new_connections = rate;
        self.connects = match rate {
            Some(rate) => Bucket::keeping(Duration::from_secs(1), rate, now),
            None => Bucket::keeping(Duration::from_secs(10), NEW_CONNECTIONS, now),
        };
    }

    /// Whether the guest may open one more connection now.
    pub(in crate::network) fn may_connect(&mut self) -> bool {
        let now = self.host.now.saturating_duration_since(self.start);
        self.connects.take_whole(now)
    }

    /// Whether the guest may ask for one more name now.
    pub(in crate::network) fn may_ask(&mut self) -> bool {
        let now = self.host.now.saturating_duration_since(self.start);
        self.questions.take_whole(now)
    }

    /// Counts a frame of the guest and reads its front into `head`. `None` when it is in the name of another card.
    pub(in crate::network) fn open<'h>(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        head: &'h mut [u8; wire::HEADERS],
    ) -> Result<Option<(Ethernet, &'h [u8])>, PacketError> {
        self.stats.sent_frames += 1;
        self.stats.sent_bytes += frame.iter().map(|s| s.len() as u64).sum::<u64>();
        let filled = memory.gather(frame, 0, head).map_err(|_| PacketError::Malformed)?;
        let head = head.get(..filled).unwrap_or_default();
        let ethernet = Ethernet::parse(head)?;
        if ethernet.src != self.config.guest_mac {
            self.stats.spoofed += 1;
            return Ok(None);
        }
        Ok(Some((ethernet, head)))
    }

    /// Counts what became of a frame of the guest.
    pub(in crate::network) fn count(&mut self, taken: Result<(), PacketError>) {
        match taken {
            Ok(()) => {}
            Err(PacketError::Malformed) => self.stats.malformed += 1,
            Err(PacketError::Fragment) => self.stats.fragments += 1,
            Err(PacketError::Checksum) => self.stats.bad_checksums += 1,
        }
    }

    /// Asks the policy; whatever goes out of the host needs its answer.
    pub(in crate::network) fn admit(&mut self, protocol: Protocol, to: SocketAddr) -> Option<Admitted> {
        self.host.syscalls += ROUTE_CALLS;
        let admitted = self.policy.admit(protocol, to, self.host.now);
        self.stats.denied += u64::from(admitted.is_none());
        admitted
    }

    /// Reports a lack of descriptors for what was admitted, at most once a second.
    pub(in crate::network) fn refused(&mut self, protocol: Protocol, to: SocketAddr) {
        let now = self.host.now;
        if self.refusal_reported.is_none_or(|last| now >= last + Duration::from_secs(1)) {
            self.refusal_reported = Some(now);
            self.policy.refused(protocol, to, now);
        }
    }

    /// Whether what was admitted still is.
    pub(in crate::network) fn allows(&self, protocol: Protocol, to: SocketAddr) -> bool {
        self.policy.allows(protocol, to)
    }

    /// From the gateway's card to the guest's.
    pub(in crate::network) fn macs(&self) -> MacPair {
        MacPair { src: self.config.gateway_mac, dst: self.config.guest_mac }
    }

    /// The `len` bytes of `frame` from `skip` on.
    pub(in crate::network) fn copy(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        skip: usize,
        len: usize,
    ) -> Result<&[u8], PacketError> {
        self.buffer.resize(wire::MAX_PACKET, 0);
        let to = self.buffer.get_mut(..len).ok_or(PacketError::Malformed)?;
        memory.gather(frame, skip, to).map_err(|_| PacketError::Malformed)?;
        Ok(self.buffer.get(..len).unwrap_or_default())
    }

    /// Whether the checksum of what is `at` in the frame is right, where the guest has made one.
    pub(in crate::network) fn verify(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        at: usize,
        packet: IpPacket,
    ) -> Result<(), PacketError> {
        packet.verify(self.copy(memory, frame, at, packet.len)?)
    }

    /// Sends a small frame to the guest some time soon.
    pub(in crate::network) fn send(&mut self, frame: Vec<u8>) {
        if self.waiting.len() < WAITING {
            self.waiting.push_back(frame);
        } else {
            self.stats.overflowed += 1;
        }
    }

    /// Sends headers that are a whole packet, with the checksum of the innermost put at `check` bytes after the IP header.
    pub(in crate::network) fn send_headers(
        &mut self,
        mut head: FrameBuilder,
        addrs: AddressPair,
        protocol: u8,
        check: usize,
    ) {
        let at = wire::ETHERNET + wire::ip_header_len(addrs.src);
        let inner = head.from(at);
        let sum = wire::pseudo(addrs.src, addrs.dst, protocol, inner.len()) + wire::sum(inner);
        head.set16(at + check, !wire::fold(sum));
        self.send(head.as_slice().to_vec());
    }

    /// Sends an ICMP message of the gateway or of who it speaks for.
    pub(in crate::network) fn send_icmp(&mut self, addrs: AddressPair, message: &mut [u8]) {
        let protocol = if addrs.src.is_ipv4() { wire::ICMP } else { wire::ICMPV6 };
        let covered = match addrs.src {
            IpAddr::V4(_) => 0,
            IpAddr::V6(_) => wire::pseudo(addrs.src, addrs.dst, protocol, message.len()),
        };
        if let Some(check) = message.get_mut(2..4) {
            check.copy_from_slice(&[0, 0]);
        }
        let check = !wire::fold(covered + wire::sum(message));
        if let Some(place) = message.get_mut(2..4) {
            place.copy_from_slice(&check.to_be_bytes());
        }
        self.send_packet(addrs, protocol, message);
    }

    /// Sends a datagram of the gateway, or of who it speaks for.
    pub(in crate::network) fn send_udp(&mut self, addrs: AddressPair, ports: UdpPorts, payload: &[u8]) {
        self.send_packet(addrs, wire::UDP, &wire::datagram(addrs, ports, payload));
    }

    /// Sends a packet to the guest some time soon, in fragments where it is larger than the guest takes.
    pub(in crate::network) fn send_packet(&mut self, addrs: AddressPair, protocol: u8, body: &[u8]) {
        let (macs, mtu) = (self.macs(), usize::from(self.config.mtu));
        let frame = |head: FrameBuilder, part: &[u8]| [head.as_slice(), part].concat();
        if wire::ip_header_len(addrs.src) + body.len() <= mtu {
            return self.send(frame(FrameBuilder::ip(macs, addrs, protocol, body.len()), body));
        }
        self.fragmented = self.fragmented.wrapping_add(1);
        // All but the last are of whole units (RFC 791, 3.2; RFC 8200, 4.5).
        let size = mtu.saturating_sub(wire::fragment_header_len(addrs.src)).max(8) & !7;
        let count = body.len().div_ceil(size);
        if self.waiting.len() + count > WAITING {
            self.stats.overflowed += 1;
            return;
        }
        for (n, part) in body.chunks(size).enumerate() {
            let fragment = Fragment { id: self.fragmented, offset: n * size, more: n + 1 < count };
            self.send(frame(FrameBuilder::fragment(macs, addrs, protocol, part.len(), fragment), part));
        }
    }

    /// How long the first frame is that waits.
    pub(in crate::network) fn waiting(&self) -> Option<usize> {
        self.waiting.front().map(Vec::len)
    }

    pub(in crate::network) fn receive(&mut self, memory: &GuestMemory, room: &[Segment]) -> Option<Received> {
        let frame = self.waiting.pop_front()?;
        put(memory, room, &frame).then_some(Received { len: frame.len(), offload: Offload::default() })
    }
}

/// Writes all of `bytes` to the guest. False: there is not enough room.
pub(in crate::network) fn put(memory: &GuestMemory, room: &[Segment], bytes: &[u8]) -> bool {
    memory.scatter(room, bytes).is_ok_and(|n| n == bytes.len())
}
