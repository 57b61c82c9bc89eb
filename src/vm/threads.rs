//! The threads of a VM beside its loops: `vcpuN`, `console` and `capture`.

use std::sync::{Arc, PoisonError, Weak, mpsc};
use std::thread::JoinHandle;

use super::cgroup::CgroupHandle;
use super::config::VmConfig;
use super::machine::Machine;
use super::shared::VmShared;
use super::vcpu;
use crate::arch::{self, EntryPoint};
use crate::error::{Context, Result};
use crate::network::CapturePump;
use crate::sys::{self, STACK};

/// What makes a thread one of a VM's. It does not keep the VM.
pub(super) struct ThreadMembership {
    shared: Weak<VmShared>,
    member: Option<CgroupHandle>,
}

impl ThreadMembership {
    /// The calling thread becomes one of the VM's: it is counted as such, and runs in the VM's control group.
    ///
    /// # Errors
    /// `Io` when the group does not take it. It is counted all the same.
    pub(super) fn enter(&self) -> Result<()> {
        if let Some(shared) = self.shared.upgrade() {
            shared.register_thread();
        }
        self.member.as_ref().map_or(Ok(()), CgroupHandle::join)
    }
}

/// Starts the threads of a VM.
pub(super) struct VmThreads<'a> {
    pub shared: &'a Arc<VmShared>,
    /// The VM's control group, if it has one.
    pub member: Option<CgroupHandle>,
}

/// The threads of the vCPUs, and whether all of them could start.
pub(super) struct VcpuThreads {
    pub threads: Vec<JoinHandle<()>>,
    pub outcome: Result<()>,
}

impl VmThreads<'_> {
    pub(super) fn membership(&self) -> ThreadMembership {
        ThreadMembership { shared: Arc::downgrade(self.shared), member: self.member.clone() }
    }

    /// Starts the thread that gives the console to the embedder's writer, which may block.
    pub(super) fn start_console_writer(&self, config: &VmConfig) -> Result<Option<JoinHandle<()>>> {
        let Some(writer) = config.console.writer.clone() else {
            return Ok(None);
        };
        let output = self.shared.output.clone();
        output.expect_pump();
        let pump = move || {
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            output.pump(&mut *writer);
        };
        self.start_writer("console", pump).map(Some)
    }

    /// Starts the threads that give captures to their writers, which may block. The wait for them has a bound.
    pub(super) fn start_captures(&self, captures: &[CapturePump]) -> Result<()> {
        captures.iter().cloned().try_for_each(|pump| self.start_writer("capture", move || pump.run()).map(drop))
    }

    /// Starts a thread that calls a writer of the embedder's. Its stack is larger than others, and still no huge page.
    fn start_writer(&self, name: &'static str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
        let membership = self.membership();
        let body = move || {
            // A writer that is slow because it has no time is better than none.
            if let Err(error) = membership.enter() {
                log::warn!("thread {name}: {error}");
            }
            body();
        };
        sys::spawn(name.into(), 4 * STACK, body).doing(|| format!("starting thread {name}"))
    }

    /// Starts the vCPU threads; each makes its vCPU, as KVM wants, and runs it once all are made.
    pub(super) fn start_vcpus(&self, machine: &Arc<Machine>, entry: EntryPoint) -> VcpuThreads {
        let (ready, answers) = mpsc::channel::<Result<()>>();
        let (mut threads, mut outcome, mut gates) = (Vec::new(), Ok(()), Vec::new());
        for (id, _) in (0..).zip(&self.shared.vcpus) {
            let (gate, open) = mpsc::sync_channel::<()>(1);
            let (its_machine, ready, membership) = (machine.clone(), ready.clone(), self.membership());
            let body = move || {
                let machine = its_machine;
                let made = membership.enter().and_then(|()| make_vcpu(&machine, id, entry));
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
                    self.shared.vcpus.iter().skip(usize::from(id)).for_each(|_| machine.vcpu_done());
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
}

fn make_vcpu(machine: &Machine, id: u8, entry: EntryPoint) -> Result<crate::kvm::VcpuFd> {
    machine.shared.signal.unblock().doing(|| "unblocking the kick signal")?;
    let vcpu = machine.kvm.make_vcpu(&machine.kvm.vm(), id)?;
    if id == 0 {
        arch::boot_vcpu(&vcpu, entry)?;
    }
    Ok(vcpu)
}
