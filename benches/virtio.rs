//! What one request costs in the device model, without KVM: through queue, block device and vsock.
//!
//! Printed in nanoseconds here and then, by running itself in the lab's virtual time, in instructions, the kernel's included.
//! Those of a disk's device in user space alone, from hearing the kick to having raised the interrupt, for 10,000 reads of 4 KiB
//! through io_uring:
//!
//! ```text
//! valgrind --tool=callgrind --toggle-collect='*runner::look*' target/release/deps/virtio-* ring
//! ```

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Instant;

use cofferdam::disk::IoEngine;
use cofferdam::fuzzing::bench;
use common::figure;

/// Nanoseconds for one of `n`.
fn each(n: u32, mut f: impl FnMut()) -> f64 {
    // For the caches, and until every page of the fake guest was touched.
    (0..5).for_each(|_| f());
    let begin = Instant::now();
    f();
    begin.elapsed().as_nanos() as f64 / f64::from(n)
}

fn measure(unit: &str, n: u32) {
    let mut queue = bench::Queue::new();
    figure("queue: one chain, kick to interrupt", each(n, || queue.run(n)), unit, None);

    let mut page = vec![0; 4096];
    for (name, engine) in [("io_uring", IoEngine::IoUring), ("calls", IoEngine::Threads)] {
        let mut blk = bench::Blk::new(engine);
        let file = blk.file();
        let pread = each(n, || (0..n).for_each(|_| file.read_exact_at(&mut page, 0).expect("a read")));
        let name = format!("blk: 4 KiB read through {name}, kick to interrupt (peer: the pread alone)");
        figure(&name, each(n, || blk.run(n)), unit, Some(pread));
    }

    let mut vsock = bench::Vsock::new();
    let (mut near, mut far) = UnixStream::pair().expect("a socket pair");
    let pair = each(n, || {
        (0..n).for_each(|_| {
            near.write_all(&page).expect("a write");
            far.read_exact(&mut page).expect("a read");
        });
    });
    figure(
        "vsock: 4 KiB from guest to embedder (peer: the socket pair alone)",
        each(n, || vsock.run(n)),
        unit,
        Some(pair),
    );
}

fn main() {
    if std::env::args().any(|argument| argument == "ring") {
        return bench::Blk::new(IoEngine::IoUring).run(10_000);
    }
    if std::env::var_os("COFFERDAM_IN_LAB").is_some() {
        return measure("instructions", 2_000);
    }
    measure("ns", 50_000);
    let this = std::env::current_exe().expect("this program");
    let lab = concat!(env!("CARGO_MANIFEST_DIR"), "/lab/run");
    let status = Command::new(lab).arg("--icount").arg(this).status();
    if !status.is_ok_and(|s| s.success()) {
        println!("the lab did not run, so there are no instruction counts");
    }
}
