//! What an exit of the guest costs between KVM_RUN's return and its next call, QEMU's microvm beside it; and pausing.
//!
//! Runs in the lab's virtual time, where a nanosecond, and a tick of the processor's clock, is an instruction
//! (benches/README.md). The kernel's own trace of
//! system calls says when KVM_RUN returns and when it is called again, so the same is counted in both programs.

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]
#![allow(unsafe_code, reason = "a system call that does nothing, to know what counting costs")]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam::kernel::Initramfs;
use cofferdam::{Console, Kernel, Size, Vm};
use common::{Running, figure, kernel, median, microvm};

/// Exits of each kind that are counted.
const COUNTED: usize = 400;
/// KVM_RUN's number among ioctls, as traces print it.
const KVM_RUN: &str = ", ae80, ";

/// A static program in which PID 1 does one thing for ever: `body`, in a loop, after `before`.
fn init(before: &[u8], body: &[u8]) -> Vec<u8> {
    let back = -(body.len() as i8) - 2;
    let code = [before, body, &[0xeb, back as u8]].concat();
    let (base, size) = (0x40_0000u64, (120 + code.len()) as u64);
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0, 1, 0, 0, 0];
    for field in [base + 120, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0]);
    for field in [0, base, base, size, size, 4096] {
        file.extend(field.to_le_bytes());
    }
    file.extend(code);
    file
}

/// The interrupt controller's ports are KVM's own; the scratch register of a serial port that is there in both is not.
fn port_writer() -> Vec<u8> {
    // iopl(3); mov dx, 0x3ff; again: out dx, al
    init(&[0xb8, 172, 0, 0, 0, 0xbf, 3, 0, 0, 0, 0x0f, 0x05, 0x66, 0xba, 0xff, 0x03], &[0xee])
}

/// Reads random numbers of the entropy device, again and again: Linux acknowledges the interrupt of each request in a register.
fn register_writer() -> Vec<u8> {
    let file = b"/dev/hwrng\0";
    // call over the text; pop rbx; sub rsp, 64
    let mut code = [&[0xe8, file.len() as u8, 0, 0, 0], &file[..], &[0x5b, 0x48, 0x83, 0xec, 0x40]].concat();
    // r8 = open(file, O_RDONLY)
    code.extend([0xb8, 2, 0, 0, 0, 0x48, 0x89, 0xdf, 0x31, 0xf6, 0x0f, 0x05, 0x49, 0x89, 0xc0]);
    // read(r8, rsp, 64)
    init(&code, &[0x31, 0xc0, 0x4c, 0x89, 0xc7, 0x48, 0x89, 0xe6, 0xba, 64, 0, 0, 0, 0x0f, 0x05])
}

fn initramfs(init: Vec<u8>) -> Initramfs {
    Initramfs::new()
        .directory("/dev", 0o755)
        .character_device("/dev/console", 0o600, (5, 1))
        .character_device("/dev/hwrng", 0o600, (10, 183))
        .file("/init", 0o755, init)
}

/// The kernel's trace of system calls.
struct ExitReport(PathBuf);

/// What one thread does.
#[derive(Default)]
struct Thread {
    in_run: bool,
    returned: Option<u64>,
    /// From KVM_RUN's returns to its next calls.
    spans: Vec<f64>,
}

impl Thread {
    fn calls(&mut self, time: u64, run: bool) {
        self.in_run = run;
        if let Some(before) = self.returned.take_if(|_| run) {
            self.spans.push((time - before) as f64);
        }
    }

    fn returns(&mut self, time: u64) {
        if std::mem::take(&mut self.in_run) {
            self.returned = Some(time);
        }
    }
}

impl ExitReport {
    /// `None` where this process may not.
    fn new() -> Option<Self> {
        let at = Path::new("/sys/kernel/tracing");
        if !at.join("trace").exists() {
            Command::new("mount").args(["-t", "tracefs", "none"]).arg(at).status().ok()?;
        }
        let it = Self(at.to_owned());
        it.set("buffer_size_kb", "8192")?;
        // Times are in microseconds otherwise. In virtual time its ticks are instructions.
        it.set("trace_clock", "x86-tsc")?;
        it.set("events/raw_syscalls/filter", "id == 16")?;
        it.set("events/raw_syscalls/enable", "1")?;
        it.set("tracing_on", "0")?;
        Some(it)
    }

    fn set(&self, file: &str, value: &str) -> Option<()> {
        fs::write(self.0.join(file), value).ok()
    }

