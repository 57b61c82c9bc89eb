//! The device with sockets behind it whose other end is the test.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};

use super::*;
use crate::memory::GuestAddress;
use crate::network::{Csum, Received, RxBuffer, SocketBackend};
use crate::virtio::testing::{Driver, WRITE};
use crate::virtio::turn::{MAX_PIECE, MAX_TURN};

const RX: usize = 0;
const TX: usize = 1;
const CONTROL: usize = 2;
const HEADER: [u8; HEADER_LEN] = [0; HEADER_LEN];
const OURS: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn device(backends: Vec<SocketBackend>) -> Driver<Net> {
    let backends = backends.into_iter().map(BackendKind::other).collect();
    Driver::start(Net::new(backends, OURS, 1500))
}

fn stream() -> (Driver<Net>, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    (device(vec![SocketBackend::new(near.into()).unwrap()]), far)
}

/// Returns why backends were lost since this was last called.
fn lost(driver: &Driver<Net>) -> Vec<String> {
    let reason = |event| match event {
        DeviceEvent::BackendLost(error) => error.to_string(),
        other => panic!("{other:?}"),
    };
    driver.take_events().into_iter().map(reason).collect()
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

/// A frame of so many bytes.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|n| n as u8 ^ seed).collect()
}

#[test]
fn frames_go_out_in_any_split() {
    let (mut driver, mut far) = stream();
    let sent = frame(1514, 3);
    let whole = [&HEADER[..], &sent].concat();
    for at in [0, 1, 11, 12, 13, 500, whole.len()] {
        let (one, two) = whole.split_at(at);
        assert!(driver.send(TX, &[one, two], &[]));
        driver.dispatch(TX);
        assert_eq!(driver.receive(TX).unwrap().1, 0);
        let mut came = vec![0; 4 + sent.len()];
        far.read_exact(&mut came).unwrap();
        assert!(came == framed(&sent), "split at {at}");
    }
}

#[test]
fn frames_come_in_over_as_many_buffers_as_they_need() {
    let (mut driver, mut far) = stream();
    let frames = [frame(60, 1), frame(1514, 2), frame(5000, 3), frame(1, 4)];
    far.write_all(&frames.iter().flat_map(|it| framed(it)).collect::<Vec<_>>()).unwrap();
    driver.dispatch_watched(0);
    assert!(driver.receive(RX).is_none(), "there are no buffers yet");
    // The header ends at the end of a piece, within one, and one behind the first.
    for split in [&[700, 836][..], &[12, 1524], &[5, 3, 4, 1524], &[1, 1535]].into_iter().cycle().take(8) {
        driver.send(RX, &[], split);
    }
    driver.dispatch(RX);
    for sent in &frames {
        let (first, written) = driver.receive(RX).unwrap();
        let buffers = usize::from(u16::from_le_bytes([first[10], first[11]]));
        assert_eq!(buffers, (HEADER_LEN + sent.len()).div_ceil(1536));
        assert_eq!(first[..10], [0; 10]);
        let mut came = first[HEADER_LEN..written as usize].to_vec();
        for _ in 1..buffers {
            let (more, written) = driver.receive(RX).unwrap();
            came.extend(&more[..written as usize]);
        }
        assert!(came == *sent, "{} bytes", sent.len());
    }
    assert!(driver.receive(RX).is_none() && driver.interrupted());
}

#[test]
fn a_slow_peer_holds_the_guest_and_loses_nothing() {
    let (mut driver, mut far) = stream();
    let frames: Vec<_> = (0..200).map(|n| frame(9000, n)).collect();
    let (mut sent, mut done, mut came) = (0, 0, Vec::<u8>::new());
    far.set_nonblocking(true).unwrap();
    while came.len() < frames.len() * 9004 {
        while sent < frames.len() && driver.send(TX, &[&HEADER, &frames[sent]], &[]) {
            sent += 1;
        }
        driver.dispatch(TX);
        driver.dispatch_watched(0);
        while driver.receive(TX).is_some() {
            done += 1;
        }
        assert!(done <= came.len() / 9004 + 60, "a socket has no endless room");
        let mut some = vec![0; 30_000];
        if let Ok(n) = far.read(&mut some) {
            came.extend(&some[..n]);
        }
    }
    assert!(came == frames.iter().flat_map(|it| framed(it)).collect::<Vec<_>>());
    assert_eq!(driver.device.dropped(), 0);
}

