//! What the embedder asks for: plain values, checked without touching KVM.

use std::collections::BTreeSet;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex};

use super::cgroup::Cgroup;
use super::disk::{Disk, check_serials};
use super::mmio_slots::MmioSlots;
use super::net::{Net, check_addresses};
use crate::arch::layout::{self, MmioSlot};
use crate::arch::{CpuProfile, FirmwareTables, MAX_VCPUS};
use crate::boot::{self, Cmdline, Kernel, Need};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::sys::{DescriptorShare, KickSignal};
use crate::virtio::blk::Blk;

/// Descriptors that a guest needs for its connections.
const MIN_DESCRIPTORS: u32 = 16;

/// Describes where the guest's console goes; a config value.
///
/// The last 64 KiB are kept in any case, for the report of an end.
#[derive(Clone, Default)]
#[must_use = "a config value does nothing by itself"]
pub struct Console {
    pub(super) writer: Option<Arc<Mutex<dyn Write + Send>>>,
}

impl Console {
    /// Sends the console nowhere.
    pub fn none() -> Self {
        Self::default()
    }

    /// Gives all output of `hvc0` and `ttyS0` to `writer`, on a thread of its own.
    ///
    /// It may block without delaying the guest: 256 KiB of later output are kept for it. What is beyond that is lost to
    /// it, and counted in [`DeviceStats::dropped`](crate::stats::DeviceStats::dropped).
    pub fn writer(writer: impl Write + Send + 'static) -> Self {
        Self { writer: Some(Arc::new(Mutex::new(writer))) }
    }
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.writer.is_some() { "Console(writer)" } else { "Console(none)" })
    }
}

/// Describes a vsock device, which connects guest programs and the embedder; a config value.
///
/// The guest's address is CID 3, the host's CID 2. No files, no host vsock module: everything stays in this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct Vsock {
    pub(super) ports: Vec<u32>,
}

impl Vsock {
    /// Describes a device without listeners.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens on `port` from the guest's first instruction on.
    ///
    /// [`Vm::listen_vsock`](crate::Vm::listen_vsock) takes the connections, also earlier ones.
    pub fn listen(mut self, port: u32) -> Self {
        self.ports.push(port);
        self
    }
}

/// Everything about one VM.
#[derive(Debug, Clone)]
pub(super) struct VmConfig {
    pub kernel: Kernel,
    pub vcpus: u32,
    pub cpu: CpuProfile,
    pub memory: Memory,
    pub disks: Vec<Disk>,
    pub nets: Vec<Net>,
    pub console: Console,
    pub vsock: Option<Vsock>,
    pub cgroup: Option<Cgroup>,
    pub kick_signal: u8,
    /// Descriptors of the process that its connections may hold.
    pub descriptors: Option<u32>,
    /// What the layer above needs on the kernel's command line. An empty value is a bare word.
    pub parameters: Vec<(String, String)>,
}

impl VmConfig {
    /// Checks all that needs nothing of the host. A description that was loaded has been through no builder.
    ///
    /// # Errors
    /// `InvalidConfig` names the method whose value cannot be.
    pub(super) fn check(&self) -> Result<()> {
        let vcpus = self.vcpus()?;
        self.cgroup.as_ref().map_or(Ok(()), Cgroup::check)?;
        layout::memory_ranges(self.memory.size())?;
        // So many are not even looked at. With the devices that every machine has, they are counted when all are there.
        let mut free = MmioSlots::new();
        (0..self.disks.len() + self.nets.len()).try_for_each(|_| free.take().map(drop))?;
        check_serials(&self.disks)?;
        for (n, disk) in self.disks.iter().enumerate() {
            disk.options(n).map_err(|e| e.doing(format!("attaching disk {n}")))?;
        }
        check_addresses(&self.nets)?;
        self.descriptors()?;
        for (n, net) in self.nets.iter().enumerate() {
            net.check(vcpus).map_err(|e| e.doing(format!("attaching network {n}")))?;
        }
        let mut ports = BTreeSet::new();
        if let Some(twice) = self.vsock.iter().flat_map(|vsock| &vsock.ports).find(|port| !ports.insert(**port)) {
            let why = format!("vsock: vsock port {twice} has a listener already");
            return Err(Error::new(ErrorKind::AlreadyExists, why));
        }
        KickSignal::check(self.kick_signal)?;
        // Without the devices, whose words are ours.
        self.cmdline(&[])?;
        for (key, value) in &self.parameters {
            if !key.bytes().chain(value.bytes()).all(|byte| byte.is_ascii_graphic()) {
                return Err(Error::invalid("Kernel::cmdline", format!("{key:?}={value:?} is not printable ASCII")));
            }
        }
        Ok(())
    }

