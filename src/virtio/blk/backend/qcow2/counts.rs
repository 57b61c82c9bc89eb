//! Checks the table of reference counts of an image before it is written.
//!
//! The crate looks for a free cluster count by count. A small image could keep it looking for ever: several table
//! entries may name one block, or blocks may describe clusters beyond the file's end. All clusters of a file of holes may
//! be counted. An offset of 0 means no block. The crate would put one into the first cluster, which nothing counts, and
//! make it again without end.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::header::Qcow2Header;
use super::rebuild::big_endian;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::next_data;

/// Clusters of an image to be written that may be used: 1 TiB of 64 KiB each. The crate goes past all of them for its first
/// free one, at a tenth of a microsecond each. It does so again when the guest has given back one in front of others.
const MAX_USED: u64 = 1 << 24;
/// Blocks of counts for clusters behind the end of the file. A writer that ran out of space leaves one or two behind.
const MAX_BEYOND: u64 = 4;

fn corrupt(problem: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Corrupt, format!("its table of reference counts cannot be: {problem}"))
}

/// Checks every entry of the table: one read of it, and one of each block that speaks of nothing in the file.
///
/// # Errors
/// `Corrupt` says what is wrong; as the host when the file cannot be read.
pub(super) fn check(file: &File, header: &Qcow2Header, len: u64) -> Result<()> {
    let cluster = u64::from(header.cluster);
    let bytes = u64::from(header.counts.clusters) * cluster;
    // What is cut off by the file's end reads as zeroes.
    let mut table = vec![0; usize::try_from(bytes.min(len.saturating_sub(header.counts.at))).unwrap_or(0)];
    file.read_exact_at(&mut table, header.counts.at)?;
    let a_block = (cluster * 8) >> header.counts.order;
    check_first(file, header, table.chunks_exact(8).next().map_or(0, big_endian))?;
    let (clusters, mut blocks, mut beyond) = (len.div_ceil(cluster), Vec::new(), 0);
    for (n, entry) in (0u64..).zip(table.chunks_exact(8)) {
        let at = big_endian(entry);
        if at == 0 {
            continue;
        }
        if !at.is_multiple_of(cluster) || at / cluster >= clusters {
            return Err(corrupt(format_args!("block {n} is said to be at {at}")));
        }
        blocks.push(at);
        if n * a_block >= clusters {
            beyond += 1;
            if beyond > MAX_BEYOND || !is_zero(file, at, cluster.min(len - at))? {
                return Err(corrupt(format_args!("block {n} counts clusters behind the end of the file")));
            }
        }
    }
    blocks.sort_unstable();
    if let Some(pair) = blocks.windows(2).find(|pair| matches!(pair, [a, b] if a == b)) {
        return Err(corrupt(format_args!("two of its blocks are at {}", pair.first().unwrap_or(&0))));
    }
    // Most images have too few counts for this, and their blocks are not read.
    if blocks.len() as u64 * a_block > MAX_USED {
        let (mut used, mut bytes) = (0, vec![0; header.cluster as usize]);
        for at in blocks {
            if next_data(file, at)?.is_none_or(|data| data - at >= cluster) {
                continue;
            }
            let there = usize::try_from(len - at).unwrap_or(usize::MAX).min(bytes.len());
            let there = bytes.get_mut(..there).unwrap_or_default();
            file.read_exact_at(there, at)?;
            used += in_use(there, header.counts.order);
            check_used(used)?;
        }
    }
    Ok(())
}

/// Refuses an image in which the crate would look too long for a free cluster.
///
/// # Errors
/// `Unsupported` says what makes it smaller.
pub(super) fn check_used(used: u64) -> Result<()> {
    if used > MAX_USED {
        let problem = format!(
            "qcow2: writing an image with more than {MAX_USED} clusters in use; it can be read, and qemu-img convert -O qcow2 -o \
             cluster_size=2M makes one with larger clusters"
        );
        return Err(Error::new(ErrorKind::Unsupported, problem));
    }
    Ok(())
}

/// How many counts of 2^order bits in these bytes are not 0.
fn in_use(bytes: &[u8], order: u32) -> u64 {
    let lowest = |byte: u8| match order {
        0 => byte,
        1 => (byte | byte >> 1) & 0x55,
        _ => (byte | byte >> 1 | byte >> 2 | byte >> 3) & 0x11,
    };
    if order < 3 {
        return bytes.iter().map(|byte| u64::from(lowest(*byte).count_ones())).sum();
    }
    bytes.chunks(1 << (order - 3)).filter(|count| count.iter().any(|byte| *byte != 0)).count() as u64
}

/// Checks that the first cluster, which is the header's, is counted in the block at `at`.
fn check_first(file: &File, header: &Qcow2Header, at: u64) -> Result<()> {
    let width = 1u32 << header.counts.order;
    let mut bytes = [0; 8];
    let (count, _) = bytes.split_at_mut(width.div_ceil(8) as usize);
    if at != 0 {
        file.read_exact_at(count, at).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => corrupt(format_args!("block 0 is said to be at {at}")),
            _ => e.into(),
        })?;
    }
    // Of counts smaller than a byte the first is its lowest bits.
    let mask = if width < 8 { (1u8 << width) - 1 } else { u8::MAX };
    if count.iter().all(|byte| byte & mask == 0) {
        return Err(corrupt("the header's own cluster is not counted"));
    }
    Ok(())
}

fn is_zero(file: &File, offset: u64, len: u64) -> Result<bool> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes.iter().all(|byte| *byte == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_read() {
        let bytes = [0b1000_0001, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0b0100_0000, 1, 1, 0];
        let used = [0, 1, 2, 3, 4, 5, 6].map(|order| in_use(&bytes, order));
        assert_eq!(used, [5, 5, 5, 4, 3, 2, 2]);
    }
}
