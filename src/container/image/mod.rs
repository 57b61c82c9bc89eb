//! [`Image`]: a root file system as people have it, and the disk that is made of it once.

mod directory;
mod entry;
mod ext4;
mod store;
mod tar;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys;
use store::Store;

/// A root file system to start containers from: a tar archive or a directory. Cloning is cheap.
///
/// The first container of an image waits until its content was written into an ext4 disk image, without privileges and
/// without mounting anything. That disk is kept in the user's cache under the digest of the content and is shared
/// read-only by every container, also of other processes; however many ask at once, it is made once.
///
/// Ownership, modes, times, links, device nodes and extended attributes are those of the archive or directory. What
/// cannot be kept is an error that names the entry, never left out silently: names that are not UTF-8, and sparse files
/// in the archive format of GNU tar's `--format=posix --sparse`. Sockets have no meaning in an image and are left out.
#[derive(Debug, Clone)]
pub struct Image {
    path: PathBuf,
    kind: Kind,
    cache: Option<PathBuf>,
    max_size: Size,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tar,
    Directory,
}

impl Image {
    /// A tar archive (not compressed), or a directory.
    ///
    /// Its content is looked at when the first container starts. A directory should not be written to meanwhile.
    ///
    /// # Errors
    /// `NotFound` or `PermissionDenied` when it cannot be looked at, `InvalidConfig` when it is something else.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let doing = || format!("opening image {}", path.display());
        let metadata = std::fs::metadata(path).doing(doing)?;
        let kind = match () {
            () if metadata.is_dir() => Kind::Directory,
            () if metadata.is_file() => Kind::Tar,
            () => {
                return Err(Error::new(ErrorKind::InvalidConfig, "neither a file nor a directory").doing(doing()));
            }
        };
        let path = std::path::absolute(path).doing(doing)?;
        Ok(Self { path, kind, cache: None, max_size: Size::gib(16) })
    }

    /// Keeps the disk in this folder instead of the user's cache (`$XDG_CACHE_HOME/cofferdam/images`, with `~/.cache`
    /// where that variable is not set). It is made when it is missing.
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache = Some(dir.into());
        self
    }

    /// Refuses content beyond `size` in all, 16 GiB unless set: an archive of a few bytes can unpack to any size.
    pub fn max_size(mut self, size: Size) -> Self {
        self.max_size = size;
        self
    }

    /// Makes the disk if it is not there yet, so that no container has to wait for it. Blocks.
    ///
    /// # Errors
    /// `Corrupt` for an archive that is damaged or is none, `Unsupported` for what cannot be kept, both naming the
    /// entry; `InvalidConfig` beyond [`Image::max_size`]; `ResourceExhausted` without space. Nothing is left behind.
    pub fn prepare(&self) -> Result<()> {
        self.disk().map(drop)
    }

    /// The disk, open for reading.
    pub(super) fn disk(&self) -> Result<File> {
        self.made().doing(|| format!("preparing image {}", self.path.display()))
    }

    /// An empty, unnamed file system of `size`, rounded up to 128 MiB, for a container to write to. The first of a size is
    /// kept beside the disks of images, all others are copies of the little that is in it.
    pub(super) fn scratch(&self, size: Size) -> Result<File> {
        let size = ext4::whole_groups(size)?;
        self.copy_of_empty(size).doing(|| format!("disk: making a disk of {size}"))
    }

    fn copy_of_empty(&self, size: Size) -> Result<File> {
        let mut hash = Sha256::new();
        hash.update(b"cofferdam empty disk 1\n");
        hash.update(size.as_bytes().to_le_bytes());
        let store = Store::open(self.cache.clone())?;
        let empty = store.get_or_make(&hex(&hash.finalize()), |path| ext4::write_empty(path, size))?;
        let copy = sys::temp_file(&std::env::temp_dir())?;
        sys::copy_data(&empty, &copy)?;
        Ok(copy)
    }

    fn made(&self) -> Result<File> {
        let store = Store::open(self.cache.clone())?;
        let identity = self.identity()?;
        let digest = match identity.as_ref().and_then(|identity| store.remembered(identity)) {
            Some(digest) => digest,
            None => {
                let digest = self.digest()?;
                identity.iter().for_each(|identity| store.remember(identity, &digest));
                digest
            }
        };
        store.get_or_make(&digest, |path| ext4::write(path, self.max_size, |writer| self.write(writer)))
    }

    fn write(&self, writer: &mut ext4::Writer) -> Result<()> {
        match self.kind {
            Kind::Tar => tar::write(&self.path, writer),
            Kind::Directory => directory::write(&self.path, writer),
        }
    }

    /// What changes whenever an archive's content may have changed, without reading it. A directory's own times say
    /// nothing of what is in it, so it has no such thing.
    fn identity(&self) -> Result<Option<String>> {
        let m = std::fs::metadata(&self.path)?;
        let times = [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
        let mut hash = Sha256::new();
        [m.dev(), m.ino(), m.len()].iter().for_each(|field| hash.update(field.to_le_bytes()));
        times.iter().for_each(|field| hash.update(field.to_le_bytes()));
        Ok((self.kind == Kind::Tar).then(|| hex(&hash.finalize())))
    }

    /// What the content is, in 64 hexadecimal digits.
    fn digest(&self) -> Result<String> {
        let mut hash = Sha256::new();
        // Disks that an older release wrote in another way are other disks.
        hash.update(b"cofferdam disk 1\n");
        match self.kind {
            Kind::Tar => read_into(File::open(&self.path)?, &mut hash)?,
            Kind::Directory => directory::fingerprint(&self.path, &mut hash)?,
        }
        Ok(hex(&hash.finalize()))
    }
}

fn read_into(mut file: File, hash: &mut Sha256) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => hash.update(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads an archive into a disk that nobody keeps.
#[cfg(any(test, feature = "internals"))]
pub(crate) fn read_archive(source: &mut dyn std::io::Read) {
    use std::os::fd::AsRawFd;
    let Ok(file) = sys::temp_file(&std::env::temp_dir()) else {
        return;
    };
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let _ = ext4::write(&path, Size::mib(64), |writer| tar::read_archive(source, writer));
}

#[cfg(test)]
mod tests;
