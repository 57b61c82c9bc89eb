//! Socket device (Virtio 1.3, 5.10): connections between guest programs and the embedder. Runs on the VM's loop.
//!
//! Each connection is a socket pair: the embedder holds one end as a [`VsockStream`], the device the other. Data moves
//! between socket and guest memory without a copy in between. What the embedder does not take waits in a buffer, whose
//! size is the guest's credit. A guest that sends more is disconnected.

mod connection;
mod credit;
pub(crate) mod packet;
mod stream;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use connection::{Answer, PendingControl, PortPair, VsockConnection};
use credit::CreditUpdate;
use packet::{HEADER, TYPE_STREAM, VsockHeader, VsockOp};
pub(crate) use stream::AcceptQueue;
#[cfg(feature = "container")]
pub(crate) use stream::StreamBreaker;
pub use stream::{VsockListener, VsockStream};

use super::{Chain, DeviceIo, DeviceState, DeviceType, EventSource, Profile, VirtioDevice, Work};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::event_loop::Interest;
use crate::sys::{DescriptorShare, Timer, is_spare};

/// The host's address in every guest (Virtio 1.3, 5.10.4).
pub(crate) const HOST_CID: u64 = 2;
/// The guest's. Guests do not see each other, so all have the same.
pub(crate) const GUEST_CID: u64 = 3;

/// Queues (Virtio 1.3, 5.10.2): to the guest, from the guest, events.
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Connections at once. More are refused.
const MAX_CONNECTIONS: usize = 1024;
/// Connections of the embedder that wait for the guest's answer. More are refused.
const MAX_CONNECTING: usize = 256;
/// How long a connection waits for the guest's answer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Refusals that may wait for the guest to offer buffers.
///
/// More are dropped: the guest's sockets time out in a few seconds. To stop reading from the guest instead would be
/// worse. A guest stops reading when too many of its own answers wait to be sent, and both would wait for ever.
const MAX_RESETS: usize = 4096;
/// The most data in one packet.
const MAX_DATA: u32 = 64 * 1024;
/// The number under which the time-outs of connections are watched. Connections have smaller ones.
const TIMER: u32 = 1 << 30;
/// Ports for connections that the embedder makes are taken from here on, round and round.
const EPHEMERAL: u32 = 1 << 30;

/// The device and all its connections.
pub(crate) struct Vsock {
    connections: HashMap<u32, VsockConnection>,
    names: HashMap<PortPair, u32>,
    listeners: HashMap<u32, Arc<AcceptQueue>>,
    /// Connections that may have something to say, each at most once.
    talkative: VecDeque<u32>,
    resets: VecDeque<PortPair>,
    /// A buffer of the guest that was taken and not filled.
    spare: Option<Chain>,
    next_number: u32,
    next_port: u32,
    /// Connections that wait for the guest's answer, or have got it, and until when: the oldest first.
    connecting: VecDeque<(Instant, PortPair)>,
    connect_timeout: Duration,
    timer: Option<Timer>,
    /// Descriptors that the guest may hold.
    share: DescriptorShare,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Vsock({} connections)", self.connections.len())
    }
}

impl std::fmt::Debug for AcceptQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Arrivals")
    }
}

/// What a guest believes to be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct VsockState {
    /// In order, each once.
    pub connections: Vec<PortPair>,
}

impl Vsock {
    pub(crate) fn new() -> Self {
        Self {
            connections: HashMap::new(),
            names: HashMap::new(),
            listeners: HashMap::new(),
            talkative: VecDeque::new(),
            resets: VecDeque::new(),
            spare: None,
            next_number: 0,
            next_port: EPHEMERAL,
            connecting: VecDeque::new(),
            connect_timeout: CONNECT_TIMEOUT,
            timer: None,
            share: DescriptorShare::default(),
        }
    }

    /// Has the guest's connections hold descriptors of this share.
    pub(crate) fn share(mut self, share: DescriptorShare) -> Self {
        self.share = share;
        self
    }

