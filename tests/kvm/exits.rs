//! Each way in which a guest can end has its own [`Exit`](cofferdam::Exit).

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam::event::DeviceId;
use cofferdam::exit::Stage;
use cofferdam::{Console, Disk, Exit, Size, Vm};

use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, Temp, alone, driver, guest, run, tiny_kernel};
use crate::{check, check_eq};

/// `mov dx, 0x600; mov al, N; out dx, al; hlt`
fn exit_port(value: u8) -> Vec<u8> {
    vec![0x66, 0xba, 0x00, 0x06, 0xb0, value, 0xee, 0xf4]
}

/// `jmp .`
const SPIN: &[u8] = &[0xeb, 0xfe];

fn tiny(code: &[u8]) -> Result<Exit, Box<dyn std::error::Error>> {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, code)?).start()?;
    Ok(vm.wait_timeout(TEST_TIMEOUT).ok_or("it never ended")?)
}

pub fn power_off_exits_with_power_off() -> Outcome {
    let exit = tiny(&exit_port(0x34))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    Ok(())
}

pub fn halt_exits_with_halt() -> Outcome {
    let exit = tiny(&exit_port(0x36))?;
    check!(matches!(exit, Exit::Halt { .. }), "{exit}");
    Ok(())
}

pub fn exit_port_write_exits_with_init_fault() -> Outcome {
    let exit = tiny(&exit_port(0x37))?;
    check!(matches!(exit, Exit::InitFault { .. }), "{exit}");
    Ok(())
}

pub fn reboot_exits_with_reboot() -> Outcome {
    let (exit, _) = run(guest("echo last words\nreboot -f"))?;
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    check!(format!("{exit:#}").contains("last words"), "{exit:#}");
    check_eq!(exit.report().stage, Stage::DriversReady);
    Ok(())
}

pub fn kernel_panic_exits_with_panic_and_its_message() -> Outcome {
    // PID 1 ends, which no kernel survives.
    let (exit, _) = run(guest("exit 3"))?;
    check!(matches!(exit, Exit::Panic { .. }), "{exit}");
    check!(exit.to_string().contains("Attempted to kill init"), "{exit}");
    Ok(())
}

pub fn panic_port_write_exits_with_panic_without_a_message() -> Outcome {
    // mov dx, 0x505; in al, dx; out dx, al; hlt
    let exit = tiny(&[0x66, 0xba, 0x05, 0x05, 0xec, 0xb0, 1, 0xee, 0xf4])?;
    check!(matches!(exit, Exit::Panic { .. }) && exit.to_string().contains("does not say why"), "{exit}");
    Ok(())
}

pub fn oom_of_pid_1_exits_with_panic() -> Outcome {
    // PID 1 itself takes all there is, and the kernel has no other process to end.
    let (exit, _) = run(guest("exec tail /dev/zero"))?;
    check!(matches!(exit, Exit::Panic { .. }), "{exit}");
    check!(format!("{exit:#}").contains("memory") || format!("{exit:#}").contains("Attempted to kill init"), "{exit}");
    Ok(())
}

pub fn invalid_queue_without_a_reset_exits_with_device_fault() -> Outcome {
    // Starts the first device as a driver does, but for a queue of three entries.
    let exit = tiny(&[driver(0, 0, 0x3000, 3), SPIN.to_vec()].concat())?;
    check!(
        matches!(&exit, Exit::DeviceFault { device: DeviceId::Console, message, .. } if message.starts_with("queue 0: ")),
        "{exit}"
    );
    check!(exit.to_string().contains("did not reset it within 10 s"), "{exit}");
    Ok(())
}

pub fn triple_fault_exits_with_triple_fault() -> Outcome {
    // An undefined instruction, without anybody to handle it.
    let exit = tiny(&[0x0f, 0x0b])?;
    check!(matches!(exit, Exit::TripleFault { .. }), "{exit}");
    // KVM on AMD resets the processor at once; on Intel it still shows where it was.
    if let Some(registers) = exit.report().registers.clone() {
        check_eq!(registers.rip, 0x10_0000);
    }
    Ok(())
}

pub fn kill_ends_a_spinning_guest() -> Outcome {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, SPIN)?).vcpus(2).start()?;
    check!(vm.try_wait().is_none());
    vm.kill();
    vm.kill();
    let exit = vm.wait_timeout(TEST_TIMEOUT).ok_or("kill did nothing")?;
    check!(matches!(exit, Exit::Killed { .. }), "{exit}");
    // Where it was is what a person needs who ends a guest that hangs.
    let was_at = exit.report().registers.as_ref().map(|registers| registers.rip);
    check_eq!(was_at, Some(0x10_0000));
    check!(format!("{exit:#}").contains("ended from outside after"), "{exit:#}");
    check!(matches!(vm.wait(), Exit::Killed { .. }));
    Ok(())
}

