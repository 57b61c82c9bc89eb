//! Copies of a container's files to the host. All that the guest says of them is checked.

use std::fs::{DirBuilder, File, FileTimes, Permissions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::conversation::{Conversation, broken, guest_path, unexpected};
use super::metadata::time;
use super::report::{CopyReport, Tally, push};
use super::{Files, shown};
use crate::error::{Context, Error, Result};
use crate::proto::{EntryKind, FileAction, FileEntry, FileRecord};
use crate::size::Size;
use crate::sys::{Directory, split_name};

/// How much a copy may have, unless the caller says otherwise.
const MAX_ENTRIES: u64 = 1_000_000;
const MAX_SIZE: Size = Size::gib(16);

/// A copy of a container's files to the host; see [`Files::copy_out`].
///
/// A file gets its name when it is whole, and replaces what has it. A directory that is there already keeps its
/// attributes and its other entries. The caller's user owns everything. Permissions and times are the container's, but
/// no other user may write, and setuid, setgid and sticky bits are left out.
///
/// The guest cannot write outside of `to`, whatever it sends. On the host no link below `to` is followed. In the
/// container `from` is followed and no link below it. A link is copied if it leads nowhere but into the copy. That is
/// so when it is relative and goes up at its beginning only, not above `to`. Other links are left out,
/// unless [`CopyOut::keep_all_links`] says otherwise. Devices, pipes, sockets, extended attributes, and what is in file
/// systems of the kernel, such as `/proc`, are always left out.
#[derive(Debug, Clone)]
#[must_use = "nothing is copied before `run`"]
pub struct CopyOut {
    files: Files,
    plan: CopyOutPlan,
}

/// What is copied, how, and how much at most.
#[derive(Debug, Clone)]
pub(super) struct CopyOutPlan {
    pub(super) from: PathBuf,
    pub(super) to: PathBuf,
    pub(super) max_entries: u64,
    pub(super) max_size: Size,
    pub(super) all_links: bool,
    pub(super) digests: bool,
}

impl CopyOut {
    pub(super) fn new(files: Files, from: PathBuf, to: PathBuf) -> Self {
        Self { files, plan: CopyOutPlan::new(from, to) }
    }

    /// Sets how many files, directories and links it may have. A million, unless set.
    pub fn max_entries(mut self, max: u64) -> Self {
        self.plan.max_entries = max;
        self
    }

    /// Sets how many bytes its files may have in all, with their holes. 16 GiB, unless set.
    pub fn max_size(mut self, max: Size) -> Self {
        self.plan.max_size = max;
        self
    }

    /// Copies every symbolic link as it is.
    ///
    /// The guest chooses where they lead. A program of the host that follows one reads or writes a file of the guest's
    /// choice.
    pub fn keep_all_links(mut self) -> Self {
        self.plan.all_links = true;
        self
    }

    /// Has the SHA-256 digest of each regular file reported.
    pub fn digests(mut self) -> Self {
        self.plan.digests = true;
        self
    }

    /// Copies, and returns what was copied.
    ///
    /// The directory that `to` is in must exist. A copy that fails leaves what it has copied before, and no file that
    /// is not whole. Files that programs change meanwhile are copied as they are read.
    ///
    /// # Errors
    /// - `NotFound` when `from`, or the directory of `to`, is missing.
    /// - `ResourceExhausted` when there is more than the limits allow, or it is more than 128 directories deep.
    /// - `ResourceExhausted` when the host's disk is full, or 16 requests are open.
    /// - `Unsupported` when `from` is no file or directory, `AlreadyExists` or `Io` as the host refuses it.
    /// - `InvalidConfig` when `from` is not absolute, or `to` has no name.
    /// - `TimedOut` when the guest does not go on, `GuestFailed` when it hangs up or sends what is no copy.
    /// - `InvalidState` when the container has ended.
    pub fn run(&self) -> Result<CopyReport> {
        let CopyOutPlan { from, to, .. } = &self.plan;
        let copy = || {
            let path = guest_path("Files::copy_out", from)?;
            self.plan.receive(Conversation::start(&self.files, FileAction::Get, path)?)
        };
        copy().doing(|| format!("copying {} of the container to {}", from.display(), to.display()))
    }
}

impl CopyOutPlan {
    pub(super) fn new(from: PathBuf, to: PathBuf) -> Self {
        Self { from, to, max_entries: MAX_ENTRIES, max_size: MAX_SIZE, all_links: false, digests: false }
    }

    /// Takes all of it from a conversation that has begun.
    pub(super) fn receive(&self, mut conversation: Conversation) -> Result<CopyReport> {
        let tally = Tally::new(self.max_entries, self.max_size, self.digests);
        let first = match conversation.next()? {
            FileRecord::Entry(entry) if entry.name.is_empty() => Attributes::new(&entry),
            other => return Err(unexpected(&other)),
        };
        let mut receiver = Receiver { conversation, tally, all_links: self.all_links, path: Vec::new() };
        match first.kind {
            EntryKind::Directory => receiver.tree(&self.to, &first)?,
            EntryKind::File => {
                let problem = || Error::invalid("Files::copy_out", format!("{} has no name", self.to.display()));
                let (above, name) = split_name(&self.to).ok_or_else(problem)?;
                let directory = Directory::open(above).doing(|| format!("opening {}", above.display()))?;
                receiver.file(&directory, name.as_bytes(), &first)?;
            }
            EntryKind::Link | EntryKind::Special => return Err(broken(&"neither a file nor a directory")),
        }
        receiver.conversation.finish()?;
        Ok(receiver.tally.finish())
    }
}

/// What an entry says beside its name.
#[derive(Debug, Clone, Copy)]
struct Attributes {
    kind: EntryKind,
    mode: u32,
    modified: SystemTime,
}

impl Attributes {
    fn new(entry: &FileEntry<'_>) -> Self {
        Self { kind: entry.kind, mode: entry.mode & 0o755, modified: time(entry.seconds, entry.nanoseconds) }
    }

    fn give_to(&self, file: &File) -> Result<()> {
        file.set_permissions(Permissions::from_mode(self.mode)).doing(|| "setting its permissions")?;
        if let Err(error) = file.set_times(FileTimes::new().set_modified(self.modified)) {
            // The guest may claim any.
            log::debug!("a file of a guest does not get its time: {error}");
        }
        Ok(())
    }
}

/// A directory that the guest is in.
struct OpenDirectory {
    directory: Directory,
    /// What it gets when the guest leaves it, where it was made here.
    attributes: Option<Attributes>,
    /// How long the path above is.
    above: usize,
}

struct Receiver {
    conversation: Conversation,
    tally: Tally,
    all_links: bool,
    /// Of the directory that the guest is in, from the one that is copied.
    path: Vec<u8>,
}

/// What the guest says next in a directory.
enum Step {
    Enter(Vec<u8>, Attributes),
    File(Vec<u8>, Attributes),
    Link(Vec<u8>, Vec<u8>),
    Skip,
    Leave,
}

impl Receiver {
    fn tree(&mut self, to: &Path, first: &Attributes) -> Result<()> {
        self.tally.directory(0)?;
        let made = match DirBuilder::new().mode(0o700).create(to) {
            Ok(()) => true,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(Error::from(e).doing(format!("making the directory {}", to.display()))),
        };
        let directory = Directory::open(to).doing(|| format!("opening {}", to.display()))?;
        let mut open = vec![OpenDirectory { directory, attributes: made.then_some(*first), above: 0 }];
        while let Some(inner) = open.last() {
            let (step, depth) = (self.step()?, open.len());
            match step {
                Step::Leave => {
                    if let Some(attributes) = &inner.attributes {
                        attributes.give_to(inner.directory.file()).doing(|| shown(&self.path))?;
                    }
                    self.path.truncate(inner.above);
                    open.pop();
                }
                Step::Enter(name, attributes) => {
                    self.tally.directory(depth)?;
                    let above = self.path.len();
                    push(&mut self.path, &name);
                    let entered = enter(&inner.directory, &name, attributes, above);
                    open.push(entered.doing(|| format!("making the directory {}", shown(&self.path)))?);
                }
                Step::File(name, attributes) => {
                    let above = self.path.len();
                    push(&mut self.path, &name);
                    self.file(&inner.directory, &name, &attributes)?;
                    self.path.truncate(above);
                }
                Step::Link(name, target) if self.all_links || stays_inside(&target, depth - 1) => {
                    self.tally.link()?;
                    let make = || inner.directory.draft_link(&target)?.publish(&name);
                    make().doing(|| format!("making the link {} in {}", shown(&name), shown(&self.path)))?;
                }
                Step::Link(..) | Step::Skip => self.tally.skip()?,
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<Step> {
        Ok(match self.conversation.next()? {
            FileRecord::Entry(entry) if !entry.name.is_empty() => match entry.kind {
                EntryKind::File => Step::File(entry.name.to_vec(), Attributes::new(&entry)),
                EntryKind::Directory => Step::Enter(entry.name.to_vec(), Attributes::new(&entry)),
                EntryKind::Link => Step::Link(entry.name.to_vec(), entry.target.to_vec()),
                EntryKind::Special => Step::Skip,
            },
            FileRecord::Leave => Step::Leave,
            other => return Err(unexpected(&other)),
        })
    }

    /// Takes a file's content, and gives the file its name then.
    fn file(&mut self, directory: &Directory, name: &[u8], attributes: &Attributes) -> Result<()> {
        self.tally.file()?;
        let draft = directory.draft().doing(|| format!("making the file {}", shown(name)))?;
        if let Some(file) = draft.file() {
            self.content(file, name)?;
            attributes.give_to(file).doing(|| shown(name))?;
        }
        draft.publish(name).doing(|| format!("giving the file {} its name", shown(name)))
    }

    fn content(&mut self, mut file: &File, name: &[u8]) -> Result<()> {
        let (mut at, mut has_holes) = (0u64, false);
        loop {
            match self.conversation.next()? {
                FileRecord::Data(bytes) => {
                    self.tally.data(bytes)?;
                    let written = if has_holes { file.write_all_at(bytes, at) } else { file.write_all(bytes) };
                    written.doing(|| format!("writing the file {}", shown(name)))?;
                    at += bytes.len() as u64;
                }
                FileRecord::Hole { length } => {
                    self.tally.hole(length, || self.conversation.check_time())?;
                    at += length;
                    has_holes = true;
                }
                FileRecord::FileEnd => break,
                other => return Err(unexpected(&other)),
            }
        }
        if has_holes {
            file.set_len(at).doing(|| format!("writing the file {}", shown(name)))?;
        }
        self.tally.file_end(&self.path)?;
        Ok(())
    }
}

/// Enters a directory, and makes it first where it is missing.
fn enter(directory: &Directory, name: &[u8], attributes: Attributes, above: usize) -> Result<OpenDirectory> {
    let made = match directory.make(name) {
        Ok(()) => true,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => false,
        Err(e) => return Err(e.into()),
    };
    let directory = directory.enter(name)?;
    Ok(OpenDirectory { directory, attributes: made.then_some(attributes), above })
}

/// Whether a link leads into the copy, whatever other links of it do. `depth` is how far it is below the copy's root.
///
/// Going up only at its beginning, it goes up through directories, which have no other place. After that it comes
/// through names of the copy, and each link among them keeps to the same.
fn stays_inside(target: &[u8], depth: usize) -> bool {
    let mut parts = target.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b"."));
    let ups = parts.by_ref().take_while(|part| *part == b"..").count();
    // The part that ended the count is a name.
    !target.starts_with(b"/") && ups <= depth && parts.all(|part| part != b"..")
}
