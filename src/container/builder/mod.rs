//! [`ContainerBuilder`]: what a container shall be, until `start`.

mod boot_config;
mod disks;
mod guest_settings;
mod mounts;
mod programs;

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Agent;
use super::defaults::ProgramDefaults;
use super::image::PreparedImage;
use super::{CancelToken, Container, Image, NamedVolume, RunningContainer, WritableLayer};
use crate::boot::{Kernel, Need};
use crate::error::{Context, Result};
use crate::proto::CONTROL_PORT;
use crate::size::Size;
use crate::vm::{Cgroup, Console, CpuProfile, Disk, Memory, Net, Vm, VmBuilder, Vsock};
use boot_config::ShimConfig;
use disks::{Layer, RootDisks};
use guest_settings::GuestSettings;
use mounts::MountSettings;
pub use mounts::Tmpfs;
use programs::ProgramSettings;

/// What the root of a container needs of its kernel.
const FILE_SYSTEMS: [Need; 3] =
    [Need::required("erofs", "EROFS_FS"), Need::required("ext4", "EXT4_FS"), Need::required("overlay", "OVERLAY_FS")];

/// Builds a container; see [`Container::builder`]. Does nothing before [`ContainerBuilder::start`].
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `start`"]
pub struct ContainerBuilder {
    image: Image,
    kernel: Option<Kernel>,
    vcpus: u32,
    cpu: CpuProfile,
    memory: Memory,
    layer: Layer,
    disks: Vec<Disk>,
    nets: Vec<Net>,
    hostname: String,
    programs: ProgramSettings,
    guest: GuestSettings,
    mounts: MountSettings,
    console: Console,
    start_timeout: Duration,
    cancel: Option<CancelToken>,
    descriptors: Option<u32>,
    cgroup: Option<Cgroup>,
    kick_signal: Option<u8>,
}

impl ContainerBuilder {
    pub(super) fn new(image: Image) -> Self {
        Self {
            image,
            kernel: None,
            vcpus: 1,
            cpu: CpuProfile::host(),
            memory: Size::mib(256).into(),
            layer: Layer::Scratch(WritableLayer::new(Size::gib(4))),
            disks: Vec::new(),
            nets: Vec::new(),
            hostname: "container".into(),
            programs: ProgramSettings::default(),
            guest: GuestSettings::default(),
            mounts: MountSettings::default(),
            console: Console::none(),
            start_timeout: Duration::from_secs(30),
            cancel: None,
            descriptors: None,
            cgroup: None,
            kick_signal: None,
        }
    }

