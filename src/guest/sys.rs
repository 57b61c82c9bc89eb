//! All raw system calls of the shim, behind functions that are safe to call. Owned by the shim's one thread.
//!
//! What depends on the processor is in `arch`. The same file is part of the library's tests, where it runs on the host.
#![allow(unsafe_code, reason = "raw system calls: the shim has no libc")]

use core::ffi::{CStr, c_char};
use core::marker::PhantomData;
use core::ptr;

use super::alloc::vec::Vec;
use arch::nr;

/// # Safety
///
/// The arguments are what the system call `n` takes: pointers are valid for what the kernel reads and writes through them.
unsafe fn syscall(n: usize, args: [usize; 6]) -> Result<usize, Errno> {
    // SAFETY: the caller's promise.
    let result = unsafe { arch::system_call(n, args) };
    // -4095..=-1 are error numbers.
    match result.wrapping_neg() {
        errno @ 1..=4095 => Err(Errno(errno as i32)),
        _ => Ok(result),
    }
}

/// A system call with as many arguments as it takes; the others are 0.
macro_rules! call {
    ($n:expr) => {
        call!($n, 0)
    };
    ($n:expr, $a:expr) => {
        call!($n, $a, 0)
    };
    ($n:expr, $a:expr, $b:expr) => {
        call!($n, $a, $b, 0)
    };
    ($n:expr, $a:expr, $b:expr, $c:expr) => {
        call!($n, $a, $b, $c, 0)
    };
    ($n:expr, $a:expr, $b:expr, $c:expr, $d:expr) => {
        call!($n, $a, $b, $c, $d, 0)
    };
    ($n:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr) => {
        call!($n, $a, $b, $c, $d, $e, 0)
    };
    ($n:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr) => {
        syscall($n, [$a, $b, $c, $d, $e, $f])
    };
}

/// An error number of Linux.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Errno(pub(super) i32);

impl Errno {
    pub(super) const EPERM: Self = Self(1);
    pub(super) const ENOENT: Self = Self(2);
    pub(super) const EINTR: Self = Self(4);
    pub(super) const EIO: Self = Self(5);
    pub(super) const ENXIO: Self = Self(6);
    pub(super) const E2BIG: Self = Self(7);
    pub(super) const EAGAIN: Self = Self(11);
    pub(super) const ENOMEM: Self = Self(12);
    pub(super) const EACCES: Self = Self(13);
    pub(super) const EBUSY: Self = Self(16);
    pub(super) const EEXIST: Self = Self(17);
    pub(super) const ENODEV: Self = Self(19);
    pub(super) const ENOTDIR: Self = Self(20);
    pub(super) const EISDIR: Self = Self(21);
    pub(super) const EINVAL: Self = Self(22);
    pub(super) const EFBIG: Self = Self(27);
    pub(super) const ENOSYS: Self = Self(38);
    pub(super) const ELOOP: Self = Self(40);
    pub(super) const EPROTO: Self = Self(71);
    pub(super) const ECANCELED: Self = Self(125);
    pub(super) const ESHUTDOWN: Self = Self(108);
    pub(super) const ETIMEDOUT: Self = Self(110);
    pub(super) const ECONNREFUSED: Self = Self(111);
    pub(super) const EINPROGRESS: Self = Self(115);
    pub(super) const ESTALE: Self = Self(116);
}

type Result<T, E = Errno> = core::result::Result<T, E>;

/// An open file, closed when dropped.
#[derive(Debug)]
pub(super) struct Fd(i32);

impl Fd {
    pub(super) fn raw(&self) -> i32 {
        self.0
    }

    /// Leaves it open for good.
    pub(super) fn keep(self) {
        let _ = core::mem::ManuallyDrop::new(self);
    }

    /// For system calls; descriptors are never negative.
    fn arg(&self) -> usize {
        self.0 as usize
    }

    fn new(raw: usize) -> Self {
        Self(raw as i32)
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: the descriptor is this value's alone, and is not used after.
        let _ = unsafe { call!(nr::CLOSE, self.arg()) };
    }
}

#[cfg(test)]
impl From<std::os::fd::OwnedFd> for Fd {
    fn from(fd: std::os::fd::OwnedFd) -> Self {
        Self(std::os::fd::IntoRawFd::into_raw_fd(fd))
    }
}

