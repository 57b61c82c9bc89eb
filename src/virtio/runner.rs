//! [`Slots`]: the devices of one event loop, each idle or running. Starts, dispatches and stops them.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::event::{DeviceEvent, DeviceReporter};
use super::io::{slot_token, split_token};
use super::queue::{Queue, QueueError};
use super::transport::{DeviceSetup, StoppedDevice};
use super::{DeviceIo, DeviceState, DrainCause, EventSource, VirtioDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::event_loop::{Handler, Interest, Remote, Sources};
use crate::memory::IoQueue;
use crate::sys::left;

/// How a device's turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TurnEnd {
    /// It has done all that there was.
    Done,
    /// There may be more.
    Over,
}

/// What is left of a device that was removed from its loop.
#[derive(Debug)]
#[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
pub(crate) struct RemovedDevice {
    /// What the host still moves from or to guest memory.
    pub unfinished: Option<IoQueue>,
}

struct DeviceSlot {
    /// Its number on this loop.
    number: usize,
    reporter: DeviceReporter,
    device: Box<dyn VirtioDevice>,
    phase: DevicePhase,
}

/// Where a device is in its life.
enum DevicePhase {
    /// No driver has set it up.
    Idle,
    Running(DeviceIo),
    /// A pause has stopped it.
    Paused(DeviceIo, StoppedDevice),
    /// A driver has set it up so that it could not start; it waits for a reset.
    Refused(DeviceIo),
}

/// What an event loop owns.
///
/// Each device has a number, by which descriptors and handles name it. No number is given twice, so that a late event of a
/// device that was removed never reaches another.
pub(crate) struct Slots {
    /// In the order of their numbers.
    slots: Vec<DeviceSlot>,
    next_number: usize,
    sources: Sources,
    /// What else is watched on this loop.
    extra_sources: Vec<ExtraSource>,
}

/// A file of no device, and what is done when it is ready.
struct ExtraSource {
    number: usize,
    file: File,
    on_ready: Box<dyn FnMut() + Send>,
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slots({})", self.slots.len())
    }
}

impl Slots {
    pub(crate) fn new(sources: Sources) -> Self {
        Self { slots: Vec::new(), next_number: 0, sources, extra_sources: Vec::new() }
    }

    /// Takes a device, which no driver has set up, and returns its number.
    pub(crate) fn add(&mut self, device: Box<dyn VirtioDevice>, reporter: DeviceReporter) -> usize {
        let number = self.take_number();
        self.slots.push(DeviceSlot { number, reporter, device, phase: DevicePhase::Idle });
        number
    }

