//! [`Net`]: what a network card of a VM shall be connected to. [`NetHandle`]: a card of a VM that runs.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::{Context, Error, ErrorKind, Result};
pub use crate::net::Mac;
use crate::net::{NetBackend, SocketNet, TapNet};
use crate::sys;
use crate::virtio::DeviceHandle;
use crate::virtio::net::{self, PAIRS_MAX};

/// Sizes of a packet that a card can be told (Virtio 1.3, 5.1.4.1: at least 68); every host takes 576 (RFC 791, 3.1).
const MTU: std::ops::RangeInclusive<u32> = 576..=65535;

/// A config value: one network card of a VM, and what it is connected to. A VM has none unless asked.
#[derive(Debug, Clone)]
pub struct Net {
    source: Source,
    mac: Option<Mac>,
    mtu: u32,
    queues: u32,
}

#[derive(Debug, Clone)]
enum Source {
    Tap(String),
    TapFiles(Vec<Arc<File>>),
    Socket(Arc<OwnedFd>),
}

impl Net {
    fn of(source: Source) -> Self {
        Self { source, mac: None, mtu: 1500, queues: 1 }
    }

    /// A tap device of the host, which must be there: `ip tuntap add dev NAME mode tap vnet_hdr user USER` makes one that needs
    /// no privileges to open. Its addresses, and the bridge that it is in, are the caller's. For several [`Net::queues`] it is
    /// made with `multi_queue`.
    pub fn tap(name: impl Into<String>) -> Self {
        Self::of(Source::Tap(name.into()))
    }

    /// A tap that is open already, with `IFF_NO_PI` and `IFF_VNET_HDR`: one descriptor for each pair of queues.
    pub fn tap_files(files: impl IntoIterator<Item = File>) -> Self {
        let files: Vec<_> = files.into_iter().map(Arc::new).collect();
        let queues = u32::try_from(files.len()).unwrap_or(u32::MAX);
        Self::of(Source::TapFiles(files)).queues(queues)
    }

    /// A connected socket with a program at its other end that carries the frames. On a stream, four bytes before each frame say
    /// how long it is, the highest first, as `passt --fd` and QEMU's `-netdev stream` have it; on a socket of datagrams each is
    /// a frame. When the other end is closed, the guest sees that its cable is out, and
    /// [`EventKind::Degraded`](crate::EventKind::Degraded) tells.
    pub fn fd(socket: impl Into<OwnedFd>) -> Self {
        Self::of(Source::Socket(Arc::new(socket.into())))
    }

    /// Sets the card's address, which must name one card; one that nobody else has is made up unless set.
    pub fn mac(mut self, mac: impl Into<Mac>) -> Self {
        self.mac = Some(mac.into());
        self
    }

    /// The largest packet, 576 to 65535 bytes, which the guest is told; 1500 unless set.
    pub fn mtu(mut self, bytes: u32) -> Self {
        self.mtu = bytes;
        self
    }

    /// How many pairs of queues the guest may use at once: 1 unless set, at most 32 and one for each vCPU. Of taps only.
    pub fn queues(mut self, pairs: u32) -> Self {
        self.queues = pairs;
        self
    }

    /// The card's address, if it was set.
    pub(super) fn wanted_mac(&self) -> Option<Mac> {
        self.mac
    }

