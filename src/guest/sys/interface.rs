//! Network interfaces: addresses and routes, by the requests of netdevice(7).

use super::{AF_INET, AF_INET6, Fd, O_CLOEXEC, Result, nr, syscall};

const SIOCADDRT: usize = 0x890b;
const SIOCSIFADDR: usize = 0x8916;

fn datagrams(family: usize) -> Result<Fd> {
    const SOCK_DGRAM: usize = 2;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::SOCKET, family, SOCK_DGRAM | O_CLOEXEC) }.map(Fd::new)
}

/// Opens a socket by which interfaces are set up.
pub fn interface_socket() -> Result<Fd> {
    datagrams(AF_INET)
}

/// struct ifreq (Linux, include/uapi/linux/if.h)
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

/// Sends a request about an interface, and returns the value that the kernel has put into it.
fn interface_request(socket: &Fd, command: usize, name: &[u8], value: &[u8]) -> Result<[u8; 24]> {
    let mut request = InterfaceRequest { name: [0; 16], value: [0; 24] };
    request.name.iter_mut().zip(name).for_each(|(to, byte)| *to = *byte);
    request.value.iter_mut().zip(value).for_each(|(to, byte)| *to = *byte);
    // SAFETY: the kernel reads and writes one request of 40 bytes.
    unsafe { call!(nr::IOCTL, socket.arg(), command, &raw mut request as usize) }?;
    Ok(request.value)
}

/// struct sockaddr_in without a port (ip(7)).
fn socket_address(address: [u8; 4]) -> [u8; 16] {
    let ([f, g], [a, b, c, d]) = ((AF_INET as u16).to_ne_bytes(), address);
    [f, g, 0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// Switches an interface on.
pub fn interface_up(socket: &Fd, name: &[u8]) -> Result<()> {
    const SIOCSIFFLAGS: usize = 0x8914;
    const IFF_UP: u16 = 1;
    interface_request(socket, SIOCSIFFLAGS, name, &IFF_UP.to_ne_bytes()).map(drop)
}

/// Gives an interface its IPv4 address and network.
pub fn set_address(socket: &Fd, name: &[u8], address: [u8; 4], mask: [u8; 4]) -> Result<()> {
    const SIOCSIFNETMASK: usize = 0x891c;
    interface_request(socket, SIOCSIFADDR, name, &socket_address(address))?;
    interface_request(socket, SIOCSIFNETMASK, name, &socket_address(mask)).map(drop)
}

/// Sends everything that is for no network of its own to this router.
pub fn set_gateway(socket: &Fd, gateway: [u8; 4]) -> Result<()> {
    const RTF_UP_GATEWAY: u16 = 3;
    /// struct rtentry (Linux, include/uapi/linux/route.h)
    #[repr(C)]
    struct Route {
        pad1: usize,
        destination: [u8; 16],
        gateway: [u8; 16],
        mask: [u8; 16],
        flags: u16,
        rest: [u8; 54],
    }
    let [any, gateway] = [[0; 4], gateway].map(socket_address);
    let route = Route { pad1: 0, destination: any, gateway, mask: any, flags: RTF_UP_GATEWAY, rest: [0; 54] };
    // SAFETY: the kernel reads one entry of 120 bytes.
    unsafe { call!(nr::IOCTL, socket.arg(), SIOCADDRT, &raw const route as usize) }.map(drop)
}

/// Opens a socket by which IPv6 is set up.
pub fn interface_socket6() -> Result<Fd> {
    datagrams(AF_INET6)
}

/// Returns the number of an interface.
pub fn interface_index(socket: &Fd, name: &[u8]) -> Result<u32> {
    const SIOCGIFINDEX: usize = 0x8933;
    let [a, b, c, d, ..] = interface_request(socket, SIOCGIFINDEX, name, &[])?;
    Ok(u32::from_ne_bytes([a, b, c, d]))
}

/// Gives an interface an IPv6 address in a network of 64 bits.
pub fn set_address6(socket6: &Fd, index: u32, address: [u8; 16]) -> Result<()> {
    /// struct in6_ifreq (Linux, include/uapi/linux/ipv6.h)
    #[repr(C)]
    struct Address {
        address: [u8; 16],
        prefix: u32,
        index: u32,
    }
    let request = Address { address, prefix: 64, index };
    // SAFETY: the kernel reads one request of 24 bytes.
    unsafe { call!(nr::IOCTL, socket6.arg(), SIOCSIFADDR, &raw const request as usize) }.map(drop)
}

/// Routes what is for no other IPv6 network to this router.
pub fn set_gateway6(socket6: &Fd, index: u32, gateway: [u8; 16]) -> Result<()> {
    const RTF_UP_GATEWAY: u32 = 3;
    /// struct in6_rtmsg (Linux, include/uapi/linux/ipv6_route.h)
    #[repr(C)]
    struct Route {
        destination: [u8; 16],
        source: [u8; 16],
        gateway: [u8; 16],
        kind: u32,
        prefixes: [u16; 2],
        metric: u32,
        info: u64,
        flags: u32,
        index: u32,
    }
    let route = Route {
        destination: [0; 16],
        source: [0; 16],
        gateway,
        kind: 0,
        prefixes: [0; 2],
        // The kernel's own for routes of IPv6.
        metric: 1024,
        info: 0,
        flags: RTF_UP_GATEWAY,
        index,
    };
    // SAFETY: the kernel reads one entry of 80 bytes.
    unsafe { call!(nr::IOCTL, socket6.arg(), SIOCADDRT, &raw const route as usize) }.map(drop)
}
