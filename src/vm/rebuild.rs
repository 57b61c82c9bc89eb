//! Replaces all KVM objects of a machine while its guest stands still.
//!
//! The new ones get the state of the old ones. Memory, devices and threads stay. A restored machine will do the
//! same with state that was kept.

use std::sync::{Arc, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::Vm;
use super::exit::Reason;
use super::kvm_objects::KvmObjects;
use super::shared::VmShared;
use super::vcpu::{LastExit, VcpuControl};
use crate::arch::PlatformDevices;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::kvm::state::{VcpuFormat, VcpuState, VmState};
use crate::kvm::{Irqfd, Kvm, VcpuFd, VmFd};
use crate::sys::left;

/// How long a rebuild may take beside the pause before it.
const REBUILD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the vCPUs' threads have to take their new vCPUs, from which there is no way back.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes all KVM objects of `vm` anew, with the same state.
///
/// The guest does not run meanwhile, and its clocks stand still. They go on where they stopped.
///
/// Waits for requests in flight as [`Vm::pause`] does, and for the vCPUs' threads twenty seconds more at most. A paused VM
/// stays paused.
///
/// # Errors
/// `InvalidState` when the VM has ended, `TimedOut` when it is busy for too long, `ResourceExhausted` without descriptors.
/// `Unsupported` and `Incompatible` for what KVM does not keep. The guest goes on with what it had. Where it cannot, the
/// VM ends, with an [`Exit`](crate::Exit) that says why.
pub fn rebuild(vm: &Vm) -> Result<()> {
    vm.check_thread()?;
    let paused = vm.running.paused.lock().unwrap_or_else(PoisonError::into_inner);
    let outcome = match *paused {
        true => vm.running.shared.park_vcpus(REBUILD_TIMEOUT),
        false => vm.quiesce(),
    };
    let outcome = outcome.and_then(|()| {
        let machine = vm.running.machine.upgrade().ok_or_else(Error::vm_ended)?;
        let (objects, platform) = (&machine.kvm, &machine.platform);
        Rebuild { objects, platform, shared: &vm.running.shared, deadline: Instant::now() + REBUILD_TIMEOUT }.run()
    });
    if !*paused {
        vm.go_on();
    }
    outcome.doing(|| "rebuilding the VM")
}

/// A rebuild of a machine whose vCPUs are parked and whose devices are paused.
struct Rebuild<'a> {
    objects: &'a Arc<KvmObjects>,
    platform: &'a PlatformDevices,
    shared: &'a Arc<VmShared>,
    deadline: Instant,
}

/// A VM and its vCPUs that no thread runs yet.
struct Replacement {
    vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
}

