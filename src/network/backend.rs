//! [`NetBackend`]: carries a guest's frames.
//!
//! The network device owns and drives it, on the VM's event loop.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use super::{Mac, Offload, Offloads};
use crate::memory::{GuestMemory, Segment};

/// The largest frame: a packet of 65535 bytes behind an Ethernet header with a VLAN's tag.
pub(crate) const FRAME_MAX: usize = 65535 + 18;

/// Carries the frames of one network card, or of one pair of its queues.
///
/// The device owns it and calls it on the VM's event loop, which serves all the VM's devices. So no call may block, and each
/// does a bounded amount of work. While one blocks, calls that ask a device fail with `TimedOut` after ten seconds. After
/// the VM's end, its vsock listeners and streams do not end before that call returns. Threads of its own are welcome; they
/// wake the loop by [`NetBackend::fd`]. A panic ends the VM with [`Exit::DeviceFault`](crate::Exit::DeviceFault).
///
/// ```text
/// at start         negotiated(what the driver agreed to), then fd() is watched
/// fd() readable    poll(), then frames to the guest as below
/// guest sends      send() for each frame, then frames to the guest as below
/// guest has room   while let Some(len) = next_len() { take buffers for `len` bytes; receive() into them }
/// at stop          fd() is watched no more; another start may follow when the driver has reset the device
/// at the VM's end  dropped
/// ```
///
/// Frames are Ethernet frames without preamble and check sequence, 65553 bytes at most. They are the guest's: nothing about them
/// is known to be true but their length, and what [`Offload`] says of itself.
///
/// The least that works, a wire on which every frame comes back:
///
/// ```
/// use cofferdam::backend::{Frame, NetBackend, Received, RxBuffer};
/// use std::collections::VecDeque;
/// use std::os::fd::{AsFd, BorrowedFd};
/// use std::os::unix::net::UnixStream;
///
/// struct Echo {
///     frames: VecDeque<Vec<u8>>,
///     never: (UnixStream, UnixStream),
/// }
///
/// impl NetBackend for Echo {
///     fn fd(&self) -> BorrowedFd<'_> {
///         self.never.0.as_fd() // nothing ever happens but by `send`
///     }
///     fn poll(&mut self) {}
///     fn send(&mut self, frame: Frame<'_>) -> std::io::Result<()> {
///         if self.frames.len() < 64 {
///             self.frames.push_back(frame.to_vec());
///         }
///         Ok(())
///     }
///     fn next_len(&mut self) -> Option<usize> {
///         self.frames.front().map(Vec::len)
///     }
///     fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> std::io::Result<Option<Received>> {
///         Ok(self.frames.pop_front().and_then(|frame| buffer.copy_from(&frame)))
///     }
/// }
///
/// let net = cofferdam::Net::custom(|_| Ok(Echo { frames: VecDeque::new(), never: UnixStream::pair()? }));
/// # let _ = net;
/// ```
pub trait NetBackend: Send {
    /// What it can do beyond plain frames; nothing unless said. Does not change.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    /// What driver and device agreed to: parts of [`NetBackend::capabilities`]. Said at each start, and when the driver changes
    /// its mind. Before, nothing is agreed.
    fn negotiated(&mut self, agreed: Capabilities) {
        let _ = agreed;
    }

    /// Readable when [`NetBackend::poll`] has something to do: an eventfd, a socket, an epoll of several with timers in it. The
    /// same descriptor as long as the backend lives.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Does what is due, a bounded amount of it in each call.
    ///
    /// Afterwards [`NetBackend::fd`] is readable only when there is more to do. It must not be readable because frames wait
    /// for the guest, which may have no room for long: the loop would spin.
    fn poll(&mut self);

    /// Takes one frame of the guest.
    ///
    /// # Errors
    /// `WouldBlock` when the backend can take it only after its next [`NetBackend::poll`]; the frame was not taken then, and is
    /// offered again. Any other error is the backend's end: the guest sees that its cable is out, and
    /// [`EventKind::Degraded`](crate::event::EventKind::Degraded) tells why. Bad frames are no errors: they are dropped.
    fn send(&mut self, frame: Frame<'_>) -> io::Result<()>;

    /// How many bytes the next frame to the guest has, at most. `None`: there is none before the next [`NetBackend::poll`]
    /// or [`NetBackend::send`]. Asking again does not change the answer.
    fn next_len(&mut self) -> Option<usize>;

    /// Puts the next frame into `buffer`, which has at least as many bytes as [`NetBackend::next_len`] returned.
    ///
    /// Returns `None` when there was none after all. What `buffer` holds is undefined then, and `next_len` has another
    /// answer.
    ///
    /// # Errors
    /// The backend's end, as for [`NetBackend::send`].
    fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> io::Result<Option<Received>>;
}

/// Work on frames that one side may leave to the other (Virtio 1.3, 5.1.3). Nothing, by default. Without [`Offloads::CSUM`] the
/// rest means nothing, and is not offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Capabilities {
    /// What the guest may leave to the backend: offered to it as `VIRTIO_NET_F_CSUM` and `HOST_*`.
    pub to_host: Offloads,
    /// What the backend may leave to the guest: `VIRTIO_NET_F_GUEST_*`.
    pub to_guest: Offloads,
}

