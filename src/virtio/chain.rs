//! [`Chain`]: one request of the driver, validated whole when popped, completed by value.

use super::ring::Descriptor;
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
    /// It runs in circles, ends in a descriptor that does not exist, nests tables, or is longer than its queue.
    #[error("the chain does not end properly, or is longer than the queue")]
    Endless,
}

/// Less was left in the chain than was asked for: the request is malformed, the chain is fine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the request is shorter than its type demands")]
pub(crate) struct TooShort;

/// Segments with more room than this are not kept for the next chain.
const KEEP: usize = 64;

/// Consecutive buffers of one direction that were taken out of a chain; the chain tells which: [`Chain::readable`],
/// [`Chain::writable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    from: usize,
    to: usize,
}

/// Buffers of one direction, used up from the front.
#[derive(Debug, Default)]
struct ChainBuffers {
    segments: Vec<Segment>,
    /// The first that is not used up. What was taken lies before it and stays what it is.
    next: usize,
    /// Bytes that are not used up.
    len: usize,
}

impl ChainBuffers {
    fn clear(&mut self) {
        self.segments.clear();
        (self.next, self.len) = (0, 0);
    }

    fn push(&mut self, segment: Segment) {
        self.len += segment.len();
        if segment.len() > 0 {
            self.segments.push(segment);
        }
    }

    /// What is not used up.
    fn rest(&self) -> &[Segment] {
        self.segments.get(self.next..).unwrap_or_default()
    }

    fn get(&self, span: Span) -> &[Segment] {
        self.segments.get(span.from..span.to).unwrap_or_default()
    }

    /// Uses up the first `n` bytes, or all there are.
    fn skip(&mut self, n: usize) {
        let mut left = n.min(self.len);
        self.len -= left;
        while let Some(first) = self.segments.get_mut(self.next).filter(|_| left > 0) {
            if left < first.len() {
                *first = first.split_at(left).1;
                return;
            }
            left -= first.len();
            self.next += 1;
        }
    }

    /// Takes the first `n` bytes, or all there are.
    fn take(&mut self, n: usize) -> Span {
        let (from, mut left) = (self.next, n.min(self.len));
        self.len -= left;
        while let Some(first) = self.segments.get_mut(self.next).filter(|_| left > 0) {
            let (head, tail) = first.split_at(left);
            *first = head;
            left -= head.len();
            self.next += 1;
            if tail.len() > 0 {
                self.segments.insert(self.next, tail);
            }
        }
        Span { from, to: self.next }
    }
}

/// A descriptor chain: what the device may read, then what it may write. Every byte of it exists.
///
/// It must be given back with `DeviceIo::complete` (or by the closure of `drain` returning): until then the driver
/// waits for it. Data is consumed from the front, in any split that the driver chose.
#[derive(Debug)]
#[must_use = "the driver waits until the chain is completed"]
pub(crate) struct Chain(Box<Body>);

/// On the heap, so that requests are moved about cheaply; used again by the queue, so that none is allocated.
#[derive(Debug)]
struct Body {
    head: u16,
    memory: GuestMemory,
    readable: ChainBuffers,
    writable: ChainBuffers,
    /// Bytes of the writable part that hold an answer, reported to the driver.
    written: u32,
    /// Descriptors, those of empty buffers included.
    descriptors: usize,
}

impl Chain {
    /// An empty one, to be filled.
    pub(super) fn new(memory: &GuestMemory) -> Self {
        let (readable, writable) = Default::default();
        Self(Box::new(Body { head: 0, memory: memory.clone(), readable, writable, written: 0, descriptors: 0 }))
    }

    /// Collects and checks the descriptors of the chain that begins at `head`. The last of them must say that it is the last.
    pub(super) fn fill(&mut self, head: u16, descriptors: impl Iterator<Item = Descriptor>) -> Result<(), ChainError> {
        let Body { memory, readable, writable, descriptors: walked, .. } = &mut *self.0;
        let (mut total, mut ended) = (0u64, false);
        for descriptor in descriptors {
            *walked += 1;
            ended = !descriptor.has_next();
            total += u64::from(descriptor.len);
            if total > u64::from(u32::MAX) {
                return Err(ChainError::TooLong);
            }
            let segment = memory.segment(GuestAddress(descriptor.addr), descriptor.len as usize)?;
            match (descriptor.is_writable(), writable.segments.is_empty()) {
                (true, _) => writable.push(segment),
                (false, true) => readable.push(segment),
                (false, false) => return Err(ChainError::Order),
            }
        }
        self.0.head = head;
        if ended { Ok(()) } else { Err(ChainError::Endless) }
    }

    /// To be filled again, unless the driver has made it large.
    pub(super) fn recycle(mut self) -> Option<Self> {
        let Body { readable, writable, written, descriptors, .. } = &mut *self.0;
        readable.clear();
        writable.clear();
        (*written, *descriptors) = (0, 0);
        (readable.segments.capacity().max(writable.segments.capacity()) <= KEEP).then_some(self)
    }

    pub(super) fn head(&self) -> u16 {
        self.0.head
    }

    pub(super) fn written(&self) -> u32 {
        self.0.written
    }

