//! [`VmSpec`]: what of a VM's description is plain data. [`LiveParts`]: all else of it.
//!
//! A spec can be kept, or sent to another process, and is not trusted when it is loaded. What is no data is in one table,
//! which says of each kind how it is handed over. The spec names its live parts by their places there.
//!
//! Every VM is started by this way: its description is taken apart, put together again, checked and assembled.
//!
//! Paths and names of the host's are data. The process that has the authority opens them: today the embedder's, in the
//! assembly. A process without authority gets open files instead, and [`VmSpec::check_opens_nothing`] says so.

mod disk;
mod live;
mod net;
mod path;
#[cfg(test)]
mod tests;

pub(crate) use disk::DiskPiece;
#[cfg(feature = "qcow2")]
pub(super) use disk::Qcow2Source;
pub(super) use disk::{DiskSettings, DiskSource, DiskSpec, FileSource, OverlaySource, ScratchSource};
use live::{LivePart, take};
pub use live::{LivePartId, LiveParts};
pub(super) use net::{NetSpec, UserSource};
pub(super) use path::HostPath;

#[cfg(any(test, feature = "internals"))]
use super::builder::VmBuilder;
use super::cgroup::Cgroup;
use super::config::{Console, VmConfig, Vsock};
use super::net::Net;
use crate::arch::CpuProfile;
use crate::boot::{EntryChoice, Kernel};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::version::{Version, Versioned};

/// The description of a VM without its live parts. Not trusted when it is loaded.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct VmSpec {
    version: Version<Self>,
    kernel: KernelSpec,
    vcpus: u32,
    cpu: CpuProfile,
    memory: Memory,
    disks: Vec<DiskSpec>,
    nets: Vec<NetSpec>,
    console: ConsoleSpec,
    vsock: Option<Vsock>,
    cgroup: Option<Cgroup>,
    kick_signal: u8,
    descriptors: Option<u32>,
    parameters: Vec<(String, String)>,
}

impl Versioned for VmSpec {
    const NAME: &'static str = "the description of the VM";
    const VERSION: u32 = 1;
}

/// How a kernel is booted, and the names of what it is loaded from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
struct KernelSpec {
    cmdline: String,
    choice: EntryChoice,
    image: LivePartId,
    initramfs: Option<LivePartId>,
    modules: Option<LivePartId>,
}

/// Where the console's output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
struct ConsoleSpec {
    writer: Option<LivePartId>,
}

impl VmConfig {
    /// Chooses what is left to chance and must be the same whenever the description is used again.
    ///
    /// # Errors
    /// As [`VmConfig::check`], and `Io` when the host has no random numbers.
    pub(super) fn settle(self) -> Result<Self> {
        let settle = |(n, net): (usize, Net)| net.settle().doing(|| format!("attaching network {n}"));
        let nets = self.nets.into_iter().enumerate().map(settle).collect::<Result<_>>()?;
        Ok(Self { nets, ..self })
    }

    /// Takes the description apart: what is data, and what is not.
    pub(super) fn split(self) -> (VmSpec, LiveParts) {
        // Without `..`, here and below: a field that is added is not forgotten.
        let Self {
            kernel,
            vcpus,
            cpu,
            memory,
            disks,
            nets,
            console,
            vsock,
            cgroup,
            kick_signal,
            descriptors,
            parameters,
        } = self;
        let mut live = LiveParts::default();
        let spec = VmSpec {
            version: Version::OURS,
            kernel: KernelSpec::split(kernel, &mut live),
            vcpus,
            cpu,
            memory,
            disks: disks.into_iter().map(|disk| DiskSpec::split(disk, &mut live)).collect(),
            nets: nets.into_iter().map(|net| NetSpec::split(net, &mut live)).collect(),
            console: ConsoleSpec::split(console, &mut live),
            vsock,
            cgroup,
            kick_signal,
            descriptors,
            parameters,
        };
        (spec, live)
    }
}

