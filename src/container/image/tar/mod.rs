//! Reads an image from a tar archive. Nothing is unpacked onto the host: entries go into the tree, content onto the disk.

mod header;
mod members;
mod pax;
mod sparse;
mod stream;

use super::budget::Budget;
use super::content::{SparseExtent, SparseMap};
use super::erofs::Disk;
use super::path::{EntryPath, shown, symlink_target};
use super::recognize;
use super::tree::{EntrySink, FileData, InodeKind, Metadata};
use super::xattr::{self, Holder};
use crate::error::{Context, Error, ErrorKind, Result};
use header::{TarHeader, text};
pub(super) use members::{Member, Members, Seekable, Sequential, list as list_members};
use pax::Pax;
pub(super) use stream::Stream;

/// What headers before an entry say of it.
#[derive(Default)]
struct Pending {
    path: Option<Vec<u8>>,
    link_path: Option<Vec<u8>>,
    /// An error in it is reported with the entry's name.
    pax: Option<Result<Pax>>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.path.is_none() && self.link_path.is_none() && self.pax.is_none()
    }
}

/// Where everything of an archive goes.
pub(super) struct ImageBuilder<'a, 'f> {
    pub tree: &'a mut dyn EntrySink,
    pub disk: &'a mut Disk<'f>,
    pub budget: &'a Budget,
}

/// What an archive is, which decides on how it may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ArchiveKind {
    /// Of a whole root file system: with entries, and with an end that is not cut off.
    RootFs,
    /// Of a layer, which may be empty. Its digest says whether it is whole.
    Layer,
}

fn corrupt(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

fn unsupported(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
}

/// Adds every entry of the archive to `to`.
///
/// # Errors
/// `Corrupt` for what is no archive, or is cut off; `Unsupported` for what cannot be kept.
pub(super) fn read(stream: &mut Stream<'_>, to: &mut ImageBuilder<'_, '_>, kind: ArchiveKind) -> Result<()> {
    recognize::no_other_format(stream.peek()?)?;
    let (mut entries, mut global, mut pending) = (0u64, Pax::default(), Pending::default());
    loop {
        let block = match stream.block() {
            Ok(Some(block)) => block,
            Ok(None) if kind == ArchiveKind::Layer => break,
            // An archive ends with a block of zeros; one that merely stops was cut off between two entries.
            Ok(None) if entries > 0 => return Err(corrupt("the archive is cut off at its end")),
            Ok(None) => return Err(corrupt("not a tar archive: it is empty")),
            Err(error) if entries == 0 && error.kind() == ErrorKind::Corrupt => {
                return Err(corrupt("not a tar archive: it is shorter than a header"));
            }
            Err(error) => return Err(error),
        };
        if block.iter().all(|byte| *byte == 0) {
            break;
        }
        let Some(header) = TarHeader::parse(&block) else {
            return Err(match entries {
                0 if pending.is_empty() => corrupt("not a tar archive: it begins with no header of one"),
                n => corrupt(format!("the archive is damaged after {n} entries: no header is where one belongs")),
            });
        };
        to.budget.header()?;
        match header.typeflag() {
            b'L' => pending.path = Some(long_text(stream, &header, to.budget)?),
            b'K' => pending.link_path = Some(long_text(stream, &header, to.budget)?),
            b'x' | b'X' => {
                // Shares what is large.
                let mut pax = global.clone();
                let read = pax.read(&extension(stream, &header, to.budget)?);
                pending.pax = Some(read.map(|()| pax));
            }
            b'g' => {
                global = Pax::default();
                global.read(&extension(stream, &header, to.budget)?)?;
                if global.sparse.is_sparse() {
                    return Err(unsupported("a global header that speaks of a sparse file"));
                }
                to.budget.entry_xattrs(global.xattr_bytes()).doing(|| "a global header")?;
                global.share();
            }
            // The label of the archive.
            b'V' => stream.skip(header.size()?.next_multiple_of(header::BLOCK as u64))?,
            _ => {
                to.budget.entry()?;
                let Pending { path, link_path, pax } = std::mem::take(&mut pending);
                let (pax, fault) = match pax {
                    None => (None, None),
                    Some(Ok(pax)) => (Some(pax), None),
                    Some(Err(fault)) => (None, Some(fault)),
                };
                let entry = RawEntry {
                    path: path.unwrap_or_else(|| header.path()),
                    link_path: link_path.unwrap_or_else(|| header.link_path().to_vec()),
                    pax: pax.as_ref().unwrap_or(&global),
                    header: &header,
                };
                let name = entry.path().to_vec();
                let added = fault.map_or_else(|| entry.add(stream, to), Err);
                added.doing(|| format!("entry {}", shown(&name)))?;
                entries += 1;
            }
        }
    }
    if !pending.is_empty() {
        return Err(corrupt("the archive ends behind an extended header, without its entry"));
    }
    if entries == 0 && kind == ArchiveKind::RootFs {
        return Err(corrupt("not a tar archive with anything in it: it begins with zeros, as disk images do"));
    }
    Ok(())
}

/// The data of a header that extends others.
fn extension(stream: &mut Stream<'_>, header: &TarHeader<'_>, budget: &Budget) -> Result<Vec<u8>> {
    let (size, limit) = (header.size()?, budget.limits.header);
    if size > limit.as_bytes() {
        let what = format!("an extended header or a long name has {size} bytes: more than {limit}");
        return Err(Error::invalid("ImageLimits::header", what));
    }
    stream.data(size)
}

fn long_text(stream: &mut Stream<'_>, header: &TarHeader<'_>, budget: &Budget) -> Result<Vec<u8>> {
    Ok(text(&extension(stream, header, budget)?).to_vec())
}

/// An entry with all that headers say of it.
struct RawEntry<'a> {
    path: Vec<u8>,
    link_path: Vec<u8>,
    pax: &'a Pax,
    header: &'a TarHeader<'a>,
}

