//! Numbers of the specification that more than one file needs.

/// Which device it is (Virtio 1.3, 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum DeviceType {
    /// Network device (Virtio 1.3, 5.1).
    Net = 1,
    /// Block device (Virtio 1.3, 5.2).
    Block = 2,
    /// Console (Virtio 1.3, 5.3).
    Console = 3,
    /// Entropy (Virtio 1.3, 5.4).
    Entropy = 4,
    /// Memory balloon (Virtio 1.3, 5.5).
    Balloon = 5,
    /// Socket (Virtio 1.3, 5.10).
    Vsock = 19,
}

/// Drivers may put descriptor tables into buffers (Virtio 1.3, 6).
pub(crate) const F_INDIRECT_DESC: u64 = 1 << 28;
/// Suppression of notifications by ring index (Virtio 1.3, 6).
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device; a driver that refuses this gets no device (Virtio 1.3, 6).
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// What the transport offers for every device.
pub(crate) const TRANSPORT_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// Device status bits (Virtio 1.3, 2.1).
pub(crate) mod status {
    pub(crate) const DRIVER: u32 = 2;
    pub(crate) const DRIVER_OK: u32 = 4;
    pub(crate) const FEATURES_OK: u32 = 8;
    pub(crate) const NEEDS_RESET: u32 = 64;
}
