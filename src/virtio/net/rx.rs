//! [`RxQueue`]: the guest's buffers that wait for frames, and how a frame comes into them.

use std::collections::VecDeque;
use std::io;

use crate::memory::Segment;
use crate::network::{BackendKind, CaptureRecorder, HEADER_LEN, Offloads, Received, RxBuffer};
use crate::virtio::{Chain, DeviceIo, Work};

/// Buffers that the guest has offered.
///
/// A frame's length is known only when it is there, so there is always space for the largest. Those are dozens of
/// buffers, whose pieces are collected once and not for each frame.
#[derive(Debug, Default)]
pub(super) struct RxQueue {
    /// The chains, and how many of the pieces are each one's.
    pub chains: VecDeque<(Chain, usize)>,
    pieces: Vec<Segment>,
    /// How long the pieces are in all.
    bytes: usize,
}

pub(super) enum RxSpace {
    Enough,
    /// The guest has to offer more first.
    TooLittle,
    /// The guest's buffers can never hold it.
    TooSmall,
}

/// One frame on its way to the guest.
pub(super) struct RxFill<'a> {
    pub queue: usize,
    /// The frame has no more bytes than this.
    pub len: usize,
    pub mergeable: bool,
    pub agreed: Offloads,
    pub capture: Option<&'a CaptureRecorder>,
}

pub(super) enum RxDone {
    Frame(Received),
    /// There was none.
    Nothing,
    /// It leaves the guest what it did not agree to do.
    Unfit,
}

impl RxQueue {
    /// Takes buffers out of `queue` until there is room for `wanted` bytes.
    pub(super) fn gather(&mut self, io: &mut DeviceIo, queue: usize, wanted: usize, mergeable: bool) -> RxSpace {
        loop {
            if self.bytes >= wanted {
                let first = self.chains.front().map_or(0, |(chain, _)| chain.writable_len());
                return if first < HEADER_LEN || !mergeable && first < wanted {
                    RxSpace::TooSmall
                } else {
                    RxSpace::Enough
                };
            }
            if !mergeable && !self.chains.is_empty() {
                return RxSpace::TooSmall;
            }
            match io.pop(queue) {
                Some(chain) => {
                    let (len, before) = (chain.writable_len(), self.pieces.len());
                    self.pieces.extend(chain.writable_after(0, len));
                    self.bytes += len;
                    self.chains.push_back((chain, self.pieces.len() - before));
                }
                None if io.rearm(queue) => {}
                None => return RxSpace::TooLittle,
            }
        }
    }

    /// Lets the backend fill the first buffers with its next frame, and gives those to the guest.
    pub(super) fn fill(
        &mut self,
        io: &mut DeviceIo,
        backend: &mut BackendKind,
        filling: &RxFill<'_>,
    ) -> io::Result<RxDone> {
        let RxFill { queue, len, mergeable, agreed, capture } = *filling;
        let Some(memory) = self.chains.front().map(|(chain, _)| chain.memory().clone()) else {
            return Ok(RxDone::Nothing);
        };
        // All of them are looked at, and those that stay are moved to the front.
        io.charge(Work::Descriptors(self.pieces.len()));
        let received = self.behind_header(len, |pieces| {
            let received = backend.receive(&mut RxBuffer::new(&memory, pieces))?;
            let received = received.map(|it| Received { len: it.len.min(len), ..it });
            let fit = |it: &Received| agreed.contains(it.offload.needed()) && it.offload.check(it.len).is_ok();
            if let (Some(capture), Some(received)) = (capture, received.filter(fit)) {
                capture.record(&memory, pieces, received.len);
            }
            Ok::<_, io::Error>(received.map(|received| (received, fit(&received))))
        })?;
        let received = match received {
            None => return Ok(RxDone::Nothing),
            Some((_, false)) => return Ok(RxDone::Unfit),
            Some((received, true)) => received,
        };
        let total = HEADER_LEN + received.len;
        let (mut buffers, mut covered) = (0u16, 0);
        while let Some((chain, _)) = self.chains.get(usize::from(buffers)).filter(|_| covered < total) {
            covered += chain.writable_len();
            buffers += 1;
        }
        // Without mergeable buffers this is one as well (Virtio 1.3, 5.1.6.4.1).
        debug_assert!(mergeable || buffers == 1);
        let (header, mut left, mut used) = (received.offload.to_bytes(buffers), total, 0);
        for n in 0..buffers {
            let Some((mut chain, pieces)) = self.chains.pop_front() else { break };
            used += pieces;
            self.bytes -= chain.writable_len();
            let mut now = chain.writable_len().min(left);
            left -= now;
            // The first was seen to have room for it.
            if n == 0 && chain.write(&header).is_ok() {
                now -= HEADER_LEN;
            }
            chain.wrote(now);
            io.complete(queue, chain);
        }
        self.pieces.drain(..used.min(self.pieces.len()));
        Ok(RxDone::Frame(received))
    }

    /// Gives `f` the pieces of the `len` bytes behind a header's room.
    fn behind_header<R>(&mut self, len: usize, f: impl FnOnce(&[Segment]) -> R) -> R {
        let (from, skip) = place(&self.pieces, HEADER_LEN);
        let pieces = self.pieces.get_mut(from..).unwrap_or_default();
        let (last, end) = place(pieces, skip + len);
        // What is cut off now is there again for the next frame.
        let whole = (pieces.first().copied(), pieces.get(last).copied());
        if let Some(piece) = pieces.get_mut(last) {
            *piece = piece.split_at(end).0;
        }
        if let Some(piece) = pieces.first_mut() {
            *piece = piece.split_at(skip).1;
        }
        let answer = f(pieces.get(..=last).unwrap_or_default());
        if let (Some(piece), Some(whole)) = (pieces.get_mut(last), whole.1) {
            *piece = whole;
        }
        if let (Some(piece), Some(whole)) = (pieces.first_mut(), whole.0) {
            *piece = whole;
        }
        answer
    }
}

/// In which piece the byte at `at` lies, and how far in it; what is beyond all is in the last.
fn place(pieces: &[Segment], mut at: usize) -> (usize, usize) {
    for (n, piece) in pieces.iter().enumerate() {
        if at < piece.len() || n + 1 == pieces.len() {
            return (n, at);
        }
        at -= piece.len();
    }
    (0, 0)
}
