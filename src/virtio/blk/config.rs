//! The configuration of a disk: features and configuration space (Virtio 1.3, 5.2.3, 5.2.4).

use super::backend::Geometry;
use super::limit::DiskLimit;
use super::policy::ErrorPolicy;
use super::request::{ID_LEN, MAX_DISCARD, MAX_RANGES, MAX_ZEROES};
use super::reserve::Reserve;
use super::{QUEUE_SIZE, SECTOR};
use crate::virtio::{ConfigSpace, DeviceId};

/// What moves a disk's bytes; a config value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum IoEngine {
    /// [`IoEngine::IoUring`] where the host has io_uring and lets this process use it, else [`IoEngine::Threads`].
    #[default]
    Auto,
    /// io_uring: many requests at once without a thread for them. Needs Linux 5.6.
    ///
    /// Where it cannot be used, the disk uses a thread instead and an event says why.
    IoUring,
    /// A thread of the disk's own, which does one request after the other.
    Threads,
}

/// What a guest's flush means; a config value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum CacheMode {
    /// It is answered when everything written before is on stable storage.
    #[default]
    Durable,
    /// It is answered at once, and nothing is ever brought to stable storage.
    ///
    /// When the host crashes or loses power, the disk may hold anything. For disks that are not needed after that.
    Unsafe,
}

/// What a disk is configured to be.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    /// By which events and errors call it.
    pub device: DeviceId,
    /// What the guest sees as its serial number; cut after 20 bytes.
    pub serial: String,
    pub queues: u16,
    pub engine: IoEngine,
    pub cache: CacheMode,
    pub policy: ErrorPolicy,
    pub limit: DiskLimit,
    /// With less space than this left on the host, in bytes, the embedder is warned.
    pub min_free_space: Option<u64>,
    /// What is left of the host's space.
    pub reserve: Reserve,
}

/// Feature bits (Virtio 1.3, 5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
pub(super) const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
pub(super) const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
pub(super) const F_CONFIG_WCE: u64 = 1 << 11;
pub(super) const F_MQ: u64 = 1 << 12;
pub(super) const F_DISCARD: u64 = 1 << 13;
pub(super) const F_WRITE_ZEROES: u64 = 1 << 14;

/// Buffers in one request, beside its header and its status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Fields of the configuration space (Virtio 1.3, 5.2.4).
pub(super) const CAPACITY: usize = 0;
pub(super) const WRITEBACK: usize = 32;

impl Options {
    /// The `n`th disk, whose name is its serial number, with everything as it is by default.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn new(n: usize) -> Self {
        let device = DeviceId::Disk(n);
        Self {
            device,
            serial: device.to_string(),
            queues: 1,
            engine: IoEngine::Auto,
            cache: CacheMode::Durable,
            policy: ErrorPolicy::default(),
            limit: DiskLimit::none(),
            min_free_space: None,
            reserve: Reserve::Nothing,
        }
    }

    pub(super) fn serial_bytes(&self) -> [u8; ID_LEN] {
        let mut bytes = [0; ID_LEN];
        bytes.iter_mut().zip(self.serial.bytes()).for_each(|(to, byte)| *to = byte);
        bytes
    }

    pub(super) fn features(&self, shape: &Geometry) -> u64 {
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE;
        if shape.read_only {
            features |= F_RO;
        } else {
            features |= F_WRITE_ZEROES | if shape.discard > 0 { F_DISCARD } else { 0 };
        }
        features | if self.queues > 1 { F_MQ } else { 0 }
    }

    /// Virtio 1.3, 5.2.4, virtio_blk_config.
    pub(super) fn config_space(&self, shape: &Geometry) -> ConfigSpace {
        let discard = if shape.read_only { 0 } else { u64::from(shape.discard) };
        let sectors = u32::try_from(discard / SECTOR).unwrap_or(u32::MAX).max(1);
        let mut bytes = Vec::with_capacity(60);
        let mut put = |field: &[u8]| bytes.extend_from_slice(field);
        put(&(shape.len / SECTOR).to_le_bytes());
        put(&0u32.to_le_bytes()); // size_max: any
        put(&SEG_MAX.to_le_bytes());
        put(&[0; 4]); // geometry: none
        put(&(SECTOR as u32).to_le_bytes()); // blk_size
        // Topology: physical blocks of 2^3 sectors, aligned, in which the host's caches and file systems work.
        put(&[3, 0]);
        put(&8u16.to_le_bytes()); // min_io_size
        put(&0u32.to_le_bytes()); // opt_io_size: none
        put(&[1, 0]); // writeback, unused
        put(&self.queues.to_le_bytes());
        let (most, ranges) = if discard > 0 { (MAX_DISCARD, MAX_RANGES) } else { (0, 0) };
        put(&most.to_le_bytes());
        put(&ranges.to_le_bytes());
        put(&if discard > 0 { sectors } else { 0 }.to_le_bytes());
        let (most, ranges) = if shape.read_only { (0, 0) } else { (MAX_ZEROES, MAX_RANGES) };
        put(&most.to_le_bytes());
        put(&ranges.to_le_bytes());
        put(&[u8::from(discard > 0), 0, 0, 0]); // write_zeroes_may_unmap
        ConfigSpace::new(bytes).writable(WRITEBACK..WRITEBACK + 1)
    }
}
