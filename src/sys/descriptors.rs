//! Counts the descriptors that guests hold, so that the embedder always has some.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// What is kept for the embedder; [`u32::MAX`] is what [`default_reserve`] says.
static RESERVE: AtomicU32 = AtomicU32::new(u32::MAX);

/// Keeps `count` of this process's descriptors (`RLIMIT_NOFILE`) from its guests.
///
/// It holds for all VMs together, and takes effect at once. Connections and datagrams of a
/// [`Net::user`](crate::Net::user), and connections that guests make over vsock, take descriptors of the process. When
/// no more than `count` are left, further ones are refused to the guest. Those of a network are counted in
/// [`NetStats::limited`](crate::net::NetStats::limited); over vsock the guest sees a reset. What the process itself opens is
/// not affected.
///
/// One guest takes half of the rest at most, over its networks and vsock together.
/// [`VmBuilder::descriptors`](crate::VmBuilder::descriptors) sets another share. So two guests that take all they can
/// leave others none.
///
/// By default a quarter of the process's descriptors is kept, but at least 256, and never more than half.
pub fn set_descriptor_reserve(count: u32) {
    RESERVE.store(count.min(u32::MAX - 1), Ordering::Relaxed);
}

fn default_reserve(limit: u64) -> u64 {
    (limit / 4).max(256).min(limit / 2)
}

/// How many descriptors the process may have.
fn limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is valid for writes across the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => limit.rlim_cur,
        // It is always there; nothing is left for guests if it is not.
        _ => 0,
    }
}

/// Whether a guest may have `fd`, which was just opened. Of those that are free the kernel gives the lowest: so at least as many
/// are open as its number says.
pub(crate) fn is_spare(fd: impl AsFd) -> bool {
    u64::try_from(fd.as_fd().as_raw_fd()).is_ok_and(|number| number < guests())
}

/// The descriptors that one guest may hold for its connections, and those that it does. Clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct DescriptorShare(Arc<Share>);

#[derive(Debug, Default)]
struct Share {
    held: AtomicUsize,
    most: Option<u32>,
    /// Networks leave a part of it to vsock, by which the embedder reaches the guest.
    vsock: bool,
}

impl DescriptorShare {
    /// At most so many; half of what all guests may have where none is said, so that none takes it all.
    pub(crate) fn new(most: Option<u32>, vsock: bool) -> Self {
        Self(Arc::new(Share { held: AtomicUsize::new(0), most, vsock }))
    }

    /// What a network holds of it.
    pub(crate) fn network(&self) -> HeldDescriptors {
        HeldDescriptors { share: self.clone(), count: 0, network: true }
    }

    /// What a connection over vsock holds of it, which is `count`. `None` without room.
    pub(crate) fn vsock(&self, count: usize) -> Option<HeldDescriptors> {
        let mut held = HeldDescriptors { share: self.clone(), count: 0, network: false };
        held.has_room(count).then(|| {
            held.set(count);
            held
        })
    }

    fn most(&self) -> usize {
        self.0.most.map_or_else(|| usize::try_from(guests() / 2).unwrap_or(usize::MAX), |most| most as usize)
    }
}

/// What is held of a [`DescriptorShare`]; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct HeldDescriptors {
    share: DescriptorShare,
    count: usize,
    network: bool,
}

impl HeldDescriptors {
    pub(crate) fn has_room(&self, more: usize) -> bool {
        let most = self.share.most();
        let kept = if self.network && self.share.0.vsock { most / 8 } else { 0 };
        self.share.0.held.load(Ordering::Relaxed).saturating_add(more) <= most - kept
    }

    /// From now on it is so many.
    pub(crate) fn set(&mut self, count: usize) {
        if count == self.count {
            return;
        }
        self.share.0.held.fetch_add(count, Ordering::Relaxed);
        self.share.0.held.fetch_sub(self.count, Ordering::Relaxed);
        self.count = count;
    }

    pub(crate) fn add(&mut self, more: usize) {
        self.set(self.count + more);
    }
}

impl Drop for HeldDescriptors {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What all guests may have, and the process with them.
fn guests() -> u64 {
    let limit = limit();
    let reserve = match RESERVE.load(Ordering::Relaxed) {
        u32::MAX => default_reserve(limit),
        set => set.into(),
    };
    limit.saturating_sub(reserve)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_and_vsock_share_one_descriptor_limit() {
        let share = DescriptorShare::new(Some(16), true);
        let (mut first, mut second) = (share.network(), share.network());
        first.set(8);
        second.add(5);
        assert!(second.has_room(1) && !second.has_room(2), "an eighth is for vsock");
        let stream = share.vsock(2).unwrap();
        assert!(!second.has_room(1) && share.vsock(2).is_none());
        first.set(6);
        assert!(share.vsock(3).is_some() && share.vsock(4).is_none());
        drop((first, stream));
        second.set(0);
        assert!(share.vsock(16).is_some() && share.vsock(17).is_none());
        // Without vsock nothing is kept for it.
        assert!(DescriptorShare::new(Some(16), false).network().has_room(16));
    }

    #[test]
    fn descriptor_reserve_is_kept_for_any_limit() {
        let kept = [0, 64, 256, 1024, 4096, 1 << 20].map(default_reserve);
        assert_eq!(kept, [0, 32, 128, 256, 1024, 1 << 18]);
    }
}
