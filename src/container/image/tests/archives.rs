//! What archives say is on the disk, or is refused by name.

use std::os::unix::fs::MetadataExt;

use super::maker::{V7, record};
use super::*;

#[test]
fn archive_metadata_is_on_the_disk() {
    let tree = tree(&[
        Made::directory("./").mode(0o711),
        Made::directory("./etc/"),
        Made::file("./etc/motd", "hello"),
        Made::link("./etc/again", "./etc/motd"),
        Made::symlink("./abs", "/nowhere/at/all"),
        Made::device("./null"),
        Made { device: (300, 1_000_000), ..Made::device("./large") }.of_type(b'4'),
        Made::fifo("./pipe"),
        Made { owner: (4_294_967_294, 4_294_967_295), ..Made::file("owners", "") },
        Made::file(b"\xff\xfe".as_slice(), "not UTF-8"),
        Made::file("n".repeat(255), "long"),
        Made::symlink("long", "x/".repeat(2000) + "y"),
    ])
    .unwrap();
    let motd = &tree["etc/motd"];
    assert_eq!((motd.mode, motd.uid, motd.gid, motd.nlink), (0o100_640, 1000, 1001, 2));
    assert_eq!((&*motd.content, motd.mtime), (&b"hello"[..], (1_600_000_000, 0)));
    assert_eq!(tree["etc/again"], *motd);
    assert_eq!((tree[""].mode, tree["etc"].mode, tree["etc"].nlink), (0o040_711, 0o040_750, 2));
    assert_eq!((tree["abs"].mode, &*tree["abs"].content), (0o120_777, &b"/nowhere/at/all"[..]));
    assert_eq!((tree["null"].mode, tree["null"].rdev), (0o020_640, 0x103));
    assert_eq!((tree["large"].mode, tree["large"].rdev), (0o060_640, 0x40 | 300 << 8 | (1_000_000 & !0xff) << 12));
    assert_eq!(tree["pipe"].mode, 0o010_640);
    assert_eq!((tree["owners"].uid, tree["owners"].gid), (4_294_967_294, 4_294_967_295));
    assert_eq!((tree["\u{fffd}\u{fffd}"].size, tree["long"].size), (9, 4001));
    assert_eq!(tree[&"n".repeat(255)].content, b"long");
}

#[test]
fn damaged_or_hostile_archives_are_refused_with_the_entry() {
    let good = archive(&[Made::file("a", "x"), Made::file("b", [7; 2000])]);
    let end = good.len();
    let mut bad_checksum = good.clone();
    bad_checksum[1024] = b'Z';
    let directory = [Made::file("d/f", "")];
    let made = |entry: Made| archive(&[&directory[..], &[entry]].concat());
    let cases: [(&str, Vec<u8>, &str); 23] = [
        ("empty", vec![], "not a tar archive"),
        ("text", b"this is no archive\n".repeat(100), "not a tar archive"),
        ("short text", b"x".to_vec(), "not a tar archive"),
        ("gzip", vec![0x1f, 0x8b, 8, 0], "gzip"),
        ("xz", vec![0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        ("zstd", vec![0x28, 0xb5, 0x2f, 0xfd, 0], "zstd"),
        ("bzip2", b"BZh9".to_vec(), "bzip2"),
        ("no entries", vec![0; 10240], "zeros"),
        ("inside an entry", good[..end - 1024 - 600].to_vec(), "cut off"),
        ("between entries", good[..1024].to_vec(), "cut off"),
        ("damaged header", bad_checksum, "damaged after 1"),
        ("dotdot", archive(&[Made::file("a/../../etc/passwd", "x")]), "a/../../etc/passwd"),
        ("dangling hard link", archive(&[Made::link("a", "nowhere")]), "nowhere"),
        ("hard link outside", archive(&[Made::file("a", ""), Made::link("b", "../a")]), "`..`"),
        ("hard link to a directory", made(Made::link("l", "d")), "directory"),
        ("below a file", archive(&[Made::file("a", ""), Made::file("a/b", "")]), "no directory"),
        ("root is a file", archive(&[Made::file("./.", "")]), "root"),
        ("a file for a full directory", made(Made::file("d", "")), "\"d\""),
        ("a name that is too long", made(Made::file("n".repeat(256), "")), "longer"),
        ("an unknown type", made(Made::file("z", "").of_type(b'Z')), "\"z\""),
        ("a further volume", made(Made::file("z", "").of_type(b'M')), "volume"),
        ("a whiteout", made(Made { device: (0, 0), ..Made::device("wh") }), "\"wh\""),
        ("a loop", archive(&[Made::symlink("a", "b"), Made::symlink("b", "a"), Made::file("a/f", "")]), "links"),
    ];
    for (name, bytes, word) in cases {
        let error = prepare(&bytes).map(|_| ()).expect_err(name);
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{name}: {error:?}");
        assert!(error.to_string().contains(word), "{name}: {error}");
    }
}

#[test]
fn layered_image_archives_are_recognized() {
    let saved = [Made::file("./manifest.json", "[]"), Made::file("./c.json", "{}"), Made::file("l/layer.tar", "x")];
    let error = refused(&saved);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("docker export"), "{error}");
    let layout = [Made::file("oci-layout", "{}"), Made::file("index.json", "{}"), Made::directory("blobs")];
    let error = refused(&layout);
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("oci-layout: "), "{error}");
    tree(&[Made::file("manifest.json", "a program's"), Made::directory("etc")]).unwrap();
}

