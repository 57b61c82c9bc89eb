//! What a running guest learns of its machine: a new generation, and the power button.

use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam::internals::{rebuild, renew_container_generation, renew_generation};
use cofferdam::process::Stdio;
use cofferdam::{Container, ErrorKind, Exit, Kernel};

use crate::fixture::{Outcome, TEST_TIMEOUT, debian_container, distribution, distribution_alone, distribution_modules};
use crate::{check, check_eq};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn shell(container: &Container, script: &str) -> Result<String> {
    let output = container.exec(["sh", "-ec", script]).timeout(TEST_TIMEOUT).output()?;
    check!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Waits until the kernel's log has this text so often.
fn wait_for_log(container: &Container, text: &str, times: usize) -> Outcome {
    let deadline = Instant::now() + TEST_TIMEOUT;
    loop {
        let log = shell(container, "dmesg")?;
        if log.matches(text).count() >= times {
            return Ok(());
        }
        check!(Instant::now() < deadline, "{text:?} is not {times} times in {log}");
        thread::sleep(Duration::from_millis(50));
    }
}

pub fn running_debian_6_12_learns_of_each_new_generation() -> Outcome {
    let container = debian_container().kernel(distribution("cloud-6.12")?.0).vcpus(2).start()?;
    let reseeded = "crng reseeded due to virtual machine fork";
    for n in 1..=5 {
        check_eq!(shell(&container, "dmesg")?.matches(reseeded).count(), n - 1);
        // Also with new KVM objects, and without the shim's part.
        match n {
            2 => renew_generation(container.vm())?,
            3 => {
                rebuild(container.vm())?;
                renew_container_generation(&container)?;
            }
            _ => renew_container_generation(&container)?,
        }
        wait_for_log(&container, reseeded, n)?;
    }
    check!(!shell(&container, "dmesg -r | grep '^<[0-3]>' || true")?.contains("ACPI"));
    Ok(())
}

pub fn kernels_without_acpi_learn_of_a_new_generation_by_the_shim() -> Outcome {
    let container = debian_container().start()?;
    check_eq!(shell(&container, "ls -d /sys/firmware/acpi 2> /dev/null || true")?, "");
    thread::scope(|scope| {
        let all: Vec<_> = (0..8).map(|_| scope.spawn(|| renew_container_generation(&container))).collect();
        all.into_iter().try_for_each(|one| one.join().map_err(|_| "a panic")?.map_err(|e| e.to_string()))
    })?;
    // What a program has put in the generator's place does not hold the shim up.
    shell(&container, "mv /dev/urandom /dev/kept; mkfifo /dev/urandom")?;
    let refused = renew_container_generation(&container).err().ok_or("a pipe was reseeded")?;
    check_eq!(refused.kind(), ErrorKind::GuestFailed);
    shell(&container, "mv /dev/kept /dev/urandom")?;
    renew_container_generation(&container)?;
    // One that stands still answers when it goes on, and one that has ended at once.
    container.pause()?;
    let late = renew_container_generation(&container).err().ok_or("a paused guest has answered")?;
    check_eq!(late.kind(), ErrorKind::TimedOut);
    container.resume()?;
    renew_container_generation(&container)?;
    container.kill();
    container.wait();
    let ended = renew_container_generation(&container).err().ok_or("an ended guest has answered")?;
    check_eq!(ended.kind(), ErrorKind::InvalidState);
    Ok(())
}

fn with_button() -> Result<Kernel> {
    let modules = distribution_modules("cloud-6.12")?.with("button").with("evdev");
    Ok(distribution_alone("cloud-6.12")?.modules(modules))
}

pub fn power_button_is_pressed_by_stop() -> Outcome {
    let container = debian_container().kernel(with_button()?).start()?;
    // The key's number in the first event of the button's own device; the keyboard has another.
    let script = "for device in /sys/class/input/event*; do
        if grep -q 'Power Button' $device/device/name; then button=/dev/input/${device##*/}; fi
        done; exec 3< $button; echo ready; dd bs=24 count=1 status=none <&3 | od -An -tu2 -j18 -N2";
    let mut reader = container.exec(["sh", "-ec", script]).stdout(Stdio::piped()).spawn()?;
    let mut output = reader.stdout.take().ok_or("no output")?;
    output.read_exact(&mut [0; 6])?;
    let (exit, pressed) = thread::scope(|scope| -> Result<_> {
        let stopping = scope.spawn(|| container.vm().stop(TEST_TIMEOUT));
        let mut pressed = [0; 7];
        output.read_exact(&mut pressed)?;
        Ok((stopping.join().map_err(|_| "a panic")??, String::from_utf8(pressed.to_vec())?))
    })?;
    check_eq!(pressed.trim(), "116");
    check!(matches!(exit, Exit::PowerOff { .. } | Exit::Reboot { .. }), "{exit}");
    Ok(())
}
