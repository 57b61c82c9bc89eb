//! Serves one request for files, by calls that wait. A process of its own; it ends with the request.
//!
//! Paths are resolved in the guest, and its links lead within it. Below the path of a copy no link is followed.

use core::ffi::CStr;
use core::num::NonZeroI32;

use super::alloc::ffi::CString;
use super::alloc::vec;
use super::alloc::vec::Vec;
use super::file_copy;
use super::files;
use super::sys::{self, Errno, Fd, FileStatus, O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDONLY};
use crate::proto::{Decoder, EntryKind, FILES_FRAME_MAX, FileAction, FileEntry, FileRecord};

/// What is read of a file or a stream at once.
pub(super) const PIECE: usize = FILES_FRAME_MAX;
/// What is read of a directory at once.
pub(super) const NAMES: usize = 8 * 1024;
/// How much of the answer waits until it is sent, at least.
const UNSENT: usize = 64 * 1024;

/// The worker's end of a conversation with the host.
#[derive(Debug)]
pub(super) struct Conversation<'a> {
    socket: &'a Fd,
    decoder: Decoder,
    /// What has been read of the stream, and from where to where it is not decoded yet.
    input: Vec<u8>,
    begin: usize,
    end: usize,
    unsent: Vec<u8>,
    /// When the host was last given a sign.
    sign: u64,
    /// Of which file an error would be.
    pub(super) path: Vec<u8>,
}

/// Tells the host that nothing serves it. A stream that is new takes it whole.
pub(super) fn refuse(socket: &Fd, errno: Errno) {
    let mut conversation = Conversation::new(socket);
    let _ = conversation.fail(errno);
}

/// Serves the request, and says how that ended. Returns the process's exit code.
pub(super) fn serve(socket: &Fd) -> i32 {
    let mut conversation = Conversation::new(socket);
    let served = sys::set_blocking(socket).and_then(|()| conversation.serve());
    let said = match served {
        Ok(()) => conversation.say(&FileRecord::Done).and_then(|()| conversation.flush()),
        Err(errno) => conversation.fail(errno).and_then(|()| conversation.drain()),
    };
    i32::from(said.is_err())
}

impl<'a> Conversation<'a> {
    fn new(socket: &'a Fd) -> Self {
        let decoder = Decoder::new(FILES_FRAME_MAX);
        Self {
            socket,
            decoder,
            input: Vec::new(),
            begin: 0,
            end: 0,
            unsent: Vec::new(),
            sign: sys::now_ns(),
            path: Vec::new(),
        }
    }

    /// Says one thing, in time with what follows.
    pub(super) fn say(&mut self, record: &FileRecord<'_>) -> Result<(), Errno> {
        record.encode(&mut self.unsent).map_err(|_| Errno::EPROTO)?;
        if self.unsent.len() >= UNSENT { self.flush() } else { Ok(()) }
    }

    /// Gives the host a sign, if it has had none for a second.
    pub(super) fn give_sign(&mut self) -> Result<(), Errno> {
        const PERIOD_NS: u64 = 1_000_000_000;
        let now = sys::now_ns();
        if now.saturating_sub(self.sign) < PERIOD_NS {
            return Ok(());
        }
        self.sign = now;
        self.say(&FileRecord::Progress)?;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), Errno> {
        files::write_all(self.socket, &self.unsent)?;
        self.unsent.clear();
        Ok(())
    }

    /// Says what has failed, and of which file.
    fn fail(&mut self, errno: Errno) -> Result<(), Errno> {
        let errno = NonZeroI32::new(errno.0).ok_or(errno)?;
        FileRecord::Failed { errno, path: &self.path }.encode(&mut self.unsent).map_err(|_| Errno::EPROTO)?;
        self.flush()
    }

    /// Waits until the host has hung up, as it may be saying something. What it has not been read of, a close would lose.
    fn drain(&mut self) -> Result<(), Errno> {
        self.input.resize(PIECE, 0);
        while sys::read(self.socket, &mut self.input)? > 0 {}
        Ok(())
    }

