//! The format of an overlay's file. Everything is little-endian; what is not written is a hole.
//!
//! ```text
//!         0  header: one sector of numbers, which is replaced whole or not at all
//!       512  path of the base, as bytes
//!     8,192  states, two bits for each cluster, from the lowest bits of the first byte on
//!  `data`    cluster n of the disk at `data` + n * 4,096
//! ```
//!
//! The header's sector, with bytes in parentheses:
//!
//! ```text
//! magic `CofferOv` (8)   version (4)   flags (4; bit 0: frozen)   size of the disk (8)   bytes of a cluster (4)
//! kind of the base (4; 1 raw, 2 overlay)   `data` (8)   the overlay's own id (16)
//! of an overlay as base: its id (16)
//! of a raw base: length (8), time of its last change in nanoseconds since 1970 (8), inode number (8)
//! length of the base's path (4)   FNV-1a of the path (8)   FNV-1a of all before (8)
//! ```

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::size::Size;

/// Bytes of a cluster: what is copied at once, and a page of the host, so that holes can be made of each.
pub(super) const CLUSTER: u64 = 4096;
/// Where the states begin.
pub(in super::super) const STATES: u64 = 8192;
/// Bytes of states that are read and written at once.
pub(super) const PAGE: usize = 4096;
/// Clusters whose states are in a page.
pub(super) const PER_PAGE: u64 = PAGE as u64 * 4;
/// Disks smaller than this can grow to it.
const ROOM: u64 = 1 << 40;
/// The largest disk: what ext4 can hold in one file.
const MAX_SIZE: u64 = 15 << 40;
const MAGIC: &[u8; 8] = b"CofferOv";
const VERSION: u32 = 1;
const FROZEN: u32 = 1;
const SECTOR: usize = 512;
/// The longest path that Linux knows.
const MAX_PATH: usize = 4096;

/// What a base is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BaseIdentity {
    /// A raw image that has not changed since.
    Raw { len: u64, changed: i64, inode: u64 },
    /// A frozen overlay, wherever it is.
    Overlay { id: [u8; 16], len: u64 },
}

/// What an overlay says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OverlayHeader {
    pub frozen: bool,
    /// Bytes of the disk: whole sectors.
    pub size: u64,
    /// Where the first cluster is.
    pub data: u64,
    pub id: [u8; 16],
    pub base: BaseIdentity,
    pub path: PathBuf,
}

impl OverlayHeader {
    /// # Errors
    /// `InvalidConfig` when the disk is too large or no whole sectors, or the base's path too long.
    pub(super) fn new(size: u64, id: [u8; 16], base: BaseIdentity, path: &Path) -> Result<Self> {
        let bad = |problem: String| Err(Error::new(ErrorKind::InvalidConfig, problem));
        if size == 0 || !size.is_multiple_of(SECTOR as u64) || size > MAX_SIZE {
            return bad(format!(
                "{size} bytes: an overlay has whole sectors of {SECTOR} bytes, up to {}",
                Size::bytes(MAX_SIZE)
            ));
        }
        if path.as_os_str().len() > MAX_PATH {
            return bad(format!("the base's path has more than {MAX_PATH} bytes"));
        }
        let pages = size.max(ROOM).div_ceil(CLUSTER * PER_PAGE);
        let data = (STATES + pages * PAGE as u64).next_multiple_of(1 << 20);
        Ok(Self { frozen: false, size, data, id, base, path: path.into() })
    }

    /// How large the disk can become.
    pub(super) fn most(&self) -> u64 {
        ((self.data - STATES) / PAGE as u64 * PER_PAGE).saturating_mul(CLUSTER).min(MAX_SIZE)
    }

    /// How long the file is.
    pub(super) fn file_len(&self) -> u64 {
        self.data + self.size.next_multiple_of(CLUSTER)
    }

