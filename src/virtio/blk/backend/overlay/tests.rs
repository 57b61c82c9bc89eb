//! Overlays against a plain vector, and everything about them that can be wrong.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::error::{Error, ErrorKind};
use crate::memory::GuestAddress;
use crate::size::Size;

/// A directory that goes away with its test.
pub(super) struct Temp(PathBuf);

impl Temp {
    pub(super) fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cofferdam-overlay-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A raw image of these bytes.
    fn raw(&self, name: &str, bytes: &[u8]) -> BasePath {
        fs::write(self.path(name), bytes).unwrap();
        BasePath::Raw(self.path(name))
    }

    /// An overlay on it.
    fn overlay(&self, name: &str, base: &BasePath) -> PathBuf {
        create(&self.path(name), base, None).unwrap();
        self.path(name)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(super) fn memory() -> GuestMemory {
    GuestMemory::anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 512 * 7 + n % 251) as u8).collect()
}

fn write(disk: &mut OverlayFile, memory: &GuestMemory, bytes: &[u8], offset: u64) -> io::Result<()> {
    memory.write(GuestAddress(0), bytes).unwrap();
    disk.write(memory, &[memory.segment(GuestAddress(0), bytes.len()).unwrap()], offset)
}

fn read(disk: &mut OverlayFile, memory: &GuestMemory, offset: u64, len: usize) -> Vec<u8> {
    let cut = len / 3;
    let segments = [
        memory.segment(GuestAddress(1 << 20), cut).unwrap(),
        memory.segment(GuestAddress(2 << 20), len - cut).unwrap(),
    ];
    BlockBackend::read(disk, memory, &segments, offset).unwrap();
    let mut bytes = vec![0; len];
    let (a, b) = bytes.split_at_mut(cut);
    memory.read(GuestAddress(1 << 20), a).unwrap();
    memory.read(GuestAddress(2 << 20), b).unwrap();
    bytes
}

/// Returns what a reader gets that follows [`BlockBackend::extents`].
fn read_extents(disk: &mut OverlayFile, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut extents = Vec::new();
    BlockBackend::extents(disk, false, offset, len as u64, &mut extents).unwrap().unwrap();
    for extent in extents {
        match extent {
            Extent::Zeroes { len } => bytes.extend(vec![0; len as usize]),
            Extent::File { fd, offset, len } => {
                let mut piece = vec![0; len as usize];
                fs::File::open(format!("/proc/self/fd/{fd}")).unwrap().read_exact_at(&mut piece, offset).unwrap();
                bytes.extend(piece);
            }
        }
    }
    bytes
}

/// Writes as an engine does that moves the bytes itself.
fn write_extents(disk: &mut OverlayFile, bytes: &[u8], offset: u64) {
    let mut extents = Vec::new();
    BlockBackend::extents(disk, true, offset, bytes.len() as u64, &mut extents).unwrap().unwrap();
    let mut rest = bytes;
    for extent in extents {
        let Extent::File { fd, offset, len } = extent else { panic!("nowhere to write") };
        let (now, later) = rest.split_at(len as usize);
        let file = fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}")).unwrap();
        file.write_all_at(now, offset).unwrap();
        rest = later;
    }
    disk.write_done(offset, bytes.len() as u64).unwrap();
}

#[derive(Debug, Clone)]
enum Op {
    Write(u8),
    WriteExtents(u8),
    Zeroes(bool),
    Discard,
    Flush,
    Reopen,
    Compact,
}

fn ops() -> impl Strategy<Value = Vec<(Op, u64, u64)>> {
    let op = prop_oneof![
        4 => any::<u8>().prop_map(Op::Write),
        4 => any::<u8>().prop_map(Op::WriteExtents),
        2 => any::<bool>().prop_map(Op::Zeroes),
        1 => Just(Op::Discard),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
        1 => Just(Op::Compact),
    ];
    proptest::collection::vec((op, 0..SECTORS, 1..40u64), 1..40)
}

