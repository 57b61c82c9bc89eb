//! Sockets for relays: they never block, never raise SIGPIPE, and close with exec.
//!
//! The standard library connects only with blocking, and neither peeks at an offset nor resets a connection.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::CloseOnFork;
use super::descriptors::is_spare;
use super::iovec::{count, result};

/// What is spoken on a [`Socket`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SocketKind {
    Stream,
    Datagram,
    /// ICMP echo without privileges, where the host's `net.ipv4.ping_group_range` allows it.
    Ping,
}

/// A socket with one peer.
#[derive(Debug)]
pub(crate) struct Socket(CloseOnFork<OwnedFd>);

fn check(outcome: i32) -> io::Result<i32> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
}

impl Socket {
    /// Of a descriptor that does not block.
    pub(crate) fn new(fd: impl Into<OwnedFd>) -> Self {
        Self(CloseOnFork::new(fd.into()))
    }

    /// Begins to connect to `to`, for a guest; for a stream, it is done when the socket becomes writable ([`Socket::error`] says
    /// how). Fails with `EMFILE` when guests may have no more descriptors.
    pub(crate) fn connect(kind: SocketKind, to: SocketAddr) -> io::Result<Self> {
        let domain = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        let (kind, protocol) = match kind {
            SocketKind::Stream => (libc::SOCK_STREAM, 0),
            SocketKind::Datagram => (libc::SOCK_DGRAM, 0),
            SocketKind::Ping if to.is_ipv4() => (libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
            SocketKind::Ping => (libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6),
        };
        // SAFETY: socket(2) takes no pointers.
        let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, protocol) })?;
        // SAFETY: the descriptor was just made and has no other owner.
        let socket = Self(CloseOnFork::new(unsafe { OwnedFd::from_raw_fd(fd) }));
        if !is_spare(&*socket.0) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let outcome = match to {
            SocketAddr::V4(to) => {
                let address = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: to.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(to.ip().octets()) },
                    sin_zero: [0; 8],
                };
                let len = size_of_val(&address) as libc::socklen_t;
                // SAFETY: pointer and length describe `address`, which lives throughout the call.
                unsafe { libc::connect(fd, (&raw const address).cast(), len) }
            }
            SocketAddr::V6(to) => {
                let address = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: to.port().to_be(),
                    sin6_flowinfo: to.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: to.ip().octets() },
                    sin6_scope_id: to.scope_id(),
                };
                let len = size_of_val(&address) as libc::socklen_t;
                // SAFETY: pointer and length describe `address`, which lives throughout the call.
                unsafe { libc::connect(fd, (&raw const address).cast(), len) }
            }
        };
        match check(outcome) {
            Ok(_) => Ok(socket),
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
            Err(error) => Err(error),
        }
    }

    fn set<T>(&self, level: i32, name: i32, value: T) -> io::Result<()> {
        let len = size_of::<T>() as libc::socklen_t;
        // SAFETY: pointer and length describe `value`, which lives throughout the call and is only read.
        check(unsafe { libc::setsockopt(self.0.as_raw_fd(), level, name, (&raw const value).cast(), len) }).map(drop)
    }

    /// Small pieces of a TCP stream are sent at once, and urgent ones are read as all others.
    pub(crate) fn relay(&self) -> io::Result<()> {
        self.set(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1i32)?;
        self.set(libc::SOL_SOCKET, libc::SO_OOBINLINE, 1i32)
    }

    /// When it is closed, the peer sees a reset, and what was not sent is forgotten.
    pub(crate) fn reset_on_close(&self) -> io::Result<()> {
        self.set(libc::SOL_SOCKET, libc::SO_LINGER, libc::linger { l_onoff: 1, l_linger: 0 })
    }

    /// From now on, what is peeked begins after what was peeked before, this time `offset` bytes after what was consumed.
    /// For TCP since Linux 6.9.
    pub(crate) fn peek_from(&self, offset: i32) -> io::Result<()> {
        self.set(libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
    }

    /// What went wrong since this was last asked.
    pub(crate) fn error(&self) -> Option<io::Error> {
        match option(self.0.as_fd(), libc::SO_ERROR) {
            Err(error) => Some(error),
            Ok(0) => None,
            Ok(number) => Some(io::Error::from_raw_os_error(number)),
        }
    }

    /// How many bytes of a stream can be read now.
    pub(crate) fn unread(&self) -> io::Result<usize> {
        let mut n = 0i32;
        // SAFETY: FIONREAD writes one int, which `n` is.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::FIONREAD, &raw mut n) })?;
        Ok(usize::try_from(n).unwrap_or(0))
    }

    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let how = match how {
            Shutdown::Read => libc::SHUT_RD,
            Shutdown::Write => libc::SHUT_WR,
            Shutdown::Both => libc::SHUT_RDWR,
        };
        // SAFETY: shutdown(2) takes no pointers.
        check(unsafe { libc::shutdown(self.0.as_raw_fd(), how) }).map(drop)
    }

    /// Takes `n` bytes of a TCP stream that were peeked before, without copying them.
    pub(crate) fn discard(&self, n: usize) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
        // SAFETY: with MSG_TRUNC, a TCP socket writes nothing to the buffer (tcp(7)), so none is needed.
        result(unsafe { libc::recv(self.0.as_raw_fd(), std::ptr::null_mut(), n, flags) })
    }

    /// Takes what fits of a stream, or one datagram.
    pub(crate) fn receive(&self, to: &mut [u8]) -> io::Result<usize> {
        super::receive(self.0.as_fd(), to)
    }

    /// Sends what fits to a stream, or one datagram.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        super::send(self.0.as_fd(), bytes, false)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A number that the kernel knows of a socket (socket(7)).
