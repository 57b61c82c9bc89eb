//! [`Core`]: what all protocols of the stack share: addresses, policy, host, counters, and frames that wait for the guest.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::config::{Config, NetStats};
use super::host::Host;
use crate::memory::{GuestMemory, Segment};
use crate::net::policy::{Admitted, Enforcer, Protocol};
use crate::net::wire::{self, Bad, Ends, Head, Packet};
use crate::net::{Agreed, Mac, Offload, Received};

/// Frames that may wait for the guest: answers to what it sent, which it can ask for again.
const WAITING: usize = 512;

#[derive(Debug)]
pub(super) struct Core {
    pub config: Config,
    pub agreed: Agreed,
    pub stats: NetStats,
    pub policy: Enforcer,
    pub host: Host,
    calls: Option<Calls>,
    waiting: VecDeque<Vec<u8>>,
    /// Room for a whole packet, for those that must be looked at.
    pub buffer: Vec<u8>,
}

/// New connections: so many in each second, and as many at once.
#[derive(Debug)]
struct Calls {
    rate: u32,
    level: f64,
    at: Instant,
}

impl Calls {
    fn take(&mut self, now: Instant) -> bool {
        let came = now.saturating_duration_since(self.at).as_secs_f64() * f64::from(self.rate);
        (self.level, self.at) = ((self.level + came).min(f64::from(self.rate)), now);
        let may = self.level >= 1.0;
        self.level -= if may { 1.0 } else { 0.0 };
        may
    }
}

impl Core {
    pub(super) fn new(config: Config) -> io::Result<Self> {
        let policy = Enforcer::new(config.policy.clone());
        let (agreed, stats, host) = (Agreed::default(), NetStats::default(), Host::new()?);
        let calls = config.limits.new_connections.map(|rate| Calls { rate, level: f64::from(rate), at: host.now });
        Ok(Self { config, agreed, stats, policy, host, calls, waiting: VecDeque::new(), buffer: Vec::new() })
    }

    /// Whether the guest may open one more connection now.
    pub(super) fn may_call(&mut self) -> bool {
        let now = self.host.now;
        self.calls.as_mut().is_none_or(|calls| calls.take(now))
    }

    /// Asks the policy; whatever goes out of the host needs its answer.
    pub(super) fn admit(&mut self, protocol: Protocol, to: SocketAddr) -> Option<Admitted> {
        let admitted = self.policy.admit(protocol, to, self.host.now);
        self.stats.denied += u64::from(admitted.is_none());
        admitted
    }

    /// Whether what was admitted still is.
    pub(super) fn allows(&self, protocol: Protocol, to: SocketAddr) -> bool {
        self.policy.allows(protocol, to)
    }

    /// From the gateway's card to the guest's.
    pub(super) fn macs(&self) -> (Mac, Mac) {
        (self.config.gateway_mac, self.config.guest_mac)
    }

    /// The `len` bytes of `frame` from `skip` on.
    pub(super) fn copy(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        skip: usize,
        len: usize,
    ) -> Result<&[u8], Bad> {
        self.buffer.resize(wire::MAX_PACKET, 0);
        let to = self.buffer.get_mut(..len).ok_or(Bad::Malformed)?;
        memory.gather(frame, skip, to).map_err(|_| Bad::Malformed)?;
        Ok(self.buffer.get(..len).unwrap_or_default())
    }

    /// Whether the checksum of what is `at` in the frame is right, where the guest has made one.
    pub(super) fn verify(
        &mut self,
        memory: &GuestMemory,
        frame: &[Segment],
        at: usize,
        packet: Packet,
    ) -> Result<(), Bad> {
        let bytes = self.copy(memory, frame, at, packet.len)?;
        // No checksum at all is fine for UDP over IPv4 (RFC 768).
        if packet.protocol == wire::UDP && packet.src.is_ipv4() && bytes.get(6..8) == Some(&[0, 0]) {
            return Ok(());
        }
        let covered = match packet.protocol {
            wire::ICMP => 0,
            protocol => wire::pseudo(packet.src, packet.dst, protocol, packet.len),
        };
        if wire::fold(covered + wire::sum(bytes)) == 0xffff { Ok(()) } else { Err(Bad::Checksum) }
    }

    /// Sends a small frame to the guest some time soon.
    pub(super) fn send(&mut self, frame: Vec<u8>) {
        if self.waiting.len() < WAITING {
            self.waiting.push_back(frame);
        } else {
            self.stats.overflowed += 1;
        }
    }

    /// Sends headers that are a whole packet, with the checksum of the innermost put at `check` bytes after the IP header.
    pub(super) fn send_head(&mut self, mut head: Head, ends: Ends, protocol: u8, check: usize) {
        let at = wire::ETHERNET + wire::ip_header_len(ends.src);
        let inner = head.from(at);
        let sum = wire::pseudo(ends.src, ends.dst, protocol, inner.len()) + wire::sum(inner);
        head.set16(at + check, !wire::fold(sum));
        self.send(head.as_slice().to_vec());
    }

    /// Sends an ICMP message of the gateway or of who it speaks for.
    pub(super) fn send_icmp(&mut self, ends: Ends, message: &mut [u8]) {
        let protocol = if ends.src.is_ipv4() { wire::ICMP } else { wire::ICMPV6 };
        let covered = match ends.src {
            IpAddr::V4(_) => 0,
            IpAddr::V6(_) => wire::pseudo(ends.src, ends.dst, protocol, message.len()),
        };
        if let Some(check) = message.get_mut(2..4) {
            check.copy_from_slice(&[0, 0]);
        }
        let check = !wire::fold(covered + wire::sum(message));
        if let Some(place) = message.get_mut(2..4) {
            place.copy_from_slice(&check.to_be_bytes());
        }
        let mut frame = Head::ip(self.macs(), ends, protocol, message.len()).as_slice().to_vec();
        frame.extend_from_slice(message);
        self.send(frame);
    }

    /// How long the first frame is that waits.
    pub(super) fn waiting(&self) -> Option<usize> {
        self.waiting.front().map(Vec::len)
    }

    pub(super) fn receive(&mut self, memory: &GuestMemory, room: &[Segment]) -> Option<Received> {
        let frame = self.waiting.pop_front()?;
        put(memory, room, &frame).then_some(Received { len: frame.len(), offload: Offload::default() })
    }
}

/// Writes all of `bytes` to the guest. False: there is not enough room.
pub(super) fn put(memory: &GuestMemory, room: &[Segment], bytes: &[u8]) -> bool {
    memory.scatter(room, bytes).is_ok_and(|n| n == bytes.len())
}
