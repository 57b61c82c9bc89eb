//! The one assembly: from config to running threads. It knows all modules.
//!
//! The threads `vcpuN`, `console` and `capture` start here, and the loops `io`, `disks` and `diskN` in [`devices`](super::devices).

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use super::cgroup::{CgroupGuard, CgroupHandle};
use super::config::VmConfig;
use super::devices::{
    Attacher, Attachments, DeviceInfo, MachineRef, attachments, disk_handle, handle, mmio_slots, net_handle,
};
use super::events::{EventKind, EventLog, Throttled};
use super::exit::{BootMarks, Exit, ExitReport, Reason};
use super::kvm_objects::{Irqfd, KvmObjects, make_vm};
use super::stats::DeviceStats;
use super::vcpu::{self, LastExit, VcpuControl};
use super::vcpu_gate::{Parked, VcpuGate};
use super::{Handles, Keyboard, Vm};
use crate::arch::{self, Cpu, EntryPoint, layout};
use crate::boot;
use crate::bus::{Attached, Bus};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event_loop::{Loop, Loops};
use crate::kvm::Kvm;
use crate::legacy::{
    EXIT_PORTS, ExitPort, ExitPortRequest, I8042, I8042_PORTS, PANIC_PORTS, PanicPort, SERIAL_PORTS, SerialPort,
};
use crate::memory::GuestMemory;
use crate::network::CapturePump;
use crate::sys::{self, EventFd, KickSignal, PeriodicKick, ProcessGeneration, RegisterPages, STACK, Stack, eventfd};
use crate::virtio::console::ConsoleOutput;
use crate::virtio::{DeviceId, Slots};

/// How long the end of a VM waits for what its guest has asked of devices last: disks on files that answer late.
const DEVICE_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of a VM waits for a console's writer to take the last bytes.
const CONSOLE_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// What every thread of a VM sees of its end.
pub(super) struct VmShared {
    end: Mutex<End>,
    ended: Condvar,
    /// Readable once the VM has ended.
    pub exit_fd: EventFd,
    pub vcpus: Vec<VcpuControl>,
    pub gate: VcpuGate,
    running_vcpus: AtomicUsize,
    signal: KickSignal,
    pub marks: BootMarks,
    pub log: Arc<EventLog>,
    pub output: ConsoleOutput,
    pub devices: Mutex<Vec<DeviceInfo>>,
    threads: Mutex<Vec<ThreadId>>,
    /// Of the VM's threads.
    stacks: Mutex<Vec<Stack>>,
    /// What the guest reads of its devices, in the order of their windows.
    pub registers: RegisterPages,
    /// Where the VM's threads are.
    pub origin: ProcessGeneration,
}

/// Why the VM ends, and where its guest was.
#[derive(Clone)]
struct EndReason {
    reason: Reason,
    last: LastExit,
}

#[derive(Default)]
struct End {
    reason: Option<EndReason>,
    exit: Option<Exit>,
}

impl VmShared {
    fn end(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stopping(&self) -> bool {
        self.gate.is_shut_down()
    }

    /// Makes all vCPUs stop. The first reason is the one that is reported.
    pub(super) fn stop(&self, reason: Reason, last: LastExit) {
        if !self.origin.is_current() {
            return;
        }
        self.end().reason.get_or_insert(EndReason { reason, last });
        self.marks.ended();
        self.gate.shut_down();
        self.kick();
    }

    /// Whether the VM was ended by us, so that nothing tells yet where its guest was.
    pub(super) fn ended_without_reason(&self) -> bool {
        let ended = |it: &EndReason| {
            let unknown = it.last.vcpu_exit.is_none() && it.last.registers.is_none();
            matches!(it.reason, Reason::Killed | Reason::Unresponsive(_)) && unknown
        };
        self.end().reason.as_ref().is_some_and(ended)
    }

    /// Says where the guest was when it was ended.
    pub(super) fn set_last_exit(&self, last: LastExit) {
        if let Some(it) = &mut self.end().reason {
            it.last = last;
        }
    }

    /// Gets all vCPUs out of the guest, to look at what is asked of them.
    pub(super) fn kick(&self) {
        if !self.origin.is_current() {
            return;
        }
        self.vcpus.iter().for_each(|vcpu| vcpu.kick(self.signal));
    }

    /// Lets the calling thread, a vCPU's, leave the guest now and then, as long as what this gives lives.
    pub(super) fn kick_periodically(&self, period: Duration) -> Option<PeriodicKick> {
        let kick = PeriodicKick::start(self.signal, period);
        let degraded = |error: &io::Error| {
            self.log.push(EventKind::Degraded { what: format!("the end of a guest that halts for good: {error}") });
        };
        kick.inspect_err(degraded).ok()
    }

    /// Brings all vCPUs to the gate, within `limit`.
    pub(super) fn park_vcpus(&self, limit: Duration) -> Result<()> {
        if !self.origin.is_current() {
            return Err(Error::new(
                ErrorKind::InvalidState,
                "the virtual machine runs in another process, which has forked",
            ));
        }
        self.gate.close();
        self.kick();
        match self.gate.wait_parked(self.vcpus.len(), Instant::now() + limit) {
            Parked::All => Ok(()),
            Parked::Gone => Err(Error::vm_ended()),
            Parked::Busy(n) => {
                self.gate.open();
                Err(Error::new(ErrorKind::TimedOut, format!("{n} vCPUs were busy for longer than {limit:?}")))
            }
        }
    }

    /// Whether the calling thread is one of the VM's.
    pub(super) fn is_own_thread(&self) -> bool {
        let own = thread::current().id();
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).contains(&own)
    }

