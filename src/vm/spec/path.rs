//! [`HostPath`]: a path of the host as data, whatever bytes it has.

use std::ops::Deref;
use std::path::{Path, PathBuf};

#[cfg(feature = "serde")]
use std::ffi::OsString;
#[cfg(feature = "serde")]
use std::os::unix::ffi::OsStringExt;

/// A path that can be kept and sent, which serde alone does with valid UTF-8 only.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(from = "PathBytes", into = "PathBytes")
)]
pub(in crate::vm) struct HostPath(PathBuf);

impl HostPath {
    pub(in crate::vm) fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }
}

impl From<HostPath> for PathBuf {
    fn from(HostPath(path): HostPath) -> Self {
        path
    }
}

impl Deref for HostPath {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

/// A path as it is kept.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
enum PathBytes {
    Text(String),
    /// What is no text.
    Bytes(Vec<u8>),
}

#[cfg(feature = "serde")]
impl From<HostPath> for PathBytes {
    fn from(HostPath(path): HostPath) -> Self {
        match path.into_os_string().into_string() {
            Ok(text) => Self::Text(text),
            Err(other) => Self::Bytes(other.into_vec()),
        }
    }
}

#[cfg(feature = "serde")]
impl From<PathBytes> for HostPath {
    fn from(path: PathBytes) -> Self {
        Self(match path {
            PathBytes::Text(text) => text.into(),
            PathBytes::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}
