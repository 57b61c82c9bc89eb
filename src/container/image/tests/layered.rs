//! Layers upon each other, against a naive model.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::super::layers::{Allowed, fuzzing};
use super::*;
use crate::size::Size;

fn allowed() -> Allowed {
    Allowed { limits: ImageLimits::default(), max_size: Size::gib(1) }
}

fn deadline() -> PrepareDeadline {
    PrepareDeadline::new(Duration::from_secs(60), None)
}

fn composed(layers: &[Vec<u8>]) -> Result<BTreeMap<String, Node>> {
    let disk = fuzzing::composed(layers, &allowed(), &deadline())?;
    fsck(Path::new(&format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd())));
    let tree = Reader::open(&disk).tree(64 << 10);
    Ok(tree.into_iter().map(|(path, node)| (String::from_utf8_lossy(&path).into_owned(), node)).collect())
}

/// What becomes of these layers, the lowest first.
fn stacked(layers: &[&[Made]]) -> Result<BTreeMap<String, Node>> {
    composed(&layers.iter().map(|entries| archive(entries)).collect::<Vec<_>>())
}

fn names(tree: &BTreeMap<String, Node>) -> Vec<&str> {
    tree.keys().map(String::as_str).filter(|path| !path.is_empty()).collect()
}

fn content<'a>(tree: &'a BTreeMap<String, Node>, path: &str) -> &'a [u8] {
    &tree[path].content
}

fn lower() -> Vec<Made> {
    vec![
        Made::directory("d").mode(0o711),
        Made::file("d/one", "1"),
        Made::directory("d/sub"),
        Made::file("d/sub/two", "2"),
        Made::file("f", "lower"),
    ]
}

#[test]
fn whiteouts_hide_files_and_whole_directories() {
    let tree = stacked(&[&lower(), &[Made::file("d/.wh.one", ""), Made::file(".wh.f", "")]]).unwrap();
    assert_eq!(names(&tree), ["d", "d/sub", "d/sub/two"]);
    let tree = stacked(&[&lower(), &[Made::file(".wh.d", "")]]).unwrap();
    assert_eq!(names(&tree), ["f"]);
    // What is not there needs no removal, nor has the lowest layer anything below it.
    let marks =
        [Made::file(".wh.none", ""), Made::file("f/.wh.x", ""), Made::file("no/.wh.x", ""), Made::file("k", "")];
    assert_eq!(names(&stacked(&[&marks]).unwrap()), ["k"]);
    assert_eq!(stacked(&[&lower(), &marks]).unwrap().len(), 7);
}

#[test]
fn whiteout_leaves_what_its_own_layer_adds() {
    let (mark, file) = (Made::file("d/.wh.one", ""), Made::file("d/one", "upper"));
    for layer in [[mark.clone(), file.clone()], [file, mark]] {
        assert_eq!(content(&stacked(&[&lower(), &layer]).unwrap(), "d/one"), b"upper");
    }
    let (mark, file) = (Made::file(".wh.d", ""), Made::file("d", "a file"));
    for layer in [[mark.clone(), file.clone()], [file, mark.clone()]] {
        let tree = stacked(&[&lower(), &layer]).unwrap();
        assert_eq!((names(&tree), content(&tree, "d")), (vec!["d", "f"], &b"a file"[..]));
    }
    let again = [Made::directory("d").mode(0o700), Made::file("d/new", ""), mark];
    let tree = stacked(&[&lower(), &again]).unwrap();
    assert_eq!((names(&tree), tree["d"].mode & 0o777), (vec!["d", "d/new", "f"], 0o700));
}

#[test]
fn opaque_directory_hides_what_is_below_it() {
    let opaque = Made::file("d/.wh..wh..opq", "");
    let own = [Made::directory("d").mode(0o750), Made::file("d/new", "")];
    for at in 0..=2 {
        let mut layer = own.to_vec();
        layer.insert(at, opaque.clone());
        let tree = stacked(&[&lower(), &layer]).unwrap();
        assert_eq!((names(&tree), tree["d"].mode & 0o777), (vec!["d", "d/new", "f"], 0o750), "{at}");
    }
    // Without an entry of its own the directory stays as it was.
    let tree = stacked(&[&lower(), &[opaque]]).unwrap();
    assert_eq!((names(&tree), tree["d"].mode & 0o777), (vec!["d", "f"], 0o711));
    let tree = stacked(&[&lower(), &[Made::file(".wh..wh..opq", ""), Made::file("k", "")]]).unwrap();
    assert_eq!(names(&tree), ["k"]);
}

