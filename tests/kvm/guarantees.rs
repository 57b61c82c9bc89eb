//! What the docs say that no guest can exceed: how long calls wait, what an end is called, who gets a stream.

use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use cofferdam::memory::Memory;
use cofferdam::process::{ExitStatus, Stdio};
use cofferdam::{CancelToken, Container, ErrorKind, Exit, Image, Size};

use crate::fixture::{
    Outcome, Printed, TEST_TIMEOUT, Temp, alone, busybox, container, debian_container, guest, kernel, run,
};
use crate::{check, check_eq};

/// What the lab, where a second of the host's may be short, is given beyond a bound.
fn slack() -> Duration {
    Duration::from_secs(if std::env::var_os("COFFERDAM_IN_LAB").is_some() { 8 } else { 1 })
}

/// Runs `call`, which must be back by `bound`.
fn within<T>(what: &str, bound: Duration, call: impl FnOnce() -> T) -> Result<T, Box<dyn std::error::Error>> {
    let begin = Instant::now();
    let answer = call();
    check!(begin.elapsed() < bound + slack(), "{what} took {:?} instead of {bound:?}", begin.elapsed());
    Ok(answer)
}

/// Our kernel has no means to power off, so a guest that wants to stands still.
pub fn guest_halted_with_interrupts_disabled_ends() -> Outcome {
    for script in ["poweroff -f", "halt -f"] {
        for vcpus in [1, 2] {
            let (exit, _) = run(guest(script).vcpus(vcpus))?;
            check!(matches!(exit, Exit::Halt { .. }), "{script} on {vcpus}: {exit}");
            check!(format!("{exit:#}").contains("interrupts disabled"), "{exit:#}");
        }
    }
    Ok(())
}

pub fn idle_guest_keeps_running() -> Outcome {
    let vm = guest("sleep 1000").vcpus(2).start()?;
    check!(vm.wait_timeout(Duration::from_secs(6)).is_none());
    Ok(())
}

pub fn guest_power_off_is_not_reported_as_killed() -> Outcome {
    let container = container()?;
    let status = container.exec(["sh", "-c", "echo o > /proc/sysrq-trigger; sleep 1000"]).status()?;
    let ExitStatus::VmEnded { exit } = status else { return Err(format!("{status}").into()) };
    check!(matches!(exit, Exit::Halt { .. } | Exit::PowerOff { .. } | Exit::Unresponsive { .. }), "{exit}");
    Ok(())
}

/// A paused guest stands for one that is slow. It must not run afterwards what has timed out meanwhile.
pub fn request_that_timed_out_while_paused_is_not_executed() -> Outcome {
    let container = container()?;
    container.vm().pause()?;
    let status = container.exec(["sh", "-c", "echo late > /late"]).timeout(Duration::from_millis(300)).status()?;
    check!(matches!(status, ExitStatus::TimedOut), "{status}");
    container.vm().resume()?;
    let left = container.exec(["sh", "-c", "sleep 1; cat /late"]).timeout(TEST_TIMEOUT).output()?;
    check!(left.status.code() == Some(1), "what was given up in time did not run: {}", left.status);
    Ok(())
}

pub fn cancelled_start_returns() -> Outcome {
    let token = CancelToken::new()?;
    let theirs = token.clone();
    let cancel = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        theirs.cancel();
    });
    let started = within("start", Duration::from_secs(3), || debian_container().cancel(&token).start())?;
    check_eq!(started.err().map(|e| e.kind()), Some(ErrorKind::Cancelled));
    cancel.join().map_err(|_| "the thread panicked")?;
    // A token that is canceled after the start has no effect.
    let token = CancelToken::new()?;
    let container = debian_container().cancel(&token).start()?;
    token.cancel();
    check!(container.exec(["true"]).status()?.success());
    Ok(())
}

pub fn early_timeouts_are_reported_as_timed_out() -> Outcome {
    let container = container()?;
    for millis in [0, 1, 3, 5, 8, 12, 20] {
        let output = container.exec(["sleep", "1000"]).timeout(Duration::from_millis(millis)).output()?;
        check!(matches!(output.status, ExitStatus::TimedOut), "{millis} ms: {}", output.status);
    }
    check!(container.exec(["true"]).status()?.success());
    Ok(())
}

