//! The cost of a device's turn under a hostile driver. It is counted for fuzzing, and timed for `benches/turns.rs`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::Bytes;
use crate::memory::GuestAddress;
use crate::network::{BackendKind, Capabilities, Frame, Mac, NetBackend, Offloads, Received, RxBuffer};
use crate::sys;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{Blk, Options, RawFile};
use crate::virtio::console::{Console, ConsoleOutput};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{Driver, NEXT, WRITE};
use crate::virtio::turn::{MAX_PIECE, MAX_TURN};
use crate::virtio::vsock::Vsock;

/// In a descriptor's flags: it leads to a table.
const INDIRECT: u16 = 4;
/// Where tables and buffers are. Rings are below.
const TABLES: u64 = 0x80_0000;
const BUFFERS: u64 = 0x100_0000;

/// A network that takes and has frames without end.
struct Endless(UnixStream);

impl NetBackend for Endless {
    fn capabilities(&self) -> Capabilities {
        Capabilities { to_host: Offloads::all(), to_guest: Offloads::all() }
    }
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
    fn poll(&mut self) {}
    fn send(&mut self, _: Frame<'_>) -> io::Result<()> {
        Ok(())
    }
    fn next_len(&mut self) -> Option<usize> {
        Some(65_000)
    }
    fn receive(&mut self, _: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        Ok(Some(Received { len: 60_000, offload: Default::default() }))
    }
}

fn card(backend: BackendKind) -> Net {
    Net::new(vec![backend], Mac([2, 0, 0, 0, 0, 1]), 1500)
}

/// Writes a table of `n` descriptors at `at`; `each` says address, length and flags.
fn table<D: VirtioDevice>(driver: &Driver<D>, at: u64, n: u16, mut each: impl FnMut(u16) -> (u64, u32, u16)) {
    let mut bytes = Vec::with_capacity(16 * usize::from(n));
    for number in 0..n {
        let (addr, len, flags) = each(number);
        let next = if number + 1 < n { NEXT } else { 0 };
        bytes.extend_from_slice(&addr.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&(flags | next).to_le_bytes());
        bytes.extend_from_slice(&(number + 1).to_le_bytes());
    }
    let _ = driver.memory().write(GuestAddress(at), &bytes);
}

/// Kinds of devices in [`device_turn`].
pub(super) const DEVICES: u8 = 7;

/// Chains of any shape and size to any device.
///
/// No turn does more work than it may.
pub fn device_turn(data: &[u8]) {
    let mut bytes = Bytes(data);
    match bytes.byte() % DEVICES {
        0 => flood(Driver::start(Rng), bytes),
        1 => flood(Driver::start(Console::new(ConsoleOutput::default())), bytes),
        2 => flood(Driver::start_with(|memory| Balloon::new(memory.clone())), bytes),
        3 => {
            let mut vsock = Vsock::new();
            let _listener = vsock.listen(1);
            flood(Driver::start(vsock), bytes);
        }
        4 => {
            let Ok((socket, _)) = UnixStream::pair() else { return };
            flood(Driver::start(card(BackendKind::other(Endless(socket)))), bytes);
        }
        number => {
            let disk =
                sys::scratch_file(&std::env::temp_dir(), crate::Size::mib(8)).map(|f| RawFile::from_file(f, false));
            let Ok(Ok(disk)) = disk else { return };
            let engine =
                if number == 5 { crate::virtio::blk::IoEngine::IoUring } else { crate::virtio::blk::IoEngine::Threads };
            flood(Driver::start(Blk::new(Box::new(disk), Options { engine, ..Options::new(0) })), bytes);
        }
    }
}

