//! Keeps guests, their files' locks and other descriptors from children of fork(2).
//!
//! Descriptors are closed on exec(2). But a child that goes on without exec would hold all of them, with their locks,
//! for as long as it lives. In such a child each of them becomes `/dev/null` at once. Nothing else of a guest's is of
//! any use there either: its threads are not there, and its memory is not mapped.

use std::cell::UnsafeCell;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// How many forks lie between the first process and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// The descriptors that children do not keep: one bit each, by their numbers.
static GUARDED: Mutex<Vec<u64>> = Mutex::new(Vec::new());
/// The table's lock while its process forks.
static FORKING: Forking = Forking(UnsafeCell::new(None));

struct Forking(UnsafeCell<Option<MutexGuard<'static, Vec<u64>>>>);

// SAFETY: only the handlers below touch it. `before` fills it while it holds the lock of the table, and one of the others
// empties it on the same thread before that lock is given back: so one thread uses it at a time.
unsafe impl Sync for Forking {}

fn guarded() -> MutexGuard<'static, Vec<u64>> {
    GUARDED.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn before() {
    let table = guarded();
    // SAFETY: see `Forking`: the lock is held.
    unsafe { *FORKING.0.get() = Some(table) };
}

extern "C" fn in_parent() {
    // SAFETY: see `Forking`: this thread holds the lock since `before`.
    drop(unsafe { (*FORKING.0.get()).take() });
}

/// Runs between fork and whatever the child does first: system calls that are safe there, and no allocation.
extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::SeqCst);
    // SAFETY: see `Forking`: this thread, of which fork made a copy, holds the lock since `before`.
    let Some(mut table) = (unsafe { (*FORKING.0.get()).take() }) else { return };
    // SAFETY: the path is a C string, and the flags are plain numbers.
    let null = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    for (word, bits) in (0..).zip(table.iter_mut()) {
        while *bits != 0 {
            let fd = word * u64::BITS as RawFd + bits.trailing_zeros() as RawFd;
            *bits &= *bits - 1;
            // SAFETY: takes plain numbers. The descriptor's owner, if it is ever dropped here, closes what lies there then.
            unsafe {
                match null {
                    -1 => libc::close(fd),
                    null => libc::dup3(null, fd, libc::O_CLOEXEC),
                }
            };
        }
    }
    if null != -1 {
        // SAFETY: it was opened here, and is known only here.
        unsafe { libc::close(null) };
    }
}

/// Keeps a descriptor from children. To be dropped before the descriptor is closed.
#[derive(Debug)]
pub(crate) struct ForkGuard(RawFd);

/// Has the handlers above called from now on.
fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the handlers are functions of this crate, which is not unloaded while it has guests.
        if unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) } != 0 {
            log::warn!("children of fork keep the descriptors of guests: no memory for a handler");
        }
    });
}

impl ForkGuard {
    /// Keeps `fd` from children that are made from now on.
    ///
    /// It is the number that is kept: who gives the descriptor away ends the guard before, or the child finds `/dev/null` there.
    pub(crate) fn new(fd: &impl AsRawFd) -> Self {
        install();
        let fd = fd.as_raw_fd();
        mark(fd, true);
        Self(fd)
    }
}

impl Drop for ForkGuard {
    fn drop(&mut self) {
        mark(self.0, false);
    }
}

fn mark(fd: RawFd, guard: bool) {
    let Ok(fd) = usize::try_from(fd) else { return };
    let (word, bit) = (fd / 64, 1 << (fd % 64));
    let mut table = guarded();
    if table.len() <= word {
        table.resize(word + 1, 0);
    }
    if let Some(bits) = table.get_mut(word) {
        *bits = if guard { *bits | bit } else { *bits & !bit };
    }
}

/// A descriptor that children of fork do not keep.
#[derive(Debug)]
pub(crate) struct CloseOnFork<T: AsRawFd> {
    // Goes first.
    _guard: ForkGuard,
    inner: T,
}

