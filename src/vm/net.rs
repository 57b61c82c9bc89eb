//! [`Net`]: the configuration of a network card. [`NetHandle`]: a card of a running VM.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::net::{
    BackendKind, Card, Config, NetBackend, Place, Published, Pump, SocketNet, SwitchPort, TapNet, UserNet,
};
pub use crate::net::{Capture, CaptureStats, Cidr, Denial, Mac, NetStats, Policy, Protocol, Rule, Switch, Why};
use crate::sys::{self, DescriptorShare};
use crate::virtio::DeviceHandle;
pub use crate::virtio::net::NetLimit;
use crate::virtio::net::{self, PAIRS_MAX};

/// Sizes of a packet that a card can be told (Virtio 1.3, 5.1.4.1: at least 68); every host takes 576 (RFC 791, 3.1).
const MTU: std::ops::RangeInclusive<u32> = 576..=65535;

/// Describes one network card of a VM, and its connection; a config value.
///
/// A VM has none by default.
#[derive(Debug, Clone)]
pub struct Net {
    source: Source,
    mac: Option<Mac>,
    mtu: u32,
    queues: u32,
    limit: NetLimit,
    capture: Option<Capture>,
    /// The method that was called though it says nothing about such a network.
    misplaced: Option<&'static str>,
}

/// What a card tells: called on the VM's loop.
pub(super) struct NetCallbacks {
    pub lost: Box<dyn FnMut(&std::io::Error) + Send>,
    pub denied: Box<dyn FnMut(Denial) + Send>,
    pub throttled: Box<dyn FnMut() + Send>,
}

/// A card that is connected.
pub(super) struct AttachedNet {
    pub card: net::Net,
    /// Where its published ports are.
    pub published: Vec<SocketAddr>,
    /// What writes its capture, for a thread of its own.
    pub pump: Option<Pump>,
}

#[derive(Debug, Clone)]
enum Source {
    User(Box<User>),
    Tap(String),
    TapFiles(Vec<Arc<File>>),
    Socket(Arc<OwnedFd>),
    Switch(SwitchAttachment),
    Custom(Custom),
}

/// A place on a switch, to be taken.
#[derive(Debug, Clone)]
struct SwitchAttachment {
    switch: Switch,
    name: String,
    /// It was taken before the VM is started.
    place: Option<Arc<Place>>,
}

/// Makes the embedder's backends.
#[derive(Clone)]
struct Custom(Arc<dyn Fn(Card) -> io::Result<BackendKind> + Send + Sync>);

impl fmt::Debug for Custom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Custom")
    }
}

/// A user-mode network.
#[derive(Debug, Clone)]
struct User {
    policy: Policy,
    ports: Vec<Port>,
    /// The guest's 127.0.0.1 can be reached.
    loopback: bool,
}

/// A port of the host that leads to one of the guest; see [`Net::publish`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    tcp: bool,
    host: SocketAddr,
    guest: u16,
    callers: Vec<Cidr>,
}

impl Port {
    /// Leads TCP connections at this address of the host to a port of the guest.
    ///
    /// Port 0 of the host is any that is free.
    pub fn tcp(host: impl Into<SocketAddr>, guest: u16) -> Self {
        Self { tcp: true, host: host.into(), guest, callers: Vec::new() }
    }

    /// Leads UDP datagrams at this address of the host to a port of the guest.
    ///
    /// Port 0 of the host is any that is free.
    pub fn udp(host: impl Into<SocketAddr>, guest: u16) -> Self {
        Self { tcp: false, ..Self::tcp(host, guest) }
    }

    /// Accepts callers of this range only. Call repeatedly to add ranges.
    ///
    /// By default all callers are accepted.
    pub fn caller(mut self, range: impl Into<Cidr>) -> Self {
        self.callers.push(range.into());
        self
    }

