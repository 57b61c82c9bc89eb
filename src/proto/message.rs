//! The messages of the control stream: frames whose payload was checked and means something. No I/O; any thread.

use super::alloc::vec::Vec;
use super::field::{Fields, Malformed, Writer};
use super::frame::{self, FrameError, MessageFrame};
use super::spawn::{Spawn, TerminalSize};
use super::{FROM_GUEST_MAX, FROM_HOST_MAX, SEED_SIZE};

/// Kinds from the host are small, and kinds from the guest have this bit. So a stream read by the wrong side is full of
/// unknown kinds.
const GUEST: u32 = 0x100;

const HOST_HELLO: u32 = 1;
const SPAWN: u32 = 2;
const SIGNAL: u32 = 3;
const KILL: u32 = 4;
const SHUTDOWN: u32 = 5;
const CONNECT: u32 = 6;
const RESEED: u32 = 7;
const RESIZE: u32 = 8;
const GUEST_HELLO: u32 = GUEST | 1;
const READY: u32 = GUEST | 2;
const FAILED: u32 = GUEST | 3;
const SPAWNED: u32 = GUEST | 4;
const SPAWN_FAILED: u32 = GUEST | 5;
const EXITED: u32 = GUEST | 6;
const ENDING: u32 = GUEST | 7;
const CONNECTED: u32 = GUEST | 8;
const RESEEDED: u32 = GUEST | 9;
const OOM_KILLED: u32 = GUEST | 10;

/// Tags, by message. A tag's meaning never changes; what is new gets a new tag.
mod tag {
    pub(super) const VERSION: u8 = 1;

    pub(super) const ROWS: u8 = 1;
    pub(super) const COLUMNS: u8 = 2;

    pub(super) const SIGNO: u8 = 1;
    pub(super) const GROUP: u8 = 2;

    pub(super) const GRACE_MS: u8 = 1;
    pub(super) const ACTION: u8 = 2;

    pub(super) const MIN: u8 = 1;
    pub(super) const MAX: u8 = 2;

    pub(super) const USER_SPACE_NS: u8 = 1;
    pub(super) const READY_NS: u8 = 2;
    pub(super) const KERNEL: u8 = 3;

    pub(super) const STAGE: u8 = 1;
    pub(super) const ERRNO: u8 = 2;
    pub(super) const TEXT: u8 = 3;

    pub(super) const PID: u8 = 1;

    pub(super) const STEP: u8 = 1;

    pub(super) const CODE: u8 = 1;
    pub(super) const BY_SIGNAL: u8 = 2;
    pub(super) const OOM: u8 = 3;

    pub(super) const END: u8 = 1;

    pub(super) const PORT: u8 = 1;

    pub(super) const SEED: u8 = 1;

    pub(super) const COUNT: u8 = 1;
}

