//! Networks: backends that carry a guest's Ethernet frames on the host.
//!
//! The device drives a [`NetBackend`] on the VM's event loop; nothing here blocks, and every call does a bounded amount
//! of work. [`user`] is the backend that needs no privileges: it ends the guest's connections in this process and opens
//! ordinary sockets of the host for them. [`policy`] says where it may go, [`dns`] answers the guest's questions for
//! names. [`switch`] is a network between guests, [`capture`] keeps a record of frames.
#![deny(clippy::indexing_slicing, reason = "frames are the guest's, answers are strangers'")]

mod address;
mod backend;
mod backend_kind;
mod capture;
mod dns;
mod edge_poller;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod fuzzing;
mod offload;
mod policy;
mod segment;
mod socket;
mod switch;
mod tap;
mod user;
mod wire;

pub use address::Mac;
pub(crate) use backend::FRAME_MAX;
pub use backend::{Capabilities, Frame, NetBackend, NicConfig, Received, RxBuffer};
pub(crate) use backend_kind::BackendKind;
pub use capture::{Capture, CaptureStats};
pub(crate) use capture::{CaptureCounters, CapturePump, CaptureRecorder, CaptureSink};
pub use offload::{Csum, Gso, GsoKind, Offload, Offloads};
pub(crate) use offload::{HEADER_LEN, MAX_UDP_SEGMENTS};
pub use policy::{Cidr, Denial, DenyReason, Policy, Protocol, Rule};
pub(crate) use socket::SocketBackend;
pub use switch::Switch;
pub(crate) use switch::{AddressLease, PREFIX as SWITCH_PREFIX, SwitchPort};
pub(crate) use tap::TapBackend;
pub(crate) use user::{Config, Published, UserStack};
pub use user::{ConnectionLimit, NetStats};
