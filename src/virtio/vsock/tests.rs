//! The device against a fake driver, packet by packet.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::Duration;

use super::credit::BUFFER;
use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;
use crate::virtio::testing::Driver;
use crate::virtio::turn::{MAX_PIECE, MAX_TURN};

const PORT: u32 = 1024;
const GUEST_PORT: u32 = 7;

struct Fixture {
    driver: Driver<Vsock>,
    listener: VsockListener,
}

impl Fixture {
    fn new() -> Self {
        let mut vsock = Vsock::new();
        let listener = vsock.listen(PORT).unwrap();
        let mut driver = Driver::start(vsock);
        for _ in 0..64 {
            driver.send(RX, &[], &[HEADER + 100, 4096]);
        }
        Self { driver, listener }
    }

    /// The guest sends a packet, its bytes split at `splits`.
    fn send(&mut self, header: VsockHeader, data: &[u8], splits: &[usize]) {
        let bytes = [header.to_bytes().as_slice(), data].concat();
        let (mut pieces, mut rest) = (Vec::new(), bytes.as_slice());
        for split in splits {
            let (piece, later) = rest.split_at((*split).min(rest.len()));
            pieces.push(piece);
            rest = later;
        }
        pieces.push(rest);
        pieces.retain(|p| !p.is_empty());
        assert!(self.driver.send(TX, &pieces, &[]));
        self.driver.dispatch(TX);
        assert!(self.driver.receive(TX).is_some());
    }

    fn op(&mut self, op: VsockOp, flags: u32) {
        self.send(VsockHeader { flags, ..guest(op, 0) }, &[], &[]);
    }

    /// Returns what the guest receives next.
    fn receive(&mut self) -> Option<(VsockHeader, Vec<u8>)> {
        let (bytes, written) = self.driver.receive(RX)?;
        self.driver.send(RX, &[], &[HEADER + 100, 4096]);
        let (header, data) = bytes[..written as usize].split_first_chunk().unwrap();
        Some((VsockHeader::parse(header), data.to_vec()))
    }

    fn receive_op(&mut self) -> Option<VsockOp> {
        self.receive().map(|(header, _)| header.op)
    }

    /// Tells the device that every socket may have changed, as the loop would.
    fn sockets(&mut self) {
        for number in 0..4 {
            self.driver.dispatch_watched(number);
        }
    }

    fn connected() -> (Self, VsockStream) {
        let mut rig = Self::new();
        rig.op(VsockOp::Request, 0);
        assert_eq!(rig.receive_op(), Some(VsockOp::Response));
        let stream = rig.listener.accept_timeout(Duration::from_secs(5)).unwrap().unwrap();
        (rig, stream)
    }
}

fn guest(op: VsockOp, len: u32) -> VsockHeader {
    VsockHeader {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        src_port: GUEST_PORT,
        dst_port: PORT,
        len,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 1 << 20,
        fwd_cnt: 0,
    }
}

#[test]
fn guest_connects_to_listeners_only() {
    let mut rig = Fixture::new();
    rig.send(VsockHeader { dst_port: 99, ..guest(VsockOp::Request, 0) }, &[], &[]);
    let (header, _) = rig.receive().unwrap();
    assert_eq!((header.op, header.src_port, header.dst_port), (VsockOp::Reset, 99, GUEST_PORT));
    assert!(rig.listener.try_accept().unwrap().is_none());
}

#[test]
fn data_arrives_in_any_split_of_descriptors() {
    let (mut rig, mut stream) = Fixture::connected();
    for splits in [&[][..], &[10], &[44], &[44, 1, 1], &[43, 3], &[1; 50]] {
        rig.send(guest(VsockOp::Data, 10), b"0123456789", splits);
        let mut back = [0; 10];
        stream.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"0123456789");
    }
}

#[test]
fn what_the_embedder_writes_reaches_the_guest_within_its_credit() {
    let (mut rig, mut stream) = Fixture::connected();
    rig.send(VsockHeader { buf_alloc: 6, ..guest(VsockOp::CreditUpdate, 0) }, &[], &[]);
    stream.write_all(b"hello world").unwrap();
    rig.sockets();
    assert_eq!(rig.receive().unwrap().1, b"hello ");
    assert!(rig.receive().is_none(), "no credit is left");
    rig.send(VsockHeader { buf_alloc: 6, fwd_cnt: 6, ..guest(VsockOp::CreditUpdate, 0) }, &[], &[]);
    assert_eq!(rig.receive().unwrap().1, b"world");
}

