//! [`NetLimit`]: the rates of a card, kept by token buckets on the VM's loop.
//!
//! Frames of the guest stay in its queue until they may go, so that its own system slows down the sender. Frames for
//! the guest stay with the backend.

use crate::virtio::DeviceEvent;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::network::Offload;
use crate::rate::{Buckets, Rate};
use crate::sys::Timer;
use crate::virtio::DeviceIo;

/// The rates of a network card, for each way apart; see [`UserNet::limit`](crate::net::UserNet::limit).
///
/// A config value. Nothing is limited by default.
///
/// Bytes are those of whole Ethernet frames. A frame that stands for several (TSO) counts as that many packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct NetLimit {
    rates: [Option<Rate>; 4],
}

/// What is limited, and the method that says so.
const METHODS: [&str; 4] = ["sent_bytes", "sent_packets", "received_bytes", "received_packets"];

impl NetLimit {
    /// No limit at all.
    pub fn none() -> Self {
        Self::default()
    }

    /// Limits the bytes that the guest sends.
    pub fn sent_bytes(mut self, rate: Rate) -> Self {
        self.rates[0] = Some(rate);
        self
    }

    /// Limits the packets that the guest sends.
    pub fn sent_packets(mut self, rate: Rate) -> Self {
        self.rates[1] = Some(rate);
        self
    }

    /// Limits the bytes that the guest receives.
    pub fn received_bytes(mut self, rate: Rate) -> Self {
        self.rates[2] = Some(rate);
        self
    }

    /// Limits the packets that the guest receives.
    pub fn received_packets(mut self, rate: Rate) -> Self {
        self.rates[3] = Some(rate);
        self
    }

    /// # Errors
    /// `InvalidConfig` for nothing at all, by which a guest would wait for ever.
    pub(crate) fn check(&self) -> Result<()> {
        let mut rates = self.rates.iter().zip(METHODS);
        rates.try_for_each(|(rate, method)| rate.map_or(Ok(()), |rate| rate.check(method)))
    }
}

/// Which way frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Sent,
    Received,
}

/// What a frame costs: bytes and packets.
pub(super) fn cost(len: usize, offload: Offload) -> [u64; 2] {
    let packets = offload.gso.map_or(1, |gso| len.div_ceil(usize::from(gso.size.max(1))).max(1));
    [len as u64, packets as u64]
}

#[derive(Debug, Default)]
struct RateLimiter {
    buckets: Buckets,
    /// Since when a frame waits.
    since: Option<Duration>,
}

/// The timer rings no sooner, so that of many small frames several go at a time; what comes meanwhile is not lost.
const MIN_TIMER: Duration = Duration::from_millis(1);
/// How often waiting frames are reported, at most.
const THROTTLED_INTERVAL: Duration = Duration::from_secs(1);

/// The limits of one card, of all its pairs of queues.
pub(super) struct RateLimiters {
    sent: RateLimiter,
    received: RateLimiter,
    epoch: Instant,
    pub(super) timer: Option<Timer>,
    reported: Option<Duration>,
}

impl RateLimiters {
    pub(super) fn new() -> Self {
        Self {
            sent: RateLimiter::default(),
            received: RateLimiter::default(),
            epoch: Instant::now(),
            timer: None,
            reported: None,
        }
    }

    /// Other limits from now on. What waits is looked at anew at once.
    pub(super) fn set(&mut self, limit: &NetLimit) {
        let [sent_bytes, sent, received_bytes, received] = limit.rates;
        let now = self.epoch.elapsed();
        self.sent.buckets = Buckets::new([sent_bytes, sent], now);
        self.received.buckets = Buckets::new([received_bytes, received], now);
        self.arm(Duration::ZERO);
    }

    fn gate(&mut self, way: Direction) -> &mut RateLimiter {
        match way {
            Direction::Sent => &mut self.sent,
            Direction::Received => &mut self.received,
        }
    }

    /// Whether one more may go now. If not, the timer rings when it may, and that is reported, at most once a second.
    pub(super) fn open(&mut self, io: &DeviceIo, way: Direction) -> bool {
        let gate = self.gate(way);
        if !gate.buckets.limited() && gate.since.is_none() {
            return true;
        }
        let now = self.epoch.elapsed();
        let gate = self.gate(way);
        if gate.buckets.wait(now).is_zero() {
            if let Some(since) = gate.since.take() {
                let waited = u64::try_from(now.saturating_sub(since).as_nanos()).unwrap_or(u64::MAX);
                io.counters().throttled_nanos.fetch_add(waited, Ordering::Relaxed);
            }
            return true;
        }
        if gate.since.is_none() {
            gate.since = Some(now);
            io.counters().throttled.fetch_add(1, Ordering::Relaxed);
            if self.reported.is_none_or(|last| now >= last + THROTTLED_INTERVAL) {
                self.reported = Some(now);
                io.report(DeviceEvent::Throttled);
            }
        }
        self.rearm(now);
        false
    }

    /// A frame goes.
    pub(super) fn take(&mut self, way: Direction, cost: [u64; 2]) {
        self.gate(way).buckets.take(cost);
    }

    /// Nothing waits any more: the device stops.
    pub(super) fn forget(&mut self) {
        (self.sent.since, self.received.since) = (None, None);
    }

    /// Sets the timer to when the first of those that wait may go.
    fn rearm(&mut self, now: Duration) {
        let limiters = [&mut self.sent, &mut self.received].into_iter();
        let wait = limiters.filter(|gate| gate.since.is_some()).map(|gate| gate.buckets.wait(now)).min();
        if let Some(wait) = wait {
            self.arm(wait.max(MIN_TIMER));
        }
    }

    fn arm(&mut self, wait: Duration) {
        if let Some(timer) = &mut self.timer
            && let Err(error) = timer.set(Instant::now().checked_add(wait))
        {
            log::error!("a card's timer: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{Csum, Gso, GsoKind};

    #[test]
    fn invalid_limits_name_their_method() {
        let none = NetLimit::none;
        for (limit, method) in [
            (none().sent_bytes(Rate::per_second(0)), "sent_bytes"),
            (none().received_packets(Rate::per_second(0)), "received_packets"),
        ] {
            let error = limit.check().unwrap_err();
            assert!(error.to_string().starts_with(method), "{error}");
        }
    }

    #[test]
    fn gso_frame_is_charged_per_segment() {
        assert_eq!(cost(60, Offload::default()), [60, 1]);
        let gso = Some(Gso { kind: GsoKind::Tcp4, size: 1000, header_len: 54 });
        assert_eq!(cost(9054, Offload { csum: Some(Csum { start: 34, offset: 16 }), gso }), [9054, 10]);
    }
}
