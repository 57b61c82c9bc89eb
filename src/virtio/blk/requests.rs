//! [`RequestTable`]: the requests that a disk has taken from its driver and still has. Bounded.

use std::io;
use std::time::Duration;

use slab::Slab;

use super::IN_FLIGHT;
use super::request::{BlkRequest, DiskRange};
use crate::virtio::Chain;

/// A request in flight.
#[derive(Debug)]
pub(super) struct InFlightRequest {
    pub queue: usize,
    pub chain: Chain,
    pub work: BlkRequest,
    /// The bytes have arrived, and are being brought to stable storage.
    pub syncing: bool,
    /// The I/O queue writes it to places that the backend gave.
    pub placed: bool,
    /// The host knows no short way to zeroes here, so they are written.
    pub plain: bool,
    /// What the I/O queue has in flight for it.
    pub moves: u32,
    /// The first thing that went wrong with them.
    pub error: Option<io::Error>,
    /// When it began to wait for a limit.
    pub since: Duration,
    /// Bytes that the I/O queue has in flight for it.
    pub moving: u64,
    /// Bytes of it that are done, of data or of its ranges.
    pub done: u64,
}

impl InFlightRequest {
    pub(super) fn new(queue: usize, chain: Chain, work: BlkRequest) -> Self {
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
            moving: 0,
            done: 0,
        }
    }

    /// Whether its next stage needs a place for what it writes.
    pub(super) fn writes(&self) -> bool {
        match &self.work {
            BlkRequest::Write { .. } => true,
            BlkRequest::WriteZeroes(_) => self.plain || !self.stage().unmap,
            _ => false,
        }
    }

    /// Bytes that its next stage moves.
    pub(super) fn moves_next(&self) -> u64 {
        let moves = match self.work {
            BlkRequest::Read { .. } | BlkRequest::Write { .. } => !self.syncing,
            BlkRequest::WriteZeroes(_) => self.plain && !self.syncing,
            _ => false,
        };
        if moves { self.stage().len } else { 0 }
    }

    /// What its next stage costs the loop.
    pub(super) fn cost(&self) -> crate::virtio::Work {
        use crate::virtio::Work;
        match &self.work {
            _ if self.syncing => Work::Calls(1),
            BlkRequest::Read { .. } | BlkRequest::Write { .. } => {
                Work::FileBytes(usize::try_from(self.stage().len).unwrap_or(usize::MAX))
            }
            // Written zeroes cost what other bytes do; files with holes take a call.
            BlkRequest::WriteZeroes(_) if self.plain => {
                Work::FileBytes(usize::try_from(self.stage().len).unwrap_or(usize::MAX))
            }
            BlkRequest::WriteZeroes(_) | BlkRequest::Discard(_) | BlkRequest::Flush => Work::Calls(10),
            BlkRequest::GetId => Work::Chain,
        }
    }

    /// What is done of it at once, from where it stands.
    pub(super) fn stage(&self) -> DiskRange {
        self.work.stage(self.done, self.plain)
    }
}

/// Requests in flight, by slot.
#[derive(Debug, Default)]
pub(super) struct RequestTable(Slab<InFlightRequest>);

impl RequestTable {
    pub(super) fn full(&self) -> bool {
        self.0.len() >= IN_FLIGHT
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn put(&mut self, flight: InFlightRequest) -> usize {
        self.0.insert(flight)
    }

    pub(super) fn get(&mut self, slot: usize) -> Option<&mut InFlightRequest> {
        self.0.get_mut(slot)
    }

    pub(super) fn take(&mut self, slot: usize) -> Option<InFlightRequest> {
        self.0.try_remove(slot)
    }

    /// Takes all requests, in the order of their slots.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = InFlightRequest> {
        std::mem::take(&mut self.0).into_iter().map(|(_, flight)| flight)
    }

    /// Writes whose bytes were on their way to places that the backend gave.
    pub(super) fn placed(&self) -> impl Iterator<Item = (u64, u64)> {
        let placed = self.0.iter().filter(|(_, flight)| flight.placed && !flight.syncing);
        placed.filter(|(_, flight)| matches!(flight.work, BlkRequest::Write { .. })).map(|(_, flight)| {
            let DiskRange { offset, len, .. } = flight.stage();
            (offset, len)
        })
    }
}
