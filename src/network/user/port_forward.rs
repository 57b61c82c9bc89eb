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
use super::host::{Alarm, exhausted};
use super::tcp::{Called, Caller, FlowKey, TcpFlows, Tried, gateway_of};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::network::policy::Cidr;
use crate::sys::{CloseOnFork, Socket, is_spare};

/// Connections that are accepted in one turn.
const BATCH: usize = 32;
/// System calls of each: accept(2), three options, what watches it, and close(2).
const ACCEPT_CALLS: usize = 6;
/// How long no caller is accepted when the host has no more descriptors.
const PAUSE: Duration = Duration::from_millis(250);

#[derive(Debug)]
enum Kind {
    Tcp(CloseOnFork<TcpListener>),
    Udp(CloseOnFork<UdpSocket>),
}

/// A published port.
#[derive(Debug)]
struct Port {
    kind: Kind,
    guest: u16,
    /// Which callers are accepted. Empty: all.
    callers: Vec<Cidr>,
    /// Where a listener was found last.
    found: Option<IpAddr>,
    alarm: Alarm,
}

/// Where in the guest a service may be.
fn places(core: &Core) -> [Option<IpAddr>; 3] {
    let loopback = core.config.loopback.then_some(Ipv4Addr::LOCALHOST.into());
    [Some(core.config.guest4.into()), loopback, core.guest6.map(IpAddr::from)]
}

