//! What KVM keeps of a machine, as plain data.
//!
//! That is the state of each vCPU, of the interrupt controllers, the timer and the clock.
//! The structures are this crate's own, so that what is kept does not change with KVM's bindings. Kept state is untrusted:
//! its versions, lengths and counts are checked before KVM sees it.

mod chips;
mod clock;
mod events;
mod msrs;
mod registers;
mod vcpu;
mod vm;

pub(crate) use vcpu::{VcpuFormat, VcpuState};
pub(crate) use vm::VmState;

use crate::error::{Error, ErrorKind, Result};

/// Makes a structure with the fields of one of KVM's, and the way between both.
macro_rules! mirror {
    ($(#[$meta:meta])* $name:ident of $raw:ident { $($field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
        pub(crate) struct $name {
            $(pub(crate) $field: $kind,)*
        }

        impl From<$raw> for $name {
            fn from(raw: $raw) -> Self {
                Self { $($field: raw.$field.into(),)* }
            }
        }

        impl From<$name> for $raw {
            #[allow(clippy::needless_update, reason = "some of KVM's structures have padding, and some have none")]
            fn from(state: $name) -> Self {
                Self { $($field: state.$field.into(),)* ..Default::default() }
            }
        }
    };
}
use mirror;

/// # Errors
/// `Corrupt` for another length.
fn check_len(what: &str, len: usize, wanted: usize) -> Result<()> {
    match len == wanted {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Corrupt, format!("{what} has {len} bytes instead of {wanted}"))),
    }
}

/// # Errors
/// `Corrupt` for more than `max`.
fn check_count(what: &str, count: usize, max: usize) -> Result<()> {
    match count <= max {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Corrupt, format!("{count} {what} are more than {max}"))),
    }
}

#[cfg(test)]
mod tests;