#[cfg(test)]
impl From<Fd> for std::os::fd::OwnedFd {
    fn from(fd: Fd) -> Self {
        let raw = core::mem::ManuallyDrop::new(fd).0;
        // SAFETY: the descriptor was owned by `fd`, which does not close it any more.
        unsafe { std::os::fd::FromRawFd::from_raw_fd(raw) }
    }
}

mod arch;
mod disk;
mod filter;
mod identity;
mod interface;
mod random;
mod socket;
mod terminal;
mod tree;

pub(super) use arch::{O_DIRECTORY, O_NOFOLLOW, end_machine, print};
pub(super) use disk::{disk_size, grow_file_system, open_without_links};
pub(super) use filter::{kernel_version, set_filter};
pub(super) use identity::{
    become_user, change_owner, drop_capability, is_regular, is_user, set_no_new_privs, set_rlimit,
};
pub(super) use interface::{
    interface_index, interface_socket, interface_socket6, interface_up, set_address, set_address6, set_gateway,
    set_gateway6,
};
pub(super) use random::reseed;
pub(super) use socket::{
    Epoll, accept_vsock, connect_result, connect_tcp, connect_vsock, is_writable, listen_vsock, shut_write,
};
pub(super) use terminal::{end_of_input, hang_up, open_terminal, set_size, take_terminal};
pub(super) use tree::{
    FileStatus, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, Whence, change_mode, change_owner_at, create_at, open_entry,
    read_link, read_names, rename_at, seek, set_blocking, set_length, set_modified, status, symlink_at, unlink_at,
};

/// Paths relative to the current directory.
const AT_FDCWD: usize = -100isize as usize;

fn dir(at: Option<&Fd>) -> usize {
    at.map_or(AT_FDCWD, Fd::arg)
}

fn text(path: &CStr) -> usize {
    path.as_ptr() as usize
}

fn optional(path: Option<&CStr>) -> usize {
    path.map_or(0, text)
}

pub(super) const O_RDONLY: usize = 0;
pub(super) const O_WRONLY: usize = 1;
pub(super) const O_RDWR: usize = 2;
pub(super) const O_CREAT: usize = 0o100;
pub(super) const O_EXCL: usize = 0o200;
pub(super) const O_APPEND: usize = 0o2000;
pub(super) const O_NONBLOCK: usize = 0o4000;
pub(super) const O_PATH: usize = 0o10_000_000;
const O_CLOEXEC: usize = 0o2_000_000;

/// Opens a file, relative to a directory or to the current one. Always close-on-exec; new files get the mode 0644.
pub(super) fn open(at: Option<&Fd>, path: &CStr, flags: usize) -> Result<Fd> {
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { call!(nr::OPENAT, dir(at), text(path), flags | O_CLOEXEC, 0o644) }.map(Fd::new)
}

pub(super) fn read(fd: &Fd, into: &mut [u8]) -> Result<usize> {
    // SAFETY: the kernel writes at most `len` bytes into the slice.
    unsafe { call!(nr::READ, fd.arg(), into.as_mut_ptr() as usize, into.len()) }
}

/// Reads from the beginning, wherever the descriptor stands.
pub(super) fn read_start(fd: &Fd, into: &mut [u8]) -> Result<usize> {
    // SAFETY: the kernel writes at most `len` bytes into the slice.
    unsafe { call!(nr::PREAD64, fd.arg(), into.as_mut_ptr() as usize, into.len()) }
}

pub(super) fn write(fd: &Fd, from: &[u8]) -> Result<usize> {
    write_raw(fd.raw(), from)
}

/// Writes to a descriptor without an owner, such as standard error.
pub(super) fn write_raw(fd: i32, from: &[u8]) -> Result<usize> {
    // SAFETY: the kernel reads at most `len` bytes of the slice; a wrong descriptor is an error.
    unsafe { call!(nr::WRITE, fd as usize, from.as_ptr() as usize, from.len()) }
}

pub(super) fn mkdir(at: Option<&Fd>, path: &CStr, mode: u32) -> Result<()> {
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { call!(nr::MKDIRAT, dir(at), text(path), mode as usize) }.map(drop)
}

pub(super) fn symlink(target: &CStr, path: &CStr) -> Result<()> {
    // SAFETY: both are C strings that outlive the call.
    unsafe { call!(nr::SYMLINKAT, text(target), AT_FDCWD, text(path)) }.map(drop)
}

