//! A raw image: a file or block device, locked and used in place.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use super::super::SECTOR;
use super::{BlockBackend, Extent, Geometry, transfer};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::{GuestMemory, Segment};
use crate::sys::{self, CloseOnFork, LockKind, Space, try_lock};

/// An open disk image. Its length is fixed when it is opened.
#[derive(Debug)]
pub(crate) struct RawFile {
    file: CloseOnFork<File>,
    len: u64,
    read_only: bool,
    /// Whether it is a device of the host.
    device: bool,
}

/// Opens an image and, if `locked`, locks it. Readers share it, a writer has it alone, in any process. `flags` are more
/// of `open(2)`.
///
/// # Errors
/// `NotFound`, `PermissionDenied`; `ResourceBusy` names who holds it.
pub(super) fn open(path: &Path, read_only: bool, locked: bool, flags: i32) -> Result<File> {
    let file = OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)?;
    if locked {
        lock_or_name_holder(&file, if read_only { LockKind::Shared } else { LockKind::Exclusive })?;
    }
    Ok(file)
}

/// How long to wait for a lock that may soon be released. A program that this process starts has a copy of every
/// descriptor until it is loaded, also of those closed meanwhile.
const STARTING: Duration = Duration::from_millis(300);

/// # Errors
/// `ResourceBusy` when another open file has it.
pub(super) fn lock_or_name_holder(file: &File, kind: LockKind) -> Result<()> {
    lock_with_remedy(file, kind, "share it read-only, use an overlay or a copy, or see FileDisk::lock")
}

/// The same, where the error ends with this `remedy`.
pub(crate) fn lock_with_remedy(file: &File, kind: LockKind, remedy: &str) -> Result<()> {
    let deadline = Instant::now() + STARTING;
    while !try_lock(file, kind)? {
        if Instant::now() >= deadline {
            return Err(held(file, remedy));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn held(file: &File, remedy: &str) -> Error {
    let holder = sys::lock_holder(file).unwrap_or_else(|| "another process".into());
    Error::new(
        ErrorKind::ResourceBusy,
        format!("{holder} has it open for writing, or would be disturbed by writes; {remedy}"),
    )
}

/// How long an image is, in bytes.
///
/// # Errors
/// `InvalidConfig` when it is empty, not a file or block device, or not whole sectors.
pub(super) fn length(mut file: &File) -> Result<u64> {
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::new(ErrorKind::InvalidConfig, "neither a regular file nor a block device"));
    }
    // The length of a block device is not in its metadata.
    let len = file.seek(SeekFrom::End(0))?;
    if len == 0 || len % SECTOR != 0 {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("{len} bytes are not a disk: a multiple of {SECTOR} is needed, at least one sector"),
        ));
    }
    Ok(len)
}

impl RawFile {
    /// Opens an image and, if `locked`, locks it. Readers share it, a writer has it alone, in any process.
    ///
    /// # Errors
    /// `NotFound`, `PermissionDenied`; `ResourceBusy` when another VM holds it; `InvalidConfig` when it is empty,
    /// not a file or block device, or not whole sectors.
    pub(crate) fn open(path: &Path, read_only: bool, locked: bool) -> Result<Self> {
        let doing = || format!("opening disk {}", path.display());
        let file = open(path, read_only, locked, 0).doing(doing)?;
        Self::from_file(file, read_only).doing(doing)
    }

    /// Takes a file that is open already, and has no other user.
    ///
    /// # Errors
    /// `InvalidConfig` when it is empty, not a file or block device, or not whole sectors.
    pub(crate) fn from_file(file: File, read_only: bool) -> Result<Self> {
        let len = length(&file)?;
        let device = file.metadata()?.file_type().is_block_device();
        Ok(Self { file: CloseOnFork::new(file), len, read_only, device })
    }

