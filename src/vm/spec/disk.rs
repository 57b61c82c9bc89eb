//! [`DiskSpec`]: the description of a disk as plain data.

use std::convert::Infallible;
use std::fs::File;
use std::sync::Arc;

use super::live::{LivePart, LivePartId, LiveParts, take};
use super::path::HostPath;
use crate::error::Result;
use crate::size::Size;
use crate::virtio::blk::{CacheMode, DiskLimit, ErrorPolicy, IoEngine, Reserve};
use crate::vm::disk::Disk;
use crate::vm::overlay::BaseImage;

/// A disk, with the name of its open file if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct DiskSpec {
    pub settings: DiskSettings,
    pub source: DiskSource<LivePartId>,
}

/// The settings of all kinds. Kinds without a method for a setting leave it as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct DiskSettings {
    pub read_only: bool,
    pub serial: Option<String>,
    pub queues: u32,
    pub engine: IoEngine,
    pub cache: CacheMode,
    pub policy: ErrorPolicy,
    pub limit: DiskLimit,
    pub min_free_space: Option<Size>,
    pub reserve: Reserve,
}

impl DiskSettings {
    pub(in crate::vm) fn new() -> Self {
        Self {
            read_only: false,
            serial: None,
            queues: 1,
            engine: IoEngine::Auto,
            cache: CacheMode::Durable,
            policy: ErrorPolicy::default(),
            limit: DiskLimit::none(),
            min_free_space: None,
            reserve: Reserve::Nothing,
        }
    }

    /// Of a disk that takes space on the host as its guest writes.
    pub(in crate::vm) fn sharing() -> Self {
        Self { reserve: Reserve::Share, ..Self::new() }
    }
}

/// Where a disk's bytes are. `F` is a file that the embedder has opened, or its name.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(in crate::vm) enum DiskSource<F> {
    Path(FileSource),
    File(F),
    Scratch(ScratchSource),
    Memory(Size),
    Overlay(OverlaySource),
    #[cfg(feature = "qcow2")]
    Qcow2(Qcow2Source),
    /// Pieces of files, one behind the other. It can only be read.
    #[cfg_attr(not(feature = "container"), allow(dead_code, reason = "containers alone have such disks"))]
    Pieces(Vec<DiskPiece<F>>),
}

/// Some bytes of a file that are a piece of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct DiskPiece<F> {
    pub file: F,
    pub offset: u64,
    pub len: u64,
}

/// The path of an image, and how it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct FileSource {
    pub path: HostPath,
    pub locked: bool,
    pub direct: bool,
}

/// How large a scratch disk is, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct ScratchSource {
    pub size: Size,
    pub dir: Option<HostPath>,
}

/// An overlay, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct OverlaySource {
    pub base: BaseImage,
    pub persist_at: Option<HostPath>,
    pub scratch_dir: Option<HostPath>,
    pub size: Option<Size>,
    pub max_size: Option<Size>,
}

/// A qcow2 image, and where its backing files may be.
#[cfg(feature = "qcow2")]
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(in crate::vm) struct Qcow2Source {
    pub path: HostPath,
    pub backing_dir: Option<HostPath>,
}

impl<F> DiskSource<F> {
    /// Returns what of the host's is opened by its name, if anything is.
    pub(super) fn opens(&self) -> Option<String> {
        match self {
            Self::Path(FileSource { path, .. }) => Some(path.display().to_string()),
            Self::Scratch(_) => Some("the directory of a scratch disk".into()),
            Self::Overlay(OverlaySource { base, .. }) => Some(base.path().display().to_string()),
            #[cfg(feature = "qcow2")]
            Self::Qcow2(Qcow2Source { path, .. }) => Some(path.display().to_string()),
            Self::File(_) | Self::Memory(_) | Self::Pieces(_) => None,
        }
    }

    /// Returns the same with what `change` makes of an open file.
    fn try_map<G, E>(self, mut change: impl FnMut(F) -> Result<G, E>) -> Result<DiskSource<G>, E> {
        Ok(match self {
            Self::Path(source) => DiskSource::Path(source),
            Self::File(file) => DiskSource::File(change(file)?),
            Self::Scratch(source) => DiskSource::Scratch(source),
            Self::Memory(size) => DiskSource::Memory(size),
            Self::Overlay(source) => DiskSource::Overlay(source),
            #[cfg(feature = "qcow2")]
            Self::Qcow2(source) => DiskSource::Qcow2(source),
            Self::Pieces(pieces) => {
                let place = |DiskPiece { file, offset, len }| Ok(DiskPiece { file: change(file)?, offset, len });
                DiskSource::Pieces(pieces.into_iter().map(place).collect::<Result<_, E>>()?)
            }
        })
    }
}

impl DiskSpec {
    pub(super) fn split(Disk { settings, source }: Disk, live: &mut LiveParts) -> Self {
        let name = |file: Arc<File>| Ok::<_, Infallible>(live.add(LivePart::DiskFile(file)));
        let Ok(source) = source.try_map(name);
        Self { settings, source }
    }

    pub(super) fn join(self, live: &mut LiveParts) -> Result<Disk> {
        let Self { settings, source } = self;
        Ok(Disk { settings, source: source.try_map(|id| take!(live, id, DiskFile))? })
    }
}
