//! The devices of a machine on their way to their loops and onto the bus. Only [`machine`](super::machine) uses it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use super::config::VmConfig;
use super::disk::{DiskError, DiskHandle, ErrorAction, IoEngine};
use super::events::{EventKind, EventLog, PauseCause, Throttled};
use super::exit::Reason;
use super::net::{AttachedNet, Net, NetHandle, check_addresses};
use super::shared::VmShared;
use super::vcpu::LastExit;
use crate::arch::layout::{self, MmioSlot};
use crate::boot::Kernel;
use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::event_loop::{Loop, Loops, Remote};
use crate::irq::IrqLine;
use crate::kvm::VmFd;
use crate::memory::GuestMemory;
use crate::network::{CaptureCounters, CapturePump};
use crate::size::Size;
use crate::sys::{EventFd, set_sched_batch};
use crate::virtio::balloon::Balloon;
use crate::virtio::console::{Console, ConsoleOutput};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{self, VsockListener};
use crate::virtio::{
    Counters, DeviceHandle, DeviceId, Interrupt, LoopDevice, MmioTransport, NOTIFY_OFFSET, Profile, Slots, VirtioDevice,
};

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
}

/// A device on its way into the machine.
pub(super) struct Attachment {
    id: DeviceId,
    device: Box<dyn VirtioDevice>,
    /// A disk that blocks gets a loop of its own.
    blocking: bool,
    /// Of a disk.
    engine: Option<IoEngine>,
}

/// Where a disk's faults go, once the machine is there: the disk is made before it.
pub(super) type MachineRef = Arc<OnceLock<Weak<VmShared>>>;

/// Carries out what is to be done about a host's error. On the disk's loop.
fn on_disk_error(shared: &VmShared, error: DiskError) {
    shared.log.push(EventKind::DiskError { error: error.clone() });
    match error.action {
        ErrorAction::Pause => {
            shared.gate.hold();
            shared.kick();
            shared.log.push(EventKind::Paused { cause: PauseCause::Disk(error.disk) });
        }
        ErrorAction::Stop => shared.stop(Reason::Disk(error), LastExit::default()),
        _ => {}
    }
}

/// All devices of a machine, and what came of opening them.
pub(super) struct Attachments {
    pub devices: Vec<Attachment>,
    pub listeners: Vec<VsockListener>,
    /// Of each network, where its ports are.
    pub published: Vec<Vec<SocketAddr>>,
    /// Of each, what writes its capture.
    pub pumps: Vec<Option<CapturePump>>,
}