/// 1 MiB of data at the beginning, then nothing, then a few bytes at an odd place.
fn holey() -> ([(u64, u64); 3], u64, Vec<u8>) {
    let data = [vec![1; 1 << 20], vec![2; 1000], Vec::new()].concat();
    ([(0, 1 << 20), (9_999_999, 1000), (5 << 30, 0)], 5 << 30, data)
}

#[test]
fn files_with_holes_are_the_same_in_every_form() {
    let (pieces, size, data) = holey();
    let text = |n: u64| n.to_string();
    let plain = |name: &str| Made::file(name, &data);
    let mut old = plain("f").pax("GNU.sparse.size", text(size)).pax("GNU.sparse.numblocks", "3");
    for (offset, len) in pieces {
        old = old.pax("GNU.sparse.offset", text(offset)).pax("GNU.sparse.numbytes", text(len));
    }
    let map: Vec<String> = pieces.iter().map(|(offset, len)| format!("{offset},{len}")).collect();
    let newer = plain("GNUSparseFile.1/f").pax("GNU.sparse.name", "f").pax("GNU.sparse.size", text(size));
    let newer = newer.pax("GNU.sparse.map", map.join(","));
    let mut lines = format!("{}\n", pieces.len());
    pieces.iter().for_each(|(offset, len)| lines += &format!("{offset}\n{len}\n"));
    let mut before = lines.into_bytes();
    before.resize(512, 0);
    let newest = Made::file("GNUSparseFile.1/f", [before, data.clone()].concat());
    let newest = newest.pax("GNU.sparse.major", "1").pax("GNU.sparse.minor", "0");
    let newest = newest.pax("GNU.sparse.name", "f").pax("GNU.sparse.realsize", text(size));
    for entry in [plain("f").sparse(&pieces, size), old, newer, newest] {
        // A limit that what is stored fits into, and the whole file does not.
        let bytes = archive(&[entry, Made::file("after", "after")]);
        let (_temp, disk) = prepare_with(&bytes, |image| image.max_size(Size::mib(2))).unwrap();
        fsck(&disk);
        let metadata = fs::metadata(&disk).unwrap();
        assert!(metadata.blocks() * 512 < 4 << 20, "{metadata:?}");
        let tree = tree_of(&disk);
        assert_eq!((tree["f"].size, &*tree["after"].content), (size, &b"after"[..]));
        let file = File::open(&disk).unwrap();
        let reader = Reader::open(&file);
        let read = |at, len| reader.read(tree["f"].nid, at, len);
        assert_eq!((read((1 << 20) - 1, 2), read(9_999_998, 2)), (vec![1, 0], vec![0, 2]));
        assert_eq!((read(10_000_998, 2), read(size - 5, 10)), (vec![2, 0], vec![0; 5]));
    }
}

