//! Stores on a file system that is full.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cofferdam::image::ImageStore;
use cofferdam::{ErrorKind, Image, Size};

use super::{Server, Temp, layout, lines, push, registry, run};

/// A directory for file systems, in a process with mounts of its own.
const MOUNTS: &str = "COFFERDAM_TEST_MOUNTS";

/// Runs a test of this file again where mounts are its own, so that none is left behind; whether this is that process.
fn has_own_mounts(test: &str) -> bool {
    if std::env::var_os(MOUNTS).is_some() {
        return true;
    }
    let root = run("id", &["-u"]).trim() == "0";
    let output = Command::new("unshare")
        .args(if root { &["--mount"][..] } else { &["--mount", "--map-root-user"] })
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("full_disk::{test}"), "--nocapture"])
        .env(MOUNTS, "1")
        .output()
        .expect("unshare: install util-linux");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && said.contains("1 passed"), "in mounts of its own: {said}");
    false
}

/// A file system in memory, which is gone with this.
struct Disk(PathBuf);

impl Disk {
    fn mount(path: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&path).unwrap();
        run("mount", &["-t", "tmpfs", "-o", options, "tmpfs", path.to_str().unwrap()]);
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn is_whole_without_names(cache: &Path, left: u64) {
    if cache.exists() {
        let store = ImageStore::at(cache);
        let broken = store.verify(Duration::from_secs(60)).unwrap_or_else(|error| panic!("{left} KiB: {error}"));
        assert!(broken.is_empty(), "{left} KiB: {broken:?}");
        assert!(store.list().unwrap().is_empty(), "{left} KiB: a name is there");
    }
}

const SIZE: u64 = 32 << 10;

#[test]
fn full_disk_fails_a_pull_that_succeeds_once_there_is_room() {
    if !has_own_mounts("full_disk_fails_a_pull_that_succeeds_once_there_is_room") {
        return;
    }
    let temp = Temp::new("full");
    let server = Server::start(&temp, "");
    let [a, b, c] = [1, 2, 3].map(|n| lines(n, 2 << 20));
    let layout = layout(&temp, "one", &[("a", &a), ("b", &b), ("c", &c)]);
    push(&layout, &server, "app:1", &[]);
    let name = format!("{}/app:1", server.name);
    let disk = Disk::mount(temp.path("disk"), &format!("size={SIZE}k"));
    let (cache, ballast) = (disk.path("store"), disk.path("ballast"));
    let mut failures = 0;
    // KiB that are left: too few for anything, for the first file, for a layer, for the last layer.
    for left in [0, 4, 16, 100, 1000, 2200, 3500, 5000, 6300] {
        let _ = fs::remove_dir_all(&cache);
        fs::write(&ballast, vec![1; ((SIZE - left) << 10) as usize]).unwrap();
        // The second attempt begins with what the first has left.
        for _ in 0..2 {
            match registry(&server, &temp).cache_dir(&cache).pull(&name).and_then(|image| image.prepare()) {
                Ok(()) => assert!(left >= 6000, "{left} KiB were enough"),
                Err(error) => {
                    assert_eq!((error.kind(), error.os_error()), (ErrorKind::ResourceExhausted, Some(28)), "{error}");
                    assert!(error.to_string().contains(&name), "{error}");
                    failures += 1;
                    is_whole_without_names(&cache, left);
                }
            }
        }
        // To remove what is left needs no room. With 4 and 16 KiB not even the store's directories could be made.
        if left < 6000 && left % 100 == 0 && cache.exists() {
            let store = ImageStore::at(&cache);
            store.gc(Size::bytes(0)).unwrap_or_else(|error| panic!("{left} KiB: {error}"));
            assert_eq!(store.disk_usage().unwrap(), Size::bytes(0), "{left} KiB");
        }
        fs::remove_file(&ballast).unwrap();
        registry(&server, &temp).cache_dir(&cache).pull(&name).unwrap().prepare().unwrap();
        let store = ImageStore::at(&cache);
        assert_eq!((store.list().unwrap().len(), store.verify(Duration::from_secs(60)).unwrap().len()), (1, 0));
    }
    assert!(failures >= 14, "{failures} failures");

    // The same without a registry.
    let _ = fs::remove_dir_all(&cache);
    fs::write(&ballast, vec![1; ((SIZE - 3500) << 10) as usize]).unwrap();
    let image = Image::open(&layout).unwrap().select("1").cache_dir(&cache);
    let error = image.prepare().unwrap_err();
    assert_eq!((error.kind(), error.os_error()), (ErrorKind::ResourceExhausted, Some(28)), "{error}");
    is_whole_without_names(&cache, 3500);
    fs::remove_file(&ballast).unwrap();
    image.prepare().unwrap();
}

#[test]
fn disk_without_room_for_more_files_fails_a_pull_that_succeeds_once_there_is() {
    if !has_own_mounts("disk_without_room_for_more_files_fails_a_pull_that_succeeds_once_there_is") {
        return;
    }
    let temp = Temp::new("inodes");
    let server = Server::start(&temp, "");
    push(&layout(&temp, "one", &[("a", "1"), ("b", "2")]), &server, "app:1", &[]);
    let name = format!("{}/app:1", server.name);
    let disk = Disk::mount(temp.path("disk"), "nr_inodes=40");
    let cache = disk.path("store");
    let mut failures = 0;
    for left in 1..12 {
        let _ = fs::remove_dir_all(&cache);
        let fillers: Vec<_> = (0..38 - left).map(|n| disk.path(&n.to_string())).collect();
        fillers.iter().for_each(|filler| fs::write(filler, "").unwrap());
        match registry(&server, &temp).cache_dir(&cache).pull(&name).and_then(|image| image.prepare()) {
            Ok(()) => assert!(left > 5, "{left} files were enough"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ResourceExhausted, "{error}");
                failures += 1;
            }
        }
        fillers.iter().for_each(|filler| fs::remove_file(filler).unwrap());
        registry(&server, &temp).cache_dir(&cache).pull(&name).unwrap().prepare().unwrap();
        assert!(ImageStore::at(&cache).verify(Duration::from_secs(60)).unwrap().is_empty());
    }
    assert!(failures >= 5, "{failures} failures");
}
