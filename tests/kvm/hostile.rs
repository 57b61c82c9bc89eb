//! Guests that mean harm, beside a neighbour that must not notice.

use std::io::Read;
use std::time::{Duration, Instant};

use cofferdam::disk::WritableLayer;
use cofferdam::event::{DeviceId, EventKind};
use cofferdam::process::{ExitStatus, Stdio};
use cofferdam::vsock::Vsock;
use cofferdam::{Container, Disk, Exit, Size, Vm};

use crate::fixture::{
    MAP_DEVICES, Outcome, RINGS, TEST_TIMEOUT, Temp, alone, container, debian_container, driver, guest, resident, run,
    soaking, tiny_kernel,
};
use crate::{check, check_eq};

/// The neighbour still runs programs, and soon.
fn assert_responsive(neighbour: &Container) -> Outcome {
    let begin = Instant::now();
    let output = neighbour.exec(["echo", "well"]).output()?;
    check_eq!(output.stdout, b"well\n");
    check!(begin.elapsed() < TEST_TIMEOUT / 4, "{:?}", begin.elapsed());
    Ok(())
}

pub fn random_register_writes_are_survived() -> Outcome {
    // Reads and writes all device windows at random places, with random values, at every width.
    let code: &[u8] = &[
        0xbb, 1, 2, 3, 4, // mov ebx, seed
        0x69, 0xdb, 0x0d, 0x66, 0x19, 0, // again: imul ebx, ebx, 1664525
        0x81, 0xc3, 0x5f, 0xf3, 0x6e, 0x3c, // add ebx, 1013904223
        0x89, 0xd8, 0xc1, 0xe8, 0x0c, // mov eax, ebx; shr eax, 12
        0x25, 0xff, 0x7f, 0, 0, // and eax, 0x7fff
        0x85, 0xdb, 0x78, 0x0d, // test ebx, ebx; js words
        0x88, 0x1c, 0x07, 0x66, 0x89, 0x1c, 0x07, // mov [rdi+rax], bl; mov [rdi+rax], bx
        0x48, 0x89, 0x1c, 0x07, // mov [rdi+rax], rbx
        0xeb, 0xd9, // jmp again
        0x25, 0xfc, 0x7f, 0, 0, // words: and eax, 0x7ffc
        0x89, 0x1c, 0x07, 0x8b, 0x0c, 0x07, // mov [rdi+rax], ebx; mov ecx, [rdi+rax]
        0xeb, 0xcc, // jmp again
    ];
    let code = [MAP_DEVICES, code].concat();
    let (temp, neighbour) = (Temp::new()?, container()?);
    let vm = Vm::builder(tiny_kernel(&temp, &code)?).memory(Size::mib(4)).vsock(Vsock::new()).start()?;
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        assert_responsive(&neighbour)?;
    }
    check!(vm.try_wait().is_none(), "{}", vm.report());
    let exits = vm.stats().vcpus.iter().map(|vcpu| vcpu.mmio_exits).sum::<u64>();
    check!(exits > 1000, "{exits}");
    vm.kill();
    check!(matches!(vm.wait(), Exit::Killed { .. }));
    Ok(())
}

