//! [`HostSockets`]: the host's side of the stack. Sockets are made here alone, and here are their events and the clock.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::generational::Owner;
use crate::network::policy::Admitted;
use crate::sys::{ControlOperation, Epoll, EpollEvent, EventSet, HeldDescriptors, Socket, SocketKind, Timer};

/// When an owner is called. It has at most one timer, so there are never more than owners. A timer may fire too early:
/// what moves on with every packet is not written down each time.
#[derive(Debug, Default, Clone, Copy)]
pub(in crate::network) struct TimerEntry(Option<Instant>);

/// Sockets, timers and the time.
pub(in crate::network) struct HostSockets {
    epoll: Epoll,
    timer: Timer,
    /// What the timer is set to.
    set: Option<Instant>,
    timers: BTreeSet<(Instant, Owner)>,
    /// The time, as of the last [`HostSockets::tick`].
    pub now: Instant,
    /// Tests are ahead of their time.
    skew: Duration,
    /// How many sockets were made to go out; each was admitted by the policy.
    pub made: u64,
    /// Expensive system calls since [`HostSockets::take_calls`] last took them.
    pub syscalls: usize,
    /// This network's share of its guest's descriptors, as last counted. They count against its guest's share.
    pub held: HeldDescriptors,
    /// Where sockets would have gone, when none are to be made.
    #[cfg(any(test, feature = "internals"))]
    pub pretended: Option<Vec<(crate::sys::SocketKind, std::net::SocketAddr)>>,
}

impl std::fmt::Debug for HostSockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("timers", &self.timers.len()).field("made", &self.made).finish_non_exhaustive()
    }
}

impl HostSockets {
    pub(in crate::network) fn new(held: HeldDescriptors) -> io::Result<Self> {
        let (epoll, timer) = (Epoll::new()?, Timer::new()?);
        let event = EpollEvent::new(EventSet::IN, Owner::Timer.token());
        epoll.ctl(ControlOperation::Add, timer.as_fd().as_raw_fd(), event)?;
        let (now, skew) = (Instant::now(), Duration::ZERO);
        Ok(Self {
            epoll,
            timer,
            set: None,
            timers: BTreeSet::new(),
            now,
            skew,
            made: 0,
            syscalls: 0,
            held,
            #[cfg(any(test, feature = "internals"))]
            pretended: None,
        })
    }

    pub(in crate::network) fn fd(&self) -> BorrowedFd<'_> {
        crate::sys::borrow_epoll(&self.epoll)
    }

    /// Makes a socket to where the policy lets it go. Only the policy makes an [`Admitted`].
    pub(in crate::network) fn connect(&mut self, to: &Admitted) -> io::Result<Socket> {
        self.made += 1;
        // socket(2), connect(2), what watches it, and close(2); a stream has two options.
        self.syscalls += if to.kind() == SocketKind::Stream { 6 } else { 4 };
        #[cfg(any(test, feature = "internals"))]
        if let Some(made) = &mut self.pretended {
            made.push((to.kind(), to.address()));
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        if !self.may_hold() {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        Socket::connect(to.kind(), to.address()).inspect(|_| self.held.add(1))
    }

    /// Whether this network may have one more descriptor, of those that its guest may hold.
    pub(in crate::network) fn may_hold(&self) -> bool {
        self.held.has_room(1)
    }

    /// System calls that the device has not charged yet.
    pub(in crate::network) fn take_calls(&mut self) -> usize {
        std::mem::take(&mut self.syscalls)
    }

    /// Tells its owner what happens to a descriptor, each time it happens.
    pub(in crate::network) fn watch(&self, fd: BorrowedFd<'_>, owner: Owner) -> io::Result<()> {
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(interest, owner.token()))
    }

    /// As [`HostSockets::watch`], but only that there is something to read, for as long as there is.
    pub(in crate::network) fn watch_level(&self, fd: BorrowedFd<'_>, owner: Owner) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, owner.token()))
    }

    pub(in crate::network) fn unwatch(&self, fd: BorrowedFd<'_>) {
        if let Err(error) = self.epoll.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default()) {
            log::debug!("a descriptor was not watched: {error}");
        }
    }

    /// What happened; fills no more than `events` holds.
    pub(in crate::network) fn events(&self, events: &mut [EpollEvent]) -> usize {
        match self.epoll.wait(0, events) {
            Ok(count) => count,
            Err(error) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    log::error!("a network cannot look at its sockets: {error}");
                }
                0
            }
        }
    }

    pub(in crate::network) fn tick(&mut self) {
        self.now = Instant::now() + self.skew;
    }

    #[cfg(any(test, feature = "internals"))]
    pub(in crate::network) fn advance(&mut self, by: Duration) {
        self.skew += by;
        self.tick();
    }

    /// Calls `owner` at `at`, or earlier.
    pub(in crate::network) fn set_timer(&mut self, timer: &mut TimerEntry, owner: Owner, at: Option<Instant>) {
        let Some(at) = at else { return };
        if timer.0.is_some_and(|set| set <= at) {
            return;
        }
        self.cancel_timer(timer, owner);
        self.timers.insert((at, owner));
        timer.0 = Some(at);
    }

    /// The owner is going.
    pub(in crate::network) fn cancel_timer(&mut self, timer: &mut TimerEntry, owner: Owner) {
        if let Some(set) = timer.0.take() {
            self.timers.remove(&(set, owner));
        }
    }

    /// Returns an owner whose time has come. It must call [`TimerEntry::fired`] and set its next.
    pub(in crate::network) fn due(&mut self) -> Option<Owner> {
        let (at, owner) = *self.timers.first()?;
        if at > self.now {
            return None;
        }
        self.timers.pop_first();
        Some(owner)
    }

    /// Sets the timer to the earliest entry.
    pub(in crate::network) fn arm(&mut self) {
        let first = self.timers.first().map(|(at, _)| *at);
        // One that is too early costs less than a system call each time that the earliest entry moves.
        if first.is_none_or(|first| self.set.is_some_and(|set| set <= first)) {
            return;
        }
        if let Err(error) = self.timer.set(first.and_then(|at| at.checked_sub(self.skew))) {
            log::error!("a network's timer cannot be set: {error}");
        }
        self.set = first;
    }

    /// Clears the timer, which has fired.
    pub(in crate::network) fn clear_timer(&mut self) {
        self.timer.clear();
        self.set = None;
    }
}

impl TimerEntry {
    /// [`HostSockets::due`] named its owner.
    pub(in crate::network) fn fired(&mut self) {
        self.0 = None;
    }
}

/// Whether a descriptor's owner should try again later, as the host has no more of something.
pub(in crate::network) fn exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
