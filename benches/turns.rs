//! How long a device keeps its loop at most, under a driver that means harm. Whatever else is on the loop waits as long: other
//! devices, and what the embedder asks for.
//!
//! Of the loop's own processor, so that a busy machine changes nothing. The peer is what is aimed at: 20 ms.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;

use cofferdam::doors::turns::bench;
use common::figure;

/// Milliseconds that no turn shall take.
const AIM: f64 = 20.0;

fn main() {
    for (name, longest) in bench::longest_turns() {
        figure(name, longest, "ms", Some(AIM));
    }
}
