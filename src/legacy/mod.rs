//! Devices that a stock kernel uses and that are no virtio devices.
//!
//! They are a serial port, and the registers by which a kernel ends, reports a panic or learns of the machine's events. Where they answer, and what else
//! is there, is the architecture's matter.

mod event_device;
mod exit_port;
mod panic_port;
mod serial;

pub(crate) use event_device::{EventDevice, EventSender, MachineEvent};
pub(crate) use exit_port::ExitPort;
pub(crate) use panic_port::PanicPort;
pub(crate) use serial::{SerialPort, SerialPortState};

/// How a guest ends by itself, as it tells one of these devices or its processor reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GuestEnd {
    PowerOff,
    Reset,
    Halt,
    /// PID 1 could not go on.
    InitFault,
    /// The kernel could not.
    Panic,
    /// The processor could not.
    TripleFault,
}

/// Keys of a guest's keyboard, pressed and released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keys {
    Power,
    CtrlAltDel,
}
