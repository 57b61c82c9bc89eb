//! Pieces of files, one behind the other, as one disk that is only read.
//!
//! Each piece is used in place, so that disks that share a file share its pages in the host's cache.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::super::SECTOR;
use super::{BlockBackend, Extent, Geometry, front, transfer};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{GuestMemory, Segment};

/// Which bytes of a file are a piece of a disk.
#[derive(Debug)]
pub(crate) struct FilePiece {
    pub file: Arc<File>,
    pub offset: u64,
    pub len: u64,
}

/// A piece in its place on the disk.
#[derive(Debug)]
struct PlacedPiece {
    /// Its number among the files.
    file: usize,
    offset: u64,
    /// Where it begins and ends on the disk.
    start: u64,
    end: u64,
}

/// An open disk of pieces.
#[derive(Debug)]
pub(crate) struct ConcatFile {
    /// Each once, however many pieces are of it. Disks share them, so that a layer takes one descriptor of the process, whatever
    /// containers use it. They can only be read and have no locks: that children of fork keep them does no harm.
    files: Vec<Arc<File>>,
    pieces: Vec<PlacedPiece>,
    len: u64,
}

/// A part of a range that lies in one piece.
struct PieceRange {
    file: usize,
    offset: u64,
    len: u64,
}

impl ConcatFile {
    /// Takes the pieces in their order. They must stay as they are.
    ///
    /// # Errors
    /// `InvalidConfig` for pieces that are empty, not whole sectors, or beyond the end of their file, and for none.
    pub(crate) fn new(pieces: &[FilePiece]) -> Result<Self> {
        let invalid = |what: String| Error::new(ErrorKind::InvalidConfig, what);
        let (mut files, mut placed, mut len) = (Vec::<Arc<File>>::new(), Vec::new(), 0u64);
        for (n, FilePiece { file, offset, len: piece }) in pieces.iter().enumerate() {
            let there = offset.checked_add(*piece).is_some_and(|end| file.metadata().is_ok_and(|it| end <= it.len()));
            if *piece == 0 || piece % SECTOR != 0 || offset % SECTOR != 0 || !there {
                return Err(invalid(format!("piece {n} of the disk is not in whole sectors of its file")));
            }
            let known = files.iter().position(|it| Arc::ptr_eq(it, file));
            if known.is_none() {
                files.push(file.clone());
            }
            let start = len;
            len = len.checked_add(*piece).ok_or_else(|| invalid("the disk is too large".into()))?;
            placed.push(PlacedPiece { file: known.unwrap_or(files.len() - 1), offset: *offset, start, end: len });
        }
        if placed.is_empty() {
            return Err(invalid("a disk without a piece".into()));
        }
        Ok(Self { files, pieces: placed, len })
    }

    /// Where a range lies, in order. Nothing of it is beyond the disk.
    fn parts(&self, offset: u64, len: u64) -> impl Iterator<Item = PieceRange> {
        let end = offset.saturating_add(len);
        let first = self.pieces.partition_point(|piece| piece.end <= offset);
        let touched = self.pieces.iter().skip(first).take_while(move |piece| piece.start < end);
        touched.map(move |piece| {
            let (from, to) = (offset.max(piece.start), end.min(piece.end));
            PieceRange { file: piece.file, offset: piece.offset + (from - piece.start), len: to - from }
        })
    }