impl Port {
    /// Where to look next, which is added to what was tried.
    fn place(&self, core: &Core, tried: &mut Tried) -> Option<IpAddr> {
        let untried = || (0..).zip(places(core)).filter(|(n, place)| place.is_some() && *tried & 1 << n == 0);
        let (n, place) = untried().find(|(_, place)| *place == self.found).or_else(|| untried().next())?;
        *tried |= 1 << n;
        place
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Tcp(listener) => listener.as_fd(),
            Kind::Udp(socket) => socket.as_fd(),
        }
    }

    fn hears(&self, caller: SocketAddr) -> bool {
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
            return Err(Error::invalid(method, "port 0 of the guest is nobody's: say 1 or higher"));
        }
        let bind = || -> io::Result<(Kind, SocketAddr)> {
            if tcp {
                let listener = TcpListener::bind(host)?;
                listener.set_nonblocking(true)?;
                let at = listener.local_addr()?;
                Ok((Kind::Tcp(CloseOnFork::new(listener)), at))
            } else {
                let socket = UdpSocket::bind(host)?;
                socket.set_nonblocking(true)?;
                let at = socket.local_addr()?;
                Ok((Kind::Udp(CloseOnFork::new(socket)), at))
            }
        };
        let (kind, at) = bind().map_err(|error| explain(error, method, host))?;
        let id = self.all.insert(Port { kind, guest, callers, found: None, alarm: Alarm::default() });
        if let Err(error) = self.watch(core, id) {
            self.all.remove(id);
            return Err(error).doing(|| format!("{method}: watching {at}"));
        }
        Ok((Published(id), at))
    }

    fn watch(&mut self, core: &Core, id: Id) -> io::Result<()> {
        match self.all.get_mut(id) {
            Some(port) if matches!(port.kind, Kind::Tcp(_)) => core.host.watch_level(port.fd(), Owner::Listener(id)),
            Some(port) => core.host.watch(port.fd(), Owner::Listener(id)),
            None => Ok(()),
        }
    }

    /// Closes the port to new callers; existing connections stay. False: it was gone.
    pub(super) fn unpublish(&mut self, core: &mut Core, Published(id): Published) -> bool {
        let Some(mut port) = self.all.remove(id) else { return false };
        core.host.cancel(&mut port.alarm, Owner::Listener(id));
        true
    }

    pub(super) fn is_datagram(&self, id: Id) -> bool {
        self.all.get(id).is_some_and(|port| matches!(port.kind, Kind::Udp(_)))
    }

    pub(super) fn is_there(&self, id: Id) -> bool {
        self.all.get(id).is_some()
    }

    /// Accepts callers, a batch at most.
    pub(super) fn accept(&mut self, core: &mut Core, tcp: &mut TcpFlows, id: Id) {
        let Some(port) = self.all.get_mut(id) else { return };
        let Kind::Tcp(listener) = &port.kind else { return };
        for _ in 0..BATCH {
            core.host.calls += ACCEPT_CALLS;
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
                    let at = core.host.now + PAUSE;
                    core.host.alarm(&mut port.alarm, Owner::Listener(id), Some(at));
                    return;
                }
                // No caller any more, or gone again already (accept(2)).
                Err(_) => return,
            };
            let heard = port.hears(caller);
            let nonblocking = stream.set_nonblocking(true);
            let socket = Socket::new(stream);
            if let Err(error) = nonblocking.and_then(|()| socket.relay()) {
                log::debug!("a caller of a published port is gone: {error}");
                continue;
            }
            if !heard {
                core.stats.denied += 1;
                reset(&socket);
                continue;
            }
            core.host.held.add(1);
            call(core, tcp, &mut self.next, port, Caller { port: id, tried: 0, socket });
        }
    }

    /// Where to look next for who takes datagrams, which is added to what was tried.
    pub(super) fn place(&self, core: &Core, id: Id, tried: &mut Tried) -> Option<IpAddr> {
        self.all.get(id)?.place(core, tried)
    }

    /// Remembers a place that had a listener.
    pub(super) fn reached(&mut self, id: Id, place: IpAddr) {
        if let Some(port) = self.all.get_mut(id) {
            port.found = Some(place);
        }
    }

    /// Forgets the place: none had a listener.
    pub(super) fn silence(&mut self, id: Id) {
        if let Some(port) = self.all.get_mut(id) {
            port.found = None;
        }
    }

    /// Where the last caller of a port was led.
    #[cfg(test)]
    pub(super) fn found(&self, Published(id): Published) -> Option<IpAddr> {
        self.all.get(id)?.found
    }

    /// Takes what became of calls: whom the guest refuses at one place is led to the next.
    pub(super) fn called(&mut self, core: &mut Core, tcp: &mut TcpFlows) {
        while let Some(called) = tcp.called.pop() {
            match called {
                Called::Reached(id, place) => self.reached(id, place),
                Called::Silence(id) => self.silence(id),
                Called::Refused(caller) => match self.all.get(caller.port) {
                    Some(port) => call(core, tcp, &mut self.next, port, caller),
                    None => reset(&caller.socket),
                },
            }
        }
    }

    /// The pause is over.
    pub(super) fn rang(&mut self, core: &mut Core, id: Id) {
        let Some(port) = self.all.get_mut(id) else { return };
        port.alarm.rang();
        if let Err(error) = self.watch(core, id) {
            log::debug!("a published port is not watched yet: {error}");
            let at = core.host.now + PAUSE;
            if let Some(port) = self.all.get_mut(id) {
                core.host.alarm(&mut port.alarm, Owner::Listener(id), Some(at));
            }
        }
    }

    fn datagrams(&self, id: Id) -> io::Result<(&Port, &UdpSocket)> {
        let port = self.all.get(id).ok_or(io::ErrorKind::NotFound)?;
        match &port.kind {
            Kind::Udp(socket) => Ok((port, socket)),
            Kind::Tcp(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Takes the next datagram to a published port. Returns its length, its sender, and the guest's port. `None`: its
    /// sender is not accepted.
    pub(super) fn receive(&self, id: Id, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr, u16)>> {
        let (port, socket) = self.datagrams(id)?;
        let (n, caller) = socket.recv_from(buffer)?;
        Ok(port.hears(caller).then_some((n, caller, port.guest)))
    }

    /// Sends the guest's answer to a client of a published port.
    pub(super) fn send(&self, id: Id, to: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        self.datagrams(id)?.1.send_to(bytes, to)
    }
}

/// Leads a caller to the next place that may have a listener.
fn call(core: &mut Core, tcp: &mut TcpFlows, next: &mut u16, port: &Port, mut caller: Caller) {
    let Some(place) = port.place(core, &mut caller.tried) else {
        core.stats.unconnected += 1;
        return reset(&caller.socket);
    };
    let remote = (gateway_of(core, place), ephemeral(next));
    if let Err(socket) = tcp.call_guest(core, FlowKey { guest: (place, port.guest), remote }, caller) {
        reset(&socket);
    }
}

/// Resets the caller's connection when the socket is dropped.
fn reset(socket: &Socket) {
    if let Err(error) = socket.reset_on_close() {
        log::debug!("a caller of a published port is gone: {error}");
    }
}

/// What an embedder can do about a port that cannot be had.
fn explain(error: io::Error, method: &str, host: SocketAddr) -> Error {
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
