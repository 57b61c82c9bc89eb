//! [`Members`]: where the files of an archive lie, so that each is read in place.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};

use super::header::{BLOCK, Block, TarHeader, text};
use super::pax::Pax;
use super::{corrupt, unsupported};
use crate::container::image::budget::Budget;
use crate::container::image::path::EntryPath;
use crate::error::{Error, ErrorKind, Result};

/// What one member is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) enum Member {
    File {
        offset: u64,
        len: u64,
    },
    Directory,
    /// Leads to another member.
    Link(Vec<u8>),
}

/// The members of an archive by their paths. Later ones replace earlier ones.
pub(in super::super) type Members = BTreeMap<Vec<u8>, Member>;

/// An archive that is looked through: what is not of interest is jumped over where that is possible.
pub(in super::super) trait Skip: Read {
    fn skip(&mut self, len: u64, budget: &Budget) -> Result<()>;
}

/// Jumps.
pub(in super::super) struct Seekable<R>(pub R);

/// Reads on.
pub(in super::super) struct Sequential<R>(pub R);

impl<R: Read> Read for Seekable<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Read for Sequential<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read + Seek> Skip for Seekable<R> {
    fn skip(&mut self, len: u64, _: &Budget) -> Result<()> {
        let len = i64::try_from(len).map_err(|_| corrupt("a member is larger than any file"))?;
        self.0.seek(SeekFrom::Current(len))?;
        Ok(())
    }
}

impl<R: Read> Skip for Sequential<R> {
    fn skip(&mut self, mut len: u64, budget: &Budget) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        while len > 0 {
            budget.check()?;
            let piece = len.min(PIECE);
            if io::copy(&mut (&mut self.0).take(piece), &mut io::sink()).map_err(from_io)? < piece {
                return Err(corrupt("the archive is cut off"));
            }
            len -= piece;
        }
        Ok(())
    }
}

fn from_io(error: io::Error) -> Error {
    error.downcast::<Error>().unwrap_or_else(Error::from)
}

/// Lists the members. None as soon as one does not `belong`, and for what is no archive or a damaged one.
///
/// # Errors
/// `InvalidConfig` beyond a limit, and what the source fails with.
pub(in super::super) fn list(
    source: &mut dyn Skip,
    budget: &Budget,
    belongs: &dyn Fn(&[u8], &Member) -> bool,
) -> Result<Option<Members>> {
    match list_all(source, budget, belongs) {
        // Who reads it as a root file system says what is wrong, and where.
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported) => Ok(None),
        listed => listed,
    }
}

fn list_all(
    source: &mut dyn Skip,
    budget: &Budget,
    belongs: &dyn Fn(&[u8], &Member) -> bool,
) -> Result<Option<Members>> {
    let (mut members, mut at) = (Members::new(), 0u64);
    let (mut long_path, mut long_link, mut pax, mut global) = (None, None, None, Pax::default());
    loop {
        let mut block: Block = [0; BLOCK];
        match read_block(source, &mut block)? {
            0 => return Ok(Some(members)),
            BLOCK => {}
            _ => return Err(corrupt("the archive is cut off")),
        }
        at = at.saturating_add(BLOCK as u64);
        if block.iter().all(|byte| *byte == 0) {
            return Ok(Some(members));
        }
        let Some(header) = TarHeader::parse(&block) else {
            return Err(corrupt("no header is where one belongs"));
        };
        budget.header()?;
        let mut len = header.size()?;
        match header.typeflag() {
            b'L' | b'K' | b'x' | b'X' | b'g' => {
                if len > budget.limits.header.as_bytes() {
                    return Err(Error::invalid("ImageLimits::header", format!("an extended header has {len} bytes")));
                }
                let padded = len.next_multiple_of(BLOCK as u64);
                let mut data = Vec::new();
                if (&mut *source).take(padded).read_to_end(&mut data).map_err(from_io)? as u64 != padded {
                    return Err(corrupt("the archive is cut off"));
                }
                data.truncate(usize::try_from(len).unwrap_or(usize::MAX));
                at = at.saturating_add(padded);
                match header.typeflag() {
                    b'L' => long_path = Some(text(&data).to_vec()),
                    b'K' => long_link = Some(text(&data).to_vec()),
                    b'g' => global.read(&data)?,
                    _ => {
                        let mut own = global.clone();
                        own.read(&data)?;
                        pax = Some(own);
                    }
                }
                continue;
            }
            _ => {}
        }
        let own = pax.take().unwrap_or_else(|| global.clone());
        len = own.size.unwrap_or(len);
        let path = own.path.or(long_path.take()).unwrap_or_else(|| header.path());
        let link = own.link_path.or(long_link.take()).unwrap_or_else(|| header.link_path().to_vec());
        let (member, data) = match header.typeflag() {
            b'0' | 0 | b'7' if path.ends_with(b"/") => (Member::Directory, len),
            b'0' | 0 | b'7' if own.sparse.is_sparse() => return Err(unsupported("a member that is a sparse file")),
            b'0' | 0 | b'7' => (Member::File { offset: at, len }, len),
            b'5' => (Member::Directory, 0),
            b'1' | b'2' => {
                let hard = header.typeflag() == b'1';
                (Member::Link(if hard { link } else { beside(&path, &link) }), 0)
            }
            _ => return Ok(None),
        };
        let path = EntryPath::parse(&path)?;
        if !belongs(path.as_bytes(), &member) {
            return Ok(None);
        }
        budget.names(path.as_bytes().len())?;
        members.insert(path.as_bytes().to_vec(), member);
        let padded = data.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| corrupt("a member is too large"))?;
        source.skip(padded, budget)?;
        at = at.saturating_add(padded);
    }
}

/// Where a symbolic link at `path` leads, from the root of the archive.
fn beside(path: &[u8], target: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> =
        path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && part != b".").collect();
    parts.pop();
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join(&b'/')
}

/// How much there was of a block.
fn read_block(source: &mut dyn Skip, block: &mut Block) -> Result<usize> {
    let mut n = 0;
    while n < BLOCK {
        match source.read(block.get_mut(n..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(from_io(e)),
        }
    }
    Ok(n)
}
