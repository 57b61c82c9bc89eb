//! Handles on runtimes of one thread and of several, without guests.

use std::cell::Cell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Builder;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::Async;
use super::ends::ended;
use crate::error::ErrorKind;
use crate::sys::{EventFd, borrow, eventfd};
use crate::virtio::vsock::{AcceptQueue, VsockListener, VsockStream};
use crate::vm::events::{EventKind, EventLog, PauseCause};
use crate::vm::exit::{ExitReport, Stage};
use crate::vm::{Exit, Vm};

/// Longer than any of this takes on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs a task on a runtime of one thread.
fn run<T>(task: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { timeout(LIMIT, task).await.expect("it is never woken") })
}

/// Polls a future once, and drops it; whether it was ready.
async fn is_ready(future: impl Future) -> bool {
    let mut future = pin!(future);
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await
}

/// A connection on the runtime, and the device's end, which blocks.
fn connected() -> (Async<VsockStream>, UnixStream) {
    let (near, far, _) = VsockStream::pair().unwrap();
    far.set_nonblocking(false).unwrap();
    (Async::new(near).unwrap(), far)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

const PAUSED: EventKind = EventKind::Paused { cause: PauseCause::Embedder };

fn exit() -> Exit {
    Exit::PowerOff { report: Arc::new(ExitReport::new(Stage::Running)) }
}

#[test]
fn megabytes_pass_both_ways_at_once_in_parts() {
    run(async {
        let (near, far) = connected();
        let mut echo = far.try_clone().unwrap();
        let echo = thread::spawn(move || {
            // Slow, and in parts of no even size.
            let (mut far, mut buffer) = (far, vec![0; 70_001]);
            loop {
                match far.read(&mut buffer).unwrap() {
                    0 => return echo.shutdown(Shutdown::Write).unwrap(),
                    n => echo.write_all(&buffer[..n]).unwrap(),
                }
            }
        });
        let bytes = pattern(8 << 20);
        let (mut reader, mut writer) = tokio::io::split(near);
        let sent = bytes.clone();
        let writing = tokio::spawn(async move {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
            writer
        });
        let mut read = Vec::new();
        reader.read_to_end(&mut read).await.unwrap();
        assert!(read == bytes, "{} bytes came back", read.len());
        drop(writing.await.unwrap());
        echo.join().unwrap();
    });
}

#[test]
fn short_reads_return_what_is_there() {
    run(async {
        let (mut near, mut far) = connected();
        far.write_all(b"abcdef").unwrap();
        let (mut first, mut rest) = ([0; 2], [0; 64]);
        assert_eq!(near.read(&mut first).await.unwrap(), 2);
        assert_eq!(near.read(&mut rest).await.unwrap(), 4);
        assert_eq!((&first, &rest[..4]), (b"ab", &b"cdef"[..]));
        assert!(!is_ready(near.read(&mut rest)).await, "there is no more");
    });
}

#[test]
fn dropped_reads_and_writes_lose_nothing() {
    run(async {
        let (mut near, mut far) = connected();
        let mut buffer = [0; 3];
        for _ in 0..3 {
            assert!(!is_ready(near.read(&mut buffer)).await);
        }
        far.write_all(b"all").unwrap();
        assert_eq!(near.read(&mut buffer).await.unwrap(), 3);
        assert_eq!(&buffer, b"all");
        // What a write took before one had to wait arrives, and no byte of the one that waited.
        let (mut taken, bytes) = (0, pattern(1 << 20));
        loop {
            let mut write = pin!(near.write(&bytes[taken % 251..]));
            match poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx))).await {
                Poll::Ready(written) => taken += written.unwrap(),
                Poll::Pending => break,
            }
        }
        assert!(taken > 0);
        let reader = thread::spawn(move || {
            let mut read = vec![0; taken];
            far.read_exact(&mut read).unwrap();
            let mut last = Vec::new();
            far.read_to_end(&mut last).unwrap();
            (read, last)
        });
        // It is woken by the reader.
        near.write_all(b"last").await.unwrap();
        near.shutdown().await.unwrap();
        let (read, last) = reader.join().unwrap();
        assert!(read.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8), "not in order");
        assert_eq!(last, b"last");
    });
}

#[test]
fn shutdown_ends_one_direction() {
    run(async {
        let (mut near, mut far) = connected();
        near.write_all(b"question").await.unwrap();
        near.flush().await.unwrap();
        near.shutdown().await.unwrap();
        let far = thread::spawn(move || {
            let mut question = String::new();
            far.read_to_string(&mut question).unwrap();
            far.write_all(b"answer").unwrap();
            question
        });
        let mut answer = String::new();
        near.read_to_string(&mut answer).await.unwrap();
        assert_eq!((answer.as_str(), far.join().unwrap().as_str()), ("answer", "question"));
        let error = near.write(b"more").await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        // Once more is no mistake.
        near.shutdown().await.unwrap();
    });
}