    /// Stops a device for good and drops it. What the host still moves for it is left in `unfinished`. `None` when there is
    /// no such device.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub(crate) fn remove(&mut self, number: usize) -> Option<RemovedDevice> {
        let at = self.position(number)?;
        let unfinished = self.reset(number);
        let mut slot = self.slots.remove(at);
        // It may be the embedder's in part, and panic at both.
        let ended = catch_unwind(AssertUnwindSafe(|| slot.device.ended()));
        let dropped = catch_unwind(AssertUnwindSafe(move || drop(slot)));
        for panic in [ended, dropped].into_iter().filter_map(std::result::Result::err) {
            log::error!("a device that was removed has panicked: {}", panic_text(&*panic));
        }
        Some(RemovedDevice { unfinished })
    }

    fn take_number(&mut self) -> usize {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    fn position(&self, number: usize) -> Option<usize> {
        // Where none was removed, a device is where its number says.
        match self.slots.get(number) {
            Some(slot) if slot.number == number => Some(number),
            _ => self.slots.binary_search_by_key(&number, |slot| slot.number).ok(),
        }
    }

    fn slot(&mut self, number: usize) -> Option<&mut DeviceSlot> {
        let at = self.position(number)?;
        self.slots.get_mut(at)
    }

    fn numbers(&self) -> Vec<usize> {
        self.slots.iter().map(|slot| slot.number).collect()
    }

    /// Calls `f` on this loop whenever the kernel has something urgent to say by `file` (`EPOLLPRI`).
    pub(crate) fn watch_urgent(&mut self, file: File, f: impl FnMut() + Send + 'static) -> std::io::Result<()> {
        let number = self.take_number();
        self.sources.watch(file.as_fd(), slot_token(number), Interest::PRIORITY)?;
        self.extra_sources.push(ExtraSource { number, file, on_ready: Box::new(f) });
        Ok(())
    }

    fn urgent(&mut self, number: usize, events: Interest) {
        let source = self.extra_sources.iter_mut().find(|source| source.number == number);
        let Some(ExtraSource { file, on_ready, .. }) = source else { return };
        if events.contains(Interest::ERROR) {
            // It is gone, and would say so for ever.
            let _ = self.sources.unwatch(file.as_fd());
            return;
        }
        on_ready();
    }

    /// Starts a device: it runs, and has looked at its queues once when this returns. One that cannot run waits for its
    /// driver's reset; then this is false.
    pub(super) fn start(&mut self, slot: usize, setup: DeviceSetup) -> bool {
        if self.position(slot).is_none() {
            return false;
        }
        let (io, state) = DeviceIo::new(setup, self.sources.clone(), slot);
        self.reset(slot);
        match state {
            Ok(state) => self.run(slot, io, state.as_ref()),
            Err(why) => {
                self.refuse(slot, io, &why);
                false
            }
        }
    }

    /// Lets a stopped device run, from where it stands.
    fn run(&mut self, slot: usize, mut io: DeviceIo, state: Option<&DeviceState>) -> bool {
        let started = self.caught(slot, |it| {
            let started = io.watch_kicks().and_then(|()| it.device.start(&mut io, state));
            if started.is_err() {
                // What it watches already would be in the way of the next start.
                it.stop(&mut io);
                it.device.reset();
            }
            started
        });
        match started {
            Some(Ok(())) => {}
            Some(Err(error)) => {
                self.refuse(slot, io, &error.to_string());
                return false;
            }
            // It panicked, which ends the VM.
            None => {
                io.unwatch_kicks();
                return false;
            }
        }
        // One that comes from a state that was saved in need of a reset.
        if io.interrupt.needs_reset() && io.pending_reset.is_none() {
            io.fail(&"it needed a reset when its state was saved");
        }
        let queues = io.queues.len();
        if let Some(it) = self.slot(slot) {
            it.phase = DevicePhase::Running(io);
        }
        // One turn for all: those for which it is too short are looked at in the next.
        self.call(slot, |device, io| (0..queues).for_each(|queue| look_on(device, io, EventSource::Queue(queue))));
        true
    }

    /// The driver has set the device up so that it cannot run: it waits for a reset.
    fn refuse(&mut self, slot: usize, mut io: DeviceIo, why: &str) {
        io.fail(&why);
        if let Some(it) = self.slot(slot) {
            it.phase = DevicePhase::Refused(io);
        }
    }

    /// Makes the device idle, and lets its queues go. Returns what the host still moves for it.
    pub(super) fn reset(&mut self, slot: usize) -> Option<IoQueue> {
        self.caught(slot, DeviceSlot::reset).flatten()
    }

    /// Returns where a paused device stands; `None` for one that no driver has started.
    ///
    /// # Errors
    /// `InvalidState` for one that runs.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    pub(super) fn save(&self, slot: usize) -> Result<Option<StoppedDevice>> {
        match self.position(slot).and_then(|at| self.slots.get(at)).map(|it| &it.phase) {
            Some(DevicePhase::Paused(_, stopped)) => Ok(Some(stopped.clone())),
            Some(DevicePhase::Running(_)) => {
                Err(Error::new(ErrorKind::InvalidState, format!("device {slot} runs; pause the VM first")))
            }
            _ => Ok(None),
        }
    }

    /// Serves what the driver has handed over at the VM's end; then stops every device. Waiting takes the given time at
    /// most.
    pub(crate) fn finish(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        // Also what a limit or a fault kept back before a pause is served, or fails once more.
        let numbers = self.numbers();
        numbers.iter().for_each(|slot| _ = self.unpause(*slot));
        for slot in numbers {
            let queues = self.call(slot, |_, io| io.queues.len()).unwrap_or(0);
            for queue in 0..queues {
                // What was handed over by a guest that runs no more takes a bounded number of turns.
                while self.dispatch(slot, EventSource::Queue(queue)) == Some(TurnEnd::Over) && !left(deadline).is_zero()
                {
                }
            }
            self.call(slot, |device, io| device.drain(io, left(deadline), DrainCause::End));
            self.reset(slot);
            if let Some(it) = self.slot(slot) {
                it.device.ended();
            }
        }
    }

    /// Stops all devices for a pause, when what they have in flight ends within the given time. False when it does not:
    /// then all go on.
    pub(crate) fn pause(&mut self, timeout: Duration) -> bool {
        let (deadline, numbers) = (Instant::now() + timeout, self.numbers());
        let mut drain = |slot| self.call(slot, |device, io| device.drain(io, left(deadline), DrainCause::Pause));
        let quiet = numbers.iter().copied().filter_map(&mut drain).all(|quiet| quiet);
        if quiet {
            numbers.iter().for_each(|slot| _ = self.caught(*slot, DeviceSlot::pause));
        }
        quiet
    }

    /// Lets devices go on after a pause, or after a fault that the embedder has seen to.
    pub(crate) fn resume(&mut self) {
        for slot in self.numbers() {
            // One that starts takes everything again anyway.
            if !self.unpause(slot) {
                self.call(slot, |device, io| device.ready(io, EventSource::Resumed));
            }
        }
    }

    /// Starts a device that a pause has stopped; false for others.
    fn unpause(&mut self, slot: usize) -> bool {
        let Some(it) = self.slot(slot) else { return false };
        let (mut io, stopped) = match std::mem::replace(&mut it.phase, DevicePhase::Idle) {
            DevicePhase::Paused(io, stopped) => (io, stopped),
            mut other => {
                if let DevicePhase::Running(io) | DevicePhase::Refused(io) = &mut other {
                    io.start_reset_deadline();
                }
                it.phase = other;
                return false;
            }
        };
        io.start_reset_deadline();
        let queues: std::result::Result<_, QueueError> = io.queues.drain(..).map(Queue::restarted).collect();
        match queues {
            Ok(queues) => {
                io.queues = queues;
                self.run(slot, io, Some(&stopped.state));
            }
            Err(error) => {
                debug_assert!(false, "device {slot} has lost a chain: {error}");
                it.device.reset();
                self.refuse(slot, io, &error.to_string());
            }
        }
        true
    }

    /// Gives a device its turn. `None` for one that does not run.
    fn dispatch(&mut self, slot: usize, source: EventSource) -> Option<TurnEnd> {
        self.call(slot, |device, io| {
            look(device, io, source);
            if io.turn_over() { TurnEnd::Over } else { TurnEnd::Done }
        })
    }

    /// Asks something of a device that runs. One that panics, our own mistake, does not run any more.
    fn call<R>(&mut self, slot: usize, f: impl FnOnce(&mut dyn VirtioDevice, &mut DeviceIo) -> R) -> Option<R> {
        let Some(DeviceSlot { device, phase: DevicePhase::Running(io), .. }) = self.slot(slot) else {
            return None;
        };
        io.turn.begin();
        let panic = match catch_unwind(AssertUnwindSafe(|| f(&mut **device, io))) {
            Ok(answer) => return Some(answer),
            Err(panic) => panic,
        };
        let why = panic_text(&*panic);
        io.fail(&why);
        io.unwatch_kicks();
        self.panicked(slot, &why);
        None
    }

    /// Starts, stops or resets a device, which may panic at that too.
    fn caught<R>(&mut self, slot: usize, f: impl FnOnce(&mut DeviceSlot) -> R) -> Option<R> {
        let it = self.slot(slot)?;
        match catch_unwind(AssertUnwindSafe(|| f(it))) {
            Ok(answer) => Some(answer),
            Err(panic) => {
                self.panicked(slot, &panic_text(&*panic));
                None
            }
        }
    }

    fn panicked(&mut self, slot: usize, why: &str) {
        if let Some(it) = self.slot(slot) {
            it.phase = DevicePhase::Idle;
            it.reporter.report(DeviceEvent::Failed(format!("it panicked: {why}")));
        }
    }

    /// The driver has not reset the device in time.
    fn reset_deadline_passed(&mut self, slot: usize) {
        let Some(it) = self.slot(slot) else { return };
        let io = match &mut it.phase {
            DevicePhase::Running(io) | DevicePhase::Paused(io, _) | DevicePhase::Refused(io) => io,
            DevicePhase::Idle => return,
        };
        if let Some(why) = io.reset_deadline_passed() {
            it.reporter.report(DeviceEvent::Failed(why));
        }
    }
}

