//! Pausing and going on.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam::event::{DeviceId, EventKind, PauseCause};
use cofferdam::net::{NetLimit, Policy, PortForward};
use cofferdam::process::Stdio;
use cofferdam::stats::Stats;
use cofferdam::{ErrorKind, Exit, Net};

use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, container, debian_container, guest};
use crate::{check, check_eq};

const MOMENT: Duration = Duration::from_millis(200);

/// Waits until the guest has printed more than `n` bytes.
fn printed_beyond(printed: &Printed, n: usize) -> Result<usize, String> {
    let deadline = Instant::now() + TEST_TIMEOUT;
    while Instant::now() < deadline {
        match printed.text().len() {
            now if now > n => return Ok(now),
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
    Err(format!("nothing printed beyond {n} bytes"))
}

pub fn paused_guest_makes_no_progress_until_resumed() -> Outcome {
    let printed = Printed::default();
    let vm = guest("while :; do echo running; done").console(printed.console()).start()?;
    let mut seen = printed_beyond(&printed, 100)?;
    for _ in 0..3 {
        vm.pause()?;
        vm.pause()?;
        // The console's thread may still have something to give.
        thread::sleep(MOMENT);
        seen = printed.text().len();
        thread::sleep(MOMENT);
        check_eq!(printed.text().len(), seen);
        vm.resume()?;
        vm.resume()?;
        seen = printed_beyond(&printed, seen)?;
    }
    check!(seen > 100);
    vm.kill();
    vm.wait();
    check_eq!(vm.pause().map_err(|e| e.kind()), Err(ErrorKind::InvalidState));
    check_eq!(vm.resume().map_err(|e| e.kind()), Err(ErrorKind::InvalidState));
    Ok(())
}

/// A program talks to the host's end of a published port, all the while.
pub fn devices_of_a_paused_vm_take_calls_and_go_on() -> Outcome {
    let net = Net::user(Policy::deny_all()).publish(PortForward::tcp(([127, 0, 0, 1], 0), 7000));
    let container = debian_container().net(net).start()?;
    let (vm, net) = (container.vm(), container.net(0)?);
    let script = "my $l = IO::Socket::IP->new(LocalHost => '0.0.0.0', LocalPort => 7000, Listen => 5) or die;
        $| = 1; print 'ready'; my $c = $l->accept; while (<$c>) { syswrite $c, $_ }";
    let mut echo = container.exec(["perl", "-MIO::Socket::IP", "-e", script]).stdout(Stdio::piped()).spawn()?;
    echo.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0; 5])?;
    let mut caller = TcpStream::connect(*net.published().first().ok_or("a port was published")?)?;
    caller.set_read_timeout(Some(TEST_TIMEOUT))?;
    let mut answers = BufReader::new(caller.try_clone()?);
    for round in 0..20 {
        let mut line = String::new();
        writeln!(caller, "before {round}")?;
        vm.pause()?;
        // Each of these looks at the device, and what the guest has put into its queues.
        net.set_policy(Policy::deny_all())?;
        net.set_limit(NetLimit::none())?;
        net.set_link(true)?;
        check!(net.stats()?.malformed == 0);
        writeln!(caller, "while {round}")?;
        vm.resume()?;
        for when in ["before", "while"] {
            line.clear();
            answers.read_line(&mut line)?;
            check_eq!(line, format!("{when} {round}\n"));
        }
    }
    // What was asked for while it was paused is done.
    vm.pause()?;
    let asking = thread::spawn({
        let container = container.clone();
        move || container.exec(["echo", "on"]).timeout(TEST_TIMEOUT).output()
    });
    thread::sleep(MOMENT);
    vm.resume()?;
    check_eq!(asking.join().map_err(|_| "the caller panicked")??.stdout, b"on\n");
    check!(vm.stats().devices.iter().all(|it| it.driver_errors == 0), "{:?}", vm.stats());
    Ok(())
}

pub fn repeated_pauses_lose_no_data() -> Outcome {
    const ROUNDS: u32 = 2000;
    let container = container()?;
    let done = AtomicBool::new(false);
    let (mut data, mut state) = (vec![0u8; 256 << 10], 1u32);
    data.iter_mut().for_each(|byte| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    });
    thread::scope(|scope| -> Outcome {
        let work = scope.spawn(|| -> Result<u32, String> {
            let mut turns = 0;
            while !done.load(Ordering::SeqCst) {
                // Over vsock to the disk, flushed, and back over vsock.
                let command = "cat > /root/data; sync /root/data; echo 3 > /proc/sys/vm/drop_caches; cat /root/data";
                let mut process = container
                    .exec(["sh", "-c", command])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .spawn()
                    .map_err(|e| e.to_string())?;
                let mut input = process.stdin.take().ok_or("no stdin")?;
                let output = thread::scope(|both| {
                    both.spawn(|| input.write_all(&data).map(|()| drop(input)));
                    process.wait_with_output()
                });
                let output = output.map_err(|e| e.to_string())?;
                if output.stdout != data {
                    return Err(format!("{} bytes came back: {}", output.stdout.len(), output.status));
                }
                turns += 1;
            }
            Ok(turns)
        });
        for _ in 0..ROUNDS {
            container.vm().pause()?;
            container.vm().resume()?;
            if work.is_finished() {
                break;
            }
        }
        done.store(true, Ordering::SeqCst);
        let turns = work.join().map_err(|_| "the work panicked")??;
        check!(turns > 0, "{turns} turns");
        Ok(())
    })
}

