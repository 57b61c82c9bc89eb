//! The header block of an entry. See POSIX.1-2024, pax, ustar interchange format, and the GNU tar manual, basic tar
//! format.

use crate::container::image::content::SparseExtent;
use crate::error::{Error, ErrorKind, Result};

pub(super) const BLOCK: usize = 512;

pub(super) type Block = [u8; BLOCK];

/// Places of fields: first byte and length.
type Field = (usize, usize);
const NAME: Field = (0, 100);
const MODE: Field = (100, 8);
const UID: Field = (108, 8);
const GID: Field = (116, 8);
const SIZE: Field = (124, 12);
const MTIME: Field = (136, 12);
const CHKSUM: Field = (148, 8);
const LINKNAME: Field = (157, 100);
const DEVMAJOR: Field = (329, 8);
const DEVMINOR: Field = (337, 8);
const PREFIX: Field = (345, 155);
/// Of GNU's old format, where others have the prefix: four pieces, whether more follow, and the size with holes.
const SPARSE: Field = (386, 4 * PIECE);
const IS_EXTENDED: usize = 482;
const REALSIZE: Field = (483, 12);
/// A piece of a sparse file, in a header and in a block that extends it.
const PIECE: usize = 24;
const EXTENSION_PIECES: Field = (0, 21 * PIECE);
const EXTENSION_IS_EXTENDED: usize = 504;

/// One header block with a right checksum.
pub(super) struct TarHeader<'a>(&'a Block);

impl<'a> TarHeader<'a> {
    /// None when the checksum is wrong, so that it is no header.
    pub(super) fn parse(block: &'a Block) -> Option<Self> {
        let header = Self(block);
        let said = number(header.field(CHKSUM))?;
        // The sum's own field counts as spaces.
        let own = header.field(CHKSUM);
        let spaces = i64::from(b' ') * own.len() as i64;
        let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |sum, byte| sum + u32::from(*byte));
        let mut right = said == i64::from(sum(block)) - i64::from(sum(own)) + spaces;
        if !right {
            // Some old programs added the bytes as signed ones.
            let sum = |bytes: &[u8]| bytes.iter().fold(0i64, |sum, byte| sum + i64::from(*byte as i8));
            right = said == sum(block) - sum(own) + spaces;
        }
        right.then_some(header)
    }

    fn field(&self, (start, len): Field) -> &'a [u8] {
        self.0.get(start..start + len).unwrap_or_default()
    }

    pub(super) fn typeflag(&self) -> u8 {
        let [typeflag] = *self.field((156, 1)) else { return 0 };
        typeflag
    }

    /// The name with its prefix, which only POSIX's own format has.
    pub(super) fn path(&self) -> Vec<u8> {
        let (name, prefix) = (text(self.field(NAME)), text(self.field(PREFIX)));
        if self.field((257, 6)) == b"ustar\0" && !prefix.is_empty() {
            return [prefix, b"/", name].concat();
        }
        name.to_vec()
    }

    pub(super) fn link_path(&self) -> &'a [u8] {
        text(self.field(LINKNAME))
    }

    fn number(&self, field: Field, what: &str) -> Result<i64> {
        number(self.field(field))
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("its header has no {what} that is a number")))
    }

    pub(super) fn size(&self) -> Result<u64> {
        unsigned(self.number(SIZE, "size")?, "size")
    }

    pub(super) fn mode(&self) -> Result<u16> {
        Ok((self.number(MODE, "mode")? & 0o7777) as u16)
    }

    pub(super) fn uid(&self) -> Result<i64> {
        self.number(UID, "owner")
    }

    pub(super) fn gid(&self) -> Result<i64> {
        self.number(GID, "group")
    }

    pub(super) fn mtime(&self) -> Result<i64> {
        self.number(MTIME, "time")
    }

    pub(super) fn device(&self) -> Result<(i64, i64)> {
        Ok((self.number(DEVMAJOR, "device number")?, self.number(DEVMINOR, "device number")?))
    }

    /// The pieces in the header of GNU's old sparse format.
    pub(super) fn sparse(&self) -> Result<SparseBlock> {
        let more = self.0.get(IS_EXTENDED).is_some_and(|flag| *flag != 0);
        Ok(SparseBlock { pieces: pieces(self.field(SPARSE))?, more })
    }

    pub(super) fn real_size(&self) -> Result<u64> {
        unsigned(self.number(REALSIZE, "size")?, "size")
    }
}

/// What one block says of a sparse file: some of its pieces, and whether a block with more follows.
pub(super) struct SparseBlock {
    pub pieces: Vec<SparseExtent>,
    pub more: bool,
}

/// The same of a block that extends such a header.
pub(super) fn sparse_extension(block: &Block) -> Result<SparseBlock> {
    let (start, len) = EXTENSION_PIECES;
    let more = block.get(EXTENSION_IS_EXTENDED).is_some_and(|flag| *flag != 0);
    Ok(SparseBlock { pieces: pieces(block.get(start..start + len).unwrap_or_default())?, more })
}

/// All pieces up to the first that is empty.
fn pieces(bytes: &[u8]) -> Result<Vec<SparseExtent>> {
    let mut found = Vec::new();
    for piece in bytes.chunks_exact(PIECE) {
        let (offset, len) = piece.split_at(PIECE / 2);
        if len.first() == Some(&0) {
            break;
        }
        let read = |field| number(field).ok_or_else(|| Error::new(ErrorKind::Corrupt, "its sparse map is damaged"));
        found.push(SparseExtent {
            offset: unsigned(read(offset)?, "sparse map")?,
            len: unsigned(read(len)?, "sparse map")?,
        });
    }
    Ok(found)
}

pub(super) fn unsigned(number: i64, what: &str) -> Result<u64> {
    u64::try_from(number).map_err(|_| Error::new(ErrorKind::Corrupt, format!("its {what} is negative")))
}

/// Up to the first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Octal digits among spaces and NULs, nothing meaning 0; or, with the highest bit set, a number in two's complement.
fn number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The highest bit is the mark, the next one the sign.
        let start = i64::from(first & 0x3f) - i64::from(first & 0x40);
        return rest.iter().try_fold(start, |n, byte| n.checked_mul(256)?.checked_add(i64::from(*byte)));
    }
    let begin = field.iter().position(|byte| !matches!(byte, b' ' | 0)).unwrap_or(field.len());
    let digits = field.get(begin..)?;
    let end = digits.iter().position(|byte| matches!(byte, b' ' | 0)).unwrap_or(digits.len());
    digits.get(..end)?.iter().try_fold(0i64, |n, byte| match byte {
        b'0'..=b'7' => n.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_in_base_256() {
        let cases: [(&[u8], Option<i64>); 10] = [
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"77777777", Some(0o77_777_777)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"12x     ", None),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\x8f\x24\xa5\x00", Some(-1_893_423_872)),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ];
        for (field, value) in cases {
            assert_eq!(number(field), value, "{field:?}");
        }
    }
}
