//! Serves the host's requests for files. A process of its own accepts them, and each runs in a process that serves it alone.
//!
//! All of them are outside the workloads' pid namespace, as the shim is: no workload sees or signals them. The shim's own
//! thread has no part in it, so a file system that does not answer holds up its own requests only.

use super::alloc::vec::Vec;
use super::file_worker;
use super::sys::{self, Errno, Fd, POLLHUP, POLLIN, POLLRDHUP, Poll};
use crate::proto::{FILES_PORT, HOST_CID};

/// Requests at once. More are refused.
const MAX_WORKERS: usize = 16;
/// How long a worker may go on when the host has hung up.
const HUNG_UP_GRACE_NS: u64 = 5_000_000_000;
/// The number of the listener in the server, behind the standard streams.
const LISTENER: i32 = 3;

/// Forks the server. To be called before the workloads' pid namespace is made.
pub(super) fn start() -> Result<(), Errno> {
    let listener = sys::listen_vsock(FILES_PORT)?;
    sys::fork(None, || run(&listener)).map(drop)
}

fn run(listener: &Fd) -> i32 {
    let _ = sys::set_sid();
    let Ok(listener) = sys::move_to(listener, LISTENER) else { return 1 };
    // The control stream above all, which is to end with the shim.
    sys::keep_only(LISTENER as u32 + 1);
    let Ok(signals) = sys::signal_fd(sys::signal_set(&[sys::SIGCHLD])) else { return 1 };
    let mut server = FileServer { listener, signals, workers: Vec::new() };
    while server.serve().is_ok() {}
    1
}

/// A process that serves one request.
#[derive(Debug)]
struct Worker {
    pid: i32,
    /// Its connection, watched for the host's end. The worker closes its own when it ends, and this is closed then.
    connection: Fd,
    /// When it is killed, once the host has hung up.
    deadline: Option<u64>,
}

#[derive(Debug)]
struct FileServer {
    listener: Fd,
    signals: Fd,
    workers: Vec<Worker>,
}

impl FileServer {
    /// Waits for the next event, and serves it.
    fn serve(&mut self) -> Result<(), Errno> {
        let mut polls = Vec::from([&self.listener, &self.signals].map(|fd| poll_for(fd, POLLIN)));
        // One whose host has hung up is not watched any more: it would be ready for ever.
        let watched = self.workers.iter().map(|worker| match worker.deadline {
            None => poll_for(&worker.connection, POLLRDHUP),
            Some(_) => Poll { fd: -1, events: 0, happened: 0 },
        });
        polls.extend(watched);
        match sys::poll(&mut polls, self.workers.iter().filter_map(|worker| worker.deadline).min()) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
        let now = sys::now_ns();
        for (worker, poll) in self.workers.iter_mut().zip(polls.iter().skip(2)) {
            if poll.happened & (POLLRDHUP | POLLHUP) != 0 {
                worker.deadline = Some(now.saturating_add(HUNG_UP_GRACE_NS));
            } else if worker.deadline.is_some_and(|deadline| deadline <= now) {
                let _ = sys::kill(worker.pid, sys::SIGKILL);
                // One that a file system holds up ends when that lets it go.
                worker.deadline = Some(now.saturating_add(HUNG_UP_GRACE_NS));
            }
        }
        while sys::next_signal(&self.signals).is_some() {
            while let Some((pid, _)) = sys::reap() {
                self.workers.retain(|worker| worker.pid != pid);
            }
        }
        while let Ok((connection, cid)) = sys::accept_vsock(&self.listener) {
            if cid == HOST_CID {
                self.start(connection);
            }
        }
        Ok(())
    }

    fn start(&mut self, connection: Fd) {
        if self.workers.len() >= MAX_WORKERS || self.workers.try_reserve(1).is_err() {
            return file_worker::refuse(&connection, Errno::EAGAIN);
        }
        let forked = sys::fork(None, || {
            // Of other requests it has nothing, whatever holds it up.
            let Ok(connection) = sys::move_to(&connection, LISTENER) else { return 1 };
            sys::keep_only(LISTENER as u32 + 1);
            file_worker::serve(&connection)
        });
        match forked {
            Ok(pid) => self.workers.push(Worker { pid, connection, deadline: None }),
            Err(errno) => file_worker::refuse(&connection, errno),
        }
    }
}

fn poll_for(fd: &Fd, events: i16) -> Poll {
    Poll { fd: fd.raw(), events, happened: 0 }
}
