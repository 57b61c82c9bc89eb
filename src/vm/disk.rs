//! [`Disk`]: the configuration of a disk. [`DiskHandle`]: a disk of a running VM.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::overlay::Base;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys;
use crate::virtio::DeviceHandle;
use crate::virtio::blk::{self, Blk, BlockBackend, DirectFile, Options, OverlayDisk, RawFile, Reserve};
pub use crate::virtio::blk::{Cache, DiskEngine, DiskFault, DiskLimit, DiskOperation, ErrorAction, ErrorClass};

/// Bytes of a serial number (Virtio 1.3, 5.2.6).
const SERIAL_MAX: usize = 20;
/// Queues of one disk; each takes descriptors of the host's.
const QUEUES_MAX: u32 = 64;

/// Describes one disk of a VM; a config value.
#[derive(Debug, Clone)]
pub struct Disk {
    source: Source,
    read_only: bool,
    locked: bool,
    direct: bool,
    /// The method that was called though it says nothing about such a disk.
    not_applicable: Option<&'static str>,
    serial: Option<String>,
    queues: u32,
    /// All but name, serial number and queues, which are checked first.
    options: Options,
}

#[derive(Debug, Clone)]
enum Source {
    Path(PathBuf),
    File(Arc<File>),
    Scratch(Size),
    Memory(Size),
    Overlay(OverlayConfig),
    #[cfg(feature = "qcow2")]
    Qcow2 {
        path: PathBuf,
        folder: Option<PathBuf>,
    },
}

/// An overlay, and where it is.
#[derive(Debug, Clone)]
struct OverlayConfig {
    base: Base,
    at: Option<PathBuf>,
    folder: Option<PathBuf>,
    size: Option<Size>,
    max: Option<Size>,
}

impl Disk {
    fn of(source: Source) -> Self {
        Self {
            source,
            read_only: false,
            locked: true,
            direct: false,
            not_applicable: None,
            serial: None,
            queues: 1,
            options: Options::new(""),
        }
    }

    /// One that takes space on the host as its guest writes.
    fn sharing(source: Source) -> Self {
        let mut disk = Self::of(source);
        disk.options.reserve = Reserve::Share;
        disk
    }

    /// A file that nobody else knows and that is gone with the VM.
    #[cfg(feature = "container")]
    pub(crate) fn private(file: File) -> Self {
        Self::sharing(Source::File(Arc::new(file)))
    }

