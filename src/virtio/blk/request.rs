//! Requests of the driver (Virtio 1.3, 5.2.6). A descriptor chain becomes [`BlkRequest`] whose every range exists.

use super::SECTOR;
use super::backend::Geometry;
use super::policy::DiskOperation;
use crate::virtio::{Chain, Span, TooShort};

/// The largest range of one discard, in sectors.
pub(super) const MAX_DISCARD: u32 = 1 << 22;
/// The largest range of zeroes, in sectors: the host may have to write them.
pub(super) const MAX_ZEROES: u32 = 1 << 18;
/// Ranges in one request of either type.
pub(super) const MAX_RANGES: u32 = 32;
/// Bytes that are moved in one stage of a request. What drivers send is less, unless they mean harm.
pub(super) const STAGE: u64 = 2 << 20;
/// The name that a driver may ask for (Virtio 1.3, 5.2.6, VIRTIO_BLK_T_GET_ID).
pub(super) const ID_LEN: usize = 20;

/// Request types (Virtio 1.3, 5.2.6). Everything else is unsupported: lifetimes (10), secure erase (14), zones.
mod kind {
    pub(super) const READ: u32 = 0;
    pub(super) const WRITE: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// "unmap" in the flags of a range (Virtio 1.3, 5.2.6); all others are reserved.
const UNMAP: u32 = 1;

/// What is limited apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum IoDirection {
    Read,
    Write,
}

/// A part of the disk, in bytes, which exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskRange {
    pub offset: u64,
    pub len: u64,
    /// For zeroes: the space may go.
    pub unmap: bool,
}

/// What is to be done; the data's place in the request's chain included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BlkRequest {
    Read { offset: u64, to: Span, len: usize },
    Write { offset: u64, from: Span, len: usize },
    Flush,
    Discard(Vec<DiskRange>),
    WriteZeroes(Vec<DiskRange>),
    GetId,
}

/// Why a request cannot be done, by the guest's mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// It makes no sense, or names sectors that do not exist.
    Malformed,
    /// Its type is not offered.
    Unsupported,
}

impl From<TooShort> for Refused {
    fn from(_: TooShort) -> Self {
        Self::Malformed
    }
}

/// What a request does, and to which bytes of the disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestSummary {
    pub operation: DiskOperation,
    pub offset: u64,
    pub len: u64,
}

impl BlkRequest {
    /// Takes a request apart. `data` is the number of writable bytes before the status.
    pub(super) fn parse(chain: &mut Chain, data: usize, shape: &Geometry) -> Result<Self, Refused> {
        let [a, b, c, d, _, _, _, _, sector @ ..] = chain.read::<16>()?;
        let sector = u64::from_le_bytes(sector);
        let work = match u32::from_le_bytes([a, b, c, d]) {
            kind::READ => {
                let offset = locate(shape, sector, data as u64)?;
                Self::Read { offset, to: chain.take_writable(data), len: data }
            }
            kind::WRITE => {
                let len = chain.readable_len();
                let offset = locate(shape, sector, len as u64)?;
                Self::Write { offset, from: chain.take_readable(len), len }
            }
            kind::FLUSH => Self::Flush,
            kind::GET_ID if data >= ID_LEN => Self::GetId,
            kind::GET_ID => return Err(Refused::Malformed),
            kind::DISCARD if shape.discard > 0 => Self::Discard(ranges(chain, shape, MAX_DISCARD, 0)?),
            kind::WRITE_ZEROES if !shape.read_only => Self::WriteZeroes(ranges(chain, shape, MAX_ZEROES, UNMAP)?),
            _ => return Err(Refused::Unsupported),
        };
        // "VIRTIO_BLK_S_IOERR … for a write request if the VIRTIO_BLK_F_RO feature is offered, and MUST NOT write any data"
        // (Virtio 1.3, 5.2.6.2).
        match shape.read_only && work.direction() == Some(IoDirection::Write) {
            true => Err(Refused::Malformed),
            false => Ok(work),
        }
    }

    /// Which limits apply; `None` for what is never held back.
    pub(super) fn direction(&self) -> Option<IoDirection> {
        match self {
            Self::Read { .. } => Some(IoDirection::Read),
            Self::Write { .. } | Self::Discard(_) | Self::WriteZeroes(_) => Some(IoDirection::Write),
            Self::Flush | Self::GetId => None,
        }
    }

