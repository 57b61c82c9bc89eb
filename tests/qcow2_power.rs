//! The states in which a loss of power may leave a qcow2 image.
//!
//! The image is flushed as `Disk::qcow2` does. A storage below the crate imago records writes and syncs, and every
//! state in which the file may be found afterwards is opened again. What was promised can be read. Reference counts may
//! be behind, for which `Disk::qcow2` marks the image; it can be used again without losing data.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a failure here is the test's")]
#![allow(unsafe_code, reason = "imago's storage trait has unsafe methods; nothing unsafe is done in them")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::{fmt, fs, io};

use cofferdam::fuzzing::qcow2_found;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Storage};
use proptest::prelude::*;

const SECTOR: usize = 512;
/// Four clusters of the image, the backing file has two of them.
const SECTORS: usize = 32;
const CLUSTER: usize = 4096;

#[derive(Debug, Clone)]
enum Event {
    Write(usize, Vec<u8>),
    Len(usize),
    Sync,
}

#[derive(Debug, Default)]
struct Recorder {
    now: Mutex<Vec<u8>>,
    events: Arc<Mutex<Vec<Event>>>,
    helper: CommonStorageHelper,
}

impl Recorder {
    fn on(bytes: Vec<u8>) -> Self {
        Self { now: Mutex::new(bytes), ..Self::default() }
    }

    fn apply(bytes: &mut Vec<u8>, at: usize, from: &[u8]) {
        bytes.resize(bytes.len().max(at + from.len()), 0);
        bytes[at..at + from.len()].copy_from_slice(from);
    }
}

impl fmt::Display for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("recorder")
    }
}

impl Storage for Recorder {
    fn size(&self) -> io::Result<u64> {
        Ok(self.now.lock().unwrap().len() as u64)
    }

    unsafe fn pure_readv(&self, mut to: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let (now, at) = (self.now.lock().unwrap(), offset as usize);
        let mut bytes = vec![0; to.len() as usize];
        let here = now.len().saturating_sub(at).min(bytes.len());
        if here > 0 {
            bytes[..here].copy_from_slice(&now[at..at + here]);
        }
        to.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn pure_writev(&self, from: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; from.len() as usize];
        from.copy_into_slice(&mut bytes);
        Self::apply(&mut self.now.lock().unwrap(), offset as usize, &bytes);
        // A disk writes sectors whole or not at all.
        let (mut at, mut rest) = (offset as usize, bytes.as_slice());
        while !rest.is_empty() {
            let (now, later) = rest.split_at((SECTOR - at % SECTOR).min(rest.len()));
            self.events.lock().unwrap().push(Event::Write(at, now.to_vec()));
            (at, rest) = (at + now.len(), later);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.events.lock().unwrap().push(Event::Sync);
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, size: u64, _: PreallocateMode) -> io::Result<()> {
        self.now.lock().unwrap().resize(size as usize, 0);
        self.events.lock().unwrap().push(Event::Len(size as usize));
        Ok(())
    }
}

type Image = FormatAccess<Recorder>;

fn open(file: Recorder) -> Image {
    let base = Raw::builder(Recorder::on(vec![200; 2 * CLUSTER])).open(DenyImplicitOpenGate::default()).unwrap();
    let image = Qcow2::<Recorder>::builder(file).write(true).backing(Some(FormatAccess::new(base))).data_file(None);
    FormatAccess::new(image.open(DenyImplicitOpenGate::default()).unwrap())
}

/// The first byte of every sector, all of which are alike.
fn contents(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; SECTORS * SECTOR];
    image.read(bytes.as_mut_slice(), 0).unwrap();
    let sectors = bytes.chunks(SECTOR);
    sectors.map(|s| if s.iter().all(|b| *b == s[0]) { s[0] } else { panic!("a torn sector") }).collect()
}

/// An empty image.
fn empty() -> Vec<u8> {
    let file = Recorder::default();
    let events = file.events.clone();
    let builder = Qcow2::<Recorder>::create_builder(file).size((SECTORS * SECTOR) as u64).cluster_size(CLUSTER);
    builder.backing("base".into(), "raw".into()).create().unwrap();
    let events = events.lock().unwrap();
    found(&[], &events, events.len(), || true)
}

