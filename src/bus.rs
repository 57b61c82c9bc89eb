//! The bus: which device answers at an address. One for memory-mapped I/O, one for ports.
//!
//! Each vCPU's thread has a [`BusView`], which costs an access one look at a number. A device is behind its own lock, held for
//! one access only.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, ErrorKind, Result};

/// What answers on a bus. Accesses are as the guest made them: any offset, 1 to 8 bytes.
pub(crate) trait BusDevice: Send {
    /// Fills all of `data`; what does not exist reads as zero.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`; what does not exist ignores it.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device, shared by all threads that may touch its registers.
pub(crate) type Attached = Arc<Mutex<dyn BusDevice>>;

#[derive(Clone)]
struct BusRange {
    start: u64,
    len: u64,
    device: Attached,
}

/// In the order of their addresses.
type Ranges = Vec<BusRange>;

/// Address ranges and the devices behind them. Devices come and go while vCPUs run.
#[derive(Default)]
pub(crate) struct Bus {
    ranges: Mutex<Arc<Ranges>>,
    /// Counts the changes.
    version: AtomicU64,
}

/// The bus as one thread sees it: no lock is taken but when devices have come or gone.
pub(crate) struct BusView<'a> {
    bus: &'a Bus,
    ranges: Arc<Ranges>,
    version: u64,
    /// Where the last access went, as the next one often does.
    last: usize,
}

impl Bus {
    /// Puts `device` at the addresses of `range`.
    ///
    /// # Errors
    /// `AlreadyExists` when the range touches another, `InvalidConfig` when it is empty.
    pub(crate) fn attach(&self, range: Range<u64>, device: Attached) -> Result<()> {
        if range.is_empty() {
            return Err(Error::new(ErrorKind::InvalidConfig, format!("bus range {range:#x?} is empty")));
        }
        let mut shared = self.ranges();
        let place = shared.partition_point(|taken| taken.start < range.end);
        let before = place.checked_sub(1).and_then(|before| shared.get(before));
        if let Some(taken) = before.filter(|taken| taken.start + taken.len > range.start) {
            let other = taken.start..taken.start + taken.len;
            return Err(Error::new(ErrorKind::AlreadyExists, format!("bus range {range:#x?} meets {other:#x?}")));
        }
        let mut ranges = Ranges::clone(&shared);
        ranges.insert(place, BusRange { start: range.start, len: range.end - range.start, device });
        self.publish(&mut shared, ranges);
        Ok(())
    }

    /// Takes the device away whose range begins at `start`; false when there is none. Accesses that have begun may still end
    /// there, and none begins afterwards.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub(crate) fn detach(&self, start: u64) -> bool {
        let mut shared = self.ranges();
        let mut ranges = Ranges::clone(&shared);
        ranges.retain(|range| range.start != start);
        let was_there = ranges.len() < shared.len();
        self.publish(&mut shared, ranges);
        was_there
    }

    fn publish(&self, shared: &mut Arc<Ranges>, ranges: Ranges) {
        *shared = Arc::new(ranges);
        // Behind the lock: who sees the number takes the lock to see the ranges.
        self.version.fetch_add(1, Ordering::Release);
    }

    fn ranges(&self) -> MutexGuard<'_, Arc<Ranges>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a view for one thread.
    pub(crate) fn view(&self) -> BusView<'_> {
        // The number before the ranges: those may be newer than it says, and are looked at again then.
        let version = self.version.load(Ordering::Acquire);
        BusView { bus: self, ranges: self.ranges().clone(), version, last: 0 }
    }
}

impl BusView<'_> {
    /// Devices have come or gone. Apart, as an access hardly ever meets it.
    #[cold]
    #[inline(never)]
    fn refresh(&mut self) {
        *self = self.bus.view();
    }

    fn find(&mut self, addr: u64) -> Option<(u64, &Attached)> {
        if self.bus.version.load(Ordering::Acquire) != self.version {
            self.refresh();
        }
        if self.ranges.get(self.last).is_none_or(|range| addr.wrapping_sub(range.start) >= range.len) {
            self.last = self.ranges.partition_point(|range| range.start <= addr).checked_sub(1)?;
        }
        let range = self.ranges.get(self.last)?;
        let offset = addr.wrapping_sub(range.start);
        (offset < range.len).then_some((offset, &range.device))
    }

    /// Reads for the guest. Where nothing answers all bits are set, as on real hardware. False: nothing answered.
    pub(crate) fn read(&mut self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr) {
            Some((offset, device)) => {
                data.fill(0);
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes for the guest. False: nothing answered, and nothing happened.
    pub(crate) fn write(&mut self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
                true
            }
            None => false,
        }
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ranges().iter().map(|range| range.start..range.start + range.len)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Echo {
        last: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.last = Some((offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_with_their_offset() {
        let (bus, echo) = (Bus::default(), Arc::new(Mutex::new(Echo::default())));
        bus.attach(0x1000..0x1010, echo.clone()).unwrap();
        let mut bus = bus.view();
        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(bus.write(0x100f, &[1]));
        assert_eq!(echo.lock().unwrap().last, Some((0xf, vec![1])));
    }

    #[test]
    fn unmapped_addresses_read_as_ones() {
        let bus = Bus::default();
        bus.attach(0x1000..0x1010, Arc::new(Mutex::new(Echo::default()))).unwrap();
        let mut bus = bus.view();
        for addr in [0, 0xfff, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data));
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn overlapping_bus_ranges_are_rejected() {
        let bus = Bus::default();
        let echo = || Arc::new(Mutex::new(Echo::default()));
        bus.attach(0x1000..0x1010, echo()).unwrap();
        for range in [0xfff..0x1001, 0x1000..0x1001, 0x100f..0x1010, 0x800..0x1800, 0..0] {
            assert!(bus.attach(range.clone(), echo()).is_err(), "{range:#x?}");
        }
        bus.attach(0x1010..0x1020, echo()).unwrap();
        bus.attach(0xff0..0x1000, echo()).unwrap();
    }

    #[test]
    fn views_see_devices_that_come_and_go() {
        let (bus, mut data) = (Bus::default(), [0; 1]);
        let mut views = [bus.view(), bus.view()];
        for _ in 0..3 {
            bus.attach(0x1000..0x1010, Arc::new(Mutex::new(Echo::default()))).unwrap();
            assert!(views.iter_mut().all(|view| view.read(0x1001, &mut data)) && data == [1]);
            assert!(!bus.detach(0x1001) && bus.detach(0x1000) && !bus.detach(0x1000));
            assert!(!views.iter_mut().any(|view| view.write(0x1001, &[1])));
        }
    }

    #[test]
    fn accesses_go_on_while_devices_come_and_go() {
        let bus = Bus::default();
        bus.attach(0..0x10, Arc::new(Mutex::new(Echo::default()))).unwrap();
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut view, mut data) = (bus.view(), [0; 1]);
                let (mut seen, begin) = ([false; 2], std::time::Instant::now());
                while seen != [true; 2] && begin.elapsed().as_secs() < 60 {
                    // This one is always there, and the other never answers wrongly.
                    assert!(view.read(0x7, &mut data) && data == [7]);
                    let there = view.read(0x1009, &mut data);
                    assert_eq!(data, if there { [9] } else { [0xff] });
                    seen[usize::from(there)] = true;
                }
                assert_eq!(seen, [true; 2]);
            });
            while !reader.is_finished() {
                bus.attach(0x1000..0x1010, Arc::new(Mutex::new(Echo::default()))).unwrap();
                assert!(bus.detach(0x1000));
            }
        });
    }
}
