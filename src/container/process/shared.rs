//! [`ProcessShared`]: what the handle of a process and the agent's thread share.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ExitStatus;
use crate::container::control::KILL_MARGIN;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{EventFd, borrow, eventfd, left};
use crate::virtio::vsock::{StreamBreaker, VsockStream};

/// How long the guest may take to hand over the output of an ended process.
pub(in crate::container) const OUTPUT_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether a process still runs; written once by the agent's thread.
pub(in crate::container) struct ProcessShared {
    status: Mutex<Option<Ended>>,
    changed: Condvar,
    /// How many of its processes the guest's kernel has killed for want of memory, as the guest says.
    oom_kills: AtomicU32,
    /// Readable once it has ended.
    ended: EventFd,
    /// Its standard streams, for the host to end them; `None` once it has.
    streams: Mutex<Option<Vec<StreamBreaker>>>,
    /// Those of them that end with the process, whatever the guest does.
    ending: Mutex<Vec<StreamBreaker>>,
}

#[derive(Clone)]
enum Ended {
    With(ExitStatus),
    /// The container was dropped, and how it ended is not known any more.
    Unknown,
}

impl ProcessShared {
    pub(in crate::container) fn new() -> Result<Arc<Self>> {
        let ended = eventfd().doing(|| "creating a process's descriptor")?;
        Ok(Arc::new(Self {
            status: Mutex::new(None),
            changed: Condvar::new(),
            oom_kills: AtomicU32::new(0),
            ended,
            streams: Mutex::new(Some(Vec::new())),
            ending: Mutex::default(),
        }))
    }

    fn status(&self) -> MutexGuard<'_, Option<Ended>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, ended: Ended) {
        self.status().get_or_insert(ended);
        self.ending().drain(..).for_each(|stream| stream.break_off());
        self.changed.notify_all();
        // A full counter is readable, which is all that is wanted.
        let _ = self.ended.write(1);
    }

    pub(in crate::container) fn finish(&self, status: ExitStatus) {
        self.set(Ended::With(status));
    }

    pub(in crate::container) fn abandon(&self) {
        self.set(Ended::Unknown);
    }

    /// Takes what the guest says. False when that is nothing new.
    pub(in crate::container) fn oom_killed(&self, count: u32) -> bool {
        self.oom_kills.fetch_max(count, Ordering::Relaxed) < count
    }

    pub(in crate::container) fn oom_kills(&self) -> u32 {
        self.oom_kills.load(Ordering::Relaxed)
    }

    /// Whether it has ended, however.
    pub(in crate::container) fn has_ended(&self) -> bool {
        self.status().is_some()
    }

    /// Returns how long its output may go on, once it has ended.
    pub(in crate::container) fn output_timeout(&self) -> Option<Duration> {
        self.status().as_ref().map(|ended| match ended {
            Ended::With(ExitStatus::TimedOut | ExitStatus::Signaled { signal: libc::SIGKILL }) => KILL_MARGIN,
            _ => OUTPUT_TIMEOUT,
        })
    }

    pub(super) fn has_timed_out(&self) -> bool {
        matches!(&*self.status(), Some(Ended::With(ExitStatus::TimedOut)))
    }

    /// Readable once it has ended.
    pub(in crate::container) fn ended(&self) -> BorrowedFd<'_> {
        borrow(&self.ended)
    }

    fn ending(&self) -> MutexGuard<'_, Vec<StreamBreaker>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends this stream together with the process, so that no thread waits for a guest that does not read.
    pub(in crate::container) fn ends(&self, stream: &VsockStream) {
        self.ending().push(stream.breaker());
        // One that has ended already ends it now.
        if self.has_ended() {
            self.ending().drain(..).for_each(|stream| stream.break_off());
        }
    }

    fn streams(&self) -> MutexGuard<'_, Option<Vec<StreamBreaker>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has this stream, which ends with it when the host ends it.
    pub(in crate::container) fn keep(&self, stream: &VsockStream) {
        match self.streams().as_mut() {
            Some(streams) => streams.push(stream.breaker()),
            None => stream.breaker().break_off(),
        }
    }

    /// Ends its streams: what has arrived can still be read.
    pub(in crate::container) fn break_streams(&self) {
        self.streams().take().iter().flatten().for_each(StreamBreaker::break_off);
    }

    /// Waits for the end, but not beyond `deadline`.
    pub(in crate::container) fn wait(&self, deadline: Option<Instant>) -> Result<Option<ExitStatus>> {
        let mut status = self.status();
        loop {
            match &*status {
                Some(Ended::With(status)) => return Ok(Some(status.clone())),
                Some(Ended::Unknown) => {
                    return Err(Error::new(ErrorKind::InvalidState, "the container was dropped"));
                }
                None => {}
            }
            status = match deadline.map(left) {
                None => self.changed.wait(status).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => return Ok(None),
                Some(left) => self.changed.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}
