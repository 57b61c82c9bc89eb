//! Frames of a guest that cost its network the most.

use std::net::{Ipv4Addr, UdpSocket};

use crate::net::policy::{Policy, Rule};
use crate::net::user::{Config, UserNet};
use crate::net::wire::{self, Ends, Head};
use crate::net::{Csum, Offload};
#[cfg(feature = "internals")]
use crate::net::{Gso, GsoKind, MAX_UDP_SEGMENTS};

/// A stack whose guest may reach a socket of the host, and what the guest puts into a queue to send that as many datagrams as one
/// frame may be.
#[cfg(feature = "internals")]
pub(crate) fn most_datagrams() -> std::io::Result<(UserNet, UdpSocket, Vec<u8>)> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = socket.local_addr()?;
    let only = Policy::deny_all().rule(Rule::allow_range(to.ip()).port(to.port()));
    let mut config = Config::new(only);
    config.loopback = true;
    let net = UserNet::new(config.clone()).map_err(std::io::Error::other)?;
    let size = 500;
    let payload = vec![0; usize::from(size) * MAX_UDP_SEGMENTS];
    let ends = Ends { src: config.guest4.into(), dst: to.ip() };
    let mut head = Head::ip((config.guest_mac, config.gateway_mac), ends, wire::UDP, 8 + payload.len());
    head.udp(4000, to.port(), payload.len());
    let csum = Some(Csum { start: 34, offset: 6 });
    let offload = Offload { csum, gso: Some(Gso { kind: GsoKind::Udp, size, header_len: 42 }) };
    Ok((net, socket, [offload.to_bytes(0).as_slice(), head.as_slice(), &payload].concat()))
}

/// A stack whose guest may reach a socket of the host, and what the guest puts into a queue to send it a datagram from a port.
pub(crate) fn new_flows() -> std::io::Result<(UserNet, UdpSocket, impl Fn(u16) -> Vec<u8>)> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = socket.local_addr()?;
    let config = Config::new(Policy::deny_all().rule(Rule::allow_range(to.ip()).port(to.port())));
    let net = UserNet::new(config.clone()).map_err(std::io::Error::other)?;
    let frame = move |from| {
        let ends = Ends { src: config.guest4.into(), dst: to.ip() };
        let mut head = Head::ip((config.guest_mac, config.gateway_mac), ends, wire::UDP, 8);
        head.udp(from, to.port(), 0);
        let offload = Offload { csum: Some(Csum { start: 34, offset: 6 }), gso: None };
        [offload.to_bytes(0).as_slice(), head.as_slice()].concat()
    };
    Ok((net, socket, frame))
}
