//! The registers, as a driver uses them.

mod loops;
mod states;

use super::*;
use crate::error::ErrorKind;
use crate::event_loop::Loop;
use crate::memory::{GuestAddress, IoOperation, IoQueue};
use crate::virtio::queue::QueueConfig;
use crate::virtio::rng::Rng;
use crate::virtio::transport::{START_STOP_TIMEOUT, TransportState};
use crate::virtio::{DeviceEvent, KeptEvents};
use crate::virtio::{DeviceIo, DeviceState, EventSource, Slots, VirtioDevice};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A transport with its device on a loop; the registers as a driver uses them.
struct Fixture {
    transport: MmioTransport,
    memory: GuestMemory,
    events: Arc<KeptEvents>,
    slot: usize,
    _devices: Loop<Slots>,
}

impl Fixture {
    fn new() -> Self {
        Self::of(Box::new(Rng), GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap())
    }

    fn of(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let (reporter, events) = KeptEvents::reporter();
        let devices = Loop::start("test", Slots::new).unwrap();
        let its = reporter.clone();
        let slot = devices.remote().with(|slots| slots.add(device, its)).unwrap();
        let transport = MmioTransport::new(
            Rng.profile(),
            memory.clone(),
            LoopDevice { remote: devices.remote(), slot },
            RegisterPage::alone().unwrap(),
            IrqLine::new(|| ()),
            reporter,
        )
        .unwrap();
        Self { transport, memory, events, slot, _devices: devices }
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// As a driver does until the device runs, with features `high` in the upper word and a queue of `size`.
    fn drive(&mut self, high: u32, size: u32) {
        let steps = [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, high), (0x70, 11), (0x38, size), (0x80, 0x1000)];
        let more = [(0x90, 0x2000), (0xa0, 0x3000), (0x44, 1), (0x70, 15)];
        steps.into_iter().chain(more).for_each(|(at, value)| self.set(at, value));
    }
}

#[test]
fn magic_version_and_ids_are_readable() {
    let mut rig = Fixture::new();
    let read = [0x00, 0x04, 0x08, 0x34].map(|at| rig.get(at));
    assert_eq!(read, [0x7472_6976, 2, 4, 64]);
    rig.set(0x14, 1);
    assert_eq!(rig.get(0x10), 1, "VERSION_1 is offered");
    rig.set(0x14, 2);
    assert_eq!(rig.get(0x10), 0);
    rig.set(0x30, 9);
    assert_eq!(rig.get(0x34), 0, "there is no queue 9");
}

