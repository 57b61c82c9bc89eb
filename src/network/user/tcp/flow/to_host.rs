//! The guest's data on its way into the host's socket. It goes straight there, and what the socket does not take waits,
//! within bounds.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;

use super::{TcpFlow, TcpSegment};
use crate::memory::{GuestMemory, Segment as Piece};
use crate::network::user::core::Core;
use crate::network::wire::{ACK, FIN};

impl TcpFlow {
    /// RFC 9293, 3.10.7.4, "seventh, process the segment text" and "eighth, check the FIN bit".
    pub(super) fn process_text(
        &mut self,
        core: &mut Core,
        segment: &TcpSegment<'_>,
        payload: &mut Vec<Piece>,
        budget: usize,
    ) -> io::Result<()> {
        let (tcp, mut fin) = (&segment.tcp, segment.tcp.flags & FIN != 0);
        let ahead = tcp.seq.wrapping_sub(self.rcv_nxt) as i32;
        if ahead > 0 {
            // The guest counts these answers, so that none may be left out (RFC 5681, 3.2).
            core.stats.out_of_order += 1;
            self.send_control(core, ACK);
            return Ok(());
        }
        let old = ahead.unsigned_abs() as usize;
        self.ack_due |= segment.len > 0 || fin || old > 0;
        if self.fin_received || old > segment.len || segment.len + usize::from(fin) == old {
            return Ok(());
        }
        let room = self.rcv_wnd_edge.wrapping_sub(self.rcv_nxt) as usize;
        let len = (segment.len - old).min(room);
        fin &= len == segment.len - old;
        let taken = if len > 0 { self.send_to_host(segment.memory, payload, (old, len), budget)? } else { 0 };
        self.rcv_nxt = self.rcv_nxt.wrapping_add(taken as u32);
        if fin && taken == len {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.fin_received = true;
            self.shut_down_host();
        }
        Ok(())
    }

    /// Sends the `len` bytes after the first `skip` of `payload`; true to how many the host's socket or the backlog took.
    fn send_to_host(
        &mut self,
        memory: &GuestMemory,
        payload: &mut Vec<Piece>,
        (skip, len): (usize, usize),
        budget: usize,
    ) -> io::Result<usize> {
        let Some(socket) = &self.socket else { return Ok(len) };
        if skip > 0 || payload.iter().map(|p| p.len()).sum::<usize>() != len {
            let whole = std::mem::take(payload);
            crate::network::user::cut(&whole, skip, len, payload);
        }
        let mut sent = 0;
        if self.backlog.is_empty() {
            sent = match memory.send(payload, socket.as_fd()) {
                Ok(n) => n,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
                Err(e) => return Err(e),
            };
        }
        let kept = (len - sent).min(budget);
        if kept > 0 {
            let whole = std::mem::take(payload);
            crate::network::user::cut(&whole, sent, kept, payload);
            for piece in payload.iter() {
                let at = self.backlog.len();
                self.backlog.resize(at + piece.len(), 0);
                let (front, back) = self.backlog.as_mut_slices();
                let to = match at.checked_sub(front.len()) {
                    Some(at) => (None, back.get_mut(at..)),
                    None => (front.get_mut(at..), Some(back)),
                };
                let split = to.0.as_ref().map_or(0, |to| to.len());
                let (first, second) = piece.split_at(split);
                if let Some(to) = to.0 {
                    memory.read(first.addr(), to).map_err(io::Error::other)?;
                }
                if let Some(to) = to.1 {
                    memory.read(second.addr(), to).map_err(io::Error::other)?;
                }
            }
        }
        Ok(sent + kept)
    }

    /// Sends what waited. True: there is nothing left.
    pub(super) fn flush_backlog(&mut self) -> io::Result<bool> {
        let Some(socket) = &self.socket else { return Ok(true) };
        while !self.backlog.is_empty() {
            match socket.send(self.backlog.as_slices().0) {
                Ok(n) => drop(self.backlog.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        if self.backlog.capacity() > 0 {
            self.backlog = VecDeque::new();
            // The window opens again.
            self.ack_due = true;
        }
        self.shut_down_host();
        Ok(true)
    }

    /// Closes the host's direction when the guest has closed its own and nothing waits.
    pub(super) fn shut_down_host(&mut self) {
        if self.fin_received && self.backlog.is_empty() && !self.host_shut_down {
            self.host_shut_down = true;
            if let Some(Err(error)) = self.socket.as_ref().map(|s| s.shutdown(Shutdown::Write)) {
                log::debug!("a connection was closed by both sides at once: {error}");
            }
        }
    }
}
