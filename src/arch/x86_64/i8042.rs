//! The keyboard controller.
//!
//! Kernels reset the machine through it, and Ctrl-Alt-Del arrives by it.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::bus::BusDevice;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::legacy::Keys;
use crate::sys::{EventFd, eventfd};

const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// Status register: the guest may read a byte; the system has passed its test; the keyboard is not locked.
const OUTPUT_FULL: u8 = 1;
const SYSTEM_FLAG: u8 = 4;
const NOT_LOCKED: u8 = 1 << 4;
/// Command byte: interrupt when a byte of the keyboard can be read.
const KEYBOARD_INTERRUPT: u8 = 1;
/// Command byte: the keyboard's clock is off.
const KEYBOARD_OFF: u8 = 1 << 4;
/// Command byte: scan codes are translated to set 1, which is what [`codes`] are in.
const TRANSLATE: u8 = 1 << 6;

/// What the guest has not read; more is dropped, as a real controller drops keys.
const MAX_OUTPUT: usize = 32;

/// The codes of keys that are pressed and released, in scan code set 1.
fn codes(keys: Keys) -> &'static [u8] {
    match keys {
        Keys::Power => &[0xe0, 0x5e, 0xe0, 0xde],
        Keys::CtrlAltDel => &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d],
    }
}

/// What the next byte at the data port belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Expect {
    /// A command for the keyboard.
    Keyboard,
    /// The argument of a keyboard command.
    KeyboardArgument,
    /// A new command byte.
    CommandByte,
    /// Something that is ignored.
    Nothing,
}

/// Where a keyboard controller stands. Not trusted when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct KeyboardState {
    /// What the guest has not read.
    pub output: Vec<u8>,
    pub command_byte: u8,
    pub expect: Expect,
}

/// A controller that no guest has used.
impl Default for KeyboardState {
    fn default() -> Self {
        Self { output: Vec::new(), command_byte: KEYBOARD_OFF | TRANSLATE, expect: Expect::Keyboard }
    }
}

/// The device. `on_reset` is called on the vCPU's thread.
pub(super) struct I8042<F> {
    on_reset: F,
    interrupt: Arc<EventFd>,
    output: VecDeque<u8>,
    command_byte: u8,
    expect: Expect,
}

impl<F: FnMut() + Send> I8042<F> {
    /// How many ports it has, from that of its data on.
    pub(super) const LEN: u64 = 5;

