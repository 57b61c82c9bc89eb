//! The register of the machine's event device, by which ACPI asks what has happened.
//!
//! The device is the Generic Event Device of ACPI 6.5, 5.6.9: an interrupt, and a method that the kernel calls at each. Ours reads
//! this register, a bit for each kind of event; reading takes them. Kernels without ACPI do not know it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::BusDevice;
use crate::error::{Context, Result};
use crate::sys::{EventFd, eventfd};

/// What a guest learns by ACPI. The values are the register's bits, which the machine's tables name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum MachineEvent {
    /// The machine's generation has changed: it is a copy of one that was saved.
    NewGeneration = 1 << 0,
    /// The power button is pressed.
    PowerButton = 1 << 1,
}

/// The register. It holds at most one event of each kind.
#[derive(Debug)]
pub(crate) struct EventDevice {
    pending: Arc<AtomicU8>,
}

/// By which others raise events. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct EventSender {
    pending: Arc<AtomicU8>,
    interrupt: Arc<EventFd>,
}

impl EventDevice {
    /// How many addresses it has.
    pub(crate) const LEN: u64 = 1;

    /// The register, what raises events, and the descriptor of the interrupt.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new() -> Result<(Self, EventSender, Arc<EventFd>)> {
        let interrupt = Arc::new(eventfd().doing(|| "creating the event device")?);
        let pending = Arc::<AtomicU8>::default();
        let sender = EventSender { pending: pending.clone(), interrupt: interrupt.clone() };
        Ok((Self { pending }, sender, interrupt))
    }
}

impl EventSender {
    /// Returns the events that the guest has not read, as the register's bits.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    pub(crate) fn pending(&self) -> u8 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Has these events pending and no others, and raises the interrupt for them.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    pub(crate) fn set_pending(&self, pending: u8) {
        self.pending.store(pending, Ordering::SeqCst);
        if pending != 0 {
            let _ = self.interrupt.write(1);
        }
    }

    /// Tells the guest of `event`, if it uses ACPI. Never waits.
    pub(crate) fn raise(&self, event: MachineEvent) {
        // The bit before the edge: who sees the interrupt finds it.
        self.pending.fetch_or(event as u8, Ordering::SeqCst);
        // The only failure is a counter at its maximum: the interrupt is pending then already.
        let _ = self.interrupt.write(1);
    }
}

impl BusDevice for EventDevice {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        if let Some(first) = data.first_mut() {
            *first = self.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&mut self, _: u64, _: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_once_and_do_not_add_up() {
        let (mut device, sender, interrupt) = EventDevice::new().unwrap();
        let mut data = [0xff; 2];
        for _ in 0..1000 {
            sender.raise(MachineEvent::PowerButton);
            sender.raise(MachineEvent::NewGeneration);
        }
        device.write(0, &[0]);
        device.read(0, &mut data[..1]);
        assert_eq!((data[0], interrupt.read().unwrap()), (3, 2000));
        device.read(0, &mut data[..1]);
        assert_eq!(data[0], 0);
        device.read(0, &mut []);
    }
}
