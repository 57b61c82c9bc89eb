//! The disk over a backend that fails and stalls by a script.

use crate::virtio::DeviceEvent;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::Mutex;

use super::super::backend::{Extent, Geometry};
use super::super::config::F_CONFIG_WCE;
use super::*;
use crate::memory::{GuestMemory, Segment};
use crate::rate::Rate;

/// The calls that a mock backend got, in their order, and the answers that it gives.
#[derive(Debug, Default)]
struct Script {
    log: Vec<String>,
    /// The next calls fail like this.
    fail: VecDeque<i32>,
    /// Where the I/O queue reads and writes, and what it syncs.
    places: Option<RawFd>,
    sync: Option<RawFd>,
    /// All of it is one file.
    whole: bool,
    free: Option<u64>,
}

/// A backend that follows a script.
#[derive(Debug)]
struct MockBackend(Arc<Mutex<Script>>);

impl MockBackend {
    fn call(&self, name: &str) -> io::Result<()> {
        let mut script = self.0.lock().unwrap();
        script.log.push(name.into());
        script.fail.pop_front().map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
    }
}

impl BlockBackend for MockBackend {
    fn geometry(&self) -> Geometry {
        Geometry { len: 1 << 20, read_only: false, discard: 512 }
    }
    fn read(&mut self, _: &GuestMemory, _: &[Segment], _: u64) -> io::Result<()> {
        self.call("read")
    }
    fn write(&mut self, _: &GuestMemory, _: &[Segment], _: u64) -> io::Result<()> {
        self.call("write")
    }
    fn flush(&mut self) -> io::Result<()> {
        self.call("flush")
    }
    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        self.call("discard")
    }
    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.call("zero")
    }
    fn grow(&mut self, _: u64) -> io::Result<()> {
        self.call("grow")
    }
    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn extents(&mut self, write: bool, offset: u64, len: u64, found: &mut Vec<Extent>) -> Option<io::Result<()>> {
        let (fd, whole) = self.0.lock().map(|script| (script.places, script.whole)).unwrap();
        let fd = fd?;
        if whole {
            found.push(Extent::File { fd, offset, len });
            return Some(Ok(()));
        }
        // In two files of one, with a hole before what is read.
        let half = len / 1024 * 512;
        let first = match write {
            true => Extent::File { fd, offset, len: half },
            false => Extent::Zeroes { len: half },
        };
        found.extend([first, Extent::File { fd, offset: offset + half, len: len - half }]);
        Some(Ok(()))
    }
    fn write_done(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.call(&format!("written {offset} {len}"))
    }
    fn write_failed(&mut self, offset: u64, len: u64) {
        self.0.lock().unwrap().log.push(format!("abandoned {offset} {len}"));
    }
    fn sync_fd(&self) -> Option<RawFd> {
        self.0.lock().unwrap().sync
    }
    fn space(&self) -> io::Result<Option<crate::sys::Space>> {
        Ok(self.0.lock().unwrap().free.map(|free| crate::sys::Space { free, total: 1 << 30, device: 0 }))
    }
}

fn with_mock(options: Options, script: Script) -> (Driver<Blk>, Arc<Mutex<Script>>) {
    let script = Arc::new(Mutex::new(script));
    (Driver::start(Blk::new(Box::new(MockBackend(script.clone())), options)), script)
}

/// Returns the errors that were reported since this was last called.
fn disk_errors(driver: &Driver<Blk>) -> Vec<DiskError> {
    let error = |event| match event {
        DeviceEvent::DiskError(error) => error,
        other => panic!("{other:?}"),
    };
    driver.take_events().into_iter().map(error).collect()
}

fn write_through(driver: &mut Driver<Blk>) {
    assert_ne!(driver.device.profile().features & F_CONFIG_WCE, 0);
    driver.device.config.set(config::WRITEBACK, &[0]);
}

