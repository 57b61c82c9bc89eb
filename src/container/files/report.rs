//! What was copied: numbers, and the digests that the caller asked for.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use super::super::image::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::proto::COPY_DEPTH_MAX;
use crate::size::Size;

/// What the paths of all digests of a copy may take.
const MAX_DIGEST_PATHS: usize = 64 << 20;

/// What a copy of files has copied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CopyReport {
    /// Regular files.
    pub files: u64,
    /// Directories, with those that were there already.
    pub directories: u64,
    /// Symbolic links.
    pub links: u64,
    /// What was left out.
    ///
    /// These are devices, pipes and sockets, and links that lead out of a copy to the host.
    pub skipped: u64,
    /// The bytes of all files. Holes in them count.
    pub size: Size,
    /// The digest of each regular file, where the caller has asked for them.
    ///
    /// A guest that lies may name a file twice. Then the last digest is that of what is there.
    pub digests: Vec<FileDigest>,
}

/// The digest of a file that was copied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileDigest {
    /// Its path from the directory that was copied; empty for a single file.
    pub path: PathBuf,
    /// How long it is.
    pub size: Size,
    /// The SHA-256 digest of its content, as the host has read or written it.
    pub digest: Digest,
}

/// Counts what is copied, against its limits.
#[derive(Debug)]
pub(super) struct Tally {
    report: CopyReport,
    bytes: u64,
    max_entries: u64,
    max_bytes: u64,
    has_digests: bool,
    /// The paths of all digests.
    path_bytes: usize,
    /// The file that is copied now.
    hasher: Sha256,
    length: u64,
}

impl Tally {
    pub(super) fn new(max_entries: u64, max_size: Size, has_digests: bool) -> Self {
        let (report, max_bytes) = (CopyReport::default(), max_size.as_bytes());
        Self { report, bytes: 0, max_entries, max_bytes, has_digests, path_bytes: 0, hasher: Sha256::new(), length: 0 }
    }

    /// Counts one entry more, before it is copied.
    fn entry(&self) -> Result<()> {
        let CopyReport { files, directories, links, skipped, .. } = self.report;
        if files + directories + links + skipped < self.max_entries {
            return Ok(());
        }
        let why = format!("it has more than {} entries: max_entries allows more", self.max_entries);
        Err(Error::new(ErrorKind::ResourceExhausted, why))
    }

    pub(super) fn directory(&mut self, depth: usize) -> Result<()> {
        self.entry()?;
        if depth >= COPY_DEPTH_MAX {
            let why = format!("it is more than {COPY_DEPTH_MAX} directories deep");
            return Err(Error::new(ErrorKind::ResourceExhausted, why));
        }
        self.report.directories += 1;
        Ok(())
    }

    pub(super) fn link(&mut self) -> Result<()> {
        self.entry()?;
        self.report.links += 1;
        Ok(())
    }

    pub(super) fn skip(&mut self) -> Result<()> {
        self.entry()?;
        self.report.skipped += 1;
        Ok(())
    }

    pub(super) fn file(&mut self) -> Result<()> {
        self.entry()?;
        self.report.files += 1;
        (self.hasher, self.length) = (Sha256::new(), 0);
        Ok(())
    }

    /// Takes bytes of the file.
    pub(super) fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.grow(bytes.len() as u64)?;
        if self.has_digests {
            self.hasher.update(bytes);
        }
        Ok(())
    }

    /// Takes so many zeros of the file. Hashing them may take long, so it asks `check_time` again and again.
    ///
    /// # Errors
    /// `ResourceExhausted` beyond the limit; that of `check_time`.
    pub(super) fn hole(&mut self, length: u64, check_time: impl Fn() -> Result<()>) -> Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        self.grow(length)?;
        let mut left = if self.has_digests { length } else { 0 };
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
            self.hasher.update(ZEROS.get(..n).unwrap_or_default());
            left -= n as u64;
            check_time()?;
        }
        Ok(())
    }

    fn grow(&mut self, by: u64) -> Result<()> {
        match self.bytes.checked_add(by).filter(|bytes| *bytes <= self.max_bytes) {
            Some(bytes) => {
                self.bytes = bytes;
                self.length += by;
                Ok(())
            }
            None => {
                let why = format!("its files have more than {}: max_size allows more", Size::bytes(self.max_bytes));
                Err(Error::new(ErrorKind::ResourceExhausted, why))
            }
        }
    }

    /// The file is complete.
    ///
    /// # Errors
    /// `ResourceExhausted` when the paths of all digests are too long together.
    pub(super) fn file_end(&mut self, path: &[u8]) -> Result<()> {
        if self.has_digests {
            self.path_bytes = self.path_bytes.saturating_add(path.len());
            if self.path_bytes > MAX_DIGEST_PATHS {
                let most = Size::bytes(MAX_DIGEST_PATHS as u64);
                let why = format!("the paths of its files have more than {most}: copy parts of it, or without digests");
                return Err(Error::new(ErrorKind::ResourceExhausted, why));
            }
            let digest = Digest::of(std::mem::take(&mut self.hasher));
            let (path, size) = (PathBuf::from(OsStr::from_bytes(path)), Size::bytes(self.length));
            self.report.digests.push(FileDigest { path, size, digest });
        }
        Ok(())
    }

    pub(super) fn finish(self) -> CopyReport {
        CopyReport { size: Size::bytes(self.bytes), ..self.report }
    }
}

/// Appends a name to a path.
pub(super) fn push(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}
