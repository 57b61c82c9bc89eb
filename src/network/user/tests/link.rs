//! Who answers on the link, and to whom.

use std::net::{IpAddr, Ipv6Addr};

use super::*;
use crate::network::wire::{self, AddressPair, Ethernet, FrameBuilder, IpPacket};
use crate::network::{Mac, NetStats};
use smoltcp::socket::dhcpv4;

fn arp(guest: &Guest, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let config = &guest.net.core.config;
    let mut frame = vec![0xff; 6];
    frame.extend(config.guest_mac.0);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(config.guest_mac.0);
    frame.extend(config.guest4.octets());
    frame.extend([0; 6]);
    frame.extend(config.gateway4.octets());
    change(&mut frame);
    frame
}

fn answers(guest: &mut Guest, frame: &[u8]) -> usize {
    guest.send(frame, Offload::default());
    std::iter::from_fn(|| guest.take()).count()
}

#[test]
fn the_gateway_answers_for_itself_only() {
    let mut guest = Guest::new();
    let good = arp(&guest, |_| ());
    assert_eq!(answers(&mut guest, &good), 1);
    let other = arp(&guest, |f| f[41] = 77);
    assert_eq!(answers(&mut guest, &other), 0);
    let probe = arp(&guest, |f| f[28..32].copy_from_slice(&[0; 4]));
    assert_eq!(answers(&mut guest, &probe), 1);
    assert_eq!(guest.net.stats().spoofed, 0);
    let poison: [fn(&mut Vec<u8>); 3] = [|f| f[31] = 2, |f| f[22] ^= 4, |f| f[6] ^= 4];
    for (n, change) in poison.into_iter().enumerate() {
        let frame = arp(&guest, change);
        assert_eq!((answers(&mut guest, &frame), guest.net.stats().spoofed), (0, n as u64 + 1));
    }
    let short = arp(&guest, |f| f.truncate(30));
    assert_eq!((answers(&mut guest, &short), guest.net.stats().malformed), (0, 1));
}

#[test]
fn foreign_sources_are_dropped_and_counted() {
    let mut guest = Guest::new();
    let (_listener, to) = listener();
    let handle = guest.connected(to);
    guest.tcp(handle).send_slice(b"x").unwrap();
    let now = guest.now();
    guest.iface.poll(now, &mut guest.card, &mut guest.sockets);
    let frame = guest.card.from_guest.pop_back().unwrap();
    let offload = Offload { csum: Some(Csum { start: 34, offset: 16 }), gso: None };
    let mut foreign = frame.clone();
    foreign[29] ^= 1;
    // The header's own checksum is right.
    foreign[25] ^= 1;
    let before = guest.net.stats();
    guest.send(&foreign, offload);
    let mut foreign = frame;
    foreign[11] ^= 1;
    guest.send(&foreign, offload);
    // 127.0.0.1 is accepted when it answers, and not when it calls.
    let (addrs, port) =
        (AddressPair { src: Ipv4Addr::LOCALHOST.into(), dst: guest.net.core.config.gateway4.into() }, 80);
    let macs = wire::MacPair { src: guest.net.core.config.guest_mac, dst: guest.net.core.config.gateway_mac };
    for flags in [wire::SYN, wire::SYN | wire::ACK, wire::RST] {
        let mut head = FrameBuilder::ip(macs, addrs, wire::TCP, 20);
        head.tcp(&wire::Tcp { src: port, dst: 50_000, flags, ..wire::Tcp::default() });
        let before = guest.net.stats().spoofed;
        guest.send(head.as_slice(), offload);
        assert_eq!(guest.net.stats().spoofed, before + 1);
    }
    let after = NetStats { spoofed: guest.net.stats().spoofed - 3, ..guest.net.stats() };
    assert_eq!(after.spoofed + after.bad_checksums, before.spoofed + 2);
}

#[test]
fn wrong_checksums_and_fragments_of_segments_are_dropped_and_counted() {
    let mut guest = Guest::of(Config::new(local()), Offloads::none());
    let (_listener, to) = listener();
    let handle = guest.connected(to);
    guest.tcp(handle).send_slice(b"hello").unwrap();
    let now = guest.now();
    guest.iface.poll(now, &mut guest.card, &mut guest.sockets);
    let frame = guest.card.from_guest.pop_back().unwrap();
    let mut wrong = frame.clone();
    *wrong.last_mut().unwrap() ^= 1;
    guest.send(&wrong, Offload::default());
    assert_eq!(guest.net.stats().bad_checksums, 1);
    let mut wrong = frame.clone();
    wrong[24] ^= 1;
    guest.send(&wrong, Offload::default());
    assert_eq!(guest.net.stats().bad_checksums, 2);
    let mut fragment = frame;
    let (flags, check) = (fragment[20], fragment[24]);
    fragment[20] = 0x20;
    fragment[24] = check.wrapping_add(flags).wrapping_sub(0x20);
    guest.send(&fragment, Offload::default());
    assert_eq!(guest.net.stats().fragments, 1);
}

#[test]
fn the_guest_gets_one_lease_and_the_resolver() {
    let mut guest = Guest::new();
    guest.iface.update_ip_addrs(|all| all.clear());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let lease = guest.until(|g| match g.sockets.get_mut::<dhcpv4::Socket>(handle).poll() {
        Some(dhcpv4::Event::Configured(lease)) => {
            Some((lease.address, lease.router, lease.dns_servers.first().copied()))
        }
        _ => None,
    });
    let config = Config::new(local());
    let network = smoltcp::wire::Ipv4Cidr::new(config.guest4, 24);
    assert_eq!(lease, (network, Some(config.gateway4), Some(config.gateway4)));
}