/// `mov dword [address], value`
fn store(address: u32, value: u32) -> Vec<u8> {
    [[0xc7, 0x04, 0x25].as_slice(), &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Offers one more buffer, kicks the queue, waits until the buffer comes back, acknowledges the interrupt, and so on for ever:
/// inc word [available.index]; mov dword [rdi+0x50], queue; mov ax, [used.index]; cmp ax, [available.index]; jne .-16;
/// mov dword [rdi+0x64], 1; jmp .-40
fn storm(queue: u8) -> Vec<u8> {
    let [available, used] = [RINGS[1], RINGS[2]].map(|ring| (ring + 2).to_le_bytes());
    let kick = [0xc7, 0x47, 0x50, queue, 0, 0, 0];
    let parts = [&[0x66, 0xff, 0x04, 0x25], available.as_slice(), &kick, &[0x66, 0x8b, 0x04, 0x25], &used];
    let acknowledge = [0xc7, 0x47, 0x64, 1, 0, 0, 0];
    let compare = [0x66, 0x3b, 0x04, 0x25];
    [parts.concat().as_slice(), &compare, &available, &[0x75, 0xee], &acknowledge, &[0xeb, 0xd6]].concat()
}

pub fn queue_addresses_outside_memory_need_a_reset() -> Outcome {
    let neighbour = container()?;
    // Beyond memory, at its very end, wrapping around; then where the other rings are, which is no fault by itself.
    let nowhere = [0x1_0000_0000, 0x3f_fff0, u64::MAX - 15].map(|address| (address, true));
    let overlapping = [RINGS[1], RINGS[2]].map(|address| (address.into(), false));
    for (descriptors, refused) in nowhere.into_iter().chain(overlapping) {
        let vm = Vm::builder(tiny_kernel(&Temp::new()?, &[driver(1, 0, descriptors, 8), storm(0)].concat())?);
        let vm = vm.memory(Size::mib(4)).start()?;
        let events = vm.events()?;
        let error = |kind: &EventKind| matches!(kind, EventKind::DeviceError { device: DeviceId::Rng, .. });
        if refused {
            let found = std::iter::from_fn(|| events.next_timeout(TEST_TIMEOUT)).find(|event| error(&event.kind));
            check!(found.is_some(), "{descriptors:#x}: {}", vm.report());
        }
        assert_responsive(&neighbour)?;
        check!(vm.stats().vcpus[0].mmio_exits > 0 && vm.try_wait().is_none(), "{descriptors:#x}: {}", vm.report());
        vm.kill();
        check!(matches!(vm.wait(), Exit::Killed { .. }));
    }
    Ok(())
}

pub fn looped_descriptor_chain_needs_a_reset() -> Outcome {
    let neighbour = container()?;
    // A descriptor for sixteen bytes whose next is itself; then the ring says that it is offered.
    let table = [(0, 0x30_0000), (4, 0), (8, 16), (12, 1)].map(|(at, value)| store(RINGS[0] + at, value)).concat();
    let code = [table, driver(1, 0, RINGS[0].into(), 8), storm(0)].concat();
    let vm = Vm::builder(tiny_kernel(&Temp::new()?, &code)?).memory(Size::mib(4)).start()?;
    let events = vm.events()?;
    let broken = |kind: &EventKind| matches!(kind, EventKind::DeviceError { device: DeviceId::Rng, .. });
    let found = std::iter::from_fn(|| events.next_timeout(TEST_TIMEOUT)).find(|event| broken(&event.kind));
    check!(found.is_some(), "{}", vm.report());
    assert_responsive(&neighbour)
}

pub fn endless_kicks_do_not_starve_neighbors() -> Outcome {
    let neighbour = container()?;
    // The same buffer for sixteen bytes, again and again.
    let table = [(0, 0x30_0000), (8, 16), (12, 2)].map(|(at, value)| store(RINGS[0] + at, value)).concat();
    let code = [table, driver(1, 0, RINGS[0].into(), 8), storm(0)].concat();
    let vm = Vm::builder(tiny_kernel(&Temp::new()?, &code)?).memory(Size::mib(4)).start()?;
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        assert_responsive(&neighbour)?;
    }
    let rng = vm.stats().devices.into_iter().find(|d| d.device == DeviceId::Rng).ok_or("no rng")?;
    check!(rng.interrupts > 100 && rng.requests > 100, "{rng:?}");
    vm.kill();
    check!(matches!(vm.wait(), Exit::Killed { .. }));
    assert_responsive(&neighbour)
}

pub fn busy_vcpus_do_not_starve_neighbors() -> Outcome {
    let neighbour = container()?;
    let miners = std::thread::available_parallelism()?.get() as u32 + 1;
    let vm = Vm::builder(tiny_kernel(&Temp::new()?, &[0xeb, 0xfe])?).vcpus(miners).start()?;
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        assert_responsive(&neighbour)?;
    }
    check!(vm.stats().vcpus.iter().all(|vcpu| !vcpu.cpu_time.is_zero()), "{:?}", vm.stats());
    Ok(())
}

pub fn repeated_panics_do_not_affect_neighbors() -> Outcome {
    let neighbour = container()?;
    for _ in 0..5 {
        let (exit, _) = run(guest("echo c > /proc/sysrq-trigger; sleep 1000"))?;
        check!(matches!(exit, Exit::Panic { .. }), "{exit}");
        assert_responsive(&neighbour)?;
    }
    Ok(())
}

