//! The number of how a store is arranged. A release leaves a store alone that a newer one has arranged otherwise.

use std::fs;
use std::io::{self, Read, Write};

use super::{FILE_MODE, Shelf, private_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::AtomicFile;

/// To be raised when directories or names change so that older releases would do harm. Formats of disks and layers have
/// versions of their own, and lie side by side.
const FORMAT: u32 = 1;
const NAME: &str = "format";
const MAX_LEN: u64 = 16;

/// Reads the number of a store, or gives it one where it has none.
///
/// # Errors
/// `Incompatible` for the store of a newer release, or a number that is none. What reading or writing it fails with.
pub(super) fn check(store: &Shelf) -> Result<()> {
    let doing = || format!("reading {}", store.shown.join(NAME).display());
    // A second time after another process was quicker.
    for _ in 0..2 {
        match private_file(&store.directory, NAME) {
            Ok(file) => return judge(file).doing(doing),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error.doing(doing())),
        }
        match write(store) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.raw_os_error().is_some_and(is_no_room_or_right) => return Ok(()),
            Err(error) => return Err(error).doing(|| format!("writing {}", store.shown.join(NAME).display())),
        }
    }
    Err(Error::new(ErrorKind::ResourceBusy, "other processes make and remove it").doing(doing()))
}

/// Of a user that may only read the store, or that is about to free space in it.
fn is_no_room_or_right(error: i32) -> bool {
    matches!(error, libc::EACCES | libc::EPERM | libc::EROFS | libc::ENOSPC | libc::EDQUOT)
}

fn judge(file: fs::File) -> Result<()> {
    let mut bytes = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let number = text.trim_end();
    if number.parse().is_ok_and(|number: u32| number <= FORMAT) {
        return Ok(());
    }
    let what = format!(
        "the store has format {number:?}, and this release knows {FORMAT}: use a newer release, or another directory \
         (`Image::cache_dir`)"
    );
    Err(Error::new(ErrorKind::Incompatible, what))
}

fn write(store: &Shelf) -> io::Result<()> {
    let draft = AtomicFile::new(&store.path(), FILE_MODE)?;
    writeln!(draft.file(), "{FORMAT}")?;
    draft.file().sync_all()?;
    draft.publish(&store.path().join(NAME))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::Store;
    use super::*;

    #[test]
    fn store_of_a_newer_release_is_left_alone() {
        let dir: PathBuf = std::env::temp_dir().join(format!("cofferdam-format-{}", std::process::id()));
        drop(Store::open(Some(dir.clone())).unwrap());
        assert_eq!(fs::read_to_string(dir.join(NAME)).unwrap(), "1\n");
        let newer: [&[u8]; 7] = [b"2\n", b"10", b"", b"-1", b"1 and more", b"99999999999999999999999", b"\xff\xfe"];
        for newer in newer {
            fs::write(dir.join(NAME), newer).unwrap();
            let before = fs::read_dir(&dir).unwrap().count();
            let error = Store::open(Some(dir.clone())).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Incompatible, "{error}");
            assert!(error.to_string().contains("use a newer release"), "{error}");
            assert_eq!(fs::read_dir(&dir).unwrap().count(), before);
        }
        fs::write(dir.join(NAME), "1").unwrap();
        drop(Store::open(Some(dir.clone())).unwrap());
        fs::remove_dir_all(dir).unwrap();
    }
}