    /// What no disk for reading only may be asked for.
    fn writable(&self) -> io::Result<&File> {
        if self.read_only { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { Ok(&self.file) }
    }
}

impl BlockBackend for RawFile {
    fn geometry(&self) -> Geometry {
        Geometry { len: self.len, read_only: self.read_only, discard: if self.read_only { 0 } else { 4096 } }
    }

    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        transfer(segments, offset, |rest, at| memory.read_at(rest, self.file.as_fd(), at))
    }

    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        let file = self.writable()?;
        transfer(segments, offset, |rest, at| memory.write_at(rest, file.as_fd(), at))
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let file = self.writable()?;
        if self.device { sys::discard_device(file, offset, len) } else { sys::punch(file, offset, len) }
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        sys::zero(self.writable()?, offset, len, unmap)
    }

    fn grow(&mut self, len: u64) -> io::Result<()> {
        if len < self.len {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if self.device {
            // Who makes a device larger is not us.
            if length(self.writable()?).map_err(io::Error::from)? < len {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        } else {
            self.writable()?.set_len(len)?;
        }
        self.len = len;
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        if self.device { Ok(self.len) } else { Ok(self.file.metadata()?.blocks() * 512) }
    }

    fn extents(&mut self, write: bool, offset: u64, len: u64, found: &mut Vec<Extent>) -> Option<io::Result<()>> {
        let file = if write { self.writable() } else { Ok(&*self.file) };
        Some(file.map(|file| found.push(Extent::File { fd: file.as_raw_fd(), offset, len })))
    }

    fn write_done(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_fd(&self) -> Option<RawFd> {
        Some(self.file.as_raw_fd())
    }

    fn takes(&mut self, offset: u64, len: u64) -> io::Result<u64> {
        // What is no hole has its place already.
        let hole = sys::next_hole(&self.file, offset)?.is_none_or(|hole| hole >= offset.saturating_add(len));
        Ok(if hole { 0 } else { len })
    }

    fn space(&self) -> io::Result<Option<Space>> {
        // A file that was given all of its space needs no more.
        if self.read_only || self.device || self.allocated()? >= self.len {
            return Ok(None);
        }
        sys::space(&self.file).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    struct Temp(PathBuf);

    impl Temp {
        fn new(name: &str, len: u64) -> Self {
            let path = std::env::temp_dir().join(format!("cofferdam-disk-{name}-{}", std::process::id()));
            File::create(&path).unwrap().set_len(len).unwrap();
            Self(path)
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_writer_has_the_image_alone_and_readers_share_it() {
        let temp = Temp::new("lock", 4096);
        let reader = RawFile::open(&temp.0, true, true).unwrap();
        let second = RawFile::open(&temp.0, true, true).unwrap();
        assert_eq!(RawFile::open(&temp.0, false, true).unwrap_err().kind(), ErrorKind::ResourceBusy);
        drop((reader, second));
        let _writer = RawFile::open(&temp.0, false, true).unwrap();
        let error = RawFile::open(&temp.0, true, true).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceBusy);
        let text = error.to_string();
        assert!(text.contains(&*temp.0.to_string_lossy()) && text.contains(": this process has it open"), "{text}");
        RawFile::open(&temp.0, false, false).unwrap();
    }

    #[test]
    fn free_space_is_reported_for_sparse_images() {
        let temp = Temp::new("space", 1 << 20);
        assert!(RawFile::open(&temp.0, false, true).unwrap().space().unwrap().is_some_and(|space| space.free > 0));
        assert_eq!(RawFile::open(&temp.0, true, true).unwrap().space().unwrap(), None);
    }

    #[test]
    fn non_disk_files_are_rejected() {
        for len in [0, 1, 511, 513] {
            let error = RawFile::open(&Temp::new(&format!("odd{len}"), len).0, true, true).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        }
        assert_eq!(RawFile::open(Path::new("/nonexistent"), true, true).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(RawFile::open(Path::new("/tmp"), true, true).unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}
