//! Reads an image from a directory. The order does not depend on the host's file system.
//!
//! Each entry is opened below a descriptor of the directory, without following links, and checked once more after that.
//! So an entry that is replaced meanwhile is an error, and never what a link points to.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata as Stat};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use sha2::{Digest, Sha256};

use super::budget::Budget;
use super::content::{Content, SparseExtent, SparseMap};
use super::path::{EntryPath, symlink_target};
use super::tar::ImageBuilder;
use super::tree::{FileData, InodeKind, Metadata};
use super::xattr::{self, Holder};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, Beneath};

/// What one read asks for.
const PIECE: usize = 256 << 10;

/// Something in the directory: where it is, what it is, and itself, opened as a mere place.
struct Found<'a> {
    path: &'a Path,
    stat: &'a Stat,
    place: &'a File,
}

/// Calls `f` with everything below `root`, parents first, names in order. Never follows a symbolic link.
fn walk(root: &Beneath, budget: &Budget, f: &mut dyn FnMut(Found<'_>) -> Result<()>) -> Result<()> {
    let mut waiting: Vec<(Rc<Path>, OsString)> = vec![(Rc::from(Path::new("")), OsString::new())];
    budget.entry()?;
    while let Some((parent, name)) = waiting.pop() {
        budget.check()?;
        let path: PathBuf = if name.is_empty() { PathBuf::new() } else { parent.join(name) };
        let doing = || format!("reading {:?}", path.display());
        let place = root.open_at(&path, libc::O_PATH).doing(doing)?;
        let stat = place.metadata().doing(doing)?;
        f(Found { path: &path, stat: &stat, place: &place }).doing(doing)?;
        if stat.is_dir() {
            let directory = root.open_at(&path, libc::O_RDONLY | libc::O_DIRECTORY).doing(doing)?;
            same(&stat, &directory.metadata()?).doing(doing)?;
            let parent: Rc<Path> = Rc::from(&*path);
            let before = waiting.len();
            for child in fs::read_dir(sys::path_of(directory.as_fd())).doing(doing)? {
                let name = child.doing(doing)?.file_name();
                // Here, as a directory may have any number of them.
                budget.entry()?;
                budget.names(name.len())?;
                waiting.push((parent.clone(), name));
            }
            waiting.get_mut(before..).unwrap_or_default().sort_unstable_by(|(_, a), (_, b)| b.cmp(a));
        }
    }
    Ok(())
}

/// # Errors
/// `InvalidState` when something else has taken its place.
fn same(stat: &Stat, now: &Stat) -> Result<()> {
    if (stat.dev(), stat.ino(), stat.file_type()) == (now.dev(), now.ino(), now.file_type()) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidState, "it was replaced while the directory was read"))
}

/// What changes whenever anything in the directory has changed. Contents need not be read for that: the kernel gives a file a new
/// change time with every write.
fn identify(hash: &mut Sha256, path: &Path, m: &Stat) {
    hash.update(path.as_os_str().as_bytes());
    let numbers = [m.dev(), m.ino(), m.len(), m.mode().into(), m.uid().into(), m.gid().into(), m.rdev()];
    let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
    hash.update([0]);
    numbers.iter().for_each(|n| hash.update(n.to_le_bytes()));
    times.iter().for_each(|t| hash.update(t.to_le_bytes()));
}

/// Feeds `hash` with what the directory is.
pub(super) fn fingerprint(root: &Beneath, budget: &Budget, hash: &mut Sha256) -> Result<()> {
    walk(root, budget, &mut |found| {
        identify(hash, found.path, found.stat);
        Ok(())
    })
}

