//! Paths of entries: bytes, from the root of the image.

use crate::error::{Error, ErrorKind, Result};

/// Linux keeps names and link targets of at most so many bytes.
pub(super) const NAME_MAX: usize = 255;
pub(super) const PATH_MAX: usize = 4095;

/// How an error shows a path, or another text of an image: at most 200 bytes of it, in quotes, nothing unprintable as it is.
pub(in crate::container) fn shown(path: &[u8]) -> String {
    const MAX_SHOWN: usize = 200;
    match path.get(..MAX_SHOWN) {
        Some(begin) if path.len() > MAX_SHOWN => format!("{:?}…", String::from_utf8_lossy(begin)),
        _ => format!("{:?}", String::from_utf8_lossy(path)),
    }
}

/// A path from the root of the image, without empty, `.` and `..` parts. The root itself is the empty path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EntryPath(Box<[u8]>);

impl EntryPath {
    /// Takes a path as archives have it: `./` in front, slashes around, or absolute, which is meant from the root too.
    ///
    /// # Errors
    /// `Corrupt` when it leaves the root, has a NUL, or is longer than Linux allows.
    pub(super) fn parse(raw: &[u8]) -> Result<Self> {
        let corrupt = |what: &str| Err(Error::new(ErrorKind::Corrupt, format!("path {}: {what}", shown(raw))));
        if raw.len() > PATH_MAX {
            return corrupt("it is longer than Linux allows");
        }
        let mut path = Vec::with_capacity(raw.len());
        for part in raw.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => continue,
                b".." => return corrupt("it leaves the image with `..`"),
                part if part.contains(&0) => return corrupt("it has a NUL"),
                part if part.len() > NAME_MAX => return corrupt("a name in it is longer than Linux allows"),
                part => {
                    if !path.is_empty() {
                        path.push(b'/');
                    }
                    path.extend_from_slice(part);
                }
            }
        }
        Ok(Self(path.into()))
    }

    /// The same of what is no directory, to whose name no `.` can lead.
    ///
    /// # Errors
    /// As [`EntryPath::parse`].
    pub(super) fn parse_file(raw: &[u8]) -> Result<Self> {
        let last = raw.rsplit(|byte| *byte == b'/').find(|part| !part.is_empty());
        if last == Some(b".") {
            let what = format!("path {}: only the root and other directories have such a one", shown(raw));
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        Self::parse(raw)
    }

    pub(super) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The parts of the directories above, then the last part, which only the root has not.
    pub(super) fn split(&self) -> (impl Iterator<Item = &[u8]>, Option<&[u8]>) {
        let mut parts = self.0.rsplitn(2, |byte| *byte == b'/');
        let last = parts.next().filter(|part| !part.is_empty());
        let above = parts.next().unwrap_or_default();
        (above.split(|byte| *byte == b'/').filter(|part| !part.is_empty()), last)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The target of a symbolic link; where it points is the guest's business.
///
/// # Errors
/// `Corrupt` for one that no link can have.
pub(super) fn symlink_target(raw: &[u8]) -> Result<Box<[u8]>> {
    if raw.is_empty() || raw.len() > PATH_MAX || raw.contains(&0) {
        return Err(Error::new(ErrorKind::Corrupt, "its target is empty, has a NUL, or is longer than Linux allows"));
    }
    Ok(raw.into())
}