#[test]
fn datagram_sockets_carry_one_frame_each() {
    let (near, far) = UnixDatagram::pair().unwrap();
    let mut driver = device(vec![SocketBackend::new(near.into()).unwrap()]);
    driver.send(TX, &[&HEADER, &frame(100, 1)], &[]);
    driver.dispatch(TX);
    let mut came = [0; 2000];
    assert_eq!(far.recv(&mut came).unwrap(), 100);
    for n in 0..50 {
        driver.send(RX, &[], &[1536 + n]);
    }
    far.send(&frame(77, 5)).unwrap();
    driver.dispatch_watched(0);
    let (bytes, written) = driver.receive(RX).unwrap();
    assert_eq!((written as usize, &bytes[HEADER_LEN..HEADER_LEN + 77]), (HEADER_LEN + 77, &frame(77, 5)[..]));
    assert_eq!(bytes[10..12], [1, 0]);
}

#[test]
fn rx_buffers_are_limited_by_the_queue_size() {
    let (mut driver, mut far) = stream();
    far.write_all(&framed(&frame(60, 1))).unwrap();
    driver.dispatch_watched(0);
    // They have no room, so that they would be gathered for ever.
    for _ in 0..10 {
        driver.claim(RX, QUEUE_SIZE);
        driver.dispatch(RX);
    }
    assert!(driver.needs_reset());
    assert_eq!(driver.device.pairs[0].waiting.chains.len(), usize::from(QUEUE_SIZE));
}

#[test]
fn frames_fit_one_buffer_without_mrg_rxbuf() {
    let (mut driver, mut far) = stream();
    driver.set_features(0);
    driver.send(RX, &[], &[1526]);
    driver.dispatch(RX);
    far.write_all(&framed(&frame(1514, 9))).unwrap();
    driver.dispatch_watched(0);
    assert_eq!(driver.receive(RX).unwrap().1, 1526);
    driver.send(RX, &[], &[100]);
    far.write_all(&framed(&frame(1514, 9))).unwrap();
    driver.dispatch_watched(0);
    assert!(driver.needs_reset());
}

#[test]
fn malformed_frames_are_dropped_and_counted() {
    let (mut driver, mut far) = stream();
    // Too short for a header, work that was not agreed to, an unknown kind.
    let bad: [&[u8]; 3] =
        [&[0; 5], &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 9, 9, 9, 9], &[0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]];
    for bytes in bad {
        driver.send(TX, &[bytes], &[]);
    }
    driver.send(TX, &[&HEADER, b"good"], &[]);
    driver.dispatch(TX);
    let mut came = [0; 8];
    far.read_exact(&mut came).unwrap();
    assert_eq!(came, *framed(b"good"));
    assert_eq!(driver.device.dropped(), 3);
    assert_eq!(std::iter::from_fn(|| driver.receive(TX)).count(), 4);
}

#[test]
fn a_peer_that_goes_away_takes_the_link_down() {
    let (mut driver, far) = stream();
    driver.send(RX, &[], &[1536]);
    drop(far);
    driver.dispatch_watched(0);
    assert_eq!(lost(&driver).len(), 1);
    assert_eq!(driver.device.space.word(4) >> 16, 0, "the link is down");
    driver.send(TX, &[&HEADER, b"lost"], &[]);
    driver.dispatch(TX);
    assert!(driver.receive(TX).is_some() && !driver.needs_reset());
    driver.device.set_link(None, true);
    assert_eq!(driver.device.space.word(4) >> 16, 0, "and stays so");
}

