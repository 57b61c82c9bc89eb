//! Entry points of the network for fuzzing, and for tests with any bytes; see `crate::fuzzing`.

mod flood;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::policy::{Cidr, Enforcer, Policy, Protocol, Rule};
use super::switch::fake_guest::FakeGuest;
use super::user::{Config, UserStack};
use super::wire::{self, AddressPair, Fragment, FrameBuilder, Tcp};
use super::{
    Capabilities, Csum, Frame, Gso, GsoKind, HEADER_LEN, Mac, NetBackend, Offload, Offloads, RxBuffer, Switch, dns,
};
use crate::memory::{GuestAddress, GuestMemory};
use crate::sys::SocketKind;

pub(crate) use self::flood::new_flows;
#[cfg(feature = "internals")]
pub(crate) use self::flood::{most_datagrams, switched};

/// Takes values off the front of the bytes; zeros when they are used up.
pub(crate) struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub(crate) fn take(&mut self, n: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(n.min(self.0.len()));
        self.0 = later;
        now
    }

    pub(crate) fn number<const N: usize>(&mut self) -> [u8; N] {
        let mut number = [0; N];
        number.iter_mut().zip(self.take(N)).for_each(|(to, byte)| *to = *byte);
        number
    }

    pub(crate) fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.number())
    }

    pub(crate) fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.number())
    }

    fn address(&mut self) -> IpAddr {
        match self.byte() % 6 {
            0 => Ipv4Addr::from(self.number::<4>()).into(),
            1 => Ipv6Addr::from(self.number::<16>()).into(),
            2 => Ipv4Addr::new(127, 0, 0, 1).into(),
            3 => Ipv4Addr::new(10, self.byte(), 2, 2).into(),
            4 => Ipv4Addr::new(169, 254, 169, self.byte()).into(),
            _ => Ipv4Addr::new(9, 9, 9, self.byte()).into(),
        }
    }

    pub(crate) fn done(&self) -> bool {
        self.0.is_empty()
    }
}

/// A stack, its guest's memory, and a listener on the host: the only place where the guest may go.
struct Fixture {
    net: UserStack,
    memory: GuestMemory,
    config: Config,
    listener: TcpListener,
    at: SocketAddr,
    /// Sends to a published port.
    caller: UdpSocket,
    streams: Vec<TcpStream>,
    /// The guest's next numbers, by the stack's last segment.
    seq: u32,
    ack: u32,
    /// Frames of the guest and to it, and their bytes.
    sent: [usize; 2],
    taken: [usize; 2],
}

const FRAME: GuestAddress = GuestAddress(0x1000);
const ROOM: GuestAddress = GuestAddress(0x2_0000);

