//! aarch64: no boot protocol yet. No kernel can be opened, so there is none to load.

#[cfg(any(test, feature = "internals"))]
pub(crate) mod tiny;

use std::fs::File;

use super::kernel::Loaded;
use super::{Cmdline, Kernel};
use crate::arch::layout::MmioSlot;
use crate::arch::{EntryPoint, FirmwareTables, unsupported};
use crate::error::Result;
use crate::memory::GuestMemory;

/// In every configuration of a kernel that boots here.
pub(super) const CONFIG_SYMBOL: &str = "ARM64";
/// The machine of ELF files (System V ABI, gABI 4.1).
pub(super) const ELF_MACHINE: u16 = 183;
/// In images (image-spec, config.md).
#[cfg(feature = "container")]
pub(crate) const OCI_ARCHITECTURE: &str = "arm64";
/// All names that images have for this architecture.
#[cfg(feature = "container")]
pub(crate) const OCI_ALIASES: &[&str] = &["arm64", "aarch64"];
/// The variant of images that name none.
#[cfg(feature = "container")]
pub(crate) const OCI_VARIANT: u8 = 8;

/// How a kernel can be entered, as its file says.
#[derive(Debug)]
pub(super) enum KernelEntry {}

#[cfg(test)]
impl KernelEntry {
    pub(super) fn has_header(&self) -> bool {
        match *self {}
    }
}

/// How the embedder wants a kernel to be entered: there is one way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct EntryChoice;

/// # Errors
/// `Unsupported`.
pub(super) fn open(_: &mut File) -> Result<Loaded> {
    Err(unsupported("the boot protocol (Image)"))
}

/// Loads everything; returns where the kernel is entered.
pub(crate) fn load(_: &GuestMemory, kernel: &Kernel, _: &str) -> Result<EntryPoint> {
    match kernel.loaded.entry {}
}

/// Finishes the command line of `kernel`, and says by which tables it learns of the machine.
pub(crate) fn finish_cmdline(_: Cmdline, kernel: &Kernel, _: &[MmioSlot]) -> Result<(String, FirmwareTables)> {
    match kernel.loaded.entry {}
}
