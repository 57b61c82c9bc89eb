//! [`Process`]: a program that runs in a container, with the vocabulary of [`std::process::Child`].

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::control::{ControlClient, KILL_MARGIN};
use super::redirect::Redirect;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event_loop::Remote;
use crate::proto::FromHost;
use crate::size::Size;
use crate::sys::{EventFd, borrow, deadline, eventfd, left, wait_any};
use crate::virtio::vsock::{StreamBreaker, VsockStream};
use crate::vm::Exit;

/// How long the guest may take to hand over the output of an ended process.
pub(super) const OUTPUT_TIMEOUT: Duration = Duration::from_secs(10);

/// How a process ended. The failure of a program and the failure of its machine never look alike.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitStatus {
    /// The process exited.
    Exited {
        /// With this code, 0 to 255.
        code: i32,
    },
    /// A signal terminated the process.
    Signaled {
        /// The number of the signal.
        signal: i32,
    },
    /// The guest's kernel killed the process for want of memory.
    OomKilled,
    /// Its time was over, and the process was killed with all that it had started.
    TimedOut,
    /// The machine ended while the process ran.
    VmEnded {
        /// How.
        exit: Exit,
    },
}

impl ExitStatus {
    /// Returns whether the process exited with code 0.
    pub fn success(&self) -> bool {
        self.code() == Some(0)
    }

    /// Returns the code with which the process exited, if it did.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Exited { code } => Some(*code),
            _ => None,
        }
    }

    /// Returns the signal that terminated the process, if one did.
    pub fn signal(&self) -> Option<i32> {
        match self {
            Self::Signaled { signal } => Some(*signal),
            _ => None,
        }
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { code } => write!(f, "exit code {code}"),
            Self::Signaled { signal } => write!(f, "ended by signal {signal}"),
            Self::OomKilled => f.write_str("killed for want of memory"),
            Self::TimedOut => f.write_str("killed when its time was over"),
            Self::VmEnded { exit } => write!(f, "its machine ended: {exit}"),
        }
    }
}

/// Whether a process still runs; written once by the agent's thread.
pub(super) struct ProcessShared {
    status: Mutex<Option<Ended>>,
    changed: Condvar,
    /// Readable once it has ended.
    ended: EventFd,
    /// Its standard streams, for the host to end them; `None` once it has.
    streams: Mutex<Option<Vec<StreamBreaker>>>,
    /// Those of them that end with the process, whatever the guest does.
    ending: Mutex<Vec<StreamBreaker>>,
}

#[derive(Clone)]
enum Ended {
    With(ExitStatus),
    /// The container was dropped, and how it ended is not known any more.
    Unknown,
}

impl ProcessShared {
    pub(super) fn new() -> Result<Arc<Self>> {
        let ended = eventfd().doing(|| "creating a process's descriptor")?;
        Ok(Arc::new(Self {
            status: Mutex::new(None),
            changed: Condvar::new(),
            ended,
            streams: Mutex::new(Some(Vec::new())),
            ending: Mutex::default(),
        }))
    }