    /// The number of vCPUs.
    ///
    /// # Errors
    /// `InvalidConfig` for none or more than a machine holds.
    pub(super) fn vcpus(&self) -> Result<u8> {
        match u8::try_from(self.vcpus) {
            Ok(0) => Err(Error::invalid("vcpus", "0: a machine needs at least one")),
            Ok(n) if n <= MAX_VCPUS => Ok(n),
            _ => Err(Error::invalid("vcpus", format!("{}: a machine holds at most {MAX_VCPUS}", self.vcpus))),
        }
    }

    /// What its connections may hold of the process's descriptors.
    ///
    /// # Errors
    /// `InvalidConfig` for so few that hardly anything works.
    pub(super) fn descriptors(&self) -> Result<DescriptorShare> {
        match self.descriptors {
            Some(few @ ..MIN_DESCRIPTORS) => {
                Err(Error::invalid("descriptors", format!("{few}: a guest needs {MIN_DESCRIPTORS} at least")))
            }
            most => Ok(DescriptorShare::new(most, self.vsock.is_some())),
        }
    }

    /// Opens all disks in their order.
    pub(super) fn open_disks(&self) -> Result<Vec<Blk>> {
        let open = |(n, disk): (usize, &Disk)| disk.attach(n).map_err(|e| e.doing(format!("attaching disk {n}")));
        self.disks.iter().enumerate().map(open).collect()
    }

    /// What the devices need of the kernel's modules. Every machine has a console, an entropy device and a balloon.
    pub(super) fn needs(&self) -> Vec<Need> {
        let disks = (!self.disks.is_empty()).then_some(Need::required("virtio_blk", "VIRTIO_BLK"));
        let vsock = self.vsock.as_ref().map(|_| Need::required("vmw_vsock_virtio_transport", "VIRTIO_VSOCKETS"));
        let always = [
            Need::nice("virtio_console", "VIRTIO_CONSOLE"),
            Need::nice("virtio_rng", "HW_RANDOM_VIRTIO"),
            Need::nice("virtio_balloon", "VIRTIO_BALLOON"),
            Need::nice("pvpanic_mmio", "PVPANIC_MMIO"),
        ];
        let nets = (!self.nets.is_empty()).then_some(Need::required("virtio_net", "VIRTIO_NET"));
        let mmio = [Need::required("virtio_mmio", "VIRTIO_MMIO")];
        mmio.into_iter().chain(disks).chain(nets).chain(vsock).chain(always).collect()
    }

    /// The kernel, with what it needs of its modules in its initramfs.
    pub(super) fn packed_kernel(&self) -> Result<Kernel> {
        let packed = self.kernel.pack_modules(&self.needs())?;
        Ok(self.kernel.clone().with_packed(&packed))
    }

    /// Returns the finished command line, and by what the kernel learns of the machine. It has the devices, where the
    /// kernel takes them from there.
    ///
    /// # Errors
    /// `InvalidConfig` names what in the kernel's command line cannot be.
    pub(super) fn cmdline(&self, slots: &[MmioSlot]) -> Result<(String, FirmwareTables)> {
        let mut cmdline = Cmdline::new(self.kernel.text(), layout::CMDLINE_MAX)?;
        for (key, value) in &self.parameters {
            cmdline.require(key, value)?;
        }
        boot::finish_cmdline(cmdline, &self.kernel, slots)
    }
}
