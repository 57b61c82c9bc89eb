//! Images that `umoci` and `skopeo` make and unpack, against ours.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use sha2::Digest;

use super::super::layers::fuzzing::joined;
use super::local::{Files, open};
use super::*;
use crate::sys::{self, Beneath};

/// Runs a program, and fails with what it says.
pub(super) fn run(program: &str, arguments: &[&str]) {
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
pub(super) struct Seen {
    mode: u32,
    owner: Option<(u32, u32)>,
    mtime: Option<(i64, u32)>,
    rdev: u64,
    /// Of files and links.
    size: u64,
    /// Of a file the digest of its content, of a link its target.
    content: String,
    xattrs: BTreeMap<String, Vec<u8>>,
    /// The first path of the same inode, and how many it has.
    first: String,
    nlink: u64,
}

/// A name as text that no other has.
fn shown(name: &[u8]) -> String {
    name.escape_ascii().to_string()
}

fn shown_xattrs(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> BTreeMap<String, Vec<u8>> {
    xattrs.iter().map(|(name, value)| (shown(name), value.clone())).collect()
}

/// Adds up what `read` returns from each offset on, until it returns nothing.
fn digest(mut read: impl FnMut(u64) -> Vec<u8>) -> String {
    let (mut hash, mut at) = (sha2::Sha256::new(), 0);
    loop {
        let piece = read(at);
        if piece.is_empty() {
            return shown(&hash.finalize());
        }
        hash.update(&piece);
        at += piece.len() as u64;
    }
}

/// As much of a file as is read at once.
const PIECE: u64 = 1 << 20;

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
        let name = shown(path.as_os_str().as_bytes());
        let content = match stat.file_type() {
            kind if kind.is_file() => {
                let mut file = File::open(root.join(&path)).unwrap();
                digest(|_| {
                    let mut piece = Vec::new();
                    file.by_ref().take(PIECE).read_to_end(&mut piece).unwrap();
                    piece
                })
            }
            kind if kind.is_symlink() => shown(fs::read_link(root.join(&path)).unwrap().as_os_str().as_bytes()),
            _ => String::new(),
        };
        let seen = Seen {
            mode: stat.mode(),
            owner: is_root().then_some((stat.uid(), stat.gid())),
            // The root has the time of its making.
            mtime: (!name.is_empty()).then_some((stat.mtime(), stat.mtime_nsec() as u32)),
            rdev: stat.rdev(),
            size: if stat.is_file() || stat.is_symlink() { stat.len() } else { 0 },
            content,
            xattrs: shown_xattrs(&sys::xattrs(place.as_fd(), 1 << 20).unwrap()),
            first: firsts.entry(stat.ino()).or_insert_with(|| name.clone()).clone(),
            nlink: if stat.is_dir() { 0 } else { stat.nlink() },
        };
        found.insert(name, seen);
    }
    found
}

/// The same of ours.
pub(super) fn ours(image: &Image) -> BTreeMap<String, Seen> {
    let disk = match image.disk(None).unwrap_or_else(|error| panic!("{image:?}: {error}")) {
        ImageDisk::File(file) => file,
        ImageDisk::Pieces(pieces) => joined(&pieces).unwrap(),
    };
    let reader = Reader::open(&disk);
    let mut firsts = BTreeMap::new();
    let tree = reader.tree(4096).into_iter().map(|(name, node)| (PathBuf::from(OsString::from_vec(name)), node));
    // In the order of the others.
    let tree: BTreeMap<PathBuf, Node> = tree.collect();
    let seen = |(path, node): (PathBuf, Node)| {
        let name = shown(path.as_os_str().as_bytes());
        let (major, minor) = (node.rdev >> 8 & 0xfff, node.rdev & 0xff | node.rdev >> 12 & 0xfff00);
        let kind = u32::from(node.mode) & libc::S_IFMT;
        let seen = Seen {
            mode: u32::from(node.mode),
            owner: is_root().then_some((node.uid, node.gid)),
            mtime: (!name.is_empty()).then_some(node.mtime),
            rdev: libc::makedev(major, minor),
            size: if matches!(kind, libc::S_IFREG | libc::S_IFLNK) { node.size } else { 0 },
            content: match kind {
                libc::S_IFREG => digest(|at| reader.read(node.nid, at, PIECE)),
                libc::S_IFLNK => shown(&node.content),
                _ => String::new(),
            },
            xattrs: shown_xattrs(&node.xattrs),
            first: firsts.entry(node.nid).or_insert_with(|| name.clone()).clone(),
            nlink: if kind == libc::S_IFDIR { 0 } else { u64::from(node.nlink) },
        };
        (name, seen)
    };
    tree.into_iter().map(seen).collect()
}

/// Compares with what umoci unpacks of an image; the number of entries.
pub(super) fn compare(image: &Image, layout: &str, bundle: &Path) -> usize {
    let mut arguments = vec!["unpack", "--image", layout, bundle.to_str().unwrap()];
    if !is_root() {
        arguments.insert(1, "--rootless");
    }
    run("umoci", &arguments);
    let (ours, theirs) = (ours(image), unpacked(&bundle.join("rootfs")));
    let differ: Vec<_> = ours.keys().chain(theirs.keys()).filter(|path| ours.get(*path) != theirs.get(*path)).collect();
    if let Some(path) = differ.first() {
        let count = differ.len();
        panic!("{layout}: {count} differ: {path}:\n{:?}\n{:?}", ours.get(*path), theirs.get(*path));
    }
    ours.len()
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
    let first = ours(&open(&temp, &layout));
    for path in [saved, packed] {
        assert!(ours(&open(&temp, &path)) == first, "{}", path.display());
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
