//! Memory balloon (Virtio 1.3, 5.5): memory that the guest does not use goes back to the host.
//!
//! Runs on the VM's loop. Three ways: the guest reports what it freed, without being asked (free page reporting); the
//! embedder inflates the balloon; and the guest says how it is using its memory. What it gives is discarded at once.

use std::sync::mpsc::SyncSender;

use super::config_space::ConfigSpace;
use super::{Chain, DeviceIo, DeviceType, Profile, Source, VirtioDevice, Work};
use crate::memory::{GuestAddress, GuestMemory};
use crate::size::Size;

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
pub struct GuestMemoryUse {
    /// Used by nobody.
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

impl GuestMemoryUse {
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

/// What a queue is for. Which there are depends on the features, and they are numbered without gaps, as Linux and every
/// device it meets do; the specification numbers them with gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// Told how many bytes the balloon holds.
pub(crate) type OnSettled = Box<dyn Fn(u64) + Send>;

/// The device.
pub(crate) struct Balloon {
    memory: GuestMemory,
    /// Called when the balloon has become what was asked for, and when the guest makes it less than that.
    on_settled: OnSettled,
    /// Pages that went in, less those that came out.
    held: u64,
    settled: bool,
    config: ConfigSpace,
    roles: Vec<Role>,
    /// The driver's buffer for statistics: it fills in new ones when it gets the buffer back.
    stats: Option<Chain>,
    waiting: Vec<SyncSender<GuestMemoryUse>>,
    /// Requests that take more than a turn: to inflate, and of free memory.
    inflating: Option<Chain>,
    reporting: Option<Chain>,
    /// Bytes that the guest has reported as free so far.
    reported: u64,
}

impl Balloon {
    pub(crate) fn new(memory: GuestMemory, on_settled: OnSettled) -> Self {
        let config = ConfigSpace::new([0; 8]).writable(ACTUAL..ACTUAL + 4);
        Self {
            memory,
            on_settled,
            held: 0,
            settled: true,
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

    /// Bytes that the guest has reported as free so far.
    pub(crate) fn reported(&self) -> u64 {
        self.reported
    }

    /// Asks the guest how it uses its memory; the answer goes to `answer`, which is dropped when there will be none.
    pub(crate) fn ask(&mut self, io: Option<&mut DeviceIo>, answer: SyncSender<GuestMemoryUse>) {
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
    fn settle(&mut self) {
        let settled = self.held == u64::from(self.config.word(TARGET));
        if std::mem::replace(&mut self.settled, settled) != settled {
            (self.on_settled)(self.held * PAGE);
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
            // The guest's mistake, which harms nobody.
            Err(error) => log::debug!("a balloon holds what is no memory: {error}"),
        }
    }

    /// Takes what the driver wants to be in the balloon.
    fn take_pages(&mut self, io: &mut DeviceIo, queue: usize) {
        while let Some(mut chain) = next(io, queue, &mut self.inflating) {
            if let Err(why) = self.inflate(io, &mut chain) {
                io.fail(&why);
            } else if chain.readable_len() >= 4 {
                self.inflating = Some(chain);
                io.kick_self(queue);
                break;
            }
            io.complete(queue, chain);
        }
        io.flush(&[queue]);
        self.settle();
    }

    /// Takes what the driver reports as free.
    fn take_reports(&mut self, io: &mut DeviceIo, queue: usize) {
        while let Some(mut chain) = next(io, queue, &mut self.reporting) {
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
                io.kick_self(queue);
                break;
            }
            io.complete(queue, chain);
        }
        io.flush(&[queue]);
    }

    /// Takes how the guest uses its memory.
    fn take_stats(&mut self, io: &mut DeviceIo, queue: usize) {
        while let Some(mut chain) = next(io, queue, &mut None) {
            let mut bytes = vec![0; chain.readable_len().min(1024)];
            if chain.read_into(&mut bytes).is_ok() {
                let told = GuestMemoryUse::parse(&bytes);
                for answer in self.waiting.drain(..) {
                    // Who asked may have given up.
                    let _ = answer.try_send(told);
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

    fn started(&mut self, io: &mut DeviceIo) -> std::io::Result<()> {
        let optional = [(F_STATS, Role::Stats), (F_REPORTING, Role::Reporting)];
        self.roles = vec![Role::Inflate, Role::Deflate];
        self.roles.extend(optional.into_iter().filter(|(bit, _)| io.features() & bit != 0).map(|(_, role)| role));
        Ok(())
    }

    fn ready(&mut self, io: &mut DeviceIo, source: Source) {
        let Source::Queue(queue) = source else { return };
        match self.roles.get(queue).copied() {
            Some(Role::Inflate) => self.take_pages(io, queue),
            // What the guest takes back is there again as soon as it touches it.
            Some(Role::Deflate) => {
                io.drain(queue, |chain| {
                    self.held = self.held.saturating_sub(chain.readable_len() as u64 / 4);
                    Work::Chain
                });
                self.settle();
            }
            Some(Role::Stats) => self.take_stats(io, queue),
            Some(Role::Reporting) => self.take_reports(io, queue),
            None => {}
        }
    }

    fn stopping(&mut self, _: &mut DeviceIo) {
        (self.stats, self.inflating, self.reporting) = (None, None, None);
        self.waiting.clear();
        self.held = 0;
        self.config.set(ACTUAL, &[0; 4]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, WRITE};
    use crate::virtio::turn::{MAX_PIECE, MAX_TURN};
    use std::sync::mpsc;

    const INFLATE: usize = 0;
    const DEFLATE: usize = 1;
    const STATS: usize = 2;
    const REPORTING: usize = 3;

    fn rig() -> Driver<Balloon> {
        Driver::start_with(|memory| Balloon::new(memory.clone(), Box::new(|_| ())))
    }

    fn byte(memory: &GuestMemory, at: u64) -> u8 {
        let mut byte = [0];
        memory.read(GuestAddress(at), &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn inflated_pages_are_discarded_and_others_are_not() {
        let mut driver = rig();
        let memory = driver.memory();
        let pages = [0x400u32, 0x401, 0x403, 0xffff_ffff];
        (0x400..0x405).for_each(|page| memory.write(GuestAddress(page * PAGE), &[7]).unwrap());
        let numbers: Vec<u8> = pages.iter().flat_map(|n| n.to_le_bytes()).collect();
        driver.send(INFLATE, &[&numbers[..6], &numbers[6..]], &[]);
        driver.poke(INFLATE);
        assert!(driver.receive(INFLATE).is_some());
        let left: Vec<u8> = (0x400..0x405).map(|page| byte(&memory, page * PAGE)).collect();
        assert_eq!(left, [0, 0, 7, 0, 7]);
    }

    #[test]
    fn who_asked_is_told_when_it_is_done_and_when_the_guest_takes_some_back() {
        let (tell, told) = mpsc::channel();
        let mut driver =
            Driver::start_with(|memory| Balloon::new(memory.clone(), Box::new(move |held| tell.send(held).unwrap())));
        let (device, io) = driver.parts();
        device.set_target(3 * PAGE, Some(io));
        for (queue, pages) in [(INFLATE, 2), (INFLATE, 1), (DEFLATE, 1), (DEFLATE, 1)] {
            driver.send(queue, &[&vec![0; pages * 4]], &[]);
            driver.poke(queue);
        }
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [3 * PAGE, 2 * PAGE]);
    }

    #[test]
    fn absurd_requests_need_a_reset() {
        let mut driver = rig();
        driver.send(INFLATE, &[&vec![0; (MAX_PAGES + 1) * 4]], &[]);
        driver.poke(INFLATE);
        assert!(driver.broken());
    }

    #[test]
    fn reported_memory_is_discarded_and_counted() {
        let mut driver = rig();
        let memory = driver.memory();
        let (free, written) = (0x40_0000, 0x40_3000);
        memory.write(GuestAddress(written), &[7]).unwrap();
        driver.send_raw(REPORTING, &[(free, 16 * PAGE as u32, WRITE)]);
        driver.poke(REPORTING);
        assert!(driver.receive(REPORTING).is_some());
        assert_eq!((byte(&memory, written), driver.device.reported()), (0, 16 * PAGE));
    }

    fn bounded(driver: &Driver<Balloon>) {
        assert!(driver.most_work() <= MAX_TURN + MAX_PIECE, "{}", driver.most_work());
    }

    #[test]
    fn reports_take_as_many_turns_as_they_need() {
        let mut driver = rig();
        // Tables of as many single pages as a chain may have.
        let memory = driver.memory();
        for n in 0..64u64 {
            let next = u16::from(n < 63);
            let rest = [[WRITE | next, n as u16 + 1]].map(|[a, b]| u32::from(a) | u32::from(b) << 16);
            let bytes = [0x80_0000 + 2 * PAGE * n, u64::from(rest[0]) << 32 | PAGE].map(u64::to_le_bytes).concat();
            memory.write(GuestAddress(0x100_0000 + 16 * n), &bytes).unwrap();
        }
        let (mut turns, mut back) = (0, 0);
        while back < 1000 {
            while driver.send_raw(REPORTING, &[(0x100_0000, 64 * 16, 4)]) {}
            driver.poke(REPORTING);
            turns += 1;
            while driver.receive(REPORTING).is_some() {
                back += 1;
            }
        }
        assert_eq!(driver.device.reported() / (64 * PAGE), back);
        assert!(turns > 30, "{turns}");
        bounded(&driver);
        // A table of more is no chain of this queue.
        driver.send_raw(REPORTING, &[(0x100_0000, 65 * 16, 4)]);
        memory.write(GuestAddress(0x100_0000 + 16 * 63 + 12), &[3, 0, 64, 0]).unwrap();
        driver.poke(REPORTING);
        assert!(driver.broken());
    }

    #[test]
    fn one_large_report_is_given_back_in_pieces() {
        let mut driver = rig();
        for _ in 0..64 {
            assert!(driver.send_raw(REPORTING, &[(0x40_0000, 24 << 20, WRITE)]));
        }
        let (mut turns, mut back) = (0, 0);
        while back < 64 {
            driver.poke(REPORTING);
            turns += 1;
            while driver.collect(REPORTING).is_some() {
                back += 1;
            }
        }
        assert_eq!((driver.device.reported(), turns > 10), (64 * (24 << 20), true));
        bounded(&driver);
    }

    #[test]
    fn scattered_pages_take_as_many_turns_as_they_need() {
        let mut driver = rig();
        let numbers: Vec<u8> = (0..MAX_PAGES as u32).flat_map(|n| (0x400 + 2 * (n % 512)).to_le_bytes()).collect();
        (0..64).for_each(|_| assert!(driver.send(INFLATE, &[&numbers], &[])));
        let (mut turns, mut back) = (0, 0);
        while back < 64 {
            driver.poke(INFLATE);
            turns += 1;
            while driver.receive(INFLATE).is_some() {
                back += 1;
            }
        }
        assert!(turns > 64, "{turns}");
        bounded(&driver);
    }

    #[test]
    fn statistics_that_are_offered_again_and_again_end_the_turn() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let mut driver = rig();
        let memory = driver.memory();
        driver.send(STATS, &[&[0; 10]], &[]);
        // A driver on another processor that offers its buffer as soon as it comes back, for ever.
        let ring = 0x10_0000 + STATS as u64 * 0x1_0000;
        (0..16).for_each(|n| memory.write(GuestAddress(ring + 0x8004 + 2 * n), &[15, 0]).unwrap());
        let stop = std::sync::Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let guest = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                let mut used = [0; 2];
                memory.read(GuestAddress(ring + 0xc002), &mut used).unwrap();
                let next = u16::from_le_bytes(used).wrapping_add(15);
                memory.write(GuestAddress(ring + 0x8002), &next.to_le_bytes()).unwrap();
            }
        });
        (0..50).for_each(|_| driver.poke(STATS));
        stop.store(true, Ordering::Relaxed);
        guest.join().unwrap();
        bounded(&driver);
    }

    #[test]
    fn statistics_are_asked_for_and_come_back() {
        let mut driver = rig();
        let (answer, told) = mpsc::sync_channel(1);
        let ask = |driver: &mut Driver<Balloon>| {
            let (device, io) = driver.parts();
            device.ask(Some(io), answer.clone());
        };
        ask(&mut driver);
        assert!(told.try_recv().is_err(), "the driver has not sent its buffer yet");
        let entry = |tag: u16, value: u64| [tag.to_le_bytes().as_slice(), &value.to_le_bytes()].concat();
        driver.send(STATS, &[&entry(9, 1)], &[]);
        driver.poke(STATS);
        ask(&mut driver);
        assert!(driver.receive(STATS).is_some(), "the buffer comes back to be filled");
        driver.send(STATS, &[&[entry(4, 1 << 20), entry(5, 1 << 30), vec![1]].concat()], &[]);
        driver.poke(STATS);
        let expected =
            GuestMemoryUse { free: Some(Size::mib(1)), total: Some(Size::gib(1)), ..GuestMemoryUse::default() };
        assert_eq!(told.try_recv(), Ok(expected));
    }
}