impl Fixture {
    fn new(policy: Option<Policy>) -> Option<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
        listener.set_nonblocking(true).ok()?;
        let at = listener.local_addr().ok()?;
        let only = Policy::deny_all().rule(Rule::allow_range(IpAddr::from(Ipv4Addr::LOCALHOST)).port(at.port()));
        let mut config = Config::new(policy.unwrap_or(only));
        config.resolvers = Some(Vec::new());
        config.limits.connections = 64;
        config.limits.datagram_flows = 16;
        config.loopback = true;
        let mut net = UserStack::new(config.clone()).ok()?;
        let (_, published) = net.publish_udp((Ipv4Addr::LOCALHOST, 0).into(), 7, Vec::new()).ok()?;
        let caller =
            UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|socket| socket.connect(published).map(|()| socket));
        net.negotiated(Capabilities { to_host: Offloads::all(), to_guest: net.capabilities().to_guest });
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 18)]).ok()?;
        Some(Self {
            net,
            memory,
            config,
            listener,
            at,
            caller: caller.ok()?,
            streams: Vec::new(),
            seq: 0,
            ack: 0,
            sent: [0; 2],
            taken: [0; 2],
        })
    }

    fn send(&mut self, frame: &[u8], offload: Offload) {
        if offload.check(frame.len()).is_err() || self.memory.write(FRAME, frame).is_err() {
            return;
        }
        self.sent = [self.sent[0] + 1, self.sent[1] + frame.len()];
        if let Ok(segment) = self.memory.segment(FRAME, frame.len()) {
            let (a, b) = segment.split_at(frame.len() / 2);
            let sent = self.net.send(Frame::new(&self.memory, &[a, b], offload));
            assert!(sent.is_ok(), "bad frames are no errors");
        }
    }

    /// Takes what there is for the guest, which never is without end.
    fn take(&mut self) {
        for _ in 0..4096 {
            let Some(len) = self.net.next_len() else { return };
            let Ok(room) = self.memory.segment(ROOM, len) else { return };
            let received = self.net.receive(&mut RxBuffer::new(&self.memory, &[room])).ok().flatten();
            let Some(received) = received else { continue };
            self.taken = [self.taken[0] + 1, self.taken[1] + received.len];
            assert!(received.len <= len && received.offload.check(received.len).is_ok(), "the frame is none");
            let mut head = [0; 54];
            if received.len >= 54 && self.memory.read(ROOM, &mut head).is_ok() {
                let tcp = head.get(34..).and_then(|bytes| Tcp::parse(bytes, 20).ok());
                if let Some(tcp) = tcp.filter(|_| head.get(23) == Some(&wire::TCP)) {
                    (self.seq, self.ack) =
                        (tcp.ack, tcp.seq.wrapping_add((received.len as u32).saturating_sub(54).max(1)));
                }
            }
        }
        assert!(self.net.next_len().is_none(), "there is always something for the guest");
    }

    fn ip(&self, dst: IpAddr, protocol: u8, len: usize) -> FrameBuilder {
        let src = if dst.is_ipv4() { self.config.guest4.into() } else { self.config.guest6.into() };
        FrameBuilder::ip(
            wire::MacPair { src: self.config.guest_mac, dst: self.config.gateway_mac },
            AddressPair { src, dst },
            protocol,
            len,
        )
    }

    /// One segment, near what the stack expects or anywhere.
    fn tcp(&mut self, bytes: &mut Bytes<'_>) {
        let (what, flags) = (bytes.byte(), bytes.byte());
        let dst = if what & 1 == 0 { self.at.ip() } else { bytes.address() };
        let port = if what & 1 == 0 { self.at.port() } else { bytes.short() };
        let (near, far) = (u32::from(bytes.byte() % 8), u32::from_le_bytes(bytes.number()));
        let spread = if what & 2 == 0 { near } else { far };
        let tcp = Tcp {
            src: 4000 + u16::from(bytes.byte() % 4),
            dst: port,
            seq: self.seq.wrapping_add(spread),
            ack: self.ack.wrapping_sub(if what & 4 == 0 { 0 } else { spread }),
            flags,
            window: bytes.short(),
            mss: (what & 8 == 0).then(|| bytes.short()),
            shift: (what & 16 == 0).then(|| bytes.byte()),
            ..Tcp::default()
        };
        let len = usize::from(bytes.short() % 3000);
        let mut head = self.ip(dst, wire::TCP, wire::tcp_header_len(&tcp) + len);
        head.tcp(&tcp);
        let mut frame = head.as_slice().to_vec();
        frame.resize(frame.len() + len, what);
        let start = if dst.is_ipv4() { 34 } else { 54 };
        let kind = if dst.is_ipv4() { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
        let gso = (len > 1448).then_some(Gso { kind, size: 1448, header_len: start + 20 });
        self.send(&frame, Offload { csum: Some(Csum { start, offset: 16 }), gso });
    }

    fn udp(&mut self, dst: IpAddr, port: u16, payload: &[u8], size: u16) {
        let mut head = self.ip(dst, wire::UDP, wire::UDP_HEADER + payload.len());
        head.udp(68, port, payload.len());
        let mut frame = head.as_slice().to_vec();
        frame.extend_from_slice(payload);
        let start = if dst.is_ipv4() { 34 } else { 54 };
        let gso = (size > 0).then_some(Gso { kind: GsoKind::Udp, size, header_len: start + 8 });
        self.send(&frame, Offload { csum: Some(Csum { start, offset: 6 }), gso });
    }

    /// A fragment of any protocol, of the guest or of its loopback; of few packets, so that some become whole.
    fn fragment(&mut self, bytes: &mut Bytes<'_>) {
        let (what, dst) = (bytes.byte(), bytes.address());
        let src = match dst.is_ipv4() {
            true if what & 1 != 0 => Ipv4Addr::LOCALHOST.into(),
            true => self.config.guest4.into(),
            false => self.config.guest6.into(),
        };
        let protocol = [wire::UDP, wire::ICMP, wire::ICMPV6, wire::TCP].get(usize::from(what >> 1) % 4).copied();
        let (offset, len) = (usize::from(bytes.short() % 64) * 8, usize::from(bytes.byte()));
        let fragment = Fragment { id: u32::from(what >> 5), offset, more: what & 8 != 0 };
        let macs = wire::MacPair { src: self.config.guest_mac, dst: self.config.gateway_mac };
        let head = FrameBuilder::fragment(macs, AddressPair { src, dst }, protocol.unwrap_or(wire::UDP), len, fragment);
        self.send(&[head.as_slice(), bytes.take(len)].concat(), Offload::default());
    }

    /// Answers the sender to a published port, or reports that the port has no listener.
    fn answer(&mut self, what: u8, last: &[u8]) {
        let places = [IpAddr::from(Ipv4Addr::LOCALHOST), self.config.guest4.into(), self.config.guest6.into()];
        let Some(src) = places.get(usize::from(what) % 3).copied() else { return };
        let dst = if src.is_ipv4() { IpAddr::from(self.config.gateway4) } else { self.config.gateway6.into() };
        let macs = wire::MacPair { src: self.config.guest_mac, dst: self.config.gateway_mac };
        let addrs = AddressPair { src, dst };
        let port = 49152 + u16::from(what >> 4 & 3);
        if what & 4 == 0 {
            let datagram = wire::datagram(addrs, wire::UdpPorts { src: 7, dst: port }, last);
            let head = FrameBuilder::ip(macs, addrs, wire::UDP, datagram.len());
            return self.send(&[head.as_slice(), &datagram].concat(), Offload::default());
        }
        let back = AddressPair { src: dst, dst: src };
        let sent = wire::datagram(back, wire::UdpPorts { src: port, dst: 7 }, last);
        let quote = FrameBuilder::ip(macs, back, wire::UDP, sent.len());
        let (protocol, told) = if src.is_ipv4() { (wire::ICMP, [3, 3]) } else { (wire::ICMPV6, [1, 4]) };
        let message = [&told[..], &[0; 6], quote.from(wire::ETHERNET), &sent].concat();
        let head = FrameBuilder::ip(macs, addrs, protocol, message.len());
        let csum = Some(Csum { start: wire::ETHERNET as u16, offset: 0 });
        self.send(&[head.as_slice(), &message].concat(), Offload { csum, gso: None });
    }

    /// Something that the guest sends.
    fn step(&mut self, what: u8, bytes: &mut Bytes<'_>) {
        match what {
            0..3 => self.tcp(bytes),
            3 => {
                let mut frame = Vec::new();
                frame.extend(self.config.gateway_mac.0);
                frame.extend(self.config.guest_mac.0);
                let kinds = [wire::IPV4, wire::IPV6, wire::ARP, bytes.short()];
                frame.extend(kinds.get(usize::from(bytes.byte() % 4)).copied().unwrap_or_default().to_be_bytes());
                let len = usize::from(bytes.byte());
                frame.extend(bytes.take(len));
                self.send(&frame, Offload::default());
            }
            4 => {
                let (dst, port, len) = (bytes.address(), bytes.short(), usize::from(bytes.byte()));
                let (payload, size) = (bytes.take(len), u16::from(bytes.byte()));
                let port =
                    if port % 2 == 0 { [53, 67].get(usize::from(port / 2 % 2)).copied().unwrap_or(53) } else { port };
                self.udp(dst, port, payload, size);
            }
            5 => {
                let (dst, len) = (bytes.address(), usize::from(bytes.byte()));
                let protocol = if dst.is_ipv4() { wire::ICMP } else { wire::ICMPV6 };
                let mut frame = self.ip(dst, protocol, len).as_slice().to_vec();
                frame.extend(bytes.take(len));
                self.send(&frame, Offload { csum: Some(Csum { start: 14, offset: 0 }), gso: None });
            }
            6 => {
                let (mut header, len) = ([0; HEADER_LEN], usize::from(bytes.byte()));
                header.iter_mut().zip(bytes.take(HEADER_LEN)).for_each(|(to, from)| *to = *from);
                let frame = bytes.take(len);
                if let Ok(offload) = Offload::parse(&header, frame.len(), Offloads::all()) {
                    self.send(frame, offload);
                }
            }
            7 => self.fragment(bytes),
            _ => {
                let (what, len) = (bytes.byte(), usize::from(bytes.byte()));
                self.answer(what, bytes.take(len));
            }
        }
    }

    /// Plays one action of the host.
    fn host(&mut self, what: u8) {
        if what % 8 == 7 {
            let _ = self.caller.send(&vec![what; usize::from(what) * 40]);
            return;
        }
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                self.streams.push(stream);
            }
        }
        let nth = usize::from(what >> 4) % self.streams.len().max(1);
        let Some(stream) = self.streams.get_mut(nth) else { return };
        match what % 4 {
            0 => drop(stream.write(&[what; 5000])),
            1 => drop(stream.read(&mut [0; 5000])),
            2 => drop(stream.shutdown(std::net::Shutdown::Write)),
            _ => drop(self.streams.swap_remove(nth)),
        }
    }
}

