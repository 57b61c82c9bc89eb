//! kvmclock, with which the guest's time stamp counters have to agree.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};

use crate::error::{Context, Result};
use crate::kvm::{VmFd, failed};

/// What the guest's clock said, and when that was (KVM API, 4.29).
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct ClockState {
    /// In nanoseconds since the guest's start.
    pub(crate) clock: u64,
    /// The host's real time at that moment, in nanoseconds, where KVM tells it.
    pub(crate) realtime: Option<u64>,
    /// The host's time stamp counter at that moment.
    pub(crate) host_tsc: u64,
}

/// What a guest's clock said when it stopped, and what that of the VM in its place says, where it goes on from there.
#[derive(Debug, Clone)]
pub(crate) struct ClockGap {
    pub(super) stopped: ClockState,
    pub(super) now: ClockState,
}

/// How often the clock is read where KVM does not tell the counter with it. The quickest reading says most.
const READINGS: usize = 8;

impl ClockState {
    /// Reads the clock.
    pub(super) fn read(vm: &VmFd) -> Result<Self> {
        let mut best: Option<(u64, Self)> = None;
        for _ in 0..READINGS {
            let before = host_tsc();
            let raw = vm.fd.get_clock().map_err(failed).doing(|| "reading the guest's clock")?;
            let took = host_tsc().wrapping_sub(before);
            let told = |flag: u32, value: u64| (raw.flags & flag != 0).then_some(value);
            let exact = told(KVM_CLOCK_HOST_TSC, raw.host_tsc);
            let state = Self {
                clock: raw.clock,
                realtime: told(KVM_CLOCK_REALTIME, raw.realtime),
                host_tsc: exact.unwrap_or_else(|| before.wrapping_add(took / 2)),
            };
            if exact.is_some() {
                return Ok(state);
            }
            if best.as_ref().is_none_or(|(least, _)| took < *least) {
                best = Some((took, state));
            }
        }
        best.map(|(_, state)| state).ok_or_else(|| std::io::Error::from(std::io::ErrorKind::Other).into())
    }

    /// Lets the clock go on from what it said.
    pub(super) fn restore(&self, vm: &VmFd) -> Result<()> {
        // Without flags: with the host's real time it would jump, and fire all timers.
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        vm.fd.set_clock(&clock).map_err(failed).doing(|| "setting the guest's clock")
    }
}

impl ClockGap {
    /// Returns what makes counters go on with the clock, where it is added to all their offsets.
    ///
    /// It is the same for all vCPUs, so that they differ by what they differed by. The counters go at the host's pace.
    pub(super) fn tsc_shift(&self, tsc_khz: u32) -> u64 {
        let Self { stopped, now } = self;
        let ran = u128::from(now.clock.saturating_sub(stopped.clock)) * u128::from(tsc_khz) / 1_000_000;
        stopped.host_tsc.wrapping_sub(now.host_tsc).wrapping_add(ran as u64)
    }
}

/// The host's time stamp counter now.
fn host_tsc() -> u64 {
    // SAFETY: every x86_64 processor has the instruction; it reads a counter and changes nothing.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counter_stands_still_as_long_as_the_clock() {
        let at = |clock, host_tsc| ClockState { clock, realtime: None, host_tsc };
        // The host's counter went on by 5,000, the clock by 1 us: at 2 GHz that is 2,000 of it.
        let (stopped, now) = (at(7_000, 1_000), at(8_000, 6_000));
        let guest = |offset: u64, host: u64| host.wrapping_add(offset);
        let shift = ClockGap { stopped, now }.tsc_shift(2_000_000);
        for offset in [0, 17, u64::MAX - 500] {
            let (then, later) = (guest(offset, 1_000), guest(offset.wrapping_add(shift), 6_000));
            assert_eq!(later.wrapping_sub(then), 2_000);
        }
    }
}
