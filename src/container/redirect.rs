//! Threads that carry standard streams from and to files, bytes or another process's output.
//!
//! A guest that holds on to a stream holds no thread. What carries input ends with the process. What carries output reads
//! at most [`OUTPUT_TIMEOUT`](super::process::OUTPUT_TIMEOUT) longer, whether or not the process is waited for.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::process::{OutputLimit, ProcessShared};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{left, wait_any, wait_ready};
use crate::virtio::vsock::VsockStream;
use crate::vm::Vm;

/// Bytes that are carried at a time.
const CHUNK: usize = 64 * 1024;

/// What the bytes are carried from or to.
#[derive(Debug)]
enum Endpoint {
    File(File),
    /// The output of another process, which is only read.
    Process(VsockStream),
}

impl Endpoint {
    fn read(&self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => (&*file).read(to),
            Self::Process(stream) => (&*stream).read(to),
        }
    }

    fn write(&self, from: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => (&*file).write(from),
            Self::Process(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl AsFd for Endpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File(file) => file.as_fd(),
            Self::Process(stream) => stream.as_fd(),
        }
    }
}

/// A file of the embedder's, which processes may share.
#[derive(Debug)]
pub(super) struct SharedFile {
    file: Endpoint,
    /// Held from the look whether there is something to read until it is read: another reader may not take it.
    reading: Mutex<()>,
}

impl SharedFile {
    pub(super) fn new(file: File) -> Arc<Self> {
        Arc::new(Self { file: Endpoint::File(file), reading: Mutex::new(()) })
    }

    /// Of the output of another process.
    pub(super) fn of_process(stream: VsockStream) -> Arc<Self> {
        Arc::new(Self { file: Endpoint::Process(stream), reading: Mutex::new(()) })
    }

    /// Whether something can be written to it.
    pub(super) fn is_writable(&self) -> bool {
        matches!(self.file, Endpoint::File(_))
    }

