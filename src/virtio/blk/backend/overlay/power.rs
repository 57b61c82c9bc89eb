//! A model of power loss for overlays. A storage records writes and syncs, and yields every state in which the file may
//! be found after.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::super::storage::{from_guest, to_guest};
use super::format::{BaseIdentity, OverlayHeader};
use super::tests::memory;
use super::*;
use crate::memory::GuestAddress;

const SECTOR: u64 = 512;
/// Two of the base's clusters and one beyond its end.
const SECTORS: u64 = 24;
type Sectors = BTreeMap<u64, [u8; SECTOR as usize]>;

#[derive(Debug, Clone)]
enum Event {
    /// One sector, which a disk writes whole or not at all.
    Sector(u64, Box<[u8; SECTOR as usize]>),
    Sync,
}

/// Remembers everything. What was not written reads as zeroes.
#[derive(Debug, Clone, Default)]
struct Recorder {
    now: Arc<Mutex<Sectors>>,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Recorder {
    fn on(sectors: Sectors) -> Self {
        Self { now: Arc::new(Mutex::new(sectors)), events: Arc::default() }
    }

    fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }
}

impl Storage for Recorder {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let now = self.now.lock().unwrap();
        for (n, byte) in to.iter_mut().enumerate() {
            let at = offset + n as u64;
            *byte = now.get(&(at / SECTOR)).map_or(0, |sector| sector[(at % SECTOR) as usize]);
        }
        Ok(())
    }

    fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
        assert_eq!((offset % SECTOR, from.len() as u64 % SECTOR), (0, 0), "a piece of a sector");
        for (n, sector) in from.chunks_exact(SECTOR as usize).enumerate() {
            let (number, sector) = (offset / SECTOR + n as u64, sector.try_into().unwrap());
            self.now.lock().unwrap().insert(number, sector);
            self.events.lock().unwrap().push(Event::Sector(number, Box::new(sector)));
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.events.lock().unwrap().push(Event::Sync);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write(&vec![0; len as usize], offset)
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.punch(offset, len)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space { free: u64::MAX, total: u64::MAX, device: 0 })
    }

    fn fd(&self) -> Option<RawFd> {
        None
    }

    fn read_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        to_guest(memory, segments, offset, |to, at| self.read(to, at))
    }

    fn write_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        from_guest(memory, segments, offset, |from, at| self.write(from, at))
    }
}

/// A base whose bytes are 200.
#[derive(Debug)]
struct Base;

impl Layer for Base {
    fn len(&self) -> u64 {
        16 * SECTOR
    }

    fn read(&mut self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let len = self.len();
        to.iter_mut().enumerate().for_each(|(n, byte)| *byte = if offset + (n as u64) < len { 200 } else { 0 });
        Ok(())
    }

    fn read_guest(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        to_guest(memory, segments, offset, |to, at| self.read(to, at))
    }

