//! Exits that only this processor has.

use crate::kvm::vcpu::RunPage;

/// Why `KVM_RUN` came back. The slices are KVM's own buffer: an `In` answer is what the guest will see.
#[derive(Debug)]
pub(crate) enum ArchExit<'a> {
    /// The guest reads ports: `data` is one or more accesses of `width` bytes each.
    PortIn { port: u16, width: usize, data: &'a mut [u8] },
    /// The guest writes ports, likewise.
    PortOut { port: u16, width: usize, data: &'a [u8] },
    /// A triple fault (KVM_EXIT_SHUTDOWN).
    TripleFault,
    /// HLT outside the in-kernel interrupt controller's control.
    Halt,
}

impl<'a> ArchExit<'a> {
    /// Returns what the vCPU of `page` has just reported, if it is one of these.
    #[inline]
    pub(in crate::kvm) fn new(exit: kvm_ioctls::VcpuExit<'a>, page: &RunPage) -> Option<Self> {
        use kvm_ioctls::VcpuExit as Exit;
        Some(match exit {
            Exit::IoIn(port, data) => Self::PortIn { port, width: page.port_width(), data },
            Exit::IoOut(port, data) => Self::PortOut { port, width: page.port_width(), data },
            Exit::Shutdown => Self::TripleFault,
            Exit::Hlt => Self::Halt,
            _ => return None,
        })
    }

    /// Whether the guest accesses a port.
    #[inline]
    pub(crate) fn is_port_access(&self) -> bool {
        matches!(self, Self::PortIn { .. } | Self::PortOut { .. })
    }
}

impl RunPage {
    /// The width of the port access that KVM just reported (KVM API, 5, KVM_EXIT_IO).
    #[inline]
    fn port_width(&self) -> usize {
        // SAFETY: `self` keeps the page mapped. After KVM_EXIT_IO the kernel has written the `io` member, whose
        // fields are plain integers, and does not touch it before the next KVM_RUN.
        usize::from(unsafe { (&raw const (*self.as_ptr()).__bindgen_anon_1.io.size).read_volatile() }).max(1)
    }
}
