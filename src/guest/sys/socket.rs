//! Stream sockets, and waiting for many of them. They are vsock to the host, and TCP to the guest's own services.

use core::net::SocketAddr;

use super::arch::EpollEvent;
use super::{
    AF_INET, AF_INET6, Errno, Fd, O_CLOEXEC, O_NONBLOCK, POLLIN, POLLOUT, POLLRDHUP, Result, nr, syscall, write,
};

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: usize = 1;

/// struct sockaddr_vm (Linux, include/uapi/linux/vm_sockets.h)
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

impl VsockAddress {
    fn new(cid: u32, port: u32) -> Self {
        Self { family: AF_VSOCK, reserved: 0, port, cid, zero: [0; 4] }
    }
}

fn stream(family: usize) -> Result<Fd> {
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::SOCKET, family, SOCK_STREAM | O_NONBLOCK | O_CLOEXEC) }.map(Fd::new)
}

/// Starts connecting to what an address of `T` names, without waiting. `true`: it is connected already; else it becomes writable.
fn connect<T>(fd: Fd, address: &T) -> Result<(Fd, bool)> {
    // SAFETY: the kernel reads one address of the given size.
    match unsafe { call!(nr::CONNECT, fd.arg(), core::ptr::from_ref(address) as usize, size_of::<T>()) } {
        Ok(_) => Ok((fd, true)),
        Err(Errno::EINPROGRESS) => Ok((fd, false)),
        Err(errno) => Err(errno),
    }
}

/// Starts connecting a new vsock stream to a port of the host, as [`connect`].
pub(in super::super) fn connect_vsock(cid: u32, port: u32) -> Result<(Fd, bool)> {
    connect(stream(AF_VSOCK.into())?, &VsockAddress::new(cid, port))
}

/// Small pieces are sent at once, as the relay's other end has sent them.
fn no_delay(socket: Fd) -> Fd {
    const IPPROTO_TCP: usize = 6;
    const TCP_NODELAY: usize = 1;
    let on = 1i32;
    // SAFETY: the kernel reads one int. A stream that it fails for works all the same.
    let _ = unsafe { call!(nr::SETSOCKOPT, socket.arg(), IPPROTO_TCP, TCP_NODELAY, &raw const on as usize, 4) };
    socket
}

/// Starts connecting a new TCP stream without delays for small pieces, as [`connect`].
pub(in super::super) fn connect_tcp(to: SocketAddr) -> Result<(Fd, bool)> {
    match to {
        SocketAddr::V4(to) => {
            // struct sockaddr_in (ip(7))
            let ([f, g], [p, q], [a, b, c, d]) =
                ((AF_INET as u16).to_ne_bytes(), to.port().to_be_bytes(), to.ip().octets());
            connect(no_delay(stream(AF_INET)?), &[f, g, p, q, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0])
        }
        SocketAddr::V6(to) => {
            /// struct sockaddr_in6 (ipv6(7))
            #[repr(C)]
            struct Address {
                family: u16,
                port: [u8; 2],
                flow: u32,
                ip: [u8; 16],
                scope: u32,
            }
            let (port, ip) = (to.port().to_be_bytes(), to.ip().octets());
            connect(no_delay(stream(AF_INET6)?), &Address { family: AF_INET6 as u16, port, flow: 0, ip, scope: 0 })
        }
    }
}

/// How connecting ended, once the socket is writable.
pub(in super::super) fn connect_result(socket: &Fd) -> Result<()> {
    const SOL_SOCKET: usize = 1;
    const SO_ERROR: usize = 4;
    let (mut errno, mut length) = (0i32, 4u32);
    // SAFETY: the kernel writes one int and its length.
    unsafe {
        call!(nr::GETSOCKOPT, socket.arg(), SOL_SOCKET, SO_ERROR, &raw mut errno as usize, &raw mut length as usize)
    }?;
    if errno == 0 { Ok(()) } else { Err(Errno(errno)) }
}

/// Returns a socket that listens on a vsock port of this machine.
pub(in super::super) fn listen_vsock(port: u32) -> Result<Fd> {
    const ANY: u32 = u32::MAX;
    // As many as the host makes at all.
    const BACKLOG: usize = 1024;
    let fd = stream(AF_VSOCK.into())?;
    let address = VsockAddress::new(ANY, port);
    // SAFETY: the kernel reads one address of the given size.
    unsafe { call!(nr::BIND, fd.arg(), &raw const address as usize, size_of::<VsockAddress>()) }?;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::LISTEN, fd.arg(), BACKLOG) }?;
    Ok(fd)
}

/// The next connection of a listener, and the CID of who it is. Never waits.
pub(in super::super) fn accept_vsock(listener: &Fd) -> Result<(Fd, u32)> {
    let mut address = VsockAddress::new(u32::MAX, 0);
    let mut length = size_of::<VsockAddress>() as u32;
    let (at, flags) = (&raw mut address as usize, O_NONBLOCK | O_CLOEXEC);
    // SAFETY: the kernel writes one address, of the given size at most, and its length.
    let fd = unsafe { call!(nr::ACCEPT4, listener.arg(), at, &raw mut length as usize, flags) }.map(Fd::new)?;
    Ok((fd, address.cid))
}

/// Ends the stream in the direction away from here; what was sent still arrives.
pub(in super::super) fn shut_write(socket: &Fd) -> Result<()> {
    const SHUT_WR: usize = 1;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::SHUTDOWN, socket.arg(), SHUT_WR) }.map(drop)
}

/// Whether the other side still takes what is sent to it. Nothing is.
pub(in super::super) fn is_writable(socket: &Fd) -> bool {
    write(socket, &[]).is_ok()
}

/// Tells which of many sockets something has happened to, each time that it happens (epoll(7), edge-triggered).
#[derive(Debug)]
pub(in super::super) struct Epoll(Fd);

impl Epoll {
    pub(in super::super) fn new() -> Result<Self> {
        // SAFETY: takes a plain number.
        unsafe { call!(nr::EPOLL_CREATE1, O_CLOEXEC) }.map(|raw| Self(Fd::new(raw)))
    }

    /// For [`super::poll`]: readable while there is something to tell.
    pub(in super::super) fn raw(&self) -> i32 {
        self.0.raw()
    }

    /// Watches a socket until it is closed.
    pub(in super::super) fn watch(&self, socket: &Fd, token: u64) -> Result<()> {
        const ADD: usize = 1;
        const EDGE_TRIGGERED: u32 = 1 << 31;
        let event = EpollEvent { events: (POLLIN | POLLOUT | POLLRDHUP) as u32 | EDGE_TRIGGERED, token };
        // SAFETY: the kernel reads one event.
        unsafe { call!(nr::EPOLL_CTL, self.0.arg(), ADD, socket.arg(), &raw const event as usize) }.map(drop)
    }

    /// The tokens of what something has happened to, 32 at a time. Never waits.
    pub(in super::super) fn tokens(&self) -> impl Iterator<Item = u64> + use<> {
        let mut events = [EpollEvent { events: 0, token: 0 }; 32];
        // SAFETY: the kernel writes as many events as there is room for; the signal mask is null.
        let n = unsafe { call!(nr::EPOLL_PWAIT, self.0.arg(), events.as_mut_ptr() as usize, events.len(), 0, 0, 8) };
        events.into_iter().take(n.unwrap_or(0)).map(|event| event.token)
    }
}
