//! A serial port, `ttyS0` in the guest.
//!
//! It is a 16550A whose output is a console like any other.

use std::io;
use std::sync::Arc;

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::bus::BusDevice;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{EventFd, eventfd};

/// An interrupt line of the kind that vm-superio pulls.
struct SerialInterrupt(Arc<EventFd>);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The device.
pub(crate) struct SerialPort<W: io::Write> {
    uart: Serial<SerialInterrupt, NoEvents, W>,
    interrupt: Arc<EventFd>,
}

/// Where a serial port stands: its registers, and what the guest has not read. Not trusted when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct SerialPortState {
    pub baud_divisor: [u8; 2],
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub received: Vec<u8>,
}

impl From<SerialState> for SerialPortState {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }
}

/// A port that no guest has used.
impl Default for SerialPortState {
    fn default() -> Self {
        SerialState::default().into()
    }
}

impl<W: io::Write> SerialPort<W> {
    /// How many registers it has, of one byte each.
    pub(crate) const LEN: u64 = 8;

    /// The port, and the descriptor of its interrupt.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new(output: W) -> Result<(Self, Arc<EventFd>)> {
        let line = Arc::new(eventfd().doing(|| "creating a serial port")?);
        let uart = Serial::new(SerialInterrupt(line.clone()), output);
        Ok((Self { uart, interrupt: line.clone() }, line))
    }
}

#[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
impl<W: io::Write + Clone> SerialPort<W> {
    /// Returns where it stands.
    pub(crate) fn save(&self) -> SerialPortState {
        self.uart.state().into()
    }

    /// Goes on from `state`, and raises the interrupt that is pending in it.
    ///
    /// # Errors
    /// `Corrupt` when more was received than a port holds.
    pub(crate) fn restore(&mut self, state: &SerialPortState) -> Result<()> {
        let [baud_divisor_low, baud_divisor_high] = state.baud_divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let (interrupt, output) = (SerialInterrupt(self.interrupt.clone()), self.uart.writer().clone());
        let corrupt = |error| Error::new(ErrorKind::Corrupt, format!("the state of a serial port: {error:?}"));
        self.uart = Serial::from_state(&state, interrupt, NoEvents, output).map_err(corrupt)?;
        Ok(())
    }
}

impl<W: io::Write + Send> BusDevice for SerialPort<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.uart.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // Fails when the output does: what it did not take is lost, as on a line without a reader.
            if let Err(error) = self.uart.write(offset as u8, *byte) {
                log::debug!("serial port: {error:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_to_the_port_are_printed() {
        let mut printed = Vec::new();
        let (mut port, _) = SerialPort::new(&mut printed).unwrap();
        b"hi".iter().for_each(|byte| port.write(0, &[*byte]));
        let mut status = [0];
        port.read(5, &mut status);
        assert_eq!(status[0] & 0x20, 0x20, "the transmitter is always empty");
        port.read(0, &mut [0; 4]);
        drop(port);
        assert_eq!(printed, b"hi");
    }
}
