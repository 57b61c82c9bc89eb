//! The gateway's resolver, before a resolver of the host that says what a test wants.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::time::Duration;

use super::*;
use crate::network::policy::DenyReason;
use crate::sys::Route;
use smoltcp::socket::tcp::State;

/// A query as smoltcp would not make it.
fn query(name: &str, kind: u8) -> Vec<u8> {
    let mut bytes = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.as_bytes());
    }
    bytes.extend([0, 0, kind, 0, 1]);
    bytes
}

/// An answer to `query` with an address.
fn answer(query: &[u8], address: &[u8]) -> Vec<u8> {
    let mut bytes = query.to_vec();
    (bytes[2], bytes[3], bytes[7]) = (0x81, 0x80, 1);
    bytes.extend([0xc0, 12, 0, if address.len() == 4 { 1 } else { 28 }, 0, 1, 0, 0, 0, 60, 0, address.len() as u8]);
    bytes.extend(address);
    bytes
}

struct Fixture {
    guest: Guest,
    server: UdpSocket,
    at: SocketAddr,
    handle: SocketHandle,
}

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

impl Fixture {
    fn new(policy: Policy) -> Self {
        let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = server.local_addr().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut guest = Guest::of(Config { resolvers: Some(vec![at]), ..Config::new(policy) }, Offloads::all());
        guest.net.resolver.servers.pretend(true, Instant::now());
        // The host reaches the internet by IPv4 alone, and a range of its own by IPv6.
        guest.net.core.policy.pretend(|address| match address {
            IpAddr::V4(_) => Route::Other,
            IpAddr::V6(a) if a.segments()[0] == 0xfd12 => Route::Other,
            IpAddr::V6(_) => Route::None,
        });
        let handle = guest.udp(5353);
        Self { guest, server, at, handle }
    }

    /// Gives the host one more resolver.
    fn second_resolver(&mut self) -> UdpSocket {
        let second = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        second.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let both = vec![self.at, second.local_addr().unwrap()];
        self.guest.net.resolver = super::super::resolver::Resolver::new(Some(both));
        self.guest.net.resolver.servers.pretend(true, Instant::now());
        second
    }

    fn ask(&mut self, query: &[u8]) {
        self.guest.datagram(self.handle, query, (GATEWAY, 53).into());
    }

    /// What the host's resolver is asked.
    fn asked(&self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 2000];
        let (n, from) = self.server.recv_from(&mut buffer).unwrap();
        (buffer[..n].to_vec(), from)
    }

    fn answered(&mut self) -> Vec<u8> {
        let handle = self.handle;
        self.guest.until(|g| g.came(handle)).0
    }
}

fn names(name: &str) -> Policy {
    Policy::deny_all().rule(Rule::allow_name(name))
}

#[test]
fn allowed_names_are_resolved_and_admitted() {
    let mut world = Fixture::new(names("*.example.com"));
    world.ask(&query("www.Example.com", 1));
    let (asked, from) = world.asked();
    assert_ne!(asked[..2], [0xab, 0xcd], "the number can be guessed");
    world.server.send_to(&answer(&asked, &[9, 9, 9, 9]), from).unwrap();
    assert_eq!(world.answered(), answer(&query("www.Example.com", 1), &[9, 9, 9, 9]));
    let now = world.guest.net.core.host.now;
    let admitted = |world: &mut Fixture, after| {
        let to = "9.9.9.9:443".parse().unwrap();
        let policy = &mut world.guest.net.core.policy;
        policy.admit(crate::network::policy::Protocol::Tcp, to, now + Duration::from_secs(after)).is_some()
    };
    assert!(admitted(&mut world, 0) && admitted(&mut world, 59) && !admitted(&mut world, 61));
}

