//! [`Kernel`]: a Linux kernel, opened and checked once, booted any number of times.

use std::fs::File;
use std::io::{Seek, Write};
use std::path::Path;
#[cfg(test)]
use std::path::PathBuf;
use std::sync::Arc;

use super::find::Places;
use super::ikconfig::Configuration;
use super::protocol::{self, EntryChoice, KernelEntry};
use super::{Initramfs, Modules, Need, Packed};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::{GuestMemory, MemoryImage};
use crate::sys;

/// A kernel must fit below this guest address. Real ones end far below; the space costs nothing unless used.
pub(super) const IMAGE_SPACE: u64 = 1 << 30;

/// Records which of a kernel's pages its guests write, so that later guests have copies of them at once.
#[derive(Debug, Clone)]
pub(crate) struct DirtyPageRecorder(Arc<Loaded>);

impl DirtyPageRecorder {
    /// Records what this guest has written. When its drivers are ready is a good time.
    pub(crate) fn record(&self, memory: &GuestMemory) {
        memory.record_dirty_pages(&self.0.image);
    }
}

/// A Linux kernel to boot, with its command line and initramfs.
///
/// Takes an ELF `vmlinux`, or a `vmlinuz` that unpacks itself, as distributions ship them. Opening loads the file into a
/// sealed image in memory once, and every VM that boots it maps that image copy-on-write. So the file may change or go
/// away afterwards. Cloning is cheap and shares the loaded image. Nothing is ever downloaded.
///
/// Distributions build drivers as modules: see [`Kernel::modules`]. `vmlinuz` and its directory below `/lib/modules`
/// are used as the package has them.
///
/// A kernel finds the machine's devices by ACPI (`CONFIG_ACPI`, `CONFIG_VIRTIO_MMIO`), as those of distributions do. A
/// kernel that takes them from its command line (`CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`) boots faster. It is known to do
/// so when its configuration is embedded in it or lies beside it (see [`Kernel::check`]). Then ACPI and PCI are off,
/// unless `acpi=` is on the command line. With `acpi=off` there, any kernel gets its devices on the command line.
#[derive(Debug, Clone)]
#[must_use = "a config value does nothing by itself"]
pub struct Kernel {
    pub(crate) loaded: Arc<Loaded>,
    pub(crate) cmdline: String,
    pub(crate) initramfs: Option<Initramfs>,
    pub(crate) modules: Option<Modules>,
    pub(crate) choice: EntryChoice,
}

/// What came of a kernel file.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub image: MemoryImage,
    pub(super) entry: KernelEntry,
    /// Where the kernel will have unpacked itself; the initramfs must lie above.
    pub end: u64,
    pub(super) configuration: Configuration,
    /// What `uname -r` says, where the file tells.
    pub release: Option<String>,
}

