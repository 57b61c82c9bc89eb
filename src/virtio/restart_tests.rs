//! Devices stop in the middle of traffic, and goes on from its state. Nothing is lost, and nothing is done twice.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::balloon::Balloon;
use super::blk::{Blk, DiskLimit, IoEngine, Options, RawFile};
use super::console::{Console, ConsoleOutput};
use super::net::{Net, NetLimit};
use super::rng::Rng;
use super::testing::{Driver, RingFeatures};
use super::{DrainCause, VirtioDevice};
use crate::memory::GuestMemory;
use crate::network::{BackendKind, Mac, SocketBackend};
use crate::rate::Rate;
use crate::sys;

/// A guest that goes on using its device while that is stopped and started.
trait Guest {
    type Device: VirtioDevice;

    /// Makes its device, with the guest's memory.
    fn device(&self, memory: &GuestMemory) -> Self::Device;

    /// Makes the device that goes on: another one on the same host's parts, unless those are live.
    fn next(&self, _: Self::Device, memory: &GuestMemory) -> Self::Device {
        self.device(memory)
    }

    /// Hands over request `n`, without a kick; false when the queue is full.
    fn send(&mut self, driver: &mut Driver<Self::Device>, n: usize) -> bool;

    /// Kicks all queues.
    fn kick(&mut self, driver: &mut Driver<Self::Device>);

    /// Takes what has come back.
    fn collect(&mut self, driver: &mut Driver<Self::Device>);

    /// Whether all of the first `sent` requests have been answered, rightly.
    fn complete(&mut self, sent: usize) -> bool;
}

/// Lets such a guest work, for several orders of requests, kicks and stops.
fn survives_stops<G: Guest>(make: impl Fn() -> G) {
    for seed in 1..12u64 {
        for (indirect, event_idx) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut guest = make();
            let mut driver = Driver::start_using(RingFeatures { indirect, event_idx }, |memory| guest.device(memory));
            let (mut random, mut sent) = (seed, 0);
            for _ in 0..40 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let dice = (random >> 33) as usize;
                sent += usize::from(guest.send(&mut driver, sent));
                if dice.is_multiple_of(2) {
                    guest.kick(&mut driver);
                }
                if dice.is_multiple_of(3) {
                    guest.collect(&mut driver);
                }
                if dice.is_multiple_of(5) {
                    driver = driver.restart(|device, memory| guest.next(device, memory));
                }
            }
            let deadline = Instant::now() + Duration::from_secs(20);
            while !guest.complete(sent) {
                assert!(Instant::now() < deadline, "seed {seed}, indirect {indirect}, event index {event_idx}");
                guest.kick(&mut driver);
                guest.collect(&mut driver);
            }
            assert!(!driver.needs_reset());
        }
    }
}

/// Asks for random bytes.
#[derive(Default)]
struct Random {
    got: usize,
}

impl Guest for Random {
    type Device = Rng;

    fn device(&self, _: &GuestMemory) -> Rng {
        Rng
    }

    fn send(&mut self, driver: &mut Driver<Rng>, _: usize) -> bool {
        driver.send(0, &[], &[16, 16])
    }

    fn kick(&mut self, driver: &mut Driver<Rng>) {
        driver.dispatch(0);
    }

    fn collect(&mut self, driver: &mut Driver<Rng>) {
        while let Some((bytes, written)) = driver.receive(0) {
            assert!(written == 32 && bytes.iter().any(|b| *b != 0));
            self.got += 1;
        }
    }

    fn complete(&mut self, sent: usize) -> bool {
        self.got == sent
    }
}

#[test]
fn entropy_requests_survive_stops() {
    survives_stops(Random::default);
}

/// Prints numbers, some of them long.
#[derive(Default)]
struct Printing {
    output: ConsoleOutput,
    expected: Vec<u8>,
    printed: usize,
}

impl Guest for Printing {
    type Device = Console;

    fn device(&self, _: &GuestMemory) -> Console {
        Console::new(self.output.clone())
    }

    fn send(&mut self, driver: &mut Driver<Console>, n: usize) -> bool {
        let line = format!("{n} ").repeat(1 + n % 7 * 40);
        let sent = driver.send(1, &[line.as_bytes(), b"end"], &[]);
        if sent {
            self.expected.extend(line.bytes().chain(*b"end"));
        }
        sent
    }

    fn kick(&mut self, driver: &mut Driver<Console>) {
        driver.dispatch(1);
    }

    fn collect(&mut self, driver: &mut Driver<Console>) {
        while driver.receive(1).is_some() {
            self.printed += 1;
        }
    }

