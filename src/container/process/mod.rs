//! [`Process`]: a program that runs in a container, with the vocabulary of [`std::process::Child`].

mod exit_status;
mod output;
mod pipes;
mod shared;

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use exit_status::ExitStatus;
pub use output::Output;
pub(super) use output::OutputLimit;
use output::read_all;
pub use pipes::{ProcessReader, ProcessWriter};
pub(super) use shared::{OUTPUT_TIMEOUT, ProcessShared};

use super::control::{ControlClient, KILL_MARGIN, resize_terminal, signal_process};
use super::redirect::Redirect;
use crate::error::{Error, ErrorKind, Result};
use crate::event_loop::Remote;
use crate::proto::TerminalSize;
use crate::sys::{deadline, left};

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
    /// Its streams are a terminal.
    pub(super) has_terminal: bool,
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
        let (redirects, cut_off, has_terminal) = ([None, None], [false; 2], false);
        Self { stdin, stdout, stderr, redirects, cut_off, has_terminal, remote, number, state, limit }
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
    /// - `ResourceExhausted` when 16 MiB of requests wait for a guest that does not read, and it was killed before or has ended.
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
    /// host is too busy for ten seconds; the signal is not sent then. `ResourceExhausted` as of [`Process::kill`].
    pub fn signal(&self, signal: i32) -> Result<()> {
        let signo = u8::try_from(signal).ok().filter(|it| (1..=64).contains(it));
        let signo = signo.ok_or_else(|| Error::invalid("signal", format!("{signal} is not a signal (1 to 64)")))?;
        signal_process(&self.remote, self.number, signo, None)
    }

    /// Sets the size of the window of its terminal; see [`Exec::pty`](super::Exec::pty).
    ///
    /// The programs in the terminal get SIGWINCH when it is another size. One that has ended is no error. Does not wait
    /// for the guest.
    ///
    /// # Errors
    /// `InvalidConfig` without a terminal. `InvalidState` when the container has ended. `TimedOut` when the host is too
    /// busy for ten seconds. `ResourceExhausted` as of [`Process::kill`].
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        if !self.has_terminal {
            return Err(Error::invalid("resize", "the process has no terminal; see `Exec::pty`"));
        }
        resize_terminal(&self.remote, self.number, TerminalSize { rows, columns })
    }

    /// Returns how many of its processes were killed for want of memory so far.
    ///
    /// The guest's kernel did it, and the guest says so. Those that it started count too. Each time there are more is an
    /// [`EventKind::OutOfMemory`](crate::event::EventKind::OutOfMemory).
    pub fn oom_kills(&self) -> u32 {
        self.state.oom_kills()
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
                // Said before its end, which was waited for above.
                oom_kills: self.state.oom_kills(),
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

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.state.ended()
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
