//! The virtio-mmio transport (Virtio 1.3, 4.2): registers and one interrupt.
//!
//! Owned by the bus, used by vCPU threads under its own lock. Reads of registers are served from a page that is mapped
//! read-only into the guest, so they cause no exit. [`MmioRegisters`] alone writes to that page.

use crate::memory::IoQueue;
use crate::virtio::DeviceReporter;
use std::sync::Arc;

use super::state::TransportState;
use super::{ConfigView, DeviceHost, Interrupt, LoopDevice, Transport, TransportOps};
use crate::bus::BusDevice;
use crate::error::Result;
use crate::irq::IrqLine;
use crate::memory::GuestMemory;
use crate::sys::{EventFd, RegisterPage};
use crate::virtio::Profile;
use crate::virtio::io::Counters;

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
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
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
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt" (Virtio 1.3, 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// Not the legacy interface.
const VERSION: u32 = 2;
/// "COFF", for people who look.
const VENDOR: u32 = 0x4646_4f43;

/// "Used buffer notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 0).
const USED: u32 = 1;
/// "Configuration change notification" (Virtio 1.3, 4.2.2, InterruptStatus bit 1).
const CONFIG: u32 = 2;

/// The register where the driver kicks queue `n` by writing `n`, relative to the window.
pub(crate) const NOTIFY_OFFSET: u64 = reg::QUEUE_NOTIFY;

/// The page where a guest reads one device's registers, and the device's interrupt line. Clones are the same.
#[derive(Debug, Clone)]
struct MmioRegisters {
    page: RegisterPage,
    line: IrqLine,
}

impl MmioRegisters {
    fn store(&self, offset: u64, value: u32) {
        self.page.store(offset as usize, value);
    }

    /// Interrupts the driver unless all bits were set. When it acknowledges those, it looks at everything anyway.
    fn raise(&self, bits: u32) {
        if self.page.set(reg::INTERRUPT_STATUS as usize, bits) & bits != bits {
            self.line.pulse();
        }
    }

    /// The driver has seen these interrupts.
    fn acknowledge(&self, bits: u32) {
        self.page.clear(reg::INTERRUPT_STATUS as usize, bits);
    }

    /// Shows what does not change.
    fn show_constants(&self, profile: &Profile) {
        let device = profile.device_type as u32;
        for (at, value) in
            [(reg::MAGIC, MAGIC), (reg::VERSION, VERSION), (reg::DEVICE_ID, device), (reg::VENDOR_ID, VENDOR)]
        {
            self.store(at, value);
        }
        // "the length … reads as -1 if the region does not exist" (Virtio 1.3, 4.2.2.1); its base likewise.
        for at in (reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH).step_by(4) {
            self.store(at, u32::MAX);
        }
    }
}

impl TransportOps for MmioRegisters {
    fn signal_queue(&self, _: usize) {
        self.raise(USED);
    }

    fn signal_config(&self) {
        self.raise(CONFIG);
    }

    fn add_status(&self, bits: u32) {
        self.page.set(reg::STATUS as usize, bits);
    }

    fn reset(&self) {
        self.store(reg::INTERRUPT_STATUS, 0);
        self.store(reg::STATUS, 0);
    }

    fn pending(&self) -> u32 {
        self.page.load(reg::INTERRUPT_STATUS as usize)
    }

    fn set_pending(&self, pending: u32) {
        let pending = pending & (USED | CONFIG);
        self.page.set(reg::INTERRUPT_STATUS as usize, pending);
        if pending != 0 {
            self.line.pulse();
        }
    }

    fn raised(&self) -> u64 {
        self.line.raised()
    }
}

impl ConfigView for MmioRegisters {
    fn show_generation(&self, generation: u32) {
        self.store(reg::CONFIG_GENERATION, generation);
    }

    fn show(&self, bytes: &[u8]) {
        self.page.write(reg::CONFIG as usize, bytes);
    }
}

/// One device's registers.
pub(crate) struct MmioTransport<H = LoopDevice> {
    core: Transport<H>,
    registers: MmioRegisters,
    /// The device is gone, and its page may be another's.
    detached: bool,
}

