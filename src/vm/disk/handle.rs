//! [`DiskHandle`]: a disk of a running VM.

use crate::error::{Error, Result};
use crate::size::Size;
use crate::virtio::blk::{Blk, DiskLimit};
use crate::virtio::{DeviceHandle, DeviceId};

/// The size of a disk; see [`DiskHandle::usage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskUsage {
    /// Space that it takes on the host.
    pub allocated: Size,
    /// Size that the guest sees.
    pub capacity: Size,
}

/// A disk of a running VM; see [`Vm::disk`](crate::Vm::disk). Cheap to clone.
///
/// Calls ask the disk's loop, and wait for its answer, at most ten seconds. Where a file of the host's does not answer they
/// fail with `TimedOut`, and what was asked for is done when it does.
#[derive(Debug, Clone)]
pub struct DiskHandle {
    pub(in crate::vm) id: DeviceId,
    pub(in crate::vm) device: DeviceHandle<Blk>,
}

impl DiskHandle {
    /// Returns the name by which events, ends and counters call the disk.
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// Replaces the disk's limit from now on; [`DiskLimit::none`] for none.
    ///
    /// What waits goes on by the new limit.
    ///
    /// # Errors
    /// `InvalidConfig` for a rate of zero, `InvalidState` when the VM has ended.
    pub fn set_limit(&self, limit: DiskLimit) -> Result<()> {
        limit.check().map_err(|e| e.doing("set_limit"))?;
        self.device.with(move |disk, _| disk.set_limit(&limit)).map_err(|e| self.doing(e, "changing the limit"))
    }

    /// Makes the disk larger, and its image.
    ///
    /// The guest is notified, and sees the new size at once. The new part reads as zeroes.
    ///
    /// # Errors
    /// - `InvalidConfig` for less than it has, or not whole sectors of 512 bytes.
    /// - `PermissionDenied` for a disk that is read-only.
    /// - `ResourceExhausted` when there is no space.
    /// - `InvalidState` when the VM has ended.
    pub fn grow(&self, size: Size) -> Result<()> {
        let grown = self.device.with(move |disk, io| {
            let now = disk.usage()?.size;
            if size.as_bytes() < now || !size.as_bytes().is_multiple_of(512) {
                let now = Size::bytes(now);
                return Err(Error::invalid(
                    "grow",
                    format!("{size}: whole sectors are needed, at least the {now} there are"),
                ));
            }
            disk.grow(io, size.as_bytes()).map_err(Error::from)
        });
        grown.and_then(|outcome| outcome).map_err(|e| self.doing(e, "growing it"))
    }

    /// Returns the space that it takes on the host, and its size for the guest.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended, `Io` when the host cannot tell.
    pub fn usage(&self) -> Result<DiskUsage> {
        let usage = self.device.with(|disk, _| disk.usage().map_err(Error::from));
        let usage = usage.and_then(|outcome| outcome).map_err(|e| self.doing(e, "looking at its size"))?;
        Ok(DiskUsage { allocated: Size::bytes(usage.allocated), capacity: Size::bytes(usage.size) })
    }

    fn doing(&self, error: Error, what: &str) -> Error {
        error.doing(format!("{}: {what}", self.id))
    }
}
