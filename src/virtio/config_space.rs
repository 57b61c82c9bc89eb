//! [`ConfigSpace`]: the part of a device's registers that is its own (Virtio 1.3, 2.5).
//!
//! Shared by the device, on its loop, and its transport, on vCPU threads.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::RegisterPage;

/// Where the driver reads it, and how often it has changed (Virtio 1.3, 4.2.2).
const AT: usize = 0x100;
const GENERATION: usize = 0x0fc;

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
    /// Where the driver reads it.
    shown: Option<RegisterPage>,
}

impl Inner {
    fn show(&self) {
        if let Some(registers) = &self.shown {
            registers.write(AT, &self.bytes);
            registers.store(GENERATION, self.generation);
        }
    }

    /// Steps the generation before and after a change, so a reader meanwhile sees another one. A driver that sees
    /// neither reads once more when the interrupt comes that follows.
    fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(registers) = &self.shown {
            registers.store(GENERATION, self.generation);
        }
    }
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

    /// From now on it is in these registers, whatever becomes of it.
    pub(super) fn show_in(&self, registers: RegisterPage) {
        let mut inner = self.inner();
        inner.shown = Some(registers);
        inner.show();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The four bytes at `offset`; zeros beyond the end.
    pub(crate) fn word(&self, offset: usize) -> u32 {
        let (inner, mut word) = (self.inner(), [0; 4]);
        word.iter_mut().zip(inner.bytes.get(offset..).unwrap_or_default()).for_each(|(to, byte)| *to = *byte);
        u32::from_le_bytes(word)
    }

    /// The device changes what is at `offset`. The driver has to be interrupted for it to notice.
    pub(crate) fn set(&self, offset: usize, bytes: &[u8]) {
        let mut inner = self.inner();
        inner.next_generation();
        let to = inner.bytes.get_mut(offset..).unwrap_or_default();
        to.iter_mut().zip(bytes).for_each(|(to, byte)| *to = *byte);
        inner.generation = inner.generation.wrapping_add(1);
        inner.show();
    }

    /// The driver writes at `offset`; what it may not write is left as it was.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        let mut inner = self.inner();
        for (at, byte) in (offset..).zip(bytes) {
            if inner.writable.contains(&at)
                && let Some(to) = inner.bytes.get_mut(at)
            {
                *to = *byte;
            }
        }
        inner.show();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_writes_are_masked_and_change_the_generation() {
        let space = ConfigSpace::new([1, 0, 0, 0, 2, 0, 0, 0]).writable(4..8);
        let registers = RegisterPage::alone().unwrap();
        space.show_in(registers.clone());
        space.write(2, &[9; 100]);
        assert_eq!((space.word(0), space.word(4), registers.load(GENERATION)), (1, 0x0909_0909, 0));
        assert_eq!((registers.load(AT), registers.load(AT + 4), registers.load(AT + 8)), (1, 0x0909_0909, 0));
        space.set(0, &7u32.to_le_bytes());
        let one = registers.load(GENERATION);
        space.set(usize::MAX, &[1]);
        assert_eq!((space.word(0), registers.load(AT)), (7, 7));
        assert!(one != 0 && registers.load(GENERATION) != one);
        assert_eq!((space.word(6), space.word(8)), (0x0909, 0));
    }
}