#[test]
fn closed_peer_is_reported_alike_by_sending_and_receiving() {
    for unread in [false, true] {
        for sends_first in [true, false] {
            let (mut driver, far) = stream();
            // Linux resets a stream that is closed with something unread in it.
            if unread {
                driver.send(TX, &[&HEADER, b"unread"], &[]);
                driver.dispatch(TX);
            }
            drop(far);
            if sends_first {
                driver.send(TX, &[&HEADER, b"lost"], &[]);
                driver.dispatch(TX);
            } else {
                driver.send(RX, &[], &[1536]);
                driver.dispatch_watched(0);
            }
            assert_eq!(lost(&driver), ["the other end was closed"], "{unread} {sends_first}");
        }
    }
}

#[test]
fn oversized_frame_length_ends_the_stream() {
    let (mut driver, mut far) = stream();
    driver.send(RX, &[], &[1536]);
    far.write_all(&[0xff; 100]).unwrap();
    driver.dispatch_watched(0);
    assert!(lost(&driver)[0].contains("cannot be"));
}

#[test]
fn link_state_can_be_changed() {
    let (mut driver, mut far) = stream();
    driver.send(RX, &[], &[1536]);
    {
        let (device, io) = driver.parts();
        device.set_link(Some(io), false);
    }
    far.write_all(&framed(b"hello")).unwrap();
    driver.dispatch_watched(0);
    assert!(driver.receive(RX).is_none());
    let (device, io) = driver.parts();
    device.set_link(Some(io), true);
    assert_eq!(driver.receive(RX).unwrap().1 as usize, HEADER_LEN + 5);
}

#[test]
fn several_pairs_are_used_as_the_driver_says() {
    let (sockets, mut far): (Vec<_>, Vec<_>) = (0..3).map(|_| UnixStream::pair().unwrap()).unzip();
    let nets = sockets.into_iter().map(|it| SocketBackend::new(it.into()).unwrap()).collect();
    let mut driver = device(nets);
    for pair in 0..3 {
        for _ in 0..4 {
            driver.send(2 * pair, &[], &[1536]);
        }
    }
    let mut set = |pairs: u16| {
        driver.send(6, &[&[4, 0], &pairs.to_le_bytes()], &[1]);
        driver.dispatch(6);
        driver.receive(6).unwrap().0[0]
    };
    assert_eq!([set(0), set(4), set(2)], [1, 1, 0]);
    for (n, far) in (0..).zip(&mut far) {
        far.write_all(&framed(&[n; 20])).unwrap();
        driver.dispatch_watched(n.into());
    }
    let mut came = |queue| std::iter::from_fn(|| driver.receive(queue)).map(|(bytes, _)| bytes[12]).collect::<Vec<_>>();
    assert_eq!([came(0), came(2), came(4)], [vec![0, 2], vec![1], vec![]]);
    driver.send(3, &[&HEADER, b"second"], &[]);
    driver.dispatch(3);
    let mut bytes = [0; 10];
    far[1].read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, *framed(b"second"));
}

#[test]
fn unknown_control_commands_are_rejected() {
    let (mut driver, _far) = stream();
    for bytes in [
        &[4, 0, 1, 0][..],
        &[0, 0, 1],
        &[1, 1, 2, 2, 2, 2, 2, 2],
        &[9, 9],
        &[5],
        &[5, 0, 255, 255, 255, 255, 255, 255, 255, 255],
    ] {
        driver.send(CONTROL, &[bytes], &[1]);
        driver.dispatch(CONTROL);
        assert_eq!(driver.receive(CONTROL).unwrap().0, [1], "{bytes:?}");
    }
    driver.send(CONTROL, &[&[5, 0], &[0; 8]], &[1]);
    driver.dispatch(CONTROL);
    assert_eq!(driver.receive(CONTROL).unwrap().0, [0]);
}

