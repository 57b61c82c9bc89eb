//! [`MmioSlots`]: the windows and interrupt lines of a machine that no device has.

use std::collections::BTreeSet;

use crate::arch::layout::{self, MmioSlot};
use crate::error::{Error, Result};

/// How many virtio-mmio devices a machine has room for.
pub(super) fn max_devices() -> usize {
    lines().count()
}

fn lines() -> impl Iterator<Item = u32> {
    layout::DEVICE_IRQS.filter(|irq| !layout::RESERVED_IRQS.contains(irq))
}

/// Gives out windows and interrupt lines, the lowest first, and takes them back.
#[derive(Debug)]
pub(super) struct MmioSlots {
    windows: BTreeSet<u64>,
    lines: BTreeSet<u32>,
}

impl MmioSlots {
    /// Of a machine without devices.
    pub(super) fn new() -> Self {
        let lines: BTreeSet<_> = lines().collect();
        let windows = (0..lines.len() as u64).map(|n| layout::MMIO.0 + n * layout::MMIO_WINDOW).collect();
        Self { windows, lines }
    }

    /// Takes a window and a line.
    ///
    /// # Errors
    /// `InvalidConfig` when all are in use.
    pub(super) fn take(&mut self) -> Result<MmioSlot> {
        match (self.windows.pop_first(), self.lines.pop_first()) {
            (Some(addr), Some(irq)) => Ok(MmioSlot { addr, irq }),
            _ => {
                let why = format!("more devices than the {} that the machine has interrupt lines for", max_devices());
                Err(Error::invalid("disk or net", why))
            }
        }
    }

    /// Takes back what a device had that is gone.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub(super) fn give(&mut self, MmioSlot { addr, irq }: MmioSlot) {
        let fresh = self.windows.insert(addr) & self.lines.insert(irq);
        debug_assert!(fresh, "{addr:#x} and line {irq} were given back twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_given_once_until_they_come_back() {
        let mut slots = MmioSlots::new();
        let taken: Vec<_> = (0..max_devices()).map(|_| slots.take().unwrap()).collect();
        let lines: BTreeSet<_> = taken.iter().map(|slot| slot.irq).collect();
        let windows: BTreeSet<_> = taken.iter().map(|slot| slot.addr).collect();
        assert_eq!((lines.len(), windows.len()), (max_devices(), max_devices()));
        assert!(layout::RESERVED_IRQS.iter().all(|line| !lines.contains(line)));
        let error = slots.take().unwrap_err().to_string();
        assert!(error.contains(&format!("more devices than the {}", max_devices())), "{error}");
        slots.give(taken[3]);
        let again = slots.take().unwrap();
        assert_eq!((again.addr, again.irq), (taken[3].addr, taken[3].irq));
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "given back twice")]
    fn a_slot_that_is_given_back_twice_is_found() {
        MmioSlots::new().give(MmioSlot { addr: layout::MMIO.0, irq: 5 });
    }
}