    /// Sets the kernel; by default the one that [`Kernel::find`] finds.
    ///
    /// Its command line is added to, and its initramfs extended. A kernel of a distribution needs its
    /// [`Modules`](crate::kernel::Modules) too; the container inserts those that it needs.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = Some(kernel);
        self
    }

    /// Sets the number of vCPUs, 1 to 254; 1 by default.
    pub fn vcpus(mut self, n: u32) -> Self {
        self.vcpus = n;
        self
    }

    /// Sets the processor that the container sees; the host's by default.
    pub fn cpu(mut self, profile: CpuProfile) -> Self {
        self.cpu = profile;
        self
    }

    /// Sets the container's memory, its kernel included; 256 MiB by default.
    ///
    /// [`Memory`] also says what the host backs it with.
    pub fn memory(mut self, memory: impl Into<Memory>) -> Self {
        self.memory = memory.into();
        self
    }

    /// Sets the layer that the container writes to; 4 GiB by default.
    ///
    /// Give its size, or a [`WritableLayer`]. It takes space on the host as it is written, and is gone with the
    /// container.
    pub fn writable_layer(mut self, layer: impl Into<WritableLayer>) -> Self {
        self.layer = Layer::Scratch(layer.into());
        self
    }

    /// Keeps what the container writes in a volume, from one container to the next.
    ///
    /// A container with the same volume begins with the files that the last one left, as after a restart. The volume is of
    /// this image alone, and [`ContainerBuilder::start`] fails with `Incompatible` for one of another image. It fails with
    /// `ResourceBusy` while another container has it. No volume is read-only here: that is `InvalidConfig`.
    ///
    /// It replaces what [`ContainerBuilder::writable_layer`] has set, and the other way round.
    pub fn keep_layer(mut self, volume: NamedVolume) -> Self {
        self.layer = Layer::Kept(volume);
        self
    }

    /// Adds a disk: `/dev/vda`, then `/dev/vdb` and so on; none by default.
    ///
    /// A container has interrupt lines for 11 disks and network cards. It is itself made of two more disks, behind those. Programs find a disk by its serial number
    /// (`/sys/block/*/serial`) too. It is not mounted. [`Container::disk`] returns its handle.
    pub fn disk(mut self, disk: impl Into<Disk>) -> Self {
        self.disks.push(disk.into());
        self
    }

    /// Adds a network card: `eth0`, then `eth1` and so on; none by default.
    ///
    /// Cards of [`Net::user`](crate::Net::user) and [`Net::switch`](crate::Net::switch) have their IPv4 and IPv6
    /// addresses, and the default routes of the former, before the first program starts. `/etc/resolv.conf` then names one resolver.
    /// It is that of the user-mode network, which knows the switches' names too, or else that of the first switch, unless
    /// [`ContainerBuilder::dns_server`] names others. Other cards are
    /// set up by programs in the container. [`Container::net`] returns the cards' handles.
    pub fn net(mut self, net: impl Into<Net>) -> Self {
        self.nets.push(net.into());
        self
    }

    /// Sets the host name, at most 64 bytes; `container` by default.
    pub fn hostname(mut self, name: impl Into<String>) -> Self {
        self.hostname = name.into();
        self
    }

    /// Sets where the kernel's messages go; nowhere by default.
    ///
    /// What programs print goes where their [`Exec`](super::Exec) says.
    pub fn console(mut self, console: Console) -> Self {
        self.console = console;
        self
    }

    /// Sets how long the guest may take until programs can be started.
    ///
    /// It is 30 seconds by default, and counts from when its machine was made. Before that there is only the host's own
    /// work: the image's disk, which has its own time-out, and the machine itself.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Lets another thread cancel the start by `token`.
    ///
    /// The start then fails with `Cancelled` and leaves nothing behind. Cancelling has no effect on a running
    /// container.
    /// The token of [`Image::cancel`] cancels the image's preparation alone.
    pub fn cancel(mut self, token: &CancelToken) -> Self {
        self.cancel = Some(token.clone());
        self
    }

    /// Puts the container's host threads into a control group of their own; none by default.
    pub fn cgroup(mut self, cgroup: Cgroup) -> Self {
        self.cgroup = Some(cgroup);
        self
    }

    /// Sets how many descriptors the guest's connections may hold, at least 16.
    ///
    /// See [`VmBuilder::descriptors`](crate::VmBuilder::descriptors).
    ///
    /// The container's own connections are made over vsock and count. They are two descriptors for the container, and
    /// two for each stream of a running program that is a pipe, a file or bytes. Programs are refused with `ResourceExhausted` when there is no
    /// room for theirs.
    pub fn descriptors(mut self, count: u32) -> Self {
        self.descriptors = Some(count);
        self
    }

    /// Sets the signal that takes vCPUs out of the guest; see [`VmBuilder::kick_signal`](crate::VmBuilder::kick_signal).
    pub fn kick_signal(mut self, offset: u8) -> Self {
        self.kick_signal = Some(offset);
        self
    }

    /// Starts the container, and returns when programs can be started in it.
    ///
    /// The first container of an image waits until the image's disk is made, as do others of the same image.
    ///
    /// # Errors
    /// What [`VmBuilder::start`](crate::VmBuilder::start) says, and:
    ///
    /// - `NotFound` without a kernel;
    /// - `Unsupported` for a kernel that is known to lack a driver;
    /// - `Incompatible` for a kernel with the modules of another;
    /// - `Corrupt` for a damaged image;
    /// - `TimedOut`, naming the last stage, for a guest that is not ready in time;
    /// - `GuestFailed`, with the console's last lines, for a guest that ends before;
    /// - `Cancelled` when [`ContainerBuilder::cancel`]'s token was cancelled.
    ///
    /// Nothing is left behind.
    pub fn start(self) -> Result<Container> {
        let begin = Instant::now();
        self.run(begin).doing(|| "starting container")
    }

    fn run(mut self, begin: Instant) -> Result<Container> {
        boot_config::check_hostname(&self.hostname)?;
        // Before anything is made; the resolver of the networks changes nothing of it.
        self.guest.files(None)?;
        self.mounts.check(self.guest.secrets_path())?;
        self.programs.check()?;
        let kernel = self.kernel.take().map_or_else(Kernel::find, Ok)?;
        let PreparedImage { disk: image, config, digest } = self.image.prepared(self.cancel.as_ref())?;
        let (mut defaults, disks) = (ProgramDefaults::of(&config)?, self.disks.len());
        let labels = std::mem::take(&mut self.programs.labels);
        std::mem::take(&mut self.programs).apply(&mut defaults);
        let root = RootDisks::make(image, &digest, &self.layer, disks)?;
        let nets = boot_config::reserve_addresses(std::mem::take(&mut self.nets))?;
        let mounts = self.mounts.open(disks + RootDisks::COUNT, self.cancel.as_ref())?;
        let shim = ShimConfig::new(&self.hostname, &root, &nets, &self.guest, mounts.list)?;
        let (start_timeout, cancel) = (self.start_timeout, self.cancel.take());
        let own = root.into_disks().into_iter().chain(mounts.disks);
        let vm = self.machine(&kernel, own, nets);
        let needs = [vm.needs().as_slice(), &FILE_SYSTEMS].concat();
        kernel.check_drivers(&needs)?;
        let packed = kernel.pack_modules(&needs)?;
        let vm = vm.kernel(shim.add_to(kernel, &packed)?).start()?;
        let agent = Agent::start(&vm, begin, start_timeout, cancel.as_ref())?;
        Ok(Container { running: Arc::new(RunningContainer { vm, agent, defaults, labels, disks }) })
    }

    /// The machine, whose kernel has no initramfs with the shim yet. Its `own` disks are behind the embedder's.
    fn machine(self, kernel: &Kernel, own: impl Iterator<Item = Disk>, nets: Vec<Net>) -> VmBuilder {
        let mut vm = Vm::builder(kernel.clone())
            .vcpus(self.vcpus)
            .cpu(self.cpu)
            .memory(self.memory)
            .console(self.console)
            .vsock(Vsock::new().listen(CONTROL_PORT))
            .parameter("console", "hvc0")
            .parameter("quiet", "")
            .parameter("rdinit", "/init")
            .parameter("cofferdam.shim", "1");
        vm = self.disks.into_iter().chain(own).fold(vm, VmBuilder::disk);
        vm = nets.into_iter().fold(vm, VmBuilder::net);
        if let Some(cgroup) = self.cgroup {
            vm = vm.cgroup(cgroup);
        }
        if let Some(count) = self.descriptors {
            vm = vm.descriptors(count);
        }
        if let Some(offset) = self.kick_signal {
            vm = vm.kick_signal(offset);
        }
        vm
    }
}
