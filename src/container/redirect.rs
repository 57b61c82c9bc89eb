//! Standard streams that are files or bytes of the embedder's: threads that carry them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use super::process::State;
use crate::error::{Context, Result};
use crate::sys::{STACK, spawn, wait_any};
use crate::virtio::vsock::VsockStream;

/// Bytes that are carried at a time.
const CHUNK: usize = 64 * 1024;

/// The end of a thread that carries a process's output.
#[derive(Debug)]
pub(super) struct Redirect(Mutex<mpsc::Receiver<()>>);

impl Redirect {
    /// Waits until all output has been carried, at most `timeout`.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let end = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(end.recv_timeout(timeout), Err(mpsc::RecvTimeoutError::Disconnected))
    }
}

/// Writes to `file` what the process prints to `stream`, on a thread called `name`.
///
/// When the file fails, the stream is closed, as a pipe is whose reader has gone.
pub(super) fn write_to(name: &'static str, file: Arc<File>, mut stream: VsockStream) -> Result<Redirect> {
    let (done, wait) = mpsc::channel::<()>();
    let carry = move || {
        // Its drop tells that all is done.
        let _done = done;
        if let Err(error) = copy(&mut stream, &mut &*file) {
            log::warn!("a process's {name} is closed: {error}");
        }
    };
    spawn(name.into(), 4 * STACK, carry).doing(|| format!("starting thread {name}"))?;
    Ok(Redirect(Mutex::new(wait)))
}

/// Gives the process what is read from `file`, on a thread of its own, until the file or the process ends.
pub(super) fn read_from(file: Arc<File>, mut stream: VsockStream, state: Arc<State>) -> Result<()> {
    let carry = move || {
        let mut from = UntilEnd { file: &file, state: &state };
        if let Err(error) = copy(&mut from, &mut stream) {
            log::debug!("a process's stdin is closed: {error}");
        }
    };
    spawn("stdin".into(), 4 * STACK, carry).doing(|| "starting thread stdin").map(drop)
}

/// Gives the process these bytes, on a thread of its own, and then the end of file.
pub(super) fn read_bytes(bytes: Arc<[u8]>, mut stream: VsockStream) -> Result<()> {
    let carry = move || {
        if let Err(error) = stream.write_all(&bytes) {
            log::debug!("a process has not read all of its stdin: {error}");
        }
    };
    spawn("stdin".into(), 4 * STACK, carry).doing(|| "starting thread stdin").map(drop)
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(buffer.get(..n).unwrap_or_default())?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// A file whose reader does not wait any more once the process has ended: a pipe may be silent for ever.
struct UntilEnd<'a> {
    file: &'a File,
    state: &'a State,
}

impl Read for UntilEnd<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        wait_any(&[self.file.as_fd(), self.state.ended()], None)?;
        if self.state.has_ended() {
            return Ok(0);
        }
        let mut file = self.file;
        file.read(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::ExitStatus;

    const TIMEOUT: Duration = Duration::from_secs(20);

    fn pair() -> (VsockStream, std::os::unix::net::UnixStream) {
        let (near, far, _) = VsockStream::pair().unwrap();
        far.set_nonblocking(false).unwrap();
        (near, far)
    }

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (File::from(std::os::fd::OwnedFd::from(reader)), File::from(std::os::fd::OwnedFd::from(writer)))
    }

    #[test]
    fn what_a_process_prints_is_in_the_file_when_the_redirect_has_ended() {
        let (near, mut far) = pair();
        let path = std::env::temp_dir().join(format!("cofferdam-redirect-{}", std::process::id()));
        let file = Arc::new(File::create(&path).unwrap());
        let redirect = write_to("stdout", file, near).unwrap();
        let printed = vec![7; 3 * CHUNK + 1];
        far.write_all(&printed).unwrap();
        assert!(!redirect.wait(Duration::from_millis(10)), "the process has not ended");
        drop(far);
        assert!(redirect.wait(TIMEOUT));
        assert_eq!(std::fs::read(&path).unwrap(), printed);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_file_that_fails_closes_the_stream() {
        let (near, mut far) = pair();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let redirect = write_to("stdout", Arc::new(full), near).unwrap();
        far.write_all(b"lost").unwrap();
        assert!(redirect.wait(TIMEOUT));
        assert_eq!(far.read(&mut [0; 8]).unwrap_or(0), 0);
    }

    #[test]
    fn a_silent_pipe_holds_nothing_once_the_process_has_ended() {
        let (near, mut far) = pair();
        let (reader, mut writer) = pipe();
        let state = State::new().unwrap();
        read_from(Arc::new(reader), near, state.clone()).unwrap();
        writer.write_all(b"first").unwrap();
        let mut first = [0; 5];
        far.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"first");
        state.finish(ExitStatus::Exited { code: 0 });
        // The thread drops the stream, though the pipe is still open.
        assert_eq!(far.read(&mut first).unwrap(), 0);
        drop(writer);
    }

    #[test]
    fn bytes_are_followed_by_the_end_of_file() {
        let (near, mut far) = pair();
        read_bytes(Arc::from(&b"some bytes"[..]), near).unwrap();
        let mut all = Vec::new();
        far.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"some bytes");
    }
}
