//! [`Vm`]: a virtual machine that runs, and everything to make, watch and end one.

mod builder;
mod cgroup;
mod config;
mod device_events;
mod device_set;
mod devices;
pub(crate) mod disk;
pub(crate) mod events;
pub(crate) mod exit;
#[cfg(any(test, feature = "internals"))]
mod generation;
mod halt;
#[cfg(any(test, feature = "internals"))]
mod hotplug;
mod kvm_objects;
mod machine;
mod mmio_slots;
pub(crate) mod net;
pub(crate) mod overlay;
#[cfg(any(test, feature = "internals"))]
mod rebuild;
mod shared;
mod spec;
pub(crate) mod stats;
mod threads;
mod vcpu;
mod vcpu_gate;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub(crate) use crate::arch::CpuProfile;
pub(crate) use crate::memory::Memory;
pub use builder::VmBuilder;
pub use cgroup::{Cgroup, CgroupStats};
pub use config::{Console, Vsock};
pub use disk::Disk;
pub use exit::{Exit, ExitReport, Timeline};
#[cfg(any(test, feature = "internals"))]
pub use generation::renew_generation;
#[cfg(any(test, feature = "internals"))]
pub use hotplug::{attach_disk, attach_net, detach_disk, detach_net};
#[cfg(feature = "container")]
pub(crate) use net::AddressConfig;
pub use net::Net;
#[cfg(any(test, feature = "internals"))]
pub use rebuild::rebuild;
#[cfg(any(test, feature = "internals"))]
pub use spec::{LiveParts, VmSpec, join, split};
pub use stats::{MemoryStats, Stats};

use disk::DiskHandle;
use events::{EventKind, Events, PauseCause};
use net::NetHandle;

use crate::arch::Keyboard;
use crate::boot::Kernel;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event_loop::Remote;
use crate::legacy::{EventSender, Keys, MachineEvent};
use crate::size::Size;
use crate::sys::{STACK, borrow, deadline, leak, left, spawn};
use crate::virtio::balloon::Balloon;
use crate::virtio::vsock::{VsockListener, VsockStream};
use crate::virtio::{DeviceHandle, Slots};
use cgroup::CgroupGuard;
use exit::Reason;
use machine::Machine;
use shared::VmShared;
use vcpu::LastExit;

/// How long a guest may take to say how it uses its memory.
const MEMORY_STATS_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a guest may take to power off by its power key, before Ctrl-Alt-Del is pressed too.
const POWER_KEY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection to the guest may take to be answered.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a pause waits for what devices and vCPUs are doing.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How much longer its last answer may take.
const PAUSE_MARGIN: Duration = Duration::from_secs(1);

/// How long a killed VM may take to end. That is as long as its devices and the embedder's writers may take for their
/// last requests, and some more. On a host that works it takes milliseconds.
const END_TIMEOUT: Duration = Duration::from_secs(15);

/// A running virtual machine. Any number live in one process.
///
/// Each has its own threads. The [crate's documentation](crate) lists what guests of one process share all the same.
///
/// The handle is cheap to clone and may be used from any thread. Dropping the last clone kills the guest and waits until
/// its threads have ended. That takes milliseconds, and at most 26 seconds where a file of the host's does not answer or
/// the drop of an embedder's backend hangs. Such a thread is left behind then. On a thread of the VM's own, such as one
/// that calls a backend of the embedder's, it does not wait.
///
/// The descriptor behind [`AsFd`] and [`AsRawFd`] becomes readable when the VM has ended, for poll, epoll, tokio, smol or
/// mio.
#[derive(Clone)]
pub struct Vm {
    running: Arc<RunningVm>,
}

