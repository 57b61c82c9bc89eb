//! The one assembly: from config to running threads. It knows all modules.
//!
//! The loops `io`, `disks` and `diskN` start in [`devices`](super::devices), all other threads in [`threads`](super::threads).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::cgroup::CgroupGuard;
use super::config::VmConfig;
use super::devices::{Attacher, Attachments, MachineRef, attachments, disk_handle, handle, mmio_slots, net_handle};
use super::events::{EventKind, EventLog, Throttled};
use super::exit::{BootMarks, Reason};
use super::kvm_objects::{Irqfd, KvmObjects, make_vm};
use super::shared::VmShared;
use super::threads::VmThreads;
use super::vcpu::LastExit;
use super::{Handles, Keyboard, Vm};
use crate::arch::{self, Cpu, layout};
use crate::boot;
use crate::bus::{Attached, Bus};
use crate::error::{Context, Error, Result};
use crate::event_loop::{Loop, Loops};
use crate::kvm::Kvm;
use crate::legacy::{
    EXIT_PORTS, ExitPort, ExitPortRequest, I8042, I8042_PORTS, PANIC_PORTS, PanicPort, SERIAL_PORTS, SerialPort,
};
use crate::memory::GuestMemory;
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
    pub mmio: Bus,
    pub ports: Bus,
    loops: Loops<Slots>,
    captures: Vec<CapturePump>,
    pub shared: Arc<VmShared>,
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Machine({:?}, {:?})", self.kvm, self.mmio)
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
        for it in self.loops.iter() {
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
    // Everything that can be wrong with the configuration is found before the hypervisor is asked for anything.
    let vcpus = config.vcpus()?;
    let cgroup = config.cgroup.as_ref().map(|cgroup| cgroup.make()).transpose()?;
    let cgroup = cgroup.and_then(|made| {
        let degraded = |why| log.push(EventKind::Degraded { what: format!("a cgroup: {why}") });
        made.map_err(degraded).ok()
    });
    let ranges = layout::memory_ranges(config.memory.size())?;
    let output = ConsoleOutput::default();
    let memory = GuestMemory::new(&ranges, config.memory.backing())?;
    let faults = MachineRef::default();
    let attachments = attachments(config, &output, &memory, &log, &faults)?;
    let Attachments { devices: attachments, listeners, published, pumps } = attachments;
    let slots = mmio_slots(attachments.len())?;
    let (cmdline, tables) = config.cmdline(&slots)?;
    let kernel = config.packed_kernel()?;
    let entry = boot::load(&memory, &kernel, &cmdline)?;
    let mut generation = [0; 16];
    sys::fill_random(&mut generation).doing(|| "making the machine's generation")?;
    arch::write_tables(&memory, tables, vcpus, &slots, generation)?;

    let kvm = Kvm::open()?;
    if usize::from(vcpus) > kvm.max_vcpus() {
        return Err(Error::invalid("vcpus", format!("{vcpus}: this host's KVM allows {}", kvm.max_vcpus())));
    }
    let cpu = Cpu::new(&kvm, &config.cpu, vcpus)?;
    ranges.iter().try_for_each(|(start, len)| cpu.addresses(start.0 + len))?;
    let registers = RegisterPages::new(slots.len()).doing(|| "making the devices' registers")?;
    let vm = make_vm(&kvm, &cpu, &memory, &registers)?;
    let signal = KickSignal::install(config.kick_signal)?;
    let shared = VmShared::new(vcpus, signal, marks, log, output, registers.clone())?;
    let shared = Arc::new(shared);
    // It was not set before.
    let _ = faults.set(Arc::downgrade(&shared));
    let Ports { bus: ports, keyboard, lines } = ports(&shared)?;
    lines.iter().try_for_each(|line| line.connect(&vm))?;
    let mut parts = Attacher {
        vm: &vm,
        memory: &memory,
        kernel: &kernel,
        shared: &shared,
        mmio: Bus::default(),
        loops: Loops::new(),
        slots: BTreeMap::new(),
    };
    parts.attach(attachments, &slots)?;
    let Attacher { mmio, loops, slots, .. } = parts;
    let kvm = Arc::new(KvmObjects::new(vm, cpu, lines, registers, memory));
    let handles = Handles {
        loops: loops.iter().map(Loop::remote).collect(),
        vsock: slots.get(&DeviceId::Vsock).map(handle),
        balloon: slots.get(&DeviceId::Balloon).map(handle),
        disks: (0..config.disks.len()).filter_map(|n| disk_handle(n, &slots)).collect(),
        nets: (0..)
            .zip(published.iter().zip(&pumps))
            .filter_map(|(n, (ports, pump))| net_handle(n, &slots, ports, pump.as_ref().map(CapturePump::counters)))
            .collect(),
        keyboard,
        #[cfg(any(test, feature = "internals"))]
        kvm: Arc::downgrade(&kvm),
    };
    let captures = pumps.into_iter().flatten().collect();
    let machine = Arc::new(Machine { kvm, mmio, ports, loops, captures, shared: shared.clone() });

    let threads = VmThreads { shared: &shared, member: cgroup.as_ref().map(CgroupGuard::member) };
    for it in &handles.loops {
        let membership = threads.membership();
        it.with(move |_| membership.enter())??;
    }
    if let Some((file, mut throttled)) = cgroup.as_ref().and_then(CgroupGuard::pressure) {
        let log = shared.log.clone();
        let notify = move || {
            if throttled() {
                log.push(EventKind::Throttled { what: Throttled::Vcpus });
            }
        };
        if let Some(it) = handles.loops.last() {
            it.with(move |slots| slots.watch_urgent(file, notify))?.doing(|| "watching the VM's cgroup")?;
        }
    }
    threads.start_captures(&machine.captures)?;
    let console = threads.start_console_writer(config)?;
    let vcpus = threads.start_vcpus(&machine, entry);
    let vm = Vm::new(shared, vcpus.threads, console, listeners, handles, cgroup);
    // A thread that could not start is an error; those that could are ended by dropping `vm`.
    vcpus.outcome.map(|()| vm)
}