/// No whole clusters.
const SECTORS: u64 = 203;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn overlay_matches_a_vector(ops in ops(), short in 1..SECTORS as usize) {
        let (temp, memory) = (Temp::new(), memory());
        let base = pattern(short * 512);
        let mut model = base.clone();
        model.resize(SECTORS as usize * 512, 0);
        let (raw, path) = (temp.raw("base", &base), temp.path("overlay"));
        create(&path, &raw, Some(Size::bytes(SECTORS * 512))).unwrap();
        let mut disk = OverlayFile::open(&path, Some(&raw), false).unwrap();
        for (op, sector, count) in ops {
            let (offset, len) = (sector * 512, count.min(SECTORS - sector) * 512);
            let there = offset as usize..(offset + len) as usize;
            match op {
                Op::Write(byte) => {
                    write(&mut disk, &memory, &vec![byte; there.len()], offset).unwrap();
                    model[there].fill(byte);
                }
                Op::WriteExtents(byte) => {
                    write_extents(&mut disk, &vec![byte; there.len()], offset);
                    model[there].fill(byte);
                }
                Op::Zeroes(unmap) => {
                    disk.write_zeroes(offset, len, unmap).unwrap();
                    model[there].fill(0);
                }
                Op::Discard => {
                    disk.discard(offset, len).unwrap();
                    // Anything may be there now, but nothing beside it has changed.
                    model[there.clone()].copy_from_slice(&read(&mut disk, &memory, offset, there.len()));
                }
                Op::Flush => disk.flush().unwrap(),
                Op::Reopen | Op::Compact => {
                    disk.flush().unwrap();
                    drop(disk);
                    if matches!(op, Op::Compact) {
                        compact(&path, &mut |_, _| ControlFlow::Continue(())).unwrap();
                    }
                    disk = OverlayFile::open(&path, None, false).unwrap();
                }
            }
            let all = read(&mut disk, &memory, 0, model.len());
            prop_assert!(all == model);
            prop_assert!(read_extents(&mut disk, 0, model.len()) == model);
        }
        prop_assert_eq!(fs::read(temp.path("base")).unwrap(), base, "the base was written");
    }
}

fn fails(path: &std::path::Path) -> Error {
    OverlayFile::open(path, None, false).unwrap_err()
}

