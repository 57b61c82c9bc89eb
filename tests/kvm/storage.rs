//! Disks under real programs: `fio` that reads back what it wrote, and a journal and a database whose machine is killed.
//!
//! `COFFERDAM_SOAK` makes them as long as wanted: seconds of `fio` for each kind of disk, and kills.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cofferdam::disk::{DiskLimit, IoEngine};
use cofferdam::kernel::Initramfs;
use cofferdam::{Console, Disk, Exit, Image, Rate, Size, Vm, VmBuilder};

use crate::check;
use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, Temp, alone, busybox, cache, kernel, soak};

/// In the environment of a process that shall run a machine until it is killed: the machine's disk.
pub const VICTIM: &str = "COFFERDAM_TEST_VICTIM";

/// The disk of a Debian with fio, e2fsprogs and sqlite3.
fn root() -> Result<PathBuf, Box<dyn std::error::Error>> {
    // In a directory of its own, so that it is the only disk there.
    let directory = cache().join("storage");
    Image::open(cache().join("images/debian-12-tools.tar"))?.cache_dir(&directory).prepare()?;
    let is_disk = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "erofs");
    let found = std::fs::read_dir(directory)?.flatten().map(|entry| entry.path()).find(is_disk);
    found.ok_or_else(|| "the image's disk is not there".into())
}

/// A machine with that Debian as `/dev/vda`, in which bash runs `script`.
fn debian(script: &str) -> Result<VmBuilder, Box<dyn std::error::Error>> {
    let init = "mkdir /mnt; mount -o ro -t erofs /dev/vda /mnt; for d in dev proc sys; do mount -o bind /$d /mnt/$d; done; \
                for d in tmp run mnt; do mount -t tmpfs $d /mnt/$d; done; cp /script /mnt/tmp/; \
                PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot /mnt bash /tmp/script; \
                reboot -f";
    let initramfs: Initramfs = busybox(init).file("/script", 0o644, script);
    let vm = Vm::builder(kernel().cmdline("console=hvc0 quiet").initramfs(initramfs)).memory(Size::mib(192));
    Ok(vm.disk(Disk::file(root()?).read_only(true)))
}

/// An empty file of 64 MiB.
fn file(temp: &Temp, name: &str) -> std::io::Result<PathBuf> {
    let path = temp.path(name);
    std::fs::File::create(&path)?.set_len(64 << 20)?;
    Ok(path)
}

/// A disk of every kind, and its name.
fn every_kind(temp: &Temp) -> Result<Vec<(&'static str, Disk)>, Box<dyn std::error::Error>> {
    let (base, image) = (file(temp, "base")?, temp.path("image.qcow2"));
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("64M").status()?;
    check!(made.success());
    Ok(vec![
        ("raw", Disk::file(file(temp, "raw")?).into()),
        ("scratch", Disk::scratch(Size::mib(64)).into()),
        ("private overlay", Disk::overlay(&base).into()),
        ("kept overlay", Disk::overlay(&base).persist_at(temp.path("kept")).into()),
        ("threads", Disk::file(file(temp, "threads")?).engine(IoEngine::Threads).into()),
        ("memory", Disk::memory(Size::mib(64)).into()),
        ("direct", Disk::file(file(temp, "direct")?).direct(true).into()),
        ("qcow2", Disk::qcow2(image).into()),
    ])
}

/// What this process has in memory of its own, without what it maps of files: the guest's memory too.
fn resident() -> Result<u64, Box<dyn std::error::Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).ok_or("no RssAnon")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Random writes of mixed sizes, with syncs, all of them read back and compared, while the machine is paused again and again and
/// what the disks may do changes.
pub fn fio_verifies_written_data() -> Outcome {
    // Other tests beside this one would take memory of the same process.
    if !alone("storage::fio_verifies_written_data")? {
        return Ok(());
    }
    let (temp, seconds, printed) = (Temp::new()?, soak().unwrap_or(4), Printed::default());
    let (names, disks): (Vec<_>, Vec<_>) = every_kind(&temp)?.into_iter().unzip();
    let script: String = ('b'..)
        .zip(&names)
        .map(|(letter, name)| {
            format!(
                "(fio --name={letter} --filename=/dev/vd{letter} --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw --bssplit=512/10:4k/40:64k/40:256k/10 \
                 --bs_unaligned=0 --numjobs=4 --offset_increment=16m --size=12m --fsync=32 --verify=crc32c --verify_backlog=64 \
                 --verify_fatal=1 --verify_state_save=0 --time_based --runtime={seconds} --thread --group_reporting --minimal > /tmp/{letter}.out \
                 && echo \"sound $(tail -n 1 /tmp/{letter}.out | cut -d';' -f47) KiB written to {name}\" || tail -n 3 /tmp/{letter}.out) &\n"
            )
        })
        .collect::<String>()
        + "wait\n";
    let vm = disks.into_iter().fold(debian(&script)?, VmBuilder::disk).console(printed.console());
    let vm = vm.memory(Size::mib(384)).start()?;
    let deadline = Instant::now() + TEST_TIMEOUT + 10 * Duration::from_secs(seconds);
    let limits = [DiskLimit::none(), DiskLimit::none().write_operations(Rate::per_second(500)), DiskLimit::none()];
    let (mut turns, mut sizes) = (limits.iter().cycle(), Vec::new());
    while vm.try_wait().is_none() {
        check!(Instant::now() < deadline, "{} {}", printed.text(), vm.report());
        std::thread::sleep(Duration::from_millis(70));
        sizes.push(resident()?);
        let limit = turns.next().ok_or("no limit")?;
        // It may have ended in between.
        if vm.pause().is_ok() {
            std::thread::sleep(Duration::from_millis(5));
            let _ = vm.resume();
        }
        for n in 1..=names.len() {
            let _ = vm.disk(n).and_then(|disk| disk.set_limit(*limit));
        }
    }
    let exit = vm.wait();
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    let written = |line: &str| line.trim().strip_prefix("sound ")?.split(' ').next()?.parse::<u64>().ok();
    let text = printed.text();
    let written: Vec<u64> = text.lines().filter_map(written).collect();
    check!(written.len() == names.len() && written.iter().all(|kib| *kib > 0), "{text}");
    // The last quarter of the time beside the one before it: what leaks goes on leaking.
    let most = |part: &[u64]| part.iter().copied().max().unwrap_or(0);
    let quarter = sizes.len() / 4;
    let (before, after) = (most(&sizes[..sizes.len() - quarter]), most(&sizes[sizes.len() - quarter..]));
    let total = written.iter().sum::<u64>() >> 10;
    let pauses = sizes.len();
    writeln!(
        std::io::stderr(),
        "fio: {total} MiB written in {seconds} s, {pauses} pauses, {before} and then {after} KiB of memory\n{text}"
    )?;
    let slack = if soak().is_some() { 8 } else { 16 };
    check!(after <= before + slack * 1024, "{before} KiB have become {after}");
    Ok(())
}

