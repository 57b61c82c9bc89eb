//! [`RootDisks`]: the two disks that a container itself is made of, behind the embedder's.

use crate::container::image::ImageDisk;
use crate::container::volume::OpenVolume;
use crate::container::{NamedVolume, WritableLayer};
use crate::error::{Context, Result};
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
    grow: bool,
}

/// What a container writes to.
#[derive(Debug, Clone)]
pub(super) enum Layer {
    /// Gone with the container.
    Scratch(WritableLayer),
    Kept(NamedVolume),
}

impl RootDisks {
    /// Makes both disks, for a machine that has `before` others.
    pub(super) fn make(image: ImageDisk, digest: &str, layer: &Layer, before: usize) -> Result<Self> {
        let lower = image.into_disk("cofferdam-image");
        let (upper, grow) = match layer {
            Layer::Scratch(layer) => (layer.make()?, false),
            Layer::Kept(volume) => {
                let OpenVolume { disk, grow, .. } =
                    volume.open_layer(digest, "cofferdam-layer").doing(|| "keep_layer")?;
                (disk, grow)
            }
        };
        let paths = RootPaths { lower: disk_path(before), upper: disk_path(before + 1), grow };
        Ok(Self { lower, upper, paths })
    }

    pub(super) fn paths(&self) -> &RootPaths {
        &self.paths
    }

    /// How many disks they are.
    pub(super) const COUNT: usize = 2;

    /// In the order of their paths.
    pub(super) fn into_disks(self) -> [Disk; Self::COUNT] {
        [self.lower, self.upper]
    }
}

impl RootPaths {
    /// What the shim mounts.
    pub(super) fn root(&self, read_only: bool) -> Root<'_> {
        Root::Overlay {
            lower: RootDisk { device: self.lower.as_bytes(), fs: b"erofs" },
            upper: RootDisk { device: self.upper.as_bytes(), fs: b"ext4" },
            grow: self.grow,
            read_only,
        }
    }
}

/// Returns the path of the `n`th disk in the guest, counted from 0.
///
/// Linux names them as spreadsheets name columns: `vda` to `vdz`, then `vdaa`.
pub(super) fn disk_path(mut n: usize) -> String {
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
