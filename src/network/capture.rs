//! [`Capture`]: records a card's frames, in the format of libpcap.
//!
//! The network device hands frames to its [`CaptureRecorder`] on the VM's loop, which keeps a bounded number of them. A thread
//! of its own gives them to the writer, which may block. What does not fit in between is lost and counted.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::FRAME_MAX;
use crate::error::{Context, Result};
use crate::memory::{GuestMemory, Segment};
use crate::size::Size;

/// How much may wait for a slow writer.
const PENDING: usize = 1 << 20;
/// How large a capture becomes unless set.
const MAX: Size = Size::mib(256);

/// The file's first bytes (libpcap, pcap-savefile(5)): times in nanoseconds, version 2.4.
const MAGIC: u32 = 0xa1b2_3c4d;
const VERSION: [u16; 2] = [2, 4];
/// LINKTYPE_ETHERNET.
const ETHERNET: u32 = 1;
const HEADER: usize = 16;

/// Describes where a card's frames are recorded; see [`UserNet::capture`](crate::net::UserNet::capture).
///
/// A config value. Frames of both ways are recorded, each when it was taken or delivered. The format is that of
/// libpcap, for tcpdump and Wireshark, with times in nanoseconds. A frame that stands for several is recorded as one.
/// Checksums that were left to the other side are missing, as tcpdump shows it on a host's own card.
#[derive(Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Capture {
    pub(crate) sink: CaptureSink,
    pub(crate) snap: usize,
    pub(crate) max: Size,
}

/// Where a capture goes.
#[derive(Clone)]
pub(crate) enum CaptureSink {
    File(PathBuf),
    Writer(Arc<Mutex<dyn Write + Send>>),
}

impl Capture {
    pub(crate) fn of(sink: CaptureSink) -> Self {
        Self { sink, snap: FRAME_MAX, max: MAX }
    }

    /// Records into this file, which is made or overwritten when the VM starts.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self::of(CaptureSink::File(path.into()))
    }

    /// Records to `writer`, on a thread of its own.
    ///
    /// It may block: frames that come too fast for it are then lost to the capture alone. After a failure it is given
    /// nothing more. It is for one card of one VM: a second would begin a second capture.
    pub fn writer(writer: impl Write + Send + 'static) -> Self {
        Self::of(CaptureSink::Writer(Arc::new(Mutex::new(writer))))
    }

    /// Records at most this many bytes of each frame; all of them by default.
    pub fn snap_len(mut self, bytes: usize) -> Self {
        self.snap = bytes.min(FRAME_MAX);
        self
    }

    /// Limits the capture's size, the format's own bytes included; 256 MiB by default.
    pub fn max_size(mut self, size: Size) -> Self {
        self.max = size;
        self
    }

    /// Opens where it goes: the part that records, and the part that writes, for a thread of its own.
    pub(crate) fn open(&self) -> Result<(CaptureRecorder, CapturePump)> {
        let writer = match &self.sink {
            CaptureSink::File(path) => {
                let file = File::create(path).doing(|| format!("capture: creating {}", path.display()))?;
                Arc::new(Mutex::new(file)) as Arc<Mutex<dyn Write + Send>>
            }
            CaptureSink::Writer(writer) => writer.clone(),
        };
        let mut pending = Vec::new();
        pending.extend(MAGIC.to_ne_bytes());
        VERSION.iter().for_each(|number| pending.extend(number.to_ne_bytes()));
        pending.extend([0; 8]);
        pending.extend((self.snap as u32).to_ne_bytes());
        pending.extend(ETHERNET.to_ne_bytes());
        let state = CaptureState { total: pending.len() as u64, pending, ..CaptureState::default() };
        let shared = Arc::new(CaptureShared { state: Mutex::new(state), changed: Condvar::new() });
        let recorder = CaptureRecorder { shared: shared.clone(), snap: self.snap, max: self.max.as_bytes() };
        Ok((recorder, CapturePump { shared, writer }))
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.sink {
            CaptureSink::File(path) => write!(f, "Capture({})", path.display()),
            CaptureSink::Writer(_) => f.write_str("Capture(writer)"),
        }
    }
}

/// The counters of a capture; see [`NetHandle::capture_stats`](crate::net::NetHandle::capture_stats).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CaptureStats {
    /// Frames that were recorded.
    pub frames: u64,
    /// Frames that were not recorded.
    ///
    /// The writer was too slow or failed, or the capture is as large as it may be.
    pub lost: u64,
}

