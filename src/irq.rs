//! An interrupt line, and how often it was raised.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Raised by the device's thread. Clones are the same line.
#[derive(Clone)]
pub(crate) struct IrqLine(Arc<Line>);

struct Line {
    edge: Box<dyn Fn() + Send + Sync>,
    raised: AtomicU64,
}

impl IrqLine {
    /// `edge` raises it on the calling thread, so it must not block.
    pub(crate) fn new(edge: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(Line { edge: Box::new(edge), raised: AtomicU64::new(0) }))
    }

    /// Raises it once, as an edge.
    pub(crate) fn pulse(&self) {
        self.0.raised.fetch_add(1, Ordering::Relaxed);
        (self.0.edge)();
    }

    /// Returns how often it was raised.
    pub(crate) fn raised(&self) -> u64 {
        self.0.raised.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqLine({})", self.raised())
    }
}
