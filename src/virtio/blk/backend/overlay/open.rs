//! Finding, checking and making overlays and the chains of bases below them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::super::layer::{Layer, RawLayer};
use super::super::raw::{length, lock_or_name_holder};
use super::OverlayFile;
use super::format::{BaseIdentity, OverlayHeader, STATES};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys::{self, LockKind};

/// Overlays that may lie on each other.
const DEPTH: usize = 16;

/// What an overlay lies on. Never guessed from a file's contents: a guest may have written those.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BasePath {
    Raw(PathBuf),
    /// A frozen overlay.
    Overlay(PathBuf),
}

impl BasePath {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Raw(path) | Self::Overlay(path) => path,
        }
    }
}

/// What an overlay says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct About {
    pub size: u64,
    pub allocated: u64,
    pub frozen: bool,
    pub base: BasePath,
}

/// The overlays that were opened on the way down.
#[derive(Default)]
struct BaseChain(Vec<(u64, u64)>);

impl BaseChain {
    /// # Errors
    /// `Corrupt` when this file was met before or there are too many.
    fn add(&mut self, file: &File) -> Result<()> {
        let metadata = file.metadata()?;
        let this = (metadata.dev(), metadata.ino());
        if self.0.contains(&this) {
            return Err(Error::new(ErrorKind::Corrupt, "the chain of bases comes back to this overlay"));
        }
        if self.0.len() == DEPTH {
            return Err(Error::new(
                ErrorKind::InvalidConfig,
                format!("more than {DEPTH} overlays lie on each other: flatten some of them"),
            ));
        }
        self.0.push(this);
        Ok(())
    }
}

/// Opens the base that `path` names.
fn open_base(base: &BasePath, chain: &mut BaseChain) -> Result<(Box<dyn Layer>, BaseIdentity)> {
    let doing = || format!("opening base {}", base.path().display());
    match base {
        BasePath::Raw(path) => open_raw(path).doing(doing),
        BasePath::Overlay(path) => {
            let (file, header) = open_file(path, LockKind::Shared).doing(doing)?;
            if !header.frozen {
                return Err(Error::new(
                    ErrorKind::InvalidState,
                    "not frozen: what lies on an overlay would change with it; see Overlay::freeze",
                )
                .doing(doing()));
            }
            let identity = BaseIdentity::Overlay { id: header.id, len: header.size };
            let mut disk = assemble(file, header, None, chain).doing(doing)?;
            disk.read_only = true;
            Ok((Box::new(disk), identity))
        }
    }
}

fn open_raw(path: &Path) -> Result<(Box<dyn Layer>, BaseIdentity)> {
    let file = File::open(path)?;
    let len = length(&file)?;
    lock_or_name_holder(&file, LockKind::Shared)?;
    let metadata = file.metadata()?;
    let identity = if metadata.file_type().is_block_device() {
        BaseIdentity::Raw { len, changed: 0, inode: metadata.rdev() }
    } else {
        let changed = metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
        BaseIdentity::Raw { len, changed, inode: metadata.ino() }
    };
    Ok((Box::new(RawLayer::new(file, len)), identity))
}

/// Opens and locks an overlay's file and reads its header.
fn open_file(path: &Path, lock: LockKind) -> Result<(File, OverlayHeader)> {
    loop {
        let file = OpenOptions::new().read(true).write(lock == LockKind::Exclusive).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(Error::new(ErrorKind::InvalidConfig, "not a regular file"));
        }
        lock_or_name_holder(&file, lock)?;
        // Between opening and locking, another may have put a new one in its place.
        let (opened, named) = (file.metadata()?, fs::metadata(path)?);
        if (opened.dev(), opened.ino()) == (named.dev(), named.ino()) {
            let header = read_header(&file)?;
            return Ok((file, header));
        }
    }
}

fn read_header(file: &File) -> Result<OverlayHeader> {
    use std::os::unix::fs::FileExt;
    let (mut bytes, mut len) = (vec![0; STATES as usize], 0);
    while let Some(rest) = bytes.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, len as u64) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let header = OverlayHeader::parse(bytes.get(..len).unwrap_or_default())?;
    let (is, needed) = (file.metadata()?.len(), header.file_len());
    if is < needed {
        return Err(Error::new(ErrorKind::Corrupt, format!("the overlay was cut: {is} of {needed} bytes are left")));
    }
    Ok(header)
}

/// Puts an overlay on its base: on the one that is `named`, if any, else on the one that it names itself.
fn assemble(file: File, header: OverlayHeader, named: Option<&BasePath>, chain: &mut BaseChain) -> Result<OverlayFile> {
    chain.add(&file)?;
    let own = header.base_path();
    let path = named.unwrap_or(&own);
    let (base, identity) = open_base(path, chain)?;
    if identity != header.base {
        return Err(changed(path, header.base, identity));
    }
    OverlayFile::new(Box::new(file), header, base).doing(|| "reading an overlay")
}

/// Why this is not the base that it was.
fn changed(path: &BasePath, was: BaseIdentity, is: BaseIdentity) -> Error {
    let show = |identity| match identity {
        BaseIdentity::Raw { len, changed, inode } => {
            format!(
                "a raw image of {len} bytes, inode {inode}, changed {}.{:09} s after 1970",
                changed.div_euclid(1_000_000_000),
                changed.rem_euclid(1_000_000_000)
            )
        }
        BaseIdentity::Overlay { id, len } => format!("overlay {:032x} of {len} bytes", u128::from_be_bytes(id)),
    };
    let path = path.path().display();
    Error::new(
        ErrorKind::Incompatible,
        format!(
            "its base {path} is another than it was made for: that was {}, this is {}; \
             bring the old one back, or see Overlay::rebase when both have the same content",
            show(was),
            show(is)
        ),
    )
}

