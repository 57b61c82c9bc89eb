//! [`Hang`]: what an embedder has that hangs.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use cofferdam::Net;
use cofferdam::backend::{Frame, NetBackend, Received, RxBuffer};

use super::watch::lock;
use crate::check;
use crate::fixture::{Outcome, TEST_TIMEOUT};

/// A network backend, and writers, that hang until they are let go.
#[derive(Clone, Default)]
pub struct Hang(Arc<Inner>);

#[derive(Default)]
struct Inner {
    state: Mutex<HangState>,
    changed: Condvar,
}

#[derive(Default)]
struct HangState {
    closed: bool,
    /// The loop hangs.
    reached: bool,
    far: Option<UnixStream>,
}

impl Hang {
    pub fn net(&self) -> Net {
        let it = self.clone();
        Net::custom(move |_| {
            let (near, far) = UnixStream::pair()?;
            near.set_nonblocking(true)?;
            lock(&it.0.state).far = Some(far);
            Ok(Hanging { hang: it.clone(), near })
        })
        .into()
    }

    /// Hangs while it is closed.
    fn pass(&self) {
        let mut state = lock(&self.0.state);
        state.reached = true;
        self.0.changed.notify_all();
        drop(self.0.changed.wait_while(state, |state| state.closed));
    }

    /// From now on writers hang.
    pub fn close_writers(&self) {
        lock(&self.0.state).closed = true;
    }

    /// The same, and returns when the loop hangs too.
    pub fn close(&self) -> Outcome {
        let mut state = lock(&self.0.state);
        (state.closed, state.reached) = (true, false);
        state.far.as_mut().ok_or("no backend was made")?.write_all(b"x")?;
        let (state, late) = self
            .0
            .changed
            .wait_timeout_while(state, TEST_TIMEOUT, |state| !state.reached)
            .unwrap_or_else(PoisonError::into_inner);
        check!(!late.timed_out() && state.reached, "the backend never had its turn");
        Ok(())
    }

    pub fn open(&self) {
        lock(&self.0.state).closed = false;
        self.0.changed.notify_all();
    }
}

/// Whatever fails, nothing hangs for ever.
pub struct OpenAtEnd(pub Hang);

impl Drop for OpenAtEnd {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// The backend; see [`Hang`].
struct Hanging {
    hang: Hang,
    near: UnixStream,
}

impl NetBackend for Hanging {
    fn fd(&self) -> BorrowedFd<'_> {
        self.near.as_fd()
    }

    fn poll(&mut self) {
        let _ = self.near.read(&mut [0; 16]);
        self.hang.pass();
    }

    fn send(&mut self, _: Frame<'_>) -> io::Result<()> {
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        None
    }

    fn receive(&mut self, _: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        Ok(None)
    }
}

/// A writer of the embedder's that takes nothing while it hangs.
pub struct Stuck(pub Hang);

impl Write for Stuck {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let state = lock(&self.0.0.state);
        drop(self.0.0.changed.wait_while(state, |state| state.closed));
        Ok(from.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