/// A backend that follows a script.
#[derive(Default)]
struct BackendLog {
    sent: Vec<Vec<u8>>,
    busy: bool,
    waiting: VecDeque<(Vec<u8>, Offload)>,
}

#[derive(Clone)]
struct MockBackend(Arc<Mutex<BackendLog>>, Arc<UnixStream>);

impl crate::network::NetBackend for MockBackend {
    fn capabilities(&self) -> Capabilities {
        Capabilities { to_host: Offloads::all(), to_guest: Offloads::CSUM }
    }

    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&*self.1)
    }

    fn poll(&mut self) {}

    fn send(&mut self, frame: Frame<'_>) -> io::Result<()> {
        let mut told = self.0.lock().unwrap();
        if told.busy {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        told.sent.push(frame.to_vec());
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        self.0.lock().unwrap().waiting.front().map(|(frame, _)| frame.len())
    }

    fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        let next = self.0.lock().unwrap().waiting.pop_front();
        Ok(next.and_then(|(frame, offload)| Some(Received { offload, ..buffer.copy_from(&frame)? })))
    }
}

/// A backend whose drop panics.
struct PanicsAtDrop(UnixStream);

impl Drop for PanicsAtDrop {
    fn drop(&mut self) {
        // Without the panic hook.
        std::panic::resume_unwind(Box::new("a mistake of the embedder's"));
    }
}

impl crate::network::NetBackend for PanicsAtDrop {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }

    fn poll(&mut self) {}

    fn send(&mut self, _: Frame<'_>) -> io::Result<()> {
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        None
    }

    fn receive(&mut self, _: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        Ok(None)
    }
}

#[test]
fn panicking_drops_of_several_backends_end_nothing_else() {
    let backend = || BackendKind::other(PanicsAtDrop(UnixStream::pair().unwrap().0));
    drop(Net::new(vec![backend(), backend()], OURS, 1500));
}

fn with_mock(limit: NetLimit) -> (Driver<Net>, Arc<Mutex<BackendLog>>) {
    let told = Arc::<Mutex<BackendLog>>::default();
    let backend = MockBackend(told.clone(), Arc::new(UnixStream::pair().unwrap().0));
    let mut device = Net::new(vec![BackendKind::other(backend)], OURS, 1500);
    device.set_limit(&limit);
    (Driver::start(device), told)
}

/// Lets the timer ring until `done`.
fn until(driver: &mut Driver<Net>, mut done: impl FnMut(&mut Driver<Net>) -> bool) -> Duration {
    let start = std::time::Instant::now();
    while !done(driver) {
        assert!(start.elapsed() < Duration::from_secs(20), "it is held back for ever");
        let timer = driver.device.limiters.timer.as_ref().unwrap();
        if crate::sys::wait_readable(timer.as_fd(), Some(Duration::from_millis(20))).unwrap() {
            driver.dispatch_watched(TIMER);
        }
    }
    start.elapsed()
}

fn waited(driver: &mut Driver<Net>) -> (u64, Duration) {
    use std::sync::atomic::Ordering::Relaxed;
    let counters = driver.parts().1.counters();
    (counters.throttled.load(Relaxed), Duration::from_nanos(counters.throttled_nanos.load(Relaxed)))
}

