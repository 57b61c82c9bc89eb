//! [`Turn`]: how much a device may do before others on its loop get their turn.
//!
//! Counted in units of work and not in time, so that tests see the same on every machine. A unit is about a nanosecond
//! of a processor of today. The code that does work charges it; the queues are closed when the turn is over, and are
//! looked at again in the next one.

/// What a turn may cost: [`Turn::over`] from then on.
pub(crate) const MAX_TURN: u64 = 4_000_000;

/// The most that a single piece of work costs. A turn is over after at most [`MAX_TURN`] and this.
#[cfg(any(test, feature = "internals"))]
pub(crate) const MAX_PIECE: u64 = 4_000_000;

/// Something that costs the loop's processor time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// A chain is taken and given back.
    Chain,
    /// So many descriptors are looked at.
    Descriptors(usize),
    /// So many bytes are copied or summed up.
    Bytes(usize),
    /// So many bytes are moved from or to a file, for which pages may have to be found and cleared.
    FileBytes(usize),
    /// So many random bytes are made.
    RandomBytes(usize),
    /// So many system calls that move nothing.
    Calls(usize),
    /// So many packets go through a network of the host.
    Packets(usize),
    /// So many bytes of guest memory are given back to the host.
    Discarded(usize),
}

impl Work {
    #[inline]
    const fn units(self) -> u64 {
        // Lengths are of things in guest memory, so nothing here comes near what a number holds.
        match self {
            Self::Chain => 200,
            Self::Descriptors(n) => (n as u64).wrapping_mul(20),
            Self::Bytes(n) => n as u64 / 8,
            Self::FileBytes(n) => n as u64,
            Self::RandomBytes(n) => (n as u64).wrapping_mul(3),
            Self::Calls(n) => (n as u64).wrapping_mul(2_000),
            Self::Packets(n) => (n as u64).wrapping_mul(5_000),
            Self::Discarded(n) => n as u64 / 20,
        }
    }
}

/// What a device has done since its loop came to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    spent: u64,
    /// The most that any turn has cost.
    #[cfg(any(test, feature = "internals"))]
    most: u64,
}

impl Turn {
    /// The loop has come to the device.
    #[inline]
    pub(super) fn begin(&mut self) {
        #[cfg(any(test, feature = "internals"))]
        {
            self.most = self.most();
        }
        self.spent = 0;
    }

    /// Ends the turn before its time: nothing more is taken from a queue.
    pub(super) fn end(&mut self) {
        self.spent = MAX_TURN;
    }

    /// Charges work that is done or about to be done.
    #[inline]
    pub(super) fn charge(&mut self, work: Work) {
        // A turn's work is far from what the number holds.
        self.spent = self.spent.wrapping_add(work.units());
    }

    /// Whether others must get their turn.
    #[inline]
    pub(crate) fn over(&self) -> bool {
        self.spent >= MAX_TURN
    }

    /// The most that any turn has cost so far.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn most(&self) -> u64 {
        self.most.max(self.spent)
    }
}
