//! x86_64: kernel files, the Linux x86 boot protocol, PVH, and the default command line.

mod cmdline;
mod image;
mod load;
mod pvh;
#[cfg(any(test, feature = "internals"))]
pub(crate) mod tiny;

pub(crate) use cmdline::finish_cmdline;
pub(crate) use image::EntryChoice;
pub(super) use image::{KernelEntry, open};
pub(crate) use load::load;

/// In every configuration of a kernel that boots here.
pub(super) const CONFIG_SYMBOL: &str = "X86_64";
/// The machine of ELF files (System V ABI, gABI 4.1).
pub(super) const ELF_MACHINE: u16 = 62;
/// In images (image-spec, config.md).
#[cfg(feature = "container")]
pub(crate) const OCI_ARCHITECTURE: &str = "amd64";
/// All names that images have for this architecture.
#[cfg(feature = "container")]
pub(crate) const OCI_ALIASES: &[&str] = &["amd64", "x86_64", "x86-64"];
/// The variant of images that name none.
#[cfg(feature = "container")]
pub(crate) const OCI_VARIANT: u8 = 1;