    fn publish(&self, user: &mut UserNet) -> Result<(Published, SocketAddr)> {
        let publish = if self.tcp { UserNet::publish_tcp } else { UserNet::publish_udp };
        publish(user, self.host, self.guest, self.callers.clone())
            .doing(|| format!("publishing port {} of the guest", self.guest))
    }
}

impl Net {
    /// Connects the card to a network that needs no privileges on the host.
    ///
    /// The guest's connections end in this process. It opens ordinary sockets of the host for them where `policy`
    /// allows it: TCP, UDP and ping, over IPv4 and IPv6. What the policy denies is an
    /// [`EventKind::Denied`](crate::EventKind::Denied).
    ///
    /// The guest is 10.0.2.15 and fd63:6f66:6665::15. The gateway is 10.0.2.2 and fd63:6f66:6665::2: router, DHCP
    /// server and resolver for names. Datagrams and pings that are larger than a packet go in fragments, both ways.
    pub fn user(policy: Policy) -> Self {
        Self::of(Source::User(Box::new(User { policy, ports: Vec::new(), loopback: false })))
    }

    /// Publishes a port of the guest of a [`Net::user`] on an address of the host.
    ///
    /// [`NetHandle::published`] says where it listens. To the guest all callers seem to be the gateway.
    ///
    /// A service is found on the guest's IPv4 address or its own IPv6 address, and in a container also on 127.0.0.1.
    /// One on ::1 alone is reached by `Container::connect` only. Where nothing listens, a caller of a TCP port gets a
    /// reset and a caller of a UDP port nothing, and [`NetStats::unconnected`] counts it. The first datagram to a
    /// service that has moved may be lost when it has more than 500 bytes.
    pub fn publish(mut self, port: Port) -> Self {
        match &mut self.source {
            Source::User(user) => user.ports.push(port),
            _ => self.misplaced = Some("publish"),
        }
        self
    }

    fn of(source: Source) -> Self {
        Self { source, mac: None, mtu: 1500, queues: 1, limit: NetLimit::none(), capture: None, misplaced: None }
    }

    /// Connects the card to a tap device of the host.
    ///
    /// The device must be there: `ip tuntap add dev NAME mode tap vnet_hdr user USER` makes one that needs no
    /// privileges to open. For several [`Net::queues`] add `multi_queue`. Its addresses, and the bridge that it is in,
    /// are the caller's.
    pub fn tap(name: impl Into<String>) -> Self {
        Self::of(Source::Tap(name.into()))
    }

    /// Connects the card to taps that are open already.
    ///
    /// Each was opened with `IFF_NO_PI` and `IFF_VNET_HDR`: one descriptor for each pair of queues.
    pub fn tap_files(files: impl IntoIterator<Item = File>) -> Self {
        let files: Vec<_> = files.into_iter().map(Arc::new).collect();
        let queues = u32::try_from(files.len()).unwrap_or(u32::MAX);
        Self::of(Source::TapFiles(files)).queues(queues)
    }

    /// Connects the card to a socket whose peer carries the frames.
    ///
    /// On a stream, each frame follows its length in four bytes, big endian, as for `passt --fd` and QEMU's `-netdev
    /// stream`. On a socket of datagrams each is a frame. When the peer closes it, the guest sees its link go down, and
    /// that is an [`EventKind::Degraded`](crate::EventKind::Degraded).
    pub fn fd(socket: impl Into<OwnedFd>) -> Self {
        Self::of(Source::Socket(Arc::new(socket.into())))
    }

    /// Connects the card to `switch`, where other guests find this one by `name`.
    ///
    /// A name has 1 to 63 letters, digits and hyphens; case does not matter. Nothing else is reached there. For a way
    /// out add a [`Net::user`], whose resolver then knows the names on the switch too.
    ///
    /// The name is taken when the VM starts, which fails when another has it. It is free again when the VM has ended.
    /// All guests of a switch should have the same [`Net::mtu`]: packets that are larger than a guest's are dropped.
    pub fn switch(switch: &Switch, name: impl Into<String>) -> Self {
        Self::of(Source::Switch(SwitchAttachment { switch: switch.clone(), name: name.into(), place: None }))
    }

