//! The container layer: runs [`Process`]es in a [`Container`] made of an [`Image`].

mod builder;
mod cancel;
mod control;
mod defaults;
mod exec;
mod ext4;
mod files;
#[cfg(any(test, feature = "internals"))]
mod generation;
mod image;
mod layer;
mod process;
mod redirect;
mod shim;
mod stdio;
mod volume;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use builder::{ContainerBuilder, Tmpfs};
pub use cancel::CancelToken;
#[cfg(any(test, feature = "internals"))]
pub(crate) use control::control_stream;
#[cfg(any(test, feature = "internals"))]
pub(crate) use exec::fuzz_seccomp_profile;
pub use exec::{Exec, ProcessLimits, Resource, SeccompProfile, Stdio};
pub use files::{CopyIn, CopyOut, CopyReport, DirEntry, FileDigest, FileKind, FileMetadata, FileReader, Files};
#[cfg(any(test, feature = "internals"))]
pub use generation::renew_container_generation;
#[cfg(all(feature = "registry", any(test, feature = "internals")))]
pub(crate) use image::fuzz_challenge;
#[cfg(any(test, feature = "internals"))]
pub(crate) use image::fuzz_reference;
#[cfg(all(feature = "keyless", any(test, feature = "internals")))]
pub(crate) use image::keyless_signature;
#[cfg(feature = "keyless")]
pub use image::{CertificateIdentity, TrustRoot};
pub use image::{Collected, Digest, ImageStore, LayerPhase, LayerProgress, PulledImageInfo, Reference};
#[cfg(feature = "registry")]
pub use image::{Credentials, Fetch, FetchRequest, FetchResponse, Registry};
pub use image::{Healthcheck, Image, ImageConfig, ImageLimits, Platform};
#[cfg(feature = "signatures")]
pub use image::{PublicKey, SignaturePolicy};
#[cfg(any(test, feature = "internals"))]
pub(crate) use image::{image_tar, oci_layer, oci_layer_file, oci_manifest};
pub use layer::WritableLayer;
pub use process::{ExitStatus, Output, Process, ProcessReader, ProcessWriter};
pub use volume::{NamedVolume, Volume, VolumeInfo, VolumeStore};

use crate::error::Result;
use crate::sys::left;
use crate::virtio::vsock::VsockStream;
use crate::vm::disk::DiskHandle;
use crate::vm::events::Events;
use crate::vm::net::NetHandle;
use crate::vm::{Exit, ExitReport, MemoryStats, Stats, Timeline, Vm, no_such};
use control::Agent;
use defaults::ProgramDefaults;

/// How much longer than its grace a shutdown may take before it is cut short.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(2);

/// A running container: a root file system in a virtual machine of its own.
///
/// The handle is cheap to clone and may be used from any thread. Dropping the last clone kills everything inside, and
/// waits for the machine's end. That takes milliseconds on a host that works, and at most 26 seconds on one that does not.
///
/// The descriptor behind [`AsFd`] and [`AsRawFd`] becomes readable when the container has ended, for poll, epoll, tokio,
/// smol or mio.
#[derive(Clone)]
pub struct Container {
    running: Arc<RunningContainer>,
}

/// What all clones of a handle share.
struct RunningContainer {
    // The agent's thread must end after the VM, whose end is what it waits for.
    vm: Vm,
    agent: Agent,
    defaults: ProgramDefaults,
    labels: BTreeMap<String, String>,
    /// How many disks the embedder has given it.
    disks: usize,
}

impl Container {
    /// Returns a builder for a container whose root file system is `image`.
    pub fn builder(image: Image) -> ContainerBuilder {
        ContainerBuilder::new(image)
    }

    /// Describes a program to run in the container.
    ///
    /// `argv` is its name or path, then its arguments. Environment, user and working directory are those of the builder, or
    /// else of the image's configuration, unless set otherwise.
    pub fn exec<S: Into<std::ffi::OsString>>(&self, argv: impl IntoIterator<Item = S>) -> Exec {
        Exec::new(self.clone(), argv.into_iter().map(Into::into).collect())
    }

