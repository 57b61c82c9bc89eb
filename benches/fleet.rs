//! Two hundred VMs that run at once in one process, each on a copy-on-write disk of one base image, which all of them read: how
//! long the first and the last take to start, and what a VM takes of the host.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

use std::io::Write;
use std::process::Command;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use cofferdam::{Console, Disk, Initramfs, Kernel, Size, Vm, VmBuilder};

const VMS: usize = 200;
/// Of the first and of the last so many, the median is told.
const SOME: usize = 9;

fn figure(name: &str, value: f64, unit: &str, peer: Option<f64>) {
    let (peer, ratio) = match peer {
        Some(peer) => (format!("{peer:.3}"), format!("{:.3}", peer / value)),
        None => ("null".into(), "null".into()),
    };
    println!(
        r#"{{"bench":"fleet","figure":"{name}","value":{value:.3},"unit":"{unit}","peer":{peer},"ratio":{ratio}}}"#
    );
}

/// Reads all files of the base's file system, writes to its own, and has nothing left to do.
const SCRIPT: &str = "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nmount -t devtmpfs dev /dev\n\
    mount -t ext4 /dev/vda /mnt && cat /mnt/* > /dev/null && echo mine > /mnt/mine && sync && echo idle\n\
    while :; do sleep 1000; done\n";

fn initramfs() -> Initramfs {
    let busybox = std::fs::read("/bin/busybox").expect("busybox-static: run `make setup`");
    Initramfs::new()
        .directory("/bin", 0o755)
        .directory("/dev", 0o755)
        .directory("/mnt", 0o755)
        .character_device("/dev/console", 0o600, (5, 1))
        .file("/bin/busybox", 0o755, busybox)
        .file("/init", 0o755, SCRIPT)
}

struct Idle(SyncSender<()>, Vec<u8>);

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

/// Starts one, and the milliseconds until it is idle.
fn start(vm: VmBuilder) -> (Vm, f64) {
    let (tell, idle) = sync_channel(1);
    let begin = Instant::now();
    let vm = vm.console(Console::writer(Idle(tell, Vec::new()))).start().expect("it starts");
    idle.recv_timeout(Duration::from_secs(120)).expect("it becomes idle");
    (vm, begin.elapsed().as_secs_f64() * 1000.0)
}

fn median(part: &[f64]) -> f64 {
    let mut part = part.to_vec();
    part.sort_by(f64::total_cmp);
    part[part.len() / 2]
}

/// A field of /proc/meminfo, in MiB.
fn meminfo(name: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the field");
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

fn main() {
    let folder = std::env::temp_dir().join(format!("cofferdam-bench-fleet-{}", std::process::id()));
    let files = folder.join("files");
    std::fs::create_dir_all(&files).expect("a folder");
    for n in 0..8 {
        std::fs::write(files.join(n.to_string()), vec![n as u8 + 1; 1 << 20]).expect("a file");
    }
    let base = folder.join("base.ext4");
    let made = Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&files).arg(&base).arg("64M").status();
    assert!(made.is_ok_and(|status| status.success()), "mke2fs");
    let kernel =
        Kernel::find().expect("a kernel: run `make setup`").cmdline("console=hvc0 quiet").initramfs(initramfs());
    let vm = || Vm::builder(kernel.clone()).memory(Size::mib(64)).disk(Disk::overlay(&base));
    // What the first one leaves to all that follow is no VM's own.
    drop(start(vm()));
    let before = meminfo("MemAvailable");
    let (vms, times): (Vec<Vm>, Vec<f64>) = (0..VMS).map(|_| start(vm())).unzip();
    let (first, last) = (median(&times[..SOME]), median(&times[VMS - SOME..]));
    figure("start to idle of one of the first 9 VMs on one base", first, "ms", None);
    figure("start to idle of one of the last 9 of 200, beside the others", last, "ms", Some(first));
    figure("memory of the host for each of 200 VMs", (before - meminfo("MemAvailable")) / VMS as f64, "MiB", None);
    let running = vms.iter().filter(|vm| matches!(vm.try_wait(), Ok(None))).count();
    assert_eq!(running, VMS, "all of them run");
    drop(vms);
    std::fs::remove_dir_all(&folder).expect("it is ours");
}
