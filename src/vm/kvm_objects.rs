//! [`KvmObjects`]: what KVM has of one machine, and what it is made from.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::arch::{Cpu, layout};
use crate::error::Result;
use crate::kvm::{Irqfd, Kvm, VcpuFd, VmFd};
use crate::memory::GuestMemory;
use crate::sys::RegisterPages;

/// The VM in KVM, and what it is made from. Field order is the order of release: descriptors before memory.
#[cfg_attr(
    not(any(test, feature = "internals")),
    allow(dead_code, reason = "what a VM is made from is kept for as long as it, and read by rebuilds")
)]
pub(super) struct KvmObjects {
    vm: Mutex<Arc<VmFd>>,
    cpu: Cpu,
    pub lines: Vec<Irqfd>,
    /// What states of its vCPUs have in common, once it was asked for.
    #[cfg(any(test, feature = "internals"))]
    pub format: std::sync::OnceLock<crate::kvm::state::VcpuFormat>,
    registers: RegisterPages,
    memory: GuestMemory,
}

/// Makes a VM that has memory and registers, and neither devices nor vCPUs.
pub(super) fn make_vm(kvm: &Kvm, cpu: &Cpu, memory: &GuestMemory, registers: &RegisterPages) -> Result<VmFd> {
    let vm = kvm.create_vm()?;
    cpu.restrict(&vm)?;
    vm.set_memory(memory)?;
    vm.map_register_pages(memory, layout::MMIO.0, registers)?;
    Ok(vm)
}

impl KvmObjects {
    pub(super) fn new(vm: VmFd, cpu: Cpu, lines: Vec<Irqfd>, registers: RegisterPages, memory: GuestMemory) -> Self {
        Self {
            vm: Mutex::new(Arc::new(vm)),
            cpu,
            lines,
            #[cfg(any(test, feature = "internals"))]
            format: std::sync::OnceLock::new(),
            registers,
            memory,
        }
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The VM as it is now.
    pub(super) fn vm(&self) -> Arc<VmFd> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes vCPU `id` of `vm`, as it is before its first instruction. On the thread that will run it.
    pub(super) fn make_vcpu(&self, vm: &VmFd, id: u8) -> Result<VcpuFd> {
        let vcpu = vm.create_vcpu(id)?;
        self.cpu.apply(&vcpu, id)?;
        Ok(vcpu)
    }

    /// Makes another VM like this.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn make_vm(&self, kvm: &Kvm) -> Result<VmFd> {
        make_vm(kvm, &self.cpu, &self.memory, &self.registers)
    }

    /// Puts `vm` into the place of the VM that was there.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn replace(&self, vm: Arc<VmFd>) {
        *self.vm.lock().unwrap_or_else(PoisonError::into_inner) = vm;
    }
}

impl fmt::Debug for KvmObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KvmObjects({:?})", self.vm())
    }
}
