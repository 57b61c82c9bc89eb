//! Legacy devices that a stock kernel uses.
//!
//! They are a serial port, a keyboard controller, and the ports by which a kernel ends or reports a panic.

mod exit_port;
mod i8042;
mod panic_port;
mod serial;

pub(crate) use exit_port::{EXIT_PORTS, ExitPort, ExitPortRequest};
pub(crate) use i8042::{I8042, I8042_PORTS, Keys};
pub(crate) use panic_port::{PANIC_PORTS, PanicPort};
pub(crate) use serial::{SERIAL_PORTS, SerialPort};
