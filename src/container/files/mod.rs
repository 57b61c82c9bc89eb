//! Files of a running container, read and written from the host by the shim. No program of the image takes part.
//!
//! Each request has a vsock connection of its own. In the guest a process serves it, outside the workloads' pid namespace.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `conversation` | one request and its answer, with its bounds |
//! | `metadata` | what a guest says of a file |
//! | `copy_in`, `copy_out` | copies of files and directories; below their paths no link is followed, on either side |
//! | `report` | what was copied, and its bounds |

mod conversation;
mod copy_in;
mod copy_out;
mod metadata;
mod report;

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, SystemTime};

pub use copy_in::CopyIn;
pub use copy_out::CopyOut;
pub use metadata::{DirEntry, FileKind, FileMetadata};
pub use report::{CopyReport, FileDigest};

use super::Container;
use super::image::shown;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{EntryKind, FileAction, FileEntry, FileRecord};
use crate::size::Size;
use conversation::{Conversation, guest_path, unexpected};

/// How long one request may take, unless the caller says otherwise.
const TIMEOUT: Duration = Duration::from_secs(3600);
/// How long a file is that is read whole, unless the caller says otherwise.
const READ_LIMIT: Size = Size::mib(64);
/// The entries of a directory that is listed, and the bytes of their names and links.
const MAX_LISTED: usize = 100_000;
const MAX_LISTED_BYTES: usize = 16 << 20;
/// What one record of a file's content has at most.
const PIECE: usize = 32 * 1024;

/// The files of a running container.
///
/// It is a cheap handle that keeps the container running, as a clone of it does. All paths are absolute and those of
/// the container: its links lead within it, whatever they say. The shim serves each request as root, in a process that
/// no program of the container sees. The image needs no program for it.
///
/// At most 16 requests are served at once, from all handles together. A guest that neither gives nor takes a byte for 30
/// seconds ends a request with `TimedOut`, and so does [`Files::timeout`]. The caller's thread does the work, and no
/// other waits for it.
#[derive(Clone)]
pub struct Files {
    container: Container,
    timeout: Duration,
    read_limit: Size,
}

impl Container {
    /// Returns a handle to the container's files.
    pub fn files(&self) -> Files {
        Files { container: self.clone(), timeout: TIMEOUT, read_limit: READ_LIMIT }
    }
}

impl Files {
    /// Sets how long one request may take in all. An hour, unless set.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Sets how long a file may be that [`Files::read`] returns. 64 MiB, unless set.
    #[must_use]
    pub fn read_limit(self, limit: Size) -> Self {
        Self { read_limit: limit, ..self }
    }

