//! Connections of the guest: whole, half-closed, reset, refused, over good links and bad ones.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::*;
use smoltcp::socket::tcp::State;

/// Bytes that are nowhere the same.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Sends `data` through an echo on the host, and says what comes back.
fn echoed(guest: &mut Guest, data: &[u8], to: SocketAddr, room: usize) -> Vec<u8> {
    let handle = guest.connect_with(to, room);
    let (mut sent, mut back) = (0, Vec::new());
    guest.until(|g| {
        let socket = g.tcp(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        } else if sent == data.len() && socket.may_send() {
            socket.close();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
        }
        (sent == data.len() && !socket.may_recv()).then_some(())
    });
    back
}

/// An echo that ends when its client does.
fn echo(listener: TcpListener) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut writer) = (vec![0; 100_000], stream.try_clone().unwrap());
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => break,
                n => writer.write_all(&buffer[..n]).unwrap(),
            }
        }
    })
}

fn echo_over(guest: &mut Guest, len: usize, room: usize) {
    let (listener, to) = listener();
    let (echo, data) = (echo(listener), pattern(len));
    assert!(echoed(guest, &data, to, room) == data, "what came back is something else");
    echo.join().unwrap();
    guest.over();
    assert_eq!(guest.net.stats().resets, 0);
}

#[test]
fn a_mebibyte_comes_back_whole() {
    let (mut guest, (listener, to), data) = (Guest::new(), listener(), pattern(1 << 20));
    // All of it and then back, so that there is always enough for large frames.
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
    });
    assert!(echoed(&mut guest, &data, to, 256 << 10) == data, "what came back is something else");
    server.join().unwrap();
    guest.over();
    assert_eq!(guest.net.stats().resets, 0);
    assert!(guest.largest > 20_000, "the largest frame had {} bytes", guest.largest);
    assert_eq!(guest.net.stats().retransmitted, 0);
}

#[test]
fn transfer_works_without_offloads() {
    let mut guest = Guest::of(Config::new(local()), Offloads::none());
    echo_over(&mut guest, 300_000, 64 << 10);
    assert_eq!((guest.largest, guest.net.stats().bad_checksums), (1514, 0));
}

#[test]
fn transfer_works_without_so_peek_off() {
    let mut guest = Guest::new();
    guest.net.tcp.without_peek_off = true;
    echo_over(&mut guest, 1 << 20, 256 << 10);
}

#[test]
fn transfer_works_with_any_mtu() {
    for mtu in [576, 1280, 9000, 65535] {
        for agreed in [Offloads::none(), Offloads::all()] {
            let mut guest = Guest::of(Config { mtu, ..Config::new(local()) }, agreed);
            echo_over(&mut guest, 200_000, 128 << 10);
            assert!(agreed != Offloads::none() || guest.largest <= usize::from(mtu) + 14);
        }
    }
}

#[test]
fn transfer_works_over_ipv6() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else { return crate::sys::skip("the host has no IPv6") };
    let (to, data, mut guest) = (listener.local_addr().unwrap(), pattern(300_000), Guest::new());
    let echo = echo(listener);
    assert!(echoed(&mut guest, &data, (ALIAS, to.port()).into(), 64 << 10) == data);
    echo.join().unwrap();
}

#[test]
fn lossy_link_loses_no_data() {
    for seed in 1..4 {
        for without_peek_off in [false, true] {
            let mut guest = Guest::of(Config::new(local()), Offloads::CSUM);
            guest.net.tcp.without_peek_off = without_peek_off;
            guest.faults = Faults { lost: 5, twice: 5, late: 5, seed };
            let (listener, to) = listener();
            let (echo, data) = (echo(listener), pattern(200_000));
            let handle = guest.connect(to);
            let (mut sent, mut back) = (0, Vec::new());
            let end = Instant::now() + Duration::from_secs(60);
            while back.len() < data.len() {
                assert!(Instant::now() < end, "{} of {}: {:?}", back.len(), data.len(), guest.net.stats());
                // Time-outs pass at once where nothing else happens.
                guest.wait(Duration::from_millis(50));
                let socket = guest.tcp(handle);
                if socket.can_send() && sent < data.len() {
                    sent += socket.send_slice(&data[sent..]).unwrap();
                }
                while socket.can_recv() {
                    socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
                }
            }
            assert!(back == data, "what came back is something else");
            assert!(guest.net.stats().retransmitted > 0);
            guest.tcp(handle).close();
            guest.over();
            echo.join().unwrap();
        }
    }
}

