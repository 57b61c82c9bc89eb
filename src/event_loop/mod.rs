//! [`Loop`]: a thread that owns one value. It waits for descriptors, and runs what other threads ask of it.
//!
//! The value never leaves its thread while the loop lives, so it needs no lock. Others call [`Remote::with`]; the
//! closure runs on the owner and its answer comes back.

mod mailbox;

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{self, Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::mailbox::{Closed, Mailbox, Wake};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{
    ControlOperation, Epoll, EpollEvent, EventFd, EventSet, ProcessGeneration, STACK, borrow, deadline, eventfd, leak,
    left, spawn, wait_readable,
};

pub(crate) use crate::sys::EventSet as Interest;

/// How long a request to a loop waits for its answer, unless it says otherwise. Loops take turns of a few milliseconds: one that
/// does not answer in this time hangs in a call of the host's.
pub(crate) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What a loop's value does when one of its descriptors is ready.
pub(crate) trait Handler: Send + 'static {
    /// `token` is what the descriptor was watched with. Must not block.
    fn ready(&mut self, token: u64, events: EventSet);
}

/// Where descriptors are registered. Clones register with the same loop, from its thread or before it runs.
#[derive(Clone)]
pub(crate) struct Sources(Arc<Epoll>);

/// The mailbox's own token; no source may use it.
const MAILBOX: u64 = u64::MAX;

impl Sources {
    /// Reports `fd` as `token` from now on. `Interest::EDGE_TRIGGERED` is as in epoll(7).
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, token: u64, interest: Interest) -> io::Result<()> {
        debug_assert_ne!(token, MAILBOX);
        self.0.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(interest, token))
    }

    /// Of no loop: events of what is watched are not reported.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn detached() -> io::Result<Self> {
        Ok(Self(Arc::new(Epoll::new()?)))
    }

    /// Stops reporting `fd`. Closing the only copy of a descriptor does the same.
    pub(crate) fn unwatch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default())
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sources")
    }
}

impl Wake for EventFd {
    fn wake(&self) {
        // The only possible failure is a counter at its maximum, which is readable all the same.
        let _ = self.write(1);
    }

    fn clear(&self) {
        let _ = self.read();
    }
}

thread_local! {
    /// The address of the mailbox of the loop that runs on this thread; 0 on others.
    static OWN_LOOP: Cell<usize> = const { Cell::new(0) };
}

#[cfg(test)]
thread_local! {
    /// Requests to loops for whose answers this thread has waited.
    pub(crate) static ROUND_TRIPS: Cell<usize> = const { Cell::new(0) };
}

/// A way to reach the value from other threads. Cheap to clone; outliving the loop is harmless.
pub(crate) struct Remote<S>(Arc<Mailbox<S, EventFd>>);

impl<S> Clone for Remote<S> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<S> fmt::Debug for Remote<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Remote")
    }
}

/// Where the answer to one request goes. Dropping it gives the asker an error.
pub(crate) struct Reply<R> {
    answer: mpsc::SyncSender<R>,
    deadline: Option<Instant>,
}

impl<R> Reply<R> {
    /// Answers. False when the asker has given up. Never waits.
    pub(crate) fn send(self, answer: R) -> bool {
        // There is one answer, and a place for it.
        self.answer.try_send(answer).is_ok()
    }

    /// Until when the asker waits; `None` for ever.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the asker has given up, or is about to: what it asked for is not to be begun any more.
    pub(crate) fn is_late(&self) -> bool {
        self.deadline.is_some_and(|deadline| left(deadline).is_zero())
    }

    /// A reply, and where its answer arrives.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn detached(limit: Duration) -> (Self, mpsc::Receiver<R>) {
        let (answer, wait) = mpsc::sync_channel(1);
        (Self { answer, deadline: deadline(limit) }, wait)
    }
}

impl<R> fmt::Debug for Reply<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reply")
    }
}

