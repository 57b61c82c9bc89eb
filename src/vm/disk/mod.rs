//! [`Disk`]: the configuration of a disk. [`DiskHandle`]: a disk of a running VM.

mod handle;
mod kinds;
mod scratch;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use handle::{DiskHandle, DiskUsage};
#[cfg(feature = "qcow2")]
pub use kinds::Qcow2Disk;
pub use kinds::{FileDisk, MemoryDisk, OpenFileDisk, OverlayDisk, ScratchDisk};
pub(crate) use scratch::scratch_dir;

use super::overlay::BaseImage;
pub(crate) use super::spec::DiskPiece;
#[cfg(feature = "qcow2")]
use super::spec::Qcow2Source;
use super::spec::{DiskSettings, DiskSource, FileSource, HostPath, OverlaySource, ScratchSource};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys;
use crate::virtio::DeviceId;
use crate::virtio::blk::{self, Blk, BlockBackend, ConcatFile, DirectFile, FilePiece, Options, OverlayFile, RawFile};
pub use crate::virtio::blk::{CacheMode, DiskError, DiskLimit, DiskOperation, ErrorAction, ErrorClass, IoEngine};

/// Bytes of a serial number (Virtio 1.3, 5.2.6).
const MAX_SERIAL: usize = 20;
/// Queues of one disk; each takes descriptors of the host's.
const MAX_QUEUES: u32 = 64;

/// Describes one disk of a VM; a config value.
///
/// Each of its functions returns a kind of disk with the settings that it has. All of them become a `Disk` where a
/// builder takes one, as [`VmBuilder::disk`](crate::VmBuilder::disk) does.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Disk {
    pub(in crate::vm) settings: DiskSettings,
    pub(in crate::vm) source: DiskSource<Arc<File>>,
}

impl Disk {
    /// Returns a disk of a file that has no name and that is gone with the VM.
    #[cfg(feature = "container")]
    pub(crate) fn private(file: File) -> OpenFileDisk {
        OpenFileDisk { settings: DiskSettings::sharing(), source: Arc::new(file) }
    }

    /// Returns a disk of pieces of files, one behind the other, that can only be read.
    #[cfg(feature = "container")]
    pub(crate) fn of_pieces(pieces: Vec<DiskPiece<Arc<File>>>, serial: &str) -> Self {
        let settings = DiskSettings { read_only: true, serial: Some(serial.into()), ..DiskSettings::new() };
        Self { settings, source: DiskSource::Pieces(pieces) }
    }

    /// Uses a raw image file or a block device of the host, in place.
    ///
    /// While a VM runs the file is locked: many may read an image at once, and a writer has it alone. A flush of the
    /// guest is answered when the data is on stable storage.
    pub fn file(path: impl Into<PathBuf>) -> FileDisk {
        FileDisk {
            settings: DiskSettings::new(),
            source: FileSource { path: HostPath::new(path), locked: true, direct: false },
        }
    }

    /// Uses a raw image that is open already.
    ///
    /// It must be open for writing too, unless [`OpenFileDisk::read_only`] follows. It is not locked: the caller knows who else uses it.
    pub fn from_file(file: File) -> OpenFileDisk {
        OpenFileDisk { settings: DiskSettings::new(), source: Arc::new(file) }
    }

    /// Makes an empty disk of `size` that is gone with the VM.
    ///
    /// It lies in the directory of [`ScratchDisk::scratch_dir`], and takes space there as the guest writes.
    pub fn scratch(size: Size) -> ScratchDisk {
        ScratchDisk { settings: DiskSettings::sharing(), source: ScratchSource { size, dir: None } }
    }

    /// Makes an empty disk of `size` in the host's memory.
    ///
    /// It takes memory as the guest writes, and gives it back as the guest discards.
    pub fn memory(size: Size) -> MemoryDisk {
        MemoryDisk { settings: DiskSettings::new(), source: size }
    }

    /// Makes a private, copy-on-write copy of `base`.
    ///
    /// `base` is only read. Any number of VMs may share it, also through the host's page cache. What the guest writes
    /// goes into a sparse file in the directory of [`OverlayDisk::scratch_dir`]. That file is gone with the VM, so
    /// flushes do nothing. With [`OverlayDisk::persist_at`] it is kept, and flushes are durable.
    pub fn overlay(base: impl Into<BaseImage>) -> OverlayDisk {
        let base = base.into();
        let source = OverlaySource { base, persist_at: None, scratch_dir: None, size: None, max_size: None };
        OverlayDisk { settings: DiskSettings::sharing(), source }
    }

