//! [`Reserve`]: the space that a disk leaves on the host's file system.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::backend::BlockBackend;
use crate::sys::Space;

/// What the host's file system keeps, whatever a guest writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) enum Reserve {
    /// All of it is the guest's.
    #[default]
    Nothing,
    /// A twentieth of the file system, but no more than [`MAX_DEFAULT_RESERVE`].
    Share,
    /// So many bytes.
    Bytes(u64),
}

/// What is kept at most unless the embedder asks for more.
const MAX_DEFAULT_RESERVE: u64 = 1 << 30;
/// What may be taken, by all disks of the file system, before the space that is left is looked at again.
const CHECK_AFTER: u64 = 64 << 20;
/// When it is looked at again at the latest: others take of it too.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// What files have at least of a file system at a time.
const BLOCK: u64 = 4096;
/// What a disk may take before what it has in flight is summed up again.
const SUM_AFTER: u64 = 4 << 20;

impl Reserve {
    fn kept(self, total: u64) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Share => (total / 20).min(MAX_DEFAULT_RESERVE),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// What this process knows of one file system, for all of its disks there.
#[derive(Debug, Default)]
struct Ledger {
    /// As of the last look, less what was taken since and what was in flight then.
    free: u64,
    total: u64,
    /// What may be taken before the next look.
    credit: u64,
    looked: Option<Instant>,
    /// Bytes that were taken and that the file system may not know of yet.
    under_way: u64,
}

/// By device number. Ledgers live as long as one of their disks.
static LEDGERS: Mutex<BTreeMap<u64, Weak<Mutex<Ledger>>>> = Mutex::new(BTreeMap::new());

fn ledger(device: u64) -> Arc<Mutex<Ledger>> {
    let mut all = LEDGERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = all.get(&device).and_then(Weak::upgrade) {
        return known;
    }
    all.retain(|_, ledger| ledger.strong_count() > 0);
    let new = Arc::default();
    all.insert(device, Arc::downgrade(&new));
    new
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    /// Takes `len` bytes without a look.
    fn take(&mut self, reserve: Reserve, len: u64, now: Instant) -> bool {
        let fresh = self.looked.is_some_and(|looked| now.saturating_duration_since(looked) < CHECK_INTERVAL);
        fresh && len <= self.credit && self.take_at_once(reserve, len)
    }

    fn take_at_once(&mut self, reserve: Reserve, len: u64) -> bool {
        let fits = len <= self.free.saturating_sub(reserve.kept(self.total));
        if fits {
            self.free -= len;
            self.credit = self.credit.saturating_sub(len);
        }
        fits
    }

    fn look(&mut self, space: Space, now: Instant) {
        self.free = space.free.saturating_sub(self.under_way);
        (self.total, self.credit, self.looked) = (space.total, CHECK_AFTER, Some(now));
    }
}

/// What the blocks have that a range touches.
fn whole_blocks(offset: u64, len: u64) -> u64 {
    offset.saturating_add(len).div_ceil(BLOCK).saturating_mul(BLOCK).saturating_sub(offset - offset % BLOCK)
}

/// One disk's part of its file system's room.
#[derive(Debug, Default)]
pub(super) struct Room {
    ledger: Option<Arc<Mutex<Ledger>>>,
    /// What of the ledger's `under_way` is this disk's.
    own: u64,
    /// What was taken since that was summed up.
    unsummed: u64,
}

impl Room {
    /// Takes room for a write, or fails with `ENOSPC`. `in_flight` says what is taken by writes that have not ended.
    pub(super) fn take(
        &mut self,
        reserve: Reserve,
        backend: &mut dyn BlockBackend,
        (offset, len): (u64, u64),
        in_flight: impl FnOnce() -> u64,
        now: Instant,
    ) -> io::Result<()> {
        if reserve == Reserve::Nothing {
            return Ok(());
        }
        let (place, len) = ((offset, len), whole_blocks(offset, len));
        if let Some(known) = &self.ledger {
            let mut ledger = lock(known);
            if self.unsummed < SUM_AFTER && ledger.take(reserve, len, now) {
                ledger.under_way += len;
                self.own += len;
                self.unsummed += len;
                return Ok(());
            }
        }
        let ledger = match &self.ledger {
            Some(known) => known.clone(),
            None => {
                let Some(space) = backend.space()? else { return Ok(()) };
                self.ledger.insert(ledger(space.device)).clone()
            }
        };
        let mut ledger = lock(&ledger);
        self.amount_to(&mut ledger, in_flight());
        let mut taken = len;
        if !ledger.take(reserve, len, now) {
            // While no other disk takes any: what was taken by then, the file system knows or is in flight.
            let Some(space) = backend.space()? else { return Ok(()) };
            ledger.look(space, now);
            if !ledger.take_at_once(reserve, len) {
                // What has its place already may be written over at any time.
                taken = backend.takes(place.0, place.1)?;
                if !ledger.take_at_once(reserve, taken) {
                    return Err(io::Error::from_raw_os_error(libc::ENOSPC));
                }
            }
        }
        ledger.under_way += taken;
        self.own += taken;
        self.unsummed += taken;
        Ok(())
    }

    /// Nothing of this disk is in flight any more.
    pub(super) fn rest(&mut self) {
        if self.own > 0
            && let Some(ledger) = self.ledger.clone()
        {
            self.amount_to(&mut lock(&ledger), 0);
        }
    }

