//! Entropy device (Virtio 1.3, 5.4): fills what the driver offers with the host's random bytes. Runs on the VM's loop.

use super::spec::DeviceType;
use super::{DeviceIo, EventSource, Profile, VirtioDevice, Work};
use crate::sys;

/// Served per request at most, so that a guest cannot keep the loop busy with one descriptor.
const MAX_REQUEST: usize = 64 * 1024;

#[derive(Debug)]
pub(crate) struct Rng;

impl VirtioDevice for Rng {
    fn profile(&self) -> Profile {
        Profile::new(DeviceType::Entropy).queue(64)
    }

    fn ready(&mut self, io: &mut DeviceIo, _: EventSource) {
        io.for_each_request(0, |chain| {
            let asked = chain.writable_len().min(MAX_REQUEST);
            chain.fill_with(MAX_REQUEST, sys::fill_random);
            Work::RandomBytes(asked)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, WRITE};
    use crate::virtio::turn::{MAX_PIECE, MAX_TURN};

    #[test]
    fn rng_fills_every_buffer() {
        let mut driver = Driver::start(Rng);
        driver.send(0, &[], &[16, 5000]);
        driver.dispatch(0);
        let (answer, written) = driver.receive(0).unwrap();
        assert_eq!((answer.len(), written), (5016, 5016));
        assert!(answer.iter().any(|b| *b != 0));
        assert!(driver.interrupted());
    }

    #[test]
    fn many_large_requests_take_many_turns() {
        let mut driver = Driver::start(Rng);
        (0..64).for_each(|_| assert!(driver.send_raw(0, &[(0x100_0000, 1 << 20, WRITE)])));
        let (mut turns, mut back) = (0, 0);
        while back < 64 {
            driver.dispatch(0);
            turns += 1;
            while driver.collect(0).is_some() {
                back += 1;
            }
        }
        assert!(turns > 2, "{turns}");
        assert!(driver.most_work() <= MAX_TURN + MAX_PIECE, "{}", driver.most_work());
    }

    #[test]
    fn large_rng_requests_are_truncated() {
        let mut driver = Driver::start(Rng);
        driver.send(0, &[], &[MAX_REQUEST + 1]);
        driver.dispatch(0);
        assert_eq!(driver.receive(0).unwrap().1 as usize, MAX_REQUEST);
    }
}
