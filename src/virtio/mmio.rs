//! The virtio-mmio transport (Virtio 1.3, 4.2): registers, feature negotiation, start and reset of one device.
//!
//! Owned by the bus, used by vCPU threads under its own lock. Reads of registers are served from a page that is mapped
//! read-only into the guest, so they cause no exit. The queues live on the device's event loop. A DRIVER_OK write
//! returns after that loop has started the device.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::io::{Counters, DeviceIo, OnNeedsReset};
use super::queue::{Queue, QueueConfig};
use super::spec::{F_EVENT_IDX, F_VERSION_1, TRANSPORT_FEATURES, status};
use super::turn::Turn;
use super::{Profile, Slots};
use crate::bus::BusDevice;
use crate::error::{Context, ErrorKind, Result};
use crate::event_loop::Remote;
use crate::irq::Interrupt;
use crate::memory::{GuestMemory, IoQueue};
use crate::rate::{Bucket, Rate};
use crate::sys::{EventFd, eventfd};

/// Register offsets (Virtio 1.3, 4.2.2).
mod reg {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt" (Virtio 1.3, 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// Not the legacy interface.
const VERSION: u32 = 2;
/// "COFF", for people who look.
const VENDOR: u32 = 0x4646_4f43;

/// How long a vCPU waits in all for a device that starts or stops. A device on a file that does not answer would never
/// do so. Only that vCPU waits. To pause or end the VM waits for this vCPU as long.
const START_STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Reports that a device needs a reset: ten at once, then one a second.
const REPORTS: Rate = Rate::per_second(1).one_time_burst(10);

/// The register where the driver kicks queue `n` by writing `n`, relative to the window.
pub(crate) const NOTIFY_OFFSET: u64 = reg::QUEUE_NOTIFY;

/// One device's registers.
pub(crate) struct MmioTransport {
    profile: Profile,
    memory: GuestMemory,
    devices: Remote<Slots>,
    slot: usize,
    interrupt: Interrupt,
    kicks: Arc<[EventFd]>,
    counters: Arc<Counters>,
    /// Called when a driver has made the device run.
    on_ready: Box<dyn Fn() + Send>,
    on_needs_reset: OnNeedsReset,

    /// What the device had in flight when it was reset, and the host has not ended yet. Its loop puts it here, so that it
    /// is kept when the reset has given up meanwhile.
    unfinished_io: Arc<Mutex<Option<IoQueue>>>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueConfig>,
}

impl MmioTransport {
    /// Registers for device `slot` of a loop, whose profile is `profile` and which raises `interrupt`.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new(
        profile: Profile,
        memory: GuestMemory,
        (devices, slot): (Remote<Slots>, usize),
        interrupt: Interrupt,
    ) -> Result<Self> {
        let kicks: Result<Vec<_>> =
            profile.queues.iter().map(|_| eventfd().doing(|| "creating a queue's kick")).collect();
        let transport = Self {
            queues: vec![QueueConfig::default(); profile.queues.len()],
            kicks: kicks?.into(),
            interrupt,
            counters: Arc::default(),
            on_ready: Box::new(|| ()),
            on_needs_reset: Arc::new(|_| ()),
            profile,
            memory,
            devices,
            slot,
            unfinished_io: Arc::default(),
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        };
        transport.show_constants();
        transport.show_selected();
        Ok(transport)
    }

    /// Tells `f`, on a vCPU's thread, whenever a driver has made the device run.
    pub(crate) fn on_ready(mut self, f: impl Fn() + Send + 'static) -> Self {
        self.on_ready = Box::new(f);
        self
    }

