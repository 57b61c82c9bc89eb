//! Writes entries into an ext4 disk image. The crate arcbox-ext4 does the format; its gaps are closed here.
//!
//! What it has no words for is added to the finished image: device nodes and fifos (their inodes are rewritten), and
//! holes where files are zeros. The images have neither a journal nor checksums, so an inode can be rewritten alone.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use arcbox_ext4::constants::{file_mode, make_mode};
use arcbox_ext4::error::{FormatError, ReadError};
use arcbox_ext4::{FileTimestamps, FormatOptions, Formatter, Reader};

use super::entry::{Entry, Kind, Name};
use crate::error::{Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys;

/// The only block size of the format writer.
const BLOCK: u64 = 4096;
/// A block group. Disks are whole ones, as the format writer does not lengthen the file of a part of one.
const GROUP: u64 = 128 << 20;
/// What the format writer has room to describe: 4,096 groups.
const MAX_DISK: Size = Size::gib(512);
/// Nobody has to guess identifiers of images that are found by digest; the same content gives the same bytes.
const IMAGE_UUID: [u8; 16] = *b"cofferdam-image\0";

/// An image under construction.
pub(super) struct Writer {
    formatter: Formatter,
    /// Bytes of files that may still come.
    left: u64,
    max: Size,
    /// Nodes that were written as empty files, to become what they are.
    special: BTreeMap<String, (u16, u32, u32)>,
}

/// Makes an image at `path` of what `fill` adds.
pub(super) fn write(path: &Path, max: Size, fill: impl FnOnce(&mut Writer) -> Result<()>) -> Result<()> {
    guarded(|| {
        let options = FormatOptions::new(GROUP).uuid(uuid());
        let formatter = Formatter::with_options(path, options).map_err(convert)?;
        let mut writer = Writer { formatter, left: max.as_bytes(), max, special: BTreeMap::new() };
        fill(&mut writer)?;
        let special = writer.special;
        writer.formatter.close().map_err(convert)?;
        make_special(path, &special)?;
        punch_holes(&OpenOptions::new().read(true).write(true).open(path)?)
    })
}

/// What is written for a disk of `size`: whole groups.
///
/// # Errors
/// `InvalidConfig` for nothing and for more than the format writer has room for.
pub(super) fn whole_groups(size: Size) -> Result<Size> {
    if size.as_bytes() == 0 || size > MAX_DISK {
        return Err(Error::invalid("disk", format!("{size}: up to {MAX_DISK} are possible, and not nothing")));
    }
    Ok(Size::bytes(size.as_bytes().next_multiple_of(GROUP)))
}

/// Makes an empty file system of `size` at `path`.
pub(super) fn write_empty(path: &Path, size: Size) -> Result<()> {
    guarded(|| {
        let formatter =
            Formatter::with_options(path, FormatOptions::new(size.as_bytes()).uuid(uuid())).map_err(convert)?;
        formatter.close().map_err(convert)?;
        punch_holes(&OpenOptions::new().read(true).write(true).open(path)?)
    })
}

fn uuid() -> uuid::Uuid {
    uuid::Uuid::from_bytes(IMAGE_UUID)
}

/// The format writer asserts in places what hostile input may break; that is an error here, not the end of the embedder.
fn guarded<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::Corrupt, "the disk's format writer cannot express this image")))
}

fn convert(error: FormatError) -> Error {
    match error {
        FormatError::Io(error) => error.into(),
        FormatError::NotDirectory(path) => {
            Error::new(ErrorKind::Corrupt, format!("{} is below something that is no directory", path.display()))
        }
        FormatError::NotFound(path) => {
            Error::new(ErrorKind::Corrupt, format!("{} is not in the image", path.display()))
        }
        other => Error::new(ErrorKind::Corrupt, other.to_string()),
    }
}

