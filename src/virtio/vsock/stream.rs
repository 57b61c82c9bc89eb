//! The embedder's ends of vsock: connections with a guest, and listeners for a guest's connections.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{CloseOnFork, EventFd, HeldDescriptors, borrow, deadline, eventfd, left, send, wait_readable};

/// What is left of a connection that has ended.
#[derive(Debug, Default)]
pub(crate) struct Unread {
    /// What the guest had sent and the embedder had not read.
    pub unread: VecDeque<u8>,
    /// The guest closed all of it, or was gone, without ending its own direction.
    pub abrupt: bool,
}

/// Shared by the device and all clones.
pub(crate) type SharedTail = Arc<Mutex<Unread>>;

/// A connection with a program in the guest, over vsock.
///
/// Reads and writes block like those of a `TcpStream`, unless [`VsockStream::set_nonblocking`] says otherwise. The
/// descriptor behind [`AsFd`] can be waited for with poll, epoll, tokio, smol or mio.
///
/// Flow control reaches through to the guest's program: a side that does not read stops the other, and buffers do not
/// grow. Each direction can be shut down by itself. When the VM ends, reads give what the guest had sent, then end of
/// file. Dropping closes.
pub struct VsockStream {
    socket: Arc<CloseOnFork<UnixStream>>,
    tail: SharedTail,
    /// An abrupt end is an error and not an end of file.
    tells_resets: bool,
    /// Its descriptor, where the guest has made it. It goes after the socket.
    held: Option<Arc<HeldDescriptors>>,
}

impl VsockStream {
    /// The two ends: the embedder's, and the device's.
    pub(crate) fn pair() -> io::Result<(Self, UnixStream, SharedTail)> {
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        let tail = SharedTail::default();
        Ok((
            Self { socket: Arc::new(CloseOnFork::new(near)), tail: tail.clone(), tells_resets: false, held: None },
            far,
            tail,
        ))
    }

    /// Has it hold a descriptor of the guest's until it is closed.
    pub(super) fn holding(self, held: HeldDescriptors) -> Self {
        Self { held: Some(Arc::new(held)), ..self }
    }

    /// Returns another handle to the same connection, with the same descriptor.
    ///
    /// It is for reading and writing on two threads.
    ///
    /// # Errors
    /// None today.
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self {
            socket: self.socket.clone(),
            tail: self.tail.clone(),
            tells_resets: self.tells_resets,
            held: self.held.clone(),
        })
    }

    /// A stream at its end: reads give end of file.
    pub(crate) fn ended() -> io::Result<Self> {
        Self::pair().map(|(near, _, _)| near)
    }

    /// A way to end it that does not keep it open.
    pub(crate) fn breaker(&self) -> StreamBreaker {
        StreamBreaker(Arc::downgrade(&self.socket))
    }

    /// From now on reads tell by `ConnectionReset` that the guest's end has not ended its direction but closed everything.
    pub(crate) fn report_resets(mut self) -> Self {
        self.tells_resets = true;
        self
    }

    /// What is there behind what the socket had.
    fn read_tail(&self, to: &mut [u8]) -> io::Result<usize> {
        let mut remains = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        match remains.unread.read(to)? {
            0 if self.tells_resets && remains.abrupt => Err(io::ErrorKind::ConnectionReset.into()),
            n => Ok(n),
        }
    }

    /// Shuts down one or both directions.
    ///
    /// The guest reads end of file, or cannot write any more.
    ///
    /// # Errors
    /// `Io` when the connection has ended already.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        self.socket.shutdown(how).doing(|| "shutting a vsock connection down")
    }

    /// Makes reads and writes fail with `WouldBlock` instead of waiting, for all clones.
    ///
    /// # Errors
    /// `Io` as fcntl(2) fails.
    pub fn set_nonblocking(&self, nonblocking: bool) -> Result<()> {
        self.socket.set_nonblocking(nonblocking).doing(|| "setting up a vsock connection")
    }

    /// Bounds how long a read waits; `None`, as at first, waits for ever. Reads fail with `WouldBlock` then.
    ///
    /// # Errors
    /// `Io` for a zero duration.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> Result<()> {
        self.socket.set_read_timeout(timeout).doing(|| "setting up a vsock connection")
    }

    /// Bounds how long a write waits; `None`, as at first, waits for ever. Writes fail with `WouldBlock` then.
    ///
    /// # Errors
    /// `Io` for a zero duration.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> Result<()> {
        self.socket.set_write_timeout(timeout).doing(|| "setting up a vsock connection")
    }
}

/// Ends a [`VsockStream`] from elsewhere: what has arrived can still be read, then all reads and writes are over.
#[derive(Debug, Clone)]
pub(crate) struct StreamBreaker(Weak<CloseOnFork<UnixStream>>);

