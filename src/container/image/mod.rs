//! [`Image`]: a root file system, and the disk that is made of it once.

#![deny(clippy::indexing_slicing, reason = "archives are strangers'")]

mod acl;
mod budget;
mod composed;
mod content;
mod decompress;
mod directory;
mod erofs;
#[cfg(any(test, feature = "internals"))]
mod fuzzing;
mod layers;
mod limits;
mod local;
mod oci;
mod path;
mod pulled;
mod recognize;
#[cfg(feature = "registry")]
mod registry;
mod seal;
#[cfg(feature = "signatures")]
mod signature;
mod store;
mod tar;
mod tree;
mod worker;
mod xattr;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::CancelToken;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys::Beneath;
use crate::vm::Disk;
use crate::vm::disk::DiskPiece;
use budget::{Budget, PrepareDeadline};
use composed::{ComposedDisk, ComposedImage, LayersKey};
use decompress::decompressed;
#[cfg(any(test, feature = "internals"))]
pub(crate) use fuzzing::{image_tar, oci_layer, oci_layer_file, oci_manifest};
use layers::Allowed;
pub use limits::ImageLimits;
use local::{ImageFiles, LocalImages};
#[cfg(any(test, feature = "internals"))]
pub(crate) use oci::fuzz_reference;
pub use oci::{Digest, LayerPhase, LayerProgress, Reference};
pub use oci::{Healthcheck, ImageConfig, Platform};
pub(super) use path::shown;
use pulled::PulledImage;
#[cfg(all(feature = "registry", any(test, feature = "internals")))]
pub(crate) use registry::fuzz_challenge;
#[cfg(feature = "registry")]
pub use registry::{Credentials, Fetch, FetchRequest, FetchResponse, Registry};
#[cfg(all(feature = "keyless", any(test, feature = "internals")))]
pub(crate) use signature::keyless_signature;
#[cfg(feature = "keyless")]
pub use signature::{CertificateIdentity, TrustRoot};
#[cfg(feature = "signatures")]
pub use signature::{PublicKey, SignaturePolicy};
pub use store::{Collected, ImageStore, PulledImageInfo};
use store::{FileIdentity, NameRecord, Prepared, Store};
use tar::{ArchiveKind, ImageBuilder, Stream};
use tree::InodeTree;

/// How disks are written: what hashes and seals begin with, so that disks that another release wrote otherwise are other disks.
const DISK_VERSION: [u8; 16] = *b"cofferdam disk 2";

/// How long a file system has to say what a path is.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// A root file system to start containers from. It is an image in layers, a tar archive or a directory. Cloning is cheap.
///
/// The first container of an image waits until its content was written into the user's cache as an EROFS file system. That needs
/// no privileges and mounts nothing. It is kept under the digest of the content. All containers share it read-only, also those
/// of other processes. It is made once, however many callers ask at the same time.
///
/// An image in layers that was prepared, and its clones, keep its layers open, one descriptor each. Containers share them.
///
/// # What is read
///
/// What it is, its content says:
///
/// - an OCI image layout, as a directory or an archive;
/// - what `docker save` writes, in its old and its new form;
/// - a root file system, as a directory or an archive.
///
/// Archives and layers may be compressed with gzip, zstd, xz or bzip2. Those but gzip are features of this crate. What lies in an
/// archive is read in place.
///
/// An archive is in any format that GNU tar, bsdtar or star write. The tree is the one that GNU tar gives
/// when root runs `tar --numeric-owner -p --xattrs --xattrs-include='*' --acls -x`: later entries replace earlier ones, and
/// directories merge. Links are followed inside the image only. What GNU tar refuses is an error that names the entry.
///
/// The layers of an image change what is below them as the OCI image specification has it. Each is unpacked once, however many
/// images have it, and is in the host's page cache once. Its digests and its size are checked before it is believed.
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
    select: Option<String>,
    platform: Platform,
    cache: Option<PathBuf>,
    max_size: Size,
    limits: ImageLimits,
    prepare_timeout: Duration,
    cancel: Option<CancelToken>,
    composed: ComposedDisk,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum ImageKind {
    Archive,
    Directory,
    /// In the store, under this name. The path is its reference.
    Pulled(Arc<NameRecord>),
}

