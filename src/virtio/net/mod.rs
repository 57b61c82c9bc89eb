//! Network device (Virtio 1.3, 5.1): moves a guest's frames to and from its backends. Runs on the VM's loop.
//!
//! Each pair of queues has a [`NetBackend`](crate::network::NetBackend) of its own. Frames go from guest memory to the
//! backend and back without a copy here. A frame that is larger than the guest's buffers is spread over several
//! (mergeable buffers).

mod control;
mod limit;
mod rx;
#[cfg(test)]
mod tests;

use super::DeviceEvent;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::network::{
    BackendKind, Capabilities, CaptureRecorder, FRAME_MAX, Frame, Gso, GsoKind, HEADER_LEN, Mac, NetStats, Offload,
    Offloads, UserStack,
};

use super::chain::Span;
use super::{
    Chain, ConfigSpace, DeviceIo, DeviceState, DeviceType, DrainCause, EventSource, Profile, VirtioDevice, Work,
};
pub use limit::NetLimit;
use limit::{Direction, RateLimiters, cost};
use rx::{RxDone, RxFill, RxQueue, RxSpace};

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
/// The most pairs of queues (Virtio 1.3, 5.1.4: 1 to 32768).
pub(crate) const PAIRS_MAX: usize = 32;
/// What is watched beside the pairs' backends.
const TIMER: u32 = PAIRS_MAX as u32;

fn features(offloads: Offloads, table: &[(Offloads, u64)]) -> u64 {
    table.iter().filter(|(offload, _)| offloads.contains(*offload)).fold(0, |bits, (_, bit)| bits | bit)
}

fn offloads(features: u64, table: &[(Offloads, u64)]) -> Offloads {
    table.iter().filter(|(_, bit)| features & bit == *bit).fold(Offloads::none(), |all, (offload, _)| all | *offload)
}

/// Who cuts makes checksums too (Virtio 1.3, 5.1.3.1).
fn whole(offloads: Offloads) -> Offloads {
    if offloads.contains(Offloads::CSUM) { offloads } else { Offloads::none() }
}

/// A frame of the guest that waits for a limit, or that its backend could not take yet.
#[derive(Debug)]
struct Held {
    chain: Chain,
    frame: Span,
    offload: Offload,
    /// It has met the limits.
    paid: bool,
}

/// A pair of queues, and what carries their frames.
#[derive(Debug)]
struct Pair {
    backend: BackendKind,
    held: Option<Held>,
    waiting: RxQueue,
    /// The backend is at its end, and not asked any more.
    lost: bool,
}

/// What a driver has chosen by the control queue.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct NetState {
    pub active_pairs: u16,
    /// Bits of features: the offloads that it takes.
    pub guest_offloads: u64,
}

/// The device.
pub(crate) struct Net {
    pairs: Vec<Pair>,
    space: ConfigSpace,
    capabilities: Capabilities,
    /// So many of the pairs the driver uses.
    active: usize,
    agreed: Capabilities,
    /// Bits of features: the offloads that the driver takes now (Virtio 1.3, 5.1.6.5.6).
    guest_offloads: u64,
    up: bool,
    /// A backend is at its end, so that the cable stays out.
    gone: bool,
    /// Frames of the guest that made no sense.
    dropped: u64,
    limiters: RateLimiters,
    capture: Option<CaptureRecorder>,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Net({:?})", self.pairs)
    }
}

impl Net {
    /// Returns a device with this address, for packets of at most `mtu` bytes. Its backends are alike, one for each
    /// pair of queues. When one of them cannot go on, the cable is out.
    pub(crate) fn new(backends: Vec<BackendKind>, mac: Mac, mtu: u16) -> Self {
        let capabilities = backends.first().map(|backend| backend.capabilities()).unwrap_or_default();
        let Capabilities { to_host, to_guest } = capabilities;
        let capabilities = Capabilities { to_host: whole(to_host), to_guest: whole(to_guest) };
        let pairs =
            backends.into_iter().map(|backend| Pair { backend, held: None, waiting: RxQueue::default(), lost: false });
        let pairs: Vec<_> = pairs.collect();
        let count = pairs.len() as u16;
        let fields = [mac.0.to_vec(), LINK_UP.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()];
        let space = ConfigSpace::new([fields.concat(), mtu.to_le_bytes().to_vec()].concat());
        Self {
            pairs,
            space,
            capabilities,
            active: 1,
            agreed: Capabilities::default(),
            guest_offloads: 0,
            up: true,
            gone: false,
            dropped: 0,
            limiters: RateLimiters::new(),
            capture: None,
        }
    }

