//! Block device (Virtio 1.3, 5.2): a disk. Its requests are in flight together and complete in any order.
//!
//! [`Blk`] lives on the loop of the VM's disks when an io_uring does everything that could block, and on a loop of its
//! own otherwise. A flush is answered after `fdatasync`, so data that the guest holds for durable is on the disk. After
//! a sync has failed nothing is called durable any more.

mod backend;
mod config;
mod engine;
mod limit;
mod policy;
mod request;
mod requests;
mod reserve;
mod serve;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

#[cfg(feature = "qcow2")]
pub(crate) use backend::Qcow2;
#[cfg(any(test, feature = "internals"))]
pub(crate) use backend::fuzzing;
#[cfg(feature = "container")]
pub(crate) use backend::lock_with_remedy;
pub(crate) use backend::{
    BasePath, BlockBackend, ConcatFile, DirectFile, FilePiece, OverlayFile, RawFile, compact, create, flatten, freeze,
    rebase,
};
pub use config::{CacheMode, IoEngine};
pub use limit::DiskLimit;
pub(crate) use policy::ErrorPolicy;
pub use policy::{DiskError, DiskOperation, ErrorAction, ErrorClass};

use super::{ConfigSpace, DeviceIo, DeviceState, DeviceType, DrainCause, EventSource, Profile, VirtioDevice};
use crate::memory::IoQueue;
use crate::sys::Timer;
pub(crate) use config::Options;
use engine::Engine;
use limit::DiskBuckets;
use policy::FaultThrottle;
use requests::{InFlightRequest, RequestTable};
pub(crate) use reserve::Reserve;
use reserve::Room;

/// The unit of every address and length (Virtio 1.3, 5.2.4).
pub(crate) const SECTOR: u64 = 512;
/// Descriptors in each queue.
const QUEUE_SIZE: u16 = 256;
/// Requests that are in flight together, whatever the driver's rings say.
const IN_FLIGHT: usize = 1024;
/// Operations that the kernel has at once.
const RING: u32 = 128;

/// Bytes that the kernel has in flight at once, but for one stage. It may move them when this thread next calls it, all at
/// once; so this is the loop's time, too.
const MOVING: u64 = 6 << 20;

/// Status bytes (Virtio 1.3, 5.2.6).
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// What is watched beside the queues.
const RING_READY: u32 = 0;
const TIMER: u32 = 1;

/// How often the space that is left is looked at, at most, while the guest writes.
const SPACE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long a stop waits for what is in flight and cannot be cancelled.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);

/// Bytes that a disk takes up on the host, and bytes that the guest sees.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlkUsage {
    pub allocated: u64,
    pub size: u64,
}

/// A disk.
pub(crate) struct Blk {
    engine: Engine,
    options: Options,
    config: ConfigSpace,
    table: RequestTable,
    /// Requests that wait for a limit: reads and writes.
    waiting: [VecDeque<usize>; 2],
    buckets: DiskBuckets,
    timer: Option<Timer>,
    /// Requests that failed and will be tried again when the VM goes on, or never.
    held: Vec<usize>,
    /// Requests for which a turn was too short, or too much was in flight.
    unfinished: VecDeque<usize>,
    /// Bytes that the I/O queue has in flight.
    moving: u64,
    /// Queues that were left alone for a lack of room.
    full: Vec<usize>,
    /// Queues with completions of which the driver was not notified yet.
    dirty: Vec<usize>,
    fault_throttle: FaultThrottle,
    room: Room,
    /// When the space that is left was looked at last, and whether it was too little.
    looked: Duration,
    low: bool,
    /// When waiting requests were reported last.
    throttled_reported: Option<Duration>,
    epoch: Instant,
}

impl fmt::Debug for Blk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blk({}, {:?}, {:?})", self.options.device, self.engine.backend, self.engine.io_queue)
    }
}

impl Blk {
    /// A disk on `backend`.
    pub(crate) fn new(backend: Box<dyn BlockBackend>, options: Options) -> Self {
        Self {
            config: options.config_space(&backend.geometry()),
            buckets: DiskBuckets::new(&options.limit, Duration::ZERO),
            engine: Engine::new(backend, &options),
            options,
            table: RequestTable::default(),
            waiting: Default::default(),
            timer: None,
            held: Vec::new(),
            unfinished: VecDeque::new(),
            moving: 0,
            full: Vec::new(),
            dirty: Vec::new(),
            fault_throttle: FaultThrottle::new(),
            room: Room::default(),
            looked: Duration::ZERO,
            low: false,
            throttled_reported: None,
            epoch: Instant::now(),
        }
    }

    /// What moves its bytes: [`IoEngine::IoUring`] or [`IoEngine::Threads`].
    pub(crate) fn engine(&self) -> IoEngine {
        if self.engine.io_queue.is_some() { IoEngine::IoUring } else { IoEngine::Threads }
    }

    /// Returns why it does without the ring that it was to use.
    pub(crate) fn refused(&self) -> Option<&str> {
        self.engine.refused.as_deref()
    }