/// An enum that travels as one byte.
macro_rules! byte_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $value:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum $name { $($(#[$doc])* $variant = $value,)* }

        impl $name {
            fn parse(byte: u8) -> Option<Self> {
                match byte { $($value => Some(Self::$variant),)* _ => None }
            }

            /// Every value, for tests that must not forget one.
            #[cfg(test)]
            pub(super) const ALL: &'static [Self] = &[$(Self::$variant,)*];
        }
    };
}

byte_enum! {
    /// How the machine shall end.
    End { /// Power off.
        PowerOff = 0,
        /// Start again.
        Reboot = 1,
        /// Stop where it is.
        Halt = 2,
    }
}

byte_enum! {
    /// What the shim was doing when it failed. `Other` also stands for a stage that a newer guest knows.
    Stage { /// A stage without a name of its own.
        Other = 0,
        /// Reading the boot configuration.
        BootConfig = 1,
        /// Waiting for a root device; the text names it.
        Device = 2,
        /// Mounting; the text names what.
        Mount = 3,
        /// Making the workloads' namespaces, cgroups and reaper.
        Isolation = 4,
        /// Talking to the host: it broke the protocol or speaks another version.
        Control = 5,
        /// PID 1 of the workloads ended, and they with it.
        Reaper = 6,
        /// Waiting for events.
        Loop = 7,
        /// Inserting a kernel module; the text names it.
        Modules = 8,
        /// Setting a parameter of the kernel; the text names it.
        Sysctl = 9,
    }
}

byte_enum! {
    /// Which step of starting a program failed. `Other` also stands for a step that a newer guest knows.
    SpawnStep { /// A step without a name of its own.
        Other = 0,
        /// The request itself: a process of that number exists, or the guest is going down.
        Request = 1,
        /// Connecting a stdio stream or making its pipe.
        Stdio = 2,
        /// Making the cgroup.
        Cgroup = 3,
        /// Making the process.
        Fork = 4,
        /// Preparing the new process.
        Prepare = 5,
        /// Changing into the working directory.
        Chdir = 6,
        /// Executing the program.
        Exec = 7,
        /// Finding the user, or becoming it.
        User = 8,
        /// Finding the group.
        Group = 9,
        /// Setting a resource limit.
        Rlimit = 10,
        /// Giving up privileges.
        Privileges = 11,
        /// Setting the limits of its cgroup.
        Limit = 12,
        /// Setting its filter of system calls.
        Seccomp = 13,
    }
}

/// What the host says.
#[allow(clippy::large_enum_variant, reason = "one at a time lives on the stack of who writes or reads it")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FromHost<'a> {
    /// The version in which the conversation goes on; the first message.
    Hello {
        /// One of those that the guest's `Hello` offered.
        version: u32,
    },
    /// Start a program; answered by `Spawned` or `SpawnFailed`.
    Spawn(Spawn<'a>),
    /// Send a signal to a process.
    Signal {
        /// 1 to 64.
        signo: u8,
        /// To its whole process group.
        group: bool,
    },
    /// Kill a process and all that it started, its cgroup. Also after its own exit.
    Kill,
    /// Set the size of a process's terminal.
    Resize(TerminalSize),
    /// End all processes, then the machine.
    Shutdown {
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u32,
        /// What comes after.
        end: End,
    },
    /// The machine is a copy of another: make the kernel's random numbers new. Answered by `Reseeded` of the same number.
    Reseed {
        /// Secret bytes.
        seed: &'a [u8; SEED_SIZE],
    },
    /// Connect this stream to a TCP service of the guest; the first message on a connection to [`super::CONNECT_PORT`], and said
    /// nowhere else. Answered by `Connected`; after that the stream is the service's.
    Connect {
        /// Not 0.
        port: u16,
    },
}

/// What the guest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FromGuest<'a> {
    /// The versions that the shim speaks; the first message.
    Hello {
        /// The oldest.
        min: u32,
        /// The newest.
        max: u32,
    },
    /// Programs can be started. Both times are the guest's `CLOCK_MONOTONIC`.
    Ready {
        /// When the shim's first instruction ran.
        user_space_ns: u64,
        /// Now.
        ready_ns: u64,
        /// The first two numbers of the kernel's version, 16 bits each; 0 if unknown.
        kernel: u32,
    },
    /// The shim cannot go on and ends the machine.
    Failed {
        /// While doing what.
        stage: Stage,
        /// The guest's `errno`, 0 if none.
        errno: i32,
        /// What exactly, for people. Not necessarily UTF-8: it may quote a path.
        text: &'a [u8],
    },
    /// The program runs.
    Spawned {
        /// As the workloads see it.
        pid: u32,
    },
    /// The program does not run.
    SpawnFailed {
        /// Which step failed.
        step: SpawnStep,
        /// The guest's `errno`.
        errno: i32,
    },
    /// The process itself has ended with this code. What it wrote before may still be in transit on its streams.
    Exited {
        /// The low byte of what it gave to `exit`.
        code: u8,
    },
    /// The process itself was ended by a signal.
    Signaled {
        /// Which one.
        signo: u8,
        /// The guest's kernel did it, for want of memory.
        oom: bool,
    },
    /// The guest's kernel has killed processes of a program for want of memory.
    OomKilled {
        /// How many since the program began.
        count: u32,
    },
    /// The shim ends the machine now, as asked or because a workload did; its last message.
    ///
    /// The host hangs up. The machine's end is this one, also where its kernel then can only reset or halt.
    Ending {
        /// How.
        end: End,
    },
    /// The kernel's random numbers are new, or cannot be made so.
    Reseeded {
        /// The guest's `errno`, 0 if they are.
        errno: i32,
    },
    /// The service is connected, or cannot be; then the guest hangs up.
    Connected {
        /// The guest's `errno`, 0 if it is.
        errno: i32,
    },
}