    /// Records what is sent and received.
    pub(crate) fn captured_by(mut self, recorder: Option<CaptureRecorder>) -> Self {
        self.capture = recorder;
        self
    }

    /// Changes the limits. What waits is looked at anew at once.
    pub(crate) fn set_limit(&mut self, limit: &NetLimit) {
        self.limiters.set(limit);
    }

    /// What its backend has done, where it counts.
    pub(crate) fn stats(&self) -> Option<NetStats> {
        self.pairs.first()?.backend.stats()
    }

    /// Plugs the cable in or out. Without one, nothing is delivered, and what the guest sends is lost.
    pub(crate) fn set_link(&mut self, io: Option<&mut DeviceIo>, up: bool) {
        let up = up && !self.gone;
        self.up = up;
        self.space.set(STATUS_AT, &if up { LINK_UP } else { 0 }.to_le_bytes());
        let Some(io) = io else { return };
        io.config_changed();
        (0..self.pairs.len()).for_each(|number| self.exchange(io, number));
    }

    /// Calls the user-mode stack behind the card; `None` when there is another backend. What it then has for the guest is
    /// delivered.
    pub(crate) fn with_user<R>(&mut self, io: Option<&mut DeviceIo>, f: impl FnOnce(&mut UserStack) -> R) -> Option<R> {
        let answer = f(self.pairs.first_mut()?.backend.user()?);
        if let Some(io) = io {
            self.exchange(io, 0);
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

    fn agree(&mut self, agreed: Capabilities) {
        self.agreed = agreed;
        self.pairs.iter_mut().for_each(|pair| pair.backend.negotiated(agreed));
    }

    /// Moves what a pair of queues has to move, both ways. The driver is notified of both at once.
    fn exchange(&mut self, io: &mut DeviceIo, number: usize) {
        self.transmit(io, number);
        self.deliver(io, number);
        self.report_denials(io, number);
        io.flush(&[2 * number + 1, self.arrivals(number)]);
    }

    /// Reports what a policy has denied meanwhile.
    fn report_denials(&mut self, io: &DeviceIo, number: usize) {
        let stack = self.pairs.get_mut(number).and_then(|pair| pair.backend.user());
        if let Some(stack) = stack {
            stack.take_denials().for_each(|denial| io.report(DeviceEvent::Denied(denial)));
        }
    }

    /// The queue in which a pair's frames arrive: those of pairs that the driver does not use arrive at those it does.
    fn arrivals(&self, number: usize) -> usize {
        2 * (number % self.active.max(1))
    }

    /// Takes what the guest sends.
    fn transmit(&mut self, io: &mut DeviceIo, number: usize) {
        let queue = 2 * number + 1;
        let (up, agreed) = (self.up, self.agreed.to_host);
        let Some(pair) = self.pairs.get_mut(number) else { return };
        loop {
            let held = pair.held.take().or_else(|| {
                let mut chain = io.pop(queue)?;
                let header = chain.read::<HEADER_LEN>().ok().filter(|_| chain.readable_len() <= FRAME_MAX);
                let len = chain.readable_len();
                let frame = chain.take_readable(len);
                let offload = header.and_then(|header| Offload::parse(&header, len, agreed).ok());
                match offload {
                    Some(offload) => Some(Held { chain, frame, offload, paid: false }),
                    None => {
                        self.dropped += 1;
                        io.complete(queue, chain);
                        None
                    }
                }
            });
            let Some(mut held) = held else {
                if io.rearm(queue) {
                    continue;
                }
                return;
            };
            let len = frame_len(&held);
            if up && !held.paid {
                if !self.limiters.open(io, Direction::Sent) {
                    pair.held = Some(held);
                    return;
                }
                self.limiters.take(Direction::Sent, cost(len, held.offload));
                held.paid = true;
            }
            charge(io, len, held.offload);
            let Held { chain, frame, offload, .. } = &held;
            let pieces = chain.readable(*frame);
            let sent = if up { pair.backend.send(Frame::new(chain.memory(), pieces, *offload)) } else { Ok(()) };
            io.charge(Work::Calls(pair.backend.take_calls()));
            if let (Some(capture), Ok(()), true) = (&self.capture, &sent, up) {
                capture.record(chain.memory(), pieces, len);
            }
            match sent {
                Ok(()) => io.complete(queue, held.chain),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    pair.held = Some(held);
                    return;
                }
                Err(e) => {
                    io.complete(queue, held.chain);
                    return self.lost(io, number, e);
                }
            }
        }
    }

    /// Gives the guest what a backend has for it.
    fn deliver(&mut self, io: &mut DeviceIo, number: usize) {
        if !self.up {
            return;
        }
        let queue = self.arrivals(number);
        let mergeable = io.features() & feature::MRG_RXBUF != 0;
        let mut waiting =
            self.pairs.get_mut(queue / 2).map(|pair| std::mem::take(&mut pair.waiting)).unwrap_or_default();
        let Some(pair) = self.pairs.get_mut(number) else { return };
        let outcome = loop {
            let Some(len) = pair.backend.next_len().map(|len| len.min(FRAME_MAX)) else { break Ok(()) };
            if io.turn_over() {
                io.reschedule(queue);
                break Ok(());
            }
            match waiting.gather(io, queue, HEADER_LEN + len, mergeable) {
                RxSpace::Enough => {}
                RxSpace::TooLittle => break Ok(()),
                RxSpace::TooSmall => {
                    io.fail(&"a buffer is smaller than the largest frame (Virtio 1.3, 5.1.6.3.1)");
                    break Ok(());
                }
            }
            if !self.limiters.open(io, Direction::Received) {
                break Ok(());
            }
            let filling =
                RxFill { queue, len, mergeable, agreed: self.agreed.to_guest, capture: self.capture.as_ref() };
            match waiting.fill(io, &mut pair.backend, &filling) {
                Ok(RxDone::Frame(received)) => {
                    self.limiters.take(Direction::Received, cost(received.len, received.offload));
                    charge(io, received.len, Offload::default());
                }
                Ok(RxDone::Nothing) => io.charge(Work::Calls(1)),
                Ok(RxDone::Unfit) => {
                    self.dropped += 1;
                    charge(io, len, Offload::default());
                }
                Err(e) => break Err(e),
            }
        };
        if let Some(pair) = self.pairs.get_mut(queue / 2) {
            pair.waiting = waiting;
        }
        if let Err(e) = outcome {
            self.lost(io, number, e);
        }
    }

    /// A backend is at its end: it is not asked any more, and the guest sees a cable that is out.
    fn lost(&mut self, io: &mut DeviceIo, number: usize, error: io::Error) {
        let Some(pair) = self.pairs.get_mut(number) else { return };
        pair.lost = true;
        io.unwatch(pair.backend.fd());
        io.report(DeviceEvent::BackendLost(error));
        self.gone = true;
        self.set_link(Some(io), false);
    }
}

/// A frame of so many bytes goes through a backend. What is cut is as many packets as it is cut into.
fn charge(io: &mut DeviceIo, len: usize, offload: Offload) {
    let packets = match offload.gso {
        Some(Gso { kind: GsoKind::Udp, size, .. }) => len.div_ceil(usize::from(size.max(1))),
        // The host's kernel cuts TCP, at a small part of what a packet of its own costs.
        Some(gso) => 1 + len.div_ceil(usize::from(gso.size.max(1))) / 16,
        None => 1,
    };
    io.charge(Work::Packets(packets));
    io.charge(Work::Bytes(len));
}

fn frame_len(held: &Held) -> usize {
    held.chain.readable(held.frame).iter().map(|piece| piece.len()).sum()
}

impl Drop for Net {
    /// Each backend may be an embedder's, whose drop may panic: two panics at once would end the process.
    fn drop(&mut self) {
        for pair in self.pairs.drain(..) {
            let _ = catch_unwind(AssertUnwindSafe(move || drop(pair)));
        }
    }
}

impl VirtioDevice for Net {
    fn profile(&self) -> Profile {
        use feature::{CTRL_GUEST_OFFLOADS, CTRL_VQ, MAC, MQ, MRG_RXBUF, MTU, STATUS};
        let Capabilities { to_host, to_guest } = self.capabilities;
        let mut profile = Profile::new(DeviceType::Net).config_space(self.space.clone());
        for _ in 0..2 * self.pairs.len() {
            profile = profile.queue(QUEUE_SIZE);
        }
        let profile = profile.queue(CONTROL_SIZE).features(features(to_host, &TO_HOST) | features(to_guest, &TO_GUEST));
        let profile = profile.features(MAC | MTU | STATUS | MRG_RXBUF | CTRL_VQ | CTRL_GUEST_OFFLOADS);
        if self.pairs.len() > 1 { profile.features(MQ) } else { profile }
    }

