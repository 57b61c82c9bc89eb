//! Run untrusted Linux work inside its own microVM, in process.
mod arch;
mod boot;
mod bus;
mod error;
mod event;
mod irq;
mod kvm;
mod memory;
mod size;
mod sys;
mod virtio;
pub use error::*;
pub use boot::*;