pub fn clocks_advance_while_paused() -> Outcome {
    let container = container()?;
    let uptime = || -> Result<f64, Box<dyn std::error::Error>> {
        let output = container.exec(["cut", "-d ", "-f1", "/proc/uptime"]).output()?;
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    };
    let begin = Instant::now();
    let before = uptime()?;
    container.vm().pause()?;
    let paused = Instant::now();
    thread::sleep(Duration::from_secs(3));
    let least = paused.elapsed().as_secs_f64() - 0.1;
    container.vm().resume()?;
    let passed = uptime()? - before;
    // The guest looked at its clock before it was paused and before this one is looked at.
    let bounds = least..begin.elapsed().as_secs_f64() + 0.1;
    check!(bounds.contains(&passed), "{passed} s are not in {bounds:?}");
    let log = String::from_utf8(container.exec(["dmesg"]).output()?.stdout)?;
    check!(!log.contains("lockup") && !log.contains("stall"), "{log}");
    Ok(())
}

pub fn paused_guest_can_be_killed() -> Outcome {
    let spinning = || guest("while :; do :; done").start();
    let vm = spinning()?;
    vm.pause()?;
    vm.kill();
    check!(matches!(vm.wait(), Exit::Killed { .. }));
    let vm = spinning()?;
    vm.pause()?;
    drop(vm);
    // One that goes on for its end, and ignores Ctrl-Alt-Del.
    let printed = Printed::default();
    let deaf = "echo 0 > /proc/sys/kernel/ctrl-alt-del; echo ready; exec sleep 1000";
    let vm = guest(deaf).console(printed.console()).start()?;
    printed.wait_for("ready")?;
    vm.pause()?;
    let (grace, begin) = (Duration::from_millis(100), Instant::now());
    let exit = vm.stop(grace)?;
    check!(matches!(exit, Exit::Killed { .. }) && begin.elapsed() >= grace, "{exit} after {:?}", begin.elapsed());
    Ok(())
}

pub fn pause_and_kill_race_from_many_threads() -> Outcome {
    for round in 0..5 {
        let vm = guest("while :; do echo; done").start()?;
        let vm = &vm;
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| while vm.pause().is_ok() && vm.resume().is_ok() {});
            }
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(40 * round));
                vm.kill();
            });
        });
        check!(matches!(vm.wait(), Exit::Killed { .. }));
    }
    Ok(())
}

pub fn events_report_the_whole_lifecycle() -> Outcome {
    let vm = guest("sleep 1000").start()?;
    let mut events = vm.events()?;
    let kinds = [EventKind::Started, EventKind::DriversReady];
    for kind in kinds {
        check_eq!(events.next_timeout(TEST_TIMEOUT).map(|e| e.kind), Some(kind));
    }
    vm.pause()?;
    vm.pause()?;
    vm.resume()?;
    vm.kill();
    vm.wait();
    check_eq!(events.next().map(|e| e.kind), Some(EventKind::Paused { cause: PauseCause::Embedder }));
    // The stream outlives the machine's handle.
    drop(vm);
    let rest: Vec<_> = events.map(|e| e.kind).collect();
    check!(matches!(&rest[..], [EventKind::Resumed, EventKind::Ended { exit: Exit::Killed { .. } }]), "{rest:?}");
    Ok(())
}

pub fn stats_grow_with_guest_activity() -> Outcome {
    let container = container()?;
    let before = container.vm().stats();
    let command = "dd if=/dev/zero of=/root/x bs=1M count=4 conv=fsync 2>/dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done";
    check!(container.exec(["sh", "-c", command]).status()?.success());
    let after = container.vm().stats();
    let layer = |stats: &Stats| stats.devices.iter().find(|d| d.device == DeviceId::Disk(1)).cloned();
    let [old, new] = [&before, &after].map(layer);
    let (old, new) = (old.ok_or("no disk1")?, new.ok_or("no disk1")?);
    check!(new.bytes_from_guest - old.bytes_from_guest >= 4 << 20, "{old:?} {new:?}");
    check!(new.requests > old.requests && new.kicks > old.kicks && new.interrupts > old.interrupts, "{new:?}");
    check!(after.vcpus[0].cpu_time > before.vcpus[0].cpu_time, "{after:?}");
    check!(after.vcpus[0].mmio_exits > 0 && after.vcpus[0].port_exits > 0, "{after:?}");
    let text = Stats::openmetrics([("one", &after)]);
    check!(text.contains("cofferdam_device_from_guest_bytes_total{vm=\"one\",device=\"disk1\"}"), "{text}");
    Ok(())
}