impl<S: Handler> Remote<S> {
    /// Runs `f` on the owner and waits for its answer, at most [`REQUEST_TIMEOUT`].
    ///
    /// # Errors
    /// `InvalidState` when the loop has ended, or ends without having run `f`, and on the loop's own thread. `TimedOut` when the loop is busy for too long;
    /// `f` is run all the same when the loop comes to it.
    pub(crate) fn with<R: Send + 'static>(&self, f: impl FnOnce(&mut S) -> R + Send + 'static) -> Result<R> {
        self.with_timeout(REQUEST_TIMEOUT, f)
    }

    /// As [`Remote::with`], but waits no longer than `limit`; `f` is run all the same when the loop comes to it.
    ///
    /// # Errors
    /// As [`Remote::with`], and `TimedOut`.
    pub(crate) fn with_timeout<R: Send + 'static>(
        &self,
        limit: Duration,
        f: impl FnOnce(&mut S) -> R + Send + 'static,
    ) -> Result<R> {
        self.with_reply(limit, move |s, reply| {
            // The asker may be gone; the answer is dropped then.
            let _ = reply.send(f(s));
        })
    }

    /// As [`Remote::with_timeout`], but `f` may answer later than it returns: it is given where the answer goes.
    ///
    /// # Errors
    /// As [`Remote::with_timeout`]. `InvalidState` also when the [`Reply`] is dropped without an answer.
    pub(crate) fn with_reply<R: Send + 'static>(
        &self,
        limit: Duration,
        f: impl FnOnce(&mut S, Reply<R>) + Send + 'static,
    ) -> Result<R> {
        self.check_thread()?;
        #[cfg(test)]
        ROUND_TRIPS.set(ROUND_TRIPS.get() + 1);
        let (answer, wait) = mpsc::sync_channel(1);
        let reply = Reply { answer, deadline: deadline(limit) };
        self.post(move |s| f(s, reply))?;
        answered(&wait, limit)
    }

    /// # Errors
    /// `InvalidState` on the loop's own thread, which cannot wait for itself.
    fn check_thread(&self) -> Result<()> {
        match OWN_LOOP.get() == Arc::as_ptr(&self.0).addr() {
            true => Err(Error::new(
                ErrorKind::InvalidState,
                "called on the thread that would have to answer: such calls need another thread",
            )),
            false => Ok(()),
        }
    }

    /// Runs `f` on the owner some time soon.
    ///
    /// # Errors
    /// `InvalidState` when the loop has ended.
    pub(crate) fn post(&self, f: impl FnOnce(&mut S) + Send + 'static) -> Result<()> {
        self.0.post(Box::new(f)).map_err(|Closed| Error::vm_ended())
    }

    /// Keeps the loop from looking at its descriptors: when this returns, nothing happens to its value but what others ask
    /// of it. What becomes ready meanwhile is seen after [`Remote::resume`]. Idempotent; one thread asks at a time.
    ///
    /// # Errors
    /// `InvalidState` when the loop has ended, `TimedOut` when it is busy for longer than `limit`; then it is not suspended.
    pub(crate) fn suspend(&self, limit: Duration) -> Result<()> {
        self.check_thread()?;
        let (held, wait) = mpsc::sync_channel(1);
        match self.0.suspend(held).map_err(|Closed| Error::vm_ended())? {
            true => answered(&wait, limit).inspect_err(|_| self.resume()),
            false => Ok(()),
        }
    }

    /// Lets the loop look at its descriptors again. Idempotent.
    pub(crate) fn resume(&self) {
        self.0.resume();
    }
}

fn answered<R>(wait: &mpsc::Receiver<R>, limit: Duration) -> Result<R> {
    wait.recv_timeout(limit).map_err(|error| match error {
        mpsc::RecvTimeoutError::Disconnected => Error::vm_ended(),
        mpsc::RecvTimeoutError::Timeout => {
            Error::new(ErrorKind::TimedOut, format!("an event loop was busy for longer than {limit:?}"))
        }
    })
}

/// How long a drop of a loop waits for its thread, on which what the loop owns is dropped. That may be a disk whose last
/// blocks are written then.
pub(crate) const LOOP_END_TIMEOUT: Duration = Duration::from_secs(10);

/// A running loop. Dropping it stops the thread, which drops the value, and waits [`LOOP_END_TIMEOUT`] at most.
pub(crate) struct Loop<S: Handler> {
    mailbox: Arc<Mailbox<S, EventFd>>,
    thread: Option<JoinHandle<()>>,
    /// Its sender goes when the thread has dropped everything.
    ended: Mutex<mpsc::Receiver<()>>,
    /// The owner does not wait for the thread any more.
    abandoned: AtomicBool,
    /// A child of fork has no such thread.
    origin: ProcessGeneration,
}

