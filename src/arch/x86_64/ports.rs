//! The ports of a machine, and exits of vCPUs that only this processor has.

use std::ops::Range;

use crate::bus::{Attached, Bus, BusView};
use crate::error::Result;
use crate::kvm::ArchExit;
use crate::legacy::GuestEnd;

/// What answers at ports.
#[derive(Debug, Default)]
pub(crate) struct PlatformBus(Bus);

impl PlatformBus {
    pub(super) fn attach(&self, ports: Range<u64>, device: Attached) -> Result<()> {
        self.0.attach(ports, device)
    }

    /// Returns a view of the ports alone, as tests have no exits.
    #[cfg(test)]
    pub(super) fn ports(&self) -> BusView<'_> {
        self.0.view()
    }

    /// Returns a view for the thread of one vCPU.
    pub(crate) fn view(&self) -> PlatformBusView<'_> {
        PlatformBusView(self.0.view())
    }
}

/// The same, as the thread of one vCPU sees it.
pub(crate) struct PlatformBusView<'a>(BusView<'a>);

impl PlatformBusView<'_> {
    /// Serves one exit, as a part of the loop of the vCPU's thread. Returns how the guest ended, and words for it, when it cannot go on.
    #[inline]
    pub(crate) fn serve(&mut self, exit: ArchExit<'_>) -> Option<(GuestEnd, &'static str)> {
        match exit {
            ArchExit::PortIn { port, width, data } => {
                for access in data.chunks_mut(width) {
                    self.0.read(port.into(), access);
                }
                None
            }
            ArchExit::PortOut { port, width, data } => {
                for access in data.chunks(width) {
                    self.0.write(port.into(), access);
                }
                None
            }
            ArchExit::TripleFault => Some((GuestEnd::TripleFault, "triple fault (KVM_EXIT_SHUTDOWN)")),
            ArchExit::Halt => Some((GuestEnd::Halt, "HLT with nothing to wake it")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::bus::BusDevice;

    /// Counts what it is asked for, and keeps what it is given.
    #[derive(Default)]
    struct Recorder {
        reads: u8,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, _: u64, data: &mut [u8]) {
            self.reads += 1;
            data.fill(self.reads);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn repeated_port_accesses_are_served_one_by_one() {
        let (bus, device) = (PlatformBus::default(), Arc::new(Mutex::new(Recorder::default())));
        bus.attach(0x100..0x108, device.clone()).unwrap();
        let (mut ports, mut answer) = (bus.view(), [0; 6]);
        assert!(ports.serve(ArchExit::PortIn { port: 0x102, width: 2, data: &mut answer }).is_none());
        assert_eq!(answer, [1, 1, 2, 2, 3, 3]);
        assert!(ports.serve(ArchExit::PortOut { port: 0x104, width: 1, data: b"ab" }).is_none());
        assert_eq!(device.lock().unwrap().written, [(4, b"a".to_vec()), (4, b"b".to_vec())]);
        // Nothing is there.
        assert!(ports.serve(ArchExit::PortIn { port: 0x108, width: 4, data: &mut answer[..4] }).is_none());
        assert_eq!(answer[..4], [0xff; 4]);
    }

    #[test]
    fn exits_that_a_guest_cannot_leave_are_ends() {
        let bus = PlatformBus::default();
        let end = |exit| bus.view().serve(exit).map(|(end, _)| end);
        assert_eq!(end(ArchExit::TripleFault), Some(GuestEnd::TripleFault));
        assert_eq!(end(ArchExit::Halt), Some(GuestEnd::Halt));
    }
}
