//! A private, sparse file over a base that is only read. Owned by its disk's loop.
//!
//! The file holds what was written; all else is in the base. A cluster's state is never ahead of its bytes. A flush
//! makes the bytes durable, then writes the states, then makes those durable. So a loss of power leaves each sector as
//! it was at the last flush, or as it was written since.

mod format;
mod open;
#[cfg(test)]
mod power;
mod rewrite;
mod states;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;

use super::layer::{Layer, push};
use super::storage::{Storage, zeroes_to_guest};
use super::{BlockBackend, Extent, Geometry, front};

use crate::memory::{GuestMemory, Segment};
use crate::sys::{ForkGuard, Space};
use format::{CLUSTER, OverlayHeader};
#[cfg(any(test, feature = "internals"))]
pub(super) use format::{STATES, reseal};
pub(crate) use open::{BasePath, create};
pub(crate) use rewrite::{compact, flatten, freeze, rebase};
use states::{ClusterState, States};

/// Clusters that are given up at once: their states fit into memory.
const AT_ONCE: u64 = 64 * format::PER_PAGE;
/// Writes in flight that are remembered. More cannot be in a queue of the device.
const IN_FLIGHT: usize = 4096;

/// A write that the caller does itself, in places that it was given.
#[derive(Debug)]
struct InFlightWrite {
    offset: u64,
    len: u64,
    /// Clusters that it writes whole.
    whole: Range<u64>,
    /// What it may take up beyond what was there: part of the quota until it has ended.
    reserved: u64,
}

/// An open overlay.
#[derive(Debug)]
pub(crate) struct OverlayFile {
    /// Goes before the file.
    _guard: Option<ForkGuard>,
    file: Box<dyn Storage>,
    header: OverlayHeader,
    base: Box<dyn Layer>,
    states: States,
    /// Writes in flight to clusters that were not here.
    in_flight: Vec<InFlightWrite>,
    read_only: bool,
    /// Whether the file has a name, and can be read after a loss of power.
    durable: bool,
    /// A sync has failed, upon which the kernel forgets what it could not write: nothing is durable from then on.
    failed: bool,
    /// How many bytes it may take up.
    limit: u64,
    /// How many it takes up, at most, beside those that are reserved.
    allocated: u64,
    /// How many more the writes in flight may take up.
    reserved: u64,
}

impl OverlayFile {
    fn new(file: Box<dyn Storage>, header: OverlayHeader, base: Box<dyn Layer>) -> io::Result<Self> {
        let allocated = file.allocated()?;
        Ok(Self {
            _guard: file.fd().map(|fd| ForkGuard::new(&fd)),
            file,
            header,
            base,
            states: States::default(),
            in_flight: Vec::new(),
            read_only: false,
            durable: true,
            failed: false,
            limit: u64::MAX,
            allocated,
            reserved: 0,
        })
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only { Err(io::Error::from_raw_os_error(libc::EROFS)) } else { Ok(()) }
    }

    /// Where these bytes of the disk are in the file.
    fn place(&self, offset: u64) -> u64 {
        self.header.data + offset
    }

    /// All clusters that a range touches.
    fn touched(offset: u64, len: u64) -> Range<u64> {
        offset / CLUSTER..offset.saturating_add(len).div_ceil(CLUSTER)
    }

    /// The clusters of which nothing is outside the range. The disk's last one may be a piece.
    fn whole(&self, offset: u64, len: u64) -> Range<u64> {
        let (start, end) = (offset.div_ceil(CLUSTER), offset.saturating_add(len));
        let end = if end >= self.header.size { end.div_ceil(CLUSTER) } else { end / CLUSTER };
        start..end.max(start)
    }

    /// The state of the first bytes of a range, and how many they are.
    fn run(&mut self, offset: u64, len: u64) -> io::Result<(ClusterState, u64)> {
        let (state, count) = self.states.run(&*self.file, Self::touched(offset, len))?;
        Ok((state, ((offset / CLUSTER + count) * CLUSTER - offset).min(len)))
    }