/// What all clones of a handle share.
struct RunningVm {
    shared: Arc<VmShared>,
    threads: Vec<JoinHandle<()>>,
    /// The console's thread. Its writer may block forever, so [`VmShared`] bounds the wait for it.
    pump: Option<JoinHandle<()>>,
    /// Whether the VM is paused; locked while that changes.
    paused: Mutex<bool>,
    /// Listeners that were configured and not yet taken.
    listeners: Mutex<Vec<VsockListener>>,
    handles: Handles,
    /// Gone when its vCPUs are.
    #[cfg_attr(
        not(any(test, feature = "internals")),
        allow(dead_code, reason = "so far tests alone change a machine")
    )]
    machine: Weak<Machine>,
    /// It has not ended in time, and the wait for it was given up.
    left_behind: AtomicBool,
    /// Goes last, when no thread is in it any more.
    cgroup: Option<CgroupGuard>,
}

/// Ways to the parts of a machine.
struct Handles {
    loops: Vec<Remote<Slots>>,
    vsock: Option<DeviceHandle<crate::virtio::vsock::Vsock>>,
    balloon: Option<DeviceHandle<Balloon>>,
    disks: Vec<DiskHandle>,
    nets: Vec<NetHandle>,
    keyboard: Keyboard,
    events: EventSender,
}

impl Vm {
    /// Returns a builder for a VM that boots `kernel`.
    ///
    /// By default it has one vCPU, 256 MiB of memory, and neither disks nor networks. A console, a source of random
    /// numbers and a memory balloon are always there.
    pub fn builder(kernel: Kernel) -> VmBuilder {
        VmBuilder::new(kernel)
    }

    fn new(
        shared: Arc<VmShared>,
        threads: Vec<JoinHandle<()>>,
        pump: Option<JoinHandle<()>>,
        listeners: Vec<VsockListener>,
        handles: Handles,
        machine: Weak<Machine>,
        cgroup: Option<CgroupGuard>,
    ) -> Self {
        let (paused, listeners) = (Mutex::default(), Mutex::new(listeners));
        let left_behind = AtomicBool::new(false);
        let running = RunningVm { shared, threads, pump, paused, listeners, handles, machine, left_behind, cgroup };
        Self { running: Arc::new(running) }
    }

    /// Returns a handle that does not keep the VM.
    #[cfg(feature = "container")]
    pub(crate) fn downgrade(&self) -> WeakVm {
        WeakVm(Arc::downgrade(&self.running.shared))
    }

    /// Starts a thread of the embedder's that works for the guest, and so counts for the VM's control group.
    #[cfg(feature = "container")]
    pub(crate) fn spawn_beside(&self, name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let member = self.running.cgroup.as_ref().map(CgroupGuard::member);
        let body = move || {
            if let Some(Err(error)) = member.map(|member| member.join()) {
                log::warn!("thread {name}: {error}");
            }
            body();
        };
        spawn(name.into(), 4 * STACK, body).doing(|| format!("starting thread {name}")).map(drop)
    }

    /// Waits until the VM has ended.
    ///
    /// May be called repeatedly and from many threads, but not from one of the VM's own: the VM would wait for it.
    pub fn wait(&self) -> Exit {
        loop {
            if let Some(exit) = self.running.shared.wait(None) {
                return exit;
            }
        }
    }

