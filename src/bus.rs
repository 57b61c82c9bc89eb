//! The bus: which device answers at an address. One for memory-mapped I/O, one for ports.
//!
//! Used by vCPU threads. A device is behind its own lock, held for one access only.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

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

struct BusRange {
    len: u64,
    device: Attached,
}

/// Address ranges and the devices behind them; fixed once the VM runs.
#[derive(Default)]
pub(crate) struct Bus {
    ranges: BTreeMap<u64, BusRange>,
}

impl Bus {
    /// Puts `device` at the addresses of `range`.
    ///
    /// # Errors
    /// `AlreadyExists` when the range touches another, `InvalidConfig` when it is empty.
    pub(crate) fn attach(&mut self, range: Range<u64>, device: Attached) -> Result<()> {
        if range.is_empty() {
            return Err(Error::new(ErrorKind::InvalidConfig, format!("bus range {range:#x?} is empty")));
        }
        let before = self.ranges.range(..range.end).next_back();
        if let Some((start, taken)) = before.filter(|(start, taken)| *start + taken.len > range.start) {
            let other = *start..*start + taken.len;
            return Err(Error::new(ErrorKind::AlreadyExists, format!("bus range {range:#x?} meets {other:#x?}")));
        }
        self.ranges.insert(range.start, BusRange { len: range.end - range.start, device });
        Ok(())
    }

    fn find(&self, addr: u64) -> Option<(u64, &Attached)> {
        let (base, range) = self.ranges.range(..=addr).next_back()?;
        let offset = addr - base;
        (offset < range.len).then_some((offset, &range.device))
    }

    /// Reads for the guest. Where nothing answers all bits are set, as on real hardware. False: nothing answered.
    pub(crate) fn read(&self, addr: u64, data: &mut [u8]) -> bool {
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
    pub(crate) fn write(&self, addr: u64, data: &[u8]) -> bool {
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
        f.debug_list().entries(self.ranges.iter().map(|(base, range)| *base..base + range.len)).finish()
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
        let (mut bus, echo) = (Bus::default(), Arc::new(Mutex::new(Echo::default())));
        bus.attach(0x1000..0x1010, echo.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(bus.write(0x100f, &[1]));
        assert_eq!(echo.lock().unwrap().last, Some((0xf, vec![1])));
    }

    #[test]
    fn unmapped_addresses_read_as_ones() {
        let mut bus = Bus::default();
        bus.attach(0x1000..0x1010, Arc::new(Mutex::new(Echo::default()))).unwrap();
        for addr in [0, 0xfff, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data));
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(addr, &data));
        }
    }

    #[test]
    fn overlapping_bus_ranges_are_rejected() {
        let mut bus = Bus::default();
        let echo = || Arc::new(Mutex::new(Echo::default()));
        bus.attach(0x1000..0x1010, echo()).unwrap();
        for range in [0xfff..0x1001, 0x1000..0x1001, 0x100f..0x1010, 0x800..0x1800, 0..0] {
            assert!(bus.attach(range.clone(), echo()).is_err(), "{range:#x?}");
        }
        bus.attach(0x1010..0x1020, echo()).unwrap();
        bus.attach(0xff0..0x1000, echo()).unwrap();
    }
}