    /// The memory that the segments lie in.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.0.memory
    }

    /// How many descriptors the driver has made it of.
    pub(super) fn descriptors(&self) -> usize {
        self.0.descriptors
    }

    /// Bytes not yet read.
    pub(crate) fn readable_len(&self) -> usize {
        self.0.readable.len
    }

    /// Bytes not yet written.
    pub(crate) fn writable_len(&self) -> usize {
        self.0.writable.len
    }

    /// Reads the next `N` bytes.
    ///
    /// # Errors
    /// [`TooShort`] when fewer are left; nothing is consumed then.
    #[inline]
    pub(crate) fn read<const N: usize>(&mut self) -> Result<[u8; N], TooShort> {
        let mut bytes = [0; N];
        self.read_into(&mut bytes).map(|()| bytes)
    }

    /// Reads exactly as much as `to` holds.
    ///
    /// # Errors
    /// [`TooShort`] when fewer are left; nothing is consumed then.
    #[inline]
    pub(crate) fn read_into(&mut self, to: &mut [u8]) -> Result<(), TooShort> {
        self.peek_into(to)?;
        self.0.readable.skip(to.len());
        Ok(())
    }

    /// Reads as much as `to` holds without consuming it.
    ///
    /// # Errors
    /// [`TooShort`] when fewer are left.
    pub(crate) fn peek_into(&self, to: &mut [u8]) -> Result<(), TooShort> {
        let Body { memory, readable, .. } = &*self.0;
        if readable.len < to.len() {
            return Err(TooShort);
        }
        memory.gather(readable.rest(), 0, to).map_err(|_| TooShort)?;
        Ok(())
    }

    /// Takes the next `n` bytes to be read, or all there are, without looking at them.
    pub(crate) fn take_readable(&mut self, n: usize) -> Span {
        self.0.readable.take(n)
    }

    /// What [`Chain::take_readable`] took.
    pub(crate) fn readable(&self, span: Span) -> &[Segment] {
        self.0.readable.get(span)
    }

    /// Writes all of `from`.
    ///
    /// # Errors
    /// [`TooShort`] when it does not fit; nothing is written then.
    #[inline]
    pub(crate) fn write(&mut self, from: &[u8]) -> Result<(), TooShort> {
        let Body { memory, writable, .. } = &mut *self.0;
        if writable.len < from.len() {
            return Err(TooShort);
        }
        memory.scatter(writable.rest(), from).map_err(|_| TooShort)?;
        writable.skip(from.len());
        self.wrote(from.len());
        Ok(())
    }

    /// The next `n` bytes to be written but `skip`, without taking them. Say [`Chain::wrote`] for what was filled,
    /// after writing what comes before.
    pub(crate) fn writable_after(&self, skip: usize, n: usize) -> impl Iterator<Item = Segment> {
        let (mut skip, mut rest) = (skip, n);
        let part = move |segment: &Segment| {
            let (skipped, wanted) = segment.split_at(skip);
            skip -= skipped.len();
            let (head, _) = wanted.split_at(rest);
            rest -= head.len();
            head
        };
        self.0.writable.rest().iter().map(part).filter(|part| part.len() > 0)
    }

    /// Uses up the next `n` bytes to be written, or all there are; what they hold is not reported.
    pub(crate) fn skip_writable(&mut self, n: usize) {
        self.0.writable.skip(n);
    }

    /// Takes the next `n` bytes to be written, or all there are. Say [`Chain::wrote`] for what was filled.
    pub(crate) fn take_writable(&mut self, n: usize) -> Span {
        self.0.writable.take(n)
    }

    /// What [`Chain::take_writable`] took.
    pub(crate) fn writable(&self, span: Span) -> &[Segment] {
        self.0.writable.get(span)
    }

    /// `n` more bytes of what was taken hold an answer.
    pub(crate) fn wrote(&mut self, n: usize) {
        self.0.written = self.0.written.saturating_add(u32::try_from(n).unwrap_or(u32::MAX));
    }

    /// Fills what is left, but at most `max` bytes, with what `fill` makes. What it cannot make is not reported.
    pub(crate) fn fill_with(&mut self, max: usize, mut fill: impl FnMut(&mut [u8]) -> std::io::Result<()>) {
        let mut left = max.min(self.0.writable.len);
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

    fn collected(memory: &GuestMemory, all: impl Iterator<Item = Descriptor>) -> Result<Chain, ChainError> {
        let mut chain = Chain::new(memory);
        chain.fill(0, all).map(|()| chain)
    }

    fn chain(memory: &GuestMemory, readable: &[usize], writable: &[usize]) -> Chain {
        let (mut descriptors, mut at) = (Vec::new(), 0x1000);
        let count = readable.len() + writable.len();
        for (n, len) in readable.iter().chain(writable).enumerate() {
            let flags = u16::from(n + 1 < count) | if n >= readable.len() { 2 } else { 0 };
            descriptors.push(Descriptor::new(at, *len as u32, flags));
            at += *len as u64;
        }
        collected(memory, descriptors.into_iter()).unwrap()
    }

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap()
    }

    #[test]
    fn driver_errors_are_distinguished() {
        let memory = memory();
        let collect = |descriptors: &[(u64, u32, u16)]| {
            let all = descriptors.iter().map(|(addr, len, flags)| Descriptor::new(*addr, *len, *flags));
            collected(&memory, all).map(drop)
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
        fn descriptor_splits_do_not_matter(
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
