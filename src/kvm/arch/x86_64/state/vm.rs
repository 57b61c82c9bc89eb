//! The state of a VM beside its vCPUs.

use super::chips::{IrqchipState, PitState};
use super::clock::{ClockGap, ClockState};
use crate::error::Result;
use crate::kvm::VmFd;
use crate::version::{Version, Versioned};

/// What a VM has beside its vCPUs and its memory.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct VmState {
    pub(crate) version: Version<Self>,
    pub(crate) clock: ClockState,
    pub(crate) irqchip: IrqchipState,
    pub(crate) pit: PitState,
}

impl Versioned for VmState {
    const NAME: &'static str = "the state of the VM";
    const VERSION: u32 = 1;
}

impl VmState {
    /// Reads the state. No vCPU runs.
    pub(crate) fn save(vm: &VmFd) -> Result<Self> {
        let clock = ClockState::read(vm)?;
        Ok(Self { version: Version::OURS, clock, irqchip: IrqchipState::save(vm)?, pit: PitState::save(vm)? })
    }

    /// Gives the state to a VM whose vCPUs have theirs already, but for their counters. The guest's clock goes on from here.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<()> {
        // Its first edge may come at once, and what it meets then is overwritten by what follows.
        self.pit.restore(vm)?;
        // After the vCPUs' MSRs, which register the pages that show the clock.
        self.clock.restore(vm)?;
        self.irqchip.restore(vm)
    }

    /// Reads the clock of a VM that was given this state, for the counters of its vCPUs.
    pub(crate) fn clock_gap(&self, vm: &VmFd) -> Result<ClockGap> {
        Ok(ClockGap { stopped: self.clock.clone(), now: ClockState::read(vm)? })
    }
}
