//! GNU tar itself, as root, against the same archive. The tree is the same, or there is an error where it has one.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use proptest::prelude::*;

use super::maker::{USTAR, V7};
use super::*;

/// What both must agree on.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    /// None of directories, whose time changes when something is put into them.
    mtime: Option<(i64, u32)>,
    /// All paths that are the same file; none of directories.
    names: Vec<String>,
    size: u64,
    content: Vec<u8>,
    device: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

type Trees = BTreeMap<String, Seen>;

/// Only root can make devices and give files away. These tests fail for other users, and are not skipped.
#[track_caller]
fn must_be_root() {
    assert_eq!(
        fs::metadata("/proc/self").unwrap().uid(),
        0,
        "GNU tar makes devices and gives files away, which only root can: run this as root, or leave it out with `--skip gnu_tar`"
    );
}

/// What GNU tar makes of an archive, or what it says.
fn theirs(bytes: &[u8]) -> Result<Trees, String> {
    let temp = Temp::new();
    let (tar, out) = (temp.0.join("a.tar"), temp.0.join("out"));
    fs::write(&tar, bytes).unwrap();
    fs::create_dir(&out).unwrap();
    fs::set_permissions(&out, fs::Permissions::from_mode(0o755)).unwrap();
    let command = "umask 022 && exec tar --numeric-owner -p --xattrs --xattrs-include='*' --acls -xf \"$0\" -C \"$1\"";
    let output = std::process::Command::new("sh").args(["-c", command]).args([&tar, &out]).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let (mut trees, mut waiting) = (Trees::new(), vec![out.clone()]);
    let mut names: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    while let Some(path) = waiting.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        let name = path.strip_prefix(&out).unwrap().to_string_lossy().into_owned();
        if kind.is_dir() {
            waiting.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        } else {
            names.entry(stat.ino()).or_default().push(name.clone());
        }
        let content = match () {
            () if kind.is_file() => {
                let mut content = Vec::new();
                File::open(&path).unwrap().take(64 << 10).read_to_end(&mut content).unwrap();
                content
            }
            () if kind.is_symlink() => fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            () => Vec::new(),
        };
        let place = File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(&path).unwrap();
        let device = if kind.is_char_device() || kind.is_block_device() { stat.rdev() } else { 0 };
        let seen = Seen {
            mode: stat.mode(),
            owner: (stat.uid(), stat.gid()),
            mtime: (!kind.is_dir()).then(|| (stat.mtime(), stat.mtime_nsec() as u32)),
            names: Vec::new(),
            size: if kind.is_dir() { 0 } else { stat.len() },
            content,
            device,
            xattrs: crate::sys::xattrs(std::os::fd::AsFd::as_fd(&place), usize::MAX).unwrap(),
        };
        assert!(trees.insert(name, seen).is_none());
    }
    for all in names.into_values() {
        let mut all = all;
        all.sort();
        all.iter().for_each(|name| trees.get_mut(name).unwrap().names.clone_from(&all));
    }
    Ok(trees)
}

/// What is on our disk.
fn ours(bytes: &[u8]) -> Result<Trees> {
    let (_temp, disk) = prepare(bytes)?;
    fsck(&disk);
    let tree = tree_of(&disk);
    let mut names: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    tree.iter().for_each(|(path, node)| names.entry(node.nid).or_default().push(path.clone()));
    let seen = |node: Node| {
        let is_directory = node.mode >> 12 == 4;
        Seen {
            mode: node.mode.into(),
            owner: (node.uid, node.gid),
            mtime: (!is_directory).then_some(node.mtime),
            names: if is_directory { Vec::new() } else { names[&node.nid].clone() },
            size: if is_directory { 0 } else { node.size },
            content: node.content,
            device: match node.rdev {
                0 => 0,
                n => libc::makedev(n >> 8 & 0xfff, n & 0xff | n >> 12 & 0xf_ff00),
            },
            xattrs: node.xattrs,
        }
    };
    Ok(tree.into_iter().map(|(path, node)| (path, seen(node))).collect())
}

