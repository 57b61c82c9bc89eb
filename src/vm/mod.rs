//! [`Vm`]: a virtual machine that runs, and everything to make, watch and end one.

mod builder;
mod cgroup;
mod config;
mod devices;
mod disk;
mod events;
mod exit;
mod halt;
mod machine;
mod net;
mod overlay;
mod stats;
mod vcpu;
mod vcpu_gate;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use builder::VmBuilder;
pub use cgroup::{Cgroup, CgroupStats};
pub use config::{Console, Vsock};
pub use disk::{
    Cache, Disk, DiskEngine, DiskFault, DiskHandle, DiskLimit, DiskOperation, DiskUsage, ErrorAction, ErrorClass,
};
pub use events::{Event, EventKind, Events};
pub use exit::{Exit, Registers, Stage, Timeline, Trace};
#[cfg(feature = "container")]
pub(crate) use net::Link;
pub use net::{
    Capture, CaptureStats, Cidr, Denial, Mac, Net, NetHandle, NetLimit, NetStats, Policy, Port, Protocol,
    PublishedPort, Rule, Switch, Why,
};
pub use overlay::{Base, Overlay, OverlayInfo, Progress};
pub use stats::{DeviceStats, GuestMemoryUse, MemoryStats, Stats, VcpuStats};

pub use crate::arch::{CpuProfile, CpuidBits, CpuidRegister};
use crate::boot::Kernel;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event::Remote;
use crate::legacy::{I8042, Keys};
pub use crate::memory::Memory;
use crate::size::Size;
use crate::sys::{borrow, deadline, leak, left};
use crate::virtio::balloon::Balloon;
use crate::virtio::vsock::{VsockListener, VsockStream};
use crate::virtio::{DeviceHandle, Slots};
use cgroup::CgroupGuard;
use exit::Reason;
use machine::Shared;

type Keyboard = Arc<Mutex<I8042<Box<dyn FnMut() + Send>>>>;

/// How long a guest may take to say how it uses its memory.
const MEMORY_PATIENCE: Duration = Duration::from_secs(1);
/// How long a guest may take to power off by its power key, before Ctrl-Alt-Del is pressed too.
const POWER_KEY_PATIENCE: Duration = Duration::from_secs(10);
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
/// The handle may be used from any thread. Dropping it kills the guest and waits until its threads have ended, at most
/// 15 seconds. A thread that hangs in a file of the host's is left behind then.
///
/// The descriptor behind [`AsFd`] becomes readable when the VM has ended, for poll, epoll, tokio, smol or mio.
pub struct Vm {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// The console's writer may block for ever, so nobody waits for its thread but within [`Shared`]'s bound.
    pump: Option<JoinHandle<()>>,
    /// Whether the VM is paused; locked while that changes.
    paused: Mutex<bool>,
    /// Listeners that were configured and not yet taken.
    listeners: Mutex<Vec<VsockListener>>,
    handles: Handles,
    /// It has not ended in time, and nobody waits for it any more.
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
}

impl Vm {
    /// Returns a builder for a VM that boots `kernel`.
    ///
    /// By default it has one vCPU, 256 MiB of memory, and nothing else.
    pub fn builder(kernel: Kernel) -> VmBuilder {
        VmBuilder::new(kernel)
    }

    fn new(
        shared: Arc<Shared>,
        threads: Vec<JoinHandle<()>>,
        pump: Option<JoinHandle<()>>,
        listeners: Vec<VsockListener>,
        handles: Handles,
        cgroup: Option<CgroupGuard>,
    ) -> Self {
        let (paused, listeners) = (Mutex::default(), Mutex::new(listeners));
        Self { shared, threads, pump, paused, listeners, handles, left_behind: AtomicBool::new(false), cgroup }
    }

    /// Waits until the VM has ended.
    ///
    /// May be called repeatedly and from many threads.
    ///
    /// # Errors
    /// None today. Returns `Result` so that failures can be added without a breaking change.
    pub fn wait(&self) -> Result<Exit> {
        self.shared.wait(None).ok_or_else(|| Error::new(ErrorKind::InvalidState, "the machine's end is unknown"))
    }

    /// Waits until the VM has ended, at most `timeout`; `None` when it still runs.
    ///
    /// # Errors
    /// As [`Vm::wait`].
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<Exit>> {
        Ok(self.shared.wait(deadline(timeout)))
    }

