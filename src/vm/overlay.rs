//! [`Overlay`]: copy-on-write disks as files, while no VM has them open.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

#[cfg(feature = "serde")]
use super::spec::HostPath;
use crate::error::{Context, Result};
use crate::size::Size;
use crate::virtio::blk::{self, BasePath, OverlayFile};

/// A copy-on-write disk in a sparse file of its own.
///
/// The file holds what was written; all else is read from its base, which must not change. A base is a raw image, or
/// another overlay that was frozen. An overlay knows the base that it was made for, and refuses one that was changed
/// since. A [`Disk::overlay`](super::Disk::overlay) that is
/// [kept](super::disk::OverlayDisk::persist_at) there gives it to a VM.
///
/// An overlay's file names its base, and a guest can read that base. So use no overlay files of strangers.
///
/// A call that replaces a file writes a new one without a name first. So a crash leaves the old one whole, and nothing
/// else. File systems that know no such files, as NFS, may be left with one whose name begins with
/// `.cofferdam-`.
///
/// All calls block, and lock the file.
///
/// # Errors
/// All calls fail with:
///
/// - `ResourceBusy` when a VM has it open;
/// - `NotFound`, `PermissionDenied` or `Io` as the host does;
/// - `Corrupt` when it is no overlay, damaged, or is its own base;
/// - `Incompatible` when its base was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    path: PathBuf,
}

/// The base of an overlay: a raw image, or a frozen [`Overlay`].
///
/// A path is a raw image, whatever is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(from = "BaseSpec", into = "BaseSpec")
)]
pub struct BaseImage(pub(super) BasePath);

/// A base as it is kept.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
enum BaseSpec {
    Raw(HostPath),
    Overlay(HostPath),
}

#[cfg(feature = "serde")]
impl From<BaseImage> for BaseSpec {
    fn from(BaseImage(base): BaseImage) -> Self {
        match base {
            BasePath::Raw(path) => Self::Raw(HostPath::new(path)),
            BasePath::Overlay(path) => Self::Overlay(HostPath::new(path)),
        }
    }
}

#[cfg(feature = "serde")]
impl From<BaseSpec> for BaseImage {
    fn from(base: BaseSpec) -> Self {
        Self(match base {
            BaseSpec::Raw(path) => BasePath::Raw(path.into()),
            BaseSpec::Overlay(path) => BasePath::Overlay(path.into()),
        })
    }
}

impl BaseImage {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns whether it is an overlay itself.
    pub fn is_overlay(&self) -> bool {
        matches!(self.0, BasePath::Overlay(_))
    }
}

impl From<PathBuf> for BaseImage {
    fn from(path: PathBuf) -> Self {
        Self(BasePath::Raw(path))
    }
}

impl From<&Path> for BaseImage {
    fn from(path: &Path) -> Self {
        path.to_path_buf().into()
    }
}

impl From<&PathBuf> for BaseImage {
    fn from(path: &PathBuf) -> Self {
        path.clone().into()
    }
}

impl From<&str> for BaseImage {
    fn from(path: &str) -> Self {
        PathBuf::from(path).into()
    }
}

impl From<String> for BaseImage {
    fn from(path: String) -> Self {
        PathBuf::from(path).into()
    }
}

impl From<&Overlay> for BaseImage {
    fn from(overlay: &Overlay) -> Self {
        Self(BasePath::Overlay(overlay.path.clone()))
    }
}

impl From<Overlay> for BaseImage {
    fn from(overlay: Overlay) -> Self {
        (&overlay).into()
    }
}

/// The properties of an overlay; see [`Overlay::info`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OverlayInfo {
    /// Size of the disk that a guest sees.
    pub size: Size,
    /// Space that the file takes on the host, without its base.
    pub allocated: Size,
    /// Whether it is only read, and may be a base.
    pub frozen: bool,
    /// Its base.
    pub base: BaseImage,
}

/// The progress of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// How much of the disk was processed.
    pub done: Size,
    /// Size of the disk.
    pub total: Size,
}