    /// Whether some requests block the thread that serves them, so that it needs one of its own.
    pub(crate) fn blocks(&self) -> bool {
        !self.engine.single_file || self.engine.io_queue.is_none()
    }

    /// Changes the limits. What waits is looked at anew at once.
    pub(crate) fn set_limit(&mut self, limit: &DiskLimit) {
        self.options.limit = *limit;
        self.buckets = DiskBuckets::new(limit, self.now());
        self.arm(Duration::ZERO);
    }

    /// Makes the disk larger and tells the driver.
    ///
    /// # Errors
    /// The backend's; `EINVAL` for what is smaller than it is, or not whole sectors.
    pub(crate) fn grow(&mut self, io: Option<&mut DeviceIo>, len: u64) -> io::Result<()> {
        if len < self.engine.backend.geometry().len || !len.is_multiple_of(SECTOR) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.engine.backend.grow(len)?;
        self.config.set(config::CAPACITY, &(self.engine.backend.geometry().len / SECTOR).to_le_bytes());
        if let Some(io) = io {
            io.config_changed();
        }
        Ok(())
    }

    /// Returns the size of the disk, on the host and in the guest.
    ///
    /// # Errors
    /// The host's.
    pub(crate) fn usage(&self) -> io::Result<BlkUsage> {
        Ok(BlkUsage { allocated: self.engine.backend.allocated()?, size: self.engine.backend.geometry().len })
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// Looks at what waits after this time.
    fn arm(&mut self, wait: Duration) {
        if let Some(timer) = &mut self.timer
            && let Err(error) = timer.set(Some(Instant::now() + wait))
        {
            log::error!("{}: its timer: {error}", self.options.device);
        }
    }
}

impl VirtioDevice for Blk {
    fn profile(&self) -> Profile {
        let profile = Profile::new(DeviceType::Block).features(self.options.features(&self.engine.backend.geometry()));
        let profile = (0..self.options.queues).fold(profile, |profile, _| profile.queue(QUEUE_SIZE));
        profile.config_space(self.config.clone())
    }

    fn start(&mut self, io: &mut DeviceIo, state: Option<&DeviceState>) -> io::Result<()> {
        if let Some(other) = state.filter(|state| **state != DeviceState::Stateless) {
            return Err(other.mismatch());
        }
        if self.engine.single_file && self.engine.io_queue.is_none() {
            // The last one was left with a file that did not answer.
            self.engine.io_queue = Some(IoQueue::new(RING)?);
        }
        if let Some(fd) = self.engine.io_queue.as_ref().and_then(IoQueue::as_fd) {
            io.watch(fd, RING_READY, crate::event_loop::Interest::IN)?;
        }
        io.watch_timer(&mut self.timer, TIMER)
    }

    fn ready(&mut self, io: &mut DeviceIo, source: EventSource) {
        self.go_on(io);
        match source {
            EventSource::Queue(queue) => self.take(io, queue),
            EventSource::Watched { number: TIMER, .. } => {
                if let Some(timer) = &mut self.timer {
                    timer.clear();
                }
                self.release(io);
            }
            EventSource::Watched { .. } => {}
            EventSource::Resumed => {
                for slot in std::mem::take(&mut self.held) {
                    self.advance(io, slot);
                }
            }
        }
        self.reap(io);
        // What is in flight wakes the loop when it ends.
        if self.moving < MOVING && !self.unfinished.is_empty() {
            io.reschedule(0);
        }
    }

    fn drain(&mut self, io: &mut DeviceIo, timeout: Duration, cause: DrainCause) -> bool {
        if cause == DrainCause::End {
            // No limit keeps back what is the last.
            self.buckets = DiskBuckets::default();
            self.release(io);
        }
        let quiet = self.finish(io, timeout);
        if !quiet && cause == DrainCause::End {
            log::warn!("{}: requests are dropped, because the host does not answer", self.options.device);
        }
        quiet
    }

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        if let Some(timer) = &self.timer {
            io.unwatch(timer.as_fd());
        }
        if let Some(mut io_queue) = self.engine.io_queue.take() {
            if let Some(fd) = io_queue.as_fd() {
                io.unwatch(fd);
            }
            // The loop of several disks waits for none.
            let timeout = if self.engine.single_file { Duration::ZERO } else { STOP_TIMEOUT };
            if io_queue.stop(timeout) {
                self.table.placed().for_each(|(offset, len)| self.engine.backend.write_failed(offset, len));
                self.engine.io_queue = Some(io_queue);
            } else {
                // Places stay taken where the kernel may still write to them.
                io.hand_over(io_queue);
            }
        }
        // Those that wait for a limit or for the embedder are taken again at the next start, and done all over.
        for InFlightRequest { queue, chain, .. } in self.table.take_all() {
            io.put_back(queue, chain);
        }
        self.waiting = Default::default();
        self.held.clear();
        self.unfinished.clear();
        self.moving = 0;
        self.full.clear();
        io.flush(&std::mem::take(&mut self.dirty));
        DeviceState::Stateless
    }

    fn reset(&mut self) {
        self.timer = None;
        self.config.set(config::WRITEBACK, &[1]);
    }
}
