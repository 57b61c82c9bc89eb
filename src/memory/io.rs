//! Vectored transfers between descriptors and guest memory, without a copy in between.
#![allow(
    unsafe_code,
    reason = "guest memory is handed to the kernel as raw buffers; memory/ is one of the directories that may"
)]

use std::io;
use std::os::fd::BorrowedFd;

use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::{GuestMemory, OutOfBounds, Region, Segment};
use crate::sys;

impl GuestMemory {
    /// The host buffers that `segments` consist of. A segment of another memory gives an error, never a wild pointer.
    pub(super) fn buffers(&self, segments: &[Segment]) -> io::Result<Vec<libc::iovec>> {
        let mut buffers = Vec::with_capacity(segments.len());
        self.append_buffers(segments, &mut buffers).map(|()| buffers)
    }

    /// As [`GuestMemory::buffers`], behind those that are there.
    pub(super) fn append_buffers(&self, segments: &[Segment], buffers: &mut Vec<libc::iovec>) -> io::Result<()> {
        buffers.reserve(segments.len());
        // Nearly all segments lie in one range, and looking for more takes longer.
        let mut region = None;
        for &Segment { addr, len } in segments.iter().filter(|s| s.len > 0) {
            let known = region.as_ref().and_then(|region: &Region| region.at(addr, len));
            let host = known.or_else(|| {
                region = self.region(addr, len);
                region.as_ref()?.at(addr, len)
            });
            if let Some(host) = host {
                buffers.push(libc::iovec { iov_base: host.cast(), iov_len: len });
                continue;
            }
            for slice in self.inner.get_slices(addr.inner(), len) {
                let slice: VolatileSlice<'_, _> = slice.map_err(|_| io::Error::other(OutOfBounds { addr, len }))?;
                let guard = slice.ptr_guard_mut();
                buffers.push(libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: slice.len() });
            }
        }
        Ok(())
    }

    /// Reads a file's bytes at `offset` into the guest; may be short.
    pub fn read_at(&self, segments: &[Segment], fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (buffers, offset) = (self.buffers(segments)?, file_offset(offset)?);
        // SAFETY: `buffers` came from `append_buffers`, so each lies in a mapping that `self` keeps alive and writable.
        unsafe { sys::preadv(fd, &buffers, offset) }
    }

    /// Writes the guest's bytes to a file at `offset`; may be short.
    pub fn write_at(&self, segments: &[Segment], fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (buffers, offset) = (self.buffers(segments)?, file_offset(offset)?);
        // SAFETY: `buffers` came from `append_buffers`, so each lies in a mapping that `self` keeps alive and readable.
        unsafe { sys::pwritev(fd, &buffers, offset) }
    }

    /// Receives from a stream into the guest. May be short; 0 is the stream's end.
    pub fn receive(&self, segments: &[Segment], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let buffers = self.buffers(segments)?;
        // SAFETY: `buffers` came from `append_buffers`, so each lies in a mapping that `self` keeps alive and writable.
        unsafe { sys::readv(fd, &buffers) }
    }

    /// Peeks at a stream's data into the guest, and leaves it in the stream. May be short; 0 is the stream's end. The
    /// first `skip` bytes go nowhere; `nowhere` is written over with them.
    pub fn peek(&self, segments: &[Segment], fd: BorrowedFd<'_>, skip: usize, nowhere: &mut [u8]) -> io::Result<usize> {
        let mut buffers = self.buffers(segments)?;
        let (mut left, base) = (if nowhere.is_empty() { 0 } else { skip }, nowhere.as_mut_ptr().cast());
        while left > 0 {
            let now = left.min(nowhere.len());
            buffers.insert(0, libc::iovec { iov_base: base, iov_len: now });
            left -= now;
        }
        // SAFETY: `buffers` came from `append_buffers`, so each lies in a mapping that `self` keeps alive and writable, or is
        // a part of `nowhere`, which is exclusively borrowed and may be written over in any order.
        unsafe { sys::peekv(fd, &buffers) }.map(|n| n.saturating_sub(skip))
    }

    /// Sends the guest's bytes to a stream socket without blocking; may be short.
    pub fn send(&self, segments: &[Segment], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let buffers = self.buffers(segments)?;
        // SAFETY: `buffers` came from `append_buffers`, so each lies in a mapping that `self` keeps alive and readable.
        unsafe { sys::sendv(fd, &buffers) }
    }
}

