//! The request to start a program: what it is, its user and its limits. No I/O; any thread.

use core::ffi::CStr;

use super::COOKIE_SIZE;
use super::alloc::vec::Vec;
use super::field::{Fields, Malformed, Writer};
use super::strings::Strings;

/// Tags of the fields. A tag's meaning never changes; what is new gets a new tag.
mod tag {
    pub(super) const ARGV: u8 = 1;
    pub(super) const ENV: u8 = 2;
    pub(super) const CWD: u8 = 3;
    /// Standard input, output and error are three tags in a row.
    pub(super) const STDIO: [u8; 3] = [4, 5, 6];
    pub(super) const COOKIE: u8 = 7;
    pub(super) const USER: u8 = 8;
    pub(super) const HOME: u8 = 9;
    pub(super) const MAKE_CWD: u8 = 10;
    pub(super) const STOP_SIGNAL: u8 = 11;
    /// Rows, then columns.
    pub(super) const TERMINAL: [u8; 2] = [12, 13];
    pub(super) const GROUPS: u8 = 14;
    pub(super) const MEMORY: u8 = 15;
    pub(super) const PIDS: u8 = 16;
    pub(super) const CPU_WEIGHT: u8 = 17;
    pub(super) const CPU_QUOTA_US: u8 = 18;
    pub(super) const RLIMITS: u8 = 19;
    pub(super) const NO_NEW_PRIVS: u8 = 20;
    pub(super) const CAPABILITIES: u8 = 21;
    pub(super) const SEAL: u8 = 22;
    pub(super) const FILTER: u8 = 23;
    pub(super) const FILTER_FLAGS: u8 = 24;
}

/// One of the three standard streams of a new process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Stdio {
    /// `/dev/null`.
    #[default]
    Null,
    /// A pipe that is relayed over a connection which the guest opens to this port of the host. Standard output and error with the same
    /// port share one pipe and one connection.
    Port(u32),
}

/// The size of a terminal's window, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TerminalSize {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// What a program and all that it starts may use together (Linux, cgroup v2). What is absent is as the machine allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ProcessLimits {
    /// Bytes: `memory.max`.
    pub(crate) memory: Option<u64>,
    /// Processes and threads: `pids.max`.
    pub(crate) pids: Option<u32>,
    /// 1 to 10,000: `cpu.weight`.
    pub(crate) cpu_weight: Option<u16>,
    /// Microseconds of processor time in each [`CPU_PERIOD_US`]: `cpu.max`.
    pub(crate) cpu_quota_us: Option<u64>,
}

/// The period of [`ProcessLimits::cpu_quota_us`]: Linux's default.
pub(crate) const CPU_PERIOD_US: u64 = 100_000;
/// The range of `cpu.weight`.
pub(crate) const CPU_WEIGHTS: core::ops::RangeInclusive<u16> = 1..=10_000;

impl ProcessLimits {
    /// Whether there is any.
    pub(crate) fn is_any(&self) -> bool {
        *self != Self::default()
    }
}

/// One limit of a process (getrlimit(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rlimit {
    /// Its number in Linux: `RLIMIT_*`.
    pub(crate) resource: u8,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// How many resources Linux has limits for (`RLIM_NLIMITS`).
const RLIMITS: u8 = 16;
/// Bytes of one [`Rlimit`], whose fields stand in their order.
const RLIMIT_SIZE: usize = 17;

impl Rlimit {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let ([resource], rest) = bytes.split_first_chunk()?;
        let (soft, rest) = rest.split_first_chunk()?;
        let (soft, hard) = (u64::from_le_bytes(*soft), u64::from_le_bytes(rest.try_into().ok()?));
        (*resource < RLIMITS && soft <= hard).then_some(Self { resource: *resource, soft, hard })
    }

    /// Appends it to a list.
    pub(crate) fn push(&self, to: &mut Vec<u8>) {
        to.push(self.resource);
        to.extend_from_slice(&self.soft.to_le_bytes());
        to.extend_from_slice(&self.hard.to_le_bytes());
    }
}

/// A list of limits in someone else's bytes, which [`Rlimit::push`] made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rlimits<'a>(pub(crate) &'a [u8]);