    /// Reads what is there; `None` when another reader was faster.
    fn read_ready(&self, to: &mut [u8]) -> io::Result<Option<usize>> {
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if !wait_any(&[self.file.as_fd()], Some(Duration::ZERO))? {
            return Ok(None);
        }
        match self.file.read(to) {
            Ok(n) => Ok(Some(n)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Writes all of it, also to a file that does not block.
    fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.file.write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait_ready(&[], &[self.file.as_fd()], None)?;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The end of a thread that carries a process's output.
#[derive(Debug)]
pub(super) struct Redirect(Mutex<mpsc::Receiver<Result<bool>>>);

impl Redirect {
    /// Waits until all output has been carried, at most `timeout`; `None` when it has not.
    ///
    /// The result is whether something was cut off, or why the file did not take it.
    pub(super) fn wait(&self, timeout: Duration) -> Option<Result<bool>> {
        let end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match end.recv_timeout(timeout) {
            Ok(outcome) => Some(outcome),
            Err(mpsc::RecvTimeoutError::Timeout) => None,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                Some(Err(Error::new(ErrorKind::InvalidState, "the thread that wrote has ended")))
            }
        }
    }
}

/// Writes to `file` what the process prints to `stream`, on a thread called `name`.
///
/// When the file fails, or more is printed than the limit, the stream is closed, as a pipe is whose reader has gone.
pub(super) fn write_to(
    vm: &Vm,
    name: &'static str,
    file: Arc<SharedFile>,
    mut stream: VsockStream,
    (limit, state): (Option<OutputLimit>, Arc<ProcessShared>),
) -> Result<Redirect> {
    let (done, wait) = mpsc::sync_channel(1);
    vm.spawn_beside(name, move || {
        let outcome = carry_output(&mut stream, &file, limit, &state);
        drop(stream);
        // The process may have been dropped meanwhile.
        let _ = done.send(outcome);
    })?;
    Ok(Redirect(Mutex::new(wait)))
}

fn carry_output(
    stream: &mut VsockStream,
    file: &SharedFile,
    limit: Option<OutputLimit>,
    state: &ProcessShared,
) -> Result<bool> {
    let (mut buffer, mut truncated, mut until) = (vec![0; CHUNK], false, None::<Instant>);
    let mut room = limit.map_or(u64::MAX, |limit| limit.bytes.as_bytes());
    let reading = || "reading a process's output";
    loop {
        if until.is_none() {
            until = state.output_timeout().map(|timeout| Instant::now() + timeout);
        }
        let ready = match until {
            None => wait_any(&[stream.as_fd(), state.ended()], None).doing(reading)?,
            // What has arrived by then is read, and no more.
            Some(until) => wait_any(&[stream.as_fd()], Some(left(until))).doing(reading)? && !left(until).is_zero(),
        };
        if !ready {
            return Ok(truncated);
        }
        // The process may have ended, and its stream have nothing.
        if !wait_any(&[stream.as_fd()], Some(Duration::ZERO)).doing(reading)? {
            continue;
        }
        let read = match stream.read(&mut buffer) {
            Ok(0) => return Ok(truncated),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
            // The machine has ended, which the process's status says.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(truncated),
            Err(e) => return Err(e).doing(reading),
        };
        let taken = read.min(usize::try_from(room).unwrap_or(usize::MAX));
        let part = buffer.get(..taken).unwrap_or_default();
        file.write_all(part).doing(|| "writing a process's output to its file")?;
        room -= taken as u64;
        truncated |= taken < read;
        if let Some(limit) = limit.filter(|limit| truncated && !limit.truncate) {
            return Err(limit.exceeded());
        }
    }
}

/// Gives the process what is read from `file`, on a thread of its own, until the file or the process ends.
pub(super) fn read_from(
    vm: &Vm,
    file: Arc<SharedFile>,
    mut stream: VsockStream,
    state: Arc<ProcessShared>,
) -> Result<()> {
    state.ends(&stream);
    vm.spawn_beside("stdin", move || {
        if let Err(error) = carry_input(&file, &mut stream, &state) {
            log::debug!("a process's stdin is closed: {error}");
        }
    })
}

fn carry_input(file: &SharedFile, stream: &mut VsockStream, state: &ProcessShared) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        // A pipe may be silent for ever.
        wait_any(&[file.file.as_fd(), state.ended()], None)?;
        if state.has_ended() {
            return Ok(());
        }
        match file.read_ready(&mut buffer)? {
            Some(0) => return Ok(()),
            Some(n) => stream.write_all(buffer.get(..n).unwrap_or_default())?,
            None => {}
        }
    }
}

/// Gives the process these bytes, on a thread of its own, and then the end of file.
pub(super) fn read_bytes(vm: &Vm, bytes: Arc<[u8]>, mut stream: VsockStream, state: &ProcessShared) -> Result<()> {
    state.ends(&stream);
    vm.spawn_beside("stdin", move || {
        if let Err(error) = stream.write_all(&bytes) {
            log::debug!("a process has not read all of its stdin: {error}");
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{ExitStatus, pair};
    use crate::size::Size;
    use std::os::fd::OwnedFd;
    use std::thread;

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
    }

    /// What comes of carrying what is printed to a file, which has the rest.
    fn carried(printed: &[u8], limit: Option<OutputLimit>) -> (Result<bool>, Vec<u8>) {
        let (mut near, mut far) = pair();
        let name = format!("cofferdam-redirect-{}-{:?}", std::process::id(), thread::current().id());
        let path = std::env::temp_dir().join(name);
        let file = SharedFile::new(File::create(&path).unwrap());
        let outcome = thread::scope(|scope| {
            scope.spawn(move || {
                // The reader may have had enough.
                let _ = far.write_all(printed);
            });
            let outcome = carry_output(&mut near, &file, limit, &ProcessShared::new().unwrap());
            drop(near);
            outcome
        });
        let written = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        (outcome, written)
    }

    #[test]
    fn output_is_written_up_to_the_limit() {
        let printed = vec![7; 3 * CHUNK + 1];
        let (outcome, written) = carried(&printed, None);
        assert!(!outcome.unwrap() && written == printed);
        let limit = OutputLimit { bytes: Size::bytes(100), truncate: true };
        let (outcome, written) = carried(&printed, Some(limit));
        assert!(outcome.unwrap() && written == printed[..100]);
        let (outcome, written) = carried(&printed, Some(OutputLimit { truncate: false, ..limit }));
        let error = outcome.unwrap_err();
        assert_eq!((error.kind(), written.len()), (ErrorKind::ResourceExhausted, 100));
        assert!(error.to_string().contains("output_limit"), "{error}");
    }

    #[test]
    fn output_file_error_is_reported() {
        let (mut near, mut far) = pair();
        let full = SharedFile::new(File::options().write(true).open("/dev/full").unwrap());
        far.write_all(b"lost").unwrap();
        let error = carry_output(&mut near, &full, None, &ProcessShared::new().unwrap()).unwrap_err();
        assert_eq!((error.kind(), error.os_error()), (ErrorKind::ResourceExhausted, Some(libc::ENOSPC)));
    }

    #[test]
    fn nonblocking_pipe_gets_all_output() {
        let (near, far) = pair();
        let (mut reader, writer) = pipe();
        let writer = UnixFlags::nonblocking(writer);
        let printed = vec![3; 1 << 20];
        let read = thread::scope(|scope| {
            let (mut near, mut far) = (near, far);
            let bytes = &printed;
            scope.spawn(move || far.write_all(bytes).unwrap());
            scope.spawn(move || {
                let state = ProcessShared::new().unwrap();
                assert!(!carry_output(&mut near, &SharedFile::new(writer), None, &state).unwrap());
            });
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all
        });
        assert!(read == printed);
    }

    /// A file whose reads and writes do not block.
    struct UnixFlags;

    impl UnixFlags {
        fn nonblocking(file: File) -> File {
            // A pipe that is opened anew has a description of its own.
            use std::os::unix::fs::OpenOptionsExt;
            let path = crate::sys::path_of(file.as_fd());
            File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
        }
    }

    #[test]
    fn flooding_stream_is_cut_off_after_the_process_ended() {
        let ((mut near, mut far), state) = (pair(), ProcessShared::new().unwrap());
        state.finish(ExitStatus::TimedOut);
        let file = SharedFile::new(File::options().write(true).open("/dev/null").unwrap());
        let flood = thread::spawn(move || while far.write_all(&[0; CHUNK]).is_ok() {});
        let begin = Instant::now();
        assert!(!carry_output(&mut near, &file, None, &state).unwrap());
        assert!(begin.elapsed() >= state.output_timeout().unwrap());
        drop(near);
        flood.join().unwrap();
    }

    #[test]
    fn silent_pipe_does_not_delay_the_end() {
        let (mut near, mut far) = pair();
        let (reader, mut writer) = pipe();
        let (file, state) = (SharedFile::new(reader), ProcessShared::new().unwrap());
        thread::scope(|scope| {
            let carry = scope.spawn(|| carry_input(&file, &mut near, &state));
            writer.write_all(b"first").unwrap();
            let mut first = [0; 5];
            far.read_exact(&mut first).unwrap();
            assert_eq!(&first, b"first");
            state.finish(ExitStatus::Exited { code: 0 });
            carry.join().unwrap().unwrap();
        });
        drop(writer);
    }

    #[test]
    fn unread_input_does_not_delay_the_end() {
        let (mut near, far) = pair();
        let state = ProcessShared::new().unwrap();
        state.ends(&near);
        thread::scope(|scope| {
            let carry = scope.spawn(move || near.write_all(&[0; 8 << 20]));
            state.finish(ExitStatus::Exited { code: 0 });
            assert!(carry.join().unwrap().is_err());
        });
        drop(far);
    }

    #[test]
    fn the_output_of_one_process_is_the_input_of_another() {
        let ((near, mut printing), (mut stdin, mut reading)) = (pair(), pair());
        let (output, state) = (SharedFile::of_process(near), ProcessShared::new().unwrap());
        assert!(!output.is_writable() && output.write_all(b"x").is_err());
        let read = thread::scope(|scope| {
            scope.spawn(move || carry_input(&output, &mut stdin, &state).unwrap());
            scope.spawn(move || printing.write_all(&[5; 3 * CHUNK]).unwrap());
            let mut all = Vec::new();
            reading.read_to_end(&mut all).unwrap();
            all
        });
        assert!(read == [5; 3 * CHUNK]);
    }

    #[test]
    fn processes_that_share_a_pipe_take_its_bytes_once_and_all_end() {
        let (reader, mut writer) = pipe();
        let file = SharedFile::new(reader);
        let states = [ProcessShared::new().unwrap(), ProcessShared::new().unwrap()];
        let total: usize = thread::scope(|scope| {
            let mut readers = Vec::new();
            for state in &states {
                let ((mut near, mut far), file) = (pair(), &file);
                scope.spawn(move || carry_input(file, &mut near, state));
                readers.push(scope.spawn(move || {
                    let mut all = Vec::new();
                    far.read_to_end(&mut all).map(|_| all.len()).unwrap()
                }));
            }
            (0..1000).for_each(|_| writer.write_all(&[1; 100]).unwrap());
            drop(writer);
            readers.into_iter().map(|it| it.join().unwrap()).sum()
        });
        assert_eq!(total, 100_000);
    }
}