#[test]
fn types_change_between_layers() {
    let tree = stacked(&[&lower(), &[Made::file("d", "x"), Made::directory("f"), Made::file("f/y", "")]]).unwrap();
    assert_eq!(names(&tree), ["d", "f", "f/y"]);
    let tree = stacked(&[&lower(), &[Made::symlink("d", "/f")], &[Made::fifo("f")]]).unwrap();
    assert_eq!((names(&tree), content(&tree, "d"), tree["f"].mode >> 12), (vec!["d", "f"], &b"/f"[..], 1));
    // A directory in place of a link does not go where the link led.
    let base = [Made::directory("usr/lib"), Made::file("usr/lib/libc", "c"), Made::symlink("lib", "usr/lib")];
    let upper = [
        Made::directory("lib"),
        Made::file("lib/.wh..wh..opq", ""),
        Made::file("lib/.wh.libc", ""),
        Made::file("lib/x", ""),
    ];
    for order in [[0, 1, 2, 3], [1, 2, 0, 3]] {
        let upper: Vec<Made> = order.iter().map(|n| upper[*n].clone()).collect();
        let tree = stacked(&[&base, &upper]).unwrap();
        assert_eq!(names(&tree), ["lib", "lib/x", "usr", "usr/lib", "usr/lib/libc"], "{order:?}");
    }
}

#[test]
fn links_on_the_path_are_followed_inside_the_image() {
    let base = [
        Made::directory("real/deep").mode(0o711),
        Made::symlink("abs", "/real"),
        Made::symlink("rel", "./real/../real"),
        Made::symlink("up", "../../../real/deep"),
        Made::file("real/old", ""),
    ];
    let upper = [
        Made::file("abs/one", "1"),
        Made::file("rel/two", "2"),
        Made::file("up/three", "3"),
        Made::file("abs/.wh.old", ""),
        Made::link("up/four", "abs/one"),
    ];
    let tree = stacked(&[&base, &upper]).unwrap();
    let expected =
        ["abs", "real", "real/deep", "real/deep/four", "real/deep/three", "real/one", "real/two", "rel", "up"];
    assert_eq!((names(&tree), tree["real/deep"].mode & 0o777), (expected.to_vec(), 0o711));
    assert_eq!(tree["real/one"].nid, tree["real/deep/four"].nid);
    let cycle = [Made::symlink("a", "b"), Made::symlink("b", "a")];
    for entry in [Made::file("a/x", ""), Made::file("a/.wh.x", "")] {
        let error = stacked(&[&cycle, &[entry]]).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("too many links"), "{error}");
    }
}

#[test]
fn hard_links_cross_layers() {
    let base = [Made::file("a", "content").mode(0o4755), Made::symlink("s", "a")];
    let upper = [Made::link("b", "a"), Made::link("t", "s")];
    let tree = stacked(&[&base, &upper, &[Made::link("c", "b"), Made::file(".wh.a", "")]]).unwrap();
    assert_eq!((names(&tree), tree["b"].nlink), (vec!["b", "c", "s", "t"], 2));
    let tree = stacked(&[&base, &upper, &[Made::file(".wh.a", "")], &[Made::link("c", "b")]]).unwrap();
    assert_eq!(names(&tree), ["b", "c", "s", "t"]);
    assert_eq!((tree["b"].nid, tree["b"].nlink, content(&tree, "c")), (tree["c"].nid, 2, &b"content"[..]));
    assert_eq!((tree["s"].nid, tree["t"].mode >> 12, tree["c"].mode & 0o7777), (tree["t"].nid, 10, 0o4755));
    // A name that is written anew is another file.
    let tree = stacked(&[&base, &upper, &[Made::file("a", "new")]]).unwrap();
    assert_eq!((content(&tree, "a"), content(&tree, "b"), tree["b"].nlink), (&b"new"[..], &b"content"[..], 1));
    let missing: [&[Made]; 3] = [
        &[Made::file(".wh.a", ""), Made::link("b", "a")],
        &[Made::link("b", "later"), Made::file("later", "")],
        &[Made::directory("dir"), Made::file("dir/x", ""), Made::link("dir", "dir/x")],
    ];
    for layer in missing {
        let error = stacked(&[&base, layer]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("layer 1, sha256:") && error.to_string().contains("entry \""), "{error}");
    }
}

