//! Kernels as distributions ship them, unmodified, with the modules that they need.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use cofferdam::kernel::Modules;
use cofferdam::{Disk, ErrorKind, Exit, Size, Vm};

use crate::fixture::{
    Outcome, Printed, TEST_TIMEOUT, Temp, busybox, debian_container, distribution, distribution_alone,
    distribution_modules, kernel, run, system, system_disk,
};
use crate::{check, check_eq};

/// A container on such a kernel, in which everything that a machine has does its work.
fn contains(which: &str) -> Outcome {
    let (kernel, release) = distribution(which)?;
    let container = debian_container().kernel(kernel).start()?;
    let script = "uname -r; cat /sys/class/misc/hw_random/rng_current; ls /sys/bus/virtio/drivers; echo x > /tmp/x && cat /tmp/x\n\
        head -c 8 /dev/hwrng | wc -c; echo spoken > /dev/hvc0";
    let out = String::from_utf8(container.exec(["sh", "-c", script]).output()?.stdout)?;
    check!(out.starts_with(&format!("{release}\nvirtio_rng.0\n")) && out.ends_with("\nx\n8\n"), "{out}");
    for driver in ["virtio_balloon", "virtio_blk", "virtio_console", "virtio_rng", "vmw_vsock_virtio_transport"] {
        check!(out.contains(driver), "{driver}: {out}");
    }
    check!(container.vm().report().console_lines(5).contains("spoken"));
    // Asked through the balloon, with a second for the answer.
    check!((0..10).any(|_| container.vm().memory_stats().is_ok_and(|memory| memory.guest.is_some())));
    container.stop(TEST_TIMEOUT)?;
    Ok(())
}

pub fn debian_6_1_cloud_kernel_runs_a_container() -> Outcome {
    contains("cloud")
}

pub fn debian_6_12_cloud_kernel_runs_a_container() -> Outcome {
    contains("cloud-6.12")
}

pub fn debian_6_1_generic_kernel_runs_a_container() -> Outcome {
    contains("generic")
}

pub fn modules_are_loaded_in_dependency_order() -> Outcome {
    let script = "for module in /cofferdam.modules/*; do insmod $module || echo $module; done\ncat /sys/block/vda/size\n\
        ls /cofferdam.modules | sed s/....//\npoweroff -f";
    let (kernel, _) = distribution("cloud-6.12")?;
    let kernel = kernel.cmdline("console=ttyS0 quiet").initramfs(busybox(script));
    let (exit, printed) = run(Vm::builder(kernel).disk(Disk::scratch(Size::mib(1))))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    let expected = [
        "2048",
        "virtio_mmio.ko",
        "virtio_blk.ko",
        "virtio_rng.ko",
        "virtio_balloon.ko",
        "pvpanic.ko",
        "pvpanic_mmio.ko",
    ];
    check_eq!(printed.split_whitespace().collect::<Vec<_>>(), expected);
    Ok(())
}

pub fn panic_is_reported_with_panic_0() -> Outcome {
    let (kernel, _) = distribution("cloud-6.12")?;
    // Without a reset afterwards there is only the panic port.
    let container = debian_container().kernel(kernel.cmdline("panic=0")).start()?;
    let _crash = container.exec(["sh", "-c", "echo c > /proc/sysrq-trigger"]).spawn()?;
    let exit = container.vm().wait_timeout(TEST_TIMEOUT).ok_or("it hangs")?;
    check!(matches!(exit, Exit::Panic { .. }), "{exit}");
    Ok(())
}

pub fn failing_module_is_named() -> Outcome {
    let temp = Temp::new()?;
    let built_in = ["virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport", "erofs", "ext4", "overlay"];
    std::fs::write(temp.path("modules.builtin"), built_in.map(|name| format!("kernel/{name}.ko\n")).concat())?;
    std::fs::write(temp.path("modules.dep"), "broken.ko:\n")?;
    std::fs::write(temp.path("broken.ko"), b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\x3e\0")?;
    let modules = Modules::open(temp.path(""))?.with("broken");
    let error = debian_container().kernel(kernel().modules(modules)).start().map(drop).expect_err("it is broken");
    check_eq!(error.kind(), ErrorKind::GuestFailed);
    check!(error.to_string().contains("Modules: inserting /cofferdam.modules/000-broken.ko: "), "{error}");
    check!(error.to_string().contains("(os error "), "{error}");
    Ok(())
}

pub fn missing_modules_are_named() -> Outcome {
    let error = debian_container().kernel(distribution_alone("generic")?).start().map(drop).expect_err("no drivers");
    check_eq!(error.kind(), ErrorKind::Unsupported);
    check!(error.to_string().contains("has virtio_mmio as a module only"), "{error}");
    Ok(())
}

pub fn modules_of_another_kernel_are_rejected() -> Outcome {
    let (other, _) = distribution("cloud")?;
    let (_, release) = distribution("generic")?;
    let kernel = other.modules(distribution_modules("generic")?);
    let error = debian_container().kernel(kernel).start().map(drop).expect_err("modules of another kernel");
    check_eq!(error.kind(), ErrorKind::Incompatible);
    check!(error.to_string().ends_with(&format!("these modules are for {release}")), "{error}");
    Ok(())
}

pub fn full_debian_system_boots_to_login_and_powers_off() -> Outcome {
    let printed = Printed::default();
    let vm = system(printed.console())?;
    // Emulated, it takes a minute, on slow machines several. All limits together are below that of a test: a guest of a test that was left
    // behind keeps the disk and a processor.
    printed.wait_within(Duration::from_secs(240), "debian login:").map_err(|e| format!("{e}\n{}", vm.report()))?;
    // The prompt comes before the rest of the boot; logind, which handles the power key, starts later.
    at_rest(&vm, Duration::from_secs(90))?;
    let exit = vm.stop(Duration::from_secs(90))?;
    check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
    check!(is_clean(&system_disk())?, "its file system was not unmounted");
    Ok(())
}

/// Waits until the guest takes less than a tenth of a processor for two seconds.
fn at_rest(vm: &Vm, limit: Duration) -> Outcome {
    let used = || vm.stats().vcpus.iter().map(|vcpu| vcpu.cpu_time).sum::<Duration>();
    let deadline = Instant::now() + limit;
    loop {
        let before = used();
        std::thread::sleep(Duration::from_secs(2));
        if used() - before < Duration::from_millis(200) {
            return Ok(());
        }
        check!(Instant::now() < deadline, "{}", vm.report());
    }
}

/// Whether an ext4 file system was unmounted: nothing in its journal is to be done (Linux, ext4 documentation, super block:
/// `s_feature_incompat`, INCOMPAT_RECOVER), and nothing is known to be wrong (`s_state`).
fn is_clean(disk: &std::path::Path) -> std::io::Result<bool> {
    let (mut state, mut features, disk) = ([0; 2], [0; 4], std::fs::File::open(disk)?);
    disk.read_exact_at(&mut state, 1024 + 0x3a)?;
    disk.read_exact_at(&mut features, 1024 + 0x60)?;
    Ok(u16::from_le_bytes(state) == 1 && u32::from_le_bytes(features) & 4 == 0)
}
