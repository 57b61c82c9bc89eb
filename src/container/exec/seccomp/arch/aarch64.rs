//! aarch64.

/// `AUDIT_ARCH_AARCH64`.
pub(in super::super) const AUDIT_ARCH: u32 = 0xc000_00b7;
pub(in super::super) const FOREIGN_CALLS: Option<u32> = None;
pub(in super::super) const NAME: &str = "aarch64";
