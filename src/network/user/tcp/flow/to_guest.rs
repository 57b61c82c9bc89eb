//! The next segment to the guest, and its headers. Data is peeked at and stays in the host's socket.

use std::io;
use std::os::fd::AsFd;

use super::{INITIAL_RTO, TcpFlow, TcpState, Transmit, seq_gt};
use crate::memory::{GuestMemory, Segment as Piece};
use crate::network::Offloads;
use crate::network::user::core::Core;
use crate::network::user::tcp::MAX_RCV_WND;
use crate::network::wire::{self, ACK, AddressPair, FIN, FrameBuilder, PSH, SYN, Tcp};

impl TcpFlow {
    /// What to send now.
    pub(in crate::network::user::tcp) fn next_transmit(&mut self, core: &Core) -> Option<Transmit> {
        match self.state {
            TcpState::HostConnecting => return None,
            TcpState::SynReceived | TcpState::SynSent => {
                return (self.snd_nxt == self.snd_una).then_some(Transmit::Syn);
            }
            TcpState::Established => {}
            TcpState::TimeWait => return self.ack_due.then_some(Transmit::Ack),
        }
        let in_flight = self.snd_nxt.wrapping_sub(self.snd_una) as usize;
        let closed = self.fin_seq.is_some_and(|fin| seq_gt(self.snd_nxt, fin));
        let fresh = match &self.socket {
            Some(socket) if self.readable && !closed => socket.unread().unwrap_or(0).saturating_sub(in_flight),
            _ => 0,
        };
        self.readable = fresh > 0;
        let room = (self.snd_wnd as usize).saturating_sub(in_flight);
        let room = if self.probe_due { room.max(1) } else { room };
        let n = fresh.min(room).min(self.max_payload(core));
        if n > 0 && (n == fresh || n >= usize::from(self.mss) || in_flight == 0) {
            return Some(Transmit::Data(n));
        }
        if fresh == 0 && self.peer_closed && !closed && (room > 0 || in_flight == 0) {
            return Some(Transmit::Fin);
        }
        if fresh > 0 && in_flight == 0 && self.retransmit_at.is_none() {
            self.retransmit_at = Some(core.host.now + INITIAL_RTO);
        }
        self.ack_due.then_some(Transmit::Ack)
    }

    /// Bytes of data in one frame.
    fn max_payload(&self, core: &Core) -> usize {
        let mss = usize::from(self.mss);
        if !self.guest_takes_gso(core) {
            return mss;
        }
        let headers = wire::ip_header_len(self.key.guest.addr) + 20;
        (wire::MAX_PACKET - headers) / mss * mss
    }

    /// Whether the guest takes frames that stand for many.
    pub(in crate::network::user::tcp) fn guest_takes_gso(&self, core: &Core) -> bool {
        let four = self.key.guest.addr.is_ipv4();
        let tso = if four { Offloads::TSO4 } else { Offloads::TSO6 };
        core.agreed.to_guest.contains(tso | Offloads::CSUM)
    }

    /// Returns the bytes of headers that this segment has.
    pub(in crate::network::user::tcp) fn header_len(&self, transmit: Transmit) -> usize {
        let options = match (transmit, self.rcv_wscale) {
            (Transmit::Syn, Some(_)) => 8,
            (Transmit::Syn, None) => 4,
            _ => 0,
        };
        wire::ETHERNET + wire::ip_header_len(self.key.guest.addr) + 20 + options
    }

    /// The headers of `transmit`, which is being sent now with `n` bytes of data.
    pub(in crate::network::user::tcp) fn emit_header(
        &mut self,
        core: &Core,
        transmit: Transmit,
        n: usize,
    ) -> FrameBuilder {
        let flags = match transmit {
            Transmit::Syn if self.state == TcpState::SynSent => SYN,
            Transmit::Syn => SYN | ACK,
            Transmit::Data(_) if n >= self.max_payload(core) => ACK,
            Transmit::Data(_) => ACK | PSH,
            Transmit::Fin => ACK | FIN,
            Transmit::Ack => ACK,
        };
        let syn = flags & SYN != 0;
        let headers = wire::ip_header_len(self.key.guest.addr) as u16 + 20;
        let tcp = Tcp {
            mss: syn.then_some(core.config.mtu - headers),
            shift: if syn { self.rcv_wscale } else { None },
            ..self.base_header(flags)
        };
        let len = n as u32 + u32::from(flags & (SYN | FIN) != 0);
        if flags & FIN != 0 {
            self.fin_seq = Some(self.snd_nxt);
        }
        self.snd_nxt = self.snd_nxt.wrapping_add(len);
        if seq_gt(self.snd_nxt, self.snd_max) {
            self.snd_max = self.snd_nxt;
        }
        if len > 0 && self.retransmit_at.is_none() {
            self.retransmit_at = Some(core.host.now + INITIAL_RTO);
        }
        if n > 0 && !self.probe_due {
            self.last_activity = core.host.now;
        }
        (self.ack_due, self.probe_due) = (false, false);
        let addrs = AddressPair { src: self.key.remote.addr, dst: self.key.guest.addr };
        let mut head = FrameBuilder::ip(core.macs(), addrs, wire::TCP, wire::tcp_header_len(&tcp) + n);
        head.tcp(&tcp);
        head
    }

    /// A header that says where we are.
    fn base_header(&mut self, flags: u8) -> Tcp {
        let shift = if flags & SYN != 0 { 0 } else { self.rcv_wscale.unwrap_or(0) };
        if self.backlog.is_empty() && flags & ACK != 0 {
            let window = if shift == 0 { 0xffff } else { MAX_RCV_WND };
            let edge = self.rcv_nxt.wrapping_add(window);
            self.rcv_wnd_edge = if seq_gt(edge, self.rcv_wnd_edge) { edge } else { self.rcv_wnd_edge };
        }
        let window = (self.rcv_wnd_edge.wrapping_sub(self.rcv_nxt) >> shift).min(0xffff) as u16;
        let ack = if flags & ACK != 0 { self.rcv_nxt } else { 0 };
        let (src, dst) = (self.key.remote.port, self.key.guest.port);
        Tcp { src, dst, seq: self.snd_nxt, ack, flags, window, ..Tcp::default() }
    }

    /// Sends a segment without data past everything else.
    pub(in crate::network::user::tcp) fn send_control(&mut self, core: &mut Core, flags: u8) {
        let addrs = AddressPair { src: self.key.remote.addr, dst: self.key.guest.addr };
        let mut tcp = self.base_header(flags);
        // The guest believes a reset only where it expects the next segment, which is behind all it was sent.
        tcp.seq = self.snd_max;
        let mut head = FrameBuilder::ip(core.macs(), addrs, wire::TCP, 20);
        head.tcp(&tcp);
        core.send_headers(head, addrs, wire::TCP, 16);
    }

    /// Peeks at the next `n` bytes, into `room`.
    pub(in crate::network::user::tcp) fn peek(
        &self,
        memory: &GuestMemory,
        room: &[Piece],
        scratch: &mut Vec<u8>,
    ) -> io::Result<usize> {
        let Some(socket) = &self.socket else { return Ok(0) };
        let in_flight = if self.has_peek_off { 0 } else { self.snd_nxt.wrapping_sub(self.snd_una) as usize };
        scratch.resize(wire::MAX_PACKET, 0);
        memory.peek(room, socket.as_fd(), in_flight, scratch)
    }
}
