//! Console (Virtio 1.3, 5.3), `hvc0` in the guest, and its bounded record of output. Runs on the VM's loop.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Chain, DeviceIo, DeviceState, DeviceType, DrainCause, EventSource, Profile, VirtioDevice, Work};
use crate::sys::left;

/// How much of the console is remembered for the report of a VM's end.
const TAIL: usize = 64 * 1024;
/// How much may wait for a slow writer. What a guest prints beyond that is lost to the writer, and counted.
const PENDING: usize = 256 * 1024;
/// How long the end of the output waits for the writer's thread to have a turn on a busy host.
const BEGIN: Duration = Duration::from_secs(5);
/// Queues of port 0 (Virtio 1.3, 5.3.2).
const TRANSMIT: usize = 1;
/// Bytes that are printed in one piece of work.
const AT_ONCE: usize = 4096;

#[derive(Debug, Default)]
struct ConsoleState {
    tail: VecDeque<u8>,
    pending: VecDeque<u8>,
    /// The pump takes what is pending.
    pumped: bool,
    /// Since when the writer has what is pending.
    writing: Option<Instant>,
    /// No more will be printed: the pump ends when nothing is pending.
    closed: bool,
    /// Bytes that the writer was too slow for.
    dropped: u64,
}

/// What a guest printed, from all its consoles: a bounded tail, and on its way to the embedder's writer.
#[derive(Clone, Default)]
pub(crate) struct ConsoleOutput(Arc<ConsoleShared>);

#[derive(Default)]
struct ConsoleShared {
    state: Mutex<ConsoleState>,
    changed: Condvar,
}

impl ConsoleOutput {
    fn state(&self) -> MutexGuard<'_, ConsoleState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all of `bytes`. Never waits: what a slow writer has no room for is not given to it, and counted.
    pub(crate) fn print(&self, bytes: &[u8]) {
        let mut state = self.state();
        if state.pumped {
            let room = PENDING - state.pending.len().min(PENDING);
            let (now, lost) = bytes.split_at(room.min(bytes.len()));
            state.pending.extend(now);
            state.dropped += lost.len() as u64;
            self.0.changed.notify_all();
        }
        let (_, last) = bytes.split_at(bytes.len().saturating_sub(TAIL));
        state.tail.extend(last);
        let excess = state.tail.len().saturating_sub(TAIL);
        state.tail.drain(..excess);
    }

    /// Bytes that were printed and not given to the writer, because it was too slow.
    pub(crate) fn dropped(&self) -> u64 {
        self.state().dropped
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

    /// From now on everything printed waits for [`ConsoleOutput::pump`].
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
                self.0.changed.notify_all();
                return;
            }
            let mut state = self.state();
            state.pending.drain(..bytes.len());
            state.writing = None;
            drop(state);
            self.0.changed.notify_all();
        }
    }

    /// Ends the output, and waits until the writer has all of it.
    ///
    /// Waits at most `bound` once the writer's thread has begun to write. Only the host can keep that thread from
    /// beginning; it gets [`BEGIN`] for that.
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

impl fmt::Debug for ConsoleOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Output({} bytes)", self.state().tail.len())
    }
}

/// Serial ports print too, from a vCPU's thread, which must not wait.
impl Write for ConsoleOutput {
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
    output: ConsoleOutput,
    /// Printed in part: the turn was over.
    half_done: Option<Chain>,
}

impl Console {
    pub(crate) fn new(output: ConsoleOutput) -> Self {
        Self { output, half_done: None }
    }

    /// Prints as much of the chain as the turn has time for. True when that is all.
    fn print(&self, io: &mut DeviceIo, chain: &mut Chain) -> bool {
        let mut buffer = [0; AT_ONCE];
        while chain.readable_len() > 0 {
            if io.turn_over() {
                return false;
            }
            let (now, _) = buffer.split_at_mut(chain.readable_len().min(AT_ONCE));
            io.charge(Work::Bytes(3 * now.len()));
            if chain.read_into(now).is_err() {
                return true;
            }
            self.output.print(now);
        }
        true
    }

    fn transmit(&mut self, io: &mut DeviceIo) {
        loop {
            let next = self.half_done.take().or_else(|| io.pop(TRANSMIT));
            match next {
                Some(mut chain) => {
                    if !self.print(io, &mut chain) {
                        self.half_done = Some(chain);
                        io.reschedule(TRANSMIT);
                        break;
                    }
                    io.complete(TRANSMIT, chain);
                }
                None if io.rearm(TRANSMIT) => {}
                None => break,
            }
        }
        io.flush(&[TRANSMIT]);
    }
}

