//! A serial port, `ttyS0` in the guest.
//!
//! It is a 16550A whose output is a console like any other.

use std::io;
use std::sync::Arc;

use vm_superio::{Serial, Trigger};

use crate::bus::BusDevice;
use crate::error::{Context, Result};
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
    uart: Serial<SerialInterrupt, vm_superio::serial::NoEvents, W>,
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
        Ok((Self { uart: Serial::new(SerialInterrupt(line.clone()), output) }, line))
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
