//! [`VmShared`]: what every thread of a VM sees of the machine and its end.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use super::devices::DeviceInfo;
use super::events::{EventKind, EventLog};
use super::exit::{BootMarks, Exit, ExitReport, Reason};
use super::stats::DeviceStats;
use super::vcpu::{LastExit, VcpuControl};
use super::vcpu_gate::{Parked, VcpuGate};
use crate::arch::layout;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{EventFd, KickSignal, PeriodicKick, ProcessGeneration, RegisterPages, Stack, eventfd};
use crate::virtio::DeviceId;
use crate::virtio::console::ConsoleOutput;

/// What every thread of a VM sees of its end.
pub(super) struct VmShared {
    end: Mutex<End>,
    ended: Condvar,
    /// Readable once the VM has ended.
    pub exit_fd: EventFd,
    pub vcpus: Vec<VcpuControl>,
    pub gate: VcpuGate,
    running_vcpus: AtomicUsize,
    pub signal: KickSignal,
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
    /// Of a machine with so many vCPUs, none of which runs yet.
    pub(super) fn new(
        vcpus: u8,
        signal: KickSignal,
        marks: BootMarks,
        log: Arc<EventLog>,
        output: ConsoleOutput,
        registers: RegisterPages,
    ) -> Result<Self> {
        Ok(Self {
            end: Mutex::default(),
            ended: Condvar::new(),
            exit_fd: eventfd().doing(|| "creating the exit descriptor")?,
            vcpus: (0..vcpus).map(|_| VcpuControl::default()).collect(),
            gate: VcpuGate::default(),
            running_vcpus: AtomicUsize::new(vcpus.into()),
            signal,
            marks,
            log,
            output,
            devices: Mutex::default(),
            threads: Mutex::default(),
            stacks: Mutex::default(),
            registers,
            origin: ProcessGeneration::current(),
        })
    }

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

    /// Whether the vCPU whose thread ends was the last that ran.
    pub(super) fn last_vcpu_done(&self) -> bool {
        self.running_vcpus.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// Whether the calling thread is one of the VM's.
    pub(super) fn is_own_thread(&self) -> bool {
        let own = thread::current().id();
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).contains(&own)
    }

    /// The calling thread is one of the VM's.
    pub(super) fn register_thread(&self) {
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
        stacks + held as u64 + self.registers_held()
    }

    /// Bytes of the devices' registers: those of places without a device are not touched.
    fn registers_held(&self) -> u64 {
        let devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.len() as u64 * layout::MMIO_WINDOW
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
    pub(super) fn finish(&self) {
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
