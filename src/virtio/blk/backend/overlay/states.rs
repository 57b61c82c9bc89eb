//! Where each cluster of an overlay is, read page by page as it is needed. Owned by the overlay.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::super::storage::Storage;
use super::format::{PAGE, PER_PAGE, STATES};

/// Pages that may be in memory: 4 MiB, the states of 64 GiB.
const MAX_STATE_PAGES: usize = 1024;
/// Changed pages after which they are written.
const MANY: usize = MAX_STATE_PAGES / 2;

/// Where a cluster's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClusterState {
    /// In the base.
    Base = 0,
    /// Here.
    Here = 1,
    /// Nowhere: it reads as zeroes whatever the base has.
    Zero = 2,
}

impl ClusterState {
    fn of(bits: u8) -> io::Result<Self> {
        match bits & 3 {
            0 => Ok(Self::Base),
            1 => Ok(Self::Here),
            2 => Ok(Self::Zero),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the overlay is damaged: a cluster has no state")),
        }
    }
}

#[derive(Debug)]
struct Page {
    bytes: Box<[u8]>,
    changed: bool,
}

/// The states that are in memory.
#[derive(Debug, Default)]
pub(super) struct States {
    pages: BTreeMap<u64, Page>,
    /// How many of them are not in the file as they are here.
    changed: usize,
}

impl States {
    fn page(&mut self, file: &dyn Storage, number: u64) -> io::Result<&mut Page> {
        if !self.pages.contains_key(&number) {
            if self.pages.len() >= MAX_STATE_PAGES {
                self.pages.retain(|_, page| page.changed);
            }
            let mut bytes = vec![0; PAGE].into_boxed_slice();
            file.read(&mut bytes, STATES + number * PAGE as u64)?;
            self.pages.insert(number, Page { bytes, changed: false });
        }
        self.pages.get_mut(&number).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The state of the first cluster, and how many of them have it from there on; at least one.
    pub(super) fn run(&mut self, file: &dyn Storage, clusters: Range<u64>) -> io::Result<(ClusterState, u64)> {
        let (mut at, mut found) = (clusters.start, None);
        while at < clusters.end {
            let page = self.page(file, at / PER_PAGE)?;
            let end = clusters.end.min((at / PER_PAGE + 1) * PER_PAGE);
            while at < end {
                let n = at % PER_PAGE;
                let byte = page.bytes.get(n as usize / 4).copied().unwrap_or_default();
                let state = ClusterState::of(byte >> (n % 4 * 2))?;
                match found {
                    Some(found) if found != state => return Ok((found, at - clusters.start)),
                    _ => found = Some(state),
                }
                at += 1;
            }
        }
        Ok((found.unwrap_or(ClusterState::Base), (at - clusters.start).max(1)))
    }

    /// How many of these are not here.
    pub(super) fn missing(&mut self, file: &dyn Storage, clusters: Range<u64>) -> io::Result<u64> {
        let (mut at, mut missing) = (clusters.start, 0);
        while at < clusters.end {
            let (state, count) = self.run(file, at..clusters.end)?;
            missing += if state == ClusterState::Here { 0 } else { count };
            at += count;
        }
        Ok(missing)
    }

    /// Sets the states of these, in memory.
    pub(super) fn set(&mut self, file: &dyn Storage, clusters: Range<u64>, state: ClusterState) -> io::Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            let page = self.page(file, at / PER_PAGE)?;
            let (end, mut changed) = (clusters.end.min((at / PER_PAGE + 1) * PER_PAGE), false);
            for n in at..end {
                let (n, shift) = (n % PER_PAGE, n % 4 * 2);
                if let Some(byte) = page.bytes.get_mut(n as usize / 4) {
                    let new = *byte & !(3 << shift) | (state as u8) << shift;
                    changed |= new != *byte;
                    *byte = new;
                }
            }
            let first = changed && !page.changed;
            page.changed |= changed;
            self.changed += usize::from(first);
            at = end;
        }
        Ok(())
    }

    pub(super) fn changed(&self) -> bool {
        self.changed > 0
    }

    /// Whether it is time to write what has changed.
    pub(super) fn many(&self) -> bool {
        self.changed >= MANY
    }

    /// Writes what has changed. What they speak of must be durable.
    pub(super) fn write(&mut self, file: &dyn Storage) -> io::Result<()> {
        for (number, page) in self.pages.iter_mut().filter(|(_, page)| page.changed) {
            file.write(&page.bytes, STATES + number * PAGE as u64)?;
            page.changed = false;
            self.changed -= 1;
        }
        Ok(())
    }
}
