//! Opening an overlay on a base that is there: time, and what of this process's heap it takes at most.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use cofferdam::{Overlay, Size};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's own; counting changes nothing about it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller has promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn figure(name: &str, value: f64, unit: &str) {
    println!(r#"{{"bench":"overlay","figure":"{name}","value":{value:.3},"unit":"{unit}","peer":null,"ratio":null}}"#);
}

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
    let folder = std::env::temp_dir().join(format!("cofferdam-bench-overlay-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let (base, path) = (folder.join("base"), folder.join("overlay"));
    File::create(&base).and_then(|file| file.set_len(100 << 30)).expect("a base");
    let overlay = Overlay::create_larger(&path, &base, Size::gib(200)).expect("an overlay");
    let (p50, p99) = times(1000, || drop(overlay.info().expect("it opens")));
    figure("open, lock and check an overlay of 200 GiB and its base: p50", p50, "ms");
    figure("the same: p99", p99, "ms");
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    drop(overlay.info().expect("it opens"));
    figure("the same: heap at most", (MOST.load(Ordering::Relaxed) - before) as f64 / 1024.0, "KiB");
    std::fs::remove_dir_all(&folder).expect("the folder goes");
}