    fn amount_to(&mut self, ledger: &mut Ledger, own: u64) {
        ledger.under_way = ledger.under_way.saturating_sub(self.own).saturating_add(own);
        (self.own, self.unsummed) = (own, 0);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.rest();
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::RawFd;

    use super::super::backend::{Extent, Geometry};
    use super::*;
    use crate::memory::{GuestMemory, Segment};

    const MIB: u64 = 1 << 20;

    /// A disk on a file system of which so much is free.
    #[derive(Debug, Clone)]
    struct MockBackend(Arc<Mutex<Space>>);

    impl MockBackend {
        fn new(device: u64, free: u64, total: u64) -> Self {
            Self(Arc::new(Mutex::new(Space { free, total, device })))
        }

        fn free(&self) -> u64 {
            self.0.lock().unwrap().free
        }

        fn wrote(&self, len: u64) {
            self.0.lock().unwrap().free -= len;
        }
    }

    impl BlockBackend for MockBackend {
        fn geometry(&self) -> Geometry {
            Geometry { len: 1 << 40, read_only: false, discard: 0 }
        }
        fn read(&mut self, _: &GuestMemory, _: &[Segment], _: u64) -> io::Result<()> {
            Ok(())
        }
        fn write(&mut self, _: &GuestMemory, _: &[Segment], _: u64) -> io::Result<()> {
            Ok(())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
            Ok(())
        }
        fn grow(&mut self, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn allocated(&self) -> io::Result<u64> {
            Ok(0)
        }
        fn extents(&mut self, _: bool, _: u64, _: u64, _: &mut Vec<Extent>) -> Option<io::Result<()>> {
            None
        }
        fn write_done(&mut self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
        fn sync_fd(&self) -> Option<RawFd> {
            None
        }
        fn space(&self) -> io::Result<Option<Space>> {
            Ok(Some(*self.0.lock().unwrap()))
        }
    }

    #[test]
    fn large_writes_are_admitted_while_space_is_left() {
        let mut disk = MockBackend::new(u64::MAX, 1 << 40, 1 << 40);
        let (mut room, now) = (Room::default(), Instant::now());
        for len in [4096, 128 * MIB, 128 * MIB, 4096, 1 << 38] {
            room.take(Reserve::Share, &mut disk, (0, len), || 0, now).unwrap();
            disk.wrote(len);
        }
        assert!(room.take(Reserve::Share, &mut disk, (0, 1 << 40), || 0, now).is_err());
    }

    #[test]
    fn reserve_is_shared_by_all_disks() {
        // What was taken arrives at once, late, or when nothing else fits.
        for delay in [0, 7, usize::MAX] {
            let mut disk = MockBackend::new(u64::MAX - 1, 3000 * MIB, 100 << 30);
            let now = Instant::now();
            let mut rooms: Vec<_> = (0..100).map(|_| (Room::default(), Vec::new())).collect();
            let mut taken = 0;
            for turn in 0..2000 {
                let (room, pending) = &mut rooms[turn % 100];
                let len = [4096, 65_536, MIB, 3 * MIB, 20 * MIB][turn % 5 * 7 % 5];
                let sum = pending.iter().sum();
                if room.take(Reserve::Share, &mut disk, (0, len), || sum, now).is_ok() {
                    taken += len;
                    pending.push(len);
                }
                if pending.len() > delay {
                    pending.drain(..).for_each(|len| disk.wrote(len));
                    room.rest();
                }
                assert!(3000 * MIB - taken >= MAX_DEFAULT_RESERVE, "{taken} with a delay of {delay}");
            }
            rooms.iter_mut().for_each(|(_, pending)| pending.drain(..).for_each(|len| disk.wrote(len)));
            assert!(
                disk.free() >= MAX_DEFAULT_RESERVE && disk.free() < MAX_DEFAULT_RESERVE + 40 * MIB,
                "{}",
                disk.free()
            );
        }
    }

    #[test]
    fn partial_blocks_are_charged_whole() {
        let spans =
            [(0, 512), (512, 512), (3584, 1024), (4096, 4096), (512, 8192)].map(|(at, len)| whole_blocks(at, len));
        assert_eq!(spans, [4096, 4096, 8192, 4096, 12_288]);
        let mut disk = MockBackend::new(u64::MAX - 3, 1001 * MIB, 100 << 30);
        let (mut room, now) = (Room::default(), Instant::now());
        let mut take = |n: u64| room.take(Reserve::Bytes(1000 * MIB), &mut disk, (n * BLOCK, 512), || n * BLOCK, now);
        assert_eq!((0..1000).filter(|n| take(*n).is_ok()).count(), 256);
    }

    #[test]
    fn external_space_use_is_seen_within_a_second() {
        let mut disk = MockBackend::new(u64::MAX - 2, 2000 * MIB, 100 << 30);
        let (mut room, now) = (Room::default(), Instant::now());
        let mut take = |disk: &mut MockBackend, after| {
            room.take(Reserve::Bytes(1000 * MIB), disk, (0, 4096), || 0, now + after).map_err(|e| e.raw_os_error())
        };
        take(&mut disk, Duration::ZERO).unwrap();
        disk.wrote(1000 * MIB);
        assert_eq!(take(&mut disk, CHECK_INTERVAL), Err(Some(libc::ENOSPC)));
    }
}
