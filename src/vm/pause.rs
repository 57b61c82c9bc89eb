//! The gate that vCPU threads wait at while a VM is paused.
//!
//! Closing it and kicking the vCPUs brings all of them here; each has finished what its last exit began. Nobody holds a
//! lock in KVM_RUN, and a VM that ends while it is paused opens the gate for good.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Shared by the threads of one VM.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// Changed under the lock, looked at without it before each KVM_RUN.
    closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// How many vCPU threads wait here.
    parked: usize,
    /// The VM ends: nobody waits any more.
    gone: bool,
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

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPUs that come by from now on wait. They must be kicked after this.
    pub(super) fn close(&self) {
        let state = self.state();
        self.closed.store(!state.gone, Ordering::SeqCst);
    }

    /// Lets them go on.
    pub(super) fn open(&self) {
        let _state = self.state();
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// The VM ends.
    pub(super) fn remove(&self) {
        self.state().gone = true;
        self.open();
    }

    /// Whether a vCPU has to stop here.
    pub(super) fn closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// A vCPU's thread waits until it may go on. True when it had to.
    pub(super) fn park(&self) -> bool {
        let mut state = self.state();
        if !self.closed() {
            return false;
        }
        state.parked += 1;
        self.changed.notify_all();
        while self.closed() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        true
    }

    /// Waits until `vcpus` threads are here.
    pub(super) fn wait_parked(&self, vcpus: usize, deadline: Instant) -> Parked {
        let mut state = self.state();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match () {
                () if state.gone => return Parked::Gone,
                () if state.parked >= vcpus => return Parked::All,
                () if left.is_zero() => return Parked::Busy(vcpus - state.parked),
                () => state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
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
    fn all_come_wait_and_go_on() {
        let gate = Arc::new(Gate::default());
        assert!(!gate.park(), "an open gate stops nobody");
        gate.close();
        assert_eq!(gate.wait_parked(2, soon()), Parked::Busy(2));
        let threads = [(); 2].map(|()| {
            let gate = gate.clone();
            thread::spawn(move || gate.park())
        });
        assert_eq!(gate.wait_parked(2, Instant::now() + Duration::from_secs(60)), Parked::All);
        gate.open();
        assert!(threads.into_iter().all(|thread| thread.join().unwrap()));
    }

    #[test]
    fn the_end_frees_those_who_wait_and_stops_nobody_more() {
        let gate = Arc::new(Gate::default());
        gate.close();
        let theirs = gate.clone();
        let parked = thread::spawn(move || theirs.park());
        assert_eq!(gate.wait_parked(1, Instant::now() + Duration::from_secs(60)), Parked::All);
        gate.remove();
        assert!(parked.join().unwrap());
        assert!(!gate.park() && !gate.closed());
        assert_eq!(gate.wait_parked(1, soon()), Parked::Gone);
    }
}
