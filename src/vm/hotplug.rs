//! Devices that come and go while the guest runs.
//!
//! For tests so far: an embedder's guest would have to learn of them first.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::Vm;
use super::device_set::{AttachedDevice, DeviceSet};
use super::devices::{NewDevice, disk_handle};
use super::disk::{Disk, DiskHandle};
use crate::arch::MmioSlot;
use crate::arch::layout::MMIO_WINDOW;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::IoQueue;
use crate::sys::left;
use crate::virtio::{DeviceId, LoopDevice, Slots};

/// How long a detached device has to end what it has in flight with the host, before its place stays taken for longer.
const DETACH_TIMEOUT: Duration = Duration::from_secs(10);

/// Attaches `disk` as the `n`th to a VM that runs.
///
/// It takes the lowest place that is free. The guest does not learn of it. A driver that is bound there anew finds it.
/// [`Vm::disk`] does not know it; the handle is the one that this returns. Waits ten seconds at most.
///
/// # Errors
/// `AlreadyExists` when there is an `n`th disk, `Unsupported` when no thread is there for such a disk. `InvalidConfig` when the
/// machine has no room, `InvalidState` when it has ended. Otherwise as when a VM is started.
pub fn attach_disk(vm: &Vm, n: usize, disk: impl Into<Disk>) -> Result<DiskHandle> {
    vm.check_thread()?;
    // Neither a pause, a rebuild nor another attachment meets it half-done.
    let _still = vm.running.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = vm.running.machine.upgrade().ok_or_else(Error::vm_ended)?;
    let doing = || format!("attaching disk {n}");
    let disk = disk.into().attach(n).doing(doing)?;
    machine.devices.attach(NewDevice::disk(n, disk, &vm.running.shared.log)).doing(doing)?;
    disk_handle(n, &machine.devices).ok_or_else(Error::vm_ended)
}

/// Detaches the `n`th disk, whatever the guest does with it. What it was asked for and has not done is lost.
///
/// Waits for a reset that the driver has begun, for the disk's thread and for the host, 40 seconds at most. Handles of the disk say that
/// it is gone.
///
/// # Errors
/// `NotFound` when there is no such disk, `InvalidState` when the VM has ended. `TimedOut` when the disk's thread is busy; then it leaves
/// when the thread comes to it.
pub fn detach_disk(vm: &Vm, n: usize) -> Result<()> {
    vm.check_thread()?;
    let _still = vm.running.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = vm.running.machine.upgrade().ok_or_else(Error::vm_ended)?;
    machine.devices.detach(DeviceId::Disk(n)).doing(|| format!("detaching disk {n}"))
}

/// Devices that have left their loops. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Departed(Arc<Mutex<Vec<DepartedDevice>>>);

/// What is left of a device that was detached.
struct DepartedDevice {
    slot: MmioSlot,
    /// What the host may still move from or to guest memory.
    in_flight: Vec<IoQueue>,
}

impl Departed {
    fn push(&self, device: DepartedDevice) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(device);
    }

    fn take(&self) -> Vec<DepartedDevice> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Embedders call this under the lock of a pause, so one at a time.
impl DeviceSet {
    /// # Errors
    /// `AlreadyExists` for an identifier that is in use, `Unsupported` for a device whose loop is not there, `InvalidConfig` when
    /// the machine has no room. Otherwise as [`DeviceSet::new`].
    fn attach(&self, device: NewDevice) -> Result<()> {
        let kind = device.loop_kind();
        let Some(remote) = self.by_kind.get(&kind).cloned() else {
            let why = format!("{}: the machine has no thread `{kind}`, and gets none while it runs", device.id);
            return Err(Error::new(ErrorKind::Unsupported, why));
        };
        if self.placement().devices.contains_key(&device.id) {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("{} is attached already", device.id)));
        }
        self.reclaim(Duration::ZERO);
        let slot = self.placement().free.take()?;
        let (device, config) = self.prepare(device, slot);
        let reporter = config.reporter.clone();
        // Also one that the loop takes too late gets its number there.
        let number = Arc::new(OnceLock::new());
        let its_number = number.clone();
        let added = remote.with(move |slots| *its_number.get_or_init(|| slots.add(device, reporter)));
        let connected =
            added.and_then(|number| self.connect(config, LoopDevice { remote: remote.clone(), slot: number }));
        connected.inspect_err(|_| {
            let departed = self.departed.clone();
            // Behind the request itself. A loop that has ended has nothing.
            let _ = remote.post(move |slots| {
                if let Some(number) = number.get() {
                    depart(slots, *number, slot, Vec::new(), &departed);
                }
            });
        })
    }

    /// Detaches a device, whatever its driver does.
    ///
    /// When this returns, the guest meets nothing at the device's place, and a vCPU that was there already does nothing more to it.
    ///
    /// # Errors
    /// `NotFound` when there is no such device, `TimedOut` when its loop is busy.
    fn detach(&self, id: DeviceId) -> Result<()> {
        let Some(attached) = self.placement().devices.remove(&id) else {
            return Err(Error::new(ErrorKind::NotFound, format!("no device {id} is attached")));
        };
        let AttachedDevice { on_loop: LoopDevice { remote, slot: number }, slot, transport } = attached;
        self.mmio.detach(slot.addr);
        // A vCPU that is inside ends its access first.
        let of_resets = transport.lock().unwrap_or_else(PoisonError::into_inner).detach();
        let mut devices = self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = devices.iter().position(|info| info.id == id) {
            devices.remove(at).disconnect_kicks(&self.kvm.vm());
        }
        drop(devices);
        let departed = self.departed.clone();
        remote.with(move |slots| depart(slots, number, slot, of_resets.into_iter().collect(), &departed))?;
        self.reclaim(DETACH_TIMEOUT);
        Ok(())
    }

    /// Gives back the places of devices that have left their loops and have nothing in flight any more. Waits `timeout` at most for all
    /// of them.
    fn reclaim(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        for mut device in self.departed.take() {
            device.in_flight.retain_mut(|io_queue| !io_queue.stop(left(deadline)));
            if !device.in_flight.is_empty() {
                self.departed.push(device);
                continue;
            }
            if let Ok(page) = self.registers(device.slot) {
                page.write(0, &[0; MMIO_WINDOW as usize]);
            }
            self.placement().free.give(device.slot);
        }
    }
}

/// On the device's loop: it leaves.
fn depart(slots: &mut Slots, number: usize, slot: MmioSlot, mut in_flight: Vec<IoQueue>, departed: &Departed) {
    in_flight.extend(slots.remove(number).and_then(|removed| removed.unfinished));
    departed.push(DepartedDevice { slot, in_flight });
}
