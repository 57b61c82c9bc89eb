//! What moves a disk's bytes: the kernel, through the [`Mover`]'s ring, wherever the backend says in which files they lie;
//! the backend's own calls, which block, everywhere else.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use super::backend::{Extent, front, zeroes_to_guest};
use super::config::{Cache, DiskEngine};
use super::flight::Flight;
use super::request::{Range, Work};
use super::{Blk, RING, SECTOR};
use crate::memory::{Move, Mover, Segment};
use crate::virtio::DeviceIo;

/// How long a call that needs the disk for itself waits for what is under way.
const BARRIER: Duration = Duration::from_secs(30);

/// What became of a stage of a request.
pub(super) enum Begun {
    /// The mover has it.
    UnderWay,
    /// It is over.
    Ended(io::Result<()>),
}

impl Blk {
    /// Finds out what the backend and the host can do.
    pub(super) fn choose_engine(&mut self) {
        let explicit = self.options.engine == DiskEngine::Ring;
        if self.options.engine == DiskEngine::Threads {
            return;
        }
        let len = self.backend.shape().len;
        // What is one file in any range is one file altogether.
        let mut whole = |len| match self.backend.extents(false, 0, len) {
            Some(Ok(extents)) => Some(matches!(extents[..], [Extent::File { len: found, .. }] if found == len)),
            _ => None,
        };
        let (sector, all) = (whole(SECTOR), whole(len));
        let made = match sector {
            None => Err("its bytes are not in a file that the host's kernel can read by itself".to_owned()),
            Some(_) => Mover::new(RING).map_err(|e| e.to_string()),
        };
        match made {
            Ok(mover) => {
                self.direct = (sector, all) == (Some(true), Some(true)) && self.backend.sync_fd().is_some();
                self.mover = Some(mover);
            }
            Err(why) if explicit => self.refused = Some(why),
            Err(why) => log::debug!("{}: no io_uring: {why}", self.options.name),
        }
    }

    /// Begins the stage at which the request in `slot` stands.
    pub(super) fn begin(&mut self, io: &mut DeviceIo, slot: usize) -> Begun {
        let Some(mut flight) = self.table.lift(slot) else {
            return Begun::UnderWay;
        };
        let outcome = self.begin_lifted(io, slot, &mut flight);
        let begun = match outcome {
            // What is under way must end before the request does.
            outcome if flight.moves > 0 => {
                flight.error = outcome.err();
                Begun::UnderWay
            }
            outcome => Begun::Ended(outcome),
        };
        self.table.restore(slot, flight);
        begun
    }

    fn begin_lifted(&mut self, io: &mut DeviceIo, slot: usize, flight: &mut Flight) -> io::Result<()> {
        // Taken out and put back, so that nothing is copied.
        let work = std::mem::replace(&mut flight.work, Work::Flush);
        let outcome = match &work {
            _ if flight.syncing => self.sync(slot, flight),
            Work::Flush => self.sync(slot, flight),
            Work::GetId | Work::Read { len: 0, .. } | Work::Write { len: 0, .. } => Ok(()),
            Work::Read { offset, to, len } => match self.places(false, *offset, *len as u64) {
                Some(places) => places.and_then(|places| self.transfer(slot, flight, &places, to, false)),
                None => self.backend.read(flight.chain.memory(), to, *offset),
            },
            Work::Write { offset, from, len } => match self.places(true, *offset, *len as u64) {
                Some(places) => places.and_then(|places| self.transfer(slot, flight, &places, from, true)),
                None => {
                    self.called = true;
                    self.backend.write(flight.chain.memory(), from, *offset)
                }
            },
            Work::Discard(ranges) => self.ranges(io, slot, flight, ranges, false),
            Work::WriteZeroes(ranges) => self.ranges(io, slot, flight, ranges, true),
        };
        flight.work = work;
        outcome
    }