    fn complete(&mut self, sent: usize) -> bool {
        self.printed == sent && self.expected == self.output.tail()
    }
}

#[test]
fn console_output_survives_stops() {
    survives_stops(Printing::default);
}

/// Writes sectors and reads them again, within limits that make requests wait.
struct Storing {
    file: File,
    options: fn() -> Options,
    /// What each sector should hold: the number of the last write to it.
    sectors: BTreeMap<u64, u8>,
    answered: usize,
}

impl Storing {
    fn with(options: fn() -> Options) -> Self {
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        file.set_len(64 * 512).unwrap();
        Self { file, options, sectors: BTreeMap::new(), answered: 0 }
    }
}

impl Guest for Storing {
    type Device = Blk;

    fn device(&self, _: &GuestMemory) -> Blk {
        let file = RawFile::from_file(self.file.try_clone().unwrap(), false).unwrap();
        Blk::new(Box::new(file), (self.options)())
    }

    fn send(&mut self, driver: &mut Driver<Blk>, n: usize) -> bool {
        // Every sector is written once: requests in flight may be done in any order.
        let (sector, value) = (n as u64, n as u8 + 1);
        let header = [1u32.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
        let sent = driver.send(0, &[&header, &[value; 200], &[value; 312]], &[1]);
        if sent {
            self.sectors.insert(sector, value);
        }
        sent
    }

    fn kick(&mut self, driver: &mut Driver<Blk>) {
        driver.dispatch(0);
        // What the engine has done comes by a descriptor of its own.
        driver.dispatch_watched(0);
    }

    fn collect(&mut self, driver: &mut Driver<Blk>) {
        while let Some((status, _)) = driver.receive(0) {
            assert_eq!(status, [0]);
            self.answered += 1;
        }
    }

    fn complete(&mut self, sent: usize) -> bool {
        let holds = |(sector, value): (&u64, &u8)| {
            let mut bytes = [0; 512];
            self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
            bytes == [*value; 512]
        };
        self.answered == sent && self.sectors.iter().all(holds)
    }
}

#[test]
fn disk_requests_survive_stops() {
    survives_stops(|| Storing::with(|| Options { engine: IoEngine::IoUring, ..Options::new(0) }));
    survives_stops(|| Storing::with(|| Options { engine: IoEngine::Threads, ..Options::new(0) }));
}

#[test]
fn disk_requests_that_wait_for_a_limit_survive_stops() {
    let limited = || {
        let limit = DiskLimit::none().write_operations(Rate::per_second(1).one_time_burst(2));
        Options { engine: IoEngine::Threads, limit, ..Options::new(0) }
    };
    let mut guest = Storing::with(limited);
    let mut driver = Driver::start_with(|memory| guest.device(memory));
    for n in 0..20 {
        assert!(guest.send(&mut driver, n));
    }
    for _ in 0..3 {
        guest.kick(&mut driver);
        driver = driver.restart(|device, memory| guest.next(device, memory));
    }
    guest.collect(&mut driver);
    assert!(guest.answered < 20, "some wait still");
    let (disk, io) = driver.parts();
    assert!(disk.drain(io, Duration::from_secs(20), DrainCause::End));
    guest.collect(&mut driver);
    assert!(guest.complete(20));
}

/// Fills a balloon.
#[derive(Default)]
struct Ballooning {
    given: usize,
}

impl Guest for Ballooning {
    type Device = Balloon;

    fn device(&self, memory: &GuestMemory) -> Balloon {
        Balloon::new(memory.clone())
    }

    fn send(&mut self, driver: &mut Driver<Balloon>, n: usize) -> bool {
        let page = 0x1800 + n as u32;
        driver.memory().write(crate::memory::GuestAddress(u64::from(page) << 12), &[7]).unwrap();
        driver.send(0, &[&page.to_le_bytes()], &[])
    }

    fn kick(&mut self, driver: &mut Driver<Balloon>) {
        driver.dispatch(0);
    }

    fn collect(&mut self, driver: &mut Driver<Balloon>) {
        while driver.receive(0).is_some() {
            let mut byte = [1];
            let page = 0x1800 + self.given as u64;
            driver.memory().read(crate::memory::GuestAddress(page << 12), &mut byte).unwrap();
            assert_eq!(byte, [0], "page {page:#x} is the host's");
            self.given += 1;
            assert!(driver.device.held() >= self.given as u64);
        }
    }

