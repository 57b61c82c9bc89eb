//! The devices of a machine on their way from the configuration to its [`DeviceSet`].

use std::net::SocketAddr;
use std::sync::Arc;

use super::config::VmConfig;
use super::device_set::{DeviceSet, LoopKind};
use super::disk::{DiskHandle, IoEngine};
use super::events::{EventKind, EventLog};
use super::net::{AttachedNet, Net, NetHandle};
use crate::error::Result;
use crate::kvm::VmFd;
use crate::memory::GuestMemory;
use crate::network::CapturePump;
use crate::sys::EventFd;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::{Console, ConsoleOutput};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{self, VsockListener};
use crate::virtio::{Counters, DeviceId, Interrupt, VirtioDevice};

/// What is known of a device without asking it.
pub(super) struct DeviceInfo {
    pub id: DeviceId,
    pub counters: Arc<Counters>,
    pub interrupt: Interrupt,
    pub engine: Option<IoEngine>,
    /// What the driver's notifications signal, by queue.
    pub kicks: Arc<[EventFd]>,
    /// Where the driver notifies it.
    pub notify_address: u64,
}

impl DeviceInfo {
    /// Turns the driver's notifications into kicks.
    pub(super) fn connect_kicks(&self, vm: &VmFd) -> Result<()> {
        (0..)
            .zip(self.kicks.iter())
            .try_for_each(|(queue, kick)| vm.register_ioeventfd(kick, self.notify_address, queue))
    }

    /// Undoes [`DeviceInfo::connect_kicks`], also where that has failed half-way.
    pub(super) fn disconnect_kicks(&self, vm: &VmFd) {
        for (queue, kick) in (0..).zip(self.kicks.iter()) {
            if let Err(error) = vm.unregister_ioeventfd(kick, self.notify_address, queue) {
                log::debug!("{}: {error}", self.id);
            }
        }
    }
}

/// A device on its way into the machine.
pub(super) struct NewDevice {
    pub id: DeviceId,
    pub device: Box<dyn VirtioDevice>,
    /// Of a disk.
    pub engine: Option<IoEngine>,
    /// Whether a call of it may wait for the host.
    pub blocking: bool,
}

impl NewDevice {
    /// A disk, and an event when it is not what was asked for.
    pub(super) fn disk(n: usize, disk: Blk, log: &EventLog) -> Self {
        let id = DeviceId::Disk(n);
        if let Some(why) = disk.refused() {
            log.push(EventKind::Degraded { what: format!("io_uring for {id}: {why}") });
        }
        Self { id, blocking: disk.blocks(), engine: Some(disk.engine()), device: Box::new(disk) }
    }

    /// A device that never blocks.
    pub(super) fn quick(id: DeviceId, device: impl VirtioDevice) -> Self {
        Self { id, device: Box::new(device), engine: None, blocking: false }
    }

    /// Which loop it runs on: what blocks on one of its own, disks on one, all others on the last.
    pub(super) fn loop_kind(&self) -> LoopKind {
        match self.engine {
            Some(_) if self.blocking => LoopKind::Blocking(self.id),
            Some(_) => LoopKind::Disks,
            None => LoopKind::Io,
        }
    }
}

/// All devices of a machine, and what came of opening them.
pub(super) struct OpenedDevices {
    pub devices: Vec<NewDevice>,
    pub listeners: Vec<VsockListener>,
    /// In the order of the networks.
    pub nets: Vec<OpenedNet>,
}

/// What there is of a network beside its card.
pub(super) struct OpenedNet {
    /// Where its ports are published.
    pub published: Vec<SocketAddr>,
    /// What writes its capture.
    pub pump: Option<CapturePump>,
}

/// Opens all devices of a machine. Every machine has a console, an entropy device and a balloon.
pub(super) fn open(
    config: &VmConfig,
    output: &ConsoleOutput,
    memory: &GuestMemory,
    log: &EventLog,
) -> Result<OpenedDevices> {
    let disks = config.open_disks()?.into_iter().enumerate();
    let mut devices: Vec<_> = disks.map(|(n, disk)| NewDevice::disk(n, disk, log)).collect();
    let descriptors = config.descriptors()?;
    let switches: Vec<_> = config.nets.iter().filter_map(Net::attached_switch).cloned().collect();
    let mut nets = Vec::new();
    for (n, net) in config.nets.iter().enumerate() {
        let attached = net.attach(config.vcpus()?, switches.clone(), descriptors.clone());
        let AttachedNet { card, published, pump } = attached.map_err(|e| e.doing(format!("attaching network {n}")))?;
        nets.push(OpenedNet { published, pump });
        devices.push(NewDevice::quick(DeviceId::Net(n), card));
    }
    devices.push(NewDevice::quick(DeviceId::Console, Console::new(output.clone())));
    devices.push(NewDevice::quick(DeviceId::Rng, Rng));
    devices.push(NewDevice::quick(DeviceId::Balloon, Balloon::new(memory.clone())));
    let mut listeners = Vec::new();
    if let Some(wanted) = &config.vsock {
        let mut device = vsock::Vsock::new().share(descriptors);
        for port in &wanted.ports {
            listeners.push(device.listen(*port).map_err(|e| e.doing("vsock"))?);
        }
        devices.push(NewDevice::quick(DeviceId::Vsock, device));
    }
    Ok(OpenedDevices { devices, listeners, nets })
}

/// Returns a handle of the `n`th disk.
pub(super) fn disk_handle(n: usize, devices: &DeviceSet) -> Option<DiskHandle> {
    let id = DeviceId::Disk(n);
    Some(DiskHandle { id, device: devices.handle(id)? })
}

/// Returns a handle of the `n`th network card.
pub(super) fn net_handle(n: usize, net: &OpenedNet, devices: &DeviceSet) -> Option<NetHandle> {
    let id = DeviceId::Net(n);
    let capture = net.pump.as_ref().map(CapturePump::counters);
    Some(NetHandle { id, device: devices.handle(id)?, published: net.published.as_slice().into(), capture })
}
