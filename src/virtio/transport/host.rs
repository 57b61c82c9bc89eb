//! Where a transport's device runs: [`LoopDevice`] on an event loop, or a test's own thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Interrupt, START_STOP_TIMEOUT};
use crate::error::Result;
use crate::event_loop::Remote;
use crate::memory::IoQueue;
use crate::sys::EventFd;
use crate::virtio::io::Counters;
use crate::virtio::queue::{Queue, QueuePositions};
use crate::virtio::state::DeviceState;
use crate::virtio::{DeviceReporter, Slots};

/// What a device is given when its driver is ready, but for what the loop adds.
pub(crate) struct DeviceSetup {
    /// In the order of the device's queues; or why the driver's do not make sense.
    pub queues: std::result::Result<Vec<Queue>, String>,
    pub kicks: Arc<[EventFd]>,
    pub interrupt: Interrupt,
    pub counters: Arc<Counters>,
    /// What driver and device have agreed on.
    pub features: u64,
    pub reporter: DeviceReporter,
    /// Where the device goes on; `None` after a reset.
    pub state: Option<DeviceState>,
}

/// What a device had in flight when it was stopped, and the host has not ended yet. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct UnfinishedIo(Arc<Mutex<Option<IoQueue>>>);

impl UnfinishedIo {
    pub(crate) fn get(&self) -> MutexGuard<'_, Option<IoQueue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is left of a device that was stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct StoppedDevice {
    /// In the order of its queues.
    pub positions: Vec<QueuePositions>,
    pub state: DeviceState,
}

/// Starts and stops one device, on whatever thread it runs.
pub(crate) trait DeviceHost {
    /// Starts the device; false when it cannot run, and its driver was notified.
    ///
    /// # Errors
    /// `TimedOut` when the device's thread is busy, `InvalidState` when it has ended.
    fn start(&self, setup: DeviceSetup) -> Result<bool>;

    /// Stops the device for good: what the driver has set up is let go. What stays in flight is put into `unfinished`, also
    /// after the time-out.
    ///
    /// # Errors
    /// As [`DeviceHost::start`].
    fn reset(&self, unfinished: UnfinishedIo) -> Result<()>;

    /// Returns the state of a device that a pause has stopped; `None` when it did not run before.
    ///
    /// # Errors
    /// As [`DeviceHost::start`]; `InvalidState` when the device runs.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    fn save(&self) -> Result<Option<StoppedDevice>>;
}

/// A device on an event loop.
#[derive(Clone)]
pub(crate) struct LoopDevice {
    pub remote: Remote<Slots>,
    pub slot: usize,
}

impl DeviceHost for LoopDevice {
    fn start(&self, setup: DeviceSetup) -> Result<bool> {
        let slot = self.slot;
        self.remote.with_timeout(START_STOP_TIMEOUT, move |slots| slots.start(slot, setup))
    }

    fn reset(&self, unfinished: UnfinishedIo) -> Result<()> {
        let slot = self.slot;
        self.remote.with_timeout(START_STOP_TIMEOUT, move |slots| {
            if let Some(io_queue) = slots.reset(slot) {
                *unfinished.get() = Some(io_queue);
            }
        })
    }

    fn save(&self) -> Result<Option<StoppedDevice>> {
        let slot = self.slot;
        self.remote.with_timeout(START_STOP_TIMEOUT, move |slots| slots.save(slot))?
    }
}