impl VmSpec {
    /// Puts a description together, and checks it as that of a builder.
    ///
    /// # Errors
    /// `Corrupt` when the live parts are not those that the spec names. Else as [`VmConfig::check`].
    pub(super) fn join(self, mut live: LiveParts) -> Result<VmConfig> {
        let Self {
            version: _,
            kernel,
            vcpus,
            cpu,
            memory,
            disks,
            nets,
            console,
            vsock,
            cgroup,
            kick_signal,
            descriptors,
            parameters,
        } = self;
        let config = VmConfig {
            kernel: kernel.join(&mut live)?,
            vcpus,
            cpu,
            memory,
            disks: disks.into_iter().map(|disk| disk.join(&mut live)).collect::<Result<_>>()?,
            nets: nets.into_iter().map(|net| net.join(&mut live)).collect::<Result<_>>()?,
            console: console.join(&mut live)?,
            vsock,
            cgroup,
            kick_signal,
            descriptors,
            parameters,
        };
        live.finish()?;
        config.check()?;
        Ok(config)
    }
}

impl VmSpec {
    /// Checks that no file, directory or device of the host is opened by its name: for a process without authority.
    ///
    /// The sockets of a user-mode network are not meant here: its policy, its published ports and the host's resolvers are part of the
    /// spec. So this does not make a stranger's spec safe.
    ///
    /// # Errors
    /// `PermissionDenied` names what would be opened.
    #[cfg_attr(not(test), allow(dead_code, reason = "so far only tests load specs"))]
    pub(super) fn check_opens_nothing(&self) -> Result<()> {
        let modules = self.kernel.modules.map(|_| ("kernel".into(), "the directory of its modules".into()));
        let cgroup = self.cgroup.as_ref().map(|_| ("cgroup".into(), "the directory of a group".into()));
        let disks = self.disks.iter().enumerate();
        let disks = disks.filter_map(|(n, disk)| Some((format!("disk {n}"), disk.source.opens()?)));
        let nets = self.nets.iter().enumerate();
        let nets = nets.filter_map(|(n, net)| Some((format!("network {n}"), net.opens()?)));
        modules.into_iter().chain(cgroup).chain(disks).chain(nets).next().map_or(Ok(()), |(whose, what)| {
            let problem = format!("{whose}: {what} would be opened by its name here");
            Err(Error::new(ErrorKind::PermissionDenied, problem))
        })
    }
}

impl KernelSpec {
    fn split(Kernel { loaded, cmdline, initramfs, modules, choice }: Kernel, live: &mut LiveParts) -> Self {
        Self {
            cmdline,
            choice,
            image: live.add(LivePart::KernelImage(loaded)),
            initramfs: initramfs.map(|initramfs| live.add(LivePart::Initramfs(initramfs))),
            modules: modules.map(|modules| live.add(LivePart::Modules(modules))),
        }
    }

    fn join(self, live: &mut LiveParts) -> Result<Kernel> {
        let Self { cmdline, choice, image, initramfs, modules } = self;
        Ok(Kernel {
            loaded: take!(live, image, KernelImage)?,
            cmdline,
            initramfs: initramfs.map(|id| take!(live, id, Initramfs)).transpose()?,
            modules: modules.map(|id| take!(live, id, Modules)).transpose()?,
            choice,
        })
    }
}

impl ConsoleSpec {
    fn split(Console { writer }: Console, live: &mut LiveParts) -> Self {
        Self { writer: writer.map(|writer| live.add(LivePart::ConsoleWriter(writer))) }
    }

    fn join(self, live: &mut LiveParts) -> Result<Console> {
        let Self { writer } = self;
        Ok(Console { writer: writer.map(|id| take!(live, id, ConsoleWriter)).transpose()? })
    }
}

/// Takes what a builder describes apart. What is left to chance is chosen before.
///
/// # Errors
/// `Io` when the host has no random numbers.
#[cfg(any(test, feature = "internals"))]
pub fn split(builder: VmBuilder) -> Result<(VmSpec, LiveParts)> {
    Ok(builder.config.settle()?.split())
}

/// Returns a builder of what was taken apart.
///
/// # Errors
/// As the start of a builder, for all that needs nothing of the host. `Corrupt` and `Incompatible` for a spec that cannot be.
#[cfg(any(test, feature = "internals"))]
pub fn join(spec: VmSpec, live: LiveParts) -> Result<VmBuilder> {
    Ok(VmBuilder { config: spec.join(live)? })
}