/// Returns what a panic said.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Lets a device look at what is ready: all that happens between the driver's kick and its interrupt, but for the loop.
#[inline(never)]
pub(super) fn look(device: &mut dyn VirtioDevice, io: &mut DeviceIo, source: EventSource) {
    io.turn.begin();
    look_on(device, io, source);
}

/// The same within a turn that has begun.
fn look_on(device: &mut dyn VirtioDevice, io: &mut DeviceIo, source: EventSource) {
    if let EventSource::Queue(queue) = source {
        io.ack_kick(queue);
    }
    device.ready(io, source);
}

impl DeviceSlot {
    fn pause(&mut self) {
        self.phase = match std::mem::replace(&mut self.phase, DevicePhase::Idle) {
            DevicePhase::Running(mut io) => {
                let state = self.stop(&mut io);
                let positions = io.queues.iter().map(Queue::positions).collect();
                // Calls of the embedder take nothing from queues meanwhile, so that guest memory stands still.
                io.turn.end();
                io.stop_reset_deadline();
                DevicePhase::Paused(io, StoppedDevice { positions, state })
            }
            DevicePhase::Refused(mut io) => {
                io.stop_reset_deadline();
                DevicePhase::Refused(io)
            }
            other => other,
        };
    }

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        io.unwatch_kicks();
        self.device.stop(io)
    }

    fn reset(&mut self) -> Option<IoQueue> {
        let mut io = match std::mem::replace(&mut self.phase, DevicePhase::Idle) {
            DevicePhase::Running(mut io) => {
                self.stop(&mut io);
                io
            }
            DevicePhase::Paused(io, _) => io,
            DevicePhase::Idle | DevicePhase::Refused(_) => return None,
        };
        self.device.reset();
        io.unfinished_io.take()
    }
}

