//! The disk under a fake driver, over both engines.

mod mock;

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::config::{F_DISCARD, F_MQ, F_RO, F_WRITE_ZEROES};
use super::*;
use crate::sys;
use crate::virtio::testing::{Driver, WRITE};
use crate::virtio::turn::{MAX_PIECE, MAX_TURN};

const ENGINES: [IoEngine; 2] = [IoEngine::IoUring, IoEngine::Threads];

fn options(engine: IoEngine) -> Options {
    Options { engine, serial: "serial".into(), ..Options::new(0) }
}

fn scratch(sectors: u64) -> File {
    let file = sys::temp_file(&std::env::temp_dir()).unwrap();
    file.set_len(sectors * SECTOR).unwrap();
    file
}

fn raw(file: &File, read_only: bool) -> Box<dyn BlockBackend> {
    Box::new(RawFile::from_file(file.try_clone().unwrap(), read_only).unwrap())
}

/// A disk over each engine, and its file.
fn disks(sectors: u64) -> Vec<(Driver<Blk>, File)> {
    let disk = |engine| {
        let file = scratch(sectors);
        let disk = Blk::new(raw(&file, false), options(engine));
        assert_eq!((disk.engine(), disk.blocks()), (engine, engine == IoEngine::Threads));
        (Driver::start(disk), file)
    };
    ENGINES.map(disk).into()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

/// A range of a discard, or of zeroes.
fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().as_slice(), &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

const READ: u32 = 0;
const WRITES: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// Lets the loop turn until something was answered on `queue`: the bytes, and how many are said to be written.
fn answer_on(driver: &mut Driver<Blk>, queue: usize) -> (Vec<u8>, u32) {
    for _ in 0..20_000 {
        if let Some(answer) = driver.receive(queue) {
            return answer;
        }
        driver.dispatch_watched(RING_READY);
        std::thread::sleep(Duration::from_micros(50));
    }
    panic!("no answer");
}

fn status(driver: &mut Driver<Blk>) -> u8 {
    *answer_on(driver, 0).0.last().unwrap()
}

/// Sends a request and returns the data that came back and the status.
fn request(driver: &mut Driver<Blk>, readable: &[&[u8]], writable: &[usize]) -> (Vec<u8>, u8) {
    assert!(driver.send(0, readable, writable));
    driver.dispatch(0);
    let (mut bytes, written) = answer_on(driver, 0);
    let status = bytes.pop().unwrap();
    assert_eq!(written, if status == S_OK { bytes.len() as u32 + 1 } else { 1 });
    (bytes, status)
}

#[test]
fn reads_what_the_file_holds_in_any_split() {
    for (mut driver, file) in disks(8) {
        file.write_all_at(&[7; 1024], 512).unwrap();
        let (data, status) = request(&mut driver, &[&header(READ, 1)[..5], &header(READ, 1)[5..]], &[100, 412, 1]);
        assert_eq!((data.len(), data[0], data[511], status), (512, 7, 7, S_OK));
        assert!(driver.interrupted());
        // Header, data and status may share descriptors.
        let (data, status) = request(&mut driver, &[&header(READ, 2)], &[513]);
        assert_eq!((data.len(), data[0], status), (512, 7, S_OK));
    }
}

#[test]
fn writes_reach_the_file_and_flush_is_answered() {
    for (mut driver, file) in disks(8) {
        assert_eq!(request(&mut driver, &[&header(WRITES, 1), &[9; 200], &[8; 312]], &[1]).1, S_OK);
        assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_OK);
        let mut back = [0; 512];
        file.read_exact_at(&mut back, 512).unwrap();
        assert_eq!((back[0], back[199], back[200], back[511]), (9, 9, 8, 8));
    }
}