impl StreamBreaker {
    pub(crate) fn break_off(&self) {
        if let Some(socket) = self.0.upgrade() {
            // One that has ended already cannot be ended.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Read for &VsockStream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match (&**self.socket).read(to) {
            Ok(0) if !to.is_empty() => self.read_tail(to),
            other => other,
        }
    }
}

impl Write for &VsockStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        send(self.socket.as_fd(), from, true)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for VsockStream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        (&*self).read(to)
    }
}

impl Write for VsockStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        (&*self).write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for VsockStream {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for VsockStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl fmt::Debug for VsockStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VsockStream({:?})", self.socket.as_fd())
    }
}

/// Connections that wait to be accepted, at most; more are refused. Each holds two descriptors of the process.
pub(super) const BACKLOG: usize = 32;

#[derive(Debug, Default)]
struct PendingStreams {
    waiting: VecDeque<VsockStream>,
    closed: bool,
    /// The `errno` with which the host could not make the last connection that was refused for want of something.
    refused: Option<i32>,
}

/// Where the device puts what arrives. Shared with the listener.
pub(crate) struct AcceptQueue {
    queue: Mutex<PendingStreams>,
    ready: EventFd,
}

impl AcceptQueue {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self { queue: Mutex::default(), ready: eventfd()? }))
    }

    fn queue(&self) -> MutexGuard<'_, PendingStreams> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more connection may wait.
    pub(super) fn has_room(&self) -> bool {
        let queue = self.queue();
        !queue.closed && queue.waiting.len() < BACKLOG
    }

    /// Hands a connection to the listener. One that is gone meanwhile hangs it up.
    pub(crate) fn push(&self, stream: VsockStream) {
        let mut queue = self.queue();
        if queue.closed {
            drop(queue);
            return drop(stream);
        }
        queue.waiting.push_back(stream);
        drop(queue);
        // A full counter is readable, which is all that is wanted.
        let _ = self.ready.write(1);
    }

    /// A connection was refused, as the host could not make it.
    pub(super) fn refuse(&self, why: &io::Error) {
        self.queue().refused = why.raw_os_error();
    }

    /// Hangs up what waits, as the embedder accepts no more.
    fn abandon(&self) {
        let mut queue = self.queue();
        queue.closed = true;
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        drop(waiting);
    }

    /// Nothing more will arrive.
    pub(crate) fn close(&self) {
        self.queue().closed = true;
        let _ = self.ready.write(1);
    }

    pub(super) fn closed(&self) -> bool {
        self.queue().closed
    }
}

/// Accepts the connections of guest programs to one port of the host (CID 2).
///
/// Dropping it refuses further ones. The descriptor behind [`AsFd`] is readable while something waits to be accepted,
/// or when the VM has ended.
pub struct VsockListener {
    arrivals: Arc<AcceptQueue>,
    port: u32,
}

impl VsockListener {
    pub(crate) fn new(arrivals: Arc<AcceptQueue>, port: u32) -> Self {
        Self { arrivals, port }
    }

    /// Returns the port that guests connect to.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Why the last connection was refused that the host could not make.
    pub(crate) fn refused(&self) -> Option<Error> {
        let errno = self.arrivals.queue().refused?;
        Some(Error::from(io::Error::from_raw_os_error(errno)).doing("taking a connection of the guest's"))
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn accept(&self) -> Result<VsockStream> {
        self.wait(None)?.ok_or_else(|| Error::new(ErrorKind::TimedOut, "no connection arrived"))
    }

    /// Waits for the next connection, at most `timeout`; `None` when none has arrived.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<VsockStream>> {
        self.wait(Some(timeout))
    }

    /// Returns a connection that has arrived; `None` when none has. Does not block.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn try_accept(&self) -> Result<Option<VsockStream>> {
        self.wait(Some(Duration::ZERO))
    }

    fn wait(&self, timeout: Option<Duration>) -> Result<Option<VsockStream>> {
        let deadline = timeout.and_then(deadline);
        loop {
            {
                let mut queue = self.arrivals.queue();
                if let Some(stream) = queue.waiting.pop_front() {
                    return Ok(Some(stream));
                }
                if queue.closed {
                    return Err(Error::vm_ended());
                }
                // Under the lock: what is pushed later sets it again.
                let _ = self.arrivals.ready.read();
            }
            let left = deadline.map(left);
            if !wait_readable(borrow(&self.arrivals.ready), left).doing(|| "waiting for a vsock connection")? {
                return Ok(None);
            }
        }
    }
}

impl Drop for VsockListener {
    fn drop(&mut self) {
        self.arrivals.abandon();
    }
}

impl AsRawFd for VsockListener {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for VsockListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.arrivals.ready)
    }
}

impl fmt::Debug for VsockListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VsockListener({})", self.port)
    }
}