    /// Calls `f`, on a vCPU's thread or the device's loop, when a reset is needed. The log says so, too. Of a flood
    /// only some are reported: a driver that resets the device may break it again at once.
    pub(crate) fn on_needs_reset(mut self, f: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let (slot, epoch) = (self.slot, Instant::now());
        let reports = Mutex::new((Bucket::new(REPORTS, Duration::ZERO), 0u64));
        self.on_needs_reset = Arc::new(move |why| {
            let mut reports = reports.lock().unwrap_or_else(PoisonError::into_inner);
            let (bucket, suppressed) = &mut *reports;
            if !bucket.take_whole(epoch.elapsed()) {
                *suppressed += 1;
                return;
            }
            let suppressed = std::mem::take(suppressed);
            drop(reports);
            log::warn!("device {slot} needs a reset: {why} ({suppressed} times more before)");
            f(why);
        });
        self
    }

    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// What the hypervisor signals when the driver kicks; in the order of the queues.
    pub(crate) fn kicks(&self) -> &Arc<[EventFd]> {
        &self.kicks
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn offered(&self) -> u64 {
        self.profile.features | TRANSPORT_FEATURES
    }

    fn selected(&self) -> Option<(&QueueConfig, u16)> {
        let n = self.queue_sel as usize;
        Some((self.queues.get(n)?, *self.profile.queues.get(n)?))
    }

    /// What the driver finds in the registers that do not change before it writes there.
    fn show_constants(&self) {
        let registers = self.interrupt.registers();
        let device = self.profile.device_type as u32;
        for (at, value) in
            [(reg::MAGIC, MAGIC), (reg::VERSION, VERSION), (reg::DEVICE_ID, device), (reg::VENDOR_ID, VENDOR)]
        {
            registers.store(at as usize, value);
        }
        // "the length … reads as -1 if the region does not exist" (Virtio 1.3, 4.2.2.1); its base likewise.
        for at in (reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH).step_by(4) {
            registers.store(at as usize, u32::MAX);
        }
        self.profile.config.show_in(registers.clone());
    }

    /// What the driver finds in the registers that are about what it has selected.
    fn show_selected(&self) {
        let registers = self.interrupt.registers();
        let features = match self.device_features_sel {
            0 => self.offered() as u32,
            1 => (self.offered() >> 32) as u32,
            _ => 0,
        };
        let (max, ready) = self.selected().map_or((0, 0), |(queue, max)| (max.into(), queue.ready.into()));
        for (at, value) in [(reg::DEVICE_FEATURES, features), (reg::QUEUE_SIZE_MAX, max), (reg::QUEUE_READY, ready)] {
            registers.store(at as usize, value);
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES => self.write_features(value),
            reg::QUEUE_SEL => self.queue_sel = value,
            reg::QUEUE_NOTIFY => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    // A full counter is readable, which is all that is wanted.
                    let _ = kick.write(1);
                }
            }
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => self.write_status(value),
            _ => self.write_queue(offset, value),
        }
        if !matches!(offset, reg::QUEUE_NOTIFY | reg::INTERRUPT_ACK) {
            self.show_selected();
        }
    }

    /// Virtio 1.3, 2.2: features are accepted before FEATURES_OK and not after.
    fn write_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 || self.status & status::DRIVER == 0 {
            return;
        }
        let shift = match self.driver_features_sel {
            0 => 0,
            1 => 32,
            _ => return,
        };
        self.driver_features = self.driver_features & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        // A running device's queues are its loop's (Virtio 1.3, 4.2.3.2: set up before DRIVER_OK).
        if self.status & status::DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        if offset == reg::QUEUE_READY {
            queue.ready = value & 1 != 0;
            return;
        }
        if queue.ready {
            return;
        }
        let low = |old: u64| old & !u64::from(u32::MAX) | u64::from(value);
        let high = |old: u64| old & u64::from(u32::MAX) | u64::from(value) << 32;
        match offset {
            // Too large stays too large: it is refused when the queue is made.
            reg::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(u16::MAX),
            reg::QUEUE_DESC_LOW => queue.descriptors = low(queue.descriptors),
            reg::QUEUE_DESC_HIGH => queue.descriptors = high(queue.descriptors),
            reg::QUEUE_DRIVER_LOW => queue.available = low(queue.available),
            reg::QUEUE_DRIVER_HIGH => queue.available = high(queue.available),
            reg::QUEUE_DEVICE_LOW => queue.used = low(queue.used),
            reg::QUEUE_DEVICE_HIGH => queue.used = high(queue.used),
            _ => {}
        }
    }

    /// Virtio 1.3, 3.1.1: bits are added one after the other; 0 resets.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let added = value & !self.status;
        // Bits are never taken away but by a reset.
        if self.status & !value != 0 {
            return;
        }
        self.add_status(added & !(status::FEATURES_OK | status::DRIVER_OK | status::NEEDS_RESET));
        if added & status::FEATURES_OK != 0 && self.features_acceptable() {
            self.add_status(status::FEATURES_OK);
        }
        // A device that needs a reset is not started before it had one, however often the driver asks.
        let may_start = self.status & status::FEATURES_OK != 0 && !self.interrupt.needs_reset();
        if added & status::DRIVER_OK != 0 && may_start {
            match self.start() {
                Ok(true) => {
                    self.add_status(status::DRIVER_OK);
                    (self.on_ready)();
                }
                // The device needs a reset, and the driver was notified.
                Ok(false) => {}
                Err(error) => {
                    self.counters.driver_errors.fetch_add(1, Ordering::Relaxed);
                    (self.on_needs_reset)(&format!("it cannot start: {error}"));
                    self.interrupt.signal_needs_reset();
                }
            }
        }
    }

    fn add_status(&mut self, bits: u32) {
        self.status |= bits;
        self.interrupt.registers().set(reg::STATUS as usize, bits);
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0 && self.driver_features & F_VERSION_1 != 0
    }

    fn make_queues(&self) -> Result<Vec<Queue>, String> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let make = |(n, (config, max)): (usize, (&QueueConfig, &u16))| {
            let made = match config.ready {
                true => Queue::new(config, *max, event_idx, &self.memory),
                // Drivers leave out queues of features they do not use.
                false => Ok(Queue::unused(&self.memory)),
            };
            made.map_err(|e| format!("queue {n}: {e}"))
        };
        self.queues.iter().zip(&self.profile.queues).enumerate().map(make).collect()
    }

    /// Makes the queues and hands them to the device's loop; returns when the device runs, or false when it cannot.
    ///
    /// # Errors
    /// `TimedOut` when the loop is busy, `InvalidState` when it has ended.
    fn start(&mut self) -> Result<bool> {
        let (made, features) = (self.make_queues(), self.driver_features);
        let (kicks, interrupt) = (self.kicks.clone(), self.interrupt.clone());
        let (counters, slot, on_needs_reset) = (self.counters.clone(), self.slot, self.on_needs_reset.clone());
        self.devices.with_timeout(START_STOP_TIMEOUT, move |slots| {
            let sources = slots.sources();
            let io = |queues| DeviceIo {
                queues,
                kicks,
                interrupt,
                counters,
                features,
                sources,
                slot,
                on_needs_reset,
                pending_reset: None,
                unfinished_io: None,
                turn: Turn::default(),
            };
            match made {
                Ok(queues) => slots.start(slot, io(queues)),
                Err(why) => {
                    slots.refuse(slot, io(Vec::new()), &why);
                    false
                }
            }
        })
    }

    fn unfinished_io(&self) -> MutexGuard<'_, Option<IoQueue>> {
        self.unfinished_io.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset(&mut self) {
        let (slot, deadline) = (self.slot, Instant::now() + START_STOP_TIMEOUT);
        let unfinished = self.unfinished_io.clone();
        // The queues are let go: the driver will set up new ones.
        let stop = move |slots: &mut Slots| {
            if let Some(io_queue) = slots.stop(slot).and_then(|mut io| io.unfinished_io.take()) {
                *unfinished.lock().unwrap_or_else(PoisonError::into_inner) = Some(io_queue);
            }
        };
        match self.devices.with_timeout(START_STOP_TIMEOUT, stop) {
            // The device may still use its queues, so the driver does not see a status of 0 (Virtio 1.3, 2.4.2).
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                log::warn!("device {slot} was not reset: {error}");
                return;
            }
            Err(error) => log::debug!("device {slot} was reset after its loop had ended: {error}"),
            Ok(()) => {}
        }
        // This vCPU waits for it, and no other device.
        let timeout = deadline.saturating_duration_since(Instant::now());
        let unfinished = self.unfinished_io().take();
        if let Some(mut io_queue) = unfinished
            && !io_queue.stop(timeout)
        {
            *self.unfinished_io() = Some(io_queue);
            log::warn!("device {slot} was not reset: the host still moves bytes from or to guest memory");
            return;
        }
        self.interrupt.reset();
        self.status = 0;
        (self.device_features_sel, self.driver_features_sel, self.driver_features, self.queue_sel) = (0, 0, 0, 0);
        self.queues.fill(QueueConfig::default());
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.interrupt.registers().read(usize::try_from(offset).unwrap_or(usize::MAX), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // Registers are 32 bits wide and accessed so (Virtio 1.3, 4.2.2.2).
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            self.profile.config.write(usize::try_from(at).unwrap_or(usize::MAX), data);
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

#[cfg(test)]
mod tests;
