//! Console (Virtio 1.3, 5.3), `hvc0` in the guest, and the bounded record of what was printed. Runs on the VM's loop.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Chain, DeviceIo, DeviceType, Profile, Source, VirtioDevice};
use crate::error::{Context, Result};
use crate::event::Interest;
use crate::sys::{EventFd, borrow, eventfd};

/// How much of the console is remembered for the report of a VM's end.
const TAIL: usize = 64 * 1024;
/// How much may wait for a slow writer. A guest that prints more waits too.
const PENDING: usize = 64 * 1024;
/// How long the end of the output waits for the writer's thread to have a turn on a busy host.
const BEGIN: Duration = Duration::from_secs(5);
/// Queues of port 0 (Virtio 1.3, 5.3.2).
const TRANSMIT: usize = 1;
/// The number under which the wake-up of a waiting guest is watched.
const SPACE: u32 = 0;

#[derive(Debug, Default)]
struct State {
    tail: VecDeque<u8>,
    pending: VecDeque<u8>,
    /// Somebody takes what is pending.
    pumped: bool,
    /// Since when the writer has what is pending.
    writing: Option<Instant>,
    /// No more will be printed: the pump ends when nothing is pending.
    closed: bool,
}

/// What a guest printed, from all its consoles: a bounded tail, and on its way to the embedder's writer.
#[derive(Clone)]
pub(crate) struct Output(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    /// Room was made for a console that waits.
    space: EventFd,
}

