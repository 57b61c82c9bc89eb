//! Sizes of disks and of the file systems on them, and their places.

use core::ffi::CStr;

use super::{Fd, O_CLOEXEC, Result, nr, syscall, text};

/// Linux, include/uapi/linux/fs.h.
const BLKGETSIZE64: usize = 0x8008_1272;
/// Linux, include/uapi/linux/ext4.h.
const EXT4_IOC_RESIZE_FS: usize = 0x4008_6610;
/// Of the library's ext4 file systems, in bytes.
const BLOCK: u64 = 4096;

/// struct open_how's `resolve` (openat2(2)): no link anywhere, and nothing outside.
const RESOLVE_NO_SYMLINKS: u64 = 4;
const RESOLVE_BENEATH: u64 = 8;

/// Opens what is at `path` below a directory. No link on the way is followed.
pub fn open_without_links(at: &Fd, path: &CStr, flags: usize) -> Result<Fd> {
    let how = [(flags | O_CLOEXEC) as u64, 0, RESOLVE_NO_SYMLINKS | RESOLVE_BENEATH];
    // SAFETY: the path is a C string, and the kernel reads one struct open_how, which is three words.
    unsafe { call!(nr::OPENAT2, at.arg(), text(path), how.as_ptr() as usize, size_of_val(&how)) }.map(Fd::new)
}

/// The size of a disk in bytes.
pub fn disk_size(disk: &Fd) -> Result<u64> {
    let mut size = 0u64;
    // SAFETY: the kernel writes one number of 64 bits.
    unsafe { call!(nr::IOCTL, disk.arg(), BLKGETSIZE64, &raw mut size as usize) }?;
    Ok(size)
}

/// Makes a mounted ext4 file system as large as `size` bytes. Waits until it is done. `mounted` is a directory of it.
pub fn grow_file_system(mounted: &Fd, size: u64) -> Result<()> {
    let blocks = size / BLOCK;
    // SAFETY: the kernel reads one number of 64 bits.
    unsafe { call!(nr::IOCTL, mounted.arg(), EXT4_IOC_RESIZE_FS, &raw const blocks as usize) }.map(drop)
}
