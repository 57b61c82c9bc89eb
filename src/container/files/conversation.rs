//! [`Conversation`]: one request for files of a guest, and its answer.
//!
//! It has a connection of its own. The caller's thread does all of it. Each wait is bounded, and so is what is kept of what the guest says.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::control::ended;
use super::super::image::shown;
use super::Files;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{
    Decoder, ENTRY_PATH_MAX, FILES_FRAME_MAX, FILES_PORT, FileAction, FileRecord, HEADER_SIZE, VERSION_FILES,
};
use crate::sys::{deadline, left, wait_any, wait_ready};
use crate::virtio::vsock::VsockStream;
use crate::vm::Vm;

/// How long the guest may neither say nor take a byte.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// What waits before it is sent, so that small files share system calls.
const UNSENT: usize = 64 * 1024;

/// The host's end of a conversation.
pub(super) struct Conversation {
    stream: VsockStream,
    /// To say that it has ended; `None` in tests, which have none.
    vm: Option<Vm>,
    decoder: Decoder,
    buffer: Box<[u8]>,
    /// Where in the buffer the bytes begin and end that are not decoded yet.
    begin: usize,
    end: usize,
    unsent: Vec<u8>,
    /// The end of the time for all of it.
    deadline: Option<Instant>,
}

/// Returns the bytes of a path in the guest.
///
/// # Errors
/// `InvalidConfig` when it is not absolute, is too long, or has a NUL.
pub(super) fn guest_path<'a>(method: &str, path: &'a Path) -> Result<&'a [u8]> {
    let bytes = path.as_os_str().as_bytes();
    let problem = match bytes {
        [b'/', ..] if bytes.contains(&0) => "has a NUL in it",
        [b'/', ..] if bytes.len() > ENTRY_PATH_MAX => "is longer than 4095 bytes, the most that Linux takes",
        [b'/', ..] => return Ok(bytes),
        _ => "is not absolute: begin it with a slash",
    };
    Err(Error::invalid(method, format!("the path {} of the container {problem}", shown(bytes))))
}

impl Conversation {
    /// Connects, and sends the request.
    pub(super) fn start(files: &Files, action: FileAction, path: &[u8]) -> Result<Self> {
        let container = &files.container;
        let version = container.agent().version();
        if version < VERSION_FILES {
            let why = format!("the guest's shim speaks protocol version {version}, files need {VERSION_FILES}");
            return Err(Error::new(ErrorKind::Incompatible, why));
        }
        let vm = container.vm();
        let stream = vm.connect_vsock(FILES_PORT).map_err(|error| match error.kind() {
            _ if vm.try_wait().is_some() => ended(),
            ErrorKind::NotFound => {
                error.with_kind(ErrorKind::GuestFailed).doing("reaching the guest's server of files")
            }
            _ => error.doing("reaching the guest's server of files"),
        })?;
        Self::over(stream, Some(vm.clone()), files.timeout, action, path)
    }