    /// From now on guests may connect to `port` of the host.
    ///
    /// # Errors
    /// `AlreadyExists` when there is a listener, `ResourceExhausted` without descriptors.
    pub(crate) fn listen(&mut self, port: u32) -> Result<VsockListener> {
        self.listeners.retain(|_, arrivals| !arrivals.closed());
        if self.listeners.contains_key(&port) {
            return Err(Error::new(ErrorKind::AlreadyExists, format!("vsock port {port} has a listener already")));
        }
        let arrivals = AcceptQueue::new().doing(|| format!("listening on vsock port {port}"))?;
        self.listeners.insert(port, arrivals.clone());
        Ok(VsockListener::new(arrivals, port))
    }

    /// Connects to `port` of the guest; `answer` gets the stream or the refusal, after [`CONNECT_TIMEOUT`] at the latest.
    pub(crate) fn connect(&mut self, io: Option<&mut DeviceIo>, port: u32, answer: Answer) {
        let refuse = |error| drop(answer.send(Err(error)));
        let Some(io) = io else {
            return refuse(Error::new(ErrorKind::InvalidState, "the guest has no vsock driver running yet"));
        };
        if self.connections.len() >= MAX_CONNECTIONS {
            return refuse(Error::new(
                ErrorKind::ResourceExhausted,
                format!("there are {MAX_CONNECTIONS} vsock connections"),
            ));
        }
        if self.connecting().count() >= MAX_CONNECTING {
            return refuse(Error::new(
                ErrorKind::ResourceExhausted,
                format!("{MAX_CONNECTING} vsock connections wait for the guest's answer"),
            ));
        }
        let (stream, socket, tail) = match VsockStream::pair() {
            Ok(pair) => pair,
            Err(error) => return refuse(Error::from(error).doing("connecting over vsock")),
        };
        let mut host_port = self.next_port;
        while self.names.contains_key(&PortPair { host: host_port, guest: port }) {
            host_port = host_port.wrapping_add(1).max(EPHEMERAL);
        }
        self.next_port = host_port.wrapping_add(1).max(EPHEMERAL);
        let ports = PortPair { host: host_port, guest: port };
        let connection = VsockConnection::connecting(ports, socket, tail, answer, stream);
        if let Err(connection) = self.add(io, connection) {
            return connection.end(|| Error::new(ErrorKind::ResourceExhausted, "the connection cannot be watched"));
        }
        self.connecting.push_back((Instant::now() + self.connect_timeout, ports));
        self.arm();
        self.service_rx_queue(io);
    }

    /// Those connections of the embedder that the guest has not answered.
    fn connecting(&self) -> impl Iterator<Item = &(Instant, PortPair)> {
        self.connecting.iter().filter(|(_, ports)| self.is_connecting(*ports))
    }

    fn is_connecting(&self, ports: PortPair) -> bool {
        let connection = self.names.get(&ports).and_then(|number| self.connections.get(number));
        connection.is_some_and(VsockConnection::is_connecting)
    }

    /// Rings when the first of those that wait has waited for too long.
    fn arm(&mut self) {
        while self.connecting.front().is_some_and(|(_, ports)| !self.is_connecting(*ports)) {
            self.connecting.pop_front();
        }
        let first = self.connecting.front().map(|(until, _)| *until);
        if let Some(Err(error)) = self.timer.as_mut().map(|timer| timer.set(first)) {
            log::error!("time-outs of vsock connections: {error}");
        }
    }