impl<'a> FromHost<'a> {
    /// Appends the message as a frame. Only a `Spawn` can be too long.
    pub(crate) fn encode(&self, stream: u32, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let kind = match self {
            Self::Hello { .. } => HOST_HELLO,
            Self::Spawn(_) => SPAWN,
            Self::Signal { .. } => SIGNAL,
            Self::Kill => KILL,
            Self::Resize(_) => RESIZE,
            Self::Shutdown { .. } => SHUTDOWN,
            Self::Reseed { .. } => RESEED,
            Self::Connect { .. } => CONNECT,
        };
        frame::append(out, stream, kind, FROM_HOST_MAX, |payload| {
            let mut fields = Writer(payload);
            match *self {
                Self::Hello { version } => fields.u32(tag::VERSION, version),
                Self::Spawn(spawn) => spawn.encode(&mut fields),
                Self::Signal { signo, group } => {
                    fields.u8(tag::SIGNO, signo);
                    fields.flag(tag::GROUP, group);
                }
                Self::Kill => {}
                Self::Resize(TerminalSize { rows, columns }) => {
                    fields.u16(tag::ROWS, rows);
                    fields.u16(tag::COLUMNS, columns);
                }
                Self::Shutdown { grace_ms, end } => {
                    fields.u32(tag::GRACE_MS, grace_ms);
                    fields.u8(tag::ACTION, end as u8);
                }
                Self::Reseed { seed } => fields.bytes(tag::SEED, seed),
                Self::Connect { port } => fields.u32(tag::PORT, port.into()),
            }
        })
    }

    /// Understands a frame; `None` if it is of a kind that this build does not know and skips.
    pub(crate) fn parse(frame: &MessageFrame<'a>) -> Result<Option<Self>, Malformed> {
        let fields = Fields::parse(frame.payload)?;
        Ok(Some(match frame.kind {
            HOST_HELLO => Self::Hello { version: fields.u32(tag::VERSION, "version")?.ok_or(Malformed("version"))? },
            SPAWN => Self::Spawn(Spawn::parse(&fields)?),
            SIGNAL => Self::Signal {
                signo: fields
                    .u8(tag::SIGNO, "signal")?
                    .filter(|signo| (1..=64).contains(signo))
                    .ok_or(Malformed("signal"))?,
                group: fields.flag(tag::GROUP, "group")?,
            },
            KILL => Self::Kill,
            RESIZE => {
                let side = |tag| fields.u16(tag, "terminal size")?.ok_or(Malformed("terminal size"));
                Self::Resize(TerminalSize { rows: side(tag::ROWS)?, columns: side(tag::COLUMNS)? })
            }
            SHUTDOWN => Self::Shutdown {
                grace_ms: fields.u32(tag::GRACE_MS, "grace")?.unwrap_or(0),
                end: End::parse(fields.u8(tag::ACTION, "action")?.unwrap_or(0)).ok_or(Malformed("action"))?,
            },
            RESEED => {
                let seed = fields.get(tag::SEED).and_then(|seed| seed.try_into().ok());
                Self::Reseed { seed: seed.ok_or(Malformed("seed"))? }
            }
            CONNECT => Self::Connect {
                port: fields
                    .u32(tag::PORT, "port")?
                    .and_then(|port| u16::try_from(port).ok())
                    .filter(|port| *port > 0)
                    .ok_or(Malformed("port"))?,
            },
            _ => return Ok(None),
        }))
    }
}

