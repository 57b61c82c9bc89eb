//! A virtqueue: [`QueueConfig`] is registers being written, [`Queue`] is live.
//!
//! Virtio 1.3, 2.7 (split virtqueues). The transport owns the registers; the loop owns the live queue.

use std::collections::VecDeque;

use super::chain::{Chain, ChainError};
use super::ring::Ring;
use crate::memory::GuestMemory;

/// Chains that are kept for later, at most.
const MAX_SPARE_CHAINS: usize = 256;

/// What the driver wrote about one queue. Plain data, not trusted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct QueueConfig {
    pub size: u16,
    pub ready: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// How far a device has come in one queue. Plain data, not trusted when it is loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct QueuePositions {
    /// The next element of the available ring to be looked at.
    pub next_available: u16,
    /// The next element of the used ring to be written.
    pub next_used: u16,
    /// Heads of chains that the device has taken and not given back. It takes them again first.
    pub in_flight: Vec<u16>,
    /// The driver has made a mistake. Nothing is taken from or given to it any more.
    pub broken: bool,
}

/// Why a queue cannot be used, now or any more. The guest's mistake; the device must be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueError {
    #[error("queue size {size} is not a power of two up to {max}")]
    Size { size: u16, max: u16 },
    #[error("queue addresses are misaligned or outside guest memory")]
    Addresses,
    #[error("the positions in the queue make no sense")]
    Positions,
    #[error("the available ring's index makes no sense")]
    AvailableRing,
    #[error("the used ring cannot be written")]
    UsedRing,
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// A queue that a running device serves.
#[derive(Debug)]
pub(crate) struct Queue {
    /// `None` for one that the driver left out: nothing ever comes, which is no mistake.
    ring: Option<Ring>,
    memory: GuestMemory,
    /// Set for good by the first mistake: nothing is taken from or given to the driver any more.
    broken: Option<QueueError>,
    /// The driver was asked not to kick.
    quiet: bool,
    /// Chains that were given back, to be filled again.
    spare: Vec<Chain>,
    /// Heads of chains to be taken before those in the available ring.
    returned: VecDeque<u16>,
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
        let ring = Ring::new(config, event_idx, memory).map_err(|_| QueueError::Addresses)?;
        Ok(Self { ring: Some(ring), ..Self::unused(memory) })
    }

    /// Stands for a queue that the driver left out.
    pub(crate) fn unused(memory: &GuestMemory) -> Self {
        Self {
            ring: None,
            memory: memory.clone(),
            broken: None,
            quiet: false,
            spare: Vec::new(),
            returned: VecDeque::new(),
        }
    }

    /// Goes on where a device has stopped.
    ///
    /// # Errors
    /// When no device can have stopped there.
    pub(crate) fn at(mut self, positions: QueuePositions) -> Result<Self, QueueError> {
        let QueuePositions { next_available, next_used, in_flight, broken } = positions;
        let Some(ring) = &mut self.ring else { return Ok(self) };
        if broken {
            self.broken.get_or_insert(QueueError::Positions);
            return Ok(self);
        }
        let taken = usize::from(next_available.wrapping_sub(next_used));
        let heads = in_flight.iter().all(|head| *head < ring.size());
        if taken > usize::from(ring.size()) || taken != in_flight.len() || !heads {
            return Err(QueueError::Positions);
        }
        ring.set_positions(next_available, next_used);
        self.returned = in_flight.into();
        Ok(self)
    }

    /// Returns whether the next chain was taken before.
    #[inline]
    pub(crate) fn has_returned(&self) -> bool {
        !self.returned.is_empty()
    }

    /// Returns how far the device has come. What it has not given back counts as lost, unless it was put back.
    pub(crate) fn positions(&self) -> QueuePositions {
        let Some(ring) = &self.ring else { return QueuePositions::default() };
        let (next_available, next_used) = ring.positions();
        let in_flight = self.returned.iter().copied().collect();
        QueuePositions { next_available, next_used, in_flight, broken: self.broken.is_some() }
    }

    /// Goes on where it has stopped, as one does that is loaded.
    ///
    /// # Errors
    /// When the device has neither given back nor put back what it took.
    pub(crate) fn restarted(mut self) -> Result<Self, QueueError> {
        self.quiet = false;
        let positions = self.positions();
        self.at(positions)
    }

    /// Takes a chain back that the device has not begun, or will do all over again.
    pub(crate) fn put_back(&mut self, chain: Chain) {
        self.returned.push_back(chain.head());
        self.keep(chain);
    }

    fn keep(&mut self, chain: Chain) {
        if self.spare.len() < MAX_SPARE_CHAINS {
            self.spare.extend(chain.recycle());
        }
    }

    /// Does something with the ring unless it is broken, which a mistake makes it.
    #[inline]
    fn with<R>(&mut self, f: impl FnOnce(&mut Ring) -> Result<R, QueueError>) -> Option<R> {
        if self.broken.is_some() {
            return None;
        }
        f(self.ring.as_mut()?).map_err(|error| self.broken = Some(error)).ok()
    }

    /// The next request, or `None` when there is none or the driver broke the queue.
    pub(crate) fn pop(&mut self) -> Option<Chain> {
        let head = match self.returned.pop_front() {
            Some(head) if self.broken.is_none() => head,
            Some(_) => return None,
            None => self.with(Ring::pop)??,
        };
        let mut chain = self.spare.pop().unwrap_or_else(|| Chain::new(&self.memory));
        match chain.fill(head, self.ring.as_ref()?.chain(head)) {
            Ok(()) => Some(chain),
            Err(error) => {
                self.broken = Some(error.into());
                None
            }
        }
    }

    /// Gives a chain back to the driver.
    pub(crate) fn complete(&mut self, chain: Chain) {
        self.with(|ring| ring.push(chain.head(), chain.written()));
        self.keep(chain);
    }

    /// Asks for kicks again. True when something came in between, which must be looked at.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        self.quiet = false;
        self.with(|ring| ring.enable_kicks()).unwrap_or(false) || !self.returned.is_empty()
    }

    /// No kicks needed: the queue is being looked at.
    pub(crate) fn disable_kicks(&mut self) {
        if !std::mem::replace(&mut self.quiet, true) {
            self.with(|ring| ring.disable_kicks());
        }
    }

    /// Whether the driver wants an interrupt for what was completed since it was asked last.
    pub(crate) fn wants_interrupt(&mut self) -> bool {
        self.with(|ring| Ok(ring.wants_interrupt())).unwrap_or(false)
    }

    /// The mistake that broke the queue.
    #[inline]
    pub(crate) fn broken(&self) -> Option<QueueError> {
        self.broken
    }
}
