//! The events of a VM, in a bounded log. Each reader reads at its own pace.
//!
//! The writer never waits for a reader: one that is too slow learns how many events were dropped.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::mem::discriminant;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::disk::DiskError;
use super::exit::Exit;
use super::net::Denial;
use crate::error::{Context, Result};
use crate::size::Size;
use crate::sys::{EventFd, borrow, deadline, eventfd, left};
use crate::virtio::DeviceId;

/// So many events are kept for readers that come late or are slow. What guests cause again and again pushes out no other kind.
const MAX_EVENTS: usize = 256;

/// Something that happened to a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Event {
    /// When, counted from the call of `start`.
    pub at: Duration,
    /// What.
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// Its vCPUs run.
    Started,
    /// A driver of the guest has set up the first virtio device.
    DriversReady,
    /// It was paused.
    Paused {
        /// By what.
        cause: PauseCause,
    },
    /// It goes on after a pause.
    Resumed,
    /// It runs without something that was optional.
    Degraded {
        /// Without what, and why.
        what: String,
    },
    /// A device cannot go on until the guest's driver resets it.
    DeviceError {
        /// Which device.
        device: DeviceId,
        /// What the guest's driver did, or what failed on the host.
        message: String,
    },
    /// The balloon has become what [`Vm::set_balloon`](crate::Vm::set_balloon) asked for, or less again because the guest
    /// runs short of memory.
    ///
    /// Each size that was asked for is reported when the balloon first has it. What the guest changes afterwards is
    /// reported ten times at once, then at most once a second: [`Vm::memory_stats`](crate::Vm::memory_stats) has the
    /// size of the moment.
    Balloon {
        /// What is in it.
        size: Size,
    },
    /// The host could not do what the guest asked of a disk.
    DiskError {
        /// Which disk, what the guest wanted, and what is done about it.
        error: DiskError,
    },
    /// A limit makes a device or the vCPUs wait.
    ///
    /// It is the limit of [a disk](crate::disk::FileDisk::limit), of [a network card](crate::net::UserNet::limit), or
    /// [`Cgroup::cpus`](crate::Cgroup::cpus) where the host measures pressure (PSI). There is at most one such event a
    /// second for each; [`Stats`](crate::stats::Stats) say how often and how long.
    Throttled {
        /// What waits.
        what: Throttled,
    },
    /// The policy of a network denied a connection or a name to the guest.
    ///
    /// Of a flood of them some are only counted.
    Denied {
        /// What was denied, and why.
        denial: Denial,
    },
    /// A disk's file system has less space left than [`min_free_space`](crate::disk::FileDisk::min_free_space).
    ///
    /// Reported once until there is more again. It is checked once a second while the guest writes.
    DiskSpaceLow {
        /// Which disk.
        disk: DeviceId,
        /// What is left.
        free: Size,
    },
    /// Programs can be started in the container.
    Ready,
    /// The guest's kernel has killed processes of a program for want of memory.
    ///
    /// Those that the program started count too. It is reported when it happens, while the program runs.
    OutOfMemory {
        /// The name or path by which the program was started.
        program: String,
        /// How many since the program began.
        kills: u32,
    },
    /// It has ended. The last event.
    Ended {
        /// How.
        exit: Exit,
    },
    /// The reader was too slow, so that events before the next were dropped.
    Missed {
        /// How many.
        count: u64,
    },
}

/// What paused a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PauseCause {
    /// The embedder, by [`Vm::pause`](crate::Vm::pause).
    Embedder,
    /// A disk, by [`ErrorAction::Pause`](crate::disk::ErrorAction::Pause); the event before says why.
    Disk(DeviceId),
}

impl fmt::Display for PauseCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedder => f.write_str("the embedder"),
            Self::Disk(disk) => write!(f, "{disk}"),
        }
    }
}

/// What waits for a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Throttled {
    /// Requests of a disk, or frames of a network card.
    Device(DeviceId),
    /// All threads of the VM, by its [`Cgroup`](crate::Cgroup).
    Vcpus,
}

