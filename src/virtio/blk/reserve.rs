//! [`Reserve`]: what a disk leaves of the space that it shares with everything else on the host.

use std::io;

use super::backend::BlockBackend;

/// What the host's file system keeps, whatever a guest writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Reserve {
    /// All of it is the guest's.
    #[default]
    Nothing,
    /// A twentieth of the file system, but no more than [`MOST`].
    Share,
    /// So many bytes.
    Bytes(u64),
}

/// What is kept at most unless somebody asks for more.
const MOST: u64 = 1 << 30;
/// What may be taken before the space that is left is looked at again.
const LOOK_AFTER: u64 = 64 << 20;

/// How much may still be taken.
#[derive(Debug, Clone, Default)]
pub(super) struct Room {
    /// Bytes that were there when it was last looked.
    left: u64,
}

impl Room {
    /// Takes room for a write, or fails with `ENOSPC`. `in_flight` says what may be taken by writes that have not ended.
    pub(super) fn take(
        &mut self,
        reserve: Reserve,
        backend: &mut dyn BlockBackend,
        (offset, len): (u64, u64),
        in_flight: impl FnOnce() -> u64,
    ) -> io::Result<()> {
        if reserve == Reserve::Nothing {
            return Ok(());
        }
        if let Some(left) = self.left.checked_sub(len) {
            self.left = left;
            return Ok(());
        }
        let Some(space) = backend.space()? else { return Ok(()) };
        let kept = match reserve {
            Reserve::Nothing => 0,
            Reserve::Share => (space.total / 20).min(MOST),
            Reserve::Bytes(bytes) => bytes,
        };
        self.left = space.free.saturating_sub(kept).saturating_sub(in_flight()).min(LOOK_AFTER);
        if let Some(left) = self.left.checked_sub(len) {
            self.left = left;
            return Ok(());
        }
        // What has its place already may be written over at any time.
        let takes = backend.takes(offset, len)?;
        match self.left.checked_sub(takes) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
        }
    }
}