    /// Waits until the VM has ended, at most `timeout`; `None` when it still runs.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Exit> {
        self.running.shared.wait(deadline(timeout))
    }

    /// Returns how the VM ended, or `None` while it runs. Never waits.
    pub fn try_wait(&self) -> Option<Exit> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Asks the guest to shut down, and kills it when it still runs after `grace`.
    ///
    /// The guest is asked by two keys of its keyboard. First comes the power key, and the power button of kernels that use
    /// ACPI, upon which systems with systemd-logind or acpid power off. When it still runs after a quarter of `grace`, at most ten seconds,
    /// Ctrl-Alt-Del follows, which every init understands. Most inits end with a reset, which is [`Exit::Reboot`] and
    /// starts nothing again. A systemd that is powering off already is not disturbed by it.
    ///
    /// A guest with neither a keyboard driver nor ACPI cannot be asked, and is killed after `grace`. A paused one goes on first.
    ///
    /// A killed machine has ended within milliseconds, and after 15 seconds at most, where a file of the host's does
    /// not answer.
    ///
    /// # Errors
    /// `TimedOut` when the killed machine has not ended after those 15 seconds. `InvalidState` on a thread of the VM's
    /// own, which cannot wait for its end.
    pub fn stop(&self, grace: Duration) -> Result<Exit> {
        self.check_thread()?;
        let begin = Instant::now();
        // One that has ended is reported by what follows. One that is about to be paused cannot be asked for anything.
        if let Ok(paused) = self.running.paused.try_lock() {
            let _ = self.go_on_from(paused);
        }
        let second = begin.checked_add((grace / 4).min(POWER_KEY_TIMEOUT));
        for (keys, until) in [(Keys::Power, second), (Keys::CtrlAltDel, begin.checked_add(grace))] {
            // Also by ACPI: systems that get both power off once. A child of fork has copies of the registers alone.
            if keys == Keys::Power && self.running.is_current() {
                self.running.handles.events.raise(MachineEvent::PowerButton);
            }
            if !self.running.handles.keyboard.press(keys) {
                log::info!("the guest has no keyboard driver, so that it gets at most the power button");
            }
            if let Some(exit) = self.running.shared.wait(until) {
                return Ok(exit);
            }
        }
        self.end()
    }

    /// # Errors
    /// `InvalidState` on a thread of the VM's own.
    pub(crate) fn check_thread(&self) -> Result<()> {
        match self.running.shared.is_own_thread() {
            true => {
                Err(Error::new(ErrorKind::InvalidState, "called on a thread of the machine's own: kill it instead"))
            }
            false => Ok(()),
        }
    }

    /// Kills it and waits for its end, which has a bound.
    pub(crate) fn end(&self) -> Result<Exit> {
        self.running.end()
    }

    /// Stops the guest where it is, until [`Vm::resume`]. Idempotent.
    ///
    /// When this returns no vCPU runs, and no device touches the guest's memory. Waits for requests in flight, at most
    /// 11 seconds, and as long for each pause that other threads have begun.
    ///
    /// Clocks go on, as they do for a stopped process: timers that expire meanwhile fire at once afterwards. The guest
    /// is notified that it did not run, so that its watchdogs are quiet. Data in flight between embedder and guest is
    /// kept, and delivered after [`Vm::resume`].
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended. `TimedOut` when a device is busy for too long, such as on a file that does
    /// not answer; then the guest goes on.
    pub fn pause(&self) -> Result<()> {
        let mut paused = self.running.paused.lock().unwrap_or_else(PoisonError::into_inner);
        if !*paused {
            if let Err(error) = self.quiesce() {
                self.go_on();
                return Err(error.doing("pausing the VM"));
            }
            *paused = true;
            self.running.shared.log.push(EventKind::Paused { cause: PauseCause::Embedder });
        }
        Ok(())
    }

    /// Parks all vCPUs, and ends what devices have in flight. [`Vm::go_on`] undoes it, also where it fails.
    fn quiesce(&self) -> Result<()> {
        let deadline = Instant::now() + PAUSE_TIMEOUT;
        self.running.shared.park_vcpus(PAUSE_TIMEOUT)?;
        self.running.handles.loops.iter().try_for_each(|it| it.suspend(left(deadline)))?;
        // No loop looks at anything any more, and what its devices have in flight with the host comes to its end.
        let calm =
            |it: &Remote<Slots>| it.with_timeout(left(deadline) + PAUSE_MARGIN, move |it| it.pause(left(deadline)));
        match self.running.handles.loops.iter().map(calm).collect::<Result<Vec<_>>>()?.contains(&false) {
            true => {
                Err(Error::new(ErrorKind::TimedOut, format!("a device was busy for longer than {PAUSE_TIMEOUT:?}")))
            }
            false => Ok(()),
        }
    }

    /// Lets a paused guest go on. Idempotent.
    ///
    /// That is one paused by [`Vm::pause`] or by a disk ([`ErrorAction::Pause`](crate::disk::ErrorAction::Pause)), which then tries again what had
    /// failed. Does not wait for the guest, but for a pause that another thread has begun: 11 seconds at most.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn resume(&self) -> Result<()> {
        self.go_on_from(self.running.paused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn go_on_from(&self, mut paused: MutexGuard<'_, bool>) -> Result<()> {
        if std::mem::take(&mut *paused) | self.running.shared.gate.release() {
            self.running.shared.log.push(EventKind::Resumed);
            self.go_on();
        }
        match self.running.shared.stopping() {
            true => Err(Error::vm_ended().doing("resuming the VM")),
            false => Ok(()),
        }
    }

    fn go_on(&self) {
        for it in &self.running.handles.loops {
            it.resume();
            // One that has ended has nothing to go on with.
            let _ = it.post(Slots::resume);
        }
        self.running.shared.gate.open();
    }

    /// Ends the VM now, whatever the guest does. Idempotent.
    ///
    /// Does not wait; [`Vm::wait`] returns when the VM has ended.
    pub fn kill(&self) {
        self.running.shared.stop(Reason::Killed, LastExit::default());
    }

    /// Whether this process runs it, and is no child of fork that has a copy of the handle.
    #[cfg(feature = "container")]
    pub(crate) fn is_current(&self) -> bool {
        self.running.is_current()
    }

    /// Whether the calling thread is one of the VM's, which cannot wait for the VM's end.
    #[cfg(feature = "container")]
    pub(crate) fn is_own_thread(&self) -> bool {
        self.running.shared.is_own_thread()
    }

    /// Returns what is known of the VM now, or was known at its end.
    ///
    /// It says how far the guest has come and what it printed.
    pub fn report(&self) -> ExitReport {
        self.running.shared.report()
    }

    /// Returns a stream of the VM's events, from its start on.
    ///
    /// Each call returns a stream of its own, and the VM never waits for any of them.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub fn events(&self) -> Result<Events> {
        self.running.shared.log.reader()
    }

    /// Returns the counters of vCPUs and devices. Does not disturb the guest.
    pub fn stats(&self) -> Stats {
        let vcpus = self.running.shared.vcpus.iter().map(vcpu::VcpuControl::stats).collect();
        Stats {
            vcpus,
            devices: self.running.shared.device_stats(),
            cgroup: self.running.cgroup.as_ref().map(CgroupGuard::stats),
        }
    }

    /// Returns what the guest's memory costs the host, and how the guest uses it.
    ///
    /// Waits at most a second for the guest's answer, and ten for a host that is busy.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended; `TimedOut` when the host is too busy for ten seconds.
    pub fn memory_stats(&self) -> Result<MemoryStats> {
        let (answer, wait) = mpsc::sync_channel(1);
        let (memory, balloon, reported) = self.balloon()?.with(move |balloon, io| {
            balloon.ask(io, answer);
            (balloon.memory().clone(), balloon.actual(), balloon.reported())
        })?;
        let guest = wait.recv_timeout(MEMORY_STATS_TIMEOUT).ok();
        let resident = memory.resident().doing(|| "counting the guest's pages")?;
        let all = [memory.size(), resident, self.running.shared.overhead(), balloon, reported];
        let [configured, resident, overhead, balloon, reported] = all.map(Size::bytes);
        Ok(MemoryStats { configured, resident, overhead, balloon, reported, guest })
    }

    /// Returns the file of the guest's memory, which other processes can map.
    ///
    /// Guest memory below 3 GiB lies at its beginning, and what the guest has above 4 GiB right behind that. `None`
    /// unless it is [`Memory::memfd`](crate::memory::Memory::memfd) or [`Memory::hugetlb`](crate::memory::Memory::hugetlb).
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended, `ResourceExhausted` when the process has no descriptors left.
    pub fn memory_fd(&self) -> Result<Option<OwnedFd>> {
        let file = self.balloon()?.with(|balloon, _| balloon.memory().file())?;
        file.map(|file| file.as_fd().try_clone_to_owned().doing(|| "opening the guest's memory once more")).transpose()
    }

    /// Asks the guest to give `size` of its memory back to the host.
    ///
    /// The guest does not use that memory until it is asked for less; at first it is asked for nothing. It gives memory
    /// back when it can, and [`MemoryStats::balloon`] says how much. A guest that runs short of memory takes some back
    /// by itself. Does not wait for the guest.
    ///
    /// What a guest frees goes back to the host without this (free page reporting, in pieces of 2 MiB and more). So
    /// this is for taking memory that it has not freed: caches, above all.
    ///
    /// # Errors
    /// `InvalidConfig` for more than the guest has, `InvalidState` when the VM has ended.
    pub fn set_balloon(&self, size: Size) -> Result<()> {
        self.balloon()?.with(move |balloon, io| {
            let all = Size::bytes(balloon.memory().size());
            if size > all {
                return Err(Error::invalid("set_balloon", format!("{size}: the guest has {all}")));
            }
            balloon.set_target(size.as_bytes(), io);
            Ok(())
        })?
    }

    fn balloon(&self) -> Result<&DeviceHandle<Balloon>> {
        self.running
            .handles
            .balloon
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::InvalidState, "this VM has no balloon"))
    }

    /// Returns the `n`th disk, counted from 0 in the order of [`VmBuilder::disk`].
    ///
    /// # Errors
    /// `NotFound` when there are fewer.
    pub fn disk(&self, n: usize) -> Result<DiskHandle> {
        let disks = &self.running.handles.disks;
        disks.get(n).cloned().ok_or_else(|| no_such("disk", n, disks.len()))
    }

    /// Returns the `n`th network card, counted from 0 in the order of [`VmBuilder::net`].
    ///
    /// # Errors
    /// `NotFound` when there are fewer.
    pub fn net(&self, n: usize) -> Result<NetHandle> {
        let nets = &self.running.handles.nets;
        nets.get(n).cloned().ok_or_else(|| no_such("network", n, nets.len()))
    }

    /// Returns when each stage was reached, counted from the call of `start`.
    pub fn timeline(&self) -> Timeline {
        self.running.shared.marks.timeline()
    }

    /// Listens for connections that guest programs make to `port` of the host (CID 2).
    ///
    /// When the port was configured with [`Vsock::listen`], earlier connections are waiting already.
    ///
    /// # Errors
    /// `AlreadyExists` when there is a listener for it, `InvalidState` without a vsock device or when the VM has ended.
    pub fn listen_vsock(&self, port: u32) -> Result<VsockListener> {
        let mut configured = self.running.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = configured.iter().position(|l| l.port() == port) {
            return Ok(configured.swap_remove(at));
        }
        drop(configured);
        self.vsock()?.with(move |vsock, _| vsock.listen(port))?
    }

    /// As [`Vm::listen_vsock`], for up to three ports by one request to the device's thread. None of them was configured.
    #[cfg(feature = "container")]
    pub(crate) fn listen_vsock_ports(&self, ports: [Option<u32>; 3]) -> Result<[Option<VsockListener>; 3]> {
        self.vsock()?.with(move |vsock, _| {
            let [first, second, third] = ports.map(|port| port.map(|port| vsock.listen(port)).transpose());
            Ok([first?, second?, third?])
        })?
    }

    /// Connects to a program in the guest that listens on vsock port `port`.
    ///
    /// Waits at most ten seconds for its answer, and ten for a host that is busy.
    ///
    /// # Errors
    /// `NotFound` when nothing listens there. `InvalidState` without a vsock device, before the guest has set it up, or
    /// when the VM has ended. `TimedOut` when the guest does not answer.
    pub fn connect_vsock(&self, port: u32) -> Result<VsockStream> {
        let (answer, wait) = mpsc::sync_channel(1);
        self.vsock()?.with(move |vsock, io| vsock.connect(io, port, answer))?;
        match wait.recv_timeout(CONNECT_TIMEOUT) {
            Ok(outcome) => outcome,
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Error::new(
                ErrorKind::TimedOut,
                format!("connecting to vsock port {port}: the guest did not answer within {CONNECT_TIMEOUT:?}"),
            )),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::vm_ended()),
        }
    }

    fn vsock(&self) -> Result<&DeviceHandle<crate::virtio::vsock::Vsock>> {
        self.running.handles.vsock.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::InvalidState, "this VM has no vsock device: add one with `VmBuilder::vsock`")
        })
    }
}

