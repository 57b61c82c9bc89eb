//! The device against a fake driver.

use super::*;
use crate::virtio::testing::{Driver, WRITE};
use crate::virtio::turn::{MAX_PIECE, MAX_TURN};
use std::sync::mpsc;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;

fn rig() -> Driver<Balloon> {
    Driver::start_with(|memory| Balloon::new(memory.clone()))
}

/// Returns the sizes that were reported since this was last called.
fn settled(driver: &Driver<Balloon>) -> Vec<u64> {
    let size = |event| match event {
        DeviceEvent::BalloonSettled(size) => size,
        other => panic!("{other:?}"),
    };
    driver.take_events().into_iter().map(size).collect()
}

fn byte(memory: &GuestMemory, at: u64) -> u8 {
    let mut byte = [0];
    memory.read(GuestAddress(at), &mut byte).unwrap();
    byte[0]
}

#[test]
fn inflated_pages_are_discarded_and_others_are_not() {
    let mut driver = rig();
    let memory = driver.memory();
    let pages = [0x400u32, 0x401, 0x403, 0xffff_ffff];
    (0x400..0x405).for_each(|page| memory.write(GuestAddress(page * PAGE), &[7]).unwrap());
    let numbers: Vec<u8> = pages.iter().flat_map(|n| n.to_le_bytes()).collect();
    driver.send(INFLATE, &[&numbers[..6], &numbers[6..]], &[]);
    driver.dispatch(INFLATE);
    assert!(driver.receive(INFLATE).is_some());
    let left: Vec<u8> = (0x400..0x405).map(|page| byte(&memory, page * PAGE)).collect();
    assert_eq!(left, [0, 0, 7, 0, 7]);
}

#[test]
fn balloon_reports_when_settled_and_when_the_guest_deflates() {
    let mut driver = rig();
    let (device, io) = driver.parts();
    device.set_target(3 * PAGE, Some(io));
    for (queue, pages) in [(INFLATE, 2), (INFLATE, 1), (DEFLATE, 1), (DEFLATE, 1)] {
        driver.send(queue, &[&vec![0; pages * 4]], &[]);
        driver.dispatch(queue);
    }
    assert_eq!(settled(&driver), [3 * PAGE, 2 * PAGE]);
}

#[test]
fn a_guest_that_fills_and_empties_it_without_pause_is_reported_at_a_bounded_rate() {
    let mut driver = rig();
    for _ in 0..500 {
        for queue in [INFLATE, DEFLATE] {
            driver.send(queue, &[&[0; 4]], &[]);
            driver.dispatch(queue);
            assert!(driver.receive(queue).is_some());
        }
    }
    let count = settled(&driver).len();
    assert!((11..=100).contains(&count), "{count} reports of 1000 changes");
    // The embedder's next size is reported all the same.
    for pages in [3, 2] {
        let (device, io) = driver.parts();
        device.set_target(pages * PAGE, Some(io));
        let (queue, moved) = if pages == 3 { (INFLATE, 3) } else { (DEFLATE, 1) };
        driver.send(queue, &[&vec![0; moved * 4]], &[]);
        driver.dispatch(queue);
        assert_eq!(settled(&driver), [pages * PAGE]);
    }
}

#[test]
fn absurd_requests_need_a_reset() {
    let mut driver = rig();
    driver.send(INFLATE, &[&vec![0; (MAX_PAGES + 1) * 4]], &[]);
    driver.dispatch(INFLATE);
    assert!(driver.needs_reset());
}

#[test]
fn reported_memory_is_discarded_and_counted() {
    let mut driver = rig();
    let memory = driver.memory();
    let (free, written) = (0x40_0000, 0x40_3000);
    memory.write(GuestAddress(written), &[7]).unwrap();
    driver.send_raw(REPORTING, &[(free, 16 * PAGE as u32, WRITE)]);
    driver.dispatch(REPORTING);
    assert!(driver.receive(REPORTING).is_some());
    assert_eq!((byte(&memory, written), driver.device.reported()), (0, 16 * PAGE));
}

fn bounded(driver: &Driver<Balloon>) {
    assert!(driver.most_work() <= MAX_TURN + MAX_PIECE, "{}", driver.most_work());
}

