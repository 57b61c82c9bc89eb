//! The container layer: runs [`Process`]es in a [`Container`] made of an [`Image`].

mod agent;
mod builder;
mod cancel;
mod connect;
mod exec;
mod ext4;
mod handshake;
mod image;
mod layer;
mod process;
mod shim;
mod stdio;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[cfg(any(test, feature = "internals"))]
pub(crate) use agent::control_stream;
pub use builder::ContainerBuilder;
pub use cancel::CancelToken;
pub use exec::{Exec, Stdio};
#[cfg(any(test, feature = "internals"))]
pub(crate) use image::image_tar;
pub use image::{Image, ImageLimits};
pub use layer::WritableLayer;
pub use process::{ExitStatus, Output, Process, ProcessReader, ProcessWriter};

use crate::error::Result;
use crate::sys::left;
use crate::virtio::vsock::VsockStream;
use crate::vm::{Exit, Vm};
use agent::Agent;

/// How much longer than its grace a shutdown may take before it is cut short.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(2);

/// A running container: a root file system in a virtual machine of its own.
///
/// The handle may be used from any thread. Dropping it kills everything inside, and waits at most 15 seconds for the
/// machine's end, which takes milliseconds on a host that works.
pub struct Container {
    // The agent's thread must end after the VM, whose end is what it waits for.
    vm: Arc<Vm>,
    agent: Agent,
}

impl Container {
    /// Returns a builder for a container whose root file system is `image`.
    pub fn builder(image: Image) -> ContainerBuilder {
        ContainerBuilder::new(image)
    }

    /// Describes a program to run in the container.
    ///
    /// `argv` is its name or path, then its arguments.
    pub fn exec<S: Into<std::ffi::OsString>>(&self, argv: impl IntoIterator<Item = S>) -> Exec<'_> {
        Exec::new(&self.vm, &self.agent, argv.into_iter().map(Into::into).collect())
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
        connect::connect(&self.vm, self.agent.version(), port)
    }

    /// Ends the container in good order.
    ///
    /// Every process gets SIGTERM and, after `grace`, SIGKILL. Then file systems are written and the machine is powered
    /// off.
    ///
    /// A guest that has not ended two seconds after `grace` is killed, whatever it does. This returns as soon as the
    /// machine has ended. That is at once after a kill, and at most 15 seconds later where a file of the host's does
    /// not answer.
    ///
    /// # Errors
    /// `TimedOut` when the killed machine has not ended after those 15 seconds.
    pub fn stop(&self, grace: Duration) -> Result<Exit> {
        let deadline = Instant::now().checked_add(grace).and_then(|it| it.checked_add(SHUTDOWN_MARGIN));
        // A container that has ended cannot be asked, and need not be.
        if self.agent.shutdown(grace, SHUTDOWN_MARGIN).is_ok() {
            if let Some(exit) = self.vm.wait_timeout(deadline.map_or(Duration::MAX, left))? {
                return Ok(exit);
            }
        }
        self.vm.end()
    }

    /// Ends the container now. Idempotent; does not wait.
    pub fn kill(&self) {
        self.vm.kill();
    }

    /// Waits until the container's machine has ended.
    ///
    /// # Errors
    /// As [`Vm::wait`].
    pub fn wait(&self) -> Result<Exit> {
        self.vm.wait()
    }

    /// Returns how long each step of the start took.
    pub fn startup(&self) -> Startup {
        self.agent.startup()
    }

    /// Returns the container's virtual machine.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // A child of fork has a copy of the handle, and nothing of the container.
        if !self.vm.is_current() {
            return;
        }
        // Whoever waits for a process shall hear the same as after a kill.
        self.agent.ended(self.vm.end().unwrap_or_else(|_| Exit::Killed(Box::new(self.vm.trace()))));
    }
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Container({:?})", self.vm)
    }
}

/// When a container came to life, counted from the call of `start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Startup {
    /// The guest's PID 1 ran its first instruction.
    pub user_space: Duration,
    /// Programs could be started.
    pub ready: Duration,
    /// The guest's own clock when its PID 1 ran its first instruction.
    ///
    /// This is the share of the guest's kernel.
    pub kernel_uptime: Duration,
}
