//! [`VolumeStore`]: the directory in which volumes lie, a file each.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::container::ext4;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::size::Size;
use crate::sys::{self, AtomicFile, Beneath, LockKind};
use crate::virtio::blk::lock_with_remedy;

/// The user's alone, as are those of images.
const FILE_MODE: u32 = 0o600;
const SUFFIX: &str = ".ext4";
const MAX_NAME: usize = 64;
/// How often a volume is opened anew that others replace meanwhile.
const MAX_TRIES: u32 = 16;
/// Files beyond which a directory is not listed.
const MAX_VOLUMES: usize = 100_000;

/// The directory in which volumes lie; see [`Volume::named`](super::Volume::named).
///
/// It is made when it is first used, with mode 0700. Several processes may use one. No call waits for a container: a volume
/// in use is `ResourceBusy`, with who has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStore {
    dir: PathBuf,
}

/// A volume of a store; see [`VolumeStore::list`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VolumeInfo {
    /// Its name.
    pub name: String,
    /// How much it can hold, with what its file system needs for itself.
    pub size: Size,
    /// Space that it takes on the host.
    pub allocated: Size,
    /// When it was last written to.
    pub modified: SystemTime,
}

impl VolumeStore {
    /// Names a directory as a store.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Returns the user's own: `$XDG_DATA_HOME/cofferdam/volumes`.
    ///
    /// Where that variable is not set, it is `~/.local/share/cofferdam/volumes`.
    ///
    /// # Errors
    /// `NotFound` where HOME is not set either.
    pub fn user() -> Result<Self> {
        let dir = sys::data_dir().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                "no directory for volumes: set HOME or XDG_DATA_HOME, or use VolumeStore::new",
            )
        })?;
        Ok(Self::new(dir.join("volumes")))
    }

    /// Lists its volumes by name.
    ///
    /// # Errors
    /// `PermissionDenied` for a directory that other users can write to, `ResourceExhausted` for one with more than 100,000
    /// entries. Otherwise what reading it fails with.
    pub fn list(&self) -> Result<Vec<VolumeInfo>> {
        let store = self.open()?;
        store.list().doing(|| self.doing("listing"))
    }

    /// Removes a volume, with all that is in it.
    ///
    /// # Errors
    /// `NotFound`, `ResourceBusy` for one in use, `InvalidConfig` for a name that no volume has. As [`VolumeStore::list`].
    pub fn remove(&self, name: &str) -> Result<()> {
        let doing = || format!("removing volume {name:?}");
        check_name(name).doing(doing)?;
        let store = self.open()?;
        let file = store.locked(name, LockKind::Exclusive).doing(doing)?;
        fs::remove_file(store.path(name)).doing(doing)?;
        drop(file);
        Ok(())
    }

    /// Copies a volume, as a snapshot of it under another name.
    ///
    /// Where the host's file system can share blocks (Btrfs, XFS), this takes no space. Elsewhere it takes as long as
    /// copying what was written. A volume that a container writes to cannot be copied. That of a container that was killed
    /// can, and so can one that containers read.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists` for the other name, `ResourceBusy` for one in use, `InvalidConfig` for a name that no
    /// volume has. `ResourceExhausted` when there is no space; then nothing is left. As [`VolumeStore::list`].
    pub fn copy(&self, name: &str, to: &str) -> Result<()> {
        let doing = || format!("copying volume {name:?} to {to:?}");
        check_name(name).and_then(|()| check_name(to)).doing(doing)?;
        let store = self.open()?;
        let file = store.locked(name, LockKind::Shared).doing(doing)?;
        store.publish(to, |copy| sys::copy_sparse(&file, copy)).doing(doing)
    }

    fn doing(&self, what: &str) -> String {
        format!("{what} the volumes in {}", self.dir.display())
    }

    /// Makes it where it is missing.
    pub(super) fn open(&self) -> Result<OpenStore> {
        let directory = Beneath::make_private(&self.dir).doing(|| self.doing("opening"))?;
        Ok(OpenStore { directory })
    }
}

/// A store that is held open.
pub(super) struct OpenStore {
    directory: Beneath,
}

