//! A device's interrupt, and the registers beside it, which the guest reads.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::RegisterPage;

/// InterruptStatus, a register (Virtio 1.3, 4.2.2).
const INTERRUPT_STATUS: usize = 0x060;
/// "Used buffer notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 0).
const USED: u32 = 1;
/// "Configuration change notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 1).
const CONFIG: u32 = 2;

/// Status, a register (Virtio 1.3, 4.2.2).
const STATUS: usize = 0x070;
/// DEVICE_NEEDS_RESET (Virtio 1.3, 2.1).
const NEEDS_RESET: u32 = 64;

/// Raised by the device's thread, acknowledged by vCPU threads. Clones are the same interrupt.
#[derive(Debug, Clone)]
pub(crate) struct Interrupt(Arc<Line>);

struct Line {
    edge: Box<dyn Fn() + Send + Sync>,
    registers: RegisterPage,
    raised: AtomicU64,
}

impl Interrupt {
    /// `edge` raises it; on the thread that has something to tell, so it must not block.
    pub(crate) fn new(registers: RegisterPage, edge: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Line { edge: Box::new(edge), registers, raised: AtomicU64::new(0) }))
    }

    /// The registers of its device.
    pub(crate) fn registers(&self) -> &RegisterPage {
        &self.0.registers
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
    pub(crate) fn signal_needs_reset(&self) {
        self.0.registers.set(STATUS, NEEDS_RESET);
        self.signal_config();
    }

    /// Whether the device waits for a reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.0.registers.load(STATUS) & NEEDS_RESET != 0
    }

    /// As if nothing had happened: the driver has reset the device.
    pub(crate) fn reset(&self) {
        self.0.registers.store(INTERRUPT_STATUS, 0);
        self.0.registers.store(STATUS, 0);
    }

    /// Interrupts the driver unless all bits were set. When it acknowledges those, it looks at everything anyway.
    fn raise(&self, bits: u32) {
        if self.0.registers.set(INTERRUPT_STATUS, bits) & bits != bits {
            self.0.raised.fetch_add(1, Ordering::Relaxed);
            (self.0.edge)();
        }
    }

    /// The driver has seen these bits.
    pub(crate) fn acknowledge(&self, bits: u32) {
        self.0.registers.clear(INTERRUPT_STATUS, bits);
    }

    /// How often it was raised.
    pub(crate) fn raised(&self) -> u64 {
        self.0.raised.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Line({:#x})", self.registers.load(INTERRUPT_STATUS))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_kept_until_acknowledged() {
        let edges = Arc::new(AtomicU64::new(0));
        let (counted, registers) = (edges.clone(), RegisterPage::alone().unwrap());
        let status = || registers.load(0x60);
        let interrupt = Interrupt::new(registers.clone(), move || _ = counted.fetch_add(1, Ordering::Relaxed));
        interrupt.signal_used();
        interrupt.signal_used();
        interrupt.signal_config();
        assert_eq!((status(), interrupt.raised(), edges.load(Ordering::Relaxed)), (3, 2, 2));
        interrupt.acknowledge(1);
        assert_eq!(status(), 2);
        interrupt.signal_used();
        assert_eq!((status(), edges.load(Ordering::Relaxed)), (3, 3));
        interrupt.signal_needs_reset();
        assert!(interrupt.needs_reset());
        interrupt.reset();
        assert_eq!((status(), interrupt.needs_reset()), (0, false));
    }
}
