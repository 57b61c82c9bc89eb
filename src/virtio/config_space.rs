//! [`ConfigSpace`]: the part of a device's registers that is its own (Virtio 1.3, 2.5).
//!
//! Shared by the device, on its loop, and its transport, on vCPU threads.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::transport::ConfigView;

/// Clones are the same space.
#[derive(Clone, Default)]
pub(crate) struct ConfigSpace(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    /// What the driver may write.
    writable: Range<usize>,
    /// Changes with the contents, so that a driver can tell a torn read (Virtio 1.3, 2.5.3).
    generation: u32,
    /// Where the driver reads it.
    view: Option<Box<dyn ConfigView>>,
}

impl fmt::Debug for ConfigSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner();
        write!(f, "ConfigSpace({} bytes, generation {})", inner.bytes.len(), inner.generation)
    }
}

impl Inner {
    fn show(&self) {
        if let Some(view) = &self.view {
            view.show(&self.bytes);
            view.show_generation(self.generation);
        }
    }

    /// Steps the generation before and after a change, so a reader meanwhile sees another one. A driver that sees
    /// neither reads once more when the interrupt comes that follows.
    fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if let Some(view) = &self.view {
            view.show_generation(self.generation);
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

    /// Shows it to the driver from now on, with every change.
    pub(super) fn show_in(&self, view: impl ConfigView + 'static) {
        let mut inner = self.inner();
        inner.view = Some(Box::new(view));
        inner.show();
    }

    /// Returns how often it has changed.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    pub(super) fn generation(&self) -> u32 {
        self.inner().generation
    }

    /// Returns the part that the driver may write.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    pub(super) fn written(&self) -> Vec<u8> {
        let inner = self.inner();
        inner.bytes.get(inner.writable.clone()).unwrap_or_default().to_vec()
    }

    /// Takes what a driver has written, and goes on counting changes from `generation`.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    pub(super) fn restore(&self, written: &[u8], generation: u32) {
        let start = self.inner().writable.start;
        self.write(start, written);
        let mut inner = self.inner();
        inner.generation = generation;
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

    /// Shows what the driver last read.
    #[derive(Clone, Default)]
    struct Shown(Arc<Mutex<(Vec<u8>, u32)>>);

    impl ConfigView for Shown {
        fn show_generation(&self, generation: u32) {
            self.0.lock().unwrap().1 = generation;
        }

        fn show(&self, bytes: &[u8]) {
            self.0.lock().unwrap().0 = bytes.to_vec();
        }
    }

    #[test]
    fn config_writes_are_masked_and_change_the_generation() {
        let space = ConfigSpace::new([1, 0, 0, 0, 2, 0, 0, 0]).writable(4..8);
        let shown = Shown::default();
        let seen = || shown.0.lock().unwrap().clone();
        space.show_in(shown.clone());
        space.write(2, &[9; 100]);
        assert_eq!((space.word(0), space.word(4)), (1, 0x0909_0909));
        assert_eq!(seen(), (vec![1, 0, 0, 0, 9, 9, 9, 9], 0));
        space.set(0, &7u32.to_le_bytes());
        let one = seen().1;
        space.set(usize::MAX, &[1]);
        assert_eq!((space.word(0), seen().0[0]), (7, 7));
        assert!(one != 0 && seen().1 != one);
        assert_eq!((space.word(6), space.word(8)), (0x0909, 0));
        assert_eq!(space.written(), [9, 9, 9, 9]);
        space.restore(&[1, 2, 3, 4, 5, 6], 5);
        assert_eq!(seen(), (vec![7, 0, 0, 0, 1, 2, 3, 4], 5));
        assert_eq!(space.generation(), 5);
    }
}