impl Overlay {
    /// Makes an empty overlay of the base's size, in a new file.
    ///
    /// # Errors
    /// `AlreadyExists`; and as said at [`Overlay`], of the base.
    pub fn create(path: impl Into<PathBuf>, base: impl Into<BaseImage>) -> Result<Self> {
        Self::make(path.into(), base.into(), None)
    }

    /// Makes an empty overlay of a larger size, in a new file.
    ///
    /// What is beyond the base's end reads as zeroes.
    ///
    /// # Errors
    /// `AlreadyExists`; `InvalidConfig` when `size` is smaller than the base or no whole sectors of 512 bytes.
    pub fn create_larger(path: impl Into<PathBuf>, base: impl Into<BaseImage>, size: Size) -> Result<Self> {
        Self::make(path.into(), base.into(), Some(size))
    }

    fn make(path: PathBuf, base: BaseImage, size: Option<Size>) -> Result<Self> {
        blk::create(&path, &base.0, size)?;
        Ok(Self { path })
    }

    /// Opens an overlay, and checks it and its whole chain of bases.
    ///
    /// # Errors
    /// As said at [`Overlay`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let overlay = Self { path: path.into() };
        overlay.info()?;
        Ok(overlay)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns its properties.
    ///
    /// # Errors
    /// As said at [`Overlay`].
    pub fn info(&self) -> Result<OverlayInfo> {
        let about = OverlayFile::open(&self.path, None, true)?.about()?;
        let (size, allocated) = (Size::bytes(about.size), Size::bytes(about.allocated));
        Ok(OverlayInfo { size, allocated, frozen: about.frozen, base: BaseImage(about.base) })
    }

    /// Makes it a snapshot: read-only from now on, so that it can be a base.
    ///
    /// # Errors
    /// As said at [`Overlay`].
    pub fn freeze(&self) -> Result<()> {
        blk::freeze(&self.path).doing(|| self.doing("freezing"))
    }

    /// Writes the whole disk into a raw image, which must not exist.
    ///
    /// `progress` is called for every MiB; when it breaks, nothing is left.
    ///
    /// # Errors
    /// `AlreadyExists`; `Cancelled`; and as said at [`Overlay`].
    pub fn flatten(&self, to: impl AsRef<Path>, progress: impl FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        let mut step = stepping(progress);
        blk::flatten(&self.path, to.as_ref(), &mut step).doing(|| self.doing("flattening"))
    }

    /// Changes the base. The guest reads the same as before.
    ///
    /// Where the bases differ, clusters are copied.
    ///
    /// # Errors
    /// `InvalidConfig` when the new base is larger than the disk; `Cancelled`; and as said at [`Overlay`].
    pub fn rebase(&self, base: impl Into<BaseImage>, progress: impl FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        let mut step = stepping(progress);
        blk::rebase(&self.path, &base.into().0, false, &mut step).doing(|| self.doing("rebasing"))
    }

    /// Changes the base to one with the same content, which is not compared.
    ///
    /// The caller knows that: it is a copy, or the old base, moved or touched. The old one need not be there.
    ///
    /// # Errors
    /// As [`Overlay::rebase`].
    pub fn rebase_unchecked(
        &self,
        base: impl Into<BaseImage>,
        progress: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut step = stepping(progress);
        blk::rebase(&self.path, &base.into().0, true, &mut step).doing(|| self.doing("rebasing"))
    }

    /// Rewrites the file without clusters that equal its base, and with holes for zeroes.
    ///
    /// # Errors
    /// `Cancelled`; and as said at [`Overlay`].
    pub fn compact(&self, progress: impl FnMut(Progress) -> ControlFlow<()>) -> Result<()> {
        let mut step = stepping(progress);
        blk::compact(&self.path, &mut step).doing(|| self.doing("compacting"))
    }

    fn doing(&self, what: &str) -> String {
        format!("{what} overlay {}", self.path.display())
    }
}

fn stepping(mut progress: impl FnMut(Progress) -> ControlFlow<()>) -> impl FnMut(u64, u64) -> ControlFlow<()> {
    move |done, total| progress(Progress { done: Size::bytes(done), total: Size::bytes(total) })
}
