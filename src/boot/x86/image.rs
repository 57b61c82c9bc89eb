//! Kernel files: an ELF `vmlinux`, or a bzImage.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};

use crate::arch::{EntryPoint, layout};
use crate::boot::Kernel;
use crate::boot::ikconfig::Configuration;
use crate::boot::kernel::{IMAGE_SPACE, Loaded, corrupt};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{GuestAddress, GuestMemory, MemoryImage};

/// `xloadflags`: the kernel has a 64-bit entry point at 0x200 (Linux x86 boot protocol, 1.3).
const XLF_KERNEL_64: u16 = 1;
/// Where that entry point is, from where the kernel was loaded (Linux x86 boot protocol, 1.4).
const ENTRY_64: u64 = 0x200;

/// How a kernel can be entered, as its file says.
#[derive(Debug)]
pub(in crate::boot) struct KernelEntry {
    pub(super) entry: EntryPoint,
    /// Its PVH entry point, if it has one.
    pub(super) pvh: Option<GuestAddress>,
    /// A bzImage's own header, to be handed back to it.
    pub(super) header: Option<setup_header>,
}

#[cfg(test)]
impl KernelEntry {
    /// Whether it is a bzImage's.
    pub(in crate::boot) fn has_header(&self) -> bool {
        self.header.is_some()
    }
}

/// How the embedder wants a kernel to be entered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub(crate) struct EntryChoice {
    pvh: bool,
}

impl Kernel {
    /// Sets whether a `vmlinux` is started by its PVH entry point (`CONFIG_PVH`).
    ///
    /// It is for comparing with other hypervisors, which do so. By default only kernels without a 64-bit entry point at their load address are started
    /// so, such as some of other systems. Linux boots faster by its 64-bit entry point, where it is entered in the mode
    /// in which it runs.
    pub fn pvh(mut self, pvh: bool) -> Self {
        self.choice.pvh = pvh;
        self
    }

    /// Where it is entered.
    ///
    /// # Errors
    /// `Unsupported` when the kernel lacks the entry point that the embedder wants.
    pub(super) fn entry(&self) -> Result<EntryPoint> {
        if !self.choice.pvh {
            return Ok(self.loaded.entry.entry);
        }
        let none = || Error::new(ErrorKind::Unsupported, "Kernel::pvh: this kernel has no PVH entry point");
        self.loaded.entry.pvh.map(EntryPoint::Pvh).ok_or_else(none)
    }
}

/// Opens a kernel, by what its first bytes say that it is.
pub(in crate::boot) fn open(file: &mut File) -> Result<Loaded> {
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
    let entry = KernelEntry { entry, pvh, header: None };
    Ok(Loaded { image, entry, end, configuration, release: None })
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
    let entry = KernelEntry { entry: EntryPoint::Linux64(GuestAddress(entry)), pvh: None, header: Some(header) };
    Ok(Loaded { image, entry, end, configuration, release })
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
mod tests {
    use super::super::tiny::{elf, elf_with_pvh, vmlinuz};
    use super::*;
    use crate::boot::kernel::tests::open;

    #[test]
    fn an_elf_kernel_is_loaded_where_it_asks() {
        let kernel = open("elf", &elf(b"\xf4")).unwrap();
        assert_eq!(kernel.loaded.entry.entry, EntryPoint::Linux64(GuestAddress(0x10_0000)));
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
        let kernel = open("bzimage", &vmlinuz(b"\xf4")).unwrap();
        assert_eq!(
            (kernel.loaded.entry.entry, kernel.loaded.end),
            (EntryPoint::Linux64(GuestAddress(0x10_0200)), 0x10_1000)
        );
        assert!(kernel.loaded.entry.header.is_some());
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
        let whole = vmlinuz(b"\xf4");
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
        let packed = vmlinuz(&[0xf4; 64]);
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
}
