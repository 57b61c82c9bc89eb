//! [`Uring`]: an io_uring for files. The crate `io-uring` lives here only.
//!
//! Its owner moves bytes with it, on one thread at a time. What the kernel was given must stay valid until its
//! completion was taken: that is the caller's business, see `memory::IoQueue`. Descriptors that were used once must not
//! come to mean other files while the ring lives.
//!
//! From Linux 5.10 on a ring takes the operations of this file and no others (`IORING_REGISTER_RESTRICTIONS`), whatever
//! is written to its memory. Filters of system calls (seccomp) do not see them. Older kernels have no such thing; a
//! line in the log says so.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::CloseOnFork;

/// The number under which the answers to cancellations come, which tell nothing.
const CANCEL: u64 = u64::MAX;
/// How many files the kernel is asked to look up only once.
const FILES: usize = 16;
/// Operations that are used. The ring takes no others where the kernel supports restrictions.
const OPERATIONS: [u8; 7] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::AsyncCancel::CODE,
];
/// What is still registered once the ring is used (`IORING_UNREGISTER_FILES`, `IORING_REGISTER_FILES_UPDATE`).
const REGISTRATIONS: [u8; 2] = [3, 6];

/// Submission and completion queues that are shared with the kernel.
pub(crate) struct Uring {
    ring: CloseOnFork<IoUring>,
    room: usize,
    /// Descriptors that the kernel has looked up once for all operations: the place of each is its number there.
    files: Vec<RawFd>,
    /// How many there may be; none where the kernel does not take them.
    files_room: usize,
}

impl Uring {
    /// Returns a ring for at most `entries` operations in flight, a power of two.
    ///
    /// # Errors
    /// The kernel's: `ENOSYS` and `EPERM` where there is none or it is forbidden, and `ENOMEM` for a lack of lockable
    /// memory. `EOPNOTSUPP` where it lacks an operation that is needed, before Linux 5.6.
    pub(crate) fn new(entries: u32) -> io::Result<Self> {
        // Completions get twice the room, for the answers to cancellations.
        let restricted = IoUring::builder().dontfork().setup_r_disabled().build(entries);
        let (ring, restricted) = match restricted {
            Ok(ring) => (ring, true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                log::debug!("io_uring takes every operation: restrictions need Linux 5.10");
                (IoUring::builder().dontfork().build(entries)?, false)
            }
            Err(error) => return Err(error),
        };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if OPERATIONS.iter().any(|code| !probe.is_supported(*code)) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // Empty places, to be filled as descriptors come.
        let registered = ring.submitter().register_files(&[-1; FILES]);
        let registered = registered.inspect_err(|e| log::debug!("io_uring keeps no files: {e}"));
        let files_room = if registered.is_ok() { FILES } else { 0 };
        if restricted {
            let mut all = vec![Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits())];
            all.extend(OPERATIONS.map(Restriction::sqe_op));
            all.extend(REGISTRATIONS.map(Restriction::register_op));
            ring.submitter().register_restrictions(&mut all)?;
            ring.submitter().register_enable_rings()?;
        }
        Ok(Self {
            ring: CloseOnFork::new(ring),
            room: entries as usize,
            files: Vec::with_capacity(files_room),
            files_room,
        })
    }

    /// Returns what an operation names instead of `fd`. The kernel looks up the first ones only once.
    fn file(&mut self, fd: RawFd) -> (types::Fd, squeue::Flags) {
        let known = self.files.iter().position(|file| *file == fd);
        match known.or_else(|| self.keep(fd)).map(i32::try_from) {
            Some(Ok(number)) => (types::Fd(number), squeue::Flags::FIXED_FILE),
            _ => (types::Fd(fd), squeue::Flags::empty()),
        }
    }

    #[cold]
    fn keep(&mut self, fd: RawFd) -> Option<usize> {
        let number = self.files.len();
        if number >= self.files_room || fd < 0 {
            return None;
        }
        let kept = self.ring.submitter().register_files_update(number as u32, &[fd]);
        kept.inspect_err(|e| log::debug!("io_uring does not keep a file: {e}")).ok()?;
        self.files.push(fd);
        Some(number)
    }

    /// How many operations may be in flight at once.
    pub(crate) fn room(&self) -> usize {
        self.room
    }

    /// False when the queue is full: submit, and try again.
    fn push(&mut self, entry: squeue::Entry, tag: u64) -> bool {
        let entry = entry.user_data(tag);
        // SAFETY: the entry's buffers are valid until its completion, by the contract of those who call this.
        unsafe { self.ring.submission().push(&entry) }.is_ok()
    }

    /// Queues a read from `fd` at `offset` into the buffers; may be short. False when the queue is full.
    ///
    /// # Safety
    /// The array and every buffer must be valid for writes of its length until [`Uring::next`] has given `tag` back, or for
    /// ever.
    pub(crate) unsafe fn read(&mut self, tag: u64, fd: RawFd, buffers: &[libc::iovec], offset: u64) -> bool {
        let (fd, flags) = self.file(fd);
        let entry = match buffers {
            [one] => opcode::Read::new(fd, one.iov_base.cast(), length(one)).offset(offset).build(),
            many => opcode::Readv::new(fd, many.as_ptr(), super::iovec::count(many) as u32).offset(offset).build(),
        };
        self.push(entry.flags(flags), tag)
    }

    /// Queues a write of the buffers to `fd` at `offset`; may be short. False when the queue is full.
    ///
    /// # Safety
    /// The array and every buffer must be valid for reads of its length until [`Uring::next`] has given `tag` back, or for
    /// ever.
    pub(crate) unsafe fn write(&mut self, tag: u64, fd: RawFd, buffers: &[libc::iovec], offset: u64) -> bool {
        let (fd, flags) = self.file(fd);
        let entry = match buffers {
            [one] => opcode::Write::new(fd, one.iov_base.cast_const().cast(), length(one)).offset(offset).build(),
            many => opcode::Writev::new(fd, many.as_ptr(), super::iovec::count(many) as u32).offset(offset).build(),
        };
        self.push(entry.flags(flags), tag)
    }

    /// Queues an `fdatasync`.
    pub(crate) fn sync(&mut self, tag: u64, fd: RawFd) -> bool {
        let (fd, flags) = self.file(fd);
        self.push(opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build().flags(flags), tag)
    }

    /// Queues a `fallocate`.
    pub(crate) fn allocate(&mut self, tag: u64, fd: RawFd, mode: i32, offset: u64, len: u64) -> bool {
        let (fd, flags) = self.file(fd);
        self.push(opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build().flags(flags), tag)
    }

    /// Queues the wish that `tag` ends soon, however.
    pub(crate) fn cancel(&mut self, tag: u64) -> bool {
        self.push(opcode::AsyncCancel::new(tag).build(), CANCEL)
    }

    /// Hands what is queued to the kernel; many at once are one system call.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The next operation that ended, and what the system call of its kind would have returned, errors as negative numbers.
    pub(crate) fn next(&mut self) -> Option<(u64, i32)> {
        let mut completions = self.ring.completion();
        loop {
            let entry = completions.next()?;
            if entry.user_data() != CANCEL {
                return Some((entry.user_data(), entry.result()));
            }
        }
    }

    /// Readable while [`Uring::next`] has something to give.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring owns an open descriptor for as long as the borrow of it lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel takes its time to put away a ring that was closed; files that it has kept would stay locked meanwhile.
        if self.files_room > 0 {
            let _ = self.ring.submitter().unregister_files();
        }
    }
}

