//! [`DeviceState`]: what a driver has made of a device, as plain data.
//!
//! What the embedder has set is not in it: that comes from the configuration. Chains that the device has taken are in its
//! [`QueuePositions`](super::queue::QueuePositions), and what the driver wrote to configuration space is in the transport's
//! state.

use std::io;

use super::balloon::BalloonState;
use super::net::NetState;
use super::vsock::VsockState;

/// The state of one device. Not trusted when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum DeviceState {
    /// A device whose queues are all that there is: disk, console, entropy.
    Stateless,
    Net(NetState),
    Balloon(BalloonState),
    Vsock(VsockState),
}

impl DeviceState {
    /// Returns the error of a device that was given another device's state.
    pub(super) fn mismatch(&self) -> io::Error {
        let device = match self {
            Self::Stateless => "a device without one",
            Self::Net(_) => "a network card",
            Self::Balloon(_) => "a balloon",
            Self::Vsock(_) => "a vsock device",
        };
        io::Error::new(io::ErrorKind::InvalidData, format!("the state is that of {device}"))
    }
}
