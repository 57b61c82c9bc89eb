//! A raw image past the host's page cache. What the guest asks for that is not aligned goes through a buffer that is.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::raw::open;
use super::{BlockBackend, Extent, Geometry, RawFile, front, transfer};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::{GuestMemory, Segment};
use crate::sys::{self, Alignment, CloseOnFork, Space};

/// Bytes that go through the buffer at once.
const BUFFER: u64 = 256 << 10;

/// An image that was opened with `O_DIRECT`.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: CloseOnFork<File>,
    raw: RawFile,
    alignment: Alignment,
    /// Room for [`BUFFER`] bytes at an aligned address; empty until it is needed.
    buffer: Vec<u8>,
}

impl DirectFile {
    /// # Errors
    /// As [`RawFile::open`]; `Unsupported` where the file system knows no direct I/O, `InvalidConfig` when the file's length is
    /// not aligned.
    pub(crate) fn open(path: &Path, read_only: bool, locked: bool) -> Result<Self> {
        let doing = || format!("opening disk {}", path.display());
        let file = open(path, read_only, locked, libc::O_DIRECT).map_err(|e| match e.os_error() {
            Some(libc::EINVAL) => Error::new(
                ErrorKind::Unsupported,
                "direct: the file system knows no direct I/O (O_DIRECT); leave FileDisk::direct out",
            ),
            _ => e,
        });
        let file = file.doing(doing)?;
        let alignment = Alignment::of(&file).doing(doing)?;
        let raw = RawFile::from_file(file.try_clone().doing(doing)?, read_only).doing(doing)?;
        let len = raw.geometry().len;
        if len % alignment.offset != 0 {
            return Err(Error::invalid(
                "direct",
                format!("{len} bytes are not a multiple of {}, as direct I/O needs here", alignment.offset),
            )
            .doing(doing()));
        }
        Ok(Self { file: CloseOnFork::new(file), raw, alignment, buffer: Vec::new() })
    }

    /// Whether the kernel takes this as it is. Guest memory is mapped in whole pages, so addresses are aligned as the guest's are.
    fn aligned(&self, segments: &[Segment], offset: u64) -> bool {
        let Alignment { memory, offset: align } = self.alignment;
        let fits = |s: &Segment| s.addr().0.is_multiple_of(memory as u64) && (s.len() as u64).is_multiple_of(align);
        memory <= 4096 && offset.is_multiple_of(align) && segments.iter().all(fits)
    }

    /// Calls `each` with an aligned buffer for every aligned piece around the range. It gets the buffer, its offset on
    /// the disk, and where the range's bytes are in it.
    fn bounce(
        &mut self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&File, &mut [u8], u64, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let (align, page) = (self.alignment.offset, self.alignment.memory.max(4096));
        let size = usize::try_from(BUFFER.next_multiple_of(align)).unwrap_or(usize::MAX);
        if self.buffer.is_empty() {
            self.buffer = vec![0; size + page];
        }
        let skew = self.buffer.as_ptr().align_offset(page);
        let buffer = self.buffer.get_mut(skew..skew.saturating_add(size)).ok_or(io::ErrorKind::OutOfMemory)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let start = at / align * align;
            let stop = end.min(start + buffer.len() as u64);
            let whole = usize::try_from(stop.next_multiple_of(align) - start).unwrap_or(usize::MAX);
            let inner = (at - start) as usize..(stop - start) as usize;
            each(&self.file, buffer.get_mut(..whole).unwrap_or_default(), start, inner)?;
            at = stop;
        }
        Ok(())
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| s.len() as u64).sum()
}

