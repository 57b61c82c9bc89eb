//! How a VM ended, how far it came, and what explains it.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use super::disk::DiskError;
use super::stats::DeviceStats;
use crate::legacy::GuestEnd;
use crate::virtio::DeviceId;

pub use crate::arch::Registers;

/// How far a guest has come. Later stages compare greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Stage {
    /// The machine is being put together.
    Building,
    /// The first vCPU was given to the processor.
    Running,
    /// The guest touched a device: its code runs.
    KernelEntered,
    /// A driver of the guest has set up a virtio device.
    DriversReady,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Building => "building the machine",
            Self::Running => "first vCPU running",
            Self::KernelEntered => "kernel running",
            Self::DriversReady => "virtio drivers ready",
        })
    }
}

/// When each stage was reached, counted from the call of `start`. `None`: not yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeline {
    /// Before the first vCPU was given to the processor.
    pub running: Option<Duration>,
    /// At the guest's first access to a device.
    pub kernel_entered: Option<Duration>,
    /// When the first driver of the guest had set up its device.
    pub drivers_ready: Option<Duration>,
    /// When the guest ended, or was ended.
    pub ended: Option<Duration>,
}

/// The clock behind [`Timeline`]: each mark is set once, from any thread.
#[derive(Debug)]
pub(super) struct BootMarks {
    start: Instant,
    running: OnceLock<Duration>,
    kernel_entered: OnceLock<Duration>,
    drivers_ready: OnceLock<Duration>,
    ended: OnceLock<Duration>,
}

impl BootMarks {
    pub(super) fn new(start: Instant) -> Self {
        let none = OnceLock::new;
        Self { start, running: none(), kernel_entered: none(), drivers_ready: none(), ended: none() }
    }

    /// True the first time.
    fn mark(&self, stage: &OnceLock<Duration>) -> bool {
        stage.get().is_none() && stage.set(self.start.elapsed()).is_ok()
    }

    pub(super) fn running(&self) -> bool {
        self.mark(&self.running)
    }

    pub(super) fn kernel_entered(&self) {
        self.mark(&self.kernel_entered);
    }

    pub(super) fn drivers_ready(&self) -> bool {
        self.mark(&self.drivers_ready)
    }

    pub(super) fn ended(&self) {
        self.mark(&self.ended);
    }

    pub(super) fn stage(&self) -> Stage {
        match self.timeline() {
            Timeline { drivers_ready: Some(_), .. } => Stage::DriversReady,
            Timeline { kernel_entered: Some(_), .. } => Stage::KernelEntered,
            Timeline { running: Some(_), .. } => Stage::Running,
            _ => Stage::Building,
        }
    }

    pub(super) fn timeline(&self) -> Timeline {
        Timeline {
            running: self.running.get().copied(),
            kernel_entered: self.kernel_entered.get().copied(),
            drivers_ready: self.drivers_ready.get().copied(),
            ended: self.ended.get().copied(),
        }
    }
}

/// Whether a guest's character can be shown as it is (Unicode, 23.2).
///
/// It begins no line, controls nothing, and does not change which way text runs.
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{206f}' | '\u{61c}')
}

/// Characters of a panic's message that are shown.
const MAX_MESSAGE: usize = 512;

/// How every Linux kernel begins the message of its panic.
const PANIC: &str = "Kernel panic - not syncing";

/// What is known of a VM, or was known when it ended.
///
/// [`Vm::report`](crate::Vm::report) and [`Exit::report`] return it.
///
/// `{}` prints the stage, `{:#}` everything but what is of no interest to people.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExitReport {
    /// How far the guest had come.
    pub stage: Stage,
    /// The last bytes of all its consoles, at most 64 KiB.
    pub console: Vec<u8>,
    /// Why the vCPU that ended it had left the guest, when that says something.
    pub vcpu_exit: Option<String>,
    /// That vCPU's registers, when they could be read and matter.
    pub registers: Option<Registers>,
    /// What each device had seen.
    pub devices: Vec<DeviceStats>,
}

impl ExitReport {
    /// Nothing but how far the guest has come.
    #[cfg(test)]
    pub(crate) fn new(stage: Stage) -> Self {
        Self { stage, console: Vec::new(), vcpu_exit: None, registers: None, devices: Vec::new() }
    }

