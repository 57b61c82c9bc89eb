//! [`Switch`]: a network between guests of this process, shared by the loops of their VMs.
//!
//! It knows every card on it beforehand, so that nothing has to be learned, flooded or believed. It answers all
//! questions for addresses and names itself. It passes packets from the card that has their source address to the one
//! that has their destination, and drops the rest. No frame of a guest ever reaches more than one other.

#[cfg(any(test, feature = "internals"))]
pub(super) mod fake_guest;
mod pass;
mod port;
mod queue;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(crate) use self::port::SwitchPort;
use self::queue::PacketQueue;
use super::Mac;
use super::dns::{self, Code, Question};
use crate::error::{Context, Error, ErrorKind, Result};

/// The last octets of the addresses that guests may have. The switch itself is 1.
const GUESTS: std::ops::RangeInclusive<u8> = 2..=254;
const ITSELF: u8 = 1;
pub(crate) const PREFIX: u8 = 24;
/// Seconds that an answer about a name is valid: guests come and go.
const TTL: u32 = 5;
/// The number of a switch unless said. 2 is the network of [`Net::user`](crate::Net::user).
const NUMBER: u8 = 3;

/// A network between guests of this process alone: no packet comes in or goes out.
///
/// Cheap to clone. Clones are the same switch, which lives as long as one of them or a guest on it.
///
/// [`Net::switch`](crate::Net::switch) puts a card on it under a name. The switch itself has the addresses 10.0.3.1 and
/// fd63:6f66:6666:3::1. It is its guests' DHCP server and resolver: names of running guests lead to their addresses,
/// and no other name exists. A guest gets the lowest free address from 10.0.3.2 to 10.0.3.254, by DHCP if it asks. It
/// also gets an IPv6 address that follows from its card's, by router advertisements that offer no default route.
///
/// The switch passes IPv4 and IPv6 from one guest to one other, fragments of datagrams too. It drops:
///
/// - broadcasts and multicasts;
/// - frames from an address that is not their sender's;
/// - messages that only servers of a network may send;
/// - packets whose protocol is hidden behind IPv6 extension headers.
///
/// At most 4 MiB wait for a slow guest; the rest is lost. A single sender gets no more than half of that, so that it
/// cannot shut others out. [`NetHandle::stats`](crate::net::NetHandle::stats) counts all of it.
///
#[cfg_attr(feature = "container", doc = "```no_run")]
#[cfg_attr(not(feature = "container"), doc = "```ignore")]
/// # use cofferdam::{Container, Image, Net};
/// # use cofferdam::net::{Policy, Switch};
/// # fn main() -> cofferdam::Result<()> {
/// # let image = Image::open("debian.tar")?;
/// let switch = Switch::new();
/// let db = Container::builder(image.clone()).net(Net::switch(&switch, "db")).start()?;
/// let web = Container::builder(image).net(Net::user(Policy::internet())).net(Net::switch(&switch, "web")).start()?;
/// let out = web.exec(["getent", "hosts", "db"]).output()?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Switch(Arc<Hub>);

impl Default for Switch {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Switch({}, {:?})", Ipv4Addr::from(self.0.address4(0)), self.names())
    }
}

impl Switch {
    /// Returns a switch without guests.
    pub fn new() -> Self {
        Self::with_subnet_id(NUMBER)
    }

    /// Returns a switch on 10.0.`n`.0/24 and fd63:6f66:6666:`n`::/64.
    ///
    /// It is for guests that are on more than one.
    pub fn with_subnet_id(n: u8) -> Self {
        Self(Arc::new(Hub { number: n, table: RwLock::default() }))
    }

    /// Returns the names of its guests, in alphabetical order.
    pub fn names(&self) -> Vec<String> {
        self.0.read().by_name.keys().cloned().collect()
    }

    /// Returns the IPv4 address of this guest, while it is on the switch.
    pub fn address(&self, name: &str) -> Option<Ipv4Addr> {
        self.0.read().by_name.get(&name.to_ascii_lowercase()).map(|peer| peer.address4)
    }

    /// The third octet of its addresses.
    pub(crate) fn number(&self) -> u8 {
        self.0.number
    }

    /// Answers the question that is in `query` when its name is one of the switch's.
    pub(super) fn answer(&self, query: &[u8], question: &Question) -> Option<Vec<u8>> {
        let peer = self.0.read().by_name.get(&question.name)?.clone();
        let address = match question.kind {
            dns::A => Some(IpAddr::from(peer.address4)),
            dns::AAAA => Some(peer.address6.into()),
            _ => None,
        };
        Some(dns::found(query, question, address, TTL))
    }

    /// The same as the only resolver there is.
    fn resolve(&self, query: &[u8]) -> Option<Vec<u8>> {
        match Question::parse(query) {
            Ok(question) => Some(self.answer(query, &question).unwrap_or_else(|| dns::reply(query, Code::NxDomain))),
            Err(Some(code)) => Some(dns::reply(query, code)),
            Err(None) => None,
        }
    }