impl BlockBackend for DirectFile {
    fn geometry(&self) -> Geometry {
        self.raw.geometry()
    }

    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        if self.aligned(segments, offset) {
            return transfer(segments, offset, |rest, at| memory.read_at(rest, self.file.as_fd(), at));
        }
        let mut rest = segments.to_vec();
        self.bounce(offset, total(segments), |file, buffer, start, inner| {
            file.read_exact_at(buffer, start)?;
            let piece = front(&mut rest, inner.len());
            memory.scatter(&piece, buffer.get(inner).unwrap_or_default()).map(drop).map_err(io::Error::other)
        })
    }

    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        if self.geometry().read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if self.aligned(segments, offset) {
            return transfer(segments, offset, |rest, at| memory.write_at(rest, self.file.as_fd(), at));
        }
        let mut rest = segments.to_vec();
        self.bounce(offset, total(segments), |file, buffer, start, inner| {
            if inner.len() < buffer.len() {
                file.read_exact_at(buffer, start)?;
            }
            let piece = front(&mut rest, inner.len());
            memory.gather(&piece, 0, buffer.get_mut(inner).unwrap_or_default()).map_err(io::Error::other)?;
            file.write_all_at(buffer, start)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.raw.flush()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.raw.discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if self.geometry().read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if sys::zero_range(&self.file, offset, len, unmap)? {
            return Ok(());
        }
        self.bounce(offset, len, |file, buffer, start, inner| {
            if inner.len() < buffer.len() {
                file.read_exact_at(buffer, start)?;
            }
            buffer.get_mut(inner).unwrap_or_default().fill(0);
            file.write_all_at(buffer, start)
        })
    }

    fn grow(&mut self, len: u64) -> io::Result<()> {
        if !len.is_multiple_of(self.alignment.offset) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.raw.grow(len)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.raw.allocated()
    }

    fn extents(&mut self, _: bool, _: u64, _: u64, _: &mut Vec<Extent>) -> Option<io::Result<()>> {
        None
    }

    fn write_done(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_fd(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }

    fn takes(&mut self, offset: u64, len: u64) -> io::Result<u64> {
        self.raw.takes(offset, len)
    }

    fn space(&self) -> io::Result<Option<Space>> {
        self.raw.space()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;

    #[test]
    fn direct_io_of_any_alignment_matches_a_vector() {
        let path = std::env::temp_dir().join(format!("cofferdam-direct-{}", std::process::id()));
        let mut model: Vec<u8> = (0..1 << 20).map(|n| (n / 512 * 3 + n % 7) as u8).collect();
        std::fs::write(&path, &model).unwrap();
        let opened = DirectFile::open(&path, false, true);
        std::fs::remove_file(&path).unwrap();
        let mut disk = match opened {
            Ok(disk) => disk,
            // Not every file system knows direct I/O; then it is said. That of root, as whom all tests run before a change
            // lands, does.
            Err(e) => {
                let user = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap());
                assert!(e.kind() == ErrorKind::Unsupported && user != 0, "{e}");
                return crate::sys::skip("the file system knows no direct I/O");
            }
        };
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap();
        for (n, (addr, offset, len)) in [
            (0, 0, 4096),
            (0, 512, 512),
            (4096, 4096, 65536),
            (3, 1024, 5 * 512),
            (1, 8192, 8192),
            (0, 100 * 512, 600 << 10),
            (7, (1 << 20) - 512, 512),
        ]
        .into_iter()
        .enumerate()
        {
            let there = offset..offset + len;
            let (a, b) = memory.segment(GuestAddress(addr), len).unwrap().split_at(len / 2 + n);
            disk.read(&memory, &[a, b], offset as u64).unwrap();
            let mut bytes = vec![0; len];
            memory.read(GuestAddress(addr), &mut bytes).unwrap();
            assert!(bytes == model[there.clone()], "{n}");
            model[there.clone()].fill(n as u8);
            memory.write(GuestAddress(addr), &model[there]).unwrap();
            disk.write(&memory, &[a, b], offset as u64).unwrap();
        }
        disk.write_zeroes(1536, 70_144, false).unwrap();
        model[1536..1536 + 70_144].fill(0);
        disk.flush().unwrap();
        let all = memory.segment(GuestAddress(0), 1 << 20).unwrap();
        disk.read(&memory, &[all], 0).unwrap();
        let mut bytes = vec![1; 1 << 20];
        memory.read(GuestAddress(0), &mut bytes).unwrap();
        assert!(bytes == model);
    }
}
