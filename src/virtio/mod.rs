//! The device model: the device trait, and all that exists once for all devices.
//!
//! ```text
//!  vCPU thread                            event loop
//!  MmioTransport -- with(start/stop) -->  Slots: device + DeviceIo (queues, memory, interrupt)
//!  driver's kick == ioeventfd =========>  VirtioDevice::ready
//!  driver        <== interrupt =========  DeviceIo::drain / complete
//! ```
//! This directory never sees KVM: devices get memory, an interrupt and descriptors, so all of it runs in plain tests.

pub(crate) mod balloon;
pub(crate) mod blk;
mod chain;
mod config_space;
pub(crate) mod console;
mod device_id;
#[cfg(test)]
mod example;
mod io;
mod mmio;
pub(crate) mod net;
mod queue;
mod ring;
pub(crate) mod rng;
mod runner;
mod spec;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod testing;
pub(crate) mod turn;
pub(crate) mod vsock;

use std::any::Any;
use std::time::Duration;

pub(crate) use chain::{Chain, Span, TooShort};
pub(crate) use config_space::ConfigSpace;
pub use device_id::DeviceId;
pub(crate) use io::{Counters, DeviceIo};
pub(crate) use mmio::{MmioTransport, NOTIFY_OFFSET};
pub(crate) use runner::{DeviceHandle, Slots};
pub(crate) use spec::DeviceType;
pub(crate) use turn::Work;

use crate::event_loop::Interest;

/// What is the same about a device as long as it lives.
#[derive(Debug, Clone)]
pub(crate) struct Profile {
    /// Which device it is.
    pub device_type: DeviceType,
    /// Features of this type of device that are offered; the transport adds its own.
    pub features: u64,
    /// The largest size of each queue: powers of two.
    pub queues: Vec<u16>,
    /// Its configuration space.
    pub config: ConfigSpace,
}

impl Profile {
    /// A device of this type without queues, features or configuration space.
    pub(crate) fn new(device_type: DeviceType) -> Self {
        Self { device_type, features: 0, queues: Vec::new(), config: ConfigSpace::default() }
    }

    /// Adds a queue of at most `size` descriptors, a power of two.
    pub(crate) fn queue(mut self, size: u16) -> Self {
        self.queues.push(size);
        self
    }

    /// Offers these features.
    pub(crate) fn features(mut self, bits: u64) -> Self {
        self.features |= bits;
        self
    }

    /// Sets a configuration space that never changes.
    pub(crate) fn config(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.config_space(ConfigSpace::new(bytes))
    }

    /// Sets a configuration space that the device goes on changing or reading.
    pub(crate) fn config_space(mut self, space: ConfigSpace) -> Self {
        self.config = space;
        self
    }
}

/// What made a device look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventSource {
    /// The driver may have put something into this queue.
    Queue(usize),
    /// A descriptor that the device watches is ready.
    Watched {
        /// The number it is watched under.
        number: u32,
        /// What it is ready for.
        events: Interest,
    },
}

/// A device: what it offers, and what it does when it is dispatched.
///
/// ```text
///            start                      stop
///   idle ------------> running --------------------> idle
///        DRIVER_OK                reset by the driver
///                                 end of the VM, drop
/// ```
/// All methods run on the loop that owns the device. Nothing here may panic on what the guest wrote, and nothing may
/// block, but for a device that was given a loop of its own.
pub(crate) trait VirtioDevice: Any + Send {
    /// What never changes: type, features, queue sizes, configuration space.
    fn profile(&self) -> Profile;

    /// Became running: watch host descriptors with `io`. The queues are looked at right after this.
    ///
    /// # Errors
    /// A failure leaves the device idle; the driver sees DEVICE_NEEDS_RESET.
    fn started(&mut self, io: &mut DeviceIo) -> std::io::Result<()> {
        let _ = io;
        Ok(())
    }

    /// Something happened at `source`. Spurious calls are normal.
    fn ready(&mut self, io: &mut DeviceIo, source: EventSource);

    /// Brings what is in flight to its end, for a pause of the VM. Begins nothing, so that guest memory stands still.
    /// May block for the given time at most. False when something is still in flight then.
    fn pausing(&mut self, io: &mut DeviceIo, timeout: Duration) -> bool {
        let _ = (io, timeout);
        true
    }

    /// The VM goes on after a pause.
    fn resumed(&mut self, io: &mut DeviceIo) {
        let _ = io;
    }

    /// Serves what is left, within the given time. The VM has ended, and every queue was looked at for the last time.
    fn finishing(&mut self, io: &mut DeviceIo, timeout: Duration) {
        let _ = (io, timeout);
    }

    /// The VM has ended, whether the device ran or not; it is dropped soon.
    fn ended(&mut self) {}

    /// About to become idle: stop watching, let go of every chain. The device touches guest memory no more when this
    /// returns, but for what it gives to [`DeviceIo::hand_over`].
    fn stopping(&mut self, io: &mut DeviceIo) {
        let _ = io;
    }
}
