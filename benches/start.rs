//! How long a guest takes to start, to run a program and to end; QEMU's microvm with the same kernel and initramfs
//! beside it, in the same run.
//!
//! Runs in the lab's virtual time, where a millisecond is a million instructions (benches/README.md).

#![allow(clippy::print_stdout, clippy::expect_used, reason = "a bench prints, and fails loudly")]

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam::{Console, Container, Image, Initramfs, Kernel, Size, Vm};

const ROUNDS: usize = 3;
/// Longer than any guest that ends at all.
const PATIENCE: Duration = Duration::from_secs(20);
/// A distribution's kernel takes some thirty times as long.
const STOCK_ROUNDS: usize = 1;

/// PID 1 in 70 bytes: writes its clock to standard output, then resets the machine.
const INIT: [u8; 68] = [
    0x48, 0x83, 0xec, 0x10, // sub rsp, 16
    0xb8, 228, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x48, 0x89, 0xe6, 0x0f, 0x05, // clock_gettime(CLOCK_MONOTONIC, rsp)
    0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0x48, 0x89, 0xe6, 0xba, 16, 0, 0, 0, 0x0f, 0x05, // write(1, rsp, 16)
    0xb8, 169, 0, 0, 0, 0xbf, 0xad, 0xde, 0xe1, 0xfe, 0xbe, 0x69, 0x19, 0x12, 0x28, // reboot(magic, magic, ...
    0xba, 0x67, 0x45, 0x23, 0x01, 0x0f, 0x05, // ... RESTART)
    0xeb, 0xfe, 0x90, 0x90, 0x90, 0x90, 0x90, // jmp .
];

/// A static ELF program of that code.
fn init() -> Vec<u8> {
    let base = 0x40_0000u64;
    let size = (120 + INIT.len()) as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 62, 0, 1, 0, 0, 0];
    for field in [base + 120, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for field in [0, base, base, size, size, 4096] {
        file.extend(field.to_le_bytes());
    }
    file.extend(INIT);
    file
}