    /// Where the mover can find the range by itself.
    fn places(&mut self, write: bool, offset: u64, len: u64) -> Option<io::Result<Vec<Extent>>> {
        self.mover.as_ref()?;
        self.backend.extents(write, offset, len)
    }

    /// Gives the mover an operation for the request in `slot`.
    fn hand_over(&mut self, slot: usize, flight: &mut Flight, what: Move<'_>) -> io::Result<()> {
        let mover = self.mover.as_mut().ok_or_else(|| io::Error::from_raw_os_error(libc::ENXIO))?;
        mover.take_on(flight.chain.memory(), slot, what)?;
        flight.moves += 1;
        Ok(())
    }

    fn transfer(
        &mut self,
        slot: usize,
        flight: &mut Flight,
        places: &[Extent],
        segments: &[Segment],
        write: bool,
    ) -> io::Result<()> {
        flight.placed = write;
        let (mut rest, alone) = match places {
            [_] => (Vec::new(), true),
            _ => (segments.to_vec(), false),
        };
        for place in places {
            let (Extent::File { len, .. } | Extent::Zeroes { len }) = *place;
            let part = if alone { Vec::new() } else { front(&mut rest, usize::try_from(len).unwrap_or(usize::MAX)) };
            let part = if alone { segments } else { &part };
            match *place {
                Extent::File { fd, offset, .. } if write => {
                    self.hand_over(slot, flight, Move::Write { fd, offset, from: part })?;
                }
                Extent::File { fd, offset, .. } => self.hand_over(slot, flight, Move::Read { fd, offset, to: part })?,
                Extent::Zeroes { .. } if write => return Err(io::Error::other("there is no place to write to")),
                Extent::Zeroes { .. } => zeroes_to_guest(flight.chain.memory(), part)?,
            }
        }
        debug_assert!(rest.is_empty(), "the backend did not tell all places");
        Ok(())
    }

    /// Discards ranges, or makes zeroes of them.
    fn ranges(
        &mut self,
        io: &mut DeviceIo,
        slot: usize,
        flight: &mut Flight,
        ranges: &[Range],
        zeroes: bool,
    ) -> io::Result<()> {
        let mut ranges = ranges.iter().filter(|range| range.len > 0);
        if self.mover.is_none() || !self.direct {
            // The backend may give away places that the mover reads from or writes to.
            if !self.come_to_rest(io, BARRIER) {
                return Err(io::Error::from_raw_os_error(libc::ETIMEDOUT));
            }
            self.called = true;
            return ranges.try_for_each(|range| match zeroes {
                true => self.backend.write_zeroes(range.offset, range.len, range.unmap),
                false => self.backend.discard(range.offset, range.len),
            });
        }
        ranges.try_for_each(|range| {
            let places = self.places(true, range.offset, range.len).transpose()?.unwrap_or_default();
            let [Extent::File { fd, offset, len }] = places[..] else {
                return Err(io::Error::other("the range is not in one file"));
            };
            let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
            let what = match (zeroes, range.unmap) {
                (true, _) if flight.plain => Move::Zero { fd, offset, len },
                (true, false) => Move::Allocate { fd, mode: zero, offset, len },
                _ => Move::Allocate { fd, mode: hole, offset, len },
            };
            self.hand_over(slot, flight, what)
        })
    }

    /// Brings everything that was answered to stable storage.
    fn sync(&mut self, slot: usize, flight: &mut Flight) -> io::Result<()> {
        if self.options.cache == Cache::Unsafe {
            return Ok(());
        }
        if self.undurable {
            return Err(io::Error::other("a sync has failed before, so what was written then may be lost"));
        }
        if let Some(fd) = self.sync_fd() {
            return self.hand_over(slot, flight, Move::Sync { fd });
        }
        let outcome = self.backend.flush();
        self.called &= outcome.is_err();
        outcome
    }

    /// What the mover can sync instead of the backend.
    fn sync_fd(&self) -> Option<RawFd> {
        self.mover.as_ref().filter(|_| !self.called)?;
        self.backend.sync_fd()
    }
}