#[test]
fn a_sync_comes_before_the_status_that_promises_it() {
    let (mut driver, script) = with_mock(options(IoEngine::Auto), Script::default());
    assert_eq!(driver.device.engine(), IoEngine::Threads);
    let log = || std::mem::take(&mut script.lock().unwrap().log);
    let write = [header(WRITES, 0), vec![1; 512]].concat();
    request(&mut driver, &[&write], &[1]);
    assert_eq!(log(), ["write"]);
    request(&mut driver, &[&header(FLUSH, 0)], &[1]);
    assert_eq!(log(), ["flush"]);
    write_through(&mut driver);
    request(&mut driver, &[&write], &[1]);
    assert_eq!(log(), ["write", "flush"]);
    request(&mut driver, &[&header(DISCARD, 0), &range(0, 1, 0)], &[1]);
    assert_eq!(log(), ["discard", "flush"]);
    // A driver that knows no flushes gets every write on stable storage.
    let mut driver = with_mock(options(IoEngine::Auto), Script::default());
    driver.0.set_features(0);
    request(&mut driver.0, &[&write], &[1]);
    assert_eq!(driver.1.lock().unwrap().log, ["write", "flush"]);
    // Unless the cache mode is unsafe.
    let (mut driver, script) = with_mock(Options { cache: CacheMode::Unsafe, ..Options::new(0) }, Script::default());
    write_through(&mut driver);
    request(&mut driver, &[&write], &[1]);
    request(&mut driver, &[&header(FLUSH, 0)], &[1]);
    assert_eq!(script.lock().unwrap().log, ["write"]);
}

#[test]
fn every_flush_fails_after_a_sync_has_failed() {
    let script = Script { fail: [libc::EIO].into(), ..Script::default() };
    let mut options = options(IoEngine::Auto);
    options.policy.set(ErrorClass::Write, ErrorAction::Pause);
    let (mut driver, script) = with_mock(options, script);
    // It cannot be tried again, so the guest gets the error at once.
    assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_IOERR);
    assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_IOERR);
    let write = [header(WRITES, 0), vec![1; 512]].concat();
    assert_eq!(request(&mut driver, &[&write], &[1]).1, S_OK);
    write_through(&mut driver);
    assert_eq!(request(&mut driver, &[&write], &[1]).1, S_IOERR);
    assert_eq!(script.lock().unwrap().log, ["flush", "write", "write"]);
    let faults = disk_errors(&driver);
    assert_eq!((faults.len(), faults[0].operation, faults[0].errno), (3, DiskOperation::Flush, Some(libc::EIO)));
}

#[test]
fn failed_io_uring_sync_is_reported() {
    let (file, socket) = (scratch(2048), std::os::unix::net::UnixStream::pair().unwrap().0);
    // A socket cannot be synced.
    let script = Script { places: Some(file.as_raw_fd()), sync: Some(socket.as_raw_fd()), ..Script::default() };
    let (mut driver, script) = with_mock(options(IoEngine::IoUring), script);
    assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_IOERR);
    script.lock().unwrap().sync = Some(file.as_raw_fd());
    assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_IOERR);
    assert_eq!((disk_errors(&driver).len(), script.lock().unwrap().log.len()), (2, 0));
}

#[test]
fn extents_of_a_backend_are_served_by_io_uring() {
    let file = scratch(2048);
    let script = Script { places: Some(file.as_raw_fd()), sync: Some(file.as_raw_fd()), ..Script::default() };
    let (mut driver, script) = with_mock(options(IoEngine::IoUring), script);
    assert_eq!((driver.device.engine(), driver.device.blocks()), (IoEngine::IoUring, true));
    let pieces: [&[u8]; 3] = [&header(WRITES, 2), &[5; 700], &[6; 836]];
    assert_eq!(request(&mut driver, &pieces, &[1]).1, S_OK);
    assert_eq!(script.lock().unwrap().log, ["written 1024 1536"]);
    let (data, status) = request(&mut driver, &[&header(READ, 2)], &[1000, 537]);
    assert_eq!((status, data.iter().filter(|b| **b == 0).count()), (S_OK, 512));
    assert_eq!((data[511], data[512], data[700], data[1535]), (0, 5, 6, 6));
    // What blocks comes after what is in flight, and from then on a flush is the backend's.
    assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_OK);
    assert_eq!(request(&mut driver, &[&header(ZEROES, 0), &range(0, 1, 0)], &[1]).1, S_OK);
    assert_eq!(request(&mut driver, &[&header(FLUSH, 0)], &[1]).1, S_OK);
    assert_eq!(script.lock().unwrap().log[1..], ["zero", "flush"]);
    script.lock().unwrap().fail.push_back(libc::EIO);
    assert_eq!(request(&mut driver, &pieces, &[1]).1, S_IOERR);
    // A place that nothing can be written to is given back.
    script.lock().unwrap().places = Some(-1);
    assert_eq!(request(&mut driver, &pieces, &[1]).1, S_IOERR);
    assert_eq!(script.lock().unwrap().log.last().unwrap(), "abandoned 1024 1536");
}