impl Rebuild<'_> {
    fn run(&self) -> Result<()> {
        let old = self.objects.vm();
        // Before anything is read: edges on their way reach the old controllers, and later ones wait in the descriptors.
        self.objects.lines.iter().for_each(|line| disconnect(line, &old));
        let made = self.make(&old).and_then(|made| self.connect_lines(&made.vm).map(|()| made));
        match made {
            Ok(made) => self.commit(made),
            Err(error) => {
                if let Err(lost) = self.connect_lines(&old) {
                    self.end(&format!("its interrupts were lost by a rebuild: {lost}"));
                }
                Err(error)
            }
        }
    }

    /// Makes new objects with the state of the old ones, which stay as they are.
    fn make(&self, old: &Arc<VmFd>) -> Result<Replacement> {
        let kvm = Arc::new(Kvm::open()?);
        let format = self.format(&kvm, old)?;
        let saved = self.ask(self.ids().map(|_| {
            let format = format.clone();
            move |vcpu: &mut VcpuFd| VcpuState::save(vcpu, &format)
        }))?;
        // No vCPU runs, so nothing reaches the controllers any more but edges of devices, which come once more at the end.
        let (state, platform) = (VmState::save(old)?, self.platform.save());

        let vm = Arc::new(self.objects.make_vm(&kvm)?.share_interrupts(old));
        let devices = self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner);
        devices.iter().try_for_each(|device| device.connect_kicks(&vm))?;
        drop(devices);
        let vcpus = self.ask(self.ids().map(|id| {
            let (objects, vm) = (self.objects.clone(), vm.clone());
            move |_: &mut VcpuFd| objects.make_vcpu(&vm, id)
        }))?;
        let restored = self.ask(vcpus.into_iter().zip(saved).map(|(vcpu, saved)| {
            let format = format.clone();
            move |_: &mut VcpuFd| saved.restore(&vcpu, &format).map(|()| (vcpu, saved))
        }))?;
        state.restore(&vm)?;
        // First as no guest has used them, so that nothing of theirs is left but by the state. The interrupts that are raised wait in the
        // descriptors, until the new controllers have the lines.
        self.platform.restore(&Default::default())?;
        self.platform.restore(&platform)?;
        // One reading for all vCPUs: their counters have stood still as long as the clock has, and differ as they did.
        let gap = state.clock_gap(&vm)?;
        let vcpus = self.ask(restored.into_iter().map(|(vcpu, saved)| {
            let gap = gap.clone();
            move |_: &mut VcpuFd| saved.restore_counter(&vcpu, &gap).map(|()| vcpu)
        }))?;
        Ok(Replacement { vm, vcpus })
    }

    /// How the vCPUs' states look, of which KVM is asked once.
    fn format(&self, kvm: &Arc<Kvm>, old: &Arc<VmFd>) -> Result<VcpuFormat> {
        if let Some(format) = self.objects.format.get() {
            return Ok(format.clone());
        }
        let (kvm, old) = (kvm.clone(), old.clone());
        let probe = move |vcpu: &mut VcpuFd| VcpuFormat::probe(&kvm, &old, vcpu);
        let format = self.ask([probe])?.pop().ok_or_else(Error::vm_ended)?;
        Ok(self.objects.format.get_or_init(|| format).clone())
    }

    /// Puts the new objects in the place of the old ones, which are closed. There is no way back.
    fn commit(&self, Replacement { vm, vcpus }: Replacement) -> Result<()> {
        vm.claim_interrupts();
        let swap = |new: VcpuFd| {
            move |vcpu: &mut VcpuFd| {
                *vcpu = new;
                Ok(())
            }
        };
        // However late it is, what is made is taken.
        let late = Self { deadline: Instant::now() + COMMIT_TIMEOUT, ..*self };
        late.ask(vcpus.into_iter().map(swap)).inspect_err(|error| {
            self.end(&format!("a rebuild replaced some of its vCPUs only: {error}"));
        })?;
        self.objects.replace(vm);
        let devices = self.shared.devices.lock().unwrap_or_else(PoisonError::into_inner);
        for device in devices.iter() {
            // An edge may have gone to the old controllers after their state was read, and no loop may have seen a kick.
            device.interrupt.raise_pending();
            for kick in device.kicks.iter() {
                // The only failure is a counter at its maximum, which is a kick all the same.
                let _ = kick.write(1);
            }
        }
        Ok(())
    }

    fn ids(&self) -> std::ops::Range<u8> {
        0..u8::try_from(self.shared.vcpus.len()).unwrap_or(u8::MAX)
    }

    fn connect_lines(&self, vm: &VmFd) -> Result<()> {
        for (n, line) in self.objects.lines.iter().enumerate() {
            if let Err(error) = line.connect(vm) {
                self.objects.lines.iter().take(n).for_each(|line| disconnect(line, vm));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Asks each vCPU's thread for one of `requests`, all at the same time; their answers, in the same order.
    fn ask<R, F>(&self, requests: impl IntoIterator<Item = F>) -> Result<Vec<R>>
    where
        R: Send + 'static,
        F: FnOnce(&mut VcpuFd) -> Result<R> + Send + 'static,
    {
        let asked = self.shared.vcpus.iter().zip(requests).map(|(vcpu, request)| {
            let (answer, wait) = mpsc::sync_channel(1);
            // Who asked may be gone; the answer is dropped then.
            vcpu.ask(Box::new(move |vcpu| drop(answer.send(request(vcpu)))))?;
            Ok(wait)
        });
        let waits = asked.collect::<Result<Vec<_>>>()?;
        self.shared.gate.request();
        let answered = |wait: mpsc::Receiver<Result<R>>| match wait.recv_timeout(left(self.deadline)) {
            Ok(answer) => answer,
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::vm_ended()),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                Err(Error::new(ErrorKind::TimedOut, "a vCPU did not answer in the time of a rebuild"))
            }
        };
        let answers = waits.into_iter().map(answered).collect();
        if Result::<Vec<R>>::is_err(&answers) {
            // What no caller waits for any more would be served at the next pause.
            self.shared.vcpus.iter().for_each(VcpuControl::withdraw);
        }
        answers
    }

    /// The guest cannot go on.
    fn end(&self, why: &str) {
        self.shared.stop(Reason::Vcpu(why.to_owned()), LastExit::default());
    }
}

fn disconnect(line: &Irqfd, vm: &VmFd) {
    // It fails for one that is not connected only.
    if let Err(error) = vm.unregister_irqfd(&line.fd, line.gsi) {
        log::debug!("{error}");
    }
}
