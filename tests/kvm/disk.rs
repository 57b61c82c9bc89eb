//! Disks are what they were said to be.

use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam::disk::{DiskLimit, DiskOperation, ErrorAction, ErrorClass, IoEngine};
use cofferdam::event::{DeviceId, EventKind, Throttled};
use cofferdam::{Disk, ErrorKind, Exit, Rate, Size, Vm, VmBuilder};

use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, Temp, guest, run, soaking};
use crate::{check, check_eq};

fn image(temp: &Temp, name: &str, fill: u8) -> std::io::Result<std::path::PathBuf> {
    let path = temp.path(name);
    fs::write(&path, vec![fill; 1 << 20])?;
    Ok(path)
}

pub fn written_data_is_read_back() -> Outcome {
    let temp = Temp::new()?;
    let path = image(&temp, "a.img", 0)?;
    let script = "echo written by the guest | dd of=/dev/vda bs=512 seek=100 conv=sync,fsync 2>/dev/null\nreboot -f";
    run(guest(script).disk(Disk::file(&path)))?;
    let mut bytes = [0; 20];
    File::open(&path)?.read_exact_at(&mut bytes, 100 * 512)?;
    check_eq!(&bytes, b"written by the guest");
    let (_, printed) =
        run(guest("dd if=/dev/vda bs=512 skip=100 count=1 2>/dev/null\nreboot -f").disk(Disk::file(&path)))?;
    check!(printed.contains("written by the guest"), "{printed}");
    Ok(())
}

pub fn disks_appear_in_the_order_of_the_builder() -> Outcome {
    let temp = Temp::new()?;
    let builder = guest("for d in a b c; do head -c 1 /dev/vd$d; done\nreboot -f")
        .disk(Disk::file(image(&temp, "a.img", b'1')?))
        .disk(Disk::file(image(&temp, "b.img", b'2')?).read_only(true))
        .disk(Disk::file(image(&temp, "c.img", b'3')?));
    check!(run(builder)?.1.contains("123"));
    Ok(())
}

pub fn read_only_disk_rejects_writes() -> Outcome {
    let temp = Temp::new()?;
    let path = image(&temp, "a.img", b'x')?;
    let script = "cat /sys/block/vda/ro\necho y > /dev/vda || echo refused\nreboot -f";
    let (_, printed) = run(guest(script).disk(Disk::file(&path).read_only(true)))?;
    check!(printed.contains('1') && printed.contains("refused"), "{printed}");
    check!(fs::read(&path)?.iter().all(|b| *b == b'x'));
    Ok(())
}

pub fn image_is_locked_for_one_writer_or_many_readers() -> Outcome {
    let temp = Temp::new()?;
    let path = image(&temp, "a.img", 0)?;
    let spin = "while :; do sleep 1; done";
    let readers = [guest(spin), guest(spin)].map(|g| g.disk(Disk::file(&path).read_only(true)).start());
    check!(readers.iter().all(Result::is_ok), "{readers:?}");
    let error = guest(spin).disk(Disk::file(&path)).start().expect_err("a writer beside readers");
    check_eq!(error.kind(), ErrorKind::ResourceBusy);
    check!(error.to_string().contains("attaching disk 0") && error.to_string().contains("a.img"), "{error}");
    drop(readers);
    guest(spin).disk(Disk::file(&path)).start()?;
    Ok(())
}

pub fn disk_capacity_is_the_configured_size() -> Outcome {
    let (_, printed) = run(guest("cat /sys/block/vda/size\nreboot -f").disk(Disk::scratch(Size::gib(3))))?;
    check_eq!(printed.trim(), (3 * 1024 * 2048).to_string());
    Ok(())
}

/// Both engines, and whether what moves the bytes is what was asked for.
const ENGINES: [IoEngine; 2] = [IoEngine::IoUring, IoEngine::Threads];

fn engine_of(vm: &Vm) -> Option<IoEngine> {
    vm.stats().devices.iter().find(|d| d.device == DeviceId::Disk(0)).and_then(|d| d.engine)
}

/// A running VM and what it prints.
fn started(builder: VmBuilder) -> Result<(Vm, Printed), Box<dyn Error>> {
    let printed = Printed::default();
    Ok((builder.console(printed.console()).start()?, printed))
}

