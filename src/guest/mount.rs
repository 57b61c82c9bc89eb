//! The workloads' file systems. What is to be mounted is a plan that can be read and tested, and is then carried out.
//!
//! Runs once, on the shim's one thread, before anything of the guest's owner runs. After [`MountStep::Enter`] every path is
//! inside the root of the workloads, so that a link in an image leads nowhere else.

use core::ffi::CStr;

use super::alloc::borrow::Cow;
use super::alloc::ffi::CString;
use super::alloc::vec::Vec;
use super::control::Failure;
use super::files;
use super::sys::{self, Errno, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY, MS_REMOUNT};
use crate::proto::{BootConfig, GROW_DISK, Mount, READ_ONLY_DISK, Root, RootDisk, Secret, Stage};

/// How long a device may take to appear. The drivers are there before the shim, so this is for devices that are probed later.
const DEVICE_WAIT_NS: u64 = 3_000_000_000;

type Path = Cow<'static, CStr>;

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum MountStep {
    /// Make a directory, unless it is there.
    Dir { path: Path, mode: u32 },
    /// Wait until a device is there.
    Device { path: Path },
    /// Mount a file system.
    Mount { source: Path, target: Path, fs: Path, flags: usize, data: Option<Path> },
    /// Make a symbolic link, unless something is there.
    Link { target: &'static CStr, path: &'static CStr },
    /// Make a text file, unless there is one that is not empty, or something else.
    File { path: &'static CStr, content: Vec<u8> },
    /// Make a text file in the place of what is there, whatever that is.
    Replace { path: &'static CStr, content: Vec<u8> },
    /// Check that a directory is no file system of the kernel's, to which a link of an image may lead.
    /// Where it lies in another mount, `above`, no link in that is followed: an earlier container may have made it.
    CheckPlace { path: CString, above: Option<CString> },
    /// Append to a text file, unless it has `word` on some line.
    Lines { path: &'static CStr, word: Option<Vec<u8>>, lines: Vec<u8> },
    /// Make a directory and those above it that are missing.
    Dirs { path: CString },
    /// Make a file whose content is a secret.
    Secret { path: CString, content: Vec<u8> },
    /// Make the ext4 file system at `target` as large as its device.
    Grow { device: CString, target: CString },
    /// Remount the file system at this path read-only.
    RemountReadOnly { path: &'static CStr },
    /// Make this directory the root of everything from here on.
    Enter { path: &'static CStr },
}

/// A step, and whether the machine is of no use without it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub(super) step: MountStep,
    pub(super) required: bool,
}

const NEWROOT: &CStr = c"/root";
const LOWER: &CStr = c"/lower";
const UPPER: &CStr = c"/upper";
const SECRETS: &CStr = c"/run/secrets";

/// Builds the list.
#[derive(Default)]
struct MountPlan(Vec<Planned>);

impl MountPlan {
    fn must(&mut self, step: MountStep) {
        self.0.push(Planned { step, required: true });
    }

    fn may(&mut self, step: MountStep) {
        self.0.push(Planned { step, required: false });
    }

    /// A file system of the kernel, with its mount point. The point is allowed to fail, as on a read-only root it is there or not; mounting
    /// tells.
    fn api(
        &mut self,
        fs: &'static CStr,
        target: &'static CStr,
        flags: usize,
        data: Option<&'static CStr>,
        required: bool,
    ) {
        self.may(MountStep::Dir { path: target.into(), mode: 0o755 });
        let step = MountStep::Mount {
            source: fs.into(),
            target: target.into(),
            fs: fs.into(),
            flags,
            data: data.map(Cow::from),
        };
        self.0.push(Planned { step, required });
    }

    fn disk(&mut self, source: &RootDisk<'_>, target: &'static CStr, flags: usize) {
        self.must(MountStep::Dir { path: target.into(), mode: 0o755 });
        self.must(MountStep::Device { path: path(source.device) });
        self.must(MountStep::Mount {
            source: path(source.device),
            target: target.into(),
            fs: path(source.fs),
            flags,
            data: None,
        });
    }
}

/// The boot configuration has no NUL in any text; were there one, the text would end there.
fn path(bytes: &[u8]) -> Path {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    Cow::Owned(CString::new(text).unwrap_or_default())
}

/// Everything up to the root, from the initramfs.
pub(super) fn plan(config: &BootConfig<'_>) -> Vec<Planned> {
    let root = &config.root;
    let mut plan = MountPlan::default();
    plan.api(c"devtmpfs", c"/dev", MS_NOSUID, None, true);
    match root {
        Root::Initramfs => {}
        Root::Device { source, read_only } => {
            plan.disk(source, NEWROOT, if *read_only { MS_RDONLY } else { 0 });
            plan.must(MountStep::Enter { path: NEWROOT });
        }
        Root::Overlay { lower, upper, grow, .. } => {
            plan.disk(lower, LOWER, MS_RDONLY);
            plan.disk(upper, UPPER, 0);
            if *grow {
                plan.must(MountStep::Grow { device: path(upper.device).into_owned(), target: CString::from(UPPER) });
            }
            plan.must(MountStep::Dir { path: c"/upper/upper".into(), mode: 0o755 });
            plan.must(MountStep::Dir { path: c"/upper/work".into(), mode: 0o755 });
            plan.must(MountStep::Dir { path: NEWROOT.into(), mode: 0o755 });
            plan.must(MountStep::Mount {
                source: c"overlay".into(),
                target: NEWROOT.into(),
                fs: c"overlay".into(),
                flags: 0,
                // Without redirect_dir a directory of the image cannot be renamed.
                data: Some(c"lowerdir=/lower,upperdir=/upper/upper,workdir=/upper/work,redirect_dir=on".into()),
            });
            plan.must(MountStep::Enter { path: NEWROOT });
        }
    }
    if !matches!(root, Root::Initramfs) {
        plan.api(c"devtmpfs", c"/dev", MS_NOSUID, None, true);
    }
    // The workloads' own /proc needs their pid namespace; here is only its place.
    plan.may(MountStep::Dir { path: c"/proc".into(), mode: 0o555 });
    plan.api(c"sysfs", c"/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, None, true);
    plan.api(c"cgroup2", c"/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, None, false);
    plan.api(c"devpts", c"/dev/pts", MS_NOSUID | MS_NOEXEC, Some(c"gid=5,mode=620,ptmxmode=666"), false);
    plan.api(c"tmpfs", c"/dev/shm", MS_NOSUID | MS_NODEV, Some(c"mode=1777"), false);
    plan.api(c"mqueue", c"/dev/mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, None, false);
    for (target, path) in [
        (c"/proc/self/fd", c"/dev/fd"),
        (c"/proc/self/fd/0", c"/dev/stdin"),
        (c"/proc/self/fd/1", c"/dev/stdout"),
        (c"/proc/self/fd/2", c"/dev/stderr"),
    ] {
        plan.may(MountStep::Link { target, path });
    }
    if matches!(root, Root::Device { read_only: true, .. }) {
        // Hardly a program runs without these two. On a writable root they are as the image has them.
        plan.api(c"tmpfs", c"/run", MS_NOSUID | MS_NODEV, Some(c"mode=755"), false);
        plan.api(c"tmpfs", c"/tmp", MS_NOSUID | MS_NODEV, Some(c"mode=1777"), false);
    } else {
        own_files(config, &mut plan);
    }
    own_mounts(config, &mut plan);
    if matches!(root, Root::Overlay { read_only: true, .. }) {
        plan.must(MountStep::RemountReadOnly { path: c"/" });
    }
    plan.0
}

/// Directories and files of a root that can be written.
fn own_files(config: &BootConfig<'_>, plan: &mut MountPlan) {
    let hostname = config.hostname;
    plan.may(MountStep::Dir { path: c"/run".into(), mode: 0o755 });
    plan.may(MountStep::Dir { path: c"/tmp".into(), mode: 0o1777 });
    plan.may(MountStep::Dir { path: c"/etc".into(), mode: 0o755 });
    let own: &[u8] = if hostname.is_empty() { b"localhost" } else { hostname };
    plan.may(MountStep::File { path: c"/etc/hostname", content: [own, b"\n"].concat() });
    let hosts = [b"127.0.0.1\tlocalhost ", own, b"\n::1\tlocalhost ip6-localhost ip6-loopback\n"].concat();
    plan.may(MountStep::File { path: c"/etc/hosts", content: hosts });
    // The image's own knows other names. Where they are two they both lead here.
    plan.may(MountStep::Lines {
        path: c"/etc/hosts",
        word: Some(Vec::from(own)),
        lines: [b"127.0.0.1\t", own, b"\n"].concat(),
    });
    if !config.hosts.is_empty() {
        plan.must(MountStep::Lines { path: c"/etc/hosts", word: None, lines: Vec::from(config.hosts) });
    }
    if !config.resolv_conf.is_empty() {
        // The image's own is of where it was made.
        plan.must(MountStep::Replace { path: c"/etc/resolv.conf", content: Vec::from(config.resolv_conf) });
    }
}

/// What the embedder wants in memory and on disks of its own.
fn own_mounts(config: &BootConfig<'_>, plan: &mut MountPlan) {
    for Mount { fs, device, target, options } in config.mounts.iter() {
        plan.must(MountStep::Dirs { path: CString::from(target) });
        plan.must(MountStep::CheckPlace { path: CString::from(target), above: above(config, target) });
        if device.is_empty() {
            plan.must(memory(target, options));
        } else {
            volume(&Mount { fs, device, target, options }, plan);
        }
    }
    secrets(config, plan);
}

/// A file system in memory.
fn memory(target: &CStr, options: &CStr) -> MountStep {
    MountStep::Mount {
        source: c"tmpfs".into(),
        target: Cow::Owned(CString::from(target)),
        fs: c"tmpfs".into(),
        flags: MS_NOSUID | MS_NODEV,
        data: Some(Cow::Owned(CString::from(options))),
    }
}

/// A file system on a disk that outlives the machine.
fn volume(Mount { fs, device, target, options }: &Mount<'_>, plan: &mut MountPlan) {
    let own = |text: &CStr| -> Path { Cow::Owned(CString::from(text)) };
    plan.must(MountStep::Device { path: own(device) });
    // What an earlier container has left there is not trusted with more than files.
    let flags = MS_NOSUID | MS_NODEV | if *options == READ_ONLY_DISK { MS_RDONLY } else { 0 };
    plan.must(MountStep::Mount { source: own(device), target: own(target), fs: own(fs), flags, data: None });
    if *options == GROW_DISK {
        plan.must(MountStep::Grow { device: CString::from(*device), target: CString::from(*target) });
    }
}

fn secrets(config: &BootConfig<'_>, plan: &mut MountPlan) {
    let mut secrets = config.secrets.iter().peekable();
    if secrets.peek().is_none() {
        return;
    }
    plan.must(MountStep::Dirs { path: CString::from(SECRETS) });
    plan.must(MountStep::CheckPlace { path: CString::from(SECRETS), above: above(config, SECRETS) });
    plan.must(memory(SECRETS, c"mode=755"));
    for Secret { name, content } in secrets {
        let path = path(&[SECRETS.to_bytes(), b"/", name].concat()).into_owned();
        plan.must(MountStep::Secret { path, content: Vec::from(content) });
    }
    plan.must(MountStep::RemountReadOnly { path: SECRETS });
}

/// Appends a number as text.
pub(super) fn decimal(number: u8, to: &mut Vec<u8>) {
    for unit in [100, 10, 1] {
        if number >= unit || unit == 1 {
            to.push(b'0' + number / unit % 10);
        }
    }
}

/// Carries the plan out.
pub(super) fn carry_out(plan: &[Planned]) -> Result<(), Failure> {
    for Planned { step, required } in plan {
        match step.carry_out() {
            Err(errno) if *required => return Err(step.failure(errno)),
            _ => {}
        }
    }
    Ok(())
}

impl MountStep {
    fn carry_out(&self) -> Result<(), Errno> {
        match self {
            Self::Dir { path, mode } => there(sys::mkdir(None, path, *mode)),
            Self::Device { path } => wait_for(path),
            Self::CheckPlace { path, above } => check_place(path, above.as_deref()),
            Self::Mount { source, target, fs, flags, data } => {
                match sys::mount(source, target, Some(fs), *flags, data.as_deref()) {
                    // It is mounted there already, by the kernel.
                    Err(Errno::EBUSY) if source == fs => Ok(()),
                    result => result,
                }
            }
            Self::Link { target, path } => there(sys::symlink(target, path)),
            Self::File { path, content } => match files::create(path, content) {
                // Images have an empty one, or a link to nowhere, where another program would put its own over it.
                Err(Errno::EEXIST) => files::fill(path, content),
                result => result,
            },
            Self::Replace { path, content } => match sys::unlink(path) {
                Ok(()) | Err(Errno::ENOENT) => files::create(path, content),
                // A directory.
                Err(errno) => Err(errno),
            },
            Self::Lines { path, word, lines } => files::append_unless(path, word.as_deref(), lines),
            Self::Dirs { path } => files::make_directories(path),
            Self::Secret { path, content } => files::create(path, content),
            Self::Grow { device, target } => {
                let device = sys::open(None, device, sys::O_RDONLY)?;
                let mounted = sys::open(None, target, sys::O_RDONLY | sys::O_DIRECTORY)?;
                sys::grow_file_system(&mounted, sys::disk_size(&device)?)
            }
            Self::RemountReadOnly { path } => sys::mount(c"none", path, None, MS_REMOUNT | MS_RDONLY, None),
            Self::Enter { path } => {
                sys::chdir(path)?;
                sys::mount(c".", c"/", None, MS_MOVE, None)?;
                sys::chroot(c".")?;
                sys::chdir(c"/")
            }
        }
    }

    fn failure(&self, errno: Errno) -> Failure {
        let mount = |parts: &[&[u8]]| Failure::new(Stage::Mount, errno, parts);
        match self {
            Self::Dir { path, .. } => mount(&[b"making ", path.to_bytes()]),
            Self::Device { path } => Failure::new(Stage::Device, errno, &[b"waiting for ", path.to_bytes()]),
            Self::Mount { source, target, fs, .. } => {
                mount(&[b"mounting ", source.to_bytes(), b" (", fs.to_bytes(), b") on ", target.to_bytes()])
            }
            Self::Link { path, .. }
            | Self::File { path, .. }
            | Self::Replace { path, .. }
            | Self::Lines { path, .. } => mount(&[b"making ", path.to_bytes()]),
            Self::Dirs { path } | Self::Secret { path, .. } => mount(&[b"making ", path.to_bytes()]),
            Self::CheckPlace { path, .. } => mount(&[b"finding a place at ", path.to_bytes()]),
            Self::Grow { target, .. } => mount(&[b"growing the file system at ", target.to_bytes()]),
            Self::RemountReadOnly { path } => mount(&[b"making read-only ", path.to_bytes()]),
            Self::Enter { path } => mount(&[b"entering ", path.to_bytes()]),
        }
    }
}

/// What is there already needs no making.
fn there(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::EEXIST) => Ok(()),
        result => result,
    }
}

/// `f_type` of proc, sysfs, cgroup2, devpts and mqueue (Linux, include/uapi/linux/magic.h).
const KERNELS: [u64; 5] = [0x9fa0, 0x6265_6572, 0x6367_7270, 0x1cd1, 0x1980_0202];

/// The innermost mount of the list that a path is in.
fn above(config: &BootConfig<'_>, path: &CStr) -> Option<CString> {
    let inside =
        |it: &Mount<'_>| path.to_bytes().strip_prefix(it.target.to_bytes()).is_some_and(|rest| rest.starts_with(b"/"));
    config
        .mounts
        .iter()
        .filter(inside)
        .map(|it| it.target)
        .max_by_key(|target| target.to_bytes().len())
        .map(CString::from)
}

/// # Errors
/// `EBUSY` where a file system of the kernel's is there. `ELOOP` where a link leads there from the mount `above` it.
fn check_place(path: &CStr, above: Option<&CStr>) -> Result<(), Errno> {
    let place = match above {
        None => sys::open(None, path, sys::O_PATH | sys::O_DIRECTORY)?,
        Some(above) => {
            let rest = path.to_bytes_with_nul().get(above.to_bytes().len() + 1..);
            let rest = rest.and_then(|rest| CStr::from_bytes_with_nul(rest).ok()).ok_or(Errno::EINVAL)?;
            let above = sys::open(None, above, sys::O_PATH | sys::O_DIRECTORY)?;
            sys::open_without_links(&above, rest, sys::O_PATH | sys::O_DIRECTORY)?
        }
    };
    if KERNELS.contains(&sys::file_system_kind(&place)?) { Err(Errno::EBUSY) } else { Ok(()) }
}

fn wait_for(device: &CStr) -> Result<(), Errno> {
    let deadline = sys::now_ns() + DEVICE_WAIT_NS;
    let mut pause_ms = 1;
    loop {
        match sys::open(None, device, sys::O_PATH) {
            Ok(_) => return Ok(()),
            Err(errno) if errno != Errno::ENOENT || sys::now_ns() >= deadline => return Err(errno),
            Err(_) => sys::sleep_ms(pause_ms),
        }
        pause_ms = (pause_ms * 2).min(50);
    }
}

/// What [`Writable::settle`] needs, kept where the workloads cannot hide it.
#[derive(Debug)]
pub(super) struct Writable {
    /// The file system that takes the workloads' writes, below the root.
    upper: Option<sys::Fd>,
    /// Volumes that can be written, by their roots.
    volumes: Vec<sys::Fd>,
    /// The kernel's switch for grace periods of RCU that do not wait for ticks of its clock.
    expedited: Option<sys::Fd>,
}

impl Writable {
    /// To be called after mounting and before [`MountStep::Enter`] hides it; so [`carry_out`] goes in two parts.
    pub(super) fn find(root: &Root<'_>) -> Self {
        let upper = match root {
            Root::Initramfs | Root::Device { .. } => None,
            Root::Overlay { .. } => sys::open(None, UPPER, sys::O_RDONLY | sys::O_DIRECTORY).ok(),
        };
        Self { upper, volumes: Vec::new(), expedited: None }
    }

    /// To be called when everything is mounted, and before any workload runs.
    pub(super) fn find_rest(&mut self, config: &BootConfig<'_>) {
        let written = config.mounts.iter().filter(|it| !it.device.is_empty() && it.options != READ_ONLY_DISK);
        let open = |it: Mount<'_>| sys::open(None, it.target, sys::O_RDONLY | sys::O_DIRECTORY).ok();
        self.volumes = written.filter_map(open).collect();
        self.expedited = sys::open(None, c"/sys/kernel/rcu_expedited", sys::O_WRONLY).ok();
    }

    /// Brings everything to the disks, and where nothing writes any more makes them read-only, so that they are found clean.
    pub(super) fn settle(self) {
        // A file system that becomes read-only waits for a grace period: about three ticks of a kernel that has nothing else to do.
        if let Some(switch) = &self.expedited {
            let _ = sys::write(switch, b"1");
        }
        sys::sync();
        let remount = |path| sys::mount(c"none", path, None, MS_REMOUNT | MS_RDONLY, None);
        for volume in &self.volumes {
            if sys::fchdir(volume).is_ok() {
                let _ = remount(c".");
            }
        }
        let _ = remount(c"/");
        if self.upper.is_some_and(|fd| sys::fchdir(&fd).is_ok()) {
            let _ = remount(c".");
        }
    }
}

/// Where a plan enters the root; before it [`Writable::find`] finds what it needs.
pub(super) fn split(plan: &[Planned]) -> (&[Planned], &[Planned]) {
    let enter = plan.iter().position(|planned| matches!(planned.step, MountStep::Enter { .. })).unwrap_or(0);
    plan.split_at(enter)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VDA: RootDisk<'_> = RootDisk { device: b"/dev/vda", fs: b"ext4" };
    const VDB: RootDisk<'_> = RootDisk { device: b"/dev/vdb", fs: b"ext4" };

    fn planned(root: Root<'_>, hostname: &[u8], resolv_conf: &[u8]) -> Vec<Planned> {
        plan(&BootConfig { root, hostname, resolv_conf, ..BootConfig::default() })
    }

    fn mounts(plan: &[Planned]) -> Vec<(&str, &str)> {
        let text = |path: &'_ Path| -> &str { Box::leak(path.to_str().unwrap().to_owned().into_boxed_str()) };
        plan.iter()
            .filter_map(|planned| match &planned.step {
                MountStep::Mount { target, fs, .. } => Some((text(fs), text(target))),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn an_overlay_is_mounted_below_before_it_is_entered_and_the_rest_inside() {
        let plan = planned(
            Root::Overlay { lower: VDA, upper: VDB, grow: false, read_only: false },
            b"box",
            b"nameserver 10.0.205.2\n",
        );
        let (before, after) = split(&plan);
        assert_eq!(
            mounts(before),
            [("devtmpfs", "/dev"), ("ext4", "/lower"), ("ext4", "/upper"), ("overlay", "/root")]
        );
        assert_eq!(mounts(after)[..3], [("devtmpfs", "/dev"), ("sysfs", "/sys"), ("cgroup2", "/sys/fs/cgroup")]);
        assert!(!mounts(after).contains(&("tmpfs", "/run")), "what an image has in /run stays");
    }

    #[test]
    fn the_lower_device_is_never_written() {
        let plan = planned(Root::Overlay { lower: VDA, upper: VDB, grow: false, read_only: true }, b"", b"");
        let flags = plan.iter().find_map(|planned| match &planned.step {
            MountStep::Mount { source, flags, .. } if source.to_bytes() == b"/dev/vda" => Some(*flags),
            _ => None,
        });
        assert_eq!(flags, Some(MS_RDONLY));
    }

    #[test]
    fn the_initramfs_is_not_entered() {
        let plan = planned(Root::Initramfs, b"", b"");
        assert!(!plan.iter().any(|planned| matches!(planned.step, MountStep::Enter { .. })));
        assert_eq!(mounts(&plan).iter().filter(|mount| mount.1 == "/dev").count(), 1);
    }

    #[test]
    fn a_read_only_root_gets_run_and_tmp_in_memory_and_no_files() {
        let plan = planned(Root::Device { source: VDA, read_only: true }, b"box", b"nameserver 10.0.205.2\n");
        assert!(mounts(&plan).contains(&("tmpfs", "/tmp")));
        assert!(!plan.iter().any(|planned| matches!(planned.step, MountStep::File { .. })));
    }

    #[test]
    fn resolv_conf_is_written() {
        let plan = planned(
            Root::Overlay { lower: VDA, upper: VDB, grow: false, read_only: false },
            b"",
            b"nameserver 10.0.205.2\n",
        );
        let written = plan.iter().find_map(|planned| match &planned.step {
            MountStep::Replace { path, content } if *path == c"/etc/resolv.conf" => Some(content.as_slice()),
            _ => None,
        });
        assert_eq!(written, Some(&b"nameserver 10.0.205.2\n"[..]));
    }

    #[test]
    fn a_missing_device_is_named() {
        let failure = MountStep::Device { path: path(b"/dev/vdz") }.failure(Errno::ENOENT);
        assert_eq!((failure.stage, &failure.text[..]), (Stage::Device, &b"waiting for /dev/vdz"[..]));
    }
}