pub(super) fn attachments(
    config: &VmConfig,
    output: &ConsoleOutput,
    memory: &GuestMemory,
    log: &Arc<EventLog>,
    faults: &MachineRef,
) -> Result<Attachments> {
    let (mut all, mut listeners) = (Vec::new(), Vec::new());
    for (n, disk) in config.open_disks()?.into_iter().enumerate() {
        let (id, faults) = (DeviceId::Disk(n), faults.clone());
        if let Some(why) = disk.refused() {
            log.push(EventKind::Degraded { what: format!("io_uring for {id}: {why}") });
        }
        let (blocking, engine) = (disk.blocks(), Some(disk.engine()));
        let (log, throttled) = (log.clone(), log.clone());
        let disk = disk
            .on_fault(move |error| {
                if let Some(shared) = faults.get().and_then(Weak::upgrade) {
                    on_disk_error(&shared, error);
                }
            })
            .on_throttled(move || throttled.push(EventKind::Throttled { what: Throttled::Device(id) }))
            .on_low_space(move |free| {
                log.push(EventKind::DiskSpaceLow { disk: id, free: Size::bytes(free) });
            });
        all.push(Attachment { id, device: Box::new(disk), blocking, engine });
    }
    check_addresses(&config.nets)?;
    let descriptors = config.descriptors()?;
    let (mut published, mut pumps) = (Vec::new(), Vec::new());
    let switches: Vec<_> = config.nets.iter().filter_map(Net::attached_switch).cloned().collect();
    for (n, net) in config.nets.iter().enumerate() {
        let id = DeviceId::Net(n);
        let (log, denials, throttled) = (log.clone(), log.clone(), log.clone());
        let callbacks = super::net::NetCallbacks {
            lost: Box::new(move |error| log.push(EventKind::Degraded { what: format!("{id}: {error}") })),
            denied: Box::new(move |denial| denials.push(EventKind::Denied { denial })),
            throttled: Box::new(move || throttled.push(EventKind::Throttled { what: Throttled::Device(id) })),
        };
        let attached = net.attach(config.vcpus()?, switches.clone(), descriptors.clone(), callbacks);
        let AttachedNet { card, published: ports, pump } =
            attached.map_err(|e| e.doing(format!("attaching network {n}")))?;
        published.push(ports);
        pumps.push(pump);
        all.push(Attachment { id, device: Box::new(card), blocking: false, engine: None });
    }
    let mut add = |id: DeviceId, device: Box<dyn VirtioDevice>| {
        all.push(Attachment { id, device, blocking: false, engine: None });
    };
    add(DeviceId::Console, Box::new(Console::new(output.clone())));
    add(DeviceId::Rng, Box::new(Rng));
    let log = log.clone();
    let settled = Box::new(move |held| log.push(EventKind::Balloon { size: Size::bytes(held) }));
    add(DeviceId::Balloon, Box::new(Balloon::new(memory.clone(), settled)));
    if let Some(wanted) = &config.vsock {
        let mut device = vsock::Vsock::new().share(descriptors);
        for port in &wanted.ports {
            listeners.push(device.listen(*port).map_err(|e| e.doing("vsock"))?);
        }
        add(DeviceId::Vsock, Box::new(device));
    }
    Ok(Attachments { devices: all, listeners, published, pumps })
}

/// Registers and interrupt lines for `n` devices, in order.
pub(super) fn mmio_slots(n: usize) -> Result<Vec<MmioSlot>> {
    let lines: Vec<u32> = layout::DEVICE_IRQS.filter(|irq| !layout::RESERVED_IRQS.contains(irq)).collect();
    if n > lines.len() {
        return Err(Error::invalid(
            "disk or net",
            format!("{n} devices, but the machine has interrupt lines for {}", lines.len()),
        ));
    }
    let addrs = (0..n as u64).map(|n| layout::MMIO.0 + n * layout::MMIO_WINDOW);
    Ok(addrs.zip(lines).map(|(addr, irq)| MmioSlot { addr, irq }).collect())
}

/// The machine while devices are attached.
pub(super) struct Attacher<'a> {
    pub vm: &'a VmFd,
    pub memory: &'a GuestMemory,
    pub kernel: &'a Kernel,
    pub shared: &'a Arc<VmShared>,
    pub mmio: Bus,
    pub loops: Loops<Slots>,
    /// Where each device lives.
    pub slots: BTreeMap<DeviceId, DeviceRef>,
}

/// A device as the bus sees it.
struct TransportConfig {
    profile: Profile,
    engine: Option<IoEngine>,
    slot: MmioSlot,
}

/// Devices of one loop.
#[derive(Default)]
struct LoopGroup {
    devices: Vec<Box<dyn VirtioDevice>>,
    places: Vec<(DeviceId, TransportConfig)>,
}

/// A device's loop, and its slot there.
pub(super) struct DeviceRef {
    remote: Remote<Slots>,
    slot: usize,
}

pub(super) fn handle<D: VirtioDevice>(device: &DeviceRef) -> DeviceHandle<D> {
    DeviceHandle::new(device.remote.clone(), device.slot)
}

pub(super) fn disk_handle(n: usize, slots: &BTreeMap<DeviceId, DeviceRef>) -> Option<DiskHandle> {
    let id = DeviceId::Disk(n);
    let device = slots.get(&id).map(handle)?;
    Some(DiskHandle { id, device })
}

pub(super) fn net_handle(
    n: usize,
    slots: &BTreeMap<DeviceId, DeviceRef>,
    published: &[SocketAddr],
    capture: Option<CaptureCounters>,
) -> Option<NetHandle> {
    let id = DeviceId::Net(n);
    let device = slots.get(&id).map(handle)?;
    Some(NetHandle { id, device, published: published.into(), capture })
}

