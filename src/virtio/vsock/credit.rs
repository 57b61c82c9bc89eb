//! Flow control of one connection: how much each side may still send (Virtio 1.3, 5.10.6.3).
//!
//! Pure arithmetic. All counters wrap at 32 bits, as the specification says.

use super::packet::VsockHeader;

/// What we hold for the embedder at most, per connection.
pub(super) const BUFFER: u32 = 256 * 1024;

/// Both directions of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Credit {
    /// Bytes that came from the peer.
    received: u32,
    /// Bytes of those that left our buffer.
    forwarded: u32,
    /// What the peer knows of that.
    advertised: u32,
    /// Bytes sent to the peer.
    sent: u32,
    /// The peer's buffer, and what it says it has forwarded.
    peer_buffer: u32,
    peer_forwarded: u32,
}

/// Credit that a packet carries (Virtio 1.3, 5.10.6.3): the size of our buffer, and bytes forwarded from it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct CreditUpdate {
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl CreditUpdate {
    pub(super) fn of(header: &VsockHeader) -> Self {
        Self { buf_alloc: header.buf_alloc, fwd_cnt: header.fwd_cnt }
    }
}

impl Credit {
    /// Takes the peer's side, which every packet of it carries.
    pub(super) fn update(&mut self, peer: CreditUpdate) {
        (self.peer_buffer, self.peer_forwarded) = (peer.buf_alloc, peer.fwd_cnt);
    }

    /// How many bytes may be sent. A peer that contradicts itself may get nothing, never too much.
    pub(super) fn may_send(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Data came in. False when the peer had no right to send that much.
    pub(super) fn received(&mut self, bytes: u32) -> bool {
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = bytes <= BUFFER - held.min(BUFFER);
        if fits {
            self.received = self.received.wrapping_add(bytes);
        }
        fits
    }

    pub(super) fn forwarded(&mut self, bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Returns whether the peer needs credit without having asked: it may be about to stop.
    pub(super) fn needs_credit_update(&self) -> bool {
        let believed = BUFFER.saturating_sub(self.received.wrapping_sub(self.advertised));
        believed < BUFFER / 2 && self.forwarded != self.advertised
    }

    /// Returns what every packet to the peer carries, and remembers that the peer knows it.
    pub(super) fn advertise(&mut self) -> CreditUpdate {
        self.advertised = self.forwarded;
        CreditUpdate { buf_alloc: BUFFER, fwd_cnt: self.forwarded }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn inconsistent_peer_credit_allows_no_sending() {
        let mut credit = Credit::default();
        credit.update(CreditUpdate { buf_alloc: 100, fwd_cnt: 50 });
        assert_eq!(credit.may_send(), 0);
    }

    proptest! {
        /// Two sides that speak through this arithmetic, against a naive model of two buffers.
        #[test]
        fn no_buffer_overruns_and_neither_side_stalls(steps in proptest::collection::vec((0u8..3, 1u32..200_000), 1..300)) {
            let (mut us, mut peer) = (Credit::default(), Credit::default());
            let start = u32::MAX - 100_000;
            for side in [&mut us, &mut peer] {
                (side.received, side.forwarded, side.advertised, side.sent) = (start, start, start, start);
                side.update(CreditUpdate { buf_alloc: BUFFER, fwd_cnt: start });
            }
            let mut buffered = 0u32;
            for (what, amount) in steps {
                match what {
                    0 => {
                        let bytes = amount.min(peer.may_send());
                        prop_assert!(bytes == 0 || us.received(bytes));
                        peer.sent(bytes);
                        buffered += bytes;
                        prop_assert!(buffered <= BUFFER);
                    }
                    1 => {
                        let bytes = amount.min(buffered);
                        us.forwarded(bytes);
                        buffered -= bytes;
                    }
                    _ => {}
                }
                if us.needs_credit_update() {
                    let credit = us.advertise();
                    peer.update(credit);
                }
                if buffered == 0 {
                    prop_assert!(peer.may_send() >= BUFFER / 2, "an empty buffer must not stop the peer");
                }
            }
            prop_assert!(!us.received(BUFFER + 1));
        }
    }
}