fn figure(name: &str, value: f64, peer: Option<f64>) {
    let (peer, ratio) = match peer {
        Some(peer) => (format!("{peer:.3}"), format!("{:.2}", peer / value)),
        None => ("null".into(), "null".into()),
    };
    println!(r#"{{"bench":"start","figure":"{name}","value":{value:.3},"unit":"ms","peer":{peer},"ratio":{ratio}}}"#);
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[derive(Clone, Default)]
struct Clock(Arc<Mutex<Vec<u8>>>);

impl Clock {
    /// The guest's time at its first user-space instruction; its terminal puts a CR before every LF.
    fn read(&self) -> Duration {
        let mut bytes = self.0.lock().expect("the console's bytes").clone();
        while bytes.len() > 16 {
            let at = bytes.windows(2).position(|w| w == b"\r\n").expect("a translated line feed");
            bytes.remove(at);
        }
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Duration::new(number(0), number(8) as u32)
    }
}

impl std::io::Write for Clock {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("the console's bytes").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn cache() -> String {
    let base = std::env::var("XDG_CACHE_HOME").or_else(|_| std::env::var("HOME").map(|h| h + "/.cache"));
    base.expect("HOME") + "/cofferdam"
}

fn initramfs() -> Initramfs {
    let console = Initramfs::new().directory("/dev", 0o755).character_device("/dev/console", 0o600, (5, 1));
    console.file("/init", 0o755, init())
}

/// A distribution's kernel until its user space has ended at once, and QEMU with the same files.
fn stock() {
    let path = cache() + "/kernels/cloud-6.12/vmlinuz";
    let begin = Instant::now();
    let kernel = Kernel::open(&path).expect("a stock kernel: run `make setup`");
    figure("stock kernel: Kernel::open (once for all VMs)", ms(begin.elapsed()), None);
    let cmdline = "reboot=t panic=-1 quiet";
    let mut whole = Vec::new();
    for round in 0..=STOCK_ROUNDS {
        let kernel = kernel.clone().cmdline(cmdline).initramfs(initramfs());
        let begin = Instant::now();
        let vm = Vm::builder(kernel).start().expect("the guest starts");
        vm.wait().expect("the guest ends");
        if round > 0 {
            whole.push(ms(begin.elapsed()));
        }
    }
    let qemu = qemu(&path, cmdline, 256, STOCK_ROUNDS);
    figure("stock kernel: start to end of a guest that ends at once in user space", median(whole), qemu);
}

/// Medians over the lives of guests that power off at once, in ms.
struct Lives {
    /// From `start` to `wait` returned.
    whole: f64,
    /// The guest's own uptime at user space.
    uptime: f64,
    /// From `start` to the first KVM_RUN, when all vCPUs are made.
    first: f64,
    /// From the guest's end to `wait` returned.
    ended: f64,
}

/// `None` when one of them did not end.
fn lives(kernel: &Kernel, vcpus: u32) -> Option<Lives> {
    let (mut whole, mut uptime, mut first, mut ended) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let clock = Clock::default();
        let kernel = kernel.clone().cmdline("console=hvc0 quiet").initramfs(initramfs());
        let begin = Instant::now();
        let builder = Vm::builder(kernel).vcpus(vcpus).memory(Size::mib(128)).console(Console::writer(clock.clone()));
        let vm = builder.start().expect("the guest starts");
        vm.wait_timeout(PATIENCE).expect("the guest's end")?;
        let end = begin.elapsed();
        let line = vm.timeline();
        // Once for the caches.
        if round == 0 {
            continue;
        }
        whole.push(ms(end));
        first.push(ms(line.running.expect("it ran")));
        ended.push(ms(end.saturating_sub(line.ended.expect("it ended"))));
        uptime.push(ms(clock.read()));
    }
    Some(Lives { whole: median(whole), uptime: median(uptime), first: median(first), ended: median(ended) })
}

/// A guest that powers off at once: time from `start` to its end beyond its own uptime, and QEMU's whole time.
fn shortest_life(kernel: &Kernel) -> Lives {
    let path = std::env::var("COFFERDAM_KERNEL").unwrap_or(cache() + "/kernel/vmlinux");
    let qemu = qemu(&path, "reboot=t panic=-1 quiet", 128, ROUNDS);
    let lives = lives(kernel, 1).expect("the guest ends");
    let beyond = |whole: f64| whole - lives.uptime;
    figure("start() to first KVM_RUN", lives.first, None);
    figure("guest's own uptime at user space", lives.uptime, None);
    figure("start to end of a guest that powers off at once", lives.whole, qemu);
    figure("the same beyond the guest's uptime", beyond(lives.whole), qemu.map(beyond));
    figure("guest's end to wait() returned", lives.ended, None);
    lives
}

/// What a second vCPU adds. Without a peer: guests of several vCPUs, QEMU's too, now and then never end in virtual time, which
/// has one processor for all of them.
fn second_vcpu(kernel: &Kernel, one: &Lives) {
    let Some(two) = lives(kernel, 2) else {
        println!("start: a guest of two vCPUs did not end");
        return;
    };
    figure("the second vCPU: start() to first KVM_RUN", two.first - one.first, None);
    figure("the second vCPU: start to end", two.whole - one.whole, None);
}

/// QEMU's microvm of `memory` MiB, start to end, in ms; `None` where it is not installed.
fn qemu(kernel: &str, cmdline: &str, memory: u32, rounds: usize) -> Option<f64> {
    let dir = std::env::temp_dir().join(format!("cofferdam-bench-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("root/dev")).ok()?;
    std::fs::write(dir.join("root/init"), init()).ok()?;
    let archive = "chmod 755 root/init && cd root && find . | cpio -o -H newc --quiet > ../initrd";
    Command::new("sh").args(["-c", archive]).current_dir(&dir).status().ok()?;
    let mut times = Vec::new();
    for round in 0..=rounds {
        let begin = Instant::now();
        let status = Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=off,rtc=off",
                "-accel",
                "kvm",
                "-cpu",
                "host",
            ])
            .args([
                "-m",
                &memory.to_string(),
                "-smp",
                "1",
                "-nodefaults",
                "-no-user-config",
                "-nographic",
                "-no-reboot",
            ])
            .args(["-kernel", kernel, "-append", cmdline, "-initrd"])
            .arg(dir.join("initrd"))
            .stdin(Stdio::null())
            .status()
            .ok()?;
        if !status.success() {
            return None;
        }
        if round > 0 {
            times.push(ms(begin.elapsed()));
        }
    }
    let _ = std::fs::remove_dir_all(dir);
    Some(median(times))
}

/// A container: until programs can be started, and what running one takes.
fn container(kernel: &Kernel, image: &Image) {
    let start =
        || Container::builder(image.clone()).kernel(kernel.clone()).memory(Size::mib(128)).start().expect("it starts");
    // Once for the caches.
    drop(start());
    let begin = Instant::now();
    let container = start();
    let (startup, line) = (container.startup(), container.vm().timeline());
    let first = Instant::now();
    assert!(container.exec(["/bin/true"]).status().expect("it runs").success());
    let first = first.elapsed();
    figure("container: start() to first KVM_RUN of its VM", ms(line.running.expect("it ran")), None);
    figure(
        "container: first KVM_RUN to kernel entry",
        ms(line.kernel_entered.unwrap_or_default() - line.running.unwrap_or_default()),
        None,
    );
    figure("container: start to user space", ms(startup.user_space), None);
    figure(
        "container: the same beyond the guest's uptime",
        ms(startup.user_space.saturating_sub(startup.kernel_uptime)),
        None,
    );
    figure("container: start to shim ready", ms(startup.ready), None);
    figure("container: start to first exec done", ms(begin.elapsed()), None);
    figure("container: first exec of /bin/true", ms(first), None);
    let mut trips: Vec<f64> = (0..20)
        .map(|_| {
            let begin = Instant::now();
            assert!(container.exec(["/bin/true"]).status().expect("it runs").success());
            ms(begin.elapsed())
        })
        .collect();
    trips.sort_by(f64::total_cmp);
    figure("container: exec of /bin/true, p50", trips[10], None);
    figure("container: exec of /bin/true, p99", trips[19], None);
    let stop = Instant::now();
    container.stop(Duration::from_secs(5)).expect("it stops");
    figure("container: stop() to ended", ms(stop.elapsed()), None);
}

fn main() {
    let begin = Instant::now();
    let kernel = Kernel::find().expect("a kernel: run `make setup`");
    figure("Kernel::open (once for all VMs)", ms(begin.elapsed()), None);
    let image = Image::open(cache() + "/images/debian-12.tar").expect("an image: run `make setup`");
    // In the lab that is memory, and its other files are served by another machine's program.
    let disks = std::env::temp_dir().join(format!("cofferdam-bench-images-{}", std::process::id()));
    let image = image.cache_dir(&disks);
    image.prepare().expect("the image's disk");
    let one = shortest_life(&kernel);
    container(&kernel, &image);
    std::fs::remove_dir_all(disks).expect("a folder of its own");
    stock();
    // Last, as such a guest now and then never ends in virtual time.
    second_vcpu(&kernel, &one);
}
