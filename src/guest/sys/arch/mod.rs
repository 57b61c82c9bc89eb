//! What of the shim depends on the processor. Each file has the same names:
//!
//! - `nr`: system call numbers; `system_call`: the instruction.
//! - `O_DIRECTORY`, `O_NOFOLLOW`, `EpollEvent`: what kernels lay out differently.
//! - `print` and `end_machine`: ways past the kernel, where there are such.
//! - in the shim alone, `_start` and the memory functions that compiled code calls.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub(in super::super) use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub(in super::super) use x86_64::*;