pub(super) fn unlink(path: &CStr) -> Result<()> {
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { call!(nr::UNLINKAT, AT_FDCWD, text(path)) }.map(drop)
}

pub(super) fn rmdir(at: Option<&Fd>, path: &CStr) -> Result<()> {
    const AT_REMOVEDIR: usize = 0x200;
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { call!(nr::UNLINKAT, dir(at), text(path), AT_REMOVEDIR) }.map(drop)
}

pub(super) const MS_RDONLY: usize = 1;
pub(super) const MS_NOSUID: usize = 2;
pub(super) const MS_NODEV: usize = 4;
pub(super) const MS_NOEXEC: usize = 8;
pub(super) const MS_REMOUNT: usize = 32;
pub(super) const MS_BIND: usize = 4096;
pub(super) const MS_MOVE: usize = 8192;
const MS_REC: usize = 16_384;
const MS_PRIVATE: usize = 1 << 18;

pub(super) fn mount(source: &CStr, target: &CStr, fs: Option<&CStr>, flags: usize, data: Option<&CStr>) -> Result<()> {
    // SAFETY: all are C strings that outlive the call, or null, which mount(2) takes for both.
    unsafe { call!(nr::MOUNT, text(source), text(target), optional(fs), flags, optional(data)) }.map(drop)
}

/// Unmounts a file system even when it is in use: it disappears from the tree now and ends when the last user does.
pub(super) fn unmount(target: &CStr) -> Result<()> {
    const MNT_DETACH: usize = 2;
    // SAFETY: `target` is a C string that outlives the call.
    unsafe { call!(nr::UMOUNT2, text(target), MNT_DETACH) }.map(drop)
}

pub(super) fn chdir(path: &CStr) -> Result<()> {
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { call!(nr::CHDIR, text(path)) }.map(drop)
}

pub(super) fn fchdir(fd: &Fd) -> Result<()> {
    // SAFETY: takes a plain number.
    unsafe { call!(nr::FCHDIR, fd.arg()) }.map(drop)
}

pub(super) fn chroot(path: &CStr) -> Result<()> {
    // SAFETY: `path` is a C string that outlives the call.
    unsafe { call!(nr::CHROOT, text(path)) }.map(drop)
}

/// Inserts a module from its file.
pub(super) fn insert_module_file(file: &Fd) -> Result<()> {
    // SAFETY: the parameters are an empty C string that lives for ever; the rest are plain numbers.
    unsafe { call!(nr::FINIT_MODULE, file.arg(), text(c""), 0) }.map(drop)
}

/// Inserts a module from memory.
pub(super) fn insert_module(module: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads `len` bytes of the slice; the parameters are an empty C string that lives for ever.
    unsafe { call!(nr::INIT_MODULE, module.as_ptr() as usize, module.len(), text(c"")) }.map(drop)
}

pub(super) fn sync() {
    // SAFETY: takes nothing.
    let _ = unsafe { call!(nr::SYNC) };
}

pub(super) fn set_hostname(name: &[u8]) -> Result<()> {
    // SAFETY: the kernel reads `len` bytes of the slice.
    unsafe { call!(nr::SETHOSTNAME, name.as_ptr() as usize, name.len()) }.map(drop)
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(super) fn now_ns() -> u64 {
    const CLOCK_MONOTONIC: usize = 1;
    let mut time = [0u64; 2];
    // SAFETY: the kernel writes one timespec, two words.
    let _ = unsafe { call!(nr::CLOCK_GETTIME, CLOCK_MONOTONIC, time.as_mut_ptr() as usize) };
    time[0].saturating_mul(1_000_000_000).saturating_add(time[1])
}

pub(super) fn sleep_ms(ms: u64) {
    let time = [ms / 1000, ms % 1000 * 1_000_000];
    // SAFETY: the kernel reads one timespec, two words, and writes nothing, as the second pointer is null.
    let _ = unsafe { call!(nr::NANOSLEEP, time.as_ptr() as usize) };
}

pub(super) fn getpid() -> i32 {
    // SAFETY: takes nothing.
    unsafe { call!(nr::GETPID) }.map_or(0, |pid| pid as i32)
}

/// Both ends of a new pipe, reader first, close-on-exec.
pub(super) fn pipe() -> Result<(Fd, Fd)> {
    let mut ends = [0i32; 2];
    // SAFETY: the kernel writes two descriptors.
    unsafe { call!(nr::PIPE2, ends.as_mut_ptr() as usize, O_CLOEXEC) }?;
    Ok((Fd(ends[0]), Fd(ends[1])))
}

pub(super) fn set_nonblocking(fd: &Fd) -> Result<()> {
    const F_SETFL: usize = 4;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::FCNTL, fd.arg(), F_SETFL, O_NONBLOCK) }.map(drop)
}

