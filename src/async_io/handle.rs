//! [`Async`]: a handle whose descriptor a tokio runtime waits for.

use std::os::fd::AsRawFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{register, when_readable};
#[cfg(feature = "container")]
use crate::container::{ProcessReader, ProcessWriter};
use crate::error::Result;
use crate::virtio::vsock::{VsockListener, VsockStream};
use crate::vm::events::{Event, Events};

/// A stream, a listener or events, for tasks of a tokio runtime.
///
/// [`Async::new`] takes the handle that blocks. [`ProcessReader`](crate::process::ProcessReader) and
/// [`VsockStream`](crate::vsock::VsockStream) become [`AsyncRead`](tokio::io::AsyncRead).
/// [`ProcessWriter`](crate::process::ProcessWriter) and `VsockStream` become [`AsyncWrite`](tokio::io::AsyncWrite), whose
/// shutdown ends the direction to the guest. Events have [`Async::next`], and listeners [`Async::accept`].
///
/// It waits by the handle's own descriptor and has no thread. A future that is dropped before it is ready loses nothing.
/// Guests may be silent: to bound a wait is for the caller, as by `tokio::time::timeout`. Dropping it drops the handle.
#[derive(Debug)]
pub struct Async<T: Pollable>(pub(super) AsyncFd<T>);

/// The handles that [`Async`] takes. Sealed: it is for those of this crate.
pub trait Pollable: AsRawFd + sealed::Sealed {}

pub(super) mod sealed {
    use crate::virtio::vsock::VsockStream;

    pub trait Sealed {
        /// The connection behind it, where it is one; the others only become readable.
        fn stream(&self) -> Option<&VsockStream>;
    }
}

/// Says of handles which stream is behind them.
macro_rules! pollable {
    ($($(#[$cfg:meta])* $handle:ty: |$it:ident| $stream:expr;)*) => {$(
        $(#[$cfg])*
        impl Pollable for $handle {}

        $(#[$cfg])*
        impl sealed::Sealed for $handle {
            fn stream(&self) -> Option<&VsockStream> {
                let $it = self;
                $stream
            }
        }
    )*};
}

pollable! {
    VsockStream: |it| Some(it);
    VsockListener: |_it| None;
    Events: |_it| None;
    #[cfg(feature = "container")]
    ProcessReader: |it| Some(&it.0);
    #[cfg(feature = "container")]
    ProcessWriter: |it| Some(&it.0);
}

impl<T: Pollable> Async<T> {
    /// Registers a handle with the runtime of the calling task.
    ///
    /// A connection becomes non-blocking, with all of its clones. Does not wait.
    ///
    /// # Errors
    /// - `AlreadyExists` when this runtime has a clone of the connection already. For tasks that read and write share one,
    ///   as by `tokio::io::split`.
    /// - `ResourceExhausted` when the host has no memory for it, or the user too many such registrations.
    ///
    /// # Panics
    /// Outside of a tokio runtime, and in one that was built without `enable_io`, as tokio's own types.
    pub fn new(handle: T) -> Result<Self> {
        let Some(stream) = handle.stream() else {
            return register(handle, Interest::READABLE).map(Self);
        };
        stream.set_nonblocking(true)?;
        register(handle, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// Returns the handle, for what does not wait.
    pub fn get_ref(&self) -> &T {
        self.0.get_ref()
    }

    /// Returns the handle, which blocks again. Nothing is lost.
    ///
    /// # Errors
    /// `Io` as fcntl(2) fails.
    pub fn into_inner(self) -> Result<T> {
        let handle = self.0.into_inner();
        if let Some(stream) = handle.stream() {
            stream.set_nonblocking(false)?;
        }
        Ok(handle)
    }
}

impl Async<Events> {
    /// Returns the next event, or `None` after the last.
    ///
    /// Waits until there is one. Of tasks that share the events each gets others.
    ///
    /// # Errors
    /// `Io` when the runtime shuts down.
    pub async fn next(&self) -> Result<Option<Event>> {
        let attempt = |events: &Events| {
            // `Some(None)` is the end.
            Ok(events.try_next().map(Some).or_else(|| events.is_over().then_some(None)))
        };
        when_readable(&self.0, attempt).await
    }
}

impl Async<VsockListener> {
    /// Waits for the next connection, which tasks use by an [`Async`] of its own.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended. `Io` when the runtime shuts down.
    pub async fn accept(&self) -> Result<VsockStream> {
        when_readable(&self.0, VsockListener::try_accept).await
    }
}
