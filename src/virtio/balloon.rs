//! Memory balloon (Virtio 1.3, 5.5): gives unused guest memory back to the host.
//!
//! Runs on the VM's loop. There are three ways. The guest reports what it freed, without being asked (free page
//! reporting). The embedder inflates the balloon. The guest reports how it uses its memory. What it gives is discarded
//! at once.

use super::DeviceEvent;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use super::config_space::ConfigSpace;
use super::{Chain, DeviceIo, DeviceState, DeviceType, DrainCause, EventSource, Profile, VirtioDevice, Work};
use crate::memory::{GuestAddress, GuestMemory};
use crate::rate::{Bucket, Rate};
use crate::size::Size;
use crate::sys::left;

/// The guest says how it uses its memory (Virtio 1.3, 5.5.3, VIRTIO_BALLOON_F_STATS_VQ).
const F_STATS: u64 = 1 << 1;
/// A guest short of memory takes some back from the balloon (VIRTIO_BALLOON_F_DEFLATE_ON_OOM).
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest tells what is free (VIRTIO_BALLOON_F_PAGE_REPORTING).
const F_REPORTING: u64 = 1 << 5;

/// Configuration space (Virtio 1.3, 5.5.4): how many pages the balloon shall have, and how many it has.
const TARGET: usize = 0;
const ACTUAL: usize = 4;

/// The balloon counts in pages of this size on every machine (Virtio 1.3, 5.5.6).
const PAGE: u64 = 4096;
/// Pages in one request; Linux sends 256.
const MAX_PAGES: usize = 4096;
/// Page numbers that are looked at in one piece of work.
const PAGES_AT_ONCE: usize = 64;
/// Bytes that are given back to the host in one piece of work.
const DISCARD_AT_ONCE: usize = 16 << 20;

/// How a guest uses its memory, as its kernel says (Virtio 1.3, 5.5.6.4). What it does not tell is `None`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestMemoryStats {
    /// Memory that is not used.
    pub free: Option<Size>,
    /// Known to the guest's kernel, without what it keeps for itself.
    pub total: Option<Size>,
    /// What programs could have without swapping: free memory and caches.
    pub available: Option<Size>,
    /// Files of disks.
    pub caches: Option<Size>,
    /// Page faults that had to wait for a disk, since the guest started.
    pub major_faults: Option<u64>,
}

impl GuestMemoryStats {
    /// A list of tags, of 16 bits, and values, of 64.
    fn parse(bytes: &[u8]) -> Self {
        let mut found = Self::default();
        for entry in bytes.chunks_exact(10) {
            let [t0, t1, v @ ..] = entry else { break };
            let Ok(value) = <[u8; 8]>::try_from(v) else { break };
            let value = u64::from_le_bytes(value);
            let size = Some(Size::bytes(value));
            match u16::from_le_bytes([*t0, *t1]) {
                2 => found.major_faults = Some(value),
                4 => found.free = size,
                5 => found.total = size,
                6 => found.available = size,
                7 => found.caches = size,
                _ => {}
            }
        }
        found
    }
}

/// The purpose of a queue.
///
/// The features decide which queues there are. They are numbered without gaps, as Linux and other devices do; the
/// specification numbers them with gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// Reports beyond the answers to the embedder: that the balloon has left its size, or has it again.
const REPORTS: Rate = Rate::per_second(1).one_time_burst(10);

/// What a guest has put into a balloon.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct BalloonState {
    /// In pages of 4 KiB.
    pub held: u64,
}

/// The device.
pub(crate) struct Balloon {
    memory: GuestMemory,
    /// Pages that went in, less those that came out.
    held: u64,
    /// The embedder has asked for a size that the balloon has not had since.
    asked: bool,
    /// As was last reported.
    settled: bool,
    /// Bounds what a guest reports that fills and empties the balloon without pause.
    reports: Bucket,
    epoch: Instant,
    config: ConfigSpace,
    roles: Vec<Role>,
    /// The driver's buffer for statistics: it fills in new ones when it gets the buffer back.
    stats: Option<Chain>,
    waiting: Vec<SyncSender<GuestMemoryStats>>,
    /// Requests that take more than a turn: to inflate, and of free memory.
    inflating: Option<Chain>,
    reporting: Option<Chain>,
    /// Bytes that the guest has reported as free so far.
    reported: u64,
}

impl Balloon {
    pub(crate) fn new(memory: GuestMemory) -> Self {
        let config = ConfigSpace::new([0; 8]).writable(ACTUAL..ACTUAL + 4);
        Self {
            memory,
            held: 0,
            asked: false,
            settled: true,
            reports: Bucket::new(REPORTS, Duration::ZERO),
            epoch: Instant::now(),
            config,
            roles: Vec::new(),
            stats: None,
            waiting: Vec::new(),
            inflating: None,
            reporting: None,
            reported: 0,
        }
    }

