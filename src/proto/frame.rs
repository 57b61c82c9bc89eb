//! Frames: the bounds of messages in a stream that arrives in any pieces. No I/O; owned by the stream's reader.

use super::alloc::vec::Vec;

/// The bytes before every payload: its length, the stream, the kind.
pub(crate) const HEADER_SIZE: usize = 12;

/// A buffer that grew beyond this for one long frame is given back after it.
const KEEP: usize = 16 * 1024;

/// One message as it was framed, not yet understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MessageFrame<'a> {
    /// Whom it is about: 0 is the VM, all others are process ids of the host's choice.
    pub(crate) stream: u32,
    /// Which message it is. Unknown kinds are to be skipped.
    pub(crate) kind: u32,
    /// The message's fields.
    pub(crate) payload: &'a [u8],
}

/// The stream cannot be followed any further; nothing that comes after can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// A frame announces a payload beyond the limit of its direction.
    TooLong(u32),
    /// No memory for a payload within the limit.
    NoMemory,
}

/// Finds the frames in a stream. Holds one frame at most, and of that only what has arrived: an announced length reserves nothing.
#[derive(Debug)]
pub(crate) struct Decoder {
    /// Header and payload of the frame that is arriving.
    buffer: Vec<u8>,
    /// The longest payload that is accepted.
    max: usize,
    /// The frame in `buffer` was handed out and goes with the next call.
    complete: bool,
    failed: Option<FrameError>,
}

impl Decoder {
    /// `max` is the longest acceptable payload: `FROM_GUEST_MAX` on the host, `FROM_HOST_MAX` in the guest.
    pub(crate) const fn new(max: usize) -> Self {
        Self { buffer: Vec::new(), max, complete: false, failed: None }
    }

    /// Takes bytes from the front of `input` up to the end of one frame. `None`: all of `input` was taken, and the frame is not yet whole.
    pub(crate) fn next<'a>(&'a mut self, input: &mut &[u8]) -> Result<Option<MessageFrame<'a>>, FrameError> {
        Ok(if self.advance(input)? { self.frame() } else { None })
    }

    /// As [`Decoder::next`], but only says whether the frame is whole: [`Decoder::frame`] returns it then.
    pub(crate) fn advance(&mut self, input: &mut &[u8]) -> Result<bool, FrameError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        if self.complete {
            self.complete = false;
            self.buffer.clear();
            self.buffer.shrink_to(KEEP);
        }
        if let Err(error) = self.fill(input) {
            self.failed = Some(error);
            return Err(error);
        }
        Ok(self.complete)
    }

    /// The frame that is whole, until the next call.
    pub(crate) fn frame(&self) -> Option<MessageFrame<'_>> {
        let (header, payload) = self.buffer.split_first_chunk::<HEADER_SIZE>().filter(|_| self.complete)?;
        let [_, stream, kind] = words(*header);
        Some(MessageFrame { stream, kind, payload })
    }

    /// Whether a frame has begun and not ended: the end of the stream here cuts it off.
    pub(crate) fn is_inside(&self) -> bool {
        !self.complete && !self.buffer.is_empty()
    }

    /// How many bytes must come at least until the frame is whole, as far as is known: what follows the frame is not among them.
    pub(crate) fn missing(&self) -> usize {
        let payload =
            |header: &[u8; HEADER_SIZE]| usize::try_from(words(*header)[0]).unwrap_or(usize::MAX).min(self.max);
        let have = if self.complete { 0 } else { self.buffer.len() };
        let whole = self.buffer.first_chunk().filter(|_| have > 0).map_or(HEADER_SIZE, |h| HEADER_SIZE + payload(h));
        whole.saturating_sub(have)
    }

    /// How many bytes are kept.
    pub(crate) fn kept(&self) -> usize {
        self.buffer.len()
    }

    fn fill(&mut self, input: &mut &[u8]) -> Result<(), FrameError> {
        self.take(HEADER_SIZE, input)?;
        let Some(header) = self.buffer.first_chunk::<HEADER_SIZE>() else {
            return Ok(());
        };
        let [length, ..] = words(*header);
        let payload = usize::try_from(length).ok().filter(|&n| n <= self.max).ok_or(FrameError::TooLong(length))?;
        self.take(HEADER_SIZE + payload, input)?;
        self.complete = self.buffer.len() == HEADER_SIZE + payload;
        Ok(())
    }

    /// Moves bytes from `input` until the buffer holds `target` of them.
    fn take(&mut self, target: usize, input: &mut &[u8]) -> Result<(), FrameError> {
        let wanted = target.saturating_sub(self.buffer.len()).min(input.len());
        let Some((now, later)) = input.split_at_checked(wanted) else {
            return Ok(());
        };
        self.buffer.try_reserve(wanted).map_err(|_| FrameError::NoMemory)?;
        self.buffer.extend_from_slice(now);
        *input = later;
        Ok(())
    }
}

fn words(header: [u8; HEADER_SIZE]) -> [u32; 3] {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = header;
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]), u32::from_le_bytes([i, j, k, l])]
}

/// Appends one frame whose payload `write` makes. Fails, leaving `out` as it was, when the payload is longer than `max`.
pub(super) fn append(
    out: &mut Vec<u8>,
    stream: u32,
    kind: u32,
    max: usize,
    write: impl FnOnce(&mut Vec<u8>),
) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; HEADER_SIZE]);
    write(out);
    let payload = out.len().saturating_sub(start + HEADER_SIZE);
    let length = u32::try_from(payload).unwrap_or(u32::MAX);
    if payload > max {
        out.truncate(start);
        return Err(FrameError::TooLong(length));
    }
    let header = [length.to_le_bytes(), stream.to_le_bytes(), kind.to_le_bytes()];
    for (to, from) in out.iter_mut().skip(start).zip(header.as_flattened()) {
        *to = *from;
    }
    Ok(())
}
