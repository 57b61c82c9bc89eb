//! Requests for files of the guest, and their answers. No I/O; any thread.
//!
//! Each has a connection to [`super::FILES_PORT`] of its own.
//!
//! ```text
//!  Stat     host: Request                 guest: Entry · Done
//!  List     host: Request                 guest: Entry ... · Done
//!  Read     host: Request                 guest: one file · Done
//!  Get      host: Request                 guest: one file or directory · Done
//!  Put      host: Request, one file or directory, Done       guest: Done
//!  MakeDir  host: Request                 guest: Done
//!
//!  a file       Entry · Data or Hole, any number · FileEnd
//!  a directory  Entry · files, links and directories, any number · Leave
//!  a link       Entry
//! ```
//! `Progress` may come from the guest at any point of a `Put`. `Failed` ends a conversation at any point. What an entry says of a file's size is a guess: the file is what its `Data` and `Hole` say.

use core::num::NonZeroI32;

use super::alloc::vec::Vec;
use super::field::{Fields, Malformed, Writer};
use super::frame::{self, FrameError, MessageFrame};

/// The longest payload either way.
pub(crate) const FILES_FRAME_MAX: usize = 64 * 1024;
/// The longest name of an entry, as Linux has it.
pub(crate) const ENTRY_NAME_MAX: usize = 255;
/// The longest path and target of a link, as Linux has it.
pub(crate) const ENTRY_PATH_MAX: usize = 4095;
/// The deepest directory of a copy.
pub(crate) const COPY_DEPTH_MAX: usize = 128;

const REQUEST: u32 = 1;
const ENTRY: u32 = 2;
const DATA: u32 = 3;
const HOLE: u32 = 4;
const FILE_END: u32 = 5;
const LEAVE: u32 = 6;
const DONE: u32 = 7;
const FAILED: u32 = 8;
const PROGRESS: u32 = 9;

/// Tags, by record. A tag's meaning never changes; what is new gets a new tag.
mod tag {
    pub(super) const ACTION: u8 = 1;
    pub(super) const PATH: u8 = 2;

    pub(super) const NAME: u8 = 1;
    pub(super) const KIND: u8 = 2;
    pub(super) const MODE: u8 = 3;
    pub(super) const UID: u8 = 4;
    pub(super) const GID: u8 = 5;
    pub(super) const SIZE: u8 = 6;
    pub(super) const SECONDS: u8 = 7;
    pub(super) const NANOSECONDS: u8 = 8;
    pub(super) const TARGET: u8 = 9;

    pub(super) const LENGTH: u8 = 1;

    pub(super) const ERRNO: u8 = 1;
}

/// What the host asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileAction {
    /// What is at the path. A link in the last place is not followed.
    Stat = 1,
    /// What is in the directory.
    List = 2,
    /// The content of the file.
    Read = 3,
    /// The file, or the directory with all that is in it.
    Get = 4,
    /// Make the file, or what is missing of the directory.
    Put = 5,
    /// Make the directory, and those above it.
    MakeDir = 6,
}

impl FileAction {
    /// Every value, for tests that must not forget one.
    pub(crate) const ALL: [Self; 6] = [Self::Stat, Self::List, Self::Read, Self::Get, Self::Put, Self::MakeDir];

    fn parse(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|action| *action as u8 == byte)
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    /// With content of its own.
    File = 1,
    /// With entries of its own.
    Directory = 2,
    /// A symbolic link.
    Link = 3,
    /// A device, a pipe or a socket. No copy has such.
    Special = 4,
}

impl EntryKind {
    /// Every value, for tests that must not forget one.
    pub(crate) const ALL: [Self; 4] = [Self::File, Self::Directory, Self::Link, Self::Special];

    fn parse(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// One entry of a directory, or what is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileEntry<'a> {
    /// A name in the directory that the conversation is in; empty for what is at the path of the request.
    pub(crate) name: &'a [u8],
    pub(crate) kind: EntryKind,
    /// Without the file's kind.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    /// Since 1970, and less than 10^9 nanoseconds more.
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
    /// Of a link.
    pub(crate) target: &'a [u8],
}

/// Whether Linux takes it as the name of a directory's entry.
pub(crate) fn is_entry_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..") && name.len() <= ENTRY_NAME_MAX && !name.contains(&0) && !name.contains(&b'/')
}

