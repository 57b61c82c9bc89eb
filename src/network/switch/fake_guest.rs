//! A fake guest on a switch: frames in, frames out. For tests and fuzzing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::{Switch, SwitchPort};
use crate::error::Result;
use crate::memory::{GuestAddress, GuestMemory};
use crate::network::wire::{self, AddressPair, FrameBuilder, Tcp};
use crate::network::{Capabilities, Csum, Frame, Gso, GsoKind, Mac, NetBackend, NetStats, Offload, Offloads, RxBuffer};

const FRAME: GuestAddress = GuestAddress(0);
const ROOM: GuestAddress = GuestAddress(0x2_0000);
/// More than one turn of any port has for a guest.
const FRAMES: usize = 100_000;

/// A guest whose driver agreed to something.
#[derive(Debug)]
pub(in crate::network) struct FakeGuest {
    pub mac: Mac,
    pub four: Ipv4Addr,
    pub six: Ipv6Addr,
    port: SwitchPort,
    memory: GuestMemory,
}

impl FakeGuest {
    /// # Errors
    /// As [`Switch::join`].
    pub(in crate::network) fn on(switch: &Switch, name: &str, mac: Mac, agreed: Offloads) -> Result<Self> {
        let place = Arc::new(switch.join(name, mac, 1500)?);
        let (four, six) = (place.peer.address4, place.peer.address6);
        let mut port = SwitchPort::new(place)?;
        port.negotiated(Capabilities { to_host: Offloads::all(), to_guest: agreed });
        Ok(Self { mac, four, six, port, memory: GuestMemory::anonymous(&[(GuestAddress(0), 1 << 18)])? })
    }

    /// Another driver, which agrees to this.
    #[cfg(test)]
    pub(in crate::network) fn agree(&mut self, agreed: Offloads) {
        self.port.negotiated(Capabilities { to_host: Offloads::all(), to_guest: agreed });
    }

    /// Sends a frame in two pieces.
    pub(in crate::network) fn send(&mut self, frame: &[u8], offload: Offload) {
        let segment = self.memory.segment(FRAME, frame.len()).ok();
        if let (Ok(()), Some(segment)) = (self.memory.write(FRAME, frame), segment) {
            let (a, b) = segment.split_at(frame.len() / 2);
            let sent = self.port.send(Frame::new(&self.memory, &[a, b], offload));
            debug_assert!(sent.is_ok(), "bad frames are no errors");
        }
    }

    /// All that has come.
    pub(in crate::network) fn take(&mut self) -> Vec<(Vec<u8>, Offload)> {
        self.port.poll();
        let mut frames = Vec::new();
        while let Some(len) = self.port.next_len().filter(|_| frames.len() < FRAMES) {
            let Ok(room) = self.memory.segment(ROOM, len) else { break };
            let received = self.port.receive(&mut RxBuffer::new(&self.memory, &[room])).ok().flatten();
            let Some(received) = received else { continue };
            let mut frame = vec![0; received.len];
            if self.memory.read(ROOM, &mut frame).is_ok() {
                frames.push((frame, received.offload));
            }
        }
        frames
    }

    pub(in crate::network) fn stats(&self) -> NetStats {
        self.port.stats()
    }

    pub(in crate::network) fn leave(&mut self) {
        self.port.leave();
    }

    pub(in crate::network) fn address(&self, four: bool) -> IpAddr {
        if four { self.four.into() } else { self.six.into() }
    }

    /// The headers of a packet of this guest.
    pub(in crate::network) fn ip(&self, to: Mac, dst: IpAddr, protocol: u8, len: usize) -> FrameBuilder {
        FrameBuilder::ip(
            wire::MacPair { src: self.mac, dst: to },
            AddressPair { src: self.address(dst.is_ipv4()), dst },
            protocol,
            len,
        )
    }

    /// A segment of this guest that stands for several, and what is left to do to it.
    pub(in crate::network) fn tcp(
        &self,
        to: &Self,
        four: bool,
        payload: &[u8],
        size: Option<u16>,
    ) -> (Vec<u8>, Offload) {
        let dst = to.address(four);
        let tcp = Tcp { src: 4000, dst: 80, seq: 7, flags: wire::ACK, window: 512, ..Tcp::default() };
        let mut head = self.ip(to.mac, dst, wire::TCP, 20 + payload.len());
        let start = head.len();
        head.tcp(&tcp);
        let src = self.address(four);
        head.set16(start + 16, wire::fold(wire::pseudo(src, dst, wire::TCP, 20 + payload.len())));
        let kind = if four { GsoKind::Tcp4 } else { GsoKind::Tcp6 };
        let gso = size.map(|size| Gso { kind, size, header_len: head.len() as u16 });
        let csum = Some(Csum { start: start as u16, offset: 16 });
        ([head.as_slice(), payload].concat(), Offload { csum, gso })
    }

    /// A datagram of this guest with its checksum.
    pub(in crate::network) fn udp(&self, to: Mac, dst: IpAddr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let addrs = AddressPair { src: self.address(dst.is_ipv4()), dst };
        let datagram = wire::datagram(addrs, wire::UdpPorts { src: ports.0, dst: ports.1 }, payload);
        [self.ip(to, dst, wire::UDP, datagram.len()).as_slice(), &datagram].concat()
    }
}
