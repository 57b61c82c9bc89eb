//! What a guest's real `fio` gets of a raw file, and what of the host's processor that takes; QEMU's microvm beside it, with
//! io_uring and with threads, in the same run.
//!
//! Runs in the lab's virtual time (benches/README.md): its figures are of an emulated processor, and only their ratios mean
//! anything.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use cofferdam::kernel::Initramfs;
use cofferdam::{Console, Disk, Image, Kernel, Size, Vm};
use common::{Running, cache, figure, kernel, microvm};

/// What `fio` does: how it is called here, and its options. The first touches all that it needs; what the second takes, which is
/// its own start and end, is taken off the others.
const JOBS: [(&str, &str); 9] = [
    ("one request, for the first time", "--rw=randread --bs=4k --number_ios=1"),
    ("one request", "--rw=randread --bs=4k --number_ios=1"),
    ("4k random read, depth 1", "--rw=randread --bs=4k --number_ios=4000"),
    ("4k random read, depth 32", "--rw=randread --bs=4k --iodepth=32 --number_ios=16000"),
    ("4k random write, depth 1", "--rw=randwrite --bs=4k --number_ios=4000"),
    ("4k random write, depth 32", "--rw=randwrite --bs=4k --iodepth=32 --number_ios=16000"),
    ("4k random write with fsync, depth 1", "--rw=randwrite --bs=4k --fsync=1 --number_ios=4000"),
    ("128k read in sequence, depth 8", "--rw=read --bs=128k --iodepth=8 --number_ios=1000"),
    ("128k write in sequence, depth 8", "--rw=write --bs=128k --iodepth=8 --number_ios=1000"),
];
const DATA: u64 = 128 << 20;
/// Longer than any job takes in the lab.
const WAIT_TIMEOUT: Duration = Duration::from_secs(15);

/// Processor time that a process has used, all its threads together, those that have ended too.
fn used(process: &str) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    Duration::from_millis(10 * ticks.filter_map(|n| n.parse::<u64>().ok()).sum::<u64>())
}

/// What came of one job.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    /// Requests in a second.
    rate: f64,
    /// Requests in a second of the host's processor.
    per_cpu: f64,
}

/// Reads what the guest prints, until it has ended, and looks at the process's time around each job.
fn outcomes(lines: impl Iterator<Item = (String, Duration)>) -> Vec<Outcome> {
    let (mut all, mut before, mut itself) = (Vec::new(), Duration::ZERO, Duration::ZERO);
    for (line, now) in lines {
        let line = line.trim();
        if line == "begin" {
            before = now;
        } else if line.starts_with("3;fio") {
            // fio, "Terse output", version 3: reads begin at field 6, writes at field 47; then bandwidth, rate, milliseconds.
            let fields: Vec<f64> = line.split(';').map(|field| field.parse().unwrap_or(0.0)).collect();
            let (rate, ms) = (fields[7] + fields[48], fields[8].max(fields[49]));
            let took = now - before;
            if all.len() < 2 {
                itself = took;
            }
            let cpu = took.saturating_sub(itself).as_secs_f64();
            all.push(Outcome { rate, per_cpu: rate * ms / 1e3 / cpu });
            if all.len() == JOBS.len() {
                break;
            }
        } else {
            log(line);
        }
    }
    all
}

fn log(line: &str) {
    if !line.is_empty() {
        eprintln!("guest: {line}");
    }
}

