//! Extended headers (POSIX.1-2024, pax extended header), as GNU tar, star and libarchive write them.

use std::rc::Rc;

use super::header::unsigned;
use crate::container::image::acl::Acl;
use crate::container::image::content::SparseExtent;
use crate::container::image::path::{PATH_MAX, shown};
use crate::container::image::xattr::Xattrs;
use crate::error::{Context, Error, ErrorKind, Result};

/// What one or more extended headers say. Of a field that is set nothing else is asked.
#[derive(Debug, Clone, Default)]
pub(super) struct Pax {
    pub path: Option<Vec<u8>>,
    pub link_path: Option<Vec<u8>>,
    pub size: Option<u64>,
    pub uid: Option<i64>,
    pub gid: Option<i64>,
    /// Seconds, rounded down, and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    xattrs: Xattrs,
    /// Those of the global header, which all entries share.
    shared: Rc<Xattrs>,
    pub acl_access: Option<Rc<Acl>>,
    pub acl_default: Option<Rc<Acl>>,
    pub sparse: SparseRecords,
}

/// What GNU tar's `--format=pax --sparse` says, in its versions 0.0, 0.1 and 1.0.
#[derive(Debug, Clone, Default)]
pub(super) struct SparseRecords {
    pub major: Option<u64>,
    pub minor: Option<u64>,
    pub name: Option<Vec<u8>>,
    pub real_size: Option<u64>,
    pub map: Vec<SparseExtent>,
    /// Of version 0.0, of which the length is still to come.
    offset: Option<u64>,
}

fn corrupt(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("its extended header: {what}"))
}

impl Pax {
    /// Adds what is in `data`: records of a length, a space, a key, `=`, a value of any bytes, a newline.
    ///
    /// # Errors
    /// `Corrupt` for what is no such thing, `Unsupported` for what cannot be kept.
    pub(super) fn read(&mut self, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() && data.first() != Some(&0) {
            let malformed = || corrupt("a record of it is malformed");
            let space = data.iter().take(21).position(|byte| *byte == b' ').ok_or_else(malformed)?;
            let len =
                data.get(..space).and_then(decimal).and_then(|n| usize::try_from(n).ok()).ok_or_else(malformed)?;
            let record = data.get(space + 1..len).and_then(|it| it.strip_suffix(b"\n")).ok_or_else(malformed)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
            let (key, value) = (record.get(..equals).unwrap_or_default(), record.get(equals + 1..).unwrap_or_default());
            self.record(key, value).doing(|| format!("record {}", shown(key)))?;
            data = data.get(len..).unwrap_or_default();
        }
        Ok(())
    }

    /// Lets clones share the attributes: an archive has any number of headers that extend a global one.
    pub(super) fn share(&mut self) {
        self.shared = Rc::new(std::mem::take(&mut self.xattrs));
    }

    /// The attributes, those of the global header included.
    pub(super) fn all_xattrs(&self) -> Xattrs {
        let mut all = Xattrs::clone(&self.shared);
        all.extend(self.xattrs.iter().map(|(name, value)| (name.clone(), value.clone())));
        all
    }

    /// How much this header's own attributes take, names included.
    pub(super) fn xattr_bytes(&self) -> usize {
        // Each has four bytes of its own on the disk.
        self.xattrs.iter().map(|(name, value)| 4 + name.len() + value.len()).sum()
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        // An empty value takes back what a global header or an earlier record said.
        match key {
            b"path" => self.path = set(value, path)?,
            b"linkpath" => self.link_path = set(value, path)?,
            b"size" => self.size = set(value, size)?,
            b"uid" => self.uid = set(value, integer)?,
            b"gid" => self.gid = set(value, integer)?,
            b"mtime" => self.mtime = set(value, time)?,
            b"SCHILY.acl.access" => self.acl_access = set(value, acl)?,
            b"SCHILY.acl.default" => self.acl_default = set(value, acl)?,
            b"SCHILY.acl.ace" => {
                return Err(Error::new(ErrorKind::Unsupported, "an ACL of NFSv4, which Linux keeps nowhere"));
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let name = percent_decoded(name).ok_or_else(|| corrupt("a name in it is malformed"))?;
                    let value = base64_decoded(value).ok_or_else(|| corrupt("a value in it is malformed"))?;
                    // The same attribute is said in both ways; the other one needs no decoding.
                    if !self.shared.contains_key(&name) {
                        self.xattrs.entry(name).or_insert(value);
                    }
                } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(key, value)?;
                } else if key.starts_with(b"GNU.volume.") {
                    return Err(Error::new(ErrorKind::Unsupported, "an archive of several volumes"));
                }
            }
        }
        Ok(())
    }
}

