//! [`Driver`]: plays the guest's driver on real guest memory. The only fake, for tests, fuzzing and benches.
//!
//! It sets the device up by the registers of the real transport. Everything happens on the calling thread: the device is
//! a plain value, `dispatch` is a plain call.

use super::KeptEvents;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::io::DeviceIo;
use super::runner::look;
use super::spec::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use super::transport::{DeviceHost, DeviceSetup, StoppedDevice, UnfinishedIo};
use super::{EventSource, MmioTransport, VirtioDevice};
use crate::error::Result;
use crate::event_loop::Sources;
use crate::irq::IrqLine;
use crate::memory::{GuestAddress, GuestMemory};
use crate::sys::{RegisterPage, eventfd};

/// Ring addresses of queue `n`: one 64 KiB block each.
const RINGS: u64 = 0x10_0000;
const BLOCK: u64 = 0x1_0000;
/// Buffers are taken from here on, round and round.
const BUFFERS: u64 = 0x20_0000;
const MEMORY: u64 = 0x200_0000;

/// A descriptor flag: there is a next one (Virtio 1.3, 2.7.5).
pub(crate) const NEXT: u16 = 1;
/// A descriptor flag: the device writes.
pub(crate) const WRITE: u16 = 2;

/// A descriptor flag: it leads to a table of descriptors.
const INDIRECT: u16 = 4;

/// The device's thread, which is the driver's: what the transport asks for is done by [`Driver`].
#[derive(Clone, Default)]
struct SameThread(Rc<RefCell<Asked>>);

#[derive(Default)]
struct Asked {
    setup: Option<DeviceSetup>,
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    stopped: Option<StoppedDevice>,
}

impl DeviceHost for SameThread {
    fn start(&self, setup: DeviceSetup) -> Result<bool> {
        let makes_sense = setup.queues.is_ok();
        self.0.borrow_mut().setup = Some(setup);
        Ok(makes_sense)
    }

    fn reset(&self, _: UnfinishedIo) -> Result<()> {
        Ok(())
    }

    fn save(&self) -> Result<Option<StoppedDevice>> {
        Ok(self.0.borrow().stopped.clone())
    }
}

/// What a driver uses of the transport's features.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RingFeatures {
    /// Chains of more than one descriptor are in tables of their own.
    pub indirect: bool,
    /// Notifications are asked for by ring index.
    pub event_idx: bool,
}

/// A chain that the device has: its head, all its descriptors, and its writable buffers.
type Flight = (u16, Vec<u16>, Vec<(u64, usize)>);

struct DriverRing {
    size: u16,
    base: u64,
    /// Free descriptors.
    free: Vec<u16>,
    available: u16,
    used: u16,
    /// Chains in flight, by head: all their descriptors, and the writable buffers.
    flight: Vec<Flight>,
}

/// A driver with its memory, and the device it drives.
pub(crate) struct Driver<D> {
    /// The device, to look into.
    pub(crate) device: D,
    io: DeviceIo,
    #[cfg_attr(not(test), allow(dead_code, reason = "benches and fuzzing do without what happens after the start"))]
    transport: MmioTransport<SameThread>,
    #[cfg_attr(not(test), allow(dead_code, reason = "so far tests alone save a device"))]
    host: SameThread,
    #[cfg_attr(not(test), allow(dead_code, reason = "benches and fuzzing look at no events"))]
    events: Arc<KeptEvents>,
    ring_features: RingFeatures,
    memory: GuestMemory,
    rings: Vec<DriverRing>,
    next_buffer: u64,
    /// Interrupts that were asked about.
    #[cfg(test)]
    seen_interrupts: u64,
}

impl<D> std::fmt::Debug for Driver<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

#[allow(clippy::unwrap_used, reason = "test support: a failure here is the test's")]
impl<D: VirtioDevice> Driver<D> {
    /// Sets up all queues at their largest size and starts the device.
    pub(crate) fn start(device: D) -> Self {
        Self::start_with(|_| device)
    }

    /// The same for a device that is made with the guest's memory.
    pub(crate) fn start_with(make: impl FnOnce(&GuestMemory) -> D) -> Self {
        Self::start_using(RingFeatures::default(), make)
    }

