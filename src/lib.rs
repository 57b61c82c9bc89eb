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
//! use cofferdam::{Console, Kernel, Vm};
//! use cofferdam::kernel::Initramfs;
//!
//! # fn main() -> cofferdam::Result<()> {
//! let kernel = Kernel::open("vmlinux")?.cmdline("console=hvc0").initramfs(Initramfs::open("initramfs.cpio")?);
//! let vm = Vm::builder(kernel).console(Console::writer(Vec::new())).start()?;
//! println!("{}", vm.wait());
//! # Ok(())
//! # }
//! ```
//!
//! # Nouns
//!
//! | noun | is | more in |
//! | --- | --- | --- |
//! | [`Kernel`] | what a machine boots; opened once, booted any number of times | [`kernel`] |
//! | [`Vm`] | a machine that runs until its [`Exit`] says how it ended | [`exit`], [`event`], [`stats`] |
//! | `Image` | a root file system | `image` |
//! | `Container` | a machine of its own around a private copy of an image | [`event`], [`stats`] |
//! | `Exec`, `Process` | a program in a container, with the words of [`std::process`] | `process` |
//! | [`Disk`], [`Net`], [`Console`] | what a machine is given; each kind has a builder of its own | [`disk`], [`net`], [`backend`], [`vsock`] |
//! | [`Cgroup`], [`Rate`], [`Size`] | what it may take | [`memory`], [`cpu`] |
//! | [`Host`] | whether this machine can run others at all | [`host`] |
//! | [`Error`] | what failed, where, and what to do; [`ErrorKind`] is for programs | |
//!
//! The nouns in the form `Container` belong to the feature `container`, which is on by default.
//!
//! # What a guest is granted
//!
//! Nothing, by default: no network, no standard input, no environment, no path of the host, no device of the host.
//!
//! It has the memory, processors, disks, network cards and vsock ports that its builder was given. Of a `Net::user` it
//! has only what its [`Policy`](net::Policy) allows, and of a [`Switch`](net::Switch) only the other guests on it. It
//! also has a console whose last 64 KiB are kept, and the host's random numbers.
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
//! - how many descriptors guests leave to the embedder ([`set_descriptor_reserve`](host::set_descriptor_reserve)), and how many they have;
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
//! answer, a call fails with `TimedOut` after ten seconds. `Exec` asks them up to four times.
//!
//! | call | waits at most |
//! | --- | --- |
//! | `Image::open` | 10 s |
//! | `Image::prepare`, `Image::config` | `Image::prepare_timeout`, 10 minutes unless set, and 4 s; 4 s once its `CancelToken` is cancelled |
//! | `Image::pull`, `Registry::pull` | `Registry::timeout`, 30 minutes unless set, and 4 s; 4 s once its `CancelToken` is cancelled |
//! | `ContainerBuilder::start` | the same, then `ContainerBuilder::start_timeout`, 30 s unless set, and 4 s; less when its `CancelToken` is cancelled |
//! | [`VmBuilder::start`] | for the host alone |
//! | `Exec::spawn` | until the guest has started the program: 72 s, or `Exec::timeout` and 2 s |
//! | `Exec::status`, `Process::wait` | with `Exec::timeout`: that and 4 s; without: as long as the program runs; 12 s more where output goes to a file |
//! | `Exec::output` | with `Exec::timeout`: that and 10 s for what was printed; without: as long as the program runs, and 10 s; 12 s more where one stream goes to a file |
//! | `Process::wait` after `Process::kill` | 2 s; 4 s more where output goes to a file |
//! | `Process::wait_with_output` | as `Process::wait`, and 10 s for what was printed |
//! | `Process::kill`, `Process::signal`, `Process::resize` | 10 s, for a host that is busy |
//! | `Container::connect` | 21 s: 10 s for a host that is busy, 11 s for the guest |
//! | `Container::connect_within` | its `timeout`, and the same for the last try |
//! | `Files::read`, `Files::open`, `Files::write`, `Files::list`, `Files::stat`, `Files::create_dir`, `CopyIn::run`, `CopyOut::run` | `Files::timeout`, an hour unless set, and 20 s; at most 50 s once the guest is silent |
//! | [`Vm::connect_vsock`] | 20 s: 10 s for a host that is busy, 10 s for the guest |
//! | `Container::stop`, [`Vm::stop`] | the grace and 2 s; 15 s more where a file of the host's, or a writer or network of the embedder's, hangs |
//! | `Container::kill`, [`Vm::kill`] | does not wait |
//! | `Container::resume`, [`Vm::resume`] | 11 s, for each pause that another thread has begun |
//! | dropping the last handle of a `Container` or a [`Vm`] | milliseconds; 26 s where a host's file, or an embedder's writer or network, hangs |
//! | `Container::wait`, [`Vm::wait`], `Container::wait_async`, `Vm::wait_async` | as long as the machine runs |
//! | `Process::wait_async` | with `Exec::timeout`: that and 2 s; without: as long as the program runs |
//! | [`VsockListener::accept`](vsock::VsockListener::accept), the iterator of [`Events`](event::Events), `Async::accept`, `Async::next` | until something comes, or the machine ends |
//! | reads and writes of a [`VsockStream`](vsock::VsockStream), `ProcessReader` or `ProcessWriter` | as the stream's timeouts say; without: until the guest goes on, or the machine ends |
//! | `Container::pause`, [`Vm::pause`] | 11 s, and for each pause that another thread has begun |
//! | `Container::memory_stats`, [`Vm::memory_stats`] | 11 s: 10 s for a host that is busy, 1 s for the guest |
//! | [`Vm::set_balloon`], [`Vm::memory_fd`], [`Vm::listen_vsock`], methods of [`NetHandle`](net::NetHandle), [`PublishedPort`](net::PublishedPort) and [`DiskHandle`](disk::DiskHandle) | 10 s, for a host that is busy |
//! | whatever ends with `_timeout` | the time that it is given |
//! | [`Vm::stats`], [`Vm::report`], [`Vm::timeline`], [`Vm::events`], the same of `Container`, whatever begins with `try_`, and all else that these handles have | does not wait |
//!
//! # What guests of one process share
//!
//! All guests are in the embedder's address space. A guest that breaks out of its virtual machine arrives among the
//! embedder's secrets and the other guests. Processors have faults by which a guest reads what it may not (VMSCAPE, L1TF, MDS
//! and others). They are as closed as the host's kernel closes them: [`Host::probe`] tells what it says ([`Exposure`](host::Exposure)).
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
//! | `diskN` | overlay, qcow2 or in-memory disk, or disk without io_uring ([`IoEngine`](disk::IoEngine)) | owns that disk, and blocks in its file |
//! | `console` | writer of a [`Console`] | calls the writer, which may block |
//! | `capture` | [`Capture`](net::Capture) | writes it, and may block |
//! | `agent` | container | speaks with the guest |
//! | `image` | image that is opened or prepared | reads and writes it |
//! | `pull` | pull of an image | ends requests that wait when the pull is cancelled |
//! | `stdin`, `stdout`, `stderr` | stream of a process that is a file or bytes (`Stdio`) | carries them, and may block |
//! | `left-behind` | disk whose file does not answer at the end | owns what the kernel still uses |
//! | `reaper` | VM whose last handle was dropped on a thread of its own | waits for its end |
//!
//! Threads of disks are scheduled as `SCHED_BATCH`: they preempt no vCPU when a request comes, so that requests come together.
//!
//! Calls block and need no runtime. What can be waited for also has a descriptor (`AsFd`, `AsRawFd`) for poll, epoll, tokio,
//! smol or mio; the feature `tokio` has futures and streams. All handles are `Send` and `Sync`. Handles of machines are cheap to clone; dropping the last one kills the
//! machine and waits for its threads.

