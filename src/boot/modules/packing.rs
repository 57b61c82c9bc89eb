//! The contents of a module's file: unpacked, bounded, and checked to be for this processor.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::bufread::GzDecoder;

use crate::boot::protocol::ELF_MACHINE;
use crate::error::{Error, ErrorKind, Result};

/// The largest module, packed or not. The largest of distributions, graphics drivers, have some 30 MiB.
const MAX: usize = 64 << 20;

/// How files begin: gzip (RFC 1952, 2.3), xz (The .xz File Format 1.2.1, 2.1.1.1), zstd (RFC 8878, 3.1.1).
const GZIP: &[u8] = b"\x1f\x8b";
const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
/// How modules do: ELF of 64 bits, little-endian.
const ELF: &[u8] = b"\x7fELF\x02\x01";
/// From byte 16 on: relocatable, for this processor (System V ABI, gABI 4.1).
const RELOCATABLE: &[u8] = &[1, 0, ELF_MACHINE.to_le_bytes()[0], ELF_MACHINE.to_le_bytes()[1]];

/// A module's file, unpacked.
///
/// # Errors
/// `Corrupt` when it is none, damaged or too large, `Unsupported` when this build cannot unpack it.
pub(super) fn unpack(path: &Path) -> Result<Vec<u8>> {
    if !path.metadata()?.is_file() {
        return Err(corrupt("not a regular file"));
    }
    let packed = bounded(File::open(path)?)?;
    let module = unpacked(packed)?;
    if !module.starts_with(ELF) || module.get(16..20) != Some(RELOCATABLE) {
        return Err(corrupt("not a module for this processor"));
    }
    Ok(module)
}

fn corrupt(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, text.into())
}

/// Unpacks whatever it is.
pub(super) fn unpacked(packed: Vec<u8>) -> Result<Vec<u8>> {
    match packed.as_slice() {
        bytes if bytes.starts_with(GZIP) => bounded(GzDecoder::new(bytes)),
        bytes if bytes.starts_with(XZ) => xz(bytes),
        bytes if bytes.starts_with(ZSTD) => zstd(bytes),
        _ => Ok(packed),
    }
}

/// All that can be read, unless it is too much.
fn bounded(from: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = from.take(MAX as u64 + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::from(e).with_kind(ErrorKind::Corrupt))?;
    match bytes.len() {
        ..=MAX => Ok(bytes),
        _ => Err(corrupt(format!("larger than {} MiB", MAX >> 20))),
    }
}

#[cfg(feature = "xz")]
fn xz(bytes: &[u8]) -> Result<Vec<u8>> {
    const MAX_KIB: u32 = MAX as u32 >> 10;
    bounded(lzma_rust2::XzReader::new_mem_limit(bytes, false, MAX_KIB))
}

#[cfg(not(feature = "xz"))]
fn xz(_: &[u8]) -> Result<Vec<u8>> {
    Err(lacking("xz"))
}

#[cfg(feature = "zstd")]
fn zstd(bytes: &[u8]) -> Result<Vec<u8>> {
    use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

    let bad = |e: &dyn std::fmt::Display| corrupt(e.to_string());
    // A decoder's first frame may ask for a window of any size, and all others only for one of bounded size. So the frame is
    // begun twice.
    let mut decoder = FrameDecoder::new();
    decoder.init(bytes).map_err(|e| bad(&e))?;
    bounded(StreamingDecoder::new_with_decoder(bytes, decoder).map_err(|e| bad(&e))?)
}

#[cfg(not(feature = "zstd"))]
fn zstd(_: &[u8]) -> Result<Vec<u8>> {
    Err(lacking("zstd"))
}

#[cfg(not(all(feature = "xz", feature = "zstd")))]
fn lacking(feature: &str) -> Error {
    let text = format!(
        "packed with {feature}, which this build of cofferdam cannot unpack: switch its feature `{feature}` on"
    );
    Error::new(ErrorKind::Unsupported, text)
}

/// The version of the kernel that a module was built for: the first word of its `vermagic` (Linux, include/linux/vermagic.h).
pub(super) fn release(module: &[u8]) -> Option<&str> {
    const MARK: &[u8] = b"\0vermagic=";
    let at = module.windows(MARK.len()).position(|window| window == MARK)? + MARK.len();
    let text = module.get(at..)?.split(|byte| matches!(byte, b' ' | 0)).next()?;
    std::str::from_utf8(text).ok()
}
