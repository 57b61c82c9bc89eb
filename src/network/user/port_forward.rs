//! [`PortForwards`]: ports of the host that lead to the guest.
//!
//! To the guest each caller seems to be the gateway, as an address of the host's network may mean something else in the
//! guest's. A service is looked for at three addresses: the guest's IPv4 address, its 127.0.0.1 where that can be
//! reached, and its own IPv6 address. The address at which it was found is tried first for the next caller. Where
//! nothing listens in the guest, the caller's connection is reset. A datagram goes to the next address when the guest
//! reports the one before as unreachable.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::core::Core;
use super::datagrams::ephemeral;
use super::generational::{GenerationalMap, Id, Owner};
use super::host::{TimerEntry, exhausted};
use super::tcp::{FlowKey, InboundConn, InboundPort, InboundResult, TcpFlows, TriedAddresses, gateway_of};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::network::policy::Cidr;
use crate::network::wire::IpEndpoint;
use crate::sys::{CloseOnFork, Socket, is_spare};

/// Connections that are accepted in one turn.
const MAX_ACCEPTS: usize = 32;
/// System calls of each: accept(2), three options, what watches it, and close(2).
const ACCEPT_CALLS: usize = 6;
/// How long no caller is accepted when the host has no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(250);

#[derive(Debug)]
enum PortSocket {
    Tcp(CloseOnFork<TcpListener>),
    Udp(CloseOnFork<UdpSocket>),
}

/// A published port.
#[derive(Debug)]
struct Port {
    socket: PortSocket,
    guest: u16,
    /// Which callers are accepted. Empty: all.
    callers: Vec<Cidr>,
    /// Where a listener was found last.
    found: Option<IpAddr>,
    timer: TimerEntry,
}

/// The guest's addresses where a service may listen.
fn candidate_addresses(core: &Core) -> [Option<IpAddr>; 3] {
    let loopback = core.config.loopback.then_some(Ipv4Addr::LOCALHOST.into());
    [Some(core.config.guest4.into()), loopback, core.guest6.map(IpAddr::from)]
}

impl Port {
    /// Returns the next address to try, and adds it to those that were tried.
    fn next_address(&self, core: &Core, tried: &mut TriedAddresses) -> Option<IpAddr> {
        let untried =
            || (0..).zip(candidate_addresses(core)).filter(|(n, address)| address.is_some() && !tried.contains(*n));
        let (n, address) = untried().find(|(_, address)| *address == self.found).or_else(|| untried().next())?;
        tried.insert(n);
        address
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            PortSocket::Tcp(listener) => listener.as_fd(),
            PortSocket::Udp(socket) => socket.as_fd(),
        }
    }

    fn accepts(&self, caller: SocketAddr) -> bool {
        // One that listens on `::` sees IPv4 inside.
        let address = caller.ip().to_canonical();
        self.callers.is_empty() || self.callers.iter().any(|range| range.contains(address))
    }
}

#[derive(Debug, Default)]
pub(super) struct PortForwards {
    all: GenerationalMap<Port>,
    next: u16,
}

/// Names a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Published(Id);

impl Published {
    pub(super) fn id(self) -> Id {
        self.0
    }
}

impl PortForwards {
    /// Listens on `host` for connections or datagrams to the guest's port; says where, as port 0 is any.
    pub(super) fn publish(
        &mut self,
        core: &mut Core,
        tcp: bool,
        host: SocketAddr,
        guest: u16,
        callers: Vec<Cidr>,
    ) -> Result<(Published, SocketAddr)> {
        let method = "publish";
        if guest == 0 {
            return Err(Error::invalid(method, "a guest's port is 1 or higher, not 0"));
        }
        let bind = || -> io::Result<(PortSocket, SocketAddr)> {
            if tcp {
                let listener = TcpListener::bind(host)?;
                listener.set_nonblocking(true)?;
                let at = listener.local_addr()?;
                Ok((PortSocket::Tcp(CloseOnFork::new(listener)), at))
            } else {
                let socket = UdpSocket::bind(host)?;
                socket.set_nonblocking(true)?;
                let at = socket.local_addr()?;
                Ok((PortSocket::Udp(CloseOnFork::new(socket)), at))
            }
        };
        let (socket, at) = bind().map_err(|error| bind_error(error, method, host))?;
        let id = self.all.insert(Port { socket, guest, callers, found: None, timer: TimerEntry::default() });
        if let Err(error) = self.watch(core, id) {
            self.all.remove(id);
            return Err(error).doing(|| format!("{method}: watching {at}"));
        }
        Ok((Published(id), at))
    }

