//! [`Config`]: addresses and bounds of a user-mode network; [`NetStats`]: what it has done.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::network::policy::Policy;
use crate::network::{Mac, Switch};
use crate::rate::Rate;
use crate::sys::DescriptorShare;

/// A config value: who is who on the guest's link, and how much there may be of everything.
///
/// By default 10.0.2.0/24 and fd63:6f66:6665::/64, as a guest of QEMU has them: the gateway is 2, the guest 15. The gateway
/// is router, DHCP server and resolver; nothing else is on the link.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub guest_mac: Mac,
    pub gateway_mac: Mac,
    pub gateway4: Ipv4Addr,
    pub guest4: Ipv4Addr,
    /// Bits of the IPv4 network.
    pub prefix4: u8,
    /// The first 64 bits are the IPv6 network (RFC 4193). The guest may choose its addresses there.
    pub gateway6: Ipv6Addr,
    pub guest6: Ipv6Addr,
    /// The guest takes what the gateway sends to its 127.0.0.1 (Linux: `net.ipv4.conf.*.route_localnet` of the card).
    pub loopback: bool,
    pub mtu: u16,
    /// The gateway is the way out.
    pub router: bool,
    pub policy: Policy,
    /// The host's resolvers; `None`: those of `/etc/resolv.conf`, which is read again when it changes.
    pub resolvers: Option<Vec<SocketAddr>>,
    /// Names of these are answered too.
    pub switches: Vec<Switch>,
    pub limits: Limits,
    /// Those that its guest may hold.
    pub descriptors: DescriptorShare,
}

/// Bounds of a network.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// TCP connections at once that the guest has begun. Callers of published ports may have as many.
    pub connections: usize,
    /// New TCP connections of the guest; what was not used is kept for a second.
    pub new_connections: Option<Rate>,
    /// UDP flows and pings at once that the guest has begun. Callers of published ports may have as many. Of each kind
    /// the one that was idle for longest makes room.
    pub datagram_flows: usize,
    /// Until a connection is made.
    pub half_open: Duration,
    /// Until a connection without traffic is reset. RFC 5382, REQ-5, asks for at least two hours and four minutes.
    pub idle: Duration,
    /// Until one that is closed on one side is.
    pub half_closed: Duration,
    /// Until a UDP flow is forgotten (RFC 4787, REQ-5: at least two minutes).
    pub datagram_idle: Duration,
    /// Bytes that wait for slow receivers on the host, of all connections.
    pub backlog: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8192,
            new_connections: None,
            datagram_flows: 1024,
            half_open: Duration::from_secs(60),
            idle: Duration::from_secs(2 * 3600 + 240),
            half_closed: Duration::from_secs(600),
            datagram_idle: Duration::from_secs(180),
            backlog: 16 << 20,
        }
    }
}

/// How many TCP connections a guest may have; see [`UserNet::connection_limit`](crate::net::UserNet::connection_limit).
///
/// A config value. Clients of published ports are not counted: they may have as many again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct ConnectionLimit {
    pub(super) open: Option<u32>,
    pub(super) new: Option<Rate>,
}

impl ConnectionLimit {
    /// Returns the default: 8192 connections at once, and 200 new ones a second.
    ///
    /// What was not used of the rate is kept for ten seconds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Limits the connections that are open at once.
    pub fn open(mut self, n: u32) -> Self {
        self.open = Some(n);
        self
    }

    /// Limits the rate of connections that the guest opens. What was not used is kept for a second.
    pub fn new_connections(mut self, rate: Rate) -> Self {
        self.new = Some(rate);
        self
    }

    /// # Errors
    /// `InvalidConfig` for nothing at all: a policy that denies all says why.
    pub(crate) fn check(&self) -> Result<()> {
        match self.open {
            Some(0) => Err(Error::invalid("open", "0: a policy that denies all says why")),
            _ => self.new.map_or(Ok(()), |rate| rate.check("new_connections")),
        }
    }
}

impl Config {
    pub(crate) fn new(policy: Policy) -> Self {
        let net6 = |host| Ipv6Addr::new(0xfd63, 0x6f66, 0x6665, 0, 0, 0, 0, host);
        Self {
            guest_mac: Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            gateway_mac: Mac([0x52, 0x55, 10, 0, 2, 2]),
            gateway4: Ipv4Addr::new(10, 0, 2, 2),
            guest4: Ipv4Addr::new(10, 0, 2, 15),
            prefix4: 24,
            gateway6: net6(2),
            guest6: net6(0x15),
            loopback: false,
            mtu: 1500,
            router: true,
            policy,
            resolvers: None,
            switches: Vec::new(),
            limits: Limits::default(),
            descriptors: DescriptorShare::default(),
        }
    }

