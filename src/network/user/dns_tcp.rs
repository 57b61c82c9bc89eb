//! [`DnsTcpClients`]: guests' connections to the gateway's resolver over TCP (RFC 7766). Their host's end is in this process.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::core::Core;
use super::generational::{GenerationalMap, Id, Owner};
use super::host::TimerEntry;
use super::resolver::{Requester, Resolver};
use crate::network::dns;
use crate::sys::{Socket, is_spare};

/// Connections at once, and until one is closed on which nothing happens (RFC 7766, 6.2.3).
const MAX_CLIENTS: usize = 64;
const IDLE: Duration = Duration::from_secs(20);
/// Answers that may wait for one client; one that does not read them asks no more.
const MAX_WAITING: usize = 128 << 10;

/// A connection.
#[derive(Debug)]
struct Client {
    socket: Socket,
    query: Vec<u8>,
    answers: VecDeque<u8>,
    active: Instant,
    timer: TimerEntry,
}

#[derive(Debug, Default)]
pub(super) struct DnsTcpClients(GenerationalMap<Client>);

impl DnsTcpClients {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// One more: its other end, for a flow.
    pub(super) fn open(&mut self, core: &mut Core) -> io::Result<Socket> {
        core.host.syscalls += 6;
        let none = || io::Error::from_raw_os_error(libc::EMFILE);
        if !core.host.held.has_room(2) {
            return Err(none());
        }
        if self.0.len() >= MAX_CLIENTS {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = UnixStream::pair()?;
        if !(is_spare(&near) && is_spare(&far)) {
            return Err(none());
        }
        near.set_nonblocking(true)?;
        far.set_nonblocking(true)?;
        let (active, timer) = (core.host.now, TimerEntry::default());
        let client = Client { socket: Socket::new(near), query: Vec::new(), answers: VecDeque::new(), active, timer };
        let id = self.0.insert(client);
        let Some(client) = self.0.get_mut(id) else { return Err(io::ErrorKind::NotFound.into()) };
        if let Err(error) = core.host.watch(client.socket.as_fd(), Owner::Client(id)) {
            self.0.remove(id);
            return Err(error);
        }
        core.host.set_timer(&mut client.timer, Owner::Client(id), Some(active + IDLE));
        Ok(Socket::new(far))
    }

    /// Something has happened to a client's socket.
    pub(super) fn ready(&mut self, core: &mut Core, resolver: &mut Resolver, id: Id) {
        let Some(client) = self.0.get_mut(id) else { return };
        client.active = core.host.now;
        let served = client.send().and_then(|()| client.serve(core, resolver, id));
        if served.is_err() {
            self.remove(core, id);
        }
    }

    /// Hands out the answers that have come.
    pub(super) fn answered(&mut self, core: &mut Core, resolver: &mut Resolver) {
        for (id, answer) in std::mem::take(&mut resolver.answers) {
            let Some(client) = self.0.get_mut(id) else { continue };
            client.answers.extend((answer.len() as u16).to_be_bytes());
            client.answers.extend(answer);
            if client.send().is_err() {
                self.remove(core, id);
            }
        }
    }

    pub(super) fn on_timer(&mut self, core: &mut Core, id: Id) {
        let Some(client) = self.0.get_mut(id) else { return };
        client.timer.fired();
        if client.active + IDLE <= core.host.now {
            return self.remove(core, id);
        }
        core.host.set_timer(&mut client.timer, Owner::Client(id), Some(client.active + IDLE));
    }

    fn remove(&mut self, core: &mut Core, id: Id) {
        if let Some(mut client) = self.0.remove(id) {
            core.host.cancel_timer(&mut client.timer, Owner::Client(id));
        }
    }
}

impl Client {
    /// Reads queries until there are no more. An error is the end.
    fn serve(&mut self, core: &mut Core, resolver: &mut Resolver, id: Id) -> io::Result<()> {
        let mut buffer = [0; dns::MAX_QUERY];
        while self.answers.len() < MAX_WAITING {
            let n = match self.socket.receive(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            self.query.extend_from_slice(buffer.get(..n).unwrap_or_default());
            while let Some((len, rest)) = self.query.split_first_chunk::<2>() {
                let len = usize::from(u16::from_be_bytes(*len));
                if len > dns::MAX_QUERY {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let Some(query) = rest.get(..len).map(<[u8]>::to_vec) else { break };
                self.query.drain(..2 + len);
                resolver.query(core, Requester::Tcp(id), &query);
            }
        }
        // Who asks and never listens.
        Err(io::ErrorKind::OutOfMemory.into())
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.answers.is_empty() {
            match self.socket.send(self.answers.as_slices().0) {
                Ok(n) => drop(self.answers.drain(..n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
