//! What a device and the core of its transport share: status and interrupts.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::virtio::spec::status;

/// What one kind of transport does for its device.
///
/// Called by the device's thread and by vCPU threads, so nothing here may block.
pub(crate) trait TransportOps: Send + Sync {
    /// Interrupts the driver, because buffers of this queue were used (Virtio 1.3, 2.7.7).
    fn signal_queue(&self, queue: usize);

    /// Interrupts the driver, because configuration space or the status has changed (Virtio 1.3, 2.3).
    fn signal_config(&self);

    /// Shows the driver these status bits, beside those that it sees (Virtio 1.3, 2.1).
    fn add_status(&self, bits: u32);

    /// Shows the driver a status of 0, and takes back every interrupt that it has not acknowledged.
    fn reset(&self);

    /// Returns the interrupts that the driver has not acknowledged, as InterruptStatus has them (Virtio 1.3, 4.2.2).
    fn pending(&self) -> u32;

    /// Shows these interrupts again after the state was restored, and raises them.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone restore"))]
    fn set_pending(&self, pending: u32);

    /// Returns how often the driver was interrupted.
    fn raised(&self) -> u64;
}

/// Where a driver reads a configuration space.
pub(crate) trait ConfigView: Send {
    /// Shows ConfigGeneration (Virtio 1.3, 2.5.3).
    fn show_generation(&self, generation: u32);

    /// Shows the contents.
    fn show(&self, bytes: &[u8]);
}

/// A device's status and interrupts. Clones are the same.
#[derive(Clone)]
pub(crate) struct Interrupt(Arc<Shared>);

struct Shared {
    /// All status bits. The transport's core adds the driver's, the device adds DEVICE_NEEDS_RESET.
    status: AtomicU32,
    ops: Box<dyn TransportOps>,
}

impl Interrupt {
    pub(super) fn new(ops: impl TransportOps + 'static) -> Self {
        Self(Arc::new(Shared { status: AtomicU32::new(0), ops: Box::new(ops) }))
    }

    /// Interrupts the driver: buffers of this queue were used.
    pub(crate) fn signal_used(&self, queue: usize) {
        self.0.ops.signal_queue(queue);
    }

    /// Interrupts the driver: configuration space has changed.
    pub(crate) fn signal_config(&self) {
        self.0.ops.signal_config();
    }

    /// Sets DEVICE_NEEDS_RESET: the device cannot go on until the driver resets it (Virtio 1.3, 2.1.2).
    pub(crate) fn signal_needs_reset(&self) {
        self.add_status(status::NEEDS_RESET);
        self.signal_config();
    }

    /// Returns whether the device waits for a reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Returns how often the driver was interrupted.
    pub(crate) fn raised(&self) -> u64 {
        self.0.ops.raised()
    }

    pub(super) fn status(&self) -> u32 {
        self.0.status.load(Ordering::SeqCst)
    }

    pub(super) fn add_status(&self, bits: u32) {
        self.0.status.fetch_or(bits, Ordering::SeqCst);
        self.0.ops.add_status(bits);
    }

    /// Forgets everything: the driver has reset the device.
    pub(super) fn reset(&self) {
        self.0.ops.reset();
        self.0.status.store(0, Ordering::SeqCst);
    }

    /// Raises it once more where the driver has not acknowledged everything: its last edge may have been lost.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn raise_pending(&self) {
        self.set_pending(self.pending());
    }

    pub(super) fn pending(&self) -> u32 {
        self.0.ops.pending()
    }

    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone restore"))]
    pub(super) fn set_pending(&self, pending: u32) {
        self.0.ops.set_pending(pending);
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Interrupt(status {:#x}, pending {:#x})", self.status(), self.pending())
    }
}
