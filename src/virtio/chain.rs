//! [`Chain`]: one request of the driver, validated whole when popped, completed by value.

use virtio_queue::desc::split::Descriptor;

use crate::memory::{GuestAddress, GuestMemory, OutOfBounds, Segment};

/// Why a descriptor chain is not one. The guest's mistake; the device must be reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// A buffer is not guest memory.
    #[error("a descriptor points outside guest memory: {0}")]
    OutOfBounds(#[from] OutOfBounds),
    /// "The driver MUST place any device-writable descriptor elements after any device-readable" (Virtio 1.3, 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// "total length … at most 2^32 bytes" (Virtio 1.3, 2.7.5).
    #[error("the chain is longer than 4 GiB")]
    TooLong,
    /// It runs in circles, ends in a descriptor that does not exist, or nests tables.
    #[error("the chain does not end properly")]
    Endless,
}

/// Less was left in the chain than was asked for: the request is malformed, the chain is fine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the request is shorter than its type demands")]
pub(crate) struct TooShort;

/// Buffers of one direction, used up from the front.
#[derive(Debug, Default)]
struct Buffers {
    segments: std::collections::VecDeque<Segment>,
    len: usize,
}

impl Buffers {
    fn push(&mut self, segment: Segment) {
        self.len += segment.len();
        if segment.len() > 0 {
            self.segments.push_back(segment);
        }
    }

    /// Takes the first piece, but at most `n` bytes of it.
    fn next(&mut self, n: usize) -> Option<Segment> {
        let (head, tail) = self.segments.pop_front()?.split_at(n);
        if tail.len() > 0 {
            self.segments.push_front(tail);
        }
        self.len -= head.len();
        Some(head)
    }

    /// Takes the first `n` bytes, or all there are.
    fn take(&mut self, n: usize) -> Vec<Segment> {
        let (mut taken, mut rest) = (Vec::new(), n);
        while rest > 0 {
            let Some(head) = self.next(rest) else {
                break;
            };
            rest -= head.len();
            taken.push(head);
        }
        taken
    }
}

/// A descriptor chain: what the device may read, then what it may write. Every byte of it exists.
///
/// It must be given back with `DeviceIo::complete` (or by the closure of `drain` returning): until then the driver
/// waits for it. Data is consumed from the front, in any split that the driver chose.
#[derive(Debug)]
#[must_use = "the driver waits until the chain is completed"]
pub(crate) struct Chain {
    head: u16,
    memory: GuestMemory,
    readable: Buffers,
    writable: Buffers,
    /// Bytes of the writable part that hold an answer, reported to the driver.
    written: u32,
}

impl Chain {
    /// Collects and checks the descriptors of the chain that begins at `head`. `complete` tells whether the last
    /// of them said that it is the last.
    pub(super) fn collect(
        head: u16,
        memory: &GuestMemory,
        descriptors: impl Iterator<Item = Descriptor>,
    ) -> Result<Self, ChainError> {
        let mut chain = Self {
            head,
            memory: memory.clone(),
            readable: Buffers::default(),
            writable: Buffers::default(),
            written: 0,
        };
        let (mut total, mut ended) = (0u64, false);
        for descriptor in descriptors {
            ended = !descriptor.has_next();
            total += u64::from(descriptor.len());
            if total > u64::from(u32::MAX) {
                return Err(ChainError::TooLong);
            }
            let segment = memory.segment(GuestAddress(descriptor.addr().0), descriptor.len() as usize)?;
            match (descriptor.is_write_only(), chain.writable.segments.is_empty()) {
                (true, _) => chain.writable.push(segment),
                (false, true) => chain.readable.push(segment),
                (false, false) => return Err(ChainError::Order),
            }
        }
        if ended { Ok(chain) } else { Err(ChainError::Endless) }
    }

    pub(super) fn head(&self) -> u16 {
        self.head
    }

    pub(super) fn written(&self) -> u32 {
        self.written
    }

    /// The memory that the segments lie in.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How many pieces its buffers are in.
    pub(crate) fn pieces(&self) -> usize {
        self.readable.segments.len() + self.writable.segments.len()
    }

    /// Bytes not yet read.
    pub(crate) fn readable_len(&self) -> usize {
        self.readable.len
    }

    /// Bytes not yet written.
    pub(crate) fn writable_len(&self) -> usize {
        self.writable.len
    }

    /// Reads the next `N` bytes.
    ///
    /// # Errors
    /// [`TooShort`] when fewer are left; nothing is consumed then.
    pub(crate) fn read<const N: usize>(&mut self) -> Result<[u8; N], TooShort> {
        let mut bytes = [0; N];
        self.read_into(&mut bytes).map(|()| bytes)
    }

    /// Reads exactly as much as `to` holds.
    ///
    /// # Errors
    /// [`TooShort`] when fewer are left; nothing is consumed then.
    pub(crate) fn read_into(&mut self, to: &mut [u8]) -> Result<(), TooShort> {
        self.peek_into(to)?;
        let mut rest = to.len();
        while let Some(segment) = (rest > 0).then(|| self.readable.next(rest)).flatten() {
            rest -= segment.len();
        }
        Ok(())
    }

    /// Reads as much as `to` holds without consuming it.
    ///
    /// # Errors
    /// [`TooShort`] when fewer are left.
    pub(crate) fn peek_into(&self, to: &mut [u8]) -> Result<(), TooShort> {
        if self.readable.len < to.len() {
            return Err(TooShort);
        }
        let mut rest = to;
        for segment in &self.readable.segments {
            let (now, later) = rest.split_at_mut(segment.len().min(rest.len()));
            self.memory.read(segment.addr(), now).map_err(|_| TooShort)?;
            rest = later;
        }
        Ok(())
    }

