//! The stack against smoltcp, which plays the guest. The host's sockets are real, on its loopback.

mod config;
mod datagrams;
mod link;
mod names;
mod published;
mod tcp;
mod tcp_limits;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use smoltcp::iface::{self, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, DeviceCapabilities, Medium};
use smoltcp::socket::{tcp as peer, udp};
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr};

use super::config::Limits;
use super::{Config, UserStack};
use crate::memory::{GuestAddress, GuestMemory, Segment};
use crate::network::policy::{Policy, Rule};
use crate::network::wire;
use crate::network::{Capabilities, Csum, Frame, NetBackend, Offload, Offloads, RxBuffer};
use crate::sys::wait_readable;

/// What the link does to frames.
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// Of a hundred frames: lost, sent twice, sent after the next.
    pub lost: u64,
    pub twice: u64,
    pub late: u64,
    seed: u64,
}

impl Faults {
    fn roll(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.seed >> 33) % 100
    }

    fn pass(&mut self, frame: Vec<u8>, to: &mut VecDeque<Vec<u8>>) {
        if self.roll() < self.lost {
            return;
        }
        if self.roll() < self.twice {
            to.push_back(frame.clone());
        }
        let late = self.roll() < self.late;
        to.push_back(frame);
        let n = to.len();
        if late && n > 1 {
            to.swap(n - 1, n - 2);
        }
    }
}

/// The guest's card, as smoltcp sees it.
#[derive(Debug, Default)]
pub(super) struct Card {
    pub to_guest: VecDeque<Vec<u8>>,
    pub from_guest: VecDeque<Vec<u8>>,
    mtu: usize,
    /// Checksums are left to the host.
    lazy: bool,
}

pub(super) struct In(Vec<u8>);
pub(super) struct Out<'a>(&'a mut VecDeque<Vec<u8>>);

impl phy::RxToken for In {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl phy::Device for Card {
    type RxToken<'a> = In;
    type TxToken<'a> = Out<'a>;

    fn receive(&mut self, _: Moment) -> Option<(In, Out<'_>)> {
        self.to_guest.pop_front().map(|frame| (In(frame), Out(&mut self.from_guest)))
    }

    fn transmit(&mut self, _: Moment) -> Option<Out<'_>> {
        (self.from_guest.len() < 256).then_some(Out(&mut self.from_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        (capabilities.medium, capabilities.max_transmission_unit) = (Medium::Ethernet, self.mtu + 14);
        if self.lazy {
            capabilities.checksum.tcp = phy::Checksum::Rx;
            capabilities.checksum.udp = phy::Checksum::Rx;
        }
        capabilities
    }
}

/// A guest with a network.
pub(super) struct Guest {
    pub net: UserStack,
    pub memory: GuestMemory,
    pub iface: Interface,
    pub sockets: SocketSet<'static>,
    pub card: Card,
    pub faults: Faults,
    pub largest: usize,
    start: Instant,
    pub ahead: Duration,
    port: u16,
}

const ROOM: GuestAddress = GuestAddress(0x4_0000);
const FRAME: GuestAddress = GuestAddress(0x2_0000);

/// What the guest calls the host's `::1`, as smoltcp would not leave the guest for that.
pub(super) const ALIAS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// The loopback and nothing else.
pub(super) fn local() -> Policy {
    let range = |text: &str| Rule::allow_range(text.parse::<crate::network::policy::Cidr>().unwrap());
    Policy::deny_all().rule(range("127.0.0.0/8")).rule(range("::1"))
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::of(Config::new(local()), Offloads::all())
    }

