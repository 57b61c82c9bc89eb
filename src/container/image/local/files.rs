//! [`ImageFiles`]: the files of a directory or an archive, each read in place.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::container::image::budget::{Budget, PrepareDeadline};
use crate::container::image::decompress::{Compression, decompressed};
use crate::container::image::path::shown;
use crate::container::image::tar::{Member, Members, Seekable, Sequential, list_members};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::Beneath;

/// Links from one member to another that are followed.
const MAX_LINKS: usize = 8;
/// What one read of an archive's headers asks for.
const BUFFER: usize = 8 << 10;
/// What is skipped between two looks at the time.
const MAX_SKIP: u64 = 1 << 20;

/// Where the files are.
#[derive(Debug)]
pub(in super::super) enum ImageFiles {
    Directory(Beneath),
    Archive(Archive),
}

/// An archive, perhaps compressed, and where its members lie. Nothing of it is unpacked: a member of a compressed one is found by
/// reading up to it.
#[derive(Debug)]
pub(in super::super) struct Archive {
    file: Arc<File>,
    compression: Compression,
    /// How many times its size it may unpack to.
    ratio: u32,
    members: Members,
}

/// Whether an archive with this member may be one of images. A root file system soon has another.
fn belongs(path: &[u8], member: &Member) -> bool {
    let mut parts = path.splitn(2, |byte| *byte == b'/');
    let (first, rest) = (parts.next().unwrap_or_default(), parts.next());
    let is_digest = first.len() == 64 && first.iter().all(u8::is_ascii_hexdigit);
    match (member, rest) {
        _ if path.is_empty() || first == b"blobs" || is_digest => true,
        (Member::File { .. } | Member::Link(_), None) => {
            // As root file systems have them: links of merged directories.
            !matches!(first, b"bin" | b"lib" | b"sbin" | b"lib32" | b"lib64" | b"libx32")
        }
        _ => false,
    }
}

impl ImageFiles {
    /// Looks through an archive. None where it is of a root file system.
    ///
    /// # Errors
    /// `Corrupt` for an archive of images that is damaged; `Unsupported` for a compression that this build lacks.
    pub(in super::super) fn of_archive(file: File, budget: &Budget) -> Result<Option<Self>> {
        let mut begin = [0; 6];
        let n = file.read_at(&mut begin, 0)?;
        let compression = Compression::of(begin.get(..n).unwrap_or_default());
        let (file, ratio) = (Arc::new(file), budget.limits.ratio);
        let whole = FileRange { file: file.clone(), at: 0, end: u64::MAX, deadline: budget.deadline().clone() };
        let members = match compression {
            Compression::None => {
                let mut seekable = Seekable(BufReader::with_capacity(BUFFER, whole));
                list_members(&mut seekable, budget, &belongs)?
            }
            _ => list_members(&mut Sequential(decompressed(whole, Some(ratio))?), budget, &belongs)?,
        };
        Ok(members.map(|members| Self::Archive(Archive { file, compression, ratio, members })))
    }

    /// Whether there is a file of that name.
    pub(super) fn has(&self, name: &[u8]) -> bool {
        match self {
            Self::Directory(directory) => directory.open_regular(as_path(name)).is_ok(),
            Self::Archive(archive) => archive.find(name).is_some(),
        }
    }

    /// Opens a file, and says how long it is.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub(super) fn open(&self, name: &[u8], deadline: &PrepareDeadline) -> Result<(Box<dyn Read + Send>, u64)> {
        deadline.check()?;
        let doing = || format!("opening {}", shown(name));
        match self {
            Self::Directory(directory) => {
                let file = directory.open_regular(as_path(name)).doing(doing)?;
                let len = file.metadata()?.len();
                Ok((Box::new(file), len))
            }
            Self::Archive(archive) => archive.open(name, deadline).doing(doing),
        }
    }

    /// Reads a whole file of at most `most` bytes.
    ///
    /// # Errors
    /// `NotFound` when there is none; `Corrupt` for one that is larger.
    pub(super) fn read(&self, name: &[u8], most: u64, deadline: &PrepareDeadline) -> Result<Vec<u8>> {
        let (file, len) = self.open(name, deadline)?;
        let mut bytes = Vec::new();
        let read = file.take(most + 1).read_to_end(&mut bytes);
        let read = read.map_err(|e| e.downcast::<Error>().unwrap_or_else(Error::from));
        if read.doing(|| format!("reading {}", shown(name)))? as u64 > most {
            let what = format!("{} has {len} bytes: it may have {most}", shown(name));
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        Ok(bytes)
    }
}

fn as_path(name: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(name))
}

impl Archive {
    /// Where a file lies, also behind links.
    fn find(&self, name: &[u8]) -> Option<(u64, u64)> {
        let mut name = name;
        for _ in 0..MAX_LINKS {
            match self.members.get(name)? {
                Member::File { offset, len } => return Some((*offset, *len)),
                Member::Link(to) => name = to,
                Member::Directory => return None,
            }
        }
        None
    }

    fn open(&self, name: &[u8], deadline: &PrepareDeadline) -> Result<(Box<dyn Read + Send>, u64)> {
        let missing = || Error::new(ErrorKind::NotFound, "the archive has no such file");
        let (offset, len) = self.find(name).ok_or_else(missing)?;
        let range = |at, end| FileRange { file: self.file.clone(), at, end, deadline: deadline.clone() };
        let member: Box<dyn Read + Send> = match self.compression {
            Compression::None => Box::new(range(offset, offset.saturating_add(len))),
            _ => {
                let source = decompressed(range(0, u64::MAX), Some(self.ratio))?;
                Box::new(Behind { source, before: offset, len, deadline: deadline.clone() })
            }
        };
        Ok((member, len))
    }
}

/// A part of a file, read without its position as long as there is time.
struct FileRange {
    file: Arc<File>,
    at: u64,
    end: u64,
    deadline: PrepareDeadline,
}

impl Read for FileRange {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.deadline.check()?;
        let most = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.file.read_at(buffer.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at = self.at.saturating_add(n as u64);
        Ok(n)
    }
}

impl io::Seek for FileRange {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        let at = match to {
            io::SeekFrom::Current(n) => self.at.checked_add_signed(n),
            io::SeekFrom::Start(n) => Some(n),
            io::SeekFrom::End(_) => None,
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// A part of a stream. What lies before it is read with the first read.
struct Behind<R> {
    source: R,
    before: u64,
    len: u64,
    deadline: PrepareDeadline,
}

impl<R: Read> Read for Behind<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.before > 0 {
            self.deadline.check()?;
            // Little that is compressed may be much that is skipped.
            let piece = self.before.min(MAX_SKIP);
            let skipped = io::copy(&mut (&mut self.source).take(piece), &mut io::sink())?;
            self.before -= skipped;
            if skipped < piece {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let most = usize::try_from(self.len).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.source.read(buffer.get_mut(..most).unwrap_or_default())?;
        self.len -= n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn skipping_ends_when_the_time_is_over() {
        let behind = |timeout, before| {
            let deadline = PrepareDeadline::new(timeout, None);
            let mut behind = Behind { source: io::repeat(7), before, len: 3, deadline };
            let mut bytes = Vec::new();
            behind.read_to_end(&mut bytes).map(|_| bytes)
        };
        assert_eq!(behind(Duration::from_secs(600), 5 * MAX_SKIP + 1).unwrap(), [7; 3]);
        let error = behind(Duration::ZERO, 5 * MAX_SKIP).unwrap_err().downcast::<Error>().unwrap();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    }
}