impl Output {
    /// # Errors
    /// `ResourceExhausted` when the process has no descriptors left.
    pub(crate) fn new() -> Result<Self> {
        let space = eventfd().doing(|| "creating a console")?;
        Ok(Self(Arc::new(Inner { state: Mutex::default(), changed: Condvar::new(), space })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes as much of `bytes` as fits; says how much. Never waits.
    pub(crate) fn print(&self, bytes: &[u8]) -> usize {
        let mut state = self.state();
        let room = if state.pumped { PENDING - state.pending.len().min(PENDING) } else { bytes.len() };
        let (now, _) = bytes.split_at(room.min(bytes.len()));
        if state.pumped && !now.is_empty() {
            state.pending.extend(now);
            self.0.changed.notify_all();
        }
        state.tail.extend(now);
        let excess = state.tail.len().saturating_sub(TAIL);
        state.tail.drain(..excess);
        now.len()
    }

    /// The last bytes printed, at most 64 KiB.
    pub(crate) fn tail(&self) -> Vec<u8> {
        self.state().tail.iter().copied().collect()
    }

    /// Bytes of memory that all this takes.
    pub(crate) fn held(&self) -> usize {
        let state = self.state();
        state.tail.capacity() + state.pending.capacity()
    }

    /// From now on everything printed waits for [`Output::pump`].
    pub(crate) fn expect_pump(&self) {
        self.state().pumped = true;
    }

    /// Gives everything printed to `writer` until the output is closed. For a thread of its own: the writer may block.
    pub(crate) fn pump(&self, writer: &mut dyn Write) {
        loop {
            let mut state = self.state();
            while state.pending.is_empty() && !state.closed {
                state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            // What waits is written before it is taken away, so that `drained` means written.
            let bytes: Vec<u8> = state.pending.iter().copied().collect();
            state.writing = Some(Instant::now());
            self.0.changed.notify_all();
            drop(state);
            if bytes.is_empty() {
                return;
            }
            if let Err(error) = writer.write_all(&bytes).and_then(|()| writer.flush()) {
                log::warn!("the console's writer failed, nothing more is given to it: {error}");
                let mut state = self.state();
                state.pumped = false;
                state.pending.clear();
                self.made_room();
                return;
            }
            let mut state = self.state();
            state.pending.drain(..bytes.len());
            state.writing = None;
            drop(state);
            self.made_room();
        }
    }

    fn made_room(&self) {
        self.0.changed.notify_all();
        // A full counter is readable, which is all that is wanted.
        let _ = self.0.space.write(1);
    }

    /// Nothing more will be printed. Waits until the writer has everything, but not longer than `bound` once it has begun to
    /// write: only the host keeps its thread from beginning, which is given [`BEGIN`] for it.
    pub(crate) fn close(&self, bound: Duration) {
        let begin = Instant::now();
        let mut state = self.state();
        state.closed = true;
        self.0.changed.notify_all();
        while state.pumped && !state.pending.is_empty() {
            let deadline = state.writing.map_or(begin + BEGIN, |since| since.max(begin) + bound);
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Output({} bytes)", self.state().tail.len())
    }
}

/// Serial ports print too, from a vCPU's thread, which must not wait: what does not fit is lost there.
impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.print(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The device: output only. Buffers offered for input stay with the driver's queue until there is input.
#[derive(Debug)]
pub(crate) struct Console {
    output: Output,
    /// Printed in part: the writer is slower than the guest.
    waiting: Option<Chain>,
}

impl Console {
    pub(crate) fn new(output: Output) -> Self {
        Self { output, waiting: None }
    }

    /// True when all of the chain is printed.
    fn print(&self, chain: &mut Chain) -> bool {
        let mut buffer = [0; 4096];
        while chain.readable_len() > 0 {
            let (now, _) = buffer.split_at_mut(chain.readable_len().min(4096));
            // Looked at first, taken when printed.
            if chain.peek_into(now).is_err() {
                return true;
            }
            let printed = self.output.print(now);
            chain.skip_readable(printed);
            if printed < now.len() {
                return false;
            }
        }
        true
    }

    fn transmit(&mut self, io: &mut DeviceIo) {
        for _ in 0..64 {
            let next = self.waiting.take().or_else(|| io.pop(TRANSMIT));
            match next {
                Some(mut chain) => {
                    if !self.print(&mut chain) {
                        self.waiting = Some(chain);
                        return io.flush(&[TRANSMIT]);
                    }
                    io.complete(TRANSMIT, chain);
                }
                None if io.rearm(TRANSMIT) => {}
                None => return io.flush(&[TRANSMIT]),
            }
        }
        io.flush(&[TRANSMIT]);
        io.kick_self(TRANSMIT);
    }
}

impl VirtioDevice for Console {
    fn profile(&self) -> Profile {
        // Virtio 1.3, 5.3.4: columns, rows, ports and emergency write, none of which is offered.
        Profile::new(DeviceType::Console).queue(64).queue(64).config([0; 12])
    }

    fn started(&mut self, io: &mut DeviceIo) -> std::io::Result<()> {
        io.watch(borrow(&self.output.0.space), SPACE, Interest::IN)
    }

    fn ready(&mut self, io: &mut DeviceIo, source: Source) {
        if let Source::Watched { .. } = source {
            // Cleared before looking: what comes later wakes the loop again.
            let _ = self.output.0.space.read();
        }
        self.transmit(io);
    }

    fn stopping(&mut self, io: &mut DeviceIo) {
        io.unwatch(borrow(&self.output.0.space));
        self.waiting = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Driver;
    use std::thread;

    #[test]
    fn what_the_guest_prints_is_remembered_up_to_a_bound() {
        let output = Output::new().unwrap();
        let mut driver = Driver::start(Console::new(output.clone()));
        for round in 0..100u8 {
            driver.send(TRANSMIT, &[&[round; 1000], b"\n"], &[]);
            driver.poke(TRANSMIT);
            assert!(driver.receive(TRANSMIT).is_some());
        }
        let tail = output.tail();
        assert_eq!((tail.len(), tail.last()), (TAIL, Some(&b'\n')));
    }

    #[test]
    fn a_stuck_writer_makes_the_guest_wait_and_loses_nothing() {
        let output = Output::new().unwrap();
        output.expect_pump();
        let mut driver = Driver::start(Console::new(output.clone()));
        driver.send(TRANSMIT, &[&vec![b'a'; PENDING]], &[]);
        driver.send(TRANSMIT, &[&[b'b'; 10]], &[]);
        driver.poke(TRANSMIT);
        assert!(driver.receive(TRANSMIT).is_some());
        assert!(driver.receive(TRANSMIT).is_none(), "there is no room for the second");
        let pump = {
            let output = output.clone();
            thread::spawn(move || {
                let mut written = Vec::new();
                output.pump(&mut written);
                written
            })
        };
        while driver.receive(TRANSMIT).is_none() {
            driver.poke_watched(SPACE);
        }
        output.close(Duration::from_secs(10));
        let written = pump.join().unwrap();
        assert_eq!((written.len(), written.last()), (PENDING + 10, Some(&b'b')));
    }

    #[test]
    fn a_failing_writer_does_not_stop_the_guest() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let output = Output::new().unwrap();
        output.expect_pump();
        output.print(b"x");
        output.pump(&mut Broken);
        assert_eq!(output.print(&[0; PENDING * 2]), PENDING * 2);
        output.close(Duration::from_secs(10));
    }

    #[test]
    fn a_writer_that_has_not_begun_is_waited_for_and_one_that_hangs_is_not() {
        struct Hanging(std::sync::mpsc::Receiver<()>);
        impl Write for Hanging {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.recv();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let bound = Duration::from_millis(20);
        let (late, hung) = (Output::new().unwrap(), Output::new().unwrap());
        let (done, hangs) = std::sync::mpsc::channel();
        let begin = |output: &Output, mut writer: Box<dyn Write + Send>| {
            output.expect_pump();
            output.print(b"x");
            let output = output.clone();
            thread::spawn(move || {
                thread::sleep(5 * bound);
                output.pump(&mut *writer);
            })
        };
        let pumps = [begin(&late, Box::new(std::io::sink())), begin(&hung, Box::new(Hanging(hangs)))];
        late.close(bound);
        assert!(late.state().pending.is_empty());
        hung.close(bound);
        assert!(!hung.state().pending.is_empty());
        drop(done);
        for pump in pumps {
            pump.join().unwrap();
        }
    }
}