#[test]
fn damaged_maps_of_holes_are_refused() {
    let with = |pieces: &[(u64, u64)], size| Made::file("f", [1; 1024]).sparse(pieces, size);
    let cases = [
        with(&[(512, 512), (0, 512)], 4096),
        with(&[(0, 512), (256, 512)], 4096),
        with(&[(0, 1024)], 512),
        with(&[(0, 512)], 4096),
        with(&[(u64::MAX / 2, 1024)], 4096),
        Made::file("f", "x").pax("GNU.sparse.map", "0,1,2"),
        Made::file("f", "x").pax("GNU.sparse.major", "1").pax("GNU.sparse.realsize", "5"),
        Made::file("f", "x").pax("GNU.sparse.major", "2").pax("GNU.sparse.realsize", "5"),
    ];
    for case in cases {
        let error = refused(std::slice::from_ref(&case));
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{case:?}: {error:?}");
    }
}

#[test]
fn zeros_take_no_space_but_count_against_limits() {
    let entries = [Made::file("zeros", vec![0; 8 << 20]), Made::file("end", "end")];
    let (_temp, disk) = prepare(&archive(&entries)).unwrap();
    assert!(fs::metadata(&disk).unwrap().blocks() * 512 < 1 << 20);
    assert_eq!(tree_of(&disk)["end"].content, b"end");
    let error = prepare_with(&archive(&entries), |image| image.max_size(Size::mib(4))).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert!(error.to_string().contains("Image::max_size"), "{error}");
}

#[test]
fn extended_attributes_and_lists_are_kept() {
    let acl = "user::rwx\nuser:1000:r-x\ngroup::r--\nmask::r-x\nother::---\n";
    let long = vec![b'v'; 60_000];
    let tree = tree(&[
        Made::file("f", "").mode(0o4777).pax("SCHILY.xattr.user.note", "two\nlines").pax("comment", "a\nb"),
        Made::file("cap", "").pax("SCHILY.xattr.security.capability", b"\x01\0\0\x02\n\0\0\0"),
        Made::file("acl", "").mode(0o2777).pax("SCHILY.acl.access", acl),
        Made::directory("dir").pax("SCHILY.acl.default", acl.replace("user:1000:r-x", "user:joe:r-x:1000")),
        Made::file("minimal", "").pax("SCHILY.acl.access", "user::rw-,group::r-x,other::--x"),
        Made::file("bsd", "").pax("LIBARCHIVE.xattr.user.b%2Fin", "AAEC"),
        Made::file("long", "").pax("SCHILY.xattr.user.long", &long),
        Made::symlink("link", "f").pax("SCHILY.xattr.trusted.note", "x"),
    ])
    .unwrap();
    let of = |path: &str, name: &str| tree[path].xattrs.get(name.as_bytes()).cloned().unwrap_or_default();
    assert_eq!((of("f", "user.note"), tree["f"].mode), (b"two\nlines".to_vec(), 0o104_777));
    assert_eq!(of("cap", "security.capability"), b"\x01\0\0\x02\n\0\0\0");
    assert_eq!(tree["acl"].mode, 0o102_750);
    assert_eq!(of("acl", "system.posix_acl_access"), of("dir", "system.posix_acl_default"));
    assert_eq!(of("acl", "system.posix_acl_access").len(), 4 + 5 * 8);
    assert_eq!((tree["minimal"].mode, tree["minimal"].xattrs.len()), (0o100_651, 0));
    assert_eq!(
        (of("bsd", "user.b/in"), of("long", "user.long"), of("link", "trusted.note")),
        (vec![0, 1, 2], long, b"x".to_vec())
    );
}

#[test]
fn unsupported_xattrs_are_named() {
    let cases = [
        (Made::file("e", "").pax("SCHILY.xattr.foo.bar", "x"), "foo.bar"),
        (Made::file("e", "").pax("SCHILY.xattr.trusted.overlay.opaque", "y"), "overlay"),
        (Made::file("e", "").pax("SCHILY.xattr.user.x", vec![0; 65_536]), "65,535"),
        ((0..5).fold(Made::file("e", ""), |e, n| e.pax(&format!("SCHILY.xattr.user.{n}"), vec![0; 60_000])), "256 KiB"),
        (Made::file("e", "").pax("SCHILY.acl.access", "nonsense"), "ACL"),
        (Made::file("e", "").pax("SCHILY.acl.access", "u::r,u:joe:r,g::r,m::r,o::r"), "--numeric-owner"),
        (Made::file("e", "").pax("SCHILY.xattr.system.posix_acl_access", "x"), "ACL"),
        (Made::symlink("e", "x").pax("SCHILY.xattr.user.x", "x"), "user.x"),
    ];
    for (entry, word) in cases {
        let error = refused(&[entry]);
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{error:?}");
        assert!(error.to_string().contains(word) && error.to_string().contains("entry \"e\""), "{error}");
    }
}