    /// Returns how the VM ended, or `None` while it runs. Never waits.
    ///
    /// # Errors
    /// As [`Vm::wait`].
    pub fn try_wait(&self) -> Result<Option<Exit>> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Asks the guest to shut down, and kills it when it still runs after `grace`.
    ///
    /// The guest is asked by two keys of its keyboard. First comes the power key, upon which systems with
    /// systemd-logind or acpid power off. When it still runs after a quarter of `grace`, at most ten seconds,
    /// Ctrl-Alt-Del follows, which every init understands. Most inits end with a reset, which is [`Exit::Reboot`] and
    /// starts nothing again. A systemd that is powering off already is not disturbed by it.
    ///
    /// A guest without a keyboard driver cannot be asked, and is killed after `grace`. A paused one goes on first.
    ///
    /// A killed machine has ended within milliseconds, and after 15 seconds at most, where a file of the host's does
    /// not answer.
    ///
    /// # Errors
    /// `TimedOut` when the killed machine has not ended after those 15 seconds.
    pub fn shutdown(&self, grace: Duration) -> Result<Exit> {
        let begin = Instant::now();
        // One that has ended is told by what follows. One that is about to be paused cannot be asked for anything.
        if let Ok(paused) = self.paused.try_lock() {
            let _ = self.go_on_from(paused);
        }
        let second = begin.checked_add((grace / 4).min(POWER_KEY_PATIENCE));
        for (keys, until) in [(Keys::Power, second), (Keys::CtrlAltDel, begin.checked_add(grace))] {
            if !self.handles.keyboard.lock().unwrap_or_else(PoisonError::into_inner).press(keys) {
                log::info!("the guest has no keyboard driver and cannot be asked to shut down");
            }
            if let Some(exit) = self.shared.wait(until) {
                return Ok(exit);
            }
        }
        self.end()
    }

    /// Kills it and waits for its end, which has a bound.
    pub(crate) fn end(&self) -> Result<Exit> {
        self.kill();
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

    /// Stops the guest where it is, until [`Vm::resume`]. Idempotent.
    ///
    /// When this returns no vCPU runs, and no device touches the guest's memory. Waits for requests in flight, at most
    /// 11 seconds.
    ///
    /// Clocks go on, as they do for a stopped process: timers that expire meanwhile fire at once afterwards. The guest
    /// is told that it did not run, so that its watchdogs are quiet. Data in flight between embedder and guest is kept,
    /// and delivered after [`Vm::resume`].
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended. `TimedOut` when a device is busy for too long, such as on a file that does
    /// not answer; then the guest goes on.
    pub fn pause(&self) -> Result<()> {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        let quiet = || {
            let deadline = Instant::now() + PAUSE_TIMEOUT;
            self.shared.park_vcpus(PAUSE_TIMEOUT)?;
            self.handles.loops.iter().try_for_each(|it| it.hold(left(deadline)))?;
            // No loop looks at anything any more, and what its devices have under way with the host comes to its end.
            let calm =
                |it: &Remote<Slots>| it.with_timeout(left(deadline) + PAUSE_MARGIN, move |it| it.pause(left(deadline)));
            match self.handles.loops.iter().map(calm).collect::<Result<Vec<_>>>()?.contains(&false) {
                true => {
                    Err(Error::new(ErrorKind::TimedOut, format!("a disk was busy for longer than {PAUSE_TIMEOUT:?}")))
                }
                false => Ok(()),
            }
        };
        if !*paused {
            if let Err(error) = quiet() {
                self.go_on();
                return Err(error.doing("pausing the VM"));
            }
            *paused = true;
            self.shared.log.push(EventKind::Paused);
        }
        Ok(())
    }

    /// Lets a paused guest go on. Idempotent.
    ///
    /// That is one paused by [`Vm::pause`] or by a disk ([`ErrorAction::Pause`]), which then tries again what had
    /// failed. Does not wait for the guest, but for a pause that another thread has begun: 11 seconds at most.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn resume(&self) -> Result<()> {
        self.go_on_from(self.paused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn go_on_from(&self, mut paused: MutexGuard<'_, bool>) -> Result<()> {
        if std::mem::take(&mut *paused) | self.shared.gate.release() {
            self.shared.log.push(EventKind::Resumed);
            self.go_on();
        }
        match self.shared.stopping() {
            true => Err(Error::vm_ended().doing("resuming the VM")),
            false => Ok(()),
        }
    }

    fn go_on(&self) {
        for it in &self.handles.loops {
            it.release();
            // One that has ended has nothing to go on with.
            let _ = it.post(Slots::resume);
        }
        self.shared.gate.open();
    }

    /// Ends the VM now, whatever the guest does. Idempotent.
    ///
    /// Does not wait; [`Vm::wait`] returns when the VM has ended.
    pub fn kill(&self) {
        self.shared.stop(Reason::Killed, (None, None));
    }

    /// Ends the VM, whose guest does not do its part.
    #[cfg(feature = "container")]
    pub(crate) fn give_up(&self, why: String) {
        log::warn!("ending a VM whose guest does not answer: {why}");
        self.shared.stop(Reason::Unresponsive(why), (None, None));
    }

    /// Whether no vCPU may run, by the embedder's will or a disk's.
    #[cfg(feature = "container")]
    pub(crate) fn stands_still(&self) -> bool {
        self.shared.gate.closed()
    }

    /// Whether this process runs it, and is no child of fork that has a copy of the handle.
    pub(crate) fn is_current(&self) -> bool {
        self.shared.origin.is_current()
    }

    /// Returns what is known of the VM now, or was known at its end.
    ///
    /// It says how far the guest has come and what it printed.
    pub fn trace(&self) -> Trace {
        self.shared.trace()
    }

    /// Returns a stream of the VM's events, from its start on.
    ///
    /// Each call returns a stream of its own, and the VM never waits for any of them.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub fn events(&self) -> Result<Events> {
        self.shared.log.reader()
    }

    /// Returns the counters of vCPUs and devices. Does not disturb the guest.
    pub fn stats(&self) -> Stats {
        let vcpus = self.shared.vcpus.iter().map(vcpu::VcpuControl::stats).collect();
        Stats { vcpus, devices: self.shared.device_stats(), cgroup: self.cgroup.as_ref().map(CgroupGuard::stats) }
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
        let guest = wait.recv_timeout(MEMORY_PATIENCE).ok();
        let resident = memory.resident().doing(|| "counting the guest's pages")?;
        let all = [memory.size(), resident, self.shared.overhead(), balloon, reported];
        let [configured, resident, overhead, balloon, reported] = all.map(Size::bytes);
        Ok(MemoryStats { configured, resident, overhead, balloon, reported, guest })
    }

    /// Returns the file of the guest's memory, which other processes can map.
    ///
    /// Guest memory below 3 GiB lies at its beginning, and what the guest has above 4 GiB right behind that. `None`
    /// unless it is [`Memory::memfd`] or [`Memory::huge`].
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
        self.handles.balloon.as_ref().ok_or_else(|| Error::new(ErrorKind::InvalidState, "this VM has no balloon"))
    }