    fn file(&self, n: usize) -> io::Result<&File> {
        self.files.get(n).map(AsRef::as_ref).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

fn read_only() -> io::Error {
    io::Error::from_raw_os_error(libc::EROFS)
}

impl BlockBackend for ConcatFile {
    fn geometry(&self) -> Geometry {
        Geometry { len: self.len, read_only: true, discard: 0 }
    }

    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        let mut rest = segments.to_vec();
        let len = segments.iter().map(|segment| segment.len() as u64).sum();
        for part in self.parts(offset, len) {
            let file = self.file(part.file)?;
            let piece = front(&mut rest, usize::try_from(part.len).unwrap_or(usize::MAX));
            transfer(&piece, part.offset, |rest, at| memory.read_at(rest, file.as_fd(), at))?;
        }
        Ok(())
    }

    fn write(&mut self, _: &GuestMemory, _: &[Segment], _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(read_only())
    }

    fn grow(&mut self, _: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.files.iter().try_fold(0, |sum, file| Ok(sum + file.metadata()?.blocks() * 512))
    }

    fn extents(&mut self, write: bool, offset: u64, len: u64, found: &mut Vec<Extent>) -> Option<io::Result<()>> {
        if write {
            return Some(Err(read_only()));
        }
        for PieceRange { file, offset, len } in self.parts(offset, len) {
            match self.file(file) {
                Ok(file) => found.push(Extent::File { fd: file.as_raw_fd(), offset, len }),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(()))
    }

    fn write_done(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_fd(&self) -> Option<RawFd> {
        self.files.first().map(|file| file.as_raw_fd())
    }

    fn takes(&mut self, _: u64, _: u64) -> io::Result<u64> {
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::*;
    use crate::memory::GuestAddress;
    use crate::sys;

    /// A file of sectors that each tell their own number from `first` on.
    fn file(first: u8, sectors: u8) -> Arc<File> {
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        for n in 0..sectors {
            file.write_all_at(&[first + n; SECTOR as usize], u64::from(n) * SECTOR).unwrap();
        }
        Arc::new(file)
    }

    fn piece(file: &Arc<File>, offset: u64, sectors: u64) -> FilePiece {
        FilePiece { file: file.clone(), offset: offset * SECTOR, len: sectors * SECTOR }
    }

    fn disk() -> (ConcatFile, Vec<u8>) {
        let (a, b, c) = (file(0, 8), file(50, 3), file(100, 20));
        let pieces = [piece(&a, 0, 1), piece(&b, 0, 3), piece(&c, 4, 9), piece(&a, 1, 7)];
        let numbers = [0].into_iter().chain(50..53).chain(104..113).chain(1..8);
        (ConcatFile::new(&pieces).unwrap(), numbers.collect())
    }

    #[test]
    fn files_of_several_pieces_are_open_once() {
        let (disk, numbers) = disk();
        assert_eq!((disk.files.len(), disk.pieces.len()), (3, 4));
        assert!(disk.files.iter().all(|file| Arc::strong_count(file) == 1), "no copies of descriptors");
        assert_eq!(disk.geometry(), Geometry { len: numbers.len() as u64 * SECTOR, read_only: true, discard: 0 });
    }

    #[test]
    fn writes_are_refused() {
        let (mut disk, _) = disk();
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x1000)]).unwrap();
        let segments = [memory.segment(GuestAddress(0), 512).unwrap()];
        let outcomes = [
            disk.write(&memory, &segments, 0),
            disk.discard(0, 512),
            disk.write_zeroes(0, 512, true),
            disk.grow(1 << 20),
            disk.extents(true, 0, 512, &mut Vec::new()).unwrap(),
        ];
        assert!(outcomes.iter().all(|it| it.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EROFS))));
    }

    #[test]
    fn pieces_that_cannot_be_are_refused() {
        let a = file(0, 4);
        let wrong = [
            vec![],
            vec![piece(&a, 0, 0)],
            vec![piece(&a, 0, 4), piece(&a, 2, 3)],
            vec![FilePiece { file: a.clone(), offset: 1, len: 512 }],
            vec![FilePiece { file: a.clone(), offset: 0, len: 513 }],
            vec![FilePiece { file: a.clone(), offset: u64::MAX - 511, len: 512 }],
        ];
        for pieces in wrong {
            assert_eq!(ConcatFile::new(&pieces).unwrap_err().kind(), ErrorKind::InvalidConfig, "{pieces:?}");
        }
    }

    proptest! {
        #[test]
        fn any_range_is_read_from_its_places(start in 0u64..20, len in 1u64..20, cut in 1usize..4096) {
            let (mut disk, numbers) = disk();
            let len = len.min(numbers.len() as u64 - start);
            let expected: Vec<u8> = numbers[start as usize..(start + len) as usize].iter().flat_map(|n| [*n; 512]).collect();
            let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x8000)]).unwrap();
            let bytes = expected.len();
            let cut = cut.min(bytes);
            let mut segments = vec![memory.segment(GuestAddress(0), cut).unwrap()];
            if cut < bytes {
                segments.push(memory.segment(GuestAddress(0x4000), bytes - cut).unwrap());
            }
            disk.read(&memory, &segments, start * SECTOR).unwrap();
            let mut found = vec![0; bytes];
            memory.gather(&segments, 0, &mut found).unwrap();
            prop_assert!(found == expected);
            let mut extents = Vec::new();
            disk.extents(false, start * SECTOR, len * SECTOR, &mut extents).unwrap().unwrap();
            let mut read = Vec::new();
            for extent in extents {
                let Extent::File { fd, offset, len } = extent else { panic!("a hole") };
                let file = disk.files.iter().find(|file| file.as_raw_fd() == fd).unwrap();
                let mut piece = vec![0; len as usize];
                file.read_exact_at(&mut piece, offset).unwrap();
                read.extend(piece);
            }
            prop_assert!(read == expected);
        }
    }
}
