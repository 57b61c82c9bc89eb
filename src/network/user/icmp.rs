//! ICMP messages of the gateway (RFC 792, RFC 4443). They report what cannot be reached, and answer echoes.

use std::io;
use std::net::IpAddr;

use super::core::Core;
use super::tcp::gateway_of;
use crate::network::wire::AddressPair;

/// Why a packet did not arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::network) enum Unreachable {
    Network,
    Host,
    Port,
    Prohibited,
    /// Farther than the address that it came from means anything (RFC 4443, 3.1).
    BeyondScope,
    /// Larger than this many bytes, which is what goes through.
    TooBig(u16),
}

impl Unreachable {
    pub(in crate::network) fn of(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::NetworkUnreachable => Self::Network,
            io::ErrorKind::PermissionDenied => Self::Prohibited,
            io::ErrorKind::ConnectionRefused => Self::Port,
            _ => Self::Host,
        }
    }

    /// Type and code, and what is in the last two bytes of the header (RFC 792; RFC 1812, 5.2.7.1; RFC 4443, 3.1 and 3.2).
    fn number(self, four: bool) -> (u8, u8, u16) {
        match (self, four) {
            (Self::Network, true) => (3, 0, 0),
            (Self::Host, true) => (3, 1, 0),
            (Self::Port, true) => (3, 3, 0),
            (Self::Prohibited, true) => (3, 13, 0),
            (Self::BeyondScope, true) => (3, 1, 0),
            (Self::TooBig(mtu), true) => (3, 4, mtu),
            (Self::Network, false) => (1, 0, 0),
            (Self::Host, false) => (1, 3, 0),
            (Self::Port, false) => (1, 4, 0),
            (Self::Prohibited, false) => (1, 1, 0),
            (Self::BeyondScope, false) => (1, 2, 0),
            (Self::TooBig(mtu), false) => (2, 0, mtu),
        }
    }
}

/// Returns the packet that a guest's "port unreachable" quotes (RFC 792; RFC 4443, 3.1).
pub(in crate::network) fn port_unreachable(six: bool, message: &[u8]) -> Option<&[u8]> {
    let (kind, code, _) = Unreachable::Port.number(!six);
    message.strip_prefix(&[kind, code]).and_then(|rest| rest.get(6..))
}

/// Echo requests, and what answers them.
pub(in crate::network) const ECHO: u8 = 8;
pub(in crate::network) const ECHO6: u8 = 128;
const ECHO_REPLY: u8 = 0;
const ECHO6_REPLY: u8 = 129;

/// Answers an echo request to the gateway.
pub(in crate::network) fn echo(core: &mut Core, addrs: AddressPair, message: &mut [u8]) {
    let reply = if addrs.src.is_ipv4() { ECHO_REPLY } else { ECHO6_REPLY };
    if let Some(kind) = message.first_mut() {
        *kind = reply;
    }
    core.send_icmp(AddressPair { src: addrs.dst, dst: addrs.src }, message);
}

/// As much of a packet as is sent back: its IP header, without options, and the ports.
const QUOTE: usize = 8;

/// Tells the guest that its packet between `ends`, which begins with `packet`, did not arrive.
pub(in crate::network) fn unreachable(core: &mut Core, why: Unreachable, addrs: AddressPair, packet: &[u8]) {
    let (kind, code, last) = why.number(addrs.src.is_ipv4());
    let [a, b] = last.to_be_bytes();
    let mut message = vec![kind, code, 0, 0, 0, 0, a, b];
    let header = if addrs.src.is_ipv4() { 20 } else { 40 };
    message.extend_from_slice(packet.get(..header + QUOTE).unwrap_or(packet));
    let from: IpAddr = gateway_of(core, addrs.src);
    core.send_icmp(AddressPair { src: from, dst: addrs.src }, &mut message);
}
