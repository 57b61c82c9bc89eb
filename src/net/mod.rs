//! Networks: whole Ethernet frames between a guest's network device and whatever carries them on the host.
//!
//! The device drives a [`NetBackend`] on the VM's event loop; nothing here blocks, and every call does a bounded amount of
//! work. [`user`] is the backend that needs no privileges: it ends the guest's connections in this process and opens
//! ordinary sockets of the host for them. [`policy`] says where it may go, [`dns`] answers the guest's questions for names.
#![deny(clippy::indexing_slicing, reason = "frames are the guest's, answers are strangers'")]

mod address;
mod dns;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod doors;
mod edges;
mod offload;
mod policy;
mod socket;
mod tap;
mod user;
mod wire;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

pub use address::Mac;
pub(crate) use offload::{Agreed, Csum, Gso, GsoKind, HEADER_LEN, Offload, Offloads};
pub use policy::{Cidr, Denial, Policy, Protocol, Rule, Why};
pub(crate) use socket::SocketNet;
pub(crate) use tap::TapNet;
pub use user::NetStats;
pub(crate) use user::{Config, Published, UserNet};

use crate::memory::{GuestMemory, Segment};

/// What a backend can do; does not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capabilities {
    /// Work that the guest may leave to the backend: what the device offers as `VIRTIO_NET_F_CSUM` and `HOST_*`.
    pub to_host: Offloads,
    /// Work that the backend leaves to the guest where the driver agrees: `VIRTIO_NET_F_GUEST_*`.
    pub to_guest: Offloads,
    /// The largest IP packet, but for segmentation: 576 to 65535.
    pub mtu: u16,
    /// The guest's address, where the backend insists on one.
    pub mac: Option<Mac>,
}

/// A frame that was put into the guest's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received {
    /// Bytes of the frame, from the front of the room that was given.
    pub len: usize,
    pub offload: Offload,
}

/// What carries a guest's frames. Owned and driven by the network device, on the VM's event loop; never blocks.
///
/// ```text
/// at start         negotiated(what the driver agreed to), watch fd() for reading
/// fd() readable    turn(), then frames to the guest as below
/// guest sends      send() for each frame, then frames to the guest as below
/// guest has room   while let Some(room) = next() { take buffers for `room` bytes; receive() into them }
/// at stop          stop watching fd(); connections live on in the backend
/// ```
///
/// Frames are Ethernet frames without the device's header, preamble or check sequence. What the header of the device said
/// (`virtio_net_hdr`, Virtio 1.3, 5.1.6) is an [`Offload`].
pub(crate) trait NetBackend: Send + fmt::Debug {
    fn capabilities(&self) -> Capabilities;

    /// What driver and device agreed to: parts of [`NetBackend::capabilities`]. Before this is said, nothing is agreed.
    fn negotiated(&mut self, agreed: Agreed);

    /// Readable when [`NetBackend::turn`] has something to do; timers are in it too.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Does what is due, a bounded amount of it: [`NetBackend::fd`] stays readable when there is more.
    fn turn(&mut self);

    /// Takes one frame of the guest, whose bytes are `frame` in `memory`, where they need to stay only during the call.
    ///
    /// # Errors
    /// `WouldBlock` when the backend can take it only after its next [`NetBackend::turn`]; the frame was not taken then. Any
    /// other error is the backend's end. Bad frames are no errors: they are dropped and counted.
    fn send(&mut self, memory: &GuestMemory, frame: &[Segment], offload: Offload) -> io::Result<()>;

    /// How many bytes the next frame to the guest has, at most. `None`: there is none before the next [`NetBackend::turn`]
    /// or [`NetBackend::send`]. Asking again does not change the answer.
    fn next(&mut self) -> Option<usize>;

    /// Puts the next frame into `room`, of at least as many bytes as [`NetBackend::next`] said just before.
    ///
    /// `None` when there was none after all; what `room` holds is undefined then, and `next` has another answer.
    ///
    /// # Errors
    /// The backend's end.
    fn receive(&mut self, memory: &GuestMemory, room: &[Segment]) -> io::Result<Option<Received>>;

    /// Itself, where it is one that the embedder can change.
    fn user(&mut self) -> Option<&mut UserNet> {
        None
    }
}
