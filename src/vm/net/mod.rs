//! [`Net`]: the configuration of a network card. [`NetHandle`]: a card of a running VM.

mod handle;
mod kinds;
mod ports;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
#[cfg(feature = "container")]
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use handle::{NetHandle, PublishedPort};
pub(in crate::vm) use kinds::{CustomBackend, SwitchAttachment};
pub use kinds::{CustomNet, SocketNet, SwitchNet, TapFilesNet, TapNet, UserNet};
pub use ports::PortForward;
use ports::check_ports;

use super::spec::UserSource;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::network::{
    BackendKind, CapturePump, Config, NetBackend, NicConfig, SocketBackend, SwitchPort, TapBackend, UserStack,
};
pub use crate::network::{
    Capture, CaptureStats, Cidr, ConnectionLimit, Denial, DenyReason, Mac, NetStats, Policy, Protocol, Rule, Switch,
};
use crate::sys::{self, DescriptorShare};
pub use crate::virtio::net::NetLimit;
use crate::virtio::net::{self, PAIRS_MAX};

/// Sizes of a packet that a card can have (Virtio 1.3, 5.1.4.1: at least 68). Every host takes 576 (RFC 791, 3.1).
const MTU: std::ops::RangeInclusive<u32> = 576..=65535;

/// Describes one network card of a VM, and its connection; a config value.
///
/// A VM has none by default. Each function returns a kind of network with the settings that it has. All of them become a
/// `Net` where a builder takes one, as [`VmBuilder::net`](crate::VmBuilder::net) does.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Net {
    pub(in crate::vm) settings: NetSettings,
    pub(in crate::vm) source: NetSource,
}

/// The settings of all kinds. Kinds without a method for a setting leave it as it is.
#[derive(Debug, Clone)]
pub(in crate::vm) struct NetSettings {
    pub mac: Option<Mac>,
    pub mtu: u32,
    pub queues: u32,
    pub limit: NetLimit,
    pub capture: Option<Capture>,
}

impl NetSettings {
    fn new() -> Self {
        Self { mac: None, mtu: 1500, queues: 1, limit: NetLimit::none(), capture: None }
    }
}

/// What settings come to that were checked.
#[derive(Debug)]
pub(super) struct CheckedNet {
    mtu: u16,
    /// Pairs of them.
    queues: usize,
}

/// A card that is connected.
pub(super) struct AttachedNet {
    pub card: net::Net,
    /// Where its published ports are.
    pub published: Vec<SocketAddr>,
    /// What writes its capture, for a thread of its own.
    pub pump: Option<CapturePump>,
}

/// What carries a card's frames.
#[derive(Debug, Clone)]
pub(in crate::vm) enum NetSource {
    User(Box<UserSource>),
    Tap(String),
    TapFiles(Vec<Arc<File>>),
    Socket(Arc<OwnedFd>),
    Switch(SwitchAttachment),
    Custom(CustomBackend),
}

impl Net {
    /// Connects the card to a network that needs no privileges on the host.
    ///
    /// The guest's connections end in this process. It opens ordinary sockets of the host for them where `policy`
    /// allows it: TCP, UDP and ping, over IPv4 and IPv6. What the policy denies is an
    /// [`EventKind::Denied`](crate::event::EventKind::Denied).
    ///
    /// The guest is 10.0.2.15 and fd63:6f66:6665::15. The gateway is 10.0.2.2 and fd63:6f66:6665::2: router, DHCP
    /// server and resolver for names. Datagrams and pings that are larger than a packet go in fragments, both ways.
    pub fn user(policy: Policy) -> UserNet {
        let source = Box::new(UserSource {
            policy,
            ports: Vec::new(),
            connection_limit: ConnectionLimit::new(),
            loopback: false,
        });
        UserNet { settings: NetSettings::new(), source }
    }

