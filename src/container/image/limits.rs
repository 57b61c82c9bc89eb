//! [`ImageLimits`]: how much an archive or a directory may ask for.

use crate::size::Size;

/// Limits on what an image may contain. Preparation fails with `InvalidConfig` beyond one, and names the method.
///
/// They bound what an archive of a stranger takes. With the defaults preparation needs at most about 600 MiB of memory: 400 bytes
/// for each entry, the names, and the attributes. An ordinary image needs a few MiB. Where xz or zstd say so, each of three layers
/// takes up to 128 MiB more while it is read. Space on the disk is bounded by
/// [`Image::max_size`](crate::Image::max_size), time by [`Image::prepare_timeout`](crate::Image::prepare_timeout).
///
/// Compressed content may unpack to [`ImageLimits::max_ratio`] times its size. Holes take nothing on the disk; how large they are is
/// bounded by [`ImageLimits::file_size`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a config value does nothing by itself"]
pub struct ImageLimits {
    pub(super) entries: u64,
    pub(super) depth: u32,
    pub(super) names: Size,
    pub(super) xattrs: Size,
    pub(super) entry_xattrs: Size,
    pub(super) header: Size,
    pub(super) file_size: Size,
    pub(super) ratio: u32,
}

impl Default for ImageLimits {
    fn default() -> Self {
        Self {
            entries: 1_000_000,
            depth: 256,
            names: Size::mib(128),
            xattrs: Size::mib(64),
            entry_xattrs: Size::kib(128),
            header: Size::mib(1),
            file_size: Size::gib(16 << 10),
            ratio: 1200,
        }
    }
}

impl ImageLimits {
    /// Returns the limits that an image has unless [`Image::limits`](crate::Image::limits) sets others.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many entries are read and directories made for them: 1,000,000 unless set. An archive may have four
    /// headers for each.
    pub fn max_entries(mut self, n: u64) -> Self {
        self.entries = n;
        self
    }

    /// Sets how many directories lie in each other at most: 256 unless set. Links that a path leads through are followed first.
    pub fn max_depth(mut self, n: u32) -> Self {
        self.depth = n;
        self
    }

    /// Sets how long all names and link targets are together: 128 MiB unless set.
    pub fn max_names(mut self, size: Size) -> Self {
        self.names = size;
        self
    }

    /// Sets how large all extended attributes are together: 64 MiB unless set.
    pub fn xattrs(mut self, size: Size) -> Self {
        self.xattrs = size;
        self
    }

    /// Limits the extended attributes of an entry or a global header; 128 KiB by default.
    pub fn entry_xattrs(mut self, size: Size) -> Self {
        self.entry_xattrs = size;
        self
    }

    /// Limits each of an archive's long names and extended headers; 1 MiB by default.
    pub fn header(mut self, size: Size) -> Self {
        self.header = size;
        self
    }

    /// Sets how large a file is, holes included: 16 TiB unless set.
    pub fn file_size(mut self, size: Size) -> Self {
        self.file_size = size;
        self
    }

    /// Limits how many times its compressed size content may have; 1,200 by default.
    ///
    /// That is more than gzip can reach. The first 64 MiB are always allowed.
    pub fn max_ratio(mut self, ratio: u32) -> Self {
        self.ratio = ratio;
        self
    }
}
