//! How the machine ends, and the last words on the console. Runs on the shim's one thread, also from its panic.

use super::sys;
use crate::proto::{EXIT_FAULT, EXIT_HALT, EXIT_PORT, EXIT_POWER_OFF, EXIT_REBOOT, End};

/// A number as text, without the machinery of `core::fmt`.
pub(super) struct Decimal {
    digits: [u8; 20],
    start: usize,
}

impl Decimal {
    pub(super) fn new(mut number: u64) -> Self {
        let mut digits = [b'0'; 20];
        let mut start = digits.len();
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
            start -= 1;
            if number == 0 {
                break;
            }
        }
        Self { digits, start }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        self.digits.get(self.start..).unwrap_or_default()
    }
}

/// Writes one line on the console. In one call, so that the kernel's lines do not fall into it.
pub(super) fn say(parts: &[&[u8]]) {
    let mut line = [0u8; 512];
    let mut length = 0;
    let whole = [&b"cofferdam: "[..]].into_iter().chain(parts.iter().copied()).flatten();
    for (to, from) in line.iter_mut().take(511).zip(whole) {
        *to = *from;
        length += 1;
    }
    if let Some(to) = line.get_mut(length) {
        *to = b'\n';
        length += 1;
    }
    let _ = sys::write_raw(2, line.get(..length).unwrap_or_default());
}

/// Ends the machine as it was asked to.
pub(super) fn end(end: End) -> ! {
    match end {
        End::PowerOff => leave(EXIT_POWER_OFF, sys::RB_POWER_OFF),
        End::Reboot => leave(EXIT_REBOOT, sys::RB_RESTART),
        End::Halt => leave(EXIT_HALT, sys::RB_HALT),
    }
}

/// Ends the machine because the shim cannot go on.
pub(super) fn fault() -> ! {
    leave(EXIT_FAULT, sys::RB_POWER_OFF)
}

fn leave(value: u8, command: usize) -> ! {
    // A machine without ACPI has no way of its own to switch off, so the VMM offers one. Others do not notice this write.
    let _ = sys::write_port(EXIT_PORT, value);
    let _ = sys::reboot(command);
    // Neither worked; PID 1 that leaves makes the kernel panic, and that ends any machine.
    sys::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_text() {
        for number in [0, 7, 10, 1_000_000_007, u64::MAX] {
            assert_eq!(Decimal::new(number).as_bytes(), number.to_string().as_bytes());
        }
    }
}
