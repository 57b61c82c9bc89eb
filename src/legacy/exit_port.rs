//! The register by which a guest reports its end, and that of its status.
//!
//! The values are those of an ACPI sleep control register (ACPI 6.5, 4.8.3.7: sleep type in bits 2 to 4, enable in bit
//! 5). ACPI tables name it so: type 5 is power-off. The status register reads as zero.

use super::GuestEnd;
use crate::bus::BusDevice;

const CONTROL: u64 = 0;

/// The device: calls `on_end` with how the guest ends, on the vCPU's thread.
pub(crate) struct ExitPort<F>(F);

impl<F: FnMut(GuestEnd) + Send> ExitPort<F> {
    /// How many registers it has, of one byte each.
    pub(crate) const LEN: u64 = 2;

    pub(crate) fn new(on_end: F) -> Self {
        Self(on_end)
    }
}

impl<F: FnMut(GuestEnd) + Send> BusDevice for ExitPort<F> {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        let end = match (offset, data) {
            (CONTROL, [0x34, ..]) => GuestEnd::PowerOff,
            (CONTROL, [0x35, ..]) => GuestEnd::Reset,
            (CONTROL, [0x36, ..]) => GuestEnd::Halt,
            (CONTROL, [0x37, ..]) => GuestEnd::InitFault,
            _ => return,
        };
        (self.0)(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_requests_are_passed_on() {
        let mut seen = Vec::new();
        {
            let mut port = ExitPort::new(|end| seen.push(end));
            (0..=u8::MAX).for_each(|value| port.write(CONTROL, &[value]));
            (0..=u8::MAX).for_each(|value| port.write(CONTROL + 1, &[value]));
            port.write(CONTROL, &[]);
        }
        assert_eq!(seen, [GuestEnd::PowerOff, GuestEnd::Reset, GuestEnd::Halt, GuestEnd::InitFault]);
    }
}
