//! Disks on real block devices that fail, stand still and come back, by the host's device mapper, beside a neighbour that must not
//! notice.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use cofferdam::disk::{ErrorAction, IoEngine};
use cofferdam::event::{DeviceId, EventKind, Events};
use cofferdam::{Disk, Exit, Size, Vm};

use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, Temp, guest, host, host_words, soak};
use crate::{check, check_eq};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const SECTORS: u64 = (16 << 20) / 512;

/// A block device that fails or stalls at the test's command. Without udev, which is not in the lab, its node is the kernel's.
struct Device {
    name: String,
    below: String,
}

impl Device {
    fn new(temp: &Temp) -> Result<Self> {
        // Tests at the same time would find the same free loop device.
        static FREE: Mutex<u32> = Mutex::new(0);
        let mut n = FREE.lock().unwrap_or_else(|e| e.into_inner());
        *n += 1;
        let file = temp.path("device");
        std::fs::File::create(&file)?.set_len(SECTORS * 512)?;
        if !PathBuf::from("/dev/loop-control").exists() {
            host("mknod /dev/loop-control c 10 237")?;
        }
        let below = host(&format!("losetup -f --show {}", file.display()))?;
        let device = Self { name: format!("cofferdam-{}-{n}", std::process::id()), below };
        host_words(&["dmsetup", "--noudevsync", "create", &device.name, "--table", &device.table("linear")])?;
        Ok(device)
    }

    fn table(&self, kind: &str) -> String {
        match kind {
            "linear" => format!("0 {SECTORS} linear {} 0", self.below),
            kind => format!("0 {SECTORS} {kind}"),
        }
    }

    fn path(&self) -> Result<PathBuf> {
        Ok(PathBuf::from("/dev").join(host(&format!("dmsetup info -c --noheadings -o blkdevname {}", self.name))?))
    }

    /// From now on nothing is answered.
    fn stall(&self) -> Outcome {
        host(&format!("dmsetup --noudevsync suspend --noflush --nolockfs {}", self.name)).map(drop)
    }

    fn go_on(&self) -> Outcome {
        host(&format!("dmsetup --noudevsync resume {}", self.name)).map(drop)
    }

    /// From now on all of it does what this target does.
    fn turn_into(&self, kind: &str) -> Outcome {
        self.stall()?;
        host_words(&["dmsetup", "--noudevsync", "load", &self.name, "--table", &self.table(kind)])?;
        self.go_on()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = self.go_on();
        let _ = host(&format!("dmsetup --noudevsync remove --retry {}", self.name));
        let _ = host(&format!("losetup -d {}", self.below));
    }
}

/// Writes to `/dev/vda` and reads it, past the guest's cache, and tells each time whether it went well.
const WORK: &str = "n=0; while :; do n=$((n + 1)); \
    if echo $n | dd of=/dev/vda bs=4096 conv=sync FSYNC oflag=direct 2>/dev/null && dd if=/dev/vda of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null; \
    then echo well $n; else echo failed $n; fi; usleep 50000; done";

/// A guest that works on this disk, and what it prints.
fn working(disk: impl Into<Disk>, synced: bool) -> Result<(Vm, Printed)> {
    let printed = Printed::default();
    let script = WORK.replace("conv=sync FSYNC", if synced { "conv=sync,fsync" } else { "conv=sync" });
    let vm = guest(&script).disk(disk).console(printed.console()).start()?;
    printed.wait_for("well 3")?;
    Ok((vm, printed))
}

/// How often it went well, and how often not.
fn counts(printed: &Printed) -> (usize, usize) {
    let text = printed.text();
    (text.matches("well ").count(), text.matches("failed ").count())
}