#[test]
fn changed_base_is_rejected_without_a_write() {
    let temp = Temp::new();
    let base = temp.raw("base", &pattern(8192));
    let path = temp.overlay("overlay", &base);
    let before = fs::read(&path).unwrap();
    OverlayFile::open(&path, None, false).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::OpenOptions::new().write(true).open(base.path()).unwrap().write_all_at(b"x", 5).unwrap();
    let error = fails(&path);
    assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
    assert!(error.to_string().contains(&*base.path().to_string_lossy()), "{error}");
    // Another file of the same name.
    fs::remove_file(base.path()).unwrap();
    assert_eq!(fails(&path).kind(), ErrorKind::NotFound);
    temp.raw("base", &pattern(4096));
    assert_eq!(fails(&path).kind(), ErrorKind::Incompatible);
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn non_overlays_are_rejected() {
    let temp = Temp::new();
    let base = temp.raw("base", &pattern(8192));
    let path = temp.overlay("overlay", &base);
    let whole = fs::read(&path).unwrap();
    for (bytes, kind) in [
        (vec![], ErrorKind::Corrupt),
        (vec![0; 100_000], ErrorKind::Corrupt),
        (whole[..9000].to_vec(), ErrorKind::Corrupt),
        ([&whole[..8], &[2], &whole[9..]].concat(), ErrorKind::Incompatible),
    ] {
        fs::write(&path, &bytes).unwrap();
        assert_eq!(fails(&path).kind(), kind);
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
    assert_eq!(fails(&temp.path("none")).kind(), ErrorKind::NotFound);
    assert_eq!(fails(&temp.0).kind(), ErrorKind::Io);
    let smaller = create(&temp.path("smaller"), &base, Some(Size::kib(4))).unwrap_err();
    assert_eq!(smaller.kind(), ErrorKind::InvalidConfig);
    assert_eq!(create(&path, &base, None).unwrap_err().kind(), ErrorKind::AlreadyExists);
    let empty = create(&temp.path("empty"), &temp.raw("none", &[]), None).unwrap_err();
    assert_eq!(empty.kind(), ErrorKind::InvalidConfig, "{empty}");
    assert_eq!(fs::read_dir(&temp.0).unwrap().count(), 3, "something was left behind");
}

#[test]
fn invalid_cluster_states_are_io_errors() {
    let temp = Temp::new();
    let path = temp.overlay("overlay", &temp.raw("base", &pattern(8192)));
    fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&[0xff], format::STATES).unwrap();
    let (mut disk, memory) = (OverlayFile::open(&path, None, false).unwrap(), memory());
    let error = write(&mut disk, &memory, &[1; 512], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(disk.discard(0, 8192).is_err() && disk.write_zeroes(0, 8192, true).is_err());
}

#[test]
fn overlay_locks_allow_one_writer_and_share_the_base() {
    let temp = Temp::new();
    let base = temp.raw("base", &pattern(8192));
    let path = temp.overlay("overlay", &base);
    let writer = OverlayFile::open(&path, None, false).unwrap();
    let error = OverlayFile::open(&path, None, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceBusy);
    assert!(error.to_string().contains("this process"), "{error}");
    let others: Vec<_> = (0..200).map(|_| OverlayFile::private(&temp.0, &base, None, false).unwrap()).collect();
    assert_eq!(super::super::RawFile::open(base.path(), false, true).unwrap_err().kind(), ErrorKind::ResourceBusy);
    drop((writer, others));
    super::super::RawFile::open(base.path(), false, true).unwrap();
}

#[test]
fn frozen_overlay_is_a_read_only_base() {
    let (temp, memory) = (Temp::new(), memory());
    let base = temp.raw("base", &pattern(16384));
    let lower = temp.overlay("lower", &base);
    let mut disk = OverlayFile::open(&lower, None, false).unwrap();
    write(&mut disk, &memory, &[1; 4096], 4096).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let on_lower = BasePath::Overlay(lower.clone());
    let error = create(&temp.path("upper"), &on_lower, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
    freeze(&lower).unwrap();
    freeze(&lower).unwrap();
    assert_eq!(fails(&lower).kind(), ErrorKind::InvalidState);
    let frozen = fs::read(&lower).unwrap();
    let upper = temp.overlay("upper", &on_lower);
    let mut disk = OverlayFile::open(&upper, None, false).unwrap();
    write(&mut disk, &memory, &[2; 512], 8192).unwrap();
    disk.write_zeroes(0, 4096, true).unwrap();
    disk.flush().unwrap();
    let wanted = [vec![0; 4096], vec![1; 4096], vec![2; 512], pattern(16384)[8704..].to_vec()].concat();
    assert_eq!(read(&mut disk, &memory, 0, 16384), wanted);
    assert_eq!(read_extents(&mut disk, 0, 16384), wanted);
    drop(disk);
    assert_eq!(fs::read(&lower).unwrap(), frozen);

    // Any of them as one raw image.
    let go_on = &mut |_: u64, _: u64| ControlFlow::Continue(());
    flatten(&upper, &temp.path("flat"), go_on).unwrap();
    assert_eq!(fs::read(temp.path("flat")).unwrap(), wanted);
    assert_eq!(flatten(&upper, &temp.path("flat"), go_on).unwrap_err().kind(), ErrorKind::AlreadyExists);

    // On another base, it reads as before, and takes what it needs of the old ones with it.
    let other = temp.raw("other", &[7; 8192]);
    rebase(&upper, &other, false, go_on).unwrap();
    fs::remove_file(&lower).unwrap();
    let mut disk = OverlayFile::open(&upper, None, false).unwrap();
    assert_eq!(read(&mut disk, &memory, 0, 16384), wanted);
}

#[test]
fn moved_base_is_found_after_rebase() {
    let (temp, memory) = (Temp::new(), memory());
    let base = temp.raw("base", &pattern(8192));
    let path = temp.overlay("overlay", &base);
    let mut disk = OverlayFile::open(&path, None, false).unwrap();
    write(&mut disk, &memory, &[1; 512], 0).unwrap();
    disk.flush().unwrap();
    drop(disk);
    fs::copy(base.path(), temp.path("copy")).unwrap();
    fs::remove_file(base.path()).unwrap();
    let copy = BasePath::Raw(temp.path("copy"));
    rebase(&path, &copy, true, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let mut disk = OverlayFile::open(&path, Some(&copy), false).unwrap();
    assert_eq!(read(&mut disk, &memory, 0, 8192), [vec![1; 512], pattern(8192)[512..].to_vec()].concat());
}

#[test]
fn cancelled_rewrite_changes_nothing() {
    let (temp, memory) = (Temp::new(), memory());
    let base = temp.raw("base", &pattern(8 << 20));
    let path = temp.overlay("overlay", &base);
    let mut disk = OverlayFile::open(&path, None, false).unwrap();
    write(&mut disk, &memory, &[1; 1 << 20], 1 << 20).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let before = fs::read(&path).unwrap();
    let stop = &mut |done: u64, _: u64| if done < 4 << 20 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
    let ended = [
        compact(&path, stop),
        rebase(&path, &base, false, stop),
        rebase(&path, &base, true, stop),
        flatten(&path, &temp.path("flat"), stop),
    ];
    for outcome in ended {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    assert_eq!(fs::read(&path).unwrap(), before);
    assert_eq!(fs::read_dir(&temp.0).unwrap().count(), 2, "something was left behind");
}

#[test]
fn compact_frees_clusters_equal_to_the_base() {
    let (temp, memory) = (Temp::new(), memory());
    let base = temp.raw("base", &pattern(4 << 20));
    let path = temp.overlay("overlay", &base);
    let mut disk = OverlayFile::open(&path, None, false).unwrap();
    write(&mut disk, &memory, &pattern(4 << 20), 0).unwrap();
    write(&mut disk, &memory, &[9; 4096], 1 << 20).unwrap();
    disk.flush().unwrap();
    let before = disk.allocated().unwrap();
    drop(disk);
    compact(&path, &mut |_, _| ControlFlow::Continue(())).unwrap();
    let mut disk = OverlayFile::open(&path, None, false).unwrap();
    assert!(before >= 4 << 20 && disk.allocated().unwrap() < 64 << 10, "{before}");
    assert_eq!(read(&mut disk, &memory, 1 << 20, 4096), [9; 4096]);
    assert_eq!(read(&mut disk, &memory, 0, 4096), pattern(4096));
}

#[test]
fn cyclic_or_long_base_chains_are_rejected() {
    let temp = Temp::new();
    let base = temp.raw("base", &pattern(4096));
    let mut below = base.clone();
    for n in 0..16 {
        let path = temp.overlay(&format!("{n}"), &below);
        freeze(&path).unwrap();
        below = BasePath::Overlay(path);
    }
    let error = create(&temp.path("17"), &below, None).and_then(|()| OverlayFile::open(&temp.path("17"), None, true));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidConfig);
    // The lowest of two is replaced by one that lies on the upper: only a hand can do that.
    let second = fs::read(temp.path("1")).unwrap();
    let mut header = OverlayHeader::parse(&second).unwrap();
    let lowest = OverlayHeader::parse(&fs::read(temp.path("0")).unwrap()).unwrap();
    header.base = format::BaseIdentity::Overlay { id: header.id, len: header.size };
    header.path = temp.path("1");
    header.id = lowest.id;
    let file = fs::OpenOptions::new().write(true).open(temp.path("0")).unwrap();
    file.write_all_at(&header.bytes(), 0).unwrap();
    let error = OverlayFile::open(&temp.path("1"), None, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("comes back"), "{error}");
}

#[test]
fn overlay_respects_max_size_and_frees_discarded_space() {
    let (temp, memory) = (Temp::new(), memory());
    let base = temp.raw("base", &[0; 512]);
    let mut disk = OverlayFile::private(&temp.0, &base, Some(Size::mib(64)), false).unwrap().limited(Size::mib(1));
    let mut written = 0;
    let error = loop {
        match write(&mut disk, &memory, &[5; 64 << 10], written) {
            Ok(()) => written += 64 << 10,
            Err(e) => break e,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!(disk.allocated().unwrap() <= 1 << 20 && written >= 900 << 10, "{written}");
    // In place goes on; and what is given back can be used elsewhere.
    write(&mut disk, &memory, &[6; 4096], 0).unwrap();
    disk.discard(0, 512 << 10).unwrap();
    assert!(disk.allocated().unwrap() <= 512 << 10);
    write(&mut disk, &memory, &[7; 256 << 10], 32 << 20).unwrap();
    assert_eq!(read(&mut disk, &memory, 32 << 20, 4096), [7; 4096]);
    assert_eq!(read(&mut disk, &memory, 0, 4096), [0; 4096]);
}

#[test]
fn overlay_grows_and_never_shrinks() {
    let (temp, memory) = (Temp::new(), memory());
    let path = temp.overlay("overlay", &temp.raw("base", &pattern(8192 + 512)));
    let mut disk = OverlayFile::open(&path, None, false).unwrap();
    write(&mut disk, &memory, &[1; 512], 8192).unwrap();
    assert!(disk.grow(8192).is_err() && disk.grow(u64::MAX).is_err() && disk.grow(100_000).is_err());
    disk.grow(16384).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let mut disk = OverlayFile::open(&path, None, false).unwrap();
    assert_eq!(disk.geometry().len, 16384);
    assert_eq!(read(&mut disk, &memory, 8192, 8192), [vec![1; 512], vec![0; 8192 - 512]].concat());
}

#[test]
fn concurrent_writes_to_one_cluster_are_kept() {
    let (temp, memory) = (Temp::new(), memory());
    let path = temp.overlay("overlay", &temp.raw("base", &pattern(16384)));
    let mut disk = OverlayFile::open(&path, None, false).unwrap();
    let place = |disk: &mut OverlayFile, offset, len| match disk.extents_for_write(offset, len) {
        Extent::File { fd, offset, .. } => {
            (fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}")).unwrap(), offset)
        }
        Extent::Zeroes { .. } => panic!("nowhere to write"),
    };
    // The first writes all of a cluster and has done so, but has not said it; the second asks for a piece of it.
    let (file, at) = place(&mut disk, 0, 4096);
    file.write_all_at(&[1; 4096], at).unwrap();
    assert_eq!(read(&mut disk, &memory, 0, 4096), pattern(4096), "not before it is done");
    let (file, at) = place(&mut disk, 512, 512);
    file.write_all_at(&[2; 512], at).unwrap();
    disk.write_done(0, 4096).unwrap();
    disk.write_done(512, 512).unwrap();
    assert_eq!(read(&mut disk, &memory, 0, 4096), [vec![1; 512], vec![2; 512], vec![1; 3072]].concat());
    // One that never arrives leaves what was there.
    place(&mut disk, 4096, 8192);
    disk.write_failed(4096, 8192);
    let (file, at) = place(&mut disk, 8192 + 512, 512);
    file.write_all_at(&[3; 512], at).unwrap();
    disk.write_done(8192 + 512, 512).unwrap();
    let mut wanted = pattern(16384)[4096..12288].to_vec();
    wanted[4096 + 512..4096 + 1024].fill(3);
    assert_eq!(read(&mut disk, &memory, 4096, 8192), wanted);
}

impl OverlayFile {
    fn extents_for_write(&mut self, offset: u64, len: u64) -> Extent {
        let mut extents = Vec::new();
        BlockBackend::extents(self, true, offset, len, &mut extents).unwrap().unwrap();
        extents[0]
    }
}
