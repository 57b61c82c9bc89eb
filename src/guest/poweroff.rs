//! How the machine ends, and the last words on the console. Runs on the shim's one thread, also from its panic.

use super::sys;
use crate::proto::{EXIT_FAULT, EXIT_HALT, EXIT_POWER_OFF, EXIT_REBOOT, End};

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
    let line = line.get(..length).unwrap_or_default();
    if sys::write_raw(2, line).is_err() {
        // The kernel has no driver for its console, or not yet; the machine may have something simpler all the same.
        sys::print(line);
    }
}

/// Ends the machine as it was asked to.
pub(super) fn end(end: End) -> ! {
    leave(match end {
        End::PowerOff => EXIT_POWER_OFF,
        End::Reboot => EXIT_REBOOT,
        End::Halt => EXIT_HALT,
    })
}

/// Ends the machine because the shim cannot go on.
pub(super) fn fault() -> ! {
    leave(EXIT_FAULT)
}

fn leave(value: u8) -> ! {
    sys::end_machine(value);
    // Still here. A reset ends a machine under any VMM; switching off would, without ACPI, leave it standing still for ever.
    let _ = sys::reboot(sys::RB_RESTART);
    // PID 1 that leaves makes the kernel panic, which ends it too.
    sys::exit(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_in_decimal() {
        for number in [0, 7, 10, 1_000_000_007, u64::MAX] {
            assert_eq!(Decimal::new(number).as_bytes(), number.to_string().as_bytes());
        }
    }
}
