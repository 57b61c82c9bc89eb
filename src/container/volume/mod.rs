//! [`Volume`]: a file system beside a container's root. It outlives the container, or many share it.

mod store;

use std::fs::File;
use std::io;

pub use store::{VolumeInfo, VolumeStore};

use super::image::Image;
use super::{CancelToken, ext4};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys::{self, LockKind};
use crate::vm::Disk;
use crate::vm::disk::{DiskLimit, ErrorAction, ErrorClass};
use store::OpenStore;

/// How large a new volume is, unless its size is set.
const DEFAULT_SIZE: Size = Size::gib(10);

/// A file system that is mounted in a container, beside its root; a config value.
///
/// [`ContainerBuilder::volume`](crate::ContainerBuilder::volume) mounts it. It is one of two kinds:
///
/// - [`Volume::named`]: a disk that outlives containers, which one container writes to at a time.
/// - An [`Image`](crate::Image), such as that of a directory: read-only, and for any number of containers at once.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Volume(VolumeSource);

#[derive(Debug, Clone)]
enum VolumeSource {
    Named(NamedVolume),
    Image(Image),
}

/// A volume with a name; see [`Volume::named`].
///
/// It is a file with an ext4 file system, which has a journal. So a container that is killed loses what it had not
/// synchronized, and nothing else. When the host has no space left, the guest's writes fail with an I/O error.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct NamedVolume {
    name: String,
    store: Option<VolumeStore>,
    size: Option<Size>,
    read_only: bool,
    limit: DiskLimit,
    on_error: Vec<(ErrorClass, ErrorAction)>,
}

/// A volume that is open and locked, for one machine.
#[derive(Debug)]
pub(super) struct OpenVolume {
    pub(super) disk: Disk,
    /// The kernel's name of its file system.
    pub(super) fs: &'static str,
    pub(super) read_only: bool,
    /// Its disk is larger than its file system, which shall grow.
    pub(super) grow: bool,
}

impl Volume {
    /// Names a disk that outlives containers.
    ///
    /// A name has 1 to 64 letters, digits, `.`, `-` and `_`, and begins with a letter or a digit. It is looked for in
    /// the user's own store ([`VolumeStore::user`]) unless [`NamedVolume::store`] says another. The first container that
    /// writes to it makes it.
    pub fn named(name: impl Into<String>) -> NamedVolume {
        NamedVolume {
            name: name.into(),
            store: None,
            size: None,
            read_only: false,
            limit: DiskLimit::none(),
            on_error: vec![(ErrorClass::NoSpace, ErrorAction::Report)],
        }
    }

    /// # Errors
    /// `InvalidConfig` for a name or a size that cannot be.
    pub(super) fn check(&self) -> Result<()> {
        match &self.0 {
            VolumeSource::Image(_) => Ok(()),
            VolumeSource::Named(it) => {
                store::check_name(&it.name)?;
                it.size.map_or(Ok(()), |size| ext4::whole_groups(size).map(drop))
            }
        }
    }

    /// Opens it for one machine, and makes it where it is missing. `serial` is that of its disk.
    ///
    /// # Errors
    /// Of a named volume those of [`NamedVolume::open`]; of an image those of its preparation.
    pub(super) fn open(&self, serial: &str, cancel: Option<&CancelToken>) -> Result<OpenVolume> {
        match &self.0 {
            VolumeSource::Named(it) => it.open(serial).doing(|| format!("opening volume {:?}", it.name)),
            VolumeSource::Image(image) => {
                let disk = image.prepared(cancel)?.disk.into_disk(serial);
                Ok(OpenVolume { disk, fs: "erofs", read_only: true, grow: false })
            }
        }
    }
}

impl NamedVolume {
    /// Sets where it lies; in the user's own store by default.
    pub fn store(mut self, store: &VolumeStore) -> Self {
        self.store = Some(store.clone());
        self
    }

    /// Sets its size, rounded up to 128 MiB, at most 512 GiB.
    ///
    /// A new one has 10 GiB by default. It takes space on the host as it is written. One that is smaller grows when the
    /// container starts, with its file system. One that is larger stays as it is.
    pub fn size(mut self, size: Size) -> Self {
        self.size = Some(size);
        self
    }

    /// Sets whether the container may only read it; it may write by default.
    ///
    /// Many containers may read a volume at once, and then none can write to it. It is not made where it is missing.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Limits its rates; see [`FileDisk::limit`](crate::disk::FileDisk::limit).
    pub fn limit(mut self, limit: DiskLimit) -> Self {
        self.limit = limit;
        self
    }