/// Measures what a guest gets of the stack for what it sends.
///
/// The host is idle meanwhile. At most twice as many frames and four times as many bytes as it sent, and one socket for
/// each frame. Datagrams that a frame is cut into are bounded by `Offload::check`.
pub fn amplification(data: &[u8]) {
    let Some(mut world) = Fixture::new(Some(Policy::internet())) else {
        unreachable!("the harness lacks what it needs")
    };
    // Sockets are counted, and none is made. A question goes to one resolver, or to the next when that one cannot be asked.
    world.net.pretend();
    let (mut bytes, mut made) = (Bytes(data), 0);
    while !bytes.done() {
        world.step(bytes.byte() % 7, &mut bytes);
        world.net.poll();
        world.take();
        let ([frames, len], [back, back_len]) = (world.sent, world.taken);
        assert!(back <= 2 * frames + 8, "{frames} frames came back as {back}");
        assert!(back_len <= 4 * len + 1024, "{len} bytes came back as {back_len}");
        made += world.net.pretended().len();
        assert!(made <= frames, "{frames} frames made too many sockets");
    }
}

/// Frames of any content, while the host is active and time passes.
pub fn user_frame(data: &[u8]) {
    let Some(mut world) = Fixture::new(None) else { unreachable!("the harness lacks what it needs") };
    let mut bytes = Bytes(data);
    while !bytes.done() {
        match bytes.byte() % 12 {
            what @ 0..7 => world.step(what, &mut bytes),
            10 => world.step(7, &mut bytes),
            11 => world.step(8, &mut bytes),
            7 => world.net.advance(Duration::from_millis(1 << (bytes.byte() % 24))),
            8 => world.host(bytes.byte()),
            _ => {
                world.net.poll();
                world.take();
            }
        }
    }
    world.net.poll();
    world.take();
    let stats = world.net.stats();
    assert!(stats.connections <= 64 && stats.datagram_flows <= 16, "there are too many flows");
    assert!(stats.backlog <= 16 << 20, "too much waits for the host");
    world.net.advance(Duration::from_secs(1 << 20));
    for _ in 0..100 {
        world.net.advance(Duration::from_secs(100));
    }
    let stats = world.net.stats();
    assert_eq!((stats.connections, stats.datagram_flows), (0, 0), "flows stay for ever");
}

