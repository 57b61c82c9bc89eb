//! Streams data through a program in a container: lines go in, sorted lines come out, while both sides run.
//!
//!     cargo run --release --example exec_stream -- ROOTFS_TAR_OR_DIRECTORY

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a program may")]

use std::io::{BufRead, BufReader, Write};
use std::thread;

use cofferdam::process::Stdio;
use cofferdam::{Container, Image};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let rootfs = std::env::args().nth(1).ok_or("usage: exec_stream ROOTFS_TAR_OR_DIRECTORY")?;
    let container = Container::builder(Image::open(rootfs)?).start()?;

    let mut sort = container.exec(["sort", "-n"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = sort.stdin.take().ok_or("no standard input")?;
    let output = sort.stdout.take().ok_or("no standard output")?;

    // Written on a thread of its own, as a program may print before it has read everything.
    let writer = thread::spawn(move || (0..100_000u64).try_for_each(|n| writeln!(input, "{}", n * 7919 % 100_000)));
    let mut last = None;
    for line in BufReader::new(output).lines() {
        let number: u64 = line?.parse()?;
        if last.is_some_and(|last| last >= number) {
            return Err(format!("{number} came after {last:?}").into());
        }
        last = Some(number);
    }
    writer.join().map_err(|_| "the writer panicked")??;
    println!("sorted 100000 lines, the last is {}; sort ended with {}", last.unwrap_or(0), sort.wait()?);
    Ok(())
}
