//! [`CancelToken`]: how another thread ends a start that is under way.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::image::Cancel;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{EventFd, borrow, eventfd};

/// Ends a container's start from another thread; see [`ContainerBuilder::cancel`](super::ContainerBuilder::cancel).
///
/// Clones share one state. The descriptor behind [`AsFd`] becomes readable when it is cancelled.
#[derive(Clone)]
pub struct CancelToken(Arc<Inner>);

struct Inner {
    /// What the preparation of an image looks at.
    cancelled: Cancel,
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
        Ok(Self(Arc::new(Inner { cancelled: Cancel::default(), wake })))
    }

    /// Cancels every start that has this token, now and later. Idempotent; returns at once.
    pub fn cancel(&self) {
        self.0.cancelled.cancel();
        // A full counter is readable, which is all that is wanted.
        let _ = self.0.wake.write(1);
    }

    /// Tells whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.is_cancelled()
    }

    /// What the preparation of an image looks at.
    pub(super) fn preparation(&self) -> &Cancel {
        &self.0.cancelled
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
