//! Moves a disk's bytes. The kernel moves them through the [`IoQueue`]'s ring, where the backend says in which files
//! they lie. Elsewhere the backend's own calls do it, which block.

use std::io;

use super::backend::{BlockBackend, Extent, front, zeroes_to_guest};
use super::config::{CacheMode, IoEngine, Options};
use super::request::{BlkRequest, DiskRange};
use super::requests::InFlightRequest;
use super::{RING, SECTOR};
use crate::memory::{IoOperation, IoQueue, Segment};
use crate::virtio::Chain;

/// What became of a stage of a request.
pub(super) enum RequestProgress {
    /// The I/O queue has it.
    UnderWay,
    /// It is over.
    Ended(io::Result<()>),
}

/// A disk's bytes, and what moves them.
pub(super) struct Engine {
    pub backend: Box<dyn BlockBackend>,
    /// Moves bytes to and from the backend's files. `None`: the backend's own calls do.
    pub io_queue: Option<IoQueue>,
    /// Why there is no I/O queue though one was asked for.
    pub refused: Option<String>,
    /// All of the disk is one file, so nothing but the I/O queue is needed.
    pub single_file: bool,
    /// A sync has failed. The host reports lost data once and then forgets it, so later syncs prove nothing.
    pub undurable: bool,
    /// Something was written by the backend's calls, which a sync of its file alone may not cover.
    called: bool,
    cache: CacheMode,
    /// Where the range at hand lies; kept, so that it is not allocated each time.
    places: Vec<Extent>,
}

impl Engine {
    /// Finds out what the backend and the host can do.
    pub(super) fn new(backend: Box<dyn BlockBackend>, options: &Options) -> Self {
        let cache = options.cache;
        let (io_queue, refused, places) = Default::default();
        let mut engine =
            Self { backend, io_queue, refused, single_file: false, undurable: false, called: false, cache, places };
        if options.engine == IoEngine::Threads {
            return engine;
        }
        let len = engine.backend.geometry().len;
        // If one sector and the whole range each lie in one file, the disk is that file.
        let mut whole = |len| {
            let mut found = Vec::new();
            let outcome = engine.backend.extents(false, 0, len, &mut found)?;
            Some(outcome.is_ok() && matches!(found[..], [Extent::File { len: found, .. }] if found == len))
        };
        let (sector, all) = (whole(SECTOR), whole(len));
        let made = match sector {
            None => Err("its bytes are not in a file that the host's kernel can read by itself".to_owned()),
            Some(_) => IoQueue::new(RING).map_err(|e| e.to_string()),
        };
        match made {
            Ok(io_queue) => {
                engine.single_file = (sector, all) == (Some(true), Some(true)) && engine.backend.sync_fd().is_some();
                engine.io_queue = Some(io_queue);
            }
            Err(why) if options.engine == IoEngine::IoUring => engine.refused = Some(why),
            Err(why) => log::debug!("{}: no io_uring: {why}", options.device),
        }
        engine
    }

    /// Whether this is done by a call of the backend's that may give away places which the I/O queue reads from or writes to.
    pub(super) fn needs_rest(&self, flight: &InFlightRequest) -> bool {
        !flight.syncing
            && matches!(flight.work, BlkRequest::Discard(_) | BlkRequest::WriteZeroes(_))
            && !(self.single_file && self.io_queue.is_some())
    }

    /// Begins the stage at which the request in `slot` stands.
    pub(super) fn begin(&mut self, slot: usize, flight: &mut InFlightRequest) -> RequestProgress {
        match self.step(slot, flight) {
            // What is in flight must end before the request does.
            outcome if flight.moves > 0 => {
                flight.error = outcome.err();
                RequestProgress::UnderWay
            }
            outcome => RequestProgress::Ended(outcome),
        }
    }

    fn step(&mut self, slot: usize, flight: &mut InFlightRequest) -> io::Result<()> {
        let (stage, from) = (flight.stage(), usize::try_from(flight.done).unwrap_or(usize::MAX));
        let DiskRange { offset, len, .. } = stage;
        let InFlightRequest { chain, work, moves, .. } = flight;
        match work {
            _ if flight.syncing => self.sync(slot, flight),
            BlkRequest::Flush => self.sync(slot, flight),
            BlkRequest::GetId => Ok(()),
            _ if len == 0 => Ok(()),
            BlkRequest::Read { to, len: all, .. } => {
                let mut piece = Vec::new();
                let to = part(chain.writable(*to), from, len, *all, &mut piece);
                match self.locate(false, offset, len) {
                    Some(located) => located.and_then(|()| self.transfer(slot, chain, moves, to, false)),
                    None => self.backend.read(chain.memory(), to, offset),
                }
            }
            BlkRequest::Write { from: data, len: all, .. } => {
                let mut piece = Vec::new();
                let data = part(chain.readable(*data), from, len, *all, &mut piece);
                match self.locate(true, offset, len) {
                    Some(located) => {
                        located?;
                        flight.placed = true;
                        self.transfer(slot, chain, moves, data, true)
                    }
                    None => {
                        self.called = true;
                        self.backend.write(chain.memory(), data, offset)
                    }
                }
            }
            BlkRequest::Discard(_) => self.range(slot, chain, moves, stage, Ranges::Discard),
            BlkRequest::WriteZeroes(_) if flight.plain => self.range(slot, chain, moves, stage, Ranges::PlainZeroes),
            BlkRequest::WriteZeroes(_) => self.range(slot, chain, moves, stage, Ranges::Zeroes),
        }
    }

