//! [`IoQueue`]: moves bytes between files and guest memory through an io_uring.
//!
//! Many operations are in flight at once, without a copy. Owned by a device, used on its loop. Operations use guest
//! memory directly. Each keeps the memory and its iovecs alive until its completion arrives. If that never arrives,
//! both are leaked on purpose.
#![allow(
    unsafe_code,
    reason = "guest memory is handed to the kernel as raw buffers; memory/ is one of the directories that may"
)]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use slab::Slab;

use super::{GuestMemory, Segment};
use crate::sys::{self, Uring};

/// How often an operation that the kernel has no resources for is tried again, one after the other.
const MAX_RETRIES: u8 = 16;
/// How long the drop of an I/O queue waits for what is in flight.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// What zeroes are written from.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Buffers of zeroes in one write.
const ZERO_BUFFERS: usize = 256;
/// Arrays that are kept to be used again, and the largest of them.
const MAX_SPARE_ARRAYS: usize = 128;
const MAX_SPARE_BUFFERS: usize = 64;

/// An operation.
///
/// A descriptor that was used once must stay open, on the same file, as long as the queue lives. One that is not open
/// gives an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IoOperation<'a> {
    /// From `offset` of the file to the guest, all of it.
    Read { fd: RawFd, offset: u64, to: &'a [Segment] },
    /// From the guest to `offset` of the file, all of it.
    Write { fd: RawFd, offset: u64, from: &'a [Segment] },
    /// Zeroes to the file.
    Zero { fd: RawFd, offset: u64, len: u64 },
    /// `fdatasync`.
    Sync { fd: RawFd },
    /// `fallocate` in this mode.
    Allocate { fd: RawFd, mode: i32, offset: u64, len: u64 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum IoKind {
    Read,
    Write,
    Zero { left: u64 },
    Sync,
    Allocate { mode: i32, len: u64 },
}

/// An operation in flight.
struct InFlightOperation {
    tag: usize,
    kind: IoKind,
    fd: RawFd,
    offset: u64,
    /// Of guest memory, but for zeroes. The kernel may look at the array and write to the buffers while `submitted`.
    buffers: IoVecs,
    /// So many of them are done.
    done: usize,
    tries: u8,
    submitted: bool,
}

/// An array of buffers.
#[derive(Default)]
struct IoVecs(Vec<libc::iovec>);

// SAFETY: the raw pointers lie in mappings that the I/O queue's `memory` keeps alive, whatever thread it is on.
unsafe impl Send for IoVecs {}

/// Operations that are in flight, and those that wait for room on the ring.
pub(crate) struct IoQueue {
    /// `None` once it was left.
    ring: Option<Uring>,
    /// What all buffers lie in: that of the first operation.
    memory: Option<GuestMemory>,
    flights: Slab<InFlightOperation>,
    /// Empty arrays for flights to come.
    spare: Vec<IoVecs>,
    waiting: VecDeque<usize>,
    submitted: usize,
    is_stuck: bool,
}

impl fmt::Debug for IoQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoQueue({} in flight, {} waiting)", self.submitted, self.waiting.len())
    }
}

impl IoQueue {
    /// One that has at most `entries` operations, a power of two, in flight; more wait.
    ///
    /// # Errors
    /// As [`Uring::new`].
    pub(crate) fn new(entries: u32) -> io::Result<Self> {
        Ok(Self {
            ring: Some(Uring::new(entries)?),
            memory: None,
            flights: Slab::new(),
            spare: Vec::new(),
            waiting: VecDeque::new(),
            submitted: 0,
            is_stuck: false,
        })
    }

    /// Readable when [`IoQueue::next`] has something. `None` once it was left.
    pub(crate) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ring.as_ref().map(Uring::as_fd)
    }

    /// Whether something is in flight or waits.
    pub(crate) fn busy(&self) -> bool {
        self.submitted > 0 || !self.waiting.is_empty()
    }

    /// Takes something on; [`IoQueue::next`] says `tag` when it has ended. It begins with the next [`IoQueue::submit`].
    /// All segments lie in one and the same `memory`.
    ///
    /// # Errors
    /// When segments do not exist in the memory of the first operation; nothing was taken on then.
    pub(crate) fn push(&mut self, memory: &GuestMemory, tag: usize, what: IoOperation<'_>) -> io::Result<()> {
        let memory = self.memory.get_or_insert_with(|| memory.clone());
        let mut buffers = self.spare.pop().unwrap_or_default();
        let (kind, fd, offset) = match what {
            IoOperation::Read { fd, offset, to } => {
                memory.append_buffers(to, &mut buffers.0)?;
                (IoKind::Read, fd, offset)
            }
            IoOperation::Write { fd, offset, from } => {
                memory.append_buffers(from, &mut buffers.0)?;
                (IoKind::Write, fd, offset)
            }
            IoOperation::Zero { fd, offset, len } => {
                zeroes(len, &mut buffers.0);
                (IoKind::Zero { left: len }, fd, offset)
            }
            IoOperation::Sync { fd } => (IoKind::Sync, fd, 0),
            IoOperation::Allocate { fd, mode, offset, len } => (IoKind::Allocate { mode, len }, fd, offset),
        };
        let flight = InFlightOperation { tag, kind, fd, offset, buffers, done: 0, tries: 0, submitted: false };
        self.waiting.push_back(self.flights.insert(flight));
        Ok(())
    }

    /// Hands what waits to the kernel as far as there is room, with one system call. True when it was something new, which may
    /// have ended already.
    pub(crate) fn submit(&mut self) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        let before = self.submitted;
        while self.submitted < ring.room() {
            let Some(slot) = self.waiting.front().copied() else { break };
            if let Some(flight) = self.flights.get_mut(slot) {
                if !flight.push(ring, slot as u64) {
                    break;
                }
                flight.submitted = true;
                self.submitted += 1;
            }
            self.waiting.pop_front();
        }
        self.is_stuck =
            ring.submit().inspect_err(|e| log::debug!("the kernel takes no more operations now: {e}")).is_err();
        self.submitted > before
    }

    /// The kernel did not take all that was handed to it: [`IoQueue::submit`] has to be said again after a while.
    pub(crate) fn is_stuck(&self) -> bool {
        self.is_stuck
    }

    /// The next operation that has ended, all of it or with an error; short and interrupted ones go on by themselves with the
    /// next [`IoQueue::submit`].
    pub(crate) fn next(&mut self) -> Option<(usize, io::Result<()>)> {
        loop {
            let (slot, result) = self.ring.as_mut()?.next()?;
            let slot = usize::try_from(slot).ok()?;
            let Some(flight) = self.flights.get_mut(slot) else { continue };
            flight.submitted = false;
            self.submitted -= 1;
            match flight.ended(result) {
                Some(outcome) => {
                    let tag = flight.tag;
                    self.release(slot);
                    return Some((tag, outcome));
                }
                None => self.waiting.push_front(slot),
            }
        }
    }

    fn release(&mut self, slot: usize) {
        if let Some(InFlightOperation { mut buffers, .. }) = self.flights.try_remove(slot)
            && self.spare.len() < MAX_SPARE_ARRAYS
            && buffers.0.capacity() <= MAX_SPARE_BUFFERS
        {
            buffers.0.clear();
            self.spare.push(buffers);
        }
    }

    /// Submits, and waits until something has ended, but not beyond `deadline`. False: it is over.
    pub(crate) fn wait(&mut self, deadline: Instant) -> bool {
        self.submit();
        let Some(ring) = &self.ring else { return false };
        let left = deadline.saturating_duration_since(Instant::now());
        sys::wait_readable(ring.as_fd(), Some(left)).unwrap_or_else(|error| {
            log::error!("waiting for a disk: {error}");
            false
        })
    }

    /// Ends everything soon. What waits is dropped at once without a completion, and what is in flight is cancelled
    /// where the kernel can.
    fn cancel(&mut self) {
        for slot in std::mem::take(&mut self.waiting) {
            self.release(slot);
        }
        let Some(ring) = &mut self.ring else { return };
        for (slot, _) in self.flights.iter().filter(|(_, flight)| flight.submitted) {
            if !ring.cancel(slot as u64) {
                let submitted = ring.submit().is_ok();
                if !submitted || !ring.cancel(slot as u64) {
                    break;
                }
            }
        }
        if let Err(error) = ring.submit() {
            log::debug!("cancelling: {error}");
        }
    }

    /// Waits until the kernel touches guest memory no more. False when it still does at the deadline. Completions are
    /// dropped.
    fn drain(&mut self, deadline: Instant) -> bool {
        while self.submitted > 0 {
            // Those that would go on do not.
            while self.next().is_some() {}
            for slot in std::mem::take(&mut self.waiting) {
                self.release(slot);
            }
            if self.submitted > 0 && !self.wait(deadline) {
                return false;
            }
        }
        true
    }
}