#[test]
fn requests_beyond_the_disk_are_io_errors() {
    for (mut driver, _) in disks(8) {
        for (sector, len) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
            assert_eq!(request(&mut driver, &[&header(READ, sector)], &[len, 1]).1, S_IOERR, "{sector} {len}");
            assert_eq!(request(&mut driver, &[&header(WRITES, sector), &vec![0; len]], &[1]).1, S_IOERR);
        }
        assert_eq!(request(&mut driver, &[&[0; 5]], &[1]).1, S_IOERR);
        // Old SCSI commands, lifetimes, secure erase, zones, nonsense.
        for kind in [2, 10, 14, 15, 24, u32::MAX] {
            assert_eq!(request(&mut driver, &[&header(kind, 0)], &[1]).1, S_UNSUPP, "{kind}");
        }
    }
}

#[test]
fn discards_and_zeroes_give_space_back() {
    use std::os::unix::fs::MetadataExt;
    for (mut driver, file) in disks(1024) {
        let features = driver.device.profile().features;
        assert_eq!(features & (F_DISCARD | F_WRITE_ZEROES), F_DISCARD | F_WRITE_ZEROES);
        file.write_all_at(&[7; 512 << 10], 0).unwrap();
        let full = file.metadata().unwrap().blocks();
        let two = [range(0, 256, 0), range(512, 256, 0)].concat();
        assert_eq!(request(&mut driver, &[&header(DISCARD, 0), &two[..7], &two[7..]], &[1]).1, S_OK);
        assert!(file.metadata().unwrap().blocks() <= full - 512);
        assert_eq!(request(&mut driver, &[&header(ZEROES, 0), &range(256, 8, 0)], &[1]).1, S_OK);
        assert_eq!(request(&mut driver, &[&header(ZEROES, 0), &range(264, 128, 1)], &[1]).1, S_OK);
        let mut back = vec![1; 256 << 10];
        file.read_exact_at(&mut back, 256 * 512).unwrap();
        assert!(back[..136 * 512].iter().all(|b| *b == 0) && back[136 * 512] == 7);
    }
}

#[test]
fn invalid_ranges_change_nothing() {
    for (mut driver, file) in disks(8) {
        file.write_all_at(&[7; 4096], 0).unwrap();
        let (fine, beyond) = (range(0, 8, 0), range(1, 8, 0));
        for (kind, ranges, expected) in [
            (DISCARD, [fine.clone(), beyond.clone()].concat(), S_IOERR),
            (ZEROES, [fine.clone(), beyond].concat(), S_IOERR),
            (DISCARD, range(u64::MAX, 1, 0), S_IOERR),
            (DISCARD, range(0, u32::MAX, 0), S_IOERR),
            (DISCARD, [fine.clone(), range(0, 1, 1)].concat(), S_UNSUPP),
            (ZEROES, range(0, 1, 2), S_UNSUPP),
            (DISCARD, fine[..15].to_vec(), S_IOERR),
            (ZEROES, fine.repeat(33), S_IOERR),
            (ZEROES, vec![], S_IOERR),
        ] {
            let what = (kind, ranges.len());
            assert_eq!(request(&mut driver, &[&header(kind, 0), &ranges], &[1]).1, expected, "{what:?}");
        }
        let mut back = [0; 4096];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back.iter().all(|b| *b == 7));
    }
}

#[test]
fn the_serial_number_can_be_read() {
    for (mut driver, _) in disks(1) {
        let (data, status) = request(&mut driver, &[&header(8, 0)], &[20, 1]);
        assert_eq!((&data[..7], status), (&b"serial\0"[..], S_OK));
        assert_eq!(request(&mut driver, &[&header(8, 0)], &[19, 1]).1, S_IOERR);
    }
}

#[test]
fn a_read_only_disk_refuses_writes_and_says_so() {
    for engine in ENGINES {
        let disk = Blk::new(raw(&scratch(8), true), options(engine));
        assert_eq!(disk.profile().features & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
        let mut driver = Driver::start(disk);
        assert_eq!(request(&mut driver, &[&header(WRITES, 0), &[1; 512]], &[1]).1, S_IOERR);
        assert_eq!(request(&mut driver, &[&header(DISCARD, 0), &range(0, 1, 0)], &[1]).1, S_UNSUPP);
        assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_OK);
    }
}

