//! Tagged fields, the inside of every payload: written in any order, read without copying. No I/O; any thread.

use super::alloc::vec::Vec;

/// The payload is not a list of fields, or a field is not what its tag says. Names the field, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// The bytes of `tag` and `length` before a field's own.
const PREFIX: usize = 5;

/// Appends fields to a payload.
#[derive(Debug)]
pub(super) struct Writer<'a>(pub(super) &'a mut Vec<u8>);

impl Writer<'_> {
    pub(super) fn bytes(&mut self, tag: u8, value: &[u8]) {
        // A field longer than 4 GiB cannot be written; the payload's framing refuses it by its far smaller limit.
        let length = u32::try_from(value.len()).unwrap_or(u32::MAX);
        self.0.push(tag);
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(value);
    }

    pub(super) fn u8(&mut self, tag: u8, value: u8) {
        self.bytes(tag, &[value]);
    }

    pub(super) fn u16(&mut self, tag: u8, value: u16) {
        self.bytes(tag, &value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, tag: u8, value: u32) {
        self.bytes(tag, &value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, tag: u8, value: u64) {
        self.bytes(tag, &value.to_le_bytes());
    }

    pub(super) fn flag(&mut self, tag: u8, value: bool) {
        // Absent means false, so that a flag costs nothing where it is not set.
        if value {
            self.u8(tag, 1);
        }
    }
}

/// A payload whose list of fields was checked to be whole. Look-ups walk it: payloads have a handful of fields.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn parse(payload: &'a [u8]) -> Result<Self, Malformed> {
        let mut rest = payload;
        while !rest.is_empty() {
            let (_, _, after) = split(rest).ok_or(Malformed("field list"))?;
            rest = after;
        }
        Ok(Self(payload))
    }

    /// The bytes of the last field with this tag.
    pub(super) fn get(&self, tag: u8) -> Option<&'a [u8]> {
        let mut found = None;
        let mut rest = self.0;
        while let Some((this, value, after)) = split(rest) {
            if this == tag {
                found = Some(value);
            }
            rest = after;
        }
        found
    }

    /// An integer of exactly `N` bytes, if the field is there.
    fn integer<const N: usize>(&self, tag: u8, name: &'static str) -> Result<Option<[u8; N]>, Malformed> {
        match self.get(tag) {
            None => Ok(None),
            Some(value) => value.try_into().map(Some).map_err(|_| Malformed(name)),
        }
    }

    pub(super) fn u8(&self, tag: u8, name: &'static str) -> Result<Option<u8>, Malformed> {
        Ok(self.integer(tag, name)?.map(u8::from_le_bytes))
    }

    pub(super) fn u16(&self, tag: u8, name: &'static str) -> Result<Option<u16>, Malformed> {
        Ok(self.integer(tag, name)?.map(u16::from_le_bytes))
    }

    pub(super) fn u32(&self, tag: u8, name: &'static str) -> Result<Option<u32>, Malformed> {
        Ok(self.integer(tag, name)?.map(u32::from_le_bytes))
    }

    pub(super) fn u64(&self, tag: u8, name: &'static str) -> Result<Option<u64>, Malformed> {
        Ok(self.integer(tag, name)?.map(u64::from_le_bytes))
    }

    pub(super) fn flag(&self, tag: u8, name: &'static str) -> Result<bool, Malformed> {
        Ok(self.u8(tag, name)?.unwrap_or(0) != 0)
    }
}

/// The first field of `list`, and what follows it.
fn split(list: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (prefix, rest) = list.split_first_chunk::<PREFIX>()?;
    let [tag, length @ ..] = *prefix;
    let length = usize::try_from(u32::from_le_bytes(length)).ok()?;
    let (value, after) = rest.split_at_checked(length)?;
    Some((tag, value, after))
}
