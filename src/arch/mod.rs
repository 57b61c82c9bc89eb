//! What depends on the processor's architecture. The only place with `cfg(target_arch)`.
//!
//! Each architecture's folder exports the same: `layout` (where things lie in guest memory),
//! `MAX_VCPUS`, `write_tables` (what the kernel reads about the machine), `Cpu` (what a vCPU shows)
//! and `boot_vcpu` (how the first instruction is reached).

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;
#[cfg(target_arch = "x86_64")]
pub use x86_64::{CpuProfile, CpuidBits, CpuidRegister, Registers};

#[cfg(not(target_arch = "x86_64"))]
compile_error!("cofferdam runs on x86_64 Linux hosts only, for now");
