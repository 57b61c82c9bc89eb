//! The life of a request. It is taken from a queue, perhaps held back by a limit, done and answered, or failed by the
//! disk's policy.

use crate::virtio::DeviceEvent;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::config::{F_CONFIG_WCE, F_FLUSH, WRITEBACK};
use super::engine::RequestProgress;
use super::policy::{DiskError, ErrorAction};
use super::request::{BlkRequest, IoDirection, Refused, RequestSummary};
use super::requests::InFlightRequest;
use super::{Blk, CacheMode, MOVING, Reserve, S_IOERR, S_OK, S_UNSUPP, SPACE_CHECK_INTERVAL};
use crate::sys::Space;
use crate::virtio::{Chain, DeviceIo};

/// How long a call that needs the disk for itself waits for what is in flight.
const BARRIER: Duration = Duration::from_secs(30);
/// After how long the kernel is asked again when it took no more operations.
const AGAIN: Duration = Duration::from_millis(10);

impl Blk {
    /// Takes what the driver has put into `queue`, as far as there is room.
    pub(super) fn take(&mut self, io: &mut DeviceIo, queue: usize) {
        loop {
            if self.table.full() {
                self.full.push(queue);
                return;
            }
            match io.pop(queue) {
                Some(chain) => self.accept(io, queue, chain),
                None if io.rearm(queue) => {}
                None => return,
            }
        }
    }

    fn accept(&mut self, io: &mut DeviceIo, queue: usize, mut chain: Chain) {
        // The last byte is the status; without one there is nowhere to put an answer.
        let Some(data) = chain.writable_len().checked_sub(1) else {
            return self.give_back(io, queue, chain);
        };
        match BlkRequest::parse(&mut chain, data, &self.engine.backend.geometry()) {
            Ok(BlkRequest::GetId) => {
                let status = if chain.write(&self.options.serial_bytes()).is_ok() { S_OK } else { S_IOERR };
                self.answer(io, queue, chain, status);
            }
            Ok(work) => {
                let slot = self.table.put(InFlightRequest::new(queue, chain, work));
                self.admit(io, slot);
            }
            Err(Refused::Malformed) => self.answer(io, queue, chain, S_IOERR),
            Err(Refused::Unsupported) => self.answer(io, queue, chain, S_UNSUPP),
        }
    }

    /// Begins a request, or lets it wait for its limit.
    fn admit(&mut self, io: &mut DeviceIo, slot: usize) {
        let Some(flight) = self.table.get(slot) else { return };
        let direction = flight.work.direction().filter(|direction| self.buckets.limited(*direction));
        let Some(direction) = direction else {
            return self.advance(io, slot);
        };
        let now = self.epoch.elapsed();
        let [reads, writes] = &mut self.waiting;
        let waiting = if direction == IoDirection::Read { reads } else { writes };
        let admitted = match waiting.is_empty() {
            true => self.buckets.admit(direction, flight.work.data_len(), now),
            false => Err(Duration::MAX),
        };
        match admitted {
            Ok(()) => self.advance(io, slot),
            Err(wait) => {
                flight.since = now;
                waiting.push_back(slot);
                io.counters().throttled.fetch_add(1, Ordering::Relaxed);
                if self.throttled_reported.is_none_or(|last| now >= last + SPACE_CHECK_INTERVAL) {
                    self.throttled_reported = Some(now);
                    io.report(DeviceEvent::Throttled);
                }
                // One that waits behind others needs no moment of its own.
                if wait < Duration::MAX {
                    self.rearm();
                }
            }
        }
    }

    /// Begins what waits and may go now.
    pub(super) fn release(&mut self, io: &mut DeviceIo) {
        for direction in [IoDirection::Read, IoDirection::Write] {
            loop {
                let now = self.now();
                let [reads, writes] = &mut self.waiting;
                let waiting = if direction == IoDirection::Read { reads } else { writes };
                let Some(slot) = waiting.front().copied() else { break };
                let Some(flight) = self.table.get(slot) else { break };
                if self.buckets.admit(direction, flight.work.data_len(), now).is_err() {
                    break;
                }
                let waited = u64::try_from(now.saturating_sub(flight.since).as_nanos()).unwrap_or(u64::MAX);
                io.counters().throttled_nanos.fetch_add(waited, Ordering::Relaxed);
                waiting.pop_front();
                self.advance(io, slot);
            }
        }
        self.rearm();
    }

    /// Sets the timer to when the first of those that wait may go.
    fn rearm(&mut self) {
        let now = self.now();
        let [reads, writes] = &self.waiting;
        let waits = [(IoDirection::Read, reads.is_empty()), (IoDirection::Write, writes.is_empty())];
        let some = waits.into_iter().filter(|(_, empty)| !empty);
        if let Some(wait) = some.map(|(direction, _)| self.buckets.wait(direction, now)).min() {
            self.arm(wait);
        }
    }

