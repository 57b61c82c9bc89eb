//! [`SocketBackend`]: a socket whose peer carries the frames, such as passt or QEMU. Driven by the network device.
//!
//! On a stream each frame follows its length in four bytes, big endian, as for QEMU's `-netdev stream` and passt. On a
//! socket of datagrams each is a frame.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::edge_poller::EdgePoller;
use super::{FRAME_MAX as LARGEST, Frame, NetBackend, Offload, Received, RxBuffer};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, CloseOnFork};

/// What is taken from a stream at once.
const CHUNK: usize = 128 * 1024;
const LENGTH: usize = 4;

#[derive(Debug)]
pub(crate) struct SocketBackend {
    fd: CloseOnFork<OwnedFd>,
    edges: EdgePoller,
    /// Of a stream: what was taken from it. `None` for datagrams.
    inbox: Option<Inbox>,
    /// The rest of a frame, of which the socket took a part.
    outbox: Vec<u8>,
}

/// Room for bytes of a stream, of which there are those from `begin` to `end`.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    begin: usize,
    end: usize,
}

impl Inbox {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.begin..self.end).unwrap_or_default()
    }

    /// How long the first frame is, if its length is there.
    fn announced(&self) -> Option<usize> {
        let length: [u8; LENGTH] = self.rest().get(..LENGTH)?.try_into().ok()?;
        usize::try_from(u32::from_be_bytes(length)).ok()
    }

    /// The first frame, if all of it is there.
    fn frame(&self) -> Option<&[u8]> {
        self.rest().get(LENGTH..LENGTH + self.announced()?)
    }

    /// Takes what the stream has; false when that is nothing now.
    fn fill(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        // Kept from frame to frame: to clear it each time took longer than to fill it.
        self.bytes.copy_within(self.begin..self.end, 0);
        (self.begin, self.end) = (0, self.end - self.begin);
        if self.bytes.len() < self.end + CHUNK {
            self.bytes.resize(self.end + CHUNK, 0);
        }
        match sys::receive(fd, self.bytes.get_mut(self.end..).unwrap_or_default()) {
            Ok(0) => Err(peer_closed()),
            Ok(count) => {
                self.end += count;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(stream_error(e)),
        }
    }
}

impl SocketBackend {
    /// Takes a connected socket.
    ///
    /// # Errors
    /// `InvalidConfig` when it is no socket of a stream, of datagrams or of packets in order.
    pub(crate) fn new(fd: OwnedFd) -> Result<Self> {
        let doing = || "taking a network's socket";
        let kind = sys::socket_kind(fd.as_fd()).map_err(|e| Error::from(e).with_kind(ErrorKind::InvalidConfig));
        let inbox = match kind.doing(doing)? {
            libc::SOCK_STREAM => Some(Inbox::default()),
            libc::SOCK_DGRAM | libc::SOCK_SEQPACKET => None,
            other => {
                return Err(Error::new(ErrorKind::InvalidConfig, format!("sockets of kind {other} carry no frames")))
                    .doing(doing);
            }
        };
        // The type says nothing about it: it is the standard library's way to set the flag.
        let fd = std::os::unix::net::UnixDatagram::from(fd);
        fd.set_nonblocking(true).doing(doing)?;
        let fd = OwnedFd::from(fd);
        let edges = EdgePoller::of(fd.as_fd()).doing(doing)?;
        Ok(Self { fd: CloseOnFork::new(fd), edges, inbox, outbox: Vec::new() })
    }

    /// Sends what is left of the last frame; false when the socket takes no more now.
    fn finish(&mut self) -> io::Result<bool> {
        while !self.outbox.is_empty() {
            match sys::send(self.fd.as_fd(), &self.outbox, false) {
                Ok(n) => drop(self.outbox.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(stream_error(e)),
            }
        }
        Ok(true)
    }
}

fn peer_closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the other end was closed")
}

/// Returns the same error for a closed peer, whether sending or receiving has met it first.
fn stream_error(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => peer_closed(),
        _ => error,
    }
}

impl NetBackend for SocketBackend {
    // No capabilities: nothing says on a socket what is left to do to a frame.

    fn fd(&self) -> BorrowedFd<'_> {
        self.edges.fd()
    }

    fn poll(&mut self) {
        self.edges.poll();
    }

    fn send(&mut self, frame: Frame<'_>) -> io::Result<()> {
        let (len, memory, frame) = (frame.len(), frame.memory(), frame.pieces());
        if len == 0 || len > LARGEST {
            return Ok(());
        }
        if self.inbox.is_none() {
            return match memory.send(frame, self.fd.as_fd()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(e),
                // The peer is gone, or it is too large for the socket: lost, as on a wire.
                _ => Ok(()),
            };
        }
        if !self.finish()? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let length = (len as u32).to_be_bytes();
        let sent = memory.send_behind(&length, frame, self.fd.as_fd()).map_err(stream_error)?;
        if sent < LENGTH {
            self.outbox.extend(length.get(sent..).unwrap_or_default());
        }
        if sent < LENGTH + len {
            let (done, before) = (sent.saturating_sub(LENGTH), self.outbox.len());
            self.outbox.resize(before + len - done, 0);
            let rest = self.outbox.get_mut(before..).unwrap_or_default();
            memory.gather(frame, done, rest).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        let Some(inbox) = &mut self.inbox else { return self.edges.readable.then_some(LARGEST) };
        if inbox.frame().is_none() && self.edges.readable && inbox.announced().is_none_or(|len| len <= LARGEST) {
            // `receive` reports its end, too.
            self.edges.readable = inbox.fill(self.fd.as_fd()).unwrap_or(true);
        }
        match inbox.frame() {
            Some(frame) => Some(frame.len()),
            None => self.edges.readable.then_some(0),
        }
    }

    fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        let plain = |len| Some(Received { len, offload: Offload::default() });
        let Some(inbox) = &mut self.inbox else {
            return match buffer.memory().receive(buffer.pieces(), self.fd.as_fd()) {
                Ok(0) => Err(peer_closed()),
                Ok(len) => Ok(plain(len)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.edges.readable = false;
                    Ok(None)
                }
                // A datagram socket reports so that an earlier frame found no peer.
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(None),
                Err(e) => Err(e),
            };
        };
        if inbox.announced().is_some_and(|len| len > LARGEST) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the other end announces a frame that cannot be"));
        }
        let Some(frame) = inbox.frame() else {
            self.edges.readable = inbox.fill(self.fd.as_fd())?;
            return Ok(None);
        };
        let (len, received) = (frame.len(), buffer.copy_from(frame));
        inbox.begin += LENGTH + len;
        Ok(received.filter(|_| len > 0))
    }
}