#[test]
fn a_reader_that_does_not_read_stops_the_guest_and_nothing_is_lost() {
    let (mut rig, mut stream) = Fixture::connected();
    let chunk = vec![7u8; 32 * 1024];
    let mut credit = BUFFER;
    let mut sent = 0;
    // As a driver does: only as much as there is credit for.
    while credit >= chunk.len() as u32 {
        rig.send(guest(VsockOp::Data, chunk.len() as u32), &chunk, &[]);
        sent += chunk.len() as u32;
        credit -= chunk.len() as u32;
        while let Some((header, _)) = rig.receive() {
            credit = header.buf_alloc - (sent - header.fwd_cnt);
        }
    }
    let mut received = vec![0; sent as usize];
    let reader = std::thread::spawn(move || {
        stream.read_exact(&mut received).unwrap();
        // The stream's end would be another thing to read.
        (stream, received)
    });
    while !reader.is_finished() {
        rig.sockets();
        std::thread::yield_now();
    }
    let (_stream, received) = reader.join().unwrap();
    assert!(received.iter().all(|b| *b == 7));
    rig.sockets();
    assert_eq!(rig.receive_op(), Some(VsockOp::CreditUpdate), "the guest learns that there is room again");
}

#[test]
fn a_guest_that_ignores_its_credit_is_disconnected() {
    let (mut rig, _stream) = Fixture::connected();
    let chunk = vec![0u8; 128 * 1024];
    let mut ended = false;
    for _ in 0..16 {
        rig.send(guest(VsockOp::Data, chunk.len() as u32), &chunk, &[]);
        ended |= std::iter::from_fn(|| rig.receive_op()).any(|op| op == VsockOp::Reset);
    }
    assert!(ended);
}

#[test]
fn each_direction_closes_by_itself() {
    let (mut rig, mut stream) = Fixture::connected();
    rig.send(guest(VsockOp::Data, 3), b"end", &[]);
    rig.op(VsockOp::Shutdown, SHUTDOWN_SEND);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"end");
    stream.write_all(b"still here").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    rig.sockets();
    assert_eq!(rig.receive().unwrap().1, b"still here");
    let (header, _) = rig.receive().unwrap();
    assert_eq!((header.op, header.flags), (VsockOp::Shutdown, SHUTDOWN_SEND));
    rig.op(VsockOp::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!(rig.receive_op(), Some(VsockOp::Reset));
    assert!(rig.driver.device.connections.is_empty());
}

#[test]
fn resets_are_reported_to_readers_and_writers() {
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    for (ends, reset) in
        [(&[SHUTDOWN_SEND, both][..], false), (&[both], true), (&[SHUTDOWN_RECEIVE, both], true), (&[], true)]
    {
        let (mut rig, plain) = Fixture::connected();
        let stream = plain.try_clone().unwrap().report_resets();
        rig.send(guest(VsockOp::Data, 3), b"end", &[]);
        ends.iter().for_each(|flags| rig.op(VsockOp::Shutdown, *flags));
        rig.op(VsockOp::Reset, 0);
        for (mut stream, reset) in [(stream, reset), (plain, false)] {
            let mut all = Vec::new();
            let outcome = stream.read_to_end(&mut all);
            assert_eq!(outcome.is_err(), reset, "{ends:?}");
            assert!(
                outcome.is_ok_and(|_| true)
                    || stream.read(&mut [0]).unwrap_err().kind() == io::ErrorKind::ConnectionReset
            );
        }
    }
}