/// Messages of any content to the DHCP server, with and without an address.
pub fn dhcp(data: &[u8]) {
    let Some(mut world) = Fixture::new(None) else { unreachable!("the harness lacks what it needs") };
    let (gateway, mac) = (world.config.gateway4, world.config.guest_mac);
    let mut message = vec![1, 1, 6, 0];
    message.resize(28, 7);
    message.extend(mac.0);
    message.resize(236, 0);
    message.extend([99, 130, 83, 99]);
    message.extend(data);
    for payload in [data, &message] {
        world.udp(gateway.into(), 67, payload.get(..1400).unwrap_or(payload), 0);
        world.take();
    }
}

/// Questions of any content, and answers of any content to a good one.
pub fn dns(data: &[u8]) {
    let Some(mut world) = Fixture::new(Some(Policy::internet())) else {
        unreachable!("the harness lacks what it needs")
    };
    let gateway = world.config.gateway4;
    world.net.pretend();
    let good = b"\0\x01\x01\0\0\x01\0\0\0\0\0\0\x01a\x02bc\0\0\x01\0\x01";
    let mut near = good.get(..12).unwrap_or_default().to_vec();
    near.extend(data);
    for query in [data, &near] {
        world.udp(gateway.into(), 53, query.get(..1400).unwrap_or(query), 0);
        world.take();
        let _ = (dns::reply(query, dns::Code::ServFail), dns::truncated(query));
    }
    if let Ok(question) = dns::Question::parse(good) {
        let mut answer = good.to_vec();
        answer.extend(data);
        for (to, from) in answer.iter_mut().zip([0, 1, 0x81, 0x80, 0, 1, 0, data.first().copied().unwrap_or(0) % 8]) {
            *to = from;
        }
        for answer in [data, &answer] {
            let _ = question.is_answered(good, 1, answer);
            if let Some(found) = dns::answers(&question, answer) {
                assert!(found.addresses.len() <= answer.len() / 12, "addresses come from nowhere");
            }
        }
    }
    assert!(world.net.pretended().is_empty(), "a resolver was asked, and there is none");
}

