//! Run untrusted Linux work inside its own microVM, in process.
//!
//! Cofferdam is a library, not a program: no daemon, no helper process, no shared library, no download. It needs no root
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
//! A VM without a container boots a kernel and an initramfs:
//!
//! ```no_run
//! use cofferdam::{Console, Initramfs, Kernel, Vm};
//!
//! # fn main() -> cofferdam::Result<()> {
//! let kernel = Kernel::open("vmlinux")?.cmdline("console=hvc0").initramfs(Initramfs::open("initramfs.cpio")?);
//! let vm = Vm::builder(kernel).console(Console::writer(Vec::new())).start()?;
//! println!("{}", vm.wait()?);
//! # Ok(())
//! # }
//! ```
//!
//! # Nouns
//!
//! The **VM layer** boots kernels. A [`Kernel`] is opened once and booted any number of times. [`Vm::builder`] describes a
//! machine, and a [`Vm`] runs until its [`Exit`] says how it ended.
//!
//! The **container layer** (feature `container`, on by default) runs programs. An `Image` is a root file system. A
//! `Container` is a VM of its own around a private copy of it. A `Process` runs in there, with the vocabulary of
//! [`std::process::Command`].
//!
//! Everywhere, [`Error`] says what failed, where, and what to do, and [`Size`] is bytes as a type. [`Host::probe`] says
//! whether this machine can run virtual machines at all. The rest are config values and handles reached from these.
//!
//! # What a guest is granted
//!
//! Nothing, by default: no network, no standard input, no environment, no path of the host, no device of the host.
//!
//! It has the memory, processors, disks, network cards and vsock ports that its builder was told. Of a `Net::user` it has only
//! what its [`Policy`] allows, and of a [`Switch`] only the other guests on it. It also has a console whose last 64 KiB are
//! kept, and the host's random numbers.
//!
//! # What an embedder can rely on
//!
//! The library never ends, forks or daemonizes the process. It never prints, installs a logger or panic hook, or touches
//! standard streams or terminals. It changes no user, limits or seccomp filter of the process, and takes no SIGCHLD. Its
//! threads block all signals but those of their own faults and the one that takes vCPUs out of the guest.
//!
//! Its global state is:
//!
//! - a real-time signal whose handler does nothing ([`VmBuilder::kick_signal`]);
//! - a handler for fork (`pthread_atfork`);
//! - a list of the prepared disks that were found whole;
//! - how many descriptors guests leave to the embedder ([`set_descriptor_reserve`]), and how many they have;
//! - the address of a Kubernetes API server, read once from the environment (`KUBERNETES_SERVICE_HOST`).
//!
//! All descriptors are close-on-exec. A child that fork makes and that goes on without exec has no copy of a guest's memory.
//! Machines, disks with their locks, and connections are closed in it at once. Its copies of handles are of no use there, and
//! dropping them does nothing.
//! When the process dies by any means, its machines, disks and locks are gone with it. No guest's memory is in its core file.
//!
//! An embedder built with `panic = "abort"` loses one thing: a mistake of this crate ends the process instead of one device.
//! What guests and images give is checked and never left to a panic. With the feature `qcow2` another crate works on images. What
//! it is known to panic about is refused before it sees an image, which fuzzing checks.
//!
//! # How long calls wait
//!
//! Guests may be silent, hostile, paused or hung, and files of the host may not answer. These bounds hold all the same, on a
//! host that gives the process its processors. Each call's own documentation says more. Where the threads of a VM are too busy to
//! answer, a call fails with `TimedOut` after ten seconds. `Exec` asks them up to five times.
//!
//! | call | waits at most |
//! | --- | --- |
//! | `Image::open` | 10 s |
//! | `Image::prepare` | `Image::prepare_timeout`, 10 minutes unless set, and 4 s; 4 s once its `CancelToken` is cancelled |
//! | `ContainerBuilder::start` | the same, then `ContainerBuilder::start_timeout`, 30 s unless set, and 4 s; less when its `CancelToken` is cancelled |
//! | [`VmBuilder::start`] | for the host alone |
//! | `Exec::spawn` | until the guest has started the program: 72 s, or `Exec::timeout` and 2 s |
//! | `Exec::output`, `Exec::status`, `Process::wait` | with `Exec::timeout`: that and 4 s; without: as long as the program runs |
//! | `Process::wait` after `Process::kill` | 2 s |
//! | `Process::wait_with_output` | as `Process::wait`, and 10 s for what was printed |
//! | `Process::kill`, `Process::signal` | 10 s, for a host that is busy |
//! | `Container::connect` | 21 s: 10 s for a host that is busy, 11 s for the guest |
//! | [`Vm::connect`] | 20 s: 10 s for a host that is busy, 10 s for the guest |
//! | `Container::stop`, [`Vm::shutdown`] | the grace and 2 s; 15 s more where a file of the host's, or a writer or network of the embedder's, hangs |
//! | `Container::kill`, [`Vm::kill`] | does not wait |
//! | [`Vm::resume`] | 11 s, for a pause that another thread has begun |
//! | dropping a `Container` or a [`Vm`] | milliseconds; 15 s where a file of the host's, or a writer or network of the embedder's, hangs |
//! | `Container::wait`, [`Vm::wait`] | as long as the machine runs |
//! | [`VsockListener::accept`], the iterator of [`Events`] | until something comes, or the machine ends |
//! | reads and writes of a [`VsockStream`], `ProcessReader` or `ProcessWriter` | as the stream's timeouts say; without: until the guest goes on, or the machine ends |
//! | [`Vm::pause`] | 11 s |
//! | [`Vm::memory_stats`] | 11 s: 10 s for a host that is busy, 1 s for the guest |
//! | [`Vm::set_balloon`], [`Vm::memory_fd`], [`Vm::listen`], methods of [`NetHandle`], [`PublishedPort`] and [`DiskHandle`] | 10 s, for a host that is busy |
//! | whatever ends with `_timeout` | the time that it is given |
//! | [`Vm::stats`], [`Vm::trace`], [`Vm::timeline`], [`Vm::events`], whatever begins with `try_`, and all else that these handles have | does not wait |
//!
//! # What guests of one process share
//!
//! All guests are in the embedder's address space. A guest that breaks out of its virtual machine arrives among the
//! embedder's secrets and the other guests. Processors have faults by which a guest reads what it may not (VMSCAPE, L1TF, MDS
//! and others). They are as closed as the host's kernel closes them: [`Host::probe`] tells what it says ([`Exposure`]).
//!
//! Guests of one kernel share its pages, and guests of one image or base disk those of the host's page cache. By time
//! (Flush+Reload) a guest can find out which of them another uses. Guests that must not learn that of each other need images
//! and processes of their own.
//!
//! # Threads
//!
//! | thread | one for each | does |
//! | --- | --- | --- |
//! | `vcpuN` | vCPU | runs the guest |
//! | `io` | VM | owns its devices but disks |
//! | `disks` | VM with raw disks that io_uring serves alone | owns those disks |
//! | `diskN` | overlay, qcow2 or in-memory disk, or disk without io_uring ([`DiskEngine`]) | owns that disk, and blocks in its file |
//! | `console` | writer of a [`Console`] | calls the writer, which may block |
//! | `capture` | [`Capture`] | writes it, and may block |
//! | `agent` | container | speaks with the guest |
//! | `image` | image that is opened or prepared | reads and writes it |
//! | `left-behind` | disk whose file does not answer at the end | owns what the kernel still uses |
//!
//! Threads of disks are scheduled as `SCHED_BATCH`: they preempt no vCPU when a request comes, so that requests come together.
//!
//! Calls block and need no runtime. What can be waited for also has a descriptor (`AsFd`) for poll, epoll, tokio, smol or mio.
//! All handles are `Send` and `Sync`. Dropping a [`Vm`] or a `Container` kills it and waits for its threads.
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
mod error;
mod event;
#[cfg(any(test, feature = "internals"))]
#[doc(hidden)]
pub mod fuzzing;
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
    CancelToken, Container, ContainerBuilder, Exec, ExitStatus, Image, ImageLimits, Output, Process, ProcessReader,
    ProcessWriter, Startup, Stdio, WritableLayer,
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

/// Traits and types for network backends of the embedder's own; see [`Net::custom`].
pub mod backend {
    pub use crate::net::{
        Capabilities, Card, Csum, Frame, Gso, GsoKind, NetBackend, Offload, Offloads, Received, Room,
    };
}

/// The readme's code is compiled with the documentation's.
#[cfg(all(doctest, feature = "container"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// And the guide's.
#[cfg(all(doctest, feature = "container"))]
#[doc = include_str!("../docs/guide.md")]
struct Guide;
