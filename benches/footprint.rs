//! Host memory of an idle VM beyond the guest's own pages, with 1 and with 50 in one process; QEMU's microvm beside it.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cofferdam::{Console, Initramfs, Kernel, Size, Vm};

const MEMORY: u64 = 64;

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

/// Resident KiB of a process: all, and what of it is a guest's memory: the kernel's image, large anonymous mappings,
/// and the parts of those that are kept from huge pages ("nh").
fn resident(pid: &str) -> (u64, u64) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let (mut all, mut guest, mut name, mut size, mut rss) = (0, 0, String::new(), 0, 0);
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [range, perms, ..] if range.contains('-') && perms.len() == 4 => name = words[5..].join(" "),
            ["Size:", kib, _] => size = kib.parse().unwrap_or(0),
            ["Rss:", kib, _] => rss = kib.parse().unwrap_or(0),
            ["VmFlags:", flags @ ..] => {
                let anonymous = name.is_empty() && (size >= 8192 || flags.contains(&"nh"));
                all += rss;
                guest += if anonymous || name.contains("memfd:cofferdam") { rss } else { 0 };
            }
            _ => {}
        }
    }
    (all, guest)
}

fn figure(name: &str, value: f64, peer: Option<f64>) {
    let (peer, ratio) = match peer {
        Some(peer) => (format!("{peer:.0}"), format!("{:.2}", peer / value)),
        None => ("null".into(), "null".into()),
    };
    println!(
        r#"{{"bench":"footprint","figure":"{name}","value":{value:.0},"unit":"KiB","peer":{peer},"ratio":{ratio}}}"#
    );
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
    let cache = std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|h| h + "/.cache")).ok()?;
    let mut child: Child = Command::new("qemu-system-x86_64")
        .args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off", "-accel", "kvm", "-cpu", "host", "-m"])
        .arg(MEMORY.to_string())
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-append", "panic=0 quiet", "-kernel"])
        .arg(format!("{cache}/cofferdam/kernel/vmlinux"))
        .stdin(Stdio::null())
        .spawn()
        .ok()?;
    std::thread::sleep(Duration::from_secs(4));
    let (all, guest) = resident(&child.id().to_string());
    let _ = child.kill();
    let _ = child.wait();
    Some((all - guest) as f64)
}

fn main() {
    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    let kernel = kernel.cmdline("console=hvc0 quiet").initramfs(initramfs());
    let peer = qemu();
    // What the first one leaves to all that follow is no VM's own.
    drop(start(&kernel));
    let (all, guest) = resident("self");
    let before = all - guest;
    let mut vms = vec![start(&kernel)];
    let beyond = |n: u64| {
        let (all, guest) = resident("self");
        (all - guest).saturating_sub(before) as f64 / n as f64
    };
    figure("1 VM: resident beyond guest pages", beyond(1), peer);
    while vms.len() < 50 {
        vms.push(start(&kernel));
    }
    figure("50 VMs: resident beyond guest pages, each", beyond(50), peer);
}
