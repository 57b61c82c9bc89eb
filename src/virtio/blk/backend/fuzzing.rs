//! Disk files with any bytes, and what a guest does on them; see `crate::fuzzing`.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::overlay::{STATES, reseal};
use super::{BasePath, BlockBackend, OverlayFile};
use crate::memory::{GuestAddress, GuestMemory};

/// A directory that goes away with its run.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    #[cfg(feature = "internals")]
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cofferdam-fuzz-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).ok()?;
        Some(Self(path))
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (now, later) = bytes.split_at(N.min(bytes.len()));
    *bytes = later;
    let mut taken = [0; N];
    taken.iter_mut().zip(now).for_each(|(to, byte)| *to = *byte);
    taken
}

/// Changes up to 16 runs of up to 8 bytes in the first `within` bytes of a file.
fn patch(file: &mut [u8], within: usize, bytes: &mut &[u8]) {
    let [count] = take(bytes);
    for _ in 0..count % 17 {
        let ([len], at) = (take(bytes), usize::from(u16::from_le_bytes(take(bytes))) % within.max(1));
        for n in at..at + usize::from(len % 8) + 1 {
            let [byte] = take(bytes);
            if let Some(place) = file.get_mut(n) {
                *place = byte;
            }
        }
    }
}

/// Whatever a guest can ask for.
fn use_disk(disk: &mut dyn BlockBackend, mut bytes: &[u8]) {
    let Ok(memory) = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]) else {
        unreachable!("the harness lacks what it needs")
    };
    let size = disk.geometry().len;
    for _ in 0..32 {
        let [what, sector, high, count] = take(&mut bytes);
        let sectors = size / 512;
        let offset = (u64::from(sector) | u64::from(high) << 24) % sectors * 512;
        let len = (u64::from(count) + 1).min(sectors - offset / 512) * 512;
        let Ok(segment) = memory.segment(GuestAddress(0), len as usize) else { return };
        // A failure is an answer.
        let _ = match what % 7 {
            0 | 1 => disk.read(&memory, &[segment], offset),
            2 => disk.write(&memory, &[segment], offset),
            3 => disk.write_zeroes(offset, len, what > 127),
            4 => disk.discard(offset, len),
            5 => disk.extents(what > 127, offset, len, &mut Vec::new()).unwrap_or(Ok(())),
            _ => disk.flush(),
        };
    }
}

pub(crate) fn overlay(data: &[u8]) {
    let (mut bytes, Some(directory)) = (data, TempDir::new()) else { unreachable!("the harness lacks what it needs") };
    let (base, path) = (directory.0.join("base"), directory.0.join("overlay"));
    let raw = BasePath::Raw(base.clone());
    if fs::write(&base, [7; 8192]).is_err() || super::create(&path, &raw, None).is_err() {
        return;
    }
    let Ok(file) = fs::OpenOptions::new().read(true).write(true).open(&path) else {
        unreachable!("the harness lacks what it needs")
    };
    let mut head = vec![0; STATES as usize + 64];
    use std::os::unix::fs::FileExt;
    if file.read_exact_at(&mut head, 0).is_err() {
        return;
    }
    let [how] = take(&mut bytes);
    // The header's numbers, or all that there is.
    patch(&mut head, if how & 1 == 0 { 116 } else { STATES as usize + 64 }, &mut bytes);
    if how & 2 == 0 {
        reseal(&mut head);
    }
    let _ = file.write_all_at(&head, 0);
    if how & 4 == 0 {
        let _ = file.set_len(u64::from(u16::from_le_bytes(take(&mut bytes))));
    }
    drop(file);
    if let Ok(mut disk) = OverlayFile::open(&path, None, how & 8 == 0) {
        use_disk(&mut disk, bytes);
    }
    let few = &mut |done: u64, _: u64| if done < 4 << 20 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) };
    let _ = super::flatten(&path, &directory.0.join("flat"), few);
    let _ = super::compact(&path, few);
}

/// A qcow2 image that is changed where its tables are.
#[cfg(feature = "qcow2")]
struct ForgedTables(Vec<u8>);