impl Kernel {
    /// Opens a kernel image, and reads its configuration if there is one.
    ///
    /// Blocks while the files are read; see [`Kernel::check`] for the configuration.
    ///
    /// # Errors
    /// - `NotFound` or `PermissionDenied` when it cannot be opened.
    /// - `Corrupt` when it is damaged, or no 64-bit kernel for this processor.
    /// - `ResourceExhausted` when the host has no memory for it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut loaded = File::open(path)
            .map_err(Error::from)
            .and_then(|mut file| load(&mut file))
            .doing(|| format!("opening kernel {}", path.display()))?;
        loaded.configuration = loaded.configuration.or_beside(path);
        Ok(Self::new(loaded))
    }

    fn new(loaded: Loaded) -> Self {
        Self {
            loaded: Arc::new(loaded),
            cmdline: String::new(),
            initramfs: None,
            modules: None,
            choice: EntryChoice::default(),
        }
    }

    /// Opens a kernel from its bytes, such as those of the crate `cofferdam-kernel`.
    ///
    /// They are what [`Kernel::open`] takes as a file, and are copied. Nothing lies beside them, so a `vmlinuz` has
    /// no configuration that is known.
    ///
    /// # Errors
    /// - `Corrupt` when it is damaged, or no 64-bit kernel for this processor.
    /// - `ResourceExhausted` when the host has no memory for it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let open = || {
            let mut file = sys::memfd(0)?;
            file.write_all(bytes)?;
            file.rewind()?;
            load(&mut file)
        };
        open().map(Self::new).doing(|| "opening kernel from bytes")
    }

    /// Opens the first kernel that is found in the usual places.
    ///
    /// It looks in this order:
    ///
    /// 1. What the environment variable `COFFERDAM_KERNEL` names. If it is set, nothing else is looked for.
    /// 2. `$XDG_CACHE_HOME/cofferdam/kernel/vmlinux`, or `~/.cache/cofferdam/kernel/vmlinux`. This crate's
    ///    `guest/kernel/build` puts its small kernel there.
    /// 3. `kernels/cloud-6.12/vmlinuz` in the same cache, with `modules` beside it. `guest/stock-kernels` puts Debian's
    ///    there.
    /// 4. The host's own: `/boot/vmlinuz-RELEASE`, then `/usr/lib/modules/RELEASE/vmlinuz`. `RELEASE` is what `uname -r`
    ///    says. Its modules are those of `/usr/lib/modules/RELEASE` or `/lib/modules/RELEASE`.
    ///
    /// A kernel of the last two has its [`Kernel::modules`] set. It starts more slowly than the small one. Where it
    /// is known to have `CONFIG_VIRTIO_MMIO` built in, the modules may be absent.
    ///
    /// # Errors
    /// - `NotFound` when there is none. It names every place, and what to do.
    /// - `PermissionDenied` when the host's own is there, but this user may not read it. It says how to allow that.
    /// - Else as [`Kernel::open`], for the first two.
    pub fn find() -> Result<Self> {
        Places::here().open()
    }

    /// Sets the kernel's command line, such as `console=hvc0 root=/dev/vda ro quiet`.
    ///
    /// Replaces an earlier one. The machine adds `reboot=k panic=-1` and a few more unless those are set here, and
    /// devices where the kernel takes them from there (see [`Kernel`]). Checked when the VM starts: printable ASCII, at
    /// most 2,047 bytes with what is added.
    pub fn cmdline(mut self, text: impl Into<String>) -> Self {
        self.cmdline = text.into();
        self
    }

    /// Sets the initramfs. Replaces an earlier one.
    pub fn initramfs(mut self, initramfs: Initramfs) -> Self {
        self.initramfs = Some(initramfs);
        self
    }

    /// Sets the kernel's modules, for kernels that have drivers there.
    ///
    /// Guests get those that their devices need; see [`Modules`]. Replaces earlier ones.
    pub fn modules(mut self, modules: Modules) -> Self {
        self.modules = Some(modules);
        self
    }

    /// Checks that the kernel was built with everything in `needs`.
    ///
    /// Those are symbols of its configuration such as `CONFIG_VIRTIO_BLK`, with or without the prefix. Each must be
    /// built in (`=y`) or a module (`=m`). Never blocks.
    ///
    /// The configuration is what [`Kernel::open`] found embedded in a `vmlinux` (`CONFIG_IKCONFIG`), or in a file of at
    /// most 1 MiB in the same directory. That is `config-VERSION` for a kernel `vmlinuz-VERSION`, or `config`. The
    /// payload of a `vmlinuz` is compressed and not looked into. A configuration is believed, so this finds mistakes,
    /// not lies.
    ///
    /// # Errors
    /// `Unsupported` names all symbols that are missing. `NotFound` when the configuration is not known, with the paths
    /// that were tried.
    pub fn check(&self, needs: impl IntoIterator<Item = impl AsRef<str>>) -> Result<()> {
        self.loaded.configuration.check(needs)
    }

    /// Whether it is known to take devices from the command line.
    pub(crate) fn takes_devices_from_cmdline(&self) -> bool {
        self.loaded.configuration.has("VIRTIO_MMIO_CMDLINE_DEVICES")
    }

    /// Whether it is known to find devices of this machine without any module.
    pub(super) fn has_built_in_transport(&self) -> bool {
        let transport = [("virtio_mmio", "VIRTIO_MMIO")];
        self.loaded.configuration.is_known() && self.loaded.configuration.check_drivers(&transport, false).is_ok()
    }

    /// Returns what records the pages that guests of this kernel write.
    pub(crate) fn dirty_page_recorder(&self) -> DirtyPageRecorder {
        DirtyPageRecorder(self.loaded.clone())
    }

    /// What is needed of its modules; nothing when it has none.
    ///
    /// # Errors
    /// As [`Modules::pack`].
    pub(crate) fn pack_modules(&self, needs: &[Need]) -> Result<Packed> {
        let pack = |modules: &Modules| modules.pack(needs, self.loaded.release.as_deref());
        self.modules.as_ref().map_or_else(|| Ok(Packed::default()), pack).doing(|| "Kernel::modules")
    }

    /// Checks that the kernel has these drivers, as far as its configuration is known.
    ///
    /// # Errors
    /// `Unsupported` names what it lacks, or has in modules that were not given.
    #[cfg(feature = "container")]
    pub(crate) fn check_drivers(&self, needs: &[Need]) -> Result<()> {
        self.loaded.configuration.check_drivers(&Need::drivers(needs), self.modules.is_some()).doing(|| "kernel")
    }

    /// The same with all that these modules are in its initramfs already.
    pub(crate) fn with_packed(mut self, packed: &Packed) -> Self {
        self.modules = None;
        if !packed.is_empty() {
            self.initramfs = Some(packed.add_to(self.initramfs.take().unwrap_or_default()));
        }
        self
    }

    /// The command line as it was set.
    pub(crate) fn text(&self) -> &str {
        &self.cmdline
    }

    /// The initramfs as it was set, or an empty one.
    #[cfg(feature = "container")]
    pub(crate) fn initramfs_or_default(&self) -> Initramfs {
        self.initramfs.clone().unwrap_or_default()
    }

    /// Where its modules lie, if it has any.
    #[cfg(test)]
    pub(super) fn modules_directory(&self) -> Option<PathBuf> {
        self.modules.as_ref().map(|modules| modules.root().to_owned())
    }

    /// As [`Kernel::open`], from an open file that nothing lies beside.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn read(file: &mut File) -> Result<Self> {
        load(file).map(Self::new)
    }
}

