//! Kernels boot and see the machine that was asked for.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use cofferdam::memory::Memory;
use cofferdam::{Disk, ErrorKind, Exit, Kernel, Size, Vm};

use crate::fixture::{self, Outcome, Printed, Temp, busybox, guest, kernel, run, stock_guest};
use crate::{check, check_eq};

/// Where the machine's generation is in its memory.
const VM_GENERATION: u64 = 0xe_f000;

pub fn vmlinux_boots() -> Outcome {
    let (exit, printed) = run(guest("echo hello from $(uname -s)\nreboot -f"))?;
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    check_eq!(printed.trim_end(), "hello from Linux");
    Ok(())
}

pub fn bzimage_boots() -> Outcome {
    let kernel = fixture::bzimage()?.cmdline("console=hvc0 quiet").initramfs(busybox("echo hello\nreboot -f"));
    let (exit, printed) = run(Vm::builder(kernel))?;
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    check!(printed.contains("hello"), "{printed}");
    Ok(())
}

pub fn two_vcpus_are_online() -> Outcome {
    let (_, printed) = run(guest("nproc\ncd /sys/devices/system/cpu/cpu1/topology\ncat core_id physical_package_id thread_siblings_list\nreboot -f").vcpus(2))?;
    check_eq!(printed.split_whitespace().collect::<Vec<_>>(), ["2", "1", "0", "1"]);
    Ok(())
}

pub fn memory_below_and_above_the_mmio_hole_is_usable() -> Outcome {
    for (size, least) in [(Size::mib(64), 40), (Size::mib(3584), 3400), (Size::gib(5), 4900)] {
        let (_, printed) = run(guest("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo\nreboot -f").memory(size))?;
        let seen: u64 = printed.trim().parse().map_err(|e| format!("{e}: {printed}"))?;
        check!(seen >= least && seen << 20 <= size.as_bytes(), "{size}: {seen} MiB");
    }
    Ok(())
}

