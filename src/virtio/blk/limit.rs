//! [`DiskLimit`]: the rates of a disk, kept by token buckets on its loop.

use std::time::Duration;

use super::request::IoDirection;
use crate::error::Result;
use crate::rate::{self, Rate};

/// The rates of a disk, for reads and writes apart; see [`FileDisk::limit`](crate::disk::FileDisk::limit).
///
/// A config value. Nothing is limited by default.
///
/// Writes are all requests that change the disk; of those, discards and zeroes without data count as operations only.
/// Flushes are never held back. Requests of one direction wait in their order, and the guest's other devices don't
/// notice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct DiskLimit {
    rates: [Option<Rate>; 4],
}

/// What is limited, and the method that says so.
const METHODS: [&str; 4] = ["read_bytes", "read_operations", "write_bytes", "write_operations"];

impl DiskLimit {
    /// No limit at all.
    pub fn none() -> Self {
        Self::default()
    }

    /// Limits the bytes that are read.
    pub fn read_bytes(mut self, rate: Rate) -> Self {
        self.rates[0] = Some(rate);
        self
    }

    /// Limits the number of reads.
    pub fn read_operations(mut self, rate: Rate) -> Self {
        self.rates[1] = Some(rate);
        self
    }

    /// Limits the bytes that are written.
    pub fn write_bytes(mut self, rate: Rate) -> Self {
        self.rates[2] = Some(rate);
        self
    }

    /// Limits the number of writes.
    pub fn write_operations(mut self, rate: Rate) -> Self {
        self.rates[3] = Some(rate);
        self
    }

    /// # Errors
    /// `InvalidConfig` for a rate of zero, by which nothing would ever be done.
    pub(crate) fn check(&self) -> Result<()> {
        self.rates.iter().zip(METHODS).try_for_each(|(rate, method)| rate.map_or(Ok(()), |rate| rate.check(method)))
    }
}

/// The buckets of one disk.
#[derive(Debug, Clone, Default)]
pub(super) struct DiskBuckets {
    reads: rate::Buckets,
    writes: rate::Buckets,
}

impl DiskBuckets {
    pub(super) fn new(limit: &DiskLimit, now: Duration) -> Self {
        let [read_bytes, reads, write_bytes, writes] = limit.rates;
        let reads = rate::Buckets::new([read_bytes, reads], now);
        Self { reads, writes: rate::Buckets::new([write_bytes, writes], now) }
    }

    fn of(&mut self, direction: IoDirection) -> &mut rate::Buckets {
        match direction {
            IoDirection::Read => &mut self.reads,
            IoDirection::Write => &mut self.writes,
        }
    }

    pub(super) fn limited(&mut self, direction: IoDirection) -> bool {
        self.of(direction).limited()
    }

    /// How long the next request must wait.
    pub(super) fn wait(&mut self, direction: IoDirection, now: Duration) -> Duration {
        self.of(direction).wait(now)
    }

    /// Takes what one request of `bytes` costs when it may go now; else how long it waits.
    pub(super) fn admit(&mut self, direction: IoDirection, bytes: u64, now: Duration) -> Result<(), Duration> {
        self.of(direction).admit([bytes, 1], now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_and_write_limits_are_independent() {
        let limit = DiskLimit::none().write_bytes(Rate::per_second(1000)).read_operations(Rate::per_second(10));
        let (mut buckets, now) = (DiskBuckets::new(&limit, Duration::ZERO), Duration::ZERO);
        assert_eq!(buckets.admit(IoDirection::Write, 5000, now), Ok(()));
        assert_eq!(buckets.admit(IoDirection::Write, 1, now), Err(Duration::from_nanos(4_900_000_001)));
        assert_eq!(buckets.admit(IoDirection::Read, u64::MAX, now), Ok(()));
        assert!(buckets.admit(IoDirection::Read, 1, now).is_err());
    }

    #[test]
    fn empty_limit_does_not_limit() {
        let error = DiskLimit::none().read_operations(Rate::per_second(0)).check().unwrap_err();
        assert!(error.to_string().contains("read_operations"), "{error}");
        assert!(DiskLimit::none().read_bytes(Rate::per_second(1)).check().is_ok());
    }
}
