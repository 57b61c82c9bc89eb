//! [`NetHandle`]: a network card of a running VM.

use std::net::SocketAddr;
use std::sync::Arc;

use super::ports::PortForward;
use crate::error::{Error, ErrorKind, Result};
use crate::network::{CaptureCounters, CaptureStats, ConnectionLimit, NetStats, Policy, Published, UserStack};
use crate::virtio::net::{Net, NetLimit};
use crate::virtio::{DeviceHandle, DeviceId};

/// A network card of a running VM; see [`Vm::net`](crate::Vm::net). Cheap to clone.
///
/// Calls ask the VM's loop, and wait for its answer, at most ten seconds; then they fail with `TimedOut`.
#[derive(Debug, Clone)]
pub struct NetHandle {
    pub(in crate::vm) id: DeviceId,
    pub(in crate::vm) device: DeviceHandle<Net>,
    pub(in crate::vm) published: Arc<[SocketAddr]>,
    pub(in crate::vm) capture: Option<CaptureCounters>,
}

/// A port that was published on a running VM; see [`NetHandle::publish`].
///
/// Dropping it changes nothing.
#[derive(Debug, Clone)]
pub struct PublishedPort {
    net: NetHandle,
    port: Published,
    address: SocketAddr,
}

impl PublishedPort {
    /// Returns the address of the host where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops listening; open connections stay. Idempotent.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn close(&self) -> Result<()> {
        let port = self.port;
        self.net.user("closing a port", move |user| user.unpublish(port)).map(drop)
    }
}

impl NetHandle {
    /// Returns the name by which events and counters call the card.
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// Returns where the ports of [`UserNet::publish`](super::UserNet::publish) listen, in their order.
    pub fn published(&self) -> &[SocketAddr] {
        &self.published
    }

    /// Publishes one more port; the result says where it listens.
    ///
    /// # Errors
    /// - `Unsupported` unless it is a [`Net::user`](crate::Net::user).
    /// - `InvalidConfig` when the address is none of the host's.
    /// - `ResourceBusy` when another listens there.
    /// - `PermissionDenied` for a port below 1024 without the privilege.
    /// - `InvalidState` when the VM has ended.
    pub fn publish(&self, port: PortForward) -> Result<PublishedPort> {
        let (port, address) = self.user("publishing", move |user| port.publish(user))??;
        Ok(PublishedPort { net: self.clone(), port, address })
    }

    /// Replaces the policy of a [`Net::user`](crate::Net::user) from now on.
    ///
    /// Connections that it does not allow are reset.
    ///
    /// # Errors
    /// - `Unsupported` unless it is a [`Net::user`](crate::Net::user).
    /// - `InvalidConfig` for a policy with a rule that means nothing: the old one stays.
    /// - `InvalidState` when the VM has ended.
    pub fn set_policy(&self, policy: Policy) -> Result<()> {
        self.user("changing the policy", move |user| user.set_policy(policy))?
    }

    /// Returns the counters of a [`Net::user`](crate::Net::user), or of this guest on a [`Net::switch`](crate::Net::switch).
    ///
    /// # Errors
    /// `Unsupported` unless it is one of them; `InvalidState` when the VM has ended.
    pub fn stats(&self) -> Result<NetStats> {
        let none = || Error::new(ErrorKind::Unsupported, "only cards on a Net::user or a Net::switch count");
        let stats = self.device.with(|card, _| card.stats()).and_then(|stats| stats.ok_or_else(none));
        stats.map_err(|e| e.doing(format!("{}: counting", self.id)))
    }

    /// Replaces the card's limit from now on; [`NetLimit::none`] for none.
    ///
    /// What waits goes on by the new limit, and open connections stay.
    ///
    /// # Errors
    /// `InvalidConfig` for a rate of zero; `InvalidState` when the VM has ended.
    pub fn set_limit(&self, limit: NetLimit) -> Result<()> {
        let checked = limit.check();
        let set = checked.and_then(|()| self.device.with(move |card, _| card.set_limit(&limit)));
        set.map_err(|e| e.doing(format!("{}: set_limit", self.id)))
    }

    /// Replaces the limit of the guest's TCP connections from now on; [`ConnectionLimit::new`] for the default.
    ///
    /// Open connections stay.
    ///
    /// # Errors
    /// - `Unsupported` unless it is a [`Net::user`](crate::Net::user).
    /// - `InvalidConfig` for zero.
    /// - `InvalidState` when the VM has ended.
    pub fn set_connection_limit(&self, limit: ConnectionLimit) -> Result<()> {
        limit.check().map_err(|e| e.doing(format!("{}: set_connection_limit", self.id)))?;
        self.user("set_connection_limit", move |user| user.set_connection_limit(limit))
    }

    /// Returns the counters of its `capture`, also after the VM's end; `None` without one.
    pub fn capture_stats(&self) -> Option<CaptureStats> {
        self.capture.as_ref().map(CaptureCounters::stats)
    }

    fn user<R: Send + 'static>(&self, what: &str, f: impl FnOnce(&mut UserStack) -> R + Send + 'static) -> Result<R> {
        let none = || Error::new(ErrorKind::Unsupported, "the card is not on a Net::user");
        let answer = self.device.with(move |card, io| card.with_user(io, f)).and_then(|answer| answer.ok_or_else(none));
        answer.map_err(|e| e.doing(format!("{}: {what}", self.id)))
    }

    /// Sets the link up or down.
    ///
    /// While it is down nothing is delivered, and what the guest sends is lost. Waits for the VM's event loop.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn set_link(&self, up: bool) -> Result<()> {
        let set = self.device.with(move |card, io| card.set_link(io, up));
        set.map_err(|e| e.doing(format!("{}: changing the link", self.id)))
    }

    /// Returns how many frames were dropped because they made no sense.
    ///
    /// Those are malformed frames of the guest, and frames to it that left it work which it had not agreed to do.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn dropped(&self) -> Result<u64> {
        self.device.with(|card, _| card.dropped()).map_err(|e| e.doing(format!("{}: counting", self.id)))
    }
}