    /// Describes the image's own program: its entrypoint, then its command.
    ///
    /// [`Container::stop`] asks it to end by the image's stop signal. Where the image names no program,
    /// [`Exec::spawn`] fails with `InvalidConfig`, unless arguments are added.
    pub fn command(&self) -> Exec {
        Exec::of_image(self.clone())
    }

    /// Connects to a TCP service in the container that listens on `port`.
    ///
    /// It may listen on any address: 127.0.0.1 or ::1 alone will do, and no network is needed. Waits at most eleven
    /// seconds for the guest, and ten for a host that is busy.
    ///
    /// The stream behaves as a [`std::net::TcpStream`]: each direction ends by itself, and a side that does not read
    /// stops the other. When the service resets it, or the container ends, the reader gets `ConnectionReset` after the
    /// last byte sent. At most 512 streams may be open at once.
    ///
    /// # Errors
    /// - `NotFound` when nothing listens there.
    /// - `InvalidConfig` for port 0.
    /// - `ResourceExhausted` when there are too many.
    /// - `TimedOut` when the service or the guest does not answer.
    /// - `InvalidState` when the container has ended.
    pub fn connect(&self, port: u16) -> Result<VsockStream> {
        control::connect(self.vm(), self.agent().version(), port)
    }

    /// Connects to a TCP service in the container that may not listen yet.
    ///
    /// It tries until something listens on `port`, for at most `timeout`. What it waits for the guest's answer to the last
    /// try comes on top, as of [`Container::connect`].
    ///
    /// # Errors
    /// `TimedOut` when nothing listened in time; otherwise those of [`Container::connect`], at once.
    pub fn connect_within(&self, port: u16, timeout: Duration) -> Result<VsockStream> {
        control::connect_within(self.vm(), self.agent().version(), port, timeout)
    }

    /// Ends the container in good order.
    ///
    /// A program of [`Container::command`] gets the image's stop signal where that is not SIGTERM, and the others go on
    /// until it has ended. Then every process gets SIGTERM and, after `grace` in all, SIGKILL. At last file systems are written and the machine is
    /// powered off.
    ///
    /// A guest that has not ended two seconds after `grace` is killed, whatever it does. This returns as soon as the
    /// machine has ended. That is at once after a kill, and at most 15 seconds later where a file of the host's does
    /// not answer.
    ///
    /// # Errors
    /// `TimedOut` when the killed machine has not ended after those 15 seconds. `InvalidState` on a thread of the
    /// machine's own, which cannot wait for its end.
    pub fn stop(&self, grace: Duration) -> Result<Exit> {
        self.vm().check_thread()?;
        let deadline = Instant::now().checked_add(grace).and_then(|it| it.checked_add(SHUTDOWN_MARGIN));
        // A container that has ended cannot be asked, and need not be.
        if self.agent().shutdown(grace, SHUTDOWN_MARGIN).is_ok()
            && let Some(exit) = self.wait_timeout(deadline.map_or(Duration::MAX, left))
        {
            return Ok(exit);
        }
        self.vm().end()
    }

    /// Ends the container now. Idempotent; does not wait.
    pub fn kill(&self) {
        self.vm().kill();
    }

    /// Waits until the container has ended.
    ///
    /// May be called repeatedly and from many threads.
    pub fn wait(&self) -> Exit {
        self.vm().wait()
    }

