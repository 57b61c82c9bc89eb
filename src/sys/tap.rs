//! [`Tap`]: one queue of a host's tap device (Linux, Documentation/networking/tuntap.rst).

use std::ffi::c_short;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::CloseOnFork;

/// How frames may be left to be finished by who reads them (`TUN_F_*`).
pub(crate) const TUN_CSUM: u32 = 1;
pub(crate) const TUN_TSO4: u32 = 2;
pub(crate) const TUN_TSO6: u32 = 4;
pub(crate) const TUN_USO: u32 = 0x20 | 0x40;

/// Requests (linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;

/// An open queue, which never blocks.
#[derive(Debug)]
pub(crate) struct Tap(CloseOnFork<File>);

fn check(outcome: i32) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Tap {
    /// Opens one queue of the device of this name, which is made when there is none and this process may. Frames have a
    /// header of `header` bytes.
    pub(crate) fn open(name: &str, several: bool, header: i32) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
        let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
        let mut request = request(name)?;
        request.ifr_ifru.ifru_flags = flags as c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
        Self(CloseOnFork::new(file)).with_header(header)
    }

    /// Takes a queue that was opened elsewhere.
    pub(crate) fn from_file(file: File, header: i32) -> io::Result<Self> {
        let mut request = request("")?;
        // SAFETY: TUNGETIFF writes one ifreq, which `request` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), TUNGETIFF, &raw mut request) })?;
        // SAFETY: the kernel has filled in the flags, which are a plain number.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            let why = "the descriptor is no tap with IFF_NO_PI and IFF_VNET_HDR";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        // SAFETY: F_GETFL and F_SETFL take and give plain numbers.
        let set = unsafe {
            let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        check(set)?;
        Self(CloseOnFork::new(file)).with_header(header)
    }

    fn with_header(self, header: i32) -> io::Result<Self> {
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETVNETHDRSZ, &raw const header) })?;
        Ok(self)
    }

    /// Sets what the reader of frames finishes by itself; all else the host's kernel does before.
    pub(crate) fn set_offload(&self, flags: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a plain number.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: an all-zero ifreq is a valid one: an empty name and no flags.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() || name.bytes().any(|b| b == 0 || b == b'/' || b.is_ascii_whitespace()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "interface names have 1 to 15 bytes"));
    }
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, byte)| *to = byte as libc::c_char);
    Ok(request)
}