    /// Takes a place under this name for a card of this address.
    ///
    /// # Errors
    /// `InvalidConfig` for a name that is none; `AlreadyExists` when the name or the address is taken; `ResourceExhausted` when no
    /// address or descriptor is left.
    pub(crate) fn join(&self, name: &str, mac: Mac, mtu: u16) -> Result<AddressLease> {
        let doing = || format!("joining the switch as {name:?}");
        let name = label(name).ok_or_else(|| {
            Error::invalid("switch", "a name has 1 to 63 letters, digits and hyphens, the latter not at its ends")
        });
        let name = name.doing(doing)?;
        let queue = PacketQueue::new().doing(doing)?;
        let mut table = self.0.write();
        let taken = |what: String| Err(Error::new(ErrorKind::AlreadyExists, what)).doing(doing);
        if table.by_name.contains_key(&name) {
            return taken("another guest has the name".into());
        }
        if table.by_mac.contains_key(&mac.0) || mac == self.0.mac() {
            return taken(format!("mac: another card has the address {mac}"));
        }
        let Some(number) = GUESTS.into_iter().find(|n| !table.by_number.contains_key(n)) else {
            let why = format!("all {} addresses of the switch are taken", GUESTS.count());
            return Err(Error::new(ErrorKind::ResourceExhausted, why)).doing(doing);
        };
        let peer = Arc::new(Peer {
            number,
            name: name.clone(),
            mac,
            mtu,
            address4: self.0.address4(number).into(),
            address6: self.0.address6(interface_id(mac)),
            queue,
        });
        table.by_name.insert(name, peer.clone());
        table.by_mac.insert(mac.0, peer.clone());
        table.by_number.insert(number, peer.clone());
        drop(table);
        Ok(AddressLease { switch: self.clone(), peer })
    }
}

/// What all cards of a switch share.
struct Hub {
    number: u8,
    table: RwLock<GenerationalMap>,
}

/// Who is on it.
#[derive(Default)]
struct GenerationalMap {
    by_name: BTreeMap<String, Arc<Peer>>,
    by_mac: BTreeMap<[u8; 6], Arc<Peer>>,
    by_number: BTreeMap<u8, Arc<Peer>>,
}

/// A card as the others see it.
#[derive(Debug)]
struct Peer {
    number: u8,
    name: String,
    mac: Mac,
    mtu: u16,
    address4: Ipv4Addr,
    address6: Ipv6Addr,
    queue: PacketQueue,
}

impl Hub {
    fn read(&self) -> RwLockReadGuard<'_, GenerationalMap> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, GenerationalMap> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn address4(&self, number: u8) -> [u8; 4] {
        [10, 0, self.number, number]
    }

    fn address6(&self, interface: u64) -> Ipv6Addr {
        let [a, b, c, d, e, f, g, h] = interface.to_be_bytes();
        let number = self.number;
        Ipv6Addr::from([0xfd, 0x63, 0x6f, 0x66, 0x66, 0x66, 0, number, a, b, c, d, e, f, g, h])
    }

    fn mac(&self) -> Mac {
        let [a, b, c, d] = self.address4(ITSELF);
        Mac([0x52, 0x56, a, b, c, d])
    }

    /// Who has this address.
    fn peer(&self, address: IpAddr) -> Option<Arc<Peer>> {
        let table = self.read();
        let peer = match address {
            IpAddr::V4(address) => table.by_number.get(&address.octets()[3]),
            IpAddr::V6(address) => table.by_mac.get(&mac_of(address)?.0),
        };
        peer.filter(|peer| peer.has(address)).cloned()
    }
}

impl Peer {
    /// Whether packets may come from there, and go there.
    fn has(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address == self.address4,
            IpAddr::V6(address) => address == self.address6 || address == self.local(),
        }
    }

    /// Its link-local address (RFC 4291, 2.5.6).
    fn local(&self) -> Ipv6Addr {
        Ipv6Addr::from(0xfe80 << 112 | u128::from(interface_id(self.mac)))
    }
}

/// A place on a switch. Given back when dropped, or earlier.
#[derive(Debug)]
pub(crate) struct AddressLease {
    switch: Switch,
    peer: Arc<Peer>,
}

impl AddressLease {
    pub(crate) fn address4(&self) -> Ipv4Addr {
        self.peer.address4
    }

    /// The address that follows from the card's.
    pub(crate) fn address6(&self) -> Ipv6Addr {
        self.peer.address6
    }

    /// The switch's own address: its guests' resolver.
    pub(crate) fn resolver(&self) -> Ipv4Addr {
        self.switch.0.address4(ITSELF).into()
    }

    /// The name and the addresses are free from now on, and nothing arrives any more.
    fn leave(&self) {
        let mut table = self.switch.0.write();
        // Another may be there already.
        if table.by_number.get(&self.peer.number).is_some_and(|peer| Arc::ptr_eq(peer, &self.peer)) {
            table.by_name.remove(&self.peer.name);
            table.by_mac.remove(&self.peer.mac.0);
            table.by_number.remove(&self.peer.number);
        }
        drop(table);
        self.peer.queue.close();
    }
}

impl Drop for AddressLease {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A label of a name (RFC 1123, 2.1), in lower case.
fn label(name: &str) -> Option<String> {
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    good.then(|| name.to_ascii_lowercase())
}

/// What follows from a card's address in an IPv6 address (RFC 4291, appendix A).
fn interface_id(Mac([a, b, c, d, e, f]): Mac) -> u64 {
    u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

/// The way back.
fn mac_of(address: Ipv6Addr) -> Option<Mac> {
    match address.octets() {
        [_, _, _, _, _, _, _, _, a, b, c, 0xff, 0xfe, d, e, f] => Some(Mac([a ^ 2, b, c, d, e, f])),
        _ => None,
    }
}
