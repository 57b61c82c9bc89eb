//! Many connections, slow ones, idle ones, and too many.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::*;
use crate::network::ConnectionLimit;
use smoltcp::socket::tcp::State;

#[test]
fn slow_host_reader_keeps_memory_bounded() {
    let mut guest = Guest::new();
    let (listener, to) = listener();
    let handle = guest.connected(to);
    let (mut stream, _) = listener.accept().unwrap();
    let (mut sent, block) = (0usize, vec![7; 16 << 10]);
    // More than the host's sockets take, without a reader.
    for _ in 0..3000 {
        if guest.tcp(handle).can_send() {
            sent += guest.tcp(handle).send_slice(&block).unwrap();
        }
        guest.pump();
    }
    let stuck = guest.net.stats().backlog;
    assert!(stuck > 0 && stuck <= 512 << 10, "{stuck}");
    let before = sent;
    for _ in 0..50 {
        guest.wait(Duration::from_millis(200));
        if guest.tcp(handle).can_send() {
            sent += guest.tcp(handle).send_slice(&block).unwrap();
        }
    }
    assert!(sent < before + (128 << 10), "{sent} {before}");
    guest.tcp(handle).close();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    guest.until(|g| {
        (g.tcp(handle).state() == State::FinWait2 || g.tcp(handle).state() == State::TimeWait).then_some(())
    });
    guest.until(|g| (g.net.stats().backlog == 0).then_some(()));
    assert_eq!(reader.join().unwrap().len(), sent);
}

#[test]
fn slow_guest_reader_stops_the_host() {
    let mut guest = Guest::new();
    let (listener, to) = listener();
    let handle = guest.connected(to);
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    let (block, mut sent) = (vec![7; 64 << 10], 0usize);
    let mut quiet = 0;
    while quiet < 50 {
        match stream.write(&block) {
            Ok(n) => (sent, quiet) = (sent + n, 0),
            Err(_) => quiet += 1,
        }
        guest.wait(Duration::from_millis(20));
    }
    assert_eq!(guest.net.stats().backlog, 0);
    // A closed window is asked again and again, without an end.
    guest.wait(Duration::from_secs(120));
    drop(stream);
    let mut got = 0;
    guest.until(|g| {
        let socket = g.tcp(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), got += bytes.len())).unwrap();
        }
        (socket.state() == State::CloseWait && !socket.can_recv()).then_some(())
    });
    assert_eq!(got, sent);
}

#[test]
fn a_thousand_connections_are_open_at_once() {
    let mut guest = Guest::new();
    let (listener, to) = listener();
    let mut all: Vec<(SocketHandle, TcpStream)> = Vec::new();
    for _ in 0..1000 {
        let handle = guest.connect_with(to, 2048);
        guest.until(|g| g.tcp(handle).may_send().then_some(()));
        all.push((handle, listener.accept().unwrap().0));
    }
    assert_eq!(guest.net.stats().connections, 1000);
    for (n, (handle, stream)) in all.iter_mut().enumerate().step_by(37) {
        stream.write_all(&n.to_le_bytes()).unwrap();
        guest.until(|g| g.tcp(*handle).can_recv().then_some(()));
        let mut back = [0; 8];
        guest.tcp(*handle).recv_slice(&mut back).unwrap();
        assert_eq!(usize::from_le_bytes(back), n);
    }
    all.clear();
    guest.until(|g| {
        (g.sockets.iter().all(|(_, s)| matches!(s, smoltcp::socket::Socket::Tcp(s) if s.state() == State::CloseWait)))
            .then_some(())
    });
}

#[test]
fn short_connections_leak_nothing() {
    let mut guest = Guest::new();
    let (listener, to) = listener();
    for n in 0..20_000u32 {
        let handle = guest.connect_with(to, 512);
        guest.until(|g| g.tcp(handle).may_send().then_some(()));
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&n.to_le_bytes()).unwrap();
        guest.until(|g| g.tcp(handle).can_recv().then_some(()));
        if n % 2 == 0 {
            drop(stream);
            guest.tcp(handle).close();
            guest.pump();
        } else {
            guest.tcp(handle).abort();
            guest.pump();
        }
        guest.sockets.remove(handle);
        if n % 512 == 0 {
            guest.wait(Duration::from_secs(700));
        }
    }
    guest.wait(Duration::from_secs(700));
    guest.wait(Duration::from_secs(700));
    let stats = guest.net.stats();
    assert_eq!((stats.connections, stats.connected, stats.overflowed, stats.backlog), (0, 20_000, 0, 0));
}

