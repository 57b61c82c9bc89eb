//! A device's interrupt: how to raise it, and the status bits beside it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// "Used buffer notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 0).
const USED: u32 = 1;
/// "Configuration change notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 1).
const CONFIG: u32 = 2;

/// Raised by the device's thread, read and acknowledged by vCPU threads. Clones are the same interrupt.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt(Arc<Line>);

struct Line {
    edge: Box<dyn Fn() + Send + Sync>,
    status: AtomicU32,
    raised: AtomicU64,
    /// The device cannot go on (Virtio 1.3, 2.1: DEVICE_NEEDS_RESET).
    broken: AtomicBool,
}

impl Interrupt {
    /// `edge` raises it; on the thread that has something to tell, so it must not block.
    pub(crate) fn new(edge: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Line {
            edge: Box::new(edge),
            status: AtomicU32::new(0),
            raised: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        }))
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

    /// A driver that has not acknowledged the bits yet looks at everything when it has, so it is not told again.
    fn raise(&self, bits: u32) {
        if self.0.status.fetch_or(bits, Ordering::SeqCst) & bits != bits {
            self.0.raised.fetch_add(1, Ordering::Relaxed);
            (self.0.edge)();
        }
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

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Line({:#x})", self.status.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_kept_until_acknowledged() {
        let edges = Arc::new(AtomicU64::new(0));
        let counted = edges.clone();
        let interrupt = Interrupt::new(move || _ = counted.fetch_add(1, Ordering::Relaxed));
        interrupt.signal_used();
        interrupt.signal_used();
        interrupt.signal_config();
        assert_eq!((interrupt.status(), interrupt.raised(), edges.load(Ordering::Relaxed)), (3, 2, 2));
        interrupt.acknowledge(1);
        assert_eq!(interrupt.status(), 2);
        interrupt.signal_used();
        assert_eq!((interrupt.status(), edges.load(Ordering::Relaxed)), (3, 3));
        interrupt.signal_broken();
        assert!(interrupt.broken());
        interrupt.reset();
        assert_eq!((interrupt.status(), interrupt.broken()), (0, false));
    }
}
