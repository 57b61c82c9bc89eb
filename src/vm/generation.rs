//! The machine's generation, which tells a guest that it is a copy of another.

use super::Vm;
use crate::error::{Context, Error, Result};
use crate::legacy::MachineEvent;
use crate::sys::fill_random;

/// Gives the machine a new generation, and tells kernels that know it by ACPI.
///
/// Such a kernel makes its random numbers new then. Kernels without ACPI do not learn it. Does not wait for the guest.
///
/// # Errors
/// `InvalidState` when the VM has ended, on a thread of its own, and in a child of fork.
pub fn renew_generation(vm: &Vm) -> Result<()> {
    vm.check_thread()?;
    if !vm.running.is_current() {
        return Err(Error::vm_ended());
    }
    let machine = vm.running.machine.upgrade().ok_or_else(Error::vm_ended)?;
    let Some(at) = machine.generation else { return Ok(()) };
    let mut generation = [0; 16];
    fill_random(&mut generation).doing(|| "making the machine's generation")?;
    // The bytes before the event: a kernel that gets it reads them.
    machine.kvm.memory().write(at, &generation)?;
    vm.running.handles.events.raise(MachineEvent::NewGeneration);
    Ok(())
}