#[derive(Debug, Default)]
struct CaptureState {
    pending: Vec<u8>,
    /// Frames in it.
    waiting: u64,
    stats: CaptureStats,
    /// Bytes that were recorded so far.
    total: u64,
    /// Nothing more will be recorded.
    closed: bool,
    /// Nothing more is written: all was, or the writer has failed.
    done: bool,
}

#[derive(Debug)]
struct CaptureShared {
    state: Mutex<CaptureState>,
    changed: Condvar,
}

impl CaptureShared {
    fn state(&self) -> MutexGuard<'_, CaptureState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device's part. Dropping it ends the capture.
#[derive(Debug)]
pub(crate) struct CaptureRecorder {
    shared: Arc<CaptureShared>,
    snap: usize,
    max: u64,
}

impl CaptureRecorder {
    /// Records the first `len` bytes of `pieces`. Never waits for the writer.
    pub(crate) fn record(&self, memory: &GuestMemory, pieces: &[Segment], len: usize) {
        let kept = len.min(self.snap);
        let mut state = self.shared.state();
        let size = HEADER + kept;
        if state.done || state.pending.len() + size > PENDING || state.total + size as u64 > self.max {
            state.stats.lost += 1;
            return;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if state.pending.is_empty() {
            self.shared.changed.notify_all();
        }
        for number in [now.as_secs() as u32, now.subsec_nanos(), kept as u32, len as u32] {
            state.pending.extend(number.to_ne_bytes());
        }
        let at = state.pending.len();
        state.pending.resize(at + kept, 0);
        // They are known to exist.
        let _ = memory.gather(pieces, 0, state.pending.get_mut(at..).unwrap_or_default());
        state.waiting += 1;
        state.stats.frames += 1;
        state.total += size as u64;
    }
}

impl Drop for CaptureRecorder {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_all();
    }
}

/// The writer's part.
#[derive(Clone)]
pub(crate) struct CapturePump {
    shared: Arc<CaptureShared>,
    writer: Arc<Mutex<dyn Write + Send>>,
}

impl CapturePump {
    /// Writes what is recorded until the capture ends. For a thread of its own: the writer may block.
    pub(crate) fn run(&self) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let mut state = self.shared.state();
            while state.pending.is_empty() && !state.closed {
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let (bytes, frames) = (std::mem::take(&mut state.pending), std::mem::take(&mut state.waiting));
            drop(state);
            let written =
                if bytes.is_empty() { Ok(()) } else { writer.write_all(&bytes).and_then(|()| writer.flush()) };
            if bytes.is_empty() || written.is_err() {
                let mut state = self.shared.state();
                if let Err(error) = written {
                    log::warn!("a capture's writer failed, nothing more is given to it: {error}");
                    let lost = frames + std::mem::take(&mut state.waiting);
                    state.pending = Vec::new();
                    state.stats.lost += lost;
                    state.stats.frames -= lost;
                }
                state.done = true;
                self.shared.changed.notify_all();
                return;
            }
        }
    }

    /// Returns the counters, which keep no writer.
    pub(crate) fn counters(&self) -> CaptureCounters {
        CaptureCounters(self.shared.clone())
    }

