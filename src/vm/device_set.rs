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
use crate::error::{Error, Result};
use crate::event_loop::{Loop, Loops, Remote};
use crate::irq::IrqLine;
use crate::sys::{RegisterPage, set_sched_batch};
use crate::virtio::{
    DeviceEventSink, DeviceHandle, DeviceId, DeviceReporter, LoopDevice, MmioTransport, NOTIFY_OFFSET, Profile, Slots,
    VirtioDevice,
};

/// The devices of a machine. Field order is the order of release: descriptors before memory.
pub(super) struct DeviceSet {
    pub(super) kvm: Arc<KvmObjects>,
    pub mmio: Bus,
    loops: Loops<Slots>,
    pub(super) by_kind: BTreeMap<LoopKind, Remote<Slots>>,
    pub(super) shared: Arc<VmShared>,
    sink: Arc<dyn DeviceEventSink>,
    placement: Mutex<Placement>,
    /// Devices that were detached, and have left their loops.
    #[cfg(any(test, feature = "internals"))]
    pub(super) departed: super::hotplug::Departed,
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
pub(super) struct TransportConfig {
    pub id: DeviceId,
    pub profile: Profile,
    pub engine: Option<IoEngine>,
    pub slot: MmioSlot,
    pub reporter: DeviceReporter,
}

/// Where devices are, and where there is room.
pub(super) struct Placement {
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub free: MmioSlots,
    pub devices: BTreeMap<DeviceId, AttachedDevice>,
}

/// A device's loop, its number there, and its place on the bus.
pub(super) struct AttachedDevice {
    pub on_loop: LoopDevice,
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub slot: MmioSlot,
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub transport: Arc<Mutex<MmioTransport>>,
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
        let placement = Placement { free, devices: BTreeMap::new() };
        let placement = Mutex::new(placement);
        let mut set = Self {
            kvm,
            mmio: Bus::default(),
            loops: Loops::new(),
            by_kind: BTreeMap::new(),
            shared,
            sink,
            placement,
            #[cfg(any(test, feature = "internals"))]
            departed: super::hotplug::Departed::default(),
        };
        let mut groups = BTreeMap::<LoopKind, Vec<(NewDevice, MmioSlot)>>::new();
        for (device, slot) in devices {
            groups.entry(device.loop_kind()).or_default().push((device, slot));
        }
        groups.into_iter().try_for_each(|(kind, group)| set.start_loop(kind, group))?;
        Ok(set)
    }

    /// Takes a device apart: what its loop gets, and what its transport at `slot` is made of.
    pub(super) fn prepare(&self, device: NewDevice, slot: MmioSlot) -> (Box<dyn VirtioDevice>, TransportConfig) {
        let NewDevice { id, device, engine, .. } = device;
        let (profile, reporter) = (device.profile(), DeviceReporter::new(id, self.sink.clone()));
        (device, TransportConfig { id, profile, engine, slot, reporter })
    }

    /// Starts a loop with these devices.
    fn start_loop(&mut self, kind: LoopKind, group: Vec<(NewDevice, MmioSlot)>) -> Result<()> {
        let (mut devices, mut transports) = (Vec::new(), Vec::new());
        for (device, slot) in group {
            let (device, transport) = self.prepare(device, slot);
            devices.push((device, transport.reporter.clone()));
            transports.push(transport);
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
    pub(super) fn connect(&self, config: TransportConfig, on_loop: LoopDevice) -> Result<()> {
        let TransportConfig { id, profile, engine, slot, reporter } = config;
        let vm = self.kvm.vm();
        let registers = self.registers(slot)?;
        let line = IrqLine::new(vm.pulse_irq(slot.irq));
        let memory = self.kvm.memory().clone();
        let transport = MmioTransport::new(profile, memory, on_loop.clone(), registers, line, reporter)?;
        let (counters, interrupt) = (transport.counters().clone(), transport.interrupt().clone());
        let (kicks, notify_address) = (transport.kicks().clone(), slot.addr + NOTIFY_OFFSET);
        let info = DeviceInfo { id, counters, interrupt, engine, kicks, notify_address };
        let transport = Arc::new(Mutex::new(transport));
        let connected = info
            .connect_kicks(&vm)
            .and_then(|()| self.mmio.attach(slot.addr..slot.addr + layout::MMIO_WINDOW, transport.clone()));
        if let Err(error) = connected {
            info.disconnect_kicks(&vm);
            return Err(error);
        }
        self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner).push(info);
        self.placement().devices.insert(id, AttachedDevice { on_loop, slot, transport });
        Ok(())
    }

    pub(super) fn registers(&self, slot: MmioSlot) -> Result<RegisterPage> {
        let page = self.shared.registers.device(slot.window());
        page.ok_or_else(|| Error::invalid("disk or net", "there are more devices than windows"))
    }

    pub(super) fn placement(&self) -> MutexGuard<'_, Placement> {
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
