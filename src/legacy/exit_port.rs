//! One port, by which a guest says that it has ended and how.
//!
//! The values are those of an ACPI sleep control register (ACPI 6.5, 4.8.3.7: sleep type in bits 2 to 4, enable in
//! bit 5), so that the port can be named in tables too: type 5 is power-off.

use crate::bus::BusDevice;

/// The port's number.
pub(crate) const EXIT_PORT: u64 = 0x600;

/// What the guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    PowerOff,
    Reboot,
    Halt,
    /// PID 1 could not go on.
    Fault,
}

/// The device: tells `on_request` what was asked, on the vCPU's thread.
pub(crate) struct ExitPort<F>(F);

impl<F: FnMut(Request) + Send> ExitPort<F> {
    pub(crate) fn new(on_request: F) -> Self {
        Self(on_request)
    }
}

impl<F: FnMut(Request) + Send> BusDevice for ExitPort<F> {
    fn read(&mut self, _: u64, _: &mut [u8]) {}

    fn write(&mut self, _: u64, data: &[u8]) {
        let request = match data {
            [0x34, ..] => Request::PowerOff,
            [0x35, ..] => Request::Reboot,
            [0x36, ..] => Request::Halt,
            [0x37, ..] => Request::Fault,
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
            (0..=u8::MAX).for_each(|value| port.write(0, &[value]));
            port.write(0, &[]);
        }
        assert_eq!(seen, [Request::PowerOff, Request::Reboot, Request::Halt, Request::Fault]);
    }
}
