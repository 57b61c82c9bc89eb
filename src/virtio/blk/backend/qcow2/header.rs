//! The header of a qcow2 image (QEMU, docs/interop/qcow2.txt), read by ourselves. What is not supported is refused by
//! name, before anything is opened for writing or allocated.

use crate::error::{Error, ErrorKind, Result};

/// Bytes that are read: the header, its extensions and the backing file's name are in the first cluster.
pub(super) const MAX_READ: usize = 64 << 10;
/// As QEMU has them.
const MAX_L1: u64 = 32 << 20;
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// Tables of clusters (L2) and blocks of counts that the crate keeps in memory at most.
const MAX_L2_TABLES: u64 = 128;
const MAX_BLOCKS: u64 = 32;
const MAX_NAME: usize = 1023;
/// Header extensions by their types: the format of the backing file, the names of features, the name of an external data file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const DATA_FILE: u32 = 0x4441_5441;
/// Bytes of an entry in the table of features' names.
const FEATURE_NAME: usize = 48;
/// Where the byte with the incompatible feature "dirty refcounts" is, as its lowest bit.
pub(super) const DIRTY: u64 = 79;
/// Incompatible features, by their bits.
const FEATURES: [&str; 5] =
    ["dirty refcounts", "corrupt", "external data file", "compression type", "extended L2 entries"];

/// What of a header is of use before the image is open.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Qcow2Header {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster: u32,
    /// Its table of tables (L1).
    pub l1: L1Table,
    pub counts: Counts,
    /// Its last writer did not close it: its reference counts may be wrong.
    pub dirty: bool,
    pub backing: Option<BackingName>,
}

/// Where the L1 table is, and its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct L1Table {
    pub offset: u64,
    pub len: u64,
}

/// The name of a backing file as the image has it, and its format.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BackingName {
    pub name: String,
    pub format: Format,
}

/// Where its table of reference counts is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counts {
    pub at: u64,
    pub clusters: u32,
    /// A count has 2^order bits.
    pub order: u32,
}

impl Counts {
    /// Where offset and size are in the header.
    pub(super) const AT: u64 = 48;

    /// Offset and size as they are in the header.
    pub(super) fn bytes(&self) -> [u8; 12] {
        let mut bytes = [0; 12];
        let (at, clusters) = bytes.split_at_mut(8);
        at.copy_from_slice(&self.at.to_be_bytes());
        clusters.copy_from_slice(&self.clusters.to_be_bytes());
        bytes
    }
}

/// What a backing file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Qcow2,
}

fn corrupt(problem: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Corrupt, problem)
}

fn unsupported(problem: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Unsupported, format!("qcow2: {problem}"))
}

