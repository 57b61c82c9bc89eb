//! [`VmBuilder`]: the configuration of a VM, until `start`.

use super::cgroup::Cgroup;
use super::config::{Console, VmConfig, Vsock};
use super::disk::Disk;
use super::net::Net;
use super::{Vm, machine};
use crate::arch::CpuProfile;
use crate::boot::{Kernel, Need};
use crate::error::{Context, Result};
use crate::memory::Memory;
use crate::size::Size;

/// Builds a VM; see [`Vm::builder`]. Nothing is checked or done before [`VmBuilder::start`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `start`"]
pub struct VmBuilder {
    pub(super) config: VmConfig,
}

impl VmBuilder {
    pub(super) fn new(kernel: Kernel) -> Self {
        let config = VmConfig {
            kernel,
            vcpus: 1,
            cpu: CpuProfile::host(),
            memory: Size::mib(256).into(),
            disks: Vec::new(),
            nets: Vec::new(),
            console: Console::none(),
            vsock: None,
            cgroup: None,
            kick_signal: 10,
            descriptors: None,
            parameters: Vec::new(),
        };
        Self { config }
    }

    /// Sets the number of vCPUs, 1 to 254; 1 by default.
    pub fn vcpus(mut self, n: u32) -> Self {
        self.config.vcpus = n;
        self
    }

    /// Sets the processor that the guest sees; the host's by default.
    pub fn cpu(mut self, profile: CpuProfile) -> Self {
        self.config.cpu = profile;
        self
    }

    /// Sets the guest's memory; 256 MiB by default.
    ///
    /// [`Memory`] also says what the host backs it with; a [`Size`] is [`Memory::anonymous`]. The host gives pages as
    /// they are touched.
    pub fn memory(mut self, memory: impl Into<Memory>) -> Self {
        self.config.memory = memory.into();
        self
    }

    /// Adds a disk. The first is `/dev/vda` in the guest, the second `/dev/vdb`, and so on.
    ///
    /// A machine has interrupt lines for 14 disks and network cards, or 13 beside a vsock device.
    pub fn disk(mut self, disk: impl Into<Disk>) -> Self {
        self.config.disks.push(disk.into());
        self
    }

    /// Adds a network card; without one the guest has no network.
    ///
    /// The first is `eth0` in the guest, the second `eth1`, and so on.
    pub fn net(mut self, net: impl Into<Net>) -> Self {
        self.config.nets.push(net.into());
        self
    }

    /// Sets where the guest's console goes; nowhere by default.
    pub fn console(mut self, console: Console) -> Self {
        self.config.console = console;
        self
    }

    /// Gives the guest a vsock device; none by default.
    pub fn vsock(mut self, vsock: Vsock) -> Self {
        self.config.vsock = Some(vsock);
        self
    }

    /// Puts the VM's threads into a control group of their own; none by default.
    pub fn cgroup(mut self, cgroup: Cgroup) -> Self {
        self.config.cgroup = Some(cgroup);
        self
    }

    /// Sets the signal that takes vCPUs out of the guest: `SIGRTMIN + offset`, 10 by default.
    ///
    /// The signal gets a handler that does nothing, for the whole process; all VMs may share it. Choose another when
    /// the process uses that one itself. The crate's documentation lists what else of the process a VM changes.
    pub fn kick_signal(mut self, offset: u8) -> Self {
        self.config.kick_signal = offset;
        self
    }

    /// Sets how many descriptors the guest's connections may hold at once, at least 16.
    ///
    /// Those are one for each connection and UDP flow of a [`Net::user`], and two for each connection that the guest
    /// makes over vsock. All networks and vsock share them, of which networks leave an eighth to vsock. A connection
    /// beyond is refused. Over a network that looks as if nothing listened, and
    /// [`NetStats::limited`](crate::net::NetStats::limited) counts it; over vsock it is a reset. Connections of the embedder
    /// to the guest do not count.
    ///
    /// By default it is half of what all guests of the process may have; see
    /// [`set_descriptor_reserve`](crate::host::set_descriptor_reserve). All guests together have no more than that, whatever
    /// is set here.
    pub fn descriptors(mut self, count: u32) -> Self {
        self.config.descriptors = Some(count);
        self
    }

    /// What its devices need of the kernel's modules.
    #[cfg(feature = "container")]
    pub(crate) fn needs(&self) -> Vec<Need> {
        self.config.needs()
    }

    /// Sets another kernel.
    #[cfg(feature = "container")]
    pub(crate) fn kernel(mut self, kernel: Kernel) -> Self {
        self.config.kernel = kernel;
        self
    }

    /// Adds a parameter that the layer above needs on the kernel's command line; an empty value is a bare word.
    #[cfg(feature = "container")]
    pub(crate) fn parameter(mut self, key: &'static str, value: &'static str) -> Self {
        self.config.parameters.push((key.into(), value.into()));
        self
    }

    /// Builds the machine and starts it, and returns when all its vCPUs run.
    ///
    /// Blocks for a few milliseconds.
    ///
    /// # Errors
    /// - `InvalidConfig` names the method and the value that cannot work.
    /// - `NotFound`, `PermissionDenied` and `Unsupported` say what this host lacks (see [`Host`](crate::Host)).
    /// - `Unsupported` and `Incompatible` also say what of a [`CpuProfile`] it cannot show.
    /// - `ResourceExhausted` says which limit was met.
    /// - `ResourceBusy` says which disk or device another VM or process holds.
    ///
    /// Nothing is left behind.
    pub fn start(self) -> Result<Vm> {
        let start = || {
            let (spec, live) = self.config.settle()?.split();
            machine::start(&spec.join(live)?)
        };
        start().doing(|| "starting VM")
    }
}
