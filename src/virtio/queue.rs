//! A virtqueue: [`QueueConfig`] is registers being written, [`Queue`] is live. virtio-queue lives here only.
//!
//! Virtio 1.3, 2.7 (split virtqueues). The transport owns the registers; the loop owns the live queue.

use virtio_queue::{Queue as Ring, QueueOwnedT, QueueT};

use super::chain::{Chain, ChainError};
use crate::memory::GuestMemory;

/// What the driver wrote about one queue. Plain data, not trusted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct QueueConfig {
    pub size: u16,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// Why a queue cannot be used, now or any more. The guest's mistake; the device must be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("queue size {size} is not a power of two up to {max}")]
    Size { size: u16, max: u16 },
    #[error("queue addresses are misaligned or outside guest memory")]
    Addresses,
    #[error("the available ring's index makes no sense")]
    AvailableRing,
    #[error("the driver did not set it up")]
    Unused,
    #[error("the used ring cannot be written")]
    UsedRing,
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// A queue that a running device serves.
#[derive(Debug)]
pub(crate) struct Queue {
    ring: Ring,
    memory: GuestMemory,
    /// Set for good by the first mistake: nothing is taken from or given to the driver any more.
    broken: Option<QueueError>,
    /// The driver was told not to kick.
    quiet: bool,
}

impl Queue {
    /// Checks everything the driver wrote.
    pub(crate) fn new(
        config: &QueueConfig,
        max: u16,
        event_idx: bool,
        memory: &GuestMemory,
    ) -> Result<Self, QueueError> {
        let QueueConfig { size, descriptors, available, used, .. } = *config;
        if !size.is_power_of_two() || size > max {
            return Err(QueueError::Size { size, max });
        }
        // Virtio 1.3, 2.7: alignment of the descriptor table, available ring and used ring.
        if descriptors % 16 != 0 || available % 2 != 0 || used % 4 != 0 {
            return Err(QueueError::Addresses);
        }
        let mut ring = Ring::new(max).map_err(|_| QueueError::Size { size, max })?;
        ring.set_size(size);
        let split = |at: u64| (Some(at as u32), Some((at >> 32) as u32));
        let ((dl, dh), (al, ah), (ul, uh)) = (split(descriptors), split(available), split(used));
        ring.set_desc_table_address(dl, dh);
        ring.set_avail_ring_address(al, ah);
        ring.set_used_ring_address(ul, uh);
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        if !ring.is_valid(memory.inner()) {
            return Err(QueueError::Addresses);
        }
        Ok(Self { ring, memory: memory.clone(), broken: None, quiet: false })
    }

    /// Stands for a queue that the driver left out: nothing ever comes, which is nobody's mistake.
    pub(crate) fn unused(memory: &GuestMemory) -> Result<Self, QueueError> {
        let ring = Ring::new(1).map_err(|_| QueueError::Unused)?;
        Ok(Self { ring, memory: memory.clone(), broken: Some(QueueError::Unused), quiet: false })
    }

    /// The next request, or `None` when there is none or the driver broke the queue.
    pub(crate) fn pop(&mut self) -> Option<Chain> {
        if self.broken.is_some() {
            return None;
        }
        let memory = self.memory.inner();
        let found = match self.ring.iter(memory) {
            Ok(mut available) => available.next()?,
            Err(_) => {
                self.broken = Some(QueueError::AvailableRing);
                return None;
            }
        };
        let head = found.head_index();
        match Chain::collect(head, &self.memory, found) {
            Ok(chain) => Some(chain),
            Err(error) => {
                self.broken = Some(error.into());
                None
            }
        }
    }

    /// Gives a chain back to the driver.
    pub(crate) fn complete(&mut self, chain: Chain) {
        if self.broken.is_none() && self.ring.add_used(self.memory.inner(), chain.head(), chain.written()).is_err() {
            self.broken = Some(QueueError::UsedRing);
        }
    }

    /// Asks for kicks again. True when something came in between, which must be looked at.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        self.quiet = false;
        match self.ring.enable_notification(self.memory.inner()) {
            Ok(more) => more && self.broken.is_none(),
            Err(_) => {
                self.broken.get_or_insert(QueueError::UsedRing);
                false
            }
        }
    }

    /// No kicks needed: the queue is being looked at.
    pub(crate) fn disable_kicks(&mut self) {
        if !std::mem::replace(&mut self.quiet, true) && self.ring.disable_notification(self.memory.inner()).is_err() {
            self.broken.get_or_insert(QueueError::UsedRing);
        }
    }

    /// Whether the driver wants an interrupt for what was completed since it was asked last.
    pub(crate) fn wants_interrupt(&mut self) -> bool {
        self.broken.is_none() && self.ring.needs_notification(self.memory.inner()).unwrap_or(false)
    }

    /// The mistake that broke the queue.
    pub(crate) fn broken(&self) -> Option<QueueError> {
        self.broken.filter(|e| *e != QueueError::Unused)
    }
}