#[test]
fn dropping_the_stream_tells_the_guest_after_all_data() {
    let (mut rig, mut stream) = Fixture::connected();
    stream.write_all(b"last words").unwrap();
    drop(stream);
    // A socket pair that was closed reports a hang-up; the test's dispatch does not, so it is said by hand.
    rig.driver.parts().0.connections.values_mut().for_each(VsockConnection::socket_hung_up);
    rig.sockets();
    assert_eq!(rig.receive().unwrap().1, b"last words");
    let (header, _) = rig.receive().unwrap();
    assert_eq!((header.op, header.flags), (VsockOp::Shutdown, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    rig.op(VsockOp::Reset, 0);
    assert!(rig.driver.device.connections.is_empty());
}

#[test]
fn the_embedder_connects_and_is_refused() {
    let mut rig = Fixture::new();
    for (reply, works) in [(VsockOp::Response, true), (VsockOp::Reset, false)] {
        let (answer, wait) = mpsc::sync_channel(1);
        let (vsock, io) = rig.driver.parts();
        vsock.connect(Some(io), 5000, answer);
        let (request, _) = rig.receive().unwrap();
        assert_eq!((request.op, request.dst_port), (VsockOp::Request, 5000));
        rig.send(VsockHeader { src_port: 5000, dst_port: request.src_port, ..guest(reply, 0) }, &[], &[]);
        assert_eq!(wait.try_recv().unwrap().is_ok(), works);
    }
}

#[test]
fn connecting_before_the_driver_runs_is_an_error() {
    let (answer, wait) = mpsc::sync_channel(1);
    Vsock::new().connect(None, 1, answer);
    assert_eq!(wait.try_recv().unwrap().unwrap_err().kind(), ErrorKind::InvalidState);
}

#[test]
fn what_was_received_survives_the_end() {
    let (mut rig, mut stream) = Fixture::connected();
    let chunk = vec![9u8; 64 * 1024];
    for _ in 0..4 {
        rig.send(guest(VsockOp::Data, chunk.len() as u32), &chunk, &[]);
    }
    drop(rig.driver.stop());
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 4 * chunk.len());
    assert_eq!(rig.listener.accept().unwrap_err().kind(), ErrorKind::InvalidState);
}

#[test]
fn resets_wait_for_rx_buffers_and_are_bounded() {
    let mut driver = Driver::start(Vsock::new());
    for port in 0..MAX_RESETS as u32 + 100 {
        let header = VsockHeader { src_port: port, ..guest(VsockOp::Request, 0) };
        assert!(driver.send(TX, &[&header.to_bytes()], &[]));
        driver.dispatch(TX);
        assert!(driver.receive(TX).is_some());
    }
    assert_eq!(driver.device.resets.len(), MAX_RESETS);
    let mut told = 0;
    while !driver.device.resets.is_empty() {
        for _ in 0..200 {
            driver.send(RX, &[], &[HEADER]);
        }
        driver.dispatch(RX);
        told += std::iter::from_fn(|| driver.receive(RX)).count();
    }
    assert_eq!(told, MAX_RESETS);
}

#[test]
fn malformed_vsock_packets_are_harmless() {
    let (mut rig, stream) = Fixture::connected();
    rig.send(VsockHeader { src_cid: 77, ..guest(VsockOp::Data, 1) }, b"x", &[]);
    assert!(rig.receive().is_none());
    rig.send(VsockHeader { len: 1000, ..guest(VsockOp::Data, 0) }, b"short", &[]);
    assert_eq!(rig.receive_op(), Some(VsockOp::Reset));
    drop(stream);
    rig.send(VsockHeader { kind: 2, ..guest(VsockOp::Request, 0) }, &[], &[]);
    assert_eq!(rig.receive_op(), Some(VsockOp::Reset));
    rig.send(guest(VsockOp::Unknown(99), 0), &[], &[]);
    assert_eq!(rig.receive_op(), Some(VsockOp::Reset));
    assert!(rig.driver.send(TX, &[b"tiny"], &[]));
    rig.driver.dispatch(TX);
    assert!(!rig.driver.needs_reset());
}

#[test]
fn unaccepted_connections_close_with_the_listener() {
    let mut rig = Fixture::new();
    rig.send(guest(VsockOp::Request, 0), &[], &[]);
    assert_eq!(rig.receive_op(), Some(VsockOp::Response));
    let other = rig.driver.device.listen(99).unwrap();
    drop(std::mem::replace(&mut rig.listener, other));
    rig.sockets();
    assert!(matches!(rig.receive_op(), Some(VsockOp::Shutdown | VsockOp::Reset)));
}

/// A listener may be dropped between the look whether it has room and the connection's arrival.
#[test]
fn connection_to_a_dropped_listener_is_closed() {
    let arrivals = super::stream::AcceptQueue::new().unwrap();
    arrivals.close();
    let (stream, socket, _tail) = VsockStream::pair().unwrap();
    arrivals.push(stream);
    use std::io::Read;
    assert_eq!((&socket).read(&mut [0; 1]).unwrap(), 0, "the other end is closed");
}

#[test]
fn a_guest_holds_no_more_descriptors_than_its_share() {
    let mut rig = Fixture::new();
    rig.driver.device.share = DescriptorShare::new(Some(9), true);
    let ask = |rig: &mut Fixture, port| {
        rig.send(VsockHeader { src_port: port, ..guest(VsockOp::Request, 0) }, &[], &[]);
        rig.receive_op()
    };
    for port in 0..4 {
        assert_eq!(ask(&mut rig, port), Some(VsockOp::Response), "{port}");
    }
    // Each has two, so one is left, which is too few.
    assert_eq!(ask(&mut rig, 4), Some(VsockOp::Reset));
    assert_eq!(rig.listener.refused().unwrap().kind(), ErrorKind::ResourceExhausted);
    // What the embedder connects is not the guest's.
    let (answer, _wait) = mpsc::sync_channel(1);
    let (device, io) = rig.driver.parts();
    device.connect(Some(io), 99, answer);
    assert_eq!(rig.receive_op(), Some(VsockOp::Request));
    // A connection that the guest ends gives its own half back, and the embedder's when that closes it, with all handles.
    let stream = rig.listener.accept().unwrap();
    let clone = stream.try_clone().unwrap();
    rig.send(VsockHeader { src_port: 0, ..guest(VsockOp::Reset, 0) }, &[], &[]);
    assert_eq!(ask(&mut rig, 5), Some(VsockOp::Response));
    drop(stream);
    assert_eq!(ask(&mut rig, 6), Some(VsockOp::Reset));
    drop(clone);
    rig.send(VsockHeader { src_port: 1, ..guest(VsockOp::Reset, 0) }, &[], &[]);
    drop(rig.listener.accept().unwrap());
    assert_eq!(ask(&mut rig, 7), Some(VsockOp::Response));
}

#[test]
fn listeners_are_one_a_port_until_dropped() {
    let mut vsock = Vsock::new();
    let first = vsock.listen(5).unwrap();
    assert_eq!((first.port(), vsock.listen(5).unwrap_err().kind()), (5, ErrorKind::AlreadyExists));
    let _ = first.as_fd();
    drop(first);
    vsock.listen(5).unwrap();
}

#[test]
fn a_guest_that_does_not_answer_keeps_no_connection() {
    let mut rig = Fixture::new();
    rig.driver.device.connect_timeout = Duration::from_millis(50);
    let mut waiting = Vec::new();
    for n in 0..MAX_CONNECTING + 10 {
        let (answer, wait) = mpsc::sync_channel(1);
        let (device, io) = rig.driver.parts();
        device.connect(Some(io), 1025, answer);
        // Half of those who ask give up at once.
        waiting.extend((n % 2 == 0).then_some(wait));
        while rig.receive().is_some() {}
    }
    assert_eq!(rig.driver.device.connections.len(), MAX_CONNECTING);
    let refused = |wait: &mpsc::Receiver<Result<VsockStream>>| wait.recv().unwrap().unwrap_err().kind();
    assert_eq!(refused(waiting.last().unwrap()), ErrorKind::ResourceExhausted);
    std::thread::sleep(Duration::from_millis(60));
    rig.driver.dispatch_watched(TIMER);
    assert_eq!((rig.driver.device.connections.len(), rig.driver.device.names.len()), (0, 0));
    assert_eq!(refused(&waiting[0]), ErrorKind::TimedOut);
    let mut resets = 0;
    while let Some(op) = rig.receive_op() {
        resets += usize::from(op == VsockOp::Reset);
        rig.driver.dispatch(RX);
    }
    assert_eq!(resets, MAX_CONNECTING, "the guest is told of each");
    // One that is answered in time lives on.
    let (answer, wait) = mpsc::sync_channel(1);
    let (device, io) = rig.driver.parts();
    device.connect(Some(io), 1025, answer);
    let (request, _) = rig.receive().unwrap();
    rig.send(VsockHeader { dst_port: request.src_port, src_port: 1025, ..guest(VsockOp::Response, 0) }, &[], &[]);
    let stream = wait.recv().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(60));
    rig.driver.dispatch_watched(TIMER);
    assert_eq!(rig.driver.device.connections.len(), 1);
    drop(stream);
}

