//! Containers: a root file system of their own, and ends in good order.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use cofferdam::disk::{ErrorAction, WritableLayer};
use cofferdam::event::{DeviceId, EventKind};
use cofferdam::process::ExitStatus;
use cofferdam::{Container, Disk, ErrorKind, Exit, Image, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, cache, container, debian_container, kernel};
use crate::{check, check_eq};

/// Runs a shell command and returns what it printed.
fn shell(container: &Container, command: &str) -> cofferdam::Result<String> {
    let output = container.exec(["sh", "-c", command]).timeout(TEST_TIMEOUT).output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
}

pub fn root_file_system_has_the_usual_mounts() -> Outcome {
    let container = debian_container().hostname("inside").start()?;
    check!(shell(&container, "cat /etc/os-release")?.contains("bookworm"));
    check_eq!(shell(&container, "hostname; stat -c '%U %a' /etc/shadow; stat -c %a /tmp")?, "inside\nroot 640\n1777");
    check_eq!(shell(&container, "find / -xdev -nouser | wc -l")?, "0");
    let mounts = shell(&container, "cut -d ' ' -f 2 /proc/mounts")?;
    for point in ["/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/sys/fs/cgroup"] {
        check!(mounts.lines().any(|line| line == point), "{point} is not mounted: {mounts}");
    }
    check_eq!(shell(&container, "echo x | tee /dev/stderr > /dev/null; test -r /dev/urandom && echo y")?, "y\nx");
    Ok(())
}

pub fn missing_mount_points_are_created() -> Outcome {
    let temp = Temp::new()?;
    fs::create_dir_all(temp.path("root/bin"))?;
    fs::copy("/bin/busybox", temp.path("root/bin/busybox"))?;
    let image = Image::open(temp.path("root"))?.cache_dir(temp.path("cache"));
    let container = Container::builder(image).kernel(kernel()).start_timeout(TEST_TIMEOUT).start()?;
    let output = container.exec(["/bin/busybox", "ls", "/"]).output()?;
    let seen = String::from_utf8_lossy(&output.stdout).into_owned();
    for name in ["dev", "proc", "sys", "tmp", "run"] {
        check!(seen.lines().any(|line| line == name), "{name}: {seen}");
    }
    Ok(())
}

pub fn directory_serves_as_an_image() -> Outcome {
    let temp = Temp::new()?;
    fs::create_dir_all(temp.path("root/bin"))?;
    fs::copy("/bin/busybox", temp.path("root/bin/busybox"))?;
    fs::write(temp.path("root/greeting"), "from a directory")?;
    let image = Image::open(temp.path("root"))?.cache_dir(temp.path("cache"));
    let container = Container::builder(image).kernel(kernel()).start_timeout(TEST_TIMEOUT).start()?;
    check_eq!(container.exec(["/bin/busybox", "cat", "/greeting"]).output()?.stdout, b"from a directory");
    Ok(())
}

pub fn writes_are_private_and_discarded() -> Outcome {
    let (one, two) = (container()?, container()?);
    check_eq!(shell(&one, "echo mine > /etc/motd && rm /bin/dd && cat /etc/motd")?, "mine");
    check_eq!(shell(&two, "test -e /bin/dd && ! grep -q mine /etc/motd && echo untouched")?, "untouched");
    drop(one);
    check_eq!(shell(&container()?, "test -e /bin/dd && echo whole")?, "whole");
    Ok(())
}