impl RawEntry<'_> {
    fn path(&self) -> &[u8] {
        self.pax.sparse.name.as_deref().or(self.pax.path.as_deref()).unwrap_or(&self.path)
    }

    fn link_path(&self) -> Result<&[u8]> {
        let path = self.pax.link_path.as_deref().unwrap_or(&self.link_path);
        if path.is_empty() { Err(corrupt("a link without a target")) } else { Ok(path) }
    }

    fn size(&self) -> Result<u64> {
        self.pax.size.map_or_else(|| self.header.size(), Ok)
    }

    fn add(&self, stream: &mut Stream<'_>, to: &mut ImageBuilder<'_, '_>) -> Result<()> {
        let ImageBuilder { tree, disk, budget } = to;
        // As old archives mark directories.
        let slash = self.path().ends_with(b"/");
        let path = match self.header.typeflag() {
            b'5' | b'D' => EntryPath::parse(self.path())?,
            b'0' | 0 | b'7' if slash => EntryPath::parse(self.path())?,
            _ => EntryPath::parse_file(self.path())?,
        };
        let (kind, holder) = match self.header.typeflag() {
            // Links, nodes and directories have no data, whatever their size says.
            b'1' => return tree.add_link(&path, &EntryPath::parse_file(self.link_path()?)?, budget),
            b'2' => {
                let target = symlink_target(self.link_path()?)?;
                budget.names(target.len())?;
                (InodeKind::Symlink(target), Holder::Other)
            }
            b'3' => (InodeKind::CharacterDevice(self.device()?), Holder::Other),
            b'4' => (InodeKind::BlockDevice(self.device()?), Holder::Other),
            b'6' => (InodeKind::Fifo, Holder::Other),
            b'5' => return tree.add_directory(&path, self.metadata(Holder::Directory, budget)?, budget),
            // With a list of what was in it, of an incremental archive.
            b'D' => {
                let len = self.size()?;
                stream.skip(len)?;
                stream.skip_padding(len)?;
                return tree.add_directory(&path, self.metadata(Holder::Directory, budget)?, budget);
            }
            b'0' | 0 | b'7' if slash => {
                return tree.add_directory(&path, self.metadata(Holder::Directory, budget)?, budget);
            }
            b'0' | 0 | b'7' | b'S' => {
                (InodeKind::File(self.content(stream, disk).doing(|| "its content")?), Holder::File)
            }
            b'M' => return Err(unsupported("it is continued from another volume of the archive")),
            other => {
                let code = char::from(other);
                return Err(unsupported(format!("an entry of type {code:?} cannot be kept")));
            }
        };
        tree.add(&path, kind, self.metadata(holder, budget)?, budget)
    }

    /// Writes the content of a file onto the disk.
    fn content(&self, stream: &mut Stream<'_>, disk: &mut Disk<'_>) -> Result<FileData> {
        let mut stored = self.size()?;
        let size = stored;
        let map = if self.header.typeflag() == b'S' {
            Some(sparse::old_gnu(stream, self.header)?)
        } else if self.pax.sparse.is_sparse() {
            Some(sparse::pax(stream, &self.pax.sparse, &mut stored)?)
        } else {
            None
        };
        let data = match map {
            None => disk.write_file(size, stream)?,
            Some(map) => {
                if map.stored() != stored {
                    return Err(corrupt("its sparse map does not fit its size"));
                }
                disk.write_sparse(&map, stream)?
            }
        };
        stream.skip_padding(size)?;
        Ok(data)
    }

    fn device(&self) -> Result<u32> {
        let (major, minor) = self.header.device()?;
        match (u32::try_from(major), u32::try_from(minor)) {
            // An overlay takes it for the mark of a file that was removed.
            (Ok(0), Ok(0)) if self.header.typeflag() == b'3' => {
                Err(unsupported("a character device 0:0, which containers cannot show"))
            }
            (Ok(major), Ok(minor)) => super::device_number(major, minor),
            _ => Err(corrupt("its device number is negative or too large")),
        }
    }

    fn metadata(&self, holder: Holder, budget: &Budget) -> Result<Metadata> {
        let id = |n: i64, what: &str| {
            u32::try_from(n).map_err(|_| corrupt(format!("its {what} {n} is negative or beyond 32 bits")))
        };
        let (header, pax) = (self.header, self.pax);
        let uid = id(pax.uid.map_or_else(|| header.uid(), Ok)?, "owner")?;
        let gid = id(pax.gid.map_or_else(|| header.gid(), Ok)?, "group")?;
        let (mtime, mtime_nsec) = pax.mtime.map_or_else(|| header.mtime().map(|seconds| (seconds, 0)), Ok)?;
        let mut xattrs = pax.all_xattrs();
        for (name, acl) in [(xattr::ACL_ACCESS, &pax.acl_access), (xattr::ACL_DEFAULT, &pax.acl_default)] {
            acl.iter().for_each(|acl| drop(xattrs.insert(name.to_vec(), acl.to_bytes())));
        }
        let is_link = matches!(header.typeflag(), b'2');
        let mode = if is_link { 0o777 } else { xattr::settle_mode(header.mode()?, &mut xattrs) };
        let xattrs = xattr::encode(&xattrs, holder)?;
        budget.xattrs(xattrs.len())?;
        Ok(Metadata { mode, uid, gid, mtime, mtime_nsec, xattrs })
    }
}
