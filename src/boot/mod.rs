//! Kernel, command line, initramfs and boot parameters, loaded into guest memory.

mod cmdline;
mod cpio;
mod find;
mod ikconfig;
mod initramfs;
mod kernel;
mod linux;
mod modules;
mod pvh;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod tiny;

pub(crate) use cmdline::Cmdline;
pub use initramfs::Initramfs;
pub(crate) use kernel::DirtyPageRecorder;
pub use kernel::Kernel;
pub(crate) use linux::load;
pub use modules::Modules;
#[cfg(any(test, feature = "internals"))]
pub(crate) use modules::read as read_modules;
pub(crate) use modules::{Need, Packed};
