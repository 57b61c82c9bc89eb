//! The one real-time signal with which vCPU threads are taken out of the guest.
//!
//! Its handler does nothing: what matters is that delivery interrupts `KVM_RUN`.
//! Installing it is the only thing this crate changes process-wide, and it is documented on
//! [`VmBuilder::kick_signal`](crate::VmBuilder::kick_signal).

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

extern "C" fn nothing(_: libc::c_int) {}

/// A signal number whose handler is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KickSignal(libc::c_int);

impl KickSignal {
    /// Returns the number of real-time signal `SIGRTMIN + offset`.
    ///
    /// # Errors
    /// `InvalidConfig` when there is none.
    pub(crate) fn check(offset: u8) -> Result<libc::c_int> {
        let number = libc::SIGRTMIN() + i32::from(offset);
        if number > libc::SIGRTMAX() {
            return Err(Error::invalid("kick_signal", format!("SIGRTMIN+{offset} is beyond SIGRTMAX")));
        }
        Ok(number)
    }

    /// Takes real-time signal `SIGRTMIN + offset`, unless the process uses it for something else.
    pub(crate) fn install(offset: u8) -> Result<Self> {
        let number = Self::check(offset)?;
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: a null new action only queries; `old` is writable and large enough.
        if unsafe { libc::sigaction(number, std::ptr::null(), old.as_mut_ptr()) } != 0 {
            return Err(Error::last_os().doing("asking for the kick signal's handler"));
        }
        // SAFETY: zeroed and then filled in by the successful call above.
        let old = unsafe { old.assume_init() };
        let ours = nothing as extern "C" fn(libc::c_int) as usize;
        if old.sa_sigaction == ours {
            return Ok(Self(number));
        }
        if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN {
            return Err(Error::new(
                ErrorKind::InvalidState,
                format!("kick_signal: SIGRTMIN+{offset} already has a handler in this process; choose another signal"),
            ));
        }
        // SAFETY: an all-zero sigaction is valid: empty mask, no flags. No SA_RESTART: interrupting is the purpose.
        let mut new: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        new.sa_sigaction = ours;
        // SAFETY: `new` is a valid action whose handler is async-signal-safe, as it does nothing.
        if unsafe { libc::sigaction(number, &new, std::ptr::null_mut()) } != 0 {
            return Err(Error::last_os().doing("installing the kick signal's handler"));
        }
        Ok(Self(number))
    }

    /// Makes sure the calling thread does not block the signal: threads inherit their creator's mask.
    pub(crate) fn unblock(self) -> io::Result<()> {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: `set` is writable; sigemptyset initializes it before sigaddset and pthread_sigmask read it.
        let status = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), self.0);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut())
        };
        if status == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(status)) }
    }

    /// Interrupts `thread`, which must be one of this process.
    pub(crate) fn send(self, thread: ThreadId) -> io::Result<()> {
        // SAFETY: tgkill takes numbers only; a thread that is gone gives ESRCH.
        match unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.0, self.0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Sends the kick signal to the thread that made it again and again, until it is dropped there.
#[derive(Debug)]
pub(crate) struct PeriodicKick(libc::timer_t);

impl PeriodicKick {
    /// # Errors
    /// `ResourceExhausted` when the process may have no more timers (`RLIMIT_SIGPENDING`).
    pub(crate) fn start(signal: KickSignal, period: Duration) -> io::Result<Self> {
        // SAFETY: an all-zero sigevent is valid.
        let mut event: libc::sigevent = unsafe { MaybeUninit::zeroed().assume_init() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal.0;
        event.sigev_notify_thread_id = ThreadId::current().0;
        let mut timer = MaybeUninit::<libc::timer_t>::zeroed();
        // SAFETY: `event` names a thread of this process, and `timer` is writable.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, timer.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: filled in by the successful call.
        let timer = Self(unsafe { timer.assume_init() });
        let time = libc::timespec {
            tv_sec: i64::try_from(period.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: period.subsec_nanos().into(),
        };
        let times = libc::itimerspec { it_interval: time, it_value: time };
        // SAFETY: the timer exists, and the times are readable; the old ones are not asked for.
        match unsafe { libc::timer_settime(timer.0, 0, &times, std::ptr::null_mut()) } {
            0 => Ok(timer),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for PeriodicKick {
    fn drop(&mut self) {
        // SAFETY: the timer was made by `start`, and is used no more.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// The kernel's number of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ThreadId(libc::pid_t);

impl ThreadId {
    /// The calling thread.
    pub(crate) fn current() -> Self {
        // SAFETY: gettid has no preconditions.
        Self(unsafe { libc::gettid() })
    }

    /// Processor time that it has used; zero when it is gone. Must be a thread of this process.
    pub(crate) fn cpu_time(self) -> Duration {
        // The clock of a thread by its number, as clock_getres(2) builds it: CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED.
        let clock = !self.0 << 3 | 6;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is writable; a clock that does not exist gives EINVAL.
        match unsafe { libc::clock_gettime(clock, &mut time) } {
            0 => Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)),
            _ => Duration::ZERO,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_processor_time_grows_and_ends_with_it() {
        let mine = ThreadId::current();
        let before = mine.cpu_time();
        while mine.cpu_time() < before + Duration::from_millis(5) {}
        let gone = std::thread::spawn(ThreadId::current).join().unwrap();
        assert!(gone.cpu_time() < before + Duration::from_millis(5));
    }

    #[test]
    fn handler_installs_twice_but_not_over_another() {
        assert_eq!(KickSignal::install(3).unwrap(), KickSignal::install(3).unwrap());
        extern "C" fn theirs(_: libc::c_int) {}
        // SAFETY: a zeroed sigaction with a harmless handler; the signal is used by this test only.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            action.sa_sigaction = theirs as extern "C" fn(libc::c_int) as usize;
            assert_eq!(libc::sigaction(libc::SIGRTMIN() + 4, &action, std::ptr::null_mut()), 0);
        }
        assert_eq!(KickSignal::install(4).unwrap_err().kind(), ErrorKind::InvalidState);
        assert_eq!(KickSignal::install(200).unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}
