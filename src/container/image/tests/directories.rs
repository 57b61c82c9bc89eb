//! Images of directories. The disk is that of an archive of them, and has nothing from outside.

use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;

use super::*;

#[test]
fn a_directory_becomes_the_same_disk_with_links_and_attributes() {
    let temp = Temp::new();
    let root = temp.0.join("root");
    fs::create_dir_all(root.join("sub")).unwrap();
    fs::write(root.join("sub/file"), "content").unwrap();
    fs::set_permissions(root.join("sub/file"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::hard_link(root.join("sub/file"), root.join("second")).unwrap();
    symlink("/etc/passwd", root.join("link")).unwrap();
    crate::sys::make_fifo(&root.join("pipe")).unwrap();
    let holey = File::create(root.join("holey")).unwrap();
    holey.write_all_at(b"end", 5 << 30).unwrap();
    let set = |program: &str, args: &[&str]| {
        let output =
            Command::new(program).args(args).arg(root.join("sub")).output().expect("acl, attr: run `make setup`");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    set("setfacl", &["-m", "u:1000:rwx,d:u:1000:r-x"]);
    set("setfattr", &["-n", "user.note", "-v", "hello"]);
    let image = Image::open(&root).unwrap().cache_dir(temp.0.join("cache")).max_size(Size::mib(8));
    image.prepare().unwrap();
    let disk = disks(&temp).pop().unwrap();
    fsck(&disk);
    let tree = tree_of(&disk);
    assert_eq!((tree["sub/file"].mode, tree["sub/file"].nlink, &tree["second"]), (0o104_751, 2, &tree["sub/file"]));
    assert_eq!((&*tree["link"].content, tree["pipe"].mode >> 12), (&b"/etc/passwd"[..], 1));
    let real = fs::metadata(root.join("sub")).unwrap();
    assert_eq!((tree["sub"].mode, tree["sub"].mtime), (real.mode() as u16, (real.mtime(), real.mtime_nsec() as u32)));
    let names: Vec<_> = tree["sub"].xattrs.keys().map(|name| String::from_utf8_lossy(name)).collect();
    assert_eq!(names, ["system.posix_acl_access", "system.posix_acl_default", "user.note"]);
    let file = File::open(&disk).unwrap();
    let read = |at| Reader::open(&file).read(tree["holey"].nid, at, 4);
    assert_eq!((tree["holey"].size, read(5 << 30), read(1 << 30)), ((5 << 30) + 3, b"end".to_vec(), vec![0; 4]));
    // A change below is another image.
    fs::File::options().append(true).open(root.join("second")).unwrap().write_all(b"!").unwrap();
    image.prepare().unwrap();
    assert_eq!(disks(&temp).len(), 2);
}

#[test]
fn missing_root_file_system_is_reported() {
    let temp = Temp::new();
    let root = temp.0.join("root");
    fs::create_dir(&root).unwrap();
    let prepare = || Image::open(&root).unwrap().cache_dir(temp.0.join("cache")).prepare().unwrap_err();
    assert_eq!(prepare().kind(), ErrorKind::InvalidConfig);
    fs::write(root.join("oci-layout"), "{}").unwrap();
    fs::write(root.join("index.json"), "{}").unwrap();
    let error = prepare();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("oci-layout: "), "{error}");
}

/// Files and directories are swapped while read, for pipes and links into the embedder's files.
#[test]
fn links_swapped_in_during_reading_are_not_followed() {
    use std::sync::atomic::AtomicBool;
    let temp = Temp::new();
    let (root, secret) = (temp.0.join("root"), temp.0.join("secret"));
    fs::create_dir_all(root.join("directory")).unwrap();
    fs::create_dir(&secret).unwrap();
    for name in ["a", "b"] {
        fs::write(root.join("directory").join(name), "public").unwrap();
        fs::write(secret.join(name), "secret").unwrap();
    }
    let (directory, aside) = (root.join("directory"), temp.0.join("aside"));
    let (file, pipe) = (root.join("file"), temp.0.join("pipe"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                fs::rename(&directory, &aside).unwrap();
                symlink(&secret, &directory).unwrap();
                symlink(secret.join("a"), temp.0.join("link")).unwrap();
                fs::rename(temp.0.join("link"), &file).unwrap();
                crate::sys::make_fifo(&pipe).unwrap();
                fs::remove_file(&directory).unwrap();
                fs::rename(&aside, &directory).unwrap();
                fs::rename(&pipe, &file).unwrap();
                fs::write(temp.0.join("plain"), "public").unwrap();
                fs::rename(temp.0.join("plain"), &file).unwrap();
            }
        });
        let mut whole = 0;
        for n in 0..100 {
            let cache = temp.0.join(format!("cache-{n}"));
            let image = Image::open(&root).unwrap().cache_dir(&cache).prepare_timeout(Duration::from_secs(60));
            let Ok(disk) = image.disk(None).map(ImageDisk::into_file) else { continue };
            whole += 1;
            for (path, node) in Reader::open(&disk).tree(100) {
                assert_ne!(node.content, b"secret", "{}", String::from_utf8_lossy(&path));
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(whole > 0, "no preparation came to its end");
    });
}