pub fn drop_ends_a_spinning_guest() -> Outcome {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, SPIN)?).start()?;
    let begin = Instant::now();
    drop(vm);
    check!(begin.elapsed() < TEST_TIMEOUT);
    Ok(())
}

pub fn ctrl_alt_del_asks_init_to_shut_down() -> Outcome {
    let printed = Printed::default();
    let script =
        "trap 'echo asked; reboot -f' INT\necho 0 > /proc/sys/kernel/ctrl-alt-del\necho up\nwhile :; do sleep 1; done";
    let vm = guest(script).console(printed.console()).start()?;
    printed.wait_for("up")?;
    let exit = vm.stop(Duration::from_secs(20))?;
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    check!(printed.text().contains("asked"), "{}", printed.text());
    Ok(())
}

pub fn guest_survives_sigstop_and_signals_of_the_process() -> Outcome {
    if !alone("exits::guest_survives_sigstop_and_signals_of_the_process")? {
        return Ok(());
    }
    let printed = Printed::default();
    let vm =
        guest("n=0; while :; do n=$((n + 1)); echo round $n; sleep 0.1; done").console(printed.console()).start()?;
    printed.wait_for("round 1")?;
    // By the kernel's name for the process, as a shell or a supervisor would.
    let script = "for n in 1 2 3; do kill -STOP $0; sleep 0.2; kill -CONT $0; kill -WINCH $0; sleep 0.2; done";
    check!(Command::new("sh").args(["-c", script, &std::process::id().to_string()]).status()?.success());
    let rounds = printed.text().matches("round").count();
    printed.wait_for(&format!("round {}", rounds + 3))?;
    vm.kill();
    check!(matches!(vm.wait(), Exit::Killed { .. }));
    Ok(())
}

pub fn sigkill_of_the_process_leaves_nothing_behind() -> Outcome {
    const TEST: &str = "exits::sigkill_of_the_process_leaves_nothing_behind";
    if std::env::var_os("COFFERDAM_TEST_KILLED").is_some() {
        let vm = guest("sleep 1000").disk(Disk::scratch(Size::mib(64))).start()?;
        writeln!(std::io::stdout(), "started")?;
        vm.wait();
        return Ok(());
    }
    let temp = Temp::new()?;
    for signal in ["-TERM", "-KILL"] {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["--exact", TEST, "--nocapture"])
            .env("COFFERDAM_TEST_KILLED", "1")
            .env("TMPDIR", temp.path(""))
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("no output")?;
        let started = BufReader::new(output).lines().map_while(Result::ok).find(|line| line.contains("started"));
        check!(started.is_some());
        check!(Command::new("kill").args([signal, &child.id().to_string()]).status()?.success());
        check!(child.wait()?.signal().is_some());
        check_eq!(std::fs::read_dir(temp.path(""))?.count(), 0);
    }
    Ok(())
}

pub fn shutdown_kills_an_unresponsive_guest_after_the_grace() -> Outcome {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, SPIN)?).start()?;
    let begin = Instant::now();
    let exit = vm.stop(Duration::from_millis(100))?;
    check!(matches!(exit, Exit::Killed { .. }), "{exit}");
    check!(begin.elapsed() >= Duration::from_millis(100), "{:?}", begin.elapsed());
    Ok(())
}

#[allow(unsafe_code, reason = "waits for a descriptor, as an embedder's event loop would")]
pub fn exit_descriptor_becomes_readable_at_the_end() -> Outcome {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, SPIN)?).start()?;
    let ready = |wait: i32| {
        let mut poll = libc::pollfd { fd: vm.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `poll` is one valid pollfd on this stack, and the count says one.
        unsafe { libc::poll(&mut poll, 1, wait) == 1 }
    };
    check!(!ready(0));
    vm.kill();
    check!(ready(60_000));
    Ok(())
}

pub fn blocked_console_writer_does_not_delay_the_exit() -> Outcome {
    struct Stuck(std::sync::mpsc::Receiver<()>);
    impl std::io::Write for Stuck {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            // Until the test is over.
            let _ = self.0.recv();
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (hold, held) = std::sync::mpsc::channel();
    let vm = guest("yes | head -c 1000000").console(Console::writer(Stuck(held))).start()?;
    std::thread::sleep(Duration::from_millis(500));
    vm.kill();
    let exit = vm.wait_timeout(TEST_TIMEOUT).ok_or("the writer held the end up")?;
    check!(matches!(exit, Exit::Killed { .. }), "{exit}");
    drop((vm, hold));
    Ok(())
}