impl OpenStore {
    /// Opens the file of a volume.
    ///
    /// # Errors
    /// `NotFound`; `PermissionDenied` for one that another user may have put there; `Corrupt` for what is no file.
    fn file(&self, name: &str, write: bool) -> Result<File> {
        let flags = if write { libc::O_RDWR } else { libc::O_RDONLY };
        let file = self.directory.open_at(Path::new(&file_name(name)), flags)?;
        if !file.metadata()?.is_file() {
            return Err(Error::new(ErrorKind::Corrupt, "it is no file"));
        }
        match sys::is_private(&file)? {
            true => Ok(file),
            false => Err(Error::new(ErrorKind::PermissionDenied, "its file can be written by other users")),
        }
    }

    /// The same, locked as long as it is open. For an exclusive lock it can be written.
    ///
    /// # Errors
    /// As [`OpenStore::file`]; `ResourceBusy`, naming who holds it.
    pub(super) fn locked(&self, name: &str, kind: LockKind) -> Result<File> {
        for _ in 0..MAX_TRIES {
            let file = self.file(name, kind == LockKind::Exclusive)?;
            lock_with_remedy(&file, kind, "many containers may read a volume, and one that writes has it alone")?;
            // It may have been removed before it was locked.
            if sys::has_name(&file)? {
                return Ok(file);
            }
        }
        Err(Error::new(ErrorKind::ResourceBusy, "it is replaced again and again"))
    }

    /// Makes the file of a volume, whole or not at all.
    ///
    /// # Errors
    /// `AlreadyExists`; else what `write` fails with.
    pub(super) fn publish(&self, name: &str, write: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
        let draft = AtomicFile::new(&sys::path_of(self.directory.as_fd()), FILE_MODE)?;
        write(draft.file())?;
        draft.file().sync_all()?;
        draft.publish(&self.path(name))?;
        Ok(())
    }

    /// As long as the store is open.
    fn path(&self, name: &str) -> PathBuf {
        sys::path_of(self.directory.as_fd()).join(file_name(name))
    }

