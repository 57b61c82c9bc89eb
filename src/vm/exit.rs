//! How a VM ended, how far it came, and what explains it.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::disk::DiskFault;
use super::stats::DeviceStats;

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

/// Whether a guest's character can be shown as it is: it controls nothing, nor which way text runs (Unicode, 23.2).
fn is_plain(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}')
}

/// How every Linux kernel begins the message of its panic.
const PANIC: &str = "Kernel panic - not syncing";

/// What was known when a VM ended.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Trace {
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

impl Trace {
    /// What the guest's kernel said when it panicked, if it did, without control characters.
    pub fn panic_message(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.console);
        let at = text.rfind(PANIC)?;
        let line = text.get(at..)?.lines().next()?;
        Some(line.chars().filter(|c| is_plain(*c)).collect::<String>().trim_end().to_owned())
    }

    /// The last `n` lines of the console, without control characters.
    pub fn console_lines(&self, n: usize) -> String {
        let text = String::from_utf8_lossy(&self.console);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|l| !l.is_empty()).collect();
        let shown = lines.get(lines.len().saturating_sub(n)..).unwrap_or_default().join("\n");
        shown.chars().filter(|c| is_plain(*c) || *c == '\n').collect()
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "last stage: {}", self.stage)?;
        if let Some(exit) = &self.vcpu_exit {
            write!(f, "; last vCPU exit: {exit}")?;
        }
        if let Some(registers) = &self.registers {
            write!(f, "; {registers}")?;
        }
        for d in self.devices.iter().filter(|d| d.faults > 0) {
            write!(f, "; {} had {} faults in {} requests", d.name, d.faults, d.requests)?;
        }
        match self.console_lines(12).as_str() {
            "" => f.write_str("; nothing on its console"),
            lines => write!(f, "; its console's last lines:\n{lines}"),
        }
    }
}

/// How a VM ended. An end is not an error.
///
/// `Display` prints one paragraph that a person can act on. All but the orderly [`Exit::PowerOff`] carry a [`Trace`];
/// [`Vm::trace`](crate::Vm::trace) has it for every end.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Exit {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset. It is not started again: that is the embedder's decision.
    Reboot(Box<Trace>),
    /// The guest halted for good: all its vCPUs stand still with interrupts disabled, which is noticed within three seconds.
    ///
    /// Kernels without the means to power off end so when they are told to, such as Linux with `acpi=off`. Where the process may
    /// have no more timers (`RLIMIT_SIGPENDING`) it is not noticed, and [`EventKind::Degraded`](crate::EventKind::Degraded) tells.
    Halt(Box<Trace>),
    /// The guest's kernel panicked.
    Panic(Box<Trace>),
    /// A fault while handling a fault while handling a fault; on real hardware, a spontaneous reset.
    TripleFault(Box<Trace>),
    /// Ended by [`Vm::kill`](crate::Vm::kill), by a grace that ran out, or by dropping the handle.
    Killed(Box<Trace>),
    /// Ended by this crate, because the guest had stopped answering.
    ///
    /// The text says what it did not answer. That was a kill for half a minute, or anything at all, because the shim of
    /// a container was gone.
    Unresponsive(String, Box<Trace>),
    /// A device cannot go on.
    ///
    /// It needed a reset that the guest's driver did not give it within ten seconds, or it failed by a mistake in this
    /// crate. The text says which and why.
    DeviceFault(String, Box<Trace>),
    /// The host could not do what the guest asked of a disk that was told to end the machine then, by
    /// [`ErrorAction::Stop`](crate::ErrorAction::Stop).
    DiskFault(Box<DiskFault>, Box<Trace>),
    /// The host's KVM could not go on with a vCPU.
    VcpuFault(String, Box<Trace>),
    /// PID 1 of the guest could not go on.
    InitFault(Box<Trace>),
}