fn flood<D: VirtioDevice>(mut driver: Driver<D>, mut bytes: Bytes<'_>) {
    const LENGTHS: [u32; 8] = [1, 12, 16, 44, 512, 4096, 1 << 16, 15 << 20];
    let queues = driver.device.profile().queues.len();
    while !bytes.done() {
        let (what, queue) = (bytes.byte(), usize::from(bytes.byte()) % queues);
        let (count, len) = (u16::from(bytes.byte()) + 1, LENGTHS[usize::from(bytes.byte() % 8)]);
        let (first, readable) = (LENGTHS[usize::from(bytes.byte() % 8)], u16::from(bytes.byte()));
        // What headers say.
        let head = bytes.take(44).to_vec();
        let _ = driver.memory().write(GuestAddress(BUFFERS), &head);
        table(&driver, TABLES, count, |n| match n {
            0 => (BUFFERS, first, if readable == 0 { WRITE } else { 0 }),
            n => (BUFFERS + 8 * u64::from(n), len, if n >= readable { WRITE } else { 0 }),
        });
        for _ in 0..=what % 32 {
            driver.send_raw(queue, &[(TABLES, 16 * u32::from(count), INDIRECT)]);
        }
        for _ in 0..=what / 64 {
            driver.dispatch(queue);
        }
        if what % 3 == 0 {
            driver.dispatch_watched(u32::from(what % 5));
        }
        for queue in 0..queues {
            while driver.collect(queue).is_some() {}
        }
        let most = driver.parts().1.turn().most();
        assert!(most <= MAX_TURN + MAX_PIECE, "a turn cost {most}");
    }
}

/// The longest turn of each device under a hostile driver, in milliseconds.
///
/// It is the processor time of the loop.
#[cfg(feature = "internals")]
#[allow(clippy::unwrap_used, reason = "for this repository's bench alone")]
pub mod bench {
    use super::*;
    use crate::sys::processor_time;
    use crate::virtio::blk::{BasePath, OverlayFile, create};
    use crate::virtio::testing::Driver;

    /// Gives a device its turn over and over, and says how long the longest was. `refill` puts new requests in.
    fn longest<D: VirtioDevice>(
        driver: &mut Driver<D>,
        queue: usize,
        turns: u32,
        mut refill: impl FnMut(&mut Driver<D>),
    ) -> f64 {
        let mut longest = 0.0f64;
        for _ in 0..turns {
            refill(driver);
            let begin = processor_time();
            driver.dispatch(queue);
            longest = longest.max((processor_time() - begin).as_secs_f64() * 1000.0);
            for queue in 0..driver.device.profile().queues.len() {
                while driver.collect(queue).is_some() {}
            }
        }
        longest
    }

    /// As many chains as there is room for, each the table that was written.
    fn fill<D: VirtioDevice>(driver: &mut Driver<D>, queue: usize, count: u32) {
        while driver.send_raw(queue, &[(TABLES, 16 * count, INDIRECT)]) {}
    }

