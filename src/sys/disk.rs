//! System calls for disk images.
//!
//! They are for locks and who holds them, free space, alignment of direct I/O, and discards of devices.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::size::Size;

/// Linux, include/uapi/linux/fs.h: `_IO(0x12, 119)`.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// The same: `_IO(0x12, 104)`, the size of a device's logical sectors.
const BLKSSZGET: libc::c_ulong = 0x1268;

/// Returns a process that holds a lock on this file through another descriptor, in words.
///
/// `None` when none can be seen, as those of other users cannot. The kernel names no process for locks of open files,
/// neither by `F_OFD_GETLK` nor in `/proc/locks`. But it lists them with each descriptor that has them.
pub(crate) fn lock_holder(file: &File) -> Option<String> {
    let wanted = file.metadata().ok()?;
    let holds = |process: &Path| {
        fs::read_dir(process.join("fd")).into_iter().flatten().flatten().any(|fd| {
            let same = fs::metadata(fd.path()).is_ok_and(|it| (it.dev(), it.ino()) == (wanted.dev(), wanted.ino()));
            let info = || fs::read_to_string(process.join("fdinfo").join(fd.file_name()));
            same && info().is_ok_and(|text| text.lines().any(|line| line.starts_with("lock:")))
        })
    };
    if holds(Path::new("/proc/self")) {
        return Some("this process".into());
    }
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut numbered = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let holder = numbered.find(|pid| holds(Path::new(&format!("/proc/{pid}"))))?;
    let name = fs::read_to_string(format!("/proc/{holder}/comm")).unwrap_or_default();
    Some(format!("process {holder} ({})", name.trim_end()))
}

/// Room in a file system of the host, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Space {
    /// What this process may still take.
    pub free: u64,
    /// All there is.
    pub total: u64,
    /// The file system's device number.
    pub device: u64,
}

/// The room in the file system that the file is on.
pub(crate) fn space(file: &File) -> io::Result<Space> {
    // SAFETY: an all-zero statvfs is a valid one, of numbers only.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: fstatvfs writes one statvfs, which lives on this stack across the call.
    match unsafe { libc::fstatvfs(file.as_raw_fd(), &mut found) } {
        0 => Ok(Space {
            free: found.f_bavail.saturating_mul(found.f_frsize),
            total: found.f_blocks.saturating_mul(found.f_frsize),
            device: file.metadata()?.dev(),
        }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What direct I/O on a file must be multiples of, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Addresses of buffers.
    pub memory: usize,
    /// Offsets and lengths.
    pub offset: u64,
}

impl Alignment {
    /// What the file says, or what is always enough.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        // SAFETY: an all-zero statx is a valid one, of numbers only.
        let mut found: libc::statx = unsafe { std::mem::zeroed() };
        let (flags, mask) = (libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
        // SAFETY: the path is a NUL-terminated literal; statx writes one statx, which lives on this stack across the call.
        let outcome = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, mask, &mut found) };
        let reported = outcome == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0;
        if reported && found.stx_dio_offset_align != 0 && found.stx_dio_mem_align != 0 {
            let memory = usize::try_from(found.stx_dio_mem_align).unwrap_or(4096);
            return Ok(Self { memory, offset: found.stx_dio_offset_align.into() });
        }
        // Kernels before 6.1 do not tell. No sector of a device that holds a file system is larger than a page.
        let sector = logical_sector(file).unwrap_or(4096);
        Ok(Self { memory: 4096, offset: sector.max(512) })
    }
}

/// The size of a block device's logical sectors.
fn logical_sector(file: &File) -> Option<u64> {
    let mut size: libc::c_int = 0;
    // SAFETY: the request writes one int, which lives on this stack across the call.
    let outcome = unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size) };
    if outcome == 0 { u64::try_from(size).ok() } else { None }
}

/// Discards these bytes of a block device. Devices that know no discard keep them; that is no error.
pub(crate) fn discard_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let sector = logical_sector(file).unwrap_or(4096).max(512);
    let (start, end) = (offset.next_multiple_of(sector), (offset + len) / sector * sector);
    if start >= end {
        return Ok(());
    }
    let range = [start, end - start];
    // SAFETY: the request reads two 64-bit numbers, which live on this stack across the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => Ok(()),
            e => Err(e),
        },
    }
}

/// Whether what is written in this directory is memory of the host.
pub(crate) fn is_memory(directory: &Path) -> io::Result<bool> {
    let path = CString::new(directory.as_os_str().as_bytes())?;
    let mut found = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the path is a C string, and `found` is writable and of the right size.
    if unsafe { libc::statfs(path.as_ptr(), found.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed, and then filled in by the successful call.
    let kind = unsafe { found.assume_init() }.f_type;
    Ok([libc::TMPFS_MAGIC, RAMFS_MAGIC].contains(&kind))
}

/// Linux, include/uapi/linux/magic.h.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;

/// A file in memory without a name.
pub(crate) fn memfd(flags: libc::c_uint) -> io::Result<File> {
    // SAFETY: the name is a NUL-terminated literal.
    let fd = unsafe { libc::memfd_create(c"cofferdam".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned a new descriptor that has no other owner.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// The same, of a size.
pub(crate) fn memory_file(size: Size) -> io::Result<File> {
    let file = memfd(0)?;
    file.set_len(size.as_bytes())?;
    Ok(file)
}