    pub(super) fn of(config: Config, agreed: Offloads) -> Self {
        let mut net = UserStack::new(config.clone()).unwrap();
        let capabilities = net.capabilities();
        net.negotiated(Capabilities {
            to_host: agreed.intersection(capabilities.to_host),
            to_guest: agreed.intersection(capabilities.to_guest),
        });
        let mut card = Card { mtu: config.mtu.into(), lazy: agreed.contains(Offloads::CSUM), ..Card::default() };
        let address = HardwareAddress::Ethernet(EthernetAddress(config.guest_mac.0));
        let mut settings = iface::Config::new(address);
        settings.random_seed = 7;
        let mut iface = Interface::new(settings, &mut card, Moment::ZERO);
        iface.update_ip_addrs(|all| {
            all.push(IpCidr::new(config.guest4.into(), config.prefix4)).unwrap();
            all.push(IpCidr::new(config.guest6.into(), 64)).unwrap();
        });
        iface.routes_mut().add_default_ipv4_route(config.gateway4).unwrap();
        iface.routes_mut().add_default_ipv6_route(config.gateway6).unwrap();
        Self {
            net,
            memory: GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap(),
            iface,
            sockets: SocketSet::new(Vec::new()),
            card,
            faults: Faults::default(),
            largest: 0,
            start: Instant::now(),
            ahead: Duration::ZERO,
            port: 20_000,
        }
    }

    pub(super) fn now(&self) -> Moment {
        Moment::from_micros((self.start.elapsed() + self.ahead).as_micros() as i64)
    }

    /// Time passes for both.
    pub(super) fn wait(&mut self, time: Duration) {
        self.ahead += time;
        self.net.core.host.advance(time);
        self.net.poll();
        self.pump();
    }

    /// A frame from the guest, in pieces of any size.
    pub(super) fn send(&mut self, frame: &[u8], offload: Offload) {
        self.memory.write(FRAME, frame).unwrap();
        if frame.get(38..54) == Some(&ALIAS.octets()) {
            self.memory.write(GuestAddress(FRAME.0 + 38), &Ipv6Addr::LOCALHOST.octets()).unwrap();
        }
        let (first, rest) = self.memory.segment(FRAME, frame.len()).unwrap().split_at(frame.len() / 3);
        let (second, third) = rest.split_at(30);
        self.net.send(Frame::new(&self.memory, &[first, second, third], offload)).unwrap();
    }

    /// The next frame to the guest as its driver hands it on: with all checksums.
    pub(super) fn take(&mut self) -> Option<(Vec<u8>, Offload)> {
        let len = self.net.next_len()?;
        assert_eq!(self.net.next_len(), Some(len));
        let (a, b) = self.memory.segment(ROOM, len).unwrap().split_at(len.min(61));
        let room: Vec<Segment> = [a, b].into_iter().filter(|s| s.len() > 0).collect();
        let received = self.net.receive(&mut RxBuffer::new(&self.memory, &room)).unwrap()?;
        let mut frame = vec![0; received.len];
        self.memory.read(ROOM, &mut frame).unwrap();
        received.offload.check(frame.len()).unwrap();
        if let Some(Csum { start, offset }) = received.offload.csum {
            let (start, at) = (usize::from(start), usize::from(start) + usize::from(offset));
            let check = !wire::fold(wire::sum(&frame[start..]));
            frame[at..at + 2].copy_from_slice(&check.to_be_bytes());
        }
        if frame.len() > 70 && frame[12..14] == [0x86, 0xdd] && frame[22..38] == Ipv6Addr::LOCALHOST.octets() {
            // smoltcp looks at no more than the sum of everything.
            let (old, new) = (wire::sum(&frame[22..38]), wire::sum(&ALIAS.octets()));
            let at = if frame[20] == 6 { 70 } else { 60 };
            let check = u16::from_be_bytes([frame[at], frame[at + 1]]);
            let check = !wire::fold(u64::from(!check) + u64::from(!wire::fold(old)) + new);
            frame[at..at + 2].copy_from_slice(&check.to_be_bytes());
            frame[22..38].copy_from_slice(&ALIAS.octets());
        }
        self.largest = self.largest.max(frame.len());
        Some((frame, received.offload))
    }

