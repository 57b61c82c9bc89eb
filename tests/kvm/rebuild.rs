//! Machines whose KVM objects are replaced while their guests work: what a restored machine needs of its state.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam::internals::rebuild;
use cofferdam::net::{Policy, PortForward};
use cofferdam::process::Stdio;
use cofferdam::{Container, ErrorKind, Exit, Kernel, Net, Size, Vm};

use crate::fixture::{
    Outcome, Printed, TEST_TIMEOUT, alone, busybox, debian_container, distribution, guest, kernel, soak,
};
use crate::{check, check_eq};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// How long the rebuilds of one test go on, unless `COFFERDAM_SOAK` says how many thousands there shall be.
const USUAL: Duration = Duration::from_secs(8);

/// Gives back what it gets on port 80.
const ECHO: &str = "use IO::Socket::IP; $| = 1; my $l = IO::Socket::IP->new(LocalHost => '0.0.0.0', LocalPort => 80, Listen => 5) or die $@;
    print qq(ready\\n); while (my $c = $l->accept) { while (sysread $c, my $b, 65536) { syswrite $c, $b } }";

/// Reads the monotonic clock on each of the first processors, and sleeps in between. The argument says how many these are.
/// Prints how often it slept, and how long the longest sleep of 2 ms took.
const WATCH: &str = "use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC usleep); my ($last, $sleeps, $longest) = (0, 0, 0);
    until (-e '/run/stop') { for my $cpu (0 .. $ARGV[0] - 1) {
        syscall(203, 0, 8, pack('Q', 1 << $cpu)) >= 0 or die qq(processor $cpu: $!);
        for (1 .. 50) { my $now = clock_gettime(CLOCK_MONOTONIC); die qq(back from $last to $now) if $now < $last; $last = $now }
        usleep 2000; my $slept = clock_gettime(CLOCK_MONOTONIC) - $last; $longest = $slept if $slept > $longest; $sleeps++;
    } } print qq($sleeps $longest)";

fn text(container: &Container, words: &[&str]) -> Result<String> {
    let output = container.exec(words).timeout(TEST_TIMEOUT).output()?;
    check!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn uptime(container: &Container) -> Result<f64> {
    Ok(text(container, &["cut", "-d ", "-f1", "/proc/uptime"])?.parse()?)
}

/// Bytes that are not the same in any two places of a page.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(next).collect()
}