/// Transfers of the guest's bytes behind some of our own.
impl GuestMemory {
    /// Writes `front` and then the guest's bytes to a device of packets, in one call.
    pub fn write_with_header(&self, front: &[u8], segments: &[Segment], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let buffers = self.buffers_behind(front.as_ptr(), front.len(), segments)?;
        // SAFETY: the first buffer is `front`, borrowed throughout the call; the others came from `append_buffers`, so each lies in a
        // mapping that `self` keeps alive and readable.
        unsafe { sys::writev(fd, &buffers) }
    }

    /// Sends the same to a socket without blocking. May be short for a stream.
    pub fn send_behind(&self, front: &[u8], segments: &[Segment], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let buffers = self.buffers_behind(front.as_ptr(), front.len(), segments)?;
        // SAFETY: as in `write_with_header`.
        unsafe { sys::sendv(fd, &buffers) }
    }

    /// Reads a packet into `front`, and the rest of it into the guest. What does not fit is lost.
    pub fn read_with_header(&self, front: &mut [u8], segments: &[Segment], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let buffers = self.buffers_behind(front.as_mut_ptr(), front.len(), segments)?;
        // SAFETY: the first buffer is `front`, exclusively borrowed throughout the call; the others came from `append_buffers`, so each
        // lies in a mapping that `self` keeps alive and writable.
        unsafe { sys::readv(fd, &buffers) }
    }

    fn buffers_behind(&self, front: *const u8, len: usize, segments: &[Segment]) -> io::Result<Vec<libc::iovec>> {
        let mut buffers = Vec::with_capacity(1 + segments.len());
        buffers.push(libc::iovec { iov_base: front.cast_mut().cast(), iov_len: len });
        self.append_buffers(segments, &mut buffers).map(|()| buffers)
    }
}

fn file_offset(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(&[(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000)]).unwrap()
    }

    #[test]
    fn files_are_read_and_written_across_segments() {
        let memory = memory();
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        let segments = [memory.segment(GuestAddress(0x1ffd), 6).unwrap(), memory.segment(GuestAddress(8), 2).unwrap()];
        memory.write(GuestAddress(0x1ffd), b"abcdef").unwrap();
        memory.write(GuestAddress(8), b"gh").unwrap();
        assert_eq!(memory.write_at(&segments, file.as_fd(), 100).unwrap(), 8);
        memory.write(GuestAddress(0x1ffd), &[0; 6]).unwrap();
        assert_eq!(memory.read_at(&segments, file.as_fd(), 101).unwrap(), 7);
        let mut back = [0; 6];
        memory.read(GuestAddress(0x1ffd), &mut back).unwrap();
        assert_eq!(&back, b"bcdefg");
        assert!(memory.read_at(&segments, file.as_fd(), u64::MAX).is_err());
    }

    #[test]
    fn streams_never_block_nor_signal() {
        let (memory, (mut near, far)) = (memory(), UnixStream::pair().unwrap());
        near.write_all(b"hello").unwrap();
        let segment = [memory.segment(GuestAddress(0), 16).unwrap()];
        assert_eq!(memory.receive(&segment, far.as_fd()).unwrap(), 5);
        assert_eq!(memory.send(&[segment[0].split_at(5).0], far.as_fd()).unwrap(), 5);
        let mut back = [0; 5];
        near.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"hello");
        drop(near);
        let error = memory.send(&segment, far.as_fd()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_segment_of_another_memory_is_refused() {
        let large = GuestMemory::anonymous(&[(GuestAddress(0), 0x10000)]).unwrap();
        let foreign = [large.segment(GuestAddress(0x8000), 16).unwrap()];
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        assert!(memory().write_at(&foreign, file.as_fd(), 0).is_err());
    }
}