    /// Does a request from where it stands, stage by stage, until it is over or in flight.
    pub(super) fn advance(&mut self, io: &mut DeviceIo, slot: usize) {
        loop {
            let Some(flight) = self.table.get(slot) else { return };
            let next = flight.moves_next();
            if io.turn_over() {
                io.reschedule(flight.queue);
                return self.unfinished.push_back(slot);
            }
            if next > 0 && self.moving >= MOVING {
                return self.unfinished.push_back(slot);
            }
            io.charge(flight.cost());
            let RequestProgress::Ended(result) = self.begin(io, slot) else {
                if let Some(flight) = self.table.get(slot) {
                    flight.moving = next;
                    self.moving += next;
                }
                return;
            };
            if !self.on_stage_done(io, slot, result) {
                return;
            }
        }
    }

    /// Goes on with requests for which a turn was too short.
    pub(super) fn go_on(&mut self, io: &mut DeviceIo) {
        for slot in std::mem::take(&mut self.unfinished) {
            self.advance(io, slot);
        }
    }

    /// Brings everything that was begun to its end, within the given time.
    pub(super) fn finish(&mut self, io: &mut DeviceIo, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.wait_in_flight(io, left) {
                return false;
            }
            if self.unfinished.is_empty() {
                return true;
            }
            if left.is_zero() {
                return false;
            }
            io.begin_turn();
            self.go_on(io);
        }
    }

    fn begin(&mut self, io: &mut DeviceIo, slot: usize) -> RequestProgress {
        let Some(flight) = self.table.get(slot) else { return RequestProgress::UnderWay };
        if self.engine.needs_rest(flight) && !self.wait_in_flight(io, BARRIER) {
            return RequestProgress::Ended(Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)));
        }
        if let Err(full) = self.take_room(slot) {
            return RequestProgress::Ended(Err(full));
        }
        self.table.get(slot).map_or(RequestProgress::UnderWay, |flight| self.engine.begin(slot, flight))
    }

    /// Sees to it that what is about to be written leaves the host its reserve.
    fn take_room(&mut self, slot: usize) -> io::Result<()> {
        let Some(flight) = self.table.get(slot) else { return Ok(()) };
        if self.options.reserve == Reserve::Nothing || flight.syncing || !flight.writes() {
            return Ok(());
        }
        let stage = flight.stage();
        let in_flight = || self.table.placed().map(|(_, len)| len).sum();
        let (backend, place) = (&mut *self.engine.backend, (stage.offset, stage.len));
        self.room.take(self.options.reserve, backend, place, in_flight, Instant::now())
    }

    /// Takes what the I/O queue has done until there is nothing more, and tells the driver. After everything else.
    pub(super) fn reap(&mut self, io: &mut DeviceIo) {
        loop {
            match self.engine.io_queue.as_mut().and_then(|io_queue| io_queue.next()) {
                Some((slot, result)) => self.on_io_done(io, slot, result),
                None if self.engine.io_queue.as_mut().is_some_and(|io_queue| io_queue.submit()) => {}
                None => break,
            }
        }
        if self.engine.io_queue.as_ref().is_none_or(|io_queue| !io_queue.busy()) {
            self.room.rest();
        }
        if self.engine.io_queue.as_ref().is_some_and(|io_queue| io_queue.is_stuck()) {
            self.arm(AGAIN);
        }
        io.flush(&self.dirty);
        self.dirty.clear();
        if !self.table.full() {
            // Those that found no room are looked at again.
            self.full.drain(..).for_each(|queue| io.reschedule(queue));
        }
    }

    /// Waits until nothing is in flight, within the given time. Begins nothing new.
    pub(super) fn wait_in_flight(&mut self, io: &mut DeviceIo, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        self.reap(io);
        while let Some(io_queue) = self.engine.io_queue.as_mut().filter(|io_queue| io_queue.busy()) {
            if !io_queue.wait(deadline) {
                return false;
            }
            self.reap(io);
        }
        true
    }

    /// One of the I/O queue's operations for a request has ended.
    fn on_io_done(&mut self, io: &mut DeviceIo, slot: usize, result: io::Result<()>) {
        let Some(flight) = self.table.get(slot) else { return };
        flight.moves = flight.moves.saturating_sub(1);
        if let Err(error) = result {
            flight.error.get_or_insert(error);
        }
        if flight.moves == 0 {
            self.moving = self.moving.saturating_sub(std::mem::take(&mut flight.moving));
            let result = flight.error.take().map_or(Ok(()), Err);
            if self.on_stage_done(io, slot, result) {
                self.advance(io, slot);
            }
        }
    }

    /// A stage of a request is over. True when another follows.
    fn on_stage_done(&mut self, io: &mut DeviceIo, slot: usize, mut result: io::Result<()>) -> bool {
        let through = self.writes_through(io);
        let Some(flight) = self.table.get(slot) else { return false };
        let sync = flight.syncing || flight.work == BlkRequest::Flush;
        let stage = flight.stage();
        let write = matches!(flight.work, BlkRequest::Write { .. });
        if write && flight.placed && result.is_err() && !sync {
            self.engine.backend.write_failed(stage.offset, stage.len);
            flight.placed = false;
        }
        if sync {
            self.engine.undurable |= result.is_err();
        } else if result.is_ok() {
            if write && flight.placed {
                result = self.engine.backend.write_done(stage.offset, stage.len);
            }
            if result.is_ok() {
                flight.done += stage.len;
                flight.placed = false;
                if flight.done < flight.work.len() {
                    return true;
                }
            }
            if result.is_ok() && through && flight.work.direction() == Some(IoDirection::Write) {
                flight.syncing = true;
                return true;
            }
        } else if result.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            match flight.work {
                // The file system knows no holes, and the space is kept.
                BlkRequest::Discard(_) => result = Ok(()),
                BlkRequest::WriteZeroes(_) if !flight.plain => {
                    flight.plain = true;
                    return true;
                }
                _ => {}
            }
        }
        match result {
            Ok(()) => {
                if flight.work.direction() == Some(IoDirection::Write) {
                    self.check_free_space(io);
                }
                if let Some(InFlightRequest { queue, mut chain, work, .. }) = self.table.take(slot) {
                    if let BlkRequest::Read { len, .. } = work {
                        chain.wrote(len);
                    }
                    self.answer(io, queue, chain, S_OK);
                }
            }
            Err(error) => self.fail(io, slot, &error, !sync),
        }
        false
    }

    /// Warns when the host has little space left, while there is some.
    fn check_free_space(&mut self, io: &DeviceIo) {
        let Some(min_free_space) = self.options.min_free_space else { return };
        let now = self.epoch.elapsed();
        if now < self.looked + SPACE_CHECK_INTERVAL {
            return;
        }
        self.looked = now;
        match self.engine.backend.space() {
            Ok(Some(Space { free, .. })) if free < min_free_space => {
                if !std::mem::replace(&mut self.low, true) {
                    io.report(DeviceEvent::LowSpace(free));
                }
            }
            Ok(_) => self.low = false,
            Err(error) => log::debug!("{}: the space that is left: {error}", self.options.device),
        }
    }

    /// The host could not do it; `again` tells whether it may be tried again.
    fn fail(&mut self, io: &mut DeviceIo, slot: usize, error: &io::Error, again: bool) {
        let Some(flight) = self.table.get(slot) else { return };
        io.counters().io_errors.fetch_add(1, Ordering::Relaxed);
        let RequestSummary { operation, offset, len } =
            if flight.syncing { BlkRequest::Flush.describe() } else { flight.work.describe() };
        let action = self.options.policy.action(operation, error, again);
        // The first that holds the machine up must be reported; those behind it need not.
        let must = action != ErrorAction::Report && self.held.is_empty();
        let now = self.epoch.elapsed();
        if action == ErrorAction::Report {
            if let Some(InFlightRequest { queue, chain, .. }) = self.table.take(slot) {
                self.answer(io, queue, chain, S_IOERR);
            }
        } else {
            self.held.push(slot);
        }
        if let Some(suppressed) = self.fault_throttle.admit(must, now) {
            let fault = DiskError {
                disk: self.options.device,
                operation,
                sector: offset / super::SECTOR,
                bytes: len,
                errno: error.raw_os_error(),
                error: error.to_string(),
                action,
                suppressed,
            };
            log::warn!("{fault}");
            io.report(DeviceEvent::DiskError(fault));
        }
    }

    /// Whether a write must be on stable storage before it is answered (Virtio 1.3, 5.2.6.2).
    fn writes_through(&self, io: &DeviceIo) -> bool {
        let features = io.features();
        let through = match features & F_CONFIG_WCE {
            0 => features & F_FLUSH == 0,
            _ => self.config.word(WRITEBACK) & 0xff == 0,
        };
        through && self.options.cache == CacheMode::Durable
    }

    /// Gives a request back with its status behind whatever of its data was filled.
    fn answer(&mut self, io: &mut DeviceIo, queue: usize, mut chain: Chain, status: u8) {
        chain.skip_writable(chain.writable_len().saturating_sub(1));
        let _ = chain.write(&[status]);
        self.give_back(io, queue, chain);
    }

    fn give_back(&mut self, io: &mut DeviceIo, queue: usize, chain: Chain) {
        io.complete(queue, chain);
        if !self.dirty.contains(&queue) {
            self.dirty.push(queue);
        }
    }
}
