//! The one assembly: from config to running threads. It knows all modules.
//!
//! The loops `io`, `disks` and `diskN` start in [`DeviceSet`], all other threads in [`threads`](super::threads).

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cgroup::CgroupGuard;
use super::config::VmConfig;
use super::device_events::DeviceEvents;
use super::device_set::DeviceSet;
use super::devices::{self, OpenedDevices, disk_handle, net_handle};
use super::events::{EventKind, EventLog, Throttled};
use super::exit::BootMarks;
use super::kvm_objects::{KvmObjects, make_vm};
use super::mmio_slots::{MmioSlots, max_devices};
use super::shared::VmShared;
use super::threads::VmThreads;
use super::vcpu::LastExit;
use super::{Handles, Vm};
use crate::arch::layout::{self, MmioSlot};
use crate::arch::{self, Cpu, EntryPoint, Platform, PlatformBus, PlatformDevices};
use crate::boot::{self, Kernel};
use crate::error::{Context, Error, Result};
use crate::event_loop::{Loop, Remote};
use crate::kvm::Kvm;
use crate::legacy::GuestEnd;
use crate::memory::{GuestAddress, GuestMemory};
use crate::network::CapturePump;
use crate::sys::{self, KickSignal, RegisterPages};
use crate::virtio::console::ConsoleOutput;
use crate::virtio::{DeviceId, Slots};

/// How long the end of a VM waits for what its guest has asked of devices last: disks on files that answer late.
const DEVICE_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of a VM waits for a console's writer to take the last bytes.
const CONSOLE_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The assembled parts that vCPU threads need. Field order is the order of release: descriptors before memory. A loop that is
/// left behind keeps its own share of both.
pub(super) struct Machine {
    pub kvm: Arc<KvmObjects>,
    pub devices: DeviceSet,
    pub bus: PlatformBus,
    captures: Vec<CapturePump>,
    /// Where the guest's kernel finds the machine's generation, if it reads it.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is copied yet"))]
    pub generation: Option<GuestAddress>,
    /// What has a state beside vCPUs and virtio devices.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    pub platform: PlatformDevices,
    pub shared: Arc<VmShared>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Machine({:?}, {:?})", self.kvm, self.devices)
    }
}

impl Machine {
    /// The last vCPU's thread brings everything to rest: what the guest handed over is served, streams end, the
    /// console's last words are written.
    pub(super) fn vcpu_done(&self) {
        if !self.shared.last_vcpu_done() {
            return;
        }
        let deadline = Instant::now() + DEVICE_DRAIN_TIMEOUT;
        for it in self.devices.loops() {
            let left = deadline.saturating_duration_since(Instant::now());
            // Devices get less than we wait, to stop what does not end, and to say what they leave behind.
            let theirs = left / 2;
            if let Err(error) = it.remote().with_timeout(left, move |slots| slots.finish(theirs)) {
                log::warn!("a device does not come to rest, and is left behind: {error}");
                it.abandon();
            }
        }
        self.shared.output.close(CONSOLE_DRAIN_TIMEOUT);
        // All at once: one that is stuck takes nothing of the others' time.
        let deadline = Instant::now() + CONSOLE_DRAIN_TIMEOUT;
        self.captures.iter().for_each(|pump| pump.close(Duration::ZERO));
        self.captures.iter().for_each(|pump| pump.close(sys::left(deadline)));
        self.shared.finish();
    }
}