impl OverlayHeader {
    fn base_path(&self) -> BasePath {
        match self.base {
            BaseIdentity::Raw { .. } => BasePath::Raw(self.path.clone()),
            BaseIdentity::Overlay { .. } => BasePath::Overlay(self.path.clone()),
        }
    }
}

impl OverlayFile {
    /// Opens and locks an overlay with its whole chain of bases.
    ///
    /// Its base is the one that is `named`, if any, which must be the one it was made for.
    ///
    /// # Errors
    /// - `NotFound`, `PermissionDenied`.
    /// - `ResourceBusy` when another has it or its base open.
    /// - `Corrupt` when it is none, damaged or in a circle.
    /// - `Incompatible` when its base was changed.
    /// - `InvalidState` when it is frozen and not `read_only`.
    pub(crate) fn open(path: &Path, named: Option<&BasePath>, read_only: bool) -> Result<Self> {
        let doing = || format!("opening overlay {}", path.display());
        let lock = if read_only { LockKind::Shared } else { LockKind::Exclusive };
        let (file, header) = open_file(path, lock).doing(doing)?;
        if header.frozen && !read_only {
            return Err(Error::new(
                ErrorKind::InvalidState,
                "frozen: it can be read, and new overlays can be made on it",
            )
            .doing(doing()));
        }
        let mut disk = assemble(file, header, named, &mut BaseChain::default()).doing(doing)?;
        disk.read_only = read_only;
        Ok(disk)
    }

    /// A new one without a name in `directory`, which is gone with its last descriptor. `size`: the base's unless set.
    ///
    /// # Errors
    /// As [`create`].
    pub(crate) fn private(directory: &Path, base: &BasePath, size: Option<Size>, read_only: bool) -> Result<Self> {
        let doing = || format!("making an overlay in {}", directory.display());
        let (header, base) = plan(base, size)?;
        let file = sys::temp_file(directory).doing(doing)?;
        write_new(&file, &header).doing(doing)?;
        let mut disk = Self::new(Box::new(file), header, base).doing(doing)?;
        disk.durable = false;
        disk.read_only = read_only;
        Ok(disk)
    }

    /// It never takes up more than `limit`: who writes then gets `ENOSPC`.
    pub(crate) fn limited(mut self, limit: Size) -> Self {
        self.limit = limit.as_bytes();
        self
    }

    pub(crate) fn about(&self) -> Result<About> {
        let allocated = self.file.allocated()?;
        let OverlayHeader { size, frozen, .. } = self.header;
        Ok(About { size, allocated, frozen, base: self.header.base_path() })
    }
}

/// The header of a new overlay, and its base.
fn plan(base: &BasePath, size: Option<Size>) -> Result<(OverlayHeader, Box<dyn Layer>)> {
    let (layer, identity) = open_base(base, &mut BaseChain::default())?;
    let size = size.map_or(layer.len(), Size::as_bytes);
    if size < layer.len() {
        return Err(Error::new(
            ErrorKind::InvalidConfig,
            format!("size: {size} bytes are fewer than the {} of the base {}", layer.len(), base.path().display()),
        ));
    }
    let mut id = [0; 16];
    sys::fill_random(&mut id)?;
    let path = fs::canonicalize(base.path())?;
    Ok((OverlayHeader::new(size, id, identity, &path)?, layer))
}

fn write_new(file: &File, header: &OverlayHeader) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    file.set_len(header.file_len())?;
    file.write_all_at(&header.bytes(), 0)
}

/// Makes an overlay at `path`, which must not exist, and makes it durable. `size`: the base's unless set.
///
/// # Errors
/// `AlreadyExists`; `InvalidConfig` when `size` is smaller than the base; of the base as [`OverlayFile::open`].
pub(crate) fn create(path: &Path, base: &BasePath, size: Option<Size>) -> Result<()> {
    let doing = || format!("making overlay {}", path.display());
    let (header, _base) = plan(base, size).doing(doing)?;
    super::rewrite::publish(path, false, |file| Ok(write_new(file, &header)?)).doing(doing)
}

/// The parts that rewriting needs: the overlay, alone, and what a new one on `base` would begin with.
pub(super) fn plan_again(disk: &OverlayFile, base: &BasePath) -> Result<(OverlayHeader, Box<dyn Layer>)> {
    let (mut header, layer) = plan(base, Some(Size::bytes(disk.header.size)))?;
    header.id = disk.header.id;
    header.frozen = disk.header.frozen;
    Ok((header, layer))
}

pub(super) fn own_base(disk: &OverlayFile) -> BasePath {
    disk.header.base_path()
}

/// Makes an overlay of a file whose header was written.
pub(super) fn on(file: File, header: OverlayHeader, base: Box<dyn Layer>) -> Result<OverlayFile> {
    write_new(&file, &header)?;
    Ok(OverlayFile::new(Box::new(file), header, base)?)
}

/// Opens an overlay to be rewritten. It has no other user, and may be frozen.
pub(super) fn open_alone(path: &Path) -> Result<OverlayFile> {
    let (file, header) = open_file(path, LockKind::Exclusive)?;
    assemble(file, header, None, &mut BaseChain::default())
}

/// Opens an overlay whose base may have been changed, on what the base is now.
pub(super) fn open_on_changed(path: &Path, named: &BasePath) -> Result<OverlayFile> {
    let (file, header) = open_file(path, LockKind::Exclusive)?;
    let mut chain = BaseChain::default();
    chain.add(&file)?;
    let (base, _) = open_base(named, &mut chain)?;
    Ok(OverlayFile::new(Box::new(file), header, base)?)
}