pub fn exhausted_memory_and_disk_stay_in_the_guest() -> Outcome {
    let neighbour = container()?;
    let greedy = debian_container()
        .writable_layer(WritableLayer::new(Size::mib(64)).scratch_dir(std::env::temp_dir()))
        .memory(Size::mib(128))
        .start()?;
    for _ in 0..2 {
        let hog = greedy.exec(["tail", "/dev/zero"]).status()?;
        check!(matches!(hog, ExitStatus::OomKilled), "{hog:?}");
        let filler = greedy.exec(["dd", "if=/dev/zero", "of=/root/x", "bs=1M"]).output()?;
        check!(String::from_utf8_lossy(&filler.stderr).contains("No space left on device"), "{filler:?}");
        assert_responsive(&neighbour)?;
        check!(greedy.exec(["rm", "/root/x"]).status()?.success());
    }
    assert_responsive(&greedy)
}

pub fn disk_reset_with_requests_in_flight_is_survived() -> Outcome {
    let neighbour = container()?;
    let script = "cd /sys/bus/virtio/drivers/virtio_blk; disk=$(basename $(readlink -f /sys/block/vda/device))\n\
        for i in 1 2 3 4 5 6 7 8 9 10; do\n\
        dd if=/dev/zero of=/dev/vda bs=256k count=64 conv=fsync 2>/dev/null & echo $disk > unbind; echo $disk > bind; wait\n\
        done; dd if=/dev/vda of=/dev/null bs=1M count=1 2>/dev/null && echo whole; reboot -f";
    let (exit, text) = run(guest(script).disk(Disk::scratch(Size::mib(64))))?;
    check!(matches!(exit, Exit::Reboot { .. }) && text.contains("whole"), "{exit}");
    assert_responsive(&neighbour)
}

pub fn overwritten_boot_structures_end_the_guest_only() -> Outcome {
    // mov edi, 0x500; mov ecx, 0xffa80; mov al, 0xcc; rep stosb; mov rax, cr3; mov cr3, rax; jmp .: descriptor and page tables,
    // the zero page and MP tables are gone, and the processor forgets what it remembers of them.
    let wipe = [0xbf, 0, 5, 0, 0, 0xb9, 0x80, 0xfa, 0x0f, 0, 0xb0, 0xcc, 0xf3, 0xaa];
    let code = [&wipe[..], &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8, 0xeb, 0xfe]].concat();
    let (temp, neighbour) = (Temp::new()?, container()?);
    let vm = Vm::builder(tiny_kernel(&temp, &code)?).memory(Size::mib(4)).start()?;
    // Without its page tables the guest cannot go on.
    let exit = vm.wait_timeout(TEST_TIMEOUT);
    check!(matches!(exit, Some(Exit::TripleFault { .. } | Exit::VcpuFault { .. })), "{exit:?}");
    assert_responsive(&neighbour)
}

pub fn console_flood_is_bounded() -> Outcome {
    const FLOOD: u64 = 4 << 20;
    if !alone("hostile::console_flood_is_bounded")? {
        return Ok(());
    }
    let script = format!("head -c {FLOOD} /dev/zero | tr '\\0' x > /dev/hvc0; echo; echo done; reboot -f");
    let (neighbour, vm) = (container()?, guest(&script).start()?);
    let (mut most, least) = (0, resident()?);
    let deadline = Instant::now() + TEST_TIMEOUT * 2;
    while vm.try_wait().is_none() {
        assert_responsive(&neighbour)?;
        most = most.max(resident()?);
        check!(Instant::now() < deadline, "{}", vm.report());
    }
    check!(vm.report().console_lines(1).contains("done"), "{}", vm.report());
    check!(vm.report().console.len() <= 64 << 10);
    // The guests' own memory, and not the flood.
    check!(most < least + (96 << 20), "{least} {most}");
    Ok(())
}