    /// What the host says next.
    pub(super) fn next(&mut self) -> Result<FileRecord<'_>, Errno> {
        loop {
            let mut input = self.input.get(self.begin..self.end).unwrap_or_default();
            let whole = self.decoder.advance(&mut input).map_err(|_| Errno::EPROTO)?;
            self.begin = self.end - input.len();
            if whole {
                break;
            }
            self.input.resize(PIECE, 0);
            match sys::read(self.socket, &mut self.input) {
                Ok(0) => return Err(Errno::ECANCELED),
                Ok(n) => (self.begin, self.end) = (0, n),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        let frame = self.decoder.frame().ok_or(Errno::EPROTO)?;
        FileRecord::parse(&frame).ok().flatten().ok_or(Errno::EPROTO)
    }

    fn serve(&mut self) -> Result<(), Errno> {
        let FileRecord::Request { action, path } = self.next()? else { return Err(Errno::EPROTO) };
        let path = Vec::from(path);
        self.path.clone_from(&path);
        let path = CString::new(path).map_err(|_| Errno::EINVAL)?;
        match action {
            FileAction::Stat => self.stat(&path),
            FileAction::List => self.list(&path),
            FileAction::Read => self.read(&path),
            FileAction::Get => file_copy::get(self, &path),
            FileAction::Put => file_copy::put(self, &path),
            FileAction::MakeDir => {
                files::make_directories(&path)?;
                sys::open(None, &path, O_PATH | O_DIRECTORY).map(drop)
            }
        }
    }

    fn stat(&mut self, path: &CStr) -> Result<(), Errno> {
        let place = sys::open(None, path, O_PATH | O_NOFOLLOW)?;
        let status = sys::status(&place, c"")?;
        let target = if status.is(sys::S_IFLNK) { sys::read_link(&place, c"")? } else { Vec::new() };
        self.say_entry(b"", &status, &target)
    }

    fn list(&mut self, path: &CStr) -> Result<(), Errno> {
        let directory = sys::open(None, path, O_RDONLY | O_DIRECTORY | O_NONBLOCK)?;
        let mut buffer = vec![0; NAMES];
        while sys::read_names(&directory, &mut buffer, |name| self.list_entry(&directory, name))? {}
        Ok(())
    }

    fn list_entry(&mut self, directory: &Fd, name: &CStr) -> Result<(), Errno> {
        let found = sys::status(directory, name).and_then(|status| {
            let target = if status.is(sys::S_IFLNK) { sys::read_link(directory, name)? } else { Vec::new() };
            Ok((status, target))
        });
        match found {
            Ok((status, target)) => self.say_entry(name.to_bytes(), &status, &target),
            // It is gone, or something else now.
            Err(Errno::ENOENT | Errno::EINVAL) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn read(&mut self, path: &CStr) -> Result<(), Errno> {
        let file = sys::open(None, path, O_RDONLY | O_NONBLOCK)?;
        let status = sys::status(&file, c"")?;
        if !status.is(sys::S_IFREG) {
            return Err(if status.is(sys::S_IFDIR) { Errno::EISDIR } else { Errno::EINVAL });
        }
        file_copy::get_file(self, b"", &file, &status)
    }

    pub(super) fn say_entry(&mut self, name: &[u8], status: &FileStatus, target: &[u8]) -> Result<(), Errno> {
        let &FileStatus { mode, uid, gid, size, seconds, nanoseconds, .. } = status;
        let kind = match mode & sys::S_IFMT {
            sys::S_IFREG => EntryKind::File,
            sys::S_IFDIR => EntryKind::Directory,
            sys::S_IFLNK => EntryKind::Link,
            _ => EntryKind::Special,
        };
        let mode = mode & 0o7777;
        self.say(&FileRecord::Entry(FileEntry { name, kind, mode, uid, gid, size, seconds, nanoseconds, target }))
    }
}
