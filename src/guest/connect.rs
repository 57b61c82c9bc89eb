//! Connections of the host to services of the guest. They are vsock on one side, TCP on the other. Owned by the shim's
//! one thread.
//!
//! ```text
//!  Asked --which port--> Calling --a service answers--> Open --both ways have ended--> gone
//!                           `----no service does, the host learns it----> gone
//! ```
//! Each side waits when the other takes no more: what was read and not taken is at most one piece a way. An end of one
//! way is passed on as that. When the service resets, the shim closes the host's stream before its way has ended, which
//! tells the host. When the host is gone, the shim resets the service.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::alloc::vec::Vec;
use super::files;
use super::sys::{self, Epoll, Errno, Fd, POLLIN, POLLOUT, Poll};
use crate::proto::{CONNECT_PORT, Decoder, FROM_GUEST_MAX, FromGuest, FromHost, HOST_CID};

/// Connections at once, however far. More are refused.
const MAX_CONNECTIONS: usize = 512;
/// What is read at once, and what may wait in each direction for the other side.
const PIECE: usize = 16 * 1024;
/// Pieces in a row before it is another one's turn.
const MAX_PIECES: usize = 8;
/// What is read of the kernel's lists of sockets. Those that listen come first.
const LIST_MAX: usize = 64 * 1024;

/// The token of the listener; connections have others.
const LISTENER: u64 = 0;

/// All connections.
#[derive(Debug)]
pub(super) struct Connections {
    epoll: Epoll,
    listener: Fd,
    all: Vec<ServiceConnection>,
    last: u64,
}

impl Connections {
    pub(super) fn listen() -> Result<Self, Errno> {
        Self::over(sys::listen_vsock(CONNECT_PORT)?)
    }

    fn over(listener: Fd) -> Result<Self, Errno> {
        let epoll = Epoll::new()?;
        epoll.watch(&listener, LISTENER)?;
        Ok(Self { epoll, listener, all: Vec::new(), last: LISTENER })
    }

    pub(super) fn poll(&self) -> Poll {
        Poll { fd: self.epoll.raw(), events: POLLIN, happened: 0 }
    }

    /// Whether one has more to do than it got turns for.
    pub(super) fn has_backlog(&self) -> bool {
        self.all.iter().any(|connection| connection.eager)
    }

    /// Whether no service has anything left to say.
    pub(super) fn is_drained(&self) -> bool {
        self.all.iter().all(|connection| connection.outward.ended && connection.outward.waiting.is_empty())
    }

    /// Does what can be done. `proc` is the workloads' `/proc`.
    pub(super) fn serve(&mut self, proc: &Fd) {
        for token in self.epoll.tokens() {
            if token == LISTENER {
                self.accept();
            }
            if let Some(connection) = self.all.iter_mut().find(|connection| connection.id == token) {
                connection.eager = true;
            }
        }
        let epoll = &self.epoll;
        self.all
            .retain_mut(|connection| !connection.eager || connection.advance(epoll, proc) == ConnectionProgress::Going);
    }

    fn accept(&mut self) {
        while let Ok((host, cid)) = sys::accept_vsock(&self.listener) {
            if cid == HOST_CID {
                self.add(host);
            }
        }
    }

    fn add(&mut self, host: Fd) {
        if self.all.len() >= MAX_CONNECTIONS || self.all.try_reserve(1).is_err() {
            return answer(&host, Errno::EAGAIN).unwrap_or_default();
        }
        self.last += 1;
        if let Err(errno) = self.epoll.watch(&host, self.last) {
            return answer(&host, errno).unwrap_or_default();
        }
        self.all.push(ServiceConnection::new(self.last, host));
    }
}

/// Tells the host how it went. A stream that is new takes it whole.
fn answer(host: &Fd, errno: Errno) -> Result<(), Errno> {
    let mut message = Vec::new();
    let _ = FromGuest::Connected { errno: errno.0 }.encode(0, &mut message);
    match sys::write(host, &message) {
        Ok(n) if n == message.len() => Ok(()),
        Ok(_) => Err(Errno::EPROTO),
        Err(errno) => Err(errno),
    }
}

/// Whether there is more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ConnectionProgress {
    Going,
    /// To be dropped, which closes both sides.
    Done,
}

/// One direction.
#[derive(Debug, Default)]
struct StreamHalf {
    /// What was read and not taken.
    waiting: Vec<u8>,
    /// Nothing more is read.
    ended: bool,
}