    /// Reads a regular file.
    ///
    /// # Errors
    /// - `NotFound` when there is none.
    /// - `ResourceExhausted` when it is longer than [`Files::read_limit`], or 16 requests are open.
    /// - `Unsupported` for a pipe, a device or a socket.
    /// - `InvalidConfig` for a path that is not absolute, `TimedOut` when the guest does not answer.
    /// - `GuestFailed` when it hangs up, `InvalidState` when the container has ended.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Vec<u8>> {
        let path = path.as_ref();
        let doing = || format!("reading {} of the container", path.display());
        let mut reader = self.start_reading(path).doing(doing)?;
        let (mut content, mut piece) = (Vec::new(), vec![0; PIECE]);
        let limit = self.read_limit.as_bytes();
        loop {
            let n = reader.read_some(&mut piece).doing(doing)?;
            if n == 0 {
                return Ok(content);
            }
            if (content.len() + n) as u64 > limit {
                let why =
                    format!("it is longer than {}: read_limit gives more, or open reads it in pieces", self.read_limit);
                return Err(Error::new(ErrorKind::ResourceExhausted, why).doing(doing()));
            }
            content.extend_from_slice(piece.get(..n).unwrap_or_default());
        }
    }

    /// Opens a regular file to be read in pieces, from its beginning.
    ///
    /// # Errors
    /// As [`Files::read`].
    pub fn open(&self, path: impl AsRef<Path>) -> Result<FileReader> {
        let path = path.as_ref();
        self.start_reading(path).doing(|| format!("opening {} of the container", path.display()))
    }

    fn start_reading(&self, path: &Path) -> Result<FileReader> {
        let mut conversation = Conversation::start(self, FileAction::Read, guest_path("Files::read", path)?)?;
        match conversation.next()? {
            FileRecord::Entry(entry) if entry.kind == EntryKind::File => {
                let metadata = FileMetadata::new(&entry);
                Ok(FileReader { conversation, metadata, piece: Vec::new(), at: 0, hole: 0, ended: false })
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Writes a regular file, with the mode 0644 and root as its owner.
    ///
    /// The file gets its name when it is whole: readers see what was there before, or all of this. What had the name
    /// is replaced, a link too. The directory must exist. The guest's kernel writes it to the disk later, as it does
    /// what programs write.
    ///
    /// # Errors
    /// - `NotFound` when its directory is missing.
    /// - `ResourceExhausted` when the disk is full, or 16 requests are open.
    /// - `PermissionDenied` where the file system is read-only.
    /// - `Io` when the path is a directory's.
    /// - `InvalidConfig` for a path that is not absolute, `TimedOut` when the guest does not answer.
    /// - `GuestFailed` when it hangs up, `InvalidState` when the container has ended.
    pub fn write(&self, path: impl AsRef<Path>, content: impl AsRef<[u8]>) -> Result<()> {
        let path = path.as_ref();
        self.put(path, content.as_ref()).doing(|| format!("writing {} of the container", path.display()))
    }

    fn put(&self, path: &Path, content: &[u8]) -> Result<()> {
        let mut conversation = Conversation::start(self, FileAction::Put, guest_path("Files::write", path)?)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        conversation.say(&FileRecord::Entry(FileEntry {
            name: b"",
            kind: EntryKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: content.len() as u64,
            seconds: i64::try_from(now.as_secs()).unwrap_or(0),
            nanoseconds: now.subsec_nanos(),
            target: b"",
        }))?;
        for piece in content.chunks(PIECE) {
            conversation.say(&FileRecord::Data(piece))?;
        }
        conversation.say(&FileRecord::FileEnd)?;
        conversation.say(&FileRecord::Done)?;
        conversation.finish()
    }

    /// Lists a directory, in no order. `.` and `..` are left out.
    ///
    /// # Errors
    /// As [`Files::read`]; `ResourceExhausted` beyond 100,000 entries or 16 MiB of names too, and `Io` for what is no directory.
    pub fn list(&self, path: impl AsRef<Path>) -> Result<Vec<DirEntry>> {
        let path = path.as_ref();
        self.list_entries(path).doing(|| format!("listing {} of the container", path.display()))
    }

    fn list_entries(&self, path: &Path) -> Result<Vec<DirEntry>> {
        list(Conversation::start(self, FileAction::List, guest_path("Files::list", path)?)?)
    }

    /// Returns what is known of a file. A link in the last place is not followed.
    ///
    /// # Errors
    /// As [`Files::read`]; it works for files of every kind.
    pub fn stat(&self, path: impl AsRef<Path>) -> Result<FileMetadata> {
        let path = path.as_ref();
        self.stat_entry(path).doing(|| format!("looking at {} of the container", path.display()))
    }

    fn stat_entry(&self, path: &Path) -> Result<FileMetadata> {
        let mut conversation = Conversation::start(self, FileAction::Stat, guest_path("Files::stat", path)?)?;
        let metadata = match conversation.next()? {
            FileRecord::Entry(entry) => FileMetadata::new(&entry),
            other => return Err(unexpected(&other)),
        };
        conversation.finish()?;
        Ok(metadata)
    }

    /// Makes a directory with the mode 0755, and those above it that are missing.
    ///
    /// One that exists is left as it is. A call that fails may have made some of them.
    ///
    /// # Errors
    /// As [`Files::write`]; `Io` where something else has its name.
    pub fn create_dir(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let make = || Conversation::start(self, FileAction::MakeDir, guest_path("Files::create_dir", path)?)?.finish();
        make().doing(|| format!("making the directory {} of the container", path.display()))
    }

    /// Describes a copy of the host's file or directory `from` into the container.
    ///
    /// The copy has the path `to`: it is not put into a directory of that name.
    pub fn copy_in(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> CopyIn {
        CopyIn::new(self.clone(), from.as_ref().to_owned(), to.as_ref().to_owned())
    }

    /// Describes a copy of the container's file or directory `from` to the host.
    ///
    /// The copy has the path `to`: it is not put into a directory of that name.
    pub fn copy_out(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> CopyOut {
        CopyOut::new(self.clone(), from.as_ref().to_owned(), to.as_ref().to_owned())
    }
}

/// Takes the answer to a request for a list.
fn list(mut conversation: Conversation) -> Result<Vec<DirEntry>> {
    let (mut entries, mut bytes) = (Vec::new(), 0);
    loop {
        match conversation.next()? {
            FileRecord::Entry(entry) if !entry.name.is_empty() => {
                bytes += entry.name.len() + entry.target.len();
                if entries.len() >= MAX_LISTED || bytes > MAX_LISTED_BYTES {
                    let why = format!(
                        "it has more than {MAX_LISTED} entries, or more than 16 MiB of names, up to {}",
                        shown(entry.name)
                    );
                    return Err(Error::new(ErrorKind::ResourceExhausted, why));
                }
                entries.push(DirEntry::new(&entry));
            }
            FileRecord::Done => return Ok(entries),
            other => return Err(unexpected(&other)),
        }
    }
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Files({:?})", self.container)
    }
}

/// A file of a container that is being read.
///
/// It is one of the 16 requests until it is dropped or at its end. The time of [`Files::timeout`] is for all reads
/// together. Read errors have an [`Error`] inside, as [`Files::read`] returns it.
pub struct FileReader {
    conversation: Conversation,
    metadata: FileMetadata,
    /// What the guest has sent and the caller has not taken, from `at` on, then so many zeros.
    piece: Vec<u8>,
    at: usize,
    hole: u64,
    ended: bool,
}

impl FileReader {
    /// Returns what was known of the file when it was opened. Its size may have changed since.
    pub fn metadata(&self) -> &FileMetadata {
        &self.metadata
    }

    /// Reads at least a byte; 0 is the end.
    fn read_some(&mut self, to: &mut [u8]) -> Result<usize> {
        // A hole has no end of its own.
        self.conversation.check_time()?;
        loop {
            if let Some(rest) = self.piece.get(self.at..).filter(|rest| !rest.is_empty()) {
                let n = rest.len().min(to.len());
                if let (Some(to), Some(from)) = (to.get_mut(..n), rest.get(..n)) {
                    to.copy_from_slice(from);
                }
                self.at += n;
                return Ok(n);
            }
            if self.hole > 0 {
                let n = usize::try_from(self.hole).unwrap_or(usize::MAX).min(to.len());
                to.get_mut(..n).unwrap_or_default().fill(0);
                self.hole -= n as u64;
                return Ok(n);
            }
            if self.ended {
                return Ok(0);
            }
            match self.conversation.next()? {
                FileRecord::Data(bytes) => {
                    self.piece.clear();
                    self.piece.extend_from_slice(bytes);
                    self.at = 0;
                }
                FileRecord::Hole { length } => self.hole = length,
                FileRecord::FileEnd => {
                    self.conversation.finish()?;
                    self.ended = true;
                }
                other => return Err(unexpected(&other)),
            }
        }
    }
}

impl Read for FileReader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if to.is_empty() {
            return Ok(0);
        }
        self.read_some(to).map_err(io::Error::from)
    }
}

impl fmt::Debug for FileReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileReader({:?})", self.metadata)
    }
}

#[cfg(test)]
mod tests {
    mod copies;

    /// Serves a request as the guest does, by the shim's own code.
    fn serve(connection: std::os::unix::net::UnixStream) {
        std::thread::spawn(|| crate::guest::serve_files(connection.into()));
    }
}
