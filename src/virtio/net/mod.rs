//! Network device (Virtio 1.3, 5.1): a guest's frames to and from whatever carries them. Runs on the VM's loop.
//!
//! Each pair of queues has a [`NetBackend`] of its own. Frames go from guest memory to the backend and back without a copy
//! here; one that is larger than the guest's buffers is spread over several (mergeable buffers).

mod control;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;

use crate::memory::Segment;
use crate::net::{Agreed, Capabilities, HEADER_LEN, Mac, NetBackend, Offload, Offloads, UserNet};

use super::chain::Span;
use super::{Chain, ConfigSpace, DeviceIo, DeviceType, Profile, Source, VirtioDevice};

/// Feature bits (Virtio 1.3, 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(super) const CTRL_VQ: u64 = 1 << 17;
    pub(super) const MQ: u64 = 1 << 22;
    pub(super) const GUEST_USO4: u64 = 1 << 54;
    pub(super) const GUEST_USO6: u64 = 1 << 55;
    pub(super) const HOST_USO: u64 = 1 << 56;
}

/// What the driver may leave to the device, by feature.
const TO_HOST: [(Offloads, u64); 4] = [
    (Offloads::CSUM, feature::CSUM),
    (Offloads::TSO4, feature::HOST_TSO4),
    (Offloads::TSO6, feature::HOST_TSO6),
    (Offloads::USO, feature::HOST_USO),
];
/// What the device may leave to the driver.
const TO_GUEST: [(Offloads, u64); 4] = [
    (Offloads::CSUM, feature::GUEST_CSUM),
    (Offloads::TSO4, feature::GUEST_TSO4),
    (Offloads::TSO6, feature::GUEST_TSO6),
    (Offloads::USO, feature::GUEST_USO4 | feature::GUEST_USO6),
];

/// Where fields of the configuration space are (Virtio 1.3, 5.1.4).
const STATUS_AT: usize = 6;
const LINK_UP: u16 = 1;

const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Frames sent or taken before others get their turn.
const TURN: usize = 256;
/// The most pairs of queues (Virtio 1.3, 5.1.4: 1 to 32768).
pub(crate) const PAIRS_MAX: usize = 32;

fn features(offloads: Offloads, table: &[(Offloads, u64)]) -> u64 {
    table.iter().filter(|(offload, _)| offloads.contains(*offload)).fold(0, |bits, (_, bit)| bits | bit)
}

fn offloads(features: u64, table: &[(Offloads, u64)]) -> Offloads {
    table.iter().filter(|(_, bit)| features & bit == *bit).fold(Offloads::empty(), |all, (offload, _)| all | *offload)
}

/// A frame of the guest that its backend could not take yet.
#[derive(Debug)]
struct Held {
    chain: Chain,
    frame: Span,
    offload: Offload,
}

/// A pair of queues, and what carries their frames.
#[derive(Debug)]
struct Pair {
    backend: Box<dyn NetBackend>,
    held: Option<Held>,
    /// Buffers of the guest that wait for frames.
    room: VecDeque<Chain>,
}

/// The device.
pub(crate) struct Net {
    pairs: Vec<Pair>,
    space: ConfigSpace,
    capabilities: Capabilities,
    /// So many of the pairs the driver uses.
    active: usize,
    agreed: Agreed,
    up: bool,
    /// A backend is at its end, so that the cable stays out.
    gone: bool,
    /// Frames of the guest that made no sense.
    dropped: u64,
    on_lost: OnLost,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Net({:?})", self.pairs)
    }
}

/// Told why a network has ended.
type OnLost = Box<dyn FnMut(&io::Error) + Send>;

impl Net {
    /// A device with this address; its backends are alike, one for each pair of queues. `on_lost` is told when one of them
    /// cannot go on: then the cable is out.
    pub(crate) fn new(backends: Vec<Box<dyn NetBackend>>, mac: Mac, on_lost: OnLost) -> Self {
        let capabilities = backends.first().map(|backend| backend.capabilities());
        let nothing = Capabilities { to_host: Offloads::empty(), to_guest: Offloads::empty(), mtu: 1500, mac: None };
        let capabilities = capabilities.unwrap_or(nothing);
        let pairs = backends.into_iter().map(|backend| Pair { backend, held: None, room: VecDeque::new() });
        let pairs: Vec<_> = pairs.collect();
        let count = pairs.len() as u16;
        let fields = [mac.0.to_vec(), LINK_UP.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()];
        let space = ConfigSpace::new([fields.concat(), capabilities.mtu.to_le_bytes().to_vec()].concat());
        let agreed = Agreed::default();
        Self { pairs, space, capabilities, active: 1, agreed, up: true, gone: false, dropped: 0, on_lost }
    }