    pub(super) fn over(
        stream: VsockStream,
        vm: Option<Vm>,
        timeout: Duration,
        action: FileAction,
        path: &[u8],
    ) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let (decoder, buffer) = (Decoder::new(FILES_FRAME_MAX), vec![0; FILES_FRAME_MAX + HEADER_SIZE].into());
        let (unsent, deadline) = (Vec::new(), deadline(timeout));
        let mut conversation = Self { stream, vm, decoder, buffer, begin: 0, end: 0, unsent, deadline };
        conversation.say(&FileRecord::Request { action, path })?;
        Ok(conversation)
    }

    /// Says one thing, in time with what follows.
    pub(super) fn say(&mut self, record: &FileRecord<'_>) -> Result<()> {
        record.encode(&mut self.unsent).map_err(|_| {
            Error::new(ErrorKind::InvalidConfig, "a path or a link of the copy is longer than Linux allows")
        })?;
        if self.unsent.len() >= UNSENT { self.flush() } else { Ok(()) }
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// What the guest has said instead of taking it, above all.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.check_time()?;
        let mut sent = 0;
        while let Some(rest) = self.unsent.get(sent..).filter(|rest| !rest.is_empty()) {
            match (&self.stream).write(rest) {
                Ok(n) => {
                    sent += n;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // What the guest has said before it hung up says more.
                Err(_) => return Err(self.objection()),
            }
            if !self.wait(true)? {
                return Err(self.silent());
            }
            self.take_signs()?;
        }
        self.unsent.clear();
        Ok(())
    }

    /// Takes what the guest has said while it should only take. Does not wait.
    ///
    /// # Errors
    /// When that is more than that it goes on.
    fn take_signs(&mut self) -> Result<()> {
        if !wait_any(&[self.stream.as_fd()], Some(Duration::ZERO)).doing(|| "waiting for the guest")? {
            return Ok(());
        }
        self.fill()?;
        while self.advance()? {
            match self.parse()? {
                FileRecord::Progress => {}
                other => return Err(unexpected(&other)),
            }
        }
        Ok(())
    }

    /// What the guest says where it should only take.
    fn objection(&mut self) -> Error {
        self.unsent.clear();
        match self.next() {
            Ok(record) => unexpected(&record),
            Err(error) => error,
        }
    }

    /// Waits for the guest's next record, after sending what waits.
    ///
    /// # Errors
    /// What the guest has failed with, with its path; `GuestFailed` when it hangs up or breaks the protocol.
    pub(super) fn next(&mut self) -> Result<FileRecord<'_>> {
        if !self.unsent.is_empty() {
            self.flush()?;
        }
        loop {
            if !self.advance()? {
                self.fill()?;
            } else if !matches!(self.parse()?, FileRecord::Progress) {
                return self.parse();
            }
        }
    }

    /// Decodes what was read. True when a record is whole.
    fn advance(&mut self) -> Result<bool> {
        let mut input = self.buffer.get(self.begin..self.end).unwrap_or_default();
        let whole = self.decoder.advance(&mut input).map_err(|e| broken(&e))?;
        self.begin = self.end - input.len();
        Ok(whole)
    }

    /// The record that is whole.
    fn parse(&self) -> Result<FileRecord<'_>> {
        let Some(frame) = self.decoder.frame() else { return Err(broken(&"no frame")) };
        match FileRecord::parse(&frame) {
            Ok(Some(FileRecord::Failed { errno, path })) => Err(failure(errno.get(), path)),
            Ok(Some(record)) => Ok(record),
            Ok(None) => Err(broken(&"a record of another version")),
            Err(e) => Err(broken(&e)),
        }
    }

    /// Reads once, and waits for it.
    fn fill(&mut self) -> Result<()> {
        loop {
            if left_of(self.deadline).is_zero() {
                return Err(self.silent());
            }
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(self.hung_up()),
                Ok(n) => {
                    (self.begin, self.end) = (0, n);
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(false)? {
                        return Err(self.silent());
                    }
                }
                Err(e) => return Err(Error::from(e).doing("reading the guest's answer")),
            }
        }
    }

    /// Waits until the guest has said something, or can take something. False when it is too late.
    fn wait(&self, write: bool) -> Result<bool> {
        let (fd, time) = ([self.stream.as_fd()], IDLE_TIMEOUT.min(left_of(self.deadline)));
        let writable = if write { &fd[..] } else { &[] };
        let ready = wait_ready(&fd, writable, Some(time)).doing(|| "waiting for the guest")?;
        Ok(ready && !left_of(self.deadline).is_zero())
    }

    /// # Errors
    /// `TimedOut` when the time for all of it is over.
    pub(super) fn check_time(&self) -> Result<()> {
        if left_of(self.deadline).is_zero() { Err(self.silent()) } else { Ok(()) }
    }

    /// Takes the end of the answer.
    pub(super) fn finish(&mut self) -> Result<()> {
        match self.next()? {
            FileRecord::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn silent(&self) -> Error {
        let why = match left_of(self.deadline).is_zero() {
            true => "the time for it is over: Files::timeout gives it more".to_owned(),
            false => format!("the guest has not gone on for {IDLE_TIMEOUT:?}: it is paused, busy, or does not answer"),
        };
        Error::new(ErrorKind::TimedOut, why)
    }

    fn hung_up(&self) -> Error {
        if self.vm.as_ref().is_some_and(|vm| vm.try_wait().is_some()) {
            return ended();
        }
        Error::new(ErrorKind::GuestFailed, "the guest hung up in the middle of it")
    }
}

fn left_of(deadline: Option<Instant>) -> Duration {
    deadline.map_or(Duration::MAX, left)
}

pub(super) fn broken(what: &dyn std::fmt::Debug) -> Error {
    Error::new(ErrorKind::GuestFailed, format!("the guest's server of files breaks the protocol: {what:?}"))
}

/// The guest says what does not belong there.
pub(super) fn unexpected(record: &FileRecord<'_>) -> Error {
    let what = match record {
        FileRecord::Request { .. } => "a request",
        FileRecord::Entry(_) => "an entry",
        FileRecord::Data(_) | FileRecord::Hole { .. } => "data",
        FileRecord::FileEnd => "the end of a file",
        FileRecord::Leave => "the end of a directory",
        FileRecord::Done => "the end",
        FileRecord::Progress => "a sign",
        FileRecord::Failed { .. } => "a failure",
    };
    broken(&format_args!("{what} where none belongs"))
}

/// What the guest has failed with, and at which file.
fn failure(errno: i32, path: &[u8]) -> Error {
    if errno == libc::EAGAIN && path.is_empty() {
        let why = "16 requests for files of this container are open already: let some of them end first";
        return Error::new(ErrorKind::ResourceExhausted, why);
    }
    let error = Error::from(io::Error::from_raw_os_error(errno));
    let error = match errno {
        // It has other causes than on a host.
        libc::EAGAIN | libc::ENOMEM => error.with_kind(ErrorKind::GuestFailed),
        libc::EINVAL => Error::new(ErrorKind::Unsupported, "it is no regular file, directory or link"),
        libc::E2BIG => Error::new(ErrorKind::ResourceExhausted, "it is more than 128 directories deep"),
        _ => error,
    };
    error.doing(format!("{} in the guest", shown(path)))
}
