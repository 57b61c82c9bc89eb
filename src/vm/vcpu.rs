//! One vCPU and its thread.
//!
//! It runs the guest, takes its exits to the buses, and stops when asked to.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::events::EventKind;
use super::exit::{Reason, Registers};
use super::halt::{self, HaltRecord};
use super::machine::Machine;
use super::stats::{ExitCounts, VcpuStats, count};
use super::vcpu_gate::{ExitRequest, VcpuAction};
use crate::arch::PlatformBusView;
use crate::bus::BusView;
#[cfg(any(test, feature = "internals"))]
use crate::error::{Error, Result};
use crate::kvm::{Kicker, VcpuExit, VcpuFd};
use crate::sys::{KickSignal, ThreadId};

/// What others see of a vCPU and its thread.
#[derive(Debug, Default)]
pub(super) struct VcpuControl {
    /// How they reach it. `None` before it runs and after it has ended.
    thread: Mutex<Option<VcpuThread>>,
    exits: ExitCounts,
    /// In nanoseconds, once its thread has ended.
    cpu_time: AtomicU64,
    /// Whether it was seen halted for good.
    pub halt: HaltRecord,
}

/// A thread that runs a vCPU.
struct VcpuThread {
    kicker: Kicker,
    id: ThreadId,
    request: Option<VcpuRequest>,
}

/// What another thread asks of a vCPU that is parked, done by the vCPU's own thread.
pub(super) type VcpuRequest = Box<dyn FnOnce(&mut VcpuFd) + Send>;

impl fmt::Debug for VcpuThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VcpuThread({:?})", self.id)
    }
}

impl VcpuControl {
    fn thread(&self) -> MutexGuard<'_, Option<VcpuThread>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stats(&self) -> VcpuStats {
        let running = self.thread().as_ref().map(|thread| thread.id.cpu_time());
        self.exits.stats(running.unwrap_or_else(|| Duration::from_nanos(self.cpu_time.load(Ordering::Relaxed))))
    }

    /// Bytes of memory that the vCPU takes beside its thread's stack.
    pub(super) fn held(&self) -> usize {
        self.thread().as_ref().map_or(0, |thread| thread.kicker.held())
    }

    /// The calling thread will run the vCPU.
    fn enter(&self, kicker: Kicker) {
        *self.thread() = Some(VcpuThread { kicker, id: ThreadId::current(), request: None });
    }

    /// The calling thread will not run it any more, so it must not be signaled.
    fn leave(&self) {
        let mut thread = self.thread();
        let used = thread.take().map_or(Duration::ZERO, |thread| thread.id.cpu_time());
        self.cpu_time.store(u64::try_from(used.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Leaves a request for the vCPU's thread, which serves it at the gate ([`VcpuGate::request`](super::vcpu_gate::VcpuGate)).
    /// When the thread ends, the request is dropped.
    ///
    /// # Errors
    /// `InvalidState` when the thread has ended.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn ask(&self, request: VcpuRequest) -> Result<()> {
        match &mut *self.thread() {
            Some(thread) => {
                thread.request = Some(request);
                Ok(())
            }
            None => Err(Error::vm_ended()),
        }
    }

    /// Takes back what was asked and not begun.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn withdraw(&self) {
        if let Some(thread) = &mut *self.thread() {
            thread.request = None;
        }
    }

    /// Does what is asked of the vCPU, which may be another one afterwards. On its own thread.
    fn serve(&self, vcpu: &mut VcpuFd) {
        let request = self.thread().as_mut().and_then(|thread| thread.request.take());
        if let Some(request) = request {
            request(vcpu);
            if let Some(thread) = &mut *self.thread() {
                thread.kicker = vcpu.kicker();
            }
        }
    }

    /// Gets the vCPU out of the guest, or keeps it from entering. Idempotent; does not wait for the guest.
    ///
    /// The order closes the gap between the thread's last check and KVM_RUN. The request is in place before the signal,
    /// so either KVM_RUN sees it on entry or the signal interrupts it.
    pub(super) fn kick(&self, signal: KickSignal) {
        // The thread cannot end while this lock is held, so the signal reaches no other thread.
        if let Some(VcpuThread { kicker, id, .. }) = &*self.thread() {
            kicker.request_exit();
            if let Err(error) = signal.send(*id) {
                log::error!("a vCPU cannot be kicked: {error}");
            }
        }
    }
}

impl ExitRequest for VcpuFd {
    fn request_exit(&self) {
        Self::request_exit(self);
    }

    fn clear_exit_request(&self) {
        Self::clear_exit_request(self);
    }
}

/// The last exit of a vCPU: why it left the guest for good, and its registers where they matter.
#[derive(Debug, Clone, Default)]
pub(super) struct LastExit {
    pub vcpu_exit: Option<String>,
    pub registers: Option<Registers>,
}