    /// What is measured, and how long the longest turn was.
    pub fn longest_turns() -> Vec<(String, f64)> {
        let mut all = Vec::new();

        let mut driver = Driver::start(Console::new(ConsoleOutput::default()));
        table(&driver, TABLES, 64, |_| (BUFFERS, 8 << 20, 0));
        all.push(("console: chains of 512 MiB".into(), longest(&mut driver, 1, 200, |driver| fill(driver, 1, 64))));

        let mut driver = Driver::start(Rng);
        table(&driver, TABLES, 64, |_| (BUFFERS, 8 << 20, WRITE));
        all.push(("rng: chains of 512 MiB".into(), longest(&mut driver, 0, 100, |driver| fill(driver, 0, 64))));

        let balloon = || Driver::start_with(|memory| Balloon::new(memory.clone()));
        let mut driver = balloon();
        table(&driver, TABLES, 64, |n| (BUFFERS + 8192 * u64::from(n), 4096, WRITE));
        let touch =
            |driver: &Driver<Balloon>| driver.memory().write(GuestAddress(BUFFERS), &vec![1; 15 << 20]).unwrap();
        let figure = longest(&mut driver, 3, 200, |driver| {
            touch(driver);
            fill(driver, 3, 64);
        });
        all.push(("balloon: reports of single pages".into(), figure));
        table(&driver, TABLES, 64, |_| (BUFFERS, 15 << 20, WRITE));
        let figure = longest(&mut driver, 3, 100, |driver| {
            touch(driver);
            fill(driver, 3, 64);
        });
        all.push(("balloon: reports of 960 MiB".into(), figure));
        let mut driver = balloon();
        let numbers: Vec<u8> = (0..4096u32).flat_map(|n| (0x1000 + 2 * (n % 1900)).to_le_bytes()).collect();
        let figure = longest(&mut driver, 0, 200, |driver| {
            touch(driver);
            while driver.send(0, &[&numbers], &[]) {}
        });
        all.push(("balloon: inflated by single pages".into(), figure));

        let mut driver = Driver::start(card(BackendKind::other(Endless(UnixStream::pair().unwrap().0))));
        let figure = longest(&mut driver, 0, 200, |driver| {
            table(driver, TABLES, 256, |n| (BUFFERS + u64::from(n), 1, WRITE));
            fill(driver, 0, 256);
        });
        all.push(("net: frames of 60 kB into buffers of single bytes".into(), figure));

        let (net, _socket, frame) = crate::network::fuzzing::most_datagrams().unwrap();
        let mut driver = Driver::start(card(BackendKind::User(Box::new(net))));
        let figure = longest(&mut driver, 1, 50, |driver| {
            driver.memory().write(GuestAddress(BUFFERS), &frame).unwrap();
            while driver.send_raw(1, &[(BUFFERS, frame.len() as u32, 0)]) {}
        });
        all.push(("net: frames of 128 datagrams, through sockets".into(), figure));

        let (net, _socket, frame) = crate::network::fuzzing::new_flows().unwrap();
        let mut driver = Driver::start(card(BackendKind::User(Box::new(net))));
        let mut from = 0u16;
        let figure = longest(&mut driver, 1, 50, |driver| {
            for at in (BUFFERS..).step_by(64).take(256) {
                from = from.wrapping_add(1).max(1024);
                let frame = frame(from);
                driver.memory().write(GuestAddress(at), &frame).unwrap();
                driver.send_raw(1, &[(at, frame.len() as u32, 0)]);
            }
        });
        all.push(("net: datagrams that each need a socket".into(), figure));

        for (name, nth) in [("net: segments of 65 kB for a switch to cut", 0), ("net: empty packets on a switch", 1)] {
            let (port, frames, mut take) = crate::network::fuzzing::switched().unwrap();
            let mut driver = Driver::start(card(BackendKind::Switch(Box::new(port))));
            let frame = &frames[nth];
            let figure = longest(&mut driver, 1, 100, |driver| {
                take();
                driver.memory().write(GuestAddress(BUFFERS), frame).unwrap();
                while driver.send_raw(1, &[(BUFFERS, frame.len() as u32, 0)]) {}
            });
            all.push((name.into(), figure));
        }

        let (net, _socket, _) = crate::network::fuzzing::most_datagrams().unwrap();
        let mut driver = Driver::start(card(BackendKind::User(Box::new(net))));
        let figure = longest(&mut driver, 2, 200, |driver| {
            // VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, of none.
            while driver.send(2, &[&[5, 0], &[0; 8]], &[1]) {}
        });
        all.push(("net: commands on the control queue".into(), figure));

        let mut driver = balloon();
        table(&driver, TABLES, 256, |_| (BUFFERS, 15 << 20, 0));
        let figure = longest(&mut driver, 2, 200, |driver| fill(driver, 2, 256));
        all.push(("balloon: statistics of 4 GB".into(), figure));

        let mut vsock = Vsock::new();
        let _listener = vsock.listen(1).unwrap();
        let mut driver = Driver::start(vsock);
        let mut port = 0u32;
        let figure = longest(&mut driver, 1, 200, |driver| {
            for _ in 0..250 {
                let mut header = [0; 44];
                header[..8].copy_from_slice(&3u64.to_le_bytes());
                header[8..16].copy_from_slice(&2u64.to_le_bytes());
                header[16..20].copy_from_slice(&port.to_le_bytes());
                header[20..24].copy_from_slice(&1u32.to_le_bytes());
                header[28..32].copy_from_slice(&[1, 0, if port.is_multiple_of(2) { 1 } else { 3 }, 0]);
                port += u32::from(header[30] == 3);
                driver.send(1, &[&header], &[]);
                driver.send(0, &[], &[100]);
                port += u32::from(header[30] == 1);
            }
        });
        all.push(("vsock: connections that come and go".into(), figure));

        disks(&mut all);
        all
    }