pub fn image_is_shared_and_unchanged() -> Outcome {
    let opened = || -> Result<Vec<std::path::PathBuf>, Box<dyn std::error::Error>> {
        let paths = fs::read_dir("/proc/self/fd")?.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        Ok(paths.filter(|path| path.starts_with(cache().join("images"))).collect())
    };
    let (one, two) = (container()?, container()?);
    // Both have the same file open.
    let paths = opened()?;
    let path = paths.iter().find(|path| paths.iter().filter(|other| other == path).count() >= 2);
    let path = path.ok_or_else(|| format!("{paths:?}"))?;
    let changed =
        || -> std::io::Result<_> { fs::metadata(path).map(|it| (it.mtime_nsec(), it.ctime_nsec(), it.len())) };
    let before = changed()?;
    for container in [&one, &two] {
        check_eq!(shell(container, "test -b /dev/vda && blockdev --getro /dev/vda")?, "1");
        check!(shell(container, "echo x > /dev/vda; echo $?")?.ends_with(|c: char| c != '0'));
        shell(container, "echo x > /etc/motd; rm -rf /usr/share; sync")?;
    }
    drop((one, two));
    check_eq!(changed()?, before);
    Ok(())
}

pub fn stop_sends_sigterm_and_powers_off() -> Outcome {
    let container = container()?;
    let mut sleeper = container.exec(["sleep", "1000"]).spawn()?;
    let exit = container.stop(TEST_TIMEOUT)?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    let status = sleeper.wait()?;
    check!(matches!(status, ExitStatus::Signaled { signal: 15 } | ExitStatus::VmEnded { .. }), "{status}");
    check!(matches!(container.stop(TEST_TIMEOUT)?, Exit::PowerOff { .. }), "a second stop is no error");
    Ok(())
}

pub fn stop_returns_in_time_with_an_unresponsive_guest() -> Outcome {
    let container = container()?;
    let _deaf = container.exec(["sh", "-c", "trap '' TERM; while :; do :; done"]).spawn()?;
    let begin = Instant::now();
    let exit = container.stop(Duration::from_millis(200))?;
    check!(matches!(exit, Exit::PowerOff { .. } | Exit::Killed { .. }), "{exit}");
    check!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    Ok(())
}

