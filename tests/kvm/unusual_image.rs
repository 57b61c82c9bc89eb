//! An image with unusual files, for the tests of guests and for the one that makes it outside the lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cofferdam::Image;

#[path = "../../src/container/image/tests/maker.rs"]
#[allow(dead_code, reason = "other tests make other archives")]
pub mod maker;

use maker::{Made, archive};

/// Names in one directory, and names of one file.
pub const MANY: usize = 50_000;
pub const LINKS: usize = 66_000;
/// Pieces of a file with holes, and its size.
pub const PIECES: [(u64, u64); 3] = [(4096, 5000), (3 << 30, 1), ((5 << 30) - 7, 7)];
pub const HOLEY: u64 = 5 << 30;

/// A program of the host with what it is linked with.
fn program(path: &str) -> Vec<Made> {
    let output = Command::new("ldd").arg(path).output().expect("ldd");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    let copied = libraries
        .chain([path])
        .map(|file| Made::file(file, fs::read(file).expect("acl, attr, busybox-static: run `make setup`")).mode(0o755));
    copied.collect()
}

/// Everything in it.
fn entries() -> Vec<Made> {
    let list = "user::rwx\nuser:1000:r-x\ngroup::r--\nmask::r-x\nother::---\n";
    let mut entries = [program("/usr/bin/getfattr"), program("/usr/bin/getfacl")].concat();
    entries.extend([
        Made::file("bin/busybox", fs::read("/bin/busybox").expect("busybox-static: run `make setup`")).mode(0o755),
        Made::symlink("bin/sh", "busybox"),
        Made::directory("odd").mode(0o1777).at(-5),
        Made::file("odd/xattr", "").pax("SCHILY.xattr.user.note", "two\nlines").pax("SCHILY.xattr.trusted.t", "x"),
        Made::file("odd/large", "").pax("SCHILY.xattr.user.large", [b'v'; 60_000]),
        Made::file("odd/cap", "")
            .pax("SCHILY.xattr.security.capability", b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        Made::file("odd/acl", "").mode(0o750).pax("SCHILY.acl.access", list),
        Made::directory("odd/default").pax("SCHILY.acl.default", list),
        Made::file("odd/1910", "").at(-1_893_456_000),
        Made::file("odd/fraction", "").pax("mtime", "-1.5"),
        Made::file("odd/2300", "").at(10_413_792_000),
        Made::file(b"odd/\xff\xfe".as_slice(), "not UTF-8"),
        Made::symlink("odd/long", "x/".repeat(2000) + "y"),
        Made::file("odd/setuid", "x").mode(0o4755),
        Made { device: (300, 1_000_000), ..Made::device("odd/device") },
        Made::fifo("odd/fifo"),
        Made { owner: (4_294_967_294, 3_000_000_000), ..Made::file("odd/owner", "") },
        Made::file("odd/holey", [vec![1; 5000], vec![2; 8]].concat()).sparse(&PIECES, HOLEY),
        Made::file("odd/zeros", vec![0; 1 << 20]),
        Made::file("odd/links/first", "linked"),
        Made::file("usr/lib/target", "through a link"),
        Made::symlink("link", "/usr/lib"),
        Made::file("link/below", "below a link"),
    ]);
    entries.extend((1..LINKS).map(|n| Made::link(format!("odd/links/{n}"), "odd/links/first")));
    entries.extend((0..MANY).map(|n| Made::file(format!("odd/many/{n}"), "")));
    entries
}

/// The image, with its disk beside the archive, which is made where it is missing; or made anew where it is another one, which takes
/// minutes in the lab.
pub fn image(cache: &Path, renew: bool) -> Image {
    let directory = cache.join("odd");
    fs::create_dir_all(&directory).expect("the cache");
    let path: PathBuf = directory.join("odd.tar");
    if renew || !path.exists() {
        let wanted = archive(&entries());
        if fs::read(&path).ok().is_none_or(|found| found != wanted) {
            fs::write(&path, wanted).expect("the cache");
        }
    }
    Image::open(path).expect("the archive").cache_dir(directory.join("disks"))
}
