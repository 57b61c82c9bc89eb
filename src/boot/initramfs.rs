//! The initramfs: what a guest's kernel unpacks into its first root file system.

use std::borrow::Cow;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cpio::Archive;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::{GuestAddress, GuestMemory};

/// Files for the guest's first root file system; a config value.
///
/// They come from archives, from memory, or both. Archives (cpio "newc", plain or compressed in a way the guest's
/// kernel knows) and entries are unpacked in the order they were added. A later one replaces an earlier one of the same
/// name.
#[derive(Debug, Clone, Default)]
#[must_use = "a config value does nothing by itself"]
pub struct Initramfs {
    parts: Vec<Part>,
}

#[derive(Debug, Clone)]
enum Part {
    Archive { file: Arc<File>, path: PathBuf, len: u64 },
    Entry(Arc<ArchiveEntry>),
}

#[derive(Debug)]
enum ArchiveEntry {
    Directory { path: String, permissions: u32 },
    File { path: String, permissions: u32, contents: Arc<Vec<u8>> },
    Symlink { path: String, target: String },
    CharacterDevice { path: String, permissions: u32, device: (u32, u32) },
}

impl Initramfs {
    /// An empty one. Note that a kernel makes `/dev/console` by itself only when its configuration says so.
    pub fn new() -> Self {
        Self::default()
    }

    /// An archive from a file. It is read when a VM starts, and must not shrink before.
    ///
    /// # Errors
    /// `NotFound` or `PermissionDenied` when it cannot be opened, `InvalidConfig` when it is not a regular file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let doing = || format!("opening initramfs {}", path.display());
        let file = File::open(path).doing(doing)?;
        let metadata = file.metadata().doing(doing)?;
        if !metadata.is_file() {
            return Err(Error::new(ErrorKind::InvalidConfig, "not a regular file").doing(doing()));
        }
        let part = Part::Archive { file: Arc::new(file), path: path.into(), len: metadata.len() };
        Ok(Self { parts: vec![part] })
    }

    /// Adds a directory, such as `/proc`, with permissions such as `0o755`. Parents must be there or be added before.
    pub fn directory(self, path: impl Into<String>, permissions: u32) -> Self {
        self.entry(ArchiveEntry::Directory { path: path.into(), permissions })
    }

    /// Adds a file. `/init` with permissions `0o755` is what the kernel runs.
    pub fn file(self, path: impl Into<String>, permissions: u32, contents: impl Into<Vec<u8>>) -> Self {
        self.shared_file(path, permissions, Arc::new(contents.into()))
    }

    /// Adds a file that others have too.
    pub(crate) fn shared_file(self, path: impl Into<String>, permissions: u32, contents: Arc<Vec<u8>>) -> Self {
        self.entry(ArchiveEntry::File { path: path.into(), permissions, contents })
    }

    /// Adds a symbolic link.
    pub fn symlink(self, path: impl Into<String>, target: impl Into<String>) -> Self {
        self.entry(ArchiveEntry::Symlink { path: path.into(), target: target.into() })
    }

    /// Adds a character device with its major and minor number, such as `(5, 1)` for `/dev/console`.
    pub fn character_device(self, path: impl Into<String>, permissions: u32, device: (u32, u32)) -> Self {
        self.entry(ArchiveEntry::CharacterDevice { path: path.into(), permissions, device })
    }

    fn entry(mut self, entry: ArchiveEntry) -> Self {
        self.parts.push(Part::Entry(Arc::new(entry)));
        self
    }

    /// Everything as the pieces that will lie one after the other in memory, each padded to four bytes.
    fn pieces(&self) -> Result<Vec<Piece<'_>>> {
        let (mut pieces, mut archive) = (Vec::new(), None);
        for part in &self.parts {
            match part {
                Part::Archive { file, path, len } => {
                    pieces.extend(archive.take().map(|a: Archive| Piece::Bytes(a.finish().into())));
                    pieces.push(Piece::File { file, path, len: *len });
                }
                Part::Entry(entry) => {
                    let archive = archive.get_or_insert_default();
                    append(archive, entry)?;
                    // Contents are not copied before they are copied into the guest.
                    if let ArchiveEntry::File { contents, .. } = &**entry {
                        pieces.extend([archive.take().into(), contents.as_slice().into()].map(Piece::Bytes));
                    }
                }
            }
        }
        pieces.extend(archive.map(|a| Piece::Bytes(a.finish().into())));
        Ok(pieces)
    }

    /// Puts everything into guest memory as high as possible below `limit`.
    ///
    /// # Errors
    /// `InvalidConfig` when it does not fit between `floor` and `limit`, `Corrupt` when a file has shrunk.
    pub(super) fn load(&self, memory: &GuestMemory, floor: u64, limit: u64) -> Result<LoadedInitramfs> {
        let pieces = self.pieces()?;
        let len: u64 = pieces.iter().map(|p| p.len().next_multiple_of(4)).sum();
        let start = limit.checked_sub(len).map(|at| at & !0xfff).filter(|at| *at >= floor);
        let Some(start) = start.filter(|at| memory.segment(GuestAddress(*at), len as usize).is_ok()) else {
            return Err(Error::invalid(
                "Kernel::initramfs",
                format!(
                    "{len} bytes do not fit into the guest's memory beside the kernel ({} bytes free)",
                    limit.saturating_sub(floor)
                ),
            ));
        };
        let mut at = start;
        for piece in &pieces {
            piece.load(memory, at)?;
            at += piece.len().next_multiple_of(4);
        }
        Ok(LoadedInitramfs { addr: GuestAddress(start), size: len })
    }
}