impl fmt::Display for Throttled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(device) => write!(f, "{device}"),
            Self::Vcpus => f.write_str("vCPUs"),
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} s: ", self.at.as_secs_f64())?;
        match &self.kind {
            EventKind::Started => f.write_str("started"),
            EventKind::DriversReady => f.write_str("virtio drivers ready"),
            EventKind::Paused { cause } => write!(f, "paused by {cause}"),
            EventKind::Resumed => f.write_str("resumed"),
            EventKind::Degraded { what } => write!(f, "without {what}"),
            EventKind::DeviceError { device, message } => write!(f, "{device} needs a reset: {message}"),
            EventKind::Balloon { size } => write!(f, "{size} in the balloon"),
            EventKind::DiskError { error } => write!(f, "{error}"),
            EventKind::Denied { denial } => write!(f, "denied: {denial}"),
            EventKind::Throttled { what } => write!(f, "{what}: held back by a limit"),
            EventKind::DiskSpaceLow { disk, free } => write!(f, "{disk}: {free} are left on the host"),
            EventKind::Ready => f.write_str("ready for programs"),
            EventKind::OutOfMemory { program, kills } => {
                write!(f, "{program:?} has lost {kills} processes for want of memory")
            }
            EventKind::Ended { exit } => write!(f, "ended: {exit}"),
            EventKind::Missed { count } => write!(f, "{count} events were dropped"),
        }
    }
}