    fn complete(&mut self, sent: usize) -> bool {
        self.given == sent
    }
}

#[test]
fn balloon_contents_survive_stops() {
    survives_stops(Ballooning::default);
}

#[test]
fn a_balloon_request_that_takes_several_turns_is_ended_before_a_stop() {
    const PAGES: u32 = 2000;
    let guest = Ballooning::default();
    let mut driver = Driver::start_with(|memory| guest.device(memory));
    // No two of them follow each other, so each is a system call.
    let numbers: Vec<u8> = (0..PAGES).flat_map(|n| (0x1800 + 2 * (n % 1000) + n / 1000).to_le_bytes()).collect();
    assert!(driver.send(0, &[&numbers], &[]));
    driver.dispatch(0);
    assert!(driver.receive(0).is_none(), "one turn is not enough");
    let mut driver = driver.restart(|device, memory| guest.next(device, memory));
    assert!(driver.receive(0).is_some());
    assert_eq!(driver.device.held(), u64::from(PAGES), "each is counted once");
}

/// Sends frames to an echo on the host, and takes them back.
struct Echoing {
    near: std::cell::RefCell<Option<UnixStream>>,
    far: UnixStream,
    partial: Vec<u8>,
    sent: usize,
    returned: usize,
}

const RX: usize = 0;
const TX: usize = 1;
const NET_HEADER: [u8; 12] = [0; 12];

impl Echoing {
    fn new() -> Self {
        let (near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        Self { near: Some(near).into(), far, partial: Vec::new(), sent: 0, returned: 0 }
    }
}

impl Guest for Echoing {
    type Device = Net;

    fn device(&self, _: &GuestMemory) -> Net {
        let backend = SocketBackend::new(self.near.borrow_mut().take().unwrap().into()).unwrap();
        Net::new(vec![BackendKind::other(backend)], Mac([2, 0, 0, 0, 0, 1]), 1500)
    }

    /// A socket has bytes of frames in it, so the device itself goes on.
    fn next(&self, device: Net, _: &GuestMemory) -> Net {
        device
    }

    fn send(&mut self, driver: &mut Driver<Net>, n: usize) -> bool {
        driver.send(RX, &[], &[700, 836]);
        let frame: Vec<u8> = (0..60 + n % 900).map(|at| (at + n) as u8).collect();
        driver.send(TX, &[&NET_HEADER, &(n as u32).to_le_bytes(), &frame], &[])
    }

    fn kick(&mut self, driver: &mut Driver<Net>) {
        driver.dispatch(TX);
        let mut buffer = [0; 65536];
        if let Ok(count) = self.far.read(&mut buffer) {
            self.partial.extend(&buffer[..count]);
        }
        let count = self.far.write(&self.partial).unwrap_or(0);
        self.partial.drain(..count);
        driver.dispatch_watched(0);
        driver.dispatch(RX);
    }

    fn collect(&mut self, driver: &mut Driver<Net>) {
        while driver.receive(TX).is_some() {
            self.sent += 1;
        }
        while let Some((bytes, written)) = driver.receive(RX) {
            let frame = &bytes[12..written as usize];
            let (number, rest) = frame.split_first_chunk().unwrap();
            let n = u32::from_le_bytes(*number) as usize;
            assert_eq!(n, self.returned, "in order, each once");
            assert!(rest.iter().enumerate().all(|(at, byte)| *byte == (at + n) as u8) && rest.len() == 60 + n % 900);
            self.returned += 1;
        }
    }

    fn complete(&mut self, sent: usize) -> bool {
        self.sent == sent && self.returned == sent
    }
}

#[test]
fn frames_survive_stops() {
    survives_stops(Echoing::new);
}

#[test]
fn frames_that_wait_for_a_limit_survive_stops() {
    let mut guest = Echoing::new();
    let mut driver = Driver::start_with(|memory| guest.device(memory));
    driver.parts().0.set_limit(&NetLimit::none().sent_packets(Rate::per_second(1).one_time_burst(1)));
    for n in 0..10 {
        assert!(guest.send(&mut driver, n));
    }
    guest.kick(&mut driver);
    guest.collect(&mut driver);
    assert!(guest.sent < 10, "some wait");
    driver = driver.restart(|device, memory| guest.next(device, memory));
    driver.parts().0.set_limit(&NetLimit::none());
    let deadline = Instant::now() + Duration::from_secs(20);
    while !guest.complete(10) {
        assert!(Instant::now() < deadline, "{} of 10 frames", guest.returned);
        guest.kick(&mut driver);
        guest.collect(&mut driver);
    }
}
