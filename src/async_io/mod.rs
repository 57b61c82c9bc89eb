//! Handles for tasks of a tokio runtime, which waits for their descriptors.
//!
//! No other layer knows of a runtime.

mod ends;
mod handle;
mod stream;

#[cfg(test)]
mod tests;

use std::os::fd::AsRawFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub use handle::{Async, Pollable};

use crate::error::{Context, Result};

/// Registers a descriptor with the runtime of the calling task.
#[allow(deprecated, reason = "its other name is unsafe, for descriptors that change or close; those of handles do not")]
fn register<T: AsRawFd>(inner: T, interest: Interest) -> Result<AsyncFd<T>> {
    AsyncFd::with_interest(inner, interest).doing(|| "registering a descriptor with tokio")
}

/// Waits until `attempt` returns something; it is made whenever the descriptor is readable.
///
/// What arrives between an attempt and the next wait makes the descriptor ready anew. Nothing is taken before it returns, so
/// that a caller that is dropped loses nothing.
async fn when_readable<T: AsRawFd, R>(fd: &AsyncFd<T>, mut attempt: impl FnMut(&T) -> Result<Option<R>>) -> Result<R> {
    loop {
        let mut ready = fd.readable().await.doing(|| "waiting for a descriptor by tokio")?;
        match attempt(ready.get_inner())? {
            Some(it) => return Ok(it),
            None => ready.clear_ready(),
        }
    }
}