impl Qcow2Header {
    /// Reads the first bytes of a file of `len` bytes that is to be written, or not.
    ///
    /// # Errors
    /// `Corrupt` when it is none or damaged, `Unsupported` names what of it is not.
    pub(super) fn parse(bytes: &[u8], len: u64, write: bool) -> Result<Self> {
        let cut = || corrupt("the file is too short for a qcow2 image");
        let u32_at = |at| number(bytes, at).map(u32::from_be_bytes).ok_or_else(cut);
        let u64_at = |at| number(bytes, at).map(u64::from_be_bytes).ok_or_else(cut);
        if u32_at(0)? != 0x5146_49fb {
            return Err(corrupt("not a qcow2 image"));
        }
        let version = u32_at(4)?;
        if !(2..=3).contains(&version) {
            return Err(unsupported(format!("version {version}; versions 2 and 3 are known")));
        }
        match u32_at(32)? {
            0 => {}
            1 => return Err(unsupported("the image is encrypted (AES)")),
            2 => return Err(unsupported("the image is encrypted (LUKS)")),
            other => return Err(unsupported(format!("the image is encrypted (method {other})"))),
        }
        let (header_len, order, dirty) =
            if version == 2 { (72, 4, false) } else { Self::features(bytes, u64_at(72)?)? };
        if dirty && !write {
            return Err(corrupt(
                "its last writer did not close it: open it for writing once, or repair it with qemu-img check -r all",
            ));
        }
        if write && version == 2 {
            return Err(unsupported(
                "writing version 2, which cannot be marked as open; see qemu-img amend -o compat=1.1",
            ));
        }
        let snapshots = u32_at(60)?;
        if write && snapshots > 0 {
            return Err(unsupported(format!("writing beside {snapshots} internal snapshots; it can be read")));
        }
        let (bits, size) = (u32_at(20)?, u64_at(24)?);
        if !(9..=21).contains(&bits) {
            return Err(corrupt(format!("clusters of 2^{bits} bytes cannot be")));
        }
        if size == 0 || size % 512 != 0 || size > 1 << 62 {
            return Err(corrupt(format!(
                "{size} bytes are not a disk: a multiple of 512 is needed, at least one sector"
            )));
        }
        let cluster = 1u64 << bits;
        let within = |offset: u64, bytes: u64| {
            offset.is_multiple_of(cluster) && offset > 0 && offset.checked_add(bytes).is_some_and(|end| end <= len)
        };
        let (l1, l1_at) = (u64::from(u32_at(36)?) * 8, u64_at(40)?);
        if l1 > MAX_L1 || (l1 / 8).saturating_mul(cluster / 8).saturating_mul(cluster) < size || !within(l1_at, l1) {
            return Err(corrupt("its table of clusters (L1) cannot be"));
        }
        if write && narrow(cluster, order) {
            return Err(unsupported(format!(
                "writing reference counts of {} bits with clusters of {cluster} bytes; see qemu-img convert",
                1 << order
            )));
        }
        let (refcounts_at, refcounts) = (u64_at(48)?, u64::from(u32_at(56)?) * cluster);
        if refcounts == 0 || refcounts > MAX_REFCOUNT_TABLE || !within(refcounts_at, refcounts.min(cluster)) {
            return Err(corrupt("its table of reference counts cannot be"));
        }
        if version > 2 {
            let first = bytes.get(..bytes.len().min(cluster as usize)).unwrap_or_default();
            check_extensions(first, header_len)?;
        }
        let backing = Self::backing(bytes, u64_at(8)?, u32_at(16)?, header_len)?;
        let counts = Counts { at: refcounts_at, clusters: (refcounts / cluster) as u32, order };
        Ok(Self { size, cluster: cluster as u32, l1: L1Table { offset: l1_at, len: l1 }, counts, dirty, backing })
    }

    /// Bytes of tables that are kept in memory at most while the image is open.
    pub(super) fn tables(&self, write: bool) -> u64 {
        let cluster = u64::from(self.cluster);
        let counts = u64::from(self.counts.clusters) * cluster;
        let read = self.l1.len + (self.l1.len / 8).min(MAX_L2_TABLES) * cluster;
        if write { read + counts + (counts / 8).min(MAX_BLOCKS) * cluster } else { read }
    }

    /// Checks what only version 3 has; how long its header is, the order of its reference counts, and whether these are dirty.
    fn features(bytes: &[u8], incompatible: u64) -> Result<(usize, u32, bool)> {
        let cut = || corrupt("the file is too short for a qcow2 image");
        let order = number(bytes, 96).map(u32::from_be_bytes).ok_or_else(cut)?;
        let len = number(bytes, 100).map(u32::from_be_bytes).ok_or_else(cut)?;
        let refused = incompatible & !1;
        // The first one is enough to be refused.
        let lowest = (refused != 0).then(|| refused.trailing_zeros() as usize);
        match lowest.map(|bit| (bit, FEATURES.get(bit))) {
            None => {}
            Some((1, Some(name))) => {
                return Err(corrupt(format!("the image is marked {name:?}: repair it with qemu-img check -r all")));
            }
            Some((bit, Some(name))) => return Err(unsupported(format!("incompatible feature {name:?} (bit {bit})"))),
            Some((bit, None)) => return Err(unsupported(format!("unknown incompatible feature (bit {bit})"))),
        }
        if order > 6 || !(104..=4096).contains(&len) {
            return Err(corrupt("its header cannot be"));
        }
        Ok((len as usize, order, incompatible & 1 != 0))
    }

