//! Images in QEMU's format, through the crate imago. Owned by the disk's loop; every call blocks.
//!
//! Backing files are opened here and not by the crate: beneath one directory, through no link.

mod counts;
mod header;
#[cfg(test)]
mod power;
mod rebuild;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping};

use super::raw::{length, lock_or_name_holder, open};
use super::storage::{from_guest, to_guest};
use super::{BlockBackend, Extent, Geometry};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::{GuestMemory, Segment};
use crate::sys::{self, Beneath, CloseOnFork, LockKind, OrderedFile, WriteOrder};
use header::{BackingName, Format, Qcow2Header};

type Access = FormatAccess<OrderedFile>;

/// Images that may lie on each other.
const DEPTH: usize = 16;
/// Bytes of tables that an image and all that it lies on may keep in memory.
const MAX_TABLES: u64 = 512 << 20;

/// An open image with all that it lies on.
#[derive(Debug)]
pub(crate) struct Qcow2 {
    access: Option<Access>,
    order: WriteOrder,
    /// The image's own file, which also holds the lock.
    file: CloseOnFork<File>,
    size: u64,
    read_only: bool,
    cluster: u32,
    /// In the reach of this L2 table clusters were given back since the last flush. Tables on stable storage may still name them.
    freed: Option<u64>,
    /// The image says that it is open for writing.
    marked: bool,
    /// A sync has failed, or the crate has: nothing is durable from then on.
    failed: bool,
}

/// The files that were opened on the way down, and the directory that they must be in.
struct BackingChain {
    directory: Option<BackingDirectory>,
    files: Vec<(u64, u64)>,
    /// Bytes of tables that they keep in memory at most.
    tables: u64,
}

/// Where backing files may be: held open, so that nothing that becomes of its path or of what is in it leads out.
struct BackingDirectory {
    path: PathBuf,
    beneath: Beneath,
}

impl BackingChain {
    fn add(&mut self, file: &File) -> Result<()> {
        let metadata = file.metadata()?;
        let this = (metadata.dev(), metadata.ino());
        if self.files.contains(&this) {
            return Err(Error::new(ErrorKind::Corrupt, "the chain of backing files comes back to this image"));
        }
        if self.files.len() == DEPTH {
            return Err(Error::new(ErrorKind::InvalidConfig, format!("more than {DEPTH} images lie on each other")));
        }
        self.files.push(this);
        Ok(())
    }

    /// Counts what an image keeps in memory.
    fn keep(&mut self, tables: u64) -> Result<()> {
        self.tables = self.tables.saturating_add(tables);
        if self.tables > MAX_TABLES {
            let problem = format!(
                "qcow2: tables that take more than {} MiB of memory; see qemu-img convert -o cluster_size",
                MAX_TABLES >> 20
            );
            return Err(Error::new(ErrorKind::Unsupported, problem));
        }
        Ok(())
    }

    /// Opens a backing file as an image in `beside` names it. No link in the directory is followed, and only a regular file is one.
    fn open_backing(&self, beside: &Path, name: &str) -> Result<(PathBuf, File)> {
        let named = beside.parent().unwrap_or(Path::new("/")).join(name);
        let denied = |what: String| {
            let what = format!("its backing file {} {what}; see Qcow2Disk::backing_dir", named.display());
            Err(Error::new(ErrorKind::PermissionDenied, what))
        };
        let Some(BackingDirectory { path, beneath }) = &self.directory else {
            return denied("is not allowed".into());
        };
        let finding = || format!("finding backing file {}", named.display());
        // This only says where below the directory it is. What is opened is below the directory whatever this was.
        let (Some(parent), Some(last)) = (named.parent(), named.file_name()) else {
            return denied("is no file".into());
        };
        let whole = fs::canonicalize(parent).doing(finding)?.join(last);
        let Ok(inside) = whole.strip_prefix(path) else {
            return denied(format!("is outside {}", path.display()));
        };
        match beneath.open_regular(inside) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::ELOOP | libc::EXDEV)) => denied("is a link".into()),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => denied("is no regular file".into()),
            outcome => Ok((path.join(inside), outcome.doing(finding)?)),
        }
    }
}

