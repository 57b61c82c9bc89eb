//! How long a guest takes to start, to run a program and to end; QEMU's microvm with the same kernel and initramfs
//! beside it, in the same run.
//!
//! Runs in the lab's virtual time, where a millisecond is a million instructions (benches/README.md).

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;
#[path = "common/layout.rs"]
mod layout;
#[path = "common/life.rs"]
mod life;

use std::path::Path;
use std::time::{Duration, Instant};

use cofferdam::disk::WritableLayer;
use cofferdam::{Container, Image, Kernel, Size, Vm};
use common::{cache, figure, median};
use life::ms;

/// A distribution's kernel takes some thirty times as long as ours.
const STOCK_ROUNDS: usize = 1;

/// A distribution's kernel until its user space has ended at once, and QEMU with the same files.
fn stock() {
    let path = cache().join("kernels/cloud-6.12/vmlinuz");
    let begin = Instant::now();
    let kernel = Kernel::open(&path).expect("a stock kernel: run `make setup`");
    figure("stock kernel: Kernel::open (once for all VMs)", ms(begin.elapsed()), "ms", None);
    let cmdline = "reboot=t panic=-1 quiet";
    let mut whole = Vec::new();
    for round in 0..=STOCK_ROUNDS {
        let kernel = kernel.clone().cmdline(cmdline).initramfs(life::initramfs());
        let begin = Instant::now();
        let vm = Vm::builder(kernel).start().expect("the guest starts");
        vm.wait();
        if round > 0 {
            whole.push(ms(begin.elapsed()));
        }
    }
    let qemu = life::qemu(&path, cmdline, (1, 256), STOCK_ROUNDS);
    figure("stock kernel: start to end of a guest that ends at once in user space", median(&whole), "ms", qemu);
}

/// A guest that powers off at once: time from `start` to its end beyond its own uptime, and QEMU's whole time.
fn shortest_life(kernel: &Kernel) {
    let (qemu, lives) = (life::peer(&common::kernel(), 1), life::lives(kernel, 1));
    let beyond = |whole: f64| whole - lives.uptime;
    figure("start() to first KVM_RUN", lives.first, "ms", None);
    figure("guest's own uptime at user space", lives.uptime, "ms", None);
    figure("start to end of a guest that powers off at once", lives.whole, "ms", qemu);
    figure("the same beyond the guest's uptime", beyond(lives.whole), "ms", qemu.map(beyond));
    figure("guest's end to wait() returned", lives.ended, "ms", None);
}

/// A container: until programs can be started, and what running one takes.
fn container(kernel: &Kernel, image: &Image) {
    let start = || {
        Container::builder(image.clone())
            .kernel(kernel.clone())
            .memory(Size::mib(128))
            .writable_layer(WritableLayer::new(Size::gib(4)).scratch_dir(std::env::temp_dir()))
            .start()
            .expect("it starts")
    };
    // Once for the caches.
    drop(start());
    let begin = Instant::now();
    let container = start();
    let (startup, line) = (container.startup(), container.vm().timeline());
    let first = Instant::now();
    assert!(container.exec(["/bin/true"]).status().expect("it runs").success());
    let first = first.elapsed();
    figure("container: start() to first KVM_RUN of its VM", ms(line.running.expect("it ran")), "ms", None);
    figure(
        "container: first KVM_RUN to kernel entry",
        ms(line.kernel_entered.unwrap_or_default() - line.running.unwrap_or_default()),
        "ms",
        None,
    );
    figure("container: start to user space", ms(startup.user_space_started), "ms", None);
    figure(
        "container: the same beyond the guest's uptime",
        ms(startup.user_space_started.saturating_sub(startup.kernel_uptime)),
        "ms",
        None,
    );
    figure("container: start to shim ready", ms(startup.ready), "ms", None);
    figure("container: start to first exec done", ms(begin.elapsed()), "ms", None);
    figure("container: first exec of /bin/true", ms(first), "ms", None);
    let mut trips: Vec<f64> = (0..20)
        .map(|_| {
            let begin = Instant::now();
            assert!(container.exec(["/bin/true"]).status().expect("it runs").success());
            ms(begin.elapsed())
        })
        .collect();
    trips.sort_by(f64::total_cmp);
    figure("container: exec of /bin/true, p50", trips[10], "ms", None);
    figure("container: exec of /bin/true, p99", trips[19], "ms", None);
    let stop = Instant::now();
    container.stop(Duration::from_secs(5)).expect("it stops");
    figure("container: stop() to ended", ms(stop.elapsed()), "ms", None);
}

/// Containers of an image with one layer and with many, on a disk that is made: until a first program has ended.
fn layers(kernel: &Kernel, rootfs: &Path, dir: &Path) {
    for count in [1, 60] {
        let layers = (1..count).map(|number| layout::small_layer(dir, number));
        let layers: Vec<_> = std::iter::once(rootfs.to_owned()).chain(layers).collect();
        let path = dir.join(format!("layout-{count}"));
        layout::make(&path, &layers);
        let image = Image::open(path).expect("a layout").cache_dir(dir.join("store"));
        let start = || {
            let begin = Instant::now();
            let layer = WritableLayer::new(Size::gib(4)).scratch_dir(std::env::temp_dir());
            let container = Container::builder(image.clone()).kernel(kernel.clone()).memory(Size::mib(128));
            let container = container.writable_layer(layer).start().expect("it starts");
            assert!(container.exec(["/bin/true"]).status().expect("it runs").success());
            ms(begin.elapsed())
        };
        start();
        let times: Vec<f64> = (0..5).map(|_| start()).collect();
        figure(&format!("container of {count} layers: start to first exec done"), median(&times), "ms", None);
    }
}

fn main() {
    let begin = Instant::now();
    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    figure("Kernel::open (once for all VMs)", ms(begin.elapsed()), "ms", None);
    let image = Image::open(cache().join("images/debian-12.tar")).expect("an image: run `make setup`");
    // In the lab that is memory, and its other files are served by another machine's program.
    let disks = std::env::temp_dir().join(format!("cofferdam-bench-images-{}", std::process::id()));
    let image = image.cache_dir(&disks);
    image.prepare().expect("the image's disk");
    shortest_life(&kernel);
    container(&kernel, &image);
    layers(&kernel, &cache().join("images/debian-12.tar"), &disks);
    std::fs::remove_dir_all(disks).expect("a directory of its own");
    stock();
}