    fn backing(bytes: &[u8], at: u64, len: u32, header_len: usize) -> Result<Option<BackingName>> {
        if at == 0 {
            return Ok(None);
        }
        let (at, len) = (usize::try_from(at).unwrap_or(usize::MAX), len as usize);
        let name = bytes.get(at..at.saturating_add(len)).filter(|name| (1..=MAX_NAME).contains(&name.len()));
        let name = name.ok_or_else(|| corrupt("the name of its backing file cannot be"))?;
        let name =
            String::from_utf8(name.to_vec()).map_err(|_| unsupported("a backing file whose name is not UTF-8"))?;
        match extension(bytes, header_len, BACKING_FORMAT) {
            Some(b"raw") => Ok(Some(BackingName { name, format: Format::Raw })),
            Some(b"qcow2") => Ok(Some(BackingName { name, format: Format::Qcow2 })),
            Some(other) => {
                let other = String::from_utf8_lossy(other).into_owned();
                Err(unsupported(format!("backing file {name:?} is in format {other:?}; raw and qcow2 are known")))
            }
            // To look into the file would let a guest that wrote it choose.
            None => Err(unsupported(format!(
                "the image does not say in which format its backing file {name:?} is; see qemu-img rebase -u -F"
            ))),
        }
    }
}

/// Returns whether a count is too narrow for a table of reference counts that grows.
///
/// The crate counts the clusters of a table that grew, and relies on each count to be 0 before. When several blocks are
/// one in the file, the same count is raised again for each of them. The crate panics when a count overflows. The table
/// has 32 MiB at most. That is 8192 clusters of 4 KiB, and a block describes 8192 or more of those where a count has up
/// to 4 bits. Of 65,536 clusters of 512 bytes, counts of a byte or more are raised 129 times at most.
fn narrow(cluster: u64, order: u32) -> bool {
    order < 3 && cluster < 4096
}

/// A header extension (docs/interop/qcow2.txt, "Header extensions") and where the next one is.
struct Extension<'a> {
    kind: u32,
    data: &'a [u8],
    next: usize,
}

impl<'a> Extension<'a> {
    /// `None` when `bytes` end before it does.
    fn at(bytes: &'a [u8], at: usize) -> Option<Self> {
        let kind = u32::from_be_bytes(number(bytes, at)?);
        let len = u32::from_be_bytes(number(bytes, at + 4)?) as usize;
        let data = bytes.get(at + 8..(at + 8).checked_add(len)?)?;
        Some(Self { kind, data, next: at + 8 + len.next_multiple_of(8) })
    }
}

/// The data of a header extension.
fn extension(bytes: &[u8], mut at: usize, wanted: u32) -> Option<&[u8]> {
    loop {
        match Extension::at(bytes, at)? {
            Extension { kind: 0, .. } => return None,
            Extension { kind, data, .. } if kind == wanted => return Some(data),
            Extension { next, .. } => at = next,
        }
    }
}

/// Checks all header extensions in the first cluster, which the crate takes at the same places and trusts.
fn check_extensions(cluster: &[u8], mut at: usize) -> Result<()> {
    loop {
        let Some(Extension { kind, data, next }) = Extension::at(cluster, at) else {
            return Err(corrupt(format!("the header extension at {at} does not end within the header")));
        };
        match kind {
            0 => return Ok(()),
            FEATURE_NAMES if data.len() % FEATURE_NAME != 0 => {
                let len = data.len();
                return Err(corrupt(format!("its table of features' names ends within an entry: it has {len} bytes")));
            }
            BACKING_FORMAT if std::str::from_utf8(data).is_err() => {
                return Err(corrupt("the format of its backing file is not UTF-8"));
            }
            DATA_FILE if std::str::from_utf8(data).is_err() => {
                return Err(corrupt("the name of its external data file is not UTF-8"));
            }
            _ => at = next,
        }
    }
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}
