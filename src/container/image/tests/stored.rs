//! The cache: other users cannot read it, hold it up, or put anything into it.

use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::*;

fn image(temp: &Temp, name: &str, content: &str) -> Image {
    let tar = temp.0.join(name);
    fs::write(&tar, archive(&[Made::file("etc/motd", content)])).unwrap();
    Image::open(tar).unwrap().cache_dir(temp.0.join("cache"))
}

fn motd(file: &File) -> Vec<u8> {
    Reader::open(file).tree(100)[&b"etc/motd"[..]].content.clone()
}

fn disk(image: &Image) -> Result<File> {
    image.disk(None).map(ImageDisk::into_file)
}

#[test]
fn store_files_are_private_to_the_user() {
    let temp = Temp::new();
    let image = image(&temp, "a.tar", "secret");
    disk(&image).unwrap();
    let cache = temp.0.join("cache");
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&cache), mode(&cache.join("known"))), (0o700, 0o700));
    for entry in cache.read_dir().unwrap().chain(cache.join("known").read_dir().unwrap()) {
        let path = entry.unwrap().path();
        assert!(path.is_dir() || mode(&path) == 0o600, "{}", path.display());
    }
    // Only root can change its user. A user that cannot open the lock cannot hold it.
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        fs::set_permissions(&cache, fs::Permissions::from_mode(0o755)).unwrap();
        let output = Command::new("cat").arg(cache.join("lock")).uid(65534).gid(65534).output().unwrap();
        assert!(!output.status.success());
        assert!(String::from_utf8_lossy(&output.stderr).contains("Permission denied"));
    }
}

#[test]
fn held_lock_is_waited_for_until_the_timeout() {
    let temp = Temp::new();
    let image = image(&temp, "a.tar", "x").prepare_timeout(Duration::from_millis(300));
    fs::create_dir(temp.0.join("cache")).unwrap();
    fs::set_permissions(temp.0.join("cache"), fs::Permissions::from_mode(0o700)).unwrap();
    let mut lock = File::options();
    lock.write(true).create(true).truncate(false).mode(0o600);
    let lock = lock.open(temp.0.join("cache/lock")).unwrap();
    assert!(crate::sys::try_lock(&lock, crate::sys::LockKind::Exclusive).unwrap());
    let error = disk(&image).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("another process or thread"), "{error}");
    drop(lock);
    disk(&image).unwrap();
}

#[test]
fn a_directory_that_others_can_write_to_is_refused() {
    let temp = Temp::new();
    let image = image(&temp, "a.tar", "x");
    let cache = temp.0.join("cache");
    let refused = || {
        let error = disk(&image).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains(cache.to_str().unwrap()), "{error}");
    };
    fs::create_dir(&cache).unwrap();
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
    refused();
    fs::remove_dir(&cache).unwrap();
    fs::create_dir(temp.0.join("other")).unwrap();
    symlink(temp.0.join("other"), &cache).unwrap();
    refused();
}