impl SparseRecords {
    /// Whether the entry's content is not what stands in the archive.
    pub(super) fn is_sparse(&self) -> bool {
        self.major.is_some() || self.real_size.is_some() || !self.map.is_empty() || self.name.is_some()
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        match key {
            b"major" => self.major = Some(size(value)?),
            b"minor" => self.minor = Some(size(value)?),
            b"name" => self.name = Some(path(value)?),
            b"size" | b"realsize" => self.real_size = Some(size(value)?),
            b"numblocks" => {}
            b"offset" => self.offset = Some(size(value)?),
            b"numbytes" => {
                let offset = self.offset.take().ok_or_else(|| corrupt("its sparse map is damaged"))?;
                self.map.push(SparseExtent { offset, len: size(value)? });
            }
            b"map" => {
                self.map.clear();
                let mut numbers = value.split(|byte| *byte == b',');
                while let Some(offset) = numbers.next() {
                    let len = numbers.next().ok_or_else(|| corrupt("its sparse map is damaged"))?;
                    self.map.push(SparseExtent { offset: size(offset)?, len: size(len)? });
                }
            }
            _ => {
                let what = format!("a sparse file that says {}", shown(key));
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
        }
        Ok(())
    }
}

fn set<T>(value: &[u8], parse: impl FnOnce(&[u8]) -> Result<T>) -> Result<Option<T>> {
    if value.is_empty() { Ok(None) } else { parse(value).map(Some) }
}

fn path(value: &[u8]) -> Result<Vec<u8>> {
    if value.len() > PATH_MAX { Err(corrupt("a path in it is longer than Linux allows")) } else { Ok(value.to_vec()) }
}

fn acl(value: &[u8]) -> Result<Rc<Acl>> {
    Acl::parse(value).map(Rc::new)
}

/// Digits, and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |n, byte| match byte {
        b'0'..=b'9' => n.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

fn size(value: &[u8]) -> Result<u64> {
    let size = decimal(value).ok_or_else(|| corrupt("a number in it is malformed"))?;
    unsigned(i64::try_from(size).map_err(|_| corrupt("a number in it is too large"))?, "size")
}

fn integer(value: &[u8]) -> Result<i64> {
    let number = decimal(value).and_then(|n| i64::try_from(n).ok());
    number.ok_or_else(|| corrupt("a number in it is malformed"))
}

/// Seconds with a sign and a fraction; what is below a nanosecond is cut off towards the past.
fn time(value: &[u8]) -> Result<(i64, u32)> {
    let malformed = || corrupt("a time in it is malformed");
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |byte| *byte == b'.');
    let seconds = parts.next().and_then(decimal).and_then(|n| i64::try_from(n).ok()).ok_or_else(malformed)?;
    let (mut nanos, mut more) = (0u32, false);
    let fraction = parts.next().unwrap_or_default();
    for n in 0..fraction.len().max(9) {
        let digit = match fraction.get(n) {
            Some(byte @ b'0'..=b'9') => u32::from(byte - b'0'),
            None => 0,
            Some(_) => return Err(malformed()),
        };
        if n < 9 { nanos = nanos * 10 + digit } else { more |= digit != 0 }
    }
    if !negative {
        return Ok((seconds, nanos));
    }
    // Cut off towards the past, as the seconds are.
    nanos += u32::from(more);
    Ok(if nanos == 0 { (-seconds, 0) } else { (-seconds - 1, 1_000_000_000 - nanos) })
}

