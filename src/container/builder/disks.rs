//! [`RootDisks`]: the two disks that a container itself is made of, behind the embedder's.

use crate::container::WritableLayer;
use crate::container::image::ImageDisk;
use crate::error::Result;
use crate::proto::{Root, RootDisk};
use crate::vm::Disk;

/// The image, which is only read, and the layer above it, with their paths in the guest.
pub(super) struct RootDisks {
    lower: Disk,
    upper: Disk,
    paths: RootPaths,
}

/// Where the guest finds both.
#[derive(Debug, Clone)]
pub(super) struct RootPaths {
    lower: String,
    upper: String,
}

impl RootDisks {
    /// Makes both disks, for a machine that has `before` others.
    pub(super) fn make(image: ImageDisk, layer: &WritableLayer, before: usize) -> Result<Self> {
        let lower = image.into_disk("cofferdam-image");
        let upper = layer.make()?;
        Ok(Self { lower, upper, paths: RootPaths { lower: disk_path(before), upper: disk_path(before + 1) } })
    }

    pub(super) fn paths(&self) -> &RootPaths {
        &self.paths
    }

    /// In the order of their paths.
    pub(super) fn into_disks(self) -> [Disk; 2] {
        [self.lower, self.upper]
    }
}

impl RootPaths {
    /// What the shim mounts.
    pub(super) fn root(&self, read_only: bool) -> Root<'_> {
        Root::Overlay {
            lower: RootDisk { device: self.lower.as_bytes(), fs: b"erofs" },
            upper: RootDisk { device: self.upper.as_bytes(), fs: b"ext4" },
            read_only,
        }
    }
}

/// Returns the path of the `n`th disk in the guest, counted from 0.
///
/// Linux names them as spreadsheets name columns: `vda` to `vdz`, then `vdaa`.
fn disk_path(mut n: usize) -> String {
    let mut letters = Vec::new();
    loop {
        letters.insert(0, char::from(b"abcdefghijklmnopqrstuvwxyz"[n % 26]));
        match (n / 26).checked_sub(1) {
            Some(rest) => n = rest,
            None => return format!("/dev/vd{}", letters.into_iter().collect::<String>()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_have_the_names_that_linux_gives_them() {
        for (n, path) in [(0, "/dev/vda"), (25, "/dev/vdz"), (26, "/dev/vdaa"), (701, "/dev/vdzz"), (702, "/dev/vdaaa")]
        {
            assert_eq!(disk_path(n), path);
        }
    }
}
