//! [`Disk`]: what a disk of a VM shall be. [`DiskHandle`]: a disk of a VM that runs.

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

/// A config value: one disk of a VM.
#[derive(Debug, Clone)]
pub struct Disk {
    source: Source,
    read_only: bool,
    locked: bool,
    direct: bool,
    /// The method that was called though it says nothing about such a disk.
    misplaced: Option<&'static str>,
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
    Overlay(Lying),
    #[cfg(feature = "qcow2")]
    Qcow2 {
        path: PathBuf,
        folder: Option<PathBuf>,
    },
}

/// An overlay, and where it is.
#[derive(Debug, Clone)]
struct Lying {
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
            misplaced: None,
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

    /// A raw image file, or a block device of the host, to read and write in place.
    ///
    /// While a VM runs it is locked: many may read an image at once, but who writes has it alone. Flushes of the guest
    /// are answered when the data is on stable storage.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::of(Source::Path(path.into()))
    }

    /// A raw image that is open already, for reading and writing unless [`Disk::read_only`] follows. It is not locked:
    /// whoever opened it knows who else uses it.
    pub fn open_file(file: File) -> Self {
        Self::of(Source::File(Arc::new(file)))
    }

    /// An empty disk of `size` that is gone with the VM. Takes space on the host, in the folder for temporary files,
    /// as the guest writes.
    pub fn scratch(size: Size) -> Self {
        Self::sharing(Source::Scratch(size))
    }

    /// The same in memory of the host, which it takes as the guest writes and gives back as the guest discards.
    pub fn memory(size: Size) -> Self {
        Self::of(Source::Memory(size))
    }

    /// A private copy of `base`, which is only read and may be shared by any number of VMs, also through the host's page
    /// cache. What the guest writes goes into a sparse file in the folder for temporary files, or in [`Disk::folder`], and is
    /// gone with the VM, so that flushes have nothing to do; with [`Disk::at`] it is kept, and flushes are durable.
    pub fn overlay(base: impl Into<Base>) -> Self {
        let base = base.into();
        Self::sharing(Source::Overlay(Lying { base, at: None, folder: None, size: None, max: None }))
    }

    /// An image in QEMU's format qcow2 (version 3; version 2 to be read only). It may have backing files in the folder of
    /// [`Disk::backing_folder`], and none unless that is set. Encryption, internal snapshots and data files apart are not supported.
    ///
    /// While it is written it is marked as QEMU does with lazy reference counts. When the VM's process was killed or the host lost
    /// power, all that was flushed is there. Who then opens the image for writing counts its references again, which takes as long
    /// as reading its tables; to be read only, or as a backing file, it is refused until somebody did. Overlays need no such
    /// thing, and are faster.
    #[cfg(feature = "qcow2")]
    pub fn qcow2(path: impl Into<PathBuf>) -> Self {
        Self::of(Source::Qcow2 { path: path.into(), folder: None })
    }

    /// The guest may only read it.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Takes no lock on a [`Disk::file`]: its owner sees to it that nobody writes what another uses, or that the guests'
    /// file systems are made for it.
    pub fn unlocked(mut self) -> Self {
        self.locked = false;
        self
    }

    /// Reads and writes a [`Disk::file`] past the host's page cache (`O_DIRECT`). Requests that are not aligned as the host
    /// needs it go through a buffer, which is slow.
    pub fn direct(mut self) -> Self {
        self.direct = true;
        self
    }

    /// Keeps an overlay in this file. It is made when it is not there, else it must be one of the same base.
    pub fn at(self, path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        self.lying("at", |it| it.at = Some(path))
    }

    /// Where an overlay is that is not kept; the folder for temporary files unless set.
    pub fn folder(self, folder: impl Into<PathBuf>) -> Self {
        let folder = folder.into();
        self.lying("folder", |it| it.folder = Some(folder))
    }

    /// How large a new overlay is; as large as its base unless set.
    pub fn size(self, size: Size) -> Self {
        self.lying("size", |it| it.size = Some(size))
    }

    /// How much space an overlay may take up on the host. Writes beyond fail with "no space left on device".
    pub fn max(self, space: Size) -> Self {
        self.lying("max", |it| it.max = Some(space))
    }

    fn lying(mut self, method: &'static str, set: impl FnOnce(&mut Lying)) -> Self {
        match &mut self.source {
            Source::Overlay(it) => set(it),
            _ => self.misplaced = Some(method),
        }
        self
    }

    /// Allows backing files of a [`Disk::qcow2`] in this folder and below; none unless set. The image itself says which of them its
    /// guest sees, so nothing else should be there. Symbolic links in the folder are not followed.
    #[cfg(feature = "qcow2")]
    pub fn backing_folder(mut self, dir: impl Into<PathBuf>) -> Self {
        match &mut self.source {
            Source::Qcow2 { folder, .. } => *folder = Some(dir.into()),
            _ => self.misplaced = Some("backing_folder"),
        }
        self
    }

    /// Sets the serial number by which the guest can find the disk, whatever its letter: `/sys/block/*/serial`, and in
    /// systems with udev `/dev/disk/by-id/virtio-SERIAL`. At most 20 visible ASCII characters, other for each disk of a VM;
    /// `disk0`, `disk1` and so on, in their order, unless set.
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = Some(serial.into());
        self
    }

    /// How many queues the guest may use at once, 1 to 64; 1 unless set. More than the guest has processors are of no use.
    pub fn queues(mut self, n: u32) -> Self {
        self.queues = n;
        self
    }

    /// Sets what moves the disk's bytes; [`DiskEngine::Auto`] unless set.
    pub fn engine(mut self, engine: DiskEngine) -> Self {
        self.options.engine = engine;
        self
    }

    /// Sets what a flush of the guest means; [`Cache::Durable`] unless set.
    ///
    /// After a sync has failed, all later flushes fail too, as do writes of a guest that turned its write cache off: the host
    /// tells of lost data once and then forgets it, so that a sync that works later proves nothing.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.options.cache = cache;
        self
    }

    /// Sets what happens when the host fails to do what the guest asked for. Unless set, the guest is told of errors of
    /// reading and writing, as by a real disk, and waits when there is no room: [`ErrorAction::Report`] for
    /// [`ErrorClass::Read`] and [`ErrorClass::Write`], [`ErrorAction::Pause`] for [`ErrorClass::NoSpace`].
    ///
    /// Each failure is an [`EventKind::DiskError`](crate::EventKind::DiskError); of a flood of them, ten a second.
    pub fn on_error(mut self, class: ErrorClass, action: ErrorAction) -> Self {
        self.options.policy.set(class, action);
        self
    }

    /// Sets how much the disk may do; [`DiskHandle::set_limit`] changes it while the VM runs. Nothing is limited unless set.
    pub fn limit(mut self, limit: DiskLimit) -> Self {
        self.options.limit = limit;
        self
    }

    /// The VM does not start unless the disk's file system has so much space left, and
    /// [`EventKind::DiskSpaceLow`](crate::EventKind::DiskSpaceLow) tells when there is less while it runs.
    pub fn headroom(mut self, space: Size) -> Self {
        self.options.headroom = Some(space.as_bytes());
        self
    }

    /// Sets how much space writes leave of the host's file system. What would take more fails with "no space left on device",
    /// as on a host that is full ([`Disk::on_error`]); what has its place already is written all the same.
    ///
    /// All disks of this process on one file system are counted together, what they have under way included. What others take there
    /// is seen once a second, and whenever 64 MiB were taken: so much more may go meanwhile.
    ///
    /// Unless set, [`Disk::scratch`] and [`Disk::overlay`] leave 5 % of the file system, at most 1 GiB, so that a guest takes the
    /// host's own work no room. All others leave nothing.
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
        if let Some(method) = self.misplaced.or(wrong) {
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

impl Lying {
    fn open(&self, read_only: bool) -> Result<OverlayDisk> {
        let disk = match &self.at {
            Some(path) => self.kept(path, read_only)?,
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

    fn kept(&self, path: &Path, read_only: bool) -> Result<OverlayDisk> {
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

/// What a disk takes up; see [`DiskHandle::usage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskUsage {
    /// On the host.
    pub allocated: Size,
    /// As the guest sees it.
    pub capacity: Size,
}

/// One disk of a VM that runs; see [`Vm::disk`](crate::Vm::disk). Cheap to clone.
///
/// Calls ask the disk's thread and wait for its answer. On a file that does not answer, one may wait as long as that.
#[derive(Debug, Clone)]
pub struct DiskHandle {
    pub(super) name: String,
    pub(super) device: DeviceHandle<Blk>,
}

impl DiskHandle {
    /// Changes how much the disk may do from now on, [`DiskLimit::none`] for no limit. What waits goes on by the new one.
    ///
    /// # Errors
    /// `InvalidConfig` for a rate of zero, `InvalidState` when the VM has ended.
    pub fn set_limit(&self, limit: DiskLimit) -> Result<()> {
        limit.check().map_err(|e| e.doing("set_limit"))?;
        self.device.with(move |disk, _| disk.set_limit(&limit)).map_err(|e| self.doing(e, "changing the limit"))
    }

    /// Makes the disk larger, and its image; the guest is told, and sees the new size at once. What is new reads as zeroes.
    ///
    /// # Errors
    /// `InvalidConfig` for less than it is, or not whole sectors of 512 bytes; `PermissionDenied` for one that is
    /// read-only; `ResourceExhausted` when there is no room; `InvalidState` when the VM has ended.
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

    /// How much room it takes up on the host, and how large it is for the guest.
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