    /// Connects the card to a [`NetBackend`](crate::backend::NetBackend) of the embedder's.
    ///
    /// `make` is called for each pair of queues at each start of a VM with this card, on the thread that starts it. Its
    /// error is that of the start.
    pub fn custom<B: NetBackend + 'static>(make: impl Fn(Card) -> io::Result<B> + Send + Sync + 'static) -> Self {
        Self::of(Source::Custom(Custom(Arc::new(move |card| make(card).map(BackendKind::other)))))
    }

    /// Limits the card's rates; nothing is limited by default.
    ///
    /// [`NetHandle::set_limit`] changes them while the VM runs. Beyond a rate the guest's frames wait in its own queue,
    /// and frames for it at their sender. When that begins, it is an
    /// [`EventKind::Throttled`](crate::EventKind::Throttled); [`Stats`](crate::Stats) say how often and how long.
    pub fn limit(mut self, limit: NetLimit) -> Self {
        self.limit = limit;
        self
    }

    /// Records the card's frames.
    pub fn capture(mut self, capture: Capture) -> Self {
        self.capture = Some(capture);
        self
    }

    /// Sets the card's MAC address, which must be a unicast address.
    ///
    /// By default a random one is made.
    pub fn mac(mut self, mac: impl Into<Mac>) -> Self {
        self.mac = Some(mac.into());
        self
    }

    /// Sets the largest packet (MTU), 576 to 65535 bytes; 1500 by default. The guest learns it.
    pub fn mtu(mut self, bytes: u32) -> Self {
        self.mtu = bytes;
        self
    }

    /// Sets how many pairs of queues the guest may use at once; 1 by default.
    ///
    /// At most 32, and one for each vCPU. Only for taps and [`Net::custom`].
    pub fn queues(mut self, pairs: u32) -> Self {
        self.queues = pairs;
        self
    }

    /// The card's address, if it was set.
    pub(super) fn wanted_mac(&self) -> Option<Mac> {
        self.mac
    }

    /// The switch that it is on.
    pub(super) fn its_switch(&self) -> Option<&Switch> {
        match &self.source {
            Source::Switch(plug) => Some(&plug.switch),
            _ => None,
        }
    }

    /// The network that it gives its guest an address of.
    fn network(&self) -> Option<std::net::Ipv4Addr> {
        match &self.source {
            Source::User(_) => Some(Config::new(Policy::deny_all()).guest4),
            Source::Switch(plug) => Some([10, 0, plug.switch.number(), 0].into()),
            _ => None,
        }
        .map(|address| (u32::from(address) >> 8 << 8).into())
    }

    /// Takes its place on a switch now, so that its address is known before the VM starts.
    #[cfg(feature = "container")]
    pub(crate) fn reserved(mut self) -> Result<Self> {
        if self.its_switch().is_some() {
            self.mac = Some(self.checked_mac()?);
        }
        if let (Source::Switch(plug), Some(mac)) = (&mut self.source, self.mac) {
            plug.place = Some(Arc::new(plug.switch.join(&plug.name, mac, checked_mtu(self.mtu)?)?));
        }
        Ok(self)
    }

    /// What a guest is to be told of its address, where that is known.
    #[cfg(feature = "container")]
    pub(crate) fn link(&self) -> Option<Link> {
        match &self.source {
            Source::User(_) => {
                let config = Config::new(Policy::deny_all());
                let gateway = config.gateway4.octets();
                let (address, prefix) = (config.guest4.octets(), config.prefix4);
                Some(Link { address, prefix, gateway: Some(gateway), resolver: gateway })
            }
            Source::Switch(SwitchAttachment { place: Some(place), .. }) => {
                let (address, resolver) = (place.address().octets(), place.resolver().octets());
                Some(Link { address, prefix: crate::net::SWITCH_PREFIX, gateway: None, resolver })
            }
            _ => None,
        }
    }

    /// The guest will take what is sent to its 127.0.0.1.
    #[cfg(feature = "container")]
    pub(crate) fn with_loopback(mut self) -> Self {
        if let Source::User(user) = &mut self.source {
            user.loopback = true;
        }
        self
    }

    fn user_net(
        user: &User,
        (mac, mtu): (Mac, u16),
        (switches, descriptors): (Vec<Switch>, DescriptorShare),
        denied: Box<dyn FnMut(Denial) + Send>,
    ) -> Result<(UserNet, Vec<SocketAddr>)> {
        check_ports(&user.ports)?;
        let (policy, loopback) = (user.policy.clone(), user.loopback);
        let config = Config { guest_mac: mac, mtu, switches, loopback, descriptors, ..Config::new(policy) };
        let mut stack = UserNet::new(config)?;
        let published = user.ports.iter().map(|port| Ok(port.publish(&mut stack)?.1)).collect::<Result<_>>()?;
        stack.on_denial(denied);
        Ok((stack, published))
    }

    fn checked_mac(&self) -> Result<Mac> {
        match self.mac {
            Some(mac) if mac.is_unicast() => Ok(mac),
            Some(mac) => Err(Error::invalid("mac", format!("{mac} does not name one card"))),
            None => made_up(),
        }
    }

    /// Connects the card of a VM that is on these switches.
    pub(super) fn attach(
        &self,
        vcpus: u8,
        switches: Vec<Switch>,
        descriptors: DescriptorShare,
        told: NetCallbacks,
    ) -> Result<AttachedNet> {
        if let Some(method) = self.misplaced {
            return Err(Error::invalid(method, "says nothing about a network of this kind"));
        }
        let (mac, mtu) = (self.checked_mac()?, checked_mtu(self.mtu)?);
        let queues = usize::try_from(self.queues).unwrap_or(usize::MAX);
        if !(1..=PAIRS_MAX).contains(&queues) || queues > usize::from(vcpus) {
            let why =
                format!("{queues} pairs of queues: at least 1 is needed, at most {PAIRS_MAX} and one for each vCPU");
            return Err(Error::invalid("queues", why));
        }
        self.limit.check(matches!(self.source, Source::User(_))).map_err(|e| e.doing("limit"))?;
        let mut published = Vec::new();
        let backends = match &self.source {
            Source::User(_) | Source::Socket(_) | Source::Switch(_) if queues > 1 => {
                return Err(Error::invalid("queues", "this kind of network has one pair of queues"));
            }
            Source::User(user) => {
                let (stack, ports) = Self::user_net(user, (mac, mtu), (switches, descriptors), told.denied)?;
                published = ports;
                vec![BackendKind::User(Box::new(stack))]
            }
            Source::Tap(name) => TapNet::open(name, queues, mtu)?.into_iter().map(BackendKind::other).collect(),
            Source::TapFiles(files) if files.len() == queues => {
                let open =
                    |file: &Arc<File>| TapNet::from_file(file.try_clone().doing(|| "copying a descriptor")?, mtu);
                files.iter().map(|file| open(file).map(BackendKind::other)).collect::<Result<_>>()?
            }
            Source::TapFiles(files) => {
                let why = format!("{queues}, but {} descriptors were given", files.len());
                return Err(Error::invalid("queues", why));
            }
            Source::Socket(fd) => {
                vec![BackendKind::other(SocketNet::new(fd.try_clone().doing(|| "copying a descriptor")?)?)]
            }
            Source::Switch(SwitchAttachment { switch, name, place }) => {
                let place = match place {
                    Some(place) => place.clone(),
                    None => Arc::new(switch.join(name, mac, mtu)?),
                };
                vec![BackendKind::Switch(Box::new(SwitchPort::new(place)?))]
            }
            Source::Custom(Custom(make)) => {
                let backend = || make(Card { mac, mtu }).doing(|| "making a custom backend");
                (0..queues).map(|_| backend()).collect::<Result<_>>()?
            }
        };
        let (recorder, pump) = self.capture.as_ref().map(Capture::open).transpose()?.unzip();
        let mut card = net::Net::new(backends, mac, mtu, told.lost).on_throttled(told.throttled).captured_by(recorder);
        card.set_limit(&self.limit);
        Ok(AttachedNet { card, published, pump })
    }
}