/// Adds everything in the directory to `to`, and feeds `hash` as [`fingerprint`] does.
///
/// # Errors
/// `PermissionDenied` for what may not be read, `Unsupported` for what cannot be kept, `InvalidState` for what changes meanwhile.
pub(super) fn read(root: &Beneath, to: &mut ImageBuilder<'_, '_>, hash: &mut Sha256) -> Result<()> {
    // Files with several names, by device and inode.
    let mut linked: HashMap<(u64, u64), EntryPath> = HashMap::new();
    let budget = to.budget;
    let mut found_any = false;
    walk(root, budget, &mut |found| {
        let (stat, place) = (found.stat, found.place);
        identify(hash, found.path, stat);
        let path = EntryPath::parse(found.path.as_os_str().as_bytes())?;
        found_any |= !path.is_root();
        if stat.nlink() > 1 && !stat.is_dir() {
            if let Some(first) = linked.get(&(stat.dev(), stat.ino())) {
                return to.tree.add_link(&path, first, budget);
            }
            budget.names(path.as_bytes().len())?;
            linked.insert((stat.dev(), stat.ino()), path.clone());
        }
        let kind = stat.file_type();
        let number = || super::device_number(libc::major(stat.rdev()), libc::minor(stat.rdev()));
        let kind = match () {
            () if kind.is_dir() => {
                let metadata = metadata(&found, Holder::Directory, budget)?;
                return to.tree.add_directory(&path, metadata, budget);
            }
            () if kind.is_file() => InodeKind::File(content(root, &found, to)?),
            () if kind.is_symlink() => {
                let target = symlink_target(&sys::link_target(place.as_fd())?)?;
                budget.names(target.len())?;
                InodeKind::Symlink(target)
            }
            () if kind.is_char_device() && stat.rdev() == 0 => {
                let what = "a character device 0:0, which containers cannot show";
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            () if kind.is_char_device() => InodeKind::CharacterDevice(number()?),
            () if kind.is_block_device() => InodeKind::BlockDevice(number()?),
            () if kind.is_fifo() => InodeKind::Fifo,
            // A socket is the end of a running program's connection; there is nothing to keep.
            () => return Ok(()),
        };
        let holder = if matches!(kind, InodeKind::File(_)) { Holder::File } else { Holder::Other };
        to.tree.add(&path, kind, metadata(&found, holder, budget)?, budget)
    })?;
    if !found_any {
        return Err(Error::new(ErrorKind::InvalidConfig, "the directory is empty"));
    }
    Ok(())
}

fn metadata(found: &Found<'_>, holder: Holder, budget: &Budget) -> Result<Metadata> {
    // More than the limit are refused below, where they are counted as they are kept.
    let most = usize::try_from(budget.limits.entry_xattrs.as_bytes()).unwrap_or(usize::MAX).saturating_mul(2);
    let mut xattrs = sys::xattrs(found.place.as_fd(), most).doing(|| "reading its attributes")?;
    let stat = found.stat;
    let mode = (stat.mode() & 0o7777) as u16;
    let mode = if stat.is_symlink() { mode } else { xattr::settle_mode(mode, &mut xattrs) };
    let xattrs = xattr::encode(&xattrs, holder)?;
    budget.xattrs(xattrs.len())?;
    let mtime_nsec = u32::try_from(stat.mtime_nsec()).unwrap_or(0);
    Ok(Metadata { mode, uid: stat.uid(), gid: stat.gid(), mtime: stat.mtime(), mtime_nsec, xattrs })
}

fn content(root: &Beneath, found: &Found<'_>, to: &mut ImageBuilder<'_, '_>) -> Result<FileData> {
    let file = root.open_regular(found.path)?;
    same(found.stat, &file.metadata()?)?;
    let size = found.stat.len();
    let mut source = Reading { file: &file, buffer: Vec::new() };
    // Blocks of 512 bytes.
    if found.stat.blocks().saturating_mul(512) >= size {
        return to.disk.write_file(size, &mut source);
    }
    to.budget.file_size(size)?;
    let map = SparseMap::new(size, pieces(&file, size, to.budget)?)?;
    let mut source = Pieces { source, pieces: map.pieces.iter(), left: 0 };
    to.disk.write_sparse(&map, &mut source)
}

/// The pieces of a file that are not holes.
fn pieces(file: &File, size: u64, budget: &Budget) -> Result<Vec<SparseExtent>> {
    let (mut pieces, mut at) = (Vec::new(), 0);
    while let Some(start) = sys::next_data(file, at)?.filter(|start| *start < size) {
        budget.check()?;
        at = sys::next_hole(file, start)?.unwrap_or(size).min(size);
        pieces.push(SparseExtent { offset: start, len: at.saturating_sub(start) });
        SparseMap::check(pieces.len())?;
    }
    Ok(pieces)
}

/// What is read of a file from where it stands.
struct Reading<'a> {
    file: &'a File,
    buffer: Vec<u8>,
}