pub fn processes_end_with_the_container() -> Outcome {
    let container = container()?;
    let process = container.exec(["sleep", "1000"]).spawn()?;
    drop(container);
    match process.wait_timeout(TEST_TIMEOUT) {
        Ok(Some(ExitStatus::VmEnded { .. })) => Ok(()),
        Err(error) if error.kind() == ErrorKind::InvalidState => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

pub fn memory_and_vcpus_are_as_configured() -> Outcome {
    let container = debian_container()
        .vcpus(2)
        .memory(Size::mib(512))
        .writable_layer(WritableLayer::new(Size::gib(1)).scratch_dir(std::env::temp_dir()))
        .start()?;
    check_eq!(shell(&container, "nproc")?, "2");
    let mib: u64 = shell(&container, "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo")?.parse()?;
    check!((440..=512).contains(&mib), "{mib}");
    let disk: u64 = shell(&container, "df -m --output=size / | tail -n 1")?.parse()?;
    check!((900..=1024).contains(&disk), "{disk}");
    Ok(())
}

pub fn attached_disks_are_visible_by_number() -> Outcome {
    let temp = Temp::new()?;
    fs::File::create(temp.path("data"))?.set_len(8 << 20)?;
    let data = Disk::file(temp.path("data")).serial("data");
    let container = debian_container().disk(data).disk(Disk::scratch(Size::mib(1))).start()?;
    check_eq!(shell(&container, "cat /sys/block/vda/serial /sys/block/vdb/serial")?, "datadisk1");
    check_eq!(
        shell(&container, "echo kept | dd of=/dev/vda conv=fsync 2> /dev/null; blockdev --getsize64 /dev/vdb")?,
        "1048576"
    );
    check_eq!(container.disk(0)?.usage()?.capacity, Size::mib(8));
    drop(container);
    check!(fs::read(temp.path("data"))?.starts_with(b"kept\n"));
    Ok(())
}

pub fn clones_are_handles_of_one_container() -> Outcome {
    let one = container()?;
    let (two, exec) = (one.clone(), one.exec(["echo", "still here"]));
    drop(one);
    check!(two.try_wait().is_none());
    drop(two);
    // A program that is not started yet keeps it too.
    check_eq!(exec.output()?.stdout.as_slice(), &b"still here\n"[..]);
    let last = container()?;
    let (vm, events) = (last.vm().clone(), last.events()?);
    check!(!readable(&last)?);
    drop(last);
    // A clone of its machine does not.
    let exit = vm.try_wait().ok_or("it has not ended")?;
    check!(matches!(exit, Exit::Killed { .. }), "{exit}");
    check!(readable(&vm)?);
    let end = events.last().map(|event| event.kind);
    check_eq!(end, Some(EventKind::Ended { exit }));
    Ok(())
}

/// Whether the descriptor, an eventfd, is readable now (proc_pid_fdinfo(5)).
fn readable(what: &impl AsRawFd) -> Result<bool, Box<dyn std::error::Error>> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", what.as_raw_fd()))?;
    let count = info.lines().find_map(|line| line.strip_prefix("eventfd-count:")).ok_or("it is no eventfd")?;
    Ok(count.trim() != "0")
}

pub fn container_pauses_and_reports_stats_like_a_vm() -> Outcome {
    let container = container()?;
    container.pause()?;
    // Its time-out is the host's.
    let paused = container.exec(["true"]).timeout(Duration::from_secs(1)).output()?;
    check_eq!(paused.status, ExitStatus::TimedOut);
    check!(container.wait_timeout(Duration::from_millis(50)).is_none());
    container.resume()?;
    check_eq!(shell(&container, "echo on")?, "on");
    check!(container.memory_stats()?.resident > Size::mib(1));
    check!(container.stats().devices.iter().any(|it| it.device == DeviceId::Vsock && it.requests > 0));
    check_eq!(container.disk(0).err().map(|e| e.kind()), Some(ErrorKind::NotFound));
    container.kill();
    let exit = container.wait();
    check_eq!(exit.report(), &container.report());
    check!(!exit.to_string().contains('\n') && format!("{exit:#}").contains("rip="), "{exit:#}");
    Ok(())
}

pub fn connect_without_a_listener_is_refused() -> Outcome {
    let container = container()?;
    let error = container.vm().connect_vsock(9999).expect_err("no program listens");
    check_eq!(error.kind(), ErrorKind::NotFound);
    Ok(())
}

/// Of 48 MiB, of which the layer leaves nothing free.
pub fn full_host_fails_writes_without_blocking_programs() -> Outcome {
    let temp = Temp::new()?;
    let directory = temp.path("small");
    fs::create_dir(&directory)?;
    let mount = |args: &[&str]| std::process::Command::new("mount").args(args).arg(&directory).status();
    check!(mount(&["-t", "tmpfs", "-o", "size=48m", "small"])?.success());
    let layer =
        WritableLayer::new(Size::gib(1)).scratch_dir(&directory).min_free_space(Size::mib(8)).reserve(Size::bytes(0));
    let container = debian_container().writable_layer(layer).start()?;
    let events = container.vm().events()?;
    let written = container
        .exec(["dd", "if=/dev/urandom", "of=/large", "bs=1M", "count=64", "conv=fsync"])
        .timeout(TEST_TIMEOUT)
        .output()?;
    let said = String::from_utf8_lossy(&written.stderr).into_owned();
    // Virtio has one word for all that fails (Virtio 1.3, 5.2.6, VIRTIO_BLK_S_IOERR).
    check!(written.status.code() == Some(1) && said.contains("Input/output error"), "{} {said}", written.status);
    let fault = loop {
        if let EventKind::DiskError { error: fault } =
            events.next_timeout(TEST_TIMEOUT).ok_or("no fault was reported")?.kind
        {
            break fault;
        }
    };
    check!(
        fault.errno == Some(28) && fault.disk == DeviceId::Disk(1) && fault.action == ErrorAction::Report,
        "{fault}"
    );
    // Programs run on, and the end comes in good order.
    check_eq!(shell(&container, "echo still here")?, "still here");
    let exit = container.stop(Duration::from_secs(5))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    drop(container);
    check!(std::process::Command::new("umount").arg(&directory).status()?.success(), "something is left behind");
    Ok(())
}