    /// Returns what the guest's kernel said when it panicked, if it did, without control characters.
    ///
    /// At most 512 characters of it.
    pub fn panic_message(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.console);
        let at = text.rfind(PANIC)?;
        let line = text.get(at..)?.lines().next()?;
        Some(line.chars().filter(|c| is_plain(*c)).take(MAX_MESSAGE).collect::<String>().trim_end().to_owned())
    }

    /// Returns how far the guest came and what it printed last: what a person can act on.
    #[cfg(feature = "container")]
    pub(crate) fn for_people(&self) -> String {
        match self.console_lines(CONSOLE_LINES).as_str() {
            "" => format!("{self}; nothing on its console"),
            lines => format!("{self}; its console's last lines:\n{lines}"),
        }
    }

    /// Returns the last `n` lines of the console, without control characters.
    pub fn console_lines(&self, n: usize) -> String {
        let text = String::from_utf8_lossy(&self.console);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
        let shown = lines.get(lines.len().saturating_sub(n)..).unwrap_or_default().join("\n");
        shown.chars().filter(|c| is_plain(*c) || *c == '\n').collect()
    }
}

/// How many of the console's last lines are printed.
const CONSOLE_LINES: usize = 12;

impl fmt::Display for ExitReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "last stage: {}", self.stage)?;
        if !f.alternate() {
            return Ok(());
        }
        if let Some(exit) = &self.vcpu_exit {
            write!(f, "; last vCPU exit: {exit}")?;
        }
        if let Some(registers) = &self.registers {
            write!(f, "; {registers}")?;
        }
        for it in self.devices.iter().filter(|it| it.driver_errors > 0) {
            write!(f, "; {}: {} driver errors in {} requests", it.device, it.driver_errors, it.requests)?;
        }
        match self.console_lines(CONSOLE_LINES).as_str() {
            "" => f.write_str("; nothing on its console"),
            lines => write!(f, "; its console's last lines:\n{lines}"),
        }
    }
}

