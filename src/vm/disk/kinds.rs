//! The kinds of disks, each with the settings that it has; all become a [`Disk`].

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::Disk;
use crate::size::Size;
use crate::virtio::blk::{CacheMode, DiskLimit, ErrorAction, ErrorClass, IoEngine, Reserve};
#[cfg(feature = "qcow2")]
use crate::vm::spec::Qcow2Source;
use crate::vm::spec::{DiskSettings, DiskSource, FileSource, HostPath, OverlaySource, ScratchSource};

/// The settings of every disk.
macro_rules! common_settings {
    ($kind:ident, $variant:ident) => {
        impl $kind {
            /// Sets the serial number, by which the guest finds the disk whatever its letter.
            ///
            /// The guest sees it in `/sys/block/*/serial` and, in systems with udev, as
            /// `/dev/disk/by-id/virtio-SERIAL`. It has 1 to 20 visible ASCII characters, and differs for each disk of a
            /// VM. By default it is `disk0`, `disk1` and so on, in the order of the disks.
            pub fn serial(mut self, serial: impl Into<String>) -> Self {
                self.settings.serial = Some(serial.into());
                self
            }

            /// Sets how many queues the guest may use at once, 1 to 64.
            ///
            /// It is 1 by default. More queues than the guest has vCPUs are of no use.
            pub fn queues(mut self, n: u32) -> Self {
                self.settings.queues = n;
                self
            }

            /// Sets what happens when the host fails to do what the guest asked for.
            ///
            /// By default the guest gets errors of reading and writing, as from a real disk, and waits when there is no
            /// space. That is [`ErrorAction::Report`] for [`ErrorClass::Read`] and [`ErrorClass::Write`], and
            /// [`ErrorAction::Pause`] for [`ErrorClass::NoSpace`].
            ///
            /// Each failure is an [`EventKind::DiskError`](crate::event::EventKind::DiskError); of a flood of them, ten
            /// a second.
            pub fn on_error(mut self, class: ErrorClass, action: ErrorAction) -> Self {
                self.settings.policy.set(class, action);
                self
            }

            /// Limits the disk's rates; nothing is limited by default.
            ///
            /// [`DiskHandle::set_limit`](super::DiskHandle::set_limit) changes them while the VM runs.
            pub fn limit(mut self, limit: DiskLimit) -> Self {
                self.settings.limit = limit;
                self
            }
        }

        impl From<$kind> for Disk {
            fn from($kind { settings, source }: $kind) -> Self {
                Self { settings, source: DiskSource::$variant(source) }
            }
        }
    };
}

/// The settings of a disk that lies in a file system of the host.
macro_rules! stored_settings {
    ($kind:ident) => {
        impl $kind {
            /// Sets what a flush of the guest means; [`CacheMode::Durable`] by default.
            ///
            /// Once a sync of the host has failed, every later flush fails, as do writes of a guest that turned its
            /// write cache off. Linux reports lost data only once, so a later sync that succeeds proves nothing.
            pub fn cache(mut self, cache: CacheMode) -> Self {
                self.settings.cache = cache;
                self
            }

            /// Sets how much space the disk's file system must have left.
            ///
            /// With less the VM does not start. When there is less while it runs, that is an
            /// [`EventKind::DiskSpaceLow`](crate::event::EventKind::DiskSpaceLow).
            pub fn min_free_space(mut self, space: Size) -> Self {
                self.settings.min_free_space = Some(space);
                self
            }

            /// Sets how much free space writes leave on the host's file system.
            ///
            /// A write that would take more fails with "no space left on device", as on a full host. A write to space
            /// that the disk has already is done all the same.
            ///
            /// All disks of this process on one file system count together, with their requests in flight. What other
            /// programs take there is seen once a second, and whenever 64 MiB were taken; so much more may be taken
            /// meanwhile.
            ///
            /// By default [`Disk::scratch`] and [`Disk::overlay`] leave 5 % of the file system, at most 1 GiB, for the
            /// host's own work. All others leave nothing.
            pub fn reserve(mut self, space: Size) -> Self {
                self.settings.reserve = Reserve::Bytes(space.as_bytes());
                self
            }
        }
    };
}

/// The setting of disks whose requests the host's kernel can take as they are.
macro_rules! engine_setting {
    ($kind:ident) => {
        impl $kind {
            /// Sets what moves the disk's bytes; [`IoEngine::Auto`] by default.
            pub fn engine(mut self, engine: IoEngine) -> Self {
                self.settings.engine = engine;
                self
            }
        }
    };
}

macro_rules! read_only_setting {
    ($kind:ident) => {
        impl $kind {
            /// Sets whether the guest may only read the disk; it may write by default.
            pub fn read_only(mut self, read_only: bool) -> Self {
                self.settings.read_only = read_only;
                self
            }
        }
    };
}

