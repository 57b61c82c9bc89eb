//! Many machines in one process, and nothing left of them.

use std::fs;
use std::time::{Duration, Instant};

use cofferdam::{Exit, Vm};

use crate::fixture::{Outcome, PATIENCE, Temp, alone, busybox, bzimage, guest, kernel, run, tiny_kernel};
use crate::{check, check_eq};

pub fn ten_machines_in_one_process() -> Outcome {
    let ends: Vec<_> = std::thread::scope(|scope| {
        let run =
            |n| scope.spawn(move || run(guest(&format!("echo machine {n}\nreboot -f"))).map_err(|e| e.to_string()));
        let threads: Vec<_> = (0..10).map(run).collect();
        threads.into_iter().map(|t| t.join().expect("a thread panicked")).collect()
    });
    for (n, end) in ends.into_iter().enumerate() {
        let (exit, text) = end?;
        check!(matches!(exit, Exit::Reboot(_)) && text.trim() == format!("machine {n}"), "{text}\n{exit}");
    }
    Ok(())
}

pub fn two_kernels_side_by_side() -> Outcome {
    let init = || busybox("echo here\nreboot -f");
    let kernels = [kernel(), bzimage()?].map(|k| k.cmdline("console=hvc0 quiet").initramfs(init()));
    for kernel in kernels {
        check!(run(Vm::builder(kernel))?.1.contains("here"));
    }
    Ok(())
}

pub fn starting_and_ending_leaves_nothing_behind() -> Outcome {
    if !alone("many::starting_and_ending_leaves_nothing_behind")? {
        return Ok(());
    }
    let temp = Temp::new()?;
    // mov dx, 0x600; mov al, 0x34; out dx, al
    let kernel = tiny_kernel(&temp, &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4])?;
    let count = |what: &str| fs::read_dir(format!("/proc/self/{what}")).map(Iterator::count);
    let mut first = None;
    for _ in 0..300 {
        let vm = Vm::builder(kernel.clone()).vcpus(2).start()?;
        let exit = vm.wait_timeout(PATIENCE)?.ok_or("it never ended")?;
        check!(matches!(exit, Exit::PowerOff), "{exit}");
        drop(vm);
        let look = || -> std::io::Result<_> {
            Ok((count("fd")?, count("task")?, fs::read_to_string("/proc/self/maps")?.lines().count()))
        };
        // A thread that was joined is listed until the kernel has let go of it.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (now, first) = (look()?, *first.get_or_insert(look()?));
            if now.0 <= first.0 && now.1 <= first.1 && now.2 <= first.2 + 4 {
                break;
            }
            check!(Instant::now() < deadline, "{now:?} after {first:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let left = fs::read_to_string("/proc/self/maps")?.lines().filter(|line| line.contains("kvm-vcpu")).count();
    check_eq!(left, 0);
    Ok(())
}