    /// Uses an image in QEMU's format qcow2.
    ///
    /// Version 3 can be written, version 2 only read. Backing files must lie in the directory of
    /// [`Qcow2Disk::backing_dir`]; without that the image may have none. What is not supported is refused by name:
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
    pub fn qcow2(path: impl Into<PathBuf>) -> Qcow2Disk {
        Qcow2Disk {
            settings: DiskSettings::new(),
            source: Qcow2Source { path: HostPath::new(path), backing_dir: None },
        }
    }

    /// Opens the disk, which is the `n`th of its VM.
    pub(super) fn attach(&self, n: usize) -> Result<Blk> {
        let options = self.options(n)?;
        Ok(Blk::new(self.open()?, options))
    }

    /// Returns what the `n`th disk of a VM is configured to be. Opens nothing.
    ///
    /// # Errors
    /// `InvalidConfig` names the method whose value cannot be.
    pub(super) fn options(&self, n: usize) -> Result<Options> {
        let serial = self.serial_of(n);
        if serial.is_empty() || serial.len() > MAX_SERIAL || !serial.bytes().all(|b| b.is_ascii_graphic()) {
            let why = format!("{serial:?}: 1 to {MAX_SERIAL} visible ASCII characters are needed");
            return Err(Error::invalid("serial", why));
        }
        let DiskSettings { read_only: _, serial: _, queues, engine, cache, policy, limit, min_free_space, reserve } =
            &self.settings;
        let queues = u16::try_from(*queues).ok().filter(|_| (1..=MAX_QUEUES).contains(queues));
        let queues =
            queues.ok_or_else(|| Error::invalid("queues", format!("{}: 1 to {MAX_QUEUES}", self.settings.queues)))?;
        limit.check().map_err(|e| e.doing("limit"))?;
        if let DiskSource::Overlay(overlay) = &self.source {
            overlay.check()?;
        }
        Ok(Options {
            device: DeviceId::Disk(n),
            serial,
            queues,
            engine: *engine,
            cache: *cache,
            policy: *policy,
            limit: *limit,
            min_free_space: min_free_space.map(Size::as_bytes),
            reserve: *reserve,
        })
    }

    /// Returns its serial number as the `n`th disk.
    pub(super) fn serial_of(&self, n: usize) -> String {
        self.settings.serial.clone().unwrap_or_else(|| DeviceId::Disk(n).to_string())
    }

    fn open(&self) -> Result<Box<dyn BlockBackend>> {
        let backend = self.backend()?;
        if let Some(wanted) = self.settings.min_free_space {
            let doing = || "min_free_space: asking for the space that is left";
            if let Some(space) = backend.space().doing(doing)?.filter(|space| space.free < wanted.as_bytes()) {
                let free = Size::bytes(space.free);
                return Err(Error::new(
                    ErrorKind::ResourceExhausted,
                    format!("min_free_space: {free} are left where the disk is, {wanted} are asked for"),
                ));
            }
        }
        Ok(backend)
    }

    fn backend(&self) -> Result<Box<dyn BlockBackend>> {
        let read_only = self.settings.read_only;
        let raw = |file| -> Result<Box<dyn BlockBackend>> { Ok(Box::new(RawFile::from_file(file, read_only)?)) };
        match &self.source {
            DiskSource::Path(FileSource { path, locked, direct: true }) => {
                Ok(Box::new(DirectFile::open(path, read_only, *locked)?))
            }
            DiskSource::Path(FileSource { path, locked, direct: false }) => {
                Ok(Box::new(RawFile::open(path, read_only, *locked)?))
            }
            DiskSource::File(file) => raw(file.try_clone()?),
            DiskSource::Scratch(ScratchSource { size, dir }) => {
                let dir = scratch_dir(dir.as_deref())?;
                let doing = || format!("making a scratch disk of {size} in {}", dir.display());
                raw(sys::scratch_file(&dir, *size).doing(doing)?)
            }
            DiskSource::Memory(size) => {
                raw(sys::memory_file(*size).doing(|| format!("making a disk of {size} in memory"))?)
            }
            DiskSource::Overlay(it) => Ok(Box::new(it.open(read_only)?)),
            #[cfg(feature = "qcow2")]
            DiskSource::Qcow2(it) => Ok(Box::new(blk::Qcow2::open(&it.path, it.backing_dir.as_deref(), read_only)?)),
            DiskSource::Pieces(pieces) => {
                let piece = |DiskPiece { file, offset, len }: &_| FilePiece {
                    file: Arc::clone(file),
                    offset: *offset,
                    len: *len,
                };
                let pieces: Vec<FilePiece> = pieces.iter().map(piece).collect();
                Ok(Box::new(ConcatFile::new(&pieces)?))
            }
        }
    }
}

