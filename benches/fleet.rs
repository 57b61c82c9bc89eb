//! How long a container takes to start when 199 others on the same image run already.
//!
//! Runs in the lab's virtual time, where a millisecond is a million instructions (benches/README.md).

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;

use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam::disk::WritableLayer;
use cofferdam::{Container, Image, Kernel, Size};
use common::{cache, figure, median};

const ALL: usize = 200;
/// Of so many the median is taken, at both ends.
const SAME: usize = 5;
/// So long guests have something to do after their start: they give free memory back, for one.
const REST: Duration = Duration::from_secs(5);

fn main() {
    // A container takes some twenty descriptors.
    let pid = std::process::id().to_string();
    let limit = Command::new("prlimit").args(["--pid", &pid, "--nofile=65536:65536"]).status();
    assert!(limit.expect("prlimit of util-linux").success(), "a limit of 65,536 open files");

    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    let image = Image::open(cache().join("images/debian-12.tar")).expect("run `make setup`");
    let disks = std::env::temp_dir().join(format!("cofferdam-bench-images-{pid}"));
    let image = image.cache_dir(&disks);
    image.prepare().expect("the image's disk");
    let start = || {
        Container::builder(image.clone())
            .kernel(kernel.clone())
            .memory(Size::mib(64))
            .writable_layer(WritableLayer::new(Size::gib(4)).scratch_dir(std::env::temp_dir()))
            .start()
            .expect("it starts")
    };
    // Once for the caches.
    drop(start());

    let (mut running, mut times) = (Vec::with_capacity(ALL), Vec::with_capacity(ALL));
    for n in 0..ALL {
        if n == ALL - SAME {
            std::thread::sleep(REST);
        }
        let begin = Instant::now();
        running.push(start());
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let last = running.last().expect("there are many");
    assert!(last.exec(["/bin/true"]).status().expect("it runs").success());
    let (first, last) = (median(&times[..SAME]), median(&times[ALL - SAME..]));
    let most = times.iter().copied().fold(0.0, f64::max);
    for (name, value) in [("the 200th", last), ("the slowest", most)] {
        let name = format!("{name} of 200 containers on one image, start to ready (peer: the first)");
        figure(&name, value, "ms", Some(first));
    }
    drop(running);
    std::fs::remove_dir_all(disks).expect("a directory of its own");
}
