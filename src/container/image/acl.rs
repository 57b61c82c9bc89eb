//! Reads POSIX access control lists from the text in archives. They become the form that system calls and EROFS have.

use crate::error::{Error, ErrorKind, Result};

/// Linux, posix_acl_xattr.h: the version, and the tags of entries.
const VERSION: [u8; 4] = 2u32.to_le_bytes();
const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const GROUP: u16 = 8;
const MASK: u16 = 16;
const OTHER: u16 = 32;
/// Of whom no number is said.
const NO_ID: u32 = u32::MAX;

/// An entry; they are kept in the order of their tags and numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct AclEntry {
    tag: u16,
    id: u32,
    permissions: u16,
}

/// A list that has what each must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Acl(Vec<AclEntry>);

impl Acl {
    /// Reads the text form: entries apart by newlines or commas, `user:1000:rw-`, or `user:name:rw-:1000` as star writes it.
    ///
    /// # Errors
    /// `Corrupt` for what is no list, `Unsupported` for one with a name without a number.
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(text).map_err(|_| corrupt("it is no text"))?;
        let mut entries = Vec::new();
        for line in text.split(['\n', ',', '\0']) {
            let entry = line.split('#').next().unwrap_or_default().trim();
            if !entry.is_empty() {
                entries.push(parse_entry(entry)?);
            }
        }
        entries.sort_unstable();
        Self::checked(entries).ok_or_else(|| corrupt("an entry is missing, or is there twice"))
    }

    /// Has one each of the owner, the group and the others, named ones once, and a mask where there are named ones.
    fn checked(entries: Vec<AclEntry>) -> Option<Self> {
        let count = |tag| entries.iter().filter(|entry| entry.tag == tag).count();
        let each = [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|tag| count(*tag) == 1);
        let named = count(USER) + count(GROUP) > 0;
        let mask = if named { count(MASK) == 1 } else { count(MASK) <= 1 };
        let twice = entries.windows(2).any(|two| matches!(two, [a, b] if (a.tag, a.id) == (b.tag, b.id)));
        (each && mask && !twice).then_some(Self(entries))
    }

    /// The permission bits that the file shows with this list: of its group the mask's, where there is one.
    pub(super) fn mode(&self) -> u16 {
        let of = |tag| self.0.iter().find(|entry| entry.tag == tag).map(|entry| entry.permissions & 7);
        let group = of(MASK).or_else(|| of(GROUP_OBJ)).unwrap_or(0);
        of(USER_OBJ).unwrap_or(0) << 6 | group << 3 | of(OTHER).unwrap_or(0)
    }

    /// Whether permission bits say all of it.
    pub(super) fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }

    /// Linux, posix_acl_xattr.h.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::from(VERSION);
        for AclEntry { tag, id, permissions } in &self.0 {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&permissions.to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    }
}

/// Reads the form of system calls, as a kernel does; none for what it refuses.
pub(super) fn parse_bytes(bytes: &[u8]) -> Option<Acl> {
    let entries = bytes.strip_prefix(&VERSION)?;
    if entries.len() % 8 != 0 {
        return None;
    }
    let parse = |entry: &[u8]| match *entry {
        [a, b, c, d, w, x, y, z] => Some(AclEntry {
            tag: u16::from_le_bytes([a, b]),
            id: u32::from_le_bytes([w, x, y, z]),
            permissions: u16::from_le_bytes([c, d]),
        }),
        _ => None,
    };
    let parsed: Vec<AclEntry> = entries.chunks_exact(8).map(parse).collect::<Option<_>>()?;
    let known = parsed.iter().all(|entry| {
        let named = matches!(entry.tag, USER | GROUP);
        (!named || entry.id != NO_ID)
            && matches!(entry.tag, USER_OBJ | USER | GROUP_OBJ | GROUP | MASK | OTHER)
            && entry.permissions <= 7
    });
    // The kernel wants tags in their order, and does not look at that of numbers.
    let sorted = parsed.windows(2).all(|two| matches!(two, [a, b] if a.tag <= b.tag));
    Acl::checked(parsed).filter(|_| known && sorted)
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("its ACL: {what}"))
}