    /// Uses a raw image file or a block device of the host, in place.
    ///
    /// While a VM runs the file is locked: many may read an image at once, and a writer has it alone. A flush of the
    /// guest is answered when the data is on stable storage.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::of(Source::Path(path.into()))
    }

    /// Uses a raw image that is open already, for reading and writing unless [`Disk::read_only`] follows.
    ///
    /// It is not locked: the caller knows who else uses it.
    pub fn open_file(file: File) -> Self {
        Self::of(Source::File(Arc::new(file)))
    }

    /// Makes an empty disk of `size` that is gone with the VM.
    ///
    /// It lies in the directory for temporary files, and takes space there as the guest writes.
    pub fn scratch(size: Size) -> Self {
        Self::sharing(Source::Scratch(size))
    }

    /// Makes an empty disk of `size` in the host's memory.
    ///
    /// It takes memory as the guest writes, and gives it back as the guest discards.
    pub fn memory(size: Size) -> Self {
        Self::of(Source::Memory(size))
    }

    /// Makes a private, copy-on-write copy of `base`.
    ///
    /// `base` is only read. Any number of VMs may share it, also through the host's page cache. What the guest writes
    /// goes into a sparse file in the directory for temporary files, or in [`Disk::folder`]. That file is gone with the
    /// VM, so flushes do nothing. With [`Disk::at`] it is kept, and flushes are durable.
    pub fn overlay(base: impl Into<Base>) -> Self {
        let base = base.into();
        Self::sharing(Source::Overlay(OverlayConfig { base, at: None, folder: None, size: None, max: None }))
    }

    /// Uses an image in QEMU's format qcow2.
    ///
    /// Version 3 can be written, version 2 only read. Backing files must lie in the directory of
    /// [`Disk::backing_folder`]; without that the image may have none. What is not supported is refused by name:
    ///
    /// - encryption, internal snapshots and external data files;
    /// - chains of images whose tables take more than 512 MiB of memory;
    /// - for writing, reference counts of less than a byte with clusters of less than 4 KiB;
    /// - for writing, more than 16,777,216 clusters in use, which are 1 TiB where a cluster has 64 KiB.
    ///
    /// An image may grow beyond that limit while it is written, and is refused when it is opened for writing again.
    /// `qemu-img convert -O qcow2 -o cluster_size=2M` makes one whose limit is 32 TiB.
    ///
    /// An image from a stranger may contradict itself. What its guest writes may then destroy its tables. Its header
    /// stays as it is, with the name of its backing file: the guest's request fails.
    ///
    /// While the image is written it is marked as QEMU does with lazy reference counts. After the VM's process was
    /// killed, or the host lost power, all that was flushed is there. The next open for writing counts the references
    /// again, which takes as long as reading the image's tables. Until then the image cannot be opened to be read only,
    /// or as a backing file. Overlays need no such thing, and are faster.
    #[cfg(feature = "qcow2")]
    pub fn qcow2(path: impl Into<PathBuf>) -> Self {
        Self::of(Source::Qcow2 { path: path.into(), folder: None })
    }

    /// Lets the guest only read the disk.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Takes no lock on a [`Disk::file`].
    ///
    /// The caller then ensures that nobody writes an image which another uses, or that the guests' file systems are
    /// made for it.
    pub fn unlocked(mut self) -> Self {
        self.locked = false;
        self
    }

    /// Reads and writes a [`Disk::file`] past the host's page cache (`O_DIRECT`).
    ///
    /// Requests that are not aligned as the host needs it go through a buffer, which is slow.
    pub fn direct(mut self) -> Self {
        self.direct = true;
        self
    }

    /// Keeps an overlay in this file.
    ///
    /// The file is made when it is not there. Else it must be an overlay of the same base.
    pub fn at(self, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        self.with_overlay("at", |it| it.at = Some(path))
    }

    /// Sets the directory of an overlay that is not kept.
    ///
    /// It is the directory for temporary files by default.
    pub fn folder(self, folder: impl Into<PathBuf>) -> Self {
        let folder = folder.into();
        self.with_overlay("folder", |it| it.folder = Some(folder))
    }

    /// Sets the size of a new overlay; the size of its base by default.
    pub fn size(self, size: Size) -> Self {
        self.with_overlay("size", |it| it.size = Some(size))
    }

    /// Limits the space that an overlay takes on the host.
    ///
    /// Writes beyond fail with "no space left on device".
    pub fn max(self, space: Size) -> Self {
        self.with_overlay("max", |it| it.max = Some(space))
    }

    fn with_overlay(mut self, method: &'static str, set: impl FnOnce(&mut OverlayConfig)) -> Self {
        match &mut self.source {
            Source::Overlay(it) => set(it),
            _ => self.not_applicable = Some(method),
        }
        self
    }

    /// Allows backing files of a [`Disk::qcow2`] in this directory and below.
    ///
    /// None are allowed by default. The image chooses which of them its guest sees, so nothing else should lie there.
    /// Symbolic links in the directory are not followed.
    #[cfg(feature = "qcow2")]
    pub fn backing_folder(mut self, dir: impl Into<PathBuf>) -> Self {
        match &mut self.source {
            Source::Qcow2 { folder, .. } => *folder = Some(dir.into()),
            _ => self.not_applicable = Some("backing_folder"),
        }
        self
    }

    /// Sets the serial number, by which the guest finds the disk whatever its letter.
    ///
    /// The guest sees it in `/sys/block/*/serial` and, in systems with udev, as `/dev/disk/by-id/virtio-SERIAL`. It has
    /// 1 to 20 visible ASCII characters, and differs for each disk of a VM. By default it is `disk0`, `disk1` and so
    /// on, in the order of the disks.
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = Some(serial.into());
        self
    }

    /// Sets how many queues the guest may use at once, 1 to 64.
    ///
    /// It is 1 by default. More queues than the guest has vCPUs are of no use.
    pub fn queues(mut self, n: u32) -> Self {
        self.queues = n;
        self
    }

    /// Sets what moves the disk's bytes; [`DiskEngine::Auto`] by default.
    pub fn engine(mut self, engine: DiskEngine) -> Self {
        self.options.engine = engine;
        self
    }

    /// Sets what a flush of the guest means; [`Cache::Durable`] by default.
    ///
    /// Once a sync of the host has failed, every later flush fails, as do writes of a guest that turned its write cache
    /// off. Linux reports lost data only once, so a later sync that succeeds proves nothing.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.options.cache = cache;
        self
    }

    /// Sets what happens when the host fails to do what the guest asked for.
    ///
    /// By default the guest gets errors of reading and writing, as from a real disk, and waits when there is no space.
    /// That is [`ErrorAction::Report`] for [`ErrorClass::Read`] and [`ErrorClass::Write`], and [`ErrorAction::Pause`]
    /// for [`ErrorClass::NoSpace`].
    ///
    /// Each failure is an [`EventKind::DiskError`](crate::EventKind::DiskError); of a flood of them, ten a second.
    pub fn on_error(mut self, class: ErrorClass, action: ErrorAction) -> Self {
        self.options.policy.set(class, action);
        self
    }

    /// Limits the disk's rates; nothing is limited by default.
    ///
    /// [`DiskHandle::set_limit`] changes them while the VM runs.
    pub fn limit(mut self, limit: DiskLimit) -> Self {
        self.options.limit = limit;
        self
    }

    /// Sets how much space the disk's file system must have left.
    ///
    /// With less the VM does not start. When there is less while it runs, that is an
    /// [`EventKind::DiskSpaceLow`](crate::EventKind::DiskSpaceLow).
    pub fn headroom(mut self, space: Size) -> Self {
        self.options.headroom = Some(space.as_bytes());
        self
    }

    /// Sets how much free space writes leave on the host's file system.
    ///
    /// A write that would take more fails with "no space left on device", as on a full host ([`Disk::on_error`]). A
    /// write to space that the disk has already is done all the same.
    ///
    /// All disks of this process on one file system count together, with their requests in flight. What other programs
    /// take there is seen once a second, and whenever 64 MiB were taken; so much more may be taken meanwhile.
    ///
    /// By default [`Disk::scratch`] and [`Disk::overlay`] leave 5 % of the file system, at most 1 GiB, for the host's
    /// own work. All others leave nothing.
    pub fn reserve(mut self, space: Size) -> Self {
        self.options.reserve = Reserve::Bytes(space.as_bytes());
        self
    }

    /// Opens the disk, which is the `n`th of its VM.
    pub(super) fn attach(&self, n: usize) -> Result<Blk> {
        let name = format!("disk{n}");
        let serial = self.serial_of(n);
        if serial.is_empty() || serial.len() > SERIAL_MAX || !serial.bytes().all(|b| b.is_ascii_graphic()) {
            let why = format!("{serial:?}: 1 to {SERIAL_MAX} visible ASCII characters are needed");
            return Err(Error::invalid("serial", why));
        }
        let queues = u16::try_from(self.queues).ok().filter(|_| (1..=QUEUES_MAX).contains(&self.queues));
        let queues = queues.ok_or_else(|| Error::invalid("queues", format!("{}: 1 to {QUEUES_MAX}", self.queues)))?;
        self.options.limit.check().map_err(|e| e.doing("limit"))?;
        Ok(Blk::new(self.open()?, Options { name, serial, queues, ..self.options.clone() }))
    }

    /// Its serial number as the `n`th disk.
    pub(super) fn serial_of(&self, n: usize) -> String {
        self.serial.clone().unwrap_or_else(|| format!("disk{n}"))
    }

    fn open(&self) -> Result<Box<dyn BlockBackend>> {
        let backend = self.backend()?;
        if let Some(wanted) = self.options.headroom {
            let doing = || "headroom: asking for the space that is left";
            if let Some(space) = backend.space().doing(doing)?.filter(|space| space.free < wanted) {
                let [free, wanted] = [space.free, wanted].map(Size::bytes);
                return Err(Error::new(
                    ErrorKind::ResourceExhausted,
                    format!("headroom: {free} are left where the disk is, {wanted} are asked for"),
                ));
            }
        }
        Ok(backend)
    }

    fn backend(&self) -> Result<Box<dyn BlockBackend>> {
        let file = matches!(self.source, Source::Path(_));
        let wrong = [("direct", self.direct && !file), ("unlocked", !self.locked && !file)];
        let wrong = wrong.iter().find(|(_, wrong)| *wrong).map(|(method, _)| *method);
        if let Some(method) = self.not_applicable.or(wrong) {
            return Err(Error::invalid(method, "says nothing about a disk of this kind"));
        }
        let raw = |file| -> Result<Box<dyn BlockBackend>> { Ok(Box::new(RawFile::from_file(file, self.read_only)?)) };
        match &self.source {
            Source::Path(path) if self.direct => Ok(Box::new(DirectFile::open(path, self.read_only, self.locked)?)),
            Source::Path(path) => Ok(Box::new(RawFile::open(path, self.read_only, self.locked)?)),
            Source::File(file) => raw(file.try_clone()?),
            Source::Scratch(size) => {
                raw(sys::scratch_file(*size).doing(|| format!("making a scratch disk of {size}"))?)
            }
            Source::Memory(size) => {
                raw(sys::memory_file(*size).doing(|| format!("making a disk of {size} in memory"))?)
            }
            Source::Overlay(it) => Ok(Box::new(it.open(self.read_only)?)),
            #[cfg(feature = "qcow2")]
            Source::Qcow2 { path, folder } => Ok(Box::new(blk::Qcow2::open(path, folder.as_deref(), self.read_only)?)),
        }
    }
}

