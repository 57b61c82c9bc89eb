//! How the host shares its processors among threads.

use std::io;

/// Makes the calling thread SCHED_BATCH: when it wakes it preempts no other. It waits for a free processor, or for its
/// turn. Its share stays the same (sched(7), `SCHED_BATCH`).
pub(crate) fn set_sched_batch() -> io::Result<()> {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: the parameter lives across the call; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &none) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How long the calling thread has had a processor.
#[cfg(any(test, feature = "internals"))]
pub(crate) fn processor_time() -> std::time::Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure is valid for writes across the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    std::time::Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_sched_batch_affects_the_calling_thread_only() {
        // SAFETY: 0 is the calling thread; there are no pointers.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let before = policy();
        let thread = std::thread::spawn(move || set_sched_batch().map(|()| policy()));
        assert_eq!(thread.join().unwrap().unwrap(), libc::SCHED_BATCH);
        assert_eq!(policy(), before);
    }
}
