//! The ports by which a guest reports its end, and reads their status.
//!
//! The values are those of an ACPI sleep control register (ACPI 6.5, 4.8.3.7: sleep type in bits 2 to 4, enable in bit
//! 5). The ACPI tables name the ports so: type 5 is power-off. The status register reads as zero.

use std::ops::Range;

use crate::arch::layout::EXIT_PORT;
use crate::bus::BusDevice;

/// Where it answers: first port, and how many.
pub(crate) const EXIT_PORTS: Range<u64> = EXIT_PORT..EXIT_PORT + 2;
const CONTROL: u64 = 0;

/// What the guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitPortRequest {
    PowerOff,
    Reboot,
    Halt,
    /// PID 1 could not go on.
    Fault,
}

/// The device: tells `on_request` what was asked, on the vCPU's thread.
pub(crate) struct ExitPort<F>(F);

impl<F: FnMut(ExitPortRequest) + Send> ExitPort<F> {
    pub(crate) fn new(on_request: F) -> Self {
        Self(on_request)
    }
}

impl<F: FnMut(ExitPortRequest) + Send> BusDevice for ExitPort<F> {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        let request = match (offset, data) {
            (CONTROL, [0x34, ..]) => ExitPortRequest::PowerOff,
            (CONTROL, [0x35, ..]) => ExitPortRequest::Reboot,
            (CONTROL, [0x36, ..]) => ExitPortRequest::Halt,
            (CONTROL, [0x37, ..]) => ExitPortRequest::Fault,
            _ => return,
        };
        (self.0)(request);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_requests_are_passed_on() {
        let mut seen = Vec::new();
        {
            let mut port = ExitPort::new(|request| seen.push(request));
            (0..=u8::MAX).for_each(|value| port.write(CONTROL, &[value]));
            (0..=u8::MAX).for_each(|value| port.write(CONTROL + 1, &[value]));
            port.write(CONTROL, &[]);
        }
        assert_eq!(
            seen,
            [ExitPortRequest::PowerOff, ExitPortRequest::Reboot, ExitPortRequest::Halt, ExitPortRequest::Fault]
        );
    }
}