#[derive(Debug)]
enum ConnectionState {
    /// The host has not said yet to which port.
    Asked(Decoder),
    Calling(Call),
    Open(Fd),
}

/// A service that is being looked for.
#[derive(Debug)]
struct Call {
    /// The one that is tried now.
    service: Option<Fd>,
    port: u16,
    /// Where it may be too, the next one last.
    rest: Vec<IpAddr>,
    /// The kernel was asked who listens.
    looked: bool,
    /// Why the first one failed.
    errno: Option<Errno>,
}

#[derive(Debug)]
struct ServiceConnection {
    id: u64,
    host: Fd,
    life: ConnectionState,
    inward: StreamHalf,
    outward: StreamHalf,
    /// The service takes nothing more though the host has not ended.
    reset: bool,
    /// Something has happened, or its turns were over.
    eager: bool,
}

impl ServiceConnection {
    fn new(id: u64, host: Fd) -> Self {
        let (inward, outward) = (StreamHalf::default(), StreamHalf::default());
        Self {
            id,
            host,
            life: ConnectionState::Asked(Decoder::new(FROM_GUEST_MAX)),
            inward,
            outward,
            reset: false,
            eager: true,
        }
    }

    fn advance(&mut self, epoll: &Epoll, proc: &Fd) -> ConnectionProgress {
        self.eager = false;
        let progress = self.ask().and_then(|()| self.call(epoll, proc)).map(|()| self.relay());
        progress.unwrap_or(ConnectionProgress::Done)
    }

    /// Reads to which port, which it says once.
    fn ask(&mut self) -> Result<(), Errno> {
        let ConnectionState::Asked(decoder) = &mut self.life else { return Ok(()) };
        let mut buffer = [0u8; 64];
        loop {
            let room = decoder.missing().min(buffer.len());
            let n = match sys::read(&self.host, buffer.get_mut(..room).unwrap_or_default()) {
                Ok(0) => return Err(Errno::EPROTO),
                Err(Errno::EAGAIN) => return Ok(()),
                read => read?,
            };
            let mut input = buffer.get(..n).unwrap_or_default();
            let frame = decoder.next(&mut input).map_err(|_| Errno::EPROTO)?;
            let Some(frame) = frame else { continue };
            let Ok(Some(FromHost::Connect { port })) = FromHost::parse(&frame) else { return Err(Errno::EPROTO) };
            self.life = ConnectionState::Calling(Call::new(port));
            return Ok(());
        }
    }

    /// Looks for the service, and tells the host how that ended.
    fn call(&mut self, epoll: &Epoll, proc: &Fd) -> Result<(), Errno> {
        let ConnectionState::Calling(call) = &mut self.life else { return Ok(()) };
        // It says nothing before it has the answer, so this is its end.
        if sys::read(&self.host, &mut [0]) != Err(Errno::EAGAIN) {
            return Err(Errno::ECANCELED);
        }
        match call.advance(epoll, self.id, proc) {
            Ok(None) => Ok(()),
            Ok(Some(service)) => {
                self.life = ConnectionState::Open(service);
                answer(&self.host, Errno(0))
            }
            Err(errno) => {
                let _ = answer(&self.host, errno);
                Err(errno)
            }
        }
    }

    fn relay(&mut self) -> ConnectionProgress {
        let ConnectionState::Open(service) = &self.life else { return ConnectionProgress::Going };
        match self.inward.pump(&self.host, service) {
            Ok(Pumped::Ended) => drop(sys::shut_write(service)),
            Ok(pumped) => self.eager |= pumped == Pumped::More,
            Err(BrokenSide::From) => return ConnectionProgress::Done,
            Err(BrokenSide::To) => {
                (self.reset, self.inward) = (true, StreamHalf { ended: true, ..StreamHalf::default() })
            }
        }
        match self.outward.pump(service, &self.host) {
            // What it had said before its reset has been passed on.
            Ok(Pumped::Ended) if self.reset => return ConnectionProgress::Done,
            Ok(Pumped::Ended) => drop(sys::shut_write(&self.host)),
            Ok(pumped) => self.eager |= pumped == Pumped::More,
            Err(_) => return ConnectionProgress::Done,
        }
        let over = match (self.inward.ended, self.outward.ended) {
            (true, true) => true,
            // It may have closed the stream altogether.
            (true, false) => !sys::is_writable(&self.host),
            _ => false,
        };
        if over { ConnectionProgress::Done } else { ConnectionProgress::Going }
    }
}

