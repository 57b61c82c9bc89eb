//! Reads an image from a tar archive. Nothing is unpacked onto the host: entries go straight into the disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use tar::{Archive, EntryType};

use super::entry::{Entry, Kind, Name, symlink_target};
use super::ext4::Writer;
use crate::error::{Context, Error, ErrorKind, Result};

/// How compressed files begin, and what they are called.
const COMPRESSED: [(&[u8], &str); 4] = [
    (&[0x1f, 0x8b], "gzip"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    (&[0xfd, b'7', b'z', b'X', b'Z'], "xz"),
    (b"BZh", "bzip2"),
];

/// Gives every entry of the archive to `writer`.
///
/// # Errors
/// `Corrupt` for what is no archive, or is cut off; `Unsupported` for what cannot be kept.
pub(super) fn write(path: &Path, writer: &mut Writer) -> Result<()> {
    let mut file = File::open(path)?;
    let mut head = [0; 8];
    let read = file.read(&mut head)?;
    if let Some((_, name)) = COMPRESSED.iter().find(|(magic, _)| head.get(..read).is_some_and(|h| h.starts_with(magic)))
    {
        return Err(Error::new(ErrorKind::Unsupported, format!("it is compressed with {name}: decompress it first")));
    }
    read_archive(BufReader::with_capacity(1 << 20, File::open(path)?), writer)
}

/// The same for any source of bytes.
pub(super) fn read_archive(source: impl Read, writer: &mut Writer) -> Result<()> {
    let mut watched = LastBlock { inner: source, block: Vec::with_capacity(512), zeros: false };
    {
        let mut archive = Archive::new(&mut watched);
        for (before, entry) in archive.entries().map_err(|e| damaged(0, &e))?.enumerate() {
            let mut entry = entry.map_err(|e| damaged(before, &e))?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            add(&mut entry, writer).doing(|| format!("entry {name:?}"))?;
        }
    }
    // An archive ends with a block of zeros; one that merely stops was cut off between two entries.
    if watched.zeros { Ok(()) } else { Err(Error::new(ErrorKind::Corrupt, "not a tar archive, or cut off at its end")) }
}

fn damaged(entries: usize, error: &io::Error) -> Error {
    match entries {
        0 => Error::new(ErrorKind::Corrupt, format!("not a tar archive: {error}")),
        n => Error::new(ErrorKind::Corrupt, format!("the archive is damaged after {n} entries: {error}")),
    }
}

fn add<R: Read>(entry: &mut tar::Entry<'_, R>, writer: &mut Writer) -> Result<()> {
    let xattrs = xattrs(entry)?;
    let path = Name::parse(&entry.path_bytes())?;
    let header = entry.header();
    let corrupt = |what: &'static str| move |e: io::Error| Error::new(ErrorKind::Corrupt, format!("{what}: {e}"));
    let id =
        |n: u64| u32::try_from(n).map_err(|_| Error::new(ErrorKind::Corrupt, format!("owner {n} is beyond 32 bits")));
    let (uid, gid) = (id(header.uid().map_err(corrupt("owner"))?)?, id(header.gid().map_err(corrupt("group"))?)?);
    let mode = (header.mode().map_err(corrupt("mode"))? & 0o7777) as u16;
    let mtime = i64::try_from(header.mtime().map_err(corrupt("time"))?).unwrap_or(i64::MAX);
    let node = |header: &tar::Header| -> Result<(u32, u32)> {
        let major = header.device_major().map_err(corrupt("device number"))?.unwrap_or(0);
        Ok((major, header.device_minor().map_err(corrupt("device number"))?.unwrap_or(0)))
    };
    let link = entry.link_name_bytes().map(std::borrow::Cow::into_owned);
    let link = || link.as_deref().ok_or_else(|| Error::new(ErrorKind::Corrupt, "a link without a target"));
    let kind = match header.entry_type() {
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink(symlink_target(link()?, &path)?),
        EntryType::Link => Kind::HardLink(Name::parse(link()?)?),
        EntryType::Char => node(header).map(|(major, minor)| Kind::CharacterDevice(major, minor))?,
        EntryType::Block => node(header).map(|(major, minor)| Kind::BlockDevice(major, minor))?,
        EntryType::Fifo => Kind::Fifo,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
            return writer.add(Entry { path, kind: Kind::File(entry), uid, gid, mode, mtime, xattrs });
        }
        // Settings for all entries that follow; what matters of them the archive reader has applied.
        EntryType::XGlobalHeader => return Ok(()),
        other => {
            let code = char::from(other.as_byte());
            return Err(Error::new(ErrorKind::Unsupported, format!("an entry of type {code:?} cannot be kept")));
        }
    };
    writer.add(Entry { path, kind, uid, gid, mode, mtime, xattrs })
}

/// Extended attributes, as GNU tar and star write them.
fn xattrs<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let broken = |e: io::Error| Error::new(ErrorKind::Corrupt, format!("its extended header: {e}"));
    for extension in entry.pax_extensions().map_err(broken)?.into_iter().flatten() {
        let extension = extension.map_err(broken)?;
        let Ok(key) = extension.key() else { continue };
        if key == "GNU.sparse.major" {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "a sparse file in the posix format: make the archive without --sparse, or with --format=gnu",
            ));
        }
        if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
            found.insert(name.to_owned(), extension.value_bytes().to_vec());
        }
    }
    Ok(found)
}

/// Knows whether the last whole block of 512 bytes that went by was all zeros.
struct LastBlock<R> {
    inner: R,
    block: Vec<u8>,
    zeros: bool,
}

impl<R: Read> Read for LastBlock<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(to)?;
        let mut rest = to.get(..n).unwrap_or_default();
        // Only the last block counts, so all before it is passed over.
        let whole = (self.block.len() + rest.len()) / 512;
        if whole > 1 {
            let skip = (whole - 1) * 512 - self.block.len();
            self.block.clear();
            rest = rest.get(skip..).unwrap_or_default();
        }
        for byte in rest {
            self.block.push(*byte);
            if self.block.len() == 512 {
                self.zeros = self.block.iter().all(|b| *b == 0);
                self.block.clear();
            }
        }
        Ok(n)
    }
}
