//! aarch64: no platform yet. The names are there, and what would make something of them is `Unsupported`.
//!
//! Types without values stand for what cannot be made. A platform needs a memory layout, a device tree, an interrupt
//! controller (GICv3), the registers with which a vCPU enters the kernel, and PSCI.

pub(crate) mod layout;
mod profile;

use std::convert::Infallible;
use std::fmt;
use std::io;
use std::marker::PhantomData;

pub use profile::CpuProfile;

use crate::error::Result;
pub(crate) use crate::kvm::unsupported;
use crate::kvm::{ArchExit, Irqfd, Kvm, VcpuFd, VmFd};
use crate::legacy::{EventSender, GuestEnd, Keys};
use crate::memory::{GuestAddress, GuestMemory};

/// The names of this module that embedders see.
pub mod embedder {
    pub use super::CpuProfile;
}

/// As many as an interrupt controller of KVM's takes, and no more than fit here.
pub(crate) const MAX_VCPUS: u8 = u8::MAX;

/// By what a kernel learns of the machine: a device tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FirmwareTables {}

impl FirmwareTables {
    pub(crate) fn generation(self) -> Option<GuestAddress> {
        match self {}
    }
}

/// Writes what a kernel reads about the machine.
pub(crate) fn write_tables(
    _: &GuestMemory,
    tables: FirmwareTables,
    _: u8,
    _: &[super::MmioSlot],
    _: [u8; 16],
) -> Result<()> {
    match tables {}
}

/// Where and how a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryPoint {}

/// Makes the next instruction of `vcpu` the kernel's `entry`.
pub(crate) fn boot_vcpu(_: &VcpuFd, entry: EntryPoint) -> Result<()> {
    match entry {}
}

/// The processor that every vCPU of a VM is.
#[derive(Debug, Clone)]
pub(crate) enum Cpu {}

impl Cpu {
    /// # Errors
    /// `Unsupported`.
    pub(crate) fn new(_: &Kvm, _: &CpuProfile, _: u8) -> Result<Self> {
        Err(unsupported("a processor's profile"))
    }

    pub(crate) fn addresses(&self, _: u64) -> Result<()> {
        match *self {}
    }

    pub(crate) fn restrict(&self, _: &VmFd) -> Result<()> {
        match *self {}
    }

    pub(crate) fn apply(&self, _: &VcpuFd, _: u8) -> Result<()> {
        match *self {}
    }
}

/// What a machine has beside processors, memory and virtio devices.
pub(crate) struct Platform {
    pub bus: PlatformBus,
    pub keyboard: Keyboard,
    pub events: EventSender,
    pub lines: Vec<Irqfd>,
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
    pub devices: PlatformDevices,
}

/// What answers beside the bus of memory-mapped devices: nothing.
#[derive(Debug)]
pub(crate) enum PlatformBus {}

impl PlatformBus {
    pub(crate) fn view(&self) -> PlatformBusView<'_> {
        match *self {}
    }
}

/// The same, as the thread of one vCPU sees it.
pub(crate) struct PlatformBusView<'a>(Infallible, PhantomData<&'a ()>);

impl PlatformBusView<'_> {
    pub(crate) fn serve(&mut self, exit: ArchExit<'_>) -> Option<(GuestEnd, &'static str)> {
        match exit.never() {}
    }
}

/// The devices that have a state.
#[derive(Debug, Clone)]
pub(crate) enum PlatformDevices {}

/// Where the devices of a platform stand. By default, as no guest has used them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PlatformState;

#[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "no machine is saved yet"))]
impl PlatformDevices {
    pub(crate) fn save(&self) -> PlatformState {
        match *self {}
    }

    pub(crate) fn restore(&self, _: &PlatformState) -> Result<()> {
        match *self {}
    }
}

impl Platform {
    /// # Errors
    /// `Unsupported`.
    pub(crate) fn new(
        _: impl io::Write + Clone + Send + 'static,
        _: impl Fn(GuestEnd) + Clone + Send + 'static,
    ) -> Result<Self> {
        Err(unsupported("a platform"))
    }
}

/// The keyboard of one machine.
#[derive(Debug, Clone)]
pub(crate) enum Keyboard {}

impl Keyboard {
    pub(crate) fn press(&self, _: Keys) -> bool {
        match *self {}
    }
}

/// A vCPU's registers, to find out why a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Registers {}

impl Registers {
    pub(crate) fn of(_: &VcpuFd) -> Result<Self> {
        Err(unsupported("a vCPU's registers"))
    }

    pub(crate) fn are_reset(&self) -> bool {
        match *self {}
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}
