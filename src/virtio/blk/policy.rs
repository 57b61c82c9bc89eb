//! What a disk does when the host fails a request: an [`ErrorAction`] for each [`ErrorClass`].

use std::fmt;
use std::io;
use std::time::Duration;

use crate::rate::{Bucket, Rate};
use crate::virtio::DeviceId;

/// Kinds of failures of the host's that a disk tells apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorClass {
    /// Something could not be read.
    Read,
    /// Something could not be written, discarded or brought to stable storage.
    Write,
    /// There was no room for what was written: `ENOSPC` or `EDQUOT`.
    NoSpace,
}

/// What a disk does when the host fails; see [`FileDisk::on_error`](crate::disk::FileDisk::on_error).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum ErrorAction {
    /// The guest sees an I/O error.
    Report,
    /// The guest's processors stand still until [`Vm::resume`](crate::Vm::resume), which tries again.
    ///
    /// A sync that failed cannot be tried again; for it this is [`ErrorAction::Report`].
    Pause,
    /// The VM ends with [`Exit::DiskFault`](crate::Exit::DiskFault).
    Stop,
}

/// What a guest wants of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DiskOperation {
    /// Data from the disk.
    Read,
    /// Data to the disk.
    Write,
    /// What was written shall be on stable storage.
    Flush,
    /// Data that is needed no more.
    Discard,
    /// Zeroes to the disk.
    WriteZeroes,
}

impl fmt::Display for DiskOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "reading",
            Self::Write => "writing",
            Self::Flush => "flushing",
            Self::Discard => "discarding",
            Self::WriteZeroes => "writing zeroes",
        })
    }
}

/// A request that the host could not do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskError {
    /// Which disk.
    pub disk: DeviceId,
    /// What the guest wanted.
    pub operation: DiskOperation,
    /// Where it begins, in units of 512 bytes; 0 for a flush.
    pub sector: u64,
    /// How many bytes it is about; 0 for a flush.
    pub bytes: u64,
    /// The host's error number, where there is one.
    pub errno: Option<i32>,
    /// The error in words.
    pub error: String,
    /// What is done about it.
    pub action: ErrorAction,
    /// How many other faults of this disk were suppressed since the one before. They came too fast.
    pub suppressed: u64,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { disk, operation, sector, bytes, error, .. } = self;
        match operation {
            DiskOperation::Flush => write!(f, "{disk}: {operation}: {error}")?,
            _ => write!(f, "{disk}: {operation} {bytes} bytes at sector {sector}: {error}")?,
        }
        f.write_str(match self.action {
            ErrorAction::Report => "; the guest gets the error",
            ErrorAction::Pause => "; the guest waits",
            ErrorAction::Stop => "; the machine ends",
        })?;
        if self.suppressed > 0 {
            write!(f, "; {} more before", self.suppressed)?;
        }
        Ok(())
    }
}

/// Which action each class has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct ErrorPolicy {
    read: ErrorAction,
    write: ErrorAction,
    no_space: ErrorAction,
}

impl Default for ErrorPolicy {
    /// Errors of the medium are the guest's to handle, as on a real disk. For a lack of room it can do nothing. A guest
    /// that gets such an error makes its file system read-only for good.
    fn default() -> Self {
        Self { read: ErrorAction::Report, write: ErrorAction::Report, no_space: ErrorAction::Pause }
    }
}

impl ErrorPolicy {
    pub(crate) fn set(&mut self, class: ErrorClass, action: ErrorAction) {
        match class {
            ErrorClass::Read => self.read = action,
            ErrorClass::Write => self.write = action,
            ErrorClass::NoSpace => self.no_space = action,
        }
    }

    /// What to do about `error`; `again` tells whether the same may be tried again.
    pub(super) fn action(&self, operation: DiskOperation, error: &io::Error, again: bool) -> ErrorAction {
        let class = match (operation, error.raw_os_error()) {
            (DiskOperation::Read, _) => ErrorClass::Read,
            (_, Some(libc::ENOSPC | libc::EDQUOT)) => ErrorClass::NoSpace,
            _ => ErrorClass::Write,
        };
        let action = match class {
            ErrorClass::Read => self.read,
            ErrorClass::Write => self.write,
            ErrorClass::NoSpace => self.no_space,
        };
        match action {
            ErrorAction::Pause if !again => ErrorAction::Report,
            action => action,
        }
    }
}

/// Limits the reports of a disk's faults, so that a flood costs nothing.
#[derive(Debug)]
pub(super) struct FaultThrottle {
    bucket: Bucket,
    suppressed: u64,
}

impl FaultThrottle {
    /// Ten a second, and 50 more in a disk's life.
    pub(super) fn new() -> Self {
        Self { bucket: Bucket::new(Rate::per_second(10).one_time_burst(50), Duration::ZERO), suppressed: 0 }
    }

    /// Returns whether a fault at `now` is reported, and how many were not before it. One that `must` be always is.
    pub(super) fn admit(&mut self, must: bool, now: Duration) -> Option<u64> {
        if !must && !self.bucket.wait(now).is_zero() {
            self.suppressed += 1;
            return None;
        }
        if !must {
            self.bucket.take(1);
        }
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_their_own_actions() {
        let mut policy = ErrorPolicy::default();
        let [eio, enospc, edquot] = [libc::EIO, libc::ENOSPC, libc::EDQUOT].map(io::Error::from_raw_os_error);
        assert_eq!(policy.action(DiskOperation::Read, &eio, true), ErrorAction::Report);
        assert_eq!(policy.action(DiskOperation::WriteZeroes, &enospc, true), ErrorAction::Pause);
        assert_eq!(policy.action(DiskOperation::Flush, &edquot, false), ErrorAction::Report);
        policy.set(ErrorClass::Write, ErrorAction::Stop);
        assert_eq!(policy.action(DiskOperation::Flush, &eio, false), ErrorAction::Stop);
        assert_eq!(policy.action(DiskOperation::Read, &enospc, true), ErrorAction::Report);
    }

    #[test]
    fn repeated_errors_are_counted_and_suppressed() {
        let mut throttle = FaultThrottle::new();
        let reported = (0..100_000).filter(|_| throttle.admit(false, Duration::from_millis(1)).is_some()).count();
        assert!((50..60).contains(&reported), "{reported}");
        assert_eq!(throttle.admit(true, Duration::from_millis(1)), Some(100_000 - reported as u64));
        assert_eq!(throttle.admit(false, Duration::from_secs(1)), Some(0));
    }
}
