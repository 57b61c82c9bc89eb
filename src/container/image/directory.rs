//! Reads an image from a directory, in an order that does not depend on the host's file system.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::entry::{Entry, Kind, Name, symlink_target};
use super::ext4::Writer;
use crate::error::{Context, Result};
use crate::sys;

/// Calls `f` with everything below `root`, parents first, names in order. Never follows a symbolic link.
fn walk(root: &Path, f: &mut dyn FnMut(&Path, &Metadata) -> Result<()>) -> Result<()> {
    let mut waiting = vec![root.to_path_buf()];
    while let Some(path) = waiting.pop() {
        let doing = || format!("reading {}", path.display());
        let metadata = fs::symlink_metadata(&path).doing(doing)?;
        f(&path, &metadata)?;
        if metadata.is_dir() {
            let mut names: Vec<PathBuf> = Vec::new();
            for child in fs::read_dir(&path).doing(doing)? {
                names.push(child.doing(doing)?.path());
            }
            names.sort_unstable_by(|a, b| b.cmp(a));
            waiting.append(&mut names);
        }
    }
    Ok(())
}

/// Feeds `hash` with what changes whenever anything in the directory has changed. Contents need not be read for that:
/// the kernel gives a file a new change time with every write.
pub(super) fn fingerprint(root: &Path, hash: &mut Sha256) -> Result<()> {
    walk(root, &mut |path, m| {
        hash.update(path.strip_prefix(root).unwrap_or(path).as_os_str().as_bytes());
        let numbers = [m.dev(), m.ino(), m.len(), m.mode().into(), m.uid().into(), m.gid().into(), m.rdev()];
        let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
        hash.update([0]);
        numbers.iter().for_each(|n| hash.update(n.to_le_bytes()));
        times.iter().for_each(|t| hash.update(t.to_le_bytes()));
        Ok(())
    })
}

/// Gives everything in the directory to `writer`.
///
/// # Errors
/// `PermissionDenied` for what may not be read, `Unsupported` for what cannot be kept.
pub(super) fn write(root: &Path, writer: &mut Writer) -> Result<()> {
    // Files with several names, by device and inode.
    let mut linked: HashMap<(u64, u64), Name> = HashMap::new();
    walk(root, &mut |path, m| {
        let inside = path.strip_prefix(root).unwrap_or(path);
        let name = Name::parse(inside.as_os_str().as_bytes())?;
        let xattrs = xattrs(path).doing(|| format!("reading attributes of {}", path.display()))?;
        let entry = |kind| Entry {
            path: name.clone(),
            kind,
            uid: m.uid(),
            gid: m.gid(),
            mode: (m.mode() & 0o7777) as u16,
            mtime: m.mtime(),
            xattrs,
        };
        if m.nlink() > 1 && !m.is_dir() {
            if let Some(first) = linked.get(&(m.dev(), m.ino())) {
                return writer.add(entry(Kind::HardLink(first.clone())));
            }
            linked.insert((m.dev(), m.ino()), name.clone());
        }
        let (major, minor) = (libc::major(m.rdev()), libc::minor(m.rdev()));
        let kind = m.file_type();
        if kind.is_file() {
            let mut file = File::open(path).doing(|| format!("reading {}", path.display()))?;
            return writer.add(entry(Kind::File(&mut file)));
        }
        match () {
            () if kind.is_dir() => writer.add(entry(Kind::Directory)),
            () if kind.is_symlink() => {
                let target = fs::read_link(path).doing(|| format!("reading {}", path.display()))?;
                let target = symlink_target(target.as_os_str().as_bytes(), &name)?;
                writer.add(entry(Kind::Symlink(target)))
            }
            () if kind.is_char_device() => writer.add(entry(Kind::CharacterDevice(major, minor))),
            () if kind.is_block_device() => writer.add(entry(Kind::BlockDevice(major, minor))),
            () if kind.is_fifo() => writer.add(entry(Kind::Fifo)),
            // A socket is the end of a running program's connection; there is nothing to keep.
            () => Ok(()),
        }
    })
}

fn xattrs(path: &Path) -> std::io::Result<BTreeMap<String, Vec<u8>>> {
    sys::xattrs(path)
}
