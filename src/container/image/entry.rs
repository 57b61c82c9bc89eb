//! What an image consists of, wherever it comes from.

use std::collections::BTreeMap;
use std::io::Read;

use crate::error::{Error, ErrorKind, Result};

/// Linux keeps names and link targets of at most so many bytes.
const NAME_MAX: usize = 255;
const PATH_MAX: usize = 4095;

/// One file, directory, link or node, with a path that was checked.
pub(super) struct Entry<'a> {
    pub path: Name,
    pub kind: Kind<'a>,
    pub uid: u32,
    pub gid: u32,
    /// Permissions, set-id and sticky bits.
    pub mode: u16,
    /// Seconds since 1970.
    pub mtime: i64,
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

pub(super) enum Kind<'a> {
    Directory,
    File(&'a mut dyn Read),
    Symlink(String),
    /// Another name of what is at this path already.
    HardLink(Name),
    CharacterDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// A path from the root of the image: no empty, `.` or `..` parts. The root itself is the empty path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name(String);

impl Name {
    /// Takes a path as archives have it: `./` in front, slashes around, or absolute, which is meant from the root too.
    ///
    /// # Errors
    /// `Corrupt` when it leaves the root or is longer than Linux allows, `Unsupported` when it is not UTF-8.
    pub(super) fn parse(raw: &[u8]) -> Result<Self> {
        let shown = || String::from_utf8_lossy(raw).into_owned();
        let corrupt = |what: &str| Err(Error::new(ErrorKind::Corrupt, format!("entry {:?}: {what}", shown())));
        let Ok(text) = std::str::from_utf8(raw) else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("entry {:?}: its name is not UTF-8, which the disk's format writer cannot keep", shown()),
            ));
        };
        let parts: Vec<&str> = text.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        if parts.contains(&"..") {
            return corrupt("its path leaves the image with `..`");
        }
        if text.contains('\0') || text.len() > PATH_MAX || parts.iter().any(|part| part.len() > NAME_MAX) {
            return corrupt("its path is longer than Linux allows, or has a NUL");
        }
        Ok(Self(parts.join("/")))
    }

    pub(super) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// With a slash in front.
    pub(super) fn absolute(&self) -> String {
        format!("/{}", self.0)
    }
}

/// The target of a symbolic link; where it points is the guest's business.
pub(super) fn symlink_target(raw: &[u8], of: &Name) -> Result<String> {
    let bad = |kind, what: &str| Err(Error::new(kind, format!("entry {:?}: {what}", of.absolute())));
    match std::str::from_utf8(raw) {
        Err(_) => bad(ErrorKind::Unsupported, "its target is not UTF-8, which the disk's format writer cannot keep"),
        Ok(target) if target.is_empty() || target.len() > PATH_MAX || target.contains('\0') => {
            bad(ErrorKind::Corrupt, "its target is empty, has a NUL, or is longer than Linux allows")
        }
        Ok(target) => Ok(target.to_owned()),
    }
}