#[test]
fn reports_take_as_many_turns_as_they_need() {
    let mut driver = rig();
    // Tables of as many single pages as a chain may have.
    let memory = driver.memory();
    for n in 0..64u64 {
        let next = u16::from(n < 63);
        let rest = [[WRITE | next, n as u16 + 1]].map(|[a, b]| u32::from(a) | u32::from(b) << 16);
        let bytes = [0x80_0000 + 2 * PAGE * n, u64::from(rest[0]) << 32 | PAGE].map(u64::to_le_bytes).concat();
        memory.write(GuestAddress(0x100_0000 + 16 * n), &bytes).unwrap();
    }
    let (mut turns, mut back) = (0, 0);
    while back < 1000 {
        while driver.send_raw(REPORTING, &[(0x100_0000, 64 * 16, 4)]) {}
        driver.dispatch(REPORTING);
        turns += 1;
        while driver.receive(REPORTING).is_some() {
            back += 1;
        }
    }
    assert_eq!(driver.device.reported() / (64 * PAGE), back);
    assert!(turns > 30, "{turns}");
    bounded(&driver);
    // A table of more is no chain of this queue.
    driver.send_raw(REPORTING, &[(0x100_0000, 65 * 16, 4)]);
    memory.write(GuestAddress(0x100_0000 + 16 * 63 + 12), &[3, 0, 64, 0]).unwrap();
    driver.dispatch(REPORTING);
    assert!(driver.needs_reset());
}

#[test]
fn one_large_report_is_given_back_in_pieces() {
    let mut driver = rig();
    for _ in 0..64 {
        assert!(driver.send_raw(REPORTING, &[(0x40_0000, 24 << 20, WRITE)]));
    }
    let (mut turns, mut back) = (0, 0);
    while back < 64 {
        driver.dispatch(REPORTING);
        turns += 1;
        while driver.collect(REPORTING).is_some() {
            back += 1;
        }
    }
    assert_eq!((driver.device.reported(), turns > 10), (64 * (24 << 20), true));
    bounded(&driver);
}

#[test]
fn scattered_pages_take_as_many_turns_as_they_need() {
    let mut driver = rig();
    let numbers: Vec<u8> = (0..MAX_PAGES as u32).flat_map(|n| (0x400 + 2 * (n % 512)).to_le_bytes()).collect();
    (0..64).for_each(|_| assert!(driver.send(INFLATE, &[&numbers], &[])));
    let (mut turns, mut back) = (0, 0);
    while back < 64 {
        driver.dispatch(INFLATE);
        turns += 1;
        while driver.receive(INFLATE).is_some() {
            back += 1;
        }
    }
    assert!(turns > 64, "{turns}");
    bounded(&driver);
}

#[test]
fn statistics_that_are_offered_again_and_again_end_the_turn() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut driver = rig();
    let memory = driver.memory();
    driver.send(STATS, &[&[0; 10]], &[]);
    // A driver on another processor that offers its buffer as soon as it comes back, for ever.
    let ring = 0x10_0000 + STATS as u64 * 0x1_0000;
    (0..16).for_each(|n| memory.write(GuestAddress(ring + 0x8004 + 2 * n), &[15, 0]).unwrap());
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let until = stop.clone();
    let guest = std::thread::spawn(move || {
        while !until.load(Ordering::Relaxed) {
            let mut used = [0; 2];
            memory.read(GuestAddress(ring + 0xc002), &mut used).unwrap();
            let next = u16::from_le_bytes(used).wrapping_add(15);
            memory.write(GuestAddress(ring + 0x8002), &next.to_le_bytes()).unwrap();
        }
    });
    (0..50).for_each(|_| driver.dispatch(STATS));
    stop.store(true, Ordering::Relaxed);
    guest.join().unwrap();
    bounded(&driver);
}

#[test]
fn statistics_are_asked_for_and_come_back() {
    let mut driver = rig();
    let (answer, told) = mpsc::sync_channel(1);
    let ask = |driver: &mut Driver<Balloon>| {
        let (device, io) = driver.parts();
        device.ask(Some(io), answer.clone());
    };
    ask(&mut driver);
    assert!(told.try_recv().is_err(), "the driver has not sent its buffer yet");
    let entry = |tag: u16, value: u64| [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat();
    driver.send(STATS, &[&entry(9, 1)], &[]);
    driver.dispatch(STATS);
    ask(&mut driver);
    assert!(driver.receive(STATS).is_some(), "the buffer comes back to be filled");
    driver.send(STATS, &[&[entry(4, 1 << 20), entry(5, 1 << 30), vec![1]].concat()], &[]);
    driver.dispatch(STATS);
    let expected =
        GuestMemoryStats { free: Some(Size::mib(1)), total: Some(Size::gib(1)), ..GuestMemoryStats::default() };
    assert_eq!(told.try_recv(), Ok(expected));
}