#[test]
fn metadata_of_each_entry_is_its_layers() {
    let deep = Made { owner: (u64::from(u32::MAX - 1), 5), ..Made::file("x/y/z", "") }
        .at(-5)
        .pax("mtime", "-4.25")
        .pax("SCHILY.xattr.security.capability", "\u{1}\u{0}cap")
        .pax("SCHILY.xattr.user.a", "v");
    let base = [Made::directory("x").mode(0o1777), Made::directory("x/y").mode(0o700)];
    let tree =
        stacked(&[&base, &[deep], &[Made::directory("x/y").mode(0o755).pax("SCHILY.xattr.user.b", "w")]]).unwrap();
    assert_eq!((tree["x"].mode & 0o7777, tree["x/y"].mode & 0o7777), (0o1777, 0o755));
    let file = &tree["x/y/z"];
    assert_eq!((file.uid, file.gid, file.mtime), (u32::MAX - 1, 5, (-5, 750_000_000)));
    assert_eq!(file.xattrs[&b"security.capability"[..]], b"\x01\x00cap");
    assert_eq!(tree["x/y"].xattrs.len(), 1);
    // A directory that no layer describes is root's.
    let made = &stacked(&[&[Made::file("p/q", "")]]).unwrap()["p"];
    assert_eq!((made.mode & 0o7777, made.uid, made.mtime), (0o755, 0, (0, 0)));
}

#[test]
fn last_entry_of_a_path_counts_in_its_layer() {
    let layer = [Made::file("a", "1"), Made::directory("a"), Made::file("a/b", ""), Made::file("a", "2")];
    let tree = stacked(&[&layer]).unwrap();
    assert_eq!((names(&tree), content(&tree, "a")), (vec!["a"], &b"2"[..]));
}

#[test]
fn marks_of_nothing_are_refused() {
    for path in [".wh.", "d/.wh..", "d/.wh...", ".wh.d/x"] {
        let error = stacked(&[&[Made::file(path, "")]]).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(path), "{path}: {error}");
    }
    // AUFS has more marks, which say nothing of the tree.
    let aufs = [Made::directory(".wh..wh.plnk"), Made::file(".wh..wh.plnk/1.2", "x"), Made::file(".wh..wh.aufs", "")];
    assert_eq!(names(&stacked(&[&lower(), &aufs]).unwrap()).len(), 5);
}

#[test]
fn unkeepable_entries_are_refused_in_layers() {
    let cases = [
        Made { device: (0, 0), ..Made::device("null") },
        Made::file("f", "").pax("SCHILY.xattr.trusted.overlay.opaque", "y"),
        Made::file("../f", ""),
    ];
    for entry in cases {
        assert!(stacked(&[&lower(), std::slice::from_ref(&entry)]).is_err(), "{entry:?}");
    }
}

#[test]
fn empty_layers_change_nothing() {
    let all = [archive(&lower()), Vec::new(), archive(&[]), vec![0; 512], archive(&lower())];
    assert_eq!(composed(&all).unwrap(), stacked(&[&lower()]).unwrap());
    assert_eq!(composed(&[]).unwrap().len(), 1);
}

#[test]
fn sparse_files_of_several_layers_keep_their_holes() {
    let sparse = |name: &str, byte: u8| {
        Made { data: vec![byte; 8192], ..Made::file(name, "") }.sparse(&[(0, 4096), (1 << 30, 4096)], 2 << 30)
    };
    let layers = [archive(&[Made::file("pad", vec![9; 5000]), sparse("a", 1)]), archive(&[sparse("b", 2)])];
    let disk = fuzzing::composed(&layers, &allowed(), &deadline()).unwrap();
    let reader = Reader::open(&disk);
    let tree = reader.tree(100);
    for (name, byte) in [(&b"a"[..], 1), (b"b", 2)] {
        let node = &tree[name];
        assert_eq!((node.size, reader.read(node.nid, 1 << 30, 4097)), (2 << 30, [vec![byte; 4096], vec![0]].concat()));
    }
    assert!(std::os::unix::fs::MetadataExt::blocks(&disk.metadata().unwrap()) * 512 < 1 << 20);
}

