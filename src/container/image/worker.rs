//! The thread that prepares an image, and its caller. The caller waits no longer than allowed, also where a file of the
//! host's does not answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::budget::PrepareDeadline;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{self, ProcessGeneration};

/// Stack of the thread. Nothing there recurses over what is read.
const STACK: usize = 512 << 10;

/// How often the token is checked for a cancellation.
const POLL: Duration = Duration::from_millis(50);

/// How long a thread that is to end has for what it does just then, before it is left behind.
pub(super) const GRACE: Duration = Duration::from_secs(4);

/// Threads of the process that may be left behind before nothing is begun any more.
const MAX_LEFT: u32 = 16;

/// Those that are.
static LEFT: LeftBehind = LeftBehind::new();

/// How many threads of this process are left behind. In a child of fork, where they are not, there are none again.
#[derive(Debug)]
struct LeftBehind(AtomicU64);

impl LeftBehind {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn count(&self) -> u32 {
        Self::of(self.0.load(Ordering::Acquire), ProcessGeneration::current())
    }

    /// The count of a process in what is kept: its number of forks, and below that the count.
    fn of(kept: u64, process: ProcessGeneration) -> u32 {
        if (kept >> 32) as u32 == process.number() { kept as u32 } else { 0 }
    }

    fn change(&self, process: ProcessGeneration, change: impl Fn(u32) -> u32) {
        let changed = |kept| Some(u64::from(process.number()) << 32 | u64::from(change(Self::of(kept, process))));
        // It always has a value to give.
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
    }

    fn add(&self) {
        self.change(ProcessGeneration::current(), |count| count.saturating_add(1));
    }

    fn remove(&self) {
        self.change(ProcessGeneration::current(), |count| count.saturating_sub(1));
    }
}

/// Where a thread is: it and who waits for it each say at most once that they are done with the other.
#[derive(Debug, Clone, Default)]
struct Parting(Arc<AtomicU8>);

impl Parting {
    const LEFT: u8 = 1;
    const ENDED: u8 = 2;

    /// Leaves the thread behind: no thread waits for it any more.
    fn leave(&self, left: &LeftBehind) {
        left.add();
        if self.0.swap(Self::LEFT, Ordering::AcqRel) == Self::ENDED {
            left.remove();
        }
    }

    fn end(&self, left: &LeftBehind) {
        if self.0.swap(Self::ENDED, Ordering::AcqRel) == Self::LEFT {
            left.remove();
        }
    }
}

/// Says that the thread ends, also when it panics.
struct EndOnDrop {
    parting: Parting,
    left: &'static LeftBehind,
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.parting.end(self.left);
    }
}

/// Calls `f` on a thread of its own, which itself checks its deadline.
///
/// A thread that has not ended `grace` after its deadline waits for the host. It is left behind, with all that it
/// holds, and ends when the host answers.
///
/// # Errors
/// What `f` fails with; `TimedOut` and `Cancelled`; `ResourceExhausted` where too many threads were left behind.
pub(super) fn run<T: Send + 'static>(
    deadline: &PrepareDeadline,
    grace: Duration,
    f: impl FnOnce(&PrepareDeadline) -> Result<T> + Send + 'static,
) -> Result<T> {
    run_beside(&LEFT, deadline, grace, f)
}

