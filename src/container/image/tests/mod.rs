//! Archives and directories, good and bad, against what is read back from the disk.

mod archives;
mod directories;
mod foreign;
mod gnu_tar;
mod hostile;
mod layered;
mod local;
pub(super) mod maker;
mod prepared;
mod stored;
mod umoci;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::erofs::reader::{Node, Reader};
use super::*;
use maker::{Made, archive};

/// A directory that goes away with its test.
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

/// Prepares an image of these bytes and opens the disk for reading.
fn prepare(bytes: &[u8]) -> Result<(Temp, PathBuf)> {
    prepare_with(bytes, |image| image)
}

/// The same of an image with settings.
fn prepare_with(bytes: &[u8], set: impl FnOnce(Image) -> Image) -> Result<(Temp, PathBuf)> {
    let temp = Temp::new();
    let tar = temp.0.join("image.tar");
    fs::write(&tar, bytes).unwrap();
    let outcome = set(Image::open(&tar)?.cache_dir(temp.0.join("cache"))).prepare();
    let disk = disks(&temp).pop();
    match outcome {
        Ok(()) => Ok((temp, disk.unwrap())),
        Err(error) => {
            let left: Vec<_> = fs::read_dir(temp.0.join("cache")).unwrap().map(|e| e.unwrap().file_name()).collect();
            let known = ["lock", "users", "format", "known", "layers", "blobs"];
            assert!(left.iter().all(|name| known.iter().any(|it| name == it)), "left behind: {left:?}");
            Err(error)
        }
    }
}

fn disks(temp: &Temp) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(temp.0.join("cache")) else {
        return Vec::new();
    };
    entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "erofs")).collect()
}

/// Everything on a disk, by its path; of files at most 64 KiB.
fn tree_of(disk: &Path) -> BTreeMap<String, Node> {
    let file = File::open(disk).unwrap();
    let tree = Reader::open(&file).tree(64 << 10);
    tree.into_iter().map(|(path, node)| (String::from_utf8_lossy(&path).into_owned(), node)).collect()
}

/// What becomes of an archive of these, which the second checker must find whole too.
fn tree(entries: &[Made]) -> Result<BTreeMap<String, Node>> {
    let (_temp, disk) = prepare(&archive(entries))?;
    fsck(&disk);
    Ok(tree_of(&disk))
}

/// The same where it must fail: with what is said.
fn refused(entries: &[Made]) -> Error {
    prepare(&archive(entries)).map(drop).expect_err("it must be refused")
}

/// The checker of erofs-utils finds nothing to complain about.
fn fsck(disk: &Path) {
    let output = std::process::Command::new("fsck.erofs").arg(disk).output().expect("erofs-utils: run `make setup`");
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}
