//! [`Routes`]: what the host's kernel would do with a packet to an address (rtnetlink(7)).

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Where a packet would go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// To this host itself, however it got the address. Or to all hosts on a link, this one among them.
    Own,
    /// To another host.
    Other,
    /// Nowhere.
    None,
}

/// Asks the kernel. Holds a descriptor from the beginning, so that a process without further ones gets answers.
#[derive(Debug)]
pub(crate) struct Routes {
    /// `None` where the host denies netlink: then another socket is made each time.
    netlink: Option<OwnedFd>,
}

/// Sizes of `nlmsghdr` and `rtmsg`, and of an attribute's header.
const HEADER: usize = 16;
const ROUTE: usize = 12;
const ATTRIBUTE: usize = 4;

impl Routes {
    /// # Errors
    /// When the process has no descriptors left.
    pub(crate) fn new() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: socket(2) takes no pointers.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        if fd >= 0 {
            // SAFETY: the descriptor was just made and has no other owner.
            return Ok(Self { netlink: Some(unsafe { OwnedFd::from_raw_fd(fd) }) });
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => Err(error),
            error => {
                log::debug!("routes are looked up by sockets: {error}");
                Ok(Self { netlink: None })
            }
        }
    }

    /// Where a packet to `address` would go.
    ///
    /// # Errors
    /// When it cannot be determined. A caller that must be sure takes that for [`Route::Own`].
    pub(crate) fn lookup(&self, address: IpAddr) -> io::Result<Route> {
        match &self.netlink {
            Some(netlink) => ask(netlink, address),
            None => try_out(address),
        }
    }
}

fn ask(netlink: &OwnedFd, address: IpAddr) -> io::Result<Route> {
    let (family, bytes) = match address {
        IpAddr::V4(a) => (libc::AF_INET, a.octets().to_vec()),
        IpAddr::V6(a) => (libc::AF_INET6, a.octets().to_vec()),
    };
    let mut message = Vec::with_capacity(64);
    let len = HEADER + ROUTE + ATTRIBUTE + bytes.len();
    message.extend((len as u32).to_ne_bytes());
    message.extend(libc::RTM_GETROUTE.to_ne_bytes());
    message.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    message.extend([0; 8]); // no sequence, from anywhere
    message.extend([family as u8, (8 * bytes.len()) as u8]);
    message.extend([0; ROUTE - 2]);
    message.extend(((ATTRIBUTE + bytes.len()) as u16).to_ne_bytes());
    message.extend(libc::RTA_DST.to_ne_bytes());
    message.extend(&bytes);

    let mut answer = [0u8; 1024];
    // What was left by one that failed in between must not be taken for the answer.
    while receive(netlink, &mut answer).is_ok() {}
    // SAFETY: pointer and length describe `message`, which lives throughout the call.
    let sent = unsafe { libc::send(netlink.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    // The kernel has answered before the call above returns.
    let len = receive(netlink, &mut answer)?;
    parse(answer.get(..len).unwrap_or_default())
}

fn receive(netlink: &OwnedFd, to: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length describe `to`, which is valid for writes throughout the call.
    let came = unsafe { libc::recv(netlink.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), libc::MSG_DONTWAIT) };
    usize::try_from(came).map_err(|_| io::Error::last_os_error())
}

fn parse(answer: &[u8]) -> io::Result<Route> {
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer about a route makes no sense");
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(strange)?;
    if i32::from(kind) == libc::NLMSG_ERROR {
        let code = answer.get(HEADER..HEADER + 4).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes);
        return match code.map(i32::wrapping_neg) {
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => Ok(Route::None),
            Some(code @ 1..) => Err(io::Error::from_raw_os_error(code)),
            _ => Err(strange()),
        };
    }
    if kind != libc::RTM_NEWROUTE {
        return Err(strange());
    }
    match answer.get(HEADER + 7).copied().ok_or_else(strange)? {
        libc::RTN_UNICAST | libc::RTN_MULTICAST => Ok(Route::Other),
        libc::RTN_BLACKHOLE | libc::RTN_UNREACHABLE | libc::RTN_PROHIBIT | libc::RTN_THROW => Ok(Route::None),
        // Local, broadcast, anycast, and what is not known.
        _ => Ok(Route::Own),
    }
}

/// A packet to the host itself comes from the address that it goes to.
fn try_out(address: IpAddr) -> io::Result<Route> {
    let any: IpAddr = match address {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    match socket.connect((address, 9)) {
        Ok(()) if socket.local_addr()?.ip() == address => Ok(Route::Own),
        Ok(()) => Ok(Route::Other),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) => Ok(Route::None),
        // Broadcast addresses among others.
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(address: &str) -> [Option<Route>; 2] {
        let address = address.parse().unwrap();
        [Routes::new().unwrap(), Routes { netlink: None }].map(|routes| routes.lookup(address).ok())
    }

    #[test]
    fn host_addresses_are_local_routes() {
        for own in ["127.0.0.1", "127.9.9.9"] {
            assert_eq!(Routes::new().unwrap().lookup(own.parse().unwrap()).unwrap(), Route::Own, "{own}");
        }
        assert_eq!(both("127.0.0.1"), [Some(Route::Own); 2]);
        // There or not, it is no address of this host.
        for far in ["192.0.2.77", "2001:db8::77"] {
            assert!(both(far).iter().all(|route| matches!(route, Some(Route::Other | Route::None))), "{far}");
        }
    }

    #[test]
    fn malformed_netlink_messages_are_errors() {
        for answer in [&[][..], &[0; 3], &[0; 64], &[0xff; 64]] {
            assert!(parse(answer).is_err());
        }
    }
}