/// An image that can be started.
#[derive(Debug)]
pub(super) struct PreparedImage {
    pub(super) disk: ImageDisk,
    pub(super) config: ImageConfig,
    /// The same for the same content. In hexadecimal digits.
    pub(super) digest: String,
}

/// The disk of an image that was prepared.
#[derive(Debug)]
pub(super) enum ImageDisk {
    /// One file.
    File(File),
    /// Of metadata and layers.
    Pieces(Vec<DiskPiece<Arc<File>>>),
}

impl ImageDisk {
    /// As one file, where it is one.
    #[cfg(test)]
    fn into_file(self) -> File {
        match self {
            Self::File(file) => file,
            Self::Pieces(pieces) => panic!("a disk of {} pieces", pieces.len()),
        }
    }

    /// For a VM, which only reads it.
    pub(super) fn into_disk(self, serial: &str) -> Disk {
        match self {
            Self::File(file) => Disk::from_file(file).read_only(true).serial(serial).into(),
            Self::Pieces(pieces) => Disk::of_pieces(pieces, serial),
        }
    }
}

/// What the path of an image has.
enum Content {
    /// A root file system in an archive.
    Archive(File),
    /// The same in a directory.
    Directory(Beneath),
    Layers(Box<dyn LocalImages>),
}

impl Image {
    /// Opens an archive or a directory as an image. What it is, is seen when it is prepared.
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
            () if metadata.is_file() => ImageKind::Archive,
            () => {
                return Err(Error::new(ErrorKind::InvalidConfig, "neither a file nor a directory").doing(doing()));
            }
        };
        Ok(Self::of(std::path::absolute(path).doing(doing)?, kind))
    }

    fn of(path: PathBuf, kind: ImageKind) -> Self {
        Self {
            path,
            kind,
            select: None,
            platform: Platform::host(),
            cache: None,
            max_size: Size::gib(16),
            limits: ImageLimits::default(),
            prepare_timeout: Duration::from_secs(600),
            cancel: None,
            composed: ComposedDisk::default(),
        }
    }

    /// One that is in the store.
    fn pulled(record: NameRecord) -> Self {
        let platform = record.platform.parse();
        let image = Self::of(PathBuf::from(&record.reference), ImageKind::Pulled(Arc::new(record)));
        match platform {
            Ok(platform) => image.platform(platform),
            Err(_) => image,
        }
    }

    /// Chooses one of several images by its name or its digest.
    ///
    /// A name without a registry or a tag is completed as Docker does. Where there are several images and none is chosen,
    /// preparation fails and lists them. A root file system has no name, and this changes nothing then.
    pub fn select(mut self, name_or_digest: impl Into<String>) -> Self {
        self.select = Some(name_or_digest.into());
        self
    }

    /// Chooses an image for another platform than the host's, where an image has several.
    ///
    /// Where its variant is missing, an image for a lower one is taken.
    pub fn platform(mut self, platform: Platform) -> Self {
        self.platform = platform;
        self
    }

    /// Returns how the image wants to be run. Its layers are not read.
    ///
    /// A root file system says nothing: all is empty. Blocks as long as [`Image::prepare`] at most.
    ///
    /// # Errors
    /// - `NotFound` without the chosen image or platform, and `InvalidConfig` where one is to be chosen; both list what is there.
    /// - `Corrupt` for what is damaged, and `Unsupported` for types that are not known.
    /// - As [`Image::prepare`] for what the host does.
    pub fn config(&self) -> Result<ImageConfig> {
        let image = self.clone();
        let deadline = PrepareDeadline::new(self.prepare_timeout, self.cancel.iter());
        let read = move |deadline: &PrepareDeadline| match image.content(deadline)? {
            Content::Layers(images) => Ok(images.find(image.select.as_deref(), &image.platform, deadline)?.image),
            Content::Archive(_) | Content::Directory(_) => Ok(ImageConfig::default()),
        };
        worker::run(&deadline, worker::GRACE, read).doing(|| format!("reading image {}", self.path.display()))
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
    /// - `InvalidConfig` beyond a limit, naming its method, for an empty directory, and where one of several images is to be chosen.
    /// - `NotFound` without the chosen image or platform.
    /// - `InvalidState` for a source that is written to meanwhile.
    /// - `PermissionDenied` for a cache directory that others can write to.
    /// - `TimedOut`; `Cancelled`.
    /// - `ResourceExhausted` without space, and where 16 threads were left behind.
    ///
    /// No half-made disk is left behind.
    pub fn prepare(&self) -> Result<()> {
        self.prepared(None).map(drop)
    }

    /// The disk, open for reading, and the configuration. Its own token ends what is done for it, and so does `cancel`.
    pub(super) fn prepared(&self, cancel: Option<&CancelToken>) -> Result<PreparedImage> {
        let image = self.clone();
        let deadline = PrepareDeadline::new(self.prepare_timeout, self.cancel.iter().chain(cancel));
        worker::run(&deadline, worker::GRACE, move |deadline| image.made(deadline))
            .doing(|| format!("preparing image {}", self.path.display()))
    }

    #[cfg(test)]
    fn disk(&self, cancel: Option<&CancelToken>) -> Result<ImageDisk> {
        self.prepared(cancel).map(|prepared| prepared.disk)
    }

    fn made(&self, deadline: &PrepareDeadline) -> Result<PreparedImage> {
        let key = LayersKey::of(self);
        if let Some(composed) = key.as_ref().and_then(|key| self.composed.get(key)) {
            if let ImageKind::Pulled(record) = &self.kind {
                Store::open(self.cache.clone())?.touch(&record.reference);
            }
            return Ok(composed);
        }
        let store = Store::open(self.cache.clone())?;
        let (file, digest) = match self.content(deadline)? {
            Content::Archive(file) => self.made_of_archive(file, &store, deadline)?,
            Content::Directory(root) => self.made_of_directory(&root, &store, deadline)?,
            Content::Layers(images) => {
                let composed = self.made_of_layers(&*images, &store, deadline)?;
                if let Some(key) = key {
                    self.composed.set(key, composed.clone());
                }
                return Ok(composed.into());
            }
        };
        Ok(PreparedImage { disk: ImageDisk::File(file), config: ImageConfig::default(), digest })
    }

    /// Looks at what is there.
    fn content(&self, deadline: &PrepareDeadline) -> Result<Content> {
        let budget = self.budget(deadline);
        if let ImageKind::Pulled(record) = &self.kind {
            let store = Store::open(self.cache.clone())?;
            store.touch(&record.reference);
            return Ok(Content::Layers(Box::new(PulledImage::new(store, NameRecord::clone(record)))));
        }
        if self.kind == ImageKind::Directory {
            let files = ImageFiles::Directory(Beneath::open(&self.path)?);
            return match recognize::may_be_layers(&self.path).then(|| local::images(files, &budget)).transpose()? {
                Some(Some(images)) => Ok(Content::Layers(images)),
                _ => Ok(Content::Directory(Beneath::open(&self.path)?)),
            };
        }
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&self.path)?;
        if !file.metadata()?.is_file() {
            return Err(Error::new(ErrorKind::InvalidState, "it is no file any more"));
        }
        let files = ImageFiles::of_archive(file.try_clone()?, &budget)?;
        let images = files.map(|files| local::images(files, &budget)).transpose()?.flatten();
        Ok(images.map_or(Content::Archive(file), Content::Layers))
    }

    fn made_of_layers(
        &self,
        images: &dyn LocalImages,
        store: &Store,
        deadline: &PrepareDeadline,
    ) -> Result<ComposedImage> {
        let found = images.find(self.select.as_deref(), &self.platform, deadline)?;
        let allowed = Allowed { limits: self.limits.clone(), max_size: self.max_size };
        let compose = || layers::compose(store, &found.diff_ids(), &allowed, deadline);
        let pieces = match compose() {
            // A layer is not there yet, or is damaged.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                layers::prepare_layers(store, images, &found, &allowed, deadline, &|_| {})?;
                compose()?
            }
            outcome => outcome?,
        };
        let mut hash = begin();
        found.diff_ids().iter().for_each(|diff_id| hash.update(format!("{diff_id}\n")));
        Ok(ComposedImage { pieces, config: found.image, digest: hex(&hash.finalize()) })
    }

    fn budget(&self, deadline: &PrepareDeadline) -> Budget {
        Budget::new(&self.limits, self.max_size, deadline)
    }

    /// What is written was read by the same descriptor, and is kept under the digest of just that.
    fn made_of_archive(&self, mut file: File, store: &Store, deadline: &PrepareDeadline) -> Result<(File, String)> {
        let identity = FileIdentity::of(&file)?.name();
        let changed = || Error::new(ErrorKind::InvalidState, "the archive was written to while it was read");
        let digest = match store.remembered(&identity) {
            Some(digest) => digest,
            None => {
                let mut hash = begin();
                file.seek(SeekFrom::Start(0))?;
                read_into(&mut file, &mut hash, deadline)?;
                let digest = hex(&hash.finalize());
                if FileIdentity::of(&file)?.name() != identity {
                    return Err(changed());
                }
                store.remember(&identity, &digest);
                digest
            }
        };
        let disk = store.get_or_make(Prepared::Disk(&digest), deadline, |disk| {
            file.seek(SeekFrom::Start(0))?;
            let read = write_archive(&mut file, disk, &self.budget(deadline))?;
            if hex(&read.finalize()) == digest {
                return Ok(());
            }
            store.forget(&identity);
            Err(changed())
        })?;
        Ok((disk, digest))
    }

    fn made_of_directory(&self, root: &Beneath, store: &Store, deadline: &PrepareDeadline) -> Result<(File, String)> {
        let mut hash = begin();
        directory::fingerprint(root, &self.budget(deadline), &mut hash)?;
        let digest = hex(&hash.finalize());
        let disk = store.get_or_make(Prepared::Disk(&digest), deadline, |disk| {
            let budget = self.budget(deadline);
            let (mut tree, mut hash) = (InodeTree::new(), begin());
            let mut to = erofs::Disk::new(disk, &budget)?;
            directory::read(root, &mut ImageBuilder { tree: &mut tree, disk: &mut to, budget: &budget }, &mut hash)?;
            recognize::no_other_image(&tree)?;
            erofs::finish(&tree, to)?;
            if hex(&hash.finalize()) == digest {
                return Ok(());
            }
            Err(Error::new(ErrorKind::InvalidState, "the directory was written to while it was read"))
        })?;
        Ok((disk, digest))
    }
}

