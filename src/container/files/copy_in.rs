//! Copies of the host's files into a container.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use super::conversation::{Conversation, guest_path};
use super::report::{CopyReport, Tally, push};
use super::{Files, shown};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::proto::{EntryKind, FILES_FRAME_MAX, FileAction, FileEntry, FileRecord};
use crate::size::Size;
use crate::sys::{self, Directory};

/// A copy of the host's files into a container; see [`Files::copy_in`].
///
/// A file gets its name when it is whole, and replaces what has it. A directory that is there already keeps its
/// attributes and its other entries. Permissions and times are the host's, but setuid, setgid and sticky bits are left
/// out. Root owns everything, unless [`CopyIn::owner`] or [`CopyIn::keep_owner`] says otherwise.
///
/// A symbolic link is copied as one, and leads where it leads in the container; only `from` itself is followed. Holes
/// stay holes. Devices, pipes and sockets are left out, and so are extended attributes. A file with several names
/// becomes several files.
#[derive(Debug, Clone)]
#[must_use = "nothing is copied before `run`"]
pub struct CopyIn {
    files: Files,
    plan: CopyInPlan,
}

/// What is copied, and how.
#[derive(Debug, Clone)]
pub(super) struct CopyInPlan {
    pub(super) from: PathBuf,
    pub(super) to: PathBuf,
    /// `None` keeps the host's.
    pub(super) owner: Option<(u32, u32)>,
    pub(super) digests: bool,
}

impl CopyIn {
    pub(super) fn new(files: Files, from: PathBuf, to: PathBuf) -> Self {
        Self { files, plan: CopyInPlan { from, to, owner: Some((0, 0)), digests: false } }
    }

    /// Sets the user and the group of the copy, as numbers in the container. Root and its group, 0 and 0, unless set.
    pub fn owner(mut self, uid: u32, gid: u32) -> Self {
        self.plan.owner = Some((uid, gid));
        self
    }

    /// Keeps the numbers of users and groups that the files have on the host.
    pub fn keep_owner(mut self) -> Self {
        self.plan.owner = None;
        self
    }

    /// Has the SHA-256 digest of each regular file reported.
    pub fn digests(mut self) -> Self {
        self.plan.digests = true;
        self
    }

    /// Copies, and returns what was copied.
    ///
    /// The directory that `to` is in must exist in the container; [`Files::create_dir`] makes it. A copy that fails
    /// leaves what it has copied before, and no file that is not whole.
    ///
    /// # Errors
    /// - `NotFound` when `from`, or the directory of `to`, is missing.
    /// - `AlreadyExists`, `Io` or `PermissionDenied` as the guest's kernel refuses it; the error names the path.
    /// - `ResourceExhausted` when the container's disk is full, 16 requests are open, or directories are more than 128 deep.
    /// - `InvalidConfig` when `to` is not absolute, or `from` is no file or directory.
    /// - `TimedOut` when the guest does not go on, `GuestFailed` when it hangs up.
    /// - `InvalidState` when the container has ended.
    pub fn run(&self) -> Result<CopyReport> {
        let CopyInPlan { from, to, .. } = &self.plan;
        let copy = || {
            let path = guest_path("Files::copy_in", to)?;
            self.plan.send(|| Conversation::start(&self.files, FileAction::Put, path))
        };
        copy().doing(|| format!("copying {} to {} of the container", from.display(), to.display()))
    }
}

impl CopyInPlan {
    /// Sends all of it on the conversation that `start` begins.
    pub(super) fn send(&self, start: impl FnOnce() -> Result<Conversation>) -> Result<CopyReport> {
        // What it is must be known first, and a pipe is not waited for.
        let from = &self.from;
        let metadata = std::fs::metadata(from).doing(|| format!("opening {}", from.display()))?;
        if !metadata.is_dir() && !metadata.is_file() {
            return Err(Error::invalid("Files::copy_in", format!("{} is no file or directory", from.display())));
        }
        let conversation = start()?;
        // It is the caller's own, so it has no bounds but the depth.
        let tally = Tally::new(u64::MAX, Size::bytes(u64::MAX), self.digests);
        let (piece, path) = (vec![0; FILES_FRAME_MAX], Vec::new());
        let mut sender = Sender { conversation, owner: self.owner, tally, piece, path };
        if metadata.is_dir() {
            let directory = Directory::open(from).doing(|| format!("opening {}", from.display()))?;
            sender.directory(b"", &directory, 0)?;
        } else {
            let open = || File::options().read(true).custom_flags(libc::O_NONBLOCK).open(from);
            sender.file(b"", &open().doing(|| format!("opening {}", from.display()))?)?;
        }
        sender.conversation.say(&FileRecord::Done)?;
        sender.conversation.finish()?;
        Ok(sender.tally.finish())
    }
}