#[test]
fn leases_cannot_be_used_up() {
    let mut guest = Guest::new();
    let config = guest.net.core.config.clone();
    let discover = |mac: Mac| {
        let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0, 0, 0];
        message.resize(28, 0);
        message.extend(mac.0);
        message.resize(236, 0);
        message.extend([99, 130, 83, 99, 53, 1, 1, 255]);
        let addrs = AddressPair { src: Ipv4Addr::UNSPECIFIED.into(), dst: Ipv4Addr::BROADCAST.into() };
        let mut head = FrameBuilder::ip(
            wire::MacPair { src: config.guest_mac, dst: Mac::BROADCAST },
            addrs,
            wire::UDP,
            8 + message.len(),
        );
        head.udp(68, 67, message.len());
        let mut frame = head.as_slice().to_vec();
        frame.extend(message);
        frame
    };
    for n in 0..1000u16 {
        let [a, b] = n.to_be_bytes();
        assert_eq!(answers(&mut guest, &discover(Mac([2, 9, 9, 9, a, b]))), 0);
    }
    assert_eq!(guest.net.stats().spoofed, 1000);
    for _ in 0..10 {
        assert_eq!(answers(&mut guest, &discover(config.guest_mac)), 1);
    }
}

fn icmp6(config: &Config, src: Ipv6Addr, dst: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
    let addrs = AddressPair { src: src.into(), dst: dst.into() };
    let sum = wire::pseudo(addrs.src, addrs.dst, wire::ICMPV6, message.len()) + wire::sum(&message);
    message[2..4].copy_from_slice(&(!wire::fold(sum)).to_be_bytes());
    let head = FrameBuilder::ip(
        wire::MacPair { src: config.guest_mac, dst: Mac([0x33, 0x33, 0, 0, 0, 2]) },
        addrs,
        wire::ICMPV6,
        message.len(),
    );
    let mut frame = head.as_slice().to_vec();
    frame.extend(message);
    frame
}

#[test]
fn a_router_is_advertised_now_and_later() {
    let mut guest = Guest::new();
    let config = guest.net.core.config.clone();
    let (me, routers) = ("fe80::5".parse().unwrap(), "ff02::2".parse().unwrap());
    guest.send(&icmp6(&config, me, routers, vec![133, 0, 0, 0, 0, 0, 0, 0]), Offload::default());
    let (frame, _) = guest.take().unwrap();
    let packet = IpPacket::parse(Ethernet::parse(&frame).unwrap().kind, &frame[14..], frame.len() - 14).unwrap();
    assert_eq!((packet.src, packet.hops), (IpAddr::from(config.gateway_local()), 255));
    let sum = wire::pseudo(packet.src, packet.dst, wire::ICMPV6, packet.len) + wire::sum(&frame[54..]);
    assert_eq!(wire::fold(sum), 0xffff);
    let advert = smoltcp::wire::Icmpv6Packet::new_checked(&frame[54..]).unwrap();
    let advert = smoltcp::wire::NdiscRepr::parse(&advert).unwrap();
    let smoltcp::wire::NdiscRepr::RouterAdvert { mtu, prefix_info: Some(prefix), .. } = advert else {
        panic!("{advert:?}");
    };
    assert_eq!((mtu, prefix.prefix_len), (Some(1500), 64));
    assert!(config.on_link6(prefix.prefix));
    guest.net.core.host.advance(Duration::from_secs(1801));
    guest.net.poll();
    assert!(guest.take().is_some(), "it is not advertised again");
}

#[test]
fn neighbor_discovery_answers_for_the_gateway_only() {
    let mut guest = Guest::new();
    let config = guest.net.core.config.clone();
    let mut ask = |target: Ipv6Addr, src: Ipv6Addr| {
        let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
        message.extend(target.octets());
        let frame = icmp6(&config, src, "ff02::1:ff00:2".parse().unwrap(), message);
        answers(&mut guest, &frame)
    };
    assert_eq!(ask(config.gateway6, config.guest6), 1);
    assert_eq!(ask(config.gateway_local(), "fe80::5".parse().unwrap()), 1);
    assert_eq!(ask(config.gateway6, Ipv6Addr::UNSPECIFIED), 1);
    assert_eq!(ask(config.guest6, Ipv6Addr::UNSPECIFIED), 0);
    assert_eq!(ask("fe80::99".parse().unwrap(), config.guest6), 0);
}

#[test]
fn the_gateway_answers_echoes() {
    let mut guest = Guest::new();
    let config = guest.net.core.config.clone();
    let mut message = vec![128, 0, 0, 0, 0, 7, 0, 1];
    message.extend(b"abcdefgh");
    let frame = icmp6(&config, config.guest6, config.gateway6, message);
    guest.send(&frame, Offload::default());
    let (reply, _) = guest.take().unwrap();
    assert_eq!(guest.net.core.guest6, Some(config.guest6));
    assert_eq!((reply[54], &reply[58..70]), (129, &[0, 7, 0, 1, b'a', b'b', b'c', b'd', b'e', b'f', b'g', b'h'][..]));
}
