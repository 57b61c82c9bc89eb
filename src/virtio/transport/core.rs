//! What every transport has: the status machine, features, queues, start and reset.
//!
//! Used by vCPU threads, under the lock of the transport around it. The queues live on the device's thread. A DRIVER_OK
//! write returns after that thread has started the device.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{DeviceHost, DeviceSetup, Interrupt, UnfinishedIo};
use crate::error::{Context, ErrorKind, Result};
use crate::memory::GuestMemory;
use crate::sys::{EventFd, eventfd};
use crate::virtio::io::Counters;
use crate::virtio::queue::{Queue, QueueConfig, QueuePositions};
use crate::virtio::spec::{F_EVENT_IDX, F_VERSION_1, TRANSPORT_FEATURES, status};
use crate::virtio::state::DeviceState;
use crate::virtio::{DeviceEvent, DeviceReporter, Profile};

/// How long a vCPU waits in all for a device that starts or stops. A device on a file that does not answer would never
/// do so. Only that vCPU waits. To pause or end the VM waits for this vCPU as long.
pub(crate) const START_STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The transport of one device, but for its registers.
pub(crate) struct Transport<H> {
    pub(super) profile: Profile,
    memory: GuestMemory,
    pub(super) host: H,
    pub(super) interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    counters: Arc<Counters>,
    reporter: DeviceReporter,
    /// What the device had in flight when it was reset. It is kept here when the reset has given up meanwhile.
    unfinished_io: UnfinishedIo,
    /// Which word of the features the driver reads, and which it writes.
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    /// The queue that the driver sets up.
    pub(super) queue_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queues: Vec<QueueConfig>,
}