    /// Calls `each` with every run of equal states, in order.
    fn runs(
        &mut self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&mut Self, ClusterState, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (state, len) = self.run(at, end - at)?;
            each(self, state, at, len)?;
            at += len;
        }
        Ok(())
    }

    /// Reads bytes of the disk.
    fn read_bytes(&mut self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let here = usize::try_from(self.header.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(to.len());
        let (mut rest, beyond) = to.split_at_mut(here);
        beyond.fill(0);
        self.runs(offset, here as u64, |disk, state, at, len| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(usize::try_from(len).unwrap_or(usize::MAX));
            rest = later;
            match state {
                ClusterState::Here => disk.file.read(now, disk.place(at)),
                ClusterState::Base => disk.base.read(now, at),
                ClusterState::Zero => {
                    now.fill(0);
                    Ok(())
                }
            }
        })
    }

    /// Makes sure that the range may be written in place, and that all that is in its clusters beside it is here. Says how many
    /// bytes more it takes up then.
    fn prepare(&mut self, offset: u64, len: u64) -> io::Result<u64> {
        self.writable()?;
        let touched = Self::touched(offset, len);
        let missing = self.states.missing(&*self.file, touched.clone())?;
        if missing == 0 {
            return Ok(0);
        }
        self.room_for(missing * CLUSTER)?;
        let whole = self.whole(offset, len);
        for cluster in [touched.start, touched.end - 1] {
            if !whole.contains(&cluster) {
                self.copy_up(cluster)?;
            }
        }
        Ok(missing * CLUSTER)
    }

    /// Copies a cluster here, unless a write in flight covers all of it.
    fn copy_up(&mut self, cluster: u64) -> io::Result<()> {
        let this = cluster..cluster + 1;
        let (state, _) = self.states.run(&*self.file, this.clone())?;
        if state == ClusterState::Here || self.in_flight.iter().any(|it| it.whole.contains(&cluster)) {
            return Ok(());
        }
        let mut bytes = [0; CLUSTER as usize];
        if state == ClusterState::Base {
            self.base.read(&mut bytes, cluster * CLUSTER)?;
        }
        self.file.write(&bytes, self.place(cluster * CLUSTER))?;
        self.states.set(&*self.file, this, ClusterState::Here)
    }

    /// Fails when so many bytes more are too many. What is in flight counts as if nothing of it had arrived.
    fn room_for(&mut self, more: u64) -> io::Result<()> {
        let more = self.reserved.saturating_add(more);
        if self.limit < self.allocated.saturating_add(more) {
            // What was counted beforehand may not have come, or holes were made.
            self.allocated = self.file.allocated()?;
            if self.limit < self.allocated.saturating_add(more) {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
        }
        Ok(())
    }

    /// Keeps what is in memory within bounds.
    fn trim(&mut self) -> io::Result<()> {
        if self.states.many() { self.persist() } else { Ok(()) }
    }

    fn persist(&mut self) -> io::Result<()> {
        self.sync()?;
        if self.states.changed() {
            self.states.write(&*self.file)?;
            self.sync()?;
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if !self.durable {
            return Ok(());
        }
        if self.failed {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let outcome = self.file.sync();
        self.failed = outcome.is_err();
        outcome
    }

    /// Sets clusters to zero, whatever the base has, and gives up their space.
    fn zero_clusters(&mut self, clusters: Range<u64>, keep: bool) -> io::Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            let (state, count) = self.states.run(&*self.file, at..clusters.end.min(at + AT_ONCE))?;
            let (place, len) = (self.place(at * CLUSTER), count * CLUSTER);
            match state {
                ClusterState::Zero => {}
                ClusterState::Here if keep => self.file.zero(place, len)?,
                ClusterState::Here => {
                    self.file.punch(place, len)?;
                    self.states.set(&*self.file, at..at + count, ClusterState::Zero)?;
                    self.allocated = self.allocated.saturating_sub(len);
                }
                ClusterState::Base => self.states.set(&*self.file, at..at + count, ClusterState::Zero)?,
            }
            at += count;
            self.trim()?;
        }
        Ok(())
    }

    /// Zeroes in a piece of one cluster.
    fn zero_piece(&mut self, piece: Range<u64>) -> io::Result<()> {
        let len = piece.end - piece.start;
        if self.run(piece.start, len)?.0 == ClusterState::Zero {
            return Ok(());
        }
        self.allocated += self.prepare(piece.start, len)?;
        let zeroes = [0; CLUSTER as usize];
        let zeroes = zeroes.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default();
        self.file.write(zeroes, self.place(piece.start))
    }
}