    /// The header's sector.
    pub(super) fn sector(&self) -> [u8; SECTOR] {
        let path = self.path.as_os_str().as_bytes();
        let (kind, id, len, changed, inode) = match self.base {
            BaseIdentity::Raw { len, changed, inode } => (1u32, [0; 16], len, changed, inode),
            BaseIdentity::Overlay { id, len } => (2, id, len, 0, 0),
        };
        let mut bytes = Vec::with_capacity(SECTOR);
        bytes.extend_from_slice(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(if self.frozen { FROZEN } else { 0 }.to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        bytes.extend((CLUSTER as u32).to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(self.data.to_le_bytes());
        bytes.extend(self.id);
        bytes.extend(id);
        bytes.extend(len.to_le_bytes());
        bytes.extend(changed.to_le_bytes());
        bytes.extend(inode.to_le_bytes());
        bytes.extend((path.len() as u32).to_le_bytes());
        bytes.extend(fnv(path).to_le_bytes());
        bytes.extend(fnv(&bytes).to_le_bytes());
        let mut sector = [0; SECTOR];
        sector.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
        sector
    }

    /// The sector and the path behind it.
    pub(super) fn bytes(&self) -> Vec<u8> {
        [self.sector().as_slice(), self.path.as_os_str().as_bytes()].concat()
    }

    /// Reads the first [`STATES`] bytes of a file, which may be shorter.
    ///
    /// # Errors
    /// `Corrupt` when it is no overlay or a damaged one, `Incompatible` when it is one of another version.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let corrupt = |problem: &'static str| Error::new(ErrorKind::Corrupt, problem);
        let mut rest = HeaderFields(bytes);
        let cut = || corrupt("the file is too short for an overlay");
        if &rest.take::<8>().ok_or_else(cut)? != MAGIC {
            return Err(corrupt("not an overlay"));
        }
        let version = rest.u32().ok_or_else(cut)?;
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!("an overlay of version {version}; this release knows version {VERSION}"),
            ));
        }
        let header = Self::fields(&mut rest).ok_or_else(cut)?;
        let covered = bytes.len() - rest.0.len();
        let (flags, cluster, kind, path_len, path_sum, mut header) = header;
        let sum = rest.u64().ok_or_else(cut)?;
        if fnv(bytes.get(..covered).unwrap_or_default()) != sum {
            return Err(corrupt("the overlay's header is damaged: its checksum is another"));
        }
        if flags & !FROZEN != 0 || cluster != CLUSTER as u32 {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "an overlay with flags {flags:#x} and clusters of {cluster} bytes, which this release does not know"
                ),
            ));
        }
        header.frozen = flags & FROZEN != 0;
        header.base = match (kind, header.base) {
            (1, BaseIdentity::Raw { .. }) => header.base,
            (2, BaseIdentity::Raw { len, .. }) => BaseIdentity::Overlay { id: Self::base_id(bytes), len },
            _ => return Err(corrupt("the overlay's header is damaged: the kind of its base is none")),
        };
        let path_len = usize::try_from(path_len).unwrap_or(usize::MAX);
        if path_len > MAX_PATH {
            return Err(corrupt("the overlay's header is damaged: the path of its base is too long"));
        }
        let path = bytes.get(SECTOR..SECTOR + path_len).ok_or_else(cut)?;
        if fnv(path) != path_sum {
            return Err(corrupt("the overlay's header is damaged: the path of its base has another checksum"));
        }
        header.path = OsStr::from_bytes(path).into();
        let sound = header.size > 0 && header.size % SECTOR as u64 == 0 && header.data % (1 << 20) == 0;
        if !sound || header.data <= STATES || header.data > 1 << 40 || header.size > header.most() {
            return Err(corrupt("the overlay's header is damaged: sizes that cannot be"));
        }
        Ok(header)
    }

    /// What is between version and checksum: flags, cluster, kind, length and checksum of the path, and the rest.
    fn fields(rest: &mut HeaderFields<'_>) -> Option<(u32, u32, u32, u32, u64, Self)> {
        let (flags, size, cluster, kind) = (rest.u32()?, rest.u64()?, rest.u32()?, rest.u32()?);
        let (data, id, _base_id) = (rest.u64()?, rest.take()?, rest.take::<16>()?);
        let (len, changed, inode) = (rest.u64()?, i64::from_le_bytes(rest.take()?), rest.u64()?);
        let (path_len, path_sum) = (rest.u32()?, rest.u64()?);
        let base = BaseIdentity::Raw { len, changed, inode };
        Some((
            flags,
            cluster,
            kind,
            path_len,
            path_sum,
            Self { frozen: false, size, data, id, base, path: PathBuf::new() },
        ))
    }

    fn base_id(bytes: &[u8]) -> [u8; 16] {
        bytes.get(56..72).and_then(|id| id.try_into().ok()).unwrap_or_default()
    }
}

/// Takes numbers off the front.
struct HeaderFields<'a>(&'a [u8]);

impl HeaderFields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (now, later) = self.0.split_first_chunk()?;
        self.0 = later;
        Some(*now)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

/// Makes the checksums right again in the first [`STATES`] bytes of a file.
#[cfg(any(test, feature = "internals"))]
pub(in super::super) fn reseal(bytes: &mut [u8]) {
    let Some(len) = number_at(bytes, 96).map(|len| u32::from_le_bytes(len) as usize) else { return };
    let path = fnv(bytes.get(SECTOR..SECTOR.saturating_add(len)).unwrap_or_default());
    if let Some(place) = bytes.get_mut(100..108) {
        place.copy_from_slice(&path.to_le_bytes());
    }
    let all = fnv(bytes.get(..108).unwrap_or_default());
    if let Some(place) = bytes.get_mut(108..116) {
        place.copy_from_slice(&all.to_le_bytes());
    }
}

#[cfg(any(test, feature = "internals"))]
fn number_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// FNV-1a, 64 bits: against accidents, not against anybody.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(base: BaseIdentity) -> OverlayHeader {
        OverlayHeader::new(10 << 30, [7; 16], base, Path::new("/images/base.img")).unwrap()
    }

    #[test]
    fn headers_are_read_as_they_were_written() {
        let raw = BaseIdentity::Raw { len: 5 << 30, changed: -3, inode: 9 };
        for base in [raw, BaseIdentity::Overlay { id: [3; 16], len: 4096 }] {
            let mut wanted = header(base);
            wanted.frozen = true;
            assert_eq!(OverlayHeader::parse(&wanted.bytes()).unwrap(), wanted);
        }
        assert!(header(raw).most() >= 1 << 40);
    }

    #[test]
    fn changed_header_bytes_are_detected() {
        let bytes = header(BaseIdentity::Raw { len: 512, changed: 1, inode: 2 }).bytes();
        for n in (0..116).chain(512..bytes.len()) {
            let mut bad = bytes.clone();
            bad[n] ^= 1;
            let error = OverlayHeader::parse(&bad).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Incompatible), "{n}: {error}");
        }
        for len in [0, 7, 11, 100, 115, 520] {
            assert_eq!(OverlayHeader::parse(&bytes[..len]).unwrap_err().kind(), ErrorKind::Corrupt, "{len}");
        }
    }

    #[test]
    fn invalid_overlay_headers_are_rejected() {
        let base = BaseIdentity::Raw { len: 512, changed: 1, inode: 2 };
        for size in [0, 100, 16 << 40] {
            assert_eq!(
                OverlayHeader::new(size, [0; 16], base, Path::new("/")).unwrap_err().kind(),
                ErrorKind::InvalidConfig
            );
        }
    }
}
