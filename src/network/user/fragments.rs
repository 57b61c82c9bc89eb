//! [`Fragments`]: reassembles the guest's fragmented packets (RFC 791, 3.2; RFC 8200, 4.5).
//!
//! Bounded in number, in size and in time. Where fragments overlap, all of the packet is dropped (RFC 5722), so that
//! what is looked at is what arrives.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::core::Core;
use super::generational::Owner;
use super::host::TimerEntry;
use crate::network::wire::{Fragment, IpPacket, MAX_PACKET, PacketError};

/// Packets that are put together at once. The oldest makes room.
const AT_ONCE: usize = 4;
/// Fragments of one: no link's are smaller than what IPv4 asks for makes of the largest packet (RFC 791, 3.2: 576 bytes).
const MAX_FRAGMENTS: usize = 128;
/// How long the rest of a packet is waited for (RFC 791, 3.2: 15 seconds at least; RFC 8200, 4.5: 60 at most).
const REASSEMBLY_TIMEOUT: Duration = Duration::from_secs(30);

/// What all fragments of a packet have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FragmentKey {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    id: u32,
}

/// A packet that is not whole yet.
#[derive(Debug)]
struct Partial {
    name: FragmentKey,
    begun: Instant,
    bytes: Vec<u8>,
    /// Where what has come begins and ends, in order.
    come: Vec<(usize, usize)>,
    /// How long it is, once its last fragment has come.
    len: Option<usize>,
}

impl Partial {
    fn new(name: FragmentKey, begun: Instant) -> Self {
        Self { name, begun, bytes: Vec::new(), come: Vec::new(), len: None }
    }

    /// Adds a fragment. Fails when the packet cannot become whole any more.
    fn add(&mut self, Fragment { offset, more, .. }: Fragment, bytes: &[u8]) -> Result<(), PacketError> {
        let end = offset + bytes.len();
        // Only the last may end within a unit of offsets.
        if bytes.is_empty() || end > MAX_PACKET || more && !bytes.len().is_multiple_of(8) {
            return Err(PacketError::Malformed);
        }
        if self.come.contains(&(offset, end)) {
            return Ok(());
        }
        let at = self.come.partition_point(|(begin, _)| *begin < offset);
        let before = at.checked_sub(1).and_then(|n| self.come.get(n));
        let overlaps = before.is_some_and(|(_, e)| *e > offset) || self.come.get(at).is_some_and(|(b, _)| *b < end);
        let fits = self.len.is_none_or(|len| if more { end < len } else { end == len });
        let is_end = more || self.come.last().is_none_or(|(_, last)| *last <= offset);
        if overlaps || !fits || !is_end || self.come.len() >= MAX_FRAGMENTS {
            return Err(PacketError::Fragment);
        }
        self.come.insert(at, (offset, end));
        if !more {
            self.len = Some(end);
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes.get_mut(offset..end).ok_or(PacketError::Malformed)?.copy_from_slice(bytes);
        Ok(())
    }

    fn is_whole(&self) -> bool {
        // They do not overlap, so that they are all of it when they are as much as it.
        self.len == Some(self.come.iter().map(|(begin, end)| end - begin).sum())
    }
}

/// All packets that are not whole yet, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    all: Vec<Partial>,
    timer: TimerEntry,
    /// Packets that never became whole, and are not counted yet.
    dropped: u64,
}

impl Fragments {
    /// Adds a fragment of `packet`. When that makes it whole, all that follows its header comes back.
    pub(super) fn add(
        &mut self,
        now: Instant,
        packet: &IpPacket,
        bytes: &[u8],
    ) -> Result<Option<Vec<u8>>, PacketError> {
        let fragment = packet.fragment.ok_or(PacketError::Malformed)?;
        let name = FragmentKey { src: packet.src, dst: packet.dst, protocol: packet.protocol, id: fragment.id };
        let at = self.all.iter().position(|partial| partial.name == name).unwrap_or_else(|| {
            if self.all.len() >= AT_ONCE {
                self.all.remove(0);
                self.dropped += 1;
            }
            self.all.push(Partial::new(name, now));
            self.all.len() - 1
        });
        let partial = self.all.get_mut(at).ok_or(PacketError::Malformed)?;
        let added = partial.add(fragment, bytes);
        let whole = partial.is_whole();
        if added.is_err() || whole {
            let partial = self.all.remove(at);
            return added.map(|()| Some(partial.bytes));
        }
        Ok(None)
    }

