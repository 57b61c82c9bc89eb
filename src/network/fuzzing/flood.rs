//! Frames of a guest that cost its network the most.

use std::net::{Ipv4Addr, UdpSocket};
#[cfg(feature = "internals")]
use std::sync::Arc;

#[cfg(feature = "internals")]
use crate::error::Result;
use crate::network::policy::{Policy, Rule};
#[cfg(feature = "internals")]
use crate::network::switch::{Switch, SwitchPort, fake_guest::FakeGuest};
use crate::network::user::{Config, UserStack};
#[cfg(feature = "internals")]
use crate::network::wire::Tcp;
use crate::network::wire::{self, AddressPair, FrameBuilder};
use crate::network::{Csum, Offload};
#[cfg(feature = "internals")]
use crate::network::{Gso, GsoKind, MAX_UDP_SEGMENTS, Mac, Offloads};

/// Returns a stack whose guest may reach a socket of the host, and a frame for it. The frame stands for as many
/// datagrams as one may.
#[cfg(feature = "internals")]
pub(crate) fn most_datagrams() -> std::io::Result<(UserStack, UdpSocket, Vec<u8>)> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = socket.local_addr()?;
    let only = Policy::deny_all().rule(Rule::allow_range(to.ip()).port(to.port()));
    let mut config = Config::new(only);
    config.loopback = true;
    let net = UserStack::new(config.clone()).map_err(std::io::Error::other)?;
    let size = 500;
    let payload = vec![0; usize::from(size) * MAX_UDP_SEGMENTS];
    let addrs = AddressPair { src: config.guest4.into(), dst: to.ip() };
    let mut head = FrameBuilder::ip(
        wire::MacPair { src: config.guest_mac, dst: config.gateway_mac },
        addrs,
        wire::UDP,
        8 + payload.len(),
    );
    head.udp(4000, to.port(), payload.len());
    let csum = Some(Csum { start: 34, offset: 6 });
    let offload = Offload { csum, gso: Some(Gso { kind: GsoKind::Udp, size, header_len: 42 }) };
    Ok((net, socket, [offload.to_bytes(0).as_slice(), head.as_slice(), &payload].concat()))
}

/// Returns a stack whose guest may reach a socket of the host, and what makes a frame. The frame is a datagram from a
/// given port.
pub(crate) fn new_flows() -> std::io::Result<(UserStack, UdpSocket, impl Fn(u16) -> Vec<u8>)> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = socket.local_addr()?;
    let config = Config::new(Policy::deny_all().rule(Rule::allow_range(to.ip()).port(to.port())));
    let net = UserStack::new(config.clone()).map_err(std::io::Error::other)?;
    let frame = move |from| {
        let addrs = AddressPair { src: config.guest4.into(), dst: to.ip() };
        let mut head =
            FrameBuilder::ip(wire::MacPair { src: config.guest_mac, dst: config.gateway_mac }, addrs, wire::UDP, 8);
        head.udp(from, to.port(), 0);
        let offload = Offload { csum: Some(Csum { start: 34, offset: 6 }), gso: None };
        [offload.to_bytes(0).as_slice(), head.as_slice()].concat()
    };
    Ok((net, socket, frame))
}

/// A port of a switch, frames that cost it the most, and what makes the guest which they are for take them. One frame is segments
/// that this guest has not agreed to cut, the other a packet as small as it can be.
#[cfg(feature = "internals")]
pub(crate) fn switched() -> Result<(SwitchPort, [Vec<u8>; 2], impl FnMut())> {
    let switch = Switch::new();
    let macs = wire::MacPair { src: Mac([2, 0, 0, 0, 0, 1]), dst: Mac([2, 0, 0, 0, 0, 2]) };
    let mut other = FakeGuest::on(&switch, "other", macs.dst, Offloads::none())?;
    let place = switch.join("one", macs.src, 1500)?;
    let addrs = AddressPair { src: place.address4().into(), dst: other.four.into() };
    let payload = vec![0; 65_000];
    let mut head = FrameBuilder::ip(macs, addrs, wire::TCP, 20 + payload.len());
    head.tcp(&Tcp { src: 4000, dst: 80, flags: wire::ACK, window: 512, ..Tcp::default() });
    let gso = Gso { kind: GsoKind::Tcp4, size: 520, header_len: 54 };
    let offload = Offload { csum: Some(Csum { start: 34, offset: 16 }), gso: Some(gso) };
    let large = [offload.to_bytes(0).as_slice(), head.as_slice(), &payload].concat();
    let mut head = FrameBuilder::ip(macs, addrs, wire::UDP, 8);
    head.udp(4000, 7, 0);
    let small = [Offload::default().to_bytes(0).as_slice(), head.as_slice()].concat();
    Ok((SwitchPort::new(Arc::new(place))?, [large, small], move || drop(other.take())))
}
