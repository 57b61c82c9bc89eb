//! The disks of the root file systems that `make setup` makes, as their own file system's checker sees them.
//!
//! Guests' tests use the same disks: made here, they need not be made in the lab, where that takes minutes.

#![allow(clippy::expect_used, reason = "a failure here is the test's")]

use std::path::PathBuf;
use std::process::Command;

use cofferdam::Image;

#[test]
fn disks_of_debian_are_whole() {
    let cache = std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"));
    let folder = PathBuf::from(cache.expect("HOME")).join("cofferdam/images");
    for name in ["debian-12", "debian-12-network", "debian-12-storage"] {
        let image = Image::open(folder.join(format!("{name}.tar"))).expect("an image: run `make setup`");
        image.prepare().expect("its disk");
    }
    let disks = folder.read_dir().expect("the folder").flatten().map(|entry| entry.path());
    let mut checked = 0;
    for disk in disks.filter(|path| path.extension().is_some_and(|it| it == "erofs")) {
        let output = Command::new("fsck.erofs").arg(&disk).output().expect("erofs-utils: run `make setup`");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}: {said}", disk.display());
        checked += 1;
    }
    assert!(checked >= 3, "{checked} disks");
}