    /// Moves frames until none moves.
    pub(super) fn pump(&mut self) {
        loop {
            let now = self.now();
            self.iface.poll(now, &mut self.card, &mut self.sockets);
            let mut moved = !self.card.from_guest.is_empty();
            let mut frames = VecDeque::new();
            for frame in std::mem::take(&mut self.card.from_guest) {
                self.faults.pass(frame, &mut frames);
            }
            for frame in frames {
                let offload = self.offload(&frame);
                self.send(&frame, offload);
            }
            self.net.poll();
            while let Some((frame, _)) = self.take() {
                let mut frames = VecDeque::new();
                self.faults.pass(frame, &mut frames);
                self.card.to_guest.extend(frames);
                moved = true;
            }
            if !moved {
                break;
            }
        }
    }

    /// What a driver says about a frame whose checksums it leaves to the host.
    fn offload(&self, frame: &[u8]) -> Offload {
        let four = frame[12..14] == [8, 0];
        let (protocol, start) = if four { (frame[23], 34) } else { (frame[20], 54) };
        let offset = match protocol {
            6 => 16,
            17 => 6,
            _ => return Offload::default(),
        };
        let csum = (self.card.lazy && frame[12..14] != [8, 6]).then_some(Csum { start, offset });
        Offload { csum, gso: None }
    }

    /// Moves frames until `done`, for at most half a minute.
    #[track_caller]
    pub(super) fn until<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            self.pump();
            if let Some(value) = done(self) {
                self.pump();
                return value;
            }
            assert!(Instant::now() < end, "it does not come to an end: {:?}", self.net.stats());
            wait_readable(self.net.fd(), Some(Duration::from_millis(1))).unwrap();
        }
    }

    /// Time passes until no connection is left.
    #[track_caller]
    pub(super) fn over(&mut self) {
        self.until(|g| {
            g.wait(Duration::from_millis(100));
            (g.net.stats().connections == 0).then_some(())
        });
    }

    /// A UDP socket of the guest.
    pub(super) fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 100_000]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    /// Sends a datagram.
    pub(super) fn datagram(&mut self, handle: SocketHandle, bytes: &[u8], to: SocketAddr) {
        self.sockets.get_mut::<udp::Socket>(handle).send_slice(bytes, to).unwrap();
        self.pump();
    }

    /// What came to a socket.
    pub(super) fn came(&mut self, handle: SocketHandle) -> Option<(Vec<u8>, u16)> {
        let socket = self.sockets.get_mut::<udp::Socket>(handle);
        socket.recv().ok().map(|(bytes, from)| (bytes.to_vec(), from.endpoint.port))
    }

    /// A socket that the guest begins to connect.
    pub(super) fn connect(&mut self, to: SocketAddr) -> SocketHandle {
        self.connect_with(to, 64 << 10)
    }

    pub(super) fn connect_with(&mut self, to: SocketAddr, room: usize) -> SocketHandle {
        let buffer = || peer::SocketBuffer::new(vec![0; room]);
        let mut socket = peer::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        self.port = if self.port > 60_000 { 20_000 } else { self.port + 1 };
        socket.connect(self.iface.context(), to, self.port).unwrap();
        let handle = self.sockets.add(socket);
        self.pump();
        handle
    }

    pub(super) fn tcp(&mut self, handle: SocketHandle) -> &mut peer::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    #[track_caller]
    pub(super) fn connected(&mut self, to: SocketAddr) -> SocketHandle {
        let handle = self.connect(to);
        self.until(|g| g.tcp(handle).may_send().then_some(()));
        handle
    }
}

/// A listener on the host's loopback.
pub(super) fn listener() -> (std::net::TcpListener, SocketAddr) {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

pub(super) fn readable(fd: &impl AsFd) -> bool {
    wait_readable(fd.as_fd(), Some(Duration::ZERO)).unwrap()
}

/// Idle connections are small: nothing else is kept for one but its name, and what the host's kernel keeps.
const _: () = assert!(super::tcp::FLOW_SIZE <= 320);