/// The standard streams of this process, which stay open.
pub(super) fn standard_streams() -> [core::mem::ManuallyDrop<Fd>; 3] {
    [0, 1, 2].map(|number| core::mem::ManuallyDrop::new(Fd(number)))
}

/// Another descriptor of the same open file.
pub(super) fn duplicate(fd: &Fd) -> Result<Fd> {
    const F_DUPFD_CLOEXEC: usize = 1030;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::FCNTL, fd.arg(), F_DUPFD_CLOEXEC, 3) }.map(Fd::new)
}

/// Whether a descriptor, of whatever owner, is open.
pub(super) fn is_open(fd: i32) -> bool {
    const F_GETFD: usize = 1;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::FCNTL, fd as usize, F_GETFD) }.is_ok()
}

/// Makes `number` another name of `fd`, open across `execve`. What it was before is closed.
pub(super) fn dup_onto(fd: &Fd, number: i32) -> Result<()> {
    // SAFETY: takes plain numbers; only the standard streams are numbered by hand, and no `Fd` owns those.
    unsafe { call!(nr::DUP3, fd.arg(), number as usize) }.map(drop)
}

/// Bytes that can be read from a pipe now.
pub(super) fn readable_bytes(pipe: &Fd) -> Result<u64> {
    const FIONREAD: usize = 0x541b;
    let mut count = 0i32;
    // SAFETY: the kernel writes one int.
    unsafe { call!(nr::IOCTL, pipe.arg(), FIONREAD, &raw mut count as usize) }?;
    Ok(u64::try_from(count).unwrap_or(0))
}

/// Moves up to `max` bytes between a pipe and a socket, without waiting. 0: the source has ended.
pub(super) fn splice(from: &Fd, to: &Fd, max: usize) -> Result<usize> {
    const SPLICE_F_MOVE: usize = 1;
    const SPLICE_F_NONBLOCK: usize = 2;
    // SAFETY: takes plain numbers; the offsets are null, as they must be for pipes and sockets.
    unsafe { call!(nr::SPLICE, from.arg(), 0, to.arg(), 0, max, SPLICE_F_MOVE | SPLICE_F_NONBLOCK) }
}

const AF_INET: usize = 2;
const AF_INET6: usize = 10;

pub(super) const POLLIN: i16 = 1;
pub(super) const POLLPRI: i16 = 2;
pub(super) const POLLOUT: i16 = 4;
pub(super) const POLLERR: i16 = 8;
pub(super) const POLLHUP: i16 = 16;
pub(super) const POLLRDHUP: i16 = 0x2000;

/// One descriptor to wait for. A negative one is ignored.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Poll {
    pub(super) fd: i32,
    pub(super) events: i16,
    pub(super) happened: i16,
}

/// Waits until something happens to one of them, at most until the time `deadline_ns` of [`now_ns`].
pub(super) fn poll(polls: &mut [Poll], deadline_ns: Option<u64>) -> Result<usize> {
    let time = deadline_ns.map(|deadline| {
        let left = deadline.saturating_sub(now_ns());
        [left / 1_000_000_000, left % 1_000_000_000]
    });
    let time = time.as_ref().map_or(0, |time| time.as_ptr() as usize);
    // SAFETY: the kernel reads and writes `len` entries, and reads the timespec if there is one; the signal mask is null.
    unsafe { call!(nr::PPOLL, polls.as_mut_ptr() as usize, polls.len(), time, 0, 8) }
}

pub(super) const SIGHUP: u8 = 1;
pub(super) const SIGINT: u8 = 2;
pub(super) const SIGKILL: u8 = 9;
pub(super) const SIGTERM: u8 = 15;
pub(super) const SIGCHLD: u8 = 17;
pub(super) const SIGCONT: u8 = 18;
pub(super) const SIGPWR: u8 = 30;