    fn start(&mut self, io: &mut DeviceIo, state: Option<&DeviceState>) -> io::Result<()> {
        let NetState { active_pairs, guest_offloads } = match state {
            None => NetState { active_pairs: 1, guest_offloads: io.features() },
            Some(DeviceState::Net(state)) => state.clone(),
            Some(other) => return Err(other.mismatch()),
        };
        self.active = usize::from(active_pairs);
        let most = if io.features() & feature::MQ != 0 { self.pairs.len() } else { 1 };
        if !(1..=most).contains(&self.active) {
            let what = format!("{active_pairs} pairs of queues, of {most}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        self.agree(Capabilities {
            to_host: whole(offloads(io.features(), &TO_HOST)),
            to_guest: whole(offloads(guest_offloads & io.features(), &TO_GUEST)),
        });
        self.guest_offloads = guest_offloads & io.features();
        for (number, pair) in (0..).zip(&self.pairs).filter(|(_, pair)| !pair.lost) {
            io.watch(pair.backend.fd(), number, crate::event_loop::Interest::IN)?;
        }
        io.watch_timer(&mut self.limiters.timer, TIMER)
    }

    fn ready(&mut self, io: &mut DeviceIo, source: EventSource) {
        match source {
            EventSource::Queue(queue) if queue == self.control_queue(io) => self.control(io, queue),
            EventSource::Queue(queue) if queue % 2 == 1 => self.exchange(io, queue / 2),
            EventSource::Queue(queue) => {
                // Those of pairs that are not used arrive there too.
                let numbers = (queue / 2..self.pairs.len()).step_by(self.active.max(1));
                numbers.for_each(|number| self.exchange(io, number));
            }
            EventSource::Watched { number: TIMER, .. } => {
                if let Some(timer) = &mut self.limiters.timer {
                    timer.clear();
                }
                (0..self.pairs.len()).for_each(|number| self.exchange(io, number));
            }
            EventSource::Watched { number, .. } => {
                let number = number as usize;
                let Some(pair) = self.pairs.get_mut(number) else { return };
                io.charge(Work::Calls(1));
                pair.backend.poll();
                io.charge(Work::Calls(pair.backend.take_calls()));
                self.exchange(io, number);
            }
            EventSource::Resumed => {}
        }
    }

