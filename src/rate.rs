//! [`Rate`]: an amount for each second, as a type. [`Buckets`]: enforces it, without a clock of its own.

use std::time::Duration;

use crate::error::{Error, Result};

/// An amount for each second, and a one-time burst; a config value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct Rate {
    per_second: u64,
    one_time_burst: u64,
}

impl Rate {
    /// Allows `n` bytes, operations or packets in each second, spread evenly.
    ///
    /// What was not used is kept for a tenth of a second. A request that is larger than what is left goes through when
    /// anything is left, and the next one waits longer.
    pub const fn per_second(n: u64) -> Self {
        Self { per_second: n, one_time_burst: 0 }
    }

    /// Allows `n` more once, used up first and never refilled: for a boot, say.
    pub const fn one_time_burst(mut self, n: u64) -> Self {
        self.one_time_burst = n;
        self
    }

    /// # Errors
    /// `InvalidConfig`, naming `method`, for a rate of zero, by which nothing would ever be done.
    pub(crate) fn check(self, method: &'static str) -> Result<()> {
        match self.per_second {
            0 => Err(Error::invalid(method, "0 per second: the guest would wait for ever")),
            _ => Ok(()),
        }
    }
}

/// Tokens are counted in billionths, so that a nanosecond's worth is a whole number.
const BILLION: i128 = 1_000_000_000;

/// Tokens that come evenly and are kept for a while. What is taken beyond them is owed.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    rate: i128,
    room: i128,
    /// In billionths; less than zero is debt.
    level: i128,
    once: u64,
    /// Up to when tokens have come, counted from wherever the caller does.
    at: Duration,
}

impl Bucket {
    /// One that is full at `now`, and keeps what comes in a tenth of a second.
    pub(crate) fn new(rate: Rate, now: Duration) -> Self {
        Self::keeping(Duration::from_millis(100), rate, now)
    }

    /// One that keeps what comes in `time`, or one token.
    pub(crate) fn keeping(time: Duration, rate: Rate, now: Duration) -> Self {
        let per_second = i128::from(rate.per_second.max(1));
        let room = (per_second * i128::from(time.subsec_nanos()) + per_second * BILLION * i128::from(time.as_secs()))
            .max(BILLION);
        Self { rate: per_second, room, level: room, once: rate.one_time_burst, at: now }
    }

    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        let came = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX).saturating_mul(self.rate);
        self.level = self.level.saturating_add(came).min(self.room);
    }

    /// How long nothing may be taken from `now` on; zero when something may.
    pub(crate) fn wait(&mut self, now: Duration) -> Duration {
        self.refill(now);
        if self.level > 0 || self.once > 0 {
            return Duration::ZERO;
        }
        let nanos = (1 - self.level).saturating_add(self.rate - 1) / self.rate;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Takes `n`, whether there is enough or not. Ask [`Bucket::wait`] first.
    pub(crate) fn take(&mut self, n: u64) {
        let once = n.min(self.once);
        self.once -= once;
        self.level -= i128::from(n - once) * BILLION;
    }

    /// Takes one, unless there is less.
    pub(crate) fn take_whole(&mut self, now: Duration) -> bool {
        self.refill(now);
        let there = self.level >= BILLION || self.once > 0;
        if there {
            self.take(1);
        }
        there
    }
}

/// The buckets of one direction: of bytes, and of operations or packets.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buckets([Option<Bucket>; 2]);

impl Buckets {
    pub(crate) fn new(rates: [Option<Rate>; 2], now: Duration) -> Self {
        Self(rates.map(|rate| rate.map(|rate| Bucket::new(rate, now))))
    }

    pub(crate) fn limited(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }

    /// How long the next must wait.
    pub(crate) fn wait(&mut self, now: Duration) -> Duration {
        self.0.iter_mut().flatten().map(|bucket| bucket.wait(now)).max().unwrap_or_default()
    }

    /// Takes so many bytes and operations, whether there are enough or not. Ask [`Buckets::wait`] first.
    pub(crate) fn take(&mut self, amounts: [u64; 2]) {
        let [bytes, operations] = &mut self.0;
        for (bucket, n) in [bytes, operations].into_iter().zip(amounts) {
            if let Some(bucket) = bucket {
                bucket.take(n);
            }
        }
    }

    /// Takes so much when it may go now; else how long it waits.
    pub(crate) fn admit(&mut self, amounts: [u64; 2], now: Duration) -> Result<(), Duration> {
        let wait = self.wait(now);
        if !wait.is_zero() {
            return Err(wait);
        }
        self.take(amounts);
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
        fn token_bucket_matches_a_naive_model(
            tenth in 1u64..5_000_000,
            once in 0u64..50,
            steps in proptest::collection::vec((0u32..3000, 0u64..2000), 1..20),
        ) {
            let rate = tenth * 10;
            let mut bucket = Bucket::new(Rate::per_second(rate).one_time_burst(once), Duration::ZERO);
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
    fn average_rate_holds_for_any_request_size() {
        for size in [1, 512, 4096, 1 << 20, 1 << 30] {
            let rate = Rate::per_second(10 << 20).one_time_burst(1 << 20);
            let mut buckets = Buckets::new([Some(rate), None], Duration::ZERO);
            let (mut now, mut moved) = (Duration::ZERO, 0u64);
            for _ in 0..1000 {
                while let Err(wait) = buckets.admit([size, 1], now) {
                    now += wait;
                }
                moved += size;
            }
            let bound = (now.as_secs_f64() + 0.1) * f64::from(10 << 20) + f64::from(1 << 20) + size as f64;
            assert!(moved as f64 <= bound, "{size}: {moved} in {now:?}");
        }
    }

    #[test]
    fn take_whole_holds_the_rate() {
        let mut bucket = Bucket::keeping(Duration::from_secs(1), Rate::per_second(10), Duration::ZERO);
        let taken =
            |bucket: &mut Bucket, millis| (0..100).filter(|_| bucket.take_whole(Duration::from_millis(millis))).count();
        assert_eq!([0, 99, 100, 650, 5000].map(|at| taken(&mut bucket, at)), [10, 0, 1, 5, 10]);
    }
}
