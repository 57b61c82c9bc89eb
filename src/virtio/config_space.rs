//! [`ConfigSpace`]: the part of a device's registers that is its own (Virtio 1.3, 2.5).
//!
//! Shared by the device, on its loop, and its transport, on vCPU threads.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Clones are the same space.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConfigSpace(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    bytes: Vec<u8>,
    /// What the driver may write.
    writable: Range<usize>,
    /// Changes with the contents, so that a driver can tell a torn read (Virtio 1.3, 4.2.2, ConfigGeneration).
    generation: u32,
}

impl ConfigSpace {
    /// A space with these contents, of which the driver may write nothing.
    pub(crate) fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Arc::new(Mutex::new(Inner { bytes: bytes.into(), ..Inner::default() })))
    }

    /// The driver may write this part.
    pub(crate) fn writable(self, range: Range<usize>) -> Self {
        self.inner().writable = range;
        self
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The four bytes at `offset`; zeros beyond the end.
    pub(crate) fn word(&self, offset: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The device changes what is at `offset`. The driver has to be interrupted for it to notice.
    pub(crate) fn set(&self, offset: usize, bytes: &[u8]) {
        let mut inner = self.inner();
        inner.generation = inner.generation.wrapping_add(1);
        let to = inner.bytes.get_mut(offset..).unwrap_or_default();
        to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
    }

    /// What the driver sees at `offset`; what lies beyond the end stays as it is.
    pub(super) fn read(&self, offset: usize, to: &mut [u8]) {
        let inner = self.inner();
        to.iter_mut().zip(inner.bytes.get(offset..).unwrap_or_default()).for_each(|(to, byte)| *to = *byte);
    }

    /// The driver writes at `offset`; what it may not write is left as it was.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        let mut inner = self.inner();
        for (at, byte) in (offset..).zip(bytes) {
            if inner.writable.contains(&at) {
                if let Some(to) = inner.bytes.get_mut(at) {
                    *to = *byte;
                }
            }
        }
    }

    pub(super) fn generation(&self) -> u32 {
        self.inner().generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_write_what_they_may_and_see_that_something_changed() {
        let space = ConfigSpace::new([1, 0, 0, 0, 2, 0, 0, 0]).writable(4..8);
        space.write(2, &[9; 100]);
        assert_eq!((space.word(0), space.word(4), space.generation()), (1, 0x0909_0909, 0));
        space.set(0, &7u32.to_le_bytes());
        space.set(usize::MAX, &[1]);
        assert_eq!((space.word(0), space.generation()), (7, 2));
        let mut beyond = [5; 4];
        space.read(6, &mut beyond);
        assert_eq!(beyond, [9, 9, 5, 5]);
    }
}
