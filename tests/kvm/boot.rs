//! Kernels boot and see the machine that was asked for.

use cofferdam::{Exit, Size, Vm};

use crate::fixture::{self, Outcome, busybox, guest, kernel, run};
use crate::{check, check_eq};

pub fn vmlinux() -> Outcome {
    let (exit, printed) = run(guest("echo hello from $(uname -s)\nreboot -f"))?;
    check!(matches!(exit, Exit::Reboot(_)), "{exit}");
    check_eq!(printed.trim_end(), "hello from Linux");
    Ok(())
}

pub fn bzimage() -> Outcome {
    let kernel = fixture::bzimage()?.cmdline("console=hvc0 quiet").initramfs(busybox("echo hello\nreboot -f"));
    let (exit, printed) = run(Vm::builder(kernel))?;
    check!(matches!(exit, Exit::Reboot(_)), "{exit}");
    check!(printed.contains("hello"), "{printed}");
    Ok(())
}

pub fn two_processors() -> Outcome {
    let (_, printed) = run(guest("nproc\ncd /sys/devices/system/cpu/cpu1/topology\ncat core_id physical_package_id thread_siblings_list\nreboot -f").vcpus(2))?;
    check_eq!(printed.split_whitespace().collect::<Vec<_>>(), ["2", "1", "0", "1"]);
    Ok(())
}

pub fn memory_around_the_hole() -> Outcome {
    for (size, least) in [(Size::mib(64), 40), (Size::mib(3584), 3400), (Size::gib(5), 4900)] {
        let (_, printed) = run(guest("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo\nreboot -f").memory(size))?;
        let seen: u64 = printed.trim().parse().map_err(|e| format!("{e}: {printed}"))?;
        check!(seen >= least && seen << 20 <= size.as_bytes(), "{size}: {seen} MiB");
    }
    Ok(())
}

pub fn serial_port() -> Outcome {
    let kernel = kernel().cmdline("console=ttyS0 quiet").initramfs(busybox("echo by wire\nreboot -f"));
    let (_, printed) = run(Vm::builder(kernel))?;
    check!(printed.contains("by wire"), "{printed}");
    Ok(())
}

pub fn command_line_arguments_reach_init() -> Outcome {
    let kernel = kernel().cmdline("console=hvc0 quiet -- one two").initramfs(busybox("echo \"$@\"\nreboot -f"));
    let (_, printed) = run(Vm::builder(kernel))?;
    check_eq!(printed.trim(), "one two");
    Ok(())
}

pub fn a_timeline_is_kept() -> Outcome {
    let vm = guest("reboot -f").start()?;
    vm.wait()?;
    let line = vm.timeline();
    let marks = [line.running, line.kernel_entered, line.drivers_ready, line.ended];
    check!(marks.iter().all(Option::is_some) && marks.is_sorted(), "{line:?}");
    Ok(())
}