impl<H: DeviceHost> Transport<H> {
    /// Makes the transport of a device with this profile, which runs on `host` and reports by `reporter`.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(super) fn new(
        profile: Profile,
        memory: GuestMemory,
        host: H,
        interrupt: Interrupt,
        reporter: DeviceReporter,
    ) -> Result<Self> {
        let kicks: Result<Vec<_>> =
            profile.queues.iter().map(|_| eventfd().doing(|| "creating a queue's kick")).collect();
        Ok(Self {
            queues: vec![QueueConfig::default(); profile.queues.len()],
            kicks: kicks?.into(),
            interrupt,
            counters: Arc::default(),
            reporter,
            profile,
            memory,
            host,
            unfinished_io: UnfinishedIo::default(),
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            driver_features: 0,
        })
    }

    pub(super) fn kicks(&self) -> &Arc<[EventFd]> {
        &self.kicks
    }

    pub(super) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    #[cfg(test)]
    pub(super) fn unfinished_io(&self) -> &UnfinishedIo {
        &self.unfinished_io
    }

    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub(super) fn take_unfinished_io(&mut self) -> Option<crate::memory::IoQueue> {
        self.unfinished_io.get().take()
    }

    fn offered(&self) -> u64 {
        self.profile.features | TRANSPORT_FEATURES
    }

    /// Returns the word of the offered features that the driver has selected.
    pub(super) fn device_features(&self) -> u32 {
        match self.device_features_sel {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        }
    }

    /// Accepts features in the selected word, before FEATURES_OK and not after (Virtio 1.3, 2.2).
    pub(super) fn set_driver_features(&mut self, value: u32) {
        let status = self.interrupt.status();
        if status & status::FEATURES_OK != 0 || status & status::DRIVER == 0 {
            return;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features = self.driver_features & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }

    /// Returns the selected queue, and its largest size.
    pub(super) fn selected_queue(&self) -> Option<(&QueueConfig, u16)> {
        let n = self.queue_sel as usize;
        Some((self.queues.get(n)?, *self.profile.queues.get(n)?))
    }

    /// Returns the selected queue to be set up. A running device's queues are its thread's (Virtio 1.3, 4.2.3.2).
    pub(super) fn selected_queue_mut(&mut self) -> Option<&mut QueueConfig> {
        if self.interrupt.status() & status::DRIVER_OK != 0 {
            return None;
        }
        self.queues.get_mut(self.queue_sel as usize)
    }

    /// Kicks a queue, where the hypervisor does not.
    pub(super) fn notify(&self, queue: u32) {
        if let Some(kick) = self.kicks.get(queue as usize) {
            // A full counter is readable, which is all that is wanted.
            let _ = kick.write(1);
        }
    }

    /// Adds the driver's status bits one after the other; 0 resets (Virtio 1.3, 3.1.1).
    pub(super) fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let before = self.interrupt.status() & !status::NEEDS_RESET;
        let added = value & !before;
        // Bits are never taken away but by a reset.
        if before & !value != 0 {
            return;
        }
        self.interrupt.add_status(added & !(status::FEATURES_OK | status::DRIVER_OK | status::NEEDS_RESET));
        if added & status::FEATURES_OK != 0 && self.features_acceptable() {
            self.interrupt.add_status(status::FEATURES_OK);
        }
        // A device that needs a reset is not started before it had one, however often the driver asks.
        let may_start = self.interrupt.status() & status::FEATURES_OK != 0 && !self.interrupt.needs_reset();
        if added & status::DRIVER_OK != 0 && may_start {
            let queues = self.make_queues(None);
            match self.start(queues, None) {
                Ok(true) => {
                    self.interrupt.add_status(status::DRIVER_OK);
                    self.reporter.report(DeviceEvent::DriverReady);
                }
                // The device needs a reset, and the driver was notified.
                Ok(false) => {}
                Err(error) => {
                    self.counters.driver_errors.fetch_add(1, Ordering::Relaxed);
                    self.reporter.report_needs_reset(&format!("it cannot start: {error}"));
                    self.interrupt.signal_needs_reset();
                }
            }
        }
    }

    pub(super) fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & F_VERSION_1 != 0
    }

    /// Makes the queues that the driver has set up, each at its position.
    pub(super) fn make_queues(&self, positions: Option<&[QueuePositions]>) -> std::result::Result<Vec<Queue>, String> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let make = |(n, (config, max)): (usize, (&QueueConfig, &u16))| {
            if !config.ready {
                // Drivers leave out queues of features they do not use.
                return Ok(Queue::unused(&self.memory));
            }
            let positions = positions.and_then(|all| all.get(n)).cloned().unwrap_or_default();
            Queue::new(config, *max, event_idx, &self.memory)
                .and_then(|queue| queue.at(positions))
                .map_err(|e| format!("queue {n}: {e}"))
        };
        self.queues.iter().zip(&self.profile.queues).enumerate().map(make).collect()
    }

    /// Hands the queues to the device's thread; returns when the device runs, or false when it cannot.
    pub(super) fn start(
        &self,
        queues: std::result::Result<Vec<Queue>, String>,
        state: Option<DeviceState>,
    ) -> Result<bool> {
        self.host.start(DeviceSetup {
            queues,
            kicks: self.kicks.clone(),
            interrupt: self.interrupt.clone(),
            counters: self.counters.clone(),
            features: self.driver_features,
            reporter: self.reporter.clone(),
            state,
        })
    }

    fn reset(&mut self) {
        let deadline = Instant::now() + START_STOP_TIMEOUT;
        // The queues are let go: the driver will set up new ones.
        match self.host.reset(self.unfinished_io.clone()) {
            // The device may still use its queues, so the driver does not see a status of 0 (Virtio 1.3, 2.4.2).
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                log::warn!("a device was not reset: {error}");
                return;
            }
            Err(error) => log::debug!("a device was reset after its thread had ended: {error}"),
            Ok(()) => {}
        }
        // This vCPU waits for it, and no other device.
        let timeout = deadline.saturating_duration_since(Instant::now());
        let unfinished = self.unfinished_io.get().take();
        if let Some(mut io_queue) = unfinished
            && !io_queue.stop(timeout)
        {
            *self.unfinished_io.get() = Some(io_queue);
            log::warn!("a device was not reset: the host still moves bytes from or to guest memory");
            return;
        }
        self.interrupt.reset();
        (self.device_features_sel, self.driver_features_sel, self.driver_features, self.queue_sel) = (0, 0, 0, 0);
        self.queues.fill(QueueConfig::default());
    }
}