/// The log of one VM, shared by all writers and readers.
#[derive(Debug)]
pub(crate) struct EventLog {
    start: Instant,
    state: Mutex<EventLogState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct EventLogState {
    /// With their numbers, which ascend. The last event is always among them.
    kept: VecDeque<(u64, Event)>,
    /// How many there were.
    count: u64,
    ended: bool,
    readers: Vec<Weak<EventFd>>,
}

impl EventLogState {
    /// Forgets the oldest event of the kind of which there are most.
    fn drop_one(&mut self) {
        let mut counts = HashMap::new();
        for (_, event) in &self.kept {
            *counts.entry(discriminant(&event.kind)).or_insert(0) += 1;
        }
        let Some(kind) = counts.into_iter().max_by_key(|(_, count): &(_, usize)| *count).map(|(kind, _)| kind) else {
            return;
        };
        if let Some(at) = self.kept.iter().position(|(_, event)| discriminant(&event.kind) == kind) {
            self.kept.remove(at);
        }
    }
}

impl EventLog {
    pub(crate) fn new(start: Instant) -> Arc<Self> {
        Arc::new(Self { start, state: Mutex::default(), changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, EventLogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never waits for anybody. What comes after the end is not kept.
    pub(crate) fn push(&self, kind: EventKind) {
        let mut state = self.state();
        if state.ended {
            return;
        }
        state.ended = matches!(kind, EventKind::Ended { .. });
        if state.kept.len() == MAX_EVENTS {
            state.drop_one();
        }
        let number = state.count;
        state.count += 1;
        state.kept.push_back((number, Event { at: self.start.elapsed(), kind }));
        state.readers.retain(|reader| {
            // A counter at its maximum is readable all the same.
            reader.upgrade().map(|fd| drop(fd.write(1))).is_some()
        });
        drop(state);
        self.changed.notify_all();
    }

    /// A reader, from the first event that is kept.
    pub(crate) fn reader(self: &Arc<Self>) -> Result<Events> {
        let fd = Arc::new(eventfd().doing(|| "creating an event stream")?);
        let mut state = self.state();
        state.readers.push(Arc::downgrade(&fd));
        if !state.kept.is_empty() {
            let _ = fd.write(1);
        }
        drop(state);
        Ok(Events { log: self.clone(), fd, next: Mutex::new(0) })
    }
}

/// The events of one VM, from its start on; see [`Vm::events`](crate::Vm::events).
///
/// The descriptor behind [`AsFd`] and [`AsRawFd`] is readable while there is something to read, and once the last event
/// was read. The
/// last 256 events are kept; of more, the oldest of the most frequent kind goes. A reader gets [`EventKind::Missed`] in
/// the place of what it missed, and the VM never waits for one.
///
/// The stream outlives the VM's handle. As an iterator it blocks until the next event, and ends after
/// [`EventKind::Ended`].
#[derive(Debug)]
pub struct Events {
    log: Arc<EventLog>,
    fd: Arc<EventFd>,
    /// The number of the next event to read.
    next: Mutex<u64>,
}

impl Events {
    /// Returns the next event if there is one already. Never waits.
    pub fn try_next(&self) -> Option<Event> {
        self.read(&mut self.log.state())
    }

    /// Returns the next event, waiting for it at most `timeout`.
    ///
    /// `None` when none came, or when the last one was read.
    pub fn next_timeout(&self, timeout: Duration) -> Option<Event> {
        let deadline = deadline(timeout);
        let mut state = self.log.state();
        loop {
            // One that the clock does not count to is waited for in steps.
            let left = deadline.map_or(timeout, left);
            match self.read(&mut state) {
                None if !state.ended && !left.is_zero() => {
                    state = self.log.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                event => return event,
            }
        }
    }

    /// Whether the last event was read.
    #[cfg(feature = "tokio")]
    pub(crate) fn is_over(&self) -> bool {
        let state = self.log.state();
        state.ended && *self.next.lock().unwrap_or_else(PoisonError::into_inner) == state.count
    }

    fn read(&self, state: &mut EventLogState) -> Option<Event> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let at = state.kept.partition_point(|(number, _)| number < &*next);
        let (number, event) = state.kept.get(at)?;
        let missed = number - *next;
        *next = *number;
        if missed > 0 {
            return Some(Event { at: event.at, kind: EventKind::Missed { count: missed } });
        }
        *next += 1;
        if !state.ended && *next == state.count {
            // All were read, and the lock keeps others from coming in between.
            let _ = self.fd.read();
        }
        Some(event.clone())
    }
}

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let mut state = self.log.state();
        loop {
            match self.read(&mut state) {
                None if !state.ended => {
                    state = self.log.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                event => return event,
            }
        }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::wait_readable;
    use crate::vm::exit::{ExitReport, Stage};

    const PAUSED: EventKind = EventKind::Paused { cause: PauseCause::Embedder };

    fn ended() -> EventKind {
        EventKind::Ended { exit: Exit::PowerOff { report: Arc::new(ExitReport::new(Stage::Running)) } }
    }

    fn readable(events: &Events) -> bool {
        wait_readable(events.as_fd(), Some(Duration::ZERO)).unwrap()
    }

    #[test]
    fn every_event_reader_sees_all_events() {
        let log = EventLog::new(Instant::now());
        log.push(EventKind::Started);
        let [early, late] = [(); 2].map(|()| log.reader().unwrap());
        assert!(readable(&early));
        assert_eq!(early.try_next().unwrap().kind, EventKind::Started);
        assert!(!readable(&early) && early.try_next().is_none());
        assert!(early.next_timeout(Duration::from_millis(5)).is_none());
        log.push(PAUSED);
        log.push(ended());
        log.push(EventKind::Resumed);
        assert_eq!(early.map(|e| e.kind).collect::<Vec<_>>(), [PAUSED, ended()]);
        assert_eq!(late.map(|e| e.kind).collect::<Vec<_>>(), [EventKind::Started, PAUSED, ended()]);
    }

    #[test]
    fn slow_event_readers_get_a_count_of_missed_events() {
        let log = EventLog::new(Instant::now());
        let mut events = log.reader().unwrap();
        (0..1000).for_each(|_| log.push(PAUSED));
        assert_eq!(events.try_next().unwrap().kind, EventKind::Missed { count: 1000 - MAX_EVENTS as u64 });
        assert_eq!((0..MAX_EVENTS).filter(|_| events.try_next().is_some()).count(), MAX_EVENTS);
        assert!(events.try_next().is_none() && !readable(&events));
        log.push(ended());
        assert_eq!(events.next().unwrap().kind, ended());
        assert!(events.next().is_none() && readable(&events));
        drop(events);
        assert_eq!(log.state().kept.len(), MAX_EVENTS);
    }

    #[test]
    fn flood_of_one_event_kind_evicts_no_other() {
        let log = EventLog::new(Instant::now());
        let events = log.reader().unwrap();
        let flood = |n| {
            (0..n).for_each(|_| log.push(EventKind::Throttled { what: Throttled::Device(DeviceId::Net(0)) }));
        };
        log.push(EventKind::Started);
        flood(1000);
        let fault = EventKind::DeviceError { device: DeviceId::Rng, message: "a loop".into() };
        log.push(fault.clone());
        flood(1000);
        log.push(ended());
        let all: Vec<_> = events.map(|event| event.kind).collect();
        let missed: u64 = all.iter().map(|kind| if let EventKind::Missed { count } = kind { *count } else { 0 }).sum();
        let throttled = all.iter().filter(|kind| matches!(kind, EventKind::Throttled { .. })).count();
        assert_eq!((all.first(), all.last()), (Some(&EventKind::Started), Some(&ended())));
        assert!(all.contains(&fault));
        assert_eq!((throttled, missed), (MAX_EVENTS - 3, 2000 - (MAX_EVENTS as u64 - 3)));
    }

    #[test]
    fn a_reader_that_waits_is_woken() {
        let log = EventLog::new(Instant::now());
        let mut events = log.reader().unwrap();
        let reader = std::thread::spawn(move || events.next().map(|e| e.to_string()));
        log.push(EventKind::DeviceError { device: DeviceId::Rng, message: "a loop".into() });
        assert!(reader.join().unwrap().unwrap().ends_with(" s: rng needs a reset: a loop"));
    }
}