/// What answers at ports.
struct Ports {
    bus: Bus,
    /// By which the guest can be asked to shut down.
    keyboard: Keyboard,
    lines: Vec<Irqfd>,
}

fn ports(shared: &Arc<VmShared>) -> Result<Ports> {
    let mut ports = Bus::default();
    let stop = |shared: &Arc<VmShared>| {
        let shared = shared.clone();
        move |reason| {
            shared.stop(reason, LastExit { vcpu_exit: Some("the guest asked for it".into()), registers: None })
        }
    };
    let (serial, fd) = SerialPort::new(shared.output.clone())?;
    let serial_line = Irqfd { fd, gsi: layout::SERIAL_IRQ };
    ports.attach(SERIAL_PORTS, Arc::new(Mutex::new(serial)))?;

    let on_reset = stop(shared);
    let (controller, fd) = I8042::new(Box::new(move || on_reset(Reason::Reset)) as Box<dyn FnMut() + Send>)?;
    let keyboard_line = Irqfd { fd, gsi: layout::I8042_IRQ };
    let keyboard: Keyboard = Arc::new(Mutex::new(controller));
    ports.attach(I8042_PORTS, keyboard.clone())?;

    let on_panic = stop(shared);
    let panic: Attached = Arc::new(Mutex::new(PanicPort::new(move || on_panic(Reason::Panic))));
    ports.attach(PANIC_PORTS, panic)?;

    let on_request = stop(shared);
    let exit_port: Attached = Arc::new(Mutex::new(ExitPort::new(move |request| {
        on_request(match request {
            ExitPortRequest::PowerOff => Reason::PowerOff,
            ExitPortRequest::Reboot => Reason::Reset,
            ExitPortRequest::Halt => Reason::Halt,
            ExitPortRequest::Fault => Reason::InitFault,
        });
    })));
    ports.attach(EXIT_PORTS, exit_port)?;
    Ok(Ports { bus: ports, keyboard, lines: vec![serial_line, keyboard_line] })
}
