//! What the preparation of one image may take: numbers, bytes and time. Charged before anything is done.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::ImageLimits;
use crate::container::CancelToken;
use crate::error::{Error, ErrorKind, Result};
use crate::size::Size;

/// An entry has its own header, and at most one with its name, one with its link's target and one that extends it.
const HEADERS_PER_ENTRY: u64 = 4;

/// How long a preparation may take, and who can end it.
#[derive(Debug, Clone)]
pub(super) struct PrepareDeadline {
    timeout: Duration,
    /// How its error begins when the time is over.
    late: &'static str,
    /// None: beyond what a clock can show.
    deadline: Option<Instant>,
    /// Each of them ends it.
    cancel: Vec<CancelToken>,
}

impl PrepareDeadline {
    pub(super) fn new<'a>(timeout: Duration, cancel: impl IntoIterator<Item = &'a CancelToken>) -> Self {
        let cancel = cancel.into_iter().cloned().collect();
        Self {
            timeout,
            late: "Image::prepare_timeout: not ready",
            deadline: Instant::now().checked_add(timeout),
            cancel,
        }
    }

    /// A deadline that no method sets, with the beginning of its error.
    pub(super) fn fixed(timeout: Duration, late: &'static str) -> Self {
        Self { late, ..Self::new(timeout, None) }
    }

    /// The same, with another beginning of its error.
    #[cfg(feature = "registry")]
    pub(super) fn late(self, late: &'static str) -> Self {
        Self { late, ..self }
    }

    /// How much of the time is left.
    #[cfg(feature = "registry")]
    pub(super) fn left(&self) -> Duration {
        self.deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// # Errors
    /// `TimedOut` and `Cancelled`.
    pub(super) fn check(&self) -> Result<()> {
        self.cancel.iter().try_for_each(CancelToken::check)?;
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(Error::new(ErrorKind::TimedOut, format!("{} after {:?}", self.late, self.timeout)));
        }
        Ok(())
    }
}

/// A number that only grows, to a limit.
#[derive(Debug)]
struct Account {
    used: Cell<u64>,
    limit: u64,
    /// The method that sets the limit.
    method: &'static str,
}

impl Account {
    fn new(limit: u64, method: &'static str) -> Self {
        Self { used: Cell::new(0), limit, method }
    }

    /// Adds, or says what is too much of.
    fn charge(&self, more: u64, what: impl FnOnce() -> String) -> Result<()> {
        let used = self.used.get().saturating_add(more);
        if used > self.limit {
            return Err(Error::invalid(self.method, what()));
        }
        self.used.set(used);
        Ok(())
    }
}

/// Space on disks that several preparations use together.
#[derive(Debug, Clone)]
pub(super) struct SharedSpace {
    used: Arc<AtomicU64>,
    limit: Size,
}

impl SharedSpace {
    pub(super) fn new(limit: Size) -> Self {
        Self { used: Arc::default(), limit }
    }

    fn charge(&self, bytes: u64) -> Result<()> {
        let add = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit.as_bytes());
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::invalid("Image::max_size", format!("the image has more than {}", self.limit))),
        }
    }
}

/// The limits of one preparation, and what is used of them.
#[derive(Debug)]
pub(super) struct Budget {
    pub limits: ImageLimits,
    entries: Account,
    headers: Account,
    names: Account,
    xattrs: Account,
    space: SharedSpace,
    /// Bytes of `space` that this budget has charged.
    charged: Cell<u64>,
    deadline: PrepareDeadline,
}

impl Budget {
    pub(super) fn new(limits: &ImageLimits, max_size: Size, deadline: &PrepareDeadline) -> Self {
        Self::sharing(limits, SharedSpace::new(max_size), deadline)
    }

    /// The same with space that others use too.
    pub(super) fn sharing(limits: &ImageLimits, space: SharedSpace, deadline: &PrepareDeadline) -> Self {
        Self {
            entries: Account::new(limits.entries, "ImageLimits::max_entries"),
            headers: Account::new(limits.entries.saturating_mul(HEADERS_PER_ENTRY), "ImageLimits::max_entries"),
            names: Account::new(limits.names.as_bytes(), "ImageLimits::max_names"),
            xattrs: Account::new(limits.xattrs.as_bytes(), "ImageLimits::xattrs"),
            space,
            charged: Cell::new(0),
            limits: limits.clone(),
            deadline: deadline.clone(),
        }
    }

    /// To be called for each entry and each MiB of content.
    ///
    /// # Errors
    /// `TimedOut` and `Cancelled`.
    pub(super) fn check(&self) -> Result<()> {
        self.deadline.check()
    }

    pub(super) fn deadline(&self) -> &PrepareDeadline {
        &self.deadline
    }

    /// One more entry read, or inode made.
    pub(super) fn entry(&self) -> Result<()> {
        self.check()?;
        self.entries.charge(1, || format!("the image has more than {} entries", self.limits.entries))
    }

    /// One more header of an archive, of whatever kind.
    pub(super) fn header(&self) -> Result<()> {
        self.check()?;
        let what = || format!("the archive has more headers than {} entries have", self.limits.entries);
        self.headers.charge(1, what)
    }

    /// Bytes of names and link targets, which are kept in memory until the end.
    pub(super) fn names(&self, bytes: usize) -> Result<()> {
        self.names.charge(bytes as u64, || format!("the image has names of more than {}", self.limits.names))
    }

    /// Whether one entry may have so many bytes of extended attributes, names included. Charges nothing.
    pub(super) fn entry_xattrs(&self, bytes: usize) -> Result<()> {
        if bytes as u64 > self.limits.entry_xattrs.as_bytes() {
            let what = format!("its attributes have more than {}", self.limits.entry_xattrs);
            return Err(Error::invalid("ImageLimits::entry_xattrs", what));
        }
        Ok(())
    }

    /// Bytes of extended attributes of one entry, names included.
    pub(super) fn xattrs(&self, bytes: usize) -> Result<()> {
        self.entry_xattrs(bytes)?;
        self.xattrs.charge(bytes as u64, || format!("the image has attributes of more than {}", self.limits.xattrs))
    }

    /// Bytes of the disk.
    pub(super) fn space(&self, bytes: u64) -> Result<()> {
        self.space.charge(bytes)?;
        self.charged.set(self.charged.get().saturating_add(bytes));
        Ok(())
    }

    /// Returns all space that was charged by this budget, as nothing of it is kept.
    pub(super) fn return_space(self) {
        self.space.used.fetch_sub(self.charged.get(), Ordering::Relaxed);
    }

    /// Bytes that a file has, holes included.
    pub(super) fn file_size(&self, bytes: u64) -> Result<()> {
        if bytes > self.limits.file_size.as_bytes() {
            let what = format!("{}: more than {}", Size::bytes(bytes), self.limits.file_size);
            return Err(Error::invalid("ImageLimits::file_size", what));
        }
        Ok(())
    }
}
