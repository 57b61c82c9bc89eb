//! What others ask of a loop's value: closures, in order, until the loop ends.
//!
//! Shared by the loop's thread and every holder of a `Remote`. `tests/models.rs` runs these very lines in many thousand
//! orders of their threads.

use std::collections::VecDeque;

use super::sync::{Mutex, MutexGuard, PoisonError, mpsc};

pub(super) type LoopRequest<S> = Box<dyn FnOnce(&mut S) + Send>;

/// How the loop's thread is woken.
pub(super) trait Wake {
    /// Never waits; many in a row are one.
    fn wake(&self);
    /// Clears all wakes so far.
    fn clear(&self);
}

/// The mailbox of one loop.
pub(super) struct Mailbox<S, W> {
    state: Mutex<MailboxState<S>>,
    wake: W,
}

struct MailboxState<S> {
    requests: VecDeque<LoopRequest<S>>,
    /// The thread is gone or going: nothing will be run any more.
    closed: bool,
    dispatch: Dispatch,
}

/// Whether the loop looks at its descriptors.
enum Dispatch {
    Running,
    /// After those that are being looked at, it shall not look any more, and say so here.
    Suspending(mpsc::SyncSender<()>),
    Suspended,
}

/// The loop has ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Closed;

impl<S, W: Wake> Mailbox<S, W> {
    pub(super) fn new(wake: W) -> Self {
        Self {
            state: Mutex::new(MailboxState { requests: VecDeque::new(), closed: false, dispatch: Dispatch::Running }),
            wake,
        }
    }

    fn state(&self) -> MutexGuard<'_, MailboxState<S>> {
        // Poison is impossible to act on: the state is valid after every statement that holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn waker(&self) -> &W {
        &self.wake
    }

    pub(super) fn post(&self, request: LoopRequest<S>) -> Result<(), Closed> {
        let mut state = self.state();
        if state.closed {
            return Err(Closed);
        }
        state.requests.push_back(request);
        drop(state);
        self.wake.wake();
        Ok(())
    }

    /// Asks the loop not to look at its descriptors; it says so by `held`. False when it does not look already.
    pub(super) fn suspend(&self, held: mpsc::SyncSender<()>) -> Result<bool, Closed> {
        let mut state = self.state();
        match state.dispatch {
            _ if state.closed => return Err(Closed),
            Dispatch::Suspended => return Ok(false),
            _ => state.dispatch = Dispatch::Suspending(held),
        }
        drop(state);
        self.wake.wake();
        Ok(true)
    }

    pub(super) fn resume(&self) {
        self.state().dispatch = Dispatch::Running;
        self.wake.wake();
    }

    /// No more requests are taken; those that are here are still run.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.wake.wake();
    }

    /// By the loop's thread: whether a request waits, or the loop is to end.
    pub(super) fn asked(&self) -> bool {
        let state = self.state();
        state.closed || !state.requests.is_empty()
    }

    /// By the loop's thread: runs every request. False when the loop shall end.
    pub(super) fn serve(&self, value: &mut S) -> bool {
        // Cleared first: a request that comes later wakes the loop again.
        self.wake.clear();
        loop {
            let mut state = self.state();
            let Some(request) = state.requests.pop_front() else {
                return !state.closed;
            };
            drop(state);
            request(value);
        }
    }

    /// By the loop's thread: whether it shall look at its mailbox only. Tells who asked for it.
    pub(super) fn is_suspended(&self) -> bool {
        let mut state = self.state();
        if let Dispatch::Suspending(held) = &state.dispatch {
            // Who asked may have given up.
            let _ = held.try_send(());
            state.dispatch = Dispatch::Suspended;
        }
        matches!(state.dispatch, Dispatch::Suspended)
    }

    /// By the loop's thread, when it ends for whatever reason. Dropping the requests gives every waiter an error.
    pub(super) fn end(&self) {
        let mut state = self.state();
        state.closed = true;
        state.dispatch = Dispatch::Running;
        let requests = std::mem::take(&mut state.requests);
        drop(state);
        // Not under the lock: dropping a closure may run anything.
        drop(requests);
    }
}
