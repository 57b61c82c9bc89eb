//! What of the host's processors a VM gets.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cofferdam::event::{EventKind, Throttled};
use cofferdam::{Cgroup, ErrorKind, Vm, VmBuilder};

use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, alone, tiny_kernel};
use crate::{check, check_eq};

/// `jmp .`
fn miner(vcpus: u32) -> Result<VmBuilder, Box<dyn std::error::Error>> {
    Ok(Vm::builder(tiny_kernel(&Temp::new()?, &[0xeb, 0xfe])?).vcpus(vcpus))
}

/// The groups of this process's VMs.
fn groups() -> Vec<PathBuf> {
    let own = format!("cofferdam-{}-", std::process::id());
    let entries = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    entries.filter(|e| e.file_name().to_string_lossy().starts_with(&own)).map(|e| e.path()).collect()
}

pub fn threads_run_in_a_cgroup_that_is_removed_at_the_end() -> Outcome {
    if !alone("cgroup::threads_run_in_a_cgroup_that_is_removed_at_the_end")? {
        return Ok(());
    }
    let vm = miner(1)?.cgroup(Cgroup::under("/sys/fs/cgroup").weight(7)).start()?;
    let group = groups().pop().ok_or("no group")?;
    check_eq!(fs::read_to_string(group.join("cpu.weight"))?.trim(), "7");
    let threads = fs::read_to_string(group.join("cgroup.threads"))?;
    let name = |id: &str| fs::read_to_string(format!("/proc/self/task/{id}/comm")).unwrap_or_default();
    let mut names: Vec<String> = threads.lines().map(|id| name(id).trim().to_owned()).collect();
    names.sort();
    // KVM adds a thread of its own to those of the process.
    names.retain(|name| !name.starts_with("kvm-"));
    check_eq!(names, ["io", "vcpu0"]);
    // What a process left that was killed is swept away by the next machine.
    let stale = Path::new("/sys/fs/cgroup/cofferdam-4294967295-0");
    fs::create_dir(stale)?;
    drop(vm);
    check!(groups().is_empty(), "{:?}", groups());
    drop(miner(1)?.cgroup(Cgroup::under("/sys/fs/cgroup")).start()?);
    check!(!stale.exists() && groups().is_empty());
    Ok(())
}

pub fn cpu_limit_holds_and_throttling_is_counted() -> Outcome {
    let vm = miner(2)?.cgroup(Cgroup::under("/sys/fs/cgroup").cpus(0.2)).start()?;
    let begin = Instant::now();
    let stats = loop {
        std::thread::sleep(Duration::from_millis(200));
        let stats = vm.stats().cgroup.ok_or("no numbers")?;
        if begin.elapsed() > Duration::from_secs(3) && stats.throttled_periods > 5 {
            break stats;
        }
        check!(begin.elapsed() < TEST_TIMEOUT, "{stats:?}");
    };
    check!(stats.cpu_time < begin.elapsed().mul_f64(0.3) + Duration::from_millis(100), "{stats:?}");
    check!(!stats.throttled_time.is_zero(), "{stats:?}");
    let is_throttled = |event: &cofferdam::event::Event| event.kind == EventKind::Throttled { what: Throttled::Vcpus };
    let events = vm.events()?;
    while !is_throttled(&events.next_timeout(TEST_TIMEOUT).ok_or("it was never reported")?) {}
    Ok(())
}

pub fn cpu_weights_divide_a_contended_cpu() -> Outcome {
    if !alone("cgroup::cpu_weights_divide_a_contended_cpu")? {
        return Ok(());
    }
    // One processor for both, or the scheduler would give each its own.
    on_one_processor()?;
    let start = |(weight, vcpus)| {
        miner(vcpus)?.cgroup(Cgroup::under("/sys/fs/cgroup").weight(weight)).start().map_err(Into::into)
    };
    let vms: Vec<Vm> =
        [(100, 4), (400, 1)].into_iter().map(start).collect::<Result<_, Box<dyn std::error::Error>>>()?;
    let used = || vms.iter().map(|vm| vm.stats().cgroup.map_or(0.0, |c| c.cpu_time.as_secs_f64())).collect::<Vec<_>>();
    let before = used();
    std::thread::sleep(Duration::from_secs(4));
    let spent: Vec<f64> = used().iter().zip(before).map(|(after, before)| after - before).collect();
    // By weight four to one, however many vCPUs want it.
    check!(spent[1] > 2.5 * spent[0] && spent[0] > 0.0, "{spent:?}");
    Ok(())
}

#[allow(unsafe_code, reason = "as taskset(1) does, for this process alone")]
fn on_one_processor() -> std::io::Result<()> {
    // SAFETY: an all-zero set is valid; the call reads it and changes where this process's threads run.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

pub fn missing_cgroup_controllers_are_reported() -> Outcome {
    let error = miner(1)?.cgroup(Cgroup::under("/proc")).start().err().ok_or("it started")?;
    check_eq!(error.kind(), ErrorKind::NotFound);
    check!(error.to_string().contains("cgroup: reading the controllers of /proc: "), "{error}");
    let vm = miner(1)?.cgroup(Cgroup::under("/proc").optional(true)).start()?;
    let first = vm.events()?.next().ok_or("no event")?;
    check!(matches!(&first.kind, EventKind::Degraded { what } if what.starts_with("a cgroup: ")), "{first}");
    check!(vm.stats().cgroup.is_none());
    Ok(())
}