/// Both have the same, or both refuse.
fn compare(entries: &[Made]) {
    let bytes = archive(entries);
    match (theirs(&bytes), ours(&bytes)) {
        (Ok(theirs), Ok(ours)) => {
            for path in theirs.keys().chain(ours.keys()) {
                assert_eq!(ours.get(path), theirs.get(path), "{path:?} of {entries:?}");
            }
        }
        (Err(_), Err(error)) => {
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{error:?}");
            assert!(error.to_string().contains("entry \""), "{error}");
        }
        (Err(said), Ok(_)) => panic!("GNU tar alone refuses: {said}: {entries:?}"),
        (Ok(_), Err(error)) => panic!("GNU tar does not refuse: {error}: {entries:?}"),
    }
}

#[test]
fn unusual_archives_match_gnu_tar() {
    must_be_root();
    let f = Made::file;
    let d = Made::directory;
    let l = Made::link;
    let s = Made::symlink;
    let acl = "user::rw-\nuser:1000:rw-\ngroup::r--\nmask::rw-\nother::---\n";
    let cases: [&[Made]; 39] = [
        // A directory over the name of a hard link, and one below it.
        &[f("a", "A"), l("b", "a"), d("b").mode(0o700), f("b/f", "inside"), f("after", "x")],
        &[f("a", "A"), l("b", "a"), f("b/x", "lost?")],
        // What GNU tar makes itself: arguments that overlap, a second append, links to links, parents without an entry.
        &[d("."), d("./d"), f("./d/f", "x"), l("./d/g", "./d/f"), f("./d/f", "x"), l("./d/g", "./d/f")],
        &[f("a", "A"), l("b", "a"), l("c", "b")],
        &[f("d/f", "x"), l("e/h", "d/f")],
        &[f("a", "A"), l("a", "a")],
        &[l("a", "a")],
        &[f("a", "A"), l("a", "missing")],
        &[f("a", "A"), l("b", "a"), l("b", "a"), f("a", "new")],
        &[f("a", "A"), f("b", "B"), l("b", "a")],
        &[s("a", "x"), l("b", "a")],
        &[Made::device("a"), l("b", "a")],
        &[d("d"), l("b", "d")],
        // Types that change.
        &[d("x"), s("x", "y")],
        &[d("x"), f("x", "file")],
        &[f("x/y", ""), s("x", "y")],
        &[f("x/y", ""), f("x", "")],
        &[f("x/y", ""), l("x", "x/y")],
        &[s("x", "y"), d("x"), f("x/f", "")],
        &[Made::device("q/null"), s("q", "x")],
        &[f("a", "A"), l("b", "a"), Made::fifo("b"), Made::device("a")],
        &[d("x"), Made::fifo("x"), d("x")],
        &[f("x", ""), f("x/y", "")],
        // Links to directories.
        &[f("usr/lib/one", "1"), s("lib", "usr/lib"), f("lib/two", "2"), l("three", "lib/two")],
        &[d("u"), s("l", "u"), d("l").mode(0o711), f("l/f", "")],
        &[d("u"), s("l", "u"), f("l", "file")],
        &[s("l", "nowhere"), f("l/f", "")],
        &[d("a/b"), s("a/l", "b"), s("m", "a/l"), f("m/f", "x"), d("m/d")],
        // Old forms.
        &[f("d/", "").of_type(0).magic(V7), f("d/f", "x").of_type(0).magic(V7)],
        &[f("d/", "").magic(USTAR).mode(0o700), f("c", "x").of_type(b'7').magic(USTAR)],
        &[f("a", "A"), l("b/", "a"), s("c/", "a")],
        &[f("a", "A"), d("d").of_type(b'D'), f("label", "").of_type(b'V')],
        &[f(".", "x")],
        // What pax records say.
        &[f("short", "xyz").pax("path", "a/".repeat(60) + "z").pax("mtime", "-5.25").pax("uid", "123456789")],
        &[s("l", "short").pax("linkpath", "t/".repeat(60)), f("c", "").pax("comment", "two\nlines")],
        &[f("f", "").pax("SCHILY.xattr.user.a", "1\n2=3").pax("SCHILY.xattr.trusted.b", [0, 10, 255])],
        &[f("f", "").mode(0o4777).pax("SCHILY.acl.access", acl), d("d").pax("SCHILY.acl.default", acl)],
        &[d("p"), f("p/q", ""), d("p").mode(0o1777).at(5).pax("SCHILY.xattr.user.late", "x"), d("").mode(0o700)],
        &[f("neg", "").at(-1), f("old", "").at(-1_893_456_000), f("size", "xyz").pax("size", "3")],
    ];
    cases.into_iter().for_each(compare);
}