/// How a VM ended. An end is not an error.
///
/// `{}` prints one line for people. `{:#}` adds the console's last lines, the last vCPU exit and the registers. Every end
/// carries an [`ExitReport`], which [`Exit::report`] returns whatever the end is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// The guest powered itself off.
    PowerOff {
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// The guest asked for a reset. It is not started again: that is the embedder's decision.
    Reboot {
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// The guest halted for good: all its vCPUs stand still with interrupts disabled.
    ///
    /// That is noticed within three seconds. Kernels without the means to power off end so when they are asked to, such
    /// as Linux with `acpi=off`. Where the process may have no more timers (`RLIMIT_SIGPENDING`) it is not noticed, and
    /// the event [`EventKind::Degraded`](crate::event::EventKind::Degraded) says so.
    Halt {
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// The guest's kernel panicked; [`ExitReport::panic_message`] returns what it said.
    Panic {
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// The guest's processor failed to handle a fault (Intel SDM, volume 3, "shutdown").
    ///
    /// Real hardware resets itself then.
    TripleFault {
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// Ended by [`Vm::kill`](crate::Vm::kill), by a grace that ran out, or by dropping the last handle.
    Killed {
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// Ended by this crate, because the guest had stopped answering.
    ///
    /// It had not answered a kill for half a minute, or nothing at all, because the shim of a container was gone.
    Unresponsive {
        /// What the guest did not answer.
        message: String,
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// A device cannot go on.
    ///
    /// It needed a reset that the guest's driver did not give it within ten seconds. Or it failed by a mistake in this
    /// crate, or in a backend of the embedder's.
    DeviceFault {
        /// Which device.
        device: DeviceId,
        /// Why.
        message: String,
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// The host failed a request of a disk whose [`ErrorAction`](crate::disk::ErrorAction) is to end the machine then.
    DiskFault {
        /// Which disk, what the guest wanted, and what the host said.
        error: Box<DiskError>,
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// The host's KVM could not go on with a vCPU.
    VcpuFault {
        /// Why.
        message: String,
        /// What was known then.
        report: Arc<ExitReport>,
    },
    /// PID 1 of the guest could not go on.
    InitFault {
        /// What was known then.
        report: Arc<ExitReport>,
    },
}

impl Exit {
    /// Returns what was known at the end.
    pub fn report(&self) -> &ExitReport {
        match self {
            Self::PowerOff { report }
            | Self::Reboot { report }
            | Self::Halt { report }
            | Self::Panic { report }
            | Self::TripleFault { report }
            | Self::Killed { report }
            | Self::Unresponsive { report, .. }
            | Self::DeviceFault { report, .. }
            | Self::DiskFault { report, .. }
            | Self::VcpuFault { report, .. }
            | Self::InitFault { report } => report,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff { .. } => f.write_str("the guest powered off")?,
            Self::Reboot { .. } => f.write_str("the guest asked for a reboot")?,
            Self::Halt { .. } => f.write_str("the guest halted")?,
            Self::Panic { report } => match report.panic_message() {
                Some(message) => write!(f, "the guest's kernel panicked: {message}")?,
                None => f.write_str("the guest's kernel panicked: its console does not say why")?,
            },
            Self::TripleFault { .. } => f.write_str("the guest ended in a triple fault")?,
            Self::Killed { .. } => f.write_str("the virtual machine was killed")?,
            Self::Unresponsive { message, .. } => write!(f, "the guest stopped answering: {message}")?,
            Self::DeviceFault { device, message, .. } => write!(f, "{device} failed: {message}")?,
            Self::DiskFault { error, .. } => write!(f, "{error}")?,
            Self::VcpuFault { message, .. } => write!(f, "the processor could not go on with the guest: {message}")?,
            Self::InitFault { .. } => f.write_str("the guest's init failed")?,
        }
        match (f.alternate(), self) {
            (true, _) => write!(f, " ({:#})", self.report()),
            (false, Self::PowerOff { .. }) => Ok(()),
            (false, _) => write!(f, " ({})", self.report()),
        }
    }
}

/// Why the machine stops, before the report is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Reason {
    PowerOff,
    Reset,
    Halt,
    TripleFault,
    Killed,
    Unresponsive(String),
    Panic,
    InitFault,
    Device(DeviceId, String),
    Disk(DiskError),
    Vcpu(String),
}

impl From<GuestEnd> for Reason {
    fn from(end: GuestEnd) -> Self {
        match end {
            GuestEnd::PowerOff => Self::PowerOff,
            GuestEnd::Reset => Self::Reset,
            GuestEnd::Halt => Self::Halt,
            GuestEnd::InitFault => Self::InitFault,
            GuestEnd::Panic => Self::Panic,
            GuestEnd::TripleFault => Self::TripleFault,
        }
    }
}

impl Reason {
    /// A reset after a panic message is a panic: a kernel without a driver for the panic port has no other way to say so.
    pub(super) fn exit(self, report: Arc<ExitReport>) -> Exit {
        let panicked = report.panic_message().is_some();
        match self {
            Self::PowerOff => Exit::PowerOff { report },
            Self::Panic => Exit::Panic { report },
            Self::Reset | Self::TripleFault if panicked => Exit::Panic { report },
            Self::Reset => Exit::Reboot { report },
            Self::Halt => Exit::Halt { report },
            Self::TripleFault => Exit::TripleFault { report },
            Self::Killed => Exit::Killed { report },
            Self::Unresponsive(message) => Exit::Unresponsive { message, report },
            Self::InitFault => Exit::InitFault { report },
            Self::Device(device, message) => Exit::DeviceFault { device, message, report },
            Self::Disk(error) => Exit::DiskFault { error: Box::new(error), report },
            Self::Vcpu(message) => Exit::VcpuFault { message, report },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(console: &str) -> Arc<ExitReport> {
        Arc::new(ExitReport { console: console.into(), ..ExitReport::new(Stage::KernelEntered) })
    }

    #[test]
    fn a_reset_after_a_panic_message_is_a_panic() {
        let panic = "[0.1] Kernel panic - not syncing: VFS\n";
        let exit = Reason::Reset.exit(report(panic));
        assert!(matches!(exit, Exit::Panic { .. }));
        assert!(
            exit.to_string().starts_with("the guest's kernel panicked: Kernel panic - not syncing: VFS ("),
            "{exit}"
        );
        let colored = report("Kernel panic - not syncing: \x1b[31mred\x07\n");
        assert_eq!(colored.panic_message().unwrap(), "Kernel panic - not syncing: [31mred");
        assert!(matches!(Reason::Reset.exit(report("bye")), Exit::Reboot { .. }));
        assert!(matches!(Reason::Killed.exit(report(panic)), Exit::Killed { .. }));
    }

    #[test]
    fn an_end_prints_as_one_line_and_in_full_when_asked() {
        let exit = Reason::TripleFault.exit(report("one\r\n\x1b[1mtwo\n\n"));
        assert_eq!(exit.to_string(), "the guest ended in a triple fault (last stage: kernel running)");
        assert_eq!(
            format!("{exit:#}"),
            "the guest ended in a triple fault (last stage: kernel running; its console's last lines:\none\n[1mtwo)"
        );
        let silent = Reason::PowerOff.exit(report(""));
        assert_eq!(silent.to_string(), "the guest powered off");
        assert!(format!("{silent:#}").ends_with("nothing on its console)"));
        assert_eq!(silent, silent.clone());
        assert_ne!(silent, exit);
    }

    #[test]
    fn stages_are_reached_one_after_the_other() {
        let marks = BootMarks::new(Instant::now());
        assert_eq!(marks.stage(), Stage::Building);
        marks.running();
        marks.kernel_entered();
        assert_eq!(marks.stage(), Stage::KernelEntered);
        let first = marks.timeline();
        marks.kernel_entered();
        assert_eq!(marks.timeline(), first);
    }
}
