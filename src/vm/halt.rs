//! Guests that have ended and cannot report it: all vCPUs halted, with interrupts disabled.
//!
//! A kernel ends there when it powers off without the means to, such as Linux without ACPI. So does `halt` on any
//! kernel. KVM reports nothing then. So each vCPU's thread checks its own vCPU every second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often each vCPU is looked at. What it costs is one exit.
pub(super) const PERIOD: Duration = Duration::from_secs(1);

/// Since when one vCPU is dead, and when it was seen so last.
#[derive(Debug, Default)]
pub(super) struct HaltRecord(Mutex<Option<(Instant, Instant)>>);

impl HaltRecord {
    /// The vCPU was looked at.
    pub(super) fn record(&self, dead: bool, now: Instant) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = dead.then(|| (seen.map_or(now, |(since, _)| since), now));
    }

    fn seen(&self) -> Option<(Instant, Instant)> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether there was a moment at which all vCPUs were halted for good.
///
/// Then none was there to wake another, and none ever will be. Only a vCPU wakes another that has halted so. A vCPU
/// that was seen so twice was halted all the time between, or was woken by one that was not.
pub(super) fn all_halted_for_good<'a>(vcpus: impl Iterator<Item = &'a HaltRecord>) -> bool {
    let (mut since, mut until) = (None::<Instant>, None::<Instant>);
    for vcpu in vcpus {
        let Some((first, last)) = vcpu.seen() else { return false };
        since = Some(since.map_or(first, |it| it.max(first)));
        until = Some(until.map_or(last, |it| it.min(last)));
    }
    // Twice each, so that a halt that is about to be left, by an exit to this program, is not taken for one.
    since.zip(until).is_some_and(|(since, until)| since < until)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halt_needs_all_vcpus_dead_at_once() {
        let vcpus = [HaltRecord::default(), HaltRecord::default()];
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let all = || all_halted_for_good(vcpus.iter());
        vcpus[0].record(true, at(0));
        vcpus[0].record(true, at(1));
        assert!(!all(), "nothing is known of the other");
        vcpus[1].record(true, at(2));
        assert!(!all(), "the first may have been woken before the other died");
        vcpus[0].record(false, at(3));
        vcpus[1].record(true, at(3));
        assert!(!all(), "and was");
        vcpus[0].record(true, at(4));
        assert!(!all());
        vcpus[1].record(true, at(5));
        vcpus[0].record(true, at(5));
        assert!(all());
    }

    #[test]
    fn halt_needs_two_observations() {
        let (vcpu, now) = (HaltRecord::default(), Instant::now());
        vcpu.record(true, now);
        assert!(!all_halted_for_good([&vcpu].into_iter()));
        vcpu.record(true, now + PERIOD);
        assert!(all_halted_for_good([&vcpu].into_iter()));
        assert!(!all_halted_for_good([].into_iter()));
    }
}
