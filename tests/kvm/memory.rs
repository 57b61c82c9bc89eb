//! Memory that the guest does not use goes back to the host.

use std::time::{Duration, Instant};

use cofferdam::{Container, ErrorKind, MemoryStats, Size};

use crate::fixture::{Outcome, PATIENCE, container, debian_container};
use crate::{check, check_eq};

const MIB: u64 = 1 << 20;

/// The numbers, once `enough` is true of them.
fn wait_for(container: &Container, enough: impl Fn(&MemoryStats) -> bool) -> Result<MemoryStats, String> {
    let deadline = Instant::now() + PATIENCE;
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

pub fn what_a_guest_frees_comes_back() -> Outcome {
    const USED: u64 = 100 * MIB;
    let container = debian_container().memory(Size::mib(256)).start()?;
    let idle = wait_for(&container, |stats| stats.guest.is_some())?.resident.as_bytes();
    run(&container, "mkdir /tmp/m && mount -t tmpfs none /tmp/m && head -c 104857600 /dev/zero > /tmp/m/x")?;
    let used = wait_for(&container, |stats| stats.guest.is_some())?;
    check!(used.resident.as_bytes() >= idle + USED - 8 * MIB, "{idle} {used:?}");
    run(&container, "umount /tmp/m")?;
    // Linux reports what is free two seconds later, and goes on.
    let given_back = used.resident.as_bytes() - USED / 10 * 9;
    let after = wait_for(&container, |stats| stats.resident.as_bytes() <= given_back)?;
    check!(after.reported.as_bytes() >= USED / 10 * 9, "{after:?}");
    check_eq!(after.configured, Size::mib(256));
    // What was given back can be used again.
    run(&container, "head -c 104857600 /dev/zero | tail -c 1 > /dev/null")
}

pub fn the_balloon_takes_what_it_is_told_and_gives_it_back() -> Outcome {
    let container = debian_container().memory(Size::mib(256)).start()?;
    let free = |stats: &MemoryStats| stats.guest.and_then(|g| g.free).map_or(0, Size::as_bytes);
    let before = free(&wait_for(&container, |stats| free(stats) > 0)?);
    container.vm().set_balloon(Size::mib(64))?;
    let full = wait_for(&container, |stats| stats.balloon == Size::mib(64))?;
    check!(free(&full) < before - 48 * MIB, "{before} {full:?}");
    container.vm().set_balloon(Size::bytes(0))?;
    wait_for(&container, |stats| stats.balloon == Size::bytes(0) && free(stats) > before - 16 * MIB)?;
    let refused = container.vm().set_balloon(Size::mib(257)).map_err(|e| e.kind());
    check_eq!(refused, Err(ErrorKind::InvalidConfig));
    Ok(())
}

pub fn a_guest_short_of_memory_takes_it_from_the_balloon() -> Outcome {
    let container = container()?;
    let half = container.vm().memory_stats()?.configured.as_bytes() / 2;
    container.vm().set_balloon(Size::bytes(half))?;
    wait_for(&container, |stats| stats.balloon.as_bytes() == half)?;
    // More than is left beside the balloon.
    run(&container, &format!("head -c {half} /dev/zero | tail > /dev/null"))?;
    let after = wait_for(&container, |stats| stats.balloon.as_bytes() < half)?;
    check!(after.guest.is_some(), "{after:?}");
    Ok(())
}