    /// Requests of each kind, as large as they can be, to new disks of each kind.
    fn disks(all: &mut Vec<(String, f64)>) {
        use crate::virtio::blk::IoEngine::{IoUring, Threads};
        let file = || sys::scratch_file(&std::env::temp_dir(), crate::Size::mib(256)).unwrap();
        let raw = |engine| {
            let disk = RawFile::from_file(file(), false).unwrap();
            Driver::start(Blk::new(Box::new(disk), Options { engine, ..Options::new(0) }))
        };
        let directory = crate::virtio::blk::fuzzing::TempDir::new().unwrap();
        let (base, path) = (directory.path("base"), directory.path("overlay"));
        std::fs::File::create(&base).unwrap().set_len(256 << 20).unwrap();
        let over = || {
            let _ = std::fs::remove_file(&path);
            create(&path, &BasePath::Raw(base.clone()), None).unwrap();
            let disk = OverlayFile::open(&path, None, false).unwrap();
            Driver::start(Blk::new(Box::new(disk), Options { engine: IoUring, ..Options::new(0) }))
        };
        for (name, disk) in [
            ("through io_uring", &(|| raw(IoUring)) as &dyn Fn() -> Driver<Blk>),
            ("by calls", &|| raw(Threads)),
            ("on an overlay", &over),
        ] {
            for kind in [READ, WRITE_OUT, FLUSH, DISCARD, WRITE_ZEROES] {
                // What a host does behind a file, and for others at the same time, varies by much: the middle of several new disks.
                let mut figures = [(); 5].map(|()| {
                    let mut driver = disk();
                    request(&driver, kind);
                    longest(&mut driver, 0, 40, |driver| fill(driver, 0, 256))
                });
                figures.sort_by(f64::total_cmp);
                let [_, _, figure, ..] = figures;
                all.push((format!("blk: {} {name}", called(kind)), figure));
            }
        }
    }

    /// Types of requests (Virtio 1.3, 5.2.6).
    const READ: u32 = 0;
    const WRITE_OUT: u32 = 1;
    const FLUSH: u32 = 4;
    const DISCARD: u32 = 11;
    const WRITE_ZEROES: u32 = 13;

    fn called(kind: u32) -> &'static str {
        match kind {
            READ => "reads of 240 MiB",
            WRITE_OUT => "writes of 240 MiB",
            FLUSH => "flushes",
            DISCARD => "discards of 32 ranges",
            _ => "zeroes in 32 ranges",
        }
    }

    /// Writes the table of such a request.
    fn request(driver: &Driver<Blk>, kind: u32) {
        let (head, status) = (BUFFERS - 4096, BUFFERS - 16);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        driver.memory().write(GuestAddress(head), &header).unwrap();
        // 32 ranges of 4 MiB each, all apart.
        let range = |n: u64| [((n << 23) / 512).to_le_bytes().as_slice(), &8192u32.to_le_bytes(), &[0; 4]].concat();
        let ranges: Vec<u8> = (0..32).flat_map(range).collect();
        driver.memory().write(GuestAddress(head + 16), &ranges).unwrap();
        let flags = if kind == READ { WRITE } else { 0 };
        table(driver, TABLES, 256, |n| match (n, kind) {
            (0, _) => (head, 16, 0),
            (255, _) => (status, 1, WRITE),
            (_, READ | WRITE_OUT) => (BUFFERS, 960 << 10, flags),
            // Ranges, and empty descriptors behind them.
            (1, DISCARD | WRITE_ZEROES) => (head + 16, 512, 0),
            _ => (head, 0, 0),
        });
    }
}