#[test]
fn the_status_write_completes_when_the_device_runs() {
    let mut rig = Fixture::new();
    // A buffer of 16 bytes, offered before the device runs: it must be seen without a kick.
    let descriptor = [0x5000u64.to_le_bytes().as_slice(), &16u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
    rig.memory.write(GuestAddress(0x1000), &descriptor).unwrap();
    rig.memory.write(GuestAddress(0x2002), &[1, 0, 0, 0]).unwrap();
    rig.drive(1, 8);
    assert_eq!(rig.get(0x70), 15);
    assert!(matches!(rig.events.drain()[..], [DeviceEvent::DriverReady]));
    let mut used = [0; 2];
    rig.memory.read(GuestAddress(0x3002), &mut used).unwrap();
    assert_eq!((used, rig.get(0x60)), ([1, 0], 1));
    rig.set(0x64, 1);
    assert_eq!(rig.get(0x60), 0);
    rig.set(0x70, 0);
    assert_eq!((rig.get(0x70), rig.get(0x44)), (0, 0));
    rig.drive(1, 8);
    assert_eq!(rig.get(0x70), 15, "a device starts again after a reset");
}

#[test]
fn drivers_that_refuse_version_1_or_invent_features_get_no_device() {
    for features in [0, 0x8000_0001] {
        let mut rig = Fixture::new();
        rig.drive(features, 8);
        assert_eq!(rig.get(0x70), 3, "neither FEATURES_OK nor DRIVER_OK");
    }
}

#[test]
fn invalid_queue_configs_need_a_reset() {
    for size in [0, 3, 128, u32::MAX] {
        let mut rig = Fixture::new();
        rig.drive(1, size);
        assert_eq!(rig.get(0x70), 11 | 64, "size {size}");
        assert_eq!(rig.get(0x60), 2, "the driver is told");
        let events = rig.events.drain();
        assert!(matches!(&events[..], [DeviceEvent::NeedsReset(why)] if why.starts_with("queue 0: ")), "{events:?}");
        assert_eq!(rig.transport.counters().driver_errors.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn requests_are_served_while_a_driver_floods_the_device() {
    use crate::virtio::DeviceHandle;
    use std::sync::atomic::AtomicBool;
    let mut rig = Fixture::new();
    let buffer = [0x8_0000u64.to_le_bytes().as_slice(), &0x1_0000u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
    rig.memory.write(GuestAddress(0x1000), &buffer).unwrap();
    rig.drive(1, 8);
    // Another processor of the guest offers the buffer again as soon as it comes back, and kicks without end.
    let (memory, kick) = (rig.memory.clone(), rig.transport.kicks()[0].try_clone().unwrap());
    let flooding = Arc::new(AtomicBool::new(true));
    let until = flooding.clone();
    let guest = std::thread::spawn(move || {
        while until.load(Ordering::Relaxed) {
            let mut used = [0; 2];
            memory.read(GuestAddress(0x3002), &mut used).unwrap();
            memory.write(GuestAddress(0x2002), &u16::from_le_bytes(used).wrapping_add(8).to_le_bytes()).unwrap();
            kick.write(1).unwrap();
        }
    });
    let device = DeviceHandle::<Rng>::new(rig._devices.remote(), rig.slot);
    while rig.transport.counters().requests.load(Ordering::Relaxed) < 200 {
        let begin = Instant::now();
        device.with(|_, io| assert!(io.is_some_and(|io| !io.turn_over()))).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    }
    rig.set(0x70, 0);
    assert_eq!(rig.get(0x70), 0, "a reset has its turn too");
    flooding.store(false, Ordering::Relaxed);
    guest.join().unwrap();
}

#[test]
fn repeated_status_writes_are_reported_once() {
    let mut rig = Fixture::new();
    rig.drive(1, 3);
    for _ in 0..10_000 {
        rig.set(0x70, 15);
    }
    let faults = rig.transport.counters().driver_errors.load(Ordering::Relaxed);
    let reports = |rig: &Fixture| {
        let events = rig.events.drain();
        events.iter().filter(|event| matches!(event, DeviceEvent::NeedsReset(_))).count()
    };
    assert_eq!((reports(&rig), faults, rig.get(0x70)), (1, 1, 11 | 64));
    // With resets in between it comes to need one each time, which is counted and hardly reported.
    let begin = Instant::now();
    for _ in 0..1000 {
        rig.set(0x70, 0);
        rig.drive(1, 3);
    }
    let (told, most) = (1 + reports(&rig), 12 + begin.elapsed().as_secs() as usize);
    assert_eq!(rig.transport.counters().driver_errors.load(Ordering::Relaxed), 1001);
    assert!((2..=most).contains(&told), "{told}");
    rig.set(0x70, 0);
    rig.drive(1, 8);
    assert_eq!(rig.get(0x70), 15, "a device that was reset starts");
}

#[test]
fn accesses_of_invalid_width_or_offset_are_ignored() {
    let mut rig = Fixture::new();
    rig.transport.write(0x70, &[1]);
    rig.transport.write(0x71, &[1, 0, 0, 0]);
    rig.transport.write(0x70, &[1; 8]);
    assert_eq!(rig.get(0x70), 0);
    let mut byte = [7];
    rig.transport.read(0x70, &mut byte);
    rig.transport.read(u64::MAX, &mut byte);
    assert_eq!(rig.get(0xb0), u32::MAX, "there is no shared memory");
}

#[test]
fn status_bits_are_only_added_and_in_their_order() {
    let mut rig = Fixture::new();
    rig.set(0x70, 1);
    // DRIVER_OK before FEATURES_OK starts nothing (Virtio 1.3, 3.1.1).
    rig.set(0x70, 1 | 2 | 4);
    assert_eq!(rig.get(0x70), 3);
    // A bit that is left out stays.
    rig.set(0x70, 2);
    assert_eq!(rig.get(0x70), 3);
    // DEVICE_NEEDS_RESET is the device's alone.
    rig.set(0x70, 3 | 64);
    assert_eq!(rig.get(0x70), 3);
    // FAILED is the driver's.
    rig.set(0x70, 3 | 128);
    assert_eq!(rig.get(0x70), 3 | 128);
    rig.set(0x70, 0);
    rig.drive(1, 8);
    assert_eq!(rig.get(0x70), 15);
}

#[test]
fn features_are_accepted_before_features_ok_alone_and_words_beyond_the_second_are_none() {
    let mut rig = Fixture::new();
    // Without DRIVER nothing is accepted.
    [(0x24, 1), (0x20, 1)].into_iter().for_each(|(at, value)| rig.set(at, value));
    rig.set(0x70, 3);
    rig.set(0x70, 11);
    assert_eq!(rig.get(0x70), 3, "VERSION_1 was not accepted yet");
    for (word, value) in [(1, 1), (2, u32::MAX), (u32::MAX, u32::MAX)] {
        rig.set(0x24, word);
        rig.set(0x20, value);
    }
    rig.set(0x70, 11);
    assert_eq!(rig.get(0x70), 11);
    // Too late, and so it changes nothing.
    [(0x24, 0), (0x20, u32::MAX), (0x24, 1), (0x20, u32::MAX)].into_iter().for_each(|(at, value)| rig.set(at, value));
    assert_eq!(rig.transport.core.driver_features, 1 << 32);
}

#[test]
fn a_running_devices_queues_are_not_changed() {
    let mut rig = Fixture::new();
    rig.drive(1, 8);
    let before = format!("{:?}", rig.transport.core.queues);
    [(0x38, 16), (0x80, 0x9000), (0x94, 7), (0x44, 0)].into_iter().for_each(|(at, value)| rig.set(at, value));
    assert_eq!(format!("{:?}", rig.transport.core.queues), before);
    assert_eq!((rig.get(0x70), rig.get(0x44)), (15, 1));
}

/// Keeps the device's loop busy until what this returns is dropped.
fn busy(rig: &Fixture) -> std::sync::mpsc::Sender<()> {
    let (free, wait) = std::sync::mpsc::channel::<()>();
    let (begun, hangs) = std::sync::mpsc::channel();
    let hang = move |_: &mut Slots| {
        begun.send(()).unwrap();
        let _ = wait.recv();
    };
    rig._devices.remote().post(hang).unwrap();
    hangs.recv().unwrap();
    free
}

#[test]
fn driver_ok_with_a_hanging_loop_sets_needs_reset() {
    let mut rig = Fixture::new();
    let (hang, begin) = (busy(&rig), Instant::now());
    rig.drive(1, 8);
    assert!(begin.elapsed() >= START_STOP_TIMEOUT);
    assert_eq!((rig.get(0x70), rig.get(0x60)), (11 | 64, 2));
    drop(hang);
}

#[test]
fn reset_with_a_hanging_loop_stays_pending() {
    let mut rig = Fixture::new();
    rig.drive(1, 8);
    let (hang, begin) = (busy(&rig), Instant::now());
    rig.set(0x70, 0);
    assert!(begin.elapsed() >= START_STOP_TIMEOUT);
    assert_eq!(rig.get(0x70), 15);
    drop(hang);
    rig.set(0x70, 0);
    assert_eq!(rig.get(0x70), 0, "a driver that asks again gets its reset");
}

/// A device with a read in flight that it hands over when it is stopped.
struct Reader {
    memory: GuestMemory,
    socket: UnixStream,
    io_queue: Option<IoQueue>,
}

impl VirtioDevice for Reader {
    fn profile(&self) -> Profile {
        Rng.profile()
    }

    fn start(&mut self, _: &mut DeviceIo, _: Option<&DeviceState>) -> std::io::Result<()> {
        let mut io_queue = IoQueue::new(4)?;
        let to = [self.memory.segment(GuestAddress(0x8_0000), 3).unwrap()];
        let read = IoOperation::Read { fd: self.socket.as_raw_fd(), offset: 0, to: &to };
        io_queue.push(&self.memory, 0, read)?;
        io_queue.submit();
        self.io_queue = Some(io_queue);
        Ok(())
    }

    fn ready(&mut self, _: &mut DeviceIo, _: EventSource) {}

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        io.hand_over(self.io_queue.take().unwrap());
        DeviceState::Stateless
    }
}

#[test]
fn reset_that_gave_up_keeps_what_is_in_flight_for_the_next_one() {
    let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let mut rig = Fixture::of(Box::new(Reader { memory: memory.clone(), socket, io_queue: None }), memory);
    rig.drive(1, 8);
    let hang = busy(&rig);
    rig.set(0x70, 0);
    assert_eq!(rig.get(0x70), 15);
    drop(hang);
    // The loop has stopped the device by now, for a reset that waits no more.
    rig._devices.remote().with(|_| ()).unwrap();
    assert!(rig.transport.core.unfinished_io().get().as_ref().is_some_and(|io_queue| io_queue.busy()));
    rig.set(0x70, 0);
    assert!(rig.transport.core.unfinished_io().get().is_none());
    assert_eq!(rig.get(0x70), 0, "nothing is in flight any more");
}

#[test]
fn interrupts_are_raised_once_until_acknowledged() {
    let edges = Arc::new(AtomicU32::new(0));
    let (counted, page) = (edges.clone(), RegisterPage::alone().unwrap());
    let line = IrqLine::new(move || _ = counted.fetch_add(1, Ordering::Relaxed));
    let registers = MmioRegisters { page, line };
    let interrupt = Interrupt::new(registers.clone());
    // All queues share the line.
    interrupt.signal_used(0);
    interrupt.signal_used(1);
    interrupt.signal_config();
    assert_eq!((registers.pending(), interrupt.raised(), edges.load(Ordering::Relaxed)), (3, 2, 2));
    registers.acknowledge(1);
    assert_eq!(registers.pending(), 2);
    interrupt.signal_used(0);
    assert_eq!((registers.pending(), edges.load(Ordering::Relaxed)), (3, 3));
    interrupt.signal_needs_reset();
    assert!(interrupt.needs_reset());
    interrupt.reset();
    assert_eq!((registers.pending(), interrupt.needs_reset()), (0, false));
    // What a restored device has pending is raised again.
    interrupt.set_pending(0xff);
    assert_eq!((registers.pending(), edges.load(Ordering::Relaxed)), (3, 4));
}

/// A device that fails to start at its first try, when it watches a descriptor already.
struct Stumbling {
    socket: UnixStream,
    tries: u32,
}

impl VirtioDevice for Stumbling {
    fn profile(&self) -> Profile {
        Rng.profile()
    }

    fn start(&mut self, io: &mut DeviceIo, _: Option<&DeviceState>) -> std::io::Result<()> {
        io.watch(std::os::fd::AsFd::as_fd(&self.socket), 0, crate::event_loop::Interest::IN)?;
        self.tries += 1;
        if self.tries == 1 { Err(std::io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }

    fn ready(&mut self, _: &mut DeviceIo, _: EventSource) {}

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        io.unwatch(std::os::fd::AsFd::as_fd(&self.socket));
        DeviceState::Stateless
    }
}

#[test]
fn a_device_whose_start_failed_halfway_starts_after_a_reset() {
    let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let mut rig = Fixture::of(Box::new(Stumbling { socket, tries: 0 }), memory);
    rig.drive(1, 8);
    assert_eq!(rig.get(0x70), 11 | 64);
    rig.set(0x70, 0);
    rig.drive(1, 8);
    assert_eq!(rig.get(0x70), 15);
}

#[test]
fn calls_to_a_paused_device_take_nothing_from_its_queues() {
    use crate::virtio::DeviceHandle;
    let (mut rig, _) = states::saved();
    rig.memory.write(GuestAddress(0x2002), &[2, 0, 0, 0]).unwrap();
    let device = DeviceHandle::<Rng>::new(rig._devices.remote(), rig.slot);
    let popped = device.with(|_, io| io.is_some_and(|io| io.pop(0).is_some() || io.rearm(0))).unwrap();
    assert!(!popped);
    rig._devices.remote().with(Slots::resume).unwrap();
    let mut used = [0; 2];
    rig.memory.read(GuestAddress(0x3002), &mut used).unwrap();
    assert_eq!((used, rig.get(0x70)), ([2, 0], 15), "it goes on with what came meanwhile");
}

/// A device that panics when it is stopped, or started from a state.
struct Panicking {
    at_stop: bool,
}

impl VirtioDevice for Panicking {
    fn profile(&self) -> Profile {
        Rng.profile()
    }

    fn start(&mut self, _: &mut DeviceIo, state: Option<&DeviceState>) -> std::io::Result<()> {
        assert!(state.is_none(), "no way back");
        Ok(())
    }

    fn ready(&mut self, _: &mut DeviceIo, _: EventSource) {}

    fn stop(&mut self, _: &mut DeviceIo) -> DeviceState {
        assert!(!self.at_stop, "no end");
        DeviceState::Stateless
    }
}

#[test]
fn devices_that_panic_at_a_pause_or_resume_are_reported_and_their_loop_goes_on() {
    for (at_stop, why) in [(true, "no end"), (false, "no way back")] {
        let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut rig = Fixture::of(Box::new(Panicking { at_stop }), memory);
        rig.drive(1, 8);
        rig._devices.remote().with(|slots| slots.pause(Duration::from_secs(10))).unwrap();
        rig._devices.remote().with(Slots::resume).unwrap();
        let events = rig.events.drain();
        let failed = |event: &DeviceEvent| matches!(event, DeviceEvent::Failed(text) if text.contains(why));
        assert_eq!(events.iter().filter(|event| failed(event)).count(), 1, "{events:?}");
        rig.set(0x70, 0);
        assert_eq!(rig.get(0x70), 0);
    }
}

/// A device with a request that it holds until the embedder lets the VM go on.
struct Holding {
    resumed: Arc<AtomicU32>,
}

impl VirtioDevice for Holding {
    fn profile(&self) -> Profile {
        Rng.profile()
    }

    fn ready(&mut self, _: &mut DeviceIo, source: EventSource) {
        if source == EventSource::Resumed {
            self.resumed.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[test]
fn what_a_device_holds_is_tried_once_by_a_resume() {
    let memory = GuestMemory::anonymous(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let resumed = Arc::new(AtomicU32::new(0));
    let mut rig = Fixture::of(Box::new(Holding { resumed: resumed.clone() }), memory);
    rig.drive(1, 8);
    // Held by the device itself, which runs.
    rig._devices.remote().with(Slots::resume).unwrap();
    assert_eq!(resumed.load(Ordering::SeqCst), 1);
    // A pause of the embedder stops it: then the start is the second try.
    rig._devices.remote().with(|slots| slots.pause(Duration::from_secs(10))).unwrap();
    rig._devices.remote().with(Slots::resume).unwrap();
    assert_eq!(resumed.load(Ordering::SeqCst), 1);
}