#[test]
fn all_times_are_kept() {
    let tree = tree(&[
        Made::file("gnu-1", "").at(-1),
        Made::file("gnu-1910", "").at(-1_893_456_000),
        Made::file("pax-1910", "").pax("mtime", "-1893456000.25"),
        Made::file("pax-2300", "").pax("mtime", "10413792000.5"),
        Made::file("gnu-far", "").at(1 << 50),
    ])
    .unwrap();
    assert_eq!((tree["gnu-1"].mtime, tree["gnu-1910"].mtime), ((-1, 0), (-1_893_456_000, 0)));
    assert_eq!(tree["pax-1910"].mtime, (-1_893_456_001, 750_000_000));
    assert_eq!((tree["pax-2300"].mtime, tree["gnu-far"].mtime), ((10_413_792_000, 500_000_000), (1 << 50, 0)));
}

#[test]
fn directories_take_the_later_metadata_and_keep_what_is_in_them() {
    let tree = tree(&[
        Made::directory("p").pax("SCHILY.xattr.user.old", "x"),
        Made::file("p/f", "first"),
        Made::directory("p/").mode(0o700).at(5).pax("SCHILY.xattr.user.new", "x"),
        Made::file("p/f", "second"),
        Made::directory("/").mode(0o555).at(6),
    ])
    .unwrap();
    let names: Vec<_> = tree["p"].xattrs.keys().collect();
    assert_eq!((tree["p"].mode, tree["p"].mtime.0, names), (0o040_700, 5, vec![&b"user.new".to_vec()]));
    assert_eq!((tree["p/f"].content.as_slice(), tree[""].mode, tree[""].mtime.0), (&b"second"[..], 0o040_555, 6));
}

#[test]
fn global_headers_hold_until_the_next() {
    let global = |records: Vec<u8>| Made { data: records, ..Made::file("pax_global_header", "") }.of_type(b'g');
    let tree = tree(&[
        global([record("comment", b"x"), record("mtime", b"7"), record("uid", b"9")].concat()),
        Made::file("one", ""),
        Made::file("two", "").pax("mtime", ""),
        global(record("gid", b"8")),
        Made::file("three", ""),
    ])
    .unwrap();
    assert_eq!((tree["one"].mtime.0, tree["one"].uid, tree["two"].mtime.0), (7, 9, 1_600_000_000));
    assert_eq!((tree["three"].uid, tree["three"].gid, tree["three"].mtime.0), (1000, 8, 1_600_000_000));
}

#[test]
fn old_archives_mark_directories_with_a_slash() {
    let tree = tree(&[Made::file("d/", "").of_type(0).magic(V7), Made::file("d/f", "x").of_type(0).magic(V7)]).unwrap();
    assert_eq!((tree["d"].mode >> 12, tree["d/f"].content.as_slice()), (4, &b"x"[..]));
}

#[test]
fn image_is_reproducible() {
    let (pieces, size, data) = holey();
    let bytes = archive(&[
        Made::file("a", "1").pax("SCHILY.xattr.user.x", "x"),
        Made::directory("d"),
        Made::symlink("l", "a"),
        Made::file("s", data).sparse(&pieces, size),
    ]);
    let [one, two] = [(); 2].map(|()| prepare(&bytes).unwrap());
    assert!(fs::read(one.1).unwrap() == fs::read(two.1).unwrap());
}

#[test]
fn non_images_are_rejected() {
    assert_eq!(Image::open("/nonexistent.tar").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(Image::open("/dev/null").unwrap_err().kind(), ErrorKind::InvalidConfig);
}
