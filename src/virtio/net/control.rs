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
        io.drain(queue, |chain| {
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
                self.agree(Capabilities { to_guest: whole(offloads(wanted, &TO_GUEST)), ..self.agreed });
                Some(())
            }
            _ => None,
        }
    }
}