#[test]
fn end_of_the_machine_wakes_readers_and_writers() {
    run(async {
        let (near, far, tail) = VsockStream::pair().unwrap();
        let breaker = near.breaker();
        let mut near = Async::new(near).unwrap();
        let reading = tokio::spawn(async move {
            let mut read = Vec::new();
            near.read_to_end(&mut read).await.map(|_| read)
        });
        yield_now().await;
        tail.lock().unwrap().unread = VecDeque::from(b"what the socket had no room for".to_vec());
        drop(far);
        assert_eq!(reading.await.unwrap().unwrap(), b"what the socket had no room for");

        let (mut near, far) = connected();
        let writer = near.get_ref().breaker();
        let writing = tokio::spawn(async move { near.write_all(&pattern(8 << 20)).await });
        yield_now().await;
        writer.break_off();
        assert_eq!(writing.await.unwrap().unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
        drop(far);

        // And those of a stream that the host ends while the guest keeps it.
        let (mut near, _far) = connected();
        let stream = near.get_ref().breaker();
        let reading = tokio::spawn(async move { near.read(&mut [0; 1]).await });
        yield_now().await;
        stream.break_off();
        assert_eq!(reading.await.unwrap().unwrap(), 0);
        // One that is gone is no longer there to be ended.
        breaker.break_off();
    });
}

#[test]
fn clone_of_a_connection_is_refused_until_the_first_is_taken_back() {
    run(async {
        let (near, mut far) = connected();
        let clone = near.get_ref().try_clone().unwrap();
        let error = Async::new(clone).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        // It blocks again: without that the read would fail with `WouldBlock`.
        let mut stream = near.into_inner().unwrap();
        let late = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            far.write_all(b"x").unwrap();
            far
        });
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 1);
        let mut far = late.join().unwrap();
        let mut near = Async::new(stream).unwrap();
        far.write_all(b"y").unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'y');
        // A drop closes it.
        drop(near);
        assert_eq!(far.read(&mut [0; 1]).unwrap(), 0);
    });
}

#[cfg(feature = "container")]
#[test]
fn standard_streams_of_a_process_are_read_and_written() {
    use crate::container::{ProcessReader, ProcessWriter};
    run(async {
        let [(stdin, mut stdin_far), (stdout, mut stdout_far)] = [(); 2].map(|()| {
            let (near, far, _) = VsockStream::pair().unwrap();
            far.set_nonblocking(false).unwrap();
            (near, far)
        });
        let mut stdin = Async::new(ProcessWriter(stdin)).unwrap();
        let mut stdout = Async::new(ProcessReader(stdout)).unwrap();
        let cat = thread::spawn(move || std::io::copy(&mut stdin_far, &mut stdout_far).unwrap());
        let writing = tokio::spawn(async move {
            stdin.write_all(&pattern(3 << 20)).await.unwrap();
            // Its drop is the end of file.
        });
        let mut read = Vec::new();
        stdout.read_to_end(&mut read).await.unwrap();
        assert!(read == pattern(3 << 20));
        writing.await.unwrap();
        assert_eq!(cat.join().unwrap(), 3 << 20);
    });
}

#[test]
fn events_are_each_given_to_one_task_and_then_end() {
    run(async {
        let log = EventLog::new(Instant::now());
        let events = Arc::new(Async::new(log.reader().unwrap()).unwrap());
        assert!(!is_ready(events.next()).await, "there is none");
        log.push(EventKind::Started);
        assert_eq!(events.next().await.unwrap().unwrap().kind, EventKind::Started);
        let tasks: Vec<_> = (0..2)
            .map(|_| {
                let events = events.clone();
                tokio::spawn(async move {
                    let mut seen = 0;
                    while let Some(event) = events.next().await.unwrap() {
                        seen += usize::from(event.kind == PAUSED);
                        yield_now().await;
                    }
                    seen
                })
            })
            .collect();
        yield_now().await;
        let pushing = thread::spawn(move || {
            (0..100).for_each(|_| log.push(PAUSED));
            log.push(EventKind::Ended { exit: exit() });
        });
        let mut seen = 0;
        for task in tasks {
            seen += task.await.unwrap();
        }
        pushing.join().unwrap();
        assert_eq!(seen, 100);
        assert!(events.next().await.unwrap().is_none(), "the end is for ever");
    });
}