    /// Plugs the cable in or out. Without one, nothing is delivered, and what the guest sends is lost.
    pub(crate) fn set_link(&mut self, io: Option<&mut DeviceIo>, up: bool) {
        let up = up && !self.gone;
        self.up = up;
        self.space.set(STATUS_AT, &if up { LINK_UP } else { 0 }.to_le_bytes());
        let Some(io) = io else { return };
        io.config_changed();
        for pair in 0..self.pairs.len() {
            self.deliver(io, pair);
        }
    }

    /// Calls the user-mode stack behind the card; `None` when there is another backend. What it then has for the guest is
    /// delivered.
    pub(crate) fn with_user<R>(&mut self, io: Option<&mut DeviceIo>, f: impl FnOnce(&mut UserNet) -> R) -> Option<R> {
        let answer = f(self.pairs.first_mut()?.backend.user()?);
        if let Some(io) = io {
            self.deliver(io, 0);
        }
        Some(answer)
    }

    /// Frames of the guest that made no sense.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Where the control queue is (Virtio 1.3, 5.1.2).
    fn control_queue(&self, io: &DeviceIo) -> usize {
        if io.features() & feature::MQ != 0 { 2 * self.pairs.len() } else { 2 }
    }

    fn agree(&mut self, agreed: Agreed) {
        self.agreed = agreed;
        self.pairs.iter_mut().for_each(|pair| pair.backend.negotiated(agreed));
    }

    /// Takes what the guest sends.
    fn transmit(&mut self, io: &mut DeviceIo, number: usize) {
        let queue = 2 * number + 1;
        let (up, agreed) = (self.up, self.agreed.to_host);
        let Some(pair) = self.pairs.get_mut(number) else { return };
        for _ in 0..TURN {
            let held = pair.held.take().or_else(|| {
                let mut chain = io.pop(queue)?;
                let header = chain.read::<HEADER_LEN>().ok();
                let len = chain.readable_len();
                let frame = chain.take_readable(len);
                let offload = header.and_then(|header| Offload::parse(&header, len, agreed).ok());
                match offload {
                    Some(offload) => Some(Held { chain, frame, offload }),
                    None => {
                        self.dropped += 1;
                        io.complete(queue, chain);
                        None
                    }
                }
            });
            let Some(Held { chain, frame, offload }) = held else {
                if io.rearm(queue) {
                    continue;
                }
                io.flush(queue);
                return;
            };
            let sent = if up { pair.backend.send(chain.memory(), chain.readable(frame), offload) } else { Ok(()) };
            match sent {
                Ok(()) => io.complete(queue, chain),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    pair.held = Some(Held { chain, frame, offload });
                    io.flush(queue);
                    return;
                }
                Err(e) => {
                    io.complete(queue, chain);
                    io.flush(queue);
                    return self.lost(io, number, &e);
                }
            }
        }
        io.flush(queue);
        io.kick_self(queue);
    }

    /// Gives the guest what a backend has for it.
    fn deliver(&mut self, io: &mut DeviceIo, number: usize) {
        if !self.up {
            return;
        }
        // Frames of pairs that the driver does not use arrive at those it does.
        let queue = 2 * (number % self.active.max(1));
        let mergeable = io.features() & feature::MRG_RXBUF != 0;
        let mut room = self.pairs.get_mut(queue / 2).map(|pair| std::mem::take(&mut pair.room)).unwrap_or_default();
        let Some(pair) = self.pairs.get_mut(number) else { return };
        let mut frames = 0;
        let outcome = loop {
            let Some(len) = pair.backend.next() else { break Ok(()) };
            if frames == TURN {
                io.kick_self(queue);
                break Ok(());
            }
            match gather(io, queue, &mut room, HEADER_LEN + len, mergeable) {
                Gathered::Enough => {}
                Gathered::TooLittle => break Ok(()),
                Gathered::TooSmall => {
                    io.fail(&"a buffer is smaller than the largest frame (Virtio 1.3, 5.1.6.3.1)");
                    break Ok(());
                }
            }
            match fill(io, queue, &mut room, &mut *pair.backend, len, mergeable) {
                Ok(()) => frames += 1,
                Err(e) => break Err(e),
            }
        };
        io.flush(queue);
        if let Some(pair) = self.pairs.get_mut(queue / 2) {
            pair.room = room;
        }
        if let Err(e) = outcome {
            self.lost(io, number, &e);
        }
    }

    /// A backend is at its end: it is not asked any more, and the guest sees a cable that is out.
    fn lost(&mut self, io: &mut DeviceIo, number: usize, error: &io::Error) {
        let Some(pair) = self.pairs.get(number) else { return };
        io.unwatch(pair.backend.fd());
        (self.on_lost)(error);
        self.gone = true;
        self.set_link(Some(io), false);
    }
}

enum Gathered {
    Enough,
    /// The guest has to offer more first.
    TooLittle,
    /// The guest's buffers can never hold it.
    TooSmall,
}

