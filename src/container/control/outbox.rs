//! [`Outbox`]: the host's requests that the shim has not taken yet.

use std::io::{self, Write};

use crate::error::{Error, ErrorKind, Result};
use crate::proto::FromHost;
use crate::virtio::vsock::VsockStream;

/// The host's requests that may wait for a guest that does not read, in bytes.
pub(super) const MAX_UNSENT: usize = 16 * 1024 * 1024;

/// Holds requests for the shim, and writes them without blocking.
pub(super) struct Outbox {
    stream: VsockStream,
    unsent: Vec<u8>,
    /// How much of it was sent.
    sent: usize,
}

/// Whether a request may go beyond [`MAX_UNSENT`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// It may not: the caller gets an error.
    Ordinary,
    /// It may. There is one of a few bytes for each process, which must not run without an owner.
    Cleanup,
}

impl Outbox {
    /// Of this connection, which does not block.
    pub(super) fn new(stream: VsockStream) -> Self {
        Self { stream, unsent: Vec::new(), sent: 0 }
    }

    /// Takes a request in. [`Outbox::flush`] sends it.
    ///
    /// # Errors
    /// `ResourceExhausted` when the guest does not read; `InvalidConfig` for a program whose arguments are too long.
    pub(super) fn push(&mut self, process: u32, message: &FromHost<'_>, urgency: Urgency) -> Result<()> {
        let before = self.unsent.len();
        message.encode(process, &mut self.unsent).map_err(|_| match message {
            FromHost::Spawn(_) => Error::invalid("exec", "arguments and environment are together longer than 4 MiB"),
            _ => Error::new(ErrorKind::ResourceExhausted, "a request to the shim is too long"),
        })?;
        if self.len() > MAX_UNSENT && urgency == Urgency::Ordinary {
            self.unsent.truncate(before);
            return Err(Error::new(ErrorKind::ResourceExhausted, "the guest does not read its control stream"));
        }
        Ok(())
    }

    /// How many bytes wait.
    pub(super) fn len(&self) -> usize {
        self.unsent.len() - self.sent
    }

    /// How many bytes are kept, sent ones too.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.unsent.len()
    }

    /// Writes what the shim takes, with at most `writes` system calls. True when these were too few.
    pub(super) fn flush(&mut self, writes: usize) -> bool {
        for _ in 0..writes {
            if self.len() == 0 {
                self.clear();
                return false;
            }
            match self.stream.write(self.unsent.get(self.sent..).unwrap_or_default()) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.compact();
                    return false;
                }
                // The end is seen by reading, which is about to fail too.
                Err(_) => self.clear(),
            }
        }
        self.compact();
        self.len() > 0
    }

    /// Drops the bytes that were sent, once they are more than half of the buffer.
    fn compact(&mut self) {
        if self.sent > self.unsent.len() / 2 {
            drop(self.unsent.drain(..self.sent));
            self.sent = 0;
        }
    }

    pub(super) fn clear(&mut self) {
        (self.unsent, self.sent) = (Vec::new(), 0);
    }
}