    /// Counts what was dropped, and sets the timer to when the oldest has waited for long enough.
    pub(super) fn arm(&mut self, core: &mut Core) {
        core.stats.fragments += std::mem::take(&mut self.dropped);
        let at = self.all.first().map(|partial| partial.begun + REASSEMBLY_TIMEOUT);
        core.host.set_timer(&mut self.timer, Owner::Fragments, at);
    }

    /// The timer has fired.
    pub(super) fn on_timer(&mut self, core: &mut Core) {
        self.timer.fired();
        let now = core.host.now;
        let before = self.all.len();
        self.all.retain(|partial| partial.begun + REASSEMBLY_TIMEOUT > now);
        self.dropped += (before - self.all.len()) as u64;
        self.arm(core);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::wire::UDP;
    use proptest::prelude::*;

    fn fragment(id: u32, offset: usize, more: bool) -> IpPacket {
        let fragment = Some(Fragment { id, offset, more });
        let (src, dst) = ("10.0.2.15".parse().unwrap(), "192.0.2.1".parse().unwrap());
        IpPacket { src, dst, protocol: UDP, hops: 64, header: 20, len: 0, fragment }
    }

    /// Adds these fragments: what came of each.
    fn added(fragments: &[(usize, usize, bool)]) -> Vec<Result<Option<Vec<u8>>, PacketError>> {
        let (mut all, now) = (Fragments::default(), Instant::now());
        let bytes: Vec<u8> = (0..MAX_PACKET + 64).map(|n| n as u8).collect();
        let mut add = |&(offset, len, more): &(usize, usize, bool)| {
            all.add(now, &fragment(1, offset, more), &bytes[offset..offset + len])
        };
        fragments.iter().map(&mut add).collect()
    }

    #[test]
    fn overlapping_fragments_are_dropped() {
        let nothing = Ok(None);
        for (fragments, outcome) in [
            // The same again is no contradiction.
            (&[(0, 16, true), (0, 16, true)][..], &nothing),
            (&[(0, 16, true), (8, 16, true)], &Err(PacketError::Fragment)),
            (&[(8, 16, true), (0, 16, true)], &Err(PacketError::Fragment)),
            (&[(16, 8, false), (8, 8, false)], &Err(PacketError::Fragment)),
            (&[(16, 8, false), (24, 8, true)], &Err(PacketError::Fragment)),
            (&[(24, 8, true), (16, 4, false)], &Err(PacketError::Fragment)),
            (&[(0, 12, true)], &Err(PacketError::Malformed)),
            (&[(8, 0, false)], &Err(PacketError::Malformed)),
            (&[(65_528, 8, false)], &Err(PacketError::Malformed)),
            (&[(65_528, 7, false)], &nothing),
        ] {
            assert_eq!(added(fragments).last(), Some(outcome), "{fragments:?}");
        }
    }

    #[test]
    fn partial_packets_are_bounded() {
        let (mut all, now) = (Fragments::default(), Instant::now());
        for id in 0..100 {
            assert_eq!(all.add(now, &fragment(id, 65_520, true), &[0; 8]), Ok(None));
        }
        assert_eq!((all.all.len(), all.all[0].name.id, all.dropped), (AT_ONCE, 96, 96));
        let fragments: Vec<_> = (0..MAX_FRAGMENTS + 1).map(|n| (n * 16, 8, true)).collect();
        assert_eq!(added(&fragments).iter().filter(|outcome| outcome.is_err()).count(), 1);
    }

    proptest! {
        #[test]
        fn fragments_in_any_order_reassemble_once(len in 1usize..4000, size in 1usize..100, keys in prop::collection::vec(any::<u32>(), 64)) {
            let size = (size * 8).max(len.div_ceil(MAX_FRAGMENTS).next_multiple_of(8));
            let mut fragments: Vec<_> = (0..len).step_by(size).map(|at| (at, size.min(len - at), at + size < len)).collect();
            // The order of their keys; some come twice.
            fragments.sort_by_key(|(at, ..)| keys[at / size % 64].wrapping_mul(*at as u32 + 1));
            let again = fragments.len() > 1 && keys[0] % 2 == 0;
            let twice: Vec<_> = fragments.iter().take(fragments.len() - 1).flat_map(|fragment| [*fragment, *fragment]).collect();
            let last = *fragments.last().unwrap();
            let outcomes = if again { added(&[&twice[..], &[last]].concat()) } else { added(&fragments) };
            let (last, others) = outcomes.split_last().unwrap();
            prop_assert!(others.iter().all(|outcome| *outcome == Ok(None)));
            let expected: Vec<u8> = (0..len).map(|n| n as u8).collect();
            prop_assert_eq!(last, &Ok(Some(expected)));
        }
    }
}
