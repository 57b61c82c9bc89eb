//! Ends of machines, containers and processes, as futures.

use std::os::fd::AsFd;

use tokio::io::Interest;

use super::{register, when_readable};
#[cfg(feature = "container")]
use crate::container::{Container, ExitStatus, Process};
use crate::error::{Context, Result};
use crate::vm::{Exit, Vm};

/// Waits until `end` returns something, which it does when the handle's descriptor is readable.
///
/// Any number of tasks may wait for one end, and a runtime takes a descriptor only once. So each waits by a copy.
pub(super) async fn ended<T>(handle: &impl AsFd, end: impl Fn() -> Result<Option<T>>) -> Result<T> {
    if let Some(end) = end()? {
        return Ok(end);
    }
    let copy = handle.as_fd().try_clone_to_owned().doing(|| "copying the descriptor of an end")?;
    when_readable(&register(copy, Interest::READABLE)?, |_| end()).await
}

impl Vm {
    /// Waits until the VM has ended, as a future of tokio's.
    ///
    /// It needs the feature `tokio`. Any number of tasks may wait. The future has a descriptor and no thread, and may be dropped at any time. The VM is kept
    /// while it waits.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left. `Io` when the runtime shuts down.
    ///
    /// # Panics
    /// Outside of a tokio runtime, and in one that was built without `enable_io`, as tokio's own types.
    pub async fn wait_async(&self) -> Result<Exit> {
        ended(self, || Ok(self.try_wait())).await
    }
}

#[cfg(feature = "container")]
impl Container {
    /// Waits until the container has ended, as a future of tokio's.
    ///
    /// It needs the feature `tokio`, and is as [`Vm::wait_async`]. Dropping the last handle of a container blocks: that is for `spawn_blocking`.
    ///
    /// # Errors
    /// As [`Vm::wait_async`].
    ///
    /// # Panics
    /// As [`Vm::wait_async`].
    pub async fn wait_async(&self) -> Result<Exit> {
        self.vm().wait_async().await
    }
}

#[cfg(feature = "container")]
impl Process {
    /// Closes standard input and waits for the end, as a future of tokio's.
    ///
    /// It needs the feature `tokio`, and is ready when [`Process::wait`] would be, but for output that goes to a file. That may still be on its way.
    /// `Process::wait` on `spawn_blocking` waits for that too, and returns its errors. The future may be dropped at any time.
    ///
    /// # Errors
    /// - `InvalidState` when the container was dropped, so that the end is not known.
    /// - `ResourceExhausted` when this process has no descriptors left.
    /// - `Io` when the runtime shuts down.
    ///
    /// # Panics
    /// As [`Vm::wait_async`].
    pub async fn wait_async(&mut self) -> Result<ExitStatus> {
        drop(self.stdin.take());
        ended(self, || self.try_wait()).await
    }
}