impl Capabilities {
    /// Describes a backend that takes the work `to_host` over, and leaves `to_guest` to the guest.
    pub const fn new(to_host: Offloads, to_guest: Offloads) -> Self {
        Self { to_host, to_guest }
    }
}

/// The card that a backend is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct NicConfig {
    /// Its address.
    pub mac: Mac,
    /// The largest packet, in bytes, as the guest learns it.
    ///
    /// Frames have 14 bytes more, but for segmentation.
    pub mtu: u16,
}

/// A frame that was put into the guest's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Received {
    /// Bytes of the frame, from the beginning of the buffer.
    pub len: usize,
    /// What is left to do to it. A frame that leaves more than was agreed to is dropped.
    pub offload: Offload,
}

impl Received {
    /// Describes a frame of `len` bytes, to which `offload` is left to do.
    pub const fn new(len: usize, offload: Offload) -> Self {
        Self { len, offload }
    }
}

/// One frame of the guest, in the guest's memory. The guest may change it at any time: what was read twice may differ.
#[derive(Clone, Copy)]
pub struct Frame<'a> {
    memory: &'a GuestMemory,
    pieces: &'a [Segment],
    offload: Offload,
}

impl<'a> Frame<'a> {
    pub(crate) fn new(memory: &'a GuestMemory, pieces: &'a [Segment], offload: Offload) -> Self {
        Self { memory, pieces, offload }
    }

    pub(crate) fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    pub(crate) fn pieces(&self) -> &'a [Segment] {
        self.pieces
    }

    /// Returns its length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a frame without bytes is as bad as one with too few")]
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len()).sum()
    }

    /// Returns what the guest left to do to it.
    ///
    /// Those are parts of what was agreed to, and within the frame.
    pub fn offload(&self) -> Offload {
        self.offload
    }

    /// Copies its bytes from the `at`th on into `to`, and returns how many.
    pub fn read_at(&self, at: usize, to: &mut [u8]) -> usize {
        // The pieces are known to exist.
        self.memory.gather(self.pieces, at, to).unwrap_or(0)
    }

    /// Copies all of it, at most 65553 bytes; what is longer is no frame.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len().min(FRAME_MAX)];
        let len = self.read_at(0, &mut bytes);
        bytes.truncate(len);
        bytes
    }

    /// Writes `header` and then the frame by one `writev(2)`, without a copy.
    ///
    /// It is for taps and sockets of datagrams.
    ///
    /// # Errors
    /// The host's.
    pub fn write_with_header(&self, header: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.memory.write_with_header(header, self.pieces, fd)
    }
}

impl fmt::Debug for Frame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Frame({} bytes, {:?})", self.len(), self.offload)
    }
}

/// Buffers of the guest's memory for one frame.
pub struct RxBuffer<'a> {
    memory: &'a GuestMemory,
    pieces: &'a [Segment],
}

impl<'a> RxBuffer<'a> {
    pub(crate) fn new(memory: &'a GuestMemory, pieces: &'a [Segment]) -> Self {
        Self { memory, pieces }
    }

    pub(crate) fn memory(&self) -> &'a GuestMemory {
        self.memory
    }

    pub(crate) fn pieces(&self) -> &'a [Segment] {
        self.pieces
    }

    /// Returns how many bytes fit.
    #[allow(clippy::len_without_is_empty, reason = "there always is room")]
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len()).sum()
    }

    /// Copies a whole frame in, to which nothing is left to do.
    ///
    /// `None` when it does not fit, which cannot be when [`NetBackend::next_len`] returned its length; the content is
    /// undefined then.
    pub fn copy_from(&mut self, frame: &[u8]) -> Option<Received> {
        let all = self.memory.scatter(self.pieces, frame).is_ok_and(|n| n == frame.len());
        all.then_some(Received { len: frame.len(), offload: Offload::default() })
    }

    /// Reads one packet by one `readv(2)` into `header` and then this buffer, without a copy.
    ///
    /// Returns how many bytes came, those of `header` included. What does not fit is lost.
    ///
    /// # Errors
    /// The host's, `WouldBlock` among them.
    pub fn read_with_header(&mut self, header: &mut [u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.memory.read_with_header(header, self.pieces, fd)
    }
}

impl fmt::Debug for RxBuffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RxBuffer({} bytes)", self.len())
    }
}