struct Sender {
    conversation: Conversation,
    owner: Option<(u32, u32)>,
    tally: Tally,
    piece: Vec<u8>,
    /// Of the entry that is sent now, from the directory that is copied.
    path: Vec<u8>,
}

impl Sender {
    fn entry(&mut self, name: &[u8], kind: EntryKind, metadata: &Metadata, target: &[u8]) -> Result<()> {
        let (uid, gid) = self.owner.unwrap_or((metadata.uid(), metadata.gid()));
        self.conversation.say(&FileRecord::Entry(FileEntry {
            name,
            kind,
            mode: metadata.mode() & 0o777,
            uid,
            gid,
            size: metadata.len(),
            seconds: metadata.mtime(),
            nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0).min(999_999_999),
            target,
        }))
    }

    fn directory(&mut self, name: &[u8], directory: &Directory, depth: usize) -> Result<()> {
        self.tally.directory(depth)?;
        let metadata = directory.file().metadata()?;
        self.entry(name, EntryKind::Directory, &metadata, b"")?;
        for name in directory.names()? {
            let above = self.path.len();
            push(&mut self.path, &name);
            match self.child(directory, &name, depth) {
                // It was removed meanwhile.
                Err(error) if error.os_error() == Some(libc::ENOENT) && directory.place(&name).is_err() => {}
                sent => sent.doing(|| format!("sending {}", shown(&name)))?,
            }
            self.path.truncate(above);
        }
        self.conversation.say(&FileRecord::Leave)
    }

    fn child(&mut self, directory: &Directory, name: &[u8], depth: usize) -> Result<()> {
        let place = directory.place(name)?;
        let metadata = place.metadata()?;
        if metadata.is_symlink() {
            let target = sys::link_target(place.as_fd())?;
            self.tally.link()?;
            return self.entry(name, EntryKind::Link, &metadata, &target);
        }
        if metadata.is_dir() {
            return self.directory(name, &directory.enter(name)?, depth + 1);
        }
        if !metadata.is_file() {
            return self.tally.skip();
        }
        let file = directory.open_entry(name)?;
        self.file(name, &file)
    }

    fn file(&mut self, name: &[u8], file: &File) -> Result<()> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::InvalidState, "it was replaced while it was copied"));
        }
        self.tally.file()?;
        self.entry(name, EntryKind::File, &metadata, b"")?;
        if metadata.blocks().saturating_mul(512) < metadata.len() {
            self.ranges(file)?;
        } else {
            self.content(file)?;
        }
        self.tally.file_end(&self.path)?;
        self.conversation.say(&FileRecord::FileEnd)
    }

    fn content(&mut self, mut file: &File) -> Result<()> {
        loop {
            match file.read(&mut self.piece) {
                Ok(0) => return Ok(()),
                Ok(n) => self.data(n)?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// A file with holes.
    fn ranges(&mut self, file: &File) -> Result<()> {
        let mut at = 0;
        for range in sys::data_ranges(file)? {
            self.hole(range.start.saturating_sub(at))?;
            at = range.start;
            while at < range.end {
                let room = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(self.piece.len());
                match file.read_at(self.piece.get_mut(..room).unwrap_or_default(), at) {
                    // It is shorter now.
                    Ok(0) => return Ok(()),
                    Ok(n) => {
                        self.data(n)?;
                        at += n as u64;
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(e.into()),
                }
            }
        }
        let len = file.metadata()?.len();
        self.hole(len.saturating_sub(at))
    }

    fn hole(&mut self, length: u64) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        self.tally.hole(length, || self.conversation.check_time())?;
        self.conversation.say(&FileRecord::Hole { length })
    }

    fn data(&mut self, n: usize) -> Result<()> {
        let bytes = self.piece.get(..n).unwrap_or_default();
        self.tally.data(bytes)?;
        self.conversation.say(&FileRecord::Data(bytes))
    }
}
