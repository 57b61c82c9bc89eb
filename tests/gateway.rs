//! The gateway's example against callers who send anything, or nothing. With guests it is tested in `tests/kvm/gateway.rs`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's")]

#[path = "../examples/gateway/main.rs"]
#[allow(dead_code, reason = "the program's own arguments")]
mod gateway;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use gateway::guests::Guests;
use gateway::head::{Found, Kind, MAX_HEAD};
use gateway::serve::{self, Limits};
use proptest::prelude::*;

fn name(text: &str) -> Found {
    Found::Name(text.into())
}

fn request(host: &str) -> Vec<u8> {
    format!("GET /a HTTP/1.1\r\nAccept: */*\r\n{host}\r\n\r\nbody").into_bytes()
}

/// Records of a ClientHello with these extensions, so many bytes each.
fn hello(extensions: &[(u16, Vec<u8>)], piece: usize) -> Vec<u8> {
    let vector = |width: usize, bytes: &[u8]| [&bytes.len().to_be_bytes()[8 - width..], bytes].concat();
    let extensions: Vec<u8> =
        extensions.iter().flat_map(|(kind, bytes)| [kind.to_be_bytes().to_vec(), vector(2, bytes)].concat()).collect();
    let parts =
        [vec![3, 3], vec![7; 32], vector(1, &[9; 32]), vector(2, &[19, 1]), vector(1, &[0]), vector(2, &extensions)];
    let message = [vec![1], vector(3, &parts.concat())].concat();
    message.chunks(piece).flat_map(|piece| [vec![22, 3, 1], vector(2, piece)].concat()).collect()
}

fn server_name(text: &str) -> (u16, Vec<u8>) {
    let len = text.len() as u16;
    (0, [&(len + 3).to_be_bytes()[..], &[0], &len.to_be_bytes(), text.as_bytes()].concat())
}

#[test]
fn http_host_header_is_found() {
    for (host, found) in [
        ("Host: Alice.Example.test", name("alice.example.test")),
        ("hOST:alice.example.test:8080", name("alice.example.test")),
        ("Host: alice.example.test.", name("alice.example.test")),
        ("X: y", Found::Unnamed),
        ("Host: a\r\nHost: b", Found::Bad),
        ("Host: ", Found::Bad),
        ("Host: a..b", Found::Bad),
        ("Host: a/b", Found::Bad),
        ("Host: a:b", Found::Bad),
        ("Host: [::1]:80", Found::Bad),
        ("Host: a\0b", Found::Bad),
    ] {
        assert_eq!(Kind::Http.find(&request(host)), found, "{host:?}");
    }
    assert_eq!(Kind::Http.find(b"GET http://evil/ HTTP/1.1\r\nHost: a\r\n\r\n"), Found::Bad);
    assert_eq!(Kind::Http.find(b"\x80\x80 nonsense"), Found::Bad);
}

#[test]
fn tls_server_name_is_found_in_any_record_split() {
    let extensions = [(10, vec![0, 2, 0, 29]), server_name("Alice.example.test"), (43, vec![2, 3, 4])];
    for piece in [1, 3, 50, 16384] {
        assert_eq!(Kind::of(22).find(&hello(&extensions, piece)), name("alice.example.test"), "{piece}");
    }
    assert_eq!(Kind::Tls.find(&hello(&extensions[..1], 100)), Found::Unnamed);
    let twice = [server_name("a"), server_name("b")];
    assert_eq!(Kind::Tls.find(&hello(&twice, 100)), Found::Bad);
    assert_eq!(Kind::Tls.find(&hello(&[server_name("a b")], 100)), Found::Bad);
    assert_eq!(Kind::Tls.find(&hello(&[(0, vec![0, 9, 0])], 100)), Found::Bad);
    assert_eq!(Kind::Tls.find(&[22, 3, 1, 0, 5, 2, 0, 0, 1, 0]), Found::Bad, "a ServerHello");
    assert_eq!(Kind::Tls.find(&[22, 3, 1, 0, 4, 1, 0, 0x10, 0]), Found::More);
    assert_eq!(Kind::Tls.find(&[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff]), Found::Bad);
}

#[test]
fn unfinished_requests_time_out() {
    let endless = [b"GET / HTTP/1.1\r\nX: ".to_vec(), vec![b'a'; MAX_HEAD]].concat();
    assert_eq!(Kind::Http.find(&endless[..MAX_HEAD - 1]), Found::More);
    assert_eq!(Kind::Http.find(&endless[..MAX_HEAD]), Found::Bad);
}

/// A gateway whose one guest cannot be started.
fn gateway(limits: Limits) -> SocketAddr {
    let start = |_: &str| cofferdam::Image::open("/nowhere").map(|_| unreachable!());
    let guests = Arc::new(Guests::new(["down.example.test".to_owned()], Duration::from_secs(60), start));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || serve::run(&listener, &guests, &limits));
    at
}

/// What comes back until the end.
fn say(at: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut caller = TcpStream::connect(at).unwrap();
    caller.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    caller.write_all(bytes).unwrap();
    let mut all = Vec::new();
    caller.read_to_end(&mut all).unwrap();
    all
}

#[test]
fn unserved_clients_get_an_error_response() {
    let at = gateway(Limits { head: Duration::from_millis(300), ..Limits::default() });
    for (host, status) in [("Host: nobody.example.test", "404"), ("Host: down.example.test", "503"), ("X: y", "400")] {
        let answer = say(at, &request(host));
        assert!(answer.starts_with(format!("HTTP/1.1 {status} ").as_bytes()), "{}", String::from_utf8_lossy(&answer));
    }
    assert!(say(at, b"GET / HTTP/1.1\r\nHost: al").starts_with(b"HTTP/1.1 408 "));
    for (name, alert) in [("nobody.example.test", 112), ("down.example.test", 80), ("no name", 50)] {
        assert_eq!(say(at, &hello(&[server_name(name)], 100)), [21, 3, 3, 0, 2, 2, alert], "{name}");
    }
    assert_eq!(say(at, &hello(&[server_name("nobody.example.test")], 100)[..50]), [21, 3, 3, 0, 2, 2, 90]);
}

#[test]
fn excess_clients_are_closed() {
    let at = gateway(Limits { connections: 2, head: Duration::from_millis(500), ..Limits::default() });
    let slow: Vec<_> = (0..2).map(|_| TcpStream::connect(at).unwrap()).collect();
    std::thread::sleep(Duration::from_millis(100));
    let mut third = TcpStream::connect(at).unwrap();
    assert!(matches!(third.read(&mut [0]), Ok(0) | Err(_)));
    drop(slow);
    std::thread::sleep(Duration::from_millis(100));
    assert!(say(at, &request("Host: nobody.example.test")).starts_with(b"HTTP/1.1 404 "));
}

proptest! {
    #[test]
    fn gateway_survives_arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..600), tls in any::<bool>()) {
        let _ = if tls { Kind::Tls } else { Kind::Http }.find(&bytes);
    }

    #[test]
    fn partial_requests_are_incomplete(cut in 0usize..1000, change in 0usize..1000, byte in any::<u8>()) {
        let whole = hello(&[server_name("alice.example.test")], 60);
        let part = &whole[..cut % whole.len()];
        prop_assert_eq!(Kind::Tls.find(part), Found::More);
        let mut changed = whole.clone();
        changed[change % whole.len()] = byte;
        let _ = Kind::Tls.find(&changed);
        let request = request("Host: a");
        let end = request.len() - 4;
        prop_assert_eq!(Kind::Http.find(&request[..cut % end]), Found::More);
    }
}