/// Over vsock to the disk, flushed, and back over vsock from the disk.
fn use_disk(container: &Container, data: &[u8]) -> Result<(), String> {
    let command = "cat > /root/data; sync /root/data; echo 3 > /proc/sys/vm/drop_caches; cat /root/data";
    let process = container.exec(["sh", "-c", command]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut process = process.map_err(|e| e.to_string())?;
    let mut input = process.stdin.take().ok_or("no stdin")?;
    let output = thread::scope(|both| {
        both.spawn(|| input.write_all(data).map(|()| drop(input)));
        process.wait_with_output()
    });
    let output = output.map_err(|e| e.to_string())?;
    match output.stdout == data {
        true => Ok(()),
        false => Err(format!("{} bytes came back from the disk: {}", output.stdout.len(), output.status)),
    }
}

/// Over the network and back.
fn use_network(at: std::net::SocketAddr, data: &[u8]) -> Result<(), String> {
    let mut stream = TcpStream::connect(at).map_err(|e| format!("connecting: {e}"))?;
    stream.set_read_timeout(Some(TEST_TIMEOUT)).map_err(|e| e.to_string())?;
    let mut writer = stream.try_clone().map_err(|e| e.to_string())?;
    let mut back = vec![0; data.len()];
    thread::scope(|both| {
        both.spawn(move || writer.write_all(data));
        stream.read_exact(&mut back)
    })
    .map_err(|e| format!("the network: {e}"))?;
    match back == data {
        true => Ok(()),
        false => Err("other bytes came back from the network".into()),
    }
}

/// Interrupts of this device come at any moment, also when loops are suspended.
fn move_balloon(container: &Container) -> Result<(), String> {
    for size in [1, 0] {
        thread::sleep(Duration::from_millis(25));
        container.vm().set_balloon(Size::mib(size)).map_err(|e| e.to_string())?;
    }
    Ok(())
}

/// Does `work` until it fails or `done`; how often it was done.
fn repeat(done: &AtomicBool, work: impl Fn() -> Result<(), String>) -> Result<u32, String> {
    let mut turns = 0;
    while !done.load(Ordering::SeqCst) {
        work()?;
        turns += 1;
    }
    Ok(turns)
}

/// Rebuilds a machine again and again while its guest uses disk, network, vsock, clocks and timers.
fn guest_survives(kernel: Kernel, vcpus: u32) -> Outcome {
    let net = Net::user(Policy::deny_all()).publish(PortForward::tcp(([127, 0, 0, 1], 0), 80));
    let container = debian_container().kernel(kernel).vcpus(vcpus).net(net).start()?;
    let mut echo = container.exec(["perl", "-e", ECHO]).stdout(Stdio::piped()).spawn()?;
    echo.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0; 6])?;
    let at = *container.vm().net(0)?.published().first().ok_or("no port")?;
    let watch = container.exec(["perl", "-e", WATCH, &vcpus.to_string()]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let watch = watch.spawn()?;
    let (data, done) = (pattern(256 << 10), AtomicBool::new(false));
    // Some kernels find the lab's own counters unsynchronized at boot.
    text(&container, &["dmesg", "-C"])?;
    let begin = Instant::now();
    let before = uptime(&container)?;
    let (rounds, gaps) = thread::scope(|scope| -> Result<(u64, Duration)> {
        let loads = [
            scope.spawn(|| repeat(&done, || use_disk(&container, &data))),
            scope.spawn(|| repeat(&done, || use_network(at, &data))),
            scope.spawn(|| repeat(&done, || move_balloon(&container))),
        ];
        let (mut rounds, mut gaps, mut failed) = (0, Duration::ZERO, None);
        while failed.is_none() && soak().map_or(begin.elapsed() < USUAL, |thousands| rounds < thousands * 1000) {
            let gap = Instant::now();
            failed = rebuild(container.vm()).err();
            let took = gap.elapsed();
            gaps += took;
            rounds += 1;
            if loads.iter().any(|load| load.is_finished()) {
                break;
            }
            // The guest shall come to do something in between, however long a rebuild takes here.
            thread::sleep(took * (rounds % 4) as u32 / 2);
        }
        done.store(true, Ordering::SeqCst);
        for load in loads {
            let turns = load.join().map_err(|_| "the load panicked")??;
            check!(turns > 0, "nothing was done in {rounds} rebuilds");
        }
        failed.map_or(Ok((rounds, gaps)), |error| Err(error.into()))
    })?;
    check!(rounds > 8, "{rounds} rebuilds took {gaps:?}");
    // Clocks stood still while the guest could not run, and no longer than that.
    let passed = uptime(&container)? - before;
    let bounds = (begin.elapsed() - gaps).as_secs_f64() - 0.5..begin.elapsed().as_secs_f64() + 0.1;
    check!(bounds.contains(&passed), "{passed} s are not in {bounds:?} after {rounds} rebuilds");
    pace(&container)?;
    container.vm().set_balloon(Size::mib(16))?;
    let deadline = Instant::now() + TEST_TIMEOUT;
    while container.vm().memory_stats()?.balloon != Size::mib(16) {
        check!(Instant::now() < deadline, "{:?}", container.vm().memory_stats());
    }
    text(&container, &["touch", "/run/stop"])?;
    let watched = watch.wait_with_output()?;
    let said = String::from_utf8_lossy(&[watched.stdout, watched.stderr].concat()).into_owned();
    check!(watched.status.success(), "{said}");
    let longest: f64 = said.split(' ').nth(1).ok_or("two numbers")?.parse()?;
    check!((0.0..10.0).contains(&longest), "a sleep of 2 ms took {longest} s; {said}; {rounds} rebuilds took {gaps:?}");
    let log = text(&container, &["dmesg"])?;
    for word in ["lockup", "stall", "nstable", "BUG", "Oops", "timed out"] {
        check!(!log.contains(word), "{log}");
    }
    Ok(())
}

/// That the guest's clock goes as fast as this host's.
fn pace(container: &Container) -> Outcome {
    let (outer, one) = (Instant::now(), uptime(container)?);
    let inner = Instant::now();
    thread::sleep(Duration::from_secs(3));
    let least = inner.elapsed().as_secs_f64() - 0.1;
    let passed = uptime(container)? - one;
    let bounds = least..outer.elapsed().as_secs_f64() + 0.1;
    check!(bounds.contains(&passed), "{passed} s are not in {bounds:?}");
    Ok(())
}

pub fn rebuilt_guest_keeps_its_data_and_clocks() -> Outcome {
    guest_survives(kernel(), 1)
}

pub fn rebuilt_guest_of_four_vcpus_keeps_its_data_and_clocks() -> Outcome {
    guest_survives(kernel(), 4)
}

pub fn rebuilt_debian_kernel_keeps_its_data_and_clocks() -> Outcome {
    guest_survives(distribution("cloud")?.0, 1)
}

pub fn rebuilt_debian_kernel_of_four_vcpus_keeps_its_data_and_clocks() -> Outcome {
    guest_survives(distribution("cloud")?.0, 4)
}

