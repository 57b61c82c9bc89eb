//! What KVM has for some processors only. Each directory has the same names:
//!
//! - `NEEDED`, `MODULES`, `UNUSABLE`, `REMEDY`, `check`: what a host must have, and what to do where it lacks it.
//! - `set_up`: what a VM has in the kernel beside memory and vCPUs.
//! - `ArchExit`: exits of a vCPU that only this processor has.
//! - `VcpuFd::is_dead` and `VcpuFd::notify_guest_paused`.
//! - `state`: what KVM keeps of a machine.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::*;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;