fn allocated(path: &Path) -> std::io::Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

pub fn serial_number_and_queue_count_are_visible() -> Outcome {
    let script =
        "cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial; echo; ls /sys/block/vda/mq | wc -l\nreboot -f";
    let disk = Disk::scratch(Size::mib(1)).serial("data-0123456789abcde").queues(2);
    let (_, printed) = run(guest(script).vcpus(2).disk(disk).disk(Disk::scratch(Size::mib(1))))?;
    check_eq!(printed.split_whitespace().collect::<Vec<_>>(), ["data-0123456789abcde", "disk1", "2"]);
    Ok(())
}

pub fn discard_frees_host_space() -> Outcome {
    let temp = Temp::new()?;
    for engine in ENGINES {
        let path = temp.path("a.img");
        fs::write(&path, vec![7; 32 << 20])?;
        let full = allocated(&path)?;
        let script = "blkdiscard -o 1048576 -l 16777216 /dev/vda && echo discarded; sync\nreboot -f";
        let (_, printed) = run(guest(script).disk(Disk::file(&path).engine(engine)))?;
        check!(printed.contains("discarded"), "{printed}");
        check!(allocated(&path)? + (16 << 20) <= full, "{} of {full}", allocated(&path)?);
        let bytes = fs::read(&path)?;
        check!(bytes[..1 << 20].iter().chain(&bytes[17 << 20..]).all(|b| *b == 7));
    }
    Ok(())
}

pub fn disk_grows_while_in_use() -> Outcome {
    for engine in ENGINES {
        let script =
            "echo ready; while [ $(cat /sys/block/vda/size) = 2048 ]; do sleep 0.1; done; cat /sys/block/vda/size
            echo grown | dd of=/dev/vda bs=512 seek=4095 conv=sync,fsync 2>/dev/null && echo written\nreboot -f";
        let (vm, printed) = started(guest(script).disk(Disk::scratch(Size::mib(1)).engine(engine)))?;
        printed.wait_for("ready")?;
        let disk = vm.disk(0)?;
        check_eq!(disk.grow(Size::kib(512)).map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig));
        disk.grow(Size::mib(2))?;
        printed.wait_for("written")?;
        check!(printed.text().contains("4096"), "{}", printed.text());
        let usage = disk.usage()?;
        check!(usage.capacity == Size::mib(2) && usage.allocated < Size::mib(1), "{usage:?}");
        check_eq!(vm.disk(1).map(drop).map_err(|e| e.kind()), Err(ErrorKind::NotFound));
    }
    Ok(())
}

pub fn rate_limits_hold_and_can_be_changed() -> Outcome {
    for engine in ENGINES {
        let script = "echo ready; dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct 2>/dev/null; echo slow
            dd if=/dev/vda of=/dev/null bs=1M count=64 iflag=direct 2>/dev/null; echo fast\nreboot -f";
        let limit = DiskLimit::none().read_bytes(Rate::per_second(2 << 20));
        let disk = Disk::scratch(Size::mib(64)).engine(engine).limit(limit);
        let (vm, printed) = started(guest(script).disk(disk))?;
        printed.wait_for("ready")?;
        let begin = Instant::now();
        printed.wait_for("slow")?;
        // A tenth of a second's worth comes at once, and the last request is paid later.
        check!(begin.elapsed() > Duration::from_millis(900), "{:?}", begin.elapsed());
        let stats = vm.stats().devices[0].clone();
        check!(stats.throttled > 0 && stats.throttled_time > Duration::from_millis(500), "{stats:?}");
        let is_throttled = |event: cofferdam::event::Event| {
            event.kind == EventKind::Throttled { what: Throttled::Device(DeviceId::Disk(0)) }
        };
        let events = vm.events()?;
        check!(std::iter::from_fn(|| events.next_timeout(Duration::ZERO)).any(is_throttled));
        vm.disk(0)?.set_limit(DiskLimit::none())?;
        let begin = Instant::now();
        printed.wait_for("fast")?;
        // At the old rate it would take 32 s.
        check!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    }
    Ok(())
}

