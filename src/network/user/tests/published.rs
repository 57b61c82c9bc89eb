//! Ports of the host that lead to the guest.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream, UdpSocket};
use std::time::Duration;

use super::*;
use crate::network::policy::Cidr;
use smoltcp::socket::tcp::State;

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn listening(guest: &mut Guest, port: u16) -> SocketHandle {
    let buffer = || peer::SocketBuffer::new(vec![0; 64 << 10]);
    let mut socket = peer::Socket::new(buffer(), buffer());
    socket.listen(port).unwrap();
    guest.sockets.add(socket)
}

#[test]
fn clients_reach_the_guest_through_published_ports() {
    let mut guest = Guest::of(Config::new(Policy::deny_all()), Offloads::all());
    let (published, at) = guest.net.publish_tcp(ANY, 80, Vec::new()).unwrap();
    let handle = listening(&mut guest, 80);
    let mut caller = TcpStream::connect(at).unwrap();
    caller.write_all(b"GET").unwrap();
    guest.until(|g| g.tcp(handle).can_recv().then_some(()));
    let mut word = [0; 4];
    assert_eq!(guest.tcp(handle).recv_slice(&mut word), Ok(3));
    assert_eq!(guest.tcp(handle).remote_endpoint().unwrap().addr, guest.net.core.config.gateway4.into());
    guest.tcp(handle).send_slice(&[9; 50_000]).unwrap();
    guest.tcp(handle).close();
    guest.until(|g| (g.tcp(handle).state() == State::FinWait2).then_some(()));
    let mut all = Vec::new();
    caller.read_to_end(&mut all).unwrap();
    assert_eq!(all, [9; 50_000]);
    drop(caller);
    guest.over();
    assert!(guest.net.unpublish(published) && !guest.net.unpublish(published));
    assert_eq!(TcpStream::connect(at).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(guest.net.core.host.made, 0);
}

#[test]
fn missing_listener_is_a_reset() {
    let mut guest = Guest::new();
    let (_, at) = guest.net.publish_tcp(ANY, 80, Vec::new()).unwrap();
    let mut caller = TcpStream::connect(at).unwrap();
    guest.until(|g| (g.net.stats().unconnected == 1).then_some(()));
    assert_eq!(caller.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// A guest whose 127.0.0.1 can be reached, with a server at each of these addresses.
fn inside(addresses: &[IpAddr]) -> (Guest, Vec<SocketHandle>) {
    let mut guest = Guest::of(Config { loopback: true, ..Config::new(Policy::deny_all()) }, Offloads::all());
    guest.iface.update_ip_addrs(|all| all.push(IpCidr::new(Ipv4Addr::LOCALHOST.into(), 8)).unwrap());
    let handles = addresses.iter().map(|address| listening_at(&mut guest, *address)).collect();
    (guest, handles)
}

fn listening_at(guest: &mut Guest, address: IpAddr) -> SocketHandle {
    let handle = listening(guest, 80);
    guest.tcp(handle).abort();
    guest.tcp(handle).listen((address, 80)).unwrap();
    handle
}

/// Calls, and is answered by the server at `handle`.
fn reach(guest: &mut Guest, at: SocketAddr, handle: SocketHandle) {
    let mut caller = TcpStream::connect(at).unwrap();
    caller.write_all(b"GET").unwrap();
    guest.until(|g| g.tcp(handle).can_recv().then_some(()));
    guest.tcp(handle).send_slice(b"200").unwrap();
    guest.tcp(handle).close();
    guest.until(|g| (g.tcp(handle).state() == State::FinWait2).then_some(()));
    let mut all = String::new();
    caller.read_to_string(&mut all).unwrap();
    assert_eq!(all, "200");
    drop(caller);
    guest.over();
}

#[test]
fn services_on_the_guests_loopback_are_found_and_remembered() {
    let lo = IpAddr::from(Ipv4Addr::LOCALHOST);
    let (mut guest, handles) = inside(&[lo]);
    let (published, at) = guest.net.publish_tcp(ANY, 80, Vec::new()).unwrap();
    reach(&mut guest, at, handles[0]);
    assert_eq!(guest.net.ports.found(published), Some(lo));
    // It has moved.
    let own = IpAddr::from(guest.net.core.config.guest4);
    let moved = listening_at(&mut guest, own);
    guest.sockets.remove(handles[0]);
    reach(&mut guest, at, moved);
    assert_eq!(guest.net.ports.found(published), Some(own));
    let stats = guest.net.stats();
    assert_eq!((stats.unconnected, stats.spoofed, stats.connected, stats.connections), (0, 0, 2, 0));
}

#[test]
fn services_on_ipv6_alone_are_found_once_the_guest_has_an_address() {
    let own = Config::new(Policy::deny_all()).guest6;
    let (mut guest, handles) = inside(&[own.into()]);
    let (published, at) = guest.net.publish_tcp("[::1]:0".parse().unwrap(), 80, Vec::new()).unwrap();
    let mut early = TcpStream::connect(at).unwrap();
    guest.until(|g| (g.net.stats().unconnected == 1).then_some(()));
    assert_eq!(early.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    guest.net.core.guest6 = Some(own);
    reach(&mut guest, at, handles[0]);
    assert_eq!(guest.net.ports.found(published), Some(own.into()));
}

#[test]
fn missing_listener_on_all_addresses_is_one_reset() {
    let (mut guest, _) = inside(&[]);
    guest.net.core.guest6 = Some(guest.net.core.config.guest6);
    let (published, at) = guest.net.publish_tcp(ANY, 80, Vec::new()).unwrap();
    let mut callers: Vec<_> = (0..3).map(|_| TcpStream::connect(at).unwrap()).collect();
    guest.until(|g| (g.net.stats().unconnected == 3).then_some(()));
    for caller in &mut callers {
        assert_eq!(caller.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    guest.faults.lost = 100;
    let late = TcpStream::connect(at).unwrap();
    guest.until(|g| (g.net.stats().connections == 1).then_some(()));
    guest.net.unpublish(published);
    guest.faults.lost = 0;
    guest.until(|g| (g.net.stats().connections == 0).then_some(()));
    drop(late);
    assert_eq!((guest.net.stats().unconnected, guest.net.tcp.inbound_results.len()), (3, 0));
}

#[test]
fn unanswered_syn_ends_in_a_reset() {
    let mut guest = Guest::new();
    guest.faults = Faults { lost: 100, ..Faults::default() };
    let (_, at) = guest.net.publish_tcp(ANY, 80, Vec::new()).unwrap();
    let mut caller = TcpStream::connect(at).unwrap();
    guest.until(|g| (g.net.stats().connections == 1).then_some(()));
    for _ in 0..70 {
        guest.wait(Duration::from_secs(1));
    }
    assert_eq!((guest.net.stats().connections, guest.net.stats().timed_out), (0, 1));
    assert_eq!(caller.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn clients_reach_a_guest_that_remembers_another_connection_of_the_same_ports() {
    let mut guest = Guest::of(Config::new(Policy::deny_all()), Offloads::none());
    let (_, at) = guest.net.publish_tcp(ANY, 80, Vec::new()).unwrap();
    let caller = TcpStream::connect(at).unwrap();
    let segment = |guest: &mut Guest| loop {
        guest.net.poll();
        if let Some((frame, _)) = guest.take() {
            break wire::Tcp::parse(&frame[34..], frame.len() - 34).unwrap();
        }
    };
    let syn = segment(&mut guest);
    assert_eq!(syn.flags, wire::SYN);
    // As in TIME-WAIT (RFC 9293, 3.10.7.4).
    let config = &guest.net.core.config;
    let macs = wire::MacPair { src: config.guest_mac, dst: config.gateway_mac };
    let addrs = wire::AddressPair { src: config.guest4.into(), dst: config.gateway4.into() };
    let (seq, ack) = (99, syn.seq.wrapping_sub(1_000_000));
    let old = wire::Tcp { src: 80, dst: syn.src, seq, ack, flags: wire::ACK, window: 1000, ..wire::Tcp::default() };
    let mut head = wire::FrameBuilder::ip(macs, addrs, wire::TCP, 20);
    head.tcp(&old);
    guest.send(head.as_slice(), Offload { csum: Some(Csum { start: 34, offset: 16 }), gso: None });
    let reset = segment(&mut guest);
    assert_eq!((reset.flags, reset.seq, reset.dst), (wire::RST, ack, 80));
    let handle = listening(&mut guest, 80);
    guest.until(|g| g.tcp(handle).may_send().then_some(()));
    assert_eq!((guest.net.stats().connected, guest.net.stats().unconnected), (1, 0));
    drop(caller);
}

#[test]
fn clients_outside_the_allowed_ranges_are_reset() {
    let mut guest = Guest::new();
    let callers = vec!["192.0.2.0/24".parse::<Cidr>().unwrap()];
    let (_, at) = guest.net.publish_tcp(ANY, 80, callers.clone()).unwrap();
    let mut caller = TcpStream::connect(at).unwrap();
    guest.until(|g| (g.net.stats().denied == 1).then_some(()));
    assert_eq!(caller.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (_, at) = guest.net.publish_udp(ANY, 80, callers).unwrap();
    let (handle, caller) = (guest.udp(80), UdpSocket::bind(ANY).unwrap());
    caller.send_to(b"x", at).unwrap();
    for _ in 0..20 {
        guest.wait(Duration::from_millis(1));
    }
    assert_eq!((guest.came(handle), guest.net.stats().datagram_flows), (None, 0));
}

#[test]
fn ipv6_clients_reach_published_ports() {
    let mut guest = Guest::new();
    let loopback: SocketAddr = "[::1]:0".parse().unwrap();
    let (_, at) = guest.net.publish_tcp(loopback, 80, vec!["::1".parse().unwrap()]).unwrap();
    let handle = listening(&mut guest, 80);
    reach(&mut guest, at, handle);
    let (_, at) = guest.net.publish_udp(loopback, 81, Vec::new()).unwrap();
    let (handle, caller) = (guest.udp(81), UdpSocket::bind(loopback).unwrap());
    caller.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    caller.send_to(b"x", at).unwrap();
    let (_, port) = guest.until(|g| g.came(handle));
    let gateway = guest.net.core.config.gateway4;
    guest.datagram(handle, b"y", (gateway, port).into());
    assert_eq!(caller.recv_from(&mut [0; 9]).unwrap(), (1, at));
}

#[test]
fn datagrams_reach_the_guest_and_are_answered() {
    let mut guest = Guest::new();
    let (published, at) = guest.net.publish_udp(ANY, 80, Vec::new()).unwrap();
    let handle = guest.udp(80);
    let callers: Vec<UdpSocket> = (0..5).map(|_| UdpSocket::bind(ANY).unwrap()).collect();
    for (n, caller) in callers.iter().enumerate() {
        caller.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        caller.send_to(&[n as u8], at).unwrap();
        let (bytes, port) = guest.until(|g| g.came(handle));
        assert_eq!(bytes, [n as u8]);
        let gateway = guest.net.core.config.gateway4;
        guest.datagram(handle, &[n as u8, 1], (gateway, port).into());
        let mut buffer = [0; 10];
        assert_eq!(caller.recv_from(&mut buffer).unwrap(), (2, at));
        assert_eq!(buffer[..2], [n as u8, 1]);
    }
    assert_eq!(guest.net.stats().datagram_flows, 5);
    guest.net.unpublish(published);
    assert_eq!(guest.net.stats().datagram_flows, 0);
}

/// A socket of the guest at this address alone.
fn datagrams_at(guest: &mut Guest, address: IpAddr, port: u16) -> SocketHandle {
    let handle = guest.udp(port);
    let socket = guest.sockets.get_mut::<udp::Socket>(handle);
    socket.close();
    socket.bind((address, port)).unwrap();
    handle
}

/// Introduces the gateway to the guest's system. Without it smoltcp does not report a missing listener.
fn introduce(guest: &mut Guest) {
    let (config, handle) = (guest.net.core.config.clone(), guest.udp(9));
    for gateway in [IpAddr::from(config.gateway4), config.gateway6.into()] {
        guest.datagram(handle, b"x", (gateway, 9).into());
        // It asks for one neighbour a second.
        guest.wait(Duration::from_secs(2));
    }
    guest.sockets.remove(handle);
}

/// Sends to a published port, and is answered.
fn exchange(guest: &mut Guest, at: SocketAddr, handle: SocketHandle) {
    let caller = UdpSocket::bind(ANY).unwrap();
    caller.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    caller.send_to(b"question", at).unwrap();
    let (bytes, from) = guest.until(|g| {
        let socket = g.sockets.get_mut::<udp::Socket>(handle);
        socket.recv().ok().map(|(bytes, from)| (bytes.to_vec(), from))
    });
    assert_eq!(bytes, b"question");
    let socket = guest.sockets.get_mut::<udp::Socket>(handle);
    socket.send_slice(b"answer", from).unwrap();
    guest.pump();
    let mut buffer = [0; 10];
    assert_eq!(caller.recv_from(&mut buffer).unwrap(), (6, at));
    assert_eq!(&buffer[..6], b"answer");
}

#[test]
fn datagrams_find_services_on_any_address_and_remember_it() {
    let (mut guest, _) = inside(&[]);
    introduce(&mut guest);
    let own6 = guest.net.core.config.guest6;
    let (published, at) = guest.net.publish_udp(ANY, 80, Vec::new()).unwrap();
    let own4 = guest.net.core.config.guest4;
    for place in [IpAddr::from(Ipv4Addr::LOCALHOST), own6.into(), own4.into()] {
        let handle = datagrams_at(&mut guest, place, 80);
        // The second caller is led there at once.
        exchange(&mut guest, at, handle);
        let frames = guest.net.stats().sent_frames;
        exchange(&mut guest, at, handle);
        assert_eq!((guest.net.ports.found(published), guest.net.stats().sent_frames), (Some(place), frames + 1));
        guest.sockets.remove(handle);
    }
    let stats = guest.net.stats();
    assert_eq!((stats.unconnected, stats.spoofed, stats.datagram_flows), (0, 0, 6));
}

#[test]
fn unanswered_datagrams_are_counted_and_retried() {
    let (mut guest, _) = inside(&[]);
    introduce(&mut guest);
    let (published, at) = guest.net.publish_udp(ANY, 80, Vec::new()).unwrap();
    let caller = UdpSocket::bind(ANY).unwrap();
    for n in 1..4 {
        caller.send_to(&[0; 300], at).unwrap();
        guest.until(|g| (g.net.stats().unconnected == n).then_some(()));
        assert_eq!((guest.net.ports.found(published), guest.net.stats().datagram_flows), (None, 0));
    }
    let handle = datagrams_at(&mut guest, Ipv4Addr::LOCALHOST.into(), 80);
    exchange(&mut guest, at, handle);
    // The guest does not speak from there, or report a missing listener, without having been asked.
    let gateway = guest.net.core.config.gateway4;
    let addrs = crate::network::wire::AddressPair { src: Ipv4Addr::LOCALHOST.into(), dst: gateway.into() };
    let macs = wire::MacPair { src: guest.net.core.config.guest_mac, dst: guest.net.core.config.gateway_mac };
    let stray = wire::datagram(addrs, wire::UdpPorts { src: 80, dst: 9 }, b"x");
    let head = wire::FrameBuilder::ip(macs, addrs, wire::UDP, stray.len());
    let before = guest.net.stats();
    guest.send(&[head.as_slice(), &stray].concat(), Offload::default());
    let mut message = [&[3, 3, 0, 0, 0, 0, 0, 0][..], head.from(14), &stray].concat();
    let check = !wire::fold(wire::sum(&message));
    message[2..4].copy_from_slice(&check.to_be_bytes());
    let head = wire::FrameBuilder::ip(macs, addrs, wire::ICMP, message.len());
    guest.send(&[head.as_slice(), &message].concat(), Offload::default());
    let after = guest.net.stats();
    assert_eq!((after.spoofed, after.datagram_flows), (before.spoofed + 1, before.datagram_flows));
    assert_eq!((after.malformed, after.received_frames), (before.malformed, before.received_frames));
}

#[test]
fn unavailable_ports_are_reported_with_a_remedy() {
    let mut guest = Guest::new();
    let (_taken, at) = listener();
    let error = guest.net.publish_tcp(at, 80, Vec::new()).unwrap_err();
    assert_eq!(error.kind(), crate::error::ErrorKind::ResourceBusy);
    assert!(error.to_string().contains("port 0 takes any"), "{error}");
    assert!(guest.net.publish_udp(ANY, 0, Vec::new()).is_err());
    let nowhere = "192.0.2.9:80".parse().unwrap();
    assert_eq!(
        guest.net.publish_tcp(nowhere, 80, Vec::new()).unwrap_err().kind(),
        crate::error::ErrorKind::InvalidConfig
    );
}

#[test]
fn clients_evict_no_flow_of_the_guest() {
    let limits = super::super::config::Limits { datagram_flows: 8, ..Default::default() };
    let mut guest = Guest::of(Config { limits, ..Config::new(local()) }, Offloads::all());
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (own, port) = (guest.udp(4000), guest.udp(80));
    guest.datagram(own, b"x", server.local_addr().unwrap());
    let from = server.recv_from(&mut [0; 9]).unwrap().1;
    let (_, at) = guest.net.publish_udp(ANY, 80, Vec::new()).unwrap();
    // A client with as many ports as there are.
    for _ in 0..100 {
        UdpSocket::bind(ANY).unwrap().send_to(b"c", at).unwrap();
        guest.until(|g| g.came(port));
    }
    assert_eq!(guest.net.stats().datagram_flows, 9);
    server.send_to(b"answer", from).unwrap();
    assert_eq!(guest.until(|g| g.came(own)).0, b"answer");
}

#[test]
fn clients_use_none_of_the_guests_connection_limit() {
    let limits = super::super::config::Limits { connections: 3, ..Default::default() };
    let mut guest = Guest::of(Config { limits, ..Config::new(local()) }, Offloads::all());
    let (_listener, to) = listener();
    let (_, at) = guest.net.publish_tcp(ANY, 80, Vec::new()).unwrap();
    for _ in 0..6 {
        listening(&mut guest, 80);
    }
    let callers: Vec<_> = (0..6).map(|_| TcpStream::connect(at).unwrap()).collect();
    guest.until(|g| (g.net.stats().limited == 3).then_some(()));
    assert_eq!(guest.net.stats().connections, 3);
    guest.net.take_calls();
    let own: Vec<_> = (0..3).map(|_| guest.connected(to)).collect();
    // Each is charged for its route and its socket.
    assert!(guest.net.take_calls() >= 3 * 8);
    let late = guest.connect(to);
    guest.wait(Duration::from_secs(1));
    assert!(guest.net.stats().connections == 6 && !guest.tcp(late).may_send());
    // A closed connection makes room for those of its side.
    drop(callers);
    own.into_iter().for_each(|handle| guest.tcp(handle).abort());
    guest.until(|g| {
        g.wait(Duration::from_millis(100));
        g.tcp(late).may_send().then_some(())
    });
}