    /// Waits until the container has ended, at most `timeout`; `None` when it still runs.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Exit> {
        self.vm().wait_timeout(timeout)
    }

    /// Returns how the container ended, or `None` while it runs. Never waits.
    pub fn try_wait(&self) -> Option<Exit> {
        self.vm().try_wait()
    }

    /// Stops everything inside where it is, until [`Container::resume`]. Idempotent.
    ///
    /// Waits for requests in flight, at most 11 seconds; see [`Vm::pause`]. Time-outs of programs go on.
    ///
    /// # Errors
    /// As [`Vm::pause`].
    pub fn pause(&self) -> Result<()> {
        self.vm().pause()
    }

    /// Lets a paused container go on. Idempotent; see [`Vm::resume`].
    ///
    /// # Errors
    /// As [`Vm::resume`].
    pub fn resume(&self) -> Result<()> {
        self.vm().resume()
    }

    /// Returns a stream of the container's events, from its start on; see [`Vm::events`].
    ///
    /// # Errors
    /// As [`Vm::events`].
    pub fn events(&self) -> Result<Events> {
        self.vm().events()
    }

    /// Returns the counters of vCPUs and devices. Does not disturb the guest.
    pub fn stats(&self) -> Stats {
        self.vm().stats()
    }

    /// Returns what the container's memory costs the host, and how the guest uses it.
    ///
    /// Waits as long as [`Vm::memory_stats`].
    ///
    /// # Errors
    /// As [`Vm::memory_stats`].
    pub fn memory_stats(&self) -> Result<MemoryStats> {
        self.vm().memory_stats()
    }

    /// Returns the `n`th disk, counted from 0 in the order of [`ContainerBuilder::disk`].
    ///
    /// # Errors
    /// `NotFound` when there are fewer.
    pub fn disk(&self, n: usize) -> Result<DiskHandle> {
        // Behind them are those that the container itself is made of.
        if n >= self.running.disks {
            return Err(no_such("disk", n, self.running.disks));
        }
        self.vm().disk(n)
    }

    /// Returns the `n`th network card, counted from 0 in the order of [`ContainerBuilder::net`].
    ///
    /// # Errors
    /// `NotFound` when there are fewer.
    pub fn net(&self, n: usize) -> Result<NetHandle> {
        self.vm().net(n)
    }

    /// Returns the labels that [`ContainerBuilder::label`] gave it.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.running.labels
    }

    /// Returns a report of the container, as it is now or was at its end.
    pub fn report(&self) -> ExitReport {
        self.vm().report()
    }

    /// Returns when each stage of its machine was reached, counted from the call of `start`.
    pub fn timeline(&self) -> Timeline {
        self.vm().timeline()
    }

    /// Returns how long each step of the start took.
    pub fn startup(&self) -> Startup {
        self.agent().startup()
    }

    /// Returns the container's virtual machine, for what only machines have.
    ///
    /// Clones of it do not keep the container.
    pub fn vm(&self) -> &Vm {
        &self.running.vm
    }

    fn agent(&self) -> &Agent {
        &self.running.agent
    }

    fn defaults(&self) -> &ProgramDefaults {
        &self.running.defaults
    }
}

/// A stream, and its other end, both of which block.
#[cfg(test)]
fn pair() -> (VsockStream, std::os::unix::net::UnixStream) {
    let (near, far, _) = VsockStream::pair().expect("a pair of sockets");
    far.set_nonblocking(false).expect("a socket that blocks");
    (near, far)
}

impl AsFd for Container {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.vm().as_fd()
    }
}

impl AsRawFd for Container {
    fn as_raw_fd(&self) -> RawFd {
        self.vm().as_raw_fd()
    }
}

impl Drop for RunningContainer {
    fn drop(&mut self) {
        // A child of fork has a copy of the handle, and nothing of the container.
        if !self.vm.is_current() {
            return;
        }
        // For those who wait for a process this is the same as a kill. A thread of the machine's cannot wait for its end.
        let exit = match self.vm.is_own_thread() {
            true => {
                self.vm.kill();
                None
            }
            false => self.vm.end().ok(),
        };
        self.agent.ended(exit.unwrap_or_else(|| Exit::Killed { report: Arc::new(self.vm.report()) }));
    }
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Container({:?})", self.vm())
    }
}

/// When a container came to life, counted from the call of `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Startup {
    /// The guest's PID 1 ran its first instruction.
    pub user_space_started: Duration,
    /// Programs could be started.
    pub ready: Duration,
    /// The guest's own clock when its PID 1 ran its first instruction.
    ///
    /// This is the share of the guest's kernel.
    pub kernel_uptime: Duration,
}