pub fn large_console_output_uses_bounded_memory() -> Outcome {
    let flood = soaking(4096, 256) << 20;
    if !alone("hostile::large_console_output_uses_bounded_memory")? {
        return Ok(());
    }
    // A driver that prints the same MiB again and again, on the second queue, which is for what the guest says.
    let table = [(0, 0x30_0000), (8, 1 << 20), (12, 0)].map(|(at, value)| store(RINGS[0] + at, value)).concat();
    let code = [table, driver(0, 1, RINGS[0].into(), 8), storm(1)].concat();
    let neighbour = container()?;
    let before = resident()?;
    let vm = Vm::builder(tiny_kernel(&Temp::new()?, &code)?).memory(Size::mib(8)).start()?;
    let (mut most, deadline) = (0, Instant::now() + TEST_TIMEOUT * 4);
    while vm.stats().devices.iter().all(|device| device.bytes_from_guest < flood) {
        assert_responsive(&neighbour)?;
        most = most.max(resident()?);
        check!(Instant::now() < deadline && vm.try_wait().is_none(), "{:?} {}", vm.stats(), vm.report());
    }
    vm.kill();
    check!(vm.wait().report().console.len() <= 64 << 10);
    check!(most < before + (64 << 20), "{before} {most}");
    Ok(())
}

pub fn fork_bomb_stays_in_the_guest() -> Outcome {
    let (neighbour, bombed) = (container()?, container()?);
    let mut bomb = bombed.exec(["sh", "-c", "f() { f & f & wait; }; f"]).spawn()?;
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        assert_responsive(&neighbour)?;
    }
    // Whatever became of the bomb, the machine ends in the time that was given.
    let begin = Instant::now();
    bombed.stop(Duration::from_secs(1))?;
    check!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    check!(bomb.wait().is_ok());
    assert_responsive(&neighbour)
}

pub fn connection_storm_is_bounded() -> Outcome {
    let storm = soaking(100_000, 4_000);
    const WAVE: u32 = 500;
    if !alone("hostile::connection_storm_is_bounded")? {
        return Ok(());
    }
    let (neighbour, stormy) = (container()?, container()?);
    let listener = stormy.vm().listen_vsock(77)?;
    assert_responsive(&neighbour)?;
    assert_responsive(&stormy)?;
    let descriptors = || std::fs::read_dir("/proc/self/fd").map(Iterator::count);
    let (before, memory) = (descriptors()?, resident()?);
    // Family 40, port 77, CID 2, none waits for an answer; of each wave that has broken, every second one sends a byte.
    let script = format!(
        "use Socket; $SIG{{PIPE}} = 'IGNORE'; $to = pack('SSLLx4', 40, 0, 77, 2); $sent = 0; \
         for (1..{storm} / {WAVE}) {{ my (@all, $open); \
         for (1..{WAVE}) {{ socket(my $s, 40, SOCK_STREAM | 2048, 0) or die $!; connect($s, $to); push @all, $s; vec($open, fileno $s, 1) = 1; }} \
         my $end = time + 10; \
         while ($open =~ /[^\\0]/ && time < $end) {{ select(undef, my $ready = $open, undef, 1) > 0 and $open &= ~$ready; }} \
         for (@all) {{ $n++ % 2 and syswrite($_, 'x') and $sent++; }} }} \
         print $sent"
    );
    let storm = stormy.exec(["perl", "-e", &script]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (mut taken, mut most, mut looked) = (0u32, 0, Instant::now());
    while storm.try_wait()?.is_none() {
        // Those that are taken are read to their end; the others wait, and are refused when they are too many.
        if let Some(mut stream) = listener.accept_timeout(Duration::from_millis(1))? {
            taken += 1;
            let mut sent = Vec::new();
            let _ = stream.set_nonblocking(true).map(|()| stream.read_to_end(&mut sent));
        }
        if looked.elapsed() > Duration::from_secs(2) {
            assert_responsive(&neighbour)?;
            (most, looked) = (most.max(resident()?), Instant::now());
        }
    }
    let output = storm.wait_with_output()?;
    let sent = String::from_utf8(output.stdout)?;
    check!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check!(taken > 0, "{sent} sent, {taken} taken");
    check!(most < memory + (192 << 20), "{memory} {most}");
    drop(listener);
    assert_responsive(&neighbour)?;
    check!(stormy.exec(["true"]).status()?.success());
    let deadline = Instant::now() + TEST_TIMEOUT / 4;
    while descriptors()? > before {
        check!(Instant::now() < deadline, "{} of {before} descriptors; {sent} sent, {taken} taken", descriptors()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
