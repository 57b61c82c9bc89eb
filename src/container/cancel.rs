//! [`CancelToken`]: how another thread ends a running start or preparation.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{EventFd, borrow, eventfd};

/// Ends a container's start or an image's preparation from another thread.
///
/// It is given to [`ContainerBuilder::cancel`](super::ContainerBuilder::cancel) or [`Image::cancel`](super::Image::cancel).
///
/// Clones share one state. The descriptor behind [`AsFd`] becomes readable when it is cancelled.
#[derive(Clone)]
pub struct CancelToken(Arc<Inner>);

struct Inner {
    cancelled: AtomicBool,
    /// Readable once it is cancelled.
    wake: EventFd,
}

impl CancelToken {
    /// Creates a token that is not cancelled.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub fn new() -> Result<Self> {
        let wake = eventfd().doing(|| "creating a token")?;
        Ok(Self(Arc::new(Inner { cancelled: AtomicBool::new(false), wake })))
    }

    /// Cancels every start and preparation that has this token, now and later. Idempotent; returns at once.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Relaxed);
        // A full counter is readable, which is all that is wanted.
        let _ = self.0.wake.write(1);
    }

    /// Tells whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Relaxed)
    }

    /// # Errors
    /// `Cancelled` when it is.
    pub(super) fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(cancelled()),
            false => Ok(()),
        }
    }
}

pub(super) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "its token was cancelled")
}

impl AsRawFd for CancelToken {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl AsFd for CancelToken {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.0.wake)
    }
}

impl fmt::Debug for CancelToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CancelToken({})", if self.is_cancelled() { "cancelled" } else { "not cancelled" })
    }
}
