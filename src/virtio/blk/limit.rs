//! [`DiskLimit`]: how much a disk may do in a second, kept by token buckets on the disk's loop.

use std::time::Duration;

use super::request::Direction;
use crate::error::{Error, Result};

/// A config value: so much in each second, and once so much more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    per_second: u64,
    once: u64,
}

impl Rate {
    /// `n` bytes or operations in each second, spread evenly: what was not used is kept for a tenth of a second.
    ///
    /// A request that is larger than what there is goes through when there is anything, and those after it wait longer.
    pub fn per_second(n: u64) -> Self {
        Self { per_second: n, once: 0 }
    }

    /// Gives `n` more, used up first and never again: for a boot, say.
    pub fn once(mut self, n: u64) -> Self {
        self.once = n;
        self
    }
}

/// A config value: what a disk may do, for reads and writes apart; see [`Disk::limit`](crate::Disk::limit). Nothing is
/// limited unless said.
///
/// Writes are all requests that change the disk; of those, discards and zeroes without data count as operations only.
/// Flushes are never held back. Requests of one direction wait in their order, and the guest's other devices don't notice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
        for (rate, method) in self.rates.iter().zip(METHODS) {
            if rate.is_some_and(|rate| rate.per_second == 0) {
                return Err(Error::invalid(method, "0 per second: the guest would wait for ever"));
            }
        }
        Ok(())
    }
}

/// Tokens are counted in billionths, so that a nanosecond's worth is a whole number.
const BILLION: i128 = 1_000_000_000;

/// Tokens that come evenly and are kept for a tenth of a second. What is taken beyond them is owed.
#[derive(Debug, Clone)]
pub(super) struct Bucket {
    rate: i128,
    room: i128,
    /// In billionths; less than zero is debt.
    level: i128,
    once: u64,
    /// Up to when tokens have come, counted from wherever the caller does.
    at: Duration,
}

impl Bucket {
    /// One that is full at `now`.
    pub(super) fn new(rate: Rate, now: Duration) -> Self {
        let per_second = i128::from(rate.per_second.max(1));
        let room = (per_second * BILLION / 10).max(BILLION);
        Self { rate: per_second, room, level: room, once: rate.once, at: now }
    }

    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let came = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX).saturating_mul(self.rate);
        self.level = self.level.saturating_add(came).min(self.room);
    }

    /// How long nothing may be taken from `now` on; zero when something may.
    pub(super) fn wait(&mut self, now: Duration) -> Duration {
        self.refill(now);
        if self.level > 0 || self.once > 0 {
            return Duration::ZERO;
        }
        let nanos = (1 - self.level).saturating_add(self.rate - 1) / self.rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `n`, whether there is enough or not. Ask [`Bucket::wait`] first.
    pub(super) fn take(&mut self, n: u64) {
        let once = n.min(self.once);
        self.once -= once;
        self.level -= i128::from(n - once) * BILLION;
    }
}

/// The buckets of one disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Buckets {
    /// Bytes and operations of reads, then of writes.
    buckets: [Option<Bucket>; 4],
}

impl Buckets {
    pub(super) fn new(limit: &DiskLimit, now: Duration) -> Self {
        Self { buckets: limit.rates.map(|rate| rate.map(|rate| Bucket::new(rate, now))) }
    }

    fn of(&mut self, direction: Direction) -> &mut [Option<Bucket>] {
        let (reads, writes) = self.buckets.split_at_mut(2);
        match direction {
            Direction::Read => reads,
            Direction::Write => writes,
        }
    }

    pub(super) fn limited(&mut self, direction: Direction) -> bool {
        self.of(direction).iter().any(Option::is_some)
    }

    /// How long the next request must wait.
    pub(super) fn wait(&mut self, direction: Direction, now: Duration) -> Duration {
        self.of(direction).iter_mut().flatten().map(|bucket| bucket.wait(now)).max().unwrap_or_default()
    }

    /// Takes what one request of `bytes` costs when it may go now; else how long it waits.
    pub(super) fn admit(&mut self, direction: Direction, bytes: u64, now: Duration) -> Result<(), Duration> {
        let wait = self.wait(direction, now);
        if !wait.is_zero() {
            return Err(wait);
        }
        self.of(direction).iter_mut().zip([bytes, 1]).for_each(|(bucket, n)| {
            if let Some(bucket) = bucket {
                bucket.take(n);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A bucket that is filled nanosecond by nanosecond, a token at a time.
    struct Naive {
        rate: u64,
        room: i64,
        level: i64,
        part: u64,
        once: u64,
    }

    impl Naive {
        fn tick(&mut self) {
            self.part += self.rate;
            while self.part >= 1_000_000_000 {
                self.part -= 1_000_000_000;
                self.level += 1;
            }
            if self.level >= self.room {
                (self.level, self.part) = (self.room, 0);
            }
        }

        fn open(&self) -> bool {
            self.level > 0 || self.level == 0 && self.part > 0 || self.once > 0
        }

        fn take(&mut self, n: u64) {
            let once = n.min(self.once);
            self.once -= once;
            self.level -= (n - once) as i64;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_bucket_does_what_a_naive_one_does(
            tenth in 1u64..5_000_000,
            once in 0u64..50,
            steps in proptest::collection::vec((0u32..3000, 0u64..2000), 1..20),
        ) {
            let rate = tenth * 10;
            let mut bucket = Bucket::new(Rate::per_second(rate).once(once), Duration::ZERO);
            let mut naive = Naive { rate, room: tenth as i64, level: tenth as i64, part: 0, once };
            let mut now = 0;
            for (pause, n) in steps {
                (0..pause).for_each(|_| naive.tick());
                now += u64::from(pause);
                let wait = bucket.wait(Duration::from_nanos(now));
                prop_assert_eq!(wait.is_zero(), naive.open(), "{} {:?}", now, &bucket);
                if wait.is_zero() {
                    bucket.take(n);
                    naive.take(n);
                } else if wait < Duration::from_micros(100) {
                    // Not a nanosecond earlier, and not one later.
                    for _ in 0..wait.as_nanos() as u64 {
                        prop_assert!(!naive.open());
                        naive.tick();
                        now += 1;
                    }
                    prop_assert!(naive.open());
                }
            }
        }
    }

    #[test]
    fn the_average_holds_whatever_the_size_of_requests() {
        for size in [1, 512, 4096, 1 << 20, 1 << 30] {
            let mut buckets =
                Buckets::new(&DiskLimit::none().write_bytes(Rate::per_second(10 << 20).once(1 << 20)), Duration::ZERO);
            let (mut now, mut moved) = (Duration::ZERO, 0u64);
            for _ in 0..1000 {
                while let Err(wait) = buckets.admit(Direction::Write, size, now) {
                    now += wait;
                }
                moved += size;
            }
            let bound = (now.as_secs_f64() + 0.1) * f64::from(10 << 20) + f64::from(1 << 20) + size as f64;
            assert!(moved as f64 <= bound, "{size}: {moved} in {now:?}");
            assert_eq!(buckets.admit(Direction::Read, u64::MAX, now), Ok(()));
        }
    }

    #[test]
    fn nothing_at_all_is_no_limit() {
        let error = DiskLimit::none().read_operations(Rate::per_second(0)).check().unwrap_err();
        assert!(error.to_string().contains("read_operations"), "{error}");
        assert!(DiskLimit::none().read_bytes(Rate::per_second(1)).check().is_ok());
    }
}
