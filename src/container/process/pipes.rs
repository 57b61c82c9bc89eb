//! [`ProcessWriter`] and [`ProcessReader`]: the host's ends of a process's standard streams.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use crate::virtio::vsock::VsockStream;

/// The host's end of a process's standard input. Dropping it is end of file for the process.
#[derive(Debug)]
pub struct ProcessWriter(pub(crate) VsockStream);

/// The host's end of a process's standard output or error. Dropping it breaks the process's pipe.
#[derive(Debug)]
pub struct ProcessReader(pub(crate) VsockStream);

impl ProcessWriter {
    /// Returns the stream behind it, for non-blocking writes and time limits.
    pub fn into_stream(self) -> VsockStream {
        self.0
    }
}

impl ProcessReader {
    /// Returns the stream behind it, for non-blocking reads and time limits.
    pub fn into_stream(self) -> VsockStream {
        self.0
    }
}

impl Write for ProcessWriter {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for ProcessReader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.read(to)
    }
}

impl Read for &ProcessReader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(to)
    }
}

impl Write for &ProcessWriter {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        (&self.0).write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for ProcessWriter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for ProcessWriter {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsRawFd for ProcessReader {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for ProcessReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