#[cfg(feature = "qcow2")]
impl ForgedTables {
    fn number(&self, at: usize, len: usize) -> usize {
        let bytes = at.checked_add(len).and_then(|end| self.0.get(at..end)).unwrap_or_default();
        bytes.iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            if let Some(place) = at.checked_add(n).and_then(|at| self.0.get_mut(at)) {
                *place = *byte;
            }
        }
    }

    /// An entry as a table has it: some cluster of the file with some flags, or one far away.
    fn entry(&self, bytes: &mut &[u8]) -> [u8; 8] {
        let [how, flags, low, high] = take(bytes);
        let cluster = 1u64 << (self.number(20, 4) % 22);
        let mut entry = match how % 8 {
            0 => u64::from_be_bytes(take(bytes)),
            // The last that there can be, and those before.
            1 => 0x00ff_ffff_ffff_fe00 & !(cluster - 1) & !(u64::from(low) * cluster),
            // Compressed: so many sectors, somewhere.
            2 => {
                let sectors = (u64::from(flags) << 56) & ((1 << 62) - 1);
                return (1 << 62 | sectors | u64::from(low) | u64::from(high) << 8).to_be_bytes();
            }
            3 => (u64::from(low) << (how / 8)) * cluster,
            _ => u64::from(low % 96) * cluster,
        };
        entry |= u64::from(flags & 1) << 63 | u64::from(flags >> 1 & 1);
        entry.to_be_bytes()
    }

    /// Has all but a few of the clusters that its table of counts can speak of count as used, so that it must grow soon.
    fn full(mut self) -> Self {
        // Clusters of 512 bytes with counts of 64 bits.
        let (cluster, a_block) = (512, 64);
        let (counts, all) = (self.number(48, 8), a_block * a_block);
        self.0.resize(all * cluster, 0);
        for n in 0..a_block {
            if self.number(counts + n * 8, 8) == 0 {
                self.put(counts + n * 8, &((all - a_block + n) as u64 * 512).to_be_bytes());
            }
            let block = self.number(counts + n * 8, 8);
            let used = (n * a_block..(n + 1) * a_block).filter(|at| !(all - a_block - 8..all - a_block).contains(at));
            used.for_each(|at| self.put(block + at % a_block * 8, &1u64.to_be_bytes()));
        }
        self
    }

    fn change(&mut self, bytes: &mut &[u8]) {
        let [what, n, m] = take(bytes);
        let (n, m, entry) = (usize::from(n) * 8, usize::from(m) * 8, 0x00ff_ffff_ffff_fe00);
        let (l1, counts) = (self.number(40, 8), self.number(48, 8));
        match what % 8 {
            0 => self.put(l1.saturating_add(n % 128), &self.entry(bytes)),
            1 | 2 => {
                self.put((self.number(l1.saturating_add(n % 128), 8) & entry).saturating_add(m), &self.entry(bytes))
            }
            3 => self.put(counts.saturating_add(n), &self.entry(bytes)),
            4 => self.put((self.number(counts, 8) & entry).saturating_add(m / 8), &take::<2>(bytes)),
            // Header extensions from where they begin.
            5 => {
                let mut at = self.number(100, 4);
                for _ in 0..n / 8 % 4 {
                    let [kind, len] = take(bytes);
                    let kind = *[0xe279_2acau32, 0x6803_f857, 0x4441_5441, 0, 0x2385_2875]
                        .get(usize::from(kind % 8))
                        .unwrap_or(&7);
                    let data: Vec<u8> = (0..len).flat_map(|_| take::<1>(bytes)).collect();
                    self.put(at, &[kind.to_be_bytes(), u32::from(len).to_be_bytes()].concat());
                    self.put(at + 8, &data);
                    at += 8 + data.len().next_multiple_of(8);
                }
                self.put(at, &[0; 8]);
            }
            // Bytes that are stored in a compressed way (RFC 1951, 3.2.4).
            6 => {
                let len = 1u16 << (9 + m / 8 % 5);
                self.put(n * 16, &[&[1], &len.to_le_bytes()[..], &(!len).to_le_bytes()].concat());
            }
            // A disk of another size, and features that vanish.
            _ => {
                self.put(24, &(u64::from(u32::from_le_bytes(take(bytes)) >> (m / 8 % 32)) * 512).to_be_bytes());
                self.put(88, &take::<8>(bytes));
            }
        }
    }
}