#![cfg_attr(not(feature = "container"), allow(dead_code, unused_imports, reason = "only the container layer uses it"))]

mod arch;
#[cfg(feature = "tokio")]
mod async_io;
mod boot;
mod bus;
#[cfg(feature = "container")]
mod container;
mod error;
mod event_loop;
#[cfg(any(test, feature = "internals"))]
#[doc(hidden)]
pub mod fuzzing;
/// What only this repository's tests ask of machines.
#[cfg(any(test, feature = "internals"))]
#[doc(hidden)]
pub mod internals {
    #[cfg(feature = "container")]
    pub use crate::container::renew_container_generation;
    pub use crate::vm::{
        LiveParts, VmSpec, attach_disk, attach_net, detach_disk, detach_net, join, rebuild, renew_generation, split,
    };
}
#[cfg(test)]
#[path = "guest/main.rs"]
mod guest;
mod irq;
mod kvm;
mod legacy;
pub mod memory;
mod network;
#[cfg(any(feature = "container", test))]
mod proto;
mod rate;
mod size;
mod sys;
mod version;
mod virtio;
mod vm;

pub use boot::Kernel;
#[cfg(feature = "container")]
pub use container::{CancelToken, Container, ContainerBuilder, Exec, Image, Process};
pub use error::{Error, ErrorKind, Result};
pub use kvm::Host;
pub use rate::Rate;
pub use size::Size;
pub use vm::{Cgroup, Console, Disk, Exit, Net, Vm, VmBuilder};