#[test]
fn answers_lose_records_that_were_not_asked_for() {
    let mut world = Fixture::new(names("example.com"));
    world.ask(&query("example.com", 1));
    let (asked, from) = world.asked();
    let mut whole = answer(&asked, &[9, 9, 9, 9]);
    (whole[9], whole[11]) = (1, 1);
    whole.extend(b"\xc0\x0c\x00\x02\x00\x01\x00\x00\x00\x3c\x00\x06\x03ns1\xc0\x0c");
    whole.extend(b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\x0a\x00\x00\x01");
    world.server.send_to(&whole, from).unwrap();
    assert_eq!(world.answered(), answer(&query("example.com", 1), &[9, 9, 9, 9]));
}

#[test]
fn denied_names_are_nxdomain_without_a_query() {
    let mut world = Fixture::new(names("example.com"));
    for name in ["www.example.com", "secret.evil.org"] {
        world.ask(&query(name, 1));
        let reply = world.answered();
        assert_eq!((reply[3] & 15, reply.len()), (3, query(name, 1).len()));
    }
    assert_eq!((world.guest.net.core.host.made, world.guest.net.stats().denied_names), (0, 2));
    let told: Vec<_> = world.guest.net.take_denials().collect();
    assert_eq!((told[1].name.as_deref(), told[1].reason), (Some("secret.evil.org"), DenyReason::NoRule));
}

#[test]
fn private_addresses_are_removed_from_answers() {
    for (policy, count) in [
        (Policy::internet(), 0),
        (Policy::internet().rule(Rule::allow_range("10.0.0.0/8".parse::<crate::network::policy::Cidr>().unwrap())), 1),
    ] {
        let mut world = Fixture::new(policy);
        world.ask(&query("rebind.example.com", 1));
        let (asked, from) = world.asked();
        world.server.send_to(&answer(&asked, &[10, 0, 0, 1]), from).unwrap();
        // The name exists: musl takes "no such name" as the answer for every type.
        let answer = world.answered();
        assert_eq!((answer[3] & 15, answer[7], world.guest.net.stats().denied_names), (0, count, 1 - u64::from(count)));
    }
}

#[test]
fn mixed_answers_keep_only_admitted_addresses() {
    let mut world = Fixture::new(Policy::internet());
    world.ask(&query("mixed.example.com", 1));
    let (asked, from) = world.asked();
    let mut mixed = answer(&asked, &[10, 0, 0, 1]);
    mixed[7] = 2;
    mixed.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 9, 9, 9, 9]);
    world.server.send_to(&mixed, from).unwrap();
    assert_eq!(world.answered(), answer(&query("mixed.example.com", 1), &[9, 9, 9, 9]));
}

#[test]
fn records_of_other_types_need_a_rule_of_the_name() {
    let passed = |policy: &Policy, name: &str, kind: u8| {
        let mut world = Fixture::new(policy.clone());
        world.ask(&query(name, kind));
        let made = |world: &Fixture| world.guest.net.core.host.made;
        let reply = if made(&world) == 0 { Some(world.answered()) } else { None };
        (made(&world) > 0, reply.map(|reply| reply[3] & 15))
    };
    let internet = Policy::internet();
    let mixed = Policy::internet().rule(Rule::allow_name("*.example.com"));
    // MX, TXT, SRV, HTTPS.
    for kind in [15, 16, 33, 65] {
        assert_eq!(passed(&internet, "corp.internal", kind), (false, Some(0)), "{kind}");
        assert_eq!(passed(&internet.clone().all_records(true), "corp.internal", kind), (true, None), "{kind}");
        assert_eq!(passed(&names("*.example.com"), "www.example.com", kind), (true, None), "{kind}");
        assert_eq!(passed(&names("*.example.com"), "example.org", kind), (false, Some(3)), "{kind}");
        assert_eq!(passed(&internet.clone(), "www.example.com", kind), (false, Some(0)), "{kind}");
    }
    assert_eq!(passed(&internet, "corp.internal", 1), (true, None));
    // Names of addresses, as far as they may be reached.
    for (name, asked) in
        [("9.9.9.9.in-addr.arpa", true), ("1.0.0.10.in-addr.arpa", false), ("254.169.254.169.in-addr.arpa", false)]
    {
        assert_eq!(passed(&internet, name, 12).0, asked, "{name}");
        assert!(!passed(&Policy::deny_all(), name, 12).0);
    }
    assert!(
        passed(
            &Policy::deny_all().rule(Rule::allow_range("10.0.0.0/8".parse::<crate::network::policy::Cidr>().unwrap())),
            "1.0.0.10.in-addr.arpa",
            12
        )
        .0
    );
    assert!(mixed.check().is_ok());
}

#[test]
fn guest_queries_are_rate_limited() {
    let mut world = Fixture::new(Policy::internet());
    let (mut failed, handle) = (0, world.handle);
    for n in 0..400 {
        world.ask(&query(&format!("n{n}.example.com"), 1));
        while let Some((reply, _)) = world.guest.came(handle) {
            failed += u32::from(reply[3] & 15 == 2);
        }
    }
    assert!(failed > 100, "{failed}");
    assert!(world.guest.net.core.host.made < 280, "{}", world.guest.net.core.host.made);
}

