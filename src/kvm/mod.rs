//! KVM, thinly: open it, make a VM, give it memory, interrupts and vCPUs. No policy.
//!
//! kvm-ioctls and kvm-bindings live here and in the layer `arch`, which fills in KVM's register structures. What KVM
//! has for some processors only is in this layer's own `arch`, since it takes unsafe code.
#![allow(
    unsafe_code,
    reason = "memory slots, the kvm_run page, and what kvm-ioctls lacks; kvm/ is one of the directories that may"
)]

mod arch;
mod exposure;
mod host;
mod vcpu;

use std::fmt;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::IoEventAddress;

pub(crate) use arch::*;
pub use exposure::{Exposure, Vulnerability};
pub use host::{Host, KvmAccess};
pub(crate) use vcpu::{Kicker, VcpuExit, VcpuFd};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::GuestMemory;
use crate::sys::{EventFd, ForkGuard, RegisterPages};

fn failed(error: kvm_ioctls::Error) -> std::io::Error {
    std::io::Error::from_raw_os_error(error.errno())
}

/// An open `/dev/kvm` that has everything this crate needs.
pub(crate) struct Kvm {
    _guard: ForkGuard,
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// # Errors
    /// What [`Host::ready`] says is missing.
    pub(crate) fn open() -> Result<Self> {
        host::open().map(|fd| Self { _guard: ForkGuard::new(&fd), fd })
    }

    /// How many vCPUs a VM may have.
    pub(crate) fn max_vcpus(&self) -> usize {
        self.fd.get_max_vcpus()
    }

    /// An empty VM with in-kernel interrupt controllers and timer.
    pub(crate) fn create_vm(&self) -> Result<VmFd> {
        let fd = loop {
            match self.fd.create_vm() {
                Ok(fd) => break fd,
                // KVM_CREATE_VM waits for something a pending signal interrupts; trying again is what it asks for.
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(failed(e)).doing(|| "creating a VM"),
            }
        };
        let (guard, fd) = (ForkGuard::new(&fd), Arc::new(fd));
        let interrupted = Arc::new(RwLock::new(Arc::downgrade(&fd)));
        let vm = VmFd { _guard: guard, fd, interrupted };
        arch::set_up(&vm)?;
        Ok(vm)
    }
}

impl fmt::Debug for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kvm")
    }
}

/// One virtual machine in the host's kernel.
pub(crate) struct VmFd {
    _guard: ForkGuard,
    fd: Arc<kvm_ioctls::VmFd>,
    /// The VM whose interrupts are raised by what [`VmFd::pulse_irq`] returned.
    interrupted: Arc<RwLock<Weak<kvm_ioctls::VmFd>>>,
}