/// One message of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileRecord<'a> {
    /// The host's first message, and no other.
    Request { action: FileAction, path: &'a [u8] },
    /// See the conversations.
    Entry(FileEntry<'a>),
    /// Bytes of a file, as the whole payload.
    Data(&'a [u8]),
    /// So many zeros of a file.
    Hole { length: u64 },
    /// The file is complete.
    FileEnd,
    /// The directory is complete.
    Leave,
    /// All is complete.
    Done,
    /// The guest is at work, and says so now and then while it only takes.
    Progress,
    /// It cannot go on.
    Failed { errno: NonZeroI32, path: &'a [u8] },
}

impl<'a> FileRecord<'a> {
    /// Appends the record as a frame.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let kind = match self {
            Self::Request { .. } => REQUEST,
            Self::Entry(_) => ENTRY,
            Self::Data(_) => DATA,
            Self::Hole { .. } => HOLE,
            Self::FileEnd => FILE_END,
            Self::Leave => LEAVE,
            Self::Done => DONE,
            Self::Progress => PROGRESS,
            Self::Failed { .. } => FAILED,
        };
        frame::append(out, 0, kind, FILES_FRAME_MAX, |payload| {
            if let Self::Data(bytes) = self {
                return payload.extend_from_slice(bytes);
            }
            let mut fields = Writer(payload);
            match *self {
                Self::Request { action, path } => {
                    fields.u8(tag::ACTION, action as u8);
                    fields.bytes(tag::PATH, path);
                }
                Self::Entry(entry) => entry.encode(&mut fields),
                Self::Hole { length } => fields.u64(tag::LENGTH, length),
                Self::Failed { errno, path } => {
                    fields.u32(tag::ERRNO, errno.get() as u32);
                    fields.bytes(tag::PATH, path.get(..ENTRY_PATH_MAX).unwrap_or(path));
                }
                Self::Data(_) | Self::FileEnd | Self::Leave | Self::Done | Self::Progress => {}
            }
        })
    }

    /// Understands a frame; `None` if it is of a kind that this build does not know and skips.
    pub(crate) fn parse(frame: &MessageFrame<'a>) -> Result<Option<Self>, Malformed> {
        if frame.kind == DATA {
            return Ok(Some(Self::Data(frame.payload)));
        }
        let fields = Fields::parse(frame.payload)?;
        let path = || fields.get(tag::PATH).filter(|path| path.len() <= ENTRY_PATH_MAX).ok_or(Malformed("path"));
        Ok(Some(match frame.kind {
            REQUEST => Self::Request {
                action: fields.u8(tag::ACTION, "action")?.and_then(FileAction::parse).ok_or(Malformed("action"))?,
                path: path()?,
            },
            ENTRY => Self::Entry(FileEntry::parse(&fields)?),
            HOLE => Self::Hole { length: fields.u64(tag::LENGTH, "length")?.ok_or(Malformed("length"))? },
            FILE_END => Self::FileEnd,
            LEAVE => Self::Leave,
            DONE => Self::Done,
            PROGRESS => Self::Progress,
            FAILED => Self::Failed {
                errno: NonZeroI32::new(fields.u32(tag::ERRNO, "errno")?.unwrap_or(0) as i32)
                    .filter(|errno| (1..4096).contains(&errno.get()))
                    .ok_or(Malformed("errno"))?,
                path: path()?,
            },
            _ => return Ok(None),
        }))
    }
}

impl<'a> FileEntry<'a> {
    fn encode(&self, fields: &mut Writer<'_>) {
        fields.bytes(tag::NAME, self.name);
        fields.u8(tag::KIND, self.kind as u8);
        fields.u32(tag::MODE, self.mode);
        fields.u32(tag::UID, self.uid);
        fields.u32(tag::GID, self.gid);
        fields.u64(tag::SIZE, self.size);
        fields.u64(tag::SECONDS, self.seconds as u64);
        fields.u32(tag::NANOSECONDS, self.nanoseconds);
        if self.kind == EntryKind::Link {
            fields.bytes(tag::TARGET, self.target);
        }
    }

    fn parse(fields: &Fields<'a>) -> Result<Self, Malformed> {
        let name = fields.get(tag::NAME).unwrap_or_default();
        if !name.is_empty() && !is_entry_name(name) {
            return Err(Malformed("name"));
        }
        let kind = fields.u8(tag::KIND, "kind")?.and_then(EntryKind::parse).ok_or(Malformed("kind"))?;
        let target = fields.get(tag::TARGET).unwrap_or_default();
        let is_target = !target.is_empty() && target.len() <= ENTRY_PATH_MAX && !target.contains(&0);
        if (kind == EntryKind::Link) != is_target {
            return Err(Malformed("target"));
        }
        let number = |tag, name| Ok(fields.u32(tag, name)?.unwrap_or(0));
        Ok(Self {
            name,
            kind,
            mode: number(tag::MODE, "mode")? & 0o7777,
            uid: number(tag::UID, "user")?,
            gid: number(tag::GID, "group")?,
            size: fields.u64(tag::SIZE, "size")?.unwrap_or(0),
            seconds: fields.u64(tag::SECONDS, "time")?.unwrap_or(0) as i64,
            nanoseconds: Some(number(tag::NANOSECONDS, "time")?)
                .filter(|n| *n < 1_000_000_000)
                .ok_or(Malformed("time"))?,
            target,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::Decoder;
    use super::*;

    fn parsed(bytes: &[u8], check: impl FnOnce(Result<Option<FileRecord<'_>>, Malformed>)) {
        let (mut decoder, mut input) = (Decoder::new(FILES_FRAME_MAX), bytes);
        check(FileRecord::parse(&decoder.next(&mut input).unwrap().unwrap()));
    }

    fn round_trips(record: FileRecord<'_>) {
        let mut bytes = Vec::new();
        record.encode(&mut bytes).unwrap();
        parsed(&bytes, |parsed| assert_eq!(parsed, Ok(Some(record))));
    }

    proptest! {
        #[test]
        fn entries_round_trip(name in vec(any::<u8>(), 0..256), target in vec(1..=255u8, 1..4095), kind in 0..4usize, mode in 0..=0o7777u32, ids in any::<[u32; 2]>(), size in any::<u64>(), seconds in any::<i64>(), nanoseconds in 0..1_000_000_000u32) {
            let name = if is_entry_name(&name) { &name[..] } else { b"" };
            let kind = EntryKind::ALL[kind];
            let target = if kind == EntryKind::Link { &target[..] } else { b"" };
            let [uid, gid] = ids;
            round_trips(FileRecord::Entry(FileEntry { name, kind, mode, uid, gid, size, seconds, nanoseconds, target }));
        }
    }

    #[test]
    fn every_other_record_round_trips() {
        let path = &[b'x'; ENTRY_PATH_MAX];
        let failed = |errno, path| FileRecord::Failed { errno: NonZeroI32::new(errno).unwrap(), path };
        FileAction::ALL.into_iter().for_each(|action| round_trips(FileRecord::Request { action, path }));
        for record in [
            FileRecord::Data(b""),
            FileRecord::Data(&[9; FILES_FRAME_MAX]),
            FileRecord::Hole { length: u64::MAX },
            FileRecord::FileEnd,
            FileRecord::Leave,
            FileRecord::Done,
            FileRecord::Progress,
            failed(28, path),
            failed(4095, b""),
        ] {
            round_trips(record);
        }
        assert!(FileRecord::Data(&[9; FILES_FRAME_MAX + 1]).encode(&mut Vec::new()).is_err());
        let unknown = MessageFrame { stream: 0, kind: 99, payload: &[] };
        assert_eq!(FileRecord::parse(&unknown), Ok(None));
    }

    #[test]
    fn names_and_numbers_that_no_file_has_are_malformed() {
        let entry = FileEntry {
            name: b"n",
            kind: EntryKind::File,
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            seconds: 0,
            nanoseconds: 0,
            target: b"",
        };
        let link = FileEntry { kind: EntryKind::Link, target: b"t", ..entry };
        let long = [b't'; ENTRY_PATH_MAX + 1];
        for (entry, what) in [
            (FileEntry { name: b".", ..entry }, "name"),
            (FileEntry { name: b"..", ..entry }, "name"),
            (FileEntry { name: b"a/b", ..entry }, "name"),
            (FileEntry { name: b"a\0", ..entry }, "name"),
            (FileEntry { name: &[b'n'; 256], ..entry }, "name"),
            (FileEntry { nanoseconds: 1_000_000_000, ..entry }, "time"),
            (FileEntry { target: b"", ..link }, "target"),
            (FileEntry { target: b"\0", ..link }, "target"),
            (FileEntry { target: &long, ..link }, "target"),
        ] {
            let mut bytes = Vec::new();
            FileRecord::Entry(entry).encode(&mut bytes).unwrap();
            parsed(&bytes, |parsed| assert_eq!(parsed, Err(Malformed(what))));
        }
        for errno in [0u32, 4096, u32::MAX] {
            let mut bytes = Vec::new();
            frame::append(&mut bytes, 0, FAILED, 100, |out| Writer(out).u32(tag::ERRNO, errno)).unwrap();
            parsed(&bytes, |parsed| assert_eq!(parsed, Err(Malformed("errno"))));
        }
    }
}