impl OverlayConfig {
    fn open(&self, read_only: bool) -> Result<OverlayDisk> {
        let disk = match &self.at {
            Some(path) => self.open_persistent(path, read_only)?,
            None => {
                let folder = self.folder.clone().unwrap_or_else(std::env::temp_dir);
                OverlayDisk::private(&folder, &self.base.0, self.size)?
            }
        };
        Ok(match self.max {
            Some(max) => disk.limited(max),
            None => disk,
        })
    }

    fn open_persistent(&self, path: &Path, read_only: bool) -> Result<OverlayDisk> {
        match OverlayDisk::open(path, Some(&self.base.0), read_only) {
            Err(e) if e.kind() == ErrorKind::NotFound && path.symlink_metadata().is_err() => {}
            opened => return opened,
        }
        match blk::create(path, &self.base.0, self.size) {
            // Another was faster.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            outcome => outcome?,
        }
        OverlayDisk::open(path, Some(&self.base.0), read_only)
    }
}

/// The size of a disk; see [`DiskHandle::usage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskUsage {
    /// Space that it takes on the host.
    pub allocated: Size,
    /// Size that the guest sees.
    pub capacity: Size,
}

/// A disk of a running VM; see [`Vm::disk`](crate::Vm::disk). Cheap to clone.
///
/// Calls ask the disk's loop, and wait for its answer, at most ten seconds. Where a file of the host's does not answer they
/// fail with `TimedOut`, and what was asked for is done when it does.
#[derive(Debug, Clone)]
pub struct DiskHandle {
    pub(super) name: String,
    pub(super) device: DeviceHandle<Blk>,
}