/// A console that gives away its lines, each with the time that this process has used by then.
struct Lines(Vec<u8>, mpsc::Sender<(String, Duration)>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned();
                let _ = self.1.send((line, used("self")));
            } else {
                self.0.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Everything that the machines share, in a directory that goes with it.
struct Bench {
    dir: PathBuf,
    kernel: PathBuf,
    root: PathBuf,
}

impl Drop for Bench {
    fn drop(&mut self) {
        if in_lab() {
            let _ = Command::new("umount").arg(self.dir.join("data")).status();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Where what is temporary is in memory. Files there are never read or written at once (`RWF_NOWAIT`), as those on disks are
/// whose contents the host has cached.
fn in_lab() -> bool {
    std::env::var_os("COFFERDAM_IN_LAB").is_some()
}

/// A directory for disks, in the lab on a file system as hosts have it.
fn data_directory(dir: &Path) {
    fs::create_dir(dir.join("data")).expect("a directory");
    let made = "truncate -s 1G fs && /sbin/mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 fs && \
                { [ -e /dev/loop-control ] || mknod /dev/loop-control c 10 237; } && mount -o loop fs data";
    let made = || Command::new("sh").args(["-c", made]).current_dir(dir).status().is_ok_and(|it| it.success());
    assert!(!in_lab() || made(), "e2fsprogs and mount: run `make setup`");
}

const CMDLINE: &str = "console=hvc0 quiet reboot=t panic=-1";

impl Bench {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("cofferdam-disk-bench-{}", std::process::id()));
        fs::create_dir_all(dir.join("root/bin")).expect("a directory");
        data_directory(&dir);
        let image = Image::open(cache().join("images/debian-12-tools.tar")).expect("an image: run `make setup`");
        // In a directory of its own, its disk is the only file there.
        let disks = cache().join("bench-disk");
        image.cache_dir(&disks).prepare().expect("the image's disk");
        let is_disk = |path: &PathBuf| path.extension().is_some_and(|e| e == "erofs");
        let root =
            fs::read_dir(disks).expect("it").flatten().map(|e| e.path()).find(is_disk).expect("the image's disk");
        let jobs: String = JOBS
            .iter()
            .map(|(_, options)| {
                format!(
                    "echo begin\nchroot /mnt fio --name=job --filename=/dev/vdb --direct=1 --ioengine=libaio --thread \
                     --randrepeat=1 --output-format=terse --terse-version=3 {options}\n"
                )
            })
            .collect();
        let script = format!(
            "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\nmkdir -p /proc /sys /mnt\n\
             mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev\n\
             mount -o ro -t erofs /dev/vda /mnt; mount -o bind /dev /mnt/dev; mount -o bind /proc /mnt/proc\n\
             mount -o bind /sys /mnt/sys; mount -t tmpfs tmp /mnt/tmp\n{jobs}reboot -f\n"
        );
        fs::write(dir.join("root/init"), script).expect("the script");
        let archive = "chmod 755 root/init && mkdir -p root/dev && cp /bin/busybox root/bin/ && mknod root/dev/console c 5 1 && \
                       cd root && find . | cpio -o -H newc --quiet > ../initrd";
        let made = Command::new("sh").args(["-c", archive]).current_dir(&dir).status().expect("sh");
        assert!(made.success(), "busybox-static and cpio: run `make setup`");
        Self { dir, kernel: kernel(), root }
    }

    /// A disk that was written whole, so that nothing is the first to touch a page of it.
    fn data(&self, name: &str) -> PathBuf {
        let path = self.dir.join("data").join(name);
        let mut file = File::create(&path).expect("a disk");
        let piece: Vec<u8> = (0..1u32 << 18).flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
        (0..DATA / piece.len() as u64).for_each(|_| file.write_all(&piece).expect("room for a disk"));
        path
    }

    fn ours(&self) -> Vec<Outcome> {
        let (to, from) = mpsc::channel();
        let data = self.data("ours");
        let kernel = Kernel::open(&self.kernel).expect("a kernel: run `make setup`").cmdline(CMDLINE);
        let kernel = kernel.initramfs(Initramfs::open(self.dir.join("initrd")).expect("the initramfs"));
        let vm = Vm::builder(kernel)
            .memory(Size::mib(256))
            .disk(Disk::file(&self.root).read_only(true))
            .disk(Disk::file(&data))
            .console(Console::writer(Lines(Vec::new(), to)))
            .start()
            .expect("the guest starts");
        let all = outcomes(std::iter::from_fn(|| from.recv_timeout(WAIT_TIMEOUT).ok()));
        drop(vm);
        fs::remove_file(data).expect("the disk goes");
        all
    }

    /// `None` where it is not installed, or knows no such way.
    fn qemu(&self, aio: &str) -> Option<Vec<Outcome>> {
        let data = self.data("qemu");
        let drive = |id: &str, path: &Path, more: &str, device: &str| {
            let drive = format!("id={id},if=none,format=raw,file={},{more}", path.display());
            ["-drive".to_owned(), drive, "-device".to_owned(), format!("virtio-blk-device,drive={id}{device}")]
        };
        let child = microvm(256, &self.kernel, CMDLINE)
            .args(["-chardev", "stdio,id=console", "-device", "virtio-serial-device"])
            .args(["-device", "virtconsole,chardev=console", "-object", "iothread,id=io", "-initrd"])
            .arg(self.dir.join("initrd"))
            .args(drive("root", &self.root, "readonly=on", ""))
            .args(drive("data", &data, &format!("aio={aio},cache=writeback"), ",iothread=io"))
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut machine = Running(child);
        let pid = machine.0.id().to_string();
        let lines = BufReader::new(machine.0.stdout.take()?).lines().map_while(Result::ok);
        let (to, from) = mpsc::channel();
        let reader = thread::spawn(move || lines.for_each(|line| drop(to.send((line, used(&pid))))));
        let all = outcomes(std::iter::from_fn(|| from.recv_timeout(WAIT_TIMEOUT).ok()));
        drop(machine);
        let _ = reader.join();
        fs::remove_file(data).ok()?;
        Some(all)
    }
}

/// Instead of a guest that hangs for the emulation's fault (lab/README.md), has another.
fn again(mut run: impl FnMut() -> Option<Vec<Outcome>>) -> Option<Vec<Outcome>> {
    for _ in 0..4 {
        let all = run()?;
        if all.len() == JOBS.len() {
            return Some(all);
        }
        eprintln!("a guest hung after {} of {} jobs, and is started again", all.len(), JOBS.len());
    }
    None
}

fn main() {
    let bench = Bench::new();
    let ours = again(|| Some(bench.ours())).expect("every job has an outcome");
    for aio in ["io_uring", "threads"] {
        let peer = again(|| bench.qemu(aio));
        for (n, (job, _)) in JOBS.iter().enumerate().skip(2) {
            let peer = peer.as_ref().map(|all| all[n]);
            figure(
                &format!("{job}: requests per second of the host's processor (QEMU: {aio})"),
                ours[n].per_cpu,
                "1/s",
                peer.map(|p| p.per_cpu),
            );
            figure(&format!("{job}: requests per second (QEMU: {aio})"), ours[n].rate, "1/s", peer.map(|p| p.rate));
        }
    }
}