#[test]
fn request_without_a_status_buffer_is_returned() {
    for (mut driver, _) in disks(1) {
        driver.send(0, &[&header(FLUSH, 0)], &[]);
        driver.dispatch(0);
        assert_eq!(driver.receive(0), Some((vec![], 0)));
        assert!(!driver.needs_reset());
    }
}

#[test]
fn a_request_has_as_many_pieces_as_its_queue_and_no_more() {
    const INDIRECT: u16 = 4;
    const TABLE: u64 = 0x8_0000;
    for (mut driver, _) in disks(2048) {
        for data in [254, 255] {
            let memory = driver.memory();
            memory.write(crate::memory::GuestAddress(TABLE - 16), &header(READ, 0)).unwrap();
            for n in 0..data + 2u64 {
                let (addr, len, flags) = match n {
                    0 => (TABLE - 16, 16, 1),
                    n if n <= data => (0x10_0000 + 0x2_0000 + n * 512, 512, 3),
                    _ => (TABLE - 17, 1, 2u16),
                };
                let rest = [len as u16, 0, flags, n as u16 + 1].map(u16::to_le_bytes).concat();
                let bytes = [addr.to_le_bytes().as_slice(), &rest].concat();
                memory.write(crate::memory::GuestAddress(TABLE + n * 16), &bytes).unwrap();
            }
            driver.send_raw(0, &[(TABLE, (data as u32 + 2) * 16, INDIRECT)]);
            driver.dispatch(0);
            if data > 254 {
                assert!(driver.needs_reset());
                continue;
            }
            answer_on(&mut driver, 0);
            let mut status = [9];
            memory.read(crate::memory::GuestAddress(TABLE - 17), &mut status).unwrap();
            assert_eq!(status, [S_OK]);
        }
    }
}

#[test]
fn addresses_outside_memory_need_a_reset() {
    for (mut driver, _) in disks(1) {
        driver.send_raw(0, &[(u64::MAX - 4, 16, 0), (0, 1, WRITE)]);
        driver.dispatch(0);
        assert!(driver.needs_reset());
        assert_eq!(driver.receive(0), None);
    }
}

#[test]
fn a_disk_that_shrank_is_an_io_error() {
    for (mut driver, file) in disks(8) {
        file.set_len(512).unwrap();
        assert_eq!(request(&mut driver, &[&header(READ, 4)], &[512, 1]).1, S_IOERR);
    }
}

#[test]
fn many_requests_on_many_queues_are_in_flight_together() {
    for engine in ENGINES {
        let file = scratch(4096);
        for n in 0..4096u64 {
            file.write_all_at(&n.to_le_bytes(), n * 512).unwrap();
        }
        let disk = Blk::new(raw(&file, false), Options { queues: 4, ..options(engine) });
        assert_ne!(disk.profile().features & F_MQ, 0);
        assert_eq!((disk.profile().queues.len(), disk.config.word(32) >> 16), (4, 4));
        let mut driver = Driver::start(disk);
        for n in 0..320u64 {
            assert!(driver.send((n % 4) as usize, &[&header(READ, n * 7)], &[512, 1]));
        }
        (0..4).for_each(|queue| driver.dispatch(queue));
        let mut seen = Vec::new();
        for n in 0..320 {
            let (bytes, _) = answer_on(&mut driver, n % 4);
            assert_eq!(bytes[512], S_OK);
            seen.push(u64::from_le_bytes(bytes[..8].try_into().unwrap()));
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..320).map(|n| n * 7).collect::<Vec<_>>());
    }
}