impl Writer {
    /// Adds one entry. A later one of the same path takes an earlier one's place, but for directories, which merge.
    pub(super) fn add(&mut self, entry: Entry<'_>) -> Result<()> {
        let Entry { path, kind, uid, gid, mode, mtime, xattrs } = entry;
        let at = path.absolute();
        self.special.remove(&at);
        let named = |error: Error| error.doing(at.clone());
        let (mode, special) = match &kind {
            Kind::Directory => (make_mode(file_mode::S_IFDIR, mode), None),
            Kind::File(_) => (make_mode(file_mode::S_IFREG, mode), None),
            Kind::Symlink(_) => (make_mode(file_mode::S_IFLNK, 0o777), None),
            Kind::HardLink(target) => return self.link(&path, target).map_err(named),
            Kind::CharacterDevice(major, minor) => {
                (make_mode(file_mode::S_IFREG, mode), Some((file_mode::S_IFCHR | mode, *major, *minor)))
            }
            Kind::BlockDevice(major, minor) => {
                (make_mode(file_mode::S_IFREG, mode), Some((file_mode::S_IFBLK | mode, *major, *minor)))
            }
            Kind::Fifo => (make_mode(file_mode::S_IFREG, mode), Some((file_mode::S_IFIFO | mode, 0, 0))),
        };
        if path.is_root() && !matches!(kind, Kind::Directory) {
            return Err(Error::new(ErrorKind::Corrupt, "the root is not a directory"));
        }
        if let Some(special) = special {
            self.special.insert(at.clone(), special);
        }
        let xattrs: HashMap<String, Vec<u8>> = xattrs.into_iter().collect();
        let xattrs = (!xattrs.is_empty()).then_some(&xattrs);
        let (uid, gid, times) = (Some(uid), Some(gid), Some(times(mtime)));
        let outcome = match kind {
            Kind::File(data) => {
                let mut limited = Limited { inner: data, left: &mut self.left, exceeded: false };
                let outcome = self.formatter.create(&at, mode, None, times, Some(&mut limited), uid, gid, xattrs);
                if limited.exceeded {
                    return Err(named(Error::invalid(
                        "Image::max_size",
                        format!("the image has more than {}", self.max),
                    )));
                }
                outcome
            }
            Kind::Symlink(target) => self.formatter.create(&at, mode, Some(&target), times, None, uid, gid, xattrs),
            _ => self.formatter.create(&at, mode, None, times, None, uid, gid, xattrs),
        };
        outcome.map_err(convert).map_err(named)
    }

    fn link(&mut self, path: &Name, target: &Name) -> Result<()> {
        let (at, to) = (path.absolute(), target.absolute());
        if at == to || !self.formatter.exists(&to) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("a hard link to {to}, which is not in the image before it"),
            ));
        }
        if self.formatter.is_dir(&at) {
            return Err(Error::new(ErrorKind::Corrupt, "a hard link in the place of a directory"));
        }
        if let Some(node) = self.special.get(&to).copied() {
            self.special.insert(at.clone(), node);
        }
        self.formatter.link(&at, &to).map_err(convert)
    }
}

/// The first and the last second that an inode can keep, in 1901 and 2446.
const TIMES: RangeInclusive<i64> = i32::MIN as i64..=(3 << 32) + i32::MAX as i64;

/// Seconds in the format of an inode: the low 32 bits, and two more above them (Linux ext4, inode timestamps). What
/// lies beyond becomes the nearest that can be kept, as Linux does it.
fn times(mtime: i64) -> FileTimestamps {
    let mtime = mtime.clamp(*TIMES.start(), *TIMES.end());
    let (low, high) = (mtime as u32, ((mtime - i64::from(mtime as i32)) >> 32) as u32 & 3);
    FileTimestamps {
        access_lo: low,
        access_hi: high,
        modification_lo: low,
        modification_hi: high,
        creation_lo: low,
        creation_hi: high,
        now_lo: low,
        now_hi: high,
    }
}

/// Stops with an error before the limit of all files is exceeded.
struct Limited<'a> {
    inner: &'a mut dyn Read,
    left: &'a mut u64,
    exceeded: bool,
}

impl Read for Limited<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        // Whole buffers matter: the format writer goes on after short ones, and pays a system call for each.
        let mut n = 0;
        while n < to.len() {
            match self.inner.read(to.get_mut(n..).unwrap_or_default()) {
                Ok(0) => break,
                Ok(more) => n += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("its content is cut off: {e}")));
                }
            }
        }
        match self.left.checked_sub(n as u64) {
            Some(left) => *self.left = left,
            None => {
                self.exceeded = true;
                return Err(io::Error::other("too large"));
            }
        }
        Ok(n)
    }
}

/// Turns empty files into the nodes that they stand for.
fn make_special(path: &Path, nodes: &BTreeMap<String, (u16, u32, u32)>) -> Result<()> {
    if nodes.is_empty() {
        return Ok(());
    }
    let broken = |e: ReadError| Error::new(ErrorKind::Corrupt, format!("reading the new disk: {e}"));
    let mut reader = Reader::new(path).map_err(broken)?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    for (name, node) in nodes {
        let (number, _) = reader.stat_no_follow(name).map_err(broken)?;
        rewrite_inode(&file, inode_offset(&mut reader, number).map_err(broken)?, *node)?;
        let (parent, own) = name.rsplit_once('/').unwrap_or(("", name));
        let parent = if parent.is_empty() { "/" } else { parent };
        let (_, directory) = reader.stat_no_follow(parent).map_err(broken)?;
        rewrite_type(&file, &directory.block, own.as_bytes(), node.0)?;
    }
    Ok(())
}

