//! [`Image`]: a root file system, and the disk that is made of it once.

#![deny(clippy::indexing_slicing, reason = "archives are strangers'")]

mod acl;
mod budget;
mod content;
mod directory;
mod erofs;
#[cfg(any(test, feature = "internals"))]
mod fuzzing;
#[allow(dead_code, reason = "images in layers come next")]
mod layers;
mod limits;
#[allow(dead_code, unused_imports, reason = "images of registries come next")]
mod oci;
mod path;
mod recognize;
mod seal;
#[cfg(feature = "signatures")]
#[allow(dead_code, unused_imports, reason = "pulls come next")]
mod signature;
mod store;
mod tar;
mod tree;
mod worker;
mod xattr;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::CancelToken;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys::Beneath;
use budget::{Budget, PrepareDeadline};
#[cfg(any(test, feature = "internals"))]
pub(crate) use fuzzing::image_tar;
pub use limits::ImageLimits;
pub use oci::ImageConfig;
use store::{FileIdentity, Store};
use tar::{ImageBuilder, Stream};
use tree::InodeTree;

/// How disks are written: what hashes and seals begin with, so that disks that another release wrote otherwise are other disks.
const DISK_VERSION: [u8; 16] = *b"cofferdam disk 2";

/// How long a file system has to say what a path is.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// A root file system to start containers from: a tar archive or a directory. Cloning is cheap.
///
/// The first container of an image waits until its content was written into an EROFS disk image. That needs no privileges
/// and mounts nothing. The disk is kept in the user's cache under the digest of the content. All containers share it
/// read-only, also those of other processes. It is made once, however many callers ask at the same time.
///
/// # What is read
///
/// An archive is in any format that GNU tar, bsdtar or star write, and is not compressed. The tree is the one that GNU tar gives
/// when root runs `tar --numeric-owner -p --xattrs --xattrs-include='*' --acls -x`: later entries replace earlier ones, and
/// directories merge. Links are followed inside the image only. What GNU tar refuses is an error that names the entry.
///
/// Ownership, modes, times, links, device nodes, holes, extended attributes and ACLs are those of the archive or directory. What
/// cannot be kept is an error, never left out silently: attributes outside `user`, `trusted`, `security` and POSIX ACLs,
/// `trusted.overlay`, and a character device 0:0. Sockets have no meaning in an image and are left out.
///
/// # Images of strangers
///
/// No content makes preparation panic, or take more memory, disk or time than allowed. [`ImageLimits`], [`Image::max_size`] and
/// [`Image::prepare_timeout`] are these bounds. Preparation runs on a thread of its own.
///
/// The cache directory is made for its user alone. A directory that others can write to is refused, and so are files of others in it.
/// Each process reads a disk through before its first use, and makes a damaged one anew.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Image {
    path: PathBuf,
    kind: ImageKind,
    cache: Option<PathBuf>,
    max_size: Size,
    limits: ImageLimits,
    prepare_timeout: Duration,
    cancel: Option<CancelToken>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ImageKind {
    Tar,
    Directory,
}

