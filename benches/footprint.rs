//! Host memory of an idle VM beyond the guest's own pages, with 1 and with 64 in one process; QEMU's microvm beside it.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;

use std::io::Write;
use std::time::Duration;

use cofferdam::kernel::Initramfs;
use cofferdam::{Console, Kernel, Size, Vm};
use common::{Running, figure, kernel, microvm};

const MEMORY: u64 = 64;
/// Nothing is reserved for guests' memory in this process, so the flag of such mappings marks guests' memory alone.
const OURS: Option<&str> = Some("nr");

/// The guest prints a word when it has nothing left to do.
fn initramfs() -> Initramfs {
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static: run `make setup`");
    Initramfs::new()
        .directory("/bin", 0o755)
        .directory("/dev", 0o755)
        .character_device("/dev/console", 0o600, (5, 1))
        .file("/bin/busybox", 0o755, busybox)
        .file("/init", 0o755, "#!/bin/busybox sh\necho idle\nwhile :; do /bin/busybox sleep 1000; done\n")
}

/// Resident KiB of a process: all, and what of it is guests' memory: writable mappings with this flag, if any, which lie
/// side by side and together have at least the size of a guest.
fn resident(pid: &str, flag: Option<&str>) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let (mut all, mut guests, mut run) = (0, 0, Run::default());
    let (mut range, mut writable, mut rss) = (0..0, false, 0);
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [addresses, perms, ..] if addresses.contains('-') && perms.len() == 4 => {
                let mut ends = addresses.split('-').filter_map(|end| u64::from_str_radix(end, 16).ok());
                range = ends.next().expect("a start")..ends.next().expect("an end");
                writable = *perms == "rw-p";
            }
            ["Rss:", kib, _] => rss = kib.parse().unwrap_or(0),
            ["VmFlags:", flags @ ..] => {
                all += rss;
                let guest = writable && flag.is_none_or(|flag| flags.contains(&flag));
                if !guest || run.range.end != range.start {
                    guests += std::mem::take(&mut run).of_guest();
                    run.range.start = range.start;
                }
                if guest {
                    run = Run { range: run.range.start..range.end, rss: run.rss + rss };
                }
            }
            _ => {}
        }
    }
    (all, guests + run.of_guest())
}

/// Mappings side by side.
#[derive(Default)]
struct Run {
    range: std::ops::Range<u64>,
    rss: u64,
}

impl Run {
    fn of_guest(self) -> u64 {
        if self.range.end - self.range.start >= MEMORY << 20 { self.rss } else { 0 }
    }
}

#[derive(Clone)]
struct Idle(std::sync::mpsc::SyncSender<()>, Vec<u8>);

impl Write for Idle {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.1.extend_from_slice(bytes);
        if self.1.windows(4).any(|w| w == b"idle") {
            let _ = self.0.try_send(());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn start(kernel: &Kernel) -> Vm {
    let (tell, idle) = std::sync::mpsc::sync_channel(1);
    let kernel = kernel.clone();
    let console = Console::writer(Idle(tell, Vec::new()));
    let vm = Vm::builder(kernel).memory(Size::mib(MEMORY)).console(console).start().expect("it starts");
    idle.recv_timeout(Duration::from_secs(120)).expect("it becomes idle");
    vm
}

/// QEMU's microvm with as much memory: its resident KiB beyond the guest's. `None` where it is not installed.
fn qemu() -> Option<f64> {
    let machine = Running(microvm(MEMORY, &kernel(), "panic=0 quiet").spawn().ok()?);
    std::thread::sleep(Duration::from_secs(4));
    let (all, guest) = resident(&machine.0.id().to_string(), None);
    Some((all - guest) as f64)
}

fn main() {
    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    let kernel = kernel.cmdline("console=hvc0 quiet").initramfs(initramfs());
    let peer = qemu();
    // What the first one leaves to all that follow is no VM's own.
    drop(start(&kernel));
    let (all, guest) = resident("self", OURS);
    let before = all - guest;
    let mut vms = vec![start(&kernel)];
    let beyond = |n: u64| {
        let (all, guest) = resident("self", OURS);
        (all - guest).saturating_sub(before) as f64 / n as f64
    };
    figure("1 VM: resident beyond guest pages", beyond(1), "KiB", peer);
    while vms.len() < 64 {
        vms.push(start(&kernel));
    }
    figure("64 VMs: resident beyond guest pages, each", beyond(64), "KiB", peer);
}
