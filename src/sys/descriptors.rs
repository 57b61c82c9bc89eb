//! Descriptors that guests may take of those that the process may have, so that the embedder always finds some.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, Ordering};

/// What is kept for the embedder; [`u32::MAX`] is what [`default_reserve`] says.
static RESERVE: AtomicU32 = AtomicU32::new(u32::MAX);

/// Keeps `count` of the descriptors that this process may have (`RLIMIT_NOFILE`) from its guests; of all VMs together.
///
/// Connections and datagrams of a [`Net::user`](crate::Net::user), and those that guests make over vsock, take descriptors of the
/// process. When no more than `count` are left, further ones are refused to the guest. Those of a network are counted in
/// [`NetStats::limited`](crate::NetStats::limited); over vsock the guest sees a reset. What the process itself opens is not
/// affected.
///
/// One [`Net::user`](crate::Net::user) takes half of the rest at most, whatever its guest does; so two that take all they can
/// leave others none. Connections over vsock have no such share.
///
/// Unless set, a quarter of them is kept, but at least 256, and never more than half. Takes effect at once.
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

/// What one guest's network may have: half of what all guests may, so that none takes it all.
pub(crate) fn guest_share() -> usize {
    usize::try_from(guests() / 2).unwrap_or(usize::MAX)
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
    fn a_part_is_kept_of_any_number() {
        let kept = [0, 64, 256, 1024, 4096, 1 << 20].map(default_reserve);
        assert_eq!(kept, [0, 32, 128, 256, 1024, 1 << 18]);
    }
}