impl<H: DeviceHost> MmioTransport<H> {
    /// Makes the registers of a device with this profile, which runs on `host`, raises `line` and reports by
    /// `reporter`.
    ///
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new(
        profile: Profile,
        memory: GuestMemory,
        host: H,
        page: RegisterPage,
        line: IrqLine,
        reporter: DeviceReporter,
    ) -> Result<Self> {
        let registers = MmioRegisters { page, line };
        registers.show_constants(&profile);
        profile.config.show_in(registers.clone());
        let core = Transport::new(profile, memory, host, Interrupt::new(registers.clone()), reporter)?;
        let transport = Self { core, registers, detached: false };
        transport.show_selected();
        Ok(transport)
    }

    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.core.interrupt
    }

    /// Returns what the hypervisor signals when the driver kicks; in the order of the queues.
    pub(crate) fn kicks(&self) -> &Arc<[EventFd]> {
        self.core.kicks()
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        self.core.counters()
    }

    /// Shows the registers that are about what the driver has selected.
    fn show_selected(&self) {
        let (max, ready) = self.core.selected_queue().map_or((0, 0), |(queue, max)| (max.into(), queue.ready.into()));
        let features = self.core.device_features();
        for (at, value) in [(reg::DEVICE_FEATURES, features), (reg::QUEUE_SIZE_MAX, max), (reg::QUEUE_READY, ready)] {
            self.registers.store(at, value);
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.core.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.core.driver_features_sel = value,
            reg::DRIVER_FEATURES => self.core.set_driver_features(value),
            reg::QUEUE_SEL => self.core.queue_sel = value,
            reg::QUEUE_NOTIFY => self.core.notify(value),
            reg::INTERRUPT_ACK => self.registers.acknowledge(value),
            reg::STATUS => self.core.write_status(value),
            _ => self.write_queue(offset, value),
        }
        if !matches!(offset, reg::QUEUE_NOTIFY | reg::INTERRUPT_ACK) {
            self.show_selected();
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.core.selected_queue_mut() else {
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

    /// Touches neither the register page nor the device any more: both may be others'. Returns what the device had in flight when its
    /// driver reset it, if the host still moves that.
    #[cfg_attr(not(any(test, feature = "internals")), allow(dead_code, reason = "so far tests alone detach devices"))]
    pub(crate) fn detach(&mut self) -> Option<IoQueue> {
        self.detached = true;
        self.core.take_unfinished_io()
    }

    /// Reads registers for the driver.
    pub(crate) fn read_register_bytes(&self, offset: u64, data: &mut [u8]) {
        self.registers.page.read(usize::try_from(offset).unwrap_or(usize::MAX), data);
    }

    /// Takes a write of the driver.
    pub(crate) fn write_register_bytes(&mut self, offset: u64, data: &[u8]) {
        // Registers are 32 bits wide and accessed so (Virtio 1.3, 4.2.2.2).
        if let Some(at) = offset.checked_sub(reg::CONFIG) {
            self.core.profile.config.write(usize::try_from(at).unwrap_or(usize::MAX), data);
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }

    /// Returns the state of registers and device, while the VM is paused.
    ///
    /// # Errors
    /// `TimedOut` when the device's thread is busy; `InvalidState` when it has ended, or when no pause has stopped the
    /// device.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    pub(crate) fn save(&self) -> Result<TransportState> {
        self.core.save()
    }

    /// Takes a state, as registers that no driver has used, and starts the device if it ran.
    ///
    /// # Errors
    /// `Incompatible` for a state of another version, `Corrupt` for one that makes no sense for this device. Otherwise as
    /// [`MmioTransport::save`].
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    pub(crate) fn restore(&mut self, state: &TransportState) -> Result<()> {
        let restored = self.core.restore(state);
        self.show_selected();
        restored
    }
}

impl<H: DeviceHost + Send> BusDevice for MmioTransport<H> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if self.detached {
            return data.fill(0xff);
        }
        self.read_register_bytes(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if !self.detached {
            self.write_register_bytes(offset, data);
        }
    }
}

#[cfg(test)]
mod tests;
