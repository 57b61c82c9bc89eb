//! A model of power loss for qcow2. It yields every state in which the file may be found, by what was written and
//! synced.

use std::fs;

use proptest::prelude::*;

use super::tests::{Temp, read, write};
use super::*;
use crate::sys::record::{self, WriteEvent};

const SECTOR: u64 = 512;
/// Groups of sectors that are far apart, so that they are not in one table where clusters are small.
const GROUPS: u64 = 5;
const GROUP: u64 = 12;
const APART: u64 = 100;
/// The base has as many sectors as this, all of whose bytes are 200.
const BASE: u64 = 350;

fn place(sector: u64) -> u64 {
    (sector / GROUP * APART + sector % GROUP) * SECTOR
}

/// The first byte of every sector, all of which are alike.
fn contents(disk: &mut Qcow2) -> Vec<u8> {
    let groups = (0..GROUPS).flat_map(|group| read(disk, place(group * GROUP), (GROUP * SECTOR) as usize));
    let bytes: Vec<u8> = groups.collect();
    let sectors = bytes.chunks(SECTOR as usize);
    sectors.map(|s| if s.iter().all(|b| *b == s[0]) { s[0] } else { panic!("a torn sector") }).collect()
}

#[derive(Debug, Clone, Copy)]
enum Op {
    Write(u8),
    Zeroes,
    Discard,
    Flush,
}

fn ops() -> impl Strategy<Value = Vec<(Op, u64, u64)>> {
    let op = prop_oneof![
        5 => (1..100u8).prop_map(Op::Write),
        2 => Just(Op::Zeroes),
        2 => Just(Op::Discard),
        2 => Just(Op::Flush),
    ];
    proptest::collection::vec((op, 0..GROUPS * GROUP, 1..GROUP + 1), 1..16)
}

/// What a sector may be found with: what it had at the last flush that was answered, and all it was given since.
type Allowed = Vec<Vec<u8>>;

/// Does all of it, and says for each point of the record what was promised there.
fn record(disk: &mut Qcow2, ops: &[(Op, u64, u64)]) -> (Vec<WriteEvent>, Vec<(usize, Allowed)>) {
    let mut allowed: Allowed = contents(disk).into_iter().map(|byte| vec![byte]).collect();
    let (mut events, mut promises) = (record::taken(), vec![(0, allowed.clone())]);
    for &(op, sector, count) in ops {
        let count = count.min(GROUP - sector % GROUP);
        let (offset, len) = (place(sector), count * SECTOR);
        let there = &mut allowed[sector as usize..(sector + count) as usize];
        match op {
            Op::Write(byte) => there.iter_mut().for_each(|values| values.push(byte)),
            Op::Zeroes => there.iter_mut().for_each(|values| values.push(0)),
            // Anything, of which the image knows zeroes and what is below.
            Op::Discard => there.iter_mut().for_each(|values| values.extend([0, 200])),
            Op::Flush => {}
        }
        // From before the call on, for the power may go in the middle of it.
        promises.push((events.len(), allowed.clone()));
        match op {
            Op::Write(byte) => write(disk, &vec![byte; len as usize], offset),
            Op::Zeroes => disk.write_zeroes(offset, len, true).unwrap(),
            Op::Discard => disk.discard(offset, len).unwrap(),
            Op::Flush => disk.flush().unwrap(),
        }
        events.extend(record::taken());
        if matches!(op, Op::Flush) {
            allowed = contents(disk).into_iter().map(|byte| vec![byte]).collect();
            promises.push((events.len(), allowed.clone()));
        }
    }
    (events, promises)
}

/// The file after the power went at `end`: all up to the last sync is there, of what came later what `kept` says. It may be
/// as long as all of it already.
fn found(before: &[u8], events: &[WriteEvent], end: usize, long: bool, mut kept: impl FnMut() -> bool) -> Vec<u8> {
    let synced = events[..end].iter().rposition(|e| matches!(e, WriteEvent::Synced)).unwrap_or(0);
    let mut file = before.to_vec();
    for (n, event) in events[..end].iter().enumerate() {
        if let WriteEvent::Wrote(offset, bytes) = event {
            let (at, len) = (*offset as usize, bytes.len());
            let keep = n < synced || kept();
            if keep || long {
                file.resize(file.len().max(at + len), 0);
            }
            if keep {
                file[at..at + len].copy_from_slice(bytes);
            }
        }
    }
    file
}

