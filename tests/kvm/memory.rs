//! Memory that the guest does not use goes back to the host.

use std::fs::{self, File};
use std::io::BufRead;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use cofferdam::event::EventKind;
use cofferdam::memory::Memory;
use cofferdam::stats::MemoryStats;
use cofferdam::{Container, ErrorKind, Exit, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, debian_container, guest, run as run_vm};
use crate::{check, check_eq};

const MIB: u64 = 1 << 20;

/// The numbers, once `enough` is true of them.
fn wait_for(container: &Container, enough: impl Fn(&MemoryStats) -> bool) -> Result<MemoryStats, String> {
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        let stats = container.vm().memory_stats().map_err(|e| e.to_string())?;
        match enough(&stats) {
            true => return Ok(stats),
            false if Instant::now() > deadline => return Err(format!("it never came to that: {stats:?}")),
            false => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn run(container: &Container, command: &str) -> Outcome {
    let output = container.exec(["sh", "-c", command]).output()?;
    check!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

pub fn freed_guest_memory_returns_to_the_host() -> Outcome {
    const USED: u64 = 100 * MIB;
    let container = debian_container().memory(Size::mib(256)).start()?;
    let idle = wait_for(&container, |stats| stats.guest.is_some())?.resident.as_bytes();
    run(&container, "mkdir /tmp/m && mount -t tmpfs none /tmp/m && head -c 104857600 /dev/zero > /tmp/m/x")?;
    let used = wait_for(&container, |stats| stats.guest.is_some())?;
    check!(used.resident.as_bytes() >= idle + USED - 8 * MIB, "{idle} {used:?}");
    run(&container, "umount /tmp/m")?;
    // Linux reports what is free two seconds later, and goes on.
    // In pieces of 2 MiB, so that some stay for what shares them.
    let given_back = used.resident.as_bytes() - USED / 10 * 8;
    let after = wait_for(&container, |stats| stats.resident.as_bytes() <= given_back)?;
    check!(after.reported.as_bytes() >= USED / 10 * 8, "{after:?}");
    check_eq!(after.configured, Size::mib(256));
    check!((16 << 10..1 << 20).contains(&after.overhead.as_bytes()), "{after:?}");
    // What was given back can be used again.
    run(&container, "head -c 104857600 /dev/zero | tail -c 1 > /dev/null")
}

pub fn balloon_inflates_and_deflates_to_its_target() -> Outcome {
    let container = debian_container().memory(Size::mib(256)).start()?;
    let free = |stats: &MemoryStats| stats.guest.and_then(|g| g.free).map_or(0, Size::as_bytes);
    let before = free(&wait_for(&container, |stats| free(stats) > 0)?);
    let mut events = container.vm().events()?;
    container.vm().set_balloon(Size::mib(64))?;
    let full = wait_for(&container, |stats| stats.balloon == Size::mib(64))?;
    check!(free(&full) < before - 48 * MIB, "{before} {full:?}");
    let held = events.find_map(|event| match event.kind {
        EventKind::Balloon { size } => Some(size),
        _ => None,
    });
    check_eq!(held, Some(Size::mib(64)));
    container.vm().set_balloon(Size::bytes(0))?;
    wait_for(&container, |stats| stats.balloon == Size::bytes(0) && free(stats) > before - 16 * MIB)?;
    let refused = container.vm().set_balloon(Size::mib(257)).map_err(|e| e.kind());
    check_eq!(refused, Err(ErrorKind::InvalidConfig));
    Ok(())
}

pub fn guest_under_memory_pressure_deflates_the_balloon() -> Outcome {
    let container = debian_container().memory(Size::mib(192)).start()?;
    let half = container.vm().memory_stats()?.configured.as_bytes() / 2;
    container.vm().set_balloon(Size::bytes(half))?;
    wait_for(&container, |stats| stats.balloon.as_bytes() == half)?;
    // More than is left beside the balloon. One process touches it at once: others would read their own pages again and again.
    run(&container, &format!("perl -e '$n = {half}; $x = q(x) x $n'"))?;
    let after = wait_for(&container, |stats| stats.balloon.as_bytes() < half)?;
    check!(after.guest.is_some(), "{after:?}");
    Ok(())
}

pub fn memory_beyond_the_commit_limit_is_resource_exhausted() -> Outcome {
    let [mode, ratio] = ["memory", "ratio"].map(|name| format!("/proc/sys/vm/overcommit_{name}"));
    let before = [fs::read_to_string(&mode)?, fs::read_to_string(&ratio)?];
    // A hundred times what the host has, for a moment: no other process is refused memory.
    fs::write(&ratio, "10000")?;
    fs::write(&mode, "2")?;
    let refused = guest("true").memory(Size::gib(60_000)).start().map(drop);
    let started = run_vm(guest("reboot -f").memory(Size::gib(2)));
    fs::write(&mode, &before[0])?;
    fs::write(&ratio, &before[1])?;
    let error = refused.err().ok_or("60 TiB were promised")?;
    check_eq!(error.kind(), ErrorKind::ResourceExhausted);
    check!(error.to_string().contains("vm.overcommit_memory"), "{error}");
    check!(matches!(started?.0, Exit::Reboot { .. }));
    Ok(())
}

pub fn transparent_huge_pages_are_requested() -> Outcome {
    // Bytes of the process's memory for which huge pages are asked: flag `hg` (proc_pid_smaps(5)).
    let advised = || -> Result<u64, Box<dyn std::error::Error>> {
        let (mut all, mut size) = (0, 0);
        for line in fs::read_to_string("/proc/self/smaps")?.lines() {
            if let Some(kib) = line.strip_prefix("Size:") {
                size = kib.trim().trim_end_matches(" kB").parse::<u64>()? << 10;
            } else if line.strip_prefix("VmFlags:").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hg")) {
                all += size;
            }
        }
        Ok(all)
    };
    let vm = guest("sleep 1000").memory(Memory::transparent_huge_pages(Size::mib(128))).start()?;
    // All but what is shared with other guests of the kernel.
    check!(advised()? >= 100 * MIB, "{}", advised()?);
    drop(vm);
    let vm = guest("sleep 1000").memory(Size::mib(128)).start()?;
    check!(advised()? < 100 * MIB, "{}", advised()?);
    drop(vm);
    Ok(())
}

pub fn memfd_memory_can_be_mapped_by_others() -> Outcome {
    let container = debian_container().memory(Memory::memfd(Size::mib(128))).start()?;
    let file = File::from(container.vm().memory_fd()?.ok_or("no descriptor")?);
    check_eq!(file.metadata()?.len(), 128 * MIB);
    // A word that is nowhere but in the guest's memory; the shell's command line has it in two pieces.
    run(&container, "mkdir /tmp/m && mount -t tmpfs none /tmp/m && echo cof''ferd''am-was-here > /tmp/m/x")?;
    let mut all = vec![0; 128 << 20];
    file.read_exact_at(&mut all, 0)?;
    let (mut rest, mut found) = (all.as_slice(), false);
    // From one first letter to the next.
    while !found && rest.skip_until(b'c')? > 0 {
        found = rest.starts_with(b"offerdam-was-here");
    }
    check!(found);
    let before = wait_for(&container, |stats| stats.guest.is_some())?;
    run(&container, "head -c 40000000 /dev/zero > /tmp/m/x")?;
    let used = wait_for(&container, |stats| stats.resident.as_bytes() > before.resident.as_bytes() + 30 * MIB)?;
    run(&container, "umount /tmp/m")?;
    wait_for(&container, |stats| stats.resident.as_bytes() < used.resident.as_bytes() - 20 * MIB)?;
    check!(container.vm().memory_fd().is_ok() && debian_container().start()?.vm().memory_fd()?.is_none());
    Ok(())
}

pub fn hugetlb_memory_comes_from_the_pool() -> Outcome {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let (before, huge) = (fs::read_to_string(POOL)?, Memory::hugetlb(Size::mib(128)).page_size(Size::mib(2)));
    let builder = || guest("echo here\nreboot -f").memory(huge);
    // Only root makes a pool; without one the error names the reason.
    let made = fs::write(POOL, "64").is_ok();
    let outcome = run_vm(builder());
    // Whatever is in use now stays until it is given back.
    let emptied = fs::write(POOL, before);
    match made {
        true => check!(matches!(outcome?, (Exit::Reboot { .. }, text) if text.contains("here"))),
        false => check!(outcome.is_err_and(|e| e.to_string().contains("huge pages of 2 MiB wanted"))),
    }
    check_eq!(made, emptied.is_ok());
    let error = guest("").memory(Memory::hugetlb(Size::gib(4096))).start().err().ok_or("it started")?;
    check_eq!(error.kind(), ErrorKind::ResourceExhausted);
    check!(error.to_string().contains("nr_hugepages"), "{error}");
    Ok(())
}
