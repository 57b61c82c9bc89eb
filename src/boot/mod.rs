//! From files to a guest that is about to run: kernel, command line, initramfs, boot parameters.
//!
//! linux-loader lives here only. Everything in this folder reads files that may be hostile.

mod cmdline;
mod cpio;
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
pub use kernel::Kernel;
pub(crate) use linux::load;
pub use modules::Modules;
#[cfg(any(test, feature = "internals"))]
pub(crate) use modules::read as read_modules;
pub(crate) use modules::{Need, Packed};