#[test]
fn addresses_without_a_route_are_not_offered() {
    let range: crate::network::policy::Cidr = "fd12::/16".parse().unwrap();
    for (address, offered) in [("2606::1", 0), ("fd12::1", 1)] {
        let mut world = Fixture::new(Policy::internet().rule(Rule::allow_range(range)));
        world.ask(&query("example.com", 28));
        let (asked, from) = world.asked();
        let address: std::net::Ipv6Addr = address.parse().unwrap();
        world.server.send_to(&answer(&asked, &address.octets()), from).unwrap();
        let reply = world.answered();
        assert_eq!((reply[3] & 15, reply[7]), (0, offered), "{address}");
        // Where nothing leads anywhere, all are as good.
        world.guest.net.resolver.servers.pretend(false, Instant::now());
        world.ask(&query("example.com", 28));
        let (asked, from) = world.asked();
        world.server.send_to(&answer(&asked, &address.octets()), from).unwrap();
        assert_eq!(world.answered()[7], 1);
    }
}

#[test]
fn mismatched_answers_are_ignored() {
    let mut world = Fixture::new(Policy::internet());
    world.ask(&query("example.com", 1));
    let (asked, from) = world.asked();
    let mut other = answer(&asked, &[6, 6, 6, 6]);
    other[0] ^= 1;
    world.server.send_to(&other, from).unwrap();
    let mut other = answer(&asked, &[6, 6, 6, 6]);
    other[13] = b'x';
    world.server.send_to(&other, from).unwrap();
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    stranger.send_to(&answer(&asked, &[6, 6, 6, 6]), from).unwrap();
    world.server.send_to(&answer(&asked, &[9, 9, 9, 9]), from).unwrap();
    assert_eq!(world.answered(), answer(&query("example.com", 1), &[9, 9, 9, 9]));
}

#[test]
fn after_many_wrong_answers_the_next_resolver_is_asked() {
    let mut world = Fixture::new(Policy::internet());
    let second = world.second_resolver();
    world.ask(&query("example.com", 1));
    let (asked, from) = world.asked();
    let mut guess = answer(&asked, &[6, 6, 6, 6]);
    guess[0] ^= 1;
    for _ in 0..40 {
        // The port may be closed already.
        let _ = world.server.send_to(&guess, from);
    }
    world.guest.until(|_| readable(&second).then_some(()));
}

/// An answer with 200 addresses.
fn addresses(asked: &[u8]) -> Vec<u8> {
    let mut all = answer(asked, &[9, 9, 0, 0]);
    for n in 1..200u8 {
        all.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 9, 9, 1, n]);
    }
    all[6..8].copy_from_slice(&200u16.to_be_bytes());
    all
}

#[test]
fn burst_of_answers_takes_several_turns() {
    const QUESTIONS: usize = 160;
    let mut world = Fixture::new(Policy::internet());
    for n in 0..QUESTIONS {
        world.ask(&query(&format!("n{n}.example.com"), 1));
    }
    for _ in 0..QUESTIONS {
        let (asked, from) = world.asked();
        world.server.send_to(&addresses(&asked), from).unwrap();
    }
    let net = &mut world.guest.net;
    let mut turns = 0;
    while net.resolver.len() > 0 {
        net.core.host.syscalls = 0;
        crate::network::NetBackend::poll(net);
        // Two calls for each of 32 addresses, and a batch that has begun is ended.
        assert!(net.core.host.syscalls < 5000, "{}", net.core.host.syscalls);
        turns += 1;
    }
    assert!(turns > 1);
}

/// Each address costs the loop a question to the kernel.
#[test]
fn addresses_per_answer_are_limited() {
    let mut world = Fixture::new(names("example.com"));
    world.ask(&query("example.com", 1));
    let (asked, from) = world.asked();
    world.server.send_to(&addresses(&asked), from).unwrap();
    let came = world.answered();
    assert_eq!(u16::from_be_bytes([came[6], came[7]]), 32);
    let now = world.guest.net.core.host.now;
    let mut may = |last: [u8; 4]| {
        let to = SocketAddr::from((last, 80));
        world.guest.net.core.policy.admit(crate::network::policy::Protocol::Tcp, to, now).is_some()
    };
    assert!(may([9, 9, 0, 0]) && may([9, 9, 1, 31]) && !may([9, 9, 1, 32]));
}

