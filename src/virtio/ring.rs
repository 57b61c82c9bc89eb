//! [`Ring`]: a split virtqueue in guest memory, and the positions in it (Virtio 1.3, 2.7).
//!
//! Owned by a live queue. Everything is looked up once, when the device starts; everything the driver wrote is read
//! once and is a copy from then on.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;

use super::queue::{QueueConfig, QueueError};
use crate::memory::{GuestAddress, GuestMemory, GuestSlice, OutOfBounds, PinnedSlice};

/// Flags of a descriptor (Virtio 1.3, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Bytes of a descriptor.
const DESCRIPTOR: usize = 16;
/// In the available ring's flags: no interrupts are needed (Virtio 1.3, 2.7.6).
const NO_INTERRUPT: u16 = 1;
/// In the used ring's flags: no kicks are needed (Virtio 1.3, 2.7.8).
const NO_NOTIFY: u16 = 1;
/// Where both rings have their flags, their index and their elements.
const FLAGS: usize = 0;
const INDEX: usize = 2;
const ELEMENTS: usize = 4;

/// A buffer of a chain, as the driver described it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub addr: u64,
    pub len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    #[cfg(test)]
    pub(super) fn new(addr: u64, len: u32, flags: u16) -> Self {
        Self { addr, len, flags, next: 0 }
    }

    fn parse([addr, rest]: [u64; 2]) -> Self {
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// Another follows.
    pub(super) fn has_next(&self) -> bool {
        self.flags & NEXT != 0
    }

    /// It is for the device to write to.
    pub(super) fn is_writable(&self) -> bool {
        self.flags & WRITE != 0
    }
}

/// The descriptors of one chain. It ends early where the chain makes no sense; then the last one said that another follows.
pub(super) struct Descriptors<'a> {
    memory: &'a GuestMemory,
    table: GuestSlice<'a>,
    /// Descriptors in the table.
    count: u32,
    next: Option<u16>,
    /// So many more may come: "a descriptor chain longer than the Queue Size" is the driver's mistake (Virtio 1.3, 2.7.5.3.1).
    left: u32,
    indirect: bool,
}

impl Iterator for Descriptors<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut n = u32::from(self.next.take()?);
        loop {
            if n >= self.count || self.left == 0 {
                return None;
            }
            let found = Descriptor::parse(self.table.load_pair(n as usize * DESCRIPTOR)?);
            if found.flags & INDIRECT == 0 {
                self.left -= 1;
                self.next = found.has_next().then_some(found.next);
                return Some(found);
            }
            // Tables do not nest, and are whole (Virtio 1.3, 2.7.5.3).
            let (len, entry) = (found.len as usize, DESCRIPTOR as u32);
            if std::mem::replace(&mut self.indirect, true)
                || !found.len.is_multiple_of(entry)
                || found.len / entry > 0xffff
            {
                return None;
            }
            self.table = self.memory.view(GuestAddress(found.addr), len)?;
            (self.count, self.left, n) = (found.len / entry, self.left.min(found.len / entry), 0);
        }
    }
}

/// A ring that a running device serves.
#[derive(Debug)]
pub(super) struct Ring {
    table: PinnedSlice,
    available: PinnedSlice,
    used: PinnedSlice,
    /// A power of two.
    size: u16,
    event_idx: bool,
    /// The next element of the available ring to be looked at.
    next: u16,
    /// Up to where the driver had filled it when that was last looked at.
    filled: u16,
    /// The next element of the used ring to be written.
    used_next: u16,
    /// Up to where the driver was considered for an interrupt.
    considered: u16,
}

impl Ring {
    /// One of `config.size` descriptors, a power of two.
    ///
    /// # Errors
    /// When a part is not guest memory.
    pub(super) fn new(config: &QueueConfig, event_idx: bool, memory: &GuestMemory) -> Result<Self, OutOfBounds> {
        let size = usize::from(config.size);
        let window = |addr, len| memory.window(GuestAddress(addr), len);
        Ok(Self {
            // Virtio 1.3, 2.7: both rings have a number for suppressing notifications at their end.
            table: window(config.descriptors, DESCRIPTOR * size)?,
            available: window(config.available, ELEMENTS + 2 * size + 2)?,
            used: window(config.used, ELEMENTS + 8 * size + 2)?,
            size: config.size,
            event_idx,
            next: 0,
            filled: 0,
            used_next: 0,
            considered: 0,
        })
    }