pub fn full_host_pauses_the_guest_until_space_is_freed() -> Outcome {
    // A file system of 8 MiB, in the lab, where this process may mount.
    let temp = Temp::new()?;
    for (n, engine) in ENGINES.into_iter().enumerate() {
        let directory = temp.path(&format!("small{n}"));
        fs::create_dir(&directory)?;
        let mount = |args: &[&str]| Command::new("mount").args(args).arg(&directory).status();
        check!(mount(&["-t", "tmpfs", "-o", "size=8m", "small"])?.success());
        let path = directory.join("a.img");
        File::create(&path)?.set_len(32 << 20)?;
        let script = "dd if=/dev/zero bs=1M count=16 2>/dev/null | tr '\\0' x | dd of=/dev/vda bs=1M iflag=fullblock conv=fsync 2>/dev/null && echo done\nreboot -f";
        let (vm, printed) = started(guest(script).disk(Disk::file(&path).engine(engine)))?;
        let events = vm.events()?;
        let fault = loop {
            if let EventKind::DiskError { error: fault } =
                events.next_timeout(TEST_TIMEOUT).ok_or("no fault was reported")?.kind
            {
                break fault;
            }
        };
        check!(
            fault.errno == Some(28) && fault.disk == DeviceId::Disk(0) && fault.action == ErrorAction::Pause,
            "{fault}"
        );
        check!(!printed.text().contains("done"));
        // Trying again without room holds it again, also after a pause.
        vm.pause()?;
        vm.resume()?;
        std::thread::sleep(Duration::from_millis(200));
        check!(!printed.text().contains("done") && vm.try_wait().is_none());
        check!(mount(&["-o", "remount,size=64m"])?.success());
        vm.resume()?;
        printed.wait_for("done")?;
        vm.wait();
        let bytes = fs::read(&path)?;
        check!(bytes[..16 << 20].iter().all(|b| *b == b'x'));
        check!(Command::new("umount").arg(&directory).status()?.success());
    }
    Ok(())
}

pub fn error_action_stop_ends_the_vm() -> Outcome {
    let temp = Temp::new()?;
    let path = image(&temp, "a.img", 1)?;
    let script = "echo ready; while :; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null; sleep 0.1; done";
    for engine in ENGINES {
        File::options().write(true).open(&path)?.set_len(1 << 20)?;
        let disk = Disk::file(&path).engine(engine).on_error(ErrorClass::Read, ErrorAction::Stop);
        let (vm, printed) = started(guest(script).disk(disk))?;
        printed.wait_for("ready")?;
        // Its image shrinks under it.
        File::options().write(true).open(&path)?.set_len(512)?;
        let exit = vm.wait_timeout(TEST_TIMEOUT).ok_or("it never ended")?;
        let Exit::DiskFault { error: fault, .. } = exit else { return Err(format!("{exit}").into()) };
        check!(fault.disk == DeviceId::Disk(0) && fault.operation == DiskOperation::Read, "{fault}");
    }
    Ok(())
}