    /// All bytes that it is about.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => *len as u64,
            Self::Discard(ranges) | Self::WriteZeroes(ranges) => ranges.iter().map(|range| range.len).sum(),
            Self::Flush | Self::GetId => 0,
        }
    }

    /// What is done at once when so many bytes are done: a piece of the data, or of a range; `plain` zeroes are written.
    pub(super) fn stage(&self, done: u64, plain: bool) -> DiskRange {
        match self {
            Self::Read { offset, len, .. } | Self::Write { offset, len, .. } => {
                DiskRange { offset: offset + done, len: (*len as u64 - done).min(STAGE), unmap: false }
            }
            Self::Discard(ranges) | Self::WriteZeroes(ranges) => {
                let mut before = 0;
                let this = ranges.iter().find(|range| {
                    before += range.len;
                    done < before
                });
                let Some(range) = this else { return DiskRange { offset: 0, len: 0, unmap: false } };
                let left = before - done;
                let len = if plain { left.min(STAGE) } else { left };
                DiskRange { offset: range.offset + range.len - left, len, unmap: range.unmap }
            }
            Self::Flush | Self::GetId => DiskRange { offset: 0, len: 0, unmap: false },
        }
    }

    /// Bytes that move.
    pub(super) fn data_len(&self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => *len as u64,
            _ => 0,
        }
    }

    /// Returns what an error message says of the request.
    pub(super) fn describe(&self) -> RequestSummary {
        let summary = |operation, offset, len| RequestSummary { operation, offset, len };
        let all = |operation, ranges: &[DiskRange]| {
            summary(operation, ranges.first().map_or(0, |r| r.offset), ranges.iter().map(|r| r.len).sum())
        };
        match self {
            Self::Read { offset, len, .. } => summary(DiskOperation::Read, *offset, *len as u64),
            Self::Write { offset, len, .. } => summary(DiskOperation::Write, *offset, *len as u64),
            Self::Flush => summary(DiskOperation::Flush, 0, 0),
            Self::GetId => summary(DiskOperation::Read, 0, 0),
            Self::Discard(ranges) => all(DiskOperation::Discard, ranges),
            Self::WriteZeroes(ranges) => all(DiskOperation::WriteZeroes, ranges),
        }
    }
}

/// The byte offset of `len` bytes at `sector`, all of which exist.
fn locate(shape: &Geometry, sector: u64, len: u64) -> Result<u64, Refused> {
    let offset = sector.checked_mul(SECTOR).ok_or(Refused::Malformed)?;
    let end = offset.checked_add(len).ok_or(Refused::Malformed)?;
    if !len.is_multiple_of(SECTOR) || end > shape.len { Err(Refused::Malformed) } else { Ok(offset) }
}

/// The ranges that a discard or a request for zeroes consists of (Virtio 1.3, 5.2.6, virtio_blk_discard_write_zeroes). All
/// are looked at before anything is done.
fn ranges(chain: &mut Chain, shape: &Geometry, max: u32, known: u32) -> Result<Vec<DiskRange>, Refused> {
    let len = chain.readable_len();
    if len == 0 || !len.is_multiple_of(16) || len / 16 > MAX_RANGES as usize {
        return Err(Refused::Malformed);
    }
    let mut found = Vec::with_capacity(len / 16);
    while chain.readable_len() > 0 {
        let sector = u64::from_le_bytes(chain.read()?);
        let count = u32::from_le_bytes(chain.read()?);
        let flags = u32::from_le_bytes(chain.read()?);
        // "MUST set the status byte to VIRTIO_BLK_S_UNSUPP … if any unknown flag is set"; for discards the unmap flag too
        // (Virtio 1.3, 5.2.6.2).
        if flags & !known != 0 {
            return Err(Refused::Unsupported);
        }
        if count > max {
            return Err(Refused::Malformed);
        }
        let len = u64::from(count) * SECTOR;
        found.push(DiskRange { offset: locate(shape, sector, len)?, len, unmap: flags & UNMAP != 0 });
    }
    Ok(found)
}