/// A raw image file or a block device of the host; see [`Disk::file`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct FileDisk {
    pub(super) settings: DiskSettings,
    pub(super) source: FileSource,
}

impl FileDisk {
    /// Sets whether the file is locked while a VM uses it; it is by default.
    ///
    /// Without the lock the caller ensures that an image in use has no other writer, or that the guests' file systems
    /// are made for it.
    pub fn lock(mut self, lock: bool) -> Self {
        self.source.locked = lock;
        self
    }

    /// Sets whether reads and writes go past the host's page cache (`O_DIRECT`).
    ///
    /// They do not by default. Requests that are not aligned as the host needs it go through a buffer, which is slow.
    pub fn direct(mut self, direct: bool) -> Self {
        self.source.direct = direct;
        self
    }
}

/// A raw image that the caller has opened; see [`Disk::from_file`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct OpenFileDisk {
    pub(super) settings: DiskSettings,
    pub(super) source: Arc<File>,
}

/// An empty disk that is gone with the VM; see [`Disk::scratch`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct ScratchDisk {
    pub(super) settings: DiskSettings,
    pub(super) source: ScratchSource,
}

impl ScratchDisk {
    /// Sets the directory of the host in which the disk lies.
    ///
    /// By default it is the directory for temporary files (`TMPDIR`, else `/tmp`), or `/var/tmp` where that is memory
    /// (tmpfs, ramfs). Where both are memory, the start fails and asks for a directory. One that is set may be memory.
    pub fn scratch_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.source.dir = Some(HostPath::new(dir));
        self
    }
}

/// An empty disk in the host's memory; see [`Disk::memory`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct MemoryDisk {
    pub(super) settings: DiskSettings,
    pub(super) source: Size,
}

/// A copy-on-write copy of another image; see [`Disk::overlay`].
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct OverlayDisk {
    pub(super) settings: DiskSettings,
    pub(super) source: OverlaySource,
}

impl OverlayDisk {
    /// Keeps the overlay in this file.
    ///
    /// The file is made when it is not there. Else it must be an overlay of the same base.
    pub fn persist_at(mut self, path: impl Into<PathBuf>) -> Self {
        self.source.persist_at = Some(HostPath::new(path));
        self
    }

    /// Sets the directory of an overlay that is not kept; not for one of [`OverlayDisk::persist_at`].
    ///
    /// By default it is the directory for temporary files (`TMPDIR`, else `/tmp`), or `/var/tmp` where that is memory
    /// (tmpfs, ramfs). Where both are memory, the start fails and asks for a directory. One that is set may be memory.
    pub fn scratch_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.source.scratch_dir = Some(HostPath::new(dir));
        self
    }

    /// Sets the size of a new overlay; the size of its base by default.
    pub fn size(mut self, size: Size) -> Self {
        self.source.size = Some(size);
        self
    }

    /// Limits the space that the overlay takes on the host.
    ///
    /// Writes beyond fail with "no space left on device".
    pub fn max_size(mut self, space: Size) -> Self {
        self.source.max_size = Some(space);
        self
    }
}

/// An image in QEMU's format qcow2; see [`Disk::qcow2`].
#[cfg(feature = "qcow2")]
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Qcow2Disk {
    pub(super) settings: DiskSettings,
    pub(super) source: Qcow2Source,
}

#[cfg(feature = "qcow2")]
impl Qcow2Disk {
    /// Allows backing files in this directory and below.
    ///
    /// None are allowed by default. The image chooses which of them its guest sees, so nothing else should lie there.
    /// Symbolic links in the directory are not followed.
    pub fn backing_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.source.backing_dir = Some(HostPath::new(dir));
        self
    }
}

common_settings!(FileDisk, Path);
common_settings!(OpenFileDisk, File);
common_settings!(ScratchDisk, Scratch);
common_settings!(MemoryDisk, Memory);
common_settings!(OverlayDisk, Overlay);
stored_settings!(FileDisk);
stored_settings!(OpenFileDisk);
stored_settings!(ScratchDisk);
stored_settings!(OverlayDisk);
engine_setting!(FileDisk);
engine_setting!(OpenFileDisk);
engine_setting!(ScratchDisk);
engine_setting!(OverlayDisk);
read_only_setting!(FileDisk);
read_only_setting!(OpenFileDisk);
read_only_setting!(OverlayDisk);
#[cfg(feature = "qcow2")]
common_settings!(Qcow2Disk, Qcow2);
#[cfg(feature = "qcow2")]
stored_settings!(Qcow2Disk);
#[cfg(feature = "qcow2")]
read_only_setting!(Qcow2Disk);