    fn watch(&mut self, core: &Core, id: Id) -> io::Result<()> {
        match self.all.get_mut(id) {
            Some(port) if matches!(port.socket, PortSocket::Tcp(_)) => {
                core.host.watch_level(port.fd(), Owner::Listener(id))
            }
            Some(port) => core.host.watch(port.fd(), Owner::Listener(id)),
            None => Ok(()),
        }
    }

    /// Closes the port to new callers; existing connections stay. False: it was gone.
    pub(super) fn unpublish(&mut self, core: &mut Core, Published(id): Published) -> bool {
        let Some(mut port) = self.all.remove(id) else { return false };
        core.host.cancel_timer(&mut port.timer, Owner::Listener(id));
        true
    }

    pub(super) fn is_datagram(&self, id: Id) -> bool {
        self.all.get(id).is_some_and(|port| matches!(port.socket, PortSocket::Udp(_)))
    }

    pub(super) fn is_there(&self, id: Id) -> bool {
        self.all.get(id).is_some()
    }

    /// Accepts callers, a batch at most.
    pub(super) fn accept(&mut self, core: &mut Core, tcp: &mut TcpFlows, id: Id) {
        let Some(port) = self.all.get_mut(id) else { return };
        let PortSocket::Tcp(listener) = &port.socket else { return };
        for _ in 0..MAX_ACCEPTS {
            core.host.syscalls += ACCEPT_CALLS;
            let may_hold = core.host.may_hold();
            let accepted = listener.accept().and_then(|(stream, caller)| match may_hold && is_spare(&stream) {
                true => Ok((stream, caller)),
                false => Err(io::Error::from_raw_os_error(libc::EMFILE)),
            });
            let (stream, caller) = match accepted {
                Ok(accepted) => accepted,
                Err(error) if exhausted(&error) => {
                    // It would be readable again at once.
                    core.stats.limited += 1;
                    core.host.unwatch(listener.as_fd());
                    let at = core.host.now + ACCEPT_PAUSE;
                    core.host.set_timer(&mut port.timer, Owner::Listener(id), Some(at));
                    return;
                }
                // No caller any more, or gone again already (accept(2)).
                Err(_) => return,
            };
            let accepted_source = port.accepts(caller);
            let nonblocking = stream.set_nonblocking(true);
            let socket = Socket::new(stream);
            if let Err(error) = nonblocking.and_then(|()| socket.relay()) {
                log::debug!("a caller of a published port is gone: {error}");
                continue;
            }
            if !accepted_source {
                core.stats.denied += 1;
                reset(&socket);
                continue;
            }
            core.host.held.add(1);
            connect_next(
                core,
                tcp,
                &mut self.next,
                port,
                InboundConn { port: InboundPort { id, tried: TriedAddresses::default() }, socket },
            );
        }
    }

    /// Returns the next address of the guest to send datagrams to, and adds it to those that were tried.
    pub(super) fn next_address(&self, core: &Core, id: Id, tried: &mut TriedAddresses) -> Option<IpAddr> {
        self.all.get(id)?.next_address(core, tried)
    }

    /// Remembers an address that had a listener.
    pub(super) fn remember_address(&mut self, id: Id, address: IpAddr) {
        if let Some(port) = self.all.get_mut(id) {
            port.found = Some(address);
        }
    }