#[test]
fn same_layer_gives_the_same_bytes() {
    let tar = archive(&[&lower()[..], &[Made::file("x", vec![7; 10_000]), Made::file(".wh.y", "")]].concat());
    let bytes = || {
        let file = fuzzing::unpacked(&tar, &allowed(), &deadline()).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let first = bytes();
    assert!(first == bytes() && first.len() % 4096 == 0);
}

/// Beyond a mebibyte a log is not kept in memory while its layer is read.
#[test]
fn log_larger_than_its_buffer_is_whole() {
    let names: Vec<String> = (0..25_000).map(|n| format!("{n:05}{}", "x".repeat(n % 40))).collect();
    let tree = stacked(&[&names.iter().map(|name| Made::file(name, "")).collect::<Vec<_>>()]).unwrap();
    assert_eq!(tree.len(), names.len() + 1);
    let marks: Vec<Made> = names.iter().skip(1).map(|name| Made::file(format!(".wh.{name}"), "")).collect();
    let layers = [archive(&names.iter().map(|name| Made::file(name, "")).collect::<Vec<_>>()), archive(&marks)];
    assert_eq!(composed(&layers).unwrap().keys().collect::<Vec<_>>(), ["", "00000"]);
}

#[test]
fn limits_hold_for_all_layers_together() {
    let layers: Vec<Vec<u8>> = (0..4).map(|n| archive(&[Made::file(format!("f{n}"), vec![n; 40_000])])).collect();
    let with = |limits: ImageLimits, max_size| fuzzing::composed(&layers, &Allowed { limits, max_size }, &deadline());
    with(ImageLimits::new().max_entries(4), Size::kib(200)).unwrap();
    for (limits, size, method) in [
        (ImageLimits::new().max_entries(3), Size::gib(1), "ImageLimits::max_entries"),
        (ImageLimits::new(), Size::kib(100), "Image::max_size"),
        (ImageLimits::new().max_names(Size::bytes(7)), Size::gib(1), "ImageLimits::max_names"),
    ] {
        let error = with(limits, size).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains(method), "{error}");
    }
}

/// A damaged file of the store is an error or a disk that reads back, and never more work than it is long.
#[test]
fn damaged_layer_file_is_an_error() {
    let tar = archive(&[&lower()[..], &[Made::file("x", vec![7; 10_000]).pax("SCHILY.xattr.user.a", "v")]].concat());
    let file = fuzzing::unpacked(&tar, &allowed(), &deadline()).unwrap();
    let mut whole = vec![8];
    whole.resize(1 + file.metadata().unwrap().len() as usize, 0);
    file.read_exact_at(&mut whole[1..], 0).unwrap();
    whole.remove(0);
    let (mut refused, start) = (0, 5 * 4096);
    for at in (start..whole.len()).filter(|at| whole[*at] != 0) {
        for flip in [1, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] ^= flip;
            // A first byte that is a multiple of eight is taken as it is.
            damaged[0] = 8;
            match fuzzing::of_layer_file(&damaged, &allowed(), &deadline()) {
                Ok(disk) => drop(Reader::open(&disk).tree(64)),
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::InvalidConfig), "{error}");
                }
            }
        }
    }
    assert!(refused > 100, "{refused}");
}

/// What a layer does, as archives say it.
#[derive(Debug, Clone)]
enum Op {
    File(String, u8),
    Directory(String, u8),
    Link(String, String),
    Remove(String),
    Clear(String),
}