/// Calls the crate. What it is known to panic about is refused before; what is not known must not end the caller.
fn guarded<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::InvalidData, "the image is damaged in a way that its reader cannot express"))
    })
}

/// Says in an image whether its reference counts may be wrong.
fn mark(file: &File, bit: u8) -> io::Result<()> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, header::DIRTY)?;
    let byte = [byte[0] & !1 | bit];
    file.write_all_at(&byte, header::DIRTY)?;
    file.sync_data()?;
    #[cfg(test)]
    {
        sys::record::wrote(header::DIRTY, &byte);
        sys::record::synced();
    }
    Ok(())
}

/// Opens an image and what it lies on, the lowest first. `file` is the image at `path`, not locked yet.
fn open_image(
    path: &Path,
    file: File,
    write: bool,
    order: WriteOrder,
    chain: &mut BackingChain,
) -> Result<(Access, File, Qcow2Header)> {
    lock_or_name_holder(&file, if write { LockKind::Exclusive } else { LockKind::Shared })?;
    if !file.metadata()?.is_file() {
        return Err(Error::new(ErrorKind::InvalidConfig, "not a regular file"));
    }
    chain.add(&file)?;
    let len = file.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(header::MAX_READ)];
    file.read_exact_at(&mut bytes, 0)?;
    let header = Qcow2Header::parse(&bytes, len, write)?;
    chain.keep(header.tables(write))?;
    if header.dirty {
        let used = rebuild::rebuild_refcounts(&file, &header)?;
        mark(&file, 0)?;
        counts::check_used(used)?;
    } else if write {
        counts::check(&file, &header, len)?;
    }
    let backing = match &header.backing {
        None => None,
        Some(BackingName { name, format }) => {
            let (below, file) = chain.open_backing(path, name)?;
            let doing = || format!("opening backing file {}", below.display());
            Some(open_backing(&below, file, *format, chain).doing(doing)?)
        }
    };
    let own = OrderedFile::new(file.try_clone()?, write, header.cluster.into(), order.clone())?;
    let image = guarded(|| {
        imago::qcow2::Qcow2::<OrderedFile>::builder(own)
            .write(write)
            .backing(backing)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
    });
    let image = image.map_err(|e| Error::from(e).with_kind(ErrorKind::Corrupt))?;
    order.keep_header();
    Ok((FormatAccess::new(image), file, header))
}

fn open_backing(path: &Path, file: File, format: Format, chain: &mut BackingChain) -> Result<Access> {
    if format == Format::Qcow2 {
        return Ok(open_image(path, file, false, WriteOrder::default(), chain)?.0);
    }
    lock_or_name_holder(&file, LockKind::Shared)?;
    chain.add(&file)?;
    length(&file)?;
    let own = OrderedFile::new(file, false, 1, WriteOrder::default())?;
    let raw =
        guarded(|| imago::raw::Raw::<OrderedFile>::builder(own).write(false).open(DenyImplicitOpenGate::default()));
    Ok(FormatAccess::new(raw?))
}

impl Qcow2 {
    /// Opens and locks an image with its backing files, which are in `directory`.
    ///
    /// Without a directory it may have none.
    ///
    /// # Errors
    /// - `NotFound`; `PermissionDenied`, also for a backing file elsewhere.
    /// - `ResourceBusy` when another has one of them open.
    /// - `Corrupt` when the image is none, damaged, or its own backing file.
    /// - `Unsupported` names what of it is not supported.
    pub(crate) fn open(path: &Path, directory: Option<&Path>, read_only: bool) -> Result<Self> {
        let doing = || format!("opening disk {}", path.display());
        let path = fs::canonicalize(path).doing(doing)?;
        let open_directory = |directory: &Path| -> io::Result<BackingDirectory> {
            Ok(BackingDirectory { path: fs::canonicalize(directory)?, beneath: Beneath::open(directory)? })
        };
        let named =
            |directory: &Path| open_directory(directory).doing(|| format!("backing_dir: {}", directory.display()));
        let mut chain = BackingChain { directory: directory.map(named).transpose()?, files: Vec::new(), tables: 0 };
        let order = WriteOrder::default();
        let opened = open(&path, read_only, false, libc::O_NONBLOCK)
            .and_then(|file| open_image(&path, file, !read_only, order.clone(), &mut chain))
            .doing(doing)?;
        let (access, file, Qcow2Header { size, cluster, .. }) = opened;
        Ok(Self {
            access: Some(access),
            order,
            freed: None,
            file: CloseOnFork::new(file),
            size,
            read_only,
            cluster,
            marked: false,
            failed: false,
        })
    }