/// Buffers beyond 4 GiB are short transfers, as the kernel makes them of all beyond 2 GiB.
fn length(buffer: &libc::iovec) -> u32 {
    u32::try_from(buffer.iov_len).unwrap_or(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{temp_file, wait_readable};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_ring_takes_no_operation_that_is_not_used() {
        let mut ring = Uring::new(4).unwrap();
        let file = temp_file(&std::env::temp_dir()).unwrap();
        let other = [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build(),
            opcode::Close::new(types::Fd(file.as_raw_fd())).build(),
            // Nor one that is used with what is not: the next would wait for it.
            opcode::Fsync::new(types::Fd(file.as_raw_fd())).build().flags(squeue::Flags::IO_LINK),
        ];
        for (tag, entry) in (0..).zip(other) {
            assert!(ring.push(entry, tag));
            ring.submit().unwrap();
            wait_readable(ring.as_fd(), None).unwrap();
            assert_eq!(ring.next(), Some((tag, -libc::EACCES)));
        }
        assert_eq!(ring.ring.submitter().register_eventfd(0).unwrap_err().raw_os_error(), Some(libc::EACCES));
        assert!(ring.sync(9, file.as_raw_fd()));
        ring.submit().unwrap();
        wait_readable(ring.as_fd(), None).unwrap();
        assert_eq!(ring.next(), Some((9, 0)));
    }

    #[test]
    fn several_operations_are_one_submission() {
        let mut ring = Uring::new(4).unwrap();
        let file = temp_file(&std::env::temp_dir()).unwrap();
        file.write_all_at(b"abcdef", 0).unwrap();
        let mut to = [[0u8; 3]; 2];
        let buffers = to.each_mut().map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: 3 });
        // SAFETY: the buffers outlive the loop below, which takes all completions.
        unsafe {
            assert!(ring.read(7, file.as_raw_fd(), &buffers, 1));
            assert!(ring.read(8, file.as_raw_fd(), &buffers[..1], 100));
        }
        assert!(ring.sync(9, file.as_raw_fd()) && ring.cancel(1000) && !ring.sync(10, 0));
        ring.submit().unwrap();
        let mut ended = Vec::new();
        while ended.len() < 3 {
            wait_readable(ring.as_fd(), None).unwrap();
            ended.extend(std::iter::from_fn(|| ring.next()));
        }
        ended.sort_unstable();
        assert_eq!(ended, [(7, 5), (8, 0), (9, 0)]);
        assert_eq!(&to.concat(), b"bcdef\0");
    }
}
