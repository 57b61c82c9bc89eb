//! [`WritableLayer`]: what a container's writable layer shall be.

use std::fs::File;
use std::path::PathBuf;

use super::ext4;
use crate::error::{Context, Result};
use crate::size::Size;
use crate::sys;
use crate::vm::Disk;
use crate::vm::disk::{DiskLimit, ErrorAction, ErrorClass, OpenFileDisk, scratch_dir};

/// The layer into which a container writes, over its image; a config value.
///
/// It is gone with the container. A plain [`Size`] is `WritableLayer::new` of it.
///
/// When the host has no space left, the guest's writes fail with an I/O error ([`ErrorAction::Report`]), and time-outs go
/// on. A disk of a VM waits for space instead.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct WritableLayer {
    size: Size,
    dir: Option<PathBuf>,
    on_error: Vec<(ErrorClass, ErrorAction)>,
    min_free_space: Option<Size>,
    reserve: Option<Size>,
    limit: DiskLimit,
}

impl WritableLayer {
    /// Describes a layer of `size`, rounded up to 128 MiB, at most 512 GiB.
    ///
    /// It takes space on the host as it is written.
    pub fn new(size: Size) -> Self {
        let on_error = vec![(ErrorClass::NoSpace, ErrorAction::Report)];
        Self { size, dir: None, on_error, min_free_space: None, reserve: None, limit: DiskLimit::default() }
    }

    /// Sets the directory of the host in which the layer lies.
    ///
    /// It is a file without a name there.
    ///
    /// By default it is the directory for temporary files (`TMPDIR`, else `/tmp`), or `/var/tmp` where that is memory
    /// (tmpfs, ramfs). Where both are memory, the start fails and asks for a directory. One that is set may be memory.
    pub fn scratch_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Sets what happens when the host fails a request to the layer.
    ///
    /// See [`FileDisk::on_error`](crate::disk::FileDisk::on_error).
    pub fn on_error(mut self, class: ErrorClass, action: ErrorAction) -> Self {
        self.on_error.push((class, action));
        self
    }

    /// Sets how much space its file system must have left at the start; see [`FileDisk::min_free_space`](crate::disk::FileDisk::min_free_space).
    pub fn min_free_space(mut self, space: Size) -> Self {
        self.min_free_space = Some(space);
        self
    }

    /// Sets how much free space writes leave on its file system.
    ///
    /// By default 5 % of it, at most 1 GiB; see [`FileDisk::reserve`](crate::disk::FileDisk::reserve).
    pub fn reserve(mut self, space: Size) -> Self {
        self.reserve = Some(space);
        self
    }

    /// Limits the layer's rates; see [`FileDisk::limit`](crate::disk::FileDisk::limit).
    pub fn limit(mut self, limit: DiskLimit) -> Self {
        self.limit = limit;
        self
    }

    /// Makes the layer, with an empty file system.
    ///
    /// # Errors
    /// `InvalidConfig` for an impossible size, and for a directory that is memory and was not set; `Io` and others, naming the
    /// directory.
    pub(super) fn make(&self) -> Result<Disk> {
        let size = ext4::whole_groups(self.size)?;
        let dir = scratch_dir(self.dir.as_deref()).doing(|| "writable_layer")?;
        let make = || -> std::io::Result<File> {
            let file = sys::temp_file(&dir)?;
            ext4::write_empty(&file, size)?;
            Ok(file)
        };
        let file = make().doing(|| format!("writable_layer: making a disk of {size} in {}", dir.display()))?;
        let disk = Disk::private(file).serial("cofferdam-layer").limit(self.limit);
        let disk = self.on_error.iter().fold(disk, |disk, (class, action)| disk.on_error(*class, *action));
        let disk = self.min_free_space.into_iter().fold(disk, OpenFileDisk::min_free_space);
        Ok(self.reserve.into_iter().fold(disk, OpenFileDisk::reserve).into())
    }
}

impl From<Size> for WritableLayer {
    fn from(size: Size) -> Self {
        Self::new(size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn memory_layer_is_opt_in() {
        assert!(WritableLayer::new(Size::mib(1)).scratch_dir("/dev/shm").make().is_ok());
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let error = WritableLayer::new(Size::mib(1)).scratch_dir("/nowhere").make().unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("/nowhere"), "{error}");
    }
}