    /// Nothing more will be recorded. Waits until the writer has everything, for `bound` at most.
    pub(crate) fn close(&self, bound: Duration) {
        let deadline = Instant::now() + bound;
        let mut state = self.shared.state();
        state.closed = true;
        self.shared.changed.notify_all();
        while !state.done {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The counters of a capture, which do not keep its writer.
#[derive(Debug, Clone)]
pub(crate) struct CaptureCounters(Arc<CaptureShared>);

impl CaptureCounters {
    pub(crate) fn stats(&self) -> CaptureStats {
        self.0.state().stats
    }
}

impl fmt::Debug for CapturePump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pump")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestAddress;
    use std::sync::mpsc;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn number(bytes: &[u8], at: usize) -> u32 {
        u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// The frames of a capture: how long each was, and what is there of it.
    fn parse(bytes: &[u8], snap: u32) -> Vec<(u32, Vec<u8>)> {
        assert_eq!((number(bytes, 0), number(bytes, 16), number(bytes, 20)), (MAGIC, snap, ETHERNET));
        let (mut rest, mut frames, mut last) = (&bytes[24..], Vec::new(), 0);
        while !rest.is_empty() {
            let [secs, nanos, kept, len] = [0, 4, 8, 12].map(|at| number(rest, at));
            let time = u64::from(secs) * 1_000_000_000 + u64::from(nanos);
            assert!(time >= last && nanos < 1_000_000_000 && kept <= len);
            (last, rest) = (time, &rest[16..]);
            frames.push((len, rest[..kept as usize].to_vec()));
            rest = &rest[kept as usize..];
        }
        frames
    }

    fn frame(memory: &GuestMemory, bytes: &[u8]) -> [Segment; 2] {
        memory.write(GuestAddress(0x100), bytes).unwrap();
        memory.segment(GuestAddress(0x100), bytes.len()).unwrap().split_at(bytes.len() / 2).into()
    }

    fn memory() -> GuestMemory {
        GuestMemory::anonymous(&[(GuestAddress(0), 0x20000)]).unwrap()
    }

    #[test]
    fn capture_round_trips() {
        let (memory, written) = (memory(), Written::default());
        let (recorder, pump) = Capture::writer(written.clone()).snap_len(100).open().unwrap();
        let thread = std::thread::spawn({
            let pump = pump.clone();
            move || pump.run()
        });
        let frames: Vec<Vec<u8>> = (0..50u8).map(|n| vec![n; 14 + 5 * usize::from(n)]).collect();
        for bytes in &frames {
            recorder.record(&memory, &frame(&memory, bytes), bytes.len());
        }
        pump.close(Duration::from_secs(10));
        let expected: Vec<_> =
            frames.iter().map(|bytes| (bytes.len() as u32, bytes[..bytes.len().min(100)].to_vec())).collect();
        assert_eq!(parse(&written.0.lock().unwrap(), 100), expected);
        let counters = pump.counters();
        thread.join().unwrap();
        drop((recorder, pump));
        assert_eq!(Arc::strong_count(&written.0), 1, "the counters keep the writer");
        assert_eq!(counters.stats(), CaptureStats { frames: 50, lost: 0 });
    }

    /// Tells that it was called, and then waits until it may go on.
    struct Slow(mpsc::Sender<usize>, mpsc::Receiver<()>);

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.send(bytes.len());
            self.1.recv().map_or(Err(std::io::ErrorKind::BrokenPipe.into()), |()| Ok(bytes.len()))
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn slow_capture_writer_only_drops_captured_frames() {
        let memory = memory();
        let ((began, begun), (go, wait)) = (mpsc::channel(), mpsc::channel());
        let (recorder, pump) = Capture::writer(Slow(began, wait)).open().unwrap();
        let thread = std::thread::spawn({
            let pump = pump.clone();
            move || pump.run()
        });
        begun.recv().unwrap();
        let pieces = frame(&memory, &[7; 10_000]);
        for _ in 0..300 {
            recorder.record(&memory, &pieces, 10_000);
        }
        let CaptureStats { frames, lost } = pump.counters().stats();
        assert_eq!((frames, lost), (104, 196), "a mebibyte waits");
        let start = Instant::now();
        pump.close(Duration::from_millis(20));
        assert!(start.elapsed() < Duration::from_secs(5), "who closes waits for ever");
        // It fails with what it was given last.
        go.send(()).unwrap();
        drop(go);
        thread.join().unwrap();
        recorder.record(&memory, &pieces, 10_000);
        assert_eq!(pump.counters().stats(), CaptureStats { frames: 0, lost: 301 });
    }

    #[test]
    fn capture_stops_at_its_max_size() {
        let (memory, written) = (memory(), Written::default());
        let (recorder, pump) = Capture::writer(written.clone()).max_size(Size::bytes(24 + 3 * 116)).open().unwrap();
        let pieces = frame(&memory, &[7; 100]);
        for _ in 0..10 {
            recorder.record(&memory, &pieces, 100);
        }
        assert_eq!(pump.counters().stats(), CaptureStats { frames: 3, lost: 7 });
        drop(recorder);
        pump.run();
        assert_eq!(parse(&written.0.lock().unwrap(), FRAME_MAX as u32).len(), 3);
    }

    #[test]
    fn a_file_that_cannot_be_made_is_named() {
        let error = Capture::file("/nonexistent/a.pcap").open().unwrap_err();
        assert!(error.to_string().starts_with("capture: creating /nonexistent/a.pcap: "), "{error}");
    }
}
