//! [`OrderedFile`]: the file below an image of the crate imago, with barriers between its writes.
//!
//! The crate writes tables when its memory for them is full, and pointers to tables at once, with no sync before. After
//! a loss of power a table could name a cluster that holds something else. Data would be lost that no writer had
//! touched. So no table goes to stable storage before what it refers to.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

use super::ForkGuard;

#[cfg(test)]
pub(crate) mod record;

/// The fields of the header that the crate writes while an image is open: where they are and their bytes. It writes all that
/// version 2 has (QEMU, docs/interop/qcow2.txt).
const FIELDS: (u64, u64) = (0, 72);

/// What is in flight, as only the caller of the crate can know it. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct WriteOrder(Arc<Mutex<WriteOrderState>>);

#[derive(Debug, Default)]
struct WriteOrderState {
    /// Where the bytes that are written for the guest lie in this process.
    guest: Range<usize>,
    /// The crate writes all that it has in memory, and everything that this speaks of is on stable storage.
    flushing: bool,
    /// Something was written since the last sync.
    pending: bool,
    /// The image is open, so that of its first cluster only fields of the header change.
    keeps_header: bool,
    /// A sync has failed. The host reports that only once, so no later one can be believed.
    failed: bool,
}

impl WriteOrder {
    fn state<R>(&self, f: impl FnOnce(&mut WriteOrderState) -> R) -> R {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `f`, which writes `bytes`, as they are here, for the guest.
    pub(crate) fn writing<R>(&self, bytes: &[u8], f: impl FnOnce() -> R) -> R {
        let range = bytes.as_ptr_range();
        self.state(|state| state.guest = range.start.addr()..range.end.addr());
        let answer = f();
        self.state(|state| state.guest = 0..0);
        answer
    }

    /// Keeps the image's first cluster, which is the header's, from all else that is written from now on.
    ///
    /// A hostile image may name that cluster as data, or not count it, so that the crate takes it for free.
    pub(crate) fn keep_header(&self) {
        self.state(|state| state.keeps_header = true);
    }

    /// Calls `f`, which writes tables that speak only of what was synced.
    pub(crate) fn flushing<R>(&self, f: impl FnOnce() -> R) -> R {
        self.state(|state| state.flushing = true);
        let answer = f();
        self.state(|state| state.flushing = false);
        answer
    }
}

/// An image's file.
#[derive(Debug)]
pub(crate) struct OrderedFile {
    // Goes before the file.
    _guard: ForkGuard,
    file: File,
    cluster: u64,
    order: WriteOrder,
}

impl OrderedFile {
    /// That of an image with clusters of `cluster` bytes.
    pub(crate) fn new(file: std::fs::File, write: bool, cluster: u64, order: WriteOrder) -> io::Result<Self> {
        let guard = ForkGuard::new(&file);
        Ok(Self {
            _guard: guard,
            file: File::from_open_file(file, StorageOpenOptions::new().write(write))?,
            cluster,
            order,
        })
    }

    /// Does what must come before a write of `len` bytes at `offset`; `guest` says whether they are the guest's.
    ///
    /// Tables are whole clusters, pointers to them are smaller than a sector, and the header is at the front. What is
    /// copied into a new cluster around the guest's bytes is sectors, and never the whole cluster.
    fn before(&self, offset: u64, len: u64, guest: bool) -> io::Result<()> {
        if guest || (offset, len) != FIELDS {
            self.check_header(offset)?;
        }
        if !guest && (offset == 0 || len.is_multiple_of(self.cluster) || !len.is_multiple_of(512)) {
            self.settle()?;
        }
        self.order.state(|state| state.pending = true);
        Ok(())
    }

    fn check_header(&self, offset: u64) -> io::Result<()> {
        if offset < self.cluster && self.order.state(|state| state.keeps_header) {
            log::warn!("a qcow2 image is damaged: it has its own header among its data or free clusters");
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    /// Syncs what was written since the last sync.
    fn settle(&self) -> io::Result<()> {
        if self.order.state(|state| state.pending && !state.flushing) { self.sync() } else { Ok(()) }
    }
}

impl fmt::Display for OrderedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

impl Storage for OrderedFile {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: our caller has promised what is asked for.
        unsafe { self.file.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let parts = bufv.into_inner();
        let first = parts.first().map_or(0, |part| part.as_ptr().addr());
        let bufv = IoVector::from(parts);
        let guest = self.order.state(|state| state.guest.contains(&first));
        self.before(offset, bufv.len(), guest)?;
        #[cfg(test)]
        record::wrote(offset, &record::bytes(&bufv));
        // SAFETY: as above.
        unsafe { self.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before(offset, length, false)?;
        #[cfg(test)]
        record::wrote(offset, &vec![0; length as usize]);
        // SAFETY: as above.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before(offset, length, false)?;
        #[cfg(test)]
        record::wrote(offset, &vec![0; length as usize]);
        // SAFETY: as above.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_header(offset)?;
        // What pointed there must be gone before.
        self.settle()?;
        self.order.state(|state| state.pending = true);
        #[cfg(test)]
        record::wrote(offset, &vec![0; length as usize]);
        // SAFETY: as above.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        if self.order.state(|state| state.failed) {
            return Err(io::Error::other("a sync has failed before, so what was written then may be lost"));
        }
        let outcome = self.file.sync();
        self.order.state(|state| (state.pending, state.failed) = (outcome.is_err(), outcome.is_err()));
        outcome?;
        #[cfg(test)]
        record::synced();
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, new_size: u64, prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(new_size, prealloc_mode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;

    #[test]
    fn syncs_fail_after_a_failed_sync() {
        // Which cannot be synced (fsync(2), EINVAL).
        let file = OpenOptions::new().read(true).write(true).open("/proc/self/comm").unwrap();
        let file = OrderedFile::new(file, true, 512, WriteOrder::default()).unwrap();
        file.before(512, 512, true).unwrap();
        assert_eq!(file.before(1024, 512, false).unwrap_err().raw_os_error(), Some(libc::EINVAL), "a table");
        assert!(file.sync().unwrap_err().to_string().contains("has failed before"));
    }
}