impl Content for Reading<'_> {
    fn next(&mut self, most: u64) -> Result<&[u8]> {
        self.buffer.resize(usize::try_from(most).unwrap_or(PIECE).min(PIECE), 0);
        loop {
            match self.file.read(&mut self.buffer) {
                Ok(0) => return Err(Error::new(ErrorKind::InvalidState, "it became shorter while it was read")),
                Ok(n) => return Ok(self.buffer.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// The same of a file with holes, which it jumps over.
struct Pieces<'a, 'p> {
    source: Reading<'a>,
    pieces: std::slice::Iter<'p, SparseExtent>,
    /// Of the piece that it is in.
    left: u64,
}

impl Content for Pieces<'_, '_> {
    fn next(&mut self, most: u64) -> Result<&[u8]> {
        use std::io::{Seek, SeekFrom};
        if self.left == 0
            && let Some(SparseExtent { offset, len }) = self.pieces.next()
        {
            self.source.file.seek(SeekFrom::Start(*offset))?;
            self.left = *len;
        }
        let piece = self.source.next(most.min(self.left))?;
        self.left -= piece.len() as u64;
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use super::*;
    use crate::container::CancelToken;
    use crate::container::image::budget::PrepareDeadline;
    use crate::container::image::limits::ImageLimits;
    use crate::size::Size;

    fn budget(limits: &ImageLimits, cancel: &CancelToken) -> Budget {
        Budget::new(limits, Size::mib(1), &PrepareDeadline::new(Duration::MAX, [cancel]))
    }

    /// A directory of any number of names once took all of them into memory before the first was counted.
    #[test]
    fn name_bytes_are_charged_before_allocation() {
        let directory = std::env::temp_dir().join(format!("cofferdam-names-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        (0..20).for_each(|n| fs::write(directory.join(n.to_string()), "").unwrap());
        let root = Beneath::open(&directory).unwrap();
        let walked = |entries| {
            let mut found = 0;
            let count = &mut |_: Found<'_>| {
                found += 1;
                Ok(())
            };
            let outcome =
                walk(&root, &budget(&ImageLimits::new().max_entries(entries), &CancelToken::new().unwrap()), count);
            (outcome.is_ok(), found)
        };
        assert_eq!((walked(21), walked(20)), ((true, 21), (false, 1)));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn hole_search_ends_when_cancelled() {
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        file.set_len(4 << 20).unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 3 << 20).unwrap();
        let (limits, cancel) = (ImageLimits::new(), CancelToken::new().unwrap());
        let found = pieces(&file, 4 << 20, &budget(&limits, &cancel)).unwrap();
        let extent = |offset| SparseExtent { offset, len: 4096 };
        assert_eq!(found, [extent(1 << 20), extent(3 << 20)]);
        // What was added behind its end is no part of it.
        assert_eq!(pieces(&file, 2 << 20, &budget(&limits, &cancel)).unwrap(), [extent(1 << 20)]);
        cancel.cancel();
        assert_eq!(pieces(&file, 4 << 20, &budget(&limits, &cancel)).unwrap_err().kind(), ErrorKind::Cancelled);
    }
}