/// A set of signals as the kernel takes it.
pub(super) fn signal_set(signals: &[u8]) -> u64 {
    signals.iter().fold(0, |set, signal| set | 1 << (signal - 1))
}

/// Makes `set` the signals that are blocked.
pub(super) fn block_signals(set: u64) -> Result<()> {
    const SIG_SETMASK: usize = 2;
    // SAFETY: the kernel reads one set of 8 bytes and writes nothing, as the second pointer is null.
    unsafe { call!(nr::RT_SIGPROCMASK, SIG_SETMASK, &raw const set as usize, 0, 8) }.map(drop)
}

/// A descriptor that is readable while a signal of `set` is pending.
pub(super) fn signal_fd(set: u64) -> Result<Fd> {
    // SAFETY: the kernel reads one set of 8 bytes.
    unsafe { call!(nr::SIGNALFD4, usize::MAX, &raw const set as usize, 8, O_CLOEXEC | O_NONBLOCK) }.map(Fd::new)
}

/// The next pending signal of a [`signal_fd`].
pub(super) fn next_signal(fd: &Fd) -> Option<u8> {
    // struct signalfd_siginfo; the first word is the signal.
    let mut info = [0u8; 128];
    read(fd, &mut info).ok().filter(|&n| n == info.len()).map(|_| info[0])
}

/// Waits for a blocked signal of `set`.
pub(super) fn wait_signal(set: u64) {
    // SAFETY: the kernel reads one set of 8 bytes; the other pointers are null.
    let _ = unsafe { call!(nr::RT_SIGTIMEDWAIT, &raw const set as usize, 0, 0, 8) };
}

pub(super) fn kill(pid: i32, signal: u8) -> Result<()> {
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::KILL, pid as usize, signal.into()) }.map(drop)
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Exited(u8),
    Signaled(u8),
}

/// The next child that has ended, if one has.
pub(super) fn reap() -> Option<(i32, Status)> {
    const WNOHANG: usize = 1;
    let mut status = 0i32;
    // SAFETY: the kernel writes one int; the resource usage is null.
    let pid = unsafe { call!(nr::WAIT4, usize::MAX, &raw mut status as usize, WNOHANG) }.ok()? as i32;
    let status = match (status & 0x7f) as u8 {
        0 => Status::Exited((status >> 8) as u8),
        signal => Status::Signaled(signal),
    };
    (pid > 0).then_some((pid, status))
}

/// Makes a process that runs `run` on a copy of this process's memory and exits with its result. It is born in the
/// cgroup if one is given. Returns its pid.
pub(super) fn fork(cgroup: Option<&Fd>, child: impl FnOnce() -> i32) -> Result<i32> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    /// struct clone_args, version 2 (Linux 5.7, include/uapi/linux/sched.h)
    #[repr(C)]
    #[derive(Default)]
    struct Arguments {
        flags: u64,
        /// pidfd, child_tid, parent_tid
        ids: [u64; 3],
        exit_signal: u64,
        /// stack, stack_size, tls, set_tid, set_tid_size
        place: [u64; 5],
        cgroup: u64,
    }
    let arguments = Arguments {
        flags: if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 },
        exit_signal: SIGCHLD.into(),
        cgroup: cgroup.map_or(0, |fd| fd.raw() as u64),
        ..Arguments::default()
    };
    // SAFETY: the kernel reads one structure of the given size. Without CLONE_VM and without a stack the child gets a copy of
    // everything and goes on from here as after fork(2).
    match unsafe { call!(nr::CLONE3, &raw const arguments as usize, size_of::<Arguments>()) }? {
        0 => exit(child()),
        pid => Ok(pid as i32),
    }
}

/// A null-terminated vector of C strings, as `execve` takes two of.
#[derive(Debug)]
pub(super) struct Vector<'a>(Vec<*const c_char>, PhantomData<&'a CStr>);

impl<'a> Vector<'a> {
    pub(super) fn new(strings: impl Iterator<Item = &'a CStr> + Clone) -> Result<Self> {
        let mut pointers = Vec::new();
        pointers.try_reserve_exact(strings.clone().count() + 1).map_err(|_| Errno::ENOMEM)?;
        pointers.extend(strings.map(CStr::as_ptr));
        pointers.push(ptr::null());
        Ok(Self(pointers, PhantomData))
    }

    fn arg(&self) -> usize {
        self.0.as_ptr() as usize
    }
}

