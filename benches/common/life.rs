//! The shortest life of a guest: Linux with one program in its initramfs, which says what time it is and resets the machine.

#![allow(dead_code, reason = "no bench uses all of it")]

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use cofferdam::kernel::Initramfs;
use cofferdam::{Console, Kernel, Size, Vm};

use super::common::{median, microvm};

/// Lives that are counted; one before them is for the caches.
const ROUNDS: usize = 3;
/// Longer than any guest that ends at all.
const WAIT_TIMEOUT: Duration = Duration::from_secs(20);

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

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
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

pub(crate) fn initramfs() -> Initramfs {
    let console = Initramfs::new().directory("/dev", 0o755).character_device("/dev/console", 0o600, (5, 1));
    console.file("/init", 0o755, init())
}

/// Medians over the lives of guests that end at once, in ms.
pub(crate) struct Lives {
    /// From `start` to `wait` returned.
    pub whole: f64,
    /// The guest's own uptime at user space.
    pub uptime: f64,
    /// From `start` to the first KVM_RUN, when all vCPUs are made.
    pub first: f64,
    /// From the guest's end to `wait` returned.
    pub ended: f64,
}

/// Those of guests with so many vCPUs.
pub(crate) fn lives(kernel: &Kernel, vcpus: u32) -> Lives {
    let (mut whole, mut uptime, mut first, mut ended) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let clock = Clock::default();
        let kernel = kernel.clone().cmdline("console=hvc0 quiet").initramfs(initramfs());
        let begin = Instant::now();
        let builder = Vm::builder(kernel).vcpus(vcpus).memory(Size::mib(128)).console(Console::writer(clock.clone()));
        let vm = builder.start().expect("the guest starts");
        vm.wait_timeout(WAIT_TIMEOUT).expect("the guest ends");
        let end = begin.elapsed();
        let line = vm.timeline();
        if round == 0 {
            continue;
        }
        whole.push(ms(end));
        first.push(ms(line.running.expect("it ran")));
        ended.push(ms(end.saturating_sub(line.ended.expect("it ended"))));
        uptime.push(ms(clock.read()));
    }
    Lives { whole: median(&whole), uptime: median(&uptime), first: median(&first), ended: median(&ended) }
}

/// The whole life of the same guest in QEMU's microvm with so many processors and MiB of memory, in ms; `None` where QEMU is not
/// installed.
pub(crate) fn qemu(kernel: &Path, cmdline: &str, (vcpus, mib): (u32, u64), rounds: usize) -> Option<f64> {
    let dir = std::env::temp_dir().join(format!("cofferdam-bench-{}", std::process::id()));
    std::fs::create_dir_all(dir.join("root/dev")).ok()?;
    std::fs::write(dir.join("root/init"), init()).ok()?;
    let archive = "chmod 755 root/init && cd root && find . | cpio -o -H newc --quiet > ../initrd";
    Command::new("sh").args(["-c", archive]).current_dir(&dir).status().ok()?;
    let mut times = Vec::new();
    for round in 0..=rounds {
        let begin = Instant::now();
        let mut child = microvm(mib, kernel, cmdline)
            .args(["-smp", &vcpus.to_string(), "-machine", "isa-serial=off", "-initrd"])
            .arg(dir.join("initrd"))
            .spawn()
            .ok()?;
        let pid = child.id().to_string();
        let (ended, end) = mpsc::channel::<()>();
        // A peer may hang, and has no figure then.
        let watch = std::thread::spawn(move || {
            if end.recv_timeout(WAIT_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = Command::new("kill").args(["-KILL", &pid]).status();
            }
        });
        let status = child.wait().ok()?;
        let took = ms(begin.elapsed());
        drop(ended);
        let _ = watch.join();
        if !status.success() {
            return None;
        }
        if round > 0 {
            times.push(took);
        }
    }
    let _ = std::fs::remove_dir_all(dir);
    Some(median(&times))
}

/// QEMU's, as often as ours.
pub(crate) fn peer(kernel: &Path, vcpus: u32) -> Option<f64> {
    qemu(kernel, "reboot=t panic=-1 quiet", (vcpus, 128), ROUNDS)
}
