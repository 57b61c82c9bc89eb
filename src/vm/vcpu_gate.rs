//! The gate that vCPU threads pass before each entry into the guest.
//!
//! A pause stops them there, and the end for good.

use std::time::Instant;

use super::sync::atomic::{AtomicBool, Ordering};
use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Shared by the threads of one VM.
#[derive(Debug, Default)]
pub(super) struct VcpuGate {
    /// Both are changed under the lock, and looked at without it before each KVM_RUN.
    closed: AtomicBool,
    /// A device cannot go on until the embedder resumes it; changed and looked at likewise.
    held: AtomicBool,
    /// The VM ends: no thread waits here any more, and no vCPU runs.
    gone: AtomicBool,
    parked: Mutex<ParkedVcpus>,
    changed: Condvar,
}

/// The vCPU threads that wait at the gate.
#[derive(Debug, Default)]
struct ParkedVcpus {
    count: usize,
    /// How often something was asked of them.
    requests: usize,
}

/// How a vCPU's thread asks its own vCPU to come back.
pub(super) trait ExitRequest {
    /// The next KVM_RUN finishes what the last exit began, and no more.
    fn request_exit(&self);
    /// The next KVM_RUN enters the guest.
    fn clear_exit_request(&self);
}

/// What a vCPU's thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VcpuAction {
    /// The VM has ended.
    End,
    /// Run the guest.
    Enter,
    /// Call KVM_RUN, which will not enter the guest; when it was merely interrupted, [`VcpuGate::park`].
    Finish,
}

/// What came of waiting for all vCPUs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parked {
    All,
    /// The VM ended meanwhile.
    Gone,
    /// So many were still busy at the deadline.
    Busy(usize),
}

impl VcpuGate {
    fn parked(&self) -> MutexGuard<'_, ParkedVcpus> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPUs that come by from now on wait. They must be kicked after this.
    pub(super) fn close(&self) {
        let _parked = self.parked();
        self.closed.store(!self.is_shut_down(), Ordering::SeqCst);
    }

    /// As [`VcpuGate::close`], by a device; only [`VcpuGate::release`] ends it. Never waits.
    pub(super) fn hold(&self) {
        let _parked = self.parked();
        self.held.store(!self.is_shut_down(), Ordering::SeqCst);
    }

    /// No device holds the vCPUs any more. True when one did. They go on with [`VcpuGate::open`].
    pub(super) fn release(&self) -> bool {
        let _parked = self.parked();
        self.held.swap(false, Ordering::SeqCst)
    }

    /// Lets them go on.
    pub(super) fn open(&self) {
        let _parked = self.parked();
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// The VM ends. vCPUs must be kicked after this.
    pub(super) fn shut_down(&self) {
        let _parked = self.parked();
        self.gone.store(true, Ordering::SeqCst);
        self.closed.store(false, Ordering::SeqCst);
        self.held.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Whether the VM ends.
    pub(super) fn is_shut_down(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    pub(super) fn closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst) || self.held.load(Ordering::SeqCst)
    }

    /// What the thread of `vcpu` does next.
    pub(super) fn next_action(&self, vcpu: &impl ExitRequest) -> VcpuAction {
        // Cleared before the checks: an end or a pause that comes later makes a new request.
        vcpu.clear_exit_request();
        match () {
            () if self.is_shut_down() => VcpuAction::End,
            () if self.closed() => {
                vcpu.request_exit();
                VcpuAction::Finish
            }
            () => VcpuAction::Enter,
        }
    }

    /// A vCPU's thread waits until it may go on. True when it had to.
    ///
    /// Meanwhile `serve` is called when something may be asked of it: at most once more than [`VcpuGate::request`].
    pub(super) fn park(&self, mut serve: impl FnMut()) -> bool {
        let mut parked = self.parked();
        if !self.closed() {
            return false;
        }
        parked.count += 1;
        self.changed.notify_all();
        let mut served = 0;
        while self.closed() {
            if parked.requests != served {
                served = parked.requests;
                drop(parked);
                serve();
                parked = self.parked();
            } else {
                parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
            }
        }
        parked.count -= 1;
        true
    }

    /// Tells the threads that wait here that something is asked of them.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn request(&self) {
        self.parked().requests += 1;
        self.changed.notify_all();
    }

    /// Waits until `vcpus` threads are here.
    pub(super) fn wait_parked(&self, vcpus: usize, deadline: Instant) -> Parked {
        let mut parked = self.parked();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match () {
                () if self.is_shut_down() => return Parked::Gone,
                () if parked.count >= vcpus => return Parked::All,
                () if left.is_zero() => return Parked::Busy(vcpus - parked.count),
                () => parked = self.changed.wait_timeout(parked, left).unwrap_or_else(PoisonError::into_inner).0,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn vcpus_park_wait_and_resume() {
        let gate = Arc::new(VcpuGate::default());
        assert!(!gate.park(|| ()), "an open gate stops no vCPU");
        gate.close();
        assert_eq!(gate.wait_parked(2, soon()), Parked::Busy(2));
        let threads = [(); 2].map(|()| {
            let gate = gate.clone();
            thread::spawn(move || gate.park(|| ()))
        });
        assert_eq!(gate.wait_parked(2, Instant::now() + Duration::from_secs(60)), Parked::All);
        gate.open();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    }

    #[test]
    fn parked_vcpus_serve_each_request() {
        let gate = Arc::new(VcpuGate::default());
        gate.close();
        let (served, seen) = std::sync::mpsc::channel();
        let theirs = gate.clone();
        let parked = thread::spawn(move || theirs.park(|| served.send(()).unwrap()));
        for _ in 0..3 {
            gate.request();
            seen.recv_timeout(Duration::from_secs(60)).unwrap();
        }
        assert_eq!(gate.wait_parked(1, Instant::now() + Duration::from_secs(60)), Parked::All);
        gate.open();
        assert!(parked.join().unwrap());
    }

    #[test]
    fn shutdown_releases_waiters_and_parks_no_more() {
        let gate = Arc::new(VcpuGate::default());
        gate.close();
        let theirs = gate.clone();
        let parked = thread::spawn(move || theirs.park(|| ()));
        assert_eq!(gate.wait_parked(1, Instant::now() + Duration::from_secs(60)), Parked::All);
        gate.shut_down();
        assert!(parked.join().unwrap());
        assert!(!gate.park(|| ()) && !gate.closed());
        assert_eq!(gate.wait_parked(1, soon()), Parked::Gone);
    }
}