    /// Returns the `n`th disk, counted from 0 in the order of [`VmBuilder::disk`].
    ///
    /// # Errors
    /// `NotFound` when there are fewer.
    pub fn disk(&self, n: usize) -> Result<DiskHandle> {
        self.handles.disks.get(n).cloned().ok_or_else(|| {
            let all = self.handles.disks.len();
            Error::new(ErrorKind::NotFound, format!("disk {n}: the VM has {all}, counted from 0"))
        })
    }

    /// Returns the `n`th network card, counted from 0 in the order of [`VmBuilder::net`].
    ///
    /// # Errors
    /// `NotFound` when there are fewer.
    pub fn net(&self, n: usize) -> Result<NetHandle> {
        self.handles.nets.get(n).cloned().ok_or_else(|| {
            let all = self.handles.nets.len();
            Error::new(ErrorKind::NotFound, format!("network {n}: the VM has {all}, counted from 0"))
        })
    }

    /// Returns when each stage was reached, counted from the call of `start`.
    pub fn timeline(&self) -> Timeline {
        self.shared.marks.timeline()
    }

    /// Listens for connections that guest programs make to `port` of the host (CID 2).
    ///
    /// When the port was configured with [`Vsock::listen`], earlier connections are waiting already.
    ///
    /// # Errors
    /// `AlreadyExists` when there is a listener for it, `InvalidState` without a vsock device or when the VM has ended.
    pub fn listen(&self, port: u32) -> Result<VsockListener> {
        let mut configured = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = configured.iter().position(|l| l.port() == port) {
            return Ok(configured.swap_remove(at));
        }
        drop(configured);
        self.vsock()?.with(move |vsock, _| vsock.listen(port))?
    }

    /// Connects to a program in the guest that listens on vsock port `port`.
    ///
    /// Waits at most ten seconds for its answer, and ten for a host that is busy.
    ///
    /// # Errors
    /// `NotFound` when nothing listens there. `InvalidState` without a vsock device, before the guest has set it up, or
    /// when the VM has ended. `TimedOut` when the guest does not answer.
    pub fn connect(&self, port: u32) -> Result<VsockStream> {
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
        self.handles.vsock.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::InvalidState, "this VM has no vsock device: add one with `VmBuilder::vsock`")
        })
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.shared.exit_fd)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // A child of fork has a copy of the handle, and nothing of the VM.
        if !self.is_current() {
            leak((std::mem::take(&mut self.threads), self.pump.take(), self.shared.clone()));
            return;
        }
        if self.left_behind.load(Ordering::SeqCst) {
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
        write!(f, "Vm({} vCPUs, {})", self.shared.vcpus.len(), self.shared.marks.stage())
    }
}
