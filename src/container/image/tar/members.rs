//! [`Members`]: where the files of an archive lie, so that each is read in place.

use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom};

use super::header::{BLOCK, Block, TarHeader, text};
use super::pax::Pax;
use super::{corrupt, unsupported};
use crate::container::image::budget::Budget;
use crate::container::image::path::{EntryPath, PATH_MAX};
use crate::error::{Context, Error, ErrorKind, Result};

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
                    b'g' => global = shared_by_all(&data, budget)?,
                    _ => {
                        // Shares what is large.
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
        let place = EntryPath::parse(&path)?;
        if link.len() > PATH_MAX {
            return Err(corrupt("a link leads to a path that is longer than Linux allows"));
        }
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
        if !belongs(place.as_bytes(), &member) {
            return Ok(None);
        }
        budget.names(place.as_bytes().len())?;
        if let Member::Link(to) = &member {
            budget.names(to.len())?;
        }
        members.insert(place.as_bytes().to_vec(), member);
        let padded = data.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| corrupt("a member is too large"))?;
        source.skip(padded, budget)?;
        at = at.saturating_add(padded);
    }
}

/// What a global header says, instead of what an earlier one said. Clones share what is large.
fn shared_by_all(data: &[u8], budget: &Budget) -> Result<Pax> {
    let mut global = Pax::default();
    global.read(data)?;
    if global.sparse.is_sparse() {
        return Err(unsupported("a global header that speaks of a sparse file"));
    }
    budget.entry_xattrs(global.xattr_bytes()).doing(|| "a global header")?;
    global.share();
    Ok(global)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::container::image::ImageLimits;
    use crate::container::image::budget::PrepareDeadline;
    use crate::container::image::tests::maker::{Made, archive, record};
    use crate::size::Size;

    fn listed(archive: &[u8], limits: &ImageLimits) -> Result<Option<Members>> {
        let deadline = PrepareDeadline::new(Duration::from_secs(600), None);
        list_all(&mut Sequential(archive), &Budget::new(limits, Size::gib(1), &deadline), &|_, _| true)
    }

    #[test]
    fn link_longer_than_a_path_is_no_member() {
        for typeflag in [b'1', b'2'] {
            let link = |len| archive(&[Made::link("a", vec![b'x'; len]).of_type(typeflag)]);
            let members = listed(&link(PATH_MAX), &ImageLimits::new()).unwrap().unwrap();
            assert_eq!(members[&b"a"[..]], Member::Link(vec![b'x'; PATH_MAX]));
            let error = listed(&link(PATH_MAX + 1), &ImageLimits::new()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
    }

    #[test]
    fn targets_of_listed_links_count_as_names() {
        let links: Vec<_> = (0..10).map(|n| Made::symlink(format!("{n}"), [b'x'; 200])).collect();
        let limits = ImageLimits::new();
        listed(&archive(&links), &limits.clone().max_names(Size::bytes(2010))).unwrap();
        let error = listed(&archive(&links), &limits.max_names(Size::bytes(2009))).unwrap_err();
        assert!(error.to_string().contains("ImageLimits::max_names"), "{error}");
    }

    fn global(records: &[u8]) -> Made {
        Made::file("global", records).of_type(b'g')
    }

    #[test]
    fn global_header_of_listed_members_replaces_the_one_before() {
        let file = Made::file("a", "");
        let entries = [global(&record("path", b"b")), file.clone(), global(&record("comment", b"")), file];
        let members = listed(&archive(&entries), &ImageLimits::new()).unwrap().unwrap();
        assert_eq!(members.keys().collect::<Vec<_>>(), [b"a", b"b"]);
    }

    #[test]
    fn global_header_of_listed_members_is_bounded() {
        let large = global(&record("SCHILY.xattr.user.a", &[0; 200 << 10]));
        let error = listed(&archive(&[large]), &ImageLimits::new()).unwrap_err();
        assert!(error.to_string().contains("ImageLimits::entry_xattrs"), "{error}");
        let sparse = global(&record("GNU.sparse.map", b"0,1"));
        let error = listed(&archive(&[sparse]), &ImageLimits::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}