impl<'a> FromGuest<'a> {
    /// Appends the message as a frame. Too long a text of `Failed` is cut, so all fit.
    pub(crate) fn encode(&self, stream: u32, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let kind = match self {
            Self::Hello { .. } => GUEST_HELLO,
            Self::Ready { .. } => READY,
            Self::Failed { .. } => FAILED,
            Self::Spawned { .. } => SPAWNED,
            Self::SpawnFailed { .. } => SPAWN_FAILED,
            Self::Exited { .. } | Self::Signaled { .. } => EXITED,
            Self::OomKilled { .. } => OOM_KILLED,
            Self::Ending { .. } => ENDING,
            Self::Reseeded { .. } => RESEEDED,
            Self::Connected { .. } => CONNECTED,
        };
        frame::append(out, stream, kind, FROM_GUEST_MAX, |payload| {
            let mut fields = Writer(payload);
            match *self {
                Self::Hello { min, max } => {
                    fields.u32(tag::MIN, min);
                    fields.u32(tag::MAX, max);
                }
                Self::Ready { user_space_ns, ready_ns, kernel } => {
                    fields.u64(tag::USER_SPACE_NS, user_space_ns);
                    fields.u64(tag::READY_NS, ready_ns);
                    fields.u32(tag::KERNEL, kernel);
                }
                Self::Failed { stage, errno, text } => {
                    fields.u8(tag::STAGE, stage as u8);
                    fields.u32(tag::ERRNO, errno as u32);
                    // Room for the other fields remains.
                    fields.bytes(tag::TEXT, text.get(..FROM_GUEST_MAX / 2).unwrap_or(text));
                }
                Self::Spawned { pid } => fields.u32(tag::PID, pid),
                Self::SpawnFailed { step, errno } => {
                    fields.u8(tag::STEP, step as u8);
                    fields.u32(tag::ERRNO, errno as u32);
                }
                Self::Exited { code } => fields.u8(tag::CODE, code),
                Self::Signaled { signo, oom } => {
                    fields.u8(tag::BY_SIGNAL, signo);
                    fields.flag(tag::OOM, oom);
                }
                Self::OomKilled { count } => fields.u32(tag::COUNT, count),
                Self::Ending { end } => fields.u8(tag::END, end as u8),
                Self::Reseeded { errno } | Self::Connected { errno } => fields.u32(tag::ERRNO, errno as u32),
            }
        })
    }

    /// Understands a frame; `None` if it is of a kind that this build does not know and skips.
    pub(crate) fn parse(frame: &MessageFrame<'a>) -> Result<Option<Self>, Malformed> {
        let fields = Fields::parse(frame.payload)?;
        let errno = || Ok(fields.u32(tag::ERRNO, "errno")?.unwrap_or(0) as i32);
        Ok(Some(match frame.kind {
            GUEST_HELLO => Self::Hello {
                min: fields.u32(tag::MIN, "oldest version")?.ok_or(Malformed("oldest version"))?,
                max: fields.u32(tag::MAX, "newest version")?.ok_or(Malformed("newest version"))?,
            },
            READY => Self::Ready {
                user_space_ns: fields.u64(tag::USER_SPACE_NS, "time of user space")?.unwrap_or(0),
                ready_ns: fields.u64(tag::READY_NS, "time of readiness")?.unwrap_or(0),
                kernel: fields.u32(tag::KERNEL, "version of the kernel")?.unwrap_or(0),
            },
            FAILED => Self::Failed {
                stage: Stage::parse(fields.u8(tag::STAGE, "stage")?.unwrap_or(0)).unwrap_or(Stage::Other),
                errno: errno()?,
                text: fields.get(tag::TEXT).unwrap_or_default(),
            },
            SPAWNED => Self::Spawned { pid: fields.u32(tag::PID, "pid")?.unwrap_or(0) },
            SPAWN_FAILED => Self::SpawnFailed {
                step: SpawnStep::parse(fields.u8(tag::STEP, "step")?.unwrap_or(0)).unwrap_or(SpawnStep::Other),
                errno: errno()?,
            },
            EXITED => match (fields.u8(tag::CODE, "exit code")?, fields.u8(tag::BY_SIGNAL, "signal")?) {
                (Some(code), None) => Self::Exited { code },
                (None, Some(signo)) => Self::Signaled { signo, oom: fields.flag(tag::OOM, "oom")? },
                _ => return Err(Malformed("exit status")),
            },
            ENDING => {
                Self::Ending { end: End::parse(fields.u8(tag::END, "end")?.unwrap_or(0)).ok_or(Malformed("end"))? }
            }
            OOM_KILLED => Self::OomKilled { count: fields.u32(tag::COUNT, "count")?.unwrap_or(0) },
            RESEEDED => Self::Reseeded { errno: errno()? },
            CONNECTED => Self::Connected { errno: errno()? },
            _ => return Ok(None),
        }))
    }
}
