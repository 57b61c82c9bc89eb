//! Recognizes content that is mistaken for a root file system. The error says what to do about it.

use std::path::Path;

use super::tree::{InodeKind, InodeTree};
use crate::error::{Error, ErrorKind, Result};

/// How compressed files begin, and what they are called.
const COMPRESSED: [(&[u8], &str); 5] = [
    (&[0x1f, 0x8b], "gzip"),
    (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
    (&[0xfd, b'7', b'z', b'X', b'Z'], "xz"),
    (b"BZh", "bzip2"),
    (&[0x04, 0x22, 0x4d, 0x18], "lz4"),
];

/// What root file systems have at their top.
const SYSTEM: [&str; 5] = ["bin", "etc", "lib", "sbin", "usr"];

/// Whether a directory may hold an image in layers.
pub(super) fn may_be_layers(directory: &Path) -> bool {
    let system = || SYSTEM.iter().any(|name| directory.join(name).symlink_metadata().is_ok());
    directory.join("oci-layout").is_file() || directory.join("manifest.json").is_file() && !system()
}

/// # Errors
/// `Unsupported` names the compression of a file that begins so.
pub(super) fn no_other_format(begin: &[u8]) -> Result<()> {
    match COMPRESSED.iter().find(|(magic, _)| begin.starts_with(magic)) {
        Some((_, name)) => {
            Err(Error::new(ErrorKind::Unsupported, format!("it is compressed with {name}: decompress it first")))
        }
        None => Ok(()),
    }
}

/// # Errors
/// `Unsupported` for what holds an image in layers instead of a root file system.
pub(super) fn no_other_image(tree: &InodeTree) -> Result<()> {
    let file = |name: &[u8]| tree.at_top(name).is_some_and(|inode| matches!(inode.kind, InodeKind::File(_)));
    let unsupported = |what| Err(Error::new(ErrorKind::Unsupported, what));
    // Programs have files of that name too, but then there is something to run them with.
    let system = SYSTEM.iter().any(|name| tree.at_top(name.as_bytes()).is_some());
    if file(b"manifest.json") && !system {
        return unsupported(
            "it has files of `docker save` beside others that such an archive has not: save the image anew, or use `docker export` of a \
             container",
        );
    }
    if file(b"oci-layout") && file(b"index.json") {
        return unsupported(
            "it has files of an OCI image layout beside others that a layout has not: copy the image anew, or use `docker export` of a \
             container",
        );
    }
    Ok(())
}
