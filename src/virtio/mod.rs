//! The device model: the device trait, and all that exists once for all devices.
//!
//! ```text
//!  vCPU thread                            event loop
//!  transport   -- with(start/reset) -->  Slots: device + DeviceIo (queues, memory, interrupt)
//!  driver's kick == ioeventfd =========>  VirtioDevice::ready
//!  driver        <== interrupt =========  DeviceIo::for_each_request / complete
//! ```
//! This directory never sees KVM: devices get memory, an interrupt and descriptors, so all of it runs in plain tests.

pub(crate) mod balloon;
pub(crate) mod blk;
mod chain;
mod config_space;
pub(crate) mod console;
mod device_id;
mod event;
#[cfg(test)]
mod example;
mod io;
pub(crate) mod net;
mod queue;
#[cfg(test)]
mod restart_tests;
mod ring;
pub(crate) mod rng;
mod runner;
mod spec;
pub(crate) mod state;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod testing;
mod transport;
pub(crate) mod turn;
pub(crate) mod vsock;

use std::any::Any;
use std::time::Duration;

pub(crate) use chain::{Chain, Span, TooShort};
pub(crate) use config_space::ConfigSpace;
pub use device_id::DeviceId;
#[cfg(any(test, feature = "internals"))]
pub(crate) use event::KeptEvents;
pub(crate) use event::{DeviceEvent, DeviceEventSink, DeviceReporter};
pub(crate) use io::{Counters, DeviceIo};
pub(crate) use runner::{DeviceHandle, Slots};
pub(crate) use spec::DeviceType;
pub(crate) use state::DeviceState;
pub(crate) use transport::{Interrupt, LoopDevice, MmioTransport, NOTIFY_OFFSET};
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
    /// The embedder lets the VM go on, which a fault of this device may have stopped.
    Resumed,
}

/// Why a device brings what it has in flight to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DrainCause {
    /// The VM pauses: nothing new is begun, so that guest memory stands still.
    Pause,
    /// The VM has ended: what the guest handed over last is served.
    End,
}

/// A device: what it offers, and what it does when it is dispatched.
///
/// ```text
///            start(None)
///   idle -------------------> running <------------------+
///    ^       DRIVER_OK           |                       |
///    |                           | stop -> state         | start(Some(state))
///    +-------- reset ---------- stopped -----------------+
///       reset by the driver,     pause, save     resume, restore
///       end of the VM, drop
/// ```
/// All methods run on the loop that owns the device. Nothing here may panic on what the guest wrote, and nothing may
/// block, but for a device that was given a loop of its own.
pub(crate) trait VirtioDevice: Any + Send {
    /// What never changes: type, features, queue sizes, configuration space.
    fn profile(&self) -> Profile;

    /// Runs from now on: watches host descriptors with `io`. The queues are looked at right after this.
    ///
    /// `state` is where the device goes on; `None` after a reset. It may come from a file, so it is checked.
    ///
    /// # Errors
    /// A failure leaves the device idle; the driver sees DEVICE_NEEDS_RESET.
    fn start(&mut self, io: &mut DeviceIo, state: Option<&DeviceState>) -> std::io::Result<()> {
        let _ = io;
        match state {
            None | Some(DeviceState::Stateless) => Ok(()),
            Some(other) => Err(other.mismatch()),
        }
    }

    /// Something happened at `source`. Spurious calls are normal.
    fn ready(&mut self, io: &mut DeviceIo, source: EventSource);

    /// Brings what is in flight to its end, and waits for the host at most as long as given.
    ///
    /// False when something is in flight still.
    fn drain(&mut self, io: &mut DeviceIo, timeout: Duration, cause: DrainCause) -> bool {
        let _ = (io, timeout, cause);
        true
    }

    /// Stops: watches nothing, puts every chain back, and returns where it stands.
    ///
    /// The device touches guest memory no more when this returns, but for what it gives to [`DeviceIo::hand_over`]. What it
    /// has on the host, such as connections, stays for the next start.
    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        let _ = io;
        DeviceState::Stateless
    }

    /// Forgets what a driver has made of it, after it was stopped.
    fn reset(&mut self) {}

    /// The VM has ended, whether the device ran or not; it is dropped soon. Called once at most.
    fn ended(&mut self) {}
}