    /// Marks the image before anything is written.
    ///
    /// The crate writes reference counts and tables without a sync in between. After a loss of power the counts may be
    /// behind, and a later writer would overwrite data. So the image is marked as QEMU does with lazy reference counts,
    /// until it is closed. The next open for writing then counts again first.
    fn writable(&mut self) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        if !self.marked {
            mark(&self.file, 1)?;
            self.marked = true;
        }
        Ok(())
    }

    /// Before anything that takes clusters: none may be taken again while tables on stable storage name it.
    fn forget_freed(&mut self) -> io::Result<()> {
        if self.freed.is_some() { self.flush() } else { Ok(()) }
    }

    /// Writes `bytes`, cluster by cluster where more at once would free clusters. That is so for zeroes that have a
    /// cluster, which the crate would move, and for compressed data.
    fn replace(&mut self, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
        let (cluster, order) = (u64::from(self.cluster), self.order.clone());
        while !bytes.is_empty() {
            self.forget_freed()?;
            let most = bytes.len() as u64;
            let rest = cluster - at % cluster;
            let (len, freed) = self.call(|image| {
                let (mapping, alike) = image.get_shallow_mapping(at, most)?;
                Ok(match mapping {
                    ShallowMapping::Special { .. } => (rest, true),
                    ShallowMapping::Zero { explicit: true, .. } => (rest, false),
                    _ => (alike.max(1), false),
                })
            })?;
            let len = len.min(most);
            let (now, later) = bytes.split_at(len as usize);
            if freed {
                self.freed = Some(at / self.reach());
            }
            self.call(|image| order.writing(now, || image.write(now, at)))?;
            (bytes, at) = (later, at + len);
        }
        Ok(())
    }

    /// Makes a piece of a cluster zeroes. The crate computes wrongly here where the disk is smaller than a cluster.
    fn zero_part(&mut self, at: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (mapping, alike) = self.call(|image| {
            let (mapping, alike) = image.get_shallow_mapping(at, len)?;
            Ok((matches!(mapping, ShallowMapping::Zero { .. }), alike))
        })?;
        if mapping && alike >= len {
            return Ok(());
        }
        self.replace(&vec![0; usize::try_from(len).unwrap_or(usize::MAX)], at)
    }

    /// What one L2 table speaks of.
    fn reach(&self) -> u64 {
        u64::from(self.cluster / 8) * u64::from(self.cluster)
    }

    /// Gives back what the range takes up. Pieces of clusters and tables that are not there yet take clusters themselves.
    fn give_back(
        &mut self,
        offset: u64,
        len: u64,
        call: impl Fn(&mut Access, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        self.writable()?;
        let cluster = u64::from(self.cluster);
        let (reach, mut at, end) = (self.reach(), offset, offset + len);
        while at < end {
            let whole = at % cluster == 0 && end - at >= cluster;
            let next = if whole { end / cluster * cluster } else { (at / cluster + 1) * cluster };
            let next = next.min((at / reach + 1) * reach).min(end);
            if self.freed.is_some_and(|freed| !whole || freed != at / reach) {
                self.flush()?;
            }
            self.freed = Some(at / reach);
            self.call(|image| call(image, at, next - at))?;
            at = next;
        }
        Ok(())
    }

    /// Calls the crate. Once it panicked, what it has in memory is not to be relied on and is never written.
    fn call<T>(&mut self, call: impl FnOnce(&mut Access) -> io::Result<T>) -> io::Result<T> {
        let gone = || io::Error::from_raw_os_error(libc::EIO);
        let access = self.access.as_mut().filter(|_| !self.failed).ok_or_else(gone)?;
        catch_unwind(AssertUnwindSafe(|| call(access))).unwrap_or_else(|_| {
            self.failed = true;
            Err(gone())
        })
    }
}

