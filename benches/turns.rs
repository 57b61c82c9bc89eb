//! How long a device keeps its loop at most, under a driver that means harm. Whatever else is on the loop waits as long: other
//! devices, and what the embedder asks for.
//!
//! Of the loop's own processor, so that a busy machine changes little. The peer is what is promised, 20 ms: a longer turn is an error.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;

use cofferdam::fuzzing::turns::bench;
use common::figure;

/// Milliseconds that no turn takes.
const MOST: f64 = 20.0;

fn main() -> std::process::ExitCode {
    let all = bench::longest_turns();
    for (name, longest) in &all {
        figure(name, *longest, "ms", Some(MOST));
    }
    let late: Vec<_> = all.iter().filter(|(_, longest)| *longest > MOST).map(|(name, _)| name).collect();
    match late.is_empty() {
        true => std::process::ExitCode::SUCCESS,
        false => {
            eprintln!("longer than {MOST} ms: {late:?}");
            std::process::ExitCode::FAILURE
        }
    }
}