#[test]
fn resolvers_are_tried_in_turn_then_servfail() {
    let mut world = Fixture::new(Policy::internet());
    let second = world.second_resolver();
    world.ask(&query("example.com", 1));
    let (mut asked, from) = world.asked();
    // The first fails, the second is silent, and both again.
    (asked[2], asked[3]) = (0x81, 0x82);
    world.server.send_to(&asked, from).unwrap();
    world.guest.until(|_| readable(&second).then_some(()));
    let mut buffer = [0; 100];
    second.recv_from(&mut buffer).unwrap();
    for _ in 0..3 {
        assert_eq!(world.guest.net.resolver.len(), 1);
        world.guest.wait(Duration::from_secs(3));
    }
    assert_eq!(world.answered()[3] & 15, 2);
    assert_eq!((world.guest.net.stats().unanswered, world.guest.net.resolver.len()), (1, 0));
}

#[test]
fn a_resolver_that_refuses_is_followed_by_the_next() {
    // SERVFAIL, NOTIMP, REFUSED.
    for code in [2, 4, 5] {
        let mut world = Fixture::new(names("example.com"));
        let second = world.second_resolver();
        world.ask(&query("example.com", 1));
        let (mut asked, from) = world.asked();
        (asked[2], asked[3]) = (0x81, 0x80 | code);
        world.server.send_to(&asked, from).unwrap();
        world.guest.until(|_| readable(&second).then_some(()));
        let mut buffer = [0; 100];
        let (n, from) = second.recv_from(&mut buffer).unwrap();
        second.send_to(&answer(&buffer[..n], &[9, 9, 9, 9]), from).unwrap();
        assert_eq!(world.answered(), answer(&query("example.com", 1), &[9, 9, 9, 9]), "{code}");
    }
}

/// What they do not understand they do not repeat, so that nothing but its number tells what such an answer belongs to.
#[test]
fn resolvers_without_edns_are_distinguished_from_silent_ones() {
    // An OPT record: 1,232 bytes, nothing else.
    let with_edns = |mut query: Vec<u8>| {
        query[11] = 1;
        query.extend([0, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0]);
        query
    };
    let plain = query("example.com", 1);
    for bare in [true, false] {
        let mut world = Fixture::new(names("example.com"));
        world.ask(&with_edns(plain.clone()));
        let (asked, from) = world.asked();
        assert_eq!(asked[2..], with_edns(plain.clone())[2..]);
        let mut refusal = asked[..if bare { 12 } else { plain.len() }].to_vec();
        (refusal[2], refusal[3], refusal[5], refusal[11]) = (0x81, 0x81, u8::from(!bare), 0);
        // A sender that guesses is not believed.
        let mut other = refusal.clone();
        other[0] ^= 1;
        world.server.send_to(&other, from).unwrap();
        world.guest.pump();
        assert!(world.guest.came(world.handle).is_none());
        world.server.send_to(&refusal, from).unwrap();
        let told = world.answered();
        assert_eq!((&told[..2], told[3] & 15, &told[12..]), (&plain[..2], 1, &plain[12..]), "{bare}");
        world.ask(&plain);
        let (asked, from) = world.asked();
        world.server.send_to(&answer(&asked, &[9, 9, 9, 9]), from).unwrap();
        assert_eq!(world.answered(), answer(&plain, &[9, 9, 9, 9]));
        // Others answer, as if it were not there.
        world.ask(&with_edns(plain.clone()));
        let (asked, from) = world.asked();
        let mut ignored = answer(&asked[..plain.len()], &[9, 9, 9, 9]);
        ignored[11] = 0;
        world.server.send_to(&ignored, from).unwrap();
        assert_eq!(world.answered(), answer(&plain, &[9, 9, 9, 9]));
    }
}