    fn drain(&mut self, io: &mut DeviceIo, _: Duration, cause: DrainCause) -> bool {
        if cause == DrainCause::Pause {
            // What waits is put back: nothing of it has begun.
            return true;
        }
        // No limit keeps back what is the last.
        self.limiters.set(&NetLimit::none());
        for number in 0..self.pairs.len() {
            // The rest of its queue was seen to before.
            self.transmit(io, number);
            self.report_denials(io, number);
            io.flush(&[2 * number + 1]);
        }
        true
    }

    fn ended(&mut self) {
        self.pairs.iter_mut().for_each(|pair| pair.backend.ended());
    }

    fn stop(&mut self, io: &mut DeviceIo) -> DeviceState {
        if let Some(timer) = &self.limiters.timer {
            io.unwatch(timer.as_fd());
        }
        self.limiters.forget();
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            if !pair.lost {
                io.unwatch(pair.backend.fd());
            }
            if let Some(held) = pair.held.take() {
                io.put_back(2 * number + 1, held.chain);
            }
            for (chain, _) in std::mem::take(&mut pair.waiting).chains {
                io.put_back(2 * number, chain);
            }
        }
        let active_pairs = u16::try_from(self.active).unwrap_or(u16::MAX);
        DeviceState::Net(NetState { active_pairs, guest_offloads: self.guest_offloads })
    }

    fn reset(&mut self) {
        self.limiters.timer = None;
    }
}