/// A connection and its host's end.
fn pair(guest: &mut Guest) -> (SocketHandle, TcpStream) {
    let (listener, to) = listener();
    let handle = guest.connected(to);
    let (stream, _) = listener.accept().unwrap();
    (handle, stream)
}

#[test]
fn the_guest_closes_one_half() {
    let mut guest = Guest::new();
    let (handle, mut stream) = pair(&mut guest);
    guest.tcp(handle).send_slice(b"question").unwrap();
    guest.tcp(handle).close();
    guest.until(|g| (g.tcp(handle).state() == State::FinWait2).then_some(()));
    let mut question = String::new();
    stream.read_to_string(&mut question).unwrap();
    assert_eq!(question, "question");
    stream.write_all(b"answer").unwrap();
    guest.until(|g| g.tcp(handle).can_recv().then_some(()));
    let mut answer = [0; 9];
    assert_eq!(guest.tcp(handle).recv_slice(&mut answer), Ok(6));
    drop(stream);
    guest.until(|g| (g.tcp(handle).state() == State::TimeWait).then_some(()));
}

#[test]
fn the_host_closes_one_half() {
    let mut guest = Guest::new();
    let (handle, mut stream) = pair(&mut guest);
    stream.write_all(b"all there is").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.until(|g| (g.tcp(handle).state() == State::CloseWait).then_some(()));
    let mut all = [0; 20];
    assert_eq!(guest.tcp(handle).recv_slice(&mut all), Ok(12));
    guest.tcp(handle).send_slice(b"thanks").unwrap();
    guest.tcp(handle).close();
    guest.until(|g| (g.tcp(handle).state() == State::Closed).then_some(()));
    let mut thanks = String::new();
    stream.read_to_string(&mut thanks).unwrap();
    assert_eq!(thanks, "thanks");
    assert_eq!(guest.net.stats().resets, 0);
}

#[test]
fn a_reset_by_the_guest_is_one_on_the_host() {
    let mut guest = Guest::new();
    let (handle, mut stream) = pair(&mut guest);
    guest.tcp(handle).abort();
    guest.until(|g| (g.net.stats().connections == 0).then_some(()));
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_reset_by_the_host_is_one_for_the_guest() {
    let mut guest = Guest::new();
    let (handle, stream) = pair(&mut guest);
    let socket = crate::sys::Socket::new(stream);
    socket.reset_on_close().unwrap();
    drop(socket);
    guest.until(|g| (g.tcp(handle).state() == State::Closed).then_some(()));
    assert_eq!((guest.net.stats().connections, guest.net.stats().resets), (0, 1));
}

#[test]
fn closed_port_is_refused() {
    let (listener, to) = listener();
    drop(listener);
    let mut guest = Guest::new();
    let handle = guest.connect(to);
    guest.until(|g| (g.tcp(handle).state() == State::Closed).then_some(()));
    assert_eq!((guest.net.stats().unconnected, guest.net.stats().connections), (1, 0));
}

#[test]
fn denied_destination_is_reset_without_a_connect() {
    let mut guest = Guest::of(Config::new(Policy::internet()), Offloads::all());
    let (listener, to) = listener();
    for to in [to, "169.254.169.254:80".parse().unwrap(), "10.1.2.3:80".parse().unwrap()] {
        let handle = guest.connect(to);
        guest.until(|g| (g.tcp(handle).state() == State::Closed).then_some(()));
    }
    assert_eq!((guest.net.core.host.made, guest.net.stats().denied), (0, 3));
    assert!(!readable(&listener));
}

#[test]
fn a_changed_policy_resets_what_it_denies() {
    let mut guest = Guest::new();
    let (handle, mut stream) = pair(&mut guest);
    guest.net.set_policy(Policy::deny_all()).unwrap();
    guest.until(|g| (g.tcp(handle).state() == State::Closed).then_some(()));
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn syn_ack_is_sent_after_the_host_has_connected() {
    // This queue is never emptied, so that the connection hangs when it is full.
    let (listener, to) = listener();
    let mut guest = Guest::new();
    let handle = guest.connect(to);
    guest.until(|g| g.tcp(handle).may_send().then_some(()));
    let (accepted, _) = listener.accept().unwrap();
    assert_eq!(accepted.local_addr().unwrap().ip(), Ipv4Addr::LOCALHOST);
}
