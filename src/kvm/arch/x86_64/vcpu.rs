//! Registers of a vCPU, and whether it can go on.

use kvm_bindings::{
    CpuId, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_lapic_state,
    kvm_regs, kvm_sregs,
};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::{VcpuFd, failed};

impl VcpuFd {
    /// Marks the guest's clock as paused, so its watchdogs do not complain (KVM API, 4.70). A guest that has set up no
    /// clock of KVM's cannot be notified.
    pub(crate) fn notify_guest_paused(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl() {
            log::trace!("a vCPU has no clock of KVM's: {error}");
        }
    }

    /// Whether nothing can wake the vCPU but another one of its VM: it has halted with interrupts disabled, or was never
    /// started (KVM API, 4.38).
    pub(crate) fn is_dead(&self) -> Result<bool> {
        /// RFLAGS.IF (Intel SDM vol. 1, 3.4.3).
        const INTERRUPTS: u64 = 1 << 9;
        let state = self.fd.get_mp_state().map_err(failed).doing(|| "asking for a vCPU's state")?.mp_state;
        Ok(match state {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
            KVM_MP_STATE_HALTED => self.regs()?.rflags & INTERRUPTS == 0,
            _ => false,
        })
    }

    pub(crate) fn set_cpuid(&self, cpuid: &CpuId) -> Result<()> {
        self.fd.set_cpuid2(cpuid).map_err(failed).doing(|| "setting a vCPU's CPUID")
    }

    /// # Errors
    /// `Unsupported`, naming the register, when KVM takes only some of them (KVM API, 4.18).
    pub(crate) fn set_msrs(&self, msrs: &Msrs) -> Result<()> {
        let taken = self.fd.set_msrs(msrs).map_err(failed).doing(|| "setting a vCPU's MSRs")?;
        match msrs.as_slice().get(taken) {
            None => Ok(()),
            Some(refused) => Err(Error::new(ErrorKind::Unsupported, format!("KVM refuses MSR {:#x}", refused.index))),
        }
    }

    pub(crate) fn regs(&self) -> Result<kvm_regs> {
        self.fd.get_regs().map_err(failed).doing(|| "reading a vCPU's registers")
    }

    pub(crate) fn set_regs(&self, regs: &kvm_regs) -> Result<()> {
        self.fd.set_regs(regs).map_err(failed).doing(|| "setting a vCPU's registers")
    }

    pub(crate) fn sregs(&self) -> Result<kvm_sregs> {
        self.fd.get_sregs().map_err(failed).doing(|| "reading a vCPU's system registers")
    }

    pub(crate) fn set_sregs(&self, sregs: &kvm_sregs) -> Result<()> {
        self.fd.set_sregs(sregs).map_err(failed).doing(|| "setting a vCPU's system registers")
    }

    pub(crate) fn lapic(&self) -> Result<kvm_lapic_state> {
        self.fd.get_lapic().map_err(failed).doing(|| "reading a vCPU's interrupt controller")
    }

    pub(crate) fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<()> {
        self.fd.set_lapic(lapic).map_err(failed).doing(|| "setting a vCPU's interrupt controller")
    }
}