/// A rule, as plain as can be.
struct Plain {
    allow: bool,
    range: Option<Cidr>,
    ports: std::ops::RangeInclusive<u16>,
    protocol: Option<Protocol>,
}

/// Whether the first rule that is about `to` allows it: the policy, said a second time and more slowly.
fn allowed(rules: &[Plain], protocol: Protocol, to: SocketAddr) -> bool {
    for rule in rules {
        let port = protocol == Protocol::Ping && rule.ports == (1..=u16::MAX) || rule.ports.contains(&to.port());
        if !port || rule.protocol.is_some_and(|p| p != protocol) {
            continue;
        }
        let inside = super::policy::special_purpose_range(to.ip());
        let about = match (rule.range, rule.allow) {
            (None, false) => true,
            (None, true) => inside.is_none(),
            (Some(range), false) => range.contains(to.ip()),
            (Some(range), true) => range.contains(to.ip()) && inside.is_none_or(|(block, _)| block.covers(range)),
        };
        if about {
            return rule.allow;
        }
    }
    false
}

/// Any policy, and a guest that calls any address.
///
/// No socket is ever made to where it may not go.
pub fn policy(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (mut rules, mut policy) = (Vec::new(), Policy::deny_all());
    for _ in 0..bytes.byte() % 6 {
        let what = bytes.byte();
        let (address, bits) = (bytes.address(), bytes.byte() % 129);
        let range = (what & 1 == 0).then(|| Cidr::new(address, bits).unwrap_or(address.into()));
        let protocol = [None, Some(Protocol::Tcp), Some(Protocol::Udp), Some(Protocol::Ping)];
        let protocol = protocol.get(usize::from(what >> 2 & 3)).copied().flatten();
        let ports =
            if what & 16 == 0 { 1..=u16::MAX } else { bytes.short().max(1)..=u16::MAX - u16::from(bytes.byte()) };
        let allow = what & 2 == 0;
        let mut rule = match (allow, range) {
            (true, Some(range)) => Rule::allow_range(range),
            (true, None) => Rule::allow_public(),
            (false, Some(range)) => Rule::deny_range(range),
            (false, None) => Rule::deny_all(),
        };
        rule = if what & 16 == 0 { rule } else { rule.ports(ports.clone()) };
        rule = protocol.map_or(rule.clone(), |protocol| rule.protocol(protocol));
        policy = policy.rule(rule);
        rules.push(Plain { allow, range, ports, protocol });
    }
    let Some(mut world) = Fixture::new(Some(Policy::deny_all())) else {
        unreachable!("the harness lacks what it needs")
    };
    world.net.pretend();
    let used = world.net.set_policy(policy.clone()).is_ok();
    let enforcer = Enforcer::new(if used { policy } else { Policy::deny_all() });
    while !bytes.done() {
        let (to, ports) = (bytes.address(), [80, bytes.short()]);
        for port in ports {
            let tcp = Tcp { src: 4000, dst: port, flags: wire::SYN, ..Tcp::default() };
            let mut head = world.ip(to, wire::TCP, 20);
            head.tcp(&tcp);
            let start = if to.is_ipv4() { 34 } else { 54 };
            world.send(head.as_slice(), Offload { csum: Some(Csum { start, offset: 16 }), gso: None });
            world.udp(to, port, b"x", 0);
            for (kind, at) in world.net.pretended() {
                let protocol = if kind == SocketKind::Stream { Protocol::Tcp } else { Protocol::Udp };
                assert!(used && allowed(&rules, protocol, at), "{at} is denied, and a socket was made to it");
                assert!(enforcer.allows(protocol, at), "the policy says one thing and does another");
            }
        }
        world.take();
    }
}