#[test]
fn grown_disk_signals_a_config_change() {
    for (mut driver, file) in disks(8) {
        let (disk, io) = driver.parts();
        assert_eq!(disk.grow(Some(io), 4 * 512).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        disk.grow(Some(io), 16 * 512).unwrap();
        assert!(driver.interrupted());
        assert_eq!((driver.device.config.word(0), file.metadata().unwrap().len()), (16, 8192));
        assert_eq!(request(&mut driver, &[&header(WRITES, 15), &[1; 512]], &[1]).1, S_OK);
    }
}

/// A request of 240 buffers of 256 KiB, all of them the same: 60 MiB. What it says is at `at`.
fn huge(driver: &mut Driver<Blk>, what: u32, at: u64) -> bool {
    let memory = driver.memory();
    memory.write(crate::memory::GuestAddress(at), &header(what, 0)).unwrap();
    let flags = if what == READ { WRITE } else { 0 };
    let data = (0..240).map(|_| (0x100_0000, 256 << 10, flags));
    let pieces: Vec<_> = [(at, 16, 0)].into_iter().chain(data).chain([(at + 64, 1, WRITE)]).collect();
    driver.send_raw(0, &pieces)
}

#[test]
fn large_requests_take_many_turns() {
    for what in [READ, WRITES] {
        for (mut driver, file) in disks(60 << 11) {
            file.write_all_at(&[7; 4096], (59 << 20) - 4096).unwrap();
            driver.memory().write(crate::memory::GuestAddress(0x100_0000), &vec![9; 256 << 10]).unwrap();
            assert!(huge(&mut driver, what, 0x180_0000));
            let mut turns = 0;
            while driver.collect(0).is_none() {
                driver.dispatch(0);
                driver.dispatch_watched(RING_READY);
                turns += 1;
                assert!(turns < 1_000_000, "no answer");
            }
            assert!(turns > 1 || driver.most_work() > MAX_TURN, "one turn was enough");
            let mut status = [9];
            driver.memory().read(crate::memory::GuestAddress(0x180_0040), &mut status).unwrap();
            assert_eq!(status, [S_OK]);
            assert!(driver.most_work() <= MAX_TURN + MAX_PIECE, "{}", driver.most_work());
            let mut last = [0; 4096];
            file.read_exact_at(&mut last, (60 << 20) - 4096).unwrap();
            assert_eq!(last[0], if what == WRITES { 9 } else { 0 });
            // In a pause nothing is left half done.
            assert!(huge(&mut driver, what, 0x180_0000));
            driver.dispatch(0);
            let (disk, io) = driver.parts();
            assert!(disk.drain(io, Duration::from_secs(60), DrainCause::Pause));
            assert!(driver.collect(0).is_some());
        }
    }
}

#[test]
fn a_limit_holds_for_what_is_in_flight() {
    let path = std::env::temp_dir().join(format!("cofferdam-quota-{}", std::process::id()));
    File::create(&path).unwrap().set_len(256 << 20).unwrap();
    let limit = crate::size::Size::mib(2);
    let overlay =
        OverlayFile::private(&std::env::temp_dir(), &BasePath::Raw(path.clone()), None, false).unwrap().limited(limit);
    std::fs::remove_file(&path).unwrap();
    let mut driver = Driver::start(Blk::new(Box::new(overlay), Options::new(0)));
    // As many writes at once as the ring takes, each to clusters of its own.
    let (writes, mut sent) = (80, Vec::new());
    driver.memory().write(crate::memory::GuestAddress(0x100_0000), &vec![7; 1 << 20]).unwrap();
    for n in 0..writes {
        let (at, status) = (0x180_0000 + 16 * n, 0x190_0000 + n);
        driver.memory().write(crate::memory::GuestAddress(at), &header(WRITES, n * 2048)).unwrap();
        assert!(driver.send_raw(0, &[(at, 16, 0), (0x100_0000, 1 << 20, 0), (status, 1, WRITE)]));
        sent.push(status);
    }
    // All are done, or held by the policy for a lack of space.
    driver.dispatch(0);
    while driver.device.table.len() > driver.device.held.len() {
        driver.dispatch_watched(RING_READY);
        std::thread::sleep(Duration::from_millis(1));
    }
    let status = |at: &u64| {
        let mut byte = [9];
        driver.memory().read(crate::memory::GuestAddress(*at), &mut byte).unwrap();
        byte[0]
    };
    let done = sent.iter().filter(|at| status(at) == S_OK).count();
    let taken = driver.device.usage().unwrap().allocated;
    assert!(done >= 1 && taken <= limit.as_bytes() + (256 << 10), "{done} writes took {taken} bytes");
}

/// A child of fork that lives on keeps no disk locked, whatever it is made of, also while a ring has the file.
#[test]
fn a_child_of_fork_keeps_no_disk() {
    let directory = std::env::temp_dir().join(format!("cofferdam-fork-disk-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = |name: &str| directory.join(name);
    for name in ["raw", "direct", "base"] {
        std::fs::File::create(path(name)).unwrap().set_len(1 << 20).unwrap();
    }
    super::create(&path("overlay"), &BasePath::Raw(path("base")), None).unwrap();
    let open = |name: &str| -> crate::error::Result<Box<dyn BlockBackend>> {
        Ok(match name {
            "raw" => Box::new(RawFile::open(&path(name), false, true)?),
            "direct" => Box::new(super::DirectFile::open(&path(name), false, true)?),
            _ => Box::new(OverlayFile::open(&path(name), None, false)?),
        })
    };
    for name in ["raw", "direct", "overlay"] {
        let mut driver = Driver::start(Blk::new(open(name).unwrap(), Options::new(0)));
        assert_eq!(request(&mut driver, &[&header(WRITES, 0), &[7; 512]], &[1]).1, S_OK);
        assert!(open(name).is_err(), "{name} is locked");
        crate::sys::beside_a_child(|| {
            drop(driver);
            assert!(open(name).is_ok(), "{name} is free");
        });
    }
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn guest_writes_leave_the_host_reserve() {
    for engine in ENGINES {
        let file = scratch(4096);
        file.write_all_at(&[1; 65_536], 0).unwrap();
        let path = std::env::temp_dir().join(format!("cofferdam-reserve-{}-{engine:?}", std::process::id()));
        File::create(&path).unwrap().set_len(2 << 20).unwrap();
        let overlay = OverlayFile::private(&std::env::temp_dir(), &BasePath::Raw(path.clone()), None, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        for (disk, kept) in [(raw(&file, false), true), (Box::new(overlay) as Box<dyn BlockBackend>, false)] {
            let mut disk = Blk::new(disk, options(engine));
            disk.options.policy.set(ErrorClass::NoSpace, ErrorAction::Report);
            disk.options.reserve = Reserve::Share;
            let mut driver = Driver::start(disk);
            let write =
                |driver: &mut Driver<Blk>, sector| request(driver, &[&header(WRITES, sector), &[7; 4096]], &[1]).1;
            assert_eq!((write(&mut driver, 0), write(&mut driver, 2048)), (S_OK, S_OK), "there is room");
            // As if others had taken all but what is kept.
            driver.device.options.reserve = Reserve::Bytes(1 << 62);
            driver.device.room = Room::default();
            assert_eq!((write(&mut driver, 0), write(&mut driver, 2048)), (S_OK, S_OK), "they have their places");
            assert_eq!(write(&mut driver, 3072), S_IOERR);
            assert_eq!(request(&mut driver, &[&header(ZEROES, 0), &range(3072, 8, 0)], &[1]).1, S_IOERR);
            assert_eq!(request(&mut driver, &[&header(READ, 3072)], &[512, 1]).1, S_OK);
            assert!(kept || driver.device.usage().unwrap().allocated < 2 << 20);
        }
    }
}