/// How far a way came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pumped {
    /// One side has nothing, or takes nothing.
    Idle,
    /// Its turns are over.
    More,
    /// This was its end.
    Ended,
}

/// Which side of a way is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BrokenSide {
    From,
    To,
}

impl StreamHalf {
    /// Moves what can be moved. When it ends nothing waits.
    fn pump(&mut self, from: &Fd, to: &Fd) -> Result<Pumped, BrokenSide> {
        let mut piece = [0u8; PIECE];
        for _ in 0..MAX_PIECES {
            if !self.waiting.is_empty() {
                let sent = send(to, &self.waiting)?;
                self.waiting.drain(..sent);
                if !self.waiting.is_empty() {
                    return Ok(Pumped::Idle);
                }
                // An idle connection keeps no buffer.
                self.waiting = Vec::new();
            }
            if self.ended {
                return Ok(Pumped::Idle);
            }
            let bytes = match sys::read(from, &mut piece) {
                Ok(0) => {
                    self.ended = true;
                    return Ok(Pumped::Ended);
                }
                Ok(n) => piece.get(..n).unwrap_or_default(),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Ok(Pumped::Idle),
                Err(_) => return Err(BrokenSide::From),
            };
            let rest = bytes.get(send(to, bytes)?..).unwrap_or_default();
            self.waiting.try_reserve_exact(rest.len()).map_err(|_| BrokenSide::From)?;
            self.waiting.extend_from_slice(rest);
        }
        Ok(Pumped::More)
    }
}

/// Sends what is taken now; how much that was.
fn send(to: &Fd, bytes: &[u8]) -> Result<usize, BrokenSide> {
    let mut sent = 0;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        match sys::write(to, rest) {
            Ok(n) => sent += n,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => break,
            Err(_) => return Err(BrokenSide::To),
        }
    }
    Ok(sent)
}

impl Call {
    fn new(port: u16) -> Self {
        let rest = Vec::from([IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::LOCALHOST)]);
        Self { service: None, port, rest, looked: false, errno: None }
    }

    /// The service, if it has answered.
    fn advance(&mut self, epoll: &Epoll, id: u64, proc: &Fd) -> Result<Option<Fd>, Errno> {
        loop {
            if let Some(service) = self.service.take() {
                match is_connected(&service) {
                    Ok(true) => return Ok(Some(service)),
                    Ok(false) => {
                        self.service = Some(service);
                        return Ok(None);
                    }
                    Err(errno) => drop(self.errno.get_or_insert(errno)),
                }
            }
            match (self.rest.pop(), self.looked) {
                (Some(ip), _) => match sys::connect_tcp(SocketAddr::new(ip, self.port)) {
                    Ok((service, _)) => {
                        epoll.watch(&service, id)?;
                        self.service = Some(service);
                    }
                    Err(errno) => drop(self.errno.get_or_insert(errno)),
                },
                (None, false) => (self.looked, self.rest) = (true, listening(proc, self.port)),
                (None, true) => return Err(self.errno.unwrap_or(Errno::ECONNREFUSED)),
            }
        }
    }
}

/// Whether connecting is over, and how.
fn is_connected(service: &Fd) -> Result<bool, Errno> {
    let mut polls = [Poll { fd: service.raw(), events: POLLOUT, happened: 0 }];
    if sys::poll(&mut polls, Some(0))? == 0 {
        return Ok(false);
    }
    sys::connect_result(service).map(|()| true)
}

/// Returns the addresses with a listener on a port. Unspecified and loopback ones are left out: these were tried.
fn listening(proc: &Fd, port: u16) -> Vec<IpAddr> {
    let mut found = Vec::new();
    // Of the reaper, whose network all programs share.
    for path in [c"1/net/tcp6", c"1/net/tcp"] {
        let list = files::read(Some(proc), path, LIST_MAX).unwrap_or_default();
        let listeners = list.split(|&byte| byte == b'\n').filter_map(listener).filter(|at| at.port() == port);
        found.extend(listeners.map(|at| at.ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback()));
    }
    found
}

