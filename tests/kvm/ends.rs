//! Every way a guest can end is told apart, and none is silent.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use cofferdam::event::DeviceId;
use cofferdam::exit::Stage;
use cofferdam::{Console, Disk, Exit, Size, Vm};

use crate::fixture::{Outcome, PATIENCE, Printed, Temp, alone, driver, guest, run, tiny_kernel};
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
    Ok(vm.wait_timeout(PATIENCE).ok_or("it never ended")?)
}

pub fn power_off() -> Outcome {
    let exit = tiny(&exit_port(0x34))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    Ok(())
}

pub fn halt() -> Outcome {
    let exit = tiny(&exit_port(0x36))?;
    check!(matches!(exit, Exit::Halt { .. }), "{exit}");
    Ok(())
}

pub fn init_fault() -> Outcome {
    let exit = tiny(&exit_port(0x37))?;
    check!(matches!(exit, Exit::InitFault { .. }), "{exit}");
    Ok(())
}

pub fn reboot() -> Outcome {
    let (exit, _) = run(guest("echo last words\nreboot -f"))?;
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    check!(format!("{exit:#}").contains("last words"), "{exit:#}");
    check_eq!(exit.report().stage, Stage::DriversReady);
    Ok(())
}

pub fn panic() -> Outcome {
    // PID 1 ends, which no kernel survives.
    let (exit, _) = run(guest("exit 3"))?;
    check!(matches!(exit, Exit::Panic { .. }), "{exit}");
    check!(exit.to_string().contains("Attempted to kill init"), "{exit}");
    Ok(())
}

pub fn panic_without_a_word() -> Outcome {
    // mov dx, 0x505; in al, dx; out dx, al; hlt
    let exit = tiny(&[0x66, 0xba, 0x05, 0x05, 0xec, 0xb0, 1, 0xee, 0xf4])?;
    check!(matches!(exit, Exit::Panic { .. }) && exit.to_string().contains("does not say why"), "{exit}");
    Ok(())
}

pub fn want_of_memory() -> Outcome {
    // PID 1 itself takes all there is, and the kernel has nobody else to end.
    let (exit, _) = run(guest("exec tail /dev/zero"))?;
    check!(matches!(exit, Exit::Panic { .. }), "{exit}");
    check!(format!("{exit:#}").contains("memory") || format!("{exit:#}").contains("Attempted to kill init"), "{exit}");
    Ok(())
}

pub fn device_that_is_never_reset() -> Outcome {
    // Starts the first device as a driver does, but for a queue of three entries.
    let exit = tiny(&[driver(0, 0, 0x3000, 3), SPIN.to_vec()].concat())?;
    check!(
        matches!(&exit, Exit::DeviceFault { device: DeviceId::Console, message, .. } if message.starts_with("queue 0: ")),
        "{exit}"
    );
    check!(exit.to_string().contains("did not reset it within 10 s"), "{exit}");
    Ok(())
}

pub fn triple_fault() -> Outcome {
    // An undefined instruction, without anybody to handle it.
    let exit = tiny(&[0x0f, 0x0b])?;
    check!(matches!(exit, Exit::TripleFault { .. }), "{exit}");
    // KVM on AMD resets the processor at once; on Intel it still shows where it was.
    if let Some(registers) = exit.report().registers.clone() {
        check_eq!(registers.rip, 0x10_0000);
    }
    Ok(())
}

pub fn killed_while_it_spins() -> Outcome {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, SPIN)?).vcpus(2).start()?;
    check!(vm.try_wait().is_none());
    vm.kill();
    vm.kill();
    let exit = vm.wait_timeout(PATIENCE).ok_or("kill did nothing")?;
    check!(matches!(exit, Exit::Killed { .. }), "{exit}");
    // Where it was is what a person needs who ends a guest that hangs.
    let was_at = exit.report().registers.as_ref().map(|registers| registers.rip);
    check_eq!(was_at, Some(0x10_0000));
    check!(format!("{exit:#}").contains("ended from outside after"), "{exit:#}");
    check!(matches!(vm.wait(), Exit::Killed { .. }));
    Ok(())
}

pub fn dropped_while_it_spins() -> Outcome {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, SPIN)?).start()?;
    let begin = Instant::now();
    drop(vm);
    check!(begin.elapsed() < PATIENCE);
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

pub fn stops_and_signals_of_the_host_are_survived() -> Outcome {
    if !alone("ends::stops_and_signals_of_the_host_are_survived")? {
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

pub fn nothing_is_left_when_the_process_is_killed() -> Outcome {
    const TEST: &str = "ends::nothing_is_left_when_the_process_is_killed";
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
        let told = BufReader::new(output).lines().map_while(Result::ok).find(|line| line.contains("started"));
        check!(told.is_some());
        check!(Command::new("kill").args([signal, &child.id().to_string()]).status()?.success());
        check!(child.wait()?.signal().is_some());
        check_eq!(std::fs::read_dir(temp.path(""))?.count(), 0);
    }
    Ok(())
}

pub fn shutdown_ends_a_guest_that_does_not_listen() -> Outcome {
    let temp = Temp::new()?;
    let vm = Vm::builder(tiny_kernel(&temp, SPIN)?).start()?;
    let begin = Instant::now();
    let exit = vm.stop(Duration::from_millis(100))?;
    check!(matches!(exit, Exit::Killed { .. }), "{exit}");
    check!(begin.elapsed() >= Duration::from_millis(100), "{:?}", begin.elapsed());
    Ok(())
}

#[allow(unsafe_code, reason = "waits for a descriptor, as an embedder's event loop would")]
pub fn the_exit_descriptor_tells() -> Outcome {
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

pub fn a_stuck_console_writer_holds_nothing_up() -> Outcome {
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
    let exit = vm.wait_timeout(PATIENCE).ok_or("the writer held the end up")?;
    check!(matches!(exit, Exit::Killed { .. }), "{exit}");
    drop((vm, hold));
    Ok(())
}
