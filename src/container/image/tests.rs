//! Archives and directories, good and bad, against what is read back from the disk.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// A folder that goes away with its test.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("cofferdam-image-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn header(kind: ::tar::EntryType, path: &str, size: u64) -> ::tar::Header {
    let mut header = ::tar::Header::new_gnu();
    header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o640);
    header.set_uid(1000);
    header.set_gid(1001);
    header.set_mtime(1_600_000_000);
    header
}

/// An archive of entries: type, path, and content or link target.
fn archive(entries: &[(::tar::EntryType, &str, &[u8])]) -> Vec<u8> {
    let mut builder = ::tar::Builder::new(Vec::new());
    for (kind, path, content) in entries {
        let is_link = matches!(kind, ::tar::EntryType::Symlink | ::tar::EntryType::Link);
        let data: &[u8] = if is_link { b"" } else { content };
        let mut header = header(*kind, path, data.len() as u64);
        if is_link {
            header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content);
        }
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        header.set_cksum();
        builder.append(&header, data).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Prepares an image of these bytes and opens the disk for reading.
fn prepare(bytes: &[u8]) -> Result<(Temp, PathBuf)> {
    let temp = Temp::new();
    let tar = temp.0.join("image.tar");
    fs::write(&tar, bytes).unwrap();
    let outcome = Image::open(&tar)?.cache_dir(temp.0.join("cache")).prepare();
    let disk = disks(&temp).pop();
    match outcome {
        Ok(()) => Ok((temp, disk.unwrap())),
        Err(error) => {
            let left: Vec<_> = fs::read_dir(temp.0.join("cache")).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert!(left.iter().all(|name| name == "lock" || name == "known"), "left behind: {left:?}");
            Err(error)
        }
    }
}

fn disks(temp: &Temp) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(temp.0.join("cache")) else {
        return Vec::new();
    };
    entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "ext4")).collect()
}

use ::tar::EntryType as T;

#[test]
fn everything_an_archive_says_is_on_the_disk() {
    let tar = archive(&[
        (T::Directory, "./", b""),
        (T::Directory, "./etc/", b""),
        (T::Regular, "./etc/motd", b"hello"),
        (T::Link, "./etc/again", b"./etc/motd"),
        (T::Symlink, "./abs", b"/nowhere/at/all"),
        (T::Char, "./null", b""),
        (T::Fifo, "./pipe", b""),
    ]);
    let (_temp, disk) = prepare(&tar).unwrap();
    let mut reader = arcbox_ext4::Reader::new(&disk).unwrap();
    assert_eq!(reader.read_file("/etc/motd", 0, None).unwrap(), b"hello");
    let (number, inode) = reader.stat("/etc/motd").unwrap();
    assert_eq!((inode.mode, inode.uid, inode.gid, inode.links_count), (0o100_640, 1000, 1001, 2));
    assert_eq!(inode.mtime, 1_600_000_000);
    assert_eq!(reader.stat("/etc/again").unwrap().0, number);
    let (_, link) = reader.stat_no_follow("/abs").unwrap();
    assert_eq!((link.mode & 0o170_000, &link.block[..15]), (0o120_000, &b"/nowhere/at/all"[..]));
    let (_, null) = reader.stat_no_follow("/null").unwrap();
    assert_eq!((null.mode, &null.block[..4]), (0o020_640, &[3, 1, 0, 0][..]));
    assert_eq!(reader.stat_no_follow("/pipe").unwrap().1.mode, 0o010_640);
    fsck(&disk);
}