#[test]
fn no_event_is_missed_that_comes_while_a_task_goes_to_wait() {
    run(async {
        let log = EventLog::new(Instant::now());
        let events = Async::new(log.reader().unwrap()).unwrap();
        let read = Arc::new(AtomicUsize::new(0));
        let seen = read.clone();
        let pushing = thread::spawn(move || {
            for number in 0..20_000 {
                log.push(PAUSED);
                // The next one comes when this was read, at the moment when the reader goes to wait.
                while seen.load(Ordering::Acquire) <= number {
                    thread::yield_now();
                }
            }
        });
        for number in 0..20_000 {
            assert_eq!(events.next().await.unwrap().unwrap().kind, PAUSED);
            read.store(number + 1, Ordering::Release);
        }
        pushing.join().unwrap();
    });
}

#[test]
fn connections_are_accepted_until_the_listener_is_closed() {
    run(async {
        let arrivals = AcceptQueue::new().unwrap();
        let listener = Async::new(VsockListener::new(arrivals.clone(), 7)).unwrap();
        assert!(!is_ready(listener.accept()).await);
        let guest = thread::spawn(move || {
            let fars: Vec<_> = (0..20)
                .map(|number| {
                    let (near, far, _) = VsockStream::pair().unwrap();
                    far.set_nonblocking(false).unwrap();
                    arrivals.push(near);
                    (&far).write_all(&[number]).unwrap();
                    far
                })
                .collect();
            (fars, arrivals)
        });
        for number in 0..20 {
            let mut stream = Async::new(listener.accept().await.unwrap()).unwrap();
            assert_eq!(stream.read_u8().await.unwrap(), number);
        }
        let (_fars, arrivals) = guest.join().unwrap();
        let closing = thread::spawn(move || arrivals.close());
        assert_eq!(listener.accept().await.unwrap_err().kind(), ErrorKind::InvalidState);
        closing.join().unwrap();
        assert_eq!(listener.get_ref().port(), 7);
    });
}

/// Something that ends once.
struct Ending {
    fd: EventFd,
    over: AtomicBool,
}

impl Ending {
    fn new() -> Arc<Self> {
        Arc::new(Self { fd: eventfd().unwrap(), over: AtomicBool::new(false) })
    }

    fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.fd.write(1).unwrap();
    }

    async fn wait(&self) -> crate::Result<&'static str> {
        ended(self, || Ok(self.over.load(Ordering::SeqCst).then_some("the end"))).await
    }
}

impl AsFd for Ending {
    fn as_fd(&self) -> BorrowedFd<'_> {
        borrow(&self.fd)
    }
}

#[test]
fn many_tasks_wait_for_one_end_and_may_be_dropped() {
    run(async {
        let ending = Ending::new();
        let tasks: Vec<_> = (0..100)
            .map(|_| {
                let ending = ending.clone();
                tokio::spawn(async move { ending.wait().await })
            })
            .collect();
        yield_now().await;
        assert!(!is_ready(ending.wait()).await);
        let (dropped, waiting) = tasks.split_at(30);
        dropped.iter().for_each(tokio::task::JoinHandle::abort);
        yield_now().await;
        assert!(waiting.iter().all(|task| !task.is_finished()));
        let end = ending.clone();
        let other = thread::spawn(move || end.end());
        for task in tasks.into_iter().skip(30) {
            assert_eq!(task.await.unwrap().unwrap(), "the end");
        }
        other.join().unwrap();
        assert_eq!(ending.wait().await.unwrap(), "the end", "it has ended for ever");
    });
}

#[test]
fn failure_to_learn_of_an_end_is_returned() {
    run(async {
        let ending = Ending::new();
        let asked = Cell::new(0);
        let attempt = || {
            asked.set(asked.get() + 1);
            match asked.get() {
                1 => Ok(None::<()>),
                _ => Err(crate::Error::vm_ended()),
            }
        };
        let waiting = ended(&*ending, attempt);
        ending.end();
        assert_eq!(waiting.await.unwrap_err().kind(), ErrorKind::InvalidState);
        assert_eq!(asked.get(), 2);
    });
}

#[test]
fn futures_and_handles_move_between_threads() {
    fn sends<T: Send>(_: impl Fn(&'static Vm) -> T) {}
    sends(|vm| vm.wait_async());
    let runtime = Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    let read = Arc::new(Mutex::new(0));
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for _ in 0..50 {
            let (mut near, mut far) = connected();
            let read = read.clone();
            tasks.push(tokio::spawn(async move {
                let mut bytes = Vec::new();
                near.read_to_end(&mut bytes).await.unwrap();
                *read.lock().unwrap() += bytes.len();
            }));
            tasks.push(tokio::task::spawn_blocking(move || far.write_all(&pattern(300_000)).unwrap()));
        }
        for task in tasks {
            timeout(LIMIT, task).await.expect("it is never woken").unwrap();
        }
    });
    assert_eq!(*read.lock().unwrap(), 50 * 300_000);
}