    /// # Errors
    /// `InvalidConfig` for what cannot work.
    pub(crate) fn check(&self) -> Result<()> {
        let invalid = |problem: String| Err(Error::invalid("Net::user", problem));
        let network = |a: Ipv4Addr| u32::from(a).checked_shr(32 - u32::from(self.prefix4)).unwrap_or(0);
        if !(576..).contains(&self.mtu) {
            return invalid(format!("an MTU of {} is less than the 576 bytes that IPv4 needs", self.mtu));
        }
        if !(8..=30).contains(&self.prefix4) {
            return invalid(format!(
                "a network of /{} has no room for gateway and guest, or too much: say 8 to 30",
                self.prefix4
            ));
        }
        if network(self.gateway4) != network(self.guest4) || self.gateway4 == self.guest4 {
            return invalid(format!("{} and {} are not two addresses of one network", self.gateway4, self.guest4));
        }
        let bad = |a: Ipv4Addr| a.is_loopback() || a.is_multicast() || a.is_broadcast() || a.is_unspecified();
        if bad(self.gateway4) || bad(self.guest4) {
            return invalid(format!("{} or {} cannot be a machine's address", self.gateway4, self.guest4));
        }
        if self.gateway6 == self.guest6 || !self.on_link6(self.guest6) || self.gateway6.is_multicast() {
            return invalid(format!("{} and {} are not two addresses of one /64", self.gateway6, self.guest6));
        }
        if !self.guest_mac.is_unicast() || !self.gateway_mac.is_unicast() || self.guest_mac == self.gateway_mac {
            return invalid(format!("{} and {} are not two cards' addresses", self.guest_mac, self.gateway_mac));
        }
        self.policy.check()
    }

    pub(super) fn on_link6(&self, address: Ipv6Addr) -> bool {
        u128::from(address) >> 64 == u128::from(self.gateway6) >> 64
    }

    /// The gateway's link-local address (RFC 4291, 2.5.6).
    pub(super) fn gateway_local(&self) -> Ipv6Addr {
        Ipv6Addr::from(0xfe80 << 112 | u128::from(self.gateway6) & u128::from(u64::MAX))
    }

    pub(in crate::network) fn is_gateway(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => a == self.gateway4,
            IpAddr::V6(a) => a == self.gateway6 || a == self.gateway_local(),
        }
    }

    /// Whether a DHCP server may be asked there.
    pub(in crate::network) fn is_server(&self, address: IpAddr) -> bool {
        self.is_gateway(address) || matches!(address, IpAddr::V4(a) if a.is_broadcast())
    }

    /// Whether the guest may send from there to anywhere.
    pub(super) fn is_guest(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => a == self.guest4,
            IpAddr::V6(a) => self.on_link6(a) && !self.is_gateway(address),
        }
    }

    /// Whether it is the guest's own loopback, from which it answers callers of published ports and says nothing else.
    pub(super) fn is_loopback(&self, address: IpAddr) -> bool {
        self.loopback && matches!(address, IpAddr::V4(a) if a.is_loopback())
    }

    /// The network's own broadcast address.
    pub(super) fn broadcast4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.gateway4) | u32::MAX.checked_shr(u32::from(self.prefix4)).unwrap_or(0))
    }
}

/// The counters of a network since it was made, and what there is now.
///
/// On a switch they are those of this guest's port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetStats {
    /// Frames of the guest.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames to the guest.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames of the guest that were not what they should be.
    pub malformed: u64,
    /// With a wrong checksum.
    pub bad_checksums: u64,
    /// Packets of the guest whose fragments made no whole. Fragments were late, contradicted each other, or were of a
    /// protocol that does not use them.
    pub fragments: u64,
    /// Frames from a hardware or IP address that is not the guest's.
    ///
    /// On a switch also messages that no guest may send to another.
    pub spoofed: u64,
    /// Frames of protocols, or to addresses, that the network does not serve.
    pub unserved: u64,
    /// Frames to the guest that were dropped, as too many waited.
    ///
    /// On a switch also those that came before its card ran.
    pub overflowed: u64,
    /// TCP connections now.
    pub connections: u64,
    /// TCP connections that were made, both ways.
    pub connected: u64,
    /// Connections that the peer refused, did not answer, or could not be reached for.
    ///
    /// Also datagrams to published ports that nothing in the guest took.
    pub unconnected: u64,
    /// Connections that were reset by either side, or by a changed policy.
    pub resets: u64,
    /// Connections and flows that were given up because nothing happened on them.
    pub timed_out: u64,
    /// Connections that were not made because a limit was reached.
    ///
    /// That is the limit of connections, or of descriptors for this guest or for all.
    pub limited: u64,
    /// Segments that were sent again.
    pub retransmitted: u64,
    /// Segments of the guest that came before one that is missing.
    pub out_of_order: u64,
    /// UDP flows and pings now.
    pub datagram_flows: u64,
    /// Packets of the guest that were too large for another guest on its switch.
    pub too_large: u64,
    /// Connections and datagrams that the policy denied.
    pub denied: u64,
    /// Questions for names.
    pub questions: u64,
    /// Questions that the policy denied.
    pub denied_names: u64,
    /// Questions that no resolver answered.
    pub unanswered: u64,
    /// Bytes of the guest that wait for slow receivers on the host.
    pub backlog: u64,
}