#[test]
fn tx_limit_leaves_frames_in_the_queue() {
    let (mut driver, told) = with_mock(NetLimit::none().sent_bytes(crate::rate::Rate::per_second(100_000)));
    for n in 0..60 {
        assert!(driver.send(TX, &[&HEADER, &frame(1000, n)], &[]));
    }
    driver.dispatch(TX);
    let at_once = told.lock().unwrap().sent.len();
    assert!((10..=13).contains(&at_once), "{at_once}: a tenth of a second's worth");
    assert_eq!(std::iter::from_fn(|| driver.receive(TX)).count(), at_once);
    // What the backend cannot take is paid for once.
    told.lock().unwrap().busy = true;
    until(&mut driver, |driver| driver.device.pairs[0].held.as_ref().is_some_and(|held| held.paid));
    told.lock().unwrap().busy = false;
    driver.dispatch_watched(0);
    let time = until(&mut driver, |_| told.lock().unwrap().sent.len() == 60);
    assert!(time > Duration::from_millis(350), "{time:?}");
    let expected: Vec<_> = (0..60).map(|n| frame(1000, n)).collect();
    assert!(told.lock().unwrap().sent == expected);
    let (times, waited) = waited(&mut driver);
    assert!(times > 0 && waited > Duration::from_millis(300) && waited < Duration::from_secs(20), "{times} {waited:?}");
    assert!(matches!(driver.take_events()[..], [DeviceEvent::Throttled]), "reported once a second");
}

#[test]
fn rx_limit_leaves_frames_with_the_backend() {
    let (mut driver, told) = with_mock(NetLimit::none().received_packets(crate::rate::Rate::per_second(100)));
    told.lock().unwrap().waiting = (0..40).map(|n| (frame(60, n), Offload::default())).collect();
    for _ in 0..40 {
        driver.send(RX, &[], &[1536]);
    }
    driver.dispatch(RX);
    let left = told.lock().unwrap().waiting.len();
    assert!((26..=30).contains(&left), "{left}");
    // A change takes effect at once.
    driver.device.set_limit(&NetLimit::none());
    let time = until(&mut driver, |_| told.lock().unwrap().waiting.is_empty());
    assert!(time < Duration::from_millis(200), "{time:?}");
    assert_eq!(std::iter::from_fn(|| driver.receive(RX)).count(), 40);
    assert!(waited(&mut driver).0 == 1);
}

#[test]
fn stop_delivers_frames_despite_a_limit() {
    let (mut driver, told) = with_mock(NetLimit::none().sent_packets(crate::rate::Rate::per_second(1)));
    for n in 0..20 {
        driver.send(TX, &[&HEADER, &frame(100, n)], &[]);
    }
    driver.dispatch(TX);
    assert!(told.lock().unwrap().sent.len() <= 2);
    let (device, io) = driver.parts();
    device.drain(io, Duration::ZERO, DrainCause::End);
    assert_eq!(told.lock().unwrap().sent.len(), 20);
}

#[test]
fn offloads_not_negotiated_are_not_used() {
    let (mut driver, told) = with_mock(NetLimit::none());
    let csum = |start| Offload { csum: Some(crate::network::Csum { start, offset: 16 }), gso: None };
    let gso = crate::network::Gso { kind: crate::network::GsoKind::Tcp4, size: 1000, header_len: 54 };
    let all = [csum(34), csum(90), Offload { gso: Some(gso), ..csum(34) }, Offload::default()];
    told.lock().unwrap().waiting = all.into_iter().map(|offload| (frame(100, 1), offload)).collect();
    for _ in 0..4 {
        driver.send(RX, &[], &[1536]);
    }
    driver.dispatch(RX);
    let came: Vec<u8> = std::iter::from_fn(|| driver.receive(RX)).map(|(bytes, _)| bytes[0]).collect();
    assert_eq!((came, driver.device.dropped()), (vec![1, 0], 2));
}

#[test]
fn both_directions_are_captured() {
    let path = std::env::temp_dir().join(format!("cofferdam-card-{}.pcap", std::process::id()));
    let (recorder, pump) = crate::network::Capture::file(&path).open().unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    let net = Net::new(vec![BackendKind::other(SocketBackend::new(near.into()).unwrap())], OURS, 1500);
    let mut driver = Driver::start(net.captured_by(Some(recorder)));
    driver.send(TX, &[&HEADER, &frame(100, 1)], &[]);
    driver.dispatch(TX);
    for _ in 0..8 {
        driver.send(RX, &[], &[100, 60]);
    }
    far.write_all(&framed(&frame(300, 2))).unwrap();
    driver.dispatch_watched(0);
    let stats = pump.counters().stats();
    assert_eq!((stats.frames, stats.lost), (2, 0));
    drop(driver);
    pump.run();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(bytes.len(), 24 + 2 * 16 + 400);
    assert!(bytes[40..140] == frame(100, 1) && bytes[156..] == frame(300, 2));
}

