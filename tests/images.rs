//! The disks of the root file systems that `make setup` makes, as their own file system's checker sees them.
//!
//! Guests' tests use the same disks: made here, they need not be made in the lab, where that takes minutes.

#![allow(clippy::expect_used, clippy::panic, reason = "a failure here is the test's")]

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
    for name in ["debian-12", "debian-12-network", "debian-12-tools"] {
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

/// The layouts whose images guests' tests run. Those of Debian's programs are there once `make soak` has made them.
#[test]
fn images_of_layouts_are_made_for_guests() {
    let mut images = vec![("services.oci", "nginx"), ("services.oci", "postgres"), ("services.oci", "redis")];
    images.push(("foreign/buildah.oci", "scratch"));
    if std::env::var_os("COFFERDAM_SOAK").is_some() {
        images.extend(["nginx", "redis"].map(|name| ("foreign-debian/buildah.oci", name)));
        images.extend(["postgres", "openjdk"].map(|name| ("foreign-debian/umoci.oci", name)));
        images.push(("foreign-debian/docker.oci", "nodejs"));
    }
    for (layout, name) in images {
        let image = Image::open(cache().join("images").join(layout)).expect("a layout: run `make setup`").select(name);
        image.prepare().unwrap_or_else(|error| panic!("{layout}, {name}: {error}"));
        let config = image.config().expect("its configuration");
        assert!(!config.entrypoint.is_empty() || !config.cmd.is_empty(), "{layout}, {name} has no program");
    }
}