/// All forms of sparse files, as GNU tar itself writes them.
#[test]
fn archives_made_by_gnu_tar_match() {
    must_be_root();
    let temp = Temp::new();
    let source = temp.0.join("source");
    fs::create_dir_all(source.join("dir")).unwrap();
    let mut holey = File::create(source.join("dir/holey")).unwrap();
    for n in 0..60u64 {
        holey.seek(SeekFrom::Start(n * 100_000 + n)).unwrap();
        std::io::Write::write_all(&mut holey, &[n as u8 + 1; 700]).unwrap();
    }
    holey.set_len(50 << 20).unwrap();
    fs::write(source.join("dir").join("n".repeat(200)), "long name").unwrap();
    fs::hard_link(source.join("dir/holey"), source.join("again")).unwrap();
    std::os::unix::fs::symlink("t/".repeat(100), source.join("link")).unwrap();
    let forms = ["gnu", "oldgnu", "pax --sparse-version=0.0", "pax --sparse-version=0.1", "pax --sparse-version=1.0"];
    for form in forms {
        let tar = temp.0.join("a.tar");
        let command = format!("tar --format={form} --numeric-owner --xattrs --acls -S -cf \"$0\" -C \"$1\" .");
        let output = std::process::Command::new("sh").args(["-c", &command]).args([&tar, &source]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let bytes = fs::read(&tar).unwrap();
        assert!(bytes.len() < 1 << 20, "it has holes");
        let (theirs, ours) = (theirs(&bytes).unwrap(), ours(&bytes).unwrap());
        theirs
            .keys()
            .chain(ours.keys())
            .for_each(|path| assert_eq!(ours.get(path), theirs.get(path), "{form}: {path}"));
        // Of the content both have looked at the beginning only.
        let (_temp, disk) = prepare(&bytes).unwrap();
        let file = File::open(&disk).unwrap();
        let content = Reader::open(&file).read(tree_of(&disk)["dir/holey"].nid, 0, u64::MAX);
        assert!(content == fs::read(source.join("dir/holey")).unwrap(), "{form}");
    }
}

/// Names that meet each other often, each spelled in one way: GNU tar holds `d` and `./d` for two when it puts off their metadata.
fn path() -> impl Strategy<Value = String> {
    let part = prop::sample::select(vec!["a", "b", "c"]);
    (prop::collection::vec(part, 1..4), any::<bool>()).prop_map(|(parts, slash)| {
        let path = parts.join("/");
        if slash { path + "/" } else { path }
    })
}

fn entry() -> impl Strategy<Value = Made> {
    let made = (0..9, path(), path(), any::<u8>()).prop_map(|(kind, path, other, n)| match kind {
        0..3 => Made::file(path.trim_end_matches('/'), vec![n; usize::from(n)]),
        3..5 => Made::directory(path),
        // GNU tar puts off links that lead upwards or to the root, and then refuses what comes below them.
        5 => Made::symlink(path.trim_end_matches('/'), other),
        6..8 => Made::link(path.trim_end_matches('/'), other.trim_end_matches('/')),
        _ => Made::fifo(path.trim_end_matches('/')),
    });
    (made, prop::sample::select(vec![0o644, 0o4755, 0o1777, 0o700]), 0..5i64).prop_map(|(made, mode, mtime)| {
        let made = made.mode(mode).at(mtime - 2);
        if mtime == 0 { made.pax("mtime", "-7.5") } else { made }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn random_archives_match_gnu_tar(entries in prop::collection::vec(entry(), 1..10), dot in any::<bool>()) {
        must_be_root();
        let dotted = |entry: Made| Made { path: [b"./", &*entry.path].concat(), ..entry };
        let entries: Vec<Made> = if dot { entries.into_iter().map(dotted).collect() } else { entries };
        compare(&entries);
    }
}