    /// Gives up connections that the guest has not answered in time.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some((_, ports)) = self.connecting.front().copied().filter(|(until, _)| *until <= now) {
            self.connecting.pop_front();
            if self.is_connecting(ports) {
                self.remove(ports, ErrorKind::TimedOut, "the guest did not answer");
                self.refuse(ports);
            }
        }
        self.arm();
    }

    /// Registers a connection. Gives it back when its socket cannot be watched.
    fn add(&mut self, io: &DeviceIo, connection: VsockConnection) -> Result<(), Box<VsockConnection>> {
        let mut number = self.next_number;
        while self.connections.contains_key(&number) {
            number = next(number);
        }
        self.next_number = next(number);
        if io.watch(connection.socket().as_fd(), number, SOCKET_EDGES).is_err() {
            return Err(Box::new(connection));
        }
        self.names.insert(connection.ports, number);
        self.connections.insert(number, connection);
        self.mark_ready(number);
        Ok(())
    }

    /// Forgets a connection; its socket closes.
    fn remove(&mut self, ports: PortPair, kind: ErrorKind, refusal: &str) {
        if let Some(connection) = self.names.remove(&ports).and_then(|number| self.connections.remove(&number)) {
            connection.end(|| Error::new(kind, format!("vsock port {}: {refusal}", ports.guest)));
        }
    }

    fn reset(&mut self, ports: PortPair) {
        self.remove(ports, ErrorKind::NotFound, "the connection was reset");
        self.refuse(ports);
    }

    /// Queues a reset: the guest learns that there is no such connection.
    fn refuse(&mut self, ports: PortPair) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(ports);
        }
    }

    /// The driver sent a packet.
    fn handle_packet(&mut self, io: &mut DeviceIo, chain: &mut Chain) {
        let Ok(bytes) = chain.read() else { return };
        let header = VsockHeader::parse(&bytes);
        let ports = PortPair { host: header.dst_port, guest: header.src_port };
        if header.src_cid != GUEST_CID || header.dst_cid != HOST_CID {
            // The address does not exist; a reset could not be addressed either.
            return;
        }
        if header.kind != TYPE_STREAM {
            // "…SHOULD reply with VIRTIO_VSOCK_OP_RST to unknown types" (Virtio 1.3, 5.10.6.4.2).
            return self.reset(ports);
        }
        match (header.op, self.names.get(&ports).copied()) {
            (VsockOp::Reset, _) => self.remove(ports, ErrorKind::NotFound, "no program in the guest listens there"),
            (VsockOp::Request, None) => self.accept(io, ports, &header),
            (_, Some(number)) if header.op != VsockOp::Request => {
                self.service_connection(io, number, ports, &header, chain)
            }
            _ => self.reset(ports),
        }
    }

    fn accept(&mut self, io: &mut DeviceIo, ports: PortPair, header: &VsockHeader) {
        let full = self.connections.len() >= MAX_CONNECTIONS;
        let Some(arrivals) = self.listeners.get(&ports.host).filter(|a| a.has_room() && !full).cloned() else {
            return self.reset(ports);
        };
        io.charge(Work::Calls(4));
        let none = || io::Error::from_raw_os_error(libc::EMFILE);
        let held = self.share.vsock(1).zip(self.share.vsock(1));
        let pair = held.ok_or_else(none).and_then(|held| Ok((held, VsockStream::pair()?)));
        let ((near, far), (stream, socket, tail)) = match pair {
            // What the embedder connects may use up its own reserve; what guests do may not.
            Ok((held, pair)) if is_spare(&pair.0) && is_spare(&pair.1) => (held, pair),
            other => {
                arrivals.refuse(&other.err().unwrap_or_else(none));
                return self.reset(ports);
            }
        };
        let stream = stream.holding(near);
        let mut connection = VsockConnection::accepted(ports, socket, tail, far);
        connection.credit.update(CreditUpdate::of(header));
        match self.add(io, connection) {
            Ok(()) => arrivals.push(stream),
            Err(_) => self.refuse(ports),
        }
    }

    /// A packet for a connection that exists.
    fn service_connection(
        &mut self,
        io: &mut DeviceIo,
        number: u32,
        ports: PortPair,
        header: &VsockHeader,
        chain: &mut Chain,
    ) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        connection.credit.update(CreditUpdate::of(header));
        let sound = match header.op {
            VsockOp::Response if connection.is_connecting() => {
                connection.established();
                true
            }
            // Anything else before the answer, and a second answer, is out of turn.
            _ if connection.is_connecting() => false,
            VsockOp::Data => {
                let len = header.len as usize;
                // More than a connection's buffer is refused before it is copied.
                io.charge(Work::Bytes(len.min(credit::BUFFER as usize)));
                len <= chain.readable_len() && {
                    let segments = chain.take_readable(len);
                    connection.send_from(chain.memory(), chain.readable(segments))
                }
            }
            VsockOp::Shutdown => {
                connection.guest_closes(header.flags);
                true
            }
            VsockOp::CreditUpdate => true,
            VsockOp::CreditRequest => {
                connection.ask_credit();
                true
            }
            _ => false,
        };
        if !sound || connection.finished() {
            self.reset(ports);
        } else {
            self.mark_ready(number);
        }
    }

    /// Puts a connection that may have something to say into the list, once.
    fn mark_ready(&mut self, number: u32) {
        if let Some(connection) = self.connections.get_mut(&number).filter(|c| !c.queued && c.due().is_some()) {
            connection.queued = true;
            self.talkative.push_back(number);
        }
    }

    /// Takes what the driver sent.
    fn service_tx_queue(&mut self, io: &mut DeviceIo) {
        loop {
            match io.pop(TX) {
                Some(mut chain) => {
                    // Data goes to a socket, and a new connection takes several calls.
                    io.charge(Work::Calls(2));
                    self.handle_packet(io, &mut chain);
                    io.complete(TX, chain);
                }
                None if io.rearm(TX) => {}
                None => return,
            }
        }
    }

    /// Sends what is due, as long as the driver offers buffers. The driver is notified at once of all of it.
    fn service_rx_queue(&mut self, io: &mut DeviceIo) {
        self.send_pending_control(io);
        io.flush(&[TX, RX]);
    }

    fn send_pending_control(&mut self, io: &mut DeviceIo) {
        loop {
            if self.resets.is_empty() && self.talkative.is_empty() {
                return;
            }
            let next = self.spare.take().or_else(|| io.pop(RX));
            match next {
                Some(mut chain) => {
                    // A buffer too small for a header is given back empty; the driver will see nothing in it.
                    if chain.writable_len() < HEADER || self.fill(io, &mut chain) {
                        io.complete(RX, chain);
                    } else {
                        self.spare = Some(chain);
                    }
                }
                None if io.rearm(RX) => {}
                None => return,
            }
        }
    }

    /// Puts the next packet into `chain`. False when there was none after all.
    fn fill(&mut self, io: &mut DeviceIo, chain: &mut Chain) -> bool {
        if let Some(ports) = self.resets.pop_front() {
            let header = header(ports, VsockOp::Reset, 0, CreditUpdate::default());
            return chain.write(&header.to_bytes()).is_ok();
        }
        while let Some(number) = self.talkative.pop_front() {
            let Some(connection) = self.connections.get_mut(&number) else {
                continue;
            };
            connection.queued = false;
            let said = write_packet(io, connection, chain);
            self.mark_ready(number);
            if said {
                return true;
            }
        }
        false
    }

    fn socket_ready(&mut self, number: u32, events: Interest) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if events.intersects(Interest::IN | Interest::READ_HANG_UP | Interest::HANG_UP | Interest::ERROR) {
            connection.socket_readable();
        }
        if events.intersects(Interest::HANG_UP | Interest::ERROR) {
            connection.socket_hung_up();
        }
        if events.intersects(Interest::OUT | Interest::HANG_UP | Interest::ERROR) {
            connection.flush();
        }
        let (finished, ports) = (connection.finished(), connection.ports);
        if finished {
            self.reset(ports);
        } else {
            self.mark_ready(number);
        }
    }
}

