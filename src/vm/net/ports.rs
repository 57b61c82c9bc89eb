//! [`PortForward`]: a port of the host that leads to one of the guest.

use std::net::SocketAddr;

use crate::error::{Context, Error, Result};
use crate::network::{Cidr, Protocol, Published, UserStack};

/// A port of the host that leads to one of the guest; see [`UserNet::publish`](super::UserNet::publish).
///
/// A config value.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct PortForward {
    protocol: Protocol,
    host: SocketAddr,
    guest: u16,
    sources: Vec<Cidr>,
}

impl PortForward {
    /// Leads TCP connections at this address of the host to `guest_port` of the guest.
    ///
    /// Port 0 of the host is any that is free.
    pub fn tcp(host: impl Into<SocketAddr>, guest_port: u16) -> Self {
        Self { protocol: Protocol::Tcp, host: host.into(), guest: guest_port, sources: Vec::new() }
    }

    /// Leads UDP datagrams at this address of the host to `guest_port` of the guest.
    ///
    /// Port 0 of the host is any that is free.
    pub fn udp(host: impl Into<SocketAddr>, guest_port: u16) -> Self {
        Self { protocol: Protocol::Udp, ..Self::tcp(host, guest_port) }
    }

    /// Accepts clients of this range only. Call repeatedly to add ranges.
    ///
    /// By default all clients are accepted.
    pub fn allow_from(mut self, range: impl Into<Cidr>) -> Self {
        self.sources.push(range.into());
        self
    }

    pub(super) fn publish(&self, user: &mut UserStack) -> Result<(Published, SocketAddr)> {
        let publish = match self.protocol {
            Protocol::Udp => UserStack::publish_udp,
            _ => UserStack::publish_tcp,
        };
        publish(user, self.host, self.guest, self.sources.clone())
            .doing(|| format!("publishing port {} of the guest", self.guest))
    }
}

/// Checks that one port of the host leads to one port of the guest.
pub(super) fn check_ports(ports: &[PortForward]) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    let clash = ports.iter().filter(|port| port.host.port() != 0).find(|port| !seen.insert((port.protocol, port.host)));
    clash.map_or(Ok(()), |PortForward { host, protocol, .. }| {
        Err(Error::invalid("publish", format!("{host} is published twice over {protocol}: say port 0 for any")))
    })
}