impl VirtioDevice for Console {
    fn profile(&self) -> Profile {
        // Virtio 1.3, 5.3.4: columns, rows, ports and emergency write, none of which is offered.
        Profile::new(DeviceType::Console).queue(64).queue(64).config([0; 12])
    }

    fn ready(&mut self, io: &mut DeviceIo, _: EventSource) {
        self.transmit(io);
    }

    /// Prints the rest of what is half done: a second time it would be printed whole.
    fn drain(&mut self, io: &mut DeviceIo, timeout: Duration, _: DrainCause) -> bool {
        let deadline = Instant::now() + timeout;
        while let Some(mut chain) = self.half_done.take() {
            io.begin_turn();
            if self.print(io, &mut chain) {
                io.complete(TRANSMIT, chain);
                io.flush(&[TRANSMIT]);
            } else {
                self.half_done = Some(chain);
                if left(deadline).is_zero() {
                    return false;
                }
            }
        }
        true
    }

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        if let Some(chain) = self.half_done.take() {
            io.put_back(TRANSMIT, chain);
        }
        DeviceState::Stateless
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::Driver;
    use crate::virtio::turn::{MAX_PIECE, MAX_TURN};
    use std::thread;

    #[test]
    fn what_the_guest_prints_is_remembered_up_to_a_bound() {
        let output = ConsoleOutput::default();
        let mut driver = Driver::start(Console::new(output.clone()));
        for round in 0..100u8 {
            driver.send(TRANSMIT, &[&[round; 1000], b"\n"], &[]);
            driver.dispatch(TRANSMIT);
            assert!(driver.receive(TRANSMIT).is_some());
        }
        let tail = output.tail();
        assert_eq!((tail.len(), tail.last()), (TAIL, Some(&b'\n')));
    }

    #[test]
    fn blocked_console_writer_drops_and_counts_output() {
        struct Stuck(std::sync::mpsc::Receiver<()>, Arc<Mutex<Vec<u8>>>);
        impl Write for Stuck {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                let _ = self.0.recv();
                self.1.lock().unwrap().extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (output, written) = (ConsoleOutput::default(), Arc::default());
        let (go_on, stuck) = std::sync::mpsc::channel();
        output.expect_pump();
        let pump = {
            let (output, mut writer) = (output.clone(), Stuck(stuck, Arc::clone(&written)));
            thread::spawn(move || output.pump(&mut writer))
        };
        let mut driver = Driver::start(Console::new(output.clone()));
        let printed = PENDING + 3 * TAIL;
        for n in 0..printed / 1024 {
            driver.send(TRANSMIT, &[&[n as u8; 1024]], &[]);
            driver.dispatch(TRANSMIT);
            assert!(driver.receive(TRANSMIT).is_some(), "the guest waits for the writer");
        }
        assert_eq!((output.dropped(), output.tail().len()), ((printed - PENDING) as u64, TAIL));
        // The end waits for it within its bound.
        let begin = Instant::now();
        output.close(Duration::from_millis(20));
        assert!(begin.elapsed() < Duration::from_secs(5));
        drop(go_on);
        pump.join().unwrap();
        assert_eq!(written.lock().unwrap().len(), PENDING, "what fits arrives");
    }

    #[test]
    fn much_output_takes_many_turns_and_none_is_lost() {
        let output = ConsoleOutput::default();
        let mut driver = Driver::start(Console::new(output.clone()));
        // As many buffers as the queue has, all of them the same 16 MiB: 1 GiB in one chain.
        let all = [(0x80_0000, 16 << 20, 0); 64];
        assert!(driver.send_raw(TRANSMIT, &all));
        let mut turns = 0;
        while driver.receive(TRANSMIT).is_none() {
            driver.dispatch(TRANSMIT);
            turns += 1;
        }
        assert!(turns > 50, "{turns}");
        assert!(driver.most_work() <= MAX_TURN + MAX_PIECE, "{}", driver.most_work());
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
        let output = ConsoleOutput::default();
        output.expect_pump();
        output.print(b"x");
        output.pump(&mut Broken);
        output.print(&[0; PENDING * 2]);
        assert_eq!(output.dropped(), 0, "no reader is left that could miss it");
        output.close(Duration::from_secs(10));
    }

    #[test]
    fn console_drain_waits_for_progress_only() {
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
        let (late, hung) = (ConsoleOutput::default(), ConsoleOutput::default());
        let (done, hangs) = std::sync::mpsc::channel();
        let begin = |output: &ConsoleOutput, mut writer: Box<dyn Write + Send>| {
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