/// The file after the power went at `end`: all up to the last sync is there, of what came later what `kept` says.
fn found(start: &[u8], events: &[Event], end: usize, mut kept: impl FnMut() -> bool) -> Vec<u8> {
    let synced = events[..end].iter().rposition(|e| matches!(e, Event::Sync)).unwrap_or(0);
    let mut bytes = start.to_vec();
    for (n, event) in events[..end].iter().enumerate() {
        match event {
            Event::Write(at, from) if n < synced || kept() => Recorder::apply(&mut bytes, *at, from),
            Event::Len(len) => bytes.resize(*len, 0),
            _ => {}
        }
    }
    bytes
}

/// Opens what was found as `Disk::qcow2` does, marked as it marks what it writes, and uses it.
fn used_again(directory: &Path, mut bytes: Vec<u8>) -> [Vec<u8>; 2] {
    let path = directory.join("image");
    bytes[79] |= 1;
    fs::write(&path, bytes).unwrap();
    qcow2_found(&path, CLUSTER as u64, 255).unwrap()
}

/// A directory in memory, where syncs cost nothing.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Self {
        let path = Path::new("/dev/shm").join(format!("cofferdam-power-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("base"), vec![200; 2 * CLUSTER]).unwrap();
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write(u8),
    Zeroes,
    Flush,
}

fn ops() -> impl Strategy<Value = Vec<(Op, usize, usize)>> {
    let op = prop_oneof![4 => (1..100u8).prop_map(Op::Write), 1 => Just(Op::Zeroes), 3 => Just(Op::Flush)];
    proptest::collection::vec((op, 0..SECTORS, 1..12usize), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn flushed_data_survives_every_power_loss(ops in ops(), seed in any::<u64>()) {
        let (start, directory) = (empty(), TempDir::new());
        let file = Recorder::on(start.clone());
        let events = file.events.clone();
        let count = || events.lock().unwrap().len();
        let image = open(file);
        let mut allowed: Vec<Vec<u8>> = contents(&image).into_iter().map(|byte| vec![byte]).collect();
        let mut promises = vec![(0, allowed.clone())];
        for (op, sector, len) in ops {
            let there = sector..(sector + len).min(SECTORS);
            let (offset, len) = ((sector * SECTOR) as u64, there.len() * SECTOR);
            let byte = match op {
                Op::Write(byte) => Some(byte),
                Op::Zeroes => Some(0),
                Op::Flush => None,
            };
            allowed[there].iter_mut().for_each(|values| values.extend(byte));
            promises.push((count(), allowed.clone()));
            match op {
                Op::Write(byte) => image.write(vec![byte; len].as_slice(), offset).unwrap(),
                Op::Zeroes => image.write_zeroes(offset, len as u64).unwrap(),
                Op::Flush => {
                    image.sync().and_then(|()| image.flush()).and_then(|()| image.sync()).unwrap();
                    allowed = contents(&image).into_iter().map(|byte| vec![byte]).collect();
                    promises.push((count(), allowed.clone()));
                }
            }
        }
        let (events, mut random) = (events.lock().unwrap().clone(), seed | 1);
        for end in 0..=events.len() {
            let (_, allowed) = promises.iter().rev().find(|(from, _)| *from <= end).unwrap();
            for how in 0..4 {
                let bytes = found(&start, &events, end, || {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    how == 0 || how > 1 && random % 2 == 0
                });
                if how == 2 {
                    let [found, used] = used_again(&directory.0, bytes.clone());
                    for (sector, (found, used)) in found.chunks(SECTOR).zip(used.chunks(SECTOR)).enumerate() {
                        prop_assert!(allowed[sector].contains(&found[0]), "found after {end} events: sector {sector}");
                        let wanted = if (sector * SECTOR).is_multiple_of(CLUSTER) { 255 } else { found[0] };
                        prop_assert!(used.iter().all(|b| *b == wanted), "used after {end} events: sector {sector}");
                    }
                }
                for (sector, byte) in contents(&open(Recorder::on(bytes))).iter().enumerate() {
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