    fn list(&self) -> Result<Vec<VolumeInfo>> {
        let mut found = Vec::new();
        for (n, entry) in fs::read_dir(sys::path_of(self.directory.as_fd()))?.enumerate() {
            if n >= MAX_VOLUMES {
                return Err(Error::new(
                    ErrorKind::ResourceExhausted,
                    format!("it has more than {MAX_VOLUMES} entries"),
                ));
            }
            let Ok(file_name) = entry?.file_name().into_string() else { continue };
            let Some(name) = file_name.strip_suffix(SUFFIX).filter(|name| check_name(name).is_ok()) else { continue };
            // It may be gone by now, and what is no volume is not listed.
            let Ok(file) = self.directory.open_regular(Path::new(&file_name)) else { continue };
            let metadata = file.metadata()?;
            if ext4::identify(&file)?.is_none() {
                continue;
            }
            found.push(VolumeInfo {
                name: name.to_owned(),
                size: Size::bytes(metadata.len()),
                allocated: Size::bytes(metadata.blocks().saturating_mul(512)),
                modified: metadata.modified()?,
            });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }
}

fn file_name(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

/// # Errors
/// `InvalidConfig` for what is no name of a volume.
pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    match name.len() <= MAX_NAME && begins && name.chars().all(plain) {
        true => Ok(()),
        false => Err(Error::invalid(
            "Volume::named",
            format!(
                "{name:?}: 1 to {MAX_NAME} letters, digits, `.`, `-` and `_` are needed, with a letter or a digit in front"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DEFAULT_SIZE, Volume};
    use super::*;

    fn temp_store(name: &str) -> VolumeStore {
        VolumeStore::new(std::env::temp_dir().join(format!("cofferdam-volumes-{name}-{}", std::process::id())))
    }

    #[test]
    fn volumes_are_made_listed_copied_and_removed() {
        let store = temp_store("life");
        assert_eq!(store.list().unwrap(), []);
        let one = Volume::named("one").store(&store);
        let held = one.open("serial").unwrap();
        assert!(held.fs == "ext4" && !held.grow && !held.read_only);
        let busy = one.open("serial").map(drop).unwrap_err();
        assert!(busy.kind() == ErrorKind::ResourceBusy && busy.to_string().contains("this process"), "{busy}");
        drop(held);
        // It grows, and never shrinks.
        assert!(one.clone().size(Size::gib(11)).open("serial").unwrap().grow);
        assert!(one.clone().size(Size::mib(1)).open("serial").unwrap().grow, "no kernel has grown it");
        let reader = one.clone().read_only(true).open("serial").unwrap();
        assert!(reader.read_only && !reader.grow);
        store.copy("one", "two").unwrap();
        assert_eq!(store.copy("one", "two").unwrap_err().kind(), ErrorKind::AlreadyExists);
        let found: Vec<_> = store.list().unwrap().into_iter().map(|it| (it.name, it.size)).collect();
        assert_eq!(found, [("one".into(), Size::gib(11)), ("two".into(), Size::gib(11))]);
        assert!(store.list().unwrap().iter().all(|it| it.allocated < Size::mib(8)), "holes stay holes");
        assert_eq!(store.remove("one").unwrap_err().kind(), ErrorKind::ResourceBusy);
        drop(reader);
        store.remove("one").unwrap();
        assert_eq!(store.remove("one").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(one.clone().read_only(true).open("serial").map(drop).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(DEFAULT_SIZE < Size::gib(11));
        fs::remove_dir_all(&store.dir).unwrap();
    }

    #[test]
    fn layers_are_of_their_image_alone() {
        let store = temp_store("layers");
        let layer = Volume::named("box").store(&store);
        let (image, other) = ("a".repeat(64), "b".repeat(64));
        drop(layer.open_layer(&image, "x").unwrap());
        drop(layer.open_layer(&image, "x").unwrap());
        assert_eq!(layer.open_layer(&other, "x").map(drop).unwrap_err().kind(), ErrorKind::Incompatible);
        let reader = layer.clone().read_only(true).open_layer(&image, "x").map(drop).unwrap_err();
        assert_eq!(reader.kind(), ErrorKind::InvalidConfig);
        drop(Volume::named("data").store(&store).open("x").unwrap());
        let plain = Volume::named("data").store(&store).open_layer(&image, "x").map(drop).unwrap_err();
        assert_eq!(plain.kind(), ErrorKind::Incompatible);
        fs::remove_dir_all(&store.dir).unwrap();
    }

    #[test]
    fn names_that_no_volume_has_are_refused() {
        let longest = "x".repeat(MAX_NAME);
        for name in ["a", "0.b-c_d", &longest] {
            check_name(name).unwrap();
        }
        let longer = "x".repeat(MAX_NAME + 1);
        for name in ["", ".", "..", ".a", "-a", "a/b", "a b", "ä", "a\0", &longer] {
            for error in [Volume::named(name).open("x").map(drop), temp_store("names").remove(name)] {
                assert!(matches!(error.map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig)), "{name:?}");
            }
        }
    }

    #[test]
    fn what_is_no_volume_or_not_the_users_alone_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let store = temp_store("odd");
        let open = |name: &str| Volume::named(name).store(&store).open("x").map(drop).map_err(|error| error.kind());
        store.list().unwrap();
        fs::write(store.dir.join("text.ext4"), "no file system").unwrap();
        fs::create_dir(store.dir.join("directory.ext4")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", store.dir.join("link.ext4")).unwrap();
        assert_eq!(store.list().unwrap(), []);
        assert_eq!(open("text"), Err(ErrorKind::Corrupt));
        assert!(open("directory").is_err() && open("link").is_err());
        open("shared").unwrap();
        let file = store.dir.join("shared.ext4");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o622)).unwrap();
        assert_eq!(open("shared"), Err(ErrorKind::PermissionDenied));
        fs::set_permissions(&store.dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(open("other"), Err(ErrorKind::PermissionDenied));
        fs::remove_dir_all(&store.dir).unwrap();
    }

    #[test]
    fn one_volume_is_made_however_many_ask_for_it() {
        let store = temp_store("many");
        let ask = || Volume::named("one").store(&store).read_only(false).open("x").map(drop);
        let ends: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ends.iter().any(Result::is_ok));
        assert!(
            ends.iter().all(|end| end.as_ref().err().is_none_or(|e| e.kind() == ErrorKind::ResourceBusy)),
            "{ends:?}"
        );
        assert_eq!(fs::read_dir(&store.dir).unwrap().count(), 1);
        fs::remove_dir_all(&store.dir).unwrap();
    }
}
