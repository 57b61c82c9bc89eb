//! A timer as a descriptor, set to a moment.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

/// The moment that comes `after` from now; `None` for one that never comes, further away than the clock counts.
pub(crate) fn deadline(after: Duration) -> Option<Instant> {
    Instant::now().checked_add(after)
}

/// How long it is until `deadline`; zero when it has passed.
pub(crate) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Becomes readable when its moment has come.
pub(crate) struct Timer(TimerFd);

impl Timer {
    pub(crate) fn new() -> io::Result<Self> {
        TimerFd::new().map(Self).map_err(Into::into)
    }

    /// Sets the moment; one that is over comes at once, `None` never comes.
    pub(crate) fn set(&mut self, moment: Option<Instant>) -> io::Result<()> {
        let outcome = match moment {
            // Zero would mean never.
            Some(moment) => {
                let left = moment.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
                self.0.reset(left, None)
            }
            None => self.0.clear(),
        };
        outcome.map_err(Into::into)
    }

    /// The moment was noticed. Call it only when the descriptor is readable.
    pub(crate) fn clear(&mut self) {
        if let Err(error) = self.0.wait() {
            log::debug!("a timer was noticed twice: {error}");
        }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the TimerFd owns an open descriptor for as long as the borrow of it lives.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