    /// Ticks between KVM_RUN's return and its next call, on the thread that does so most, while `f` runs.
    fn spans(&self, f: impl FnOnce()) -> f64 {
        self.set("trace", "").expect("an empty trace");
        self.set("tracing_on", "1").expect("tracing");
        f();
        self.set("tracing_on", "0").expect("tracing");
        let text = fs::read_to_string(self.0.join("trace")).expect("a trace");
        let mut threads = HashMap::<&str, Thread>::new();
        for line in text.lines().filter(|line| line.contains("NR 16 ")) {
            let mut words = line.split_whitespace();
            let (Some(name), Some(time)) = (words.next(), words.find_map(|w| w.strip_suffix(':')?.parse().ok())) else {
                continue;
            };
            let thread = threads.entry(name).or_default();
            match line.contains("sys_enter") {
                true => thread.calls(time, line.contains(KVM_RUN)),
                false => thread.returns(time),
            }
        }
        let most = threads.into_values().map(|thread| thread.spans).max_by_key(Vec::len).expect("threads");
        assert!(most.len() > COUNTED, "only {} exits", most.len());
        median(&most)
    }

    /// The same without what the trace and the kernel's entry add: the calls of a thread that does nothing in between.
    fn exits(&self) -> f64 {
        let nothing = self.spans(|| {
            for _ in 0..2 * COUNTED {
                // SAFETY: no descriptor has this number, so the kernel refuses at once and touches nothing.
                unsafe { libc::ioctl(-1, 0xae80, 0) };
            }
        });
        self.spans(|| std::thread::sleep(Duration::from_millis(200))) - nothing
    }
}

fn ours(kernel: &Kernel, trace: &ExitReport, init: Vec<u8>) -> f64 {
    let kernel = kernel.clone().cmdline("console=hvc0 quiet").initramfs(initramfs(init));
    let _vm = Vm::builder(kernel).memory(Size::mib(128)).start().expect("it starts");
    // Until it does nothing else any more.
    std::thread::sleep(Duration::from_millis(500));
    trace.exits()
}

fn qemu(trace: &ExitReport, init: &[u8]) -> Option<f64> {
    let dir = std::env::temp_dir().join(format!("cofferdam-exits-{}", std::process::id()));
    fs::create_dir_all(dir.join("root/dev")).ok()?;
    fs::write(dir.join("root/init"), init).ok()?;
    let archive = "chmod 755 root/init && mknod root/dev/hwrng c 10 183 && cd root && find . | cpio -o -H newc --quiet > ../initrd";
    Command::new("sh").args(["-c", archive]).current_dir(&dir).status().ok()?;
    let child = microvm(128, &kernel(), "reboot=t panic=-1 quiet")
        .args(["-serial", "null", "-device", "virtio-rng-device", "-initrd"])
        .arg(dir.join("initrd"))
        .spawn()
        .ok()?;
    let machine = Running(child);
    std::thread::sleep(Duration::from_millis(700));
    let exits = trace.exits();
    drop(machine);
    let _ = fs::remove_dir_all(dir);
    Some(exits)
}

/// Pausing and resuming a guest that idles.
fn pauses(kernel: &Kernel) {
    let busybox = fs::read("/bin/busybox").expect("busybox-static: run `make setup`");
    let initramfs = Initramfs::new()
        .directory("/bin", 0o755)
        .directory("/dev", 0o755)
        .character_device("/dev/console", 0o600, (5, 1))
        .file("/bin/busybox", 0o755, busybox)
        .file("/init", 0o755, "#!/bin/busybox sh\nwhile :; do /bin/busybox sleep 1000; done\n");
    let kernel = kernel.clone().cmdline("console=hvc0 quiet").initramfs(initramfs);
    let vm = Vm::builder(kernel).memory(Size::mib(128)).console(Console::none()).start().expect("it starts");
    std::thread::sleep(Duration::from_millis(500));
    let (mut pause, mut resume) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let begin = Instant::now();
        vm.pause().expect("it pauses");
        pause.push(begin.elapsed().as_secs_f64() * 1e3);
        let begin = Instant::now();
        vm.resume().expect("it goes on");
        resume.push(begin.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_millis(5));
    }
    figure("pause of an idle VM", median(&pause), "ms", None);
    figure("resume", median(&resume), "ms", None);
}

fn main() {
    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    pauses(&kernel);
    let Some(trace) = ExitReport::new() else {
        println!("exits: this process may not trace system calls; run it as root");
        return;
    };
    for (name, init) in [("port write", port_writer()), ("register write", register_writer())] {
        let peer = qemu(&trace, &init);
        let name = format!("{name}, from KVM_RUN's return to its next call");
        figure(&name, ours(&kernel, &trace, init), "instructions", peer);
    }
}
