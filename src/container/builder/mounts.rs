//! What is mounted in a container beside its root: memory file systems and volumes.

use std::collections::BTreeSet;

use super::ContainerBuilder;
use super::disks::disk_path;
use crate::container::volume::OpenVolume;
use crate::container::{CancelToken, Volume};
use crate::error::{Context, Error, Result};
use crate::proto::{GROW_DISK, READ_ONLY_DISK, StringBuf};
use crate::size::Size;
use crate::vm::Disk;

/// A file system in the guest's memory; see [`ContainerBuilder::tmpfs`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Tmpfs {
    path: String,
    size: Size,
    mode: u32,
}

impl Tmpfs {
    /// Describes one that is mounted on `path`, an absolute path.
    ///
    /// It takes at most 64 MiB, and every user may write to it (mode 1777).
    pub fn new(path: impl Into<String>) -> Self {
        Self { path: path.into(), size: Size::mib(64), mode: 0o1777 }
    }

    /// Sets how much it may hold, of the guest's memory.
    ///
    /// It is taken as files are written. All together may be more than the guest has; then programs are killed for want
    /// of memory.
    pub fn size(mut self, most: Size) -> Self {
        self.size = most;
        self
    }

    /// Sets the mode of its directory, such as `0o700`.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }
}

impl From<&str> for Tmpfs {
    fn from(path: &str) -> Self {
        Self::new(path)
    }
}

/// As the embedder set it.
#[derive(Debug, Clone, Default)]
pub(super) struct MountSettings {
    tmpfs: Vec<Tmpfs>,
    volumes: Vec<VolumeMount>,
}

/// A volume, and where it is mounted.
#[derive(Debug, Clone)]
struct VolumeMount {
    path: String,
    volume: Volume,
}

/// Volumes that are open for one machine.
#[derive(Debug, Default)]
pub(super) struct OpenMounts {
    /// In the order of their device names in the guest.
    pub(super) disks: Vec<Disk>,
    /// All that the shim mounts, as it gets it.
    pub(super) list: StringBuf,
}

/// One file system as the shim gets it.
struct PlannedMount<'a> {
    fs: &'a str,
    device: String,
    path: &'a str,
    options: Vec<u8>,
}

impl MountSettings {
    /// Checks everything before anything is made. `secrets` is where the secrets are, if there are any.
    ///
    /// # Errors
    /// `InvalidConfig`, naming the method, for what cannot be.
    pub(super) fn check(&self, secrets: Option<&str>) -> Result<()> {
        let mut taken: BTreeSet<_> = secrets.into_iter().collect();
        let tmpfs = self.tmpfs.iter().map(|it| ("tmpfs", it.path.as_str()));
        let volumes = self.volumes.iter().map(|it| ("volume", it.path.as_str()));
        for (method, path) in tmpfs.chain(volumes) {
            let wrong = |what: &str| Error::invalid(method, format!("{path:?} {what}"));
            check_path(path).map_err(wrong)?;
            let below = |above: &str| path.strip_prefix(above).is_some_and(|rest| rest.starts_with('/'));
            if secrets.is_some_and(below) {
                return Err(wrong("would be hidden by the secrets"));
            }
            if !taken.insert(path) {
                return Err(wrong("is mounted on twice"));
            }
        }
        for Tmpfs { path, size, mode } in &self.tmpfs {
            let wrong = |what: &str| Error::invalid("tmpfs", format!("{path:?} {what}"));
            if size.as_bytes() == 0 {
                return Err(wrong("would hold nothing"));
            }
            if mode & !0o7777 != 0 {
                return Err(wrong(&format!("has mode {mode:o}, which is more than permissions")));
            }
        }
        self.volumes.iter().try_for_each(|it| it.volume.check().doing(|| format!("volume {:?}", it.path)))
    }

    /// Opens all volumes, whose first disk is the machine's disk number `first`.
    ///
    /// # Errors
    /// Those of [`Volume::open`].
    pub(super) fn open(&self, first: usize, cancel: Option<&CancelToken>) -> Result<OpenMounts> {
        let tmpfs = self.tmpfs.iter().map(|Tmpfs { path, size, mode }| {
            let options = format!("size={},mode={mode:o}", size.as_bytes()).into_bytes();
            PlannedMount { fs: "tmpfs", device: String::new(), path, options }
        });
        let (mut planned, mut disks): (Vec<_>, _) = (tmpfs.collect(), Vec::new());
        for (n, VolumeMount { path, volume }) in self.volumes.iter().enumerate() {
            let opened = volume.open(&format!("cofferdam-volume{n}"), cancel);
            let OpenVolume { disk, fs, read_only, grow } = opened.doing(|| format!("volume {path:?}"))?;
            let device = disk_path(first + n);
            let options = match (read_only, grow) {
                (true, _) => READ_ONLY_DISK.to_bytes().to_vec(),
                (false, true) => GROW_DISK.to_bytes().to_vec(),
                (false, false) => Vec::new(),
            };
            planned.push(PlannedMount { fs, device, path, options });
            disks.push(disk);
        }
        // One in another comes after it.
        planned.sort_by_key(|it| it.path.matches('/').count());
        let mut list = StringBuf::new();
        for PlannedMount { fs, device, path, options } in planned {
            for text in [fs.as_bytes(), device.as_bytes(), path.as_bytes(), &options] {
                list.push(text).map_err(|_| Error::invalid("tmpfs or volume", format!("{path:?} has a NUL")))?;
            }
        }
        Ok(OpenMounts { disks, list })
    }
}

