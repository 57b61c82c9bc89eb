//! [`Seal`]: the last block of a prepared disk, which shows damage. It lies behind the file system.
//!
//! It guards against broken storage and interrupted copies. Against people, the directory's permissions guard.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use flate2::Crc;

use super::DISK_VERSION;
use super::budget::PrepareDeadline;
use crate::error::{Error, ErrorKind, Result};
use crate::sys;

pub(super) const LEN: u64 = 4096;
/// How all versions begin.
const ANY_VERSION: &[u8] = b"cofferdam disk ";
/// The version of this release, the end of [`DISK_VERSION`], for names.
pub(super) const VERSION: char = match DISK_VERSION {
    [.., last] => last as char,
};
const _: () = assert!(DISK_VERSION.len() == ANY_VERSION.len() + 1, "a version is one character");
const BLOCK: usize = 4096;
const BUFFER: usize = 1 << 20;

/// How long the disk is, and the sum of what is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seal {
    len: u64,
    sum: u32,
}

impl Seal {
    /// Of a disk that has none yet.
    pub(super) fn of(file: &File, deadline: &PrepareDeadline) -> Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { len, sum: sum(file, len, deadline)? })
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::from(DISK_VERSION);
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.sum.to_le_bytes());
        bytes.resize(LEN as usize, 0);
        bytes
    }

    /// Puts it behind the disk.
    pub(super) fn write(self, file: &File) -> io::Result<()> {
        file.write_all_at(&self.to_bytes(), self.len)
    }
}

/// Whether another version has written a disk. This one cannot say whether it is whole.
pub(super) fn is_foreign(file: &File) -> io::Result<bool> {
    let Some(len) = file.metadata()?.len().checked_sub(LEN) else {
        return Ok(false);
    };
    let mut found = [0; DISK_VERSION.len()];
    file.read_exact_at(&mut found, len)?;
    Ok(found.starts_with(ANY_VERSION) && found != DISK_VERSION)
}

/// Whether a disk has a seal of its length. Reads the seal alone.
pub(super) fn is_there(file: &File) -> io::Result<bool> {
    let Some(len) = file.metadata()?.len().checked_sub(LEN) else {
        return Ok(false);
    };
    let mut found = [0; DISK_VERSION.len() + 8];
    file.read_exact_at(&mut found, len)?;
    Ok(found.strip_prefix(&DISK_VERSION) == Some(&len.to_le_bytes()))
}

/// Whether a disk is as it was when it was sealed. Reads all of it.
pub(super) fn holds(file: &File, deadline: &PrepareDeadline) -> Result<bool> {
    let Some(len) = file.metadata()?.len().checked_sub(LEN) else {
        return Ok(false);
    };
    let mut found = vec![0; LEN as usize];
    if file.read_exact_at(&mut found, len).is_err() || !found.starts_with(&DISK_VERSION) {
        return Ok(false);
    }
    match sum(file, len, deadline) {
        Ok(sum) => Ok(Seal { len, sum }.to_bytes() == found),
        // A block that storage cannot read is damage too.
        Err(error) if matches!(error.kind(), ErrorKind::Io | ErrorKind::Corrupt) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The sum of all blocks that are not zeros and of where they are. That a file system keeps some as holes makes no difference.
fn sum(file: &File, len: u64, deadline: &PrepareDeadline) -> Result<u32> {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    let mut crc = Crc::new();
    let mut buffer = vec![0; BUFFER];
    let mut end = 0;
    while let Some(extent) = next_extent(file, end, len)? {
        end = extent.end;
        for at in extent.step_by(BUFFER) {
            deadline.check()?;
            let room = usize::try_from(end - at).unwrap_or(BUFFER).min(BUFFER);
            let piece = buffer.get_mut(..room).unwrap_or_default();
            file.read_exact_at(piece, at).map_err(Error::from)?;
            for (n, block) in piece.chunks(BLOCK).enumerate() {
                if Some(block) != ZEROS.get(..block.len()) {
                    crc.update(&(at + (n * BLOCK) as u64).to_le_bytes());
                    crc.update(block);
                }
            }
        }
    }
    Ok(crc.sum())
}

/// The next blocks that are not a hole, from a block's beginning on. Never empty.
fn next_extent(file: &File, from: u64, len: u64) -> io::Result<Option<Range<u64>>> {
    let block = BLOCK as u64;
    let Some(data) = sys::next_data(file, from)?.filter(|data| *data < len) else {
        return Ok(None);
    };
    let hole = sys::next_hole(file, data)?.unwrap_or(len).max(data + 1);
    Ok(Some(data / block * block..hole.checked_next_multiple_of(block).unwrap_or(len).min(len)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_are_not_read() {
        let file = sys::temp_file(&std::env::temp_dir()).unwrap();
        let len = 8 << 20;
        file.set_len(len).unwrap();
        (0..8).for_each(|n| file.write_all_at(&[1; BLOCK], n << 20).unwrap());
        let (mut at, mut read) = (0, 0);
        while let Some(extent) = next_extent(&file, at, len).unwrap() {
            at = extent.end;
            read += extent.end - extent.start;
        }
        assert_eq!(read, 8 * BLOCK as u64);
    }
}
