//! Vectored I/O on raw buffers, for callers whose memory is shared with a guest.
//!
//! The standard library's `IoSlice` needs references, which are unsound to memory that a guest changes at will. `iovec`
//! is a pointer and a length.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Linux takes at most this many buffers at once (`IOV_MAX`).
const MAX_BUFFERS: usize = 1024;

pub(super) fn result(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// At most [`MAX_BUFFERS`] of them: what is beyond is a short transfer, which every caller must handle anyway.
pub(super) fn count(buffers: &[libc::iovec]) -> i32 {
    buffers.len().min(MAX_BUFFERS) as i32
}

/// `preadv(2)`: reads from `offset` into the buffers; may be short.
///
/// # Safety
/// Every buffer must be valid for writes of its length throughout the call.
pub(crate) unsafe fn preadv(fd: BorrowedFd<'_>, buffers: &[libc::iovec], offset: i64) -> io::Result<usize> {
    // SAFETY: the array is valid for `count` entries; the buffers are valid by this function's contract.
    result(unsafe { libc::preadv(fd.as_raw_fd(), buffers.as_ptr(), count(buffers), offset) })
}

/// `pwritev(2)`: writes the buffers at `offset`; may be short.
///
/// # Safety
/// Every buffer must be valid for reads of its length throughout the call.
pub(crate) unsafe fn pwritev(fd: BorrowedFd<'_>, buffers: &[libc::iovec], offset: i64) -> io::Result<usize> {
    // SAFETY: the array is valid for `count` entries; the buffers are valid by this function's contract.
    result(unsafe { libc::pwritev(fd.as_raw_fd(), buffers.as_ptr(), count(buffers), offset) })
}

/// `readv(2)`: reads what a stream has; 0 is its end.
///
/// # Safety
/// Every buffer must be valid for writes of its length throughout the call.
pub(crate) unsafe fn readv(fd: BorrowedFd<'_>, buffers: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: the array is valid for `count` entries; the buffers are valid by this function's contract.
    result(unsafe { libc::readv(fd.as_raw_fd(), buffers.as_ptr(), count(buffers)) })
}

/// `writev(2)`: writes a packet.
///
/// # Safety
/// Every buffer must be valid for reads of its length throughout the call.
pub(crate) unsafe fn writev(fd: BorrowedFd<'_>, buffers: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: the array is valid for `count` entries; the buffers are valid by this function's contract.
    result(unsafe { libc::writev(fd.as_raw_fd(), buffers.as_ptr(), count(buffers)) })
}

/// `sendmsg(2)` on a stream socket, never blocking, never raising SIGPIPE; may be short.
///
/// # Safety
/// Every buffer must be valid for reads of its length throughout the call.
pub(crate) unsafe fn sendv(fd: BorrowedFd<'_>, buffers: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is a valid one: no name, no control data, no buffers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_ptr().cast_mut();
    message.msg_iovlen = count(buffers) as usize;
    // SAFETY: `message` points at `count` entries that sendmsg only reads; the buffers are valid by contract.
    result(unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) })
}

/// `recv(2)` without blocking; 0 is a stream's end.
pub(crate) fn receive(fd: BorrowedFd<'_>, to: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length describe `to`, which is exclusively borrowed throughout the call.
    result(unsafe { libc::recv(fd.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), libc::MSG_DONTWAIT) })
}

/// `send(2)` on a stream socket, never raising SIGPIPE; may be short. Without `wait` it fails with `WouldBlock`
/// instead of blocking, whatever the descriptor's mode.
pub(crate) fn send(fd: BorrowedFd<'_>, bytes: &[u8], wait: bool) -> io::Result<usize> {
    let flags = libc::MSG_NOSIGNAL | if wait { 0 } else { libc::MSG_DONTWAIT };
    // SAFETY: the pointer and length describe `bytes`, which is borrowed throughout the call.
    result(unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}