impl Exit {
    /// What was known at the end; `None` after an orderly power-off.
    pub fn trace(&self) -> Option<&Trace> {
        match self {
            Self::PowerOff => None,
            Self::Reboot(t) | Self::Halt(t) | Self::Panic(t) | Self::TripleFault(t) | Self::Killed(t) => Some(t),
            Self::Unresponsive(_, t)
            | Self::InitFault(t)
            | Self::DeviceFault(_, t)
            | Self::VcpuFault(_, t)
            | Self::DiskFault(_, t) => Some(t),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reboot(t) => write!(f, "the guest asked for a reboot ({t})"),
            Self::Halt(t) => write!(f, "the guest halted ({t})"),
            Self::Panic(t) => {
                let message = t.panic_message().unwrap_or_else(|| "its console does not say why".into());
                write!(f, "the guest's kernel panicked: {message} ({t})")
            }
            Self::TripleFault(t) => write!(f, "the guest ended in a triple fault ({t})"),
            Self::Killed(t) => write!(f, "the virtual machine was killed ({t})"),
            Self::Unresponsive(why, t) => write!(f, "the guest stopped answering: {why} ({t})"),
            Self::DiskFault(fault, t) => write!(f, "{fault} ({t})"),
            Self::DeviceFault(why, t) => write!(f, "a device failed: {why} ({t})"),
            Self::VcpuFault(why, t) => write!(f, "the processor could not go on with the guest: {why} ({t})"),
            Self::InitFault(t) => write!(f, "the guest's init failed ({t})"),
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
    Device(String),
    Disk(DiskFault),
    Vcpu(String),
}

impl Reason {
    /// A reset after a panic message is a panic: a kernel without a driver for the panic port has no other way to say so.
    pub(super) fn report(self, trace: Trace) -> Exit {
        let panicked = trace.panic_message().is_some();
        let trace = Box::new(trace);
        match self {
            Self::PowerOff => Exit::PowerOff,
            Self::Panic => Exit::Panic(trace),
            Self::Reset | Self::TripleFault if panicked => Exit::Panic(trace),
            Self::Reset => Exit::Reboot(trace),
            Self::Halt => Exit::Halt(trace),
            Self::TripleFault => Exit::TripleFault(trace),
            Self::Killed => Exit::Killed(trace),
            Self::Unresponsive(why) => Exit::Unresponsive(why, trace),
            Self::InitFault => Exit::InitFault(trace),
            Self::Device(why) => Exit::DeviceFault(why, trace),
            Self::Disk(fault) => Exit::DiskFault(Box::new(fault), trace),
            Self::Vcpu(why) => Exit::VcpuFault(why, trace),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(console: &str) -> Trace {
        let console = console.as_bytes().to_vec();
        Trace { stage: Stage::KernelEntered, console, vcpu_exit: None, registers: None, devices: vec![] }
    }

    #[test]
    fn a_reset_after_a_panic_message_is_a_panic() {
        let panic = "[0.1] Kernel panic - not syncing: VFS\n";
        let exit = Reason::Reset.report(trace(panic));
        assert!(matches!(exit, Exit::Panic(_)));
        assert!(
            exit.to_string().starts_with("the guest's kernel panicked: Kernel panic - not syncing: VFS ("),
            "{exit}"
        );
        let colored = trace("Kernel panic - not syncing: \x1b[31mred\x07\n");
        assert_eq!(colored.panic_message().unwrap(), "Kernel panic - not syncing: [31mred");
        assert!(matches!(Reason::Reset.report(trace("bye")), Exit::Reboot(_)));
        assert!(matches!(Reason::Killed.report(trace(panic)), Exit::Killed(_)));
    }

    #[test]
    fn an_end_prints_as_one_paragraph_with_the_consoles_last_lines() {
        let printed = Reason::TripleFault.report(trace("one\r\n\x1b[1mtwo\n\n")).to_string();
        assert_eq!(
            printed,
            "the guest ended in a triple fault (last stage: kernel running; its console's last lines:\none\n[1mtwo)"
        );
        assert!(Reason::Halt.report(trace("")).to_string().ends_with("nothing on its console)"));
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