#[test]
fn unaccepted_connections_are_bounded() {
    let mut rig = Fixture::new();
    for port in 0..300 {
        rig.send(VsockHeader { src_port: 5000 + port, ..guest(VsockOp::Request, 0) }, &[], &[]);
    }
    assert_eq!(rig.driver.device.connections.len(), stream::BACKLOG);
    let accepted = (0..300).map_while(|_| rig.listener.try_accept().unwrap()).count();
    assert_eq!(accepted, stream::BACKLOG);
}

#[test]
fn a_turn_of_packets_is_bounded() {
    let mut rig = Fixture::new();
    rig.op(VsockOp::Request, 0);
    let mut stream = rig.listener.accept_timeout(Duration::from_secs(5)).unwrap().unwrap();
    let mut room = vec![0; BUFFER as usize];
    for _ in 0..20 {
        // More than it may, in as many pieces as there may be.
        for _ in 0..100 {
            rig.driver.send(TX, &[&guest(VsockOp::Data, 60_000).to_bytes(), &[0; 60_000]], &[]);
        }
        rig.driver.dispatch(TX);
        while rig.driver.receive(TX).is_some() {}
        stream.set_nonblocking(true).unwrap();
        let _ = stream.read(&mut room);
    }
    assert!(rig.driver.most_work() <= MAX_TURN + MAX_PIECE, "{}", rig.driver.most_work());
}