#[test]
fn a_turn_of_frames_is_bounded_each_way() {
    /// Takes and has frames without end.
    struct Endless(UnixStream, usize, usize);
    impl crate::network::NetBackend for Endless {
        fn capabilities(&self) -> Capabilities {
            Capabilities { to_host: Offloads::all(), to_guest: Offloads::all() }
        }
        fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
            std::os::fd::AsFd::as_fd(&self.0)
        }
        fn poll(&mut self) {}
        fn send(&mut self, _: Frame<'_>) -> io::Result<()> {
            self.1 += 1;
            Ok(())
        }
        fn next_len(&mut self) -> Option<usize> {
            Some(FRAME_MAX)
        }
        fn receive(&mut self, _: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
            self.2 += 1;
            Ok(Some(Received { len: 60_000, offload: Offload::default() }))
        }
    }
    let endless = Endless(UnixStream::pair().unwrap().0, 0, 0);
    let net = Net::new(vec![BackendKind::other(endless)], OURS, 1500);
    let mut driver = Driver::start(net);
    let memory = driver.memory();
    let csum = Some(Csum { start: 34, offset: 16 });
    let put = |at: u64, kind, size| {
        let gso = Some(Gso { kind, size, header_len: 54 });
        memory.write(GuestAddress(at), &Offload { csum, gso }.to_bytes(0)).unwrap();
    };
    // TCP in the smallest pieces there may be, and datagrams in the most.
    put(0x100_0000, GsoKind::Tcp4, 8);
    put(0x110_0000, GsoKind::Udp, 512);
    // Of what makes no sense nothing goes out.
    put(0x120_0000, GsoKind::Udp, 1);
    put(0x130_0000, GsoKind::Tcp6, 1);
    let mut rejected = 0;
    for round in 0..400 {
        for at in [0x100_0000, 0x110_0000, 0x120_0000, 0x130_0000].repeat(10) {
            driver.send_raw(TX, &[(at, HEADER_LEN as u32 + 60_000, 0)]);
        }
        if round % 2 == 0 {
            while driver.send_raw(RX, &[(0x140_0000, 1, WRITE), (0x140_0000, 1499, WRITE)]) {}
        }
        driver.dispatch(TX);
        while driver.collect(TX).is_some() || driver.collect(RX).is_some() {}
        rejected = driver.device.dropped();
    }
    assert!(rejected > 100, "{rejected}");
    assert!(driver.most_work() > MAX_TURN, "no turn was too short");
    assert!(driver.most_work() <= MAX_TURN + MAX_PIECE, "{}", driver.most_work());
}

#[test]
fn new_flows_charge_their_system_calls() {
    let (net, _socket, frame) = crate::network::fuzzing::new_flows().unwrap();
    let mut driver = Driver::start(Net::new(vec![BackendKind::User(Box::new(net))], OURS, 1500));
    let memory = driver.memory();
    for n in 0..256 {
        let (at, frame) = (0x100_0000 + 64 * u64::from(n), frame(5000 + n));
        memory.write(GuestAddress(at), &frame).unwrap();
        assert!(driver.send_raw(TX, &[(at, frame.len() as u32, 0)]));
    }
    driver.dispatch(TX);
    let done = std::iter::from_fn(|| driver.collect(TX)).count() as u64;
    // A packet, a route, and a socket from its making to its end.
    assert_eq!(driver.device.stats().map(|stats| stats.datagram_flows), Some(done));
    assert!(done <= 1 + MAX_TURN / 17_000 && done > 100, "{done}");
    assert!(driver.most_work() <= MAX_TURN + 20_000, "{}", driver.most_work());
}
