//! How much memory the preparation of an image takes at most, by the promise of `ImageLimits`.

#![allow(unsafe_code, reason = "an allocator that counts")]
#![allow(clippy::expect_used, reason = "a failure here is the test's")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use cofferdam::image::ImageLimits;
use cofferdam::{ErrorKind, Image, Size};

#[path = "../src/container/image/tests/maker.rs"]
#[allow(dead_code, reason = "other tests make other archives")]
mod maker;

use maker::{Made, archive};

/// Knows how much is taken, and the most that was.
struct Counting;

static TAKEN: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn take(bytes: usize) {
    MOST.fetch_max(TAKEN.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size.saturating_sub(layout.size()));
        TAKEN.fetch_sub(layout.size().saturating_sub(size), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What preparing an archive took at its most.
fn most(name: &str, entries: &[Made], limits: ImageLimits) -> (cofferdam::Result<()>, usize) {
    let directory = std::env::temp_dir().join(format!("cofferdam-image-memory-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let path = directory.join("image.tar");
    std::fs::write(&path, archive(entries)).expect("an archive");
    let image = Image::open(&path).expect("an image").cache_dir(directory.join("cache")).limits(limits);
    let before = TAKEN.load(Relaxed);
    MOST.store(before, Relaxed);
    let outcome = image.prepare();
    let most = MOST.load(Relaxed) - before;
    std::fs::remove_dir_all(directory).expect("the directory");
    (outcome, most)
}

/// The same of an image of one layer, as a directory of what `docker save` wrote.
fn most_of_layer(entries: &[Made]) -> usize {
    let directory = std::env::temp_dir().join(format!("cofferdam-layer-memory-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let layer = directory.join("layer.tar");
    std::fs::write(&layer, archive(entries)).expect("an archive");
    let output = std::process::Command::new("sha256sum").arg(&layer).output().expect("sha256sum");
    let digest: String = String::from_utf8_lossy(&output.stdout).chars().take(64).collect();
    let config = format!(r#"{{"os":"linux","rootfs":{{"diff_ids":["sha256:{digest}"]}}}}"#);
    std::fs::write(directory.join("config.json"), config).expect("a configuration");
    let manifest = r#"[{"Config":"config.json","Layers":["layer.tar"]}]"#;
    std::fs::write(directory.join("manifest.json"), manifest).expect("a manifest");
    let image = Image::open(&directory).expect("an image").cache_dir(directory.join("cache"));
    let before = TAKEN.load(Relaxed);
    MOST.store(before, Relaxed);
    image.prepare().expect("its disk");
    let most = MOST.load(Relaxed) - before;
    std::fs::remove_dir_all(directory).expect("the directory");
    most
}

#[test]
fn memory_is_bounded_by_the_limits() {
    const N: usize = 66_000;
    /// Buffers, whatever the image is.
    const BUFFERS: usize = 8 << 20;
    let each = |made: &dyn Fn(usize) -> Made| (0..N).map(made).collect::<Vec<_>>();
    let cases = [
        ("files", each(&|n| Made::file(format!("{n:06}"), "")), 6 * N),
        ("directories", each(&|n| Made::directory(format!("{}/{n:06}", n % 1000))), 6 * N),
        ("directories", (0..N / 2).map(|n| Made::file(format!("{n:06}/f"), "")).collect(), 7 * N / 2),
        ("links", each(&|n| if n == 0 { Made::file("f", "") } else { Made::link(n.to_string(), "f") }), 6 * N),
        ("symlinks", each(&|n| Made::symlink(format!("{n:06}"), "a target")), 14 * N),
    ];
    for (name, entries, names) in cases {
        let (outcome, most) = most(name, &entries, ImageLimits::new());
        outcome.expect(name);
        let per_entry = most.saturating_sub(BUFFERS + names) / N;
        // As the documentation of `ImageLimits` says.
        assert!(per_entry <= 400, "{name}: {per_entry} bytes for each entry");
    }
    // The log of a layer is no longer in memory when its tree is.
    let taken = most_of_layer(&each(&|n| Made::file(format!("{n:06}"), "")));
    let per_entry = taken.saturating_sub(BUFFERS + 6 * N) / N;
    assert!(per_entry <= 400, "{per_entry} bytes for each entry of a layer");
    // One header of 16 MiB is not even read.
    let large = Made::file("f", "").pax("comment", vec![b'x'; 16 << 20]);
    let (outcome, most) = most("header", &[large], ImageLimits::new().header(Size::mib(1)));
    assert_eq!(outcome.expect_err("it is too large").kind(), ErrorKind::InvalidConfig);
    assert!(most < BUFFERS, "{most}");
}
