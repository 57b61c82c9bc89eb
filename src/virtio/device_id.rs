//! [`DeviceId`]: which virtio device of a VM is meant.

use std::fmt;

/// Names one virtio device of a VM, in events, ends and counters.
///
/// `Display` prints `disk0`, `net0`, `console`, `rng`, `balloon` or `vsock`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DeviceId {
    /// A disk, counted from 0 in the order in which the builder was given them.
    Disk(usize),
    /// A network card, counted likewise.
    Net(usize),
    /// The console.
    Console,
    /// The source of random numbers.
    Rng,
    /// The memory balloon.
    Balloon,
    /// The socket device between guest and host.
    Vsock,
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk(n) => write!(f, "disk{n}"),
            Self::Net(n) => write!(f, "net{n}"),
            Self::Console => f.write_str("console"),
            Self::Rng => f.write_str("rng"),
            Self::Balloon => f.write_str("balloon"),
            Self::Vsock => f.write_str("vsock"),
        }
    }
}