impl DiskHandle {
    /// Replaces the disk's limit from now on; [`DiskLimit::none`] for none.
    ///
    /// What waits goes on by the new limit.
    ///
    /// # Errors
    /// `InvalidConfig` for a rate of zero, `InvalidState` when the VM has ended.
    pub fn set_limit(&self, limit: DiskLimit) -> Result<()> {
        limit.check().map_err(|e| e.doing("set_limit"))?;
        self.device.with(move |disk, _| disk.set_limit(&limit)).map_err(|e| self.doing(e, "changing the limit"))
    }

    /// Makes the disk larger, and its image.
    ///
    /// The guest is told, and sees the new size at once. The new part reads as zeroes.
    ///
    /// # Errors
    /// - `InvalidConfig` for less than it has, or not whole sectors of 512 bytes.
    /// - `PermissionDenied` for a disk that is read-only.
    /// - `ResourceExhausted` when there is no space.
    /// - `InvalidState` when the VM has ended.
    pub fn grow(&self, size: Size) -> Result<()> {
        let grown = self.device.with(move |disk, io| {
            let (_, now) = disk.usage()?;
            if size.as_bytes() < now || size.as_bytes() % 512 != 0 {
                let now = Size::bytes(now);
                return Err(Error::invalid(
                    "grow",
                    format!("{size}: whole sectors are needed, at least the {now} there are"),
                ));
            }
            disk.grow(io, size.as_bytes()).map_err(Error::from)
        });
        grown.and_then(|outcome| outcome).map_err(|e| self.doing(e, "growing it"))
    }