/// Headers of any content before frames of any length.
///
/// What is understood was agreed to and can be done.
pub fn header(data: &[u8]) {
    let mut bytes = Bytes(data);
    while !bytes.done() {
        let (agreed, len) = (Offloads::from_bits(bytes.byte()), usize::from(bytes.short()));
        let header: [u8; HEADER_LEN] = bytes.number();
        let Ok(offload) = Offload::parse(&header, len, agreed) else { continue };
        assert!(agreed.contains(offload.needed()), "the peer did not agree to it");
        let end = |csum: Csum| usize::from(csum.start) + usize::from(csum.offset) + 2;
        assert!(offload.csum.is_none_or(|csum| end(csum) <= len), "the checksum is elsewhere");
        assert!(offload.gso.is_none_or(|gso| gso.size > 0 && offload.csum.is_some()), "it cannot be cut");
        let again = Offload::parse(&offload.to_bytes(1), len, agreed);
        assert_eq!(again, Ok(offload), "it is written otherwise than it was read");
    }
}

/// Frames of any content of one guest on a switch.
///
/// Another guest gets only what the first may send, in a form that it agreed to.
pub fn switch(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (switch, agreed) = (Switch::new(), Offloads::from_bits(bytes.byte()).without(Offloads::USO));
    let agreed = if agreed.contains(Offloads::CSUM) { agreed } else { Offloads::none() };
    let join = |name: &str, n, agreed| FakeGuest::on(&switch, name, Mac([2, 0, 0, 0, 0, n]), agreed).ok();
    let (Some(mut a), Some(mut b)) = (join("a", 1, Offloads::all()), join("b", 2, agreed)) else {
        unreachable!("the harness lacks what it needs")
    };
    while !bytes.done() {
        let what = bytes.byte();
        let (four, len) = (what & 1 == 0, usize::from(bytes.short()) % 4000);
        let dst = if what & 2 == 0 { b.address(four) } else { bytes.address() };
        let to = if what & 4 == 0 { b.mac } else { Mac(bytes.number()) };
        let (mut frame, mut offload) = match what >> 3 & 3 {
            0 => a.tcp(&b, four, &vec![what; len], (len > 1000).then(|| bytes.short())),
            1 => (a.udp(to, dst, (bytes.short(), bytes.short()), &vec![what; len % 1500]), Offload::default()),
            2 => {
                let mut frame = a.ip(to, dst, bytes.byte(), len % 100).as_slice().to_vec();
                frame.extend(bytes.take(len % 100));
                (frame, Offload::default())
            }
            _ => (bytes.take(len % 200).to_vec(), Offload::default()),
        };
        for _ in 0..bytes.byte() % 4 {
            let (at, value) = (usize::from(bytes.byte()), bytes.byte());
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        if what & 32 != 0 {
            offload = Offload::parse(&bytes.number(), frame.len(), Offloads::all()).unwrap_or_default();
        }
        if offload.check(frame.len()).is_ok() {
            a.send(&frame, offload);
        }
        let _ = a.take();
        for (frame, offload) in b.take() {
            let Ok(ethernet) = wire::Ethernet::parse(&frame) else { unreachable!("it has no header") };
            let rest = frame.get(wire::ETHERNET..).unwrap_or_default();
            let Ok(packet) = wire::IpPacket::parse(ethernet.kind, rest, rest.len()) else { unreachable!("no packet") };
            assert!(ethernet.src == a.mac && ethernet.dst == b.mac, "between other cards");
            assert_eq!(packet.header + packet.len, rest.len(), "there is something behind the packet");
            let own = |guest: &FakeGuest, address: IpAddr| {
                address == guest.address(packet.src.is_ipv4())
                    || matches!(address, IpAddr::V6(a) if a.is_unicast_link_local())
            };
            assert!(own(&a, packet.src) && own(&b, packet.dst), "between other addresses");
            assert!(
                agreed.contains(offload.needed()) && offload.check(frame.len()).is_ok(),
                "the peer did not agree to it"
            );
            let cut = offload.gso.map(|gso| usize::from(gso.header_len) + usize::from(gso.size));
            assert!(cut.unwrap_or(frame.len()) <= 1514, "it is too large");
        }
    }
    let (one, offload) = a.tcp(&b, true, b"x", None);
    b.leave();
    a.send(&one, offload);
    assert!(b.take().is_empty() && a.stats().unserved > 0, "a guest that has left still receives frames");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn arbitrary_bytes_never_panic(data in proptest::collection::vec(any::<u8>(), 0..800)) {
            for target in [amplification, user_frame, dhcp, dns, policy, header, switch] {
                target(&data);
            }
        }
    }
}