fn parse_entry(entry: &str) -> Result<AclEntry> {
    let bad = || corrupt("it is not in the text form of POSIX.1e");
    let mut fields = entry.split(':').map(str::trim);
    let kind = fields.next().unwrap_or_default();
    let mut next = || fields.next().ok_or_else(bad);
    let (tag, name, permissions) = match kind {
        "user" | "u" => (USER, next()?, next()?),
        "group" | "g" => (GROUP, next()?, next()?),
        // Their second field, which is empty, may be left out.
        "mask" | "m" | "other" | "o" => {
            let tag = if kind.starts_with('m') { MASK } else { OTHER };
            match (next()?, next().unwrap_or_default()) {
                ("", permissions) | (permissions, "") => (tag, "", permissions),
                _ => return Err(bad()),
            }
        }
        _ => return Err(bad()),
    };
    let id = match (tag, name) {
        (_, "") => NO_ID,
        (_, name) => {
            // Whom a bare name means, only the machine knew that made the archive.
            let number = fields.next().filter(|id| !id.is_empty()).unwrap_or(name);
            let Ok(id) = number.parse::<u32>() else {
                let what = format!("its ACL names {name:?} without a number: make the archive with --numeric-owner");
                return Err(Error::new(ErrorKind::Unsupported, what));
            };
            if id == NO_ID { return Err(bad()) } else { id }
        }
    };
    let tag = match (tag, id) {
        (USER, NO_ID) => USER_OBJ,
        (GROUP, NO_ID) => GROUP_OBJ,
        (tag, _) => tag,
    };
    let mut bits = 0;
    for letter in permissions.chars() {
        bits |= match letter {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return Err(bad()),
        };
    }
    Ok(AclEntry { tag, id, permissions: bits })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acl_text_becomes_the_xattr_format() {
        let forms = [
            "user::rwx\nuser:1000:r-x\ngroup::r-x\ngroup:7:---\nmask::r-x\nother::---\n",
            "u::rwx,u:joe:rx:1000,g::r-x,g:staff:-:7,m:rx,o::-",
            "other::---\nmask::r-x\ngroup:7:---\ngroup::r-x\nuser:1000:r-x\t#effective:r-x\nuser::rwx",
        ];
        for text in forms {
            let acl = Acl::parse(text.as_bytes()).unwrap();
            assert_eq!(acl.mode(), 0o750, "{text}");
            let bytes = acl.to_bytes();
            assert_eq!(bytes.len(), 4 + 6 * 8);
            assert_eq!(bytes[4..20], [1, 0, 7, 0, 255, 255, 255, 255, 2, 0, 5, 0, 232, 3, 0, 0]);
            assert_eq!(parse_bytes(&bytes), Some(acl));
        }
        assert!(Acl::parse(b"user::rw-\ngroup::r--\nother::r--").unwrap().is_minimal());
    }

    #[test]
    fn invalid_acl_is_rejected() {
        let without_number = Acl::parse(b"user::rwx\nuser:joe:rwx\ngroup::---\nmask::rwx\nother::---").unwrap_err();
        assert_eq!(without_number.kind(), ErrorKind::Unsupported);
        for text in
            ["", "nonsense", "user::rwx", "user::rwx\ngroup::q\nother::-", "user:1:r\nuser::r\ngroup::r\nother::r"]
        {
            assert_eq!(Acl::parse(text.as_bytes()).unwrap_err().kind(), ErrorKind::Corrupt, "{text}");
        }
        let good = Acl::parse(b"u::r,u:5:r,g::r,m:r,o:r").unwrap().to_bytes();
        assert!(parse_bytes(&good).is_some());
        for bad in [&good[..good.len() - 8], &good[1..], b""] {
            assert_eq!(parse_bytes(bad), None);
        }
    }
}