    /// Wants the guest to give `bytes` back, or to take again what is beyond that. It does so when it can.
    pub(crate) fn set_target(&mut self, bytes: u64, io: Option<&mut DeviceIo>) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.config.set(TARGET, &pages.to_le_bytes());
        self.settled = self.held == u64::from(pages);
        self.asked = !self.settled;
        if let Some(io) = io {
            io.config_changed();
        }
    }

    /// What the balloon takes from.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Bytes in the balloon, as the guest says.
    pub(crate) fn actual(&self) -> u64 {
        u64::from(self.config.word(ACTUAL)) * PAGE
    }

    /// Pages in the balloon, as the device has counted them.
    #[cfg(test)]
    pub(crate) fn held(&self) -> u64 {
        self.held
    }

    /// Bytes that the guest has reported as free so far.
    pub(crate) fn reported(&self) -> u64 {
        self.reported
    }

    /// Asks the guest how it uses its memory; the answer goes to `answer`, which is dropped when there will be none.
    pub(crate) fn ask(&mut self, io: Option<&mut DeviceIo>, answer: SyncSender<GuestMemoryStats>) {
        let Some(queue) = self.roles.iter().position(|role| *role == Role::Stats) else {
            return;
        };
        if let (Some(io), Some(chain)) = (io, self.stats.take()) {
            io.complete(queue, chain);
            io.flush(&[queue]);
            self.waiting.push(answer);
        }
    }

    /// Tells of what the last requests have made of the balloon.
    fn settle(&mut self, io: &DeviceIo) {
        let settled = self.held == u64::from(self.config.word(TARGET));
        // What the embedder has asked for is reported in any case, once for each time.
        let answers = settled && std::mem::take(&mut self.asked);
        if answers || settled != self.settled && self.reports.take_whole(self.epoch.elapsed()) {
            self.settled = settled;
            io.report(DeviceEvent::BalloonSettled(self.held * PAGE));
        }
    }

    /// The pages whose numbers are in the chain are the host's now; as many as the turn has time for.
    fn inflate(&mut self, io: &mut DeviceIo, chain: &mut Chain) -> Result<(), String> {
        let count = chain.readable_len() / 4;
        if count > MAX_PAGES {
            return Err(format!("{count} pages in one request"));
        }
        let mut bytes = [0; 4 * PAGES_AT_ONCE];
        while chain.readable_len() >= 4 && !io.turn_over() {
            let count = (chain.readable_len() / 4).min(PAGES_AT_ONCE);
            let (bytes, _) = bytes.split_at_mut(4 * count);
            chain.read_into(bytes).map_err(|e| e.to_string())?;
            self.discard_pages(io, bytes);
            // No more than there is memory, whatever the guest says.
            self.held = (self.held + count as u64).min(self.memory.size() / PAGE);
        }
        Ok(())
    }

    /// Discards the pages of these numbers, of 32 bits.
    fn discard_pages(&self, io: &mut DeviceIo, numbers: &[u8]) {
        let mut run: Option<(u64, u64)> = None;
        for number in numbers.chunks_exact(4).filter_map(|n| n.try_into().ok()).map(u32::from_le_bytes).map(u64::from) {
            run = match run {
                Some((start, n)) if start + n == number => Some((start, n + 1)),
                Some(whole) => {
                    self.discard(io, whole);
                    Some((number, 1))
                }
                None => Some((number, 1)),
            };
        }
        run.into_iter().for_each(|whole| self.discard(io, whole));
    }

    fn discard(&self, io: &mut DeviceIo, (start, pages): (u64, u64)) {
        let len = usize::try_from(pages * PAGE).unwrap_or(usize::MAX);
        io.charge(Work::Calls(1));
        io.charge(Work::Discarded(len));
        match self.memory.segment(GuestAddress(start * PAGE), len) {
            Ok(segment) => self.memory.discard(segment),
            // The guest's mistake, which harms only itself.
            Err(error) => log::debug!("a balloon holds what is no memory: {error}"),
        }
    }

    /// Takes what the driver wants to be in the balloon.
    fn take_pages(&mut self, io: &mut DeviceIo, queue: usize) {
        while let Some(chain) = next(io, queue, &mut self.inflating) {
            if !self.inflate_or_keep(io, queue, chain) {
                break;
            }
        }
        io.flush(&[queue]);
        self.settle(io);
    }

    /// Takes a request's pages as far as the turn lasts. True when that is all of it.
    fn inflate_or_keep(&mut self, io: &mut DeviceIo, queue: usize, mut chain: Chain) -> bool {
        if let Err(why) = self.inflate(io, &mut chain) {
            io.fail(&why);
        } else if chain.readable_len() >= 4 {
            self.inflating = Some(chain);
            io.reschedule(queue);
            return false;
        }
        io.complete(queue, chain);
        true
    }

    /// Takes what the driver reports as free.
    fn take_reports(&mut self, io: &mut DeviceIo, queue: usize) {
        while let Some(chain) = next(io, queue, &mut self.reporting) {
            if !self.discard_or_keep(io, queue, chain) {
                break;
            }
        }
        io.flush(&[queue]);
    }

    /// Discards what a request reports as far as the turn lasts. True when that is all of it.
    fn discard_or_keep(&mut self, io: &mut DeviceIo, queue: usize, mut chain: Chain) -> bool {
        while chain.writable_len() > 0 && !io.turn_over() {
            let piece = chain.take_writable(DISCARD_AT_ONCE);
            for &segment in chain.writable(piece) {
                io.charge(Work::Calls(1));
                io.charge(Work::Discarded(segment.len()));
                self.reported += segment.len() as u64;
                self.memory.discard(segment);
            }
        }
        if chain.writable_len() > 0 {
            self.reporting = Some(chain);
            io.reschedule(queue);
            return false;
        }
        io.complete(queue, chain);
        true
    }

    /// Takes how the guest uses its memory.
    fn take_stats(&mut self, io: &mut DeviceIo, queue: usize) {
        while let Some(mut chain) = next(io, queue, &mut None) {
            let mut bytes = vec![0; chain.readable_len().min(1024)];
            if chain.read_into(&mut bytes).is_ok() {
                let stats = GuestMemoryStats::parse(&bytes);
                for answer in self.waiting.drain(..) {
                    // Who asked may have given up.
                    let _ = answer.try_send(stats);
                }
            }
            // One buffer is kept; a driver that sends another gets the first back.
            if let Some(old) = self.stats.replace(chain) {
                io.complete(queue, old);
            }
        }
        io.flush(&[queue]);
    }
}

