//! Lists of C strings, for argument vectors and environments. There is one NUL after each, like `/proc/PID/cmdline`. No
//! I/O; any thread.
//!
//! One byte of overhead a string, and the shim points `execve` straight into the received bytes.

use core::ffi::CStr;

use super::alloc::vec::Vec;
use super::field::Malformed;

/// A string for a [`StringBuf`] has a NUL inside, which no C string can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nul;

/// A list of C strings in someone else's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Strings<'a>(&'a [u8]);

impl<'a> Strings<'a> {
    pub(super) fn parse(bytes: &'a [u8], name: &'static str) -> Result<Self, Malformed> {
        match bytes.last() {
            None | Some(0) => Ok(Self(bytes)),
            Some(_) => Err(Malformed(name)),
        }
    }

    /// The list as it travels.
    pub(crate) fn as_bytes(&self) -> &'a [u8] {
        self.0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The strings in their order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &'a CStr> + Clone + use<'a> {
        // Every piece ends with the only NUL in it, so the conversion drops none.
        self.0.split_inclusive(|&byte| byte == 0).filter_map(|piece| CStr::from_bytes_with_nul(piece).ok())
    }
}

/// A list of C strings being made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct StringBuf(Vec<u8>);

impl StringBuf {
    pub(crate) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Appends `string`, which is without its NUL.
    pub(crate) fn push(&mut self, string: &[u8]) -> Result<(), Nul> {
        if string.contains(&0) {
            return Err(Nul);
        }
        self.0.extend_from_slice(string);
        self.0.push(0);
        Ok(())
    }

    pub(crate) fn as_strings(&self) -> Strings<'_> {
        Strings(&self.0)
    }
}