impl BlockBackend for OverlayFile {
    fn geometry(&self) -> Geometry {
        let discard = if self.read_only { 0 } else { CLUSTER as u32 };
        Geometry { len: self.header.size, read_only: self.read_only, discard }
    }

    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        let mut rest = segments.to_vec();
        let len = segments.iter().map(|s| s.len() as u64).sum();
        self.runs(offset, len, |disk, state, at, len| {
            let now = front(&mut rest, usize::try_from(len).unwrap_or(usize::MAX));
            match state {
                ClusterState::Here => disk.file.read_guest(memory, &now, disk.place(at)),
                ClusterState::Base => disk.base.read_guest(memory, &now, at),
                ClusterState::Zero => zeroes_to_guest(memory, &now),
            }
        })
    }

    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        let len = segments.iter().map(|s| s.len() as u64).sum();
        if len == 0 {
            return Ok(());
        }
        self.allocated += self.prepare(offset, len)?;
        self.file.write_guest(memory, segments, self.place(offset))?;
        self.states.set(&*self.file, Self::touched(offset, len), ClusterState::Here)?;
        self.trim()
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.read_only || !self.durable { Ok(()) } else { self.persist() }
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.writable()?;
        self.zero_clusters(self.whole(offset, len), false)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.writable()?;
        let (whole, end) = (self.whole(offset, len), offset + len);
        if whole.is_empty() {
            // Pieces of one cluster, or of two.
            let middle = offset.next_multiple_of(CLUSTER).clamp(offset, end);
            return [offset..middle, middle..end]
                .into_iter()
                .filter(|p| !p.is_empty())
                .try_for_each(|p| self.zero_piece(p));
        }
        let (first, last) = (whole.start * CLUSTER, whole.end * CLUSTER);
        if offset < first {
            self.zero_piece(offset..first)?;
        }
        if last < end {
            self.zero_piece(last..end)?;
        }
        self.zero_clusters(whole, !unmap)
    }

    fn grow(&mut self, len: u64) -> io::Result<()> {
        self.writable()?;
        if len < self.header.size || len > self.header.most() || !len.is_multiple_of(512) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let larger = OverlayHeader { size: len, ..self.header.clone() };
        self.file.set_len(larger.file_len())?;
        self.sync()?;
        self.file.write(&larger.sector(), 0)?;
        self.header = larger;
        self.sync()
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn extents(&mut self, write: bool, offset: u64, len: u64, found: &mut Vec<Extent>) -> Option<io::Result<()>> {
        let fd = self.file.fd()?;
        if !write {
            return Some(self.list(offset, len, found));
        }
        let prepared = self.prepare(offset, len).and_then(|reserved| {
            if reserved > 0 {
                if self.in_flight.len() >= IN_FLIGHT {
                    return Err(io::Error::from_raw_os_error(libc::EAGAIN));
                }
                self.reserved += reserved;
                self.in_flight.push(InFlightWrite { offset, len, whole: self.whole(offset, len), reserved });
            }
            found.push(Extent::File { fd, offset: self.place(offset), len });
            Ok(())
        });
        Some(prepared)
    }

    fn write_done(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write_failed(offset, len);
        // What is beside the range in its clusters was copied before, or is being written by a request that this one overlaps.
        self.states.set(&*self.file, Self::touched(offset, len), ClusterState::Here)?;
        self.trim()
    }

    fn write_failed(&mut self, offset: u64, len: u64) {
        if let Some(n) = self.in_flight.iter().position(|it| (it.offset, it.len) == (offset, len)) {
            let ended = self.in_flight.swap_remove(n);
            self.reserved = self.reserved.saturating_sub(ended.reserved);
            // All of it, whatever has arrived: that is counted again before anything is refused.
            self.allocated = self.allocated.saturating_add(ended.reserved);
        }
    }

    fn sync_fd(&self) -> Option<RawFd> {
        None
    }

    fn takes(&mut self, offset: u64, len: u64) -> io::Result<u64> {
        Ok(self.states.missing(&*self.file, Self::touched(offset, len))? * CLUSTER)
    }

    fn space(&self) -> io::Result<Option<Space>> {
        if self.read_only { Ok(None) } else { self.file.space().map(Some) }
    }
}

impl OverlayFile {
    fn list(&mut self, offset: u64, len: u64, found: &mut Vec<Extent>) -> io::Result<()> {
        let fd = self.file.fd().ok_or(io::ErrorKind::Unsupported)?;
        self.runs(offset, len, |disk, state, at, len| match state {
            ClusterState::Base => disk.base.extents(at, len, found),
            ClusterState::Here => {
                push(found, Extent::File { fd, offset: disk.place(at), len });
                Ok(())
            }
            ClusterState::Zero => {
                push(found, Extent::Zeroes { len });
                Ok(())
            }
        })
    }
}

/// A frozen overlay is a base.
impl Layer for OverlayFile {
    fn len(&self) -> u64 {
        self.header.size
    }

    fn read(&mut self, to: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_bytes(to, offset)
    }

    fn read_guest(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        let mut beyond = segments.to_vec();
        let here = usize::try_from(self.header.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let here = front(&mut beyond, here);
        BlockBackend::read(self, memory, &here, offset)?;
        zeroes_to_guest(memory, &beyond)
    }

    fn extents(&mut self, offset: u64, len: u64, found: &mut Vec<Extent>) -> io::Result<()> {
        let here = self.header.size.saturating_sub(offset).min(len);
        self.list(offset, here, found)?;
        if here < len {
            push(found, Extent::Zeroes { len: len - here });
        }
        Ok(())
    }
}