    /// Connects the card to a tap device of the host.
    ///
    /// The device must be there: `ip tuntap add dev NAME mode tap vnet_hdr user USER` makes one that needs no
    /// privileges to open. For several [`TapNet::queues`] add `multi_queue`. Its addresses, and the bridge that it is in,
    /// are the caller's.
    pub fn tap(name: impl Into<String>) -> TapNet {
        TapNet { settings: NetSettings::new(), source: name.into() }
    }

    /// Connects the card to taps that are open already.
    ///
    /// Each was opened with `IFF_NO_PI` and `IFF_VNET_HDR`: one descriptor for each pair of queues.
    pub fn tap_files(files: impl IntoIterator<Item = File>) -> TapFilesNet {
        let source: Vec<_> = files.into_iter().map(Arc::new).collect();
        let queues = u32::try_from(source.len()).unwrap_or(u32::MAX);
        TapFilesNet { settings: NetSettings { queues, ..NetSettings::new() }, source }
    }

    /// Connects the card to a socket whose peer carries the frames.
    ///
    /// On a stream, each frame follows its length in four bytes, big endian, as for `passt --fd` and QEMU's `-netdev
    /// stream`. On a socket of datagrams each is a frame. When the peer closes it, the guest sees its link go down, and
    /// that is an [`EventKind::Degraded`](crate::event::EventKind::Degraded).
    pub fn socket(socket: impl Into<OwnedFd>) -> SocketNet {
        SocketNet { settings: NetSettings::new(), source: Arc::new(socket.into()) }
    }

    /// Connects the card to `switch`, where other guests find this one by `name`.
    ///
    /// A name has 1 to 63 letters, digits and hyphens; case does not matter. Nothing else is reached there. For a way
    /// out add a [`Net::user`], whose resolver then knows the names on the switch too.
    ///
    /// The name is taken when the VM starts, which fails when another has it. It is free again when the VM has ended.
    /// All guests of a switch should have the same MTU: packets that are larger than a guest's are dropped.
    pub fn switch(switch: &Switch, name: impl Into<String>) -> SwitchNet {
        let source = SwitchAttachment { switch: switch.clone(), name: name.into(), place: None };
        SwitchNet { settings: NetSettings::new(), source }
    }