    /// The calling thread is one of the VM's.
    fn register_thread(&self) {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread::current().id());
        match Stack::of_current() {
            Ok(stack) => self.stacks.lock().unwrap_or_else(PoisonError::into_inner).push(stack),
            Err(error) => log::debug!("a thread's stack is not counted: {error}"),
        }
    }

    /// Bytes that this process has in memory for the VM beside the guest's.
    pub(super) fn overhead(&self) -> u64 {
        let stacks = self.stacks.lock().unwrap_or_else(PoisonError::into_inner);
        let stacks: u64 = stacks.iter().map(|stack| stack.resident()).sum();
        let held = self.vcpus.iter().map(VcpuControl::held).sum::<usize>() + self.output.held();
        stacks + (held + self.registers.host().1) as u64
    }

    /// What is known now.
    pub(super) fn report(&self) -> ExitReport {
        match &self.end().exit {
            Some(exit) => exit.report().clone(),
            None => self.take_report(LastExit::default()),
        }
    }

    fn take_report(&self, LastExit { vcpu_exit, registers }: LastExit) -> ExitReport {
        let devices = self.device_stats();
        ExitReport { stage: self.marks.stage(), console: self.output.tail(), vcpu_exit, registers, devices }
    }

    pub(super) fn device_stats(&self) -> Vec<DeviceStats> {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        let stats = |DeviceInfo { id, counters, interrupt, engine, .. }: &DeviceInfo| DeviceStats {
            device: *id,
            kicks: counters.kicks.load(Ordering::Relaxed),
            requests: counters.requests.load(Ordering::Relaxed),
            bytes_from_guest: counters.bytes_from_guest.load(Ordering::Relaxed),
            bytes_to_guest: counters.bytes_to_guest.load(Ordering::Relaxed),
            interrupts: interrupt.raised(),
            driver_errors: counters.driver_errors.load(Ordering::Relaxed),
            io_errors: counters.io_errors.load(Ordering::Relaxed),
            throttled: counters.throttled.load(Ordering::Relaxed),
            throttled_time: Duration::from_nanos(counters.throttled_nanos.load(Ordering::Relaxed)),
            engine: *engine,
            dropped: if *id == DeviceId::Console { self.output.dropped() } else { 0 },
        };
        devices.iter().map(stats).collect()
    }

    /// Notifies all waiters: all vCPUs have stopped and all devices are at rest.
    fn finish(&self) {
        let mut end = self.end();
        let unknown = || EndReason { reason: Reason::Killed, last: LastExit::default() };
        let EndReason { reason, last } = end.reason.clone().unwrap_or_else(unknown);
        let exit = reason.exit(Arc::new(self.take_report(last)));
        end.exit = Some(exit.clone());
        drop(end);
        self.log.push(EventKind::Ended { exit });
        self.ended.notify_all();
        let _ = self.exit_fd.write(1);
    }

    /// Waits for the end, but not beyond `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Option<Exit> {
        let mut end = self.end();
        loop {
            if let Some(exit) = &end.exit {
                return Some(exit.clone());
            }
            end = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                None => self.ended.wait(end).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => return None,
                Some(left) => self.ended.wait_timeout(end, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}

/// The assembled parts that vCPU threads need. Field order is the order of release: descriptors before memory. A loop that is
/// left behind keeps its own share of both.
pub(super) struct Machine {
    kvm: Arc<KvmObjects>,
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
    fn vcpu_done(&self) {
        if self.shared.running_vcpus.fetch_sub(1, Ordering::SeqCst) != 1 {
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
    let shared = Arc::new(VmShared {
        end: Mutex::default(),
        ended: Condvar::new(),
        exit_fd: eventfd().doing(|| "creating the exit descriptor")?,
        vcpus: (0..vcpus).map(|_| VcpuControl::default()).collect(),
        gate: VcpuGate::default(),
        running_vcpus: AtomicUsize::new(vcpus.into()),
        signal: KickSignal::install(config.kick_signal)?,
        marks,
        log,
        output: output.clone(),
        devices: Mutex::default(),
        threads: Mutex::default(),
        stacks: Mutex::default(),
        registers: registers.clone(),
        origin: ProcessGeneration::current(),
    });
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

    let member = cgroup.as_ref().map(CgroupGuard::member);
    handles.loops.iter().try_for_each(|it| {
        let (shared, member) = (shared.clone(), member.clone());
        it.with(move |_| {
            shared.register_thread();
            member.map_or(Ok(()), |member| member.join())
        })?
    })?;
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
    start_captures(&machine.captures, &shared, member.as_ref())?;
    let pump = start_console_writer(config, &shared, member.clone())?;
    let threads = start_vcpus(&machine, vcpus, entry, member);
    let vm = Vm::new(shared, threads.threads, pump, listeners, handles, cgroup);
    // A thread that could not start is an error; those that could are ended by dropping `vm`.
    threads.outcome.map(|()| vm)
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

/// The thread that gives the console to the embedder's writer, which may block.
fn start_console_writer(
    config: &VmConfig,
    shared: &Arc<VmShared>,
    member: Option<CgroupHandle>,
) -> Result<Option<JoinHandle<()>>> {
    let Some(writer) = config.console.writer.clone() else {
        return Ok(None);
    };
    let output = shared.output.clone();
    output.expect_pump();
    let shared = Arc::downgrade(shared);
    let pump = move || {
        if let Some(shared) = shared.upgrade() {
            shared.register_thread();
        }
        // A writer that is slow because it has no time is better than none.
        if let Some(Err(error)) = member.map(|member| member.join()) {
            log::warn!("the console's thread: {error}");
        }
        let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
        output.pump(&mut *writer);
    };
    // The writer is the embedder's: its stack is larger, and still no huge page.
    sys::spawn("console".into(), 4 * STACK, pump).map(Some).doing(|| "starting thread console")
}

/// Starts the threads that give captures to their writers, which may block. The wait for them has a bound.
fn start_captures(captures: &[CapturePump], shared: &Arc<VmShared>, member: Option<&CgroupHandle>) -> Result<()> {
    for pump in captures {
        let (shared, member, pump) = (Arc::downgrade(shared), member.cloned(), pump.clone());
        let body = move || {
            if let Some(shared) = shared.upgrade() {
                shared.register_thread();
            }
            if let Some(Err(error)) = member.map(|member| member.join()) {
                log::warn!("a capture's thread: {error}");
            }
            pump.run();
        };
        sys::spawn("capture".into(), 4 * STACK, body).doing(|| "starting thread capture")?;
    }
    Ok(())
}

struct VcpuThreads {
    threads: Vec<JoinHandle<()>>,
    outcome: Result<()>,
}

/// Starts the vCPU threads; each makes its vCPU, as KVM wants, and runs it once all are made.
fn start_vcpus(machine: &Arc<Machine>, vcpus: u8, entry: EntryPoint, member: Option<CgroupHandle>) -> VcpuThreads {
    let (ready, answers) = mpsc::channel::<Result<()>>();
    let (mut threads, mut outcome, mut gates) = (Vec::new(), Ok(()), Vec::new());
    for id in 0..vcpus {
        let (gate, open) = mpsc::sync_channel::<()>(1);
        let (its_machine, ready, member) = (machine.clone(), ready.clone(), member.clone());
        let body = move || {
            let machine = its_machine;
            machine.shared.register_thread();
            let joined = member.map_or(Ok(()), |member| member.join());
            let made = joined.and_then(|()| make_vcpu(&machine, id, entry));
            let (vcpu, answer) = match made {
                Ok(vcpu) => (Some(vcpu), Ok(())),
                Err(error) => (None, Err(error.doing(format!("making vCPU {id}")))),
            };
            let sent = ready.send(answer);
            drop(ready);
            // A gate that closes instead of opening means that another vCPU could not be made.
            if let (Some(vcpu), Ok(()), Ok(())) = (vcpu, sent, open.recv()) {
                vcpu::run(&machine, id, vcpu);
            }
            machine.vcpu_done();
        };
        match sys::spawn(format!("vcpu{id}"), STACK, body) {
            Ok(thread) => {
                threads.push(thread);
                gates.push(gate);
            }
            Err(error) => {
                outcome = Err(error).doing(|| format!("starting thread vcpu{id}"));
                // Those that will never run are done.
                (id..vcpus).for_each(|_| machine.vcpu_done());
                break;
            }
        }
    }
    drop(ready);
    for answer in answers {
        outcome = outcome.and(answer);
    }
    if outcome.is_ok() {
        // A thread waits at its gate until it opens or closes, so this reaches all of them.
        for gate in &gates {
            let _ = gate.send(());
        }
    }
    VcpuThreads { threads, outcome }
}

fn make_vcpu(machine: &Machine, id: u8, entry: EntryPoint) -> Result<crate::kvm::VcpuFd> {
    machine.shared.signal.unblock().doing(|| "unblocking the kick signal")?;
    let vcpu = machine.kvm.make_vcpu(&machine.kvm.vm(), id)?;
    if id == 0 {
        arch::boot_vcpu(&vcpu, entry)?;
    }
    Ok(vcpu)
}