/// The error about the `n`th device of a kind of which there are `all`.
pub(crate) fn no_such(what: &str, n: usize, all: usize) -> Error {
    Error::new(ErrorKind::NotFound, format!("{what} {n}: there are {all}, counted from 0"))
}

/// A handle that does not keep the VM, and whose drop waits for nothing.
#[cfg(feature = "container")]
pub(crate) struct WeakVm(Weak<VmShared>);

#[cfg(feature = "container")]
impl WeakVm {
    /// Returns how the VM ended, or `None` while it runs.
    pub(crate) fn try_wait(&self) -> Option<Exit> {
        self.0.upgrade()?.wait(deadline(Duration::ZERO))
    }

    /// Adds an event of the guest's programs, which the VM itself does not see.
    pub(crate) fn push_event(&self, kind: events::EventKind) {
        if let Some(shared) = self.0.upgrade() {
            shared.log.push(kind);
        }
    }

    /// Ends the VM, whose guest does not do its part.
    pub(crate) fn give_up(&self, why: String) {
        log::warn!("ending a VM whose guest does not answer: {why}");
        if let Some(shared) = self.0.upgrade() {
            shared.stop(Reason::Unresponsive(why), LastExit::default());
        }
    }

    /// Whether no vCPU may run, by the embedder's will or a disk's.
    pub(crate) fn stands_still(&self) -> bool {
        self.0.upgrade().is_some_and(|shared| shared.gate.closed())
    }

