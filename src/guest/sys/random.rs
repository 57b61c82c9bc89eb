//! The kernel's random numbers (random(4)).

use super::{O_CLOEXEC, O_NOFOLLOW, O_NONBLOCK, O_WRONLY, Result, nr, syscall};
use crate::proto::SEED_SIZE;

/// `_IOW('R', 0x03, int [2])`: adds bytes that count as random.
const RNDADDENTROPY: usize = 0x4008_5203;
/// `_IO('R', 0x07)`: makes the generator take what was added.
const RNDRESEEDCRNG: usize = 0x5207;

/// struct rand_pool_info (Linux, include/uapi/linux/random.h)
#[repr(C)]
struct RandomPoolInfo {
    /// In bits.
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; SEED_SIZE],
}

/// Makes the kernel's random numbers new, by secret bytes. Programs get such numbers from the next call on.
pub fn reseed(seed: &[u8; SEED_SIZE]) -> Result<()> {
    // A program may have put something else there: a pipe without a reader would be waited for.
    let flags = O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC;
    let random = super::open(None, c"/dev/urandom", flags)?;
    let info = RandomPoolInfo { entropy_count: 8 * SEED_SIZE as i32, buf_size: SEED_SIZE as i32, buf: *seed };
    // SAFETY: the kernel reads one struct of that size, which lives until the call returns.
    unsafe { call!(nr::IOCTL, random.arg(), RNDADDENTROPY, &raw const info as usize) }?;
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::IOCTL, random.arg(), RNDRESEEDCRNG, 0) }.map(drop)
}
