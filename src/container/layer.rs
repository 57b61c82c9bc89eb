//! [`WritableLayer`]: what a container's writable layer shall be.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::ext4;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys;
use crate::vm::Disk;
use crate::vm::disk::{DiskLimit, ErrorAction, ErrorClass, OpenFileDisk};

/// The layer into which a container writes, over its image; a config value.
///
/// It is gone with the container. A plain [`Size`] is `WritableLayer::new` of it.
///
/// When the host has no space left, the guest's writes fail with an I/O error ([`ErrorAction::Report`]), and time-outs go
/// on. A disk of a VM waits for space instead.
#[derive(Debug, Clone)]
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
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => default_dir([std::env::temp_dir(), "/var/tmp".into()], is_memory)?,
        };
        let make = || -> std::io::Result<File> {
            let file = sys::temp_file(&dir)?;
            ext4::write_empty(&file, size)?;
            Ok(file)
        };
        let file = make().doing(|| format!("disk: making a disk of {size} in {}", dir.display()))?;
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

/// One that cannot be asked is no memory: making the file there tells what is wrong with it.
fn is_memory(dir: &Path) -> bool {
    sys::is_memory(dir).unwrap_or(false)
}

/// The first of the directories that is no memory.
fn default_dir(dirs: [PathBuf; 2], is_memory: impl Fn(&Path) -> bool) -> Result<PathBuf> {
    let [first, second] = dirs;
    let why = format!(
        "{} and {} are memory of the host, which the layer would take: name a directory on a disk with `WritableLayer::scratch_dir`",
        first.display(),
        second.display()
    );
    [first, second]
        .into_iter()
        .find(|dir| !is_memory(dir))
        .ok_or_else(|| Error::new(ErrorKind::InvalidConfig, format!("disk: {why}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_only_when_it_is_named() {
        let dirs = || [PathBuf::from("/a"), PathBuf::from("/b")];
        let chosen = |memory: &'static [&'static str]| {
            default_dir(dirs(), move |dir| memory.iter().any(|it| Path::new(it) == dir))
        };
        assert_eq!(chosen(&[]).unwrap(), Path::new("/a"));
        assert_eq!(chosen(&["/a"]).unwrap(), Path::new("/b"));
        let error = chosen(&["/a", "/b"]).unwrap_err();
        assert!(
            error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("WritableLayer::scratch_dir"),
            "{error}"
        );
        assert!(sys::is_memory(Path::new("/dev/shm")).unwrap() && !sys::is_memory(Path::new("/proc")).unwrap());
        WritableLayer::new(Size::mib(1)).scratch_dir("/dev/shm").make().unwrap();
    }

    #[test]
    fn a_directory_that_is_missing_is_named() {
        let error = WritableLayer::new(Size::mib(1)).scratch_dir("/nowhere").make().unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("/nowhere"), "{error}");
    }
}