#[test]
fn idle_connections_end_and_half_open_ones_sooner() {
    let mut guest = Guest::new();
    let (listener, to) = listener();
    let handle = guest.connected(to);
    let (mut stream, _) = listener.accept().unwrap();
    guest.wait(Duration::from_secs(7000));
    assert_eq!(guest.net.stats().connections, 1);
    stream.write_all(b"still there").unwrap();
    guest.until(|g| g.tcp(handle).can_recv().then_some(()));
    guest.wait(Duration::from_secs(1));
    guest.wait(Duration::from_secs(7000));
    assert_eq!(guest.net.stats().connections, 1);
    guest.wait(Duration::from_secs(1000));
    assert_eq!((guest.net.stats().connections, guest.net.stats().timed_out), (0, 1));
    assert_eq!(guest.tcp(handle).state(), State::Closed);
    assert!(stream.read(&mut [0; 20]).is_err());
}

#[test]
fn vanished_guest_connections_time_out() {
    let mut guest = Guest::new();
    let (listener, to) = listener();
    let handle = guest.connected(to);
    let (mut stream, _) = listener.accept().unwrap();
    guest.sockets.remove(handle);
    guest.faults = Faults { lost: 100, ..Faults::default() };
    stream.write_all(b"anybody?").unwrap();
    for _ in 0..400 {
        guest.wait(Duration::from_secs(1));
    }
    assert_eq!((guest.net.stats().connections, guest.net.stats().timed_out), (0, 1));
}

#[test]
fn connections_are_limited() {
    let limits = Limits { connections: 3, ..Limits::default() };
    let mut guest = Guest::of(Config { limits, ..Config::new(local()) }, Offloads::all());
    let (listener, to) = listener();
    let first = guest.connected(to);
    let _streams: Vec<_> = (0..2).map(|_| guest.connected(to)).map(|_| listener.accept().unwrap()).collect();
    let late = guest.connect(to);
    guest.wait(Duration::from_secs(1));
    assert!(guest.net.stats().connections == 3 && guest.net.stats().limited > 0);
    guest.tcp(first).abort();
    guest.until(|g| {
        g.wait(Duration::from_millis(100));
        g.tcp(late).may_send().then_some(())
    });
}

#[test]
fn limits_change_and_connections_stay() {
    let mut guest = Guest::new();
    let (_listener, to) = listener();
    let [first, second] = [(); 2].map(|()| guest.connected(to));
    guest.net.set_connection_limit(ConnectionLimit::new().open(1));
    let late = guest.connect(to);
    guest.wait(Duration::from_secs(1));
    assert!(guest.net.stats().connections == 2 && !guest.tcp(late).may_send());
    assert!(guest.tcp(first).may_send() && guest.tcp(second).may_send());
    guest.net.set_connection_limit(ConnectionLimit::new().new_connections(crate::rate::Rate::per_second(5)));
    guest.until(|g| {
        g.wait(Duration::from_millis(200));
        g.tcp(late).may_send().then_some(())
    });
    assert_eq!(guest.net.stats().connections, 3);
}

#[test]
fn new_connections_come_no_faster_than_allowed() {
    let limits = Limits { new_connections: Some(crate::rate::Rate::per_second(10)), ..Limits::default() };
    let mut guest = Guest::of(Config { limits, ..Config::new(local()) }, Offloads::all());
    let (_listener, to) = listener();
    let all: Vec<_> = (0..30).map(|_| guest.connect_with(to, 512)).collect();
    guest.wait(Duration::from_millis(10));
    let made = |guest: &mut Guest| all.iter().filter(|h| guest.tcp(**h).may_send()).count();
    let at_once = made(&mut guest);
    assert!((9..=14).contains(&at_once), "{at_once}");
    for _ in 0..60 {
        guest.wait(Duration::from_secs(1));
    }
    assert_eq!(made(&mut guest), 30);
}