pub fn rebuilds_during_boot_do_not_disturb_it() -> Outcome {
    let printed = Printed::default();
    let vm = guest("echo up; reboot -f").vcpus(2).console(printed.console()).start()?;
    let mut rounds = 0;
    let exit = loop {
        match rebuild(&vm) {
            Ok(()) => rounds += 1,
            Err(error) if error.kind() == ErrorKind::InvalidState => break vm.wait(),
            Err(error) => return Err(error.into()),
        }
        // Boots take some seconds in the lab.
        if let Some(exit) = vm.wait_timeout(Duration::from_millis(200)) {
            break exit;
        }
    };
    check!(matches!(exit, Exit::Reboot { .. }) && rounds > 0, "{exit} after {rounds} rebuilds: {}", printed.text());
    check!(printed.text().contains("up"), "{}", printed.text());
    Ok(())
}

pub fn rebuilt_vm_stays_paused_until_resumed() -> Outcome {
    let printed = Printed::default();
    let vm = guest("while :; do echo running; done").console(printed.console()).start()?;
    printed.wait_for("running")?;
    vm.pause()?;
    rebuild(&vm)?;
    thread::sleep(Duration::from_millis(200));
    let seen = printed.text().len();
    rebuild(&vm)?;
    thread::sleep(Duration::from_millis(200));
    check_eq!(printed.text().len(), seen);
    vm.resume()?;
    let deadline = Instant::now() + TEST_TIMEOUT;
    while printed.text().len() <= seen {
        check!(Instant::now() < deadline, "it did not go on");
        thread::sleep(Duration::from_millis(5));
    }
    vm.kill();
    vm.wait();
    check_eq!(rebuild(&vm).map_err(|e| e.kind()), Err(ErrorKind::InvalidState));
    Ok(())
}

pub fn rebuild_and_kill_race_from_many_threads() -> Outcome {
    for round in 0..5 {
        let vm = guest("while :; do echo; done").vcpus(2).start()?;
        let vm = &vm;
        let begin = Instant::now();
        thread::scope(|scope| {
            let rebuilding = scope.spawn(|| {
                let mut rebuilds = 0;
                loop {
                    match rebuild(vm) {
                        Ok(()) => rebuilds += 1,
                        Err(error) => break (rebuilds, error.kind()),
                    }
                }
            });
            scope.spawn(|| while vm.pause().is_ok() && vm.resume().is_ok() {});
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(2000 + 37 * round));
                vm.kill();
            });
            let (rebuilds, kind) = rebuilding.join().map_err(|_| "the rebuilds panicked")?;
            check!(rebuilds > 0 && kind == ErrorKind::InvalidState, "{rebuilds} rebuilds, then {kind:?}");
            Outcome::Ok(())
        })?;
        let exit = vm.wait();
        check!(matches!(exit, Exit::Killed { .. }), "{exit}");
        check!(begin.elapsed() < TEST_TIMEOUT);
    }
    Ok(())
}

pub fn rebuild_without_descriptors_fails_and_the_guest_goes_on() -> Outcome {
    if !alone("rebuild::rebuild_without_descriptors_fails_and_the_guest_goes_on")? {
        return Ok(());
    }
    // The serial port stands still for good when one of its interrupts is lost.
    let script =
        "trap 'echo asked; reboot -f' INT\necho 0 > /proc/sys/kernel/ctrl-alt-del\nwhile :; do echo running; done";
    let kernel = kernel().cmdline("console=ttyS0 quiet").initramfs(busybox(script));
    let printed = Printed::default();
    let vm = Vm::builder(kernel).memory(Size::mib(128)).vcpus(2).console(printed.console()).start()?;
    printed.wait_for("running")?;
    let goes_on = || -> Outcome {
        let (seen, deadline) = (printed.text().len(), Instant::now() + TEST_TIMEOUT);
        while printed.text().len() < seen + 100 {
            check!(Instant::now() < deadline, "it stands still after {seen} bytes: {:?}", vm.try_wait());
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    };
    let open = || -> Result<usize> { Ok(std::fs::read_dir("/proc/self/fd")?.count()) };
    rebuild(&vm)?;
    let before = open()?;
    let pid = std::process::id().to_string();
    check!(Command::new("prlimit").args(["--pid", &pid, "--nofile=256:1024"]).status()?.success());
    // Each time it comes one step further: to /dev/kvm, to the VM, to each of its vCPUs.
    let mut failed = 0;
    loop {
        let mut taken: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        taken.truncate(taken.len() - failed);
        let outcome = rebuild(&vm);
        drop(taken);
        goes_on()?;
        check_eq!(open()?, before);
        match outcome.map_err(|e| e.kind()) {
            Err(ErrorKind::ResourceExhausted | ErrorKind::Io) => failed += 1,
            outcome => break check_eq!((outcome, failed), (Ok(()), 4)),
        }
    }
    for _ in 0..50 {
        rebuild(&vm)?;
        goes_on()?;
    }
    check_eq!(open()?, before);
    // The keyboard reaches it, too.
    let exit = vm.stop(Duration::from_secs(60))?;
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    check!(printed.text().contains("asked"), "{}", printed.text());
    Ok(())
}
