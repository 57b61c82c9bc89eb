//! Threads of this crate.
//!
//! They are named, have a stack of known size, and block the embedder's signals.

use std::io;
use std::mem::MaybeUninit;
use std::thread::{Builder, JoinHandle};

/// What tells a thread of a mistake of its own; blocked, it would end the process without a word.
const OWN_FAULTS: [libc::c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS, libc::SIGABRT];

/// Starts a thread in which all signals are blocked. So handlers of the embedder's do not run on its small stack, and
/// no call of ours is interrupted.
pub(crate) fn spawn<T: Send + 'static>(
    name: String,
    stack: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    unsignaled(|| Builder::new().name(name).stack_size(stack).spawn(body))?
}

/// The same within a scope, which waits for it.
#[cfg(feature = "container")]
pub(crate) fn spawn_scoped<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    name: String,
    stack: usize,
    body: impl FnOnce() -> T + Send + 'scope,
) -> io::Result<std::thread::ScopedJoinHandle<'scope, T>> {
    unsignaled(|| Builder::new().name(name).stack_size(stack).spawn_scoped(scope, body))?
}

/// Calls `f`, which starts a thread, with all signals blocked: a thread begins with the mask of who makes it.
fn unsignaled<T>(f: impl FnOnce() -> T) -> io::Result<T> {
    let before = mask(libc::SIG_SETMASK, &all())?;
    let answer = f();
    mask(libc::SIG_SETMASK, &before)?;
    Ok(answer)
}

fn all() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: sigfillset initializes the set that it is given, before sigdelset takes known signals out of it.
    unsafe {
        libc::sigfillset(set.as_mut_ptr());
        for signal in OWN_FAULTS {
            libc::sigdelset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Sets the calling thread's mask, and gives the one before.
fn mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<libc::sigset_t> {
    let mut old = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `set` is initialized, and `old` is writable and of the right size.
    match unsafe { libc::pthread_sigmask(how, set, old.as_mut_ptr()) } {
        // SAFETY: zeroed, and then filled in by the successful call.
        0 => Ok(unsafe { old.assume_init() }),
        status => Err(io::Error::from_raw_os_error(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocked() -> Vec<i32> {
        let none = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: all zeros is the empty set.
        let mask = mask(libc::SIG_BLOCK, unsafe { none.assume_init_ref() }).unwrap();
        // SAFETY: the set is initialized; a number that is no signal is an error.
        (1..=64).filter(|signal| unsafe { libc::sigismember(&mask, *signal) } == 1).collect()
    }

    #[test]
    fn the_embedders_signals_do_not_reach_our_threads() {
        let before = blocked();
        let ours = spawn("test".into(), super::super::STACK, blocked).unwrap().join().unwrap();
        for signal in [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGALRM, libc::SIGRTMAX()] {
            assert!(ours.contains(&signal), "{signal}");
        }
        assert!(!ours.contains(&libc::SIGSEGV));
        assert_eq!(blocked(), before, "and the embedder's own threads are as they were");
    }
}
