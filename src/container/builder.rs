//! [`ContainerBuilder`]: what a container shall be, until `start`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::Agent;
use super::{CancelToken, Container, Image, RunningContainer, WritableLayer, shim};
use crate::boot::{Kernel, Need, Packed};
use crate::error::{Context, Error, Result};
use crate::proto::{BootConfig, CONTROL_PORT, Network, Networks, OPTIONAL, Root, RootDisk, StringBuf};
use crate::size::Size;
use crate::vm::{AddressConfig, Cgroup, Console, CpuProfile, Disk, Memory, Net, Vm, Vsock};

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
    writable_layer: WritableLayer,
    disks: Vec<Disk>,
    nets: Vec<Net>,
    hostname: String,
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
            writable_layer: WritableLayer::new(Size::gib(4)),
            disks: Vec::new(),
            nets: Vec::new(),
            hostname: "container".into(),
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
        self.writable_layer = layer.into();
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
    /// addresses, and the default routes of the former, before the first program starts. `/etc/resolv.conf` then names one resolver: that
    /// of the user-mode network, which knows the switches' names too, or else that of the first switch. Other cards are
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

    fn run(self, begin: Instant) -> Result<Container> {
        let hostname = check_hostname(&self.hostname)?;
        let kernel = self.kernel.clone().map_or_else(Kernel::find, Ok)?;
        let lower = Disk::from_file(self.image.disk(self.cancel.as_ref())?).read_only(true).serial("cofferdam-image");
        let upper = self.writable_layer.make()?;
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
        let disks = self.disks.len();
        let [lower_path, upper_path] = [disks, disks + 1].map(disk_path);
        vm = self.disks.into_iter().fold(vm, |vm, disk| vm.disk(disk)).disk(lower).disk(upper);
        // What is sent to the guest's 127.0.0.1 is the shim's business.
        let reserve =
            |(n, net): (usize, Net)| net.allow_loopback().reserve_address().doing(|| format!("attaching network {n}"));
        let nets: Vec<Net> = self.nets.into_iter().enumerate().map(reserve).collect::<Result<_>>()?;
        let (networks, resolver) = networks(&nets);
        vm = nets.into_iter().fold(vm, |vm, net| vm.net(net));
        if let Some(cgroup) = self.cgroup {
            vm = vm.cgroup(cgroup);
        }
        if let Some(count) = self.descriptors {
            vm = vm.descriptors(count);
        }
        if let Some(offset) = self.kick_signal {
            vm = vm.kick_signal(offset);
        }
        let needs = [vm.needs().as_slice(), &FILE_SYSTEMS].concat();
        kernel.check_drivers(&needs)?;
        let packed = kernel.pack_modules(&needs)?;
        let modules = modules(&packed)?;
        let config = BootConfig {
            hostname,
            control_port: CONTROL_PORT,
            root: Root::Overlay {
                lower: RootDisk { device: lower_path.as_bytes(), fs: b"erofs" },
                upper: RootDisk { device: upper_path.as_bytes(), fs: b"ext4" },
            },
            modules: modules.as_strings(),
            networks: Networks(&networks),
            resolver,
        };
        let kernel = kernel.with_packed(&packed);
        let initramfs = shim::initramfs(kernel.initramfs_or_default(), &config)?;
        let vm = vm.kernel(kernel.initramfs(initramfs)).start()?;
        let agent = Agent::start(&vm, begin, self.start_timeout, self.cancel.as_ref())?;
        Ok(Container { running: Arc::new(RunningContainer { vm, agent, disks }) })
    }
}

/// Returns the path of the `n`th disk in the guest, counted from 0.
///
/// Linux names them as spreadsheets name columns: `vda` to `vdz`, then `vdaa`.
fn disk_path(mut n: usize) -> String {
    let mut letters = Vec::new();
    loop {
        letters.insert(0, char::from(b"abcdefghijklmnopqrstuvwxyz"[n % 26]));
        match (n / 26).checked_sub(1) {
            Some(rest) => n = rest,
            None => return format!("/dev/vd{}", letters.into_iter().collect::<String>()),
        }
    }
}

/// Linux keeps host names of at most so many bytes (hostname(7)).
const HOST_NAME_MAX: usize = 64;

/// What Linux and resolvers take for a host's name (hostname(7)), and underscores, which Docker takes too. It is written
/// into files of the guest.
fn check_hostname(name: &str) -> Result<&[u8]> {
    let ends = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let fits = name.len() <= HOST_NAME_MAX
        && name.chars().all(|c| ends(c) || matches!(c, '-' | '.'))
        && name.split('.').all(|label| label.starts_with(ends) && label.ends_with(ends));
    match fits {
        true => Ok(name.as_bytes()),
        false => Err(Error::invalid(
            "hostname",
            format!(
                "{name:?}: 1 to {HOST_NAME_MAX} letters, digits, `-`, `_` and `.` are needed, without `-` and `.` at the ends of a part"
            ),
        )),
    }
}

/// Returns what the shim needs to know of the cards, and the resolver's address.
fn networks(nets: &[Net]) -> (Vec<u8>, Option<[u8; 4]>) {
    let (mut list, mut resolvers) = (Vec::new(), Vec::new());
    // No machine has as many.
    for (card, net) in (0..=u8::MAX).zip(nets) {
        let Some(AddressConfig { address4, prefix4, address6, gateways, resolver }) = net.link() else { continue };
        let network = Network {
            card,
            address4: address4.octets(),
            prefix4,
            gateway4: gateways.map_or([0; 4], |(gateway4, _)| gateway4.octets()),
            address6: address6.octets(),
            gateway6: gateways.map_or([0; 16], |(_, gateway6)| gateway6.octets()),
        };
        network.push(&mut list);
        resolvers.push((gateways.is_none(), resolver.octets()));
    }
    // One with a way out knows all names.
    resolvers.sort_by_key(|(inside, _)| *inside);
    (list, resolvers.first().map(|(_, resolver)| *resolver))
}

/// The list by which the shim inserts them.
fn modules(packed: &Packed) -> Result<StringBuf> {
    let mut list = StringBuf::new();
    for (path, required) in packed.paths() {
        let entry = if required { path } else { format!("{}{path}", char::from(OPTIONAL)) };
        list.push(entry.as_bytes()).map_err(|_| Error::invalid("Kernel::modules", format!("{entry:?} has a NUL")))?;
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn disks_have_the_names_that_linux_gives_them() {
        for (n, path) in [(0, "/dev/vda"), (25, "/dev/vdz"), (26, "/dev/vdaa"), (701, "/dev/vdzz"), (702, "/dev/vdaaa")]
        {
            assert_eq!(disk_path(n), path);
        }
    }

    #[test]
    fn host_names_that_linux_and_resolvers_do_not_take_are_refused() {
        let longest = "x".repeat(HOST_NAME_MAX);
        for name in ["box", "a_b", "0", "one.two-three", &longest] {
            assert_eq!(check_hostname(name).unwrap(), name.as_bytes());
        }
        let longer = "x".repeat(HOST_NAME_MAX + 1);
        for name in ["", "-a", "a-", ".a", "a.", "a..b", "a.-b", "a b", "a\nb", "a\0", "ä", "127.0.0.1 a", &longer] {
            let error = check_hostname(name).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("hostname"), "{error}");
        }
    }
}