/// Becomes another program. Returns only if that fails.
pub(super) fn execve(path: &CStr, argv: &Vector<'_>, envp: &Vector<'_>) -> Errno {
    // SAFETY: `path` and both vectors outlive the call; the vectors end with a null and point to C strings by construction.
    unsafe { call!(nr::EXECVE, text(path), argv.arg(), envp.arg()) }.err().unwrap_or(Errno(0))
}

pub(super) fn set_sid() -> Result<()> {
    // SAFETY: takes nothing.
    unsafe { call!(nr::SETSID) }.map(drop)
}

pub(super) fn umask(mask: u32) {
    // SAFETY: takes a plain number.
    let _ = unsafe { call!(nr::UMASK, mask as usize) };
}

/// The next children of this process live in a new pid namespace, the first of them as its PID 1.
pub(super) fn new_pid_namespace() -> Result<()> {
    const CLONE_NEWPID: usize = 0x2000_0000;
    // SAFETY: takes a plain number.
    unsafe { call!(nr::UNSHARE, CLONE_NEWPID) }.map(drop)
}

/// Closes every descriptor of this process but the first `count`. Only for one that uses no other from here on.
pub(super) fn keep_only(count: u32) {
    // SAFETY: takes plain numbers. An `Fd` that still exists then names nothing, or later something of this same process's making.
    let _ = unsafe { call!(nr::CLOSE_RANGE, count as usize, u32::MAX as usize) };
}

/// Moves a descriptor to a number and has it closed by `execve`. What the number was before is closed.
pub(super) fn move_to(fd: &Fd, number: i32) -> Result<Fd> {
    if fd.raw() != number {
        // SAFETY: takes plain numbers; the caller owns the number.
        unsafe { call!(nr::DUP3, fd.arg(), number as usize, O_CLOEXEC) }?;
    }
    Ok(Fd(number))
}

/// The kind of file system that a descriptor is on (statfs(2), `f_type`).
pub(super) fn file_system_kind(fd: &Fd) -> Result<u64> {
    let mut status = [0u64; 15];
    // SAFETY: the kernel writes one struct statfs, 120 bytes, for which there is room.
    unsafe { call!(nr::FSTATFS, fd.arg(), status.as_mut_ptr() as usize) }?;
    Ok(status[0])
}

/// Gives this process mounts of its own: what it changes no other process sees.
pub(super) fn new_mount_namespace() -> Result<()> {
    const CLONE_NEWNS: usize = 0x2_0000;
    // SAFETY: takes a plain number.
    unsafe { call!(nr::UNSHARE, CLONE_NEWNS) }?;
    mount(c"none", c"/", None, MS_REC | MS_PRIVATE, None)
}

pub(super) fn exit(code: i32) -> ! {
    loop {
        // SAFETY: takes a plain number and does not return.
        let _ = unsafe { call!(nr::EXIT_GROUP, code as usize) };
    }
}

/// The commands of [`reboot`].
pub(super) const RB_CTRL_ALT_DEL_TO_INIT: usize = 0;
pub(super) const RB_RESTART: usize = 0x0123_4567;

/// Tells the kernel how to end, or what to do with Ctrl-Alt-Del. Those that end return only if they fail.
pub(super) fn reboot(command: usize) -> Result<()> {
    // SAFETY: takes plain numbers: the two magic ones and the command.
    unsafe { call!(nr::REBOOT, 0xfee1_dead, 672_274_793, command) }.map(drop)
}

/// Pages from the kernel, zeroed; for the allocator.
#[cfg(guest_bin)]
pub(super) fn map(len: usize) -> *mut u8 {
    const PROT_READ_WRITE: usize = 3;
    const MAP_PRIVATE_ANONYMOUS: usize = 0x22;
    // SAFETY: a new mapping where the kernel likes touches nothing that exists.
    unsafe { call!(nr::MMAP, 0, len, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, usize::MAX) }
        .map_or(ptr::null_mut(), |address| address as *mut u8)
}

/// Gives pages of [`map`] back.
///
/// # Safety
///
/// They are not used any more.
#[cfg(guest_bin)]
pub(super) unsafe fn unmap(pages: *mut u8, len: usize) {
    // SAFETY: the caller's promise.
    let _ = unsafe { call!(nr::MUNMAP, pages as usize, len) };
}