    /// The controller, and the descriptor of its interrupt.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(super) fn new(on_reset: F) -> Result<(Self, Arc<EventFd>)> {
        let interrupt = Arc::new(eventfd().doing(|| "creating a keyboard controller")?);
        let KeyboardState { output, command_byte, expect } = KeyboardState::default();
        let controller = Self { on_reset, interrupt: interrupt.clone(), output: output.into(), command_byte, expect };
        Ok((controller, interrupt))
    }

    /// Presses keys. False when the guest has no keyboard driver.
    pub(super) fn press(&mut self, keys: Keys) -> bool {
        let listening = self.command_byte & (KEYBOARD_INTERRUPT | KEYBOARD_OFF) == KEYBOARD_INTERRUPT;
        if listening {
            self.answer(codes(keys));
        }
        listening
    }

    /// Returns where it stands.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    pub(super) fn save(&self) -> KeyboardState {
        let Self { output, command_byte, expect, .. } = self;
        KeyboardState { output: output.iter().copied().collect(), command_byte: *command_byte, expect: *expect }
    }

    /// Goes on from `state`, and raises the interrupt that is pending in it.
    ///
    /// # Errors
    /// `Corrupt` when more waits to be read than a controller holds.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    pub(super) fn restore(&mut self, state: &KeyboardState) -> Result<()> {
        let KeyboardState { output, command_byte, expect } = state;
        if output.len() > MAX_OUTPUT {
            let why = format!("the state of a keyboard controller: {} bytes wait to be read", output.len());
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        (self.output, self.command_byte, self.expect) = (output.iter().copied().collect(), *command_byte, *expect);
        self.raise();
        Ok(())
    }

    fn answer(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= MAX_OUTPUT {
            self.output.extend(bytes);
        }
        self.raise();
    }

    fn raise(&self) {
        if self.command_byte & KEYBOARD_INTERRUPT != 0 && !self.output.is_empty() {
            // The only failure is a counter at its maximum: the interrupt is pending then already.
            let _ = self.interrupt.write(1);
        }
    }

    fn command(&mut self, command: u8) {
        self.expect = Expect::Keyboard;
        match command {
            0x20 => self.answer(&[self.command_byte]),
            0x60 => self.expect = Expect::CommandByte,
            // There is no auxiliary port: its test fails and nothing written to it arrives.
            0xa9 => self.answer(&[0xff]),
            0xd1 | 0xd3 | 0xd4 => self.expect = Expect::Nothing,
            0xd2 => self.expect = Expect::Nothing,
            // Self test and keyboard port test pass.
            0xaa => self.answer(&[0x55]),
            0xab => self.answer(&[0]),
            0xad => self.command_byte |= KEYBOARD_OFF,
            0xae => self.command_byte &= !KEYBOARD_OFF,
            // Pulse of the reset line.
            0xfe => (self.on_reset)(),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        const ACK: u8 = 0xfa;
        match std::mem::replace(&mut self.expect, Expect::Keyboard) {
            Expect::CommandByte => self.command_byte = byte,
            Expect::Nothing => {}
            Expect::KeyboardArgument => self.answer(&[ACK]),
            Expect::Keyboard => match byte {
                // Lights, scan code set, repeat rate.
                0xed | 0xf0 | 0xf3 => {
                    self.expect = Expect::KeyboardArgument;
                    self.answer(&[ACK]);
                }
                0xf2 => self.answer(&[ACK, 0xab, 0x83]),
                0xff => self.answer(&[ACK, 0xaa]),
                _ => self.answer(&[ACK]),
            },
        }
    }
}

impl<F: FnMut() + Send> BusDevice for I8042<F> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let [byte] = data else { return };
        match offset {
            DATA => {
                *byte = self.output.pop_front().unwrap_or(0);
                self.raise();
            }
            COMMAND => *byte = SYSTEM_FLAG | NOT_LOCKED | if self.output.is_empty() { 0 } else { OUTPUT_FULL },
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (DATA, [byte]) => self.data(*byte),
            (COMMAND, [byte]) => self.command(*byte),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn read(controller: &mut impl BusDevice, offset: u64) -> u8 {
        let mut byte = [0];
        controller.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn a_pulse_of_the_reset_line_is_reported() {
        let resets = AtomicU32::new(0);
        let (mut controller, _) = I8042::new(|| {
            resets.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        (0..=u8::MAX).for_each(|command| controller.write(COMMAND, &[command]));
        assert_eq!(resets.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn initialized_i8042_driver_receives_keys() {
        let (mut controller, interrupt) = I8042::new(|| ()).unwrap();
        assert!(!controller.press(Keys::Power), "the driver does not listen yet");
        controller.write(COMMAND, &[0x60]);
        controller.write(DATA, &[KEYBOARD_INTERRUPT]);
        assert!(controller.press(Keys::Power) && controller.press(Keys::CtrlAltDel));
        assert!(interrupt.read().is_ok());
        assert_eq!(read(&mut controller, COMMAND) & OUTPUT_FULL, OUTPUT_FULL);
        let keys: Vec<u8> = (0..12).map(|_| read(&mut controller, DATA)).collect();
        let expected = [Keys::Power, Keys::CtrlAltDel].map(codes).concat();
        assert_eq!((keys, read(&mut controller, COMMAND) & OUTPUT_FULL), (expected, 0));
    }

    #[test]
    fn unread_keys_are_bounded() {
        let (mut controller, _) = I8042::new(|| ()).unwrap();
        (0..10_000).for_each(|_| controller.write(DATA, &[0xff]));
        assert!(controller.output.len() <= MAX_OUTPUT);
    }
}
