//! UDP of the guest, and what becomes of it.

use std::net::UdpSocket;
use std::time::Duration;

use super::*;
use crate::network::wire::{AddressPair, Fragment, FrameBuilder};
use crate::network::{Gso, GsoKind};

fn server() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let at = socket.local_addr().unwrap();
    (socket, at)
}

#[test]
fn datagrams_come_back_whole() {
    for agreed in [Offloads::none(), Offloads::all()] {
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
    let addrs = AddressPair { src: config.guest4.into(), dst: to.ip() };
    let mut head =
        FrameBuilder::ip(wire::MacPair { src: config.guest_mac, dst: config.gateway_mac }, addrs, wire::UDP, 8 + 2500);
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
fn closed_ports_and_denied_peers_are_reported_at_once() {
    let mut guest = Guest::new();
    let (server, to) = server();
    drop(server);
    let handle = guest.udp(5000);
    let told = |guest: &mut Guest, code: u8| {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            guest.net.poll();
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
fn idle_udp_flows_expire_and_are_bounded() {
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
fn datagrams_from_other_peers_are_dropped() {
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
fn datagrams_beyond_the_mtu_are_fragmented_both_ways() {
    for agreed in [Offloads::none(), Offloads::all()] {
        let mut guest = Guest::of(Config::new(local()), agreed);
        // smoltcp leaves a checksum that it is set to leave out of the first fragment as well.
        guest.card.lazy = false;
        let ((server, to), handle) = (server(), guest.udp(5000));
        for len in [1472, 1473, 3000, 20_000, 40_000] {
            let data: Vec<u8> = (0..len).map(|n| (n % 251) as u8).collect();
            guest.datagram(handle, &data, to);
            let mut buffer = vec![0; 65_536];
            let (n, from) = server.recv_from(&mut buffer).unwrap();
            assert!(buffer[..n] == data, "{len} bytes from the guest: {n}");
            server.send_to(&data, from).unwrap();
            let (back, port) = guest.until(|g| g.came(handle));
            assert!(back == data && port == to.port(), "{len} bytes to the guest: {}", back.len());
        }
        let stats = guest.net.stats();
        assert_eq!((stats.fragments, stats.too_large, stats.datagram_flows), (0, 0, 1));
        assert!(guest.largest <= 1514);
    }
}

/// The fragments of a datagram of the guest's over IPv6, to the host's `::1`.
fn fragments6(guest: &Guest, port: u16, payload: &[u8]) -> Vec<Vec<u8>> {
    let config = &guest.net.core.config;
    let addrs = AddressPair { src: config.guest6.into(), dst: Ipv6Addr::LOCALHOST.into() };
    let whole = wire::datagram(addrs, wire::UdpPorts { src: 5000, dst: port }, payload);
    let count = whole.chunks(1000).count();
    let fragment = |(n, part): (usize, &[u8])| {
        let fragment = Fragment { id: 7, offset: n * 1000, more: n + 1 < count };
        let head = FrameBuilder::fragment(
            wire::MacPair { src: config.guest_mac, dst: config.gateway_mac },
            addrs,
            wire::UDP,
            part.len(),
            fragment,
        );
        [head.as_slice(), part].concat()
    };
    whole.chunks(1000).enumerate().map(fragment).collect()
}

#[test]
fn fragments_of_ipv6_are_put_together_and_made_in_any_order() {
    let mut guest = Guest::new();
    let server = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let data: Vec<u8> = (0..2500).map(|n| (n % 251) as u8).collect();
    for frame in fragments6(&guest, server.local_addr().unwrap().port(), &data).into_iter().rev() {
        guest.send(&frame, Offload::default());
    }
    let mut buffer = [0; 3000];
    let (n, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..n], data);
    server.send_to(&data, from).unwrap();
    let (mut came, end) = (Vec::new(), Instant::now() + Duration::from_secs(10));
    while came.len() < 2 {
        guest.net.poll();
        let some = guest.net.next_len().is_some();
        came.extend(some.then(|| guest.take()).flatten().map(|(frame, _)| frame).filter(|frame| frame[20] == 44));
        assert!(Instant::now() < end, "no fragments come");
    }
    let inner: Vec<u8> = came.iter().flat_map(|frame| &frame[62..]).copied().collect();
    assert_eq!(inner[8..], data);
    let id = |frame: &[u8]| frame[58..62].to_vec();
    assert_eq!(id(&came[0]), id(&came[1]));
}

#[test]
fn fragments_that_never_become_whole_are_forgotten_and_counted() {
    let mut guest = Guest::new();
    let frames = fragments6(&guest, 9, &[0; 2500]);
    guest.send(&frames[0], Offload::default());
    guest.wait(Duration::from_secs(29));
    assert_eq!(guest.net.stats().fragments, 0);
    guest.wait(Duration::from_secs(2));
    assert_eq!(guest.net.stats().fragments, 1);
    // The others come too late.
    frames[1..].iter().for_each(|frame| guest.send(frame, Offload::default()));
    assert_eq!(guest.net.core.host.made, 0);
    // And in another's name they are nothing.
    let mut foreign = frames[0].clone();
    foreign[22] ^= 1;
    guest.send(&foreign, Offload::default());
    assert_eq!(guest.net.stats().spoofed, 1);
}

#[test]
fn large_pings_of_the_gateway_are_answered_in_fragments() {
    let mut guest = Guest::new();
    let config = guest.net.core.config.clone();
    let addrs = AddressPair { src: config.guest4.into(), dst: config.gateway4.into() };
    let mut message = vec![8, 0, 0, 0, 0, 1, 0, 1];
    message.resize(4000, 5);
    let check = !wire::fold(wire::sum(&message));
    message[2..4].copy_from_slice(&check.to_be_bytes());
    for (n, part) in message.chunks(1480).enumerate() {
        let fragment = Fragment { id: 9, offset: n * 1480, more: n < 2 };
        let head = FrameBuilder::fragment(
            wire::MacPair { src: config.guest_mac, dst: config.gateway_mac },
            addrs,
            wire::ICMP,
            part.len(),
            fragment,
        );
        guest.send(&[head.as_slice(), part].concat(), Offload::default());
    }
    let answers: Vec<_> = std::iter::from_fn(|| guest.take()).map(|(frame, _)| frame).collect();
    assert_eq!(answers.iter().map(|frame| frame.len() - 34).sum::<usize>(), 4000);
    assert_eq!(answers[0][34], 0);
    assert_eq!(wire::fold(answers.iter().map(|frame| wire::sum(&frame[34..])).sum()), 0xffff);
}

#[test]
fn the_flow_that_was_idle_for_longest_makes_room() {
    let limits = Limits { datagram_flows: 4, ..Limits::default() };
    let mut guest = Guest::of(Config { limits, ..Config::new(local()) }, Offloads::all());
    let handle = guest.udp(4000);
    let servers: Vec<_> = (0..5).map(|_| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
    let mut flow = |n: usize| {
        guest.wait(Duration::from_millis(10));
        guest.datagram(handle, b"x", servers[n].local_addr().unwrap());
        servers[n].set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        servers[n].recv_from(&mut [0; 9]).unwrap().1
    };
    let mut first: Vec<_> = (0..4).map(&mut flow).collect();
    // 2 is the oldest now, then 3; and with those again, 0.
    assert_eq!([0, 1].map(&mut flow), first[..2]);
    first.push(flow(4));
    assert_eq!([3, 1, 4].map(&mut flow), [3, 1, 4].map(|n: usize| first[n]));
    assert_ne!(flow(2), first[2]);
    assert_eq!([3, 1, 4].map(&mut flow), [3, 1, 4].map(|n: usize| first[n]));
    assert_eq!(guest.net.stats().datagram_flows, 4);
}

/// Apart, as a guest is large and the stack of a test is not.
fn opens_a_connection_to_the_resolver() -> bool {
    let mut guest = Guest::of(Config::new(local()), Offloads::all());
    guest.net.clients.open(&mut guest.net.core).is_ok()
}

#[test]
fn a_guest_leaves_descriptors_to_its_embedder() {
    const CHILD: &str = "COFFERDAM_TEST_DESCRIPTORS";
    if std::env::var_os(CHILD).is_none() {
        // With as many as most systems give, in a process of its own.
        let this = std::env::current_exe().unwrap();
        let name = "network::user::tests::datagrams::a_guest_leaves_descriptors_to_its_embedder";
        let mut child = std::process::Command::new("sh");
        child.args(["-c", "ulimit -n 1024 && exec \"$0\" --exact \"$1\""]).arg(this).arg(name).env(CHILD, "1");
        let child = child.output().unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains(" 1 passed"), "{said}");
        return;
    }
    let limits = Limits { datagram_flows: 4096, ..Limits::default() };
    let [mut guest, mut other] =
        [(); 2].map(|()| Guest::of(Config { limits, ..Config::new(local()) }, Offloads::all()));
    let handle = guest.udp(4000);
    let take_all = |guest: &mut Guest, handle| {
        for port in 1..1400 {
            guest.datagram(handle, b"x", (Ipv4Addr::LOCALHOST, port).into());
            while guest.came(handle).is_some() {}
        }
        guest.net.stats()
    };
    // Of the 768 that guests may have, half; and others have the rest.
    let stats = take_all(&mut guest, handle);
    assert!(stats.datagram_flows == 384 && stats.limited > 500, "{stats:?}");
    let its = other.udp(4000);
    let others = take_all(&mut other, its);
    assert!((200..384).contains(&others.datagram_flows) && others.limited > 500, "{others:?}");
    assert!(!opens_a_connection_to_the_resolver(), "that would be the embedder's");
    drop(other);
    let files: Vec<_> = (0..250).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
    drop(files);
    let told: Vec<_> = guest.net.take_denials().map(|denial| denial.reason).collect();
    assert!((1..10).contains(&told.len()) && told[0] == crate::network::policy::DenyReason::Descriptors, "{told:?}");
    // What a guest's builder says is for all that it has, and comes back with a network that is gone.
    let share = crate::sys::DescriptorShare::new(Some(32), true);
    let part = |share: &crate::sys::DescriptorShare| {
        let config = Config { limits, descriptors: share.clone(), ..Config::new(local()) };
        let mut guest = Guest::of(config, Offloads::all());
        let handle = guest.udp(4000);
        (take_all(&mut guest, handle).datagram_flows, guest)
    };
    let (flows, mut its) = part(&share);
    assert_eq!(flows, 28, "an eighth is left to vsock");
    assert!(share.vsock(4).is_some() && share.vsock(5).is_none());
    assert_eq!(part(&share).0, 0, "a second card has no more");
    // What a new policy closes is the guest's again at once.
    its.net.set_policy(Policy::deny_all()).unwrap();
    assert!(share.vsock(32).is_some());
    drop(its);
    assert_eq!(part(&share).0, 28);
    // An embedder that needs fewer for itself says so.
    drop(told);
    crate::sys::set_descriptor_reserve(10);
    guest.datagram(handle, b"x", (Ipv4Addr::LOCALHOST, 2000).into());
    assert_eq!(guest.net.stats().datagram_flows, stats.datagram_flows + 1);
}

#[test]
fn connection_from_a_link_local_address_is_refused_at_once() {
    use crate::network::wire::{self, AddressPair, FrameBuilder};
    let mut guest = Guest::new();
    let config = guest.net.core.config.clone();
    let src: std::net::Ipv6Addr = "fe80::1234".parse().unwrap();
    let call = |guest: &mut Guest, dst: &str| {
        let addrs = AddressPair { src: src.into(), dst: dst.parse().unwrap() };
        let mut head =
            FrameBuilder::ip(wire::MacPair { src: config.guest_mac, dst: config.gateway_mac }, addrs, wire::UDP, 8);
        head.udp(4000, 7, 0);
        let check = wire::udp_check(wire::pseudo(addrs.src, addrs.dst, wire::UDP, 8) + wire::sum(head.from(54)));
        head.set16(60, check);
        guest.send(head.as_slice(), Offload::default());
        std::iter::from_fn(|| guest.take()).map(|(frame, _)| frame).collect::<Vec<_>>()
    };
    let answers = call(&mut guest, "2606:4700::7");
    assert_eq!((answers.len(), &answers[0][54..56]), (1, &[1, 2][..]));
    assert_eq!(answers[0][38..54], src.octets());
    for near in ["fe80::1", "ff02::1"] {
        assert!(call(&mut guest, near).is_empty(), "{near}");
    }
    assert_eq!(guest.net.core.host.made, 0);
}
