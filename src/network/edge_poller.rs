//! [`EdgePoller`]: edge-triggered readiness of one descriptor, behind a descriptor of its own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::sys::{ControlOperation, Epoll, EpollEvent, EventSet, borrow_epoll};

/// A descriptor that is watched for both directions.
pub(super) struct EdgePoller {
    epoll: Epoll,
    pub readable: bool,
}

impl std::fmt::Debug for EdgePoller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Edges(readable: {})", self.readable)
    }
}

impl EdgePoller {
    /// Taken to be ready until it says that it is not.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(interest, 0))?;
        Ok(Self { epoll, readable: true })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        borrow_epoll(&self.epoll)
    }

    /// Takes note of what it became ready for.
    pub(super) fn poll(&mut self) {
        let mut events = [EpollEvent::default()];
        if self.epoll.wait(0, &mut events).is_ok_and(|n| n > 0) {
            let [event] = events;
            self.readable |= event.event_set() != EventSet::OUT;
        }
    }
}