/// What a guest is to be told of the address of one of its cards.
#[cfg(feature = "container")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub address: [u8; 4],
    /// Bits of the network.
    pub prefix: u8,
    /// The way out, if there is one.
    pub gateway: Option<[u8; 4]>,
    pub resolver: [u8; 4],
}

fn checked_mtu(bytes: u32) -> Result<u16> {
    let mtu = u16::try_from(bytes).ok().filter(|_| MTU.contains(&bytes));
    mtu.ok_or_else(|| Error::invalid("mtu", format!("{bytes} is not within {} to {}", MTU.start(), MTU.end())))
}

/// One port of the host leads to one port of the guest.
fn check_ports(ports: &[Port]) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    let clash = ports.iter().filter(|port| port.host.port() != 0).find(|port| !seen.insert((port.tcp, port.host)));
    clash.map_or(Ok(()), |Port { host, tcp, .. }| {
        let protocol = if *tcp { "TCP" } else { "UDP" };
        Err(Error::invalid("publish", format!("{host} is published twice over {protocol}: say port 0 for any")))
    })
}

/// An address of those that nobody sells (IEEE 802, 8.2: locally administered).
fn made_up() -> Result<Mac> {
    let mut bytes = [0; 6];
    sys::fill_random(&mut bytes).doing(|| "making up a card's address")?;
    bytes[0] = bytes[0] & 0xfc | 2;
    Ok(Mac(bytes))
}