impl<'a> Rlimits<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let all = bytes.chunks(RLIMIT_SIZE).all(|rlimit| Rlimit::parse(rlimit).is_some());
        if all { Ok(Self(bytes)) } else { Err(Malformed("list of resource limits")) }
    }

    /// The limits in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Rlimit> + use<'a> {
        self.0.chunks(RLIMIT_SIZE).filter_map(Rlimit::parse)
    }
}

/// Bytes of one instruction of a filter (struct sock_filter).
pub(crate) const FILTER_INSTRUCTION: usize = 8;
/// Instructions of a filter, at most (Linux, `BPF_MAXINSNS`).
const FILTER_MAX: usize = 4096;

/// A program to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Spawn<'a> {
    /// The argument vector, at least the program. A program without a slash is looked for in `PATH` of `env`.
    pub(crate) argv: Strings<'a>,
    /// The whole environment, `NAME=value` each. Nothing is added.
    pub(crate) env: Strings<'a>,
    /// Where it starts, `/` if absent.
    pub(crate) cwd: Option<&'a CStr>,
    /// Directories of `cwd` that are missing are made, as root.
    pub(crate) make_cwd: bool,
    /// Its user: `USER` or `USER:GROUP`, by the names or numbers of the guest's own files; root if absent.
    pub(crate) user: Option<&'a CStr>,
    /// Supplementary groups beside those of the user, by name or number.
    pub(crate) groups: Strings<'a>,
    /// The user's home directory is added to the environment. Means nothing without a user.
    pub(crate) home: bool,
    /// 1 to 64: asks it to end when the machine shall. Others get SIGTERM, once those with a signal have ended.
    pub(crate) stop_signal: Option<u8>,
    /// Standard input, output and error.
    pub(crate) stdio: [Stdio; 3],
    /// What each connection of `stdio` begins with, so that the host knows it from those of other programs.
    pub(crate) cookie: &'a [u8],
    /// All three streams are a terminal of this size. Input and output are connected where `stdio` says; the third has none.
    pub(crate) terminal: Option<TerminalSize>,
    /// What it may use.
    pub(crate) limits: ProcessLimits,
    /// Its own limits, which what it starts inherits.
    pub(crate) rlimits: Rlimits<'a>,
    /// Executing a file never gives it more privileges (`PR_SET_NO_NEW_PRIVS`).
    pub(crate) no_new_privs: bool,
    /// The capabilities that it can ever have, bit by number (capabilities(7)); all if absent.
    pub(crate) capabilities: Option<u64>,
    /// Files of the kernel by which it could undo its limits are read-only for it.
    pub(crate) seal: bool,
    /// The instructions by which the kernel judges its system calls (seccomp(2)); none if empty.
    pub(crate) filter: &'a [u8],
    /// Flags of seccomp(2).
    pub(crate) filter_flags: u32,
}

impl<'a> Spawn<'a> {
    pub(super) fn encode(&self, fields: &mut Writer<'_>) {
        fields.bytes(tag::ARGV, self.argv.as_bytes());
        fields.bytes(tag::ENV, self.env.as_bytes());
        if let Some(cwd) = self.cwd {
            fields.bytes(tag::CWD, cwd.to_bytes_with_nul());
        }
        for (tag, stdio) in tag::STDIO.into_iter().zip(self.stdio) {
            if let Stdio::Port(port) = stdio {
                fields.u32(tag, port);
            }
        }
        fields.bytes(tag::COOKIE, self.cookie);
        if let Some(user) = self.user {
            fields.bytes(tag::USER, user.to_bytes_with_nul());
        }
        if !self.groups.is_empty() {
            fields.bytes(tag::GROUPS, self.groups.as_bytes());
        }
        fields.flag(tag::HOME, self.home);
        fields.flag(tag::MAKE_CWD, self.make_cwd);
        if let Some(signal) = self.stop_signal {
            fields.u8(tag::STOP_SIGNAL, signal);
        }
        if let Some(TerminalSize { rows, columns }) = self.terminal {
            fields.u16(tag::TERMINAL[0], rows);
            fields.u16(tag::TERMINAL[1], columns);
        }
        let ProcessLimits { memory, pids, cpu_weight, cpu_quota_us } = self.limits;
        memory.into_iter().for_each(|bytes| fields.u64(tag::MEMORY, bytes));
        pids.into_iter().for_each(|count| fields.u32(tag::PIDS, count));
        cpu_weight.into_iter().for_each(|weight| fields.u16(tag::CPU_WEIGHT, weight));
        cpu_quota_us.into_iter().for_each(|quota| fields.u64(tag::CPU_QUOTA_US, quota));
        if !self.rlimits.0.is_empty() {
            fields.bytes(tag::RLIMITS, self.rlimits.0);
        }
        fields.flag(tag::NO_NEW_PRIVS, self.no_new_privs);
        fields.flag(tag::SEAL, self.seal);
        self.capabilities.into_iter().for_each(|kept| fields.u64(tag::CAPABILITIES, kept));
        if !self.filter.is_empty() {
            fields.bytes(tag::FILTER, self.filter);
            fields.u32(tag::FILTER_FLAGS, self.filter_flags);
        }
    }