/// What a connection's socket is watched for.
const SOCKET_EDGES: Interest =
    Interest::IN.union(Interest::OUT).union(Interest::READ_HANG_UP).union(Interest::EDGE_TRIGGERED);

/// Puts what is due into `chain`, which has room for a header. False when it was data and there is none after all.
fn write_packet(io: &mut DeviceIo, connection: &mut VsockConnection, chain: &mut Chain) -> bool {
    let Some(due) = connection.due() else {
        return false;
    };
    let (op, flags, mut len) = match due {
        PendingControl::Request => (VsockOp::Request, 0, 0),
        PendingControl::Response => (VsockOp::Response, 0, 0),
        PendingControl::Shutdown(flags) => (VsockOp::Shutdown, flags, 0),
        PendingControl::CreditUpdate => (VsockOp::CreditUpdate, 0, 0),
        PendingControl::Data(max) => (VsockOp::Data, 0, max.min(MAX_DATA)),
    };
    if op == VsockOp::Data {
        let space: Vec<_> = chain.writable_after(HEADER, len as usize).collect();
        io.charge(Work::Calls(1));
        match connection.receive_into(chain.memory(), &space) {
            Some(n) => {
                io.charge(Work::Bytes(n as usize));
                len = n;
            }
            None => return false,
        }
    }
    connection.said(due);
    let header = VsockHeader { flags, ..header(connection.ports, op, len, connection.credit.advertise()) };
    let written = chain.write(&header.to_bytes()).is_ok();
    chain.wrote(len as usize);
    written
}

