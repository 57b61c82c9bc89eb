//! Files and directories to the host and from it. Runs in the worker of one request.

use core::ffi::CStr;

use super::alloc::ffi::CString;
use super::alloc::vec;
use super::file_worker::{Conversation, NAMES, PIECE};
use super::files;
use super::poweroff::Decimal;
use super::sys::{self, Errno, Fd, FileStatus, O_DIRECTORY, O_NONBLOCK, O_PATH, O_RDONLY, Whence};
use crate::proto::{COPY_DEPTH_MAX, EntryKind, FileEntry, FileRecord};

/// File systems of which nothing is copied, as they have no files of anyone's (statfs(2)): proc, sysfs, cgroup2.
const KERNEL_FILE_SYSTEMS: [u64; 3] = [0x9fa0, 0x6265_6572, 0x6367_7270];
/// Names that are tried for a file that is not whole yet.
const MAX_NAMES: u64 = 64;

/// Sends what is at the path: a file, or a directory with all that is in it.
pub(super) fn get(conversation: &mut Conversation<'_>, path: &CStr) -> Result<(), Errno> {
    let file = sys::open(None, path, O_RDONLY | O_NONBLOCK)?;
    let status = sys::status(&file, c"")?;
    if status.is(sys::S_IFREG) {
        return get_file(conversation, b"", &file, &status);
    }
    if !status.is(sys::S_IFDIR) {
        return Err(Errno::EINVAL);
    }
    conversation.say_entry(b"", &status, b"")?;
    get_entries(conversation, &file, 1)?;
    conversation.say(&FileRecord::Leave)
}

fn get_entries(conversation: &mut Conversation<'_>, directory: &Fd, depth: usize) -> Result<(), Errno> {
    let mut buffer = vec![0; NAMES];
    let mut get = |name: &CStr| {
        let above = conversation.path.len();
        conversation.path.push(b'/');
        conversation.path.extend_from_slice(name.to_bytes());
        get_entry(conversation, directory, name, depth)?;
        conversation.path.truncate(above);
        Ok(())
    };
    while sys::read_names(directory, &mut buffer, &mut get)? {}
    Ok(())
}

fn get_entry(conversation: &mut Conversation<'_>, at: &Fd, name: &CStr, depth: usize) -> Result<(), Errno> {
    let gone = |outcome| match outcome {
        // Programs may remove and replace files meanwhile.
        Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR | Errno::ENXIO) => Ok(None),
        outcome => outcome.map(Some),
    };
    let Some(status) = gone(sys::status(at, name).map(|status| (status, None)))? else { return Ok(()) };
    let bytes = name.to_bytes();
    match status.0.mode & sys::S_IFMT {
        sys::S_IFREG | sys::S_IFDIR => {
            let opened = sys::open_entry(at, name, O_RDONLY)
                .and_then(|file| sys::status(&file, c"").map(|status| (status, Some(file))));
            let Some((status, Some(file))) = gone(opened)? else { return Ok(()) };
            if status.is(sys::S_IFREG) {
                return get_file(conversation, bytes, &file, &status);
            }
            if !status.is(sys::S_IFDIR) {
                return conversation.say_entry(bytes, &status, b"");
            }
            if depth >= COPY_DEPTH_MAX {
                return Err(Errno::E2BIG);
            }
            conversation.say_entry(bytes, &status, b"")?;
            if !KERNEL_FILE_SYSTEMS.contains(&sys::file_system_kind(&file)?) {
                get_entries(conversation, &file, depth + 1)?;
            }
            conversation.say(&FileRecord::Leave)
        }
        sys::S_IFLNK => match sys::read_link(at, name) {
            Ok(target) => conversation.say_entry(bytes, &status.0, &target),
            Err(Errno::ENOENT | Errno::EINVAL) => Ok(()),
            Err(errno) => Err(errno),
        },
        _ => conversation.say_entry(bytes, &status.0, b""),
    }
}

/// Sends a regular file, from its beginning.
pub(super) fn get_file(
    conversation: &mut Conversation<'_>,
    name: &[u8],
    file: &Fd,
    status: &FileStatus,
) -> Result<(), Errno> {
    conversation.say_entry(name, status, b"")?;
    let mut piece = vec![0; PIECE.min(usize::try_from(status.size).unwrap_or(PIECE).saturating_add(1).max(4096))];
    let has_holes = status.blocks.saturating_mul(512) < status.size;
    let at = if has_holes { get_ranges(conversation, file, &mut piece)? } else { 0 };
    // Of what has grown behind its last hole there is more.
    sys::seek(file, at, Whence::Start)?;
    get_data(conversation, file, &mut piece, u64::MAX)?;
    conversation.say(&FileRecord::FileEnd)
}

