//! Rules of a filter: what happens to a call, and under which conditions.

/// What the kernel does with a call, the strictest first (seccomp(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::container) enum Action {
    KillProcess,
    KillThread,
    Trap,
    /// The call fails with this error number, 4095 at most.
    Errno(u16),
    Log,
    Allow,
}

impl Action {
    /// The filter's result (Linux, include/uapi/linux/seccomp.h).
    pub(super) fn result(self) -> u32 {
        match self {
            Self::KillProcess => 0x8000_0000,
            Self::KillThread => 0,
            Self::Trap => 0x0003_0000,
            Self::Errno(errno) => 0x0005_0000 | u32::from(errno),
            Self::Log => 0x7ffc_0000,
            Self::Allow => 0x7fff_0000,
        }
    }

    /// Returns its rank, of which a lower one is stricter. Actions that fail a call have one rank, whatever the error.
    pub(super) fn strictness(self) -> u32 {
        match self {
            Self::KillProcess => 0,
            action => (action.result() >> 16) + 1,
        }
    }
}

/// How an argument is compared, as unsigned numbers of 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    NotEqual,
    Less,
    LessOrEqual,
    Equal,
    GreaterOrEqual,
    Greater,
    /// The argument's bits of `value` are those of `value_two`.
    MaskedEqual,
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    /// 0 to 5.
    pub index: u8,
    pub comparison: Comparison,
    pub value: u64,
    pub value_two: u64,
}

/// A rule for one call: the action where all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// One for each argument at most.
    pub conditions: Vec<Condition>,
    pub action: Action,
}
