//! [`Kernel`]: a Linux kernel, opened and checked once, booted any number of times.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
#[cfg(test)]
use std::path::PathBuf;
use std::sync::Arc;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};

use super::find::Places;
use super::ikconfig::Configuration;
use super::{Initramfs, Modules, Need, Packed};
use crate::arch::{EntryPoint, layout};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::memory::{GuestAddress, GuestMemory, MemoryImage};
use crate::sys;

/// A kernel must fit below this guest address. Real ones end far below; the space costs nothing unless used.
const IMAGE_SPACE: u64 = 1 << 30;
/// `xloadflags`: the kernel has a 64-bit entry point at 0x200 (Linux x86 boot protocol, 1.3).
const XLF_KERNEL_64: u16 = 1;
/// Where that entry point is, from where the kernel was loaded (Linux x86 boot protocol, 1.4).
const ENTRY_64: u64 = 0x200;

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
/// Takes an x86_64 ELF `vmlinux` or a `bzImage` (`vmlinuz`) as distributions ship them. Opening loads the file into a
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
    pub(super) loaded: Arc<Loaded>,
    pub(super) cmdline: String,
    pub(super) initramfs: Option<Initramfs>,
    modules: Option<Modules>,
    pvh: bool,
}

/// What came of a kernel file.
#[derive(Debug)]
pub(super) struct Loaded {
    pub image: MemoryImage,
    pub entry: EntryPoint,
    /// Its PVH entry point, if it has one.
    pub pvh: Option<GuestAddress>,
    /// Where the kernel will have unpacked itself; the initramfs must lie above.
    pub end: u64,
    /// A bzImage's own header, to be handed back to it.
    pub header: Option<setup_header>,
    pub configuration: Configuration,
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
    /// - `Corrupt` when it is damaged, or neither an x86_64 ELF kernel nor a 64-bit bzImage.
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
        Self { loaded: Arc::new(loaded), cmdline: String::new(), initramfs: None, modules: None, pvh: false }
    }

    /// Opens a kernel from its bytes, such as those of the crate `cofferdam-kernel`.
    ///
    /// They are what [`Kernel::open`] takes as a file, and are copied. Nothing lies beside them, so a `bzImage` has
    /// no configuration that is known.
    ///
    /// # Errors
    /// - `Corrupt` when it is damaged, or neither an x86_64 ELF kernel nor a 64-bit bzImage.
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

    /// Sets whether a `vmlinux` is started by its PVH entry point (`CONFIG_PVH`).
    ///
    /// It is for comparing with other hypervisors, which do so. By default only kernels without a 64-bit entry point at their load address are started
    /// so, such as some of other systems. Linux boots faster by its 64-bit entry point, where it is entered in the mode
    /// in which it runs.
    pub fn pvh(mut self, pvh: bool) -> Self {
        self.pvh = pvh;
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
    /// payload of a `bzImage` is compressed and not looked into. A configuration is believed, so this finds mistakes,
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

    /// Where it is entered.
    ///
    /// # Errors
    /// `Unsupported` when it shall be entered in a way that it has not.
    pub(super) fn entry(&self) -> Result<EntryPoint> {
        if !self.pvh {
            return Ok(self.loaded.entry);
        }
        let none = || Error::new(ErrorKind::Unsupported, "Kernel::pvh: this kernel has no PVH entry point");
        self.loaded.pvh.map(EntryPoint::Pvh).ok_or_else(none)
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

fn corrupt(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, text.into())
}

fn load(file: &mut File) -> Result<Loaded> {
    if !file.metadata()?.is_file() {
        return Err(Error::new(ErrorKind::InvalidConfig, "not a regular file"));
    }
    let mut head = [0; 20];
    file.read_exact(&mut head).map_err(|_| corrupt("too short to be a kernel"))?;
    file.seek(SeekFrom::Start(0))?;
    match head {
        // ELF, 64 bits, little-endian, machine 62: x86-64.
        [0x7f, b'E', b'L', b'F', 2, 1, .., 62, 0] => load_elf(file),
        [0x7f, b'E', b'L', b'F', ..] => Err(corrupt("an ELF file, but not for x86_64")),
        _ => match packed(&head) {
            Some(how) => Err(corrupt(format!("it is compressed with {how}: unpack it first"))),
            None => load_bzimage(file),
        },
    }
}

fn load_elf(file: &mut File) -> Result<Loaded> {
    let (image, result) = MemoryImage::build(IMAGE_SPACE, |memory: &GuestMemory| {
        Elf::load(memory.inner(), None, file, Some(layout::HIGH_MEMORY.inner()))
            .map_err(|e| corrupt(format!("not a usable ELF kernel: {e}")))
    })?;
    let inside = |at: &GuestAddress| (image.start()..image.end()).contains(&at.0);
    let pvh = match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(at) => Some(GuestAddress(at.0)).filter(inside),
        _ => None,
    };
    let at = GuestAddress(result.kernel_load.0);
    let entry = match pvh {
        _ if inside(&at) => EntryPoint::Linux64(at),
        Some(pvh) => EntryPoint::Pvh(pvh),
        None => return Err(corrupt(format!("its entry point {at} lies outside what it loads"))),
    };
    let end = result.kernel_end.max(image.end());
    let image = match data(file)? {
        Some(at) => image.with_data(GuestAddress(at)),
        None => image,
    };
    let configuration = Configuration::embedded(&image);
    Ok(Loaded { image, entry, pvh, end, header: None, configuration, release: None })
}