/// Waits until it went well, or failed, three more times.
fn more(printed: &Printed, well: bool) -> Outcome {
    let count = || if well { counts(printed).0 } else { counts(printed).1 };
    let (before, deadline) = (count(), Instant::now() + TEST_TIMEOUT);
    while count() < before + 3 {
        check!(Instant::now() < deadline, "{}", printed.text());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The errno of the next fault that was reported.
fn fault(events: &Events) -> Result<Option<i32>> {
    loop {
        let event = events.next_timeout(TEST_TIMEOUT).ok_or("no fault was reported")?;
        if let EventKind::DiskError { error: fault } = event.kind {
            check!(fault.disk == DeviceId::Disk(0) && fault.action == ErrorAction::Report, "{fault}");
            return Ok(fault.errno);
        }
    }
}

pub fn guest_sees_io_errors_until_the_device_recovers() -> Outcome {
    let (neighbour, untouched) = working(Disk::scratch(Size::mib(1)), true)?;
    for engine in [IoEngine::IoUring, IoEngine::Threads] {
        let temp = Temp::new()?;
        let device = Device::new(&temp)?;
        let (vm, printed) = working(Disk::file(device.path()?).direct(true).engine(engine), false)?;
        let events = vm.events()?;
        device.turn_into("error")?;
        check_eq!(fault(&events)?, Some(5));
        more(&printed, false)?;
        more(&untouched, true)?;
        device.turn_into("linear")?;
        more(&printed, true)?;
        vm.kill();
        check!(matches!(vm.wait(), Exit::Killed { .. }));
    }
    check_eq!(counts(&untouched).1, 0);
    drop(neighbour);
    Ok(())
}

pub fn every_flush_fails_after_a_failed_sync() -> Outcome {
    let temp = Temp::new()?;
    let device = Device::new(&temp)?;
    let (vm, printed) = working(Disk::file(device.path()?), true)?;
    let events = vm.events()?;
    device.turn_into("error")?;
    check_eq!(fault(&events)?, Some(5));
    device.turn_into("linear")?;
    // The host has forgotten that bytes were lost; the disk has not.
    let (well, _) = counts(&printed);
    more(&printed, false)?;
    check_eq!(counts(&printed).0, well);
    vm.kill();
    vm.wait();
    Ok(())
}

pub fn stalled_device_delays_only_its_own_guest() -> Outcome {
    let (neighbour, untouched) = working(Disk::scratch(Size::mib(1)), true)?;
    let (one, two) = (Temp::new()?, Temp::new()?);
    let devices = [Device::new(&one)?, Device::new(&two)?];
    let disk = |n: usize, engine| Ok::<_, Box<dyn std::error::Error>>(Disk::file(devices[n].path()?).engine(engine));
    let guests =
        [working(disk(0, IoEngine::IoUring)?.direct(true), true)?, working(disk(1, IoEngine::Threads)?, true)?];
    for device in &devices {
        device.stall()?;
    }
    let (begin, mut before) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_secs(soak().map_or(13, |_| 30)) {
        more(&untouched, true)?;
        let now: usize = guests.iter().map(|(_, printed)| counts(printed).0).sum();
        if begin.elapsed() > Duration::from_secs(5) && before == 0 {
            before = now;
        }
        check!(before == 0 || now == before, "a disk that stands still has answered");
    }
    for device in &devices {
        device.go_on()?;
    }
    for (vm, printed) in &guests {
        more(printed, true)?;
        check_eq!(counts(printed).1, 0);
        vm.kill();
        vm.wait();
    }
    check_eq!(counts(&untouched).1, 0);
    drop(neighbour);
    Ok(())
}

pub fn read_only_file_system_fails_writes() -> Outcome {
    let temp = Temp::new()?;
    let (device, directory) = (Device::new(&temp)?, temp.path("mounted"));
    std::fs::create_dir(&directory)?;
    let node = device.path()?;
    host(&format!("mkfs.ext4 -q {}", node.display()))?;
    host(&format!("mount -o errors=remount-ro {} {}", node.display(), directory.display()))?;
    let path = directory.join("disk");
    std::fs::File::create(&path)?.set_len(1 << 20)?;
    let (vm, printed) = working(Disk::file(&path), true)?;
    let events = vm.events()?;
    // As the host's kernel does when it finds the file system damaged.
    host(&format!("mount -o remount,abort {}", directory.display()))?;
    let errno = fault(&events)?;
    check!([Some(5), Some(30)].contains(&errno), "{errno:?}");
    more(&printed, false)?;
    vm.kill();
    vm.wait();
    host(&format!("umount {}", directory.display()))?;
    host(&format!("mount -o ro {} {}", node.display(), directory.display()))?;
    let refused = guest("").disk(Disk::file(&path)).start().map(drop).expect_err("the file system is read-only");
    check_eq!(refused.kind(), cofferdam::ErrorKind::PermissionDenied);
    host(&format!("umount {}", directory.display())).map(drop)
}