impl<T: AsRawFd> CloseOnFork<T> {
    pub(crate) fn new(inner: T) -> Self {
        Self { _guard: ForkGuard::new(&inner), inner }
    }
}

impl<T: AsRawFd> Deref for CloseOnFork<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: AsRawFd> DerefMut for CloseOnFork<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Keeps a mapping out of children of fork and out of core files.
///
/// So a child has no copy of a guest's memory or of a vCPU's state, and no core file has it.
pub(crate) fn keep_private(at: *mut libc::c_void, len: usize) {
    for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP] {
        // SAFETY: both change what becomes of the mapping at fork and in a core file, and nothing that this process sees.
        if unsafe { libc::madvise(at, len, advice) } != 0 {
            log::warn!("a guest's memory is not kept out of children and core files: {}", io::Error::last_os_error());
        }
    }
}

/// Keeps a value from ever being dropped: in a child, where threads and mappings that it names are not there.
pub(crate) fn leak<T>(value: T) {
    let _ = Box::leak(Box::new(value));
}

/// The process in which something was made, to tell it from its children.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProcessGeneration(u32);

impl ProcessGeneration {
    /// Returns this process. Its children differ from it from now on.
    pub(crate) fn current() -> Self {
        install();
        Self(GENERATION.load(Ordering::SeqCst))
    }

    /// How many forks lie between the first process and this one.
    pub(crate) fn number(self) -> u32 {
        self.0
    }

    /// Whether this is the process, and no child of it that fork made.
    pub(crate) fn is_current(self) -> bool {
        self == Self::current()
    }
}

/// Runs `f` in a child, and gives what it answers.
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is the test's")]
pub(crate) fn in_a_child(f: impl FnOnce() -> bool) -> bool {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    let (mut here, mut there) = UnixStream::pair().unwrap();
    // SAFETY: the child calls what allocates nothing and takes no lock of another thread's, and ends by a signal.
    match unsafe { libc::fork() } {
        0 => {
            let answer = f();
            let _ = there.write_all(&[answer.into()]);
            // SAFETY: ends the child at once.
            unsafe { libc::raise(libc::SIGKILL) };
            answer
        }
        child => {
            drop(there);
            let mut answer = [0];
            here.read_exact(&mut answer).unwrap();
            // SAFETY: waits for the child that was just made; no status is asked for.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            answer[0] == 1
        }
    }
}

/// Runs `f` while a child that was made before it lives, and has done what a child does first.
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failure here is the test's")]
pub(crate) fn beside_a_child(f: impl FnOnce()) {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    let (mut here, there) = UnixStream::pair().unwrap();
    // SAFETY: the child only writes to and reads from a socket, and ends by a signal.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(here);
        let _ = (&there).write(&[0]);
        let _ = (&there).read(&mut [0]);
        loop {
            // SAFETY: ends the child at once.
            unsafe { libc::raise(libc::SIGKILL) };
        }
    }
    drop(there);
    here.read_exact(&mut [0]).unwrap();
    f();
    here.write_all(&[0]).unwrap();
    // SAFETY: waits for the child that was just made; no status is asked for.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{LockKind, try_lock};
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn a_child_does_not_keep_a_lock() {
        let path = std::env::temp_dir().join(format!("cofferdam-fork-{}", std::process::id()));
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let locked = open();
        assert!(try_lock(&locked, LockKind::Exclusive).unwrap());
        let guard = ForkGuard::new(&locked);
        beside_a_child(|| {
            drop((guard, locked));
            assert!(try_lock(&open(), LockKind::Exclusive).unwrap(), "the child lives, and holds nothing");
        });
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn forked_child_is_detected() {
        let file = File::open("/dev/zero").unwrap();
        let _guard = ForkGuard::new(&file);
        let origin = ProcessGeneration::current();
        assert!(origin.is_current());
        // What is behind the number is another file, and the number is still taken.
        let zero = move || !origin.is_current() && (&file).read(&mut [0]).is_ok_and(|n| n == 0);
        assert!(in_a_child(zero));
        assert!(origin.is_current());
    }
}