    /// Forgets the address: none had a listener.
    pub(super) fn forget_address(&mut self, id: Id) {
        if let Some(port) = self.all.get_mut(id) {
            port.found = None;
        }
    }

    /// Where the last caller of a port was led.
    #[cfg(test)]
    pub(super) fn found(&self, Published(id): Published) -> Option<IpAddr> {
        self.all.get(id)?.found
    }

    /// Handles the results of connecting. A client that the guest refuses at one address is connected to the next.
    pub(super) fn handle_inbound(&mut self, core: &mut Core, tcp: &mut TcpFlows) {
        while let Some(called) = tcp.inbound_results.pop() {
            match called {
                InboundResult::Connected(id, address) => self.remember_address(id, address),
                InboundResult::TimedOut(id) => self.forget_address(id),
                InboundResult::Refused(conn) => match self.all.get(conn.port.id) {
                    Some(port) => connect_next(core, tcp, &mut self.next, port, conn),
                    None => reset(&conn.socket),
                },
            }
        }
    }

    /// The pause of accepting has ended.
    pub(super) fn on_timer(&mut self, core: &mut Core, id: Id) {
        let Some(port) = self.all.get_mut(id) else { return };
        port.timer.fired();
        if let Err(error) = self.watch(core, id) {
            log::debug!("a published port is not watched yet: {error}");
            let at = core.host.now + ACCEPT_PAUSE;
            if let Some(port) = self.all.get_mut(id) {
                core.host.set_timer(&mut port.timer, Owner::Listener(id), Some(at));
            }
        }
    }

    fn datagrams(&self, id: Id) -> io::Result<(&Port, &UdpSocket)> {
        let port = self.all.get(id).ok_or(io::ErrorKind::NotFound)?;
        match &port.socket {
            PortSocket::Udp(socket) => Ok((port, socket)),
            PortSocket::Tcp(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Takes the next datagram to a published port. Returns its length, its sender, and the guest's port. `None`: its
    /// sender is not accepted.
    pub(super) fn receive(&self, id: Id, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr, u16)>> {
        let (port, socket) = self.datagrams(id)?;
        let (n, caller) = socket.recv_from(buffer)?;
        Ok(port.accepts(caller).then_some((n, caller, port.guest)))
    }

    /// Sends the guest's answer to a client of a published port.
    pub(super) fn send(&self, id: Id, to: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        self.datagrams(id)?.1.send_to(bytes, to)
    }
}

/// Connects a client to the next address that may have a listener.
fn connect_next(core: &mut Core, tcp: &mut TcpFlows, next: &mut u16, port: &Port, mut conn: InboundConn) {
    let Some(address) = port.next_address(core, &mut conn.port.tried) else {
        core.stats.unconnected += 1;
        return reset(&conn.socket);
    };
    let guest = IpEndpoint::new(address, port.guest);
    let remote = IpEndpoint::new(gateway_of(core, address), ephemeral(next));
    if let Err(socket) = tcp.connect_to_guest(core, FlowKey { guest, remote }, conn) {
        reset(&socket);
    }
}

/// Resets the client's connection when the socket is dropped.
fn reset(socket: &Socket) {
    if let Err(error) = socket.reset_on_close() {
        log::debug!("a caller of a published port is gone: {error}");
    }
}

/// What an embedder can do about a port that cannot be had.
fn bind_error(error: io::Error, method: &str, host: SocketAddr) -> Error {
    let (remedy, kind) = match error.kind() {
        io::ErrorKind::AddrInUse => ("another listens there; port 0 takes any that is free", ErrorKind::ResourceBusy),
        io::ErrorKind::PermissionDenied => {
            ("ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE", ErrorKind::PermissionDenied)
        }
        io::ErrorKind::AddrNotAvailable => ("the host has no such address", ErrorKind::InvalidConfig),
        _ => return Error::from(error).doing(format!("{method}: listening on {host}")),
    };
    Error::new(kind, format!("{error}: {remedy}")).doing(format!("{method}: listening on {host}"))
}
