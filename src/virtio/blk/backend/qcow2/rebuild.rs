//! Makes an image's reference counts anew, when its last writer did not close it.
//!
//! Runs before the image is used. The counts in the file may be behind its tables: data that the tables know may be
//! taken for free. What the tables say is durable, so the counts are made from them, into new clusters at the end of
//! the file. Then a write of one sector points the header there. A loss of power in between leaves the image as it was.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::header::{Counts, L1Table, Qcow2Header};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::next_data;

/// Clusters of a file that are counted at most: the counting takes 128 MiB of memory for them, whatever the tables say.
const MAX_CLUSTERS: u64 = 1 << 26;
/// Of an entry of the tables, where it points (QEMU, docs/interop/qcow2.txt, "L1 table entry").
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;

/// Where the header names features that a write by an unaware program invalidates.
const AUTOCLEAR: u64 = 88;

fn corrupt(problem: String) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{problem}: its reference counts cannot be made again"))
}

/// How often every cluster is used.
struct Uses {
    cluster: u64,
    /// Clusters of the file; the last may be cut off.
    clusters: u64,
    /// Of each cluster. More than one use only compressed data has.
    counts: Vec<u16>,
}

impl Uses {
    /// Counts one use of every cluster of these bytes, which are in the file.
    fn count(&mut self, place: &TableExtent) -> Result<()> {
        for cluster in place.offset / self.cluster..(place.offset + place.len).div_ceil(self.cluster) {
            let count = usize::try_from(cluster).ok().and_then(|n| self.counts.get_mut(n));
            // Behind the end is only the rest of the last cluster.
            let Some(count) = count else { break };
            if *count > 0 && !place.compressed {
                return Err(corrupt(format!("what is at {} overlaps with something else", place.offset)));
            }
            let more = || corrupt(format!("what is at {} shares a cluster with too much else", place.offset));
            *count = count.checked_add(1).ok_or_else(more)?;
        }
        Ok(())
    }

    fn of(&self, cluster: u64) -> u64 {
        usize::try_from(cluster).ok().and_then(|n| self.counts.get(n)).copied().unwrap_or(0).into()
    }
}

/// What an entry of a table points to.
struct TableExtent {
    offset: u64,
    len: u64,
    compressed: bool,
}

impl TableExtent {
    /// By an entry of an L2 table (docs/interop/qcow2.txt, "Standard" and "Compressed Cluster Descriptor"), or one of L1, which
    /// looks the same. `None` for one that points nowhere.
    fn of(entry: u64, cluster: u64, l2: bool) -> Result<Option<Self>> {
        if l2 && entry & COMPRESSED != 0 {
            let bits = 62 - (cluster.trailing_zeros() - 8);
            let (offset, sectors) = (entry & ((1 << bits) - 1), (entry & (COMPRESSED - 1)) >> bits);
            // So many sectors beyond the one in which it begins.
            return Ok(Some(Self { offset, len: (sectors + 1) * 512 - offset % 512, compressed: true }));
        }
        let offset = entry & OFFSET;
        if !offset.is_multiple_of(cluster) {
            return Err(corrupt(format!("what is at {offset} begins within a cluster")));
        }
        Ok((offset != 0).then_some(Self { offset, len: cluster, compressed: false }))
    }
}

/// Makes the reference counts of an image anew that is open for writing, and returns how many clusters are used.
///
/// # Errors
/// `Corrupt` when its tables cannot be right, and the file is untouched; as the host when it cannot be read or written.
pub(super) fn rebuild_refcounts(file: &File, header: &Qcow2Header) -> Result<u64> {
    let cluster = u64::from(header.cluster);
    let len = file.metadata()?.len();
    let clusters = len.div_ceil(cluster);
    if clusters > MAX_CLUSTERS {
        let problem = format!(
            "it has {clusters} clusters, of which at most {MAX_CLUSTERS} are counted again; see qemu-img check -r all"
        );
        return Err(Error::new(ErrorKind::Unsupported, problem));
    }
    let mut uses = Uses { cluster, clusters, counts: vec![0; usize::try_from(clusters).unwrap_or(usize::MAX)] };
    for (offset, len) in [(0, cluster), (header.l1.offset, header.l1.len)] {
        uses.count(&TableExtent { offset, len, compressed: false })?;
    }
    let mut lost = false;
    walk(file, header, len, |place| {
        if place.offset >= len {
            lost = true;
        } else {
            uses.count(place)?;
        }
        Ok(Keep::Yes)
    })?;
    if lost {
        forget(file, header, len).doing(|| "forgetting clusters that never came to be")?;
    }
    write(file, header, &uses).doing(|| "writing new reference counts")?;
    Ok(uses.counts.iter().filter(|count| **count > 0).count() as u64)
}

/// Whether an entry goes on to point where it does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Yes,
    No,
}

