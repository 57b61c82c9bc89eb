//! [`Slots`]: the devices of one event loop, each idle or running. Starts, dispatches and stops them.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::io::{slot_token, split_token};
use super::{DeviceIo, EventSource, VirtioDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::event_loop::{Handler, Interest, Remote, Sources};
use crate::sys::left;

/// Called with a device's slot when it has panicked, our own mistake, or has waited in vain for its driver's reset.
pub(crate) type OnDeviceFault = Box<dyn Fn(usize, &str) + Send>;

/// How a device's turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TurnEnd {
    /// It has done all that there was.
    Done,
    /// There may be more.
    Over,
}

struct DeviceSlot {
    device: Box<dyn VirtioDevice>,
    running: Option<DeviceIo>,
    /// What a driver set up so that the device could not start; it waits for a reset.
    refused: Option<DeviceIo>,
}

/// What an event loop owns.
pub(crate) struct Slots {
    slots: Vec<DeviceSlot>,
    sources: Sources,
    on_fault: OnDeviceFault,
    /// What else is watched on this loop. Its slots are behind those of the devices.
    extra_sources: Vec<ExtraSource>,
}

/// A file of no device, and what is done when it is ready.
struct ExtraSource {
    file: File,
    on_ready: Box<dyn FnMut() + Send>,
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slots({})", self.slots.len())
    }
}

impl Slots {
    pub(crate) fn new(devices: Vec<Box<dyn VirtioDevice>>, sources: Sources, on_fault: OnDeviceFault) -> Self {
        let slots = devices.into_iter().map(|device| DeviceSlot { device, running: None, refused: None }).collect();
        Self { slots, sources, on_fault, extra_sources: Vec::new() }
    }

    /// Calls `f` on this loop whenever the kernel has something urgent to say by `file` (`EPOLLPRI`).
    pub(crate) fn watch_urgent(&mut self, file: File, f: impl FnMut() + Send + 'static) -> std::io::Result<()> {
        let slot = self.slots.len() + self.extra_sources.len();
        self.sources.watch(file.as_fd(), slot_token(slot), Interest::PRIORITY)?;
        self.extra_sources.push(ExtraSource { file, on_ready: Box::new(f) });
        Ok(())
    }

    fn urgent(&mut self, slot: usize, events: Interest) {
        let Some(ExtraSource { file, on_ready }) =
            slot.checked_sub(self.slots.len()).and_then(|n| self.extra_sources.get_mut(n))
        else {
            return;
        };
        if events.contains(Interest::ERROR) {
            // It is gone, and would say so for ever.
            let _ = self.sources.unwatch(file.as_fd());
            return;
        }
        on_ready();
    }

    /// Where this loop's descriptors are registered.
    pub(super) fn sources(&self) -> Sources {
        self.sources.clone()
    }

    /// The driver is ready: the device runs, and has looked at its queues once when this returns. One that cannot run waits
    /// for its driver's reset; then this is false.
    pub(super) fn start(&mut self, slot: usize, mut io: DeviceIo) -> bool {
        let Some(it) = self.slots.get_mut(slot) else {
            return false;
        };
        it.stop();
        if let Err(error) = io.watch_kicks().and_then(|()| it.device.started(&mut io)) {
            io.unwatch_kicks();
            self.refuse(slot, io, &error.to_string());
            return false;
        }
        let queues = io.queues.len();
        it.running = Some(io);
        // One turn for all: those for which it is too short are looked at in the next.
        self.call(slot, |device, io| (0..queues).for_each(|queue| look_on(device, io, EventSource::Queue(queue))));
        true
    }

    /// The driver has set the device up so that it cannot run: it waits for a reset.
    pub(super) fn refuse(&mut self, slot: usize, mut io: DeviceIo, why: &str) {
        io.fail(&why);
        if let Some(it) = self.slots.get_mut(slot) {
            it.stop();
            it.refused = Some(io);
        }
    }

    /// The device becomes idle; its queues come back. Idle ones stay idle.
    pub(super) fn stop(&mut self, slot: usize) -> Option<DeviceIo> {
        self.slots.get_mut(slot).and_then(DeviceSlot::stop)
    }

    /// Serves what the driver has handed over at the VM's end; then stops every device. Waiting takes the given time at
    /// most.
    pub(crate) fn finish(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        for slot in 0..self.slots.len() {
            let queues = self.slots.get(slot).and_then(|s| s.running.as_ref()).map_or(0, |io| io.queues.len());
            for queue in 0..queues {
                // What was handed over by a guest that runs no more takes a bounded number of turns.
                while self.dispatch(slot, EventSource::Queue(queue)) == Some(TurnEnd::Over) && !left(deadline).is_zero()
                {
                }
            }
            self.call(slot, |device, io| device.finishing(io, left(deadline)));
            self.stop(slot);
            if let Some(it) = self.slots.get_mut(slot) {
                it.device.ended();
            }
        }
    }

    /// Ends what devices have in flight, within the given time. False when something is still in flight then.
    pub(crate) fn pause(&mut self, timeout: Duration) -> bool {
        let (deadline, slots) = (Instant::now() + timeout, self.slots.len());
        let mut pause = |slot| self.call(slot, |device, io| device.pausing(io, left(deadline)));
        (0..slots).filter_map(&mut pause).all(|quiet| quiet)
    }

    /// Devices go on after a pause.
    pub(crate) fn resume(&mut self) {
        for slot in 0..self.slots.len() {
            self.call(slot, |device, io| device.resumed(io));
        }
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
        let Some(DeviceSlot { device, running: Some(io), .. }) = self.slots.get_mut(slot) else {
            return None;
        };
        io.turn.begin();
        let panic = match catch_unwind(AssertUnwindSafe(|| f(&mut **device, io))) {
            Ok(answer) => return Some(answer),
            Err(panic) => panic,
        };
        let why = panic.downcast_ref::<String>().cloned();
        let why = why.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
        io.fail(&why);
        io.unwatch_kicks();
        if let Some(DeviceSlot { running, .. }) = self.slots.get_mut(slot) {
            *running = None;
        }
        (self.on_fault)(slot, &format!("it panicked: {why}"));
        None
    }

    /// The driver has not reset the device in time.
    fn reset_deadline_passed(&mut self, slot: usize) {
        let io = self.slots.get_mut(slot).and_then(|it| it.running.as_mut().or(it.refused.as_mut()));
        if let Some(why) = io.and_then(DeviceIo::reset_deadline_passed) {
            (self.on_fault)(slot, &why);
        }
    }
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
    fn stop(&mut self) -> Option<DeviceIo> {
        self.refused = None;
        let mut io = self.running.take()?;
        io.unwatch_kicks();
        self.device.stopping(&mut io);
        Some(io)
    }
}

impl Handler for Slots {
    fn ready(&mut self, token: u64, events: Interest) {
        match split_token(token, events) {
            (slot, _) if slot >= self.slots.len() => self.urgent(slot, events),
            (slot, Some(source)) => drop(self.dispatch(slot, source)),
            (slot, None) => self.reset_deadline_passed(slot),
        }
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        (0..self.slots.len()).for_each(|slot| drop(self.stop(slot)));
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
        let answer = self.remote.with(move |slots| {
            let DeviceSlot { device, running, .. } = slots.slots.get_mut(slot)?;
            // What is asked for is a turn of its own.
            running.iter_mut().for_each(DeviceIo::begin_turn);
            (&mut **device as &mut dyn Any).downcast_mut::<D>().map(|device| f(device, running.as_mut()))
        })?;
        answer.ok_or_else(|| Error::new(ErrorKind::InvalidState, format!("device {slot} is of another type")))
    }
}
