//! The kinds of networks, each with the settings that it has; all become a [`Net`].

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::ports::PortForward;
use super::{Net, NetSettings, NetSource};
use crate::network::{AddressLease, BackendKind, Capture, ConnectionLimit, Mac, NicConfig, Switch};
use crate::virtio::net::NetLimit;
use crate::vm::spec::UserSource;

/// The settings of every card.
macro_rules! common_settings {
    ($kind:ident, $variant:ident) => {
        impl $kind {
            /// Limits the card's rates; nothing is limited by default.
            ///
            /// [`NetHandle::set_limit`](super::NetHandle::set_limit) changes them while the VM runs. Beyond a rate the
            /// guest's frames wait in its own queue, and frames for it at their sender. When that begins, it is an
            /// [`EventKind::Throttled`](crate::event::EventKind::Throttled). [`Stats`](crate::stats::Stats) say how
            /// often and how long.
            pub fn limit(mut self, limit: NetLimit) -> Self {
                self.settings.limit = limit;
                self
            }

            /// Records the card's frames.
            pub fn capture(mut self, capture: Capture) -> Self {
                self.settings.capture = Some(capture);
                self
            }

            /// Sets the card's MAC address, which must be a unicast address.
            ///
            /// By default a random one is made.
            pub fn mac(mut self, mac: impl Into<Mac>) -> Self {
                self.settings.mac = Some(mac.into());
                self
            }

            /// Sets the largest packet (MTU), 576 to 65535 bytes; 1500 by default. The guest learns it.
            pub fn mtu(mut self, bytes: u32) -> Self {
                self.settings.mtu = bytes;
                self
            }
        }

        impl From<$kind> for Net {
            fn from($kind { settings, source }: $kind) -> Self {
                Self { settings, source: NetSource::$variant(source) }
            }
        }
    };
}

/// The setting of cards whose kind has several pairs of queues.
macro_rules! queues_setting {
    ($kind:ident) => {
        impl $kind {
            /// Sets how many pairs of queues the guest may use at once; 1 by default.
            ///
            /// At most 32, and one for each vCPU.
            pub fn queues(mut self, pairs: u32) -> Self {
                self.settings.queues = pairs;
                self
            }
        }
    };
}

/// A network that needs no privileges on the host; see [`Net::user`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct UserNet {
    pub(super) settings: NetSettings,
    pub(super) source: Box<UserSource>,
}

impl UserNet {
    /// Publishes a port of the guest on an address of the host.
    ///
    /// [`NetHandle::published`](super::NetHandle::published) says where it listens. To the guest all clients seem to be
    /// the gateway.
    ///
    /// A service is found on the guest's IPv4 address or its own IPv6 address, and in a container also on 127.0.0.1.
    /// One on ::1 alone is reached by `Container::connect` only. Where nothing listens, a client of a TCP port gets a
    /// reset and a client of a UDP port nothing. [`NetStats::unconnected`](super::NetStats::unconnected) counts it. The
    /// first datagram to a service that has moved may be lost when it has more than 500 bytes.
    pub fn publish(mut self, port: PortForward) -> Self {
        self.source.ports.push(port);
        self
    }

    /// Limits the guest's TCP connections; see [`ConnectionLimit`] for what is allowed by default.
    ///
    /// [`NetHandle::set_connection_limit`](super::NetHandle::set_connection_limit) changes it while the VM runs.
    pub fn connection_limit(mut self, limit: ConnectionLimit) -> Self {
        self.source.connection_limit = limit;
        self
    }
}

/// A card on a tap device of the host; see [`Net::tap`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct TapNet {
    pub(super) settings: NetSettings,
    /// The device's name.
    pub(super) source: String,
}

/// A card on taps that are open already; see [`Net::tap_files`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct TapFilesNet {
    pub(super) settings: NetSettings,
    /// One for each pair of queues.
    pub(super) source: Vec<Arc<File>>,
}

/// A card whose frames the peer of a socket carries; see [`Net::socket`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct SocketNet {
    pub(super) settings: NetSettings,
    pub(super) source: Arc<OwnedFd>,
}

/// A card on a [`Switch`]; see [`Net::switch`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct SwitchNet {
    pub(super) settings: NetSettings,
    pub(super) source: SwitchAttachment,
}

/// A place on a switch, to be taken.
#[derive(Debug, Clone)]
pub(in crate::vm) struct SwitchAttachment {
    pub switch: Switch,
    pub name: String,
    /// It was taken before the VM is started.
    pub place: Option<Arc<AddressLease>>,
}

/// A card on a [`NetBackend`](crate::backend::NetBackend) of the embedder's; see [`Net::custom`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct CustomNet {
    pub(super) settings: NetSettings,
    pub(super) source: CustomBackend,
}

/// Makes the embedder's backends.
#[derive(Clone)]
pub(in crate::vm) struct CustomBackend(pub Arc<dyn Fn(NicConfig) -> io::Result<BackendKind> + Send + Sync>);

impl fmt::Debug for CustomBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CustomBackend")
    }
}

common_settings!(UserNet, User);
common_settings!(TapNet, Tap);
common_settings!(TapFilesNet, TapFiles);
common_settings!(SocketNet, Socket);
common_settings!(SwitchNet, Switch);
common_settings!(CustomNet, Custom);
queues_setting!(TapNet);
queues_setting!(CustomNet);