/// Builds the machine and starts its vCPUs.
pub(super) fn start(config: &VmConfig) -> Result<Vm> {
    let begin = Instant::now();
    let (marks, log) = (BootMarks::new(begin), EventLog::new(begin));
    config.vcpus()?;
    let cgroup = make_cgroup(config, &log)?;
    let Plan { marks, log, vcpus, ranges, output, memory, opened, free, places, kernel, entry, generation } =
        Plan::new(config, marks, log)?;
    let OpenedDevices { devices, listeners, nets } = opened;

    let kvm = Kvm::open()?;
    if usize::from(vcpus) > kvm.max_vcpus() {
        return Err(Error::invalid("vcpus", format!("{vcpus}: this host's KVM allows {}", kvm.max_vcpus())));
    }
    let cpu = Cpu::new(&kvm, &config.cpu, vcpus)?;
    ranges.iter().try_for_each(|(start, len)| cpu.addresses(start.0 + len))?;
    let registers = RegisterPages::new(max_devices()).doing(|| "making the devices' registers")?;
    let vm = make_vm(&kvm, &cpu, &memory, &registers)?;
    let signal = KickSignal::install(config.kick_signal)?;
    let shared = VmShared::new(vcpus, signal, marks, log, output, registers.clone())?;
    let shared = Arc::new(shared);
    let Platform { bus, keyboard, events, lines, devices: platform } =
        Platform::new(shared.output.clone(), guest_end(&shared))?;
    lines.iter().try_for_each(|line| line.connect(&vm))?;
    let kvm = Arc::new(KvmObjects::new(vm, cpu, lines, registers, memory.clone()));
    let recorder = kernel.dirty_page_recorder();
    let sink = Arc::new(DeviceEvents { shared: shared.clone(), memory, recorder });
    let devices = DeviceSet::new(kvm.clone(), shared.clone(), sink, free, devices.into_iter().zip(places))?;
    let handles = Handles {
        loops: devices.loops().map(Loop::remote).collect(),
        vsock: devices.handle(DeviceId::Vsock),
        balloon: devices.handle(DeviceId::Balloon),
        disks: (0..config.disks.len()).filter_map(|n| disk_handle(n, &devices)).collect(),
        nets: nets.iter().enumerate().filter_map(|(n, net)| net_handle(n, net, &devices)).collect(),
        keyboard,
        events,
    };
    let captures = nets.into_iter().filter_map(|net| net.pump).collect();
    let machine = Arc::new(Machine { kvm, devices, bus, captures, generation, platform, shared: shared.clone() });

    let threads = VmThreads { shared: &shared, member: cgroup.as_ref().map(CgroupGuard::member) };
    for it in &handles.loops {
        let membership = threads.membership();
        it.with(move |_| membership.enter())??;
    }
    if let Some(it) = handles.loops.last() {
        watch_pressure(cgroup.as_ref(), it, &shared)?;
    }
    threads.start_captures(&machine.captures)?;
    let console = threads.start_console_writer(config)?;
    let vcpus = threads.start_vcpus(&machine, entry);
    let weak = Arc::downgrade(&machine);
    drop(machine);
    let vm = Vm::new(shared, vcpus.threads, console, listeners, handles, weak, cgroup);
    // A thread that could not start is an error; those that could are ended by dropping `vm`.
    vcpus.outcome.map(|()| vm)
}

/// A machine before the hypervisor is asked for anything: all that can be wrong with its configuration was found.
struct Plan {
    marks: BootMarks,
    log: Arc<EventLog>,
    vcpus: u8,
    ranges: Vec<(GuestAddress, u64)>,
    output: ConsoleOutput,
    memory: GuestMemory,
    opened: OpenedDevices,
    /// Places that no device has.
    free: MmioSlots,
    /// Those of the devices, in their order.
    places: Vec<MmioSlot>,
    kernel: Kernel,
    entry: EntryPoint,
    generation: Option<GuestAddress>,
}

impl Plan {
    /// Opens what the configuration names, and loads the kernel.
    fn new(config: &VmConfig, marks: BootMarks, log: Arc<EventLog>) -> Result<Self> {
        let vcpus = config.vcpus()?;
        let ranges = layout::memory_ranges(config.memory.size())?;
        let output = ConsoleOutput::default();
        let memory = GuestMemory::new(&ranges, config.memory.backing())?;
        let opened = devices::open(config, &output, &memory, &log)?;
        let mut free = MmioSlots::new();
        let places = opened.devices.iter().map(|_| free.take()).collect::<Result<Vec<_>>>()?;
        let (cmdline, tables) = config.cmdline(&places)?;
        let kernel = config.packed_kernel()?;
        let entry = boot::load(&memory, &kernel, &cmdline)?;
        let mut generation = [0; 16];
        sys::fill_random(&mut generation).doing(|| "making the machine's generation")?;
        arch::write_tables(&memory, tables, vcpus, &places, generation)?;
        let generation = tables.generation();
        Ok(Self { marks, log, vcpus, ranges, output, memory, opened, free, places, kernel, entry, generation })
    }
}

/// Makes the VM's control group; `None` where it has none, or runs without it.
fn make_cgroup(config: &VmConfig, log: &EventLog) -> Result<Option<CgroupGuard>> {
    let made = config.cgroup.as_ref().map(|cgroup| cgroup.make()).transpose()?;
    let degraded = |why| log.push(EventKind::Degraded { what: format!("a cgroup: {why}") });
    Ok(made.and_then(|made| made.map_err(degraded).ok()))
}

/// Reports, from a loop, when the limit of the VM's control group makes its threads wait.
fn watch_pressure(cgroup: Option<&CgroupGuard>, on: &Remote<Slots>, shared: &Arc<VmShared>) -> Result<()> {
    let Some((file, mut throttled)) = cgroup.and_then(CgroupGuard::pressure) else { return Ok(()) };
    let log = shared.log.clone();
    let notify = move || {
        if throttled() {
            log.push(EventKind::Throttled { what: Throttled::Vcpus });
        }
    };
    on.with(move |slots| slots.watch_urgent(file, notify))?.doing(|| "watching the VM's cgroup")
}

/// What a guest does that tells a device how it ends.
fn guest_end(shared: &Arc<VmShared>) -> impl Fn(GuestEnd) + Clone + Send + use<> {
    let shared = shared.clone();
    move |end: GuestEnd| {
        shared.stop(end.into(), LastExit { vcpu_exit: Some("the guest asked for it".into()), registers: None });
    }
}
