//! What each further vCPU adds to the life of a guest that ends at once, and to that of QEMU's microvm with the same files.
//!
//! Runs in the lab's virtual time, in a lab with a processor for each vCPU (benches/README.md).

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;
#[path = "common/life.rs"]
mod life;

use cofferdam::Kernel;
use common::figure;

/// As many as the lab has processors.
const MOST: u32 = 4;

fn main() {
    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    let (one, peer) = (life::lives(&kernel, 1), life::peer(&common::kernel(), 1));
    for vcpus in 2..=MOST {
        let (all, others) = (life::lives(&kernel, vcpus), life::peer(&common::kernel(), vcpus));
        let each = |all: f64, one: f64| (all - one) / f64::from(vcpus - 1);
        let name = |what: &str| format!("{vcpus} vCPUs, each beyond the first: {what}");
        figure(&name("start() to first KVM_RUN"), each(all.first, one.first), "ms", None);
        figure(&name("start to end"), each(all.whole, one.whole), "ms", others.zip(peer).map(|(o, p)| each(o, p)));
    }
}