impl<S: Handler> Loop<S> {
    /// Starts a thread called `name` that owns what `make` returns.
    ///
    /// # Errors
    /// `ResourceExhausted` or `Io` when descriptors or the thread cannot be made.
    pub(crate) fn start(name: &str, make: impl FnOnce(Sources) -> S) -> Result<Self> {
        let sources = Sources(Arc::new(Epoll::new().doing(|| "creating an event loop")?));
        let wake = eventfd().doing(|| "creating an event loop")?;
        sources
            .0
            .ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, MAILBOX))
            .doing(|| "creating an event loop")?;
        let mailbox = Arc::new(Mailbox::new(wake));
        let (mut value, epoll, theirs) = (make(sources.clone()), sources.0, mailbox.clone());
        let (alive, ended) = mpsc::channel();
        let body = move || {
            OWN_LOOP.set(Arc::as_ptr(&theirs).addr());
            // A panic is our own mistake. It must not leave others waiting for answers for ever.
            let _ = catch_unwind(AssertUnwindSafe(|| run(&mut value, &epoll, &theirs)));
            theirs.end();
            // Part of it may be the embedder's, whose drop may panic, or hang.
            let _ = catch_unwind(AssertUnwindSafe(move || drop(value)));
            drop::<mpsc::Sender<()>>(alive);
        };
        let thread = spawn(name.into(), STACK, body).doing(|| format!("starting thread {name}"))?;
        Ok(Self {
            mailbox,
            thread: Some(thread),
            ended: Mutex::new(ended),
            abandoned: AtomicBool::new(false),
            origin: ProcessGeneration::current(),
        })
    }

    pub(crate) fn remote(&self) -> Remote<S> {
        Remote(self.mailbox.clone())
    }

    /// Keeps the loop's drop from waiting for its thread, which hangs in a call of the host's. The thread ends, and
    /// drops the value, when that call returns.
    pub(crate) fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
    }

    /// Asks the thread to end after the requests in its mailbox. Does not wait.
    pub(crate) fn close(&self) {
        if self.origin.is_current() {
            self.mailbox.close();
        }
    }

    /// Asks the thread to end, and waits until it has dropped its value, but not beyond `deadline`. Idempotent.
    pub(crate) fn end(&mut self, deadline: Instant) {
        if !self.origin.is_current() {
            leak(self.thread.take());
            return;
        }
        self.mailbox.close();
        let Some(thread) = self.thread.take().filter(|_| !self.abandoned.load(Ordering::SeqCst)) else {
            return;
        };
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        match ended.recv_timeout(left(deadline)) {
            Err(mpsc::RecvTimeoutError::Timeout) => {
                log::warn!(
                    "a thread of a VM still drops what it owns, and is left behind: it ends when that has ended"
                );
            }
            // The thread's panic was its own; the hook and every failing `with` reported it.
            _ => drop(thread.join()),
        }
    }
}

/// Loops that end together: a thread that hangs takes nothing of the others' time.
#[derive(Debug)]
pub(crate) struct Loops<S: Handler>(Vec<Loop<S>>);

impl<S: Handler> Loops<S> {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn push(&mut self, it: Loop<S>) {
        self.0.push(it);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Loop<S>> {
        self.0.iter()
    }
}

impl<S: Handler> Drop for Loops<S> {
    fn drop(&mut self) {
        self.0.iter().for_each(Loop::close);
        let deadline = Instant::now() + LOOP_END_TIMEOUT;
        self.0.iter_mut().for_each(|it| it.end(deadline));
    }
}

impl<S: Handler> Drop for Loop<S> {
    fn drop(&mut self) {
        self.end(Instant::now() + LOOP_END_TIMEOUT);
    }
}

impl<S: Handler> fmt::Debug for Loop<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Loop")
    }
}

/// How many ready descriptors are taken from the kernel at once.
const BATCH: usize = 32;