impl Handler for Slots {
    fn ready(&mut self, token: u64, events: Interest) {
        match split_token(token, events) {
            (slot, Some(source)) if self.position(slot).is_some() => drop(self.dispatch(slot, source)),
            (slot, Some(_)) => self.urgent(slot, events),
            (slot, None) => self.reset_deadline_passed(slot),
        }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.numbers().into_iter().for_each(|slot| drop(self.reset(slot)));
    }
}

/// A typed way to one device on its loop. Cheap to clone; outliving the loop is harmless.
pub(crate) struct DeviceHandle<D> {
    remote: Remote<Slots>,
    slot: usize,
    device: PhantomData<fn(&mut D)>,
}

impl<D> Clone for DeviceHandle<D> {
    fn clone(&self) -> Self {
        Self { remote: self.remote.clone(), slot: self.slot, device: PhantomData }
    }
}

impl<D> fmt::Debug for DeviceHandle<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceHandle({})", self.slot)
    }
}

impl<D: VirtioDevice> DeviceHandle<D> {
    /// The caller knows that `slot` of that loop holds a `D`.
    pub(crate) fn new(remote: Remote<Slots>, slot: usize) -> Self {
        Self { remote, slot, device: PhantomData }
    }

    /// Runs `f` on the device's loop, with what the device is given while it runs, and waits for the answer, at most
    /// [`REQUEST_TIMEOUT`](crate::event_loop::REQUEST_TIMEOUT).
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended, `TimedOut` when its loop hangs; then `f` is run all the same when it goes on.
    pub(crate) fn with<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut D, Option<&mut DeviceIo>) -> R + Send + 'static,
    ) -> Result<R> {
        let slot = self.slot;
        self.remote.with(move |slots| {
            let Some(DeviceSlot { device, phase, .. }) = slots.slot(slot) else {
                return Err(Error::new(ErrorKind::InvalidState, "the device was detached"));
            };
            let io = match phase {
                DevicePhase::Running(io) => {
                    // What is asked for is a turn of its own.
                    io.begin_turn();
                    Some(io)
                }
                DevicePhase::Paused(io, _) => Some(io),
                DevicePhase::Idle | DevicePhase::Refused(_) => None,
            };
            let device = (&mut **device as &mut dyn Any).downcast_mut::<D>();
            let device = device.ok_or_else(|| {
                debug_assert!(false, "device {slot} is of another type");
                Error::new(ErrorKind::InvalidState, format!("device {slot} is of another type"))
            })?;
            Ok(f(device, io))
        })?
    }
}