    fn status(&self) -> MutexGuard<'_, Option<Ended>> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, ended: Ended) {
        self.status().get_or_insert(ended);
        self.ending().drain(..).for_each(|stream| stream.break_off());
        self.changed.notify_all();
        // A full counter is readable, which is all that is wanted.
        let _ = self.ended.write(1);
    }

    pub(super) fn finish(&self, status: ExitStatus) {
        self.set(Ended::With(status));
    }

    pub(super) fn abandon(&self) {
        self.set(Ended::Unknown);
    }

    /// Whether it has ended, however.
    pub(super) fn has_ended(&self) -> bool {
        self.status().is_some()
    }

    /// Returns how long its output may go on, once it has ended.
    pub(super) fn output_timeout(&self) -> Option<Duration> {
        self.status().as_ref().map(|ended| match ended {
            Ended::With(ExitStatus::TimedOut | ExitStatus::Signaled { signal: libc::SIGKILL }) => KILL_MARGIN,
            _ => OUTPUT_TIMEOUT,
        })
    }

    fn has_timed_out(&self) -> bool {
        matches!(&*self.status(), Some(Ended::With(ExitStatus::TimedOut)))
    }

    /// Readable once it has ended.
    pub(super) fn ended(&self) -> BorrowedFd<'_> {
        borrow(&self.ended)
    }

    fn ending(&self) -> MutexGuard<'_, Vec<StreamBreaker>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends this stream together with the process, so that no thread waits for a guest that does not read.
    pub(super) fn ends(&self, stream: &VsockStream) {
        self.ending().push(stream.breaker());
        // One that has ended already ends it now.
        if self.has_ended() {
            self.ending().drain(..).for_each(|stream| stream.break_off());
        }
    }

    fn streams(&self) -> MutexGuard<'_, Option<Vec<StreamBreaker>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has this stream, which ends with it when the host ends it.
    pub(super) fn keep(&self, stream: &VsockStream) {
        match self.streams().as_mut() {
            Some(streams) => streams.push(stream.breaker()),
            None => stream.breaker().break_off(),
        }
    }

    /// Ends its streams: what has arrived can still be read.
    pub(super) fn break_streams(&self) {
        self.streams().take().iter().flatten().for_each(StreamBreaker::break_off);
    }

    /// Waits for the end, but not beyond `deadline`.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Result<Option<ExitStatus>> {
        let mut status = self.status();
        loop {
            match &*status {
                Some(Ended::With(status)) => return Ok(Some(status.clone())),
                Some(Ended::Unknown) => {
                    return Err(Error::new(ErrorKind::InvalidState, "the container was dropped"));
                }
                None => {}
            }
            status = match deadline.map(left) {
                None => self.changed.wait(status).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => return Ok(None),
                Some(left) => self.changed.wait_timeout(status, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}

/// The host's end of a process's standard input. Dropping it is end of file for the process.
#[derive(Debug)]
pub struct ProcessWriter(pub(super) VsockStream);

/// The host's end of a process's standard output or error. Dropping it breaks the process's pipe.
#[derive(Debug)]
pub struct ProcessReader(pub(super) VsockStream);

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
    /// More was printed on standard output than the limit, with [`Exec::truncate_output`](super::Exec::truncate_output).
    pub stdout_truncated: bool,
    /// The same of standard error.
    pub stderr_truncated: bool,
}

/// How much of each stream is read, and what happens beyond.
#[derive(Debug, Clone, Copy)]
pub(super) struct OutputLimit {
    pub bytes: Size,
    pub truncate: bool,
}

impl OutputLimit {
    /// The error about a process that printed more.
    pub(super) fn exceeded(&self) -> Error {
        let text = format!("output_limit: the process printed more than {}", self.bytes);
        Error::new(ErrorKind::ResourceExhausted, text)
    }
}

/// A program that runs in a container; made by [`Exec::spawn`](super::Exec::spawn).
///
/// Dropping the handle lets the process run on, as with [`std::process::Child`]. It ends with its container at the
/// latest. The descriptor behind [`AsFd`] and [`AsRawFd`] becomes readable when the process has ended.
pub struct Process {
    /// Standard input, when it was piped. Take it to write, and drop it for end of file.
    pub stdin: Option<ProcessWriter>,
    /// Standard output, when it was piped.
    pub stdout: Option<ProcessReader>,
    /// Standard error, when it was piped.
    pub stderr: Option<ProcessReader>,
    /// Standard output and error, where threads write them to files.
    pub(super) redirects: [Option<Redirect>; 2],
    /// Which of those were cut off.
    cut_off: [bool; 2],
    remote: Remote<ControlClient>,
    number: u32,
    state: Arc<ProcessShared>,
    limit: OutputLimit,
}

impl Process {
    pub(super) fn new(
        remote: Remote<ControlClient>,
        number: u32,
        state: Arc<ProcessShared>,
        limit: OutputLimit,
    ) -> Self {
        let (stdin, stdout, stderr) = (None, None, None);
        Self { stdin, stdout, stderr, redirects: [None, None], cut_off: [false; 2], remote, number, state, limit }
    }

    /// Closes standard input and waits until the process has ended.
    ///
    /// Processes that it left behind are not waited for. Output that goes to a file is waited for, at most ten seconds
    /// after the end.
    ///
    /// Waits as long as the process runs. One with [`Exec::timeout`](super::Exec::timeout) has ended two seconds after
    /// its time is over, whatever the guest does; a killed one two seconds after the kill. When the container ends, or
    /// is dropped, the process has ended with [`ExitStatus::VmEnded`].
    ///
    /// # Errors
    /// - `ResourceExhausted`, `Io` and others when a file did not take the process's output, or was given more than
    ///   [`Exec::output_limit`](super::Exec::output_limit). [`Process::try_wait`] has the status all the same.
    /// - `TimedOut` when that file blocks.
    /// - `InvalidState` when a mistake of this crate has ended the thread that learns of the end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        drop(self.stdin.take());
        let unknown = || Error::new(ErrorKind::InvalidState, "the process's end is unknown");
        let status = self.state.wait(None)?.ok_or_else(unknown)?;
        // Threads read no longer than the first; the margin is for what they write.
        let until = Instant::now() + self.state.output_timeout().unwrap_or(OUTPUT_TIMEOUT) + KILL_MARGIN;
        let mut outcome = Ok(());
        for (redirect, cut_off) in self.redirects.iter_mut().zip(&mut self.cut_off) {
            let Some(redirect) = redirect.take() else { continue };
            let late = || Error::new(ErrorKind::TimedOut, "the embedder's file does not take the process's output");
            match redirect.wait(left(until)).unwrap_or_else(|| Err(late())) {
                Ok(truncated) => *cut_off = truncated,
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome.map(|()| status)
    }

    /// Waits until the process has ended, at most `timeout`; `None` when it still runs.
    ///
    /// Output that goes to a file may still be on its way then, as after [`Process::try_wait`].
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<ExitStatus>> {
        self.state.wait(deadline(timeout))
    }

    /// Returns how the process ended, or `None` while it runs. Never waits.
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub fn try_wait(&self) -> Result<Option<ExitStatus>> {
        self.wait_timeout(Duration::ZERO)
    }

    /// Kills the process and everything that it started.
    ///
    /// That is done also when the process itself has ended. Does not wait for the guest. When the guest does not report
    /// the process's end within two seconds, its end is signal 9. A guest that runs and has not reported it after 30
    /// seconds more is ended, with [`Exit::Unresponsive`](crate::Exit::Unresponsive).
    ///
    /// # Errors
    /// - `InvalidState` when the container has ended.
    /// - `TimedOut` when the host is too busy for ten seconds.
    /// - `ResourceExhausted` when 16 MiB of requests wait for a guest that does not read.
    ///
    /// In each case but the first the process has ended for the host two seconds later.
    pub fn kill(&self) -> Result<()> {
        let number = self.number;
        self.remote.with(move |client| client.kill(number))?
    }

    /// Sends a signal, 1 to 64, to the process alone.
    ///
    /// # Errors
    /// `InvalidConfig` for a number that is no signal. `InvalidState` when the container has ended. `TimedOut` when the
    /// host is too busy for ten seconds.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let signo = u8::try_from(signal).ok().filter(|it| (1..=64).contains(it));
        let signo = signo.ok_or_else(|| Error::invalid("signal", format!("{signal} is not a signal (1 to 64)")))?;
        let (number, message) = (self.number, FromHost::Signal { signo, group: false });
        self.remote.with(move |client| client.send(number, &message))?
    }

    /// Closes standard input, reads all output, and waits for the end.
    ///
    /// What a background process prints later is not waited for.
    ///
    /// Waits as long as [`Process::wait`], and at most ten seconds more for the guest to hand over the output. Of a
    /// process whose time was over it returns the output that has arrived two seconds later.
    ///
    /// # Errors
    /// `ResourceExhausted` beyond [`Exec::output_limit`](super::Exec::output_limit); the process is killed then.
    /// `TimedOut` when the process has ended and the guest has not ended its output ten seconds later.
    pub fn wait_with_output(mut self) -> Result<Output> {
        drop(self.stdin.take());
        let streams = [self.stdout.take(), self.stderr.take()];
        match read_all(streams, &self.state, self.limit) {
            Ok([stdout, stderr]) => Ok(Output {
                status: self.wait()?,
                stdout: stdout.bytes,
                stderr: stderr.bytes,
                stdout_truncated: stdout.truncated || self.cut_off[0],
                stderr_truncated: stderr.truncated || self.cut_off[1],
            }),
            Err(error) => {
                // It would block forever without a reader.
                let _ = self.kill();
                Err(error)
            }
        }
    }

    /// Kills it: its streams could not be had, so it has no owner.
    pub(super) fn give_up(&self) {
        if let Err(error) = self.kill() {
            log::debug!("a process without an owner was not killed: {error}");
        }
    }
}

/// What was read of a stream.
#[derive(Debug, Default)]
struct Collected {
    bytes: Vec<u8>,
    truncated: bool,
}

/// Reads both streams to their ends as they come. What the guest owes after the process's end has a bound.
fn read_all(streams: [Option<ProcessReader>; 2], state: &ProcessShared, limit: OutputLimit) -> Result<[Collected; 2]> {
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

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.state.ended)
    }
}

impl AsRawFd for Process {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Process({})", self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn exit_status_accessors_match_the_variant() {
        let status = ExitStatus::Exited { code: 3 };
        assert_eq!((status.code(), status.signal(), status.success()), (Some(3), None, false));
        assert_eq!(ExitStatus::Signaled { signal: 9 }.signal(), Some(9));
        assert_eq!(status.to_string(), "exit code 3");
    }
}