    /// Returns a handle without a VM.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn dangling() -> Self {
        Self(Weak::new())
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.running.shared.exit_fd)
    }
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl RunningVm {
    /// Whether this process runs it, and is no child of fork that has a copy of the handle.
    fn is_current(&self) -> bool {
        self.shared.origin.is_current()
    }

    /// Kills it and waits for its end, which has a bound.
    fn end(&self) -> Result<Exit> {
        self.shared.stop(Reason::Killed, LastExit::default());
        self.shared.wait(deadline(END_TIMEOUT)).ok_or_else(|| {
            self.left_behind.store(true, Ordering::SeqCst);
            Error::new(
                ErrorKind::TimedOut,
                format!(
                    "the machine has not ended within {END_TIMEOUT:?} after it was killed: a file of the host's hangs"
                ),
            )
        })
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        // A child of fork has a copy of the handle, and nothing of the VM.
        if !self.is_current() {
            leak((std::mem::take(&mut self.threads), self.pump.take(), self.shared.clone()));
            return;
        }
        if self.left_behind.load(Ordering::SeqCst) {
            return;
        }
        // A thread cannot wait for its own end, so another one does.
        if self.shared.is_own_thread() {
            self.shared.stop(Reason::Killed, LastExit::default());
            let (threads, cgroup, shared) =
                (std::mem::take(&mut self.threads), self.cgroup.take(), self.shared.clone());
            let wait = move || {
                if shared.wait(deadline(END_TIMEOUT)).is_some() {
                    threads.into_iter().for_each(|thread| drop(thread.join()));
                }
                drop(cgroup);
            };
            if let Err(error) = spawn("reaper".into(), STACK, wait) {
                log::error!("no thread waits for the end of a VM: {error}");
            }
            return;
        }
        if let Err(error) = self.end() {
            log::error!("a VM is left behind: {error}");
            return;
        }
        // They have nothing more to do.
        for thread in self.threads.drain(..) {
            // A panic there was our own mistake; it was reported by the panic hook, and the VM has ended all the same.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.running.shared;
        write!(f, "Vm({} vCPUs, {})", shared.vcpus.len(), shared.marks.stage())
    }
}