pub fn pause_leaves_no_request_in_flight() -> Outcome {
    let rounds = soaking(12, 6) as usize;
    for engine in ENGINES {
        let script = format!("mkdir -p /tmp; i=0; while [ $i -lt {rounds} ]; do
                tr '\\0' $(printf '\\\\%o' $((97 + i))) < /dev/zero | dd of=/dev/vda bs=64k count=32 iflag=fullblock oflag=direct 2>/dev/null
                dd if=/dev/vda bs=64k count=32 iflag=direct 2>/dev/null | md5sum; i=$((i + 1)); done; echo over\nreboot -f");
        let disk = Disk::scratch(Size::mib(2)).engine(engine).queues(2);
        let (vm, printed) = started(guest(&script).vcpus(2).disk(disk))?;
        check_eq!(engine_of(&vm), Some(engine));
        let mut pauses = 0;
        while !printed.text().contains("over") && vm.try_wait().is_none() {
            vm.pause()?;
            let before = vm.stats().devices[0].clone();
            std::thread::sleep(Duration::from_millis(5));
            check_eq!(vm.stats().devices[0], before);
            vm.disk(0)?.set_limit(DiskLimit::none().write_operations(Rate::per_second(2000)))?;
            vm.resume()?;
            // By what the guest does, not by time, of which a busy host gives it little.
            let next = before.requests + 8;
            let deadline = Instant::now() + TEST_TIMEOUT;
            while vm.stats().devices[0].requests < next && !printed.text().contains("over") && vm.try_wait().is_none() {
                check!(Instant::now() < deadline, "{before:?} and no request more: {}", printed.text());
                std::thread::sleep(Duration::from_millis(1));
            }
            pauses += 1;
        }
        vm.wait();
        check!(pauses >= 20, "paused {pauses} times");
        let text = printed.text();
        let sums: std::collections::BTreeSet<_> = text.lines().filter(|l| l.ends_with('-')).collect();
        check_eq!(sums.len(), rounds);
    }
    Ok(())
}

pub fn engine_falls_back_to_threads_without_io_uring() -> Outcome {
    const CHILD: &str = "COFFERDAM_TEST_NO_RING";
    if std::env::var_os(CHILD).is_none() {
        // For processes that lack the capability which is taken from the child; others keep io_uring.
        let forbidden = "/proc/sys/kernel/io_uring_disabled";
        let before = fs::read_to_string(forbidden)?;
        fs::write(forbidden, "1")?;
        let this = std::env::current_exe()?;
        let mut child = Command::new("setpriv");
        child.args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]).arg(this).env(CHILD, "1");
        let output = child.args(["--exact", "disk::engine_falls_back_to_threads_without_io_uring"]).output();
        fs::write(forbidden, before)?;
        let output = output?;
        check!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return Ok(());
    }
    for (engine, warned) in [(IoEngine::Auto, false), (IoEngine::IoUring, true)] {
        let script = "echo x | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null && echo written\nreboot -f";
        let (vm, printed) = started(guest(script).disk(Disk::scratch(Size::mib(1)).engine(engine)))?;
        check_eq!(engine_of(&vm), Some(IoEngine::Threads));
        let events: Vec<_> = vm.events()?.map(|e| e.to_string()).collect();
        check_eq!(events.iter().any(|e| e.contains("without io_uring for disk0")), warned);
        check!(printed.text().contains("written"), "{}", printed.text());
    }
    Ok(())
}

pub fn file_system_is_consistent_after_concurrent_load() -> Outcome {
    let temp = Temp::new()?;
    let script = "mkdir /mnt; mount -t ext4 /dev/vda /mnt || echo no mount
        work() { for i in 1 2 3 4; do head -c $((300000 + $1 * 77777 * i)) /dev/urandom > /mnt/$1.$i; md5sum /mnt/$1.$i >> /sums.$1
            fsync /mnt/$1.$i; done; }
        for j in 1 2 3 4; do work $j & done; wait; rm /mnt/*.3; fstrim /mnt && echo trimmed
        umount /mnt; echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /mnt
        cat /sums.* | grep -v '\\.3$' | md5sum -c -s && echo all whole; umount /mnt; echo over\nreboot -f";
    for engine in ENGINES {
        let path = temp.path("fs.img");
        File::create(&path)?.set_len(64 << 20)?;
        check!(Command::new("mkfs.ext4").arg("-Fq").arg(&path).status()?.success());
        let disk = Disk::file(&path).engine(engine).queues(2);
        let (vm, printed) = started(guest(script).vcpus(2).disk(disk))?;
        for n in 1.. {
            if printed.text().contains("over") || vm.try_wait().is_some() {
                break;
            }
            vm.pause()?;
            let rate = Rate::per_second(if n % 2 == 0 { 200 << 20 } else { 20 << 20 });
            vm.disk(0)?.set_limit(DiskLimit::none().write_bytes(rate).read_bytes(rate))?;
            vm.resume()?;
            std::thread::sleep(Duration::from_millis(n % 50));
        }
        vm.wait();
        check!(printed.text().contains("trimmed") && printed.text().contains("all whole"), "{}", printed.text());
        check!(!vm.events()?.any(|e| matches!(e.kind, EventKind::DiskError { .. })));
        check!(Command::new("e2fsck").arg("-fn").arg(&path).output()?.status.success());
    }
    Ok(())
}
