//! Measures a guest's first read of an image's files, beside an ext4 disk with the same files.
//!
//! Runs in the lab's virtual time (benches/README.md). The host has the files in its page cache, the guest has not.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;
#[path = "common/layout.rs"]
mod layout;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use cofferdam::disk::WritableLayer;
use cofferdam::{Container, Disk, Image, Kernel, Size};
use common::{cache, figure, median};

const ROUNDS: usize = 3;
/// The directories that are read: 26 MiB in 425 files.
const DIRECTORIES: [&str; 2] = ["usr/bin", "usr/sbin"];

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An ext4 file system with these directories of a root file system.
fn ext4(rootfs: &Path, dir: &Path) -> PathBuf {
    let (tree, disk) = (dir.join("tree"), dir.join("disk.ext4"));
    std::fs::create_dir_all(&tree).expect("a directory");
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let names = DIRECTORIES.map(|it| format!("./{it}"));
    run("tar", &["-C", &text(&tree), "-xf", &text(rootfs), &names[0], &names[1]]);
    run("mke2fs", &["-q", "-t", "ext4", "-d", &text(&tree), &text(&disk), "128M"]);
    disk
}

/// Milliseconds until all is read below `root`, after `before`, in a container that has read nothing of it.
fn read(kernel: &Kernel, image: &Image, disk: Option<&Path>, root: &str, before: &str) -> f64 {
    let layer = WritableLayer::new(Size::gib(1)).scratch_dir(std::env::temp_dir());
    let builder = Container::builder(image.clone()).kernel(kernel.clone()).memory(Size::mib(192)).writable_layer(layer);
    let builder = disk.into_iter().fold(builder, |it, disk| it.disk(Disk::file(disk).read_only(true)));
    let container = builder.start().expect("it starts");
    // The programs themselves are read before.
    let warm = format!("{before}; cat /dev/null; exec true");
    assert!(container.exec(["sh", "-c", &warm]).status().expect("it runs").success());
    let read = format!("cd {root}/ && exec cat {}/* {}/* > /dev/null", DIRECTORIES[0], DIRECTORIES[1]);
    let begin = Instant::now();
    assert!(container.exec(["sh", "-c", &read]).status().expect("it runs").success());
    begin.elapsed().as_secs_f64() * 1000.0
}

fn main() {
    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    let rootfs = cache().join("images/debian-12.tar");
    let dir = std::env::temp_dir().join(format!("cofferdam-bench-reads-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let store = dir.join("store");
    let open = |path: &Path| Image::open(path).expect("an image").cache_dir(&store);
    let of_layers = |count: usize| {
        let layers = (1..count).map(|number| layout::small_layer(&dir, number));
        let layers: Vec<_> = std::iter::once(rootfs.clone()).chain(layers).collect();
        let path = dir.join(format!("layout-{count}"));
        layout::make(&path, &layers);
        open(&path)
    };
    let (plain, one, many) = (open(&rootfs), of_layers(1), of_layers(60));
    let disk = ext4(&rootfs, &dir);
    let time = |image: &Image, disk: Option<&Path>, root: &str, before: &str| {
        let times: Vec<f64> = (0..ROUNDS).map(|_| read(&kernel, image, disk, root, before)).collect();
        median(&times)
    };
    let peer = time(&plain, Some(&disk), "/mnt", "mount -o ro /dev/vda /mnt");
    println!("ext4: {peer:.1} ms");
    for (name, image) in [("1 layer", &one), ("60 layers", &many), ("a root file system as tar", &plain)] {
        let what = format!("first read of the files of an image of {name}");
        figure(&what, time(image, None, "", "true"), "ms", Some(peer));
    }
    std::fs::remove_dir_all(&dir).expect("the directory goes");
}