/// While a child of fork lives, the embedder's stream still ends with the guest's.
#[test]
fn a_child_of_fork_keeps_no_stream_open() {
    let (mut rig, mut stream) = Fixture::connected();
    rig.send(guest(VsockOp::Data, 5), b"hello", &[]);
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    crate::sys::beside_a_child(|| {
        rig.op(VsockOp::Reset, 0);
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        assert_eq!(all, "hello");
    });
}

#[test]
fn connections_go_on_after_a_stop() {
    let (mut rig, mut stream) = Fixture::connected();
    // On its way both ways, and not taken yet.
    rig.send(guest(VsockOp::Data, 5), b"hello", &[]);
    stream.write_all(b"world").unwrap();
    rig.driver = rig.driver.restart(|device, _| device);
    let mut came = [0; 5];
    stream.read_exact(&mut came).unwrap();
    assert_eq!(&came, b"hello");
    rig.sockets();
    let (header, data) = std::iter::from_fn(|| rig.receive()).find(|(header, _)| header.op == VsockOp::Data).unwrap();
    assert_eq!((header.src_port, data.as_slice()), (PORT, b"world".as_slice()));
    // And everything after that.
    rig.send(guest(VsockOp::Data, 5), b"again", &[]);
    stream.read_exact(&mut came).unwrap();
    assert_eq!(&came, b"again");
}

#[test]
fn connections_that_the_host_has_lost_are_reset_after_a_restore() {
    let (mut rig, _stream) = Fixture::connected();
    rig.driver = rig.driver.restart(|_, _| Vsock::new());
    let (header, _) = rig.receive().expect("the guest learns of it at once");
    assert_eq!((header.op, header.src_port, header.dst_port), (VsockOp::Reset, PORT, GUEST_PORT));
    assert!(rig.receive().is_none());
}

#[test]
fn states_with_too_many_connections_or_of_other_devices_are_refused() {
    let mut driver = Driver::start(Vsock::new());
    let ports = |n| PortPair { host: n, guest: n };
    let many = VsockState { connections: (0..=MAX_CONNECTIONS as u32).map(ports).collect() };
    for state in [DeviceState::Vsock(many), DeviceState::Stateless] {
        let (device, io) = driver.parts();
        device.stop(io);
        assert_eq!(device.start(io, Some(&state)).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