fn run<S: Handler>(value: &mut S, epoll: &Epoll, mailbox: &Mailbox<S, EventFd>) {
    let mut events = [EpollEvent::default(); BATCH];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                log::error!("an event loop cannot wait any more: {e}");
                return;
            }
        };
        let mut asked = false;
        for (n, event) in events.iter().take(count).enumerate() {
            // An asker waits for one turn of one descriptor, however many are ready.
            if event.data() == MAILBOX || n > 0 && mailbox.asked() {
                asked = true;
                if !mailbox.serve(value) {
                    return;
                }
            }
            if event.data() != MAILBOX {
                value.ready(event.data(), event.event_set());
            }
        }
        // Only now, as the kernel may not report again what was taken from it.
        while asked && mailbox.is_suspended() {
            if let Err(e) = wait_readable(borrow(mailbox.waker()), None) {
                log::error!("an event loop cannot wait any more: {e}");
                return;
            }
            if !mailbox.serve(value) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[derive(Default)]
    struct Counter {
        kicks: Option<EventFd>,
        seen: u64,
    }

    impl Handler for Counter {
        fn ready(&mut self, token: u64, _: EventSet) {
            assert_eq!(token, 7);
            self.seen += self.kicks.as_ref().unwrap().read().unwrap();
        }
    }

    fn counter() -> Loop<Counter> {
        Loop::start("test", |sources| {
            let kicks = eventfd().unwrap();
            sources.watch(borrow(&kicks), 7, Interest::IN).unwrap();
            Counter { kicks: Some(kicks), seen: 0 }
        })
        .unwrap()
    }

    #[test]
    fn posted_closures_run_on_the_loop_and_return_values() {
        let it = counter();
        let name = it.remote().with(|_| thread::current().name().map(str::to_owned)).unwrap();
        assert_eq!(name.as_deref(), Some("test"));
    }

    #[test]
    fn ready_descriptors_are_dispatched() {
        let it = counter();
        it.remote().with(|c| c.kicks.as_ref().unwrap().write(3)).unwrap().unwrap();
        while it.remote().with(|c| c.seen).unwrap() < 3 {}
        assert_eq!(it.remote().with(|c| c.seen).unwrap(), 3);
    }

    #[test]
    fn suspended_loop_serves_only_its_mailbox() {
        let (it, limit) = (counter(), Duration::from_secs(10));
        for _ in 0..100 {
            it.remote().suspend(limit).unwrap();
            it.remote().suspend(limit).unwrap();
            let before = it.remote().with(|c| (c.kicks.as_ref().unwrap().write(1), c.seen).1).unwrap();
            assert_eq!(it.remote().with(|c| c.seen).unwrap(), before);
            it.remote().resume();
            while it.remote().with(|c| c.seen).unwrap() == before {}
        }
        it.remote().suspend(limit).unwrap();
        assert_eq!(it.remote().with(|c| c.seen).unwrap(), 100);
    }

    #[test]
    fn forked_child_drops_its_copy_harmlessly() {
        let it = counter();
        let joined = crate::sys::in_a_child(|| {
            // Its stack may be where the loop's thread had its own.
            let mine = thread::Builder::new().stack_size(STACK).spawn(|| thread::sleep(Duration::from_millis(20)));
            drop(it);
            mine.is_ok_and(|thread| thread.join().is_ok())
        });
        assert!(joined);
    }

    #[test]
    fn suspend_of_a_busy_loop_times_out() {
        let it = counter();
        it.remote().post(|_| thread::sleep(Duration::from_millis(300))).unwrap();
        assert_eq!(it.remote().suspend(Duration::from_millis(10)).unwrap_err().kind(), ErrorKind::TimedOut);
        it.remote().with(|c| c.kicks.as_ref().unwrap().write(1)).unwrap().unwrap();
        while it.remote().with(|c| c.seen).unwrap() == 0 {}
    }

    #[test]
    fn requests_to_a_hanging_loop_time_out() {
        let (it, (hang, come_back)) = (counter(), mpsc::channel::<()>());
        it.remote().post(move |_| assert!(come_back.recv().is_err())).unwrap();
        let outcome = it.remote().with_timeout(Duration::from_millis(10), |c| c.seen += 1);
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::TimedOut);
        let remote = it.remote();
        it.abandon();
        drop(it);
        assert_eq!(remote.with(|_| ()).unwrap_err().kind(), ErrorKind::InvalidState);
        drop(hang);
    }

    #[test]
    fn requests_on_the_loops_own_thread_fail_at_once() {
        let (it, other) = (counter(), counter());
        let (own, others) = (it.remote(), other.remote());
        let begin = Instant::now();
        let (kinds, seen) = it
            .remote()
            .with(move |_| {
                let (reply, limit) = (|_: &mut Counter, _: Reply<()>| {}, Duration::from_secs(10));
                let outcomes = [own.with(|_| ()), own.with_reply(limit, reply), own.suspend(limit)];
                // Another loop can be asked, and its own can be given work.
                own.post(|c| c.seen += 1).unwrap();
                (outcomes.map(|it| it.unwrap_err().kind()), others.with(|c| c.seen).unwrap())
            })
            .unwrap();
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        assert_eq!((kinds, seen), ([ErrorKind::InvalidState; 3], 0));
        assert_eq!(it.remote().with(|c| c.seen).unwrap(), 1, "and the loop goes on");
    }

    #[test]
    fn answers_that_come_later_than_the_closure_are_waited_for() {
        /// Keeps what asks until a descriptor is ready.
        struct Later(EventFd, Option<Reply<u32>>);
        impl Handler for Later {
            fn ready(&mut self, _: u64, _: EventSet) {
                let _ = self.0.read();
                assert!(self.1.take().unwrap().send(5));
            }
        }
        let it = Loop::start("later", |sources| {
            let kick = eventfd().unwrap();
            sources.watch(borrow(&kick), 7, Interest::IN).unwrap();
            Later(kick, None)
        })
        .unwrap();
        let answered = it.remote().with_reply(REQUEST_TIMEOUT, |later, reply| {
            later.1 = Some(reply);
            later.0.write(1).unwrap();
        });
        assert_eq!(answered.unwrap(), 5);
        // One that is dropped is an error, and one that comes too late has no receiver.
        let dropped = it.remote().with_reply(REQUEST_TIMEOUT, |_, reply: Reply<()>| drop(reply));
        assert_eq!(dropped.unwrap_err().kind(), ErrorKind::InvalidState);
        let late = it.remote().with_reply(Duration::from_millis(1), |later, reply| later.1 = Some(reply));
        assert_eq!(late.unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(!it.remote().with(|later| later.1.take().unwrap().send(1)).unwrap());
    }

    #[test]
    fn requests_before_the_end_are_served_and_later_ones_refused() {
        let it = counter();
        let remote = it.remote();
        for _ in 0..100 {
            remote.post(|c| c.seen += 1).unwrap();
        }
        let (last, seen) = mpsc::channel();
        remote.post(move |c| last.send(c.seen).unwrap()).unwrap();
        drop(it);
        assert_eq!(seen.recv().unwrap(), 100);
        assert_eq!(remote.with(|_| ()).unwrap_err().kind(), ErrorKind::InvalidState);
    }

    #[test]
    fn request_waits_for_one_turn_only() {
        /// Many descriptors that are always ready, each of which takes its time.
        struct Busy(#[allow(dead_code, reason = "they are open")] Vec<EventFd>, u32);
        impl Handler for Busy {
            fn ready(&mut self, _: u64, _: EventSet) {
                thread::sleep(Duration::from_millis(20));
                self.1 += 1;
            }
        }
        let it = Loop::start("busy", |sources| {
            let all: Vec<_> = (0..BATCH).map(|_| eventfd().unwrap()).collect();
            for (token, fd) in (0..).zip(&all) {
                sources.watch(borrow(fd), token, Interest::IN).unwrap();
                fd.write(1).unwrap();
            }
            Busy(all, 0)
        })
        .unwrap();
        let turns = || it.remote().with(|busy| busy.1).unwrap();
        let mut before = turns();
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(5));
            let now = turns();
            assert!(now - before <= 4, "{} turns came first", now - before);
            before = now;
        }
    }

    #[test]
    fn panic_wakes_all_waiters() {
        let it = counter();
        let remote = it.remote();
        assert!(remote.with(|_| panic!("on purpose")).is_err());
        assert!(remote.with(|_| ()).is_err());
        drop(it);
    }

    #[test]
    fn a_value_whose_drop_panics_or_hangs_holds_nobody_up() {
        struct Embedders(mpsc::Receiver<()>);
        impl Handler for Embedders {
            fn ready(&mut self, _: u64, _: EventSet) {}
        }
        impl Drop for Embedders {
            fn drop(&mut self) {
                assert!(self.0.recv().is_ok(), "on purpose");
            }
        }
        let (panics, hook) = mpsc::channel();
        let it = Loop::start("panics", |_| Embedders(hook)).unwrap();
        drop(panics);
        drop(it);
        let (hangs, hook) = mpsc::channel();
        let mut it = Loop::start("hangs", |_| Embedders(hook)).unwrap();
        it.end(Instant::now() + Duration::from_millis(10));
        drop(it);
        hangs.send(()).unwrap();
    }
}