    pub(super) fn parse(fields: &Fields<'a>) -> Result<Self, Malformed> {
        let argv = Strings::parse(fields.get(tag::ARGV).unwrap_or_default(), "argv")?;
        if argv.is_empty() {
            return Err(Malformed("argv"));
        }
        let text = |tag, what| match fields.get(tag) {
            None => Ok(None),
            Some(bytes) => CStr::from_bytes_with_nul(bytes).map(Some).map_err(|_| Malformed(what)),
        };
        let mut stdio = [Stdio::Null; 3];
        for (tag, stdio) in tag::STDIO.into_iter().zip(&mut stdio) {
            if let Some(port) = fields.u32(tag, "stdio")? {
                *stdio = Stdio::Port(port);
            }
        }
        let cookie = fields.get(tag::COOKIE).unwrap_or_default();
        if cookie.len() > COOKIE_SIZE {
            return Err(Malformed("cookie"));
        }
        let stop_signal = match fields.u8(tag::STOP_SIGNAL, "stop signal")? {
            Some(signal) if !(1..=64).contains(&signal) => return Err(Malformed("stop signal")),
            signal => signal,
        };
        let [rows, columns] = tag::TERMINAL.map(|tag| fields.u16(tag, "terminal size"));
        let terminal = match (rows?, columns?) {
            (Some(rows), Some(columns)) => Some(TerminalSize { rows, columns }),
            (None, None) => None,
            _ => return Err(Malformed("terminal size")),
        };
        let cpu_weight = fields.u16(tag::CPU_WEIGHT, "processor weight")?;
        if cpu_weight.is_some_and(|weight| !CPU_WEIGHTS.contains(&weight)) {
            return Err(Malformed("processor weight"));
        }
        let filter = fields.get(tag::FILTER).unwrap_or_default();
        if !filter.len().is_multiple_of(FILTER_INSTRUCTION) || filter.len() > FILTER_MAX * FILTER_INSTRUCTION {
            return Err(Malformed("filter of system calls"));
        }
        Ok(Self {
            argv,
            env: Strings::parse(fields.get(tag::ENV).unwrap_or_default(), "environment")?,
            cwd: text(tag::CWD, "working directory")?,
            make_cwd: fields.flag(tag::MAKE_CWD, "making a directory")?,
            user: text(tag::USER, "user")?,
            groups: Strings::parse(fields.get(tag::GROUPS).unwrap_or_default(), "groups")?,
            home: fields.flag(tag::HOME, "home")?,
            stop_signal,
            stdio,
            cookie,
            terminal,
            limits: ProcessLimits {
                memory: fields.u64(tag::MEMORY, "memory limit")?,
                pids: fields.u32(tag::PIDS, "limit of processes")?,
                cpu_weight,
                cpu_quota_us: fields.u64(tag::CPU_QUOTA_US, "processor quota")?,
            },
            rlimits: Rlimits::parse(fields.get(tag::RLIMITS).unwrap_or_default())?,
            no_new_privs: fields.flag(tag::NO_NEW_PRIVS, "privileges")?,
            capabilities: fields.u64(tag::CAPABILITIES, "capabilities")?,
            seal: fields.flag(tag::SEAL, "sealing")?,
            filter,
            filter_flags: fields.u32(tag::FILTER_FLAGS, "flags of a filter")?.unwrap_or(0),
        })
    }
}