/// Runs `vcpu` until the machine stops. On its own thread.
pub(super) fn run(machine: &Machine, id: u8, mut vcpu: VcpuFd) {
    let Some(control) = machine.shared.vcpus.get(usize::from(id)) else {
        return;
    };
    // Without it only guests that halt for good are not noticed.
    let _looks = machine.shared.kick_periodically(halt::PERIOD);
    control.enter(vcpu.kicker());
    if machine.shared.marks.running() {
        machine.shared.log.push(EventKind::Started);
    }
    let (mut entered, mut mmio, mut own) = (false, machine.devices.mmio.view(), machine.bus.view());
    loop {
        let action = machine.shared.gate.next_action(&vcpu);
        if action == VcpuAction::End {
            break;
        }
        let exit = vcpu.run();
        count(match &exit {
            Ok(VcpuExit::Arch(exit)) if exit.is_port_access() => &control.exits.port,
            Ok(VcpuExit::MmioRead { .. } | VcpuExit::MmioWrite { .. }) => &control.exits.mmio,
            Ok(VcpuExit::Interrupted) => &control.exits.interrupted,
            _ => &control.exits.other,
        });
        if action == VcpuAction::Finish && matches!(exit, Ok(VcpuExit::Interrupted)) {
            if machine.shared.gate.park(|| control.serve(&mut vcpu)) {
                // Right before the guest goes on: a flag that was set earlier may not be in its page yet.
                vcpu.notify_guest_paused();
            }
            continue;
        }
        if !entered && !matches!(exit, Ok(VcpuExit::Interrupted)) {
            entered = true;
            machine.shared.marks.kernel_entered();
        }
        let reason = match exit {
            // Some are the periodic ones.
            Ok(VcpuExit::Interrupted) => look(machine, control, &vcpu),
            Ok(exit) => handle(&mut mmio, &mut own, exit),
            Err(error) => Some((Reason::Vcpu(error.to_string()), error.to_string())),
        };
        if let Some((reason, words)) = reason {
            let registers = (reason != Reason::PowerOff).then(|| Registers::of(&vcpu).ok()).flatten();
            let registers = registers.filter(|r| reason != Reason::TripleFault || !r.are_reset());
            machine.shared.stop(reason, LastExit { vcpu_exit: Some(words), registers });
        }
    }
    if id == 0 && machine.shared.ended_without_reason() {
        let VcpuStats { cpu_time, port_exits, mmio_exits, .. } = control.stats();
        let did = format!("{cpu_time:?} on a processor, {port_exits} accesses to ports, {mmio_exits} to devices");
        let vcpu_exit = Some(format!("ended from outside after {did}"));
        machine.shared.set_last_exit(LastExit { vcpu_exit, registers: Registers::of(&vcpu).ok() });
    }
    control.leave();
}

/// Looks whether the guest has ended without being able to say so.
fn look(machine: &Machine, control: &VcpuControl, vcpu: &VcpuFd) -> Option<(Reason, String)> {
    // One that cannot be asked is not dead.
    control.halt.record(vcpu.is_dead().unwrap_or(false), Instant::now());
    halt::all_halted_for_good(machine.shared.vcpus.iter().map(|it| &it.halt))
        .then(|| (Reason::Halt, "all vCPUs halted, with interrupts disabled".into()))
}

/// Serves one exit. Something comes back when the guest cannot go on.
fn handle(mmio: &mut BusView<'_>, own: &mut PlatformBusView<'_>, exit: VcpuExit<'_>) -> Option<(Reason, String)> {
    match exit {
        VcpuExit::Arch(exit) => {
            let (end, words) = own.serve(exit)?;
            return Some((end.into(), words.into()));
        }
        VcpuExit::MmioRead { addr, data } => {
            mmio.read(addr, data);
        }
        VcpuExit::MmioWrite { addr, data } => {
            mmio.write(addr, data);
        }
        VcpuExit::Interrupted => {}
        VcpuExit::SystemEvent(kind) => {
            let reason = match kind {
                kvm_events::SHUTDOWN => Reason::PowerOff,
                kvm_events::RESET => Reason::Reset,
                _ => Reason::Vcpu(format!("system event {kind}")),
            };
            return Some((reason, format!("system event {kind}")));
        }
        VcpuExit::EntryFailed(hardware) => {
            let why = format!("the processor refused to enter the guest (KVM_EXIT_FAIL_ENTRY, reason {hardware:#x})");
            return Some((Reason::Vcpu(why.clone()), why));
        }
        VcpuExit::InternalError { suberror, data } => {
            let data = data.iter().map(|word| format!("{word:#x}")).collect::<Vec<_>>().join(" ");
            let why = format!("KVM_EXIT_INTERNAL_ERROR, sub-error {suberror}, data [{data}]");
            return Some((Reason::Vcpu(why.clone()), why));
        }
        VcpuExit::Unknown(number) => {
            let why = format!("KVM exit {number}, which nothing here asked for");
            return Some((Reason::Vcpu(why.clone()), why));
        }
    }
    None
}

/// Types of KVM_EXIT_SYSTEM_EVENT (KVM API, 5).
mod kvm_events {
    pub(super) const SHUTDOWN: u32 = 1;
    pub(super) const RESET: u32 = 2;
}