impl Attacher<'_> {
    /// Puts every device onto a loop and the bus: what blocks on one of its own, disks on one, all others on the last.
    pub(super) fn attach(&mut self, attachments: Vec<Attachment>, slots: &[MmioSlot]) -> Result<()> {
        let (mut disks, mut others) = (BTreeMap::<String, LoopGroup>::new(), LoopGroup::default());
        for (Attachment { id, device, blocking, engine }, slot) in attachments.into_iter().zip(slots) {
            let group = match engine {
                Some(_) if blocking => disks.entry(id.to_string()).or_default(),
                Some(_) => disks.entry("disks".into()).or_default(),
                None => &mut others,
            };
            group.places.push((id, TransportConfig { profile: device.profile(), engine, slot: *slot }));
            group.devices.push(device);
        }
        for (name, group) in disks {
            // A driver that has begun to ask mostly asks for more: it shall get to its end before it is answered.
            self.attach_group(&name, group)?.post(|_| {
                if let Err(error) = set_sched_batch() {
                    log::debug!("a thread for disks is scheduled as all others: {error}");
                }
            })?;
        }
        self.attach_group("io", others).map(drop)
    }

    fn attach_group(&mut self, name: &str, LoopGroup { devices, places }: LoopGroup) -> Result<Remote<Slots>> {
        let ids = places.iter().map(|(id, _)| *id).collect();
        let remote = self.start_loop(name, ids, devices)?;
        for (n, (id, on_bus)) in places.into_iter().enumerate() {
            self.connect(id, DeviceRef { remote: remote.clone(), slot: n }, on_bus)?;
        }
        Ok(remote)
    }

    /// A loop called `name` for devices with these identifiers.
    fn start_loop(
        &mut self,
        name: &str,
        ids: Vec<DeviceId>,
        devices: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Remote<Slots>> {
        let shared = Arc::downgrade(self.shared);
        let on_fault = Box::new(move |slot: usize, why: &str| {
            if let (Some(shared), Some(id)) = (shared.upgrade(), ids.get(slot)) {
                shared.stop(Reason::Device(*id, why.to_owned()), LastExit::default());
            }
        });
        let it = Loop::start(name, |sources| Slots::new(devices, sources, on_fault))?;
        let remote = it.remote();
        self.loops.push(it);
        Ok(remote)
    }

    fn connect(&mut self, id: DeviceId, device: DeviceRef, on_bus: TransportConfig) -> Result<()> {
        let TransportConfig { profile, engine, slot: MmioSlot { addr, irq } } = on_bus;
        let host = LoopDevice { remote: device.remote.clone(), slot: device.slot };
        self.slots.insert(id, device);
        let [ready, broken] = [(); 2].map(|()| self.shared.clone());
        let (record_dirty_pages, memory) = (self.kernel.dirty_page_recorder(), self.memory.clone());
        let window = addr.saturating_sub(layout::MMIO.0) / layout::MMIO_WINDOW;
        let registers = usize::try_from(window).ok().and_then(|n| self.shared.registers.device(n));
        let registers = registers.ok_or_else(|| Error::invalid("disk", "there are more devices than windows"))?;
        let line = IrqLine::new(self.vm.pulse_irq(irq));
        let transport = MmioTransport::new(profile, self.memory.clone(), host, registers, line)?
            .on_ready(move || {
                if ready.marks.drivers_ready() {
                    record_dirty_pages(&memory);
                    ready.log.push(EventKind::DriversReady);
                }
            })
            .on_needs_reset(id, move |why| {
                broken.log.push(EventKind::DeviceError { device: id, message: why.to_owned() });
            });
        let (counters, interrupt) = (transport.counters().clone(), transport.interrupt().clone());
        let (kicks, notify_address) = (transport.kicks().clone(), addr + NOTIFY_OFFSET);
        let info = DeviceInfo { id, counters, interrupt, engine, kicks, notify_address };
        info.connect_kicks(self.vm)?;
        self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner).push(info);
        self.mmio.attach(addr..addr + layout::MMIO_WINDOW, Arc::new(Mutex::new(transport)))
    }
}
