//! [`Ports`]: ports of the host that lead to the guest.
//!
//! Whoever calls one seems to the guest to come from the gateway, as an address of the host's world may mean something else in
//! the guest's. Where nobody listens in the guest, the caller sees its connection reset.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::core::Core;
use super::datagrams::ephemeral;
use super::host::{Alarm, exhausted};
use super::table::{Id, Owner, Table};
use super::tcp::{TcpFlows, Tuple};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::net::policy::Cidr;
use crate::sys::Socket;

/// Connections that are accepted in one turn.
const BATCH: usize = 32;
/// How long nobody is accepted when the host has no more descriptors.
const PAUSE: Duration = Duration::from_millis(250);

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

/// A published port.
#[derive(Debug)]
struct Port {
    kind: Kind,
    guest: u16,
    /// Who may call; nobody else is heard. Empty: everybody.
    callers: Vec<Cidr>,
    alarm: Alarm,
}

impl Port {
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
pub(super) struct Ports {
    all: Table<Port>,
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

impl Ports {
    /// Listens on `host` for connections or datagrams to the guest's port; says where, as port 0 is any.
    pub(super) fn publish(
        &mut self,
        core: &mut Core,
        tcp: bool,
        host: SocketAddr,
        guest: u16,
        callers: Vec<Cidr>,
    ) -> Result<(Published, SocketAddr)> {
        let method = if tcp { "publish_tcp" } else { "publish_udp" };
        if guest == 0 {
            return Err(Error::invalid(method, "port 0 of the guest is nobody's: say 1 or higher"));
        }
        let bind = || -> io::Result<(Kind, SocketAddr)> {
            if tcp {
                let listener = TcpListener::bind(host)?;
                listener.set_nonblocking(true)?;
                let at = listener.local_addr()?;
                Ok((Kind::Tcp(listener), at))
            } else {
                let socket = UdpSocket::bind(host)?;
                socket.set_nonblocking(true)?;
                let at = socket.local_addr()?;
                Ok((Kind::Udp(socket), at))
            }
        };
        let (kind, at) = bind().map_err(|error| explain(error, method, host))?;
        let id = self.all.insert(Port { kind, guest, callers, alarm: Alarm::default() });
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

    /// Nobody can call any more; connections that there are stay. False: it was gone.
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

    /// Somebody calls.
    pub(super) fn accept(&mut self, core: &mut Core, tcp: &mut TcpFlows, id: Id) {
        let Some(port) = self.all.get_mut(id) else { return };
        let Kind::Tcp(listener) = &port.kind else { return };
        for _ in 0..BATCH {
            let (stream, caller) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if exhausted(&error) => {
                    // It would be readable again at once.
                    core.stats.limited += 1;
                    core.host.unwatch(listener.as_fd());
                    let at = core.host.now + PAUSE;
                    core.host.alarm(&mut port.alarm, Owner::Listener(id), Some(at));
                    return;
                }
                // Nobody any more, or gone again already (accept(2)).
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
            let guest = (IpAddr::from(core.config.guest4), port.guest);
            let remote = (core.config.gateway4.into(), ephemeral(&mut self.next));
            if let Err(socket) = tcp.call_guest(core, Tuple { guest, remote }, socket) {
                reset(&socket);
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

    /// The next datagram to a published port: its length, who sent it, and the guest's port. `None`: of somebody who is not
    /// heard.
    pub(super) fn receive(&self, id: Id, buffer: &mut [u8]) -> io::Result<Option<(usize, SocketAddr, u16)>> {
        let (port, socket) = self.datagrams(id)?;
        let (n, caller) = socket.recv_from(buffer)?;
        Ok(port.hears(caller).then_some((n, caller, port.guest)))
    }

    /// The guest answers somebody who has sent to a published port.
    pub(super) fn send(&self, id: Id, to: SocketAddr, bytes: &[u8]) -> io::Result<usize> {
        self.datagrams(id)?.1.send_to(bytes, to)
    }
}

/// Whoever is connected sees a reset when the socket is dropped.
fn reset(socket: &Socket) {
    if let Err(error) = socket.reset_on_close() {
        log::debug!("a caller of a published port is gone: {error}");
    }
}

/// What an embedder can do about a port that cannot be had.
fn explain(error: io::Error, method: &str, host: SocketAddr) -> Error {
    let (remedy, kind) = match error.kind() {
        io::ErrorKind::AddrInUse => ("somebody listens there: say port 0 for any", ErrorKind::AlreadyExists),
        io::ErrorKind::PermissionDenied => {
            ("ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE", ErrorKind::PermissionDenied)
        }
        io::ErrorKind::AddrNotAvailable => ("the host has no such address", ErrorKind::InvalidConfig),
        _ => return Error::from(error).doing(format!("{method}: listening on {host}")),
    };
    Error::new(kind, format!("{error}: {remedy}")).doing(format!("{method}: listening on {host}"))
}
