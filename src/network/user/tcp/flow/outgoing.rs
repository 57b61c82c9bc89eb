//! The next segment to the guest, and its headers. Data is peeked at and stays in the host's socket.

use std::io;
use std::os::fd::AsFd;

use super::{Flow, Phase, RESEND, What, after};
use crate::memory::{GuestMemory, Segment as Piece};
use crate::network::Offloads;
use crate::network::user::core::Core;
use crate::network::user::tcp::WINDOW;
use crate::network::wire::{self, ACK, Ends, FIN, Head, PSH, SYN, Tcp};

impl Flow {
    /// What to send now.
    pub(in crate::network::user::tcp) fn what(&mut self, core: &Core) -> Option<What> {
        match self.phase {
            Phase::Connecting => return None,
            Phase::Answering | Phase::Calling => return (self.sent == self.una).then_some(What::Syn),
            Phase::Open => {}
            Phase::Over => return self.ack_due.then_some(What::Ack),
        }
        let flight = self.sent.wrapping_sub(self.una) as usize;
        let closed = self.fin.is_some_and(|fin| after(self.sent, fin));
        let fresh = match &self.socket {
            Some(socket) if self.readable && !closed => socket.unread().unwrap_or(0).saturating_sub(flight),
            _ => 0,
        };
        self.readable = fresh > 0;
        let room = (self.window as usize).saturating_sub(flight);
        let room = if self.probe { room.max(1) } else { room };
        let n = fresh.min(room).min(self.most(core));
        if n > 0 && (n == fresh || n >= usize::from(self.mss) || flight == 0) {
            return Some(What::Data(n));
        }
        if fresh == 0 && self.ended && !closed && (room > 0 || flight == 0) {
            return Some(What::Fin);
        }
        if fresh > 0 && flight == 0 && self.resend_at.is_none() {
            self.resend_at = Some(core.host.now + RESEND);
        }
        self.ack_due.then_some(What::Ack)
    }

    /// Bytes of data in one frame.
    fn most(&self, core: &Core) -> usize {
        let mss = usize::from(self.mss);
        if !self.cuts(core) {
            return mss;
        }
        let headers = wire::ip_header_len(self.key.guest.0) + 20;
        (wire::MAX_PACKET - headers) / mss * mss
    }

    /// Whether the guest takes frames that stand for many.
    pub(in crate::network::user::tcp) fn cuts(&self, core: &Core) -> bool {
        let four = self.key.guest.0.is_ipv4();
        let tso = if four { Offloads::TSO4 } else { Offloads::TSO6 };
        core.agreed.to_guest.contains(tso | Offloads::CSUM)
    }

    /// Bytes of the headers of what is sent next.
    pub(in crate::network::user::tcp) fn headers(&self, what: What) -> usize {
        let options = match (what, self.our_shift) {
            (What::Syn, Some(_)) => 8,
            (What::Syn, None) => 4,
            _ => 0,
        };
        wire::ETHERNET + wire::ip_header_len(self.key.guest.0) + 20 + options
    }

    /// The headers of `what`, which is being sent now with `n` bytes of data.
    pub(in crate::network::user::tcp) fn head(&mut self, core: &Core, what: What, n: usize) -> Head {
        let flags = match what {
            What::Syn if self.phase == Phase::Calling => SYN,
            What::Syn => SYN | ACK,
            What::Data(_) if n >= self.most(core) => ACK,
            What::Data(_) => ACK | PSH,
            What::Fin => ACK | FIN,
            What::Ack => ACK,
        };
        let syn = flags & SYN != 0;
        let headers = wire::ip_header_len(self.key.guest.0) as u16 + 20;
        let tcp = Tcp {
            mss: syn.then_some(core.config.mtu - headers),
            shift: if syn { self.our_shift } else { None },
            ..self.header(flags)
        };
        let len = n as u32 + u32::from(flags & (SYN | FIN) != 0);
        if flags & FIN != 0 {
            self.fin = Some(self.sent);
        }
        self.sent = self.sent.wrapping_add(len);
        if after(self.sent, self.max) {
            self.max = self.sent;
        }
        if len > 0 && self.resend_at.is_none() {
            self.resend_at = Some(core.host.now + RESEND);
        }
        if n > 0 && !self.probe {
            self.active = core.host.now;
        }
        (self.ack_due, self.probe) = (false, false);
        let ends = Ends { src: self.key.remote.0, dst: self.key.guest.0 };
        let mut head = Head::ip(core.macs(), ends, wire::TCP, wire::tcp_header_len(&tcp) + n);
        head.tcp(&tcp);
        head
    }

    /// A header that says where we are.
    fn header(&mut self, flags: u8) -> Tcp {
        let shift = if flags & SYN != 0 { 0 } else { self.our_shift.unwrap_or(0) };
        if self.backlog.is_empty() && flags & ACK != 0 {
            let window = if shift == 0 { 0xffff } else { WINDOW };
            let edge = self.received.wrapping_add(window);
            self.edge = if after(edge, self.edge) { edge } else { self.edge };
        }
        let window = (self.edge.wrapping_sub(self.received) >> shift).min(0xffff) as u16;
        let ack = if flags & ACK != 0 { self.received } else { 0 };
        let (src, dst) = (self.key.remote.1, self.key.guest.1);
        Tcp { src, dst, seq: self.sent, ack, flags, window, ..Tcp::default() }
    }

    /// Sends a segment without data past everything else.
    pub(in crate::network::user::tcp) fn answer(&mut self, core: &mut Core, flags: u8) {
        let ends = Ends { src: self.key.remote.0, dst: self.key.guest.0 };
        let mut tcp = self.header(flags);
        // The guest believes a reset only where it expects the next segment, which is behind all it was sent.
        tcp.seq = self.max;
        let mut head = Head::ip(core.macs(), ends, wire::TCP, 20);
        head.tcp(&tcp);
        core.send_head(head, ends, wire::TCP, 16);
    }

    /// Peeks at the next `n` bytes, into `room`.
    pub(in crate::network::user::tcp) fn peek(
        &self,
        memory: &GuestMemory,
        room: &[Piece],
        nowhere: &mut Vec<u8>,
    ) -> io::Result<usize> {
        let Some(socket) = &self.socket else { return Ok(0) };
        let flight = if self.peeks { 0 } else { self.sent.wrapping_sub(self.una) as usize };
        nowhere.resize(wire::MAX_PACKET, 0);
        memory.peek(room, socket.as_fd(), flight, nowhere)
    }
}
