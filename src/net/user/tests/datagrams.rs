//! UDP of the guest, and what becomes of it.

use std::net::UdpSocket;
use std::time::Duration;

use super::*;
use crate::net::wire::{Ends, Head};
use crate::net::{Gso, GsoKind};

fn server() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let at = socket.local_addr().unwrap();
    (socket, at)
}

#[test]
fn datagrams_come_back_whole() {
    for agreed in [Offloads::empty(), Offloads::all()] {
        let mut guest = Guest::of(Config::new(local()), agreed);
        let ((server, to), handle) = (server(), guest.udp(5000));
        for len in [0, 1, 100, 1472] {
            let data: Vec<u8> = (0..len).map(|n| n as u8).collect();
            guest.datagram(handle, &data, to);
            let mut buffer = [0; 2000];
            let (n, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..n], data);
            server.send_to(&buffer[..n], from).unwrap();
            assert_eq!(guest.until(|g| g.came(handle)), (data, to.port()));
        }
        assert_eq!((guest.net.stats().datagram_flows, guest.net.core.host.made), (1, 1));
    }
}

#[test]
fn datagrams_that_stand_for_many_are_cut() {
    let mut guest = Guest::new();
    let config = guest.net.core.config.clone();
    let (server, to) = server();
    let ends = Ends { src: config.guest4.into(), dst: to.ip() };
    let mut head = Head::ip((config.guest_mac, config.gateway_mac), ends, wire::UDP, 8 + 2500);
    head.udp(7, to.port(), 2500);
    let mut frame = head.as_slice().to_vec();
    frame.extend((0..2500u32).map(|n| n as u8));
    let gso = Gso { kind: GsoKind::Udp, size: 1000, header_len: 42 };
    guest.send(&frame, Offload { csum: Some(Csum { start: 34, offset: 6 }), gso: Some(gso) });
    let mut buffer = [0; 2000];
    let sizes: Vec<_> = (0..3).map(|_| server.recv_from(&mut buffer).unwrap().0).collect();
    assert_eq!(sizes, [1000, 1000, 500]);
    assert_eq!(buffer[0], 2000u32 as u8);
}

#[test]
fn nobody_there_and_the_forbidden_are_told_at_once() {
    let mut guest = Guest::new();
    let (server, to) = server();
    drop(server);
    let handle = guest.udp(5000);
    let told = |guest: &mut Guest, code: u8| {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            guest.net.turn();
            match guest.take() {
                Some((frame, _)) if frame[23] == 1 => return assert_eq!(frame[34..36], [3, code]),
                _ => assert!(Instant::now() < end, "nobody tells the guest"),
            }
        }
    };
    guest.pump();
    let send = |guest: &mut Guest, to: SocketAddr| {
        guest.sockets.get_mut::<udp::Socket>(handle).send_slice(b"x", to).unwrap();
        for _ in 0..3 {
            let now = guest.now();
            guest.iface.poll(now, &mut guest.card, &mut guest.sockets);
            for frame in std::mem::take(&mut guest.card.from_guest) {
                let offload = guest.offload(&frame);
                guest.send(&frame, offload);
            }
            while let Some(frame) = guest.net.core.waiting().filter(|n| *n == 42).and_then(|_| guest.take()) {
                guest.card.to_guest.push_back(frame.0);
            }
        }
    };
    send(&mut guest, to);
    told(&mut guest, 3);
    send(&mut guest, "10.1.1.1:7".parse().unwrap());
    told(&mut guest, 13);
    assert_eq!((guest.net.stats().denied, guest.net.core.host.made), (1, 1));
}

#[test]
fn idle_flows_are_forgotten_and_there_are_never_too_many() {
    let limits = Limits { datagram_flows: 8, ..Limits::default() };
    let mut guest = Guest::of(Config { limits, ..Config::new(local()) }, Offloads::all());
    let (server, to) = server();
    for port in 5000..5100 {
        let handle = guest.udp(port);
        guest.datagram(handle, b"x", to);
        guest.sockets.remove(handle);
    }
    assert_eq!(guest.net.stats().datagram_flows, 8);
    // The last is still there.
    let mut buffer = [0; 10];
    let from = (0..100).map(|_| server.recv_from(&mut buffer).unwrap().1).last().unwrap();
    let handle = guest.udp(5099);
    server.send_to(b"y", from).unwrap();
    guest.until(|g| g.came(handle));
    guest.wait(Duration::from_secs(170));
    guest.datagram(handle, b"z", to);
    guest.wait(Duration::from_secs(170));
    assert_eq!(guest.net.stats().datagram_flows, 1);
    guest.wait(Duration::from_secs(200));
    assert_eq!(guest.net.stats().datagram_flows, 0);
}

#[test]
fn only_who_was_asked_is_heard() {
    let mut guest = Guest::new();
    let ((server, to), (stranger, _), handle) = (server(), server(), guest.udp(5000));
    guest.datagram(handle, b"x", to);
    let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
    stranger.send_to(b"bad", from).unwrap();
    server.send_to(b"good", from).unwrap();
    assert_eq!(guest.until(|g| g.came(handle)).0, b"good");
    assert_eq!(guest.came(handle), None);
}

#[test]
fn what_is_larger_than_the_guest_takes_is_dropped_and_counted() {
    let mut guest = Guest::new();
    let ((server, to), handle) = (server(), guest.udp(5000));
    guest.datagram(handle, b"x", to);
    let (_, from) = server.recv_from(&mut [0; 10]).unwrap();
    server.send_to(&[1; 1473], from).unwrap();
    server.send_to(&[2; 1472], from).unwrap();
    assert_eq!(guest.until(|g| g.came(handle)).0, [2; 1472]);
    assert_eq!(guest.net.stats().too_large, 1);
}
