//! [`ExitStatus`]: how a process ended.

use std::fmt;

use crate::vm::Exit;

/// How a process ended. The failure of a program and the failure of its machine never look alike.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitStatus {
    /// The process exited.
    Exited {
        /// With this code, 0 to 255.
        code: i32,
    },
    /// A signal terminated the process.
    Signaled {
        /// The number of the signal.
        signal: i32,
    },
    /// The guest's kernel killed the process for want of memory.
    OomKilled,
    /// Its time was over, and the process was killed with all that it had started.
    TimedOut,
    /// The machine ended while the process ran.
    VmEnded {
        /// How.
        exit: Exit,
    },
}

impl ExitStatus {
    /// Returns whether the process exited with code 0.
    pub fn success(&self) -> bool {
        self.code() == Some(0)
    }

    /// Returns the code with which the process exited, if it did.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Exited { code } => Some(*code),
            _ => None,
        }
    }

    /// Returns the signal that terminated the process, if one did.
    pub fn signal(&self) -> Option<i32> {
        match self {
            Self::Signaled { signal } => Some(*signal),
            _ => None,
        }
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited { code } => write!(f, "exit code {code}"),
            Self::Signaled { signal } => write!(f, "ended by signal {signal}"),
            Self::OomKilled => f.write_str("killed for want of memory"),
            Self::TimedOut => f.write_str("killed when its time was over"),
            Self::VmEnded { exit } => write!(f, "its machine ended: {exit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_status_accessors_match_the_variant() {
        let status = ExitStatus::Exited { code: 3 };
        assert_eq!((status.code(), status.signal(), status.success()), (Some(3), None, false));
        assert_eq!(ExitStatus::Signaled { signal: 9 }.signal(), Some(9));
        assert_eq!(status.to_string(), "exit code 3");
    }
}
