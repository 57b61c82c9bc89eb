//! Kernel, command line, initramfs and modules, and the way of them into guest memory.
//!
//! What depends on the processor is in a directory of its own for each, here `protocol`. Each has the same names:
//!
//! - `open`: opens a kernel's file; `KernelEntry`, `EntryChoice`: how it can be entered, and how the embedder wants it.
//! - `load`: puts a kernel and its boot parameters into guest memory.
//! - `finish_cmdline`: what the machine adds to the command line.
//! - `CONFIG_SYMBOL`, `ELF_MACHINE`, `OCI_ARCHITECTURE`: what kernels, modules and images for this processor say of themselves.
//! - `OCI_ALIASES` and `OCI_VARIANT`: other names of it, and the variant of images that name none.
//! - `tiny`: the smallest kernel files, for tests.

mod cmdline;
mod cpio;
mod find;
mod ikconfig;
mod initramfs;
mod kernel;
mod modules;

#[cfg(target_arch = "aarch64")]
#[path = "aarch64/mod.rs"]
mod protocol;
#[cfg(target_arch = "x86_64")]
#[path = "x86/mod.rs"]
mod protocol;

pub(crate) use cmdline::Cmdline;
pub use initramfs::Initramfs;
pub(crate) use kernel::DirtyPageRecorder;
pub use kernel::Kernel;
pub(crate) use kernel::Loaded as LoadedKernel;
pub use modules::Modules;
#[cfg(any(test, feature = "internals"))]
pub(crate) use modules::read as read_modules;
pub(crate) use modules::{Need, Packed};
#[cfg(any(test, feature = "internals"))]
pub(crate) use protocol::tiny;
pub(crate) use protocol::{EntryChoice, finish_cmdline, load};
#[cfg(feature = "container")]
pub(crate) use protocol::{OCI_ALIASES, OCI_ARCHITECTURE, OCI_VARIANT};