/// Writes the disk of an archive, and returns the hash of all that was read of it.
fn write_archive(source: &mut (dyn Read + Send), disk: &File, budget: &Budget) -> Result<Sha256> {
    let mut source = Hashed { source, hash: begin(), deadline: budget.deadline() };
    let mut tree = InodeTree::new();
    let mut to = erofs::Disk::new(disk, budget)?;
    {
        let mut unpacked = decompressed(&mut source, Some(budget.limits.ratio))?;
        let mut stream = Stream::new(&mut *unpacked, budget);
        tar::read(&mut stream, &mut ImageBuilder { tree: &mut tree, disk: &mut to, budget }, ArchiveKind::RootFs)?;
        stream.finish()?;
    }
    // A decoder may leave some unread. The hash is of all.
    io::copy(&mut source, &mut io::sink()).map_err(|e| e.downcast::<Error>().unwrap_or_else(Error::from))?;
    recognize::no_other_image(&tree)?;
    erofs::finish(&tree, to)?;
    Ok(source.hash)
}

/// Hashes what is read, as long as there is time.
struct Hashed<'a> {
    source: &'a mut (dyn Read + Send),
    hash: Sha256,
    deadline: &'a PrepareDeadline,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.deadline.check()?;
        let n = self.source.read(buffer)?;
        self.hash.update(buffer.get(..n).unwrap_or_default());
        Ok(n)
    }
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
