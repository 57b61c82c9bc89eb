//! The generation of a container that is a copy of another.

use super::Container;
use crate::error::{Context, Result};
use crate::proto::SEED_SIZE;
use crate::sys::fill_random;
use crate::vm::renew_generation;

/// Gives the machine a new generation, and its kernel new random numbers by the shim.
///
/// A kernel that knows the generation by ACPI learns it that way too. When this returns, programs get other
/// numbers than those in copies of the machine. Waits ten seconds at most.
///
/// # Errors
/// `GuestFailed` when the guest's kernel does not take them, `TimedOut` when the guest does not answer. `InvalidState` when the
/// container has ended, `Unsupported` by a shim of another version.
pub fn renew_container_generation(container: &Container) -> Result<()> {
    renew_generation(container.vm())?;
    let mut seed = [0; SEED_SIZE];
    fill_random(&mut seed).doing(|| "making random numbers for a guest")?;
    container.agent().reseed(seed)
}