impl InFlightOperation {
    fn rest(&self) -> &[libc::iovec] {
        self.buffers.0.get(self.done..).unwrap_or_default()
    }

    fn push(&self, ring: &mut Uring, tag: u64) -> bool {
        match self.kind {
            // SAFETY: the buffers came from `GuestMemory::buffers` of the memory that the I/O queue holds, so they lie in mappings
            // that are alive and writable. They, the array and the memory are released only after `Uring::next` gave the tag
            // back (`IoQueue::next` takes the flight then), or never (`IoQueue::drop`).
            IoKind::Read => unsafe { ring.read(tag, self.fd, self.rest(), self.offset) },
            // SAFETY: as for reads; buffers of zeroes are a static's.
            IoKind::Write | IoKind::Zero { .. } => unsafe { ring.write(tag, self.fd, self.rest(), self.offset) },
            IoKind::Sync => ring.sync(tag, self.fd),
            IoKind::Allocate { mode, len } => ring.allocate(tag, self.fd, mode, self.offset, len),
        }
    }

    /// What the kernel said; `None` when the operation must go on.
    fn ended(&mut self, result: i32) -> Option<io::Result<()>> {
        if result < 0 {
            let code = result.saturating_neg();
            self.tries = self.tries.saturating_add(1);
            let again = code == libc::EINTR || code == libc::EAGAIN && self.tries < MAX_RETRIES;
            return (!again).then(|| Err(io::Error::from_raw_os_error(code)));
        }
        self.tries = 0;
        let moved = result.unsigned_abs();
        match &mut self.kind {
            IoKind::Sync | IoKind::Allocate { .. } => return Some(Ok(())),
            IoKind::Zero { left } => {
                *left = left.saturating_sub(moved.into());
                self.offset = self.offset.saturating_add(moved.into());
                self.buffers.0.clear();
                zeroes(*left, &mut self.buffers.0);
            }
            IoKind::Read | IoKind::Write => self.skip(moved as usize),
        }
        match self.rest().is_empty() {
            true => Some(Ok(())),
            false if moved == 0 => {
                Some(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter")))
            }
            false => None,
        }
    }

    /// `n` more bytes were moved.
    fn skip(&mut self, mut n: usize) {
        self.offset = self.offset.saturating_add(n as u64);
        while let Some(first) = self.buffers.0.get_mut(self.done) {
            if n < first.iov_len {
                // SAFETY: `n` is less than the buffer's length, so this points into the same buffer.
                first.iov_base = unsafe { first.iov_base.byte_add(n) };
                first.iov_len -= n;
                return;
            }
            n -= first.iov_len;
            self.done += 1;
        }
    }
}

/// Appends buffers from which at most `len` zeroes are written, for as many writes as it takes.
fn zeroes(len: u64, buffers: &mut Vec<libc::iovec>) {
    let mut left = len;
    while left > 0 && buffers.len() < ZERO_BUFFERS {
        let now = ZEROES.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        buffers.push(libc::iovec { iov_base: ZEROES.as_ptr().cast_mut().cast(), iov_len: now });
        left -= now as u64;
    }
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        if !self.stop(DRAIN_TIMEOUT) {
            self.leave();
        }
    }
}