impl VmFd {
    /// Shares closures that raise interrupts with `other`. They raise those of the VM that has claimed them last.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn share_interrupts(mut self, other: &Self) -> Self {
        self.interrupted = other.interrupted.clone();
        self
    }

    /// From now on closures of [`VmFd::pulse_irq`] raise interrupts of this VM.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn claim_interrupts(&self) {
        *self.interrupted.write().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&self.fd);
    }

    /// Makes `memory` the guest's memory.
    ///
    /// The memory must outlive the VM's last use; the machine keeps both together.
    pub(crate) fn set_memory(&self, memory: &GuestMemory) -> Result<()> {
        for (slot, region) in memory.regions().into_iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: region.addr.0,
                memory_size: region.len,
                userspace_addr: region.host as u64,
                flags: 0,
            };
            // SAFETY: the range is a live mapping owned by `memory`, of which the machine keeps a clone
            // until after this VM's descriptors are closed.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(failed)
                .doing(|| format!("giving the guest memory slot {slot}"))?;
        }
        Ok(())
    }

    /// Maps these registers read-only into the guest at `addr`, in the slot behind its memory. Reads cause no exit, and
    /// writes are exits as before (KVM API, 4.35: KVM_MEM_READONLY).
    ///
    /// They must outlive the VM's last use, as its memory must.
    pub(crate) fn map_register_pages(&self, memory: &GuestMemory, addr: u64, pages: &RegisterPages) -> Result<()> {
        let (host, len) = pages.host();
        let region = kvm_userspace_memory_region {
            slot: memory.regions().len() as u32,
            guest_phys_addr: addr,
            memory_size: len as u64,
            userspace_addr: host as u64,
            flags: KVM_MEM_READONLY,
        };
        // SAFETY: the range is a live mapping owned by `pages`, of which the machine keeps a clone until after this VM's
        // descriptors are closed.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(failed).doing(|| "showing the guest its registers")
    }

    /// Returns a closure that raises interrupt `gsi`, as an edge, on the thread that calls it (KVM API, 4.25).
    ///
    /// It does nothing when the VM is gone. [`VmFd::register_irqfd`] would take a thread of the host's kernel for lines of
    /// an I/O interrupt controller, and two switches to and from it.
    pub(crate) fn pulse_irq(&self, gsi: u32) -> impl Fn() + Send + Sync + use<> {
        let (vm, turn) = (self.interrupted.clone(), Mutex::new(()));
        move || {
            let Some(vm) = vm.read().unwrap_or_else(PoisonError::into_inner).upgrade() else { return };
            // Two threads' edges at the same time could be one, seen before the second had anything to tell.
            let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            for level in [true, false] {
                if let Err(error) = vm.set_irq_line(gsi, level) {
                    log::debug!("interrupt {gsi} cannot be raised: {error}");
                }
            }
        }
    }

    /// Turns signals of `fd` into edges of interrupt `gsi` (KVM API, 4.75).
    pub(crate) fn register_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.fd.register_irqfd(fd, gsi).map_err(failed).doing(|| format!("attaching interrupt {gsi}"))
    }

    /// Undoes [`VmFd::register_irqfd`]. What was signaled before has reached the interrupt controllers when this returns.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn unregister_irqfd(&self, fd: &EventFd, gsi: u32) -> Result<()> {
        self.fd.unregister_irqfd(fd, gsi).map_err(failed).doing(|| format!("detaching interrupt {gsi}"))
    }

    /// Turns guest writes of `value` to the 32-bit register at `addr` into signals of `fd` (KVM API, 4.59).
    pub(crate) fn register_ioeventfd(&self, fd: &EventFd, addr: u64, value: u32) -> Result<()> {
        self.fd
            .register_ioevent(fd, &IoEventAddress::Mmio(addr), value)
            .map_err(failed)
            .doing(|| format!("attaching queue notification {value} at {addr:#x}"))
    }

    /// Undoes [`VmFd::register_ioeventfd`].
    pub(crate) fn unregister_ioeventfd(&self, fd: &EventFd, addr: u64, value: u32) -> Result<()> {
        self.fd
            .unregister_ioevent(fd, &IoEventAddress::Mmio(addr), value)
            .map_err(failed)
            .doing(|| format!("detaching queue notification {value} at {addr:#x}"))
    }

    /// The vCPU `id`; must be called on the thread that will run it, as KVM wants (KVM API, 2).
    pub(crate) fn create_vcpu(&self, id: u8) -> Result<VcpuFd> {
        let fd = self.fd.create_vcpu(id.into()).map_err(failed).doing(|| format!("creating vCPU {id}"))?;
        VcpuFd::new(fd, self.fd.run_size())
    }
}

impl fmt::Debug for VmFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmFd({})", self.fd.as_raw_fd())
    }
}

/// An interrupt that is raised by a signal to a descriptor.
#[derive(Debug, Clone)]
pub(crate) struct Irqfd {
    pub fd: Arc<EventFd>,
    pub gsi: u32,
}

impl Irqfd {
    pub(crate) fn connect(&self, vm: &VmFd) -> Result<()> {
        vm.register_irqfd(&self.fd, self.gsi)
    }
}

/// The error for a capability that is not there.
fn missing(names: &[&str]) -> Error {
    Error::new(ErrorKind::Unsupported, format!("this host's KVM lacks {}; a newer kernel has it", names.join(", ")))
}
