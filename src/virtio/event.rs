//! [`DeviceEvent`]: what a device reports beside serving its driver, and [`DeviceReporter`], the one way there.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::DeviceId;
use super::blk::DiskError;
use crate::network::Denial;
use crate::rate::{Bucket, Rate};

/// Reports that a device needs a reset: ten at once, then one a second.
const RESET_REPORTS: Rate = Rate::per_second(1).one_time_burst(10);

/// What a device reports. What a guest can cause again and again is reported at a bounded rate.
#[derive(Debug)]
pub(crate) enum DeviceEvent {
    /// A driver has made it run. Reported on a vCPU's thread.
    DriverReady,
    /// It cannot go on until its driver resets it, for this reason.
    NeedsReset(String),
    /// It will not serve its guest again, for this reason: it has panicked, our own mistake, or its driver did not reset it.
    Failed(String),
    /// Requests or frames wait for its limit.
    Throttled,
    /// The host could not do what the guest asked of a disk.
    DiskError(DiskError),
    /// A disk's file system has so many bytes left, which are few.
    LowSpace(u64),
    /// A backend of a network card has ended, for this reason.
    BackendLost(io::Error),
    /// The policy of a network denied something to the guest.
    Denied(Denial),
    /// The balloon has so many bytes, as it was asked to, or as its guest wants.
    BalloonSettled(u64),
}

/// Takes the events of a VM's devices.
pub(crate) trait DeviceEventSink: Send + Sync {
    /// Takes an event of `device`. On the thread of the device or a vCPU, so this must not block.
    fn take(&self, device: DeviceId, event: DeviceEvent);
}

/// By which one device reports its events. Clones are the same.
#[derive(Clone)]
pub(crate) struct DeviceReporter(Arc<Reporting>);

struct Reporting {
    device: DeviceId,
    sink: Arc<dyn DeviceEventSink>,
    resets: Mutex<ResetReports>,
    epoch: Instant,
}

/// How often resets were needed.
struct ResetReports {
    bucket: Bucket,
    suppressed: u64,
}

impl DeviceReporter {
    pub(crate) fn new(device: DeviceId, sink: Arc<dyn DeviceEventSink>) -> Self {
        let resets = ResetReports { bucket: Bucket::new(RESET_REPORTS, Duration::ZERO), suppressed: 0 };
        Self(Arc::new(Reporting { device, sink, resets: Mutex::new(resets), epoch: Instant::now() }))
    }

    /// Reports an event. Never waits.
    pub(crate) fn report(&self, event: DeviceEvent) {
        self.0.sink.take(self.0.device, event);
    }

    /// Reports that the device needs a reset, and logs it.
    ///
    /// Of a flood only some are reported: a driver that resets the device may break it again at once.
    pub(crate) fn report_needs_reset(&self, why: &str) {
        let mut resets = self.0.resets.lock().unwrap_or_else(PoisonError::into_inner);
        if !resets.bucket.take_whole(self.0.epoch.elapsed()) {
            resets.suppressed += 1;
            return;
        }
        let suppressed = std::mem::take(&mut resets.suppressed);
        drop(resets);
        log::warn!("{} needs a reset: {why} ({suppressed} times more before)", self.0.device);
        self.report(DeviceEvent::NeedsReset(why.to_owned()));
    }
}

impl fmt::Debug for DeviceReporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceReporter({})", self.0.device)
    }
}

/// Keeps all events, for tests to look at.
#[cfg(any(test, feature = "internals"))]
#[derive(Default)]
pub(crate) struct KeptEvents(Mutex<Vec<DeviceEvent>>);

#[cfg(any(test, feature = "internals"))]
impl KeptEvents {
    /// Returns a reporter of no particular device, and where its events are kept.
    pub(crate) fn reporter() -> (DeviceReporter, Arc<Self>) {
        let kept = Arc::<Self>::default();
        (DeviceReporter::new(DeviceId::Rng, kept.clone()), kept)
    }

    /// Takes what was reported since this was last called.
    #[cfg(test)]
    pub(crate) fn drain(&self) -> Vec<DeviceEvent> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(any(test, feature = "internals"))]
impl DeviceEventSink for KeptEvents {
    fn take(&self, _: DeviceId, event: DeviceEvent) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Benches and fuzzing look at none.
        if cfg!(test) {
            kept.push(event);
        }
    }
}
