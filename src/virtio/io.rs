//! [`DeviceIo`]: everything that a running device is given.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::chain::Chain;
use super::event::{DeviceEvent, DeviceReporter};
use super::queue::Queue;
use super::state::DeviceState;
use super::transport::{DeviceSetup, Interrupt};
use super::turn::{Turn, Work};
use crate::event_loop::{Interest, Sources};
use crate::memory::IoQueue;
use crate::sys::{EventFd, Timer, borrow};

/// What happened to a device so far. Written by its loop, read by anybody.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub kicks: AtomicU64,
    pub requests: AtomicU64,
    pub bytes_from_guest: AtomicU64,
    pub bytes_to_guest: AtomicU64,
    pub driver_errors: AtomicU64,
    /// Requests that the host failed.
    pub io_errors: AtomicU64,
    /// Requests that waited for a limit, and how long, in nanoseconds.
    pub throttled: AtomicU64,
    pub throttled_nanos: AtomicU64,
}

/// Adds to a counter that the device's loop alone counts, so no update is lost.
fn add(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// Tokens tell descriptors of a slot apart: the slot, and what in it.
const TOKEN_BITS: u32 = 32;
/// Tokens from here on are queues, below are the device's own descriptors.
const QUEUE_TOKENS: u32 = u32::MAX - 0xffff;
/// The timer that runs while the device needs a reset.
const OVERDUE_TOKEN: u32 = QUEUE_TOKENS - 1;

/// How long a driver may leave a device that needs a reset without one. Those that have not done it by then never do, and
/// the guest would wait for the device for ever.
const RESET_GRACE: Duration = Duration::from_secs(10);

/// The first token of a slot.
pub(super) fn slot_token(slot: usize) -> u64 {
    (slot as u64) << TOKEN_BITS
}

/// A token's parts: a slot, and what of the device's is ready; `None` when the time for a reset is over.
pub(super) fn split_token(token: u64, events: Interest) -> (usize, Option<super::EventSource>) {
    let (slot, code) = ((token >> TOKEN_BITS) as usize, token as u32);
    match code.checked_sub(QUEUE_TOKENS) {
        Some(queue) => (slot, Some(super::EventSource::Queue(queue as usize))),
        None if code == OVERDUE_TOKEN => (slot, None),
        None => (slot, Some(super::EventSource::Watched { number: code, events })),
    }
}

/// Why a device needs a reset, and the timer of the driver's deadline.
pub(super) struct PendingReset {
    why: String,
    timer: Option<Timer>,
}

/// A running device's hold on the world. Made when the driver is ready, gone when the device is idle.
pub(crate) struct DeviceIo {
    pub(super) queues: Vec<Queue>,
    pub(super) kicks: Arc<[EventFd]>,
    pub(super) interrupt: Interrupt,
    pub(super) counters: Arc<Counters>,
    /// What driver and device have agreed on.
    pub(super) features: u64,
    pub(super) sources: Sources,
    pub(super) slot: usize,
    reporter: DeviceReporter,
    /// The reset that the device waits for. Reported once a start.
    pub(super) pending_reset: Option<PendingReset>,
    /// What the device had in flight when it was stopped.
    pub(super) unfinished_io: Option<IoQueue>,
    /// What the device has done since the loop came to it.
    pub(super) turn: Turn,
}

impl fmt::Debug for DeviceIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceIo({}, {:?})", self.slot, self.queues)
    }
}

impl DeviceIo {
    /// Makes what a device gets, and where it goes on; or why its driver's queues make no sense.
    pub(super) fn new(
        setup: DeviceSetup,
        sources: Sources,
        slot: usize,
    ) -> (Self, Result<Option<DeviceState>, String>) {
        let DeviceSetup { queues, kicks, interrupt, counters, features, reporter, state } = setup;
        let (queues, state) = match queues {
            Ok(queues) => (queues, Ok(state)),
            Err(why) => (Vec::new(), Err(why)),
        };
        let io = Self {
            queues,
            kicks,
            interrupt,
            counters,
            features,
            sources,
            slot,
            reporter,
            pending_reset: None,
            unfinished_io: None,
            turn: Turn::default(),
        };
        (io, state)
    }