#[test]
fn error_actions_report_pause_or_stop() {
    let mut options = options(IoEngine::Auto);
    options.policy.set(ErrorClass::Write, ErrorAction::Stop);
    let (mut driver, script) = with_mock(options, Script { fail: [libc::EIO].into(), ..Script::default() });
    let next = |fail: &[i32]| script.lock().unwrap().fail = fail.to_vec().into();
    assert_eq!(request(&mut driver, &[&header(READ, 3)], &[512, 1]).1, S_IOERR);
    // Held until the machine goes on, and then again.
    let write = [header(WRITES, 5), vec![1; 1024]].concat();
    for _ in 0..2 {
        next(&[libc::ENOSPC]);
        driver.send(0, &[&write], &[1]);
        driver.dispatch(0);
        assert_eq!(driver.receive(0), None);
        let (disk, io) = driver.parts();
        disk.ready(io, EventSource::Resumed);
        assert_eq!(status(&mut driver), S_OK);
    }
    next(&[libc::EIO]);
    driver.send(0, &[&write], &[1]);
    driver.dispatch(0);
    assert_eq!(driver.receive(0), None);
    let faults = disk_errors(&driver);
    let told: Vec<_> = faults.iter().map(|f| (f.sector, f.bytes, f.errno, f.action)).collect();
    assert_eq!(
        told,
        [
            (3, 512, Some(libc::EIO), ErrorAction::Report),
            (5, 1024, Some(libc::ENOSPC), ErrorAction::Pause),
            (5, 1024, Some(libc::ENOSPC), ErrorAction::Pause),
            (5, 1024, Some(libc::EIO), ErrorAction::Stop),
        ]
    );
    let text = faults[1].to_string();
    assert_eq!(text, "disk0: writing 1024 bytes at sector 5: No space left on device (os error 28); the guest waits");
}

/// Waits for the disk's timer.
fn tick(driver: &mut Driver<Blk>) {
    let timer = driver.device.timer.as_ref().unwrap();
    assert!(sys::wait_readable(timer.as_fd(), Some(Duration::from_secs(20))).unwrap());
    driver.dispatch_watched(TIMER);
}

#[test]
fn requests_wait_for_their_limit_in_order_and_flushes_do_not() {
    for engine in ENGINES {
        let file = scratch(4096);
        let limit = DiskLimit::none().write_operations(Rate::per_second(50).one_time_burst(2));
        let mut driver = Driver::start(Blk::new(raw(&file, false), Options { limit, ..options(engine) }));
        let begin = Instant::now();
        // Seven or eight at once, two of them by the burst; then one each 20 ms.
        for n in 0..12u8 {
            assert!(driver.send(0, &[&header(WRITES, 0), &[n; 512]], &[1]));
        }
        driver.send(0, &[&header(FLUSH, 0)], &[1]);
        driver.send(0, &[&header(READ, 0)], &[512, 1]);
        driver.dispatch(0);
        assert!(driver.device.waiting[0].is_empty() && (4..=5).contains(&driver.device.waiting[1].len()));
        let mut answers = 0;
        while answers < 14 {
            match driver.receive(0) {
                Some((bytes, _)) => {
                    assert_eq!(bytes.last(), Some(&S_OK));
                    answers += 1;
                }
                None if driver.device.waiting[1].is_empty() => driver.dispatch_watched(RING_READY),
                None => tick(&mut driver),
            }
        }
        assert!(begin.elapsed() >= Duration::from_millis(59), "{:?}", begin.elapsed());
        let mut back = [0; 1];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back[0], 11);
        let (_, io) = driver.parts();
        let count = |n: &std::sync::atomic::AtomicU64| n.load(std::sync::atomic::Ordering::Relaxed);
        assert!((4..=5).contains(&count(&io.counters().throttled)));
        assert!(count(&io.counters().throttled_nanos) > 50_000_000);
    }
}

#[test]
fn removed_limit_admits_waiting_requests() {
    let limit = DiskLimit::none().read_bytes(Rate::per_second(1));
    let mut driver = Driver::start(Blk::new(raw(&scratch(8), false), Options { limit, ..options(IoEngine::Auto) }));
    for _ in 0..3 {
        driver.send(0, &[&header(READ, 0)], &[512, 1]);
    }
    driver.dispatch(0);
    answer_on(&mut driver, 0);
    assert_eq!(driver.receive(0), None);
    driver.device.set_limit(&DiskLimit::none());
    tick(&mut driver);
    answer_on(&mut driver, 0);
    answer_on(&mut driver, 0);
}