    /// Connects the card. `on_lost` is told when that does not last.
    pub(super) fn attach(&self, vcpus: u8, on_lost: impl FnMut(&std::io::Error) + Send + 'static) -> Result<net::Net> {
        let mac = match self.mac {
            Some(mac) if mac.is_unicast() => mac,
            Some(mac) => return Err(Error::invalid("mac", format!("{mac} does not name one card"))),
            None => made_up()?,
        };
        let mtu = u16::try_from(self.mtu).ok().filter(|_| MTU.contains(&self.mtu));
        let mtu = mtu.ok_or_else(|| {
            Error::invalid("mtu", format!("{} is not within {} to {}", self.mtu, MTU.start(), MTU.end()))
        })?;
        let queues = usize::try_from(self.queues).unwrap_or(usize::MAX);
        if !(1..=PAIRS_MAX).contains(&queues) || queues > usize::from(vcpus) {
            let why =
                format!("{queues} pairs of queues: at least 1 is needed, at most {PAIRS_MAX} and one for each vCPU");
            return Err(Error::invalid("queues", why));
        }
        let backends: Vec<Box<dyn NetBackend>> = match &self.source {
            Source::Tap(name) => boxed(TapNet::open(name, queues, mtu)?),
            Source::TapFiles(files) if files.len() == queues => {
                let open =
                    |file: &Arc<File>| TapNet::from_file(file.try_clone().doing(|| "copying a descriptor")?, mtu);
                boxed(files.iter().map(open).collect::<Result<Vec<_>>>()?)
            }
            Source::TapFiles(files) => {
                let why = format!("{queues}, but {} descriptors were given", files.len());
                return Err(Error::invalid("queues", why));
            }
            Source::Socket(_) if queues > 1 => {
                return Err(Error::invalid("queues", "a socket has one pair of queues"));
            }
            Source::Socket(fd) => boxed(vec![SocketNet::new(fd.try_clone().doing(|| "copying a descriptor")?, mtu)?]),
        };
        Ok(net::Net::new(backends, mac, Box::new(on_lost)))
    }
}

fn boxed<N: NetBackend + 'static>(all: Vec<N>) -> Vec<Box<dyn NetBackend>> {
    all.into_iter().map(|it| Box::new(it) as Box<dyn NetBackend>).collect()
}

/// An address of those that nobody sells (IEEE 802, 8.2: locally administered).
fn made_up() -> Result<Mac> {
    let mut bytes = [0; 6];
    sys::fill_random(&mut bytes).doing(|| "making up a card's address")?;
    bytes[0] = bytes[0] & 0xfc | 2;
    Ok(Mac(bytes))
}

/// Addresses tell cards apart.
pub(super) fn check_macs(nets: &[Net]) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    let clash = nets.iter().filter_map(Net::wanted_mac).find(|mac| !seen.insert(mac.0));
    clash.map_or(Ok(()), |mac| {
        Err(Error::new(ErrorKind::InvalidConfig, format!("mac: two cards have the address {mac}")))
    })
}

/// One network card of a VM that runs; see [`Vm::net`](crate::Vm::net). Cheap to clone.
#[derive(Debug, Clone)]
pub struct NetHandle {
    pub(super) name: String,
    pub(super) device: DeviceHandle<net::Net>,
}

impl NetHandle {
    /// Puts the cable in, or pulls it out: without one nothing is delivered, and what the guest sends is lost. Waits for the
    /// VM's loop.
    ///
    /// # Errors
    /// `InvalidState` when the VM has ended.
    pub fn set_link(&self, up: bool) -> Result<()> {
        let set = self.device.with(move |card, io| card.set_link(io, up));
        set.map_err(|e| e.doing(format!("{}: changing the link", self.name)))
    }

    /// Frames of the guest that made no sense and were dropped.
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

    fn error(net: Net) -> Error {
        net.attach(2, |_| ()).unwrap_err()
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
            (Net::tap_files([File::open("/dev/null").unwrap()]).queues(2), "queues: "),
        ] {
            let error = error(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
            assert!(error.to_string().contains(method), "{error}");
        }
        let same = [net().mac([2, 0, 0, 0, 0, 9]), net(), net().mac([2, 0, 0, 0, 0, 9])];
        assert!(check_macs(&same).unwrap_err().to_string().contains("02:00:00:00:00:09"));
        check_macs(&same[1..]).unwrap();
    }

    #[test]
    fn what_is_no_network_is_refused_with_the_remedy() {
        let missing = error(Net::tap("no-such-tap"));
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
        assert!(missing.to_string().contains("ip tuntap add dev no-such-tap mode tap vnet_hdr user"), "{missing}");
        assert_eq!(error(Net::tap("../etc")).kind(), ErrorKind::NotFound);
        assert_eq!(error(Net::fd(File::open("/dev/null").unwrap())).kind(), ErrorKind::InvalidConfig);
        assert_eq!(error(Net::tap_files([File::open("/dev/null").unwrap()])).kind(), ErrorKind::InvalidConfig);
        Net::fd(UnixDatagram::pair().unwrap().0).attach(1, |_| ()).unwrap();
    }
}
