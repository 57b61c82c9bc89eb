//! The control queue (Virtio 1.3, 5.1.6.5). The driver sets how many pairs of queues it uses, and which offloads it
//! takes.

use super::{Net, TO_GUEST, feature, offloads, whole};
use crate::network::Capabilities;
use crate::virtio::{Chain, DeviceIo, Work};

/// Classes and commands, in the form class, command.
const PAIRS_SET: [u8; 2] = [4, 0];
const GUEST_OFFLOADS_SET: [u8; 2] = [5, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

impl Net {
    pub(super) fn control(&mut self, io: &mut DeviceIo, queue: usize) {
        let features = io.features();
        io.for_each_request(queue, |chain| {
            let answer = if self.command(features, chain).is_some() { OK } else { ERR };
            // A chain without room for an answer gets none.
            let _ = chain.write(&[answer]);
            Work::Chain
        });
    }

    /// Carries one command out. `None` for one that cannot be.
    fn command(&mut self, features: u64, chain: &mut Chain) -> Option<()> {
        match chain.read().ok()? {
            PAIRS_SET if features & feature::MQ != 0 => {
                let pairs = usize::from(u16::from_le_bytes(chain.read().ok()?));
                self.active = Some(pairs).filter(|pairs| (1..=self.pairs.len()).contains(pairs))?;
                Some(())
            }
            GUEST_OFFLOADS_SET if features & feature::CTRL_GUEST_OFFLOADS != 0 => {
                let wanted = u64::from_le_bytes(chain.read().ok()?);
                // Only what was agreed to can be turned on again (Virtio 1.3, 5.1.6.5.6.2).
                if wanted & !features != 0 {
                    return None;
                }
                self.guest_offloads = wanted;
                self.agree(Capabilities { to_guest: whole(offloads(wanted, &TO_GUEST)), ..self.agreed });
                Some(())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::net::UnixStream;

    use crate::network::{BackendKind, Mac, SocketBackend};
    use crate::virtio::net::{Net, NetState};
    use crate::virtio::testing::Driver;
    use crate::virtio::{DeviceState, VirtioDevice};

    #[test]
    fn choices_of_the_control_queue_are_kept_by_a_fresh_device() {
        let nets = || {
            let backend = || BackendKind::other(SocketBackend::new(UnixStream::pair().unwrap().0.into()).unwrap());
            Net::new(vec![backend(), backend()], Mac([2, 0, 0, 0, 0, 1]), 1500)
        };
        let mut driver = Driver::start(nets());
        // Class 4, command 0: two pairs (Virtio 1.3, 5.1.6.5.5).
        let control = 2 * 2;
        driver.send(control, &[&[4, 0, 2, 0]], &[1]);
        driver.dispatch(control);
        assert_eq!(driver.receive(control).unwrap().0, [0]);
        assert_eq!(driver.device.active, 2);
        let mut driver = driver.restart(|_, _| nets());
        assert_eq!(driver.device.active, 2);
        let state = |active_pairs| DeviceState::Net(NetState { active_pairs, guest_offloads: u64::MAX });
        for state in [state(0), state(3), DeviceState::Stateless] {
            let (device, io) = driver.parts();
            device.stop(io);
            assert_eq!(device.start(io, Some(&state)).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        let (device, io) = driver.parts();
        device.start(io, Some(&state(1))).unwrap();
        assert_eq!(device.guest_offloads, io.features(), "no offload that the driver has not accepted");
    }
}
