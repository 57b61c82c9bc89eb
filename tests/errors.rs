//! What a builder refuses before it asks the hypervisor for anything: so these need no KVM. Each error names the method
//! and the value, or the file, and nothing is left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a failure here is the test's")]

use std::fs;
use std::path::PathBuf;

use cofferdam::disk::Overlay;
use cofferdam::kernel::{Initramfs, Modules};
use cofferdam::vsock::Vsock;
use cofferdam::{Disk, ErrorKind, Kernel, Size, Vm, VmBuilder};

#[path = "../src/boot/x86/tiny.rs"]
mod tiny;

/// A directory that goes away with its test.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-errors-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A kernel that is never run here.
    fn kernel(&self) -> Kernel {
        let path = self.0.join("kernel");
        fs::write(&path, tiny::elf(b"\xf4")).unwrap();
        Kernel::open(path).unwrap()
    }

    fn vm(&self) -> VmBuilder {
        Vm::builder(self.kernel()).memory(Size::mib(16))
    }

    /// A directory of modules in which there are none.
    fn modules(&self) -> Modules {
        for list in ["modules.dep", "modules.builtin"] {
            fs::write(self.0.join(list), "").unwrap();
        }
        Modules::open(&self.0).unwrap()
    }

    fn image(&self, len: usize) -> PathBuf {
        let path = self.0.join(format!("{len}.img"));
        fs::write(&path, vec![0; len]).unwrap();
        path
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn refused(builder: VmBuilder, kind: ErrorKind, word: &str) {
    let descriptors = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let error = builder.start().map(drop).expect_err(word);
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().starts_with("starting VM: ") && error.to_string().contains(word), "{error}");
    assert!(descriptors() <= before, "descriptors are left behind");
}

/// One test, as descriptors are counted.
#[test]
fn invalid_configs_name_the_method() {
    let temp = Temp::new("config");
    let invalid = ErrorKind::InvalidConfig;
    refused(temp.vm().vcpus(0), invalid, "vcpus: 0");
    refused(temp.vm().vcpus(255), invalid, "vcpus: 255");
    refused(temp.vm().vcpus(u32::MAX), invalid, "vcpus");
    refused(temp.vm().memory(Size::bytes(0)), invalid, "memory: 0 bytes");
    refused(temp.vm().memory(Size::bytes(5_000_001)), invalid, "4 KiB");
    refused(temp.vm().memory(Size::gib(u64::MAX)), invalid, "memory");
    let long = Vm::builder(temp.kernel().cmdline("x".repeat(2000)));
    refused(long, invalid, "Kernel::cmdline: ");
    refused(Vm::builder(temp.kernel().cmdline("a\nb")), invalid, "printable");
    refused(Vm::builder(temp.kernel().cmdline("virtio_mmio.device=1@2:3")), invalid, "virtio_mmio.device");
    let large = Initramfs::new().file("/x", 0o644, vec![0; 17 << 20]);
    refused(Vm::builder(temp.kernel().initramfs(large)).memory(Size::mib(16)), invalid, "Kernel::initramfs");
    refused(temp.vm().disk(Disk::file(temp.0.join("none"))), ErrorKind::NotFound, "attaching disk 0: opening disk");
    let good = || Disk::file(temp.image(4096)).read_only(true);
    refused(temp.vm().disk(good()).disk(Disk::file(temp.image(0))), invalid, "attaching disk 1: ");
    refused(temp.vm().disk(Disk::file(temp.image(1000))), invalid, "1000 bytes are not a disk");
    refused(temp.vm().disk(Disk::file(&temp.0)), ErrorKind::Io, "attaching disk 0");
    let space = temp.vm().disk(Disk::scratch(Size::mib(1)).min_free_space(Size::gib(1 << 32)));
    refused(space, ErrorKind::ResourceExhausted, "min_free_space: ");
    let on = |name: &str| Disk::overlay(temp.0.join(name));
    refused(temp.vm().disk(on("none")), ErrorKind::NotFound, "opening base");
    refused(temp.vm().disk(Disk::overlay(temp.image(0))), invalid, "0 bytes are not a disk");
    refused(temp.vm().disk(Disk::overlay(temp.image(1000))), invalid, "1000 bytes are not a disk");
    refused(temp.vm().disk(on("4096.img").size(Size::bytes(512))), invalid, "fewer than the 4096");
    refused(temp.vm().disk(on("4096.img").persist_at(temp.image(8192))), ErrorKind::Corrupt, "not an overlay");
    let kept = temp.0.join("kept");
    let overlay = Overlay::create(&kept, temp.image(4096)).unwrap();
    fs::remove_file(temp.0.join("4096.img")).unwrap();
    temp.image(4096);
    refused(
        temp.vm().disk(on("4096.img").persist_at(&kept)),
        ErrorKind::Incompatible,
        "4096.img is another than it was made for",
    );
    refused(temp.vm().disk(Disk::overlay(&overlay)), ErrorKind::InvalidState, "not frozen");
    let many = (0..30).fold(temp.vm(), |vm, _| vm.disk(good()));
    refused(many, invalid, "interrupt lines");
    refused(temp.vm().vsock(Vsock::new().listen(1).listen(1)), ErrorKind::AlreadyExists, "port 1");
    refused(temp.vm().descriptors(15), invalid, "descriptors: 15: a guest needs 16");
    refused(Vm::builder(temp.kernel().pvh(true)).memory(Size::mib(16)), ErrorKind::Unsupported, "Kernel::pvh: ");
    let modules = temp.modules();
    let kernel = || temp.kernel().modules(modules.clone());
    refused(
        Vm::builder(kernel()).memory(Size::mib(16)),
        ErrorKind::Unsupported,
        "Kernel::modules: the kernel has no module virtio_mmio",
    );
}