    /// The same for a driver that uses these features.
    pub(crate) fn start_using(ring_features: RingFeatures, make: impl FnOnce(&GuestMemory) -> D) -> Self {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), MEMORY)]).unwrap();
        let device = make(&memory);
        let profile = device.profile();
        let (host, mut transport, events) = Self::transport(&device, &memory);
        let mut set = |at: u64, value: u32| transport.write_register_bytes(at, &value.to_le_bytes());
        let mut features = profile.features | F_VERSION_1;
        features |= if ring_features.indirect { F_INDIRECT_DESC } else { 0 };
        features |= if ring_features.event_idx { F_EVENT_IDX } else { 0 };
        // ACKNOWLEDGE, DRIVER, features, FEATURES_OK (Virtio 1.3, 3.1.1).
        let steps =
            [(0x70, 1), (0x70, 3), (0x24, 0), (0x20, features as u32), (0x24, 1), (0x20, (features >> 32) as u32)];
        steps.into_iter().chain([(0x70, 11)]).for_each(|(at, value)| set(at, value));
        let mut rings = Vec::new();
        for (n, size) in (0..).zip(&profile.queues) {
            let base = RINGS + u64::from(n) * BLOCK;
            let addresses = [(0x80, base), (0x90, base + 0x8000), (0xa0, base + 0xc000)];
            set(0x30, n);
            set(0x38, (*size).into());
            addresses.into_iter().for_each(|(at, address)| set(at, address as u32));
            set(0x44, 1);
            rings.push(DriverRing {
                size: *size,
                base,
                free: (0..*size).rev().collect(),
                available: 0,
                used: 0,
                flight: vec![],
            });
        }
        set(0x70, 15);
        #[cfg(test)]
        assert!(matches!(events.drain()[..], [super::DeviceEvent::DriverReady]));
        let (mut device, mut io) = (device, Self::started(&host));
        device.start(&mut io, None).unwrap();
        Self {
            device,
            io,
            transport,
            host,
            events,
            ring_features,
            memory,
            rings,
            next_buffer: BUFFERS,
            #[cfg(test)]
            seen_interrupts: 0,
        }
    }

    fn transport(device: &D, memory: &GuestMemory) -> (SameThread, MmioTransport<SameThread>, Arc<KeptEvents>) {
        let host = SameThread::default();
        // A system call, as where it leads to a guest.
        let edge = eventfd().unwrap();
        let line = IrqLine::new(move || edge.write(1).unwrap());
        let page = RegisterPage::alone().unwrap();
        let (reporter, events) = KeptEvents::reporter();
        let transport =
            MmioTransport::new(device.profile(), memory.clone(), host.clone(), page, line, reporter).unwrap();
        (host, transport, events)
    }

    /// What the transport has made for the device.
    fn started(host: &SameThread) -> DeviceIo {
        let setup = host.0.borrow_mut().setup.take().unwrap();
        let (io, state) = DeviceIo::new(setup, Sources::detached().unwrap(), 0);
        state.unwrap();
        io
    }

    /// The guest's memory.
    pub(crate) fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    fn buffer(&mut self, len: usize) -> u64 {
        if self.next_buffer + len as u64 > MEMORY {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += len as u64;
        at
    }

    /// Writes a chain into these places of a table.
    fn write_chain(&self, table: u64, places: &[u16], pieces: &[(u64, u32, u16)]) {
        for (i, ((addr, len, flags), n)) in pieces.iter().zip(places).enumerate() {
            let next = places.get(i + 1);
            let flags = flags | next.map_or(0, |_| NEXT);
            self.write_descriptor(table, *n, *addr, *len, flags, next.copied().unwrap_or(0));
        }
    }

    fn write_descriptor(&self, table: u64, n: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend_from_slice(&addr.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.memory.write(GuestAddress(table + 16 * u64::from(n)), &bytes).unwrap();
    }

    /// Puts a chain into `queue`: one descriptor for each piece to be read, then one for each to be written.
    /// False when the queue has no room.
    pub(crate) fn send(&mut self, queue: usize, readable: &[&[u8]], writable: &[usize]) -> bool {
        let mut pieces = Vec::new();
        for bytes in readable {
            let at = self.buffer(bytes.len());
            self.memory.write(GuestAddress(at), bytes).unwrap();
            pieces.push((at, bytes.len() as u32, 0));
        }
        for len in writable {
            pieces.push((self.buffer(*len), *len as u32, WRITE));
        }
        self.send_raw(queue, &pieces)
    }

    /// Puts a chain of these addresses, lengths and flags into `queue`, whatever they are.
    pub(crate) fn send_raw(&mut self, queue: usize, pieces: &[(u64, u32, u16)]) -> bool {
        let table = self.ring_features.indirect && pieces.len() > 1;
        let ring = self.rings.get_mut(queue).unwrap();
        let needed = if table { 1 } else { pieces.len() };
        if ring.free.len() < needed || pieces.is_empty() {
            return false;
        }
        let taken: Vec<u16> = (0..needed).map(|_| ring.free.pop().unwrap()).collect();
        let (head, base) = (*taken.first().unwrap(), ring.base);
        if table {
            let (at, places) = (self.buffer(16 * pieces.len()), (0..pieces.len() as u16).collect::<Vec<_>>());
            self.write_chain(at, &places, pieces);
            self.write_descriptor(base, head, at, 16 * pieces.len() as u32, INDIRECT, 0);
        } else {
            self.write_chain(base, &taken, pieces);
        }
        let writable = pieces.iter().filter(|p| p.2 & WRITE != 0).map(|p| (p.0, p.1 as usize)).collect();
        let memory = self.memory.clone();
        let ring = self.rings.get_mut(queue).unwrap();
        ring.flight.push((head, taken, writable));
        let available = ring.base + 0x8000;
        let at = available + 4 + 2 * u64::from(ring.available % ring.size);
        memory.write(GuestAddress(at), &head.to_le_bytes()).unwrap();
        ring.available = ring.available.wrapping_add(1);
        memory.write(GuestAddress(available + 2), &ring.available.to_le_bytes()).unwrap();
        true
    }

    /// Says that so many more chains are in `queue`, whatever its ring holds.
    #[cfg(test)]
    pub(crate) fn claim(&mut self, queue: usize, chains: u16) {
        let ring = self.rings.get_mut(queue).unwrap();
        ring.available = ring.available.wrapping_add(chains);
        self.memory.write(GuestAddress(ring.base + 0x8002), &ring.available.to_le_bytes()).unwrap();
    }

    /// As if the driver had accepted these features only.
    #[cfg(test)]
    pub(crate) fn set_features(&mut self, features: u64) {
        self.io.features = features;
    }

    /// Makes the device look at `queue`.
    pub(crate) fn dispatch(&mut self, queue: usize) {
        self.io.reschedule(queue);
        look(&mut self.device, &mut self.io, EventSource::Queue(queue));
    }

    /// Makes the device look at its descriptor `number`.
    pub(crate) fn dispatch_watched(&mut self, number: u32) {
        let events = crate::event_loop::Interest::IN | crate::event_loop::Interest::OUT;
        look(&mut self.device, &mut self.io, EventSource::Watched { number, events });
    }

    /// Takes what the device has reported since it was ready, or since this was last called.
    #[cfg(test)]
    pub(crate) fn take_events(&self) -> Vec<super::DeviceEvent> {
        self.events.drain()
    }

    /// The device and what it is given, for calls that its handle would make.
    pub(crate) fn parts(&mut self) -> (&mut D, &mut DeviceIo) {
        self.io.turn.begin();
        (&mut self.device, &mut self.io)
    }

    /// The next completed chain of `queue`: the bytes of its writable part, and how many of them the device claims.
    pub(crate) fn receive(&mut self, queue: usize) -> Option<(Vec<u8>, u32)> {
        let (writable, written) = self.collect(queue)?;
        let mut bytes = Vec::new();
        for (addr, len) in writable {
            let start = bytes.len();
            bytes.resize(start + len, 0);
            self.memory.read(GuestAddress(addr), bytes.get_mut(start..).unwrap()).unwrap();
        }
        Some((bytes, written))
    }

    /// The same without looking at the bytes: where they are.
    pub(crate) fn collect(&mut self, queue: usize) -> Option<(Vec<(u64, usize)>, u32)> {
        let memory = &self.memory;
        let ring = self.rings.get_mut(queue)?;
        let used = ring.base + 0xc000;
        let mut index = [0; 2];
        memory.read(GuestAddress(used + 2), &mut index).unwrap();
        if u16::from_le_bytes(index) == ring.used {
            return None;
        }
        let mut element = [0; 8];
        memory.read(GuestAddress(used + 4 + 8 * u64::from(ring.used % ring.size)), &mut element).unwrap();
        ring.used = ring.used.wrapping_add(1);
        if self.ring_features.event_idx {
            // It wants an interrupt for the next one (Virtio 1.3, 2.7.7).
            let used_event = ring.base + 0x8004 + 2 * u64::from(ring.size);
            memory.write(GuestAddress(used_event), &ring.used.to_le_bytes()).unwrap();
        }
        let [a, b, c, d, e, f, g, h] = element;
        let (head, written) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        // A ring that was given away with a balloon says anything.
        let at = ring.flight.iter().position(|(h, ..)| u32::from(*h) == head)?;
        let (_, taken, writable) = ring.flight.swap_remove(at);
        ring.free.extend(taken.into_iter().rev());
        Some((writable, written))
    }

    /// Whether the device interrupted since it was asked last.
    #[cfg(test)]
    pub(crate) fn interrupted(&mut self) -> bool {
        self.transport.write_register_bytes(0x64, &u32::MAX.to_le_bytes());
        let raised = self.io.interrupt.raised();
        std::mem::replace(&mut self.seen_interrupts, raised) != raised
    }

    /// Whether the device asks for a reset.
    #[cfg(test)]
    pub(crate) fn needs_reset(&self) -> bool {
        self.io.interrupt.needs_reset()
    }

    /// The most units of work that a turn of the device has cost.
    #[cfg(test)]
    pub(crate) fn most_work(&self) -> u64 {
        self.io.turn().most()
    }

    /// Stops the device as a pause does, and lets the one that `next` makes go on from its state, with a transport of its own.
    #[cfg(test)]
    pub(crate) fn restart(mut self, next: impl FnOnce(D, &GuestMemory) -> D) -> Self {
        let timeout = std::time::Duration::from_secs(20);
        assert!(self.device.drain(&mut self.io, timeout, super::DrainCause::Pause), "it does not come to rest");
        let state = self.device.stop(&mut self.io);
        let positions = self.io.queues.iter().map(super::queue::Queue::positions).collect();
        self.host.0.borrow_mut().stopped = Some(StoppedDevice { positions, state });
        let state = self.transport.save().unwrap();
        // What is kept is the same as what was saved.
        #[cfg(feature = "serde")]
        let state = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
        self.restore(&state, next)
    }

    /// Lets the device that `next` makes go on from this state, with a transport of its own.
    #[cfg(test)]
    pub(crate) fn restore(
        mut self,
        state: &super::transport::TransportState,
        next: impl FnOnce(D, &GuestMemory) -> D,
    ) -> Self {
        self.device = next(self.device, &self.memory);
        (self.host, self.transport, self.events) = Self::transport(&self.device, &self.memory);
        self.transport.restore(state).unwrap();
        let setup = self.host.0.borrow_mut().setup.take().unwrap();
        let (io, state) = DeviceIo::new(setup, Sources::detached().unwrap(), 0);
        self.io = io;
        self.seen_interrupts = 0;
        self.device.start(&mut self.io, state.unwrap().as_ref()).unwrap();
        for queue in 0..self.rings.len() {
            look(&mut self.device, &mut self.io, EventSource::Queue(queue));
        }
        self
    }

    /// Resets the device by its registers, and gives it back.
    #[cfg(test)]
    pub(crate) fn stop(mut self) -> D {
        self.device.stop(&mut self.io);
        self.device.reset();
        self.transport.write_register_bytes(0x70, &[0; 4]);
        self.device
    }
}