/// Returns an image of 256 KiB, some of which is written. It is made for the bytes of a cluster, the bits of a count,
/// and a raw backing file.
#[cfg(any(test, feature = "internals"))]
pub(super) fn small(cluster: usize, width: usize, backing: Option<&str>) -> Vec<u8> {
    use imago::FormatCreateBuilder;
    let make = || -> io::Result<Vec<u8>> {
        let file = sys::temp_file(&std::env::temp_dir())?;
        let storage = || OrderedFile::new(file.try_clone()?, true, cluster as u64, WriteOrder::default());
        let builder = imago::qcow2::Qcow2::<OrderedFile>::create_builder(storage()?);
        let builder = builder.size(256 << 10).cluster_size(cluster).refcount_width(width);
        match backing {
            Some(name) => builder.backing(name.into(), "raw".into()).create()?,
            None => builder.create()?,
        }
        let image = imago::qcow2::Qcow2::<OrderedFile>::builder(storage()?).backing(None).write(true);
        let image = FormatAccess::new(image.open(DenyImplicitOpenGate::default())?);
        image.write([3; 4096].as_slice(), 1024)?;
        image.write([4; 4096].as_slice(), 128 << 10)?;
        image.flush()?;
        let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    make().unwrap_or_else(|e| unreachable!("{e}"))
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.marked && self.flush().is_ok() {
            let _ = mark(&self.file, 0);
        }
        // The crate writes what it still has in memory, which may go as wrong as all else.
        let access = self.access.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(access)));
    }
}

impl BlockBackend for Qcow2 {
    fn geometry(&self) -> Geometry {
        let discard = if self.read_only { 0 } else { self.cluster };
        Geometry { len: self.size, read_only: self.read_only, discard }
    }

    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        self.call(|image| to_guest(memory, segments, offset, |to, at| image.read(to, at)))
    }

    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], offset: u64) -> io::Result<()> {
        self.writable()?;
        from_guest(memory, segments, offset, |from, at| self.replace(from, at))
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        // The crate's flush writes the tables that it has in memory, without a sync before: they must not speak of bytes that are
        // not there yet.
        let order = self.order.clone();
        let outcome = self.call(|image| {
            image.sync()?;
            order.flushing(|| image.flush())?;
            image.sync()
        });
        self.failed |= outcome.is_err();
        if outcome.is_ok() {
            self.freed = None;
        }
        outcome
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.give_back(offset, len, |image, at, len| image.discard_to_any(at, len))
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.writable()?;
        let (cluster, end) = (u64::from(self.cluster), offset + len);
        let middle = offset.next_multiple_of(cluster).min(end);
        // Behind the disk's end is nothing: its last cluster is whole.
        let last = if end == self.size { end } else { end / cluster * cluster }.max(middle);
        self.zero_part(offset, middle - offset)?;
        self.give_back(middle, last - middle, |image, at, len| image.write_zeroes(at, len))?;
        self.zero_part(last, end - last)
    }

    fn grow(&mut self, len: u64) -> io::Result<()> {
        self.writable()?;
        if len < self.size || !len.is_multiple_of(512) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.call(|image| image.resize_grow(len, imago::format::PreallocateMode::None))?;
        self.size = len;
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    fn extents(&mut self, _: bool, _: u64, _: u64, _: &mut Vec<Extent>) -> Option<io::Result<()>> {
        None
    }

    fn write_done(&mut self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_fd(&self) -> Option<RawFd> {
        None
    }

    fn space(&self) -> io::Result<Option<sys::Space>> {
        if self.read_only { Ok(None) } else { sys::space(&self.file).map(Some) }
    }
}
