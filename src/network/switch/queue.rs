//! [`PacketQueue`]: frames for one guest of a switch. The loops of others put them in, and its own takes them out.
//!
//! No loop waits: a sender drops what does not fit. The lock is held for as long as a frame's place in a list takes;
//! bytes are copied outside.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::network::{Offload, Offloads};
use crate::sys::{EventFd, borrow, eventfd};

/// Bytes that may wait.
pub(super) const ROOM: usize = 2 << 20;
/// What a frame counts beside its bytes: many small ones are no cheaper.
const OVERHEAD: usize = 128;

/// A frame on its way.
#[derive(Debug)]
pub(super) struct QueuedPacket {
    pub bytes: Vec<u8>,
    pub offload: Offload,
}

#[derive(Debug, Default)]
struct PacketQueueState {
    /// What the guest agreed to do itself; `None`: its card does not run.
    agreed: Option<Offloads>,
    packets: VecDeque<QueuedPacket>,
    size: usize,
    /// What of that came from each of the others, by their numbers.
    shares: Vec<usize>,
    /// The guest's loop was woken, and has not found the queue empty since.
    awake: bool,
    dropped: u64,
}

#[derive(Debug)]
pub(super) struct PacketQueue {
    state: Mutex<PacketQueueState>,
    event: EventFd,
}

fn size(packet: &QueuedPacket) -> usize {
    packet.bytes.capacity() + OVERHEAD
}

impl PacketQueue {
    pub(super) fn new() -> io::Result<Self> {
        let state = PacketQueueState { shares: vec![0; 256], ..PacketQueueState::default() };
        Ok(Self { state: Mutex::new(state), event: eventfd()? })
    }

    fn state(&self) -> MutexGuard<'_, PacketQueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What may be left to the guest; `None`: it takes nothing now.
    pub(super) fn agreed(&self) -> Option<Offloads> {
        self.state().agreed
    }

    /// The guest's card runs, and takes these.
    pub(super) fn agree(&self, offloads: Offloads) {
        self.state().agreed = Some(offloads);
    }

    /// Nothing is taken any more.
    pub(super) fn close(&self) {
        *self.state() = PacketQueueState { shares: vec![0; 256], ..PacketQueueState::default() };
    }

    /// Puts packets in, as many as fit, and wakes the loop of the guest when it sleeps.
    ///
    /// One sender has at most as much in here as is free, so that all get their share (dynamic thresholds).
    pub(super) fn push(&self, from: u8, packets: impl IntoIterator<Item = QueuedPacket>) {
        let mut ring = false;
        let mut state = self.state();
        let PacketQueueState { agreed, packets: queued, size: all, shares, awake, dropped } = &mut *state;
        let Some(share) = shares.get_mut(usize::from(from)) else { return };
        for packet in packets {
            let size = size(&packet);
            if agreed.is_none() || *share + size > ROOM.saturating_sub(*all) {
                *dropped += 1;
                continue;
            }
            *share += size;
            *all += size;
            queued.push_back(packet);
            ring |= !std::mem::replace(awake, true);
        }
        drop(state);
        if ring {
            // A full counter is readable, which is all that is wanted.
            let _ = self.event.write(1);
        }
    }

    /// Takes everything. When there is nothing, the next packet signals the event.
    pub(super) fn take(&self) -> VecDeque<QueuedPacket> {
        let mut state = self.state();
        state.awake = !state.packets.is_empty();
        if state.awake {
            state.size = 0;
            state.shares.fill(0);
        }
        std::mem::take(&mut state.packets)
    }

    /// Packets that did not fit.
    pub(super) fn dropped(&self) -> u64 {
        self.state().dropped
    }

    /// Readable when packets have come after there were none.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        borrow(&self.event)
    }

    /// Clears the event, once it has woken the loop.
    pub(super) fn clear(&self) {
        let _ = self.event.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(len: usize) -> QueuedPacket {
        QueuedPacket { bytes: vec![0; len], offload: Offload::default() }
    }

    fn is_signaled(queue: &PacketQueue) -> bool {
        queue.event.read().is_ok()
    }

    #[test]
    fn queue_signals_once_for_many_packets() {
        let queue = PacketQueue::new().unwrap();
        queue.push(2, [packet(100)]);
        assert!(!is_signaled(&queue) && queue.dropped() == 1, "its card does not run");
        queue.agree(Offloads::none());
        queue.push(2, [packet(100), packet(100)]);
        queue.push(3, [packet(100)]);
        assert!(is_signaled(&queue) && !is_signaled(&queue));
        assert_eq!(queue.take().len(), 3);
        queue.push(3, [packet(100)]);
        assert!(!is_signaled(&queue), "it has not seen that there is nothing");
        assert_eq!((queue.take().len(), queue.take().len()), (1, 0));
        queue.push(3, [packet(100)]);
        assert!(is_signaled(&queue));
        queue.close();
        assert!(queue.take().is_empty() && queue.agreed().is_none());
    }

    #[test]
    fn one_sender_cannot_fill_the_queue() {
        let queue = PacketQueue::new().unwrap();
        queue.agree(Offloads::none());
        queue.push(2, (0..10_000).map(|_| packet(1500)));
        let dropped = queue.dropped();
        assert!(dropped > 9000);
        queue.push(3, (0..100).map(|_| packet(1500)));
        assert_eq!(queue.dropped(), dropped);
    }

    proptest! {
        #[test]
        fn queue_length_is_bounded(
            steps in proptest::collection::vec((any::<u8>(), 0usize..70_000, 1usize..60, 0u8..30), 1..60),
        ) {
            let queue = PacketQueue::new().unwrap();
            queue.agree(Offloads::none());
            let (mut sent, mut came) = (0, 0);
            for (from, len, n, take) in steps {
                queue.push(from, (0..n).map(|_| packet(len)));
                sent += n as u64;
                let state = queue.state();
                prop_assert!(state.size <= ROOM);
                prop_assert_eq!(state.size, state.packets.iter().map(size).sum::<usize>());
                prop_assert_eq!(state.size, state.shares.iter().sum::<usize>());
                drop(state);
                if take == 0 {
                    came += queue.take().len() as u64;
                }
            }
            came += queue.take().len() as u64;
            prop_assert_eq!(sent, came + queue.dropped());
        }
    }
}
