//! Many VMs in one process, and that they leak nothing.

use std::error::Error;
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cofferdam::{Exit, Size, Vm};

use crate::fixture::{
    Outcome, Printed, TEST_TIMEOUT, Temp, alone, busybox, bzimage, container, guest, kernel, resident, run, soaking,
    tiny_kernel,
};
use crate::{check, check_eq};

pub fn ten_vms_run_in_one_process() -> Outcome {
    let ends: Vec<_> = std::thread::scope(|scope| {
        let run =
            |n| scope.spawn(move || run(guest(&format!("echo machine {n}\nreboot -f"))).map_err(|e| e.to_string()));
        let threads: Vec<_> = (0..10).map(run).collect();
        threads.into_iter().map(|t| t.join().expect("a thread panicked")).collect()
    });
    for (n, end) in ends.into_iter().enumerate() {
        let (exit, text) = end?;
        check!(matches!(exit, Exit::Reboot { .. }) && text.trim() == format!("machine {n}"), "{text}\n{exit}");
    }
    Ok(())
}

pub fn two_kernels_run_side_by_side() -> Outcome {
    let init = || busybox("echo here\nreboot -f");
    let kernels = [kernel(), bzimage()?].map(|k| k.cmdline("console=hvc0 quiet").initramfs(init()));
    for kernel in kernels {
        check!(run(Vm::builder(kernel))?.1.contains("here"));
    }
    Ok(())
}

/// Descriptors, threads, mappings and bytes in memory of this process.
#[derive(Debug, Clone, Copy)]
struct Held([u64; 4]);

impl Held {
    fn now() -> Result<Self, Box<dyn Error>> {
        let count = |what: &str| fs::read_dir(format!("/proc/self/{what}")).map(|all| all.count() as u64);
        let mappings = fs::read_to_string("/proc/self/maps")?.lines().count() as u64;
        Ok(Self([count("fd")?, count("task")?, mappings, resident()?]))
    }

    /// Waits until no more is held than this, with `room` for what allocator and runtime keep. A thread that was joined is
    /// listed until the kernel has let go of it.
    fn again(self, room: [u64; 4]) -> Outcome {
        let deadline = Instant::now() + TEST_TIMEOUT;
        loop {
            let now = Self::now()?;
            if now.0.iter().zip(self.0).zip(room).all(|((now, before), room)| *now <= before + room) {
                return Ok(());
            }
            check!(Instant::now() < deadline, "{now:?} after {self:?}: descriptors, threads, mappings, bytes");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

const MIB: u64 = 1 << 20;

pub fn sequential_vms_leak_nothing() -> Outcome {
    if !alone("many_vms::sequential_vms_leak_nothing")? {
        return Ok(());
    }
    let temp = Temp::new()?;
    // mov dx, 0x600; mov al, 0x34; out dx, al
    let kernel = tiny_kernel(&temp, &[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4])?;
    let mut first = None;
    for _ in 0..soaking(1000, 60) {
        let vm = Vm::builder(kernel.clone()).start()?;
        let exit = vm.wait_timeout(TEST_TIMEOUT).ok_or("it never ended")?;
        check!(matches!(exit, Exit::PowerOff { .. }), "{exit}");
        drop(vm);
        first.get_or_insert(Held::now()?).again([0, 0, 4, 4 * MIB])?;
    }
    let left = fs::read_to_string("/proc/self/maps")?.lines().filter(|line| line.contains("kvm-vcpu")).count();
    check_eq!(left, 0);
    Ok(())
}

pub fn sequential_containers_leak_nothing() -> Outcome {
    if !alone("many_vms::sequential_containers_leak_nothing")? {
        return Ok(());
    }
    let mut first = None;
    for n in 0..soaking(50, 6) {
        let container = container()?;
        check_eq!(container.exec(["echo", "here"]).output()?.stdout, b"here\n");
        // Half of them end in good order, the others as they are.
        if n % 2 == 0 {
            container.stop(TEST_TIMEOUT)?;
        }
        drop(container);
        first.get_or_insert(Held::now()?).again([0, 0, 16, 8 * MIB])?;
    }
    Ok(())
}

pub fn concurrent_vms_all_run() -> Outcome {
    if !alone("many_vms::concurrent_vms_all_run")? {
        return Ok(());
    }
    let before = Held::now()?;
    let many = soaking(64, 16);
    let printed: Vec<_> = (0..many).map(|_| Printed::default()).collect();
    let start = |(n, printed): (usize, &Printed)| {
        guest(&format!("echo machine {n}\nsleep 100000")).memory(Size::mib(48)).console(printed.console()).start()
    };
    let vms = printed.iter().enumerate().map(start).collect::<Result<Vec<_>, _>>()?;
    // All at once take as long as a busy host makes them; what must not be is that none gets any further.
    let said = || printed.iter().enumerate().filter(|(n, it)| it.text().contains(&format!("machine {n}"))).count();
    let (mut seen, mut since) = (0, Instant::now());
    while seen < printed.len() {
        std::thread::sleep(Duration::from_millis(20));
        let now = said();
        if now > seen {
            (seen, since) = (now, Instant::now());
        }
        check!(since.elapsed() < TEST_TIMEOUT, "{seen} have spoken, and no other");
    }
    let all = resident()?;
    // Guests' pages and all else; as many whole kernels would be more.
    check!(all < before.0[3] + many * 40 * MIB, "{all}");
    vms.iter().try_for_each(Vm::pause)?;
    vms.iter().try_for_each(Vm::resume)?;
    vms.iter().for_each(Vm::kill);
    drop(vms);
    // The C library keeps stacks and heaps of threads that have ended, for those to come.
    before.again([8, 0, 512, 32 * MIB])
}

pub fn vms_start_and_end_from_many_threads() -> Outcome {
    // inc eax; jmp .-2
    let kernel = tiny_kernel(&Temp::new()?, &[0xff, 0xc0, 0xeb, 0xfc])?;
    for _ in 0..10 {
        let pair = [(); 2].map(|()| Mutex::new(None::<Arc<Vm>>));
        let started = std::thread::scope(|scope| {
            let start = |slot| {
                let vm = Vm::builder(kernel.clone()).start().map(Arc::new);
                vm.map(|vm| *Mutex::lock(slot).unwrap_or_else(PoisonError::into_inner) = Some(vm))
            };
            let starting: Vec<_> = pair.iter().map(|slot| scope.spawn(move || start(slot))).collect();
            for n in 0..4 {
                let slots = &pair;
                scope.spawn(move || {
                    for round in 0..40 {
                        let mut slot = slots[(n + round) % 2].lock().unwrap_or_else(PoisonError::into_inner);
                        // One of all calls drops the handle that the others took theirs from.
                        let vm = if round == 30 + n { slot.take() } else { slot.clone() };
                        drop(slot);
                        // Any may have ended by then, which is an error of its kind.
                        let _ = vm.map(|vm| match (n + round) % 4 {
                            0 => vm.pause(),
                            1 => vm.resume(),
                            2 => vm.memory_stats().map(drop),
                            _ if round > 20 => {
                                vm.kill();
                                Ok(())
                            }
                            _ => Ok(()),
                        });
                    }
                });
            }
            starting.into_iter().map(|it| it.join().expect("a thread panicked")).collect::<Result<Vec<_>, _>>()
        });
        started?;
        for vm in pair.iter().filter_map(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take()) {
            vm.kill();
            check!(matches!(vm.wait(), Exit::Killed { .. }));
        }
    }
    Ok(())
}
