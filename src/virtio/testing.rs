//! [`Driver`]: plays the guest's driver on real guest memory. The only fake, for tests, fuzzing and benches.
//!
//! Everything happens on the calling thread: the device is a plain value, `dispatch` is a plain call.

use std::sync::Arc;

use super::io::{Counters, DeviceIo};
use super::queue::{Queue, QueueConfig};
use super::runner::look;
use super::turn::Turn;
use super::{EventSource, VirtioDevice};
use crate::event_loop::Sources;
use crate::irq::Interrupt;
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
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), MEMORY)]).unwrap();
        let device = make(&memory);
        let profile = device.profile();
        let (mut queues, mut rings) = (Vec::new(), Vec::new());
        for (n, size) in (0..).zip(&profile.queues) {
            let base = RINGS + n * BLOCK;
            let config = QueueConfig {
                size: *size,
                ready: true,
                descriptors: base,
                available: base + 0x8000,
                used: base + 0xc000,
            };
            queues.push(Queue::new(&config, *size, false, &memory).unwrap());
            rings.push(DriverRing {
                size: *size,
                base,
                free: (0..*size).rev().collect(),
                available: 0,
                used: 0,
                flight: vec![],
            });
        }
        let io = DeviceIo {
            kicks: profile.queues.iter().map(|_| eventfd().unwrap()).collect(),
            queues,
            interrupt: {
                // A system call, as where it leads to a guest.
                let edge = eventfd().unwrap();
                Interrupt::new(RegisterPage::alone().unwrap(), move || edge.write(1).unwrap())
            },
            counters: Arc::<Counters>::default(),
            on_needs_reset: Arc::new(|_| ()),
            features: profile.features,
            sources: Sources::detached().unwrap(),
            slot: 0,
            pending_reset: None,
            unfinished_io: None,
            turn: Turn::default(),
        };
        let mut driver = Self {
            device,
            io,
            memory,
            rings,
            next_buffer: BUFFERS,
            #[cfg(test)]
            seen_interrupts: 0,
        };
        driver.device.started(&mut driver.io).unwrap();
        driver
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

    fn write_descriptor(&self, queue: usize, n: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend_from_slice(&addr.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        let at = self.rings.get(queue).unwrap().base + 16 * u64::from(n);
        self.memory.write(GuestAddress(at), &bytes).unwrap();
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
        let ring = self.rings.get_mut(queue).unwrap();
        if ring.free.len() < pieces.len() || pieces.is_empty() {
            return false;
        }
        let taken: Vec<u16> = pieces.iter().map(|_| ring.free.pop().unwrap()).collect();
        let head = *taken.first().unwrap();
        for (i, ((addr, len, flags), n)) in pieces.iter().zip(&taken).enumerate() {
            let next = taken.get(i + 1);
            self.write_descriptor(queue, *n, *addr, *len, flags | next.map_or(0, |_| NEXT), next.copied().unwrap_or(0));
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
        self.io.interrupt.acknowledge(u32::MAX);
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

    /// Stops the device and gives it back.
    #[cfg(test)]
    pub(crate) fn stop(mut self) -> D {
        self.device.stopping(&mut self.io);
        self.device
    }
}
