//! The disks of the root file systems that `make setup` makes, as their own file system's checker sees them.
//!
//! Guests' tests use the same disks: made here, they need not be made in the lab, where that takes minutes.

#![allow(clippy::expect_used, reason = "a failure here is the test's")]

use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam::Image;

#[path = "kvm/unusual_image.rs"]
#[allow(dead_code, reason = "what the guests' tests look for")]
mod unusual_image;

fn cache() -> PathBuf {
    let cache = std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    PathBuf::from(cache.expect("HOME")).join("cofferdam")
}

#[test]
fn unusual_image_passes_fsck() {
    unusual_image::image(&cache(), true).prepare().expect("its disk");
    let disks = cache().join("odd/disks").read_dir().expect("the directory").flatten().map(|entry| entry.path());
    disks.filter(|path| path.extension().is_some_and(|it| it == "erofs")).for_each(|disk| check(&disk));
}

fn check(disk: &Path) {
    let output = Command::new("fsck.erofs").arg(disk).output().expect("erofs-utils: run `make setup`");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{}: {said}", disk.display());
}

#[test]
fn debian_images_pass_fsck() {
    let directory = cache().join("images");
    for name in ["debian-12", "debian-12-network", "debian-12-storage"] {
        let image = Image::open(directory.join(format!("{name}.tar"))).expect("an image: run `make setup`");
        image.prepare().expect("its disk");
    }
    let disks = directory.read_dir().expect("the directory").flatten().map(|entry| entry.path());
    let mut checked = 0;
    // The metadata of layers is no file system by itself.
    let whole =
        |path: &PathBuf| path.to_str().is_some_and(|it| it.ends_with(".erofs") && !it.ends_with(".layers.erofs"));
    for disk in disks.filter(whole) {
        check(&disk);
        checked += 1;
    }
    assert!(checked >= 3, "{checked} disks");
}