#[test]
fn foreign_files_in_the_store_are_rejected() {
    let temp = Temp::new();
    let image = image(&temp, "a.tar", "x");
    disk(&image).unwrap();
    let path = disks(&temp).pop().unwrap();
    let bytes = fs::read(&path).unwrap();
    let place: [&dyn Fn(); 3] = [
        &|| {
            fs::write(temp.0.join("elsewhere"), &bytes).unwrap();
            symlink(temp.0.join("elsewhere"), &path).unwrap();
        },
        &|| crate::sys::make_fifo(&path).unwrap(),
        &|| {
            fs::write(&path, &bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        },
    ];
    for place in place {
        fs::remove_file(&path).unwrap();
        place();
        assert!(disk(&image).is_err());
    }
}

#[test]
fn damaged_disks_are_rebuilt() {
    let temp = Temp::new();
    let image = image(&temp, "a.tar", "whole");
    disk(&image).unwrap();
    let path = disks(&temp).pop().unwrap();
    let good = fs::read(&path).unwrap();
    let mut rotten = good.clone();
    // A bit of the content, which lies in the block behind the superblock.
    rotten[4096] ^= 1;
    let mut swapped = good.clone();
    swapped[4096..12288].rotate_left(4096);
    for bad in [&good[..good.len() - 4096], &good[..10], b"", &rotten, &swapped] {
        fs::write(&path, bad).unwrap();
        assert_eq!(motd(&disk(&image).unwrap()), b"whole");
        assert!(fs::read(&path).unwrap() == good);
    }
}

/// Who can write to an archive while it is prepared must not choose what others get for another one.
#[test]
fn disk_content_matches_its_digest() {
    let temp = Temp::new();
    let (good, evil) = (image(&temp, "good.tar", "good"), image(&temp, "evil.tar", "evil"));
    let digest = hex(&begin().chain_update(fs::read(temp.0.join("good.tar")).unwrap()).finalize());
    // As if the archive had been the good one when it was hashed.
    let store = store::Store::open(Some(temp.0.join("cache"))).unwrap();
    store.remember(&FileIdentity::of(&File::open(temp.0.join("evil.tar")).unwrap()).unwrap().name(), &digest);
    let error = disk(&evil).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
    assert!(disks(&temp).is_empty());
    assert_eq!(motd(&disk(&good).unwrap()), b"good");
    assert_eq!(motd(&disk(&evil).unwrap()), b"evil");
    assert_eq!(disks(&temp).len(), 2);
}

#[test]
fn concurrent_requests_build_one_disk() {
    let temp = Temp::new();
    let image = image(&temp, "a.tar", &"x".repeat(100_000));
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let ask = || disk(&image).unwrap().metadata().unwrap().ino();
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
    assert_eq!(disks(&temp).len(), 1);
}

#[test]
fn independent_builders_do_not_conflict() {
    use std::os::unix::fs::FileExt;
    let temp = Temp::new();
    let dir = temp.0.join("cache");
    let store = store::Store::open(Some(dir.clone())).unwrap();
    let deadline = PrepareDeadline::new(Duration::from_secs(60), None);
    let (digest, other) = ("0".repeat(64), "1".repeat(64));
    let write = |file: &File, text: &str| Ok(file.write_all_at(text.as_bytes(), 0)?);
    let failed = store.get_or_make(Prepared::Disk(&digest), &deadline, |file| {
        write(file, "half")?;
        Err(Error::new(ErrorKind::Corrupt, "on purpose"))
    });
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Corrupt);
    let made = store.get_or_make(Prepared::Disk(&digest), &deadline, |file| write(file, "disk")).unwrap();
    assert_eq!(made.metadata().unwrap().len(), 4 + seal::LEN);
    store.get_or_make(Prepared::Disk(&digest), &deadline, |_| panic!("it is there")).unwrap();
    store.get_or_make(Prepared::Disk(&other), &deadline, |file| write(file, "other")).unwrap();
    let names = fs::read_dir(&dir).unwrap().count();
    assert_eq!(names, 8, "two disks, two locks, three directories, the format, and nothing else");
}

#[test]
fn index_entries_are_found_and_damaged_ones_replaced() {
    let temp = Temp::new();
    let store = store::Store::open(Some(temp.0.join("cache"))).unwrap();
    assert_eq!(store.remembered("it"), None);
    fs::write(temp.0.join("cache/known/it"), "damaged").unwrap();
    assert_eq!(store.remembered("it"), None);
    store.remember("it", &"a".repeat(64));
    assert_eq!(store.remembered("it"), Some("a".repeat(64)));
    store.forget("it");
    assert_eq!(store.remembered("it"), None);
}

#[test]
fn damaged_document_in_the_store_is_not_believed() {
    let temp = Temp::new();
    let store = store::Store::open(Some(temp.0.join("cache"))).unwrap();
    let digest = oci::Digest::sha256(b"{}");
    assert_eq!(store.blob(&digest).unwrap(), None);
    store.put_blob(&digest, b"{}").unwrap();
    assert_eq!(store.blob(&digest).unwrap().unwrap(), b"{}");
    let path = temp.0.join(format!("cache/blobs/sha256-{}", digest.hex()));
    fs::write(&path, "{ }").unwrap();
    assert_eq!(store.blob(&digest).unwrap(), None);
    store.put_blob(&digest, b"{}").unwrap();
    assert_eq!(fs::read(path).unwrap(), b"{}");
}
