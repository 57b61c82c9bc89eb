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
        let timer = TimerFd::new().map_err(io::Error::from)?;
        // SAFETY: F_GETFL and F_SETFL take and give plain numbers.
        let set = unsafe {
            let flags = libc::fcntl(timer.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(timer.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if set < 0 { Err(io::Error::last_os_error()) } else { Ok(Self(timer)) }
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

    /// The moment was noticed. Never waits: since its descriptor was readable it may have been set to a later one.
    pub(crate) fn clear(&mut self) {
        if let Err(error) = self.0.wait() {
            log::trace!("a timer was set again before it was noticed: {error}");
        }
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the TimerFd owns an open descriptor for as long as the borrow of it lives.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::wait_readable;

    #[test]
    fn rearmed_timer_does_not_block_clear() {
        let mut timer = Timer::new().unwrap();
        timer.set(Some(Instant::now())).unwrap();
        assert!(wait_readable(timer.as_fd(), Some(Duration::from_secs(10))).unwrap());
        timer.set(deadline(Duration::from_secs(3600))).unwrap();
        // Would wait for an hour.
        timer.clear();
        timer.set(Some(Instant::now())).unwrap();
        assert!(wait_readable(timer.as_fd(), Some(Duration::from_secs(10))).unwrap());
        timer.clear();
        assert!(!wait_readable(timer.as_fd(), Some(Duration::ZERO)).unwrap());
    }
}
