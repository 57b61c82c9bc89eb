//! The thread that prepares an image, and whoever waits for it: no longer than allowed, also where a file of the host's does not
//! answer.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::budget::Patience;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys;

/// Stack of the thread. Nothing there recurses over what is read.
const STACK: usize = 512 << 10;

/// How often is looked whether somebody has cancelled.
const POLL: Duration = Duration::from_millis(50);

/// How long a thread that is to end has for what it does just then, before it is left behind.
pub(super) const GRACE: Duration = Duration::from_secs(4);

/// Calls `f` on a thread of its own, which itself looks at its patience. A thread that does not end `grace` after that is over
/// waits for the host; it is left behind, with all that it holds, and ends when the host answers.
///
/// # Errors
/// What `f` fails with; `TimedOut` and `Cancelled`.
pub(super) fn run<T: Send + 'static>(
    patience: &Patience,
    grace: Duration,
    f: impl FnOnce(&Patience) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, answer) = mpsc::sync_channel(1);
    let own = patience.clone();
    let body = move || drop(done.send(f(&own)));
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
        if let Err(reason) = patience.check() {
            if over.get_or_insert_with(Instant::now).elapsed() >= grace {
                log::warn!("preparing an image: a file of the host's does not answer; a thread is left behind");
                return Err(reason.doing("waiting for a file of the host's that does not answer"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::CancelToken;

    #[test]
    fn a_host_that_does_not_answer_is_not_waited_for() {
        let cancelled = CancelToken::new().unwrap();
        cancelled.cancel();
        let cases = [
            (Duration::from_millis(50), CancelToken::new().unwrap(), ErrorKind::TimedOut),
            (Duration::MAX, cancelled, ErrorKind::Cancelled),
        ];
        for (timeout, cancel, kind) in cases {
            let (host, answer) = mpsc::channel::<()>();
            let (ended, end) = mpsc::channel();
            let patience = Patience::new(timeout, [&cancel]);
            let outcome: Result<()> = run(&patience, Duration::from_millis(100), move |_| {
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
    fn what_is_done_in_time_is_given_back() {
        let patience = Patience::new(Duration::MAX, None);
        assert_eq!(run(&patience, GRACE, |_| Ok(7)).unwrap(), 7);
        let panicked: Result<()> = run(&patience, GRACE, |_| panic!("on purpose"));
        assert_eq!(panicked.unwrap_err().kind(), ErrorKind::Io);
    }
}