    /// Returns the space that it takes on the host, and its size for the guest.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended, `Io` when the host cannot tell.
    pub fn usage(&self) -> Result<DiskUsage> {
        let usage = self.device.with(|disk, _| disk.usage().map_err(Error::from));
        let (allocated, capacity) =
            usage.and_then(|outcome| outcome).map_err(|e| self.doing(e, "looking at its size"))?;
        Ok(DiskUsage { allocated: Size::bytes(allocated), capacity: Size::bytes(capacity) })
    }

    fn doing(&self, error: Error, what: &str) -> Error {
        error.doing(format!("{}: {what}", self.name))
    }
}

/// Serial numbers tell disks apart.
pub(super) fn check_serials(disks: &[Disk]) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    let clash = disks.iter().enumerate().map(|(n, disk)| disk.serial_of(n)).find(|serial| !seen.insert(serial.clone()));
    clash.map_or(Ok(()), |serial| {
        Err(Error::new(ErrorKind::InvalidConfig, format!("serial: two disks have the serial number {serial:?}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::Rate;

    #[test]
    fn disks_name_themselves_in_errors() {
        let error = Disk::file("/nonexistent/a.img").open().unwrap_err();
        assert_eq!(error.to_string(), "opening disk /nonexistent/a.img: No such file or directory (os error 2)");
        assert_eq!(Disk::scratch(Size::bytes(0)).open().unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert_eq!(Disk::scratch(Size::bytes(1000)).open().unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert_eq!(Disk::scratch(Size::gib(100)).open().unwrap().shape().len, 100 << 30);
        assert_eq!(Disk::memory(Size::gib(100)).open().unwrap().allocated().unwrap(), 0);
    }

    #[test]
    fn what_a_disk_cannot_be_is_named() {
        let error = |disk: Disk| disk.open().unwrap_err();
        assert!(error(Disk::memory(Size::mib(1)).direct()).to_string().starts_with("direct: "));
        assert!(error(Disk::scratch(Size::mib(1)).unlocked()).to_string().starts_with("unlocked: "));
        assert!(error(Disk::file("/x").at("/y")).to_string().starts_with("at: "));
        let full = error(Disk::scratch(Size::mib(1)).headroom(Size::gib(1 << 30)));
        assert_eq!(full.kind(), ErrorKind::ResourceExhausted, "{full}");
        assert!(full.to_string().starts_with("headroom: "), "{full}");
        Disk::scratch(Size::mib(1)).headroom(Size::bytes(1)).open().unwrap();
    }

    #[test]
    fn what_cannot_be_names_its_method() {
        let disk = || Disk::scratch(Size::mib(1));
        for (disk, method) in [
            (disk().serial(""), "serial"),
            (disk().serial("a disk"), "serial"),
            (disk().serial("0123456789abcdefghijk"), "serial"),
            (disk().queues(0), "queues"),
            (disk().queues(65), "queues"),
            (disk().limit(DiskLimit::none().write_bytes(Rate::per_second(0))), "write_bytes"),
        ] {
            let error = disk.attach(0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().contains(method), "{error}");
        }
        assert!(check_serials(&[disk().serial("disk1"), disk()]).is_err());
        assert!(check_serials(&[disk().serial("data"), disk()]).is_ok());
    }
}
