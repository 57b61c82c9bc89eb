//! Opening an overlay on a base that is there: time, and what of this process's heap it takes at most.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;
#[path = "common/heap.rs"]
mod heap;

use std::fs::File;
use std::time::Instant;

use cofferdam::Size;
use cofferdam::disk::Overlay;
use common::figure;

/// The median and the 99th percentile of `count` runs, in milliseconds.
fn times(count: usize, mut run: impl FnMut()) -> (f64, f64) {
    let mut all: Vec<f64> = (0..count)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1000.0
        })
        .collect();
    all.sort_by(f64::total_cmp);
    (all[count / 2], all[count * 99 / 100])
}

fn main() {
    let directory = std::env::temp_dir().join(format!("cofferdam-bench-overlay-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let (base, path) = (directory.join("base"), directory.join("overlay"));
    File::create(&base).and_then(|file| file.set_len(100 << 30)).expect("a base");
    let overlay = Overlay::create_larger(&path, &base, Size::gib(200)).expect("an overlay");
    let (p50, p99) = times(1000, || drop(overlay.info().expect("it opens")));
    figure("open, lock and check an overlay of 200 GiB and its base: p50", p50, "ms", None);
    figure("the same: p99", p99, "ms", None);
    let most = heap::most(|| drop(overlay.info().expect("it opens")));
    figure("the same: heap at most", most as f64 / 1024.0, "KiB", None);
    std::fs::remove_dir_all(&directory).expect("the directory goes");
}