impl Image {
    /// Opens an archive or a directory as an image.
    ///
    /// Its content is read when the first container starts. A directory should not be written to meanwhile. Blocks for
    /// at most 10 s, also where the host's file system does not answer.
    ///
    /// # Errors
    /// - `NotFound` or `PermissionDenied` when it cannot be opened.
    /// - `InvalidConfig` when it is neither a file nor a directory.
    /// - `TimedOut` where the host does not answer.
    /// - `ResourceExhausted` where 16 threads of the process wait for such files already.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let doing = || format!("opening image {}", path.display());
        let asked = path.to_path_buf();
        let deadline = PrepareDeadline::fixed(OPEN_TIMEOUT, "its file system has not answered");
        let metadata = worker::run(&deadline, Duration::ZERO, move |_| Ok(std::fs::metadata(asked)?)).doing(doing)?;
        let kind = match () {
            () if metadata.is_dir() => ImageKind::Directory,
            () if metadata.is_file() => ImageKind::Tar,
            () => {
                return Err(Error::new(ErrorKind::InvalidConfig, "neither a file nor a directory").doing(doing()));
            }
        };
        let path = std::path::absolute(path).doing(doing)?;
        let (limits, prepare_timeout) = (ImageLimits::default(), Duration::from_secs(600));
        Ok(Self { path, kind, cache: None, max_size: Size::gib(16), limits, prepare_timeout, cancel: None })
    }

    /// Keeps the disk in this directory instead of the user's cache.
    ///
    /// The cache is `$XDG_CACHE_HOME/cofferdam/images`, or `~/.cache/cofferdam/images` where that variable is not set.
    /// A directory that is missing is made, for this user alone.
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache = Some(dir.into());
        self
    }

    /// Limits the size of the image's disk; 16 GiB by default.
    ///
    /// Holes of files take nothing; zeroes count.
    pub fn max_size(mut self, size: Size) -> Self {
        self.max_size = size;
        self
    }

    /// Limits what the image may contain; [`ImageLimits::default`] by default.
    ///
    /// A disk that is there already is not measured.
    pub fn limits(mut self, limits: ImageLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets how long preparation may take; ten minutes by default.
    ///
    /// That includes waiting for other callers who prepare the same image.
    pub fn prepare_timeout(mut self, timeout: Duration) -> Self {
        self.prepare_timeout = timeout;
        self
    }

    /// Lets another thread cancel the preparation by `token`.
    ///
    /// It then fails with `Cancelled` within 4 s, also where a file of the host's does not answer. No half-made disk is
    /// left behind. The token counts for [`Image::prepare`], and for starts of containers of this image as long as they
    /// wait for its disk.
    pub fn cancel(mut self, token: &CancelToken) -> Self {
        self.cancel = Some(token.clone());
        self
    }

    /// Makes the disk if it is not there yet.
    ///
    /// No container has to wait for it then.
    ///
    /// Blocks for at most [`Image::prepare_timeout`] and 4 s, and for 4 s once the token of [`Image::cancel`] is
    /// cancelled.
    ///
    /// Where a file of the host's does not answer for longer, the preparing thread is left behind. It ends when the
    /// host answers. Until then other callers who prepare the same image wait as long as they are allowed. Once 16
    /// threads of the process are left behind, no image is opened or prepared until one of them ends.
    ///
    /// # Errors
    /// - `Corrupt` for an archive that is damaged or is none, and `Unsupported` for what cannot be kept, name the
    ///   entry.
    /// - `InvalidConfig` beyond a limit, naming its method, and for an empty directory.
    /// - `InvalidState` for a source that is written to meanwhile.
    /// - `PermissionDenied` for a cache directory that others can write to.
    /// - `TimedOut`; `Cancelled`.
    /// - `ResourceExhausted` without space, and where 16 threads were left behind.
    ///
    /// No half-made disk is left behind.
    pub fn prepare(&self) -> Result<()> {
        self.disk(None).map(drop)
    }

    /// The disk, open for reading. Its own token ends what is done for it, and so does `cancel`.
    pub(super) fn disk(&self, cancel: Option<&CancelToken>) -> Result<File> {
        let image = self.clone();
        let deadline = PrepareDeadline::new(self.prepare_timeout, self.cancel.iter().chain(cancel));
        worker::run(&deadline, worker::GRACE, move |deadline| image.made(deadline))
            .doing(|| format!("preparing image {}", self.path.display()))
    }

    fn made(&self, deadline: &PrepareDeadline) -> Result<File> {
        let store = Store::open(self.cache.clone())?;
        match self.kind {
            ImageKind::Tar => self.made_of_archive(&store, deadline),
            ImageKind::Directory => self.made_of_directory(&store, deadline),
        }
    }

    fn budget(&self, deadline: &PrepareDeadline) -> Budget {
        Budget::new(&self.limits, self.max_size, deadline)
    }

    /// The archive is opened once. What is written was read by the same descriptor, and is kept under the digest of just that.
    fn made_of_archive(&self, store: &Store, deadline: &PrepareDeadline) -> Result<File> {
        let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(Error::new(ErrorKind::InvalidState, "it is no file any more"));
        }
        let identity = FileIdentity::of(&file)?.name();
        let changed = || Error::new(ErrorKind::InvalidState, "the archive was written to while it was read");
        let digest = match store.remembered(&identity) {
            Some(digest) => digest,
            None => {
                let mut hash = begin();
                read_into(&mut file, &mut hash, deadline)?;
                let digest = hex(&hash.finalize());
                if FileIdentity::of(&file)?.name() != identity {
                    return Err(changed());
                }
                store.remember(&identity, &digest);
                digest
            }
        };
        store.get_or_make(&digest, deadline, |disk| {
            file.seek(SeekFrom::Start(0))?;
            let read = write_archive(&mut file, disk, &self.budget(deadline))?;
            if hex(&read.finalize()) == digest {
                return Ok(());
            }
            store.forget(&identity);
            Err(changed())
        })
    }

    fn made_of_directory(&self, store: &Store, deadline: &PrepareDeadline) -> Result<File> {
        let root = Beneath::open(&self.path)?;
        let mut hash = begin();
        directory::fingerprint(&root, &self.budget(deadline), &mut hash)?;
        let digest = hex(&hash.finalize());
        store.get_or_make(&digest, deadline, |disk| {
            let budget = self.budget(deadline);
            let (mut tree, mut hash) = (InodeTree::new(), begin());
            let mut to = erofs::Disk::new(disk, &budget)?;
            directory::read(&root, &mut ImageBuilder { tree: &mut tree, disk: &mut to, budget: &budget }, &mut hash)?;
            erofs::finish(&tree, to)?;
            if hex(&hash.finalize()) == digest {
                return Ok(());
            }
            Err(Error::new(ErrorKind::InvalidState, "the directory was written to while it was read"))
        })
    }
}

/// Writes the disk of an archive, and returns the hash of all that was read of it.
fn write_archive(source: &mut dyn Read, disk: &File, budget: &Budget) -> Result<Sha256> {
    let mut tree = InodeTree::new();
    let mut to = erofs::Disk::new(disk, budget)?;
    let mut stream = Stream::new(source, begin(), budget);
    tar::read(&mut stream, &mut ImageBuilder { tree: &mut tree, disk: &mut to, budget })?;
    erofs::finish(&tree, to)?;
    stream.finish()
}

/// The hash by which disks are found.
fn begin() -> Sha256 {
    Sha256::new_with_prefix(DISK_VERSION).chain_update(b"\n")
}

fn read_into(file: &mut File, hash: &mut Sha256, deadline: &PrepareDeadline) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        deadline.check()?;
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

/// A device's number as Linux keeps it on disks (`new_encode_dev`).
///
/// # Errors
/// `Corrupt` for one that Linux has no room for.
fn device_number(major: u32, minor: u32) -> Result<u32> {
    if major >> 12 != 0 || minor >> 20 != 0 {
        return Err(Error::new(ErrorKind::Corrupt, format!("its device number {major}:{minor} is too large")));
    }
    Ok(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

#[cfg(test)]
mod tests;