/// Takes buffers out of `queue` until there is room for `wanted` bytes.
fn gather(io: &mut DeviceIo, queue: usize, room: &mut VecDeque<Chain>, wanted: usize, mergeable: bool) -> Gathered {
    let mut there: usize = room.iter().map(|chain| chain.writable_len()).sum();
    loop {
        if there >= wanted {
            let first = room.front().map_or(0, |chain| chain.writable_len());
            return if first < HEADER_LEN || !mergeable && first < wanted {
                Gathered::TooSmall
            } else {
                Gathered::Enough
            };
        }
        if !mergeable && !room.is_empty() {
            return Gathered::TooSmall;
        }
        match io.pop(queue) {
            Some(chain) => {
                there += chain.writable_len();
                room.push_back(chain);
            }
            None if io.rearm(queue) => {}
            None => return Gathered::TooLittle,
        }
    }
}

/// Lets the backend fill the first buffers with its next frame of at most `len` bytes, and gives those to the guest.
fn fill(
    io: &mut DeviceIo,
    queue: usize,
    room: &mut VecDeque<Chain>,
    backend: &mut dyn NetBackend,
    len: usize,
    mergeable: bool,
) -> io::Result<()> {
    let Some(memory) = room.front().map(|chain| chain.memory().clone()) else { return Ok(()) };
    let (mut pieces, mut left, mut skip) = (Vec::<Segment>::new(), len, HEADER_LEN);
    for chain in room.iter() {
        let now = (chain.writable_len() - skip).min(left);
        pieces.extend(chain.writable_after(skip, now));
        (left, skip) = (left - now, 0);
        if left == 0 {
            break;
        }
    }
    let Some(received) = backend.receive(&memory, &pieces)? else { return Ok(()) };
    let total = HEADER_LEN + received.len.min(len);
    let (mut buffers, mut covered) = (0u16, 0);
    while let Some(chain) = room.get(usize::from(buffers)).filter(|_| covered < total) {
        covered += chain.writable_len();
        buffers += 1;
    }
    // Without mergeable buffers this is one as well (Virtio 1.3, 5.1.6.4.1).
    debug_assert!(mergeable || buffers == 1);
    let (header, mut left) = (received.offload.to_bytes(buffers), total);
    for n in 0..buffers {
        let Some(mut chain) = room.pop_front() else { break };
        let mut now = chain.writable_len().min(left);
        left -= now;
        // The first was seen to have room for it.
        if n == 0 && chain.write(&header).is_ok() {
            now -= HEADER_LEN;
        }
        chain.wrote(now);
        io.complete(queue, chain);
    }
    Ok(())
}

impl VirtioDevice for Net {
    fn profile(&self) -> Profile {
        use feature::{CTRL_GUEST_OFFLOADS, CTRL_VQ, MAC, MQ, MRG_RXBUF, MTU, STATUS};
        let Capabilities { to_host, to_guest, .. } = self.capabilities;
        let mut profile = Profile::new(DeviceType::Net).config_space(self.space.clone());
        for _ in 0..2 * self.pairs.len() {
            profile = profile.queue(QUEUE_SIZE);
        }
        let profile = profile.queue(CONTROL_SIZE).features(features(to_host, &TO_HOST) | features(to_guest, &TO_GUEST));
        let profile = profile.features(MAC | MTU | STATUS | MRG_RXBUF | CTRL_VQ | CTRL_GUEST_OFFLOADS);
        if self.pairs.len() > 1 { profile.features(MQ) } else { profile }
    }

    fn started(&mut self, io: &mut DeviceIo) -> io::Result<()> {
        self.active = 1;
        self.agree(Agreed { to_host: offloads(io.features(), &TO_HOST), to_guest: offloads(io.features(), &TO_GUEST) });
        for (number, pair) in (0..).zip(&self.pairs) {
            io.watch(pair.backend.fd(), number, crate::event::Interest::IN)?;
        }
        Ok(())
    }

    fn ready(&mut self, io: &mut DeviceIo, source: Source) {
        match source {
            Source::Queue(queue) if queue == self.control_queue(io) => self.control(io, queue),
            Source::Queue(queue) if queue % 2 == 1 => {
                self.transmit(io, queue / 2);
                self.deliver(io, queue / 2);
            }
            Source::Queue(queue) => {
                // Those of pairs that are not used arrive there too.
                for number in (queue / 2..self.pairs.len()).step_by(self.active.max(1)) {
                    self.deliver(io, number);
                }
            }
            Source::Watched { number, .. } => {
                let number = number as usize;
                let Some(pair) = self.pairs.get_mut(number) else { return };
                pair.backend.turn();
                self.transmit(io, number);
                self.deliver(io, number);
            }
        }
    }

    fn stopping(&mut self, io: &mut DeviceIo) {
        for pair in &mut self.pairs {
            io.unwatch(pair.backend.fd());
            pair.held = None;
            pair.room.clear();
        }
    }
}