/// Where an inode lies on the disk (Linux ext4, inode table).
fn inode_offset(reader: &mut Reader, number: u32) -> std::result::Result<u64, ReadError> {
    let (per_group, size) = (reader.superblock().inodes_per_group.max(1), u64::from(reader.superblock().inode_size));
    let table = reader.get_group_descriptor((number - 1) / per_group)?.inode_table_lo;
    Ok(u64::from(table) * BLOCK + u64::from((number - 1) % per_group) * size)
}

/// Linux ext4, inode table: `i_mode`, `i_flags`, `i_block`, which holds a device number, in the old form where it fits.
fn rewrite_inode(file: &File, at: u64, (mode, major, minor): (u16, u32, u32)) -> io::Result<()> {
    file.write_all_at(&mode.to_le_bytes(), at)?;
    file.write_all_at(&0u32.to_le_bytes(), at + 0x20)?;
    let (old, new) = match major < 256 && minor < 256 {
        true => (major << 8 | minor, 0),
        false => (0, minor & 0xff | major << 8 | (minor & !0xff) << 12),
    };
    let mut blocks = [0; 60];
    let numbers = old.to_le_bytes().into_iter().chain(new.to_le_bytes());
    blocks.iter_mut().zip(numbers).for_each(|(to, byte)| *to = byte);
    file.write_all_at(&blocks, at + 0x28)
}

/// Linux ext4, directory entries: each repeats its file's type. `blocks` is the directory's `i_block`: one extent, as
/// the format writer lays directories down in one piece.
fn rewrite_type(file: &File, blocks: &[u8; 60], name: &[u8], mode: u16) -> Result<()> {
    let kind = match mode & file_mode::TYPE_MASK {
        file_mode::S_IFCHR => 3,
        file_mode::S_IFBLK => 4,
        _ => 5,
    };
    let [_, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, len_low, len_high, _, _, a, b, c, d, ..] = *blocks;
    let (start, len) = (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([len_low, len_high]));
    let mut bytes = vec![0; usize::from(len) * BLOCK as usize];
    let offset = u64::from(start) * BLOCK;
    file.read_exact_at(&mut bytes, offset)?;
    let mut at = 0;
    while let Some([_, _, _, _, size_low, size_high, name_len, _]) = bytes.get(at..).and_then(|rest| rest.first_chunk())
    {
        let size = usize::from(u16::from_le_bytes([*size_low, *size_high]));
        if bytes.get(at + 8..at + 8 + usize::from(*name_len)) == Some(name) {
            return Ok(file.write_all_at(&[kind], offset + at as u64 + 7)?);
        }
        at += size.max(8);
    }
    Err(Error::new(ErrorKind::Corrupt, "reading the new disk: an entry is not in its directory"))
}

/// Gives back the space of blocks that are all zeros; what they read as stays the same.
fn punch_holes(file: &File) -> Result<()> {
    let len = file.metadata()?.len();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while let Some(start) = sys::next_data(file, at)?.filter(|start| *start < len) {
        let start = start / BLOCK * BLOCK;
        let read = file.read_at(&mut buffer, start)?;
        let mut hole = None;
        for (n, block) in buffer.get(..read).unwrap_or_default().chunks(BLOCK as usize).enumerate() {
            let here = start + n as u64 * BLOCK;
            match (block.iter().all(|b| *b == 0), hole) {
                (true, None) => hole = Some(here),
                (false, Some(from)) => {
                    sys::punch(file, from, here - from)?;
                    hole = None;
                }
                _ => {}
            }
        }
        at = start + read as u64;
        if let Some(from) = hole {
            sys::punch(file, from, at - from)?;
        }
        if read == 0 {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_beyond_those_of_an_inode_become_the_nearest() {
        // The low word is signed; the high bits count how often 2^32 seconds were added.
        let kept = |mtime: i64| {
            let t = times(mtime);
            i64::from(t.modification_lo as i32) + (i64::from(t.modification_hi) << 32)
        };
        for mtime in [0, 1_600_000_000, -1, *TIMES.start(), *TIMES.end(), i64::from(i32::MAX) + 1] {
            assert_eq!(kept(mtime), mtime);
        }
        assert_eq!((kept(i64::MIN), kept(i64::MAX)), (*TIMES.start(), *TIMES.end()));
    }
}