/// What a [`Kernel`] boots with.
pub mod kernel {
    pub use crate::boot::{Initramfs, Modules};
}

/// The processor that a guest sees.
pub mod cpu {
    pub use crate::arch::embedder::*;
}

/// Disks: their kinds, limits and errors, overlays, handles, and memory file systems.
pub mod disk {
    #[cfg(feature = "container")]
    pub use crate::container::{NamedVolume, Tmpfs, Volume, VolumeInfo, VolumeStore, WritableLayer};
    #[cfg(feature = "qcow2")]
    pub use crate::vm::disk::Qcow2Disk;
    pub use crate::vm::disk::{
        CacheMode, DiskError, DiskHandle, DiskLimit, DiskOperation, DiskUsage, ErrorAction, ErrorClass, FileDisk,
        IoEngine, MemoryDisk, OpenFileDisk, OverlayDisk, ScratchDisk,
    };
    pub use crate::vm::overlay::{BaseImage, Overlay, OverlayInfo, Progress};
}

/// Networks: their kinds, policies and limits, switches, and handles.
pub mod net {
    pub use crate::vm::net::{
        Capture, CaptureStats, Cidr, ConnectionLimit, CustomNet, Denial, DenyReason, Mac, NetHandle, NetLimit,
        NetStats, Policy, PortForward, Protocol, PublishedPort, Rule, SocketNet, Switch, SwitchNet, TapFilesNet,
        TapNet, UserNet,
    };
}

/// Sockets between guest programs and the embedder, without a network.
pub mod vsock {
    pub use crate::virtio::vsock::{VsockListener, VsockStream};
    pub use crate::vm::Vsock;
}

/// Programs in a container: their streams, their limits, and how they end.
#[cfg(feature = "container")]
pub mod process {
    pub use crate::container::{
        ExitStatus, Output, ProcessLimits, ProcessReader, ProcessWriter, Resource, SeccompProfile, Stdio,
    };
}

/// Files of a running container; see [`Container::files`].
#[cfg(feature = "container")]
pub mod files {
    pub use crate::container::{CopyIn, CopyOut, CopyReport, FileDigest};
    pub use crate::container::{DirEntry, FileKind, FileMetadata, FileReader, Files};
}

/// What an [`Image`] may be.
#[cfg(feature = "container")]
pub mod image {
    #[cfg(feature = "keyless")]
    pub use crate::container::{CertificateIdentity, TrustRoot};
    pub use crate::container::{Collected, Digest, ImageStore, LayerPhase, LayerProgress, PulledImageInfo, Reference};
    #[cfg(feature = "registry")]
    pub use crate::container::{Credentials, Fetch, FetchRequest, FetchResponse, Registry};
    pub use crate::container::{Healthcheck, ImageConfig, ImageLimits, Platform};
    #[cfg(feature = "signatures")]
    pub use crate::container::{PublicKey, SignaturePolicy};
}

/// What happens to a VM while it runs.
pub mod event {
    pub use crate::virtio::DeviceId;
    pub use crate::vm::events::{Event, EventKind, Events, PauseCause, Throttled};
}

/// What is known when a VM has ended.
pub mod exit {
    pub use crate::vm::exit::{ExitReport, Registers, Stage};
}

/// Numbers and times of VMs.
pub mod stats {
    #[cfg(feature = "container")]
    pub use crate::container::Startup;
    pub use crate::vm::CgroupStats;
    pub use crate::vm::exit::Timeline;
    pub use crate::vm::stats::{DeviceStats, GuestMemoryStats, MemoryStats, Stats, VcpuStats};
}

/// The host: what it can do, and what guests leave to it.
pub mod host {
    pub use crate::kvm::{Exposure, KvmAccess, Vulnerability};
    pub use crate::sys::set_descriptor_reserve;
}

/// Handles for tasks of a [tokio](https://docs.rs/tokio) runtime.
///
/// [`Async`](tokio::Async) makes streams [`AsyncRead`](::tokio::io::AsyncRead) and [`AsyncWrite`](::tokio::io::AsyncWrite),
/// and has events and connections as futures. [`Vm::wait_async`], `Container::wait_async` and `Process::wait_async` wait for
/// ends. All are woken by descriptors, and have no threads.
///
/// Starting a machine, `Exec::spawn`, stopping, and dropping the last handle block: they are for `tokio::task::spawn_blocking`.
#[cfg(feature = "tokio")]
pub mod tokio {
    pub use crate::async_io::{Async, Pollable};
}

/// Traits and types for network backends of the embedder's own; see [`Net::custom`].
pub mod backend {
    pub use crate::network::{
        Capabilities, Csum, Frame, Gso, GsoKind, NetBackend, NicConfig, Offload, Offloads, Received, RxBuffer,
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