    /// Takes the next `n` bytes to be read, or all there are, without looking at them.
    pub(crate) fn take_readable(&mut self, n: usize) -> Vec<Segment> {
        self.readable.take(n)
    }

    /// Writes all of `from`.
    ///
    /// # Errors
    /// [`TooShort`] when it does not fit; nothing is written then.
    pub(crate) fn write(&mut self, from: &[u8]) -> Result<(), TooShort> {
        if self.writable.len < from.len() {
            return Err(TooShort);
        }
        let mut rest = from;
        while let Some(segment) = (!rest.is_empty()).then(|| self.writable.next(rest.len())).flatten() {
            let (now, later) = rest.split_at_checked(segment.len()).ok_or(TooShort)?;
            self.memory.write(segment.addr(), now).map_err(|_| TooShort)?;
            rest = later;
        }
        self.wrote(from.len());
        Ok(())
    }

    /// The next `n` bytes to be written but `skip`, without taking them. Say [`Chain::wrote`] for what was filled,
    /// after writing what comes before.
    pub(crate) fn writable_after(&self, skip: usize, n: usize) -> Vec<Segment> {
        let (mut skip, mut rest, mut found) = (skip, n, Vec::new());
        for segment in &self.writable.segments {
            let (skipped, wanted) = segment.split_at(skip);
            skip -= skipped.len();
            let (head, _) = wanted.split_at(rest);
            rest -= head.len();
            if head.len() > 0 {
                found.push(head);
            }
        }
        found
    }

    /// Takes the next `n` bytes to be written, or all there are. Say [`Chain::wrote`] for what was filled.
    pub(crate) fn take_writable(&mut self, n: usize) -> Vec<Segment> {
        self.writable.take(n)
    }

    /// `n` more bytes of what was taken hold an answer.
    pub(crate) fn wrote(&mut self, n: usize) {
        self.written = self.written.saturating_add(u32::try_from(n).unwrap_or(u32::MAX));
    }

    /// Fills what is left, but at most `max` bytes, with what `fill` makes. What it cannot make is not reported.
    pub(crate) fn fill_with(&mut self, max: usize, mut fill: impl FnMut(&mut [u8]) -> std::io::Result<()>) {
        let mut left = max.min(self.writable.len);
        if left == 0 {
            return;
        }
        let mut buffer = [0; 4096];
        while left > 0 {
            let (now, _) = buffer.split_at_mut(left.min(4096));
            if fill(now).is_err() || self.write(now).is_err() {
                return;
            }
            left -= now.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;
    use proptest::prelude::*;

    fn chain(memory: &GuestMemory, readable: &[usize], writable: &[usize]) -> Chain {
        let (mut descriptors, mut at) = (Vec::new(), 0x1000);
        let count = readable.len() + writable.len();
        for (n, len) in readable.iter().chain(writable).enumerate() {
            let flags = u16::from(n + 1 < count) | if n >= readable.len() { 2 } else { 0 };
            descriptors.push(Descriptor::new(at, *len as u32, flags, 0));
            at += *len as u64;
        }
        Chain::collect(0, memory, descriptors.into_iter()).unwrap()
    }

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn mistakes_of_the_driver_are_told_apart() {
        let memory = memory();
        let collect = |descriptors: &[(u64, u32, u16)]| {
            let all = descriptors.iter().map(|(addr, len, flags)| Descriptor::new(*addr, *len, *flags, 0));
            Chain::collect(0, &memory, all).map(drop)
        };
        assert!(matches!(collect(&[(1 << 20, 1, 0)]), Err(ChainError::OutOfBounds(_))));
        assert_eq!(collect(&[(0, 1, 3), (0, 1, 0)]), Err(ChainError::Order));
        assert_eq!(collect(&[(0, 1, 1)]), Err(ChainError::Endless));
        assert!(matches!(
            collect(&[(0, u32::MAX, 1), (0, 1, 0)]),
            Err(ChainError::OutOfBounds(_) | ChainError::TooLong)
        ));
        assert_eq!(collect(&[(0, 0, 0)]), Ok(()));
    }

    proptest! {
        /// However the driver splits its buffers and the device its accesses, the bytes are those of one long buffer.
        #[test]
        fn splits_do_not_matter(
            readable in proptest::collection::vec(0usize..300, 1..6),
            writable in proptest::collection::vec(0usize..300, 1..6),
            steps in proptest::collection::vec(0usize..200, 1..20),
        ) {
            let memory = memory();
            let (to_read, to_write) = (readable.iter().sum::<usize>(), writable.iter().sum::<usize>());
            let model: Vec<u8> = (0..to_read + to_write).map(|n| n as u8).collect();
            memory.write(GuestAddress(0x1000), &model[..to_read]).unwrap();
            let mut chain = chain(&memory, &readable, &writable);
            let (mut read, mut written) = (Vec::new(), 0);
            for step in steps {
                let mut buffer = vec![0; step];
                match chain.read_into(&mut buffer) {
                    Ok(()) => read.extend(buffer),
                    Err(TooShort) => prop_assert!(step > chain.readable_len()),
                }
                let end = (to_read + written + step).min(model.len());
                let piece = &model[to_read + written..end];
                if piece.len() == step {
                    chain.write(piece).unwrap();
                    written += step;
                }
            }
            prop_assert_eq!(&read, &model[..read.len()]);
            prop_assert_eq!((chain.writable_len(), chain.written() as usize), (to_write - written, written));
            let mut back = vec![0; written];
            memory.read(GuestAddress(0x1000 + to_read as u64), &mut back).unwrap();
            prop_assert_eq!(&back, &model[to_read..to_read + written]);
        }
    }
}