pub(super) fn corrupt(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, text.into())
}

fn load(file: &mut File) -> Result<Loaded> {
    if !file.metadata()?.is_file() {
        return Err(Error::new(ErrorKind::InvalidConfig, "not a regular file"));
    }
    protocol::open(file)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tiny::{elf, vmlinuz};
    use super::*;

    /// A file that goes away with its test.
    pub(crate) struct Temp(pub PathBuf);

    impl Temp {
        pub(crate) fn new(name: &str, bytes: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("cofferdam-kernel-{name}-{}", std::process::id()));
            std::fs::write(&path, bytes).unwrap();
            Self(path)
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    pub(crate) fn open(name: &str, bytes: &[u8]) -> Result<Kernel> {
        Kernel::open(&Temp::new(name, bytes).0)
    }

    #[test]
    fn a_kernel_of_bytes_is_the_same_as_that_of_a_file() {
        let bytes = elf(b"\xf4");
        let (one, other) = (Kernel::from_bytes(&bytes).unwrap(), open("bytes", &bytes).unwrap());
        assert_eq!(one.loaded.end, other.loaded.end);
        assert!(Kernel::from_bytes(&vmlinuz(b"\xf4")).unwrap().loaded.entry.has_header());
        let error = Kernel::from_bytes(b"no kernel, and longer than a head").unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().starts_with("opening kernel from bytes: "));
    }

    #[test]
    fn files_that_cannot_be_opened_say_so() {
        assert_eq!(Kernel::open("/nonexistent/vmlinux").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(Kernel::open("/tmp").unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}