    /// Connects the card to a [`NetBackend`](crate::backend::NetBackend) of the embedder's.
    ///
    /// `make` is called for each pair of queues at each start of a VM with this card, on the thread that starts it. Its
    /// error is that of the start.
    pub fn custom<B: NetBackend + 'static>(
        make: impl Fn(NicConfig) -> io::Result<B> + Send + Sync + 'static,
    ) -> CustomNet {
        let source = CustomBackend(Arc::new(move |card| make(card).map(BackendKind::other)));
        CustomNet { settings: NetSettings::new(), source }
    }

    /// The card's address, if it was set.
    pub(super) fn configured_mac(&self) -> Option<Mac> {
        self.settings.mac
    }

    /// The switch that it is on.
    pub(super) fn attached_switch(&self) -> Option<&Switch> {
        match &self.source {
            NetSource::Switch(plug) => Some(&plug.switch),
            _ => None,
        }
    }

    /// The network that it gives its guest an address of.
    fn network(&self) -> Option<std::net::Ipv4Addr> {
        match &self.source {
            NetSource::User(_) => Some(Config::new(Policy::deny_all()).guest4),
            NetSource::Switch(plug) => Some([10, 0, plug.switch.number(), 0].into()),
            _ => None,
        }
        .map(|address| (u32::from(address) >> 8 << 8).into())
    }

    /// Chooses the card's address where it was not set. So a description that is kept has the address that the guest knows.
    pub(super) fn settle(mut self) -> Result<Self> {
        self.settings.mac = Some(self.mac()?);
        Ok(self)
    }

    /// Takes its place on a switch now, so that its address is known before the VM starts.
    #[cfg(feature = "container")]
    pub(crate) fn reserve_address(mut self) -> Result<Self> {
        if self.attached_switch().is_some() {
            self.settings.mac = Some(self.mac()?);
        }
        if let (NetSource::Switch(plug), Some(mac)) = (&mut self.source, self.settings.mac) {
            plug.place = Some(Arc::new(plug.switch.join(&plug.name, mac, checked_mtu(self.settings.mtu)?)?));
        }
        Ok(self)
    }

    /// Returns what a guest needs to know of its address, where that is known.
    #[cfg(feature = "container")]
    pub(crate) fn link(&self) -> Option<AddressConfig> {
        match &self.source {
            NetSource::User(_) => {
                let config = Config::new(Policy::deny_all());
                Some(AddressConfig {
                    address4: config.guest4,
                    prefix4: config.prefix4,
                    address6: config.guest6,
                    gateways: Some((config.gateway4, config.gateway6)),
                    resolver: config.gateway4,
                })
            }
            NetSource::Switch(SwitchAttachment { place: Some(place), .. }) => Some(AddressConfig {
                address4: place.address4(),
                prefix4: crate::network::SWITCH_PREFIX,
                address6: place.address6(),
                gateways: None,
                resolver: place.resolver(),
            }),
            _ => None,
        }
    }

    /// The guest will take what is sent to its 127.0.0.1.
    #[cfg(feature = "container")]
    pub(crate) fn allow_loopback(mut self) -> Self {
        if let NetSource::User(user) = &mut self.source {
            user.loopback = true;
        }
        self
    }

    /// Checks all of the card that needs nothing of the host, in a VM with so many vCPUs.
    ///
    /// # Errors
    /// `InvalidConfig` names the method whose value cannot be.
    pub(super) fn check(&self, vcpus: u8) -> Result<()> {
        self.checked(vcpus)?;
        match &self.source {
            NetSource::User(user) => user.check().and_then(|()| user.policy.check()),
            _ => Ok(()),
        }
    }

    fn checked(&self, vcpus: u8) -> Result<CheckedNet> {
        let NetSettings { mac: _, mtu, queues, limit, capture: _ } = &self.settings;
        self.checked_mac()?;
        let mtu = checked_mtu(*mtu)?;
        let queues = usize::try_from(*queues).unwrap_or(usize::MAX);
        if !(1..=PAIRS_MAX).contains(&queues) || queues > usize::from(vcpus) {
            let why =
                format!("{queues} pairs of queues: at least 1 is needed, at most {PAIRS_MAX} and one for each vCPU");
            return Err(Error::invalid("queues", why));
        }
        limit.check().map_err(|e| e.doing("limit"))?;
        match &self.source {
            NetSource::User(_) | NetSource::Socket(_) | NetSource::Switch(_) if queues > 1 => {
                Err(Error::invalid("queues", "this kind of network has one pair of queues"))
            }
            NetSource::TapFiles(files) if files.len() != queues => {
                Err(Error::invalid("queues", format!("{queues}, but {} descriptors were given", files.len())))
            }
            _ => Ok(CheckedNet { mtu, queues }),
        }
    }

    fn user_net(
        user: &UserSource,
        (mac, mtu): (Mac, u16),
        (switches, descriptors): (Vec<Switch>, DescriptorShare),
    ) -> Result<(UserStack, Vec<SocketAddr>)> {
        // The stack checks the policy.
        user.check()?;
        let (policy, loopback) = (user.policy.clone(), user.loopback);
        let config = Config { guest_mac: mac, mtu, switches, loopback, descriptors, ..Config::new(policy) };
        let mut stack = UserStack::new(config)?;
        let published = user.ports.iter().map(|port| Ok(port.publish(&mut stack)?.1)).collect::<Result<_>>()?;
        stack.set_connection_limit(user.connection_limit);
        Ok((stack, published))
    }

    fn checked_mac(&self) -> Result<Option<Mac>> {
        match self.settings.mac {
            Some(mac) if !mac.is_unicast() => Err(Error::invalid("mac", format!("{mac} does not name one card"))),
            mac => Ok(mac),
        }
    }

    /// The card's address, or one that is made up.
    fn mac(&self) -> Result<Mac> {
        self.checked_mac()?.map_or_else(random_mac, Ok)
    }

    /// Connects the card of a VM that is on these switches.
    pub(super) fn attach(&self, vcpus: u8, switches: Vec<Switch>, descriptors: DescriptorShare) -> Result<AttachedNet> {
        let CheckedNet { mtu, queues } = self.checked(vcpus)?;
        let mac = self.mac()?;
        let mut published = Vec::new();
        let backends = match &self.source {
            NetSource::User(user) => {
                let (stack, ports) = Self::user_net(user, (mac, mtu), (switches, descriptors))?;
                published = ports;
                vec![BackendKind::User(Box::new(stack))]
            }
            NetSource::Tap(name) => TapBackend::open(name, queues, mtu)?.into_iter().map(BackendKind::other).collect(),
            NetSource::TapFiles(files) => {
                let open =
                    |file: &Arc<File>| TapBackend::from_file(file.try_clone().doing(|| "copying a descriptor")?, mtu);
                files.iter().map(|file| open(file).map(BackendKind::other)).collect::<Result<_>>()?
            }
            NetSource::Socket(fd) => {
                vec![BackendKind::other(SocketBackend::new(fd.try_clone().doing(|| "copying a descriptor")?)?)]
            }
            NetSource::Switch(SwitchAttachment { switch, name, place }) => {
                let place = match place {
                    Some(place) => place.clone(),
                    None => Arc::new(switch.join(name, mac, mtu)?),
                };
                vec![BackendKind::Switch(Box::new(SwitchPort::new(place)?))]
            }
            NetSource::Custom(CustomBackend(make)) => {
                let backend = || make(NicConfig { mac, mtu }).doing(|| "making a custom backend");
                (0..queues).map(|_| backend()).collect::<Result<_>>()?
            }
        };
        let (recorder, pump) = self.settings.capture.as_ref().map(Capture::open).transpose()?.unzip();
        let mut card = net::Net::new(backends, mac, mtu).captured_by(recorder);
        card.set_limit(&self.settings.limit);
        Ok(AttachedNet { card, published, pump })
    }
}

