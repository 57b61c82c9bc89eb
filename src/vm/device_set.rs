//! [`DeviceSet`]: the devices of a machine, on their loops and on the bus.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::devices::{DeviceInfo, NewDevice};
use super::disk::IoEngine;
use super::kvm_objects::KvmObjects;
use super::mmio_slots::MmioSlots;
use super::shared::VmShared;
use crate::arch::layout::{self, MmioSlot};
use crate::bus::Bus;
#[cfg(any(test, feature = "internals"))]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::event_loop::{Loop, Loops, Remote};
use crate::irq::IrqLine;
use crate::sys::{RegisterPage, set_sched_batch};
use crate::virtio::{
    DeviceEventSink, DeviceHandle, DeviceId, DeviceReporter, LoopDevice, MmioTransport, NOTIFY_OFFSET, Profile, Slots,
    VirtioDevice,
};

/// How long a detached device has to end what it has in flight with the host, before its place stays taken for longer.
#[cfg(any(test, feature = "internals"))]
const DETACH_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// The devices of a machine. Field order is the order of release: descriptors before memory.
pub(super) struct DeviceSet {
    kvm: Arc<KvmObjects>,
    pub mmio: Bus,
    loops: Loops<Slots>,
    by_kind: BTreeMap<LoopKind, Remote<Slots>>,
    shared: Arc<VmShared>,
    sink: Arc<dyn DeviceEventSink>,
    placement: Mutex<Placement>,
}

/// Which loop a device runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum LoopKind {
    /// Of a disk that blocks, which has a loop of its own.
    Blocking(DeviceId),
    /// Of all other disks.
    Disks,
    /// Of all other devices.
    Io,
}

/// What is known of a device before its transport is made.
struct TransportConfig {
    id: DeviceId,
    profile: Profile,
    engine: Option<IoEngine>,
    slot: MmioSlot,
    reporter: DeviceReporter,
}

/// Where devices are, and where there is room.
struct Placement {
    free: MmioSlots,
    devices: BTreeMap<DeviceId, AttachedDevice>,
    /// What the host still moves from or to guest memory for devices that were detached, and where they were.
    #[cfg(any(test, feature = "internals"))]
    unfinished: Vec<(crate::memory::IoQueue, MmioSlot)>,
}

/// A device's loop, its number there, and its place on the bus.
struct AttachedDevice {
    on_loop: LoopDevice,
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    slot: MmioSlot,
}

impl fmt::Display for LoopKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocking(disk) => write!(f, "{disk}"),
            Self::Disks => f.write_str("disks"),
            Self::Io => f.write_str("io"),
        }
    }
}

impl fmt::Debug for DeviceSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSet({:?})", self.mmio)
    }
}

impl DeviceSet {
    /// Puts every device onto a loop, and onto the bus at its place.
    ///
    /// # Errors
    /// `ResourceExhausted` when threads, descriptors or KVM's tables do not suffice.
    pub(super) fn new(
        kvm: Arc<KvmObjects>,
        shared: Arc<VmShared>,
        sink: Arc<dyn DeviceEventSink>,
        free: MmioSlots,
        devices: impl IntoIterator<Item = (NewDevice, MmioSlot)>,
    ) -> Result<Self> {
        let placement = Placement {
            free,
            devices: BTreeMap::new(),
            #[cfg(any(test, feature = "internals"))]
            unfinished: Vec::new(),
        };
        let placement = Mutex::new(placement);
        let mut set =
            Self { kvm, mmio: Bus::default(), loops: Loops::new(), by_kind: BTreeMap::new(), shared, sink, placement };
        let mut groups = BTreeMap::<LoopKind, Vec<(NewDevice, MmioSlot)>>::new();
        for (device, slot) in devices {
            groups.entry(device.loop_kind()).or_default().push((device, slot));
        }
        groups.into_iter().try_for_each(|(kind, group)| set.start_loop(kind, group))?;
        Ok(set)
    }

    /// Starts a loop with these devices.
    fn start_loop(&mut self, kind: LoopKind, group: Vec<(NewDevice, MmioSlot)>) -> Result<()> {
        let (mut devices, mut transports) = (Vec::new(), Vec::new());
        for (device, slot) in group {
            let NewDevice { id, device, engine, .. } = device;
            let reporter = DeviceReporter::new(id, self.sink.clone());
            transports.push(TransportConfig {
                id,
                profile: device.profile(),
                engine,
                slot,
                reporter: reporter.clone(),
            });
            devices.push((device, reporter));
        }
        let mut numbers = Vec::new();
        let it = Loop::start(&kind.to_string(), |sources| {
            let mut slots = Slots::new(sources);
            numbers.extend(devices.into_iter().map(|(device, reporter)| slots.add(device, reporter)));
            slots
        })?;
        let remote = it.remote();
        self.loops.push(it);
        if kind != LoopKind::Io {
            // A driver that has begun to ask mostly asks for more: it shall get to its end before it is answered.
            remote.post(|_| {
                if let Err(error) = set_sched_batch() {
                    log::debug!("a thread for disks is scheduled as all others: {error}");
                }
            })?;
        }
        for (transport, number) in transports.into_iter().zip(numbers) {
            self.connect(transport, LoopDevice { remote: remote.clone(), slot: number })?;
        }
        self.by_kind.insert(kind, remote);
        Ok(())
    }

