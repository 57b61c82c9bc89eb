//! Directories of modules, good, damaged and hostile. No KVM.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use flate2::Compression;
use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

/// A directory that goes away with its test.
struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-modules-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(path.join("kernel")).unwrap();
        Self(path).put("modules.builtin", "kernel/drivers/virtio/virtio_ring.ko\n")
    }

    fn put(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self
    }

    /// `modules.dep`, and a module of its own name for everything in it.
    fn with(self, dep: &str) -> Self {
        let names = dep.lines().filter_map(|line| line.split(':').next()).map(str::to_owned).collect::<Vec<_>>();
        names.iter().fold(self, |directory, name| directory.put(name, module(name))).put("modules.dep", dep)
    }

    fn open(&self) -> Result<Modules> {
        Modules::open(&self.0)
    }

    /// The paths of what is packed for one name.
    fn pack(&self, name: &'static str) -> Result<Vec<String>> {
        let packed = self.open()?.pack(&[Need::required(name, "")], None)?;
        Ok(packed.paths().map(|(path, _)| path.trim_start_matches("/cofferdam.modules/").to_owned()).collect())
    }

    fn refused(&self, name: &'static str, kind: ErrorKind, word: &str) {
        let error = self.pack(name).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What begins like a module, with `text` in it.
fn module(text: &str) -> Vec<u8> {
    [b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\x3e\0", text.as_bytes()].concat()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// `module("packed")`, by `xz --check=crc32 --lzma2=dict=1MiB`, as the kernel's build packs, and by `zstd`.
const XZ: &[u8] = b"\xfd7zXZ\0\0\x01i\"\xde6\x02\0!\x01\x10\0\0\0\xa8p\x8e\x86\xe0\0\x19\0\x17]\0?\x91E\x84h=\x89\xa6\xda\x9c\xa6\xac@~\xdc\xe8\xbf\x16\x1fNy\xe8\0\0\0\xcaX\xcbh\0\x01/\x1a<t\xf8\xcf\x90B\x99\x0d\x01\0\0\0\0\x01YZ";
const ZST: &[u8] = b"(\xb5/\xfd$\x1a\xd1\0\0\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0>\0packed\x80i\x0b\xad";

const MMIO: &str = "kernel/virtio-mmio.ko: kernel/virtio.ko\nkernel/virtio.ko:\n";

#[test]
fn modules_follow_their_dependencies_without_built_in_ones() {
    let dep = "kernel/ext4.ko: kernel/jbd2.ko kernel/crc16.ko\nkernel/jbd2.ko:\nkernel/crc16.ko:\n\
        kernel/virtio-blk.ko: kernel/virtio.ko kernel/virtio_ring.ko\n";
    let directory = TempDir::new("order").with(&(dep.to_owned() + MMIO));
    let modules = directory.open().unwrap().with("crc16").with("virtio-ring");
    let needs = ["virtio_mmio", "virtio_blk", "ext4"].map(|name| Need::required(name, ""));
    let packed = modules.pack(&needs, None).unwrap();
    let names: Vec<_> = packed.paths().map(|(path, _)| path[23..].to_owned()).collect();
    assert_eq!(names, ["virtio.ko", "virtio_mmio.ko", "virtio_blk.ko", "jbd2.ko", "crc16.ko", "ext4.ko"]);
    assert!(packed.paths().all(|(path, required)| required && path.starts_with("/cofferdam.modules/00")));
}

#[test]
fn missing_required_modules_are_named_and_optional_ones_skipped() {
    let directory = TempDir::new("missing").with(MMIO);
    directory.refused("virtio_blk", ErrorKind::Unsupported, "no module virtio_blk");
    let packed =
        directory.open().unwrap().pack(&[Need::nice("virtio_rng", ""), Need::nice("virtio", "")], None).unwrap();
    assert_eq!(packed.paths().collect::<Vec<_>>(), [("/cofferdam.modules/000-virtio.ko".into(), false)]);
    let error = directory.open().unwrap().with("erofs").pack(&[], None).unwrap_err();
    assert!(error.to_string().contains("no module erofs"), "{error}");
}

#[test]
fn soft_dependencies_come_first_if_present() {
    let directory = TempDir::new("soft")
        .with("kernel/ext4.ko:\nkernel/crc32c_generic.ko:\nkernel/crc32c-intel.ko:\nkernel/other.ko:\n")
        .put("modules.softdep", "softdep ext4 pre: crc32c nothing ext4 post: other\n# a comment\n")
        .put(
            "modules.alias",
            "alias crc32c crc32c_intel\nalias crc32c crc32c_generic\nalias crc* other\nalias broken\n",
        );
    assert_eq!(directory.pack("ext4").unwrap(), ["000-crc32c_intel.ko", "001-crc32c_generic.ko", "002-ext4.ko"]);
    let packed = directory.open().unwrap().pack(&[Need::required("ext4", "")], None).unwrap();
    assert_eq!(packed.paths().map(|(_, required)| required).collect::<Vec<_>>(), [false, false, true]);
}

#[test]
fn compressed_modules_are_unpacked_by_content() {
    for (n, bytes) in [&module("packed"), &gzip(&module("packed")), XZ, ZST].into_iter().enumerate() {
        let directory = TempDir::new(&format!("packed-{n}")).with("kernel/one.ko.xz:\n").put("kernel/one.ko.xz", bytes);
        let modules = directory.open().unwrap();
        let packed = modules.pack(&[Need::required("one", "")], None).unwrap();
        assert_eq!(*packed.0[0].contents, module("packed"));
        // Read once for all.
        std::fs::remove_file(directory.0.join("kernel/one.ko.xz")).unwrap();
        let again = modules.pack(&[Need::required("one", "")], None).unwrap();
        assert!(Arc::ptr_eq(&packed.0[0].contents, &again.0[0].contents));
    }
}

#[test]
fn module_directory_without_its_lists_is_rejected() {
    let directory = TempDir::new("lists");
    let error = directory.open().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("there is no modules.dep; depmod makes it"), "{error}");
    let directory = directory.with(MMIO);
    std::fs::remove_file(directory.0.join("modules.builtin")).unwrap();
    assert!(directory.open().unwrap_err().to_string().ends_with("there is no modules.builtin"));
    assert_eq!(Modules::open("/nonexistent").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(Modules::open("/proc/self/comm").unwrap_err().kind(), ErrorKind::InvalidConfig);
}

#[test]
fn damaged_lists_are_refused_by_line() {
    for (n, line) in
        ["no colon", "../x.ko:", "/etc/x.ko:", "a//x.ko:", "kernel/x.txt:", "kernel/.ko:"].iter().enumerate()
    {
        let dep = format!("kernel/fine.ko:\n{line}\n");
        let error = TempDir::new(&format!("line-{n}")).put("modules.dep", dep).open().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{line}");
        assert!(error.to_string().contains("modules.dep: line 2: "), "{error}");
    }
    let large = TempDir::new("large").put("modules.dep", vec![b'\n'; (16 << 20) + 1]);
    assert!(large.open().unwrap_err().to_string().contains("larger than 16 MiB"));
    let none = TempDir::new("directory").put("modules.dep", MMIO);
    std::fs::create_dir(none.0.join("modules.alias")).unwrap();
    assert_eq!(none.open().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn dependency_cycles_and_long_chains_end() {
    let circle = "kernel/a.ko: kernel/b.ko\nkernel/b.ko: kernel/c.ko\nkernel/c.ko: kernel/a.ko\n";
    TempDir::new("circle").with(circle).refused("a", ErrorKind::Corrupt, "a needs b needs c needs a, a circle");
    let chain: String = (0..10_000).map(|n| format!("kernel/m{n}.ko: kernel/m{}.ko\n", n + 1)).collect();
    let directory = TempDir::new("chain").put("modules.dep", chain);
    directory.refused("m0", ErrorKind::Corrupt, "more than 256 modules");
    let dangling = TempDir::new("dangling").with("kernel/a.ko: kernel/b.ko\n");
    dangling.refused("a", ErrorKind::Corrupt, "a needs b, which is not there");
}

#[test]
fn module_paths_outside_the_directory_are_not_read() {
    let directory = TempDir::new("outside").with(MMIO);
    std::fs::remove_file(directory.0.join("kernel/virtio.ko")).unwrap();
    symlink("/proc/self/exe", directory.0.join("kernel/virtio.ko")).unwrap();
    directory.refused("virtio", ErrorKind::Corrupt, "a symbolic link out of the directory");
    std::fs::remove_file(directory.0.join("modules.builtin")).unwrap();
    symlink("/etc/passwd", directory.0.join("modules.builtin")).unwrap();
    directory.refused("virtio", ErrorKind::Corrupt, "not a file of this directory");
}

#[test]
fn links_inside_the_directory_are_followed() {
    let directory = TempDir::new("inside").with("kernel/one.ko:\n");
    std::fs::rename(directory.0.join("kernel/one.ko"), directory.0.join("two.ko")).unwrap();
    symlink("../two.ko", directory.0.join("kernel/one.ko")).unwrap();
    assert_eq!(directory.pack("one").unwrap(), ["000-one.ko"]);
}

#[test]
fn damaged_modules_are_named() {
    let bomb = gzip(&vec![0; (64 << 20) + 1]);
    let whole = gzip(&module("whole"));
    // A window of 2^41 bytes, of which nothing may be reserved (RFC 8878, 3.1.1.1.2).
    let window = b"\x28\xb5\x2f\xfd\x00\xf8\x03\x00\x10\x01";
    let cases: [&[u8]; 9] =
        [b"", b"#!/bin/sh", b"\x7fELF\x01\x01", &bomb, &whole[..20], &XZ[..40], &ZST[..14], window, &module("")[..19]];
    for (n, bytes) in cases.into_iter().enumerate() {
        let directory = TempDir::new(&format!("damaged-{n}")).with("kernel/one.ko:\n").put("kernel/one.ko", bytes);
        directory.refused("one", ErrorKind::Corrupt, "/kernel/one.ko: ");
    }
    let directory = TempDir::new("gone").with("kernel/one.ko:\n");
    std::fs::remove_file(directory.0.join("kernel/one.ko")).unwrap();
    directory.refused("one", ErrorKind::NotFound, "/kernel/one.ko: ");
    std::fs::create_dir(directory.0.join("kernel/one.ko")).unwrap();
    directory.refused("one", ErrorKind::Corrupt, "not a regular file");
}

#[test]
fn modules_of_another_kernel_are_refused_with_both_versions() {
    let made = module("\0license=GPL\0vermagic=6.1.0-18-amd64 SMP preempt mod_unload\0");
    let directory = TempDir::new("release").with("kernel/one.ko:\n").put("kernel/one.ko", made);
    let pack = |release| directory.open().unwrap().pack(&[Need::required("one", "")], release);
    pack(Some("6.1.0-18-amd64")).unwrap();
    pack(None).unwrap();
    let error = pack(Some("6.12.9")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert_eq!(error.to_string(), "the kernel is 6.12.9, but these modules are for 6.1.0-18-amd64");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn arbitrary_module_lists_never_panic(
        dep in "(kernel/[a-c]\\.ko: ?(kernel/[a-d]\\.ko ?){0,3}\n){0,5}.{0,20}",
        soft in "(softdep [a-c] pre: ?([a-d] ?){0,3}\n){0,3}", noise in proptest::collection::vec(any::<u8>(), 0..200), kind in 0usize..4,
    ) {
        let start: [&[u8]; 4] = [b"\x1f\x8b\x08\0\0\0\0\0\0\0", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b""];
        let directory = TempDir::new("any").put("kernel/a.ko", [start[kind], &noise].concat()).put("kernel/b.ko", module("b"));
        let directory = directory.put("modules.dep", &dep).put("modules.softdep", soft);
        for name in ["a", "b", "c"] {
            let _ = directory.pack(name);
        }
    }
}
