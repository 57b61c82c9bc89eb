//! Files with holes, in the four forms that GNU tar writes. See the GNU tar manual, storing sparse files.

use super::header::{BLOCK, SparseBlock, TarHeader, sparse_extension};
use super::pax::{SparseRecords, decimal};
use super::{SparseExtent, SparseMap, Stream, corrupt, unsupported};
use crate::error::Result;

/// Numbers of more digits than these are none.
const MAX_DIGITS: usize = 20;

/// A map in the header itself and in the blocks that follow it.
pub(super) fn old_gnu(stream: &mut Stream<'_>, header: &TarHeader<'_>) -> Result<SparseMap> {
    let SparseBlock { mut pieces, mut more } = header.sparse()?;
    while more {
        let block = stream.block()?.ok_or_else(|| corrupt("its sparse map is cut off"))?;
        let next = sparse_extension(&block)?;
        pieces.extend(next.pieces);
        SparseMap::check(pieces.len())?;
        more = next.more;
    }
    SparseMap::new(header.real_size()?, pieces)
}

/// A map in the extended header, or before the content, of which `stored` loses that much.
pub(super) fn pax(stream: &mut Stream<'_>, records: &SparseRecords, stored: &mut u64) -> Result<SparseMap> {
    let size = records.real_size.ok_or_else(|| corrupt("a sparse file without a size"))?;
    match (records.major.unwrap_or(0), records.minor.unwrap_or(0)) {
        (0, _) => SparseMap::new(size, records.map.clone()),
        (1, 0) => {
            let mut numbers = Numbers { stream, left: stored, block: [0; BLOCK], at: BLOCK };
            let count = numbers.next()?;
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            SparseMap::check(count)?;
            let mut pieces = Vec::new();
            for _ in 0..count {
                pieces.push(SparseExtent { offset: numbers.next()?, len: numbers.next()? });
            }
            SparseMap::new(size, pieces)
        }
        (major, minor) => Err(unsupported(format!("a sparse file of version {major}.{minor}"))),
    }
}

/// Decimal numbers, each with a newline behind it, in whole blocks before the content.
struct Numbers<'a, 's> {
    stream: &'a mut Stream<'s>,
    left: &'a mut u64,
    block: [u8; BLOCK],
    at: usize,
}

impl Numbers<'_, '_> {
    fn next(&mut self) -> Result<u64> {
        let damaged = || corrupt("its sparse map is damaged");
        let mut digits = Vec::with_capacity(MAX_DIGITS);
        loop {
            if self.at == BLOCK {
                *self.left = self.left.checked_sub(BLOCK as u64).ok_or_else(damaged)?;
                self.block = self.stream.block()?.ok_or_else(damaged)?;
                self.at = 0;
            }
            let byte = self.block.get(self.at).copied().ok_or_else(damaged)?;
            self.at += 1;
            match byte {
                b'\n' => return decimal(&digits).ok_or_else(damaged),
                _ if digits.len() == MAX_DIGITS => return Err(damaged()),
                digit => digits.push(digit),
            }
        }
    }
}
