//! What a guest that means harm takes from a neighbour in the same process: the neighbour's work for each second of
//! processor time that it gets, and how long a program takes to start in it, alone and beside each of them.
//!
//! Runs in the lab's virtual time (benches/README.md). Every VM has a control group of the same weight.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;

#[path = "../src/boot/x86/tiny.rs"]
#[allow(dead_code, reason = "tests use more of it")]
mod tiny;

use std::time::{Duration, Instant};

use cofferdam::disk::WritableLayer;
use cofferdam::kernel::Initramfs;
use cofferdam::{Cgroup, Container, ContainerBuilder, Image, Kernel, Process, Size, Vm, VmBuilder};
use common::{cache, figure};

struct Bench {
    kernel: Kernel,
    image: Image,
}

/// What is kept while the neighbour is measured.
enum Hostile {
    Machine(Vm),
    Container(Container, Process),
}

impl Hostile {
    /// Seconds of processor time so far.
    fn cpu_time(&self) -> f64 {
        let vm = match self {
            Self::Machine(vm) => vm,
            Self::Container(container, _) => container.vm(),
        };
        vm.stats().cgroup.expect("its group").cpu_time.as_secs_f64()
    }
}

impl Bench {
    fn container(&self) -> ContainerBuilder {
        let builder = Container::builder(self.image.clone())
            .kernel(self.kernel.clone())
            .memory(Size::mib(192))
            .writable_layer(WritableLayer::new(Size::gib(4)).scratch_dir(std::env::temp_dir()));
        builder.cgroup(Cgroup::new()).start_timeout(Duration::from_secs(300))
    }

    fn machine(&self, vcpus: u32, builder: VmBuilder) -> Hostile {
        Hostile::Machine(builder.vcpus(vcpus).cgroup(Cgroup::new()).start().expect("it starts"))
    }

    fn busybox(&self, script: &str) -> VmBuilder {
        let program = std::fs::read("/bin/busybox").expect("busybox-static: run `make setup`");
        let init = format!("#!/bin/busybox sh\n/bin/busybox --install -s /bin\nmount -t devtmpfs dev /dev\n{script}\n");
        let initramfs = Initramfs::new()
            .directory("/bin", 0o755)
            .directory("/dev", 0o755)
            .character_device("/dev/console", 0o600, (5, 1))
            .file("/bin/busybox", 0o755, program)
            .file("/init", 0o755, init);
        Vm::builder(self.kernel.clone().cmdline("console=hvc0 quiet").initramfs(initramfs)).memory(Size::mib(64))
    }

    fn script(&self, script: &str) -> Hostile {
        let container = self.container().start().expect("it starts");
        let process = container.exec(["sh", "-c", script]).spawn().expect("it runs");
        Hostile::Container(container, process)
    }

    /// A guest without Linux that spins.
    fn miner(&self) -> VmBuilder {
        let path = std::env::temp_dir().join(format!("cofferdam-miner-{}", std::process::id()));
        std::fs::write(&path, tiny::elf(&[0xeb, 0xfe])).expect("a file");
        let kernel = Kernel::open(&path).expect("a kernel");
        let _ = std::fs::remove_file(path);
        Vm::builder(kernel).memory(Size::mib(4))
    }
}

/// Work for each second of processor time, in MB hashed, and how long a program takes, in ms.
fn measure(neighbour: &Container) -> (f64, f64) {
    const MEGABYTES: f64 = 6.0;
    let used = || neighbour.vm().stats().cgroup.expect("its group").cpu_time.as_secs_f64();
    let (mut work, mut starts) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let before = used();
        let status = neighbour.exec(["sh", "-c", "head -c 6000000 /dev/zero | sha256sum"]).status().expect("it runs");
        assert!(status.success());
        work.push(MEGABYTES / (used() - before));
        let begin = Instant::now();
        assert!(neighbour.exec(["true"]).status().expect("it runs").success());
        starts.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    work.sort_by(f64::total_cmp);
    starts.sort_by(f64::total_cmp);
    (work[1], starts[1])
}

fn main() {
    let image = Image::open(cache().join("images/debian-12.tar")).expect("an image: run `make setup`");
    image.prepare().expect("the image's disk");
    let bench = Bench { kernel: Kernel::find().expect("a kernel: run `make setup`"), image };
    let neighbour = bench.container().start().expect("it starts");
    measure(&neighbour);
    let (work, start) = measure(&neighbour);
    let hostile: [(&str, &dyn Fn() -> Hostile); 5] = [
        ("miners on four vCPUs", &|| bench.machine(4, bench.miner())),
        ("a fork bomb", &|| bench.script("f() { f & f & wait; }; f")),
        ("a memory hog", &|| bench.script("while :; do tail /dev/zero; done")),
        ("a console flood", &|| bench.machine(1, bench.busybox("yes > /dev/hvc0"))),
        ("a storm of connections", &|| {
            bench.script(
                    "exec perl -e 'use Socket; $to = pack(\"SSLLx4\", 40, 0, 77, 2); while (1) { socket(my $s, 40, SOCK_STREAM, 0); connect($s, $to) }'",
                )
        }),
    ];
    for (name, begin) in hostile {
        let kept = begin();
        std::thread::sleep(Duration::from_millis(500));
        let (at, before) = (Instant::now(), kept.cpu_time());
        let (work_beside, start_beside) = measure(&neighbour);
        let share = (kept.cpu_time() - before) / at.elapsed().as_secs_f64();
        figure(&format!("used meanwhile by {name}"), share, "processors", None);
        figure(&format!("work beside {name}"), work_beside, "MB/CPU-s", Some(work));
        figure(&format!("program start beside {name}"), start_beside, "ms", Some(start));
        match kept {
            Hostile::Machine(vm) => drop(vm),
            Hostile::Container(container, process) => {
                drop(container);
                drop(process);
            }
        }
    }
}
