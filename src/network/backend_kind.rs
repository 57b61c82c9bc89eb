//! [`BackendKind`]: a backend as the network device has it. Those with further calls are known by their kind.

use std::fmt;
use std::ops::{Deref, DerefMut};

use super::{NetBackend, NetStats, SwitchPort, UserStack};

pub(crate) enum BackendKind {
    User(Box<UserStack>),
    Switch(Box<SwitchPort>),
    Other(Box<dyn NetBackend>),
}

impl BackendKind {
    pub(crate) fn other(backend: impl NetBackend + 'static) -> Self {
        Self::Other(Box::new(backend))
    }

    /// The user-mode stack, where it is one.
    pub(crate) fn user(&mut self) -> Option<&mut UserStack> {
        match self {
            Self::User(user) => Some(user),
            _ => None,
        }
    }

    /// System calls that its last calls took beyond those of a packet.
    pub(crate) fn take_calls(&mut self) -> usize {
        self.user().map_or(0, UserStack::take_calls)
    }

    /// What it has done, where it counts.
    pub(crate) fn stats(&self) -> Option<NetStats> {
        match self {
            Self::User(user) => Some(user.stats()),
            Self::Switch(port) => Some(port.stats()),
            Self::Other(_) => None,
        }
    }

    /// The VM has ended: what others could take is free from now on.
    pub(crate) fn ended(&mut self) {
        if let Self::Switch(port) = self {
            port.leave();
        }
    }
}

impl Deref for BackendKind {
    type Target = dyn NetBackend;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::User(user) => &**user,
            Self::Switch(port) => &**port,
            Self::Other(other) => &**other,
        }
    }
}

impl DerefMut for BackendKind {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match self {
            Self::User(user) => &mut **user,
            Self::Switch(port) => &mut **port,
            Self::Other(other) => &mut **other,
        }
    }
}

impl fmt::Debug for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(user) => user.fmt(f),
            Self::Switch(port) => port.fmt(f),
            Self::Other(_) => f.write_str("Other"),
        }
    }
}