/// Addresses tell cards apart, and networks too.
pub(super) fn check_addresses(nets: &[Net]) -> Result<()> {
    let mut networks = std::collections::BTreeSet::new();
    if let Some(twice) = nets.iter().filter_map(Net::network).find(|network| !networks.insert(*network)) {
        return Err(Error::invalid(
            "net",
            format!("two cards are on {twice}/24: a VM has one Net::user, and Switch::numbered has other addresses"),
        ));
    }
    let mut seen = std::collections::BTreeSet::new();
    let clash = nets.iter().filter_map(Net::wanted_mac).find(|mac| !seen.insert(mac.0));
    clash.map_or(Ok(()), |mac| {
        Err(Error::new(ErrorKind::InvalidConfig, format!("mac: two cards have the address {mac}")))
    })
}

/// A network card of a running VM; see [`Vm::net`](crate::Vm::net). Cheap to clone.
///
/// Calls ask the VM's loop, and wait for its answer, at most ten seconds; then they fail with `TimedOut`.
#[derive(Debug, Clone)]
pub struct NetHandle {
    pub(super) name: String,
    pub(super) device: DeviceHandle<net::Net>,
    pub(super) published: Arc<[SocketAddr]>,
    pub(super) capture: Option<Pump>,
}

/// A port that was published on a running VM; see [`NetHandle::publish`].
///
/// Dropping it changes nothing.
#[derive(Debug, Clone)]
pub struct PublishedPort {
    net: NetHandle,
    port: Published,
    address: SocketAddr,
}

impl PublishedPort {
    /// Returns the address of the host where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops listening; open connections stay. Idempotent.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn close(&self) -> Result<()> {
        let port = self.port;
        self.net.user("closing a port", move |user| user.unpublish(port)).map(drop)
    }
}

impl NetHandle {
    /// Returns where the ports of [`Net::publish`] listen, in their order.
    pub fn published(&self) -> &[SocketAddr] {
        &self.published
    }