/// Debian's own checker finds nothing to complain about, where it is installed.
fn fsck(disk: &std::path::Path) {
    if let Ok(output) = std::process::Command::new("/sbin/e2fsck").args(["-fn"]).arg(disk).output() {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn damaged_or_hostile_archives_are_refused_with_the_entry() {
    let good = archive(&[(T::Regular, "a", b"x"), (T::Regular, "b", &[7; 2000])]);
    let end = good.len();
    let mut bad_checksum = good.clone();
    bad_checksum[1024] = b'Z';
    let cases: [(&str, Vec<u8>, &str); 11] = [
        ("empty", vec![], "not a tar archive"),
        ("text", b"this is no archive\n".repeat(100), "not a tar archive"),
        ("gzip", vec![0x1f, 0x8b, 8, 0], "gzip"),
        ("inside an entry", good[..end - 1024 - 600].to_vec(), "unexpected EOF"),
        ("between entries", good[..1024].to_vec(), "cut off"),
        ("damaged header", bad_checksum, "damaged after 1"),
        ("dotdot", archive(&[(T::Regular, "a/../../etc/passwd", b"x")]), "a/../../etc/passwd"),
        ("dangling hard link", archive(&[(T::Link, "a", b"nowhere")]), "/nowhere"),
        ("hard link outside", archive(&[(T::Regular, "a", b""), (T::Link, "b", b"../a")]), "`..`"),
        ("below a file", archive(&[(T::Regular, "a", b""), (T::Regular, "a/b", b"")]), "no directory"),
        ("root is a file", archive(&[(T::Regular, "./.", b"")]), "root"),
    ];
    for (name, bytes, word) in cases {
        let error = prepare(&bytes).map(|_| ()).expect_err(name);
        assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "{name}: {error:?}");
        assert!(error.to_string().contains(word), "{name}: {error}");
    }
}

#[test]
fn names_that_cannot_be_kept_are_named() {
    let mut builder = ::tar::Builder::new(Vec::new());
    let mut header = header(T::Regular, "x", 0);
    header.as_mut_bytes()[0] = 0xff;
    header.set_cksum();
    builder.append(&header, &b""[..]).unwrap();
    let error = prepare(&builder.into_inner().unwrap()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("not UTF-8"), "{error}");
}

#[test]
fn large_sparse_files_take_no_space() {
    const SIZE: u64 = 2 << 30;
    let mut header = header(T::GNUSparse, "sparse", 512);
    let gnu = header.as_gnu_mut().unwrap();
    // One piece of data at the end of 2 GiB.
    gnu.sparse[0].offset.copy_from_slice(format!("{:011o}\0", SIZE - 512).as_bytes());
    gnu.sparse[0].numbytes.copy_from_slice(format!("{:011o}\0", 512).as_bytes());
    gnu.realsize.copy_from_slice(format!("{SIZE:011o}\0").as_bytes());
    header.set_cksum();
    let mut builder = ::tar::Builder::new(Vec::new());
    builder.append(&header, &[5; 512][..]).unwrap();
    let tar = builder.into_inner().unwrap();
    let (temp, disk) = prepare(&tar).unwrap();
    let metadata = fs::metadata(&disk).unwrap();
    assert!(metadata.len() > SIZE && metadata.blocks() * 512 < 64 << 20, "{metadata:?}");
    let mut reader = arcbox_ext4::Reader::new(&disk).unwrap();
    assert_eq!(reader.read_file("/sparse", SIZE - 512, Some(1)).unwrap(), [5]);
    let limited = Image::open(temp.0.join("image.tar")).unwrap().cache_dir(temp.0.join("other")).max_size(Size::gib(1));
    let error = limited.prepare().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
}

#[test]
fn a_directory_becomes_the_same_disk_with_links_and_attributes() {
    let temp = Temp::new();
    let root = temp.0.join("root");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/file"), "content").unwrap();
    fs::set_permissions(root.join("sub/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(root.join("sub/file"), root.join("second")).unwrap();
    symlink("sub/file", root.join("link")).unwrap();
    let image = Image::open(&root).unwrap().cache_dir(temp.0.join("cache"));
    image.prepare().unwrap();
    let disk = disks(&temp).pop().unwrap();
    let mut reader = arcbox_ext4::Reader::new(&disk).unwrap();
    let (number, inode) = reader.stat("/sub/file").unwrap();
    assert_eq!((inode.mode, inode.links_count), (0o104_751, 2));
    assert_eq!((reader.stat("/second").unwrap().0, reader.stat("/link").unwrap().0), (number, number));
    fsck(&disk);
    // A change below is another image.
    fs::File::options().append(true).open(root.join("second")).unwrap().write_all(b"!").unwrap();
    image.prepare().unwrap();
    assert_eq!(disks(&temp).len(), 2);
}

#[test]
fn extended_attributes_are_kept() {
    let mut builder = ::tar::Builder::new(Vec::new());
    let record = " SCHILY.xattr.user.greeting=hello there\n";
    let pax = format!("{}{record}", record.len() + 2).into_bytes();
    let mut extended = header(T::XHeader, "pax", pax.len() as u64);
    extended.set_cksum();
    builder.append(&extended, pax.as_slice()).unwrap();
    let mut file = header(T::Regular, "f", 0);
    file.set_cksum();
    builder.append(&file, &b""[..]).unwrap();
    let (_temp, disk) = prepare(&builder.into_inner().unwrap()).unwrap();
    let bytes = fs::read(&disk).unwrap();
    assert!(bytes.windows(11).any(|w| w == b"hello there"), "the value is on the disk");
    fsck(&disk);
}

#[test]
fn many_who_ask_at_once_get_one_disk_made_once() {
    let temp = Temp::new();
    let tar = temp.0.join("image.tar");
    fs::write(&tar, archive(&[(T::Regular, "a", &[1; 100_000])])).unwrap();
    let image = Image::open(&tar).unwrap().cache_dir(temp.0.join("cache"));
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let ask = || image.disk().unwrap().metadata().unwrap().ino();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
    assert_eq!(disks(&temp).len(), 1);
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    let tar = archive(&[(T::Regular, "a", b"1"), (T::Directory, "d", b""), (T::Symlink, "l", b"a")]);
    let [one, two] = [(); 2].map(|()| prepare(&tar).unwrap());
    // The time of making stands in the superblock and in what the format writer made by itself.
    assert_eq!(fs::read(one.1).unwrap().len(), fs::read(two.1).unwrap().len());
}

#[test]
fn empty_disks_have_the_size_asked_for_and_nearly_none_on_the_host() {
    let temp = Temp::new();
    let image = Image::open(&temp.0).unwrap().cache_dir(temp.0.join("cache"));
    for _ in 0..2 {
        let metadata = image.scratch(Size::gib(4)).unwrap().metadata().unwrap();
        assert!(metadata.len() == 4 << 30 && metadata.blocks() * 512 < 1 << 20, "{metadata:?}");
    }
    assert_eq!(disks(&temp).len(), 1, "made once");
    fsck(&disks(&temp)[0]);
    assert_eq!(image.scratch(Size::mib(1)).unwrap().metadata().unwrap().len(), 128 << 20);
    assert_eq!(image.scratch(Size::bytes(0)).unwrap_err().kind(), ErrorKind::InvalidConfig);
    assert_eq!(image.scratch(Size::gib(1 << 30)).unwrap_err().kind(), ErrorKind::InvalidConfig);
}

#[test]
fn what_is_no_image_is_refused() {
    assert_eq!(Image::open("/nonexistent.tar").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(Image::open("/dev/null").unwrap_err().kind(), ErrorKind::InvalidConfig);
}
