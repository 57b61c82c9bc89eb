//! The container layer: an [`Image`] becomes a [`Container`] in its own VM, in which [`Process`]es run.

mod agent;
mod builder;
mod connect;
mod exec;
mod image;
mod process;
mod shim;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use builder::ContainerBuilder;
pub use exec::{Exec, Stdio};
pub use image::Image;
#[cfg(any(test, feature = "internals"))]
pub(crate) use image::read_archive;
pub use process::{ExitStatus, Output, Process, ProcessReader, ProcessWriter};

use crate::error::Result;
use crate::virtio::vsock::VsockStream;
use crate::vm::{Exit, Vm};
use agent::Agent;

/// How much longer than its grace a shutdown may take before it is cut short.
const SHUTDOWN_MARGIN: Duration = Duration::from_secs(2);

/// A running container: a root file system, in a virtual machine of its own, in which programs run.
///
/// The handle may be used from any thread. Dropping it kills everything inside.
pub struct Container {
    // The agent's thread must end after the VM, whose end is what it waits for.
    vm: Arc<Vm>,
    agent: Agent,
}

impl Container {
    /// Begins to describe a container whose root file system is `image`.
    pub fn builder(image: Image) -> ContainerBuilder {
        ContainerBuilder::new(image)
    }

    /// Begins to describe a program to run in the container: its name or path, then its arguments.
    pub fn exec<S: Into<std::ffi::OsString>>(&self, argv: impl IntoIterator<Item = S>) -> Exec<'_> {
        Exec::new(&self.vm, &self.agent, argv.into_iter().map(Into::into).collect())
    }

    /// Connects to a TCP service in the container that listens on `port`, on whatever address: 127.0.0.1 or ::1 alone will do, and no
    /// network is needed. Waits at most about ten seconds for the guest.
    ///
    /// The stream is as one of [`std::net::TcpStream`]: each direction ends by itself, whoever does not read stops the other side,
    /// and a service that resets it, or a container that ends, is a `ConnectionReset` behind the last of what was sent. At most 512
    /// at once; any number one after the other.
    ///
    /// # Errors
    /// `NotFound` when nobody listens there; `InvalidConfig` for port 0; `ResourceExhausted` when there are too many; `TimedOut` when
    /// the service or the guest does not answer; `InvalidState` when the container has ended.
    pub fn connect(&self, port: u16) -> Result<VsockStream> {
        connect::connect(&self.vm, self.agent.version(), port)
    }

    /// Ends the container in good order: every process gets SIGTERM and, after `grace`, SIGKILL; then file systems are
    /// written and the machine is powered off. Whatever the guest does, this returns about two seconds after `grace`.
    ///
    /// # Errors
    /// As [`Vm::wait`].
    pub fn stop(&self, grace: Duration) -> Result<Exit> {
        let deadline = Instant::now() + grace + SHUTDOWN_MARGIN;
        // A container that has ended cannot be asked, and need not be.
        if self.agent.shutdown(grace).is_ok() {
            if let Some(exit) = self.vm.wait_timeout(deadline.saturating_duration_since(Instant::now()))? {
                return Ok(exit);
            }
        }
        self.vm.kill();
        self.vm.wait()
    }

    /// Ends the container now. Idempotent; returns at once.
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

    /// How starting went: what each step took.
    pub fn startup(&self) -> Startup {
        self.agent.startup()
    }

    /// The virtual machine, for what a container has no words of its own for.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.vm.kill();
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
    /// The guest's own clock when its PID 1 ran its first instruction: the share of the guest's kernel.
    pub kernel_uptime: Duration,
}