    /// Sets what happens when the host fails a request; see [`FileDisk::on_error`](crate::disk::FileDisk::on_error).
    pub fn on_error(mut self, class: ErrorClass, action: ErrorAction) -> Self {
        self.on_error.push((class, action));
        self
    }

    /// Opens it, and makes it where it is missing.
    ///
    /// # Errors
    /// - `NotFound` for one that is missing and only to be read, and where the user has no store.
    /// - `ResourceBusy`, naming who holds it, for one that is in use.
    /// - `InvalidState` for one that is only to be read and was not unmounted.
    /// - `Corrupt` for a file that is no volume; `PermissionDenied` for one that other users can write to.
    /// - Otherwise what the host fails with.
    fn open(&self, serial: &str) -> Result<OpenVolume> {
        let mut uuid = [0; 16];
        sys::fill_random(&mut uuid)?;
        let (file, found) = self.find(uuid)?;
        self.prepare(file, found, serial)
    }

    /// Opens it as the writable layer of the image with this digest, whose mark it has.
    ///
    /// # Errors
    /// As [`NamedVolume::open`]; `Incompatible` for a volume that is no layer of this image, `InvalidConfig` for one that is
    /// only to be read.
    pub(super) fn open_layer(&self, digest: &str, serial: &str) -> Result<OpenVolume> {
        if self.read_only {
            return Err(Error::invalid("NamedVolume::read_only", "a container writes to its layer"));
        }
        let mut mark = [0; 16];
        mark.iter_mut().zip(digest.bytes()).for_each(|(to, digit)| *to = digit);
        let (file, found) = self.find(mark)?;
        if found.uuid != mark {
            let what = "it is no layer of this image: a layer belongs to the image that it was made with";
            return Err(Error::new(ErrorKind::Incompatible, what));
        }
        self.prepare(file, found, serial)
    }

    fn prepare(&self, file: File, found: ext4::Identity, serial: &str) -> Result<OpenVolume> {
        let read_only = self.read_only;
        if read_only && found.needs_recovery {
            let what = "it was not unmounted, as its container was killed: start one that may write to it first";
            return Err(Error::new(ErrorKind::InvalidState, what));
        }
        let wanted = self.size.map_or(Ok(Size::bytes(0)), ext4::whole_groups)?.as_bytes();
        if !read_only && file.metadata()?.len() < wanted {
            file.set_len(wanted).doing(|| "growing it")?;
        }
        // What a guest has made of its file system is not ours to judge: the kernel that mounts it will.
        let grow = !read_only && found.size < file.metadata()?.len();
        let disk = Disk::private(file).serial(serial).limit(self.limit).read_only(read_only);
        let disk = self.on_error.iter().fold(disk, |disk, (class, action)| disk.on_error(*class, *action));
        Ok(OpenVolume { disk: disk.into(), fs: "ext4", read_only, grow })
    }

    /// Opens its file, locked as long as that is open. One that is missing is made with this `uuid`.
    fn find(&self, uuid: [u8; 16]) -> Result<(File, ext4::Identity)> {
        store::check_name(&self.name)?;
        let store = self.store.clone().map_or_else(VolumeStore::user, Ok)?.open()?;
        let kind = if self.read_only { LockKind::Shared } else { LockKind::Exclusive };
        let file = match store.locked(&self.name, kind) {
            Err(error) if error.kind() == ErrorKind::NotFound && self.read_only => {
                let what = "it is missing: the first container that may write to it makes it";
                return Err(Error::new(ErrorKind::NotFound, what));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.make(&store, uuid)?;
                store.locked(&self.name, kind)?
            }
            outcome => outcome?,
        };
        let found = ext4::identify(&file)?;
        Ok((file, found.ok_or_else(|| Error::new(ErrorKind::Corrupt, "it has no ext4 file system"))?))
    }

    /// Makes it, unless another was faster.
    fn make(&self, store: &OpenStore, uuid: [u8; 16]) -> Result<()> {
        let size = ext4::whole_groups(self.size.unwrap_or(DEFAULT_SIZE))?;
        let write = |file: &File| -> io::Result<()> { ext4::write_lasting(file, size, uuid) };
        match store.publish(&self.name, write).doing(|| format!("making a file system of {size}")) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            outcome => outcome,
        }
    }
}

impl From<NamedVolume> for Volume {
    fn from(volume: NamedVolume) -> Self {
        Self(VolumeSource::Named(volume))
    }
}

impl From<Image> for Volume {
    fn from(image: Image) -> Self {
        Self(VolumeSource::Image(image))
    }
}