/// Numbers in a file and in a database, each printed on the console once it is durable. With less than "extra" a commit of SQLite's
/// may be undone after a loss of power: the directory without the journal is not synced.
const WORKLOAD: &str = "mount -t ext4 /dev/vdb /mnt && cd /mnt && echo ready\n\
    n=$(cat log 2>/dev/null | wc -l)\n\
    sqlite3 db 'pragma synchronous=extra; create table if not exists t(n integer primary key)'\n\
    while :; do n=$((n + 1)); echo $n >> log; sync log; sqlite3 db \"pragma synchronous=extra; insert or ignore into t values($n)\"; \
    echo durable $n; done\n";

/// The disk at this path, of the kind that its name says; what it lies on is beside it.
fn by_name(path: &Path) -> Disk {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("overlay") => Disk::overlay(path.with_file_name("base.raw")).persist_at(path).into(),
        Some("qcow2") => Disk::qcow2(path).backing_dir(path.parent().expect("a directory")).into(),
        _ => Disk::file(path).into(),
    }
}

/// Runs the machine whose disk is at `path`, until the test kills this process.
pub fn victim(path: &Path) -> Outcome {
    let vm = debian(WORKLOAD)?.disk(by_name(path)).console(Console::writer(std::io::stdout())).start()?;
    let exit = vm.wait();
    Err(format!("the machine was not to end: {exit}").into())
}

/// Kills the VM's process `after` the first number. Returns the last number that the guest has printed as durable.
fn killed(disk: &Path, after: Duration) -> Result<u64, Box<dyn std::error::Error>> {
    let mut child = Command::new(std::env::current_exe()?).env(VICTIM, disk).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines().map_while(Result::ok);
    let number = |line: &str| line.trim().strip_prefix("durable ")?.parse::<u64>().ok();
    let mut last = lines.by_ref().find_map(|line| number(&line)).ok_or("it never said that anything is durable")?;
    let pid = child.id();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(after);
        Command::new("kill").args(["-KILL", &pid.to_string()]).status()
    });
    for line in lines {
        last = number(&line).unwrap_or(last);
    }
    let _ = killer.join();
    child.wait()?;
    Ok(last)
}

pub fn flushed_data_survives_sigkill_of_the_process() -> Outcome {
    let temp = Temp::new()?;
    let base = file(&temp, "base.raw")?;
    check!(Command::new("/sbin/mkfs.ext4").args(["-q", "-F"]).arg(&base).status()?.success());
    std::fs::copy(&base, temp.path("disk.raw"))?;
    let image = temp.path("disk.qcow2");
    let lying = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw"];
    check!(Command::new("qemu-img").args(lying).arg(&image).status()?.success());
    let disks = [temp.path("disk.raw"), temp.path("disk.overlay"), image];
    let mut seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_nanos() as u64;
    for (round, disk) in (0..soak().unwrap_or(3)).zip(disks.iter().cycle()) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let durable = killed(disk, Duration::from_millis(seed >> 33 & 0x7ff))?;
        let check = "e2fsck -fp /dev/vdb; echo fsck $?; mount -t ext4 /dev/vdb /mnt && cd /mnt && echo log $(tail -n 1 log) \
                     lines $(wc -l < log)\n sqlite3 db 'pragma integrity_check; select \"rows \", max(n), count(*) from t'\n\
                     cd / && umount /mnt && e2fsck -fn /dev/vdb > /dev/null && echo clean\n";
        let printed = Printed::default();
        let vm = debian(check)?.disk(by_name(disk)).console(printed.console()).start()?;
        vm.wait_timeout(TEST_TIMEOUT).ok_or("the check never ended")?;
        let text = printed.text();
        let numbers = |prefix: &str| -> Vec<u64> {
            let line = text.lines().find(|line| line.trim().starts_with(prefix)).unwrap_or_default();
            line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
        };
        // fsck's 1: what was wrong is right now, which is the journal that was replayed.
        check!(numbers("fsck").iter().all(|code| *code <= 1) && text.contains("clean"), "round {round}: {text}");
        let (log, rows) = (numbers("log"), numbers("rows"));
        check!(log.len() == 2 && log[0] == log[1] && log[0] >= durable, "round {round}: {durable} {text}");
        check!(rows.len() == 2 && rows[0] >= durable && text.contains("\nok"), "round {round}: {durable} {text}");
        writeln!(std::io::stderr(), "kill {round}: {} of {durable} and more transactions is whole", disk.display())?;
    }
    Ok(())
}
