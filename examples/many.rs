//! Ten virtual machines in one process: different kernels, different root file systems, results collected.
//!
//!     cargo run --release --example many -- ROOTFS_TAR_OR_DIRECTORY [ANOTHER...]
//!
//! The kernels are the vmlinux and the bzImage that guest/kernel/build made.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a program may")]

use std::thread;
use std::time::Duration;

use cofferdam::{Container, Image, Kernel, Size};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let images = std::env::args().skip(1).map(Image::open).collect::<Result<Vec<_>, _>>()?;
    if images.is_empty() {
        return Err("usage: many ROOTFS_TAR_OR_DIRECTORY [ANOTHER...]".into());
    }
    let mut kernels = vec![Kernel::find()?];
    let cache = std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|home| home + "/.cache"))?;
    kernels.extend(Kernel::open(format!("{cache}/cofferdam/kernel/bzImage")));

    // Kernels and images are opened once and shared; each machine has its own memory and disk.
    let results: Vec<cofferdam::Result<String>> = thread::scope(|scope| {
        let run = |n: usize| {
            let (image, kernel) = (&images[n % images.len()], &kernels[n % kernels.len()]);
            scope.spawn(move || {
                let container = Container::builder(image.clone())
                    .kernel(kernel.clone())
                    .memory(Size::mib(128))
                    .hostname(format!("guest-{n}"))
                    // Ten at once may take long on a small machine.
                    .start_timeout(Duration::from_secs(300))
                    .start()?;
                let output = container.exec(["sh", "-c", "echo \"$(uname -n) $(uname -r)\""]).output()?;
                Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
            })
        };
        let threads: Vec<_> = (0..10).map(run).collect();
        threads.into_iter().map(|t| t.join().expect("a thread panicked")).collect()
    });
    for result in results {
        println!("{}", result?);
    }
    Ok(())
}