    /// Publishes one more port; the result says where it listens.
    ///
    /// # Errors
    /// - `InvalidConfig` unless it is a [`Net::user`], or when the address is none of the host's.
    /// - `AlreadyExists` and `PermissionDenied` when the port cannot be had.
    /// - `InvalidState` when the VM has ended.
    pub fn publish(&self, port: Port) -> Result<PublishedPort> {
        let (port, address) = self.user("publishing", move |user| port.publish(user))??;
        Ok(PublishedPort { net: self.clone(), port, address })
    }

    /// Replaces the policy of a [`Net::user`] from now on.
    ///
    /// Connections that it does not allow are reset.
    ///
    /// # Errors
    /// `InvalidConfig` unless it is a [`Net::user`], or for a policy with a rule that means nothing: the old one stays.
    /// `InvalidState` when the VM has ended.
    pub fn set_policy(&self, policy: Policy) -> Result<()> {
        self.user("changing the policy", move |user| user.set_policy(policy))?
    }

    /// Returns the counters of a [`Net::user`], or of this guest on a [`Net::switch`].
    ///
    /// # Errors
    /// `InvalidConfig` unless it is one of them; `InvalidState` when the VM has ended.
    pub fn stats(&self) -> Result<NetStats> {
        let none = || Error::new(ErrorKind::InvalidConfig, "only cards on a Net::user or a Net::switch count");
        let stats = self.device.with(|card, _| card.stats()).and_then(|stats| stats.ok_or_else(none));
        stats.map_err(|e| e.doing(format!("{}: counting", self.name)))
    }

    /// Replaces the card's limit from now on; [`NetLimit::none`] for none.
    ///
    /// What waits goes on by the new limit, and open connections stay.
    ///
    /// # Errors
    /// `InvalidConfig` for a rate of zero, and for connections unless it is a [`Net::user`]; `InvalidState` when the VM
    /// has ended.
    pub fn set_limit(&self, limit: NetLimit) -> Result<()> {
        let set = self.device.with(move |card, _| {
            limit.check(card.is_user())?;
            card.set_limit(&limit);
            Ok(())
        });
        set.and_then(|outcome| outcome).map_err(|e| e.doing(format!("{}: set_limit", self.name)))
    }

    /// Returns the counters of its [`Net::capture`], also after the VM's end; `None` without one.
    pub fn captured(&self) -> Option<CaptureStats> {
        self.capture.as_ref().map(Pump::stats)
    }