pub fn serial_console_output_reaches_the_writer() -> Outcome {
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

pub fn boot_timeline_is_recorded() -> Outcome {
    let vm = guest("reboot -f").start()?;
    vm.wait();
    let line = vm.timeline();
    let marks = [line.running, line.kernel_entered, line.drivers_ready, line.ended];
    check!(marks.iter().all(Option::is_some) && marks.is_sorted(), "{line:?}");
    Ok(())
}

pub fn missing_kernel_options_are_named() -> Outcome {
    for kernel in [kernel(), fixture::bzimage()?] {
        kernel.check(["CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES", "VIRTIO_BLK"])?;
        let error = kernel.check(["CONFIG_VIRTIO_MMIO", "CONFIG_NO_SUCH"]).err().ok_or("it lacks nothing")?;
        check_eq!(error.kind(), ErrorKind::Unsupported);
        check!(error.to_string().ends_with("CONFIG_NO_SUCH"), "{error}");
    }
    let error = fixture::unknown_kernel(&Temp::new()?)?.check(["CONFIG_ACPI"]).err().ok_or("no error")?;
    check_eq!(error.kind(), ErrorKind::NotFound);
    Ok(())
}

pub fn acpi_kernel_finds_virtio_devices() -> Outcome {
    let script = "ls -1 /sys/bus/acpi/devices\ncat /sys/block/vda/size /sys/block/vdb/size\n\
        grep -o virtio_mmio.device /proc/cmdline\ncat /proc/interrupts\ndmesg -r | grep '^<[0-4]>'\npoweroff -f";
    let disks = |vm: cofferdam::VmBuilder| vm.disk(Disk::scratch(Size::mib(1))).disk(Disk::scratch(Size::mib(2)));
    let (exit, printed) = run(disks(stock_guest("console=ttyS0 quiet", script)?))?;
    let printed = printed.replace('\r', "");
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    check_eq!(printed.lines().filter(|line| line.starts_with("LNRO0005:")).count(), 5);
    check!(printed.contains("PNP0501:00") && printed.contains("PNP0303:00"), "{printed}");
    check!(printed.contains("\n2048\n4096\n"), "{printed}");
    check!(printed.contains("IO-APIC   5-edge"), "{printed}");
    check!(!printed.contains("virtio_mmio.device"), "{printed}");
    let complaints = ["ACPI Error", "ACPI Warning", "ACPI BIOS", "ACPI: Unable"];
    check!(!complaints.iter().any(|text| printed.contains(text)), "{printed}");
    Ok(())
}

pub fn acpi_kernel_powers_off() -> Outcome {
    let (exit, _) = run(stock_guest("console=ttyS0 quiet", "poweroff -f")?)?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    Ok(())
}

pub fn acpi_kernel_reboots() -> Outcome {
    for way in ["", " reboot=acpi"] {
        let (exit, _) = run(stock_guest(&format!("console=ttyS0 quiet{way}"), "reboot -f")?)?;
        check!(matches!(exit, Exit::Reboot { .. }), "{way}: {exit}");
    }
    Ok(())
}

pub fn acpi_kernel_starts_two_vcpus() -> Outcome {
    let script = "cat /sys/devices/system/cpu/online\nnproc\npoweroff -f";
    let (exit, printed) = run(stock_guest("console=ttyS0 quiet", script)?.vcpus(2))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    check_eq!(printed.split_whitespace().collect::<Vec<_>>(), ["0-1", "2"]);
    Ok(())
}

pub fn acpi_kernel_receives_ctrl_alt_del() -> Outcome {
    let printed = Printed::default();
    let script = "trap 'poweroff -f' INT\necho 0 > /proc/sys/kernel/ctrl-alt-del\necho up\nwhile :; do sleep 1; done";
    let vm = stock_guest("console=ttyS0 quiet", script)?.console(printed.console()).start()?;
    printed.wait_for("up")?;
    let exit = vm.stop(Duration::from_secs(20))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    Ok(())
}

pub fn guest_has_a_ptp_clock_and_a_vm_generation_id() -> Outcome {
    // Of drivers, those that are bound; the driver itself is only there with the machine's table.
    let (_, clock) = run(guest("cat /sys/class/ptp/ptp0/clock_name\nreboot -f"))?;
    check!(clock.contains("KVM virtual PTP"), "{clock}");
    let script = "ls -d /sys/bus/*/drivers/vmgenid/*:00\npoweroff -f";
    let mut generations = Vec::new();
    for _ in 0..2 {
        let printed = Printed::default();
        let memory = Memory::memfd(Size::mib(256));
        let vm = stock_guest("console=ttyS0 quiet", script)?.memory(memory).console(printed.console()).start()?;
        let mut generation = [0; 16];
        let memory = File::from(vm.memory_fd()?.ok_or("memory without a file")?);
        memory.read_exact_at(&mut generation, VM_GENERATION)?;
        generations.push(generation);
        vm.wait();
        let printed = printed.text();
        check!(printed.contains("drivers/vmgenid/COFD0001:00"), "{printed}");
    }
    check!(generations[0] != generations[1] && !generations.contains(&[0; 16]), "{generations:x?}");
    Ok(())
}

pub fn pvh_entry_point_boots() -> Outcome {
    let script = "cat /proc/sys/kernel/bootloader_type\nnproc\nreboot -f";
    let started = |kernel: Kernel| {
        let kernel = kernel.cmdline("console=hvc0 quiet").initramfs(busybox(script));
        run(Vm::builder(kernel)).map(|(_, printed)| printed.split_whitespace().collect::<Vec<_>>().join(" "))
    };
    // What Linux makes of an entry by PVH (0xb0), and what we say ourselves.
    check_eq!(started(kernel().pvh(true))?, "176 1");
    check_eq!(started(kernel())?, "255 1");
    Ok(())
}

pub fn acpi_off_puts_devices_on_the_command_line() -> Outcome {
    let kernel = fixture::unknown_kernel(&Temp::new()?)?.cmdline("console=hvc0 quiet acpi=off");
    let (exit, printed) = run(Vm::builder(kernel.initramfs(busybox("echo here\nreboot -f"))))?;
    check!(matches!(exit, Exit::Reboot { .. }), "{exit}");
    check_eq!(printed.trim(), "here");
    Ok(())
}