/// Calls `each` with what every entry points to that points somewhere. A table is written once, when some are not kept.
fn walk(file: &File, header: &Qcow2Header, len: u64, mut each: impl FnMut(&TableExtent) -> Result<Keep>) -> Result<()> {
    let cluster = u64::from(header.cluster);
    let L1Table { offset: l1_at, len: l1_len } = header.l1;
    let mut l1 = vec![0; usize::try_from(l1_len).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut l1, l1_at)?;
    let (mut l2, mut l1_changed) = (vec![0; header.cluster as usize], false);
    for entry in l1.chunks_exact_mut(8) {
        let Some(table) = TableExtent::of(big_endian(entry), cluster, false)? else { continue };
        if each(&table)? == Keep::No {
            entry.fill(0);
            l1_changed = true;
        }
        // A table that is a hole points nowhere. That of a file which is all holes would take long to be read.
        if table.offset >= len || next_data(file, table.offset)?.is_none_or(|at| at - table.offset >= cluster) {
            continue;
        }
        // What is cut off by the file's end reads as zeroes.
        let there_len = usize::try_from(len - table.offset).unwrap_or(usize::MAX).min(l2.len());
        let (there, cut) = l2.split_at_mut(there_len);
        file.read_exact_at(there, table.offset)?;
        cut.fill(0);
        let mut changed = false;
        for entry in l2.chunks_exact_mut(8) {
            let Some(place) = TableExtent::of(big_endian(entry), cluster, true)? else { continue };
            if each(&place)? == Keep::No {
                entry.fill(0);
                changed = true;
            }
        }
        if let Some(there) = l2.get(..there_len).filter(|_| changed) {
            file.write_all_at(there, table.offset)?;
        }
    }
    if l1_changed {
        file.write_all_at(&l1, l1_at)?;
    }
    Ok(())
}

/// Entries that point behind the file's end were written when what they point to was not yet: it never was durable.
fn forget(file: &File, header: &Qcow2Header, len: u64) -> Result<()> {
    walk(file, header, len, |place| Ok(if place.offset < len { Keep::Yes } else { Keep::No }))?;
    Ok(file.sync_data()?)
}

pub(super) fn big_endian(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Writes the counts behind all else, and points to them.
fn write(file: &File, header: &Qcow2Header, uses: &Uses) -> Result<()> {
    let (cluster, width) = (uses.cluster, 1u64 << header.counts.order);
    let a_block = cluster * 8 / width;
    // The blocks and their table are counted themselves.
    let (mut blocks, mut table) = (1, 1);
    loop {
        let needed = (uses.clusters + blocks + table).div_ceil(a_block);
        let larger = (needed * 8).div_ceil(cluster);
        if (needed, larger) == (blocks, table) {
            break;
        }
        (blocks, table) = (needed, larger);
    }
    let (table_at, end) = (uses.clusters, uses.clusters + table + blocks);
    if table * cluster > super::header::MAX_REFCOUNT_TABLE {
        return Err(corrupt(format!("{end} clusters are too many")));
    }
    let mut offsets = vec![0; usize::try_from(table * cluster).unwrap_or(0)];
    for (n, entry) in (0..blocks).zip(offsets.chunks_exact_mut(8)) {
        let at = (table_at + table + n) * cluster;
        entry.copy_from_slice(&at.to_be_bytes());
        let counts =
            (n * a_block..(n + 1) * a_block).map(|c| if (table_at..end).contains(&c) { 1 } else { uses.of(c) });
        file.write_all_at(&packed(counts, width)?, at)?;
    }
    file.write_all_at(&offsets, table_at * cluster)?;
    // What others have noted beside the tables (bitmaps of what was written) was not counted and is out of date.
    file.write_all_at(&[0; 8], AUTOCLEAR)?;
    file.sync_data()?;
    let clusters = u32::try_from(table).unwrap_or(u32::MAX);
    file.write_all_at(&Counts { at: table_at * cluster, clusters, ..header.counts }.bytes(), Counts::AT)?;
    Ok(file.sync_data()?)
}

/// Counts as they lie in a block: big-endian, those smaller than a byte from its lowest bit on.
fn packed(counts: impl Iterator<Item = u64>, width: u64) -> Result<Vec<u8>> {
    let (mut bytes, mut filled) = (Vec::new(), 8);
    for count in counts {
        if width < 64 && count >> width != 0 {
            return Err(corrupt(format!("{count} uses of one cluster do not fit into {width} bits")));
        }
        if width >= 8 {
            bytes.extend(count.to_be_bytes().iter().skip(8 - (width / 8) as usize));
            continue;
        }
        if filled == 8 {
            bytes.push(0);
            filled = 0;
        }
        if let Some(last) = bytes.last_mut() {
            *last |= (count as u8) << filled;
        }
        filled += width;
    }
    Ok(bytes)
}