    fn user<R: Send + 'static>(&self, what: &str, f: impl FnOnce(&mut UserNet) -> R + Send + 'static) -> Result<R> {
        let none = || Error::new(ErrorKind::InvalidConfig, "the card is not on a Net::user");
        let answer = self.device.with(move |card, io| card.with_user(io, f)).and_then(|answer| answer.ok_or_else(none));
        answer.map_err(|e| e.doing(format!("{}: {what}", self.name)))
    }

    /// Sets the link up or down.
    ///
    /// While it is down nothing is delivered, and what the guest sends is lost. Waits for the VM's event loop.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn set_link(&self, up: bool) -> Result<()> {
        let set = self.device.with(move |card, io| card.set_link(io, up));
        set.map_err(|e| e.doing(format!("{}: changing the link", self.name)))
    }

    /// Returns how many frames were dropped because they made no sense.
    ///
    /// Those are malformed frames of the guest, and frames to it that left it work which it had not agreed to do.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn dropped(&self) -> Result<u64> {
        self.device.with(|card, _| card.dropped()).map_err(|e| e.doing(format!("{}: counting", self.name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    fn nobody() -> NetCallbacks {
        NetCallbacks { lost: Box::new(|_| ()), denied: Box::new(|_| ()), throttled: Box::new(|| ()) }
    }

    fn error(net: Net) -> Error {
        net.attach(2, Vec::new(), DescriptorShare::default(), nobody()).map(drop).unwrap_err()
    }

    #[test]
    fn what_cannot_be_names_its_method() {
        let net = || Net::fd(UnixStream::pair().unwrap().0);
        for (bad, method) in [
            (net().mtu(575), "mtu: "),
            (net().mtu(65536), "mtu: "),
            (net().mac([1, 0, 0, 0, 0, 1]), "mac: "),
            (net().mac([0; 6]), "mac: "),
            (net().queues(0), "queues: "),
            (net().queues(2), "queues: "),
            (Net::tap("lo").queues(3), "queues: "),
            (Net::tap_files([]), "queues: "),
            (Net::user(Policy::deny_all()).queues(2), "queues: "),
            (net().publish(Port::tcp(([127, 0, 0, 1], 0), 80)), "publish: "),
            (Net::tap_files([File::open("/dev/null").unwrap()]).queues(2), "queues: "),
        ] {
            let error = error(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            assert!(error.to_string().contains(method), "{error}");
        }
        let same = [net().mac([2, 0, 0, 0, 0, 9]), net(), net().mac([2, 0, 0, 0, 0, 9])];
        assert!(check_addresses(&same).unwrap_err().to_string().contains("02:00:00:00:00:09"));
        check_addresses(&same[1..]).unwrap();
    }

    #[test]
    fn ports_that_are_taken_are_refused_before_anything_starts() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listener = std::net::TcpListener::bind(taken).unwrap();
        let user = Net::user(Policy::deny_all());
        let refused = error(user.clone().publish(Port::tcp(taken, 80)));
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists, "{refused}");
        drop(listener);
        let user = user.publish(Port::tcp(([127, 0, 0, 1], 0), 80));
        let AttachedNet { published, .. } = user.attach(1, Vec::new(), DescriptorShare::default(), nobody()).unwrap();
        assert!(published[0].ip().is_loopback() && published[0].port() > 0);
    }

    #[test]
    fn ports_that_cannot_be_are_refused_before_anything_starts() {
        let publish = |ports: &[Port]| ports.iter().cloned().fold(Net::user(Policy::deny_all()), Net::publish);
        let fixed = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let twice = [Port::tcp(fixed(40_123), 80), Port::udp(fixed(40_123), 80), Port::tcp(fixed(40_123), 81)];
        for (ports, text) in [
            (&twice[..], "publish: 127.0.0.1:40123 is published twice over TCP"),
            (&[Port::udp(fixed(0), 0)], "publish: port 0 of the guest is nobody's"),
            (&[Port::tcp(([192, 0, 2, 9], 8080), 80)], "the host has no such address"),
            (
                &["[2001:db8::9]:80".parse().map(|host: SocketAddr| Port::udp(host, 80)).unwrap()],
                "the host has no such address",
            ),
        ] {
            let error = error(publish(ports));
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        let any = publish(&[Port::tcp(fixed(0), 80), Port::tcp(fixed(0), 80), Port::udp(fixed(0), 80)]);
        assert_eq!(any.attach(1, Vec::new(), DescriptorShare::default(), nobody()).unwrap().published.len(), 3);
    }

    #[test]
    fn what_is_no_network_is_refused_with_the_remedy() {
        let missing = error(Net::tap("no-such-tap"));
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
        assert!(missing.to_string().contains("ip tuntap add dev no-such-tap mode tap vnet_hdr user"), "{missing}");
        assert_eq!(error(Net::tap("../etc")).kind(), ErrorKind::NotFound);
        assert_eq!(error(Net::fd(File::open("/dev/null").unwrap())).kind(), ErrorKind::InvalidConfig);
        assert_eq!(error(Net::tap_files([File::open("/dev/null").unwrap()])).kind(), ErrorKind::InvalidConfig);
        Net::fd(UnixDatagram::pair().unwrap().0).attach(1, Vec::new(), DescriptorShare::default(), nobody()).unwrap();
    }
}