fn option(fd: BorrowedFd<'_>, name: i32) -> io::Result<i32> {
    let (mut value, mut len) = (0i32, size_of::<i32>() as libc::socklen_t);
    let at = (&raw mut value).cast();
    // SAFETY: `at` and `len` describe `value`, which is exclusively ours during the call.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, at, &raw mut len) })?;
    Ok(value)
}

/// What kind of socket it is.
pub(crate) fn socket_kind(fd: BorrowedFd<'_>) -> io::Result<i32> {
    option(fd, libc::SO_TYPE)
}

/// `recvmsg(2)` that leaves in the stream what it copies.
///
/// # Safety
/// Every buffer must be valid for writes of its length throughout the call.
pub(crate) unsafe fn peekv(fd: BorrowedFd<'_>, buffers: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: an all-zero msghdr is a valid one: no name, no control data, no buffers.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_ptr().cast_mut();
    message.msg_iovlen = count(buffers) as usize;
    // SAFETY: `message` points at `count` entries that recvmsg only reads; the buffers are valid by contract.
    result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_PEEK | libc::MSG_DONTWAIT) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn pair() -> (Socket, std::net::TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = Socket::connect(SocketKind::Stream, listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        (socket, far)
    }

    #[test]
    fn streams_connect_report_unread_bytes_and_discard() {
        let (near, mut far) = pair();
        far.write_all(b"hello, world").unwrap();
        super::super::wait_readable(near.as_fd(), None).unwrap();
        assert_eq!((near.unread().unwrap(), near.discard(7).unwrap()), (12, 7));
        let mut rest = [0; 9];
        assert_eq!(near.receive(&mut rest).unwrap(), 5);
        assert_eq!(near.receive(&mut rest).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        near.send(b"bye").unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut all = String::new();
        far.read_to_string(&mut all).unwrap();
        assert_eq!(all, "bye");
    }

    #[test]
    fn refusals_and_resets_are_reported() {
        let (near, mut far) = pair();
        near.reset_on_close().unwrap();
        drop(near);
        assert_eq!(far.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let outcome = Socket::connect(SocketKind::Stream, unused);
        let error = outcome.map_or_else(Some, |socket| socket.error()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