fn run_beside<T: Send + 'static>(
    left: &'static LeftBehind,
    deadline: &PrepareDeadline,
    grace: Duration,
    f: impl FnOnce(&PrepareDeadline) -> Result<T> + Send + 'static,
) -> Result<T> {
    let count = left.count();
    if count >= MAX_LEFT {
        let problem = format!(
            "{count} threads wait for files of images that the host does not answer for: make their file systems answer, or unmount \
             them by force"
        );
        return Err(Error::new(ErrorKind::ResourceExhausted, problem));
    }
    let (done, answer) = mpsc::sync_channel(1);
    let (own, parting) = (deadline.clone(), Parting::default());
    let ending = EndOnDrop { parting: parting.clone(), left };
    let body = move || {
        let _ending = ending;
        drop(done.send(f(&own)));
    };
    let thread = sys::spawn("image".into(), STACK, body).doing(|| "starting a thread")?;
    let mut over: Option<Instant> = None;
    loop {
        match answer.recv_timeout(POLL) {
            Err(RecvTimeoutError::Timeout) => {}
            answer => {
                let _ = thread.join();
                // Our own fault, whatever the image is.
                let panicked = |_| Err(Error::new(ErrorKind::Io, "preparation has panicked"));
                return answer.unwrap_or_else(panicked);
            }
        }
        if let Err(reason) = deadline.check()
            && over.get_or_insert_with(Instant::now).elapsed() >= grace
        {
            parting.leave(left);
            log::warn!("preparing an image: a file of the host's does not answer; a thread is left behind");
            return Err(reason.doing("waiting for a file of the host's that does not answer"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::CancelToken;

    #[test]
    fn unresponsive_host_file_system_times_out() {
        let cancelled = CancelToken::new().unwrap();
        cancelled.cancel();
        let cases = [
            (Duration::from_millis(50), CancelToken::new().unwrap(), ErrorKind::TimedOut),
            (Duration::MAX, cancelled, ErrorKind::Cancelled),
        ];
        for (timeout, cancel, kind) in cases {
            let (host, answer) = mpsc::channel::<()>();
            let (ended, end) = mpsc::channel();
            let deadline = PrepareDeadline::new(timeout, [&cancel]);
            let outcome: Result<()> = run(&deadline, Duration::from_millis(100), move |_| {
                let _ = answer.recv();
                let _ = ended.send(());
                Ok(())
            });
            assert_eq!(outcome.unwrap_err().kind(), kind);
            assert!(end.try_recv().is_err(), "it still waits");
            drop(host);
            end.recv_timeout(Duration::from_secs(60)).expect("it ends when the host answers");
        }
    }

    #[test]
    fn abandoned_threads_are_counted_until_they_end() {
        static LEFT: LeftBehind = LeftBehind::new();
        let brief = || PrepareDeadline::new(Duration::ZERO, None);
        let mut hosts = Vec::new();
        for n in 0..MAX_LEFT {
            let (host, answer) = mpsc::channel::<()>();
            hosts.push(host);
            let outcome: Result<()> = run_beside(&LEFT, &brief(), Duration::ZERO, move |_| {
                let _ = answer.recv();
                // It counts no more, whichever way it ends.
                assert!(n % 2 == 0, "on purpose");
                Ok(())
            });
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::TimedOut);
        }
        let begin = || run_beside(&LEFT, &PrepareDeadline::new(Duration::from_secs(60), None), GRACE, |_| Ok(7));
        let error = begin().unwrap_err();
        assert!(error.kind() == ErrorKind::ResourceExhausted && error.to_string().contains("16 threads"), "{error}");
        drop(hosts);
        let late = Instant::now() + Duration::from_secs(60);
        while LEFT.count() > 0 {
            assert!(Instant::now() < late, "{LEFT:?} still count");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(begin().unwrap(), 7);
    }

    #[test]
    fn thread_counts_only_while_abandoned() {
        let left = LeftBehind::new();
        let count = || left.count();
        let (first, second) = (Parting::default(), Parting::default());
        first.leave(&left);
        assert_eq!(count(), 1);
        first.end(&left);
        assert_eq!(count(), 0);
        // It ended just as it was to be left.
        second.end(&left);
        second.leave(&left);
        assert_eq!(count(), 0);
    }

    #[test]
    fn forked_child_has_no_abandoned_threads() {
        let left = LeftBehind::new();
        for _ in 0..MAX_LEFT {
            left.add();
        }
        // The child makes one that it leaves behind, and one of its parent's ends.
        let fresh = || {
            let none = left.count() == 0;
            left.remove();
            left.add();
            none && left.count() == 1
        };
        assert!(sys::in_a_child(fresh));
        assert_eq!(left.count(), MAX_LEFT);
    }

    #[test]
    fn work_done_in_time_is_returned() {
        let deadline = PrepareDeadline::new(Duration::MAX, None);
        assert_eq!(run(&deadline, GRACE, |_| Ok(7)).unwrap(), 7);
        let panicked: Result<()> = run(&deadline, GRACE, |_| panic!("on purpose"));
        assert_eq!(panicked.unwrap_err().kind(), ErrorKind::Io);
    }
}