pub fn wait_after_the_vm_ended_returns_vm_ended() -> Outcome {
    for dropped in [false, true] {
        let container = container()?;
        let mut process = container.exec(["sleep", "1000"]).spawn()?;
        match dropped {
            true => drop(container),
            false => container.kill(),
        }
        let status = process.wait()?;
        check!(matches!(&status, ExitStatus::VmEnded { exit } if matches!(exit, Exit::Killed { .. })), "{status}");
    }
    Ok(())
}

pub fn longest_durations_are_accepted_as_timeouts() -> Outcome {
    let container = debian_container().start_timeout(Duration::MAX).start()?;
    let mut process = container.exec(["true"]).timeout(Duration::MAX).spawn()?;
    check!(process.wait_timeout(Duration::MAX)?.is_some_and(|status| status.success()));
    check!(process.wait()?.success());
    let output = container.exec(["echo", "x"]).timeout(Duration::MAX).output()?;
    check_eq!(output.stdout, b"x\n");
    check!(container.vm().events()?.next_timeout(Duration::MAX).is_some());
    let listener = container.vm().listen_vsock(7000)?;
    let exit = container.stop(Duration::MAX)?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    check_eq!(listener.accept_timeout(Duration::MAX).err().map(|e| e.kind()), Some(ErrorKind::InvalidState));
    check!(container.vm().wait_timeout(Duration::MAX).is_some());
    check!(matches!(guest("poweroff -f").start()?.stop(Duration::MAX)?, Exit::Halt { .. } | Exit::Reboot { .. }));
    Ok(())
}

