//! Extended attributes in the form of an EROFS inode (Linux EROFS, inline xattrs).

use std::collections::BTreeMap;

use super::acl;
use super::path::shown;
use crate::error::{Error, ErrorKind, Result};

/// Names and values as system calls have them.
pub(super) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

pub(super) const ACL_ACCESS: &[u8] = b"system.posix_acl_access";
pub(super) const ACL_DEFAULT: &[u8] = b"system.posix_acl_default";

/// What names begin with, and the number that stands for it on the disk.
const PREFIXES: [(&[u8], u8); 5] =
    [(b"user.", 1), (ACL_ACCESS, 2), (ACL_DEFAULT, 3), (b"trusted.", 4), (b"security.", 6)];

/// An entry is a multiple of this.
const ALIGN: usize = 4;

/// What all of one inode may have: their number of units has 16 bits.
const MAX_ENTRIES: usize = (u16::MAX as usize - 1) * ALIGN;

/// What can have attributes of its user's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    Directory,
    File,
    Other,
}

/// The mode of a file with an ACL: the list has the last word. One that says no more than a mode is taken away.
pub(super) fn settle_mode(mode: u16, xattrs: &mut Xattrs) -> u16 {
    // What is no list is refused when all are encoded.
    let Some(acl) = xattrs.get(ACL_ACCESS).and_then(|value| acl::parse_bytes(value)) else {
        return mode;
    };
    if acl.is_minimal() {
        xattrs.remove(ACL_ACCESS);
    }
    mode & !0o777 | acl.mode()
}

/// Decodes what [`encode`] gave. None for anything else.
pub(super) fn decode(mut bytes: &[u8], holder: Holder) -> Option<Xattrs> {
    let whole = bytes;
    let mut xattrs = Xattrs::new();
    while let [name_len, index, low, high, rest @ ..] = bytes {
        let (prefix, _) = PREFIXES.iter().find(|(_, number)| number == index)?;
        let (suffix, rest) = rest.split_at_checked(usize::from(*name_len))?;
        let (value, _) = rest.split_at_checked(usize::from(u16::from_le_bytes([*low, *high])))?;
        xattrs.insert([prefix, suffix].concat(), value.to_vec());
        bytes = bytes.get((4 + suffix.len() + value.len()).next_multiple_of(ALIGN)..)?;
    }
    (*encode(&xattrs, holder).ok()? == *whole).then_some(xattrs)
}

/// Encodes all attributes of one inode. None are an empty slice.
///
/// # Errors
/// `Unsupported` names the attribute that cannot be kept; `Corrupt` for an ACL that no kernel reads.
pub(super) fn encode(xattrs: &Xattrs, holder: Holder) -> Result<Box<[u8]>> {
    let mut entries = Vec::new();
    for (name, value) in xattrs {
        let refused = |kind, what: &str| Err(Error::new(kind, format!("its attribute {}: {what}", shown(name))));
        let unsupported = |what: &str| refused(ErrorKind::Unsupported, what);
        let Some((prefix, index)) = PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix)) else {
            return unsupported("Linux keeps none of such a name");
        };
        let suffix = name.get(prefix.len()..).unwrap_or_default();
        match *index {
            2 | 3 if !suffix.is_empty() => return unsupported("Linux keeps none of such a name"),
            2 if holder == Holder::Other => return unsupported("only files and directories have one"),
            3 if holder != Holder::Directory => return unsupported("only directories have one"),
            2 | 3 if acl::parse_bytes(value).is_none() => return refused(ErrorKind::Corrupt, "it is no ACL"),
            1 if holder == Holder::Other => return unsupported("only files and directories have one"),
            1 | 4 | 6 if suffix.is_empty() => return unsupported("Linux keeps none of such a name"),
            4 if suffix.starts_with(b"overlay.") => {
                return unsupported("the overlay that containers are made of takes it for its own");
            }
            _ => {}
        }
        let Ok(name_len) = u8::try_from(suffix.len()) else {
            return unsupported("its name is longer than Linux allows");
        };
        let Ok(value_len) = u16::try_from(value.len()) else {
            return unsupported("its value is larger than 65,535 bytes");
        };
        entries.extend_from_slice(&[name_len, *index]);
        entries.extend_from_slice(&value_len.to_le_bytes());
        entries.extend_from_slice(suffix);
        entries.extend_from_slice(value);
        entries.resize(entries.len().next_multiple_of(ALIGN), 0);
    }
    if entries.len() > MAX_ENTRIES {
        return Err(Error::new(ErrorKind::Unsupported, "its attributes are larger than 256 KiB in all"));
    }
    Ok(entries.into())
}