    /// Puts a device's transport onto the bus, at the place that it was given.
    fn connect(&self, config: TransportConfig, on_loop: LoopDevice) -> Result<()> {
        let TransportConfig { id, profile, engine, slot, reporter } = config;
        let vm = self.kvm.vm();
        let registers = self.registers(slot)?;
        let line = IrqLine::new(vm.pulse_irq(slot.irq));
        let memory = self.kvm.memory().clone();
        let transport = MmioTransport::new(profile, memory, on_loop.clone(), registers, line, reporter)?;
        let (counters, interrupt) = (transport.counters().clone(), transport.interrupt().clone());
        let (kicks, notify_address) = (transport.kicks().clone(), slot.addr + NOTIFY_OFFSET);
        let info = DeviceInfo { id, counters, interrupt, engine, kicks, notify_address };
        info.connect_kicks(&vm)?;
        self.mmio.attach(slot.addr..slot.addr + layout::MMIO_WINDOW, Arc::new(Mutex::new(transport)))?;
        self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner).push(info);
        self.placement().devices.insert(id, AttachedDevice { on_loop, slot });
        Ok(())
    }

    fn registers(&self, slot: MmioSlot) -> Result<RegisterPage> {
        let page = self.shared.registers.device(slot.window());
        page.ok_or_else(|| Error::invalid("disk or net", "there are more devices than windows"))
    }

    fn placement(&self) -> MutexGuard<'_, Placement> {
        self.placement.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn loops(&self) -> impl Iterator<Item = &Loop<Slots>> {
        self.loops.iter()
    }

    /// Returns a handle of device `id`, which the caller knows to be a `D`.
    pub(super) fn handle<D: VirtioDevice>(&self, id: DeviceId) -> Option<DeviceHandle<D>> {
        let placement = self.placement();
        let AttachedDevice { on_loop: LoopDevice { remote, slot }, .. } = placement.devices.get(&id)?;
        Some(DeviceHandle::new(remote.clone(), *slot))
    }
}

/// Taking and giving devices while the guest runs. No embedder can do that yet: drivers must hear of it, too.
#[cfg(any(test, feature = "internals"))]
impl DeviceSet {
    /// Attaches a device to a machine that runs.
    ///
    /// # Errors
    /// `AlreadyExists` for an identifier that is in use, `Unsupported` for a device whose loop is not there, `InvalidConfig` when
    /// the machine has no room. Otherwise as [`DeviceSet::new`].
    pub(super) fn attach(&self, device: NewDevice) -> Result<()> {
        let kind = device.loop_kind();
        let Some(remote) = self.by_kind.get(&kind).cloned() else {
            let why = format!("attaching {}: the machine has no thread for such disks", device.id);
            return Err(Error::new(ErrorKind::Unsupported, why));
        };
        let mut placement = self.placement();
        if placement.devices.contains_key(&device.id) {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("{} is attached already", device.id)));
        }
        placement.retry_unfinished();
        let slot = placement.free.take()?;
        drop(placement);
        let NewDevice { id, device, engine, .. } = device;
        let reporter = DeviceReporter::new(id, self.sink.clone());
        let transport = TransportConfig { id, profile: device.profile(), engine, slot, reporter: reporter.clone() };
        let added = remote.with(move |slots| slots.add(device, reporter));
        let connected = added.and_then(|number| {
            let on_loop = LoopDevice { remote: remote.clone(), slot: number };
            self.connect(transport, on_loop).inspect_err(|_| {
                // Nothing was begun, so that nothing is in flight.
                let _ = remote.post(move |slots| _ = slots.remove(number));
            })
        });
        connected.inspect_err(|_| {
            self.placement().devices.remove(&id);
            self.placement().free.give(slot);
        })
    }

    /// Detaches a device from a machine that runs, whatever its driver does. What the driver has asked of it and was not served
    /// yet is lost.
    ///
    /// When this returns, the guest meets nothing at the device's place any more. A vCPU that was there already may end its
    /// access, which does nothing. Waits twenty seconds at most, for what the device has in flight with the host.
    ///
    /// # Errors
    /// `NotFound` when there is no such device, `TimedOut` when its loop is busy.
    pub(super) fn detach(&self, id: DeviceId) -> Result<()> {
        let Some(AttachedDevice { on_loop: LoopDevice { remote, slot: number }, slot }) =
            self.placement().devices.remove(&id)
        else {
            return Err(Error::new(ErrorKind::NotFound, format!("no device {id} is attached")));
        };
        self.mmio.detach(slot.addr);
        let mut devices = self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = devices.iter().position(|info| info.id == id) {
            devices.remove(at).disconnect_kicks(&self.kvm.vm());
        }
        drop(devices);
        let removed = remote.with(move |slots| slots.remove(number))?;
        if let Ok(page) = self.registers(slot) {
            page.write(0, &[0; layout::MMIO_WINDOW as usize]);
        }
        let mut placement = self.placement();
        if let Some(unfinished) = removed.and_then(|removed| removed.unfinished) {
            placement.unfinished.push((unfinished, slot));
            placement.retry_unfinished();
        } else {
            placement.free.give(slot);
        }
        Ok(())
    }
}

#[cfg(any(test, feature = "internals"))]
impl Placement {
    /// Gives the places back of devices that have nothing in flight any more.
    fn retry_unfinished(&mut self) {
        for (mut io_queue, slot) in std::mem::take(&mut self.unfinished) {
            match io_queue.stop(DETACH_TIMEOUT) {
                true => self.free.give(slot),
                false => self.unfinished.push((io_queue, slot)),
            }
        }
    }
}
