//! aarch64: nothing yet. A VM cannot be made: interrupt controller, registers and states are missing.

use std::convert::Infallible;
use std::marker::PhantomData;

use kvm_ioctls::Cap;

use crate::error::{Error, ErrorKind, Result};
use crate::kvm::vcpu::RunPage;
use crate::kvm::{VcpuFd, VmFd};

/// What every machine needs, by the names of the KVM API's documentation.
pub(in crate::kvm) const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];
/// KVM is no module of its own.
pub(in crate::kvm) const MODULES: &[&str] = &[];
/// Modules that cannot do what is needed, and why.
pub(in crate::kvm) const UNUSABLE: &[(&str, &str)] = &[];
/// What to do where `/dev/kvm` is absent.
pub(in crate::kvm) const REMEDY: &str = "start this machine's kernel in EL2";

/// The error for `what`, which is not written for this processor.
pub(crate) fn unsupported(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("guests on aarch64: this build lacks {what}; it runs guests on x86_64"))
}

/// Whether this crate can run guests of this processor.
///
/// # Errors
/// `Unsupported`: it cannot.
pub(in crate::kvm) fn check() -> Result<()> {
    Err(unsupported("an interrupt controller (GICv3) and a boot protocol"))
}

/// # Errors
/// `Unsupported`.
pub(in crate::kvm) fn set_up(_: &VmFd) -> Result<()> {
    Err(unsupported("an interrupt controller (GICv3)"))
}

/// Exits that only this processor has: none.
#[derive(Debug)]
pub(crate) struct ArchExit<'a>(Infallible, PhantomData<&'a mut [u8]>);

impl ArchExit<'_> {
    pub(in crate::kvm) fn new(_: kvm_ioctls::VcpuExit<'_>, _: &RunPage) -> Option<Self> {
        None
    }

    pub(crate) fn is_port_access(&self) -> bool {
        match self.0 {}
    }

    /// There is none.
    pub(crate) fn never(self) -> Infallible {
        self.0
    }
}

impl VcpuFd {
    /// There is no clock of KVM's that could be marked as paused.
    #[allow(clippy::unused_self, reason = "others have such a clock")]
    pub(crate) fn notify_guest_paused(&self) {}

    /// # Errors
    /// `Unsupported`.
    #[allow(clippy::unused_self, reason = "others ask KVM")]
    pub(crate) fn is_dead(&self) -> Result<bool> {
        Err(unsupported("a vCPU's registers"))
    }
}

/// What KVM keeps of a machine. There are no such values, as nothing makes one.
#[cfg(any(test, feature = "internals"))]
pub(crate) mod state {
    use super::unsupported;
    use crate::error::Result;
    use crate::kvm::{Kvm, VcpuFd, VmFd};

    #[derive(Debug, Clone, PartialEq, Eq)]
    pub(crate) enum VcpuFormat {}

    impl VcpuFormat {
        pub(crate) fn probe(_: &Kvm, _: &VmFd, _: &VcpuFd) -> Result<Self> {
            Err(unsupported("the state of a vCPU"))
        }
    }

    #[derive(Debug, Clone, PartialEq)]
    pub(crate) enum VcpuState {}

    impl VcpuState {
        pub(crate) fn save(_: &VcpuFd, format: &VcpuFormat) -> Result<Self> {
            match *format {}
        }

        pub(crate) fn restore(&self, _: &VcpuFd, _: &VcpuFormat) -> Result<()> {
            match *self {}
        }

        pub(crate) fn restore_counter(&self, _: &VcpuFd, _: &ClockGap) -> Result<()> {
            match *self {}
        }
    }

    #[derive(Debug, Clone)]
    pub(crate) enum ClockGap {}

    #[derive(Debug, Clone, PartialEq)]
    pub(crate) enum VmState {}

    impl VmState {
        pub(crate) fn save(_: &VmFd) -> Result<Self> {
            Err(unsupported("the state of a VM"))
        }

        pub(crate) fn restore(&self, _: &VmFd) -> Result<()> {
            match *self {}
        }

        pub(crate) fn clock_gap(&self, _: &VmFd) -> Result<ClockGap> {
            match *self {}
        }
    }
}