    /// Finds where the I/O queue can find the range by itself: `places`. `None` where it cannot.
    fn locate(&mut self, write: bool, offset: u64, len: u64) -> Option<io::Result<()>> {
        self.io_queue.as_ref()?;
        self.places.clear();
        self.backend.extents(write, offset, len, &mut self.places)
    }

    /// Moves the data between `segments` and the `places` that were found.
    fn transfer(
        &mut self,
        slot: usize,
        chain: &Chain,
        moves: &mut u32,
        segments: &[Segment],
        write: bool,
    ) -> io::Result<()> {
        let (mut rest, mut part) = (Vec::new(), Vec::new());
        let alone = self.places.len() == 1;
        if !alone {
            rest.extend_from_slice(segments);
        }
        let io_queue = self.io_queue.as_mut();
        let io_queue = io_queue.ok_or_else(no_io_queue)?;
        for place in &self.places {
            let (Extent::File { len, .. } | Extent::Zeroes { len }) = *place;
            if !alone {
                part = front(&mut rest, usize::try_from(len).unwrap_or(usize::MAX));
            }
            let part = if alone { segments } else { &part };
            let what = match *place {
                Extent::File { fd, offset, .. } if write => IoOperation::Write { fd, offset, from: part },
                Extent::File { fd, offset, .. } => IoOperation::Read { fd, offset, to: part },
                Extent::Zeroes { .. } if write => return Err(io::Error::other("there is no place to write to")),
                Extent::Zeroes { .. } => {
                    zeroes_to_guest(chain.memory(), part)?;
                    continue;
                }
            };
            io_queue.push(chain.memory(), slot, what)?;
            *moves += 1;
        }
        debug_assert!(rest.is_empty(), "the backend did not tell all places");
        Ok(())
    }

    /// Discards a range, or makes zeroes of it.
    fn range(&mut self, slot: usize, chain: &Chain, moves: &mut u32, range: DiskRange, what: Ranges) -> io::Result<()> {
        if self.io_queue.is_none() || !self.single_file {
            self.called = true;
            return match what {
                Ranges::Discard => self.backend.discard(range.offset, range.len),
                Ranges::Zeroes | Ranges::PlainZeroes => self.backend.write_zeroes(range.offset, range.len, range.unmap),
            };
        }
        self.locate(true, range.offset, range.len).transpose()?;
        let [Extent::File { fd, offset, len }] = self.places[..] else {
            return Err(io::Error::other("the range is not in one file"));
        };
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let what = match (what, range.unmap) {
            (Ranges::PlainZeroes, _) => IoOperation::Zero { fd, offset, len },
            (Ranges::Zeroes, false) => IoOperation::Allocate { fd, mode: zero, offset, len },
            _ => IoOperation::Allocate { fd, mode: hole, offset, len },
        };
        self.io_queue.as_mut().ok_or_else(no_io_queue)?.push(chain.memory(), slot, what)?;
        *moves += 1;
        Ok(())
    }

    /// Brings everything that was answered to stable storage.
    fn sync(&mut self, slot: usize, flight: &mut InFlightRequest) -> io::Result<()> {
        if self.cache == CacheMode::Unsafe {
            return Ok(());
        }
        if self.undurable {
            return Err(io::Error::other("a sync has failed before, so what was written then may be lost"));
        }
        // What the I/O queue can sync instead of the backend.
        let fd = if self.called { None } else { self.backend.sync_fd() };
        if let (Some(io_queue), Some(fd)) = (&mut self.io_queue, fd) {
            io_queue.push(flight.chain.memory(), slot, IoOperation::Sync { fd })?;
            flight.moves += 1;
            return Ok(());
        }
        let outcome = self.backend.flush();
        self.called &= outcome.is_err();
        outcome
    }
}

/// What becomes of ranges.
#[derive(Debug, Clone, Copy)]
enum Ranges {
    Discard,
    Zeroes,
    /// The host knows no short way to zeroes here, so they are written.
    PlainZeroes,
}

/// The `len` bytes of `segments` behind the first `skip`; all of them as they are where that is everything.
fn part<'a>(segments: &'a [Segment], skip: usize, len: u64, all: usize, piece: &'a mut Vec<Segment>) -> &'a [Segment] {
    if len == all as u64 {
        return segments;
    }
    let mut rest = segments.to_vec();
    front(&mut rest, skip);
    *piece = front(&mut rest, usize::try_from(len).unwrap_or(usize::MAX));
    piece
}

fn no_io_queue() -> io::Error {
    io::Error::from_raw_os_error(libc::ENXIO)
}
