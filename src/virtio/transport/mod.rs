//! Transports, by which a driver sets up its device and is interrupted (Virtio 1.3, 4).
//!
//! ```text
//!  driver --registers--> mmio: MmioTransport -> core: Transport --> host: DeviceHost (the device's loop)
//!  driver <--interrupt-- mmio: MmioRegisters <---- Interrupt <------- DeviceIo (the device)
//! ```
//! `core` has what every transport has: status, features, queues, start and reset. `mmio` has registers and one interrupt
//! for all queues. A transport with an interrupt for each queue implements the same two traits, [`TransportOps`] and
//! [`ConfigView`].

mod core;
mod host;
mod interrupt;
mod mmio;
mod state;

pub(crate) use self::core::{START_STOP_TIMEOUT, Transport};
pub(crate) use host::{DeviceHost, DeviceSetup, LoopDevice, StoppedDevice, UnfinishedIo};
pub(crate) use interrupt::{ConfigView, Interrupt, TransportOps};
pub(crate) use mmio::{MmioTransport, NOTIFY_OFFSET};
#[cfg(test)]
pub(crate) use state::TransportState;
