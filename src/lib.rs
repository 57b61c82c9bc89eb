//! Run untrusted Linux work inside its own microVM, in process.
mod arch;
mod boot;
mod bus;
#[cfg(feature = "container")]
mod container;
mod error;
mod event;
mod irq;
mod kvm;
mod legacy;
mod memory;
#[cfg(feature = "container")]
mod proto;
mod size;
mod sys;
mod virtio;
mod vm;
#[cfg(feature = "container")]
pub use container::*;
pub use boot::{Initramfs, Kernel};
pub use error::{Error, ErrorKind, Result};
pub use kvm::Host;
pub use size::Size;
pub use virtio::vsock::{VsockListener, VsockStream};
pub use vm::*;