    /// Goes on where another ring has stopped.
    pub(super) fn set_positions(&mut self, next_available: u16, next_used: u16) {
        (self.next, self.filled) = (next_available, next_available);
        (self.used_next, self.considered) = (next_used, next_used);
    }

    /// The next elements of the available and of the used ring.
    pub(super) fn positions(&self) -> (u16, u16) {
        (self.next, self.used_next)
    }

    /// Descriptors.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    fn entry_offset(&self, index: u16, width: usize) -> usize {
        ELEMENTS + width * usize::from(index & (self.size - 1))
    }

    fn look(&self) -> Result<u16, QueueError> {
        self.available.view().load_u16(INDEX, Acquire).ok_or(QueueError::AvailableRing)
    }

    /// The head of the next chain, if there is one.
    pub(super) fn pop(&mut self) -> Result<Option<u16>, QueueError> {
        if self.next == self.filled {
            let filled = self.look()?;
            if filled.wrapping_sub(self.next) > self.size {
                return Err(QueueError::AvailableRing);
            }
            self.filled = filled;
            if self.next == filled {
                return Ok(None);
            }
        }
        // A driver with more requests in flight than descriptors uses one twice: devices keep what they are given.
        if self.next.wrapping_sub(self.used_next) >= self.size {
            return Err(QueueError::AvailableRing);
        }
        let at = self.entry_offset(self.next, 2);
        let head = self.available.view().load_u16(at, Relaxed).ok_or(QueueError::AvailableRing)?;
        self.next = self.next.wrapping_add(1);
        Ok(Some(head))
    }

    /// The chain that begins at `head`.
    pub(super) fn chain(&self, head: u16) -> Descriptors<'_> {
        let count = u32::from(self.size);
        let table = self.table.view();
        Descriptors { memory: self.table.memory(), table, count, next: Some(head), left: count, indirect: false }
    }

    /// Gives the chain of `head` back, with so many bytes written.
    pub(super) fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let (used, at) = (self.used.view(), self.entry_offset(self.used_next, 8));
        self.used_next = self.used_next.wrapping_add(1);
        used.store_u32(at, head.into(), Relaxed)
            .and_then(|()| used.store_u32(at + 4, written, Relaxed))
            .and_then(|()| used.store_u16(INDEX, self.used_next, Release))
            .ok_or(QueueError::UsedRing)
    }

    /// Asks for kicks. True when there is something that the driver may not kick for any more.
    pub(super) fn enable_kicks(&self) -> Result<bool, QueueError> {
        let used = self.used.view();
        let asked = match self.event_idx {
            true => used.store_u16(self.event_offset(8), self.next, Relaxed),
            false => used.store_u16(FLAGS, 0, Relaxed),
        };
        asked.ok_or(QueueError::UsedRing)?;
        // Asked before looking, as the driver fills before it asks: one of the two sees the other.
        fence(SeqCst);
        Ok(self.look()? != self.next)
    }

    /// Tells the driver that kicks are not needed. With indices it knows, as that which was asked for goes by.
    pub(super) fn disable_kicks(&self) -> Result<(), QueueError> {
        if self.event_idx {
            return Ok(());
        }
        self.used.view().store_u16(FLAGS, NO_NOTIFY, Relaxed).ok_or(QueueError::UsedRing)
    }

    /// Whether the driver wants an interrupt for what was given back since this was last asked.
    pub(super) fn wants_interrupt(&mut self) -> bool {
        let (new, considered) = (self.used_next, std::mem::replace(&mut self.considered, self.used_next));
        if new == considered {
            return false;
        }
        // Given back before asking, as the driver asks before it looks: one of the two sees the other.
        fence(SeqCst);
        let available = self.available.view();
        match self.event_idx {
            // Virtio 1.3, 2.7.7.2: when the index that it waits for is among those that came.
            true => available
                .load_u16(self.event_offset(2), Relaxed)
                .is_some_and(|event| new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(considered)),
            false => available.load_u16(FLAGS, Relaxed).is_some_and(|flags| flags & NO_INTERRUPT == 0),
        }
    }

    /// Behind the last element.
    fn event_offset(&self, width: usize) -> usize {
        ELEMENTS + width * usize::from(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::{Queue as Reference, QueueOwnedT, QueueT};

    const SIZE: u16 = 8;
    const CONFIG: QueueConfig =
        QueueConfig { size: SIZE, ready: true, descriptors: 0x1000, available: 0x1200, used: 0x1400 };

    fn reference(event_idx: bool) -> Reference {
        let mut queue = Reference::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(0x1000), Some(0));
        queue.set_avail_ring_address(Some(0x1200), Some(0));
        queue.set_used_ring_address(Some(0x1400), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    /// The descriptors of a chain: address, length, whether another follows, whether the device writes.
    type Seen = Vec<(u64, u32, bool, bool)>;

    fn ours(ring: &mut Ring) -> Result<Option<(u16, Seen)>, QueueError> {
        let Some(head) = ring.pop()? else { return Ok(None) };
        Ok(Some((head, ring.chain(head).map(|d| (d.addr, d.len, d.has_next(), d.is_writable())).collect())))
    }

    fn theirs(queue: &mut Reference, memory: &GuestMemory) -> Option<(u16, Seen)> {
        let chain = queue.iter(memory.inner()).unwrap().next()?;
        let head = chain.head_index();
        // Theirs ends a chain at 4 GiB, ours leaves that to who collects it, and ours at the size of the queue.
        Some((head, chain.take(SIZE.into()).map(|d| (d.addr().0, d.len(), d.has_next(), d.is_write_only())).collect()))
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// A descriptor is written: its number, address, length, flags, next.
        Describe(u16, u64, u32, u16, u16),
        /// A head is made available.
        Offer(u16),
        Pop,
        Push(u16, u32),
        Enable,
        Disable,
        /// The driver asks for an interrupt at this index, or sets flags.
        Ask(u16),
        Interrupt,
    }

    fn step() -> impl Strategy<Value = Step> {
        let table = (0..16u64).prop_map(|n| 0x2000 + 8 * n);
        let addr = prop_oneof![3 => table, 1 => any::<u64>()];
        let len = prop_oneof![3 => (0..6u32).prop_map(|n| 16 * n), 1 => 0..200u32];
        prop_oneof![
            6 => (0..SIZE, addr, len, 0..8u16, 0..SIZE + 1).prop_map(|(n, a, l, f, x)| Step::Describe(n, a, l, f, x)),
            3 => (0..SIZE + 1).prop_map(Step::Offer),
            3 => Just(Step::Pop),
            3 => (0..SIZE, any::<u32>()).prop_map(|(head, len)| Step::Push(head, len)),
            1 => Just(Step::Enable),
            1 => Just(Step::Disable),
            2 => (0..12u16).prop_map(Step::Ask),
            2 => Just(Step::Interrupt),
        ]
    }

    proptest! {
        /// Whatever the driver writes, chains, used ring and notifications are those of the crate virtio-queue.
        #[test]
        fn ring_matches_rust_vmm_virtio_queue(
            event_idx: bool,
            tables in proptest::collection::vec(any::<[u16; 4]>(), 32),
            steps in proptest::collection::vec(step(), 1..60),
        ) {
            let make = || GuestMemory::anonymous(&[(GuestAddress(0), 0x4000)]).unwrap();
            let (here, there) = (make(), make());
            let write = |addr: u64, bytes: &[u8]| {
                here.write(GuestAddress(addr), bytes).unwrap();
                there.write(GuestAddress(addr), bytes).unwrap();
            };
            let descriptor = |addr: u64, len: u32, flags: u16, next: u16| {
                [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
            };
            // Indirect tables of anything.
            for (n, [addr, len, flags, next]) in (0..).zip(tables) {
                write(0x2000 + 16 * n, &descriptor(addr.into(), len.into(), flags % 5, next % 6));
            }
            let (mut ring, mut queue) = (Ring::new(&CONFIG, event_idx, &here).unwrap(), reference(event_idx));
            let (mut offered, mut popped, mut returned, mut pushed) = (0u16, 0u16, 0u16, false);
            for step in steps {
                match step {
                    Step::Describe(n, addr, len, flags, next) => {
                        write(0x1000 + 16 * u64::from(n), &descriptor(addr, len, flags, next));
                    }
                    Step::Offer(head) if offered - returned < SIZE => {
                        write(0x1204 + 2 * u64::from(offered % SIZE), &head.to_le_bytes());
                        offered += 1;
                        write(0x1202, &offered.to_le_bytes());
                    }
                    Step::Offer(_) => {}
                    Step::Pop => {
                        let found = ours(&mut ring).unwrap();
                        popped += u16::from(found.is_some());
                        prop_assert_eq!(found, theirs(&mut queue, &there));
                    }
                    Step::Push(head, len) if returned < popped => {
                        ring.push(head, len).unwrap();
                        queue.add_used(there.inner(), head, len).unwrap();
                        returned += 1;
                        pushed = true;
                    }
                    Step::Push(..) => {}
                    Step::Enable => {
                        prop_assert_eq!(ring.enable_kicks().ok(), queue.enable_notification(there.inner()).ok());
                    }
                    Step::Disable => {
                        ring.disable_kicks().unwrap();
                        queue.disable_notification(there.inner()).unwrap();
                    }
                    // Theirs does not look at the flags.
                    Step::Ask(index) if event_idx => write(0x1204 + 2 * u64::from(SIZE), &index.to_le_bytes()),
                    Step::Ask(_) => {}
                    Step::Interrupt => {
                        let wanted = queue.needs_notification(there.inner()).unwrap() && (event_idx || pushed);
                        prop_assert_eq!(ring.wants_interrupt(), wanted);
                        pushed = false;
                    }
                }
                let (mut a, mut b) = ([0; 0x100], [0; 0x100]);
                here.read(GuestAddress(0x1400), &mut a).unwrap();
                there.read(GuestAddress(0x1400), &mut b).unwrap();
                prop_assert_eq!(a, b);
            }
        }
    }

    #[test]
    fn suppressed_interrupts_are_not_sent() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x4000)]).unwrap();
        let mut ring = Ring::new(&CONFIG, false, &memory).unwrap();
        memory.write(GuestAddress(0x1200), &[1]).unwrap();
        ring.push(0, 0).unwrap();
        assert!(!ring.wants_interrupt());
        memory.write(GuestAddress(0x1200), &[0]).unwrap();
        ring.push(1, 0).unwrap();
        assert!(ring.wants_interrupt() && !ring.wants_interrupt());
    }

    #[test]
    fn indices_wrap_and_invalid_ones_are_detected() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x4000)]).unwrap();
        let mut ring = Ring::new(&CONFIG, true, &memory).unwrap();
        for n in 1..=70_000u32 {
            memory.write(GuestAddress(0x1202), &(n as u16).to_le_bytes()).unwrap();
            assert_eq!((ring.pop(), ring.pop()), (Ok(Some(0)), Ok(None)));
            ring.push(0, n).unwrap();
        }
        memory.write(GuestAddress(0x1202), &(70_009u32 as u16).to_le_bytes()).unwrap();
        assert_eq!(ring.pop(), Err(QueueError::AvailableRing));
    }

    #[test]
    fn a_chain_has_no_more_descriptors_than_the_queue() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        let ring = Ring::new(&CONFIG, false, &memory).unwrap();
        let describe = |at: u64, addr: u64, len: u32, flags: u16, next: u16| {
            let rest = [len.to_le_bytes().as_slice(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
            memory.write(GuestAddress(at), &[addr.to_le_bytes().as_slice(), &rest].concat()).unwrap();
        };
        // A table as large as tables get, all of whose descriptors follow each other.
        for n in 0..0xffff {
            describe(0x2000 + 16 * n, 0, 1, u16::from(n < 0xfffe), (n + 1) as u16);
        }
        for (len, walked, ended) in [(7, 7, true), (8, 8, true), (9, 8, false), (0xffff, 8, false)] {
            describe(0x1000, 0x2000, 16 * len, INDIRECT, 0);
            describe(0x2000 + 16 * u64::from(len - 1), 0, 1, 0, 0);
            let found: Vec<_> = ring.chain(0).collect();
            describe(0x2000 + 16 * u64::from(len - 1), 0, 1, NEXT, len as u16);
            assert_eq!((found.len(), found.last().is_some_and(|d| !d.has_next())), (walked, ended), "{len}");
        }
        // One that leads to a table counts with what it leads to.
        describe(0x1000, 0, 1, NEXT, 1);
        describe(0x1010, 0x2000, 16 * 8, INDIRECT, 0);
        assert_eq!(ring.chain(0).count(), 8);
        assert!(ring.chain(0).last().is_some_and(|d| d.has_next()));
    }

    #[test]
    fn chains_in_flight_are_limited_by_the_queue_size() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x4000)]).unwrap();
        let mut ring = Ring::new(&CONFIG, false, &memory).unwrap();
        memory.write(GuestAddress(0x1202), &SIZE.to_le_bytes()).unwrap();
        (0..SIZE).for_each(|_| assert_eq!(ring.pop(), Ok(Some(0))));
        assert_eq!(ring.pop(), Ok(None));
        memory.write(GuestAddress(0x1202), &(SIZE + 1).to_le_bytes()).unwrap();
        assert_eq!(ring.pop(), Err(QueueError::AvailableRing));
        ring.push(0, 0).unwrap();
        assert_eq!(ring.pop(), Ok(Some(0)));
    }
}