/// Where the first writable segment of an ELF file is loaded (System V ABI, gABI 4.1, 5).
fn data(file: &File) -> Result<Option<u64>> {
    const LOAD: u32 = 1;
    const WRITABLE: u32 = 2;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    let [at, count] = [u64_at(&header, 32), u64_at(&header, 56) & 0xffff];
    let mut first = None;
    for index in 0..count {
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, at.saturating_add(index * 56))?;
        let (kind_and_flags, address) = (u64_at(&segment, 0), u64_at(&segment, 24));
        if kind_and_flags as u32 == LOAD && (kind_and_flags >> 32) as u32 & WRITABLE != 0 {
            first = Some(first.map_or(address, |it: u64| it.min(address)));
        }
    }
    Ok(first)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|it| it.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn load_bzimage(file: &mut File) -> Result<Loaded> {
    let (image, result) = MemoryImage::build(IMAGE_SPACE, |memory: &GuestMemory| {
        BzImage::load(memory.inner(), None, file, Some(layout::HIGH_MEMORY.inner()))
            .map_err(|e| corrupt(format!("neither an ELF kernel nor a bzImage: {e}")))
    })?;
    let header = result.setup_header.ok_or_else(|| corrupt("a bzImage without a header"))?;
    if header.version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 {
        let version = header.version;
        return Err(corrupt(format!(
            "a bzImage without a 64-bit entry point (boot protocol {:x}.{:02x})",
            version >> 8,
            version & 0xff
        )));
    }
    check_length(file, header.setup_sects, header.syssize)?;
    let load = result.kernel_load.0;
    let entry = load + ENTRY_64;
    if entry >= result.kernel_end {
        return Err(corrupt(format!("a bzImage that ends before its entry point {entry:#x}")));
    }
    // Where it unpacks itself and how much it needs there (Linux x86 boot protocol, 1.3, init_size).
    let end = load.max(header.pref_address).saturating_add(header.init_size.into()).max(image.end());
    let configuration = Configuration::default();
    let release = release(file, header.kernel_version);
    let entry = EntryPoint::Linux64(GuestAddress(entry));
    Ok(Loaded { image, entry, pvh: None, end, header: Some(header), configuration, release })
}

