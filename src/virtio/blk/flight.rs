//! [`Table`]: the requests that a disk has taken from its driver and not yet given back. Bounded.

use std::io;
use std::time::Duration;

use super::IN_FLIGHT;
use super::request::Work;
use crate::virtio::Chain;

/// A request in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub queue: usize,
    pub chain: Chain,
    pub work: Work,
    /// The bytes have arrived, and are being brought to stable storage.
    pub syncing: bool,
    /// The mover writes it to places that the backend told.
    pub placed: bool,
    /// The host knows no short way to zeroes here, so they are written.
    pub plain: bool,
    /// What the mover has under way for it.
    pub moves: u32,
    /// The first thing that went wrong with them.
    pub error: Option<io::Error>,
    /// When it began to wait for a limit.
    pub since: Duration,
}

impl Flight {
    pub(super) fn new(queue: usize, chain: Chain, work: Work) -> Self {
        Self {
            queue,
            chain,
            work,
            syncing: false,
            placed: false,
            plain: false,
            moves: 0,
            error: None,
            since: Duration::ZERO,
        }
    }
}

/// Slots are used again.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
}

impl Table {
    pub(super) fn full(&self) -> bool {
        self.free.is_empty() && self.slots.len() >= IN_FLIGHT
    }

    pub(super) fn put(&mut self, flight: Flight) -> usize {
        let slot = self.free.pop().unwrap_or(self.slots.len());
        match self.slots.get_mut(slot) {
            Some(place) => *place = Some(flight),
            None => self.slots.push(Some(flight)),
        }
        slot
    }

    /// Takes a flight out while its next stage begins, to be put back by [`Table::restore`].
    pub(super) fn lift(&mut self, slot: usize) -> Option<Flight> {
        self.slots.get_mut(slot)?.take()
    }

    pub(super) fn restore(&mut self, slot: usize, flight: Flight) {
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(flight);
        }
    }

    pub(super) fn get(&mut self, slot: usize) -> Option<&mut Flight> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Writes whose bytes were on their way to places that the backend told.
    pub(super) fn placed(&self) -> impl Iterator<Item = (u64, u64)> {
        self.slots.iter().flatten().filter(|flight| flight.placed && !flight.syncing).filter_map(|flight| match flight
            .work
        {
            Work::Write { offset, len, .. } => Some((offset, len as u64)),
            _ => None,
        })
    }

    pub(super) fn take(&mut self, slot: usize) -> Option<Flight> {
        let flight = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        Some(flight)
    }
}
