//! The register by which a guest's kernel reports a panic (QEMU, docs/specs/pvpanic).
//!
//! It is for kernels whose console nothing reads.

use crate::bus::BusDevice;

/// The guest has panicked and will do nothing more about it.
const PANICKED: u8 = 1 << 0;
/// The guest has panicked and runs a crash kernel now, which will end the machine when it is done.
const CRASH_LOADED: u8 = 1 << 1;

/// The device: calls `on_panic` on the vCPU's thread.
pub(crate) struct PanicPort<F>(F);

impl<F: FnMut() + Send> PanicPort<F> {
    /// How many registers it has, of one byte each.
    pub(crate) const LEN: u64 = 1;

    pub(crate) fn new(on_panic: F) -> Self {
        Self(on_panic)
    }
}

impl<F: FnMut() + Send> BusDevice for PanicPort<F> {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        if let Some(byte) = data.first_mut() {
            *byte = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _: u64, data: &[u8]) {
        match data.first() {
            Some(events) if events & PANICKED != 0 => (self.0)(),
            Some(events) if events & CRASH_LOADED != 0 => log::info!("the guest panicked and runs its crash kernel"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_is_reported_unless_a_crash_kernel_handles_it() {
        let mut reports = 0;
        let mut port = PanicPort::new(|| reports += 1);
        let mut events = [0];
        port.read(0, &mut events);
        assert_eq!(events, [3]);
        [&[][..], &[0], &[2], &[4], &[1]].into_iter().for_each(|data| port.write(0, data));
        assert_eq!(reports, 1);
    }
}