/// Returns whether all of a bzImage is there that its header describes: the setup's sectors and the system. See the
/// Linux x86 boot protocol, 1.1 and 1.3 (setup_sects, syssize).
///
/// # Errors
/// `Corrupt` with both lengths.
fn check_length(file: &File, setup_sects: u8, syssize: u32) -> Result<()> {
    let sectors = 1 + u64::from(if setup_sects == 0 { 4 } else { setup_sects });
    let (needed, there) = (sectors * 512 + u64::from(syssize) * 16, file.metadata()?.len());
    match there < needed {
        true => Err(corrupt(format!("it is cut off: {there} bytes, of {needed} that its header speaks of"))),
        false => Ok(()),
    }
}

/// How a file is compressed that begins so, as far as kernels are.
fn packed(head: &[u8]) -> Option<&'static str> {
    const MAGICS: [(&[u8], &str); 7] = [
        (&[0x1f, 0x8b], "gzip"),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], "xz"),
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (b"BZh", "bzip2"),
        (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
        (&[0x5d, 0, 0], "lzma"),
        (&[0x89, b'L', b'Z', b'O'], "lzo"),
    ];
    MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, name)| *name)
}

/// The first word of the version in a bzImage; its header says where that is, from 0x200 on (Linux x86 boot protocol, 1.3,
/// kernel_version).
fn release(file: &File, at: u16) -> Option<String> {
    let mut text = [0; 128];
    let len = file.read_at(&mut text, 0x200 + u64::from(at)).ok().filter(|_| at != 0)?;
    let word = text.get(..len)?.split(|byte| matches!(byte, b' ' | 0)).next()?;
    String::from_utf8(word.to_vec()).ok().filter(|word| !word.is_empty())
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tiny::{bzimage, elf, elf_with_pvh};
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

    fn open(name: &str, bytes: &[u8]) -> Result<Kernel> {
        Kernel::open(&Temp::new(name, bytes).0)
    }

    #[test]
    fn an_elf_kernel_is_loaded_where_it_asks() {
        let kernel = open("elf", &elf(b"\xf4")).unwrap();
        assert_eq!(kernel.loaded.entry, EntryPoint::Linux64(GuestAddress(0x10_0000)));
        assert_eq!(kernel.loaded.image.data_len(), 4096);
        assert_eq!(kernel.loaded.image.data().0, kernel.loaded.image.end(), "no segment is writable");
        let mut writable = elf(b"\xf4");
        writable[68] = 6;
        assert_eq!(open("elf-writable", &writable).unwrap().loaded.image.data().0, 0x10_0000);
        // A segment of nothing may be anywhere.
        writable = elf_with_pvh(b"\xf4");
        writable[120] = 1;
        writable[124] = 6;
        writable[144..152].fill(0xff);
        writable[152..160].fill(0);
        let kernel = open("elf-writable-far", &writable).unwrap();
        assert_eq!(kernel.loaded.image.data().0, kernel.loaded.image.end());
    }

    #[test]
    fn a_bzimage_is_loaded_where_it_asks_and_keeps_room_to_unpack() {
        let kernel = open("bzimage", &bzimage(b"\xf4")).unwrap();
        assert_eq!((kernel.loaded.entry, kernel.loaded.end), (EntryPoint::Linux64(GuestAddress(0x10_0200)), 0x10_1000));
        assert!(kernel.loaded.header.is_some());
    }

    #[test]
    fn the_64_bit_entry_point_is_preferred_and_the_pvh_one_taken_where_there_is_no_other() {
        let at = GuestAddress(0x10_0000);
        let both = open("pvh", &elf_with_pvh(&[0xf4; 64])).unwrap();
        assert_eq!(
            (both.entry().unwrap(), both.pvh(true).entry().unwrap()),
            (EntryPoint::Linux64(at), EntryPoint::Pvh(at))
        );
        let mut virtual_entry = elf_with_pvh(&[0xf4; 64]);
        virtual_entry[24..32].copy_from_slice(&0xffff_ffff_8010_0000_u64.to_le_bytes());
        assert_eq!(open("pvh-only", &virtual_entry).unwrap().entry().unwrap(), EntryPoint::Pvh(at));
        let error = open("pvh-none", &elf(b"\xf4")).unwrap().pvh(true).entry().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let end = virtual_entry.len();
        virtual_entry[end - 4..].copy_from_slice(&0x4000_0000_u32.to_le_bytes());
        assert_eq!(open("pvh-outside", &virtual_entry).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn truncated_or_compressed_kernel_is_named() {
        let whole = bzimage(b"\xf4");
        assert!(open("whole", &whole).is_ok());
        let mut cut = whole.clone();
        // More than there is (Linux x86 boot protocol, 1.3, syssize).
        cut[0x1f4..0x1f8].copy_from_slice(&(whole.len() as u32).to_le_bytes());
        let error = open("cut", &cut).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("cut off"), "{error}");
        for (name, head) in
            [("gzip", &[0x1f, 0x8b][..]), ("zstd", &[0x28, 0xb5, 0x2f, 0xfd]), ("lz4", &[2, 0x21, 0x4c, 0x18])]
        {
            let error = open(name, &[head, &[0; 100]].concat()).unwrap_err();
            assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(name), "{error}");
        }
    }

    #[test]
    fn damaged_files_are_refused_with_what_is_wrong() {
        let whole = elf(&[0xf4; 64]);
        let packed = bzimage(&[0xf4; 64]);
        let damage = |file: &[u8], at: usize, bytes: &[u8]| {
            let mut file = file.to_vec();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            file
        };
        let with = |at: usize, bytes: &[u8]| damage(&whole, at, bytes);
        let packed_with = |at: usize, bytes: &[u8]| damage(&packed, at, bytes);
        let cases = [
            ("empty", vec![]),
            ("text", b"#!/bin/sh\necho this is not a kernel at all".repeat(100)),
            ("truncated", whole[..150].to_vec()),
            ("truncated-headers", whole[..80].to_vec()),
            ("arm64", with(18, &[183])),
            ("elf32", with(4, &[1])),
            ("absurd-address", with(88, &(1u64 << 60).to_le_bytes())),
            ("absurd-size", with(96, &u64::MAX.to_le_bytes())),
            ("absurd-memsz", with(104, &u64::MAX.to_le_bytes())),
            ("absurd-headers", with(32, &u64::MAX.to_le_bytes())),
            ("many-headers", with(56, &[0xff, 0xff])),
            ("entry-elsewhere", with(24, &0x4000_0000u64.to_le_bytes())),
            ("entry-low", with(24, &0u64.to_le_bytes())),
            ("bzimage-header-truncated", packed[..0x208].to_vec()),
            ("bzimage-truncated", packed[..1024 + 0x200].to_vec()),
            ("bzimage-without-kernel", packed[..1000].to_vec()),
            ("bzimage-all-setup", packed_with(0x1f1, &[0xff])),
            ("bzimage-magic", packed_with(0x202, b"SrdH")),
            ("bzimage-old", packed_with(0x206, &[4, 2])),
            ("bzimage-32-bit", packed_with(0x236, &[0])),
            ("bzimage-low", packed_with(0x214, &0x1000u32.to_le_bytes())),
            ("bzimage-high", packed_with(0x214, &0xffff_f000u32.to_le_bytes())),
        ];
        for (name, bytes) in cases {
            let error = open(name, &bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
            assert!(error.to_string().starts_with("opening kernel "), "{error}");
        }
    }

    #[test]
    fn a_kernel_of_bytes_is_the_same_as_that_of_a_file() {
        let bytes = elf(b"\xf4");
        let (one, other) = (Kernel::from_bytes(&bytes).unwrap(), open("bytes", &bytes).unwrap());
        assert_eq!((one.loaded.entry, one.loaded.end), (other.loaded.entry, other.loaded.end));
        assert!(Kernel::from_bytes(&bzimage(b"\xf4")).unwrap().loaded.header.is_some());
        let error = Kernel::from_bytes(b"no kernel, and longer than a head").unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().starts_with("opening kernel from bytes: "));
    }

    #[test]
    fn files_that_cannot_be_opened_say_so() {
        assert_eq!(Kernel::open("/nonexistent/vmlinux").unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(Kernel::open("/tmp").unwrap_err().kind(), ErrorKind::InvalidConfig);
    }
}
