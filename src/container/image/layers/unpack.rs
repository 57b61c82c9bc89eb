//! Unpacks one layer into a file of the store, as it comes. Both of its digests are checked.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};

use super::file;
use super::log::LayerLog;
use super::spill::Scratch;
use crate::container::image::budget::{Budget, PrepareDeadline};
use crate::container::image::decompress::decompressed;
use crate::container::image::erofs::Disk;
use crate::container::image::oci::{Hasher, ImageSource, Layer, Verified, from_reader};
use crate::container::image::tar::{self, ArchiveKind, ImageBuilder, Stream};
use crate::error::{Context, Error, ErrorKind, Result};

/// Writes `layer` to `to`, which is empty. `scratch` makes files without names. Calls `observe` with how much of it was read, for each piece.
///
/// # Errors
/// What the source fails with. `Corrupt` for a layer that is damaged, or not what its digests and its size say.
pub(super) fn unpack(
    source: &dyn ImageSource,
    layer: &Layer,
    to: &File,
    scratch: &Scratch<'_>,
    budget: &Budget,
    deadline: &PrepareDeadline,
    observe: &(dyn Fn(u64) + Send + Sync),
) -> Result<()> {
    let sent = AtomicU64::new(0);
    let blob = source.open(&layer.blob, deadline)?;
    let counted = Counted { inner: blob, sent: &sent, deadline, observe };
    // Where both digests are the same, one check is enough.
    let mut verified: Box<dyn Read + Send> = match layer.blob.digest == layer.diff_id {
        true => Box::new(counted.take(layer.blob.size)),
        false => Box::new(Verified::new(counted, &layer.blob.digest, layer.blob.size)),
    };
    let mut log = LayerLog::new(scratch);
    let mut disk = Disk::content(to, budget);
    let hasher = {
        let inner = decompressed(&mut verified, Some(budget.limits.ratio))?;
        let hasher = Hasher::like(&layer.diff_id);
        let mut unpacked = Unpacked { inner, hasher };
        let mut stream = Stream::new(&mut unpacked, budget);
        tar::read(&mut stream, &mut ImageBuilder { tree: &mut log, disk: &mut disk, budget }, ArchiveKind::Layer)?;
        stream.finish()?;
        unpacked.hasher
    };
    // A decoder may leave some unread. The digest is of all.
    io::copy(&mut verified, &mut io::sink()).map_err(|e| from_reader(e, deadline))?;
    let (sent, size) = (sent.load(Ordering::Relaxed), layer.blob.size);
    if sent != size {
        return Err(Error::new(ErrorKind::Corrupt, format!("it has {sent} bytes instead of {size}")));
    }
    let found = hasher.finish();
    if found != layer.diff_id {
        let what = format!("unpacked, its digest is {found} instead of {}", layer.diff_id);
        return Err(Error::new(ErrorKind::Corrupt, what));
    }
    file::finish(&log, disk).doing(|| "writing the layer")
}

/// Counts what comes, as long as there is time.
struct Counted<'a, R> {
    inner: R,
    sent: &'a AtomicU64,
    deadline: &'a PrepareDeadline,
    observe: &'a (dyn Fn(u64) + Send + Sync),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Here, as a decoder may read much before it gives anything.
        self.deadline.check()?;
        let n = self.inner.read(buffer)?;
        let sent = self.sent.fetch_add(n as u64, Ordering::Relaxed) + n as u64;
        (self.observe)(sent);
        Ok(n)
    }
}

/// Hashes the unpacked bytes.
struct Unpacked<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(buffer.get(..n).unwrap_or_default());
        Ok(n)
    }
}
