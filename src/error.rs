//! The one public error: a kind to match on, and a chain of causes.

use std::borrow::Cow;
use std::fmt;
use std::io;

/// What every fallible call of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed, coarse enough to branch on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A builder was given something that cannot work; the message names the method and the value.
    InvalidConfig,
    /// The host, its kernel or this build lacks a capability; the message names it.
    Unsupported,
    /// A file, program or address does not exist.
    NotFound,
    /// Something of that name is there already.
    AlreadyExists,
    /// The host's kernel refused access; the message says how to get it.
    PermissionDenied,
    /// The host lacks memory, descriptors, threads or disk space, or a registry's rate limit is used up.
    ResourceExhausted,
    /// Another has it: a disk's lock, a port, a device; the message names it.
    ResourceBusy,
    /// The operation does not fit what the object is doing now; the message names both.
    InvalidState,
    /// The guest did something that makes the call impossible to finish.
    GuestFailed,
    /// The time allowed is over; the message names the last stage reached.
    TimedOut,
    /// A `CancelToken` was cancelled, or the caller's callback asked to stop; the message says how far it was.
    Cancelled,
    /// Two versions do not meet; the message names both.
    Incompatible,
    /// A file or stream is damaged or is not what it claims to be.
    Corrupt,
    /// Any other failure of the host's system calls.
    Io,
}

/// What went wrong, where, and what to do about it.
///
/// `Display` prints the whole chain on one line, outermost first:
/// *starting VM: attaching disk 0: opening rootfs.img: No such file or directory (os error 2)*.
/// Because the chain is complete there, [`std::error::Error::source`] is `None`;
/// branch on [`Error::kind`] and [`Error::os_error`] instead of on causes.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    /// What failed, without context.
    message: Cow<'static, str>,
    /// Innermost first.
    context: Vec<Cow<'static, str>>,
    os: Option<i32>,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), context: Vec::new(), os: None }))
    }

    /// A builder's argument that cannot work. `method` is the builder method as the user wrote it.
    pub(crate) fn invalid(method: &str, problem: impl fmt::Display) -> Self {
        Self::new(ErrorKind::InvalidConfig, format!("{method}: {problem}"))
    }

    /// What can only be asked of a machine that runs.
    pub(crate) fn vm_ended() -> Self {
        Self::new(ErrorKind::InvalidState, "the virtual machine has ended")
    }

    /// The error of the last system call.
    pub(crate) fn last_os() -> Self {
        io::Error::last_os_error().into()
    }

    /// Why the call failed.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The host's `errno`, when a system call is the cause.
    pub fn os_error(&self) -> Option<i32> {
        self.0.os
    }

    pub(crate) fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self
    }

    pub(crate) fn doing(mut self, phrase: impl Into<Cow<'static, str>>) -> Self {
        self.0.context.push(phrase.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for phrase in self.0.context.iter().rev() {
            write!(f, "{phrase}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self})", self.0.kind)
    }
}

impl std::error::Error for Error {}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        let kind = match error.raw_os_error() {
            Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE | libc::ENOSPC | libc::EDQUOT) => {
                ErrorKind::ResourceExhausted
            }
            // Threads and processes beyond the limit end in EAGAIN.
            Some(libc::EAGAIN) => ErrorKind::ResourceExhausted,
            Some(libc::EBUSY | libc::ETXTBSY | libc::EADDRINUSE) => ErrorKind::ResourceBusy,
            Some(libc::EACCES | libc::EPERM | libc::EROFS) => ErrorKind::PermissionDenied,
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => ErrorKind::Unsupported,
            _ => match error.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
                io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                io::ErrorKind::TimedOut => ErrorKind::TimedOut,
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => ErrorKind::Corrupt,
                _ => ErrorKind::Io,
            },
        };
        let mut converted = Self::new(kind, error.to_string());
        converted.0.os = error.raw_os_error();
        converted
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::NotFound => io::ErrorKind::NotFound,
            ErrorKind::AlreadyExists => io::ErrorKind::AlreadyExists,
            ErrorKind::PermissionDenied => io::ErrorKind::PermissionDenied,
            ErrorKind::TimedOut => io::ErrorKind::TimedOut,
            ErrorKind::InvalidConfig => io::ErrorKind::InvalidInput,
            ErrorKind::Corrupt => io::ErrorKind::InvalidData,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            ErrorKind::ResourceBusy => io::ErrorKind::ResourceBusy,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Adds a verb phrase to whatever went wrong, where a person would ask "doing what?".
pub(crate) trait Context<T> {
    fn doing<P: Into<Cow<'static, str>>>(self, phrase: impl FnOnce() -> P) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for Result<T, E> {
    fn doing<P: Into<Cow<'static, str>>>(self, phrase: impl FnOnce() -> P) -> Result<T> {
        self.map_err(|error| error.into().doing(phrase()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_the_chain_outermost_first() {
        let failed: Result<(), _> = Err(io::Error::from_raw_os_error(libc::ENOENT));
        let error = failed.doing(|| "opening rootfs.img").doing(|| "starting VM").unwrap_err();
        assert_eq!(error.to_string(), "starting VM: opening rootfs.img: No such file or directory (os error 2)");
        assert_eq!((error.kind(), error.os_error()), (ErrorKind::NotFound, Some(libc::ENOENT)));
        assert_eq!(io::Error::from(error).kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_another_has_is_busy() {
        for errno in [libc::EBUSY, libc::EADDRINUSE, libc::ETXTBSY] {
            let error = Error::from(io::Error::from_raw_os_error(errno));
            assert_eq!(error.kind(), ErrorKind::ResourceBusy);
            assert_eq!(io::Error::from(error).kind(), io::ErrorKind::ResourceBusy);
        }
    }

    #[test]
    fn is_one_word_wide_and_crosses_threads() {
        fn crosses<T: Send + Sync + 'static>() {}
        crosses::<Error>();
        assert_eq!(size_of::<Result<()>>(), size_of::<usize>());
    }
}
