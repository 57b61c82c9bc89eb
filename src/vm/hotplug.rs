//! Devices that come and go while the guest runs.
//!
//! For tests so far: an embedder's guest would have to hear of them first.

use std::sync::PoisonError;

use super::Vm;
use super::devices::{NewDevice, disk_handle};
use super::disk::{Disk, DiskHandle};
use crate::error::{Context, Error, Result};
use crate::virtio::DeviceId;

/// Attaches `disk` as the `n`th to a VM that runs.
///
/// It takes the lowest place that is free. The guest does not hear of it. A driver that is bound there anew finds it.
///
/// # Errors
/// `AlreadyExists` when there is an `n`th disk, `Unsupported` for one that needs a thread of its own. `InvalidConfig` when the
/// machine has no room, `InvalidState` when it has ended. Otherwise as when a VM is started.
pub fn attach_disk(vm: &Vm, n: usize, disk: impl Into<Disk>) -> Result<DiskHandle> {
    vm.check_thread()?;
    // Neither a pause nor a rebuild meets it half-done.
    let _still = vm.running.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = vm.running.machine.upgrade().ok_or_else(Error::vm_ended)?;
    let doing = || format!("attaching disk {n}");
    let disk = disk.into().attach(n).doing(doing)?;
    machine.devices.attach(NewDevice::disk(n, disk, &vm.running.shared.log)).doing(doing)?;
    disk_handle(n, &machine.devices).ok_or_else(Error::vm_ended)
}

/// Detaches the `n`th disk, whatever the guest does with it. What it was asked for and has not done is lost.
///
/// Waits twenty seconds at most. Handles of the disk say that it is gone.
///
/// # Errors
/// `NotFound` when there is no such disk, `InvalidState` when the VM has ended, `TimedOut` when the disk's thread is busy.
pub fn detach_disk(vm: &Vm, n: usize) -> Result<()> {
    vm.check_thread()?;
    let _still = vm.running.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = vm.running.machine.upgrade().ok_or_else(Error::vm_ended)?;
    machine.devices.detach(DeviceId::Disk(n)).doing(|| format!("detaching disk {n}"))
}