impl Op {
    fn made(&self) -> Made {
        let (above, name) = match self {
            Self::Remove(path) => path.rsplit_once('/').unwrap_or(("", path)),
            _ => ("", ""),
        };
        match self {
            Self::File(path, n) => Made::file(path, vec![*n; usize::from(*n)]),
            Self::Directory(path, n) => Made::directory(path).mode(u32::from(*n)),
            Self::Link(path, target) => Made::link(path, target),
            Self::Remove(_) => Made::file(format!("{above}/.wh.{name}"), ""),
            Self::Clear(path) => Made::file(format!("{path}/.wh..wh..opq"), ""),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Modeled {
    Directory(u32),
    /// With the number of the file that it is a name of.
    File(usize, u8),
}

/// A tree as a list of paths, changed in the simplest way there is. None where a layer cannot be.
fn modeled(layers: &[Vec<Op>]) -> Option<BTreeMap<String, Modeled>> {
    let (mut tree, mut files) = (BTreeMap::<String, Modeled>::new(), 0);
    fn remove(tree: &mut BTreeMap<String, Modeled>, path: &str) {
        tree.retain(|it, _| it != path && !it.starts_with(&format!("{path}/")));
    }
    fn parents(tree: &mut BTreeMap<String, Modeled>, path: &str) -> Option<()> {
        for (at, _) in path.match_indices('/') {
            if let Modeled::File(..) = tree.entry(path[..at].into()).or_insert(Modeled::Directory(0o755)) {
                return None;
            }
        }
        Some(())
    }
    for layer in layers {
        for op in layer {
            match op {
                Op::Remove(path) => remove(&mut tree, path),
                Op::Clear(path) => tree.retain(|it, _| !it.starts_with(&format!("{path}/"))),
                _ => {}
            }
        }
        for op in layer {
            match op {
                Op::Directory(path, mode) => {
                    parents(&mut tree, path)?;
                    tree.insert(path.clone(), Modeled::Directory(u32::from(*mode)));
                }
                Op::File(path, n) => {
                    parents(&mut tree, path)?;
                    remove(&mut tree, path);
                    files += 1;
                    tree.insert(path.clone(), Modeled::File(files, *n));
                }
                Op::Link(path, target) => {
                    let Modeled::File(file, n) = *tree.get(target)? else {
                        // A directory is what it is.
                        if path == target {
                            continue;
                        }
                        return None;
                    };
                    parents(&mut tree, path)?;
                    remove(&mut tree, path);
                    if path != target {
                        tree.values().find(|it| matches!(it, Modeled::File(other, _) if *other == file))?;
                    }
                    tree.insert(path.clone(), Modeled::File(file, n));
                }
                Op::Remove(_) | Op::Clear(_) => {}
            }
        }
    }
    Some(tree)
}

fn ops() -> impl Strategy<Value = Vec<Vec<Op>>> {
    let path = || {
        proptest::collection::vec(0..3usize, 1..4)
            .prop_map(|parts| parts.into_iter().map(|n| ["a", "b", "c"][n]).collect::<Vec<_>>().join("/"))
    };
    let op = (0..9u8, path(), path(), any::<u8>()).prop_map(|(kind, path, other, n)| match kind {
        0..3 => Op::File(path, n),
        3..5 => Op::Directory(path, n),
        5 => Op::Link(path, other),
        6 | 7 => Op::Remove(path),
        _ => Op::Clear(path),
    });
    proptest::collection::vec(proptest::collection::vec(op, 0..8), 1..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn any_sequence_of_layers_is_as_the_model_has_it(layers in ops()) {
        let tars: Vec<Vec<u8>> = layers.iter().map(|ops| archive(&ops.iter().map(Op::made).collect::<Vec<_>>())).collect();
        let found = fuzzing::composed(&tars, &allowed(), &deadline());
        let Some(model) = modeled(&layers) else {
            prop_assert_eq!(found.unwrap_err().kind(), ErrorKind::Corrupt);
            return Ok(());
        };
        let tree = Reader::open(&found.unwrap()).tree(1 << 10);
        let tree: BTreeMap<String, Node> = tree.into_iter().map(|(path, node)| (String::from_utf8(path).unwrap(), node)).collect();
        prop_assert_eq!(names(&tree), model.keys().map(String::as_str).collect::<Vec<_>>());
        let mut numbers = BTreeMap::new();
        for (path, modeled) in &model {
            let node = &tree[path];
            match modeled {
                Modeled::Directory(mode) => prop_assert_eq!((u32::from(node.mode & 0o777), node.mode >> 12), (*mode, 4)),
                Modeled::File(file, n) => {
                    prop_assert_eq!(&node.content, &vec![*n; usize::from(*n)]);
                    prop_assert_eq!(*numbers.entry(*file).or_insert(node.nid), node.nid);
                }
            }
        }
        let distinct: std::collections::BTreeSet<u64> = numbers.values().copied().collect();
        prop_assert_eq!(distinct.len(), numbers.len());
    }
}
