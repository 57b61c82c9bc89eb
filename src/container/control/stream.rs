//! [`ControlStream`]: the shim's messages, out of a stream whose bytes arrive in any pieces.
//!
//! The only place of the host that reads frames. It never waits: its owner waits for the descriptor, with a deadline.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{Decoder, FROM_GUEST_MAX, FrameError, FromGuest, Malformed};
use crate::virtio::vsock::VsockStream;

/// Bytes that are read at once.
pub(super) const READ_SIZE: usize = 4096;

/// The messages of one connection with the shim. It keeps one message and [`READ_SIZE`] bytes at most.
pub(super) struct ControlStream {
    stream: VsockStream,
    decoder: Decoder,
    buffer: Box<[u8; READ_SIZE]>,
    /// Where in the buffer the bytes begin and end that are not decoded yet.
    begin: usize,
    end: usize,
    extent: ReadExtent,
}

/// How far one read may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadExtent {
    /// As far as there are bytes: all of the stream is messages.
    Ahead,
    /// To the end of the message. What follows it is another program's.
    Message,
}

/// One message of the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GuestMessage<'a> {
    /// The process that it is about; 0 is the VM.
    pub process: u32,
    /// `None` for a kind that this build does not know, and skips.
    pub message: Option<FromGuest<'a>>,
}

/// Why a stream has no further message.
#[derive(Debug)]
pub(super) enum StreamError {
    /// The shim has closed it.
    Closed {
        /// In the middle of a message.
        cut_off: bool,
    },
    /// The host cannot read it.
    Io(io::Error),
    /// The shim does not keep to the protocol.
    Frame(FrameError),
    /// As `Frame`, inside a message.
    Malformed(Malformed),
}

impl From<StreamError> for Error {
    fn from(error: StreamError) -> Self {
        let closed = |how| Self::new(ErrorKind::GuestFailed, format!("the shim closed its connection{how}"));
        match error {
            StreamError::Closed { cut_off: false } => closed(""),
            StreamError::Closed { cut_off: true } => closed(" in the middle of a message"),
            StreamError::Io(error) => Self::from(error).doing("reading the control stream"),
            StreamError::Frame(error) => protocol_error(&error),
            StreamError::Malformed(error) => protocol_error(&error),
        }
    }
}

/// The guest's shim does not keep to the protocol.
pub(super) fn protocol_error(what: &dyn fmt::Debug) -> Error {
    Error::new(ErrorKind::GuestFailed, format!("the guest's shim breaks the protocol: {what:?}"))
}

impl ControlStream {
    /// Reads messages of `stream`, which blocks no more from now on.
    pub(super) fn new(stream: VsockStream, extent: ReadExtent) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let (decoder, buffer) = (Decoder::new(FROM_GUEST_MAX), Box::new([0; READ_SIZE]));
        Ok(Self { stream, decoder, buffer, begin: 0, end: 0, extent })
    }

    /// Returns the next message; `None` when it is not whole yet. Reads at most `reads` times, and counts them down.
    ///
    /// A caller that gets `None` and has reads left waits for the descriptor. Without, there may be more to read.
    pub(super) fn next(&mut self, reads: &mut usize) -> std::result::Result<Option<GuestMessage<'_>>, StreamError> {
        loop {
            let mut input = self.buffer.get(self.begin..self.end).unwrap_or_default();
            let whole = self.decoder.advance(&mut input).map_err(StreamError::Frame)?;
            self.begin = self.end - input.len();
            if whole {
                break;
            }
            if *reads == 0 || !self.fill()? {
                return Ok(None);
            }
            *reads -= 1;
        }
        let Some(frame) = self.decoder.frame() else { return Ok(None) };
        let message = FromGuest::parse(&frame).map_err(StreamError::Malformed)?;
        Ok(Some(GuestMessage { process: frame.stream, message }))
    }

    /// Reads once. False when nothing is there.
    fn fill(&mut self) -> std::result::Result<bool, StreamError> {
        let most = match self.extent {
            ReadExtent::Ahead => READ_SIZE,
            ReadExtent::Message => self.decoder.missing().min(READ_SIZE),
        };
        loop {
            match self.stream.read(self.buffer.get_mut(..most).unwrap_or_default()) {
                Ok(0) => return Err(StreamError::Closed { cut_off: self.decoder.is_inside() }),
                Ok(n) => {
                    (self.begin, self.end) = (0, n);
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(StreamError::Io(e)),
            }
        }
    }

    /// Whether bytes were read that are not decoded yet.
    pub(super) fn has_undecoded(&self) -> bool {
        self.begin < self.end
    }

    /// How many bytes are kept.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn undecoded(&self) -> usize {
        self.end - self.begin + self.decoder.kept()
    }

    /// The connection, to write to and to end.
    pub(super) fn connection(&self) -> &VsockStream {
        &self.stream
    }

    /// Gives the connection back, which blocks again.
    pub(super) fn into_connection(self) -> Result<VsockStream> {
        debug_assert!(!self.has_undecoded(), "what follows the message stays in the connection");
        self.stream.set_nonblocking(false).doing(|| "handing a connection over")?;
        Ok(self.stream)
    }
}

impl AsFd for ControlStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