impl IoQueue {
    /// Ends everything, within the given time. False when the kernel still touches guest memory then.
    pub(crate) fn stop(&mut self, timeout: Duration) -> bool {
        self.cancel();
        self.drain(Instant::now() + timeout)
    }

    /// Leaves what is in flight to a thread of its own. The I/O queue is of no use after that.
    fn leave(&mut self) {
        // The kernel may go on writing to guest memory after the ring was closed, so the thread keeps ring and memory.
        log::warn!("{} operations on a file that does not answer are left behind", self.submitted);
        let left = Self {
            ring: self.ring.take(),
            memory: self.memory.take(),
            flights: std::mem::take(&mut self.flights),
            spare: Vec::new(),
            waiting: VecDeque::new(),
            submitted: self.submitted,
            is_stuck: false,
        };
        self.submitted = 0;
        let left = std::mem::ManuallyDrop::new(left);
        let wait = move || {
            let mut left = left;
            while !left.drain(Instant::now() + Duration::from_secs(3600)) {}
            drop(std::mem::ManuallyDrop::into_inner(left));
        };
        if let Err(error) = sys::spawn("left-behind".into(), sys::STACK, wait) {
            log::warn!("no thread waits for the requests in flight: starting it failed: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(&[(GuestAddress(0), 0x10_0000)]).unwrap()
    }

    fn ended(io_queue: &mut IoQueue, n: usize) -> Vec<(usize, Result<(), io::ErrorKind>)> {
        let mut all = Vec::new();
        while all.len() < n {
            assert!(io_queue.wait(Instant::now() + Duration::from_secs(20)), "{all:?}");
            all.extend(std::iter::from_fn(|| io_queue.next()).map(|(tag, result)| (tag, result.map_err(|e| e.kind()))));
        }
        all.sort_unstable_by_key(|(tag, _)| *tag);
        all
    }

    #[test]
    fn operations_beyond_the_ring_size_complete() {
        let (memory, mut io_queue) = (memory(), IoQueue::new(4).unwrap());
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        let fd = file.as_raw_fd();
        memory.write(GuestAddress(0), &[7; 0x1000]).unwrap();
        for n in 0..100 {
            let from = [memory.segment(GuestAddress(n), 100).unwrap(), memory.segment(GuestAddress(0), 28).unwrap()];
            io_queue.push(&memory, n as usize, IoOperation::Write { fd, offset: n * 128, from: &from }).unwrap();
        }
        assert_eq!(ended(&mut io_queue, 100), (0..100).map(|n| (n, Ok(()))).collect::<Vec<_>>());
        io_queue.push(&memory, 1, IoOperation::Zero { fd, offset: 10, len: 20 << 20 }).unwrap();
        io_queue.push(&memory, 2, IoOperation::Sync { fd }).unwrap();
        ended(&mut io_queue, 2);
        assert_eq!((file.metadata().unwrap().len(), io_queue.busy()), ((20 << 20) + 10, false));
        let mut head = [1; 11];
        file.read_exact_at(&mut head, 0).unwrap();
        assert_eq!((&head[..10], head[10]), (&[7; 10][..], 0));
    }

    #[test]
    fn short_transfers_go_on_and_the_end_of_a_file_is_an_error() {
        let (memory, mut io_queue) = (memory(), IoQueue::new(4).unwrap());
        let to = [memory.segment(GuestAddress(0), 3).unwrap(), memory.segment(GuestAddress(100), 3).unwrap()];
        let mut flight = InFlightOperation {
            tag: 0,
            kind: IoKind::Read,
            fd: 0,
            offset: 1000,
            buffers: IoVecs(memory.buffers(&to).unwrap()),
            done: 0,
            tries: 0,
            submitted: true,
        };
        let lengths = |flight: &InFlightOperation| flight.rest().iter().map(|b| b.iov_len).collect::<Vec<_>>();
        assert!(
            flight.ended(2).is_none() && flight.ended(-libc::EINTR).is_none() && flight.ended(-libc::EAGAIN).is_none()
        );
        assert_eq!((flight.offset, lengths(&flight)), (1002, vec![1, 3]));
        assert!(flight.ended(2).is_none());
        assert_eq!((flight.offset, lengths(&flight)), (1004, vec![2]));
        assert!(matches!(flight.ended(2), Some(Ok(()))));
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        file.set_len(4).unwrap();
        io_queue.push(&memory, 6, IoOperation::Read { fd: file.as_raw_fd(), offset: 0, to: &to }).unwrap();
        io_queue.push(&memory, 7, IoOperation::Sync { fd: -1 }).unwrap();
        let seen = ended(&mut io_queue, 2);
        assert!(matches!(seen[..], [(6, Err(io::ErrorKind::UnexpectedEof)), (7, Err(_))]), "{seen:?}");
    }

    #[test]
    fn dropping_the_queue_cancels_operations_in_flight() {
        let (memory, mut io_queue) = (memory(), IoQueue::new(4).unwrap());
        let (near, mut far) = UnixStream::pair().unwrap();
        let to = [memory.segment(GuestAddress(0), 3).unwrap()];
        io_queue.push(&memory, 5, IoOperation::Read { fd: near.as_raw_fd(), offset: 0, to: &to }).unwrap();
        io_queue.submit();
        assert!(io_queue.busy() && io_queue.next().is_none());
        let begin = Instant::now();
        drop(io_queue);
        assert!(begin.elapsed() < DRAIN_TIMEOUT);
        far.write_all(b"abc").unwrap();
        let mut back = [0; 3];
        (&near).read_exact(&mut back).unwrap();
        assert_eq!(&back, b"abc");
    }

    #[test]
    fn operation_that_never_ends_is_leaked_with_its_memory() {
        let (memory, mut io_queue) = (memory(), IoQueue::new(4).unwrap());
        let (near, mut far) = UnixStream::pair().unwrap();
        let to = [memory.segment(GuestAddress(0), 3).unwrap()];
        io_queue.push(&memory, 5, IoOperation::Read { fd: near.as_raw_fd(), offset: 0, to: &to }).unwrap();
        io_queue.submit();
        let weak = Arc::downgrade(&memory.inner);
        drop(memory);
        io_queue.leave();
        drop(io_queue);
        assert!(weak.upgrade().is_some());
        far.write_all(b"abc").unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while weak.upgrade().is_some() {
            assert!(Instant::now() < deadline, "the memory was never released");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
