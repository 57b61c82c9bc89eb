//! Run untrusted Linux work inside its own microVM, in process.
//!
//! Cofferdam is a library, not a program: no daemon, no helper process, no shared library, no download, and no root
//! where the host lets its users open `/dev/kvm`. A virtual machine is a value; any number of them live in one process.
//!
#![cfg_attr(feature = "container", doc = "```no_run")]
#![cfg_attr(not(feature = "container"), doc = "```ignore")]
//! use cofferdam::{Container, Image, Size};
//! use std::time::Duration;
//!
//! # fn main() -> cofferdam::Result<()> {
//! let debian = Container::builder(Image::open("debian.tar")?).memory(Size::mib(256)).start()?;
//! let out = debian.exec(["uname", "-r"]).timeout(Duration::from_secs(5)).output()?;
//! assert!(out.status.success());
//! println!("{}", String::from_utf8_lossy(&out.stdout));
//! debian.stop(Duration::from_secs(2))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Nouns
//!
//! The **VM layer** boots kernels: a [`Kernel`] is opened once and booted any number of times, [`Vm::builder`] describes
//! a machine, a [`Vm`] runs until its [`Exit`] says how it ended.
//!
//! The **container layer** (feature `container`, on by default) runs programs: an `Image` is a root file system, a
//! `Container` is a VM of its own around a private copy of it, a `Process` runs in there, with the vocabulary of
//! [`std::process::Command`].
//!
//! Everywhere, [`Error`] says what failed, where, and what to do; [`Size`] is bytes as a type; [`Host::probe`] says
//! whether this machine can run virtual machines at all. The rest are config values and handles reached from these.
//!
//! # What a guest is granted
//!
//! Nothing, by default: no network, no standard input, no environment, no path of the host, no device of the host. It
//! has the memory, processors, disks, network cards and vsock ports that its builder was told (of a `Net::user` only what its
//! [`Policy`] allows, of a [`Switch`] only the other guests on it), a console whose last 64 KiB are kept,
//! and the host's random numbers.
//!
//! # What an embedder can rely on
//!
//! The library never ends, forks or daemonises the process, prints, installs a logger or panic hook, touches standard
//! streams or terminals, changes user, limits or the process's seccomp, or takes SIGCHLD. It keeps no global state but
//! two: a real-time signal whose handler does nothing, see [`VmBuilder::kick_signal`], and a list of the prepared disks that
//! were found whole. All descriptors are
//! close-on-exec. When the process dies by any means, its machines, disks and locks are gone with it.
//!
//! # Threads
//!
//! A VM has one thread for each vCPU, one event loop that owns its devices, one that owns its disks, one for each disk that
//! io_uring cannot serve alone ([`DiskEngine`]), because files block, and one each for the console's writer and for each
//! [`Capture`], if there are any; a container has one more, which speaks with the guest. Those of disks are scheduled as
//! `SCHED_BATCH`: they take the processor of no vCPU when a request comes, so that requests come together. Calls block
//! and need no runtime; what can be waited for also has a descriptor (`AsFd`) for poll, epoll, tokio, smol or mio. All
//! handles are `Send` and `Sync`. Dropping a [`Vm`] or a `Container` kills it and waits for its threads.
//!
//! # Layers
//!
//! ```text
//! container   Image, Container, exec, the agent's client          guest   the shim: PID 1 in the guest
//! vm          builder, machine, vCPU threads, ends                proto   what both say to each other
//! virtio      device model, mmio transport: blk net vsock console rng balloon
//! net         what carries frames: the user-mode stack with its policy and names, switches, taps, sockets, captures
//! boot arch legacy kvm bus irq event memory sys
//! ```

#![cfg_attr(not(feature = "container"), allow(dead_code, unused_imports, reason = "only the container layer uses it"))]

mod arch;
mod boot;
mod bus;
#[cfg(feature = "container")]
mod container;
#[cfg(any(test, feature = "internals"))]
#[doc(hidden)]
pub mod doors;
mod error;
mod event;
#[cfg(test)]
#[path = "guest/main.rs"]
mod guest;
mod irq;
mod kvm;
mod legacy;
mod memory;
mod net;
#[cfg(any(feature = "container", test))]
mod proto;
mod rate;
mod size;
mod sys;
mod virtio;
mod vm;

pub use boot::{Initramfs, Kernel, Modules};
#[cfg(feature = "container")]
pub use container::{
    CancelToken, Container, ContainerBuilder, Exec, ExitStatus, Image, ImageLimits, Layer, Output, Process,
    ProcessReader, ProcessWriter, Startup, Stdio,
};
pub use error::{Error, ErrorKind, Result};
pub use kvm::{Device, Exposure, Host, Vulnerability};
pub use rate::Rate;
pub use size::Size;
pub use sys::set_descriptor_reserve;
pub use virtio::vsock::{VsockListener, VsockStream};
pub use vm::{
    Base, Cache, Capture, CaptureStats, Cgroup, CgroupStats, Cidr, Console, CpuProfile, CpuidBits, CpuidRegister,
    Denial, DeviceStats, Disk, DiskEngine, DiskFault, DiskHandle, DiskLimit, DiskOperation, DiskUsage, ErrorAction,
    ErrorClass, Event, EventKind, Events, Exit, GuestMemoryUse, Mac, Memory, MemoryStats, Net, NetHandle, NetLimit,
    NetStats, Overlay, OverlayInfo, Policy, Port, Progress, Protocol, PublishedPort, Registers, Rule, Stage, Stats,
    Switch, Timeline, Trace, VcpuStats, Vm, VmBuilder, Vsock, Why,
};

/// For who carries a network card's frames by other means than there are: what a backend of one's own is, and is given. See
/// [`Net::custom`].
pub mod backend {
    pub use crate::net::{
        Capabilities, Card, Csum, Frame, Gso, GsoKind, NetBackend, Offload, Offloads, Received, Room,
    };
}

/// The readme's code is compiled with the documentation's.
#[cfg(all(doctest, feature = "container"))]
#[doc = include_str!("../README.md")]
struct Readme;
