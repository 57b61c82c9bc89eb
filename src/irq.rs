//! A device's interrupt: a descriptor that the hypervisor turns into an interrupt, and the status bits beside it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::error::{Context, Result};
use crate::sys::{EventFd, eventfd};

/// "Used buffer notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 0).
const USED: u32 = 1;
/// "Configuration change notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 1).
const CONFIG: u32 = 2;

/// Raised by the device's thread, read and acknowledged by vCPU threads. Clones are the same interrupt.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt(Arc<Line>);

#[derive(Debug)]
struct Line {
    fd: EventFd,
    status: AtomicU32,
    raised: AtomicU64,
    /// The device cannot go on (Virtio 1.3, 2.1: DEVICE_NEEDS_RESET).
    broken: AtomicBool,
}

impl Interrupt {
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new() -> Result<Self> {
        let fd = eventfd().doing(|| "creating an interrupt")?;
        Ok(Self(Arc::new(Line {
            fd,
            status: AtomicU32::new(0),
            raised: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        })))
    }

    /// What the hypervisor listens to (KVM API, 4.75).
    pub(crate) fn fd(&self) -> &EventFd {
        &self.0.fd
    }

    /// Buffers were used.
    pub(crate) fn signal_used(&self) {
        self.raise(USED);
    }

    /// Configuration space changed.
    pub(crate) fn signal_config(&self) {
        self.raise(CONFIG);
    }

    /// The device cannot go on until the driver resets it.
    pub(crate) fn signal_broken(&self) {
        self.0.broken.store(true, Ordering::SeqCst);
        self.signal_config();
    }

    /// Whether the device waits for a reset.
    pub(crate) fn broken(&self) -> bool {
        self.0.broken.load(Ordering::SeqCst)
    }

    /// As if nothing had happened: the driver has reset the device.
    pub(crate) fn reset(&self) {
        self.0.status.store(0, Ordering::SeqCst);
        self.0.broken.store(false, Ordering::SeqCst);
    }

    fn raise(&self, bits: u32) {
        self.0.status.fetch_or(bits, Ordering::SeqCst);
        self.0.raised.fetch_add(1, Ordering::Relaxed);
        // The only failure is a counter at its maximum: the interrupt is pending then already.
        let _ = self.0.fd.write(1);
    }

    /// The status register.
    pub(crate) fn status(&self) -> u32 {
        self.0.status.load(Ordering::SeqCst)
    }

    /// The driver has seen these bits.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// How often it was raised.
    pub(crate) fn raised(&self) -> u64 {
        self.0.raised.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_kept_until_acknowledged() {
        let interrupt = Interrupt::new().unwrap();
        interrupt.signal_used();
        interrupt.signal_config();
        assert_eq!((interrupt.status(), interrupt.raised(), interrupt.fd().read().unwrap()), (3, 2, 2));
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
        interrupt.signal_broken();
        assert!(interrupt.broken());
        interrupt.reset();
        assert_eq!((interrupt.status(), interrupt.broken()), (0, false));
    }
}