/// The request that is half done, or the next one of the queue. `None` when the turn is over, or there is none.
fn next(io: &mut DeviceIo, queue: usize, half_done: &mut Option<Chain>) -> Option<Chain> {
    if let Some(chain) = half_done.take() {
        return Some(chain);
    }
    loop {
        match io.pop(queue) {
            None if io.rearm(queue) => {}
            popped => return popped,
        }
    }
}

impl VirtioDevice for Balloon {
    fn profile(&self) -> Profile {
        Profile::new(DeviceType::Balloon)
            .features(F_STATS | F_DEFLATE_ON_OOM | F_REPORTING)
            .queue(64)
            .queue(64)
            .queue(16)
            .queue(64)
            .config_space(self.config.clone())
    }

    fn start(&mut self, io: &mut DeviceIo, state: Option<&DeviceState>) -> std::io::Result<()> {
        match state {
            None => {}
            // No more than there is memory, whatever the state says.
            Some(DeviceState::Balloon(state)) => self.held = state.held.min(self.memory.size() / PAGE),
            Some(other) => return Err(other.mismatch()),
        }
        let optional = [(F_STATS, Role::Stats), (F_REPORTING, Role::Reporting)];
        self.roles = vec![Role::Inflate, Role::Deflate];
        self.roles.extend(optional.into_iter().filter(|(bit, _)| io.features() & bit != 0).map(|(_, role)| role));
        Ok(())
    }

    fn ready(&mut self, io: &mut DeviceIo, source: EventSource) {
        let EventSource::Queue(queue) = source else { return };
        match self.roles.get(queue).copied() {
            Some(Role::Inflate) => self.take_pages(io, queue),
            // What the guest takes back is there again as soon as it touches it.
            Some(Role::Deflate) => {
                io.for_each_request(queue, |chain| {
                    self.held = self.held.saturating_sub(chain.readable_len() as u64 / 4);
                    Work::Chain
                });
                self.settle(io);
            }
            Some(Role::Stats) => self.take_stats(io, queue),
            Some(Role::Reporting) => self.take_reports(io, queue),
            None => {}
        }
    }

    /// Ends requests that are half done, which would not be the same a second time.
    fn drain(&mut self, io: &mut DeviceIo, timeout: Duration, _: DrainCause) -> bool {
        let deadline = Instant::now() + timeout;
        let queue = |role| self.roles.iter().position(|it| *it == role).unwrap_or(usize::MAX);
        let (inflate, reporting) = (queue(Role::Inflate), queue(Role::Reporting));
        while self.inflating.is_some() || self.reporting.is_some() {
            if left(deadline).is_zero() {
                return false;
            }
            io.begin_turn();
            if let Some(chain) = self.inflating.take() {
                self.inflate_or_keep(io, inflate, chain);
            } else if let Some(chain) = self.reporting.take() {
                self.discard_or_keep(io, reporting, chain);
            }
        }
        io.flush(&[inflate, reporting]);
        self.settle(io);
        true
    }

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        let taken = [
            (Role::Stats, self.stats.take()),
            (Role::Inflate, self.inflating.take()),
            (Role::Reporting, self.reporting.take()),
        ];
        for (role, chain) in taken {
            if let (Some(chain), Some(queue)) = (chain, self.roles.iter().position(|it| *it == role)) {
                io.put_back(queue, chain);
            }
        }
        DeviceState::Balloon(BalloonState { held: self.held })
    }

    fn reset(&mut self) {
        self.waiting.clear();
        self.held = 0;
        self.config.set(ACTUAL, &[0; 4]);
    }
}

#[cfg(test)]
mod tests;
