//! System calls that the standard library lacks, with owned descriptors in and out.
#![allow(unsafe_code, reason = "raw system calls; sys/ is one of the directories that may")]

mod atomic_file;
mod beneath;
mod descriptors;
#[cfg(feature = "container")]
mod directory;
mod disk;
mod file;
mod fork;
mod iovec;
#[cfg(feature = "qcow2")]
mod ordered;
mod register_page;
mod routes;
mod sched;
mod signal;
#[cfg(test)]
mod skip;
mod socket;
mod stack;
mod tap;
mod thread;
mod timer;
mod uring;

pub(crate) use atomic_file::{AtomicFile, temp_file};
pub(crate) use beneath::{Beneath, is_private, link_target, path_of};
pub use descriptors::set_descriptor_reserve;
pub(crate) use descriptors::{DescriptorShare, HeldDescriptors, is_spare};
#[cfg(feature = "container")]
pub(crate) use directory::{Directory, split_name};
pub(crate) use disk::{Alignment, Space, discard_device, is_memory, lock_holder, memfd, memory_file, space};
#[cfg(test)]
pub(crate) use file::make_fifo;
pub(crate) use file::{
    LockKind, cache_dir, data_ranges, fill_random, next_data, next_hole, page_size, punch, scratch_file, try_lock,
    try_lock_byte, xattrs, zero, zero_range,
};
#[cfg(feature = "container")]
pub(crate) use file::{copy_sparse, data_dir, has_name};
pub(crate) use fork::{CloseOnFork, ForkGuard, ProcessGeneration, keep_private, leak};
#[cfg(test)]
pub(crate) use fork::{beside_a_child, in_a_child};
pub(crate) use iovec::{preadv, pwritev, readv, receive, send, sendv, writev};
#[cfg(all(test, feature = "qcow2"))]
pub(crate) use ordered::record;
#[cfg(feature = "qcow2")]
pub(crate) use ordered::{OrderedFile, WriteOrder};
pub(crate) use register_page::{RegisterPage, RegisterPages};
pub(crate) use routes::{Route, Routes};
#[cfg(any(test, feature = "internals"))]
pub(crate) use sched::processor_time;
pub(crate) use sched::set_sched_batch;
pub(crate) use signal::{KickSignal, PeriodicKick, ThreadId};
#[cfg(test)]
pub(crate) use skip::skip;
pub(crate) use socket::{Socket, SocketKind, peekv, socket_kind};
pub(crate) use stack::Stack;
pub(crate) use tap::{TUN_CSUM, TUN_TSO4, TUN_TSO6, TUN_USO, Tap};
pub(crate) use thread::spawn;
#[cfg(feature = "container")]
pub(crate) use thread::spawn_scoped;
pub(crate) use timer::{Timer, deadline, left};
pub(crate) use uring::Uring;
pub(crate) use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
pub(crate) use vmm_sys_util::eventfd::EventFd;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Stack of the threads that run our own code only.
///
/// It is far more than they use, and too small for the kernel to back it with a huge page. That would cost 2 MiB and
/// the time to clear them for each thread.
pub(crate) const STACK: usize = 256 * 1024;

/// A counter descriptor that neither blocks nor survives exec.
pub(crate) fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// Borrows an [`EventFd`] as the standard library's descriptor type.
pub(crate) fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the EventFd owns an open descriptor for as long as the borrow of it lives.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

/// Borrows an [`Epoll`] as the standard library's descriptor type.
pub(crate) fn borrow_epoll(epoll: &Epoll) -> BorrowedFd<'_> {
    // SAFETY: the Epoll owns an open descriptor for as long as the borrow of it lives.
    unsafe { BorrowedFd::borrow_raw(epoll.as_raw_fd()) }
}

/// Waits until `fd` is readable or `timeout` is over; `None` waits for ever. True means readable.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<bool> {
    wait_any(&[fd], timeout)
}

/// Waits until one of `fds` is readable or has ended, or `timeout` is over; `None` waits for ever. False: it is over.
pub(crate) fn wait_any(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<bool> {
    wait_ready(fds, &[], timeout)
}

/// As [`wait_any`], and until one of `writable` can be written to.
pub(crate) fn wait_ready(
    readable: &[BorrowedFd<'_>],
    writable: &[BorrowedFd<'_>],
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let deadline = timeout.and_then(deadline);
    let poll = |fd: &BorrowedFd<'_>, events| libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    let reading = readable.iter().map(|fd| poll(fd, libc::POLLIN));
    let mut polls: Vec<libc::pollfd> = reading.chain(writable.iter().map(|fd| poll(fd, libc::POLLOUT))).collect();
    loop {
        // Rounded up, so that a wait never ends early and spins.
        let left = deadline.map(|d| left(d).as_nanos().div_ceil(1_000_000));
        let millis = left.map_or(-1, |ms| i32::try_from(ms).unwrap_or(i32::MAX));
        // SAFETY: the pointer and the count describe `polls`, which is exclusively ours during the call.
        match unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, millis) } {
            0 if left.is_some_and(|ms| ms > i32::MAX as u128) => {}
            0 => return Ok(false),
            n if n > 0 => return Ok(true),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