/// Where an initramfs is in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LoadedInitramfs {
    pub addr: GuestAddress,
    pub size: u64,
}

enum Piece<'a> {
    Bytes(Cow<'a, [u8]>),
    File { file: &'a File, path: &'a Path, len: u64 },
}

impl Piece<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { len, .. } => *len,
        }
    }

    fn load(&self, memory: &GuestMemory, at: u64) -> Result<()> {
        match self {
            Self::Bytes(bytes) => Ok(memory.write(GuestAddress(at), bytes)?),
            Self::File { file, path, len } => {
                let mut done = 0;
                while done < *len {
                    let rest = [memory.segment(GuestAddress(at + done), (len - done) as usize)?];
                    let doing = || format!("reading initramfs {}", path.display());
                    match memory.read_at(&rest, file.as_fd(), done) {
                        Ok(0) => {
                            return Err(Error::new(ErrorKind::Corrupt, "it became shorter").doing(doing()));
                        }
                        Ok(n) => done += n as u64,
                        Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(e) => return Err(e).doing(doing),
                    }
                }
                Ok(())
            }
        }
    }
}

fn append(archive: &mut Archive, entry: &ArchiveEntry) -> Result<()> {
    let name = |path: &'_ str| path.trim_start_matches('/').to_owned();
    match entry {
        ArchiveEntry::Directory { path, permissions } => archive.directory(&name(path), permissions & 0o7777),
        ArchiveEntry::File { path, permissions, contents } => {
            archive.file(&name(path), permissions & 0o7777, contents.len())
        }
        ArchiveEntry::Symlink { path, target } => archive.symlink(&name(path), target),
        ArchiveEntry::CharacterDevice { path, permissions, device } => {
            archive.character_device(&name(path), permissions & 0o7777, *device)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(&[(GuestAddress(0), 4 << 20)]).unwrap()
    }

    #[test]
    fn archives_and_entries_are_concatenated() {
        let path = std::env::temp_dir().join(format!("cofferdam-initramfs-{}", std::process::id()));
        std::fs::write(&path, b"070701archive").unwrap();
        let initramfs = Initramfs::open(&path).unwrap().file("/init", 0o755, "#!").directory("proc", 0o755);
        let memory = memory();
        let LoadedInitramfs { addr: at, size: len } = initramfs.load(&memory, 1 << 20, 4 << 20).unwrap();
        assert_eq!((at.0 % 4096, at.0 + len <= 4 << 20), (0, true));
        let mut seen = vec![0; len as usize];
        memory.read(at, &mut seen).unwrap();
        assert!(seen.starts_with(b"070701archive\x00\x00\x00070701"));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn oversized_initramfs_error_has_the_sizes() {
        let large = Initramfs::new().file("/x", 0o644, vec![0; 3 << 20]);
        assert!(large.load(&memory(), 1 << 19, 4 << 20).is_ok());
        let error = large.load(&memory(), 2 << 20, 4 << 20).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.to_string().contains("2097152 bytes free"), "{error}");
    }

    #[test]
    fn missing_file_and_directory_errors_differ() {
        assert_eq!(Initramfs::open("/nonexistent").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(Initramfs::open("/tmp").unwrap_err().kind(), ErrorKind::InvalidConfig);
        assert!(Initramfs::new().file("../x", 0o644, "").load(&memory(), 0, 4 << 20).is_err());
    }
}
