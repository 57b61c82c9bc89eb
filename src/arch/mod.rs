//! What depends on the processor's architecture.
//!
//! Only here is `cfg(target_arch)`. Each directory exports the same names:
//!
//! - `layout`: where things lie in guest memory;
//! - `MAX_VCPUS`;
//! - `write_tables`: writes the tables from which the kernel learns of the machine;
//! - `Cpu`: what a vCPU shows;
//! - `boot_vcpu`: brings a vCPU to the kernel's first instruction.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{CpuProfile, CpuidBits, CpuidRegister, Registers};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("cofferdam runs on x86_64 Linux hosts only, for now");