#[test]
fn stop_and_pause_wait_for_requests_in_flight() {
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    // Reads of an empty socket are in flight for as long as one likes.
    let script = Script { places: Some(near.as_raw_fd()), ..Script::default() };
    let (mut driver, script) = with_mock(options(IoEngine::IoUring), script);
    driver.send(0, &[&header(READ, 0)], &[512, 1]);
    driver.dispatch(0);
    assert_eq!(driver.receive(0), None);
    let (disk, io) = driver.parts();
    assert!(!disk.drain(io, Duration::from_millis(20), DrainCause::Pause));
    std::io::Write::write_all(&mut &far, &[3; 512]).unwrap();
    assert!(disk.drain(io, Duration::from_secs(20), DrainCause::Pause));
    let (bytes, _) = driver.receive(0).unwrap();
    assert_eq!((bytes[0], bytes[511], bytes[512]), (3, 3, S_OK));

    driver.send(0, &[&header(READ, 0)], &[512, 1]);
    driver.dispatch(0);
    let memory = driver.memory();
    let disk = driver.stop();
    assert!(!disk.engine.io_queue.as_ref().unwrap().busy());
    std::io::Write::write_all(&mut &far, &[3; 512]).unwrap();
    let mut back = [0; 512];
    std::io::Read::read_exact(&mut &near, &mut back).unwrap();
    assert!(script.lock().unwrap().log.is_empty());
    drop(memory);
}

#[test]
fn disk_on_a_shared_loop_hands_over_requests_in_flight() {
    let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let fd = Some(near.as_raw_fd());
    let script = Script { places: fd, sync: fd, whole: true, ..Script::default() };
    let (mut driver, ..) = with_mock(options(IoEngine::IoUring), script);
    assert!(!driver.device.blocks());
    driver.send(0, &[&header(READ, 0)], &[512, 1]);
    driver.dispatch(0);
    let (disk, io) = driver.parts();
    let begin = Instant::now();
    disk.stop(io);
    assert!(begin.elapsed() < Duration::from_secs(1), "no other disk of the loop waits");
    // It may have been quick enough.
    assert_eq!(disk.engine.io_queue.is_none(), io.unfinished_io.is_some());
    assert!(io.unfinished_io.take().is_none_or(|mut io_queue| io_queue.stop(Duration::from_secs(20))));
    disk.start(io, None).unwrap();
    assert!(disk.engine.io_queue.as_ref().is_some_and(|io_queue| !io_queue.busy()));
    disk.stop(io);
}

#[test]
fn the_last_requests_are_served_whatever_their_limit() {
    for engine in ENGINES {
        let file = scratch(8);
        let limit = DiskLimit::none().write_operations(Rate::per_second(1));
        let mut driver = Driver::start(Blk::new(raw(&file, false), Options { limit, ..options(engine) }));
        for n in 0..8 {
            driver.send(0, &[&header(WRITES, n), &[9; 512]], &[1]);
        }
        driver.dispatch(0);
        let (disk, io) = driver.parts();
        disk.drain(io, Duration::from_secs(20), DrainCause::End);
        let mut back = [0; 4096];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back.iter().all(|b| *b == 9));
    }
}

#[test]
fn unusable_io_uring_is_reported() {
    let disk = Blk::new(Box::new(MockBackend(Arc::default())), options(IoEngine::IoUring));
    assert!(disk.refused().is_some() && disk.engine() == IoEngine::Threads && disk.blocks());
    assert!(Blk::new(Box::new(MockBackend(Arc::default())), options(IoEngine::Auto)).refused().is_none());
}

#[test]
fn low_space_is_reported_once_each_time() {
    let options = Options { min_free_space: Some(1000), ..Options::new(0) };
    let (mut driver, script) = with_mock(options, Script::default());
    for (n, free) in [1000, 999, 998, 2000, 5].into_iter().enumerate() {
        script.lock().unwrap().free = Some(free);
        driver.device.epoch -= SPACE_CHECK_INTERVAL;
        for _ in 0..10 {
            request(&mut driver, &[&header(WRITES, n as u64), &[1; 512]], &[1]);
        }
    }
    let events = driver.take_events();
    assert!(matches!(events[..], [DeviceEvent::LowSpace(999), DeviceEvent::LowSpace(5)]), "{events:?}");
}
