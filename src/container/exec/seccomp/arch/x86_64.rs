//! x86_64, whose x32 ABI has the same architecture and numbers of its own (Linux, arch/x86/include/uapi/asm/unistd.h).

/// `AUDIT_ARCH_X86_64`.
pub(in super::super) const AUDIT_ARCH: u32 = 0xc000_003e;
/// `__X32_SYSCALL_BIT`.
pub(in super::super) const FOREIGN_CALLS: Option<u32> = Some(0x4000_0000);
pub(in super::super) const NAME: &str = "x86_64";