impl VirtioDevice for Vsock {
    fn profile(&self) -> Profile {
        Profile::new(DeviceType::Vsock)
            .queue(QUEUE_SIZE)
            .queue(QUEUE_SIZE)
            .queue(QUEUE_SIZE)
            // Virtio 1.3, 5.10.4: the guest's address.
            .config(GUEST_CID.to_le_bytes())
    }

    fn start(&mut self, io: &mut DeviceIo, state: Option<&DeviceState>) -> std::io::Result<()> {
        let known = match state {
            None => &[][..],
            Some(DeviceState::Vsock(state)) => &state.connections,
            Some(other) => return Err(other.mismatch()),
        };
        if known.len() > MAX_CONNECTIONS {
            let what = format!("{} vsock connections", known.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        // What the guest believes to be connected, and is not here, it learns to be reset.
        let lost = known.iter().filter(|ports| !self.names.contains_key(ports));
        self.resets.extend(lost);
        for (number, connection) in &mut self.connections {
            if !std::mem::replace(&mut connection.watched, true) {
                io.watch(connection.socket().as_fd(), *number, SOCKET_EDGES)?;
            }
        }
        io.watch_timer(&mut self.timer, TIMER)?;
        self.arm();
        Ok(())
    }

    fn ready(&mut self, io: &mut DeviceIo, source: EventSource) {
        match source {
            EventSource::Watched { number: TIMER, .. } => {
                if let Some(timer) = &mut self.timer {
                    timer.clear();
                }
                self.expire();
            }
            EventSource::Queue(TX) => self.service_tx_queue(io),
            // Buffers for what is due, or for events, of which there are none.
            EventSource::Queue(_) | EventSource::Resumed => {}
            EventSource::Watched { number, events } => self.socket_ready(number, events),
        }
        self.service_rx_queue(io);
    }

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        if let Some(timer) = &self.timer {
            io.unwatch(timer.as_fd());
        }
        for connection in self.connections.values_mut() {
            if std::mem::take(&mut connection.watched) {
                io.unwatch(connection.socket().as_fd());
            }
        }
        if let Some(chain) = self.spare.take() {
            io.put_back(RX, chain);
        }
        let mut connections: Vec<_> = self.names.keys().copied().collect();
        connections.sort_unstable();
        DeviceState::Vsock(VsockState { connections })
    }

    fn reset(&mut self) {
        self.timer = None;
        self.connecting.clear();
        // Sockets are closed with their connections, which ends the watching too.
        self.names.clear();
        for (_, connection) in self.connections.drain() {
            connection.end(|| Error::new(ErrorKind::InvalidState, "the guest's vsock driver has stopped"));
        }
        self.talkative.clear();
        self.resets.clear();
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.listeners.values().for_each(|arrivals| arrivals.close());
    }
}

fn next(number: u32) -> u32 {
    (number + 1) % (1 << 30)
}

/// A header from the host to the guest.
fn header(ports: PortPair, op: VsockOp, len: u32, credit: CreditUpdate) -> VsockHeader {
    VsockHeader {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: ports.host,
        dst_port: ports.guest,
        len,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: credit.buf_alloc,
        fwd_cnt: credit.fwd_cnt,
    }
}

#[cfg(test)]
mod tests;