    /// What driver and device have agreed on.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    /// Reports an event of the device. Never waits.
    pub(crate) fn report(&self, event: DeviceEvent) {
        self.reporter.report(event);
    }

    /// Where the device counts what happens to it.
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Keeps, while stopping, what still moves bytes from or to guest memory. The transport waits until it is idle.
    pub(crate) fn hand_over(&mut self, io_queue: IoQueue) {
        self.unfinished_io = Some(io_queue);
    }

    /// Tells the driver that configuration space has changed.
    pub(crate) fn config_changed(&self) {
        self.interrupt.signal_config();
    }

    /// Charges work to this turn. What is charged before it is done makes the turn end behind it.
    #[inline]
    pub(crate) fn charge(&mut self, work: Work) {
        self.turn.charge(work);
    }

    /// Returns whether the device's turn is over. It then keeps its half-done request, calls [`DeviceIo::reschedule`] and
    /// returns.
    #[inline]
    pub(crate) fn turn_over(&self) -> bool {
        self.turn.over()
    }

    /// Begins a turn of its own, for a device that is given time to end everything.
    pub(crate) fn begin_turn(&mut self) {
        self.turn.begin();
    }

    /// What turns have cost.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn turn(&self) -> &Turn {
        &self.turn
    }

    /// Hands every request in `queue` to `f`, completes each with what was written to its chain, and interrupts the
    /// driver at most once. Ends when the queue is empty, or the turn is over. `f` says what its work was, beside the chain.
    pub(crate) fn for_each_request(&mut self, queue: usize, mut f: impl FnMut(&mut Chain) -> Work) {
        loop {
            match self.pop(queue) {
                Some(mut chain) => {
                    let work = f(&mut chain);
                    self.charge(work);
                    self.complete(queue, chain);
                }
                None if self.rearm(queue) => {}
                None => break,
            }
        }
        self.flush(&[queue]);
    }

    /// Takes the next request out of `queue`. It must be completed some time. `None` when there is none, or when the turn is
    /// over; then the device is called for this queue again.
    pub(crate) fn pop(&mut self, queue: usize) -> Option<Chain> {
        if self.turn.over() {
            self.reschedule(queue);
            return None;
        }
        let (mut again, mut popped) = (false, None);
        if let Some(q) = self.queues.get_mut(queue) {
            q.disable_kicks();
            again = q.has_returned();
            popped = q.pop();
        }
        match popped {
            Some(chain) => {
                self.turn.charge(Work::Chain);
                self.turn.charge(Work::Descriptors(chain.descriptors()));
                // What was put back has been counted.
                if !again {
                    add(&self.counters.requests, 1);
                    add(&self.counters.bytes_from_guest, chain.readable_len() as u64);
                }
                Some(chain)
            }
            None => {
                self.check(queue);
                None
            }
        }
    }

    /// Gives a request back. Say [`DeviceIo::flush`] when no more follow at once.
    pub(crate) fn complete(&mut self, queue: usize, chain: Chain) {
        add(&self.counters.bytes_to_guest, chain.written().into());
        if let Some(q) = self.queues.get_mut(queue) {
            q.complete(chain);
        }
        self.check(queue);
    }

    /// Puts a request back while stopping: it will be popped again, before all others.
    pub(crate) fn put_back(&mut self, queue: usize, chain: Chain) {
        if let Some(q) = self.queues.get_mut(queue) {
            q.put_back(chain);
        }
    }

    /// Wants to be kicked again. True when something came in between, which must be looked at now; never when the turn is over.
    pub(crate) fn rearm(&mut self, queue: usize) -> bool {
        if self.turn.over() {
            self.reschedule(queue);
            return false;
        }
        let more = self.queues.get_mut(queue).is_some_and(Queue::enable_kicks);
        self.check(queue);
        more
    }

    /// Interrupts the driver if it wants to know of what was completed in any of `queues`. Where they share an interrupt, that
    /// is one.
    pub(crate) fn flush(&mut self, queues: &[usize]) {
        for queue in queues {
            if self.queues.get_mut(*queue).is_some_and(Queue::wants_interrupt) {
                self.interrupt.signal_used(*queue);
            }
        }
    }

    /// Makes `ready` be called for `queue` once more after others had their turn.
    pub(crate) fn reschedule(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            // A full counter is readable, which is all that is wanted.
            let _ = kick.write(1);
        }
    }

    /// Reports `fd` as `EventSource::Watched` from now on; numbers below 4,294,901,759 are free to use.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, number: u32, interest: Interest) -> io::Result<()> {
        debug_assert!(number < OVERDUE_TOKEN);
        self.sources.watch(fd, self.token(number), interest)
    }

    /// Reports a device's timer under `number`, and makes it first where there is none.
    ///
    /// One that was made before a pause is kept, however few descriptors the process has left by then.
    pub(crate) fn watch_timer(&self, timer: &mut Option<Timer>, number: u32) -> io::Result<()> {
        let timer = match timer.take() {
            Some(kept) => timer.insert(kept),
            None => timer.insert(Timer::new()?),
        };
        self.watch(timer.as_fd(), number, Interest::IN)
    }

    /// Stops reporting `fd`.
    pub(crate) fn unwatch(&self, fd: BorrowedFd<'_>) {
        if let Err(error) = self.sources.unwatch(fd) {
            log::debug!("a descriptor was not watched: {error}");
        }
    }

    /// The device cannot go on: the driver sees DEVICE_NEEDS_RESET (Virtio 1.3, 2.1.2), and has a while to reset it.
    pub(crate) fn fail(&mut self, why: &dyn std::fmt::Display) {
        if self.pending_reset.is_none() {
            let why = why.to_string();
            self.counters.driver_errors.fetch_add(1, Ordering::Relaxed);
            self.reporter.report_needs_reset(&why);
            let timer = self.start_grace();
            let timer = timer.inspect_err(|e| log::warn!("a reset that does not come goes unseen: {e}")).ok();
            self.pending_reset = Some(PendingReset { why, timer });
        }
        self.interrupt.signal_needs_reset();
    }

    fn start_grace(&self) -> io::Result<Timer> {
        let mut timer = Timer::new()?;
        timer.set(Some(Instant::now() + RESET_GRACE))?;
        self.sources.watch(timer.as_fd(), self.token(OVERDUE_TOKEN), Interest::IN)?;
        Ok(timer)
    }

    /// Stops the time that the driver has for a reset: it cannot do that while the VM is paused.
    pub(super) fn stop_reset_deadline(&mut self) {
        self.set_reset_deadline(None);
    }

    /// Gives the driver the whole time for a reset, from now on.
    pub(super) fn start_reset_deadline(&mut self) {
        self.set_reset_deadline(Some(Instant::now() + RESET_GRACE));
    }

    fn set_reset_deadline(&mut self, deadline: Option<Instant>) {
        if let Some(PendingReset { timer: Some(timer), .. }) = &mut self.pending_reset
            && let Err(error) = timer.set(deadline)
        {
            log::warn!("the time of a reset that does not come: {error}");
        }
    }

    /// The reset has not come in time: what to tell of it, once.
    pub(super) fn reset_deadline_passed(&mut self) -> Option<String> {
        let PendingReset { why, timer } = self.pending_reset.as_mut()?;
        // Closing it ends its reports.
        timer.take()?;
        Some(format!("{why}; the guest's driver did not reset it within {} s", RESET_GRACE.as_secs()))
    }

    fn token(&self, code: u32) -> u64 {
        slot_token(self.slot) | u64::from(code)
    }

    fn check(&mut self, queue: usize) {
        if let Some(error) = self.queues.get(queue).and_then(Queue::broken)
            && self.pending_reset.is_none()
        {
            self.fail(&error);
        }
    }

    /// Starts hearing kicks.
    pub(super) fn watch_kicks(&self) -> io::Result<()> {
        for (n, kick) in (0..).zip(self.kicks.iter()) {
            self.sources.watch(borrow(kick), self.token(QUEUE_TOKENS + n), Interest::IN)?;
        }
        Ok(())
    }

    pub(super) fn unwatch_kicks(&self) {
        for kick in self.kicks.iter() {
            self.unwatch(borrow(kick));
        }
    }

    /// Takes a queue's kick: the counter is cleared before the queue is looked at.
    pub(super) fn ack_kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            let count = kick.read().unwrap_or(0);
            add(&self.counters.kicks, count);
        }
    }
}