#[cfg(feature = "qcow2")]
pub(crate) fn qcow2_open(data: &[u8]) {
    static IMAGES: std::sync::OnceLock<[Vec<u8>; 6]> = std::sync::OnceLock::new();
    let small = super::qcow2::small;
    let make = || {
        let (narrow, wide) = (small(4096, 1, None), small(2048, 64, None));
        let ForgedTables(full) = ForgedTables(small(512, 64, None)).full();
        [small(512, 16, None), small(512, 64, None), narrow, wide, small(512, 16, Some("base")), full]
    };
    let Some(directory) = TempDir::new() else { unreachable!("the harness lacks what it needs") };
    let (mut bytes, path) = (data, directory.0.join("image"));
    let [how, which, changes] = take(&mut bytes);
    let images = IMAGES.get_or_init(make);
    let mut image = ForgedTables(images.get(usize::from(which) % images.len()).cloned().unwrap_or_default());
    (0..changes % 16).for_each(|_| image.change(&mut bytes));
    let ForgedTables(mut image) = image;
    let len = image.len();
    if how & 8 == 0 {
        patch(&mut image, if how & 1 == 0 { 112 } else { len }, &mut bytes);
    }
    if how & 2 == 0 {
        image.truncate(usize::from(u16::from_le_bytes(take(&mut bytes))));
    }
    if fs::write(&path, image).is_err() || fs::write(directory.0.join("base"), [9; 5000]).is_err() {
        return;
    }
    // And what becomes of it, as the next one finds it.
    for _ in 0..2 {
        let Ok(mut disk) = super::Qcow2::open(&path, Some(&directory.0), how & 4 == 0) else { return };
        let (now, later) = bytes.split_at(bytes.len().min(128));
        use_disk(&mut disk, now);
        if how & 16 != 0 {
            let _ = disk.grow(disk.geometry().len.saturating_add(u64::from(how) << 12));
        }
        bytes = later;
    }
}

/// Returns what an image holds when it is found, and what it holds after it was used. The byte is written at the
/// beginning of every `step`.
#[cfg(feature = "qcow2")]
pub(crate) fn qcow2_found(path: &std::path::Path, step: u64, byte: u8) -> crate::error::Result<[Vec<u8>; 2]> {
    let mut disk = super::Qcow2::open(path, path.parent(), false)?;
    let size = disk.geometry().len;
    let memory = GuestMemory::anonymous(&[(GuestAddress(0), size)])?;
    let all = [memory.segment(GuestAddress(0), size as usize).map_err(std::io::Error::other)?];
    let contents = |disk: &mut super::Qcow2| -> crate::error::Result<Vec<u8>> {
        let mut bytes = vec![0; size as usize];
        disk.read(&memory, &all, 0)?;
        memory.read(GuestAddress(0), &mut bytes).map_err(std::io::Error::other)?;
        Ok(bytes)
    };
    let found = contents(&mut disk)?;
    memory.write(GuestAddress(0), &[byte; 512]).map_err(std::io::Error::other)?;
    let sector = [memory.segment(GuestAddress(0), 512).map_err(std::io::Error::other)?];
    for at in (0..size).step_by(step as usize) {
        disk.write(&memory, &sector, at)?;
    }
    drop(disk);
    let used = contents(&mut super::Qcow2::open(path, path.parent(), true)?)?;
    Ok([found, used])
}

#[cfg(all(test, feature = "qcow2"))]
mod tests {
    use super::*;

    #[test]
    fn refcount_table_of_the_fuzz_image_grows() {
        let directory = TempDir::new().unwrap();
        let path = directory.0.join("image");
        let ForgedTables(image) = ForgedTables(super::super::qcow2::small(512, 64, None)).full();
        let clusters = |image: Vec<u8>| ForgedTables(image).number(56, 4);
        assert_eq!(clusters(image.clone()), 1);
        fs::write(&path, image).unwrap();
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 64 << 10)]).unwrap();
        memory.write(GuestAddress(0), &[5; 64 << 10]).unwrap();
        let all = [memory.segment(GuestAddress(0), 64 << 10).unwrap()];
        let mut disk = super::super::Qcow2::open(&path, None, false).unwrap();
        disk.write(&memory, &all, 16 << 10).unwrap();
        drop(disk);
        assert!(clusters(fs::read(&path).unwrap()) > 1);
        let mut disk = super::super::Qcow2::open(&path, None, false).unwrap();
        memory.write(GuestAddress(0), &[0; 64 << 10]).unwrap();
        disk.read(&memory, &all, 16 << 10).unwrap();
        let mut read = vec![0; 64 << 10];
        memory.read(GuestAddress(0), &mut read).unwrap();
        assert_eq!(read, [5; 64 << 10]);
    }
}