/// Returns the listening address in a line of `/proc/net/tcp` or `tcp6` (proc(5)).
fn listener(line: &[u8]) -> Option<SocketAddr> {
    const LISTEN: &[u8] = b"0A";
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let (local, state) = (words.nth(1)?, words.nth(1)?);
    let hex = |digits: &[u8]| u32::from_str_radix(core::str::from_utf8(digits).ok()?, 16).ok();
    let (ip, port) = local.split_at_checked(local.iter().position(|&byte| byte == b':')?)?;
    let port = u16::try_from(hex(port.get(1..)?)?).ok()?;
    // Words of the address as they lie in memory.
    let mut words = ip.chunks_exact(8).map(|word| hex(word).map(u32::to_ne_bytes));
    let ip = match ip.len() {
        8 => IpAddr::from(words.next()??),
        32 => {
            let mut bytes = [0u8; 16];
            for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
                to.copy_from_slice(&word?);
            }
            IpAddr::from(bytes)
        }
        _ => return None,
    };
    (state == LISTEN).then_some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The shim's part, with the host's ends of its streams made by hand.
    struct Fixture {
        connections: Connections,
        proc: Fd,
    }

    impl Fixture {
        fn new() -> Self {
            let (listener, _) = sys::pipe().unwrap();
            let connections = Connections::over(listener).unwrap();
            Self { connections, proc: sys::open(None, c"/proc", sys::O_PATH).unwrap() }
        }

        /// A connection to `port`, and the host's end of it.
        fn call(&mut self, port: u16) -> UnixStream {
            let (guest, mut host) = UnixStream::pair().unwrap();
            guest.set_nonblocking(true).unwrap();
            let mut request = Vec::new();
            FromHost::Connect { port }.encode(0, &mut request).unwrap();
            host.write_all(&request).unwrap();
            self.connections.add(Fd::from(OwnedFd::from(guest)));
            self.turn();
            host
        }

        /// The loop, until nothing happens for a moment.
        fn turn(&mut self) {
            loop {
                let wait = if self.connections.has_backlog() { 0 } else { sys::now_ns() + 20_000_000 };
                let mut polls = [self.connections.poll()];
                if sys::poll(&mut polls, Some(wait)).unwrap() == 0 && !self.connections.has_backlog() {
                    return;
                }
                self.connections.serve(&self.proc);
            }
        }

        /// An open connection: the host's end and the service's.
        fn open(&mut self) -> (UnixStream, TcpStream) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut host = self.call(listener.local_addr().unwrap().port());
            assert_eq!(answer_of(&mut host), 0);
            (host, listener.accept().unwrap().0)
        }

        fn len(&self) -> usize {
            self.connections.all.len()
        }
    }

    fn answer_of(host: &mut UnixStream) -> i32 {
        let (mut decoder, mut buffer) = (Decoder::new(FROM_GUEST_MAX), [0; 64]);
        loop {
            let n = host.read(&mut buffer[..decoder.missing()]).unwrap();
            assert!(n > 0, "hung up without an answer");
            if let Some(frame) = decoder.next(&mut &buffer[..n]).unwrap() {
                let Ok(Some(FromGuest::Connected { errno })) = FromGuest::parse(&frame) else { panic!("{frame:?}") };
                return errno;
            }
        }
    }

    #[test]
    fn each_direction_flows_and_shuts_down_independently() {
        let mut rig = Fixture::new();
        let (mut host, mut service) = rig.open();
        host.write_all(b"GET").unwrap();
        host.shutdown(Shutdown::Write).unwrap();
        rig.turn();
        let mut all = String::new();
        service.read_to_string(&mut all).unwrap();
        assert_eq!((all.as_str(), rig.len(), rig.connections.is_drained()), ("GET", 1, false));
        service.write_all(b"200").unwrap();
        drop(service);
        rig.turn();
        host.read_to_string(&mut all).unwrap();
        assert_eq!((all.as_str(), rig.len()), ("GET200", 0));
    }

    #[test]
    fn end_of_the_service_leaves_the_other_direction_open() {
        let mut rig = Fixture::new();
        let (mut host, mut service) = rig.open();
        service.write_all(b"hello").unwrap();
        service.shutdown(Shutdown::Write).unwrap();
        rig.turn();
        let mut all = String::new();
        host.read_to_string(&mut all).unwrap();
        host.write_all(b"still here").unwrap();
        drop(host);
        rig.turn();
        service.read_to_string(&mut all).unwrap();
        assert_eq!((all.as_str(), rig.len()), ("hellostill here", 0));
    }

    #[test]
    fn services_are_found_on_any_address() {
        let mut rig = Fixture::new();
        for address in ["[::1]:0", "127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut host = rig.call(listener.local_addr().unwrap().port());
            assert_eq!(answer_of(&mut host), 0, "{address}");
        }
    }

    #[test]
    fn missing_listener_is_reported_and_leaks_nothing() {
        let mut rig = Fixture::new();
        let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut host = rig.call(unused.port());
        assert_eq!((answer_of(&mut host), rig.len()), (Errno::ECONNREFUSED.0, 0));
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn slow_reader_stops_the_writer_and_nothing_is_lost() {
        let mut rig = Fixture::new();
        let (host, service) = rig.open();
        let data: Vec<u8> = (0..2_000_000u32).flat_map(u32::to_le_bytes).collect();
        for (mut from, mut to) in [
            (host.try_clone().map(OwnedFd::from).unwrap(), service.try_clone().map(OwnedFd::from).unwrap()),
            (service.try_clone().map(OwnedFd::from).unwrap(), host.try_clone().map(OwnedFd::from).unwrap()),
        ]
        .map(|(from, to)| (std::fs::File::from(from), std::fs::File::from(to)))
        {
            let (sent, len) = (data.clone(), data.len());
            let writer = std::thread::spawn(move || from.write_all(&sent).unwrap());
            rig.turn();
            let ways = [&rig.connections.all[0].inward, &rig.connections.all[0].outward];
            assert!(ways.iter().any(|way| (1..=PIECE).contains(&way.waiting.len())), "no data waits");
            assert!(!rig.connections.has_backlog() && !writer.is_finished());
            let reader = std::thread::spawn(move || {
                let mut all = vec![0; len];
                to.read_exact(&mut all).unwrap();
                all
            });
            while !reader.is_finished() {
                rig.turn();
            }
            writer.join().unwrap();
            assert!(reader.join().unwrap() == data);
        }
    }

    #[test]
    fn reset_is_not_an_end_of_stream() {
        let mut rig = Fixture::new();
        let (mut host, service) = rig.open();
        host.write_all(b"unread").unwrap();
        rig.turn();
        // What was not read makes the kernel reset it.
        drop(service);
        rig.turn();
        assert_eq!(rig.len(), 0);
        assert_eq!(host.read(&mut [0]).unwrap(), 0, "what tells it from an end is in the device");
        assert_eq!(host.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn host_disconnect_closes_the_connection() {
        let mut rig = Fixture::new();
        for ended in [false, true] {
            let (host, mut service) = rig.open();
            if ended {
                host.shutdown(Shutdown::Write).unwrap();
                rig.turn();
            }
            assert_eq!(rig.len(), 1);
            drop(host);
            rig.turn();
            assert_eq!(rig.len(), 0);
            assert_eq!(service.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn invalid_requests_and_early_disconnects_leak_nothing() {
        let mut rig = Fixture::new();
        let (guest, mut host) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        host.write_all(&[0xff; 40]).unwrap();
        rig.connections.add(Fd::from(OwnedFd::from(guest)));
        let (guest, other) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        rig.connections.add(Fd::from(OwnedFd::from(guest)));
        rig.turn();
        assert_eq!(rig.len(), 1);
        drop(other);
        rig.turn();
        assert_eq!(rig.len(), 0);
    }

    #[test]
    fn concurrent_service_connections_are_limited() {
        let mut rig = Fixture::new();
        let mut hosts = Vec::new();
        for _ in 0..=MAX_CONNECTIONS {
            let (guest, host) = UnixStream::pair().unwrap();
            guest.set_nonblocking(true).unwrap();
            rig.connections.add(Fd::from(OwnedFd::from(guest)));
            hosts.push(host);
        }
        assert_eq!((rig.len(), answer_of(&mut hosts.pop().unwrap())), (MAX_CONNECTIONS, Errno::EAGAIN.0));
        drop(hosts);
        rig.turn();
        assert_eq!(rig.len(), 0);
    }

    #[test]
    fn proc_net_tcp_is_parsed() {
        let line = b"   2: 0F02000A:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1234 1";
        assert_eq!(listener(line), Some("10.0.2.15:80".parse().unwrap()));
        assert_eq!(listener(&line.map(|byte| if byte == b'A' { b'1' } else { byte })), None);
        let six = b"0: B80D0120000000000000000001000000:1F90 0000:0000 0A 0";
        assert_eq!(listener(six), Some("[2001:db8::1]:8080".parse().unwrap()));
        for bad in
            [&b"  sl  local_address rem_address   st"[..], b"", b"0: x:1 y 0A", b"0: 00:99999 y 0A", b"0: 1 2 0A"]
        {
            assert_eq!(listener(bad), None);
        }
    }
}
