//! [`Output`]: all that a process printed, and how it is read within a limit.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use super::{ExitStatus, OUTPUT_TIMEOUT, ProcessReader, ProcessShared};
use crate::container::control::KILL_MARGIN;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys::{deadline, left, wait_any};

/// What a process printed, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it printed on standard output, if that was piped.
    pub stdout: Vec<u8>,
    /// What it printed on standard error, if that was piped.
    pub stderr: Vec<u8>,
    /// More was printed on standard output than the limit, with [`Exec::truncate_output`](crate::Exec::truncate_output).
    pub stdout_truncated: bool,
    /// The same of standard error.
    pub stderr_truncated: bool,
    /// How many of its processes the guest's kernel has killed for want of memory.
    ///
    /// Those that it started count too. With [`ExitStatus::OomKilled`] it is one of them itself.
    pub oom_kills: u32,
}

/// How much of each stream is read, and what happens beyond.
#[derive(Debug, Clone, Copy)]
pub(in crate::container) struct OutputLimit {
    pub bytes: Size,
    pub truncate: bool,
}

impl OutputLimit {
    /// The error about a process that printed more.
    pub(in crate::container) fn exceeded(&self) -> Error {
        let text = format!("output_limit: the process printed more than {}", self.bytes);
        Error::new(ErrorKind::ResourceExhausted, text)
    }
}

/// What was read of a stream.
#[derive(Debug, Default)]
pub(super) struct Collected {
    pub(super) bytes: Vec<u8>,
    pub(super) truncated: bool,
}

/// Reads both streams to their ends as they come. What the guest owes after the process's end has a bound.
pub(super) fn read_all(
    streams: [Option<ProcessReader>; 2],
    state: &ProcessShared,
    limit: OutputLimit,
) -> Result<[Collected; 2]> {
    let mut streams = streams;
    let mut read = [Collected::default(), Collected::default()];
    let most = usize::try_from(limit.bytes.as_bytes()).unwrap_or(usize::MAX);
    let mut buffer = vec![0; 64 * 1024];
    let mut until = None;
    for stream in streams.iter().flatten() {
        stream.0.set_nonblocking(true)?;
    }
    while streams.iter().any(Option::is_some) {
        if until.is_none() && state.has_ended() {
            until = deadline(if state.has_timed_out() { KILL_MARGIN } else { OUTPUT_TIMEOUT });
        }
        let mut fds: Vec<BorrowedFd<'_>> = streams.iter().flatten().map(AsFd::as_fd).collect();
        if until.is_none() {
            fds.push(state.ended());
        }
        if !wait_any(&fds, until.map(left)).doing(|| "waiting for a process's output")? || until.is_some_and(is_over) {
            if state.has_timed_out() {
                break;
            }
            return Err(Error::new(
                ErrorKind::TimedOut,
                format!("the process has ended, and the guest has not ended its output within {OUTPUT_TIMEOUT:?}"),
            ));
        }
        for (stream, read) in streams.iter_mut().zip(&mut read) {
            let Some(reader) = stream else { continue };
            match reader.read(&mut buffer) {
                Ok(0) => *stream = None,
                Ok(n) => {
                    let taken = n.min(most.saturating_sub(read.bytes.len()));
                    read.bytes.extend_from_slice(buffer.get(..taken).unwrap_or_default());
                    read.truncated |= taken < n;
                    if read.truncated && !limit.truncate {
                        return Err(limit.exceeded());
                    }
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(e).doing(|| "reading a process's output"),
            }
        }
    }
    Ok(read)
}

fn is_over(deadline: Instant) -> bool {
    left(deadline).is_zero()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::vsock::VsockStream;
    use std::io::Write;

    /// What is read of a process that prints this on each stream, and how.
    fn collected(printed: [&[u8]; 2], limit: OutputLimit) -> Result<[Collected; 2]> {
        let (streams, fars): (Vec<_>, Vec<_>) = (0..2)
            .map(|_| VsockStream::pair().map(|(near, far, _)| (ProcessReader(near), far)))
            .collect::<io::Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        let state = ProcessShared::new()?;
        std::thread::scope(|scope| {
            for (mut far, bytes) in fars.into_iter().zip(printed) {
                scope.spawn(move || {
                    far.set_nonblocking(false).unwrap();
                    // The reader may have had enough.
                    let _ = far.write_all(bytes);
                });
            }
            let mut streams = streams.into_iter().map(Some);
            read_all([streams.next().flatten(), streams.next().flatten()], &state, limit)
        })
    }

    #[test]
    fn output_beyond_the_limit_is_an_error_or_is_cut_off() {
        let (many, few) = (vec![b'x'; 300_000], b"few".as_slice());
        let limit = OutputLimit { bytes: Size::bytes(100_000), truncate: false };
        let error = collected([&many, few], limit).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        let [out, err] = collected([&many, few], OutputLimit { truncate: true, ..limit }).unwrap();
        assert_eq!((out.bytes.len(), out.truncated), (100_000, true));
        assert_eq!((err.bytes.as_slice(), err.truncated), (few, false));
        // As much as the limit is not beyond it.
        let [out, _] = collected([&many[..100_000], few], limit).unwrap();
        assert_eq!((out.bytes.len(), out.truncated), (100_000, false));
    }
}