/// What may be mounted on. The error is the predicate of a sentence about the path.
fn check_path(path: &str) -> Result<(), &'static str> {
    let Some(below) = path.strip_prefix('/') else { return Err("does not begin with a slash") };
    if below.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("is no plain path: it is the root, or has `.`, `..` or an empty part");
    }
    let kernels = |top: &str| below == top || below.strip_prefix(top).is_some_and(|rest| rest.starts_with('/'));
    match ["proc", "sys", "dev/pts", "dev/mqueue"].into_iter().any(kernels) || below == "dev" {
        true => Err("is the kernel's"),
        false if path.contains('\0') => Err("has a NUL"),
        false => Ok(()),
    }
}

impl ContainerBuilder {
    /// Mounts a file system in the guest's memory; none by default.
    ///
    /// Give its path, or a [`Tmpfs`]. The path is made where it is missing. What was there is hidden. Programs cannot be
    /// set-user-ID there, and devices do not work there.
    pub fn tmpfs(mut self, tmpfs: impl Into<Tmpfs>) -> Self {
        self.mounts.tmpfs.push(tmpfs.into());
        self
    }

    /// Mounts a volume on `path`, an absolute path; none by default.
    ///
    /// Give a [`Volume::named`], or an [`Image`](crate::Image), whose files can only be read. The path is made where it is
    /// missing. What was there is hidden. Programs cannot be set-user-ID there, and devices do not work there. Each volume
    /// is a disk of the container, behind all others, and has one of its interrupt lines.
    ///
    /// Below another volume or memory file system no link is followed to `path`, as an earlier container may have made
    /// it. A start that meets one fails with `GuestFailed`.
    ///
    /// It is unmounted when the container ends by [`Container::stop`](crate::Container::stop). When the container is killed,
    /// its file system recovers by its journal the next time.
    pub fn volume(mut self, path: impl Into<String>, volume: impl Into<Volume>) -> Self {
        self.mounts.volumes.push(VolumeMount { path: path.into(), volume: volume.into() });
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn refused(settings: &MountSettings, method: &str) -> String {
        let error = settings.check(Some("/run/secrets")).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains(method), "{error}");
        error.to_string()
    }

    fn of_tmpfs(tmpfs: Vec<Tmpfs>) -> MountSettings {
        MountSettings { tmpfs, ..MountSettings::default() }
    }

    fn volume(path: &str, volume: impl Into<Volume>) -> VolumeMount {
        VolumeMount { path: path.into(), volume: volume.into() }
    }

    #[test]
    fn mount_points_that_cannot_be_are_refused() {
        for path in [
            "",
            "tmp",
            "/",
            "/a/../b",
            "/a//b",
            "/a/",
            "/./a",
            "/proc",
            "/proc/x",
            "/sys/fs",
            "/dev",
            "/dev/pts",
            "/a\0",
            "/run/secrets",
            "/run/secrets/x",
        ] {
            refused(&of_tmpfs(vec![path.into()]), "tmpfs");
            let volumes = vec![volume(path, Volume::named("a"))];
            refused(&MountSettings { volumes, ..MountSettings::default() }, "volume");
        }
        assert!(refused(&of_tmpfs(vec!["/a".into(), "/b".into(), "/a".into()]), "tmpfs").contains("twice"));
        let both = MountSettings { tmpfs: vec!["/a".into()], volumes: vec![volume("/a", Volume::named("a"))] };
        assert!(refused(&both, "volume").contains("twice"));
        for tmpfs in [Tmpfs::new("/a").size(Size::bytes(0)), Tmpfs::new("/a").mode(0o10_000)] {
            refused(&of_tmpfs(vec![tmpfs]), "tmpfs");
        }
        for named in [Volume::named("a/b"), Volume::named("a").size(Size::bytes(0))] {
            let volumes = vec![volume("/a", named)];
            refused(&MountSettings { volumes, ..MountSettings::default() }, "volume");
        }
    }

    #[test]
    fn mounts_inside_others_come_after_them() {
        let nested = vec![Tmpfs::new("/a/b").size(Size::mib(1)).mode(0o700), "/dev/own".into(), "/a".into()];
        let list = of_tmpfs(nested).open(0, None).unwrap().list;
        let list: Vec<_> = list.as_strings().iter().map(|text| text.to_str().unwrap()).collect();
        let usual = "size=67108864,mode=1777";
        let expected = [
            ["tmpfs", "", "/a", usual],
            ["tmpfs", "", "/a/b", "size=1048576,mode=700"],
            ["tmpfs", "", "/dev/own", usual],
        ];
        assert_eq!(list, expected.concat());
    }
}
