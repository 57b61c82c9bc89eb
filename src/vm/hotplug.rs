//! Devices that come and go while the guest runs.
//!
//! For tests so far: an embedder's guest would have to learn of them first.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::Vm;
use super::device_set::{AttachedDevice, DeviceSet};
use super::devices::{NewDevice, OpenedNet, disk_handle, net_handle};
use super::disk::{Disk, DiskHandle};
use super::machine::Machine;
use super::net::{AttachedNet, Net, NetHandle};
use crate::arch::MmioSlot;
use crate::arch::layout::MMIO_WINDOW;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::IoQueue;
use crate::sys::{DescriptorShare, left};
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
    with_machine(vm, |machine| {
        let disk = disk.into().attach(n)?;
        machine.devices.attach(NewDevice::disk(n, disk, &vm.running.shared.log))?;
        disk_handle(n, &machine.devices).ok_or_else(Error::vm_ended)
    })
    .doing(|| format!("attaching disk {n}"))
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
    with_machine(vm, |machine| machine.devices.detach(DeviceId::Disk(n))).doing(|| format!("detaching disk {n}"))
}

/// Attaches `net` to a VM that runs, as its `n`th network card.
///
/// It gets its place as a disk does by [`attach_disk`]. Its connections have a share of the process's descriptors of their own. Its policy knows no switches but its own.
///
/// # Errors
/// As [`attach_disk`]; `Unsupported` for a card with a capture, whose thread is made at the start alone.
pub fn attach_net(vm: &Vm, n: usize, net: impl Into<Net>) -> Result<NetHandle> {
    let net = net.into();
    with_machine(vm, |machine| {
        if net.settings.capture.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "the machine gets no thread for a capture while it runs"));
        }
        let vcpus = u8::try_from(vm.running.shared.vcpus.len()).unwrap_or(u8::MAX);
        let switches = net.attached_switch().cloned().into_iter().collect();
        let AttachedNet { card, published, pump } = net.attach(vcpus, switches, DescriptorShare::default())?;
        machine.devices.attach(NewDevice::quick(DeviceId::Net(n), card))?;
        net_handle(n, &OpenedNet { published, pump }, &machine.devices).ok_or_else(Error::vm_ended)
    })
    .doing(|| format!("attaching network {n}"))
}

/// Detaches the `n`th network card, as [`detach_disk`] does a disk. Its connections and published ports are closed.
///
/// # Errors
/// As [`detach_disk`].
pub fn detach_net(vm: &Vm, n: usize) -> Result<()> {
    with_machine(vm, |machine| machine.devices.detach(DeviceId::Net(n))).doing(|| format!("detaching network {n}"))
}

/// Calls `change` while neither a pause, a rebuild nor another change can meet it half-done.
///
/// # Errors
/// `InvalidState` when the VM has ended, or on one of its threads. Otherwise as `change`.
fn with_machine<T>(vm: &Vm, change: impl FnOnce(&Machine) -> Result<T>) -> Result<T> {
    vm.check_thread()?;
    let _still = vm.running.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let machine = vm.running.machine.upgrade().ok_or_else(Error::vm_ended)?;
    change(&machine)
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
