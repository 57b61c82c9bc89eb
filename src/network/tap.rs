//! [`TapBackend`]: a queue of a tap device of the host's. Bridges and addresses are the user's. Driven by the network device.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::edge_poller::EdgePoller;
use super::{Capabilities, Frame, HEADER_LEN, NetBackend, Offload, Offloads, Received, RxBuffer};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::{TUN_CSUM, TUN_TSO4, TUN_TSO6, TUN_USO, Tap};

/// Bytes of a frame before its packet, with a VLAN's tag.
const ETHERNET: usize = 18;
/// A packet that stands for several.
const MAX_PACKET: usize = 65535;
/// What a guest does by itself, and the tap's flags for that.
const FLAGS: [(Offloads, u32); 4] =
    [(Offloads::CSUM, TUN_CSUM), (Offloads::TSO4, TUN_TSO4), (Offloads::TSO6, TUN_TSO6), (Offloads::USO, TUN_USO)];

#[derive(Debug)]
pub(crate) struct TapBackend {
    tap: Tap,
    edges: EdgePoller,
    offloads: Offloads,
    mtu: u16,
    /// The largest frame that may come, as agreed.
    largest: usize,
}

fn flags(offloads: Offloads) -> u32 {
    FLAGS.iter().filter(|(offload, _)| offloads.contains(*offload)).fold(0, |all, (_, flag)| all | flag)
}

impl TapBackend {
    /// Opens `queues` queues of the tap of this name, which must be there.
    ///
    /// # Errors
    /// `NotFound` without it or without the host's driver, `PermissionDenied`. `ResourceBusy` when another process
    /// has it open, `InvalidConfig` when it was made for another number of queues.
    pub(crate) fn open(name: &str, queues: usize, mtu: u16) -> Result<Vec<Self>> {
        let doing = || format!("opening tap {name}");
        let several = if queues > 1 { " multi_queue" } else { "" };
        let remedy = format!("ip tuntap add dev {name} mode tap{several} vnet_hdr user $(id -un) makes one");
        let there =
            !name.is_empty() && !name.contains('/') && std::path::Path::new("/sys/class/net").join(name).exists();
        if !there {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no interface of that name: {remedy}")))
                .doing(doing);
        }
        let open = || Tap::open(name, queues > 1, HEADER_LEN as i32);
        let taps: io::Result<Vec<Tap>> = (0..queues).map(|_| open()).collect();
        let explained = |e: io::Error| match e.raw_os_error() {
            Some(libc::EPERM) => Error::new(
                ErrorKind::PermissionDenied,
                format!("it is another user's, or none that may be opened: {remedy}"),
            ),
            Some(libc::EBUSY) => Error::new(ErrorKind::ResourceBusy, "another process has it open"),
            Some(libc::EINVAL) => {
                let how = if queues > 1 { "without multi_queue" } else { "with multi_queue, or is no tap" };
                Error::new(ErrorKind::InvalidConfig, format!("it was made {how}: {remedy}"))
            }
            _ => Error::from(e),
        };
        let taps = taps.map_err(explained).doing(doing)?;
        taps.into_iter().map(|tap| Self::new(tap, mtu).doing(doing)).collect()
    }

    /// One queue that is open already.
    ///
    /// # Errors
    /// `InvalidConfig` when it is none, or without the header that says what is left to do to a frame.
    pub(crate) fn from_file(file: File, mtu: u16) -> Result<Self> {
        let doing = || "taking a tap's descriptor";
        let tap = Tap::from_file(file, HEADER_LEN as i32);
        let tap = tap.map_err(|e| Error::from(e).with_kind(ErrorKind::InvalidConfig)).doing(doing)?;
        Self::new(tap, mtu).doing(doing)
    }

    fn new(tap: Tap, mtu: u16) -> Result<Self> {
        // Kernels before 6.2 cut no UDP.
        let all = [Offloads::all(), Offloads::all().without(Offloads::USO), Offloads::none()];
        let offloads = all.into_iter().find(|offloads| tap.set_offload(flags(*offloads)).is_ok()).unwrap_or_default();
        tap.set_offload(0)?;
        let edges = EdgePoller::of(tap.as_fd())?;
        Ok(Self { tap, edges, offloads, mtu, largest: usize::from(mtu) + ETHERNET })
    }
}

impl NetBackend for TapBackend {
    fn capabilities(&self) -> Capabilities {
        Capabilities { to_host: self.offloads, to_guest: self.offloads }
    }

    fn negotiated(&mut self, agreed: Capabilities) {
        let wanted = if agreed.to_guest.contains(Offloads::CSUM) { agreed.to_guest } else { Offloads::none() };
        if let Err(e) = self.tap.set_offload(flags(wanted)) {
            log::warn!("the tap's frames are not made larger for the guest: {e}");
        }
        let large = Offloads::TSO4 | Offloads::TSO6 | Offloads::USO;
        let packet =
            if agreed.to_guest.intersection(large) != Offloads::none() { MAX_PACKET } else { usize::from(self.mtu) };
        self.largest = packet + ETHERNET;
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.edges.fd()
    }

    fn poll(&mut self) {
        self.edges.poll();
    }

    fn send(&mut self, frame: Frame<'_>) -> io::Result<()> {
        match frame.write_with_header(&frame.offload().to_bytes(0), self.tap.as_fd()) {
            Err(e) if e.raw_os_error() == Some(libc::EBADFD) => Err(e),
            // Full, down, or a frame that the host's kernel finds wrong: lost, as on a wire.
            _ => Ok(()),
        }
    }

    fn next_len(&mut self) -> Option<usize> {
        self.edges.readable.then_some(self.largest)
    }

    fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> io::Result<Option<Received>> {
        let mut header = [0; HEADER_LEN];
        let len = match buffer.read_with_header(&mut header, self.tap.as_fd()) {
            Ok(n) => n.saturating_sub(HEADER_LEN),
            Err(e) if e.raw_os_error() == Some(libc::EBADFD) => return Err(e),
            Err(_) => {
                self.edges.readable = false;
                return Ok(None);
            }
        };
        // What the host's kernel says of its own frames is right; a flag that would be wrong must not reach the guest.
        let offload = Offload::parse(&header, len, Offloads::all()).unwrap_or_default();
        Ok((len > 0).then_some(Received { len, offload }))
    }
}