/// Every program in a guest can connect to the host's ports; no other but the shim gets a process's streams.
pub fn programs_cannot_open_streams_of_others() -> Outcome {
    let container = container()?;
    // Ports are given one after the other. Each connection stays open, and the program prints what it receives.
    let thief = "use IO::Select; my $all = IO::Select->new; my $base = 0x40000000;
        $| = 1; print qq(ready\\n);
        for (;;) { for my $port (1 .. 150) {
            socket(my $s, 40, 1, 0) or next;
            if (connect($s, pack('SSLLx4', 40, 0, $base + $port, 2))) { $all->add($s); syswrite($s, 'x' x ($port % 40)); }
            for my $r ($all->can_read(0)) { sysread($r, my $d, 4096) ? print qq(STOLEN $d\\n) : $all->remove($r); } } }";
    let mut stealing = container.exec(["setpriv", "--reuid=1000", "--clear-groups", "perl", "-e", thief]);
    stealing = stealing.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut stealing = stealing.spawn()?;
    let mut ready = [0; 6];
    stealing.stdout.as_mut().ok_or("no output")?.read_exact(&mut ready)?;
    check_eq!(&ready, b"ready\n");
    for n in 0..20 {
        let mut process =
            container.exec(["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).timeout(TEST_TIMEOUT).spawn()?;
        write!(process.stdin.as_mut().ok_or("no input")?, "secret {n}")?;
        let output = process.wait_with_output()?;
        check_eq!(String::from_utf8_lossy(&output.stdout), format!("secret {n}"));
    }
    stealing.kill()?;
    let output = stealing.wait_with_output()?;
    check!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

pub fn missing_etc_files_are_created() -> Outcome {
    type Prepare = fn(&std::path::Path) -> std::io::Result<()>;
    let cases: [(&str, Prepare, &[&str]); 4] = [
        ("none", |_| Ok(()), &["127.0.0.1\tlocalhost box"]),
        ("empty", |etc| std::fs::write(etc.join("hosts"), ""), &["127.0.0.1\tlocalhost box"]),
        (
            "own",
            |etc| std::fs::write(etc.join("hosts"), "127.0.0.1 localhost mine"),
            &["localhost mine", "127.0.0.1\tbox"],
        ),
        ("dangling", |etc| std::os::unix::fs::symlink("../run/nothing/hosts", etc.join("hosts")), &["localhost box"]),
    ];
    for (name, prepare, expected) in cases {
        let temp = Temp::new()?;
        let root = temp.path("root");
        std::fs::create_dir_all(root.join("etc"))?;
        std::fs::create_dir_all(root.join("bin"))?;
        std::fs::copy("/bin/busybox", root.join("bin/busybox"))?;
        prepare(&root.join("etc"))?;
        let image = Image::open(&root)?.cache_dir(temp.path("cache"));
        let container =
            Container::builder(image).kernel(kernel()).start_timeout(TEST_TIMEOUT).hostname("box").start()?;
        let script = "cat /etc/hosts; stat -c '%n %a %u:%g' /etc/hosts /etc/hostname /tmp";
        let output = container.exec(["/bin/busybox", "sh", "-c", script]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in expected {
            check!(text.contains(line), "{name}: {line}: {text}");
        }
        check!(text.contains("/etc/hostname 644 0:0") && text.contains("/tmp 1777 0:0"), "{name}: {text}");
    }
    Ok(())
}

#[allow(unsafe_code, reason = "forks, as a host in C or Python does")]
pub fn forked_child_does_not_affect_guests() -> Outcome {
    let container = container()?;
    let mut running = container.exec(["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    // SAFETY: the child drops what it has of its parent's handles, and leaves by _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // Nothing of it reaches the guest, nor a thread or a mapping of the child's own.
        container.kill();
        let paused = container.vm().pause().is_err();
        let mine =
            std::thread::Builder::new().stack_size(256 << 10).spawn(|| std::thread::sleep(Duration::from_millis(50)));
        drop((container, running));
        let joined = mine.is_ok_and(|thread| thread.join().is_ok());
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(if paused && joined { 7 } else { 8 }) }
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made.
    check_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    check!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{status:#x}");
    running.stdin.take().ok_or("no input")?.write_all(b"still here")?;
    check_eq!(running.wait_with_output()?.stdout, b"still here");
    check!(container.exec(["true"]).status()?.success());
    Ok(())
}

/// Each call that gets no descriptor fails with `ResourceExhausted`.
#[allow(unsafe_code, reason = "sets a limit of this process, as its administrator would")]
pub fn descriptor_exhaustion_is_resource_exhausted() -> Outcome {
    if !alone("guarantees::descriptor_exhaustion_is_resource_exhausted")? {
        return Ok(());
    }
    let container = container()?;
    check!(container.exec(["true"]).output()?.status.success());
    let set = |soft: u64| {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: 65_536 };
        // SAFETY: the structure is valid for reads across the call.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) }
    };
    let highest = std::fs::read_dir("/proc/self/fd")?.flatten();
    let highest = highest.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok()).max().unwrap_or(0);
    let mut refused = 0;
    for more in 0..24 {
        check_eq!(set(highest + more), 0);
        match container.exec(["cat"]).stdin(Stdio::piped()).timeout(TEST_TIMEOUT).output() {
            Ok(output) => check!(output.status.success(), "{more} more: {}", output.status),
            Err(error) => {
                check!(error.kind() == ErrorKind::ResourceExhausted, "{more} more: {error:?}");
                refused += 1;
            }
        }
    }
    check_eq!(set(4096), 0);
    check!(refused > 0);
    check!(container.exec(["true"]).output()?.status.success());
    Ok(())
}

/// Neither is a guest's memory in a child of fork, nor would it be in a core file.
pub fn guest_memory_is_dontfork_and_dontdump() -> Outcome {
    if !alone("guarantees::guest_memory_is_dontfork_and_dontdump")? {
        return Ok(());
    }
    let _vm = guest("sleep 1000").memory(Size::mib(300)).start()?;
    let maps = std::fs::read_to_string("/proc/self/smaps")?;
    let (mut size, mut seen) = (0, 0);
    for line in maps.lines() {
        if let Some(kib) = line.strip_prefix("Size:") {
            size = kib.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let flags: Vec<&str> = flags.split_whitespace().collect();
            if flags.contains(&"dc") && flags.contains(&"dd") {
                seen += size;
            }
        }
    }
    check!(seen >= 300 << 10, "{seen} KiB are kept out");
    Ok(())
}

/// What says that a process is to start a guest and to abort, and the word that is in the guest's memory then.
const CORE: &str = "COFFERDAM_TEST_CORE";
const SECRET: &str = "in-the-guest-alone-";

/// Sets the path of the host's core files for a moment, which needs root.
pub fn core_dump_has_no_guest_memory() -> Outcome {
    const TEST: &str = "guarantees::core_dump_has_no_guest_memory";
    if let Some(directory) = std::env::var_os(CORE) {
        // The host has the word in two pieces, and a word of its own.
        let printed = Printed::default();
        let half = &SECRET[..7];
        let rest = &SECRET[7..];
        let script = format!(
            "a={half}; b={rest}; mkdir /m; mount -t tmpfs m /m; for n in $(seq 1000); do echo $a$b$n; done > /m/x; echo ready; sleep 1000"
        );
        let vm = guest(&script).memory(Memory::memfd(Size::mib(128))).console(printed.console()).start()?;
        printed.wait_for("ready")?;
        let memory = std::fs::File::from(vm.memory_fd()?.ok_or("no descriptor")?);
        let found = occurrences(memory, &format!("{half}{rest}[0-9]"))?;
        check!(found >= 900, "{found}");
        let anonymous = guest(&script.replace("ready", "ready too")).console(printed.console()).start()?;
        printed.wait_for("ready too")?;
        let own = [half, "of-the-host-"].concat().repeat(100);
        std::fs::write(std::path::Path::new(&directory).join("started"), &own)?;
        let _all = std::hint::black_box((vm, anonymous, own));
        std::process::abort();
    }
    const PATTERN: &str = "/proc/sys/kernel/core_pattern";
    /// The machine's own pattern, which it has again however the test ends.
    struct Before(String);
    impl Drop for Before {
        fn drop(&mut self) {
            let _ = std::fs::write(PATTERN, &self.0);
        }
    }
    let (temp, before) = (Temp::new()?, Before(std::fs::read_to_string(PATTERN)?));
    std::fs::write(PATTERN, temp.path("core").to_str().ok_or("a path")?)
        .map_err(|e| format!("{PATTERN}: {e}: run this as root"))?;
    let command = format!("ulimit -c unlimited; exec \"$0\" --exact {TEST} --nocapture");
    let child = std::process::Command::new("sh")
        .args(["-c", &command])
        .arg(std::env::current_exe()?)
        .env(CORE, temp.path(""))
        .output();
    drop(before);
    let child = child?;
    check!(
        temp.path("started").exists(),
        "{}{}",
        String::from_utf8_lossy(&child.stdout),
        String::from_utf8_lossy(&child.stderr)
    );
    check_eq!(child.status.signal(), Some(libc::SIGABRT));
    // A setting of some kernels adds the process's number.
    let all: Vec<_> = std::fs::read_dir(temp.path(""))?.flatten().map(|entry| entry.path()).collect();
    let is_core =
        |path: &&std::path::PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"core"));
    let path = all.iter().find(is_core).ok_or("there is no core file")?;
    let core = || std::fs::File::open(path);
    check!(
        occurrences(core()?, "in-the-of-the-host-")? >= 100,
        "that is no core file: {} bytes",
        core()?.metadata()?.len()
    );
    check_eq!(occurrences(core()?, &format!("{SECRET}[0-9]"))?, 0);
    Ok(())
}

/// How often a file has a word, by programs, so that nothing of it comes into this process.
fn occurrences(file: std::fs::File, word: &str) -> Result<usize, Box<dyn std::error::Error>> {
    let count = "tr -s '\\0' '\\n' | grep -a -o \"$0\" | wc -l";
    let output = std::process::Command::new("sh").args(["-c", count, word]).stdin(file).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
}

/// Nothing of the processor that a guest could virtualize or count with, unless it is asked for.
pub fn nested_virtualization_and_pmu_are_off_by_default() -> Outcome {
    let script = "grep -owE 'fpu|vmx|svm|arch_perfmon|perfctr_core' /proc/cpuinfo | sort -u; poweroff -f";
    let (_, text) = run(guest(script))?;
    check_eq!(text.trim(), "fpu");
    Ok(())
}

/// The initramfs of a VM is not the container's, so this is here to be named once.
pub fn command_line_may_begin_with_init_arguments() -> Outcome {
    for line in ["-- x", "--", "console=hvc0 quiet -- x y=\"b -- c\""] {
        let kernel = kernel().cmdline(line).initramfs(busybox("cat /proc/cmdline; reboot -f"));
        let vm = cofferdam::Vm::builder(kernel).memory(Size::mib(128));
        let (exit, _) = run(vm)?;
        check!(matches!(exit, Exit::Reboot { .. }), "{line}: {exit}");
        check!(exit.report().stage == cofferdam::exit::Stage::DriversReady, "{line}: {exit}");
    }
    Ok(())
}
