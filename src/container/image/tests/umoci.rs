//! Images that `umoci` and `skopeo` make and unpack, against ours.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use super::local::{Files, open, tree_of_image};
use super::*;
use crate::sys::{self, Beneath};

/// Runs a program, and fails with what it says.
fn run(program: &str, arguments: &[&str]) {
    let output =
        Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}: run `make setup`"));
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&said));
}

fn is_root() -> bool {
    fs::metadata("/proc/self").unwrap().uid() == 0
}

/// What both sides must agree on.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: Option<(u32, u32)>,
    mtime: Option<(i64, u32)>,
    rdev: u64,
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode, and how many it has.
    first: String,
    nlink: u64,
}

/// The tree that umoci unpacked.
fn unpacked(root: &Path) -> BTreeMap<String, Seen> {
    let beneath = Beneath::open(root).unwrap();
    let (mut found, mut waiting) = (BTreeMap::new(), vec![PathBuf::new()]);
    let mut paths = Vec::new();
    while let Some(path) = waiting.pop() {
        if fs::symlink_metadata(root.join(&path)).unwrap().is_dir() {
            waiting.extend(fs::read_dir(root.join(&path)).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
        }
        paths.push(path);
    }
    paths.sort();
    let mut firsts = BTreeMap::new();
    for path in paths {
        let stat = fs::symlink_metadata(root.join(&path)).unwrap();
        let place = beneath.open_at(&path, libc::O_PATH).unwrap();
        let name = path.to_string_lossy().into_owned();
        let content = match stat.file_type() {
            // As much as is read of ours.
            kind if kind.is_file() => fs::read(root.join(&path)).unwrap().into_iter().take(1 << 20).collect(),
            kind if kind.is_symlink() => fs::read_link(root.join(&path)).unwrap().as_os_str().as_bytes().to_vec(),
            _ => Vec::new(),
        };
        let seen = Seen {
            mode: stat.mode(),
            owner: is_root().then_some((stat.uid(), stat.gid())),
            // The root has the time of its making.
            mtime: (!name.is_empty()).then_some((stat.mtime(), stat.mtime_nsec() as u32)),
            rdev: stat.rdev(),
            content,
            xattrs: sys::xattrs(place.as_fd(), 1 << 20).unwrap(),
            first: firsts.entry(stat.ino()).or_insert_with(|| name.clone()).clone(),
            nlink: if stat.is_dir() { 0 } else { stat.nlink() },
        };
        found.insert(name, seen);
    }
    found
}

/// The same of ours.
fn ours(tree: BTreeMap<String, Node>) -> BTreeMap<String, Seen> {
    let mut firsts = BTreeMap::new();
    let seen = |(name, node): (String, Node)| {
        let (major, minor) = (node.rdev >> 8 & 0xfff, node.rdev & 0xff | node.rdev >> 12 & 0xfff00);
        let seen = Seen {
            mode: u32::from(node.mode),
            owner: is_root().then_some((node.uid, node.gid)),
            mtime: (!name.is_empty()).then_some(node.mtime),
            rdev: libc::makedev(major, minor),
            content: node.content,
            xattrs: node.xattrs,
            first: firsts.entry(node.nid).or_insert_with(|| name.clone()).clone(),
            nlink: if node.mode >> 12 == 4 { 0 } else { u64::from(node.nlink) },
        };
        (name, seen)
    };
    tree.into_iter().map(seen).collect()
}

fn compare(image: &Image, layout: &str, bundle: &Path) {
    let mut arguments = vec!["unpack", "--image", layout, bundle.to_str().unwrap()];
    if !is_root() {
        arguments.insert(1, "--rootless");
    }
    run("umoci", &arguments);
    let (ours, theirs) = (ours(tree_of_image(image).unwrap()), unpacked(&bundle.join("rootfs")));
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    for (path, seen) in &ours {
        assert!(*seen == theirs[path], "{path}:\n{seen:?}\n{:?}", theirs[path]);
    }
}

/// Layers with everything that they may have.
fn nasty() -> Vec<Vec<u8>> {
    let directory = |path: &str| Made::directory(path).at(1_500_000_000);
    let base = [
        directory("./"),
        directory("bin").mode(0o755),
        Made::file("bin/su", "setuid").mode(0o4755),
        Made::file("bin/ping", "caps")
            .pax("SCHILY.xattr.security.capability", [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        directory("tmp").mode(0o1777),
        directory("etc").mode(0o755),
        Made::file("etc/passwd", "root"),
        Made::file("etc/old", "1910").at(-1_893_456_000),
        Made::file("etc/half", "").pax("mtime", "-1.5"),
        Made::file("etc/nano", "").pax("mtime", "1600000000.123456789"),
        Made { owner: (4_294_967_294, 3_000_000_000), ..Made::file("etc/owner", "") },
        Made::file("etc/attributes", "").pax("SCHILY.xattr.user.note", "two\nlines"),
        directory("etc/opaque"),
        Made::file("etc/opaque/below", ""),
        directory("etc/whole"),
        Made::file("etc/whole/below", ""),
        directory("usr"),
        directory("usr/lib"),
        Made::file("usr/lib/libc", vec![3; 70_000]),
        Made::symlink("lib", "usr/lib"),
        Made::symlink("abs", "/usr/lib"),
        Made::link("usr/lib/alias", "usr/lib/libc"),
        Made::fifo("pipe"),
        Made::file(b"not utf-8 \xff", "").pax("path", b"not utf-8 \xff"),
        Made::file("new\nline", ""),
        Made::file(format!("etc/{}", "n".repeat(255)), "long"),
        Made::file("GNUSparseFile.1/holey", [vec![1; 4096], vec![2; 100]].concat())
            .pax("GNU.sparse.name", "holey")
            .pax("GNU.sparse.size", "400000")
            .pax("GNU.sparse.numblocks", "2")
            .pax("GNU.sparse.map", "0,4096,300000,100"),
        Made::file("to-dir", ""),
        directory("to-file"),
        Made::file("to-file/in", ""),
        directory("to-link"),
        Made::file("to-link/in", ""),
        Made::symlink("link-to-dir", "usr"),
    ];
    let middle = [
        directory("etc").mode(0o711),
        Made::file("etc/.wh.passwd", ""),
        directory("etc/opaque").mode(0o700),
        Made::file("etc/opaque/.wh..wh..opq", ""),
        Made::file("etc/opaque/own", ""),
        Made::file("etc/.wh.whole", ""),
        Made::link("bin/ping-too", "bin/ping"),
        Made::file("usr/lib/libc", "replaced"),
        Made::file("abs/through", "a link"),
        directory("to-dir"),
        Made::file("to-dir/in", ""),
        Made::file("to-file", "x"),
        Made::symlink("to-link", "etc"),
        directory("link-to-dir"),
        Made::file("link-to-dir/in", ""),
        Made::file("bin/readd", "1"),
    ];
    let top = [
        Made::file("bin/.wh.readd", ""),
        Made::file("bin/readd", "2"),
        directory("etc/whole").mode(0o750).pax("SCHILY.xattr.user.again", "x"),
        Made::link("etc/whole/deep", "etc/opaque/own"),
        Made::file("etc/old", "new"),
    ];
    [&base[..], &middle, &top].map(archive).to_vec()
}

#[test]
fn unpacked_layers_match_umoci() {
    let temp = Temp::new();
    let mut files = Files::default();
    let image = files.image(&nasty(), super::local::gzip, super::local::CONFIG);
    let layout = temp.0.join("layout");
    files.layout(&[(image, "latest")]).in_directory(&layout);
    let source = format!("{}:latest", layout.to_str().unwrap());
    compare(&open(&temp, &layout), &source, &temp.0.join("bundle"));
    // In the forms that others make of it, it is the same layers.
    let (saved, packed) = (temp.0.join("saved"), temp.0.join("oci-archive"));
    run(
        "skopeo",
        &["copy", "-q", &format!("oci:{source}"), &format!("docker-archive:{}:app:1", saved.to_str().unwrap())],
    );
    run("skopeo", &["copy", "-q", &format!("oci:{source}"), &format!("oci-archive:{}:app", packed.to_str().unwrap())]);
    let first = tree_of_image(&open(&temp, &layout)).unwrap();
    for path in [saved, packed] {
        assert!(tree_of_image(&open(&temp, &path)).unwrap() == first, "{}", path.display());
    }
    assert_eq!(fs::read_dir(temp.0.join("cache/layers")).unwrap().count(), 3);
    assert_eq!(disks(&temp).len(), 1);
}

/// Three layers as umoci itself writes them: of files, of changes, of removals.
#[test]
fn images_made_by_umoci_match() {
    let temp = Temp::new();
    let layout = temp.0.join("layout");
    let image = format!("{}:made", layout.to_str().unwrap());
    run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
    run("umoci", &["new", "--image", &image]);
    let steps: [&dyn Fn(&Path); 3] = [
        &|root| {
            fs::create_dir_all(root.join("a/b/c")).unwrap();
            (0..50).for_each(|n| fs::write(root.join(format!("a/{n}")), vec![n; 3000]).unwrap());
            fs::write(root.join("a/b/c/deep"), "deep").unwrap();
            std::os::unix::fs::symlink("a/b", root.join("link")).unwrap();
            fs::hard_link(root.join("a/1"), root.join("hard")).unwrap();
        },
        &|root| {
            fs::write(root.join("a/2"), "changed").unwrap();
            fs::write(root.join("a/b/c/new"), "new").unwrap();
            fs::remove_file(root.join("link")).unwrap();
            fs::create_dir(root.join("link")).unwrap();
        },
        &|root| {
            fs::remove_dir_all(root.join("a/b")).unwrap();
            fs::remove_file(root.join("a/3")).unwrap();
            fs::write(root.join("a/b"), "a file").unwrap();
        },
    ];
    for (n, step) in steps.into_iter().enumerate() {
        let bundle = temp.0.join(format!("bundle-{n}"));
        let bundle_name = bundle.to_str().unwrap();
        let mut unpack = vec!["unpack", "--image", &image, bundle_name];
        if !is_root() {
            unpack.insert(1, "--rootless");
        }
        run("umoci", &unpack);
        step(&bundle.join("rootfs"));
        run("umoci", &["repack", "--image", &image, bundle_name]);
    }
    let opened = open(&temp, &layout).select("made");
    assert_eq!(opened.config().unwrap().os, "linux");
    compare(&opened, &image, &temp.0.join("bundle"));
}