#[test]
fn truncated_answers_are_retried_over_tcp() {
    const ADDRESSES: u8 = 32;
    let mut world = Fixture::new(names("example.com"));
    let listener = TcpListener::bind(world.at).unwrap();
    let asked = query("example.com", 1);
    let all = |query: &[u8]| {
        let mut reply = query.to_vec();
        (reply[2], reply[3], reply[7]) = (0x81, 0x80, ADDRESSES);
        for n in 0..ADDRESSES {
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 9, 9, 9, n]);
        }
        reply
    };
    // In the middle of a record.
    world.ask(&asked);
    let (sent, from) = world.asked();
    let mut cut = all(&sent);
    cut[2] |= 2;
    cut.truncate(512);
    world.server.send_to(&cut, from).unwrap();
    let told = world.answered();
    assert_eq!((told[2] & 2, told[7], &told[12..]), (2, 0, &asked[12..]));
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).unwrap();
        let mut query = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut query).unwrap();
        let reply = all(&query);
        stream.write_all(&[&(reply.len() as u16).to_be_bytes(), &reply[..]].concat()).unwrap();
    });
    let handle = world.guest.connected((GATEWAY, 53).into());
    world.guest.tcp(handle).send_slice(&[&[0, asked.len() as u8], &asked[..]].concat()).unwrap();
    let (mut reply, expected) = (Vec::new(), all(&asked));
    world.guest.until(|g| {
        while g.tcp(handle).can_recv() {
            g.tcp(handle).recv(|bytes| (bytes.len(), reply.extend_from_slice(bytes))).unwrap();
        }
        (reply.len() == 2 + expected.len()).then_some(())
    });
    server.join().unwrap();
    assert_eq!(reply[2..], expected);
    let now = world.guest.net.core.host.now;
    let last = SocketAddr::from(([9, 9, 9, ADDRESSES - 1], 443));
    assert!(world.guest.net.core.policy.admit(crate::network::policy::Protocol::Tcp, last, now).is_some());
}

#[test]
fn pending_queries_are_bounded() {
    let mut world = Fixture::new(Policy::internet());
    for n in 0..2000 {
        world.ask(&query(&format!("n{n}.example.com"), 1));
        assert!(world.guest.net.resolver.len() <= 256);
        while world.guest.came(world.handle).is_some() {}
    }
    assert!(world.guest.net.stats().limited >= 1700);
}

#[test]
fn long_answers_come_over_tcp() {
    let mut world = Fixture::new(Policy::internet().all_records(true));
    let listener = TcpListener::bind(world.at).unwrap();
    world.ask(&query("example.com", 16));
    let (mut asked, from) = world.asked();
    (asked[2], asked[3]) = (0x83, 0x80);
    world.server.send_to(&asked, from).unwrap();
    assert_eq!(world.answered()[2] & 2, 2);
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut len = [0; 2];
        stream.read_exact(&mut len).unwrap();
        let mut query = vec![0; u16::from_be_bytes(len).into()];
        stream.read_exact(&mut query).unwrap();
        let mut reply = query;
        (reply[2], reply[3], reply[7]) = (0x81, 0x80, 200);
        for _ in 0..200 {
            reply.extend([0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60, 0, 50]);
            reply.extend([49; 50]);
        }
        stream.write_all(&(reply.len() as u16).to_be_bytes()).unwrap();
        stream.write_all(&reply).unwrap();
    });
    let handle = world.guest.connected((GATEWAY, 53).into());
    let asked = query("example.com", 16);
    world.guest.tcp(handle).send_slice(&[0, asked.len() as u8]).unwrap();
    world.guest.tcp(handle).send_slice(&asked).unwrap();
    let mut reply = Vec::new();
    world.guest.until(|g| {
        while g.tcp(handle).can_recv() {
            g.tcp(handle).recv(|bytes| (bytes.len(), reply.extend_from_slice(bytes))).unwrap();
        }
        (reply.len() == 2 + asked.len() + 200 * 62).then_some(())
    });
    assert_eq!(reply[2..4], [0xab, 0xcd]);
    server.join().unwrap();
    // An idle client is disconnected.
    world.guest.wait(Duration::from_secs(30));
    world.guest.until(|g| (g.tcp(handle).state() == State::CloseWait).then_some(()));
    assert_eq!(world.guest.net.stats().denied, 0);
    let _ = IpAddr::V4(GATEWAY);
}

#[test]
fn names_that_are_denied_are_denied_over_tcp_too() {
    let mut world = Fixture::new(Policy::deny_all());
    let handle = world.guest.connected((GATEWAY, 53).into());
    let asked = query("example.com", 1);
    world.guest.tcp(handle).send_slice(&[0, asked.len() as u8]).unwrap();
    world.guest.tcp(handle).send_slice(&asked).unwrap();
    world.guest.until(|g| g.tcp(handle).can_recv().then_some(()));
    let mut reply = [0; 100];
    let n = world.guest.tcp(handle).recv_slice(&mut reply).unwrap();
    assert_eq!((n, reply[5] & 15), (2 + asked.len(), 3));
    world.guest.tcp(handle).send_slice(&[0xff; 64]).unwrap();
    world.guest.until(|g| (g.tcp(handle).state() != State::Established).then_some(()));
    assert_eq!(world.guest.net.core.host.made, 0);
}