impl OverlaySource {
    /// # Errors
    /// `InvalidConfig` for one that is kept in two places.
    fn check(&self) -> Result<()> {
        match (&self.persist_at, &self.scratch_dir) {
            (Some(path), Some(_)) => {
                let problem = format!("the overlay is kept at {}, see persist_at", path.display());
                Err(Error::invalid("scratch_dir", problem))
            }
            _ => Ok(()),
        }
    }

    fn open(&self, read_only: bool) -> Result<OverlayFile> {
        self.check()?;
        let disk = match (&self.persist_at, &self.scratch_dir) {
            (Some(path), _) => self.open_persistent(path, read_only)?,
            // Nothing but a header is written for a guest that only reads.
            (None, None) if read_only => {
                OverlayFile::private(&std::env::temp_dir(), &self.base.0, self.size, read_only)?
            }
            (None, dir) => {
                let dir = scratch_dir(dir.as_deref())?;
                OverlayFile::private(&dir, &self.base.0, self.size, read_only)?
            }
        };
        Ok(match self.max_size {
            Some(max_size) => disk.limited(max_size),
            None => disk,
        })
    }

    fn open_persistent(&self, path: &Path, read_only: bool) -> Result<OverlayFile> {
        match OverlayFile::open(path, Some(&self.base.0), read_only) {
            Err(e) if e.kind() == ErrorKind::NotFound && path.symlink_metadata().is_err() => {}
            opened => return opened,
        }
        match blk::create(path, &self.base.0, self.size) {
            // Another was faster.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            outcome => outcome?,
        }
        OverlayFile::open(path, Some(&self.base.0), read_only)
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

    fn open(disk: impl Into<Disk>) -> Result<Box<dyn BlockBackend>> {
        disk.into().open()
    }

    #[test]
    fn disks_name_themselves_in_errors() {
        let error = open(Disk::file("/nonexistent/a.img")).unwrap_err();
        assert_eq!(error.to_string(), "opening disk /nonexistent/a.img: No such file or directory (os error 2)");
        let error = open(Disk::scratch(Size::mib(1)).scratch_dir("/nonexistent")).unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("/nonexistent"), "{error}");
        let error = open(Disk::overlay("/a.img").persist_at("/a.overlay").scratch_dir("/tmp")).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().starts_with("scratch_dir: "), "{error}");
        assert_eq!(open(Disk::scratch(Size::bytes(0))).unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert_eq!(open(Disk::scratch(Size::bytes(1000))).unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert_eq!(open(Disk::scratch(Size::gib(100))).unwrap().geometry().len, 100 << 30);
        assert_eq!(open(Disk::memory(Size::gib(100))).unwrap().allocated().unwrap(), 0);
    }

    #[test]
    fn each_kind_that_can_be_read_only_is() {
        let path = std::env::temp_dir().join(format!("cofferdam-read-only-{}", std::process::id()));
        std::fs::write(&path, [7; 8192]).unwrap();
        let file = || File::open(&path).unwrap();
        let disks: [Disk; 3] = [
            Disk::file(&path).read_only(true).into(),
            Disk::from_file(file()).read_only(true).into(),
            Disk::overlay(path.as_path()).read_only(true).into(),
        ];
        for disk in disks {
            assert!(disk.open().unwrap().geometry().read_only, "{disk:?}");
        }
        assert!(!open(Disk::overlay(path.as_path())).unwrap().geometry().read_only);
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_disk_is_refused_without_the_free_space_that_is_asked_for() {
        let full = open(Disk::scratch(Size::mib(1)).min_free_space(Size::gib(1 << 30))).unwrap_err();
        assert_eq!(full.kind(), ErrorKind::ResourceExhausted, "{full}");
        assert!(full.to_string().starts_with("min_free_space: "), "{full}");
        open(Disk::scratch(Size::mib(1)).min_free_space(Size::bytes(1))).unwrap();
    }

    #[test]
    fn invalid_settings_name_their_method() {
        let disk = || Disk::scratch(Size::mib(1));
        for (disk, method) in [
            (disk().serial(""), "serial"),
            (disk().serial("a disk"), "serial"),
            (disk().serial("0123456789abcdefghijk"), "serial"),
            (disk().queues(0), "queues"),
            (disk().queues(65), "queues"),
            (disk().limit(DiskLimit::none().write_bytes(Rate::per_second(0))), "write_bytes"),
        ] {
            let error = Disk::from(disk).attach(0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig);
            assert!(error.to_string().contains(method), "{error}");
        }
        assert!(check_serials(&[disk().serial("disk1").into(), disk().into()]).is_err());
        assert!(check_serials(&[disk().serial("data").into(), disk().into()]).is_ok());
    }
}
