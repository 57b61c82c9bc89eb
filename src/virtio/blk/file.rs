//! The host side of a disk: a file or block device, locked, read and written in place.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::SECTOR;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::{GuestMemory, Segment};
use crate::sys::{LockKind, try_lock};

/// An open disk image. Its length is fixed when it is opened.
#[derive(Debug)]
pub(crate) struct DiskFile {
    file: File,
    path: Option<PathBuf>,
    len: u64,
    read_only: bool,
}

impl DiskFile {
    /// Opens and locks an image: readers share it, a writer has it alone, whoever they are.
    ///
    /// # Errors
    /// `NotFound`, `PermissionDenied`; `ResourceExhausted` when another VM holds it; `InvalidConfig` when it is empty,
    /// not a file or block device, or not whole sectors.
    pub(crate) fn open(path: &Path, read_only: bool) -> Result<Self> {
        let doing = || format!("opening disk {}", path.display());
        let file = OpenOptions::new().read(true).write(!read_only).open(path).doing(doing)?;
        let mut disk = Self::from_file(file, read_only).map_err(|e| e.doing(doing()))?;
        let kind = if read_only { LockKind::Shared } else { LockKind::Exclusive };
        if !try_lock(&disk.file, kind).doing(doing)? {
            return Err(Error::new(
                ErrorKind::ResourceExhausted,
                "another virtual machine has it open for writing, or would be disturbed by writes; share it read-only or use a copy",
            )
            .doing(doing()));
        }
        disk.path = Some(path.into());
        Ok(disk)
    }

    /// Takes a file that is open already, and that nobody else knows.
    ///
    /// # Errors
    /// `InvalidConfig` when it is empty, not a file or block device, or not whole sectors.
    pub(crate) fn from_file(mut file: File, read_only: bool) -> Result<Self> {
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
        Ok(Self { file, path: None, len, read_only })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    /// Fills all of `segments`, which lie in `memory`.
    pub(crate) fn read(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        transfer(segments, offset, |rest, at| memory.read_at(rest, self.file.as_fd(), at))
    }

    /// Writes all of `segments`, which lie in `memory`.
    pub(crate) fn write(&self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        transfer(segments, offset, |rest, at| memory.write_at(rest, self.file.as_fd(), at))
    }

    /// Returns when everything written is on stable storage.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }
}

impl fmt::Display for DiskFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}", path.display()),
            None => f.write_str("(unnamed)"),
        }
    }
}

/// Goes on after short transfers and interruptions until everything is done.
fn transfer(
    segments: &[Segment],
    offset: u64,
    mut step: impl FnMut(&[Segment], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let (mut rest, mut at) = (segments.to_vec(), offset);
    while !rest.is_empty() {
        match step(&rest, at) {
            Ok(0) => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the image has become shorter"));
            }
            Ok(n) => {
                at += n as u64;
                skip(&mut rest, n);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Drops the first `n` bytes.
fn skip(segments: &mut Vec<Segment>, mut n: usize) {
    let whole = segments
        .iter()
        .take_while(|s| {
            s.len() <= n && {
                n -= s.len();
                true
            }
        })
        .count();
    segments.drain(..whole);
    if let Some(first) = segments.first_mut() {
        *first = first.split_at(n).1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;

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
        let reader = DiskFile::open(&temp.0, true).unwrap();
        let second = DiskFile::open(&temp.0, true).unwrap();
        assert_eq!(DiskFile::open(&temp.0, false).unwrap_err().kind(), ErrorKind::ResourceExhausted);
        drop((reader, second));
        let _writer = DiskFile::open(&temp.0, false).unwrap();
        assert_eq!(DiskFile::open(&temp.0, true).unwrap_err().kind(), ErrorKind::ResourceExhausted);
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        for len in [0, 1, 511, 513] {
            let error = DiskFile::open(&Temp::new(&format!("odd{len}"), len).0, true).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        }
        assert_eq!(DiskFile::open(Path::new("/nonexistent"), true).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(DiskFile::open(Path::new("/tmp"), true).unwrap_err().kind(), ErrorKind::InvalidConfig);
    }

    #[test]
    fn short_and_interrupted_transfers_go_on() {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 0x1000)]).unwrap();
        let segments = [memory.segment(GuestAddress(0), 10).unwrap(), memory.segment(GuestAddress(100), 10).unwrap()];
        let (mut seen, mut turn) = (Vec::new(), 0);
        transfer(&segments, 1000, |rest, at| {
            turn += 1;
            if turn == 2 {
                return Err(io::ErrorKind::Interrupted.into());
            }
            seen.push((at, rest.iter().map(|s| s.len()).sum::<usize>()));
            Ok(7)
        })
        .unwrap();
        assert_eq!(seen, [(1000, 20), (1007, 13), (1014, 6)]);
    }
}
