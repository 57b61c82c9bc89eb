//! What a processor's system calls are. Each architecture's file has the same names:
//!
//! - `AUDIT_ARCH`: what the kernel calls the architecture in a filter's data (Linux, include/uapi/linux/audit.h).
//! - `FOREIGN_CALLS`: numbers from here on are calls of another ABI of the same architecture.
//! - `NAME`: what profiles call it, beside the name in images.
//!
//! Names and numbers of the calls themselves are those of the crate `syscalls`.

use std::str::FromStr;

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod processor;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod processor;

pub(super) use processor::{AUDIT_ARCH, FOREIGN_CALLS, NAME};
use syscalls::{aarch64, arm, loongarch64, mips64, powerpc64, riscv64, s390x, x86, x86_64};

/// A call's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KnownCall {
    /// Its number in the guest.
    Here(u32),
    /// Linux has it on other processors alone.
    Elsewhere,
}

/// What other profiles name beside the calls of the tables: of the private range of one architecture, and other names of the same.
const MORE_ELSEWHERE: [&str; 5] = ["breakpoint", "get_tls", "set_tls", "usr26", "usr32"];

/// Returns what `name` names; `None` where Linux has no such call.
pub(super) fn known_call(name: &str) -> Option<KnownCall> {
    if let Ok(call) = syscalls::Sysno::from_str(name) {
        return u32::try_from(call.id()).ok().map(KnownCall::Here);
    }
    let elsewhere = [
        x86_64::Sysno::from_str(name).is_ok(),
        x86::Sysno::from_str(name).is_ok(),
        arm::Sysno::from_str(name).is_ok(),
        aarch64::Sysno::from_str(name).is_ok(),
        riscv64::Sysno::from_str(name).is_ok(),
        s390x::Sysno::from_str(name).is_ok(),
        powerpc64::Sysno::from_str(name).is_ok(),
        mips64::Sysno::from_str(name).is_ok(),
        loongarch64::Sysno::from_str(name).is_ok(),
    ];
    (elsewhere.contains(&true) || MORE_ELSEWHERE.contains(&name)).then_some(KnownCall::Elsewhere)
}

/// Architectures as libseccomp names them, with `SCMP_ARCH_` before.
pub(super) const ALL: [&str; 23] = [
    "NATIVE",
    "X86",
    "X86_64",
    "X32",
    "ARM",
    "AARCH64",
    "MIPS",
    "MIPS64",
    "MIPS64N32",
    "MIPSEL",
    "MIPSEL64",
    "MIPSEL64N32",
    "PPC",
    "PPC64",
    "PPC64LE",
    "S390",
    "S390X",
    "PARISC",
    "PARISC64",
    "RISCV64",
    "LOONGARCH64",
    "M68K",
    "SHEB",
];