fn percent_decoded(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (mut decoded, mut rest) = (Vec::with_capacity(text.len()), text);
    while let [first, after @ ..] = rest {
        (decoded, rest) = match (first, after) {
            (b'%', [high, low, after @ ..]) => {
                decoded.push((digit(*high)? << 4 | digit(*low)?) as u8);
                (decoded, after)
            }
            (b'%', _) => return None,
            _ => {
                decoded.push(*first);
                (decoded, after)
            }
        };
    }
    Some(decoded)
}

fn base64_decoded(text: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0);
    for byte in text.iter().filter(|byte| !matches!(byte, b'=' | b'\n')) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            decoded.push((bits >> count) as u8);
        }
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = 2 + key.len() + value.len() + 1;
        let len = (1..4).map(|digits| rest + digits).find(|len| len.to_string().len() + rest == *len).unwrap();
        [format!("{len} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn pax_records_have_their_stated_length() {
        let mut pax = Pax::default();
        let data = [
            record("comment", b"two\nlines"),
            record("SCHILY.xattr.user.note", b"a=b\n7 x=y\n"),
            record("path", b"of a global header"),
            record("path", b""),
            record("LIBARCHIVE.xattr.user.a%3Db", b"AP8K"),
            record("LIBARCHIVE.xattr.user.note", b"AP8K"),
            record("GNU.sparse.map", b"0,1,512,3"),
        ]
        .concat();
        pax.read(&data).unwrap();
        assert_eq!(pax.xattrs[&b"user.note"[..]], b"a=b\n7 x=y\n");
        assert_eq!(pax.xattrs[&b"user.a=b"[..]], [0, 255, 10]);
        assert_eq!(
            (pax.path, pax.sparse.map),
            (None, vec![SparseExtent { offset: 0, len: 1 }, SparseExtent { offset: 512, len: 3 }])
        );
        for bad in
            [&b"5 a=b\n"[..], b"x a=b\n", b"7 a=bc", b"99999999999999999999999 a=b\n", b"6 ab\n\n", b"0 a=b\n", b"2 \n"]
        {
            assert_eq!(Pax::default().read(bad).unwrap_err().kind(), ErrorKind::Corrupt, "{bad:?}");
        }
    }

    #[test]
    fn what_a_global_header_has_is_not_copied_for_each_entry() {
        let mut global = Pax::default();
        let list = record("SCHILY.acl.access", b"user::rwx,group::r--,other::r--");
        global
            .read(&[record("SCHILY.xattr.user.a", b"1"), record("SCHILY.xattr.user.b", b"2"), list].concat())
            .unwrap();
        assert_eq!(global.xattr_bytes(), 2 * (4 + 6 + 1));
        global.share();
        let mut pax = global.clone();
        pax.read(&[record("SCHILY.xattr.user.b", b"3"), record("LIBARCHIVE.xattr.user.a", b"AP8K")].concat()).unwrap();
        assert!(Rc::ptr_eq(&pax.shared, &global.shared) && global.xattrs.is_empty());
        assert!(Rc::ptr_eq(pax.acl_access.as_ref().unwrap(), global.acl_access.as_ref().unwrap()));
        let all = pax.all_xattrs();
        assert_eq!((&*all[&b"user.a"[..]], &*all[&b"user.b"[..]], all.len()), (&b"1"[..], &b"3"[..], 2));
    }

    #[test]
    fn times_have_signs_and_fractions() {
        let cases: [(&[u8], (i64, u32)); 6] = [
            (b"5", (5, 0)),
            (b"5.25", (5, 250_000_000)),
            (b"5.0000000019", (5, 1)),
            (b"-5", (-5, 0)),
            (b"-1.5", (-2, 500_000_000)),
            (b"-0.9999999999", (-1, 0)),
        ];
        for (text, value) in cases {
            assert_eq!(time(text).unwrap(), value, "{text:?}");
        }
        for bad in [&b"x"[..], b"", b"1.x", b"--1", b"1-1", b"9223372036854775808"] {
            assert!(time(bad).is_err(), "{bad:?}");
        }
    }
}