/// Sends a file with holes. Returns up to where, which is its beginning where the file system knows of none.
fn get_ranges(conversation: &mut Conversation<'_>, file: &Fd, piece: &mut [u8]) -> Result<u64, Errno> {
    let mut at = 0;
    loop {
        let data = match sys::seek(file, at, Whence::Data) {
            Ok(data) => data,
            // Behind the last data is one hole, or nothing.
            Err(Errno::ENXIO) => {
                let length = sys::status(file, c"")?.size.saturating_sub(at);
                if length > 0 {
                    conversation.say(&FileRecord::Hole { length })?;
                }
                return Ok(at.saturating_add(length));
            }
            Err(Errno::EINVAL) => return Ok(at),
            Err(errno) => return Err(errno),
        };
        let end = sys::seek(file, data, Whence::Hole)?;
        if data > at {
            conversation.say(&FileRecord::Hole { length: data - at })?;
        }
        sys::seek(file, data, Whence::Start)?;
        get_data(conversation, file, piece, end.saturating_sub(data))?;
        at = end;
    }
}

/// Sends at most `length` bytes, and less where the file ends before.
fn get_data(conversation: &mut Conversation<'_>, file: &Fd, piece: &mut [u8], mut length: u64) -> Result<(), Errno> {
    while length > 0 {
        let room = piece.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        match sys::read(file, piece.get_mut(..room).unwrap_or_default()) {
            Ok(0) => break,
            Ok(n) => {
                conversation.say(&FileRecord::Data(piece.get(..n).unwrap_or_default()))?;
                length -= n as u64;
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// What an entry of the host's says beside its name.
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    seconds: i64,
    nanoseconds: u32,
}

impl Attributes {
    fn new(entry: &FileEntry<'_>) -> Self {
        let &FileEntry { mode, uid, gid, seconds, nanoseconds, .. } = entry;
        Self { mode, uid, gid, seconds, nanoseconds }
    }

    /// The owner first, as a change of it takes permissions away.
    fn give_to(&self, file: &Fd) -> Result<(), Errno> {
        sys::change_owner(file, self.uid, self.gid)?;
        sys::change_mode(file, self.mode)?;
        sys::set_modified(file, None, self.seconds, self.nanoseconds)
    }
}

impl Attributes {
    /// Gives them to a link, by its descriptor: a program may have put something else in its place, which gets nothing.
    fn give_to_link(&self, at: &Fd, name: &CStr) -> Result<(), Errno> {
        let link = sys::open_entry(at, name, O_PATH)?;
        if !sys::status(&link, c"")?.is(sys::S_IFLNK) {
            return Err(Errno::EBUSY);
        }
        sys::change_owner_at(&link, c"", self.uid, self.gid)?;
        sys::set_modified(&link, Some(c""), self.seconds, self.nanoseconds)
    }
}

/// Makes what the host sends: a file or a link at the path, or what is missing of the directory there.
pub(super) fn put(conversation: &mut Conversation<'_>, path: &CStr) -> Result<(), Errno> {
    let FileRecord::Entry(entry) = conversation.next()? else { return Err(Errno::EPROTO) };
    let attributes = Attributes::new(&entry);
    let (kind, target) = (entry.kind, CString::new(entry.target).map_err(|_| Errno::EINVAL)?);
    if kind == EntryKind::Directory {
        let slashes = path.to_bytes().iter().rev().take_while(|byte| **byte == b'/').count();
        let (above, name) = split(path.to_bytes().get(..path.to_bytes().len() - slashes).unwrap_or_default())?;
        let (directory, made) = match name.is_empty() {
            true => (None, false),
            false => make_directory(&sys::open(None, &above, O_PATH | O_DIRECTORY)?, &name)?,
        };
        let directory = match directory {
            Some(directory) => directory,
            // It was there, and the host has named it: a link in its place is followed.
            None => sys::open(None, path, O_RDONLY | O_DIRECTORY | O_NONBLOCK)?,
        };
        put_entries(conversation, &directory, made.then_some(&attributes), 1)?;
    } else {
        let (above, name) = split(path.to_bytes())?;
        // A path that ends with a slash is a directory's.
        if name.is_empty() {
            return Err(Errno::EISDIR);
        }
        let directory = sys::open(None, &above, O_PATH | O_DIRECTORY)?;
        put_leaf(conversation, &directory, &name, kind, &target, &attributes)?;
    }
    match conversation.next()? {
        FileRecord::Done => Ok(()),
        _ => Err(Errno::EPROTO),
    }
}

/// The directory that a path is in, and its name there.
fn split(path: &[u8]) -> Result<(CString, CString), Errno> {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let above = path.get(..path.len() - name.len()).filter(|above| !above.is_empty()).unwrap_or(b"/");
    let c_string = |bytes: &[u8]| CString::new(bytes).map_err(|_| Errno::EINVAL);
    Ok((c_string(above)?, c_string(name)?))
}

/// Makes a directory, unless it is there. One that was made is opened.
///
/// # Errors
/// `EBUSY` where a program has put another in its place meanwhile, which must not get its owner.
fn make_directory(at: &Fd, name: &CStr) -> Result<(Option<Fd>, bool), Errno> {
    match sys::mkdir(Some(at), name, 0o700) {
        Ok(()) => {}
        Err(Errno::EEXIST) => return Ok((None, false)),
        Err(errno) => return Err(errno),
    }
    let made = sys::open_entry(at, name, O_RDONLY | O_DIRECTORY)?;
    let status = sys::status(&made, c"")?;
    // The bit of a group may be that of the directory above.
    let is_ours = status.uid == 0 && status.mode & 0o777 == 0o700;
    if is_ours { Ok((Some(made), true)) } else { Err(Errno::EBUSY) }
}

/// Fills a directory until the host leaves it. One that was made here gets its attributes then.
fn put_entries(
    conversation: &mut Conversation<'_>,
    directory: &Fd,
    attributes: Option<&Attributes>,
    depth: usize,
) -> Result<(), Errno> {
    loop {
        let entry = match conversation.next()? {
            FileRecord::Entry(entry) if !entry.name.is_empty() => entry,
            FileRecord::Leave => return attributes.map_or(Ok(()), |attributes| attributes.give_to(directory)),
            _ => return Err(Errno::EPROTO),
        };
        let (own, kind) = (Attributes::new(&entry), entry.kind);
        let name = CString::new(entry.name).map_err(|_| Errno::EINVAL)?;
        let target = CString::new(entry.target).map_err(|_| Errno::EINVAL)?;
        let above = conversation.path.len();
        conversation.path.push(b'/');
        conversation.path.extend_from_slice(name.to_bytes());
        if kind == EntryKind::Directory {
            if depth >= COPY_DEPTH_MAX {
                return Err(Errno::E2BIG);
            }
            let (inner, made) = make_directory(directory, &name)?;
            let inner = inner.map_or_else(|| sys::open_entry(directory, &name, O_RDONLY | O_DIRECTORY), Ok)?;
            put_entries(conversation, &inner, made.then_some(&own), depth + 1)?;
        } else {
            put_leaf(conversation, directory, &name, kind, &target, &own)?;
        }
        conversation.path.truncate(above);
    }
}

/// Makes a file or a link under another name, and gives it its own when it is whole.
fn put_leaf(
    conversation: &mut Conversation<'_>,
    directory: &Fd,
    name: &CStr,
    kind: EntryKind,
    target: &CStr,
    attributes: &Attributes,
) -> Result<(), Errno> {
    let draft = |number: u64| {
        let (pid, number) = (Decimal::new(sys::getpid().unsigned_abs().into()), Decimal::new(number));
        CString::new([b".cofferdam-", pid.as_bytes(), b"-", number.as_bytes()].concat()).map_err(|_| Errno::EINVAL)
    };
    let mut number = 0;
    let (draft, file) = loop {
        let draft = draft(number)?;
        let made = match kind {
            EntryKind::File => sys::create_at(directory, &draft).map(Some),
            EntryKind::Link => sys::symlink_at(target, directory, &draft).map(|()| None),
            EntryKind::Directory | EntryKind::Special => Err(Errno::EPROTO),
        };
        match made {
            // One is left of a worker that was killed.
            Err(Errno::EEXIST) if number < MAX_NAMES => number += 1,
            made => break (draft, made?),
        }
    };
    let complete = match &file {
        Some(file) => put_content(conversation, file).and_then(|()| attributes.give_to(file)),
        None => attributes.give_to_link(directory, &draft),
    };
    let renamed = complete.and_then(|()| sys::rename_at(directory, &draft, name));
    if renamed.is_err() {
        let _ = sys::unlink_at(directory, &draft);
    }
    renamed.and_then(|()| conversation.give_sign())
}

fn put_content(conversation: &mut Conversation<'_>, file: &Fd) -> Result<(), Errno> {
    let (mut length, mut holes) = (0u64, false);
    loop {
        match conversation.next()? {
            FileRecord::Data(bytes) => {
                files::write_all(file, bytes)?;
                length = length.saturating_add(bytes.len() as u64);
            }
            FileRecord::Hole { length: hole } => {
                length =
                    length.checked_add(hole).filter(|length| i64::try_from(*length).is_ok()).ok_or(Errno::EFBIG)?;
                sys::seek(file, length, Whence::Start)?;
                holes = true;
            }
            FileRecord::FileEnd if holes => return sys::set_length(file, length),
            FileRecord::FileEnd => return Ok(()),
            _ => return Err(Errno::EPROTO),
        }
    }
}