    fn extents(&mut self, _: u64, _: u64, _: &mut Vec<Extent>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn open(file: Recorder) -> OverlayFile {
    let base = BaseIdentity::Raw { len: 16 * SECTOR, changed: 0, inode: 0 };
    let header = OverlayHeader::new(SECTORS * SECTOR, [0; 16], base, std::path::Path::new("/base")).unwrap();
    OverlayFile::new(Box::new(file), header, Box::new(Base)).unwrap()
}

/// The first byte of every sector, all of which are alike.
fn contents(disk: &mut OverlayFile) -> Vec<u8> {
    let mut bytes = vec![0; (SECTORS * SECTOR) as usize];
    disk.read_bytes(&mut bytes, 0).unwrap();
    let sectors = bytes.chunks(SECTOR as usize);
    sectors.map(|s| if s.iter().all(|b| *b == s[0]) { s[0] } else { panic!("a torn sector") }).collect()
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write(u8),
    Zeroes(bool),
    Discard,
    Flush,
}

fn ops() -> impl Strategy<Value = Vec<(Op, u64, u64)>> {
    let op = prop_oneof![
        4 => (1..100u8).prop_map(Op::Write),
        2 => any::<bool>().prop_map(Op::Zeroes),
        1 => Just(Op::Discard),
        3 => Just(Op::Flush),
    ];
    proptest::collection::vec((op, 0..SECTORS, 1..20u64), 1..12)
}

/// What a sector may be found with: what it had at the last flush that was answered, and all it was given since.
type Allowed = Vec<Vec<u8>>;

/// Does all of it, and says for each point of the record what was promised there.
fn record(ops: &[(Op, u64, u64)]) -> (Vec<Event>, Vec<(usize, Allowed)>) {
    let (file, memory) = (Recorder::default(), memory());
    let mut disk = open(file.clone());
    let mut allowed: Allowed = contents(&mut disk).into_iter().map(|byte| vec![byte]).collect();
    let mut promises = vec![(0, allowed.clone())];
    for &(op, sector, count) in ops {
        let count = count.min(SECTORS - sector);
        let (offset, len, there) = (sector * SECTOR, count * SECTOR, sector as usize..(sector + count) as usize);
        let mut add = |byte| allowed[there.clone()].iter_mut().for_each(|values| values.push(byte));
        match op {
            Op::Write(byte) => {
                add(byte);
                memory.write(GuestAddress(0), &vec![byte; len as usize]).unwrap();
            }
            Op::Zeroes(_) | Op::Discard => add(0),
            Op::Flush => {}
        }
        // From before the call on, for the power may go in the middle of it.
        promises.push((file.events().len(), allowed.clone()));
        match op {
            Op::Write(_) => {
                let segment = memory.segment(GuestAddress(0), len as usize).unwrap();
                disk.write(&memory, &[segment], offset).unwrap();
            }
            Op::Zeroes(unmap) => disk.write_zeroes(offset, len, unmap).unwrap(),
            Op::Discard => disk.discard(offset, len).unwrap(),
            Op::Flush => {
                disk.flush().unwrap();
                allowed = contents(&mut disk).into_iter().map(|byte| vec![byte]).collect();
                promises.push((file.events().len(), allowed.clone()));
            }
        }
    }
    (file.events(), promises)
}

/// The file after the power went at `end`: all up to the last sync is there, of what came later what `kept` says.
fn found(events: &[Event], end: usize, mut kept: impl FnMut() -> bool) -> Sectors {
    let synced = events[..end].iter().rposition(|e| matches!(e, Event::Sync)).unwrap_or(0);
    let mut sectors = Sectors::new();
    for (n, event) in events[..end].iter().enumerate() {
        if let Event::Sector(number, bytes) = event
            && (n < synced || kept())
        {
            sectors.insert(*number, **bytes);
        }
    }
    sectors
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn flushed_data_survives_every_power_loss(ops in ops(), seed in any::<u64>()) {
        let (events, promises) = record(&ops);
        let mut random = seed | 1;
        for end in 0..=events.len() {
            let (_, allowed) = promises.iter().rev().find(|(from, _)| *from <= end).unwrap();
            // All of it, nothing, and some that are left to chance.
            for how in 0..6 {
                let sectors = found(&events, end, || {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    how == 0 || how > 1 && random % 2 == 0
                });
                let after = contents(&mut open(Recorder::on(sectors)));
                for (sector, byte) in after.iter().enumerate() {
                    prop_assert!(
                        allowed[sector].contains(byte),
                        "power went after {end} of {} events: sector {sector} is {byte}, not one of {:?}",
                        events.len(), allowed[sector]
                    );
                }
            }
        }
    }
}

/// The model can fail: states that are written before their bytes are found out.
#[test]
fn model_detects_a_wrong_flush_order() {
    let (file, memory) = (Recorder::default(), memory());
    let mut disk = open(file.clone());
    memory.write(GuestAddress(0), &[7; 4096]).unwrap();
    disk.write(&memory, &[memory.segment(GuestAddress(0), 4096).unwrap()], 0).unwrap();
    disk.states.write(&*disk.file).unwrap();
    let events = file.events();
    let mut n = 0;
    let sectors = found(&events, events.len(), || {
        n += 1;
        n > 8
    });
    assert_eq!(contents(&mut open(Recorder::on(sectors)))[0], 0, "neither the base's 200 nor 7");
}

/// Once a sync has failed, the host may have forgotten what it could not write.
#[test]
fn flushes_fail_after_a_failed_sync() {
    #[derive(Debug, Default)]
    struct Failing(Recorder, Arc<Mutex<bool>>);
    impl Storage for Failing {
        fn sync(&self) -> io::Result<()> {
            if *self.1.lock().unwrap() { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(()) }
        }
        fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read(to, offset)
        }
        fn write(&self, from: &[u8], offset: u64) -> io::Result<()> {
            self.0.write(from, offset)
        }
        fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.punch(offset, len)
        }
        fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.zero(offset, len)
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }
        fn allocated(&self) -> io::Result<u64> {
            self.0.allocated()
        }
        fn space(&self) -> io::Result<Space> {
            self.0.space()
        }
        fn fd(&self) -> Option<RawFd> {
            None
        }
        fn read_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
            self.0.read_guest(memory, segments, offset)
        }
        fn write_guest(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
            self.0.write_guest(memory, segments, offset)
        }
    }
    let (broken, mut disk) = (Arc::new(Mutex::new(true)), open(Recorder::default()));
    disk.file = Box::new(Failing(Recorder::default(), broken.clone()));
    assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    *broken.lock().unwrap() = false;
    assert_eq!(disk.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
}