impl UserSource {
    /// Checks all but the policy.
    fn check(&self) -> Result<()> {
        check_ports(&self.ports)?;
        self.connection_limit.check().map_err(|e| e.doing("connection_limit"))
    }
}

/// The addresses of one of a guest's cards.
#[cfg(feature = "container")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct AddressConfig {
    pub address4: Ipv4Addr,
    /// Bits of the IPv4 network.
    pub prefix4: u8,
    /// Its network has 64 bits.
    pub address6: Ipv6Addr,
    /// The routers that lead out, if there are any.
    pub gateways: Option<(Ipv4Addr, Ipv6Addr)>,
    pub resolver: Ipv4Addr,
}

fn checked_mtu(bytes: u32) -> Result<u16> {
    let mtu = u16::try_from(bytes).ok().filter(|_| MTU.contains(&bytes));
    mtu.ok_or_else(|| Error::invalid("mtu", format!("{bytes} is not within {} to {}", MTU.start(), MTU.end())))
}

/// Makes up an address that no vendor assigns (IEEE 802, 8.2: locally administered).
fn random_mac() -> Result<Mac> {
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
            format!(
                "two cards are on {twice}/24: a VM has one Net::user, and Switch::with_subnet_id has other addresses"
            ),
        ));
    }
    let mut seen = std::collections::BTreeSet::new();
    let clash = nets.iter().filter_map(Net::configured_mac).find(|mac| !seen.insert(mac.0));
    clash.map_or(Ok(()), |mac| {
        Err(Error::new(ErrorKind::InvalidConfig, format!("mac: two cards have the address {mac}")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    fn error(net: impl Into<Net>) -> Error {
        net.into().attach(2, Vec::new(), DescriptorShare::default()).map(drop).unwrap_err()
    }

    #[test]
    fn invalid_settings_name_their_method() {
        let net = || Net::socket(UnixStream::pair().unwrap().0);
        for (bad, method) in [
            (Net::from(net().mtu(575)), "mtu: "),
            (net().mtu(65536).into(), "mtu: "),
            (net().mac([1, 0, 0, 0, 0, 1]).into(), "mac: "),
            (net().mac([0; 6]).into(), "mac: "),
            (Net::tap("lo").queues(0).into(), "queues: "),
            (Net::tap("lo").queues(3).into(), "queues: "),
            (Net::tap_files([]).into(), "queues: "),
        ] {
            let error = error(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            assert!(error.to_string().contains(method), "{error}");
        }
        let same = [net().mac([2, 0, 0, 0, 0, 9]), net(), net().mac([2, 0, 0, 0, 0, 9])].map(Net::from);
        assert!(check_addresses(&same).unwrap_err().to_string().contains("02:00:00:00:00:09"));
        check_addresses(&same[1..]).unwrap();
    }

    #[test]
    fn ports_in_use_are_rejected_before_the_start() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let listener = std::net::TcpListener::bind(taken).unwrap();
        let user = Net::user(Policy::deny_all());
        let refused = error(user.clone().publish(PortForward::tcp(taken, 80)));
        assert_eq!(refused.kind(), ErrorKind::ResourceBusy, "{refused}");
        drop(listener);
        let user = user.publish(PortForward::tcp(([127, 0, 0, 1], 0), 80));
        let AttachedNet { published, .. } = Net::from(user).attach(1, Vec::new(), DescriptorShare::default()).unwrap();
        assert!(published[0].ip().is_loopback() && published[0].port() > 0);
    }

    #[test]
    fn invalid_ports_are_rejected_before_the_start() {
        let publish =
            |ports: &[PortForward]| ports.iter().cloned().fold(Net::user(Policy::deny_all()), UserNet::publish);
        let fixed = |port| std::net::SocketAddr::from(([127, 0, 0, 1], port));
        let twice = [
            PortForward::tcp(fixed(40_123), 80),
            PortForward::udp(fixed(40_123), 80),
            PortForward::tcp(fixed(40_123), 81),
        ];
        for (ports, text) in [
            (&twice[..], "publish: 127.0.0.1:40123 is published twice over TCP"),
            (&[PortForward::udp(fixed(0), 0)], "publish: a guest's port is 1 or higher, not 0"),
            (&[PortForward::tcp(([192, 0, 2, 9], 8080), 80)], "the host has no such address"),
            (
                &["[2001:db8::9]:80".parse().map(|host: SocketAddr| PortForward::udp(host, 80)).unwrap()],
                "the host has no such address",
            ),
        ] {
            let error = error(publish(ports));
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
        let any =
            publish(&[PortForward::tcp(fixed(0), 80), PortForward::tcp(fixed(0), 80), PortForward::udp(fixed(0), 80)]);
        assert_eq!(Net::from(any).attach(1, Vec::new(), DescriptorShare::default()).unwrap().published.len(), 3);
    }

    #[test]
    fn invalid_network_sources_are_rejected_with_a_remedy() {
        let missing = error(Net::tap("no-such-tap"));
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
        assert!(missing.to_string().contains("ip tuntap add dev no-such-tap mode tap vnet_hdr user"), "{missing}");
        assert_eq!(error(Net::tap("../etc")).kind(), ErrorKind::NotFound);
        assert_eq!(error(Net::socket(File::open("/dev/null").unwrap())).kind(), ErrorKind::InvalidConfig);
        assert_eq!(error(Net::tap_files([File::open("/dev/null").unwrap()])).kind(), ErrorKind::InvalidConfig);
        Net::from(Net::socket(UnixDatagram::pair().unwrap().0))
            .attach(1, Vec::new(), DescriptorShare::default())
            .unwrap();
    }
}