/// An image on a base, or one whose clusters are compressed; the files are in `temp`.
fn image(temp: &Temp, cluster: u64, compressed: bool) -> PathBuf {
    let (base, size) = (temp.path("base"), GROUPS * APART * SECTOR);
    fs::write(&base, vec![200; (BASE * SECTOR) as usize]).unwrap();
    if compressed {
        File::options().write(true).open(base).unwrap().set_len(size).unwrap();
        temp.qemu_img(&format!("convert -c -f raw -O qcow2 -o cluster_size={cluster} base image"));
    } else {
        temp.qemu_img(&format!("create -q -f qcow2 -b base -F raw -o cluster_size={cluster} image {size}"));
    }
    temp.path("image")
}

/// Does `ops` on an image and opens what a loss of power could leave of it.
fn check(temp: &Temp, ops: &[(Op, u64, u64)], cluster: u64, compressed: bool, seed: u64) -> Result<(), TestCaseError> {
    let path = image(temp, cluster, compressed);
    let (before, state) = (fs::read(&path).unwrap(), temp.path("state"));
    let mut disk = Qcow2::open(&path, path.parent(), false).unwrap();
    let (events, promises) = record(&mut disk, ops);
    drop(disk);
    let mut random = seed | 1;
    // Opening what was left has to count, which takes some milliseconds.
    for end in (0..=events.len()).rev().step_by(events.len() / 30 + 1) {
        let (_, allowed) = promises.iter().rev().find(|(from, _)| *from <= end).unwrap();
        for how in 0..4 {
            // All of it, nothing, and a half and three quarters that are left to chance.
            let file = found(&before, &events, end, how > 1, || {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                how == 0 || how > 1 && random % 4 < how
            });
            fs::write(&state, file).unwrap();
            let opened = Qcow2::open(&state, state.parent(), false);
            prop_assert!(opened.is_ok(), "power went after {end} of {}: {:?}", events.len(), opened.err());
            for (sector, byte) in contents(&mut opened.unwrap()).iter().enumerate() {
                prop_assert!(
                    allowed[sector].contains(byte),
                    "power went after {end} of {} events: sector {sector} is {byte}, not one of {:?}",
                    events.len(),
                    allowed[sector]
                );
            }
        }
    }
    record::taken();
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn flushed_data_survives_every_power_loss(
        ops in ops(), cluster in prop_oneof![Just(512u64), Just(2048), Just(65536)], compressed in any::<bool>(),
        seed in any::<u64>(),
    ) {
        check(&Temp::new("power"), &ops, cluster, compressed, seed)?;
    }
}

/// The crate would take them elsewhere, and give back clusters that the table on stable storage still names.
#[test]
fn zeroes_that_have_a_cluster_are_overwritten_where_they_are() {
    let ops = [(Op::Write(1), 4, 1), (Op::Zeroes, 0, 8), (Op::Write(1), 0, 5), (Op::Write(1), 12, 1)];
    check(&Temp::new("zeroes"), &ops, 512, false, 0).unwrap();
}

/// The model can fail: tables that are written before what they speak of are found out.
#[test]
fn model_detects_a_wrong_flush_order() {
    let temp = Temp::new("order");
    let path = image(&temp, 2048, false);
    let (before, state) = (fs::read(&path).unwrap(), temp.path("state"));
    let mut disk = Qcow2::open(&path, path.parent(), false).unwrap();
    record::taken();
    write(&mut disk, &[7; 4096], 0);
    let order = disk.order.clone();
    disk.call(|image| order.flushing(|| image.flush())).unwrap();
    let events = record::taken();
    let mut data = events.iter().filter_map(|event| match event {
        WriteEvent::Wrote(_, bytes) => Some(bytes.iter().any(|byte| *byte != 7)),
        WriteEvent::Synced => None,
    });
    // As if the only sync had been the one of the mark.
    let events: Vec<WriteEvent> =
        events.iter().filter(|event| matches!(event, WriteEvent::Wrote(..))).cloned().collect();
    fs::write(&state, found(&before, &events, events.len(), true, || data.next().unwrap())).unwrap();
    let after = contents(&mut Qcow2::open(&state, state.parent(), false).unwrap());
    assert_eq!(after[0], 0, "neither the base's 200 nor 7");
}
