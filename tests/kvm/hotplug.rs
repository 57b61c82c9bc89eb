//! Devices that are taken from and given to machines whose guests run.

use std::thread;
use std::time::{Duration, Instant};

use cofferdam::event::{DeviceId, EventKind};
use cofferdam::internals::{attach_disk, detach_disk, rebuild};
use cofferdam::{Container, Disk, ErrorKind, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, alone, debian_container};
use crate::{check, check_eq};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn shell(container: &Container, script: &str) -> Result<String> {
    let output = container.exec(["sh", "-ec", script]).timeout(TEST_TIMEOUT).output()?;
    check!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// The driver's directory, and the name of the platform device of the `n`th disk there.
const DRIVER: &str = "cd /sys/bus/platform/drivers/virtio-mmio";

/// Takes the guest's first disk away again and again and gives it another, whose driver finds it at the same place.
pub fn disks_are_replaced_while_the_guest_runs() -> Outcome {
    // It counts the descriptors of its process.
    if !alone("hotplug::disks_are_replaced_while_the_guest_runs")? {
        return Ok(());
    }
    let container = debian_container().disk(Disk::scratch(Size::mib(1)).serial("first")).start()?;
    let (vm, events) = (container.vm(), container.events()?);
    let place = shell(&container, "basename $(dirname $(readlink -f /sys/block/vda/device))")?;
    check_eq!(shell(&container, "cat /sys/block/vda/serial")?, "first");
    let open = || std::fs::read_dir("/proc/self/fd").map(Iterator::count);
    let mut old = vm.disk(0)?;
    let (before, devices) = (open()?, vm.stats().devices.len());
    for n in 1..=20u64 {
        shell(&container, &format!("{DRIVER}; echo {place} > unbind"))?;
        detach_disk(vm, 0)?;
        check_eq!(vm.stats().devices.len(), devices - 1);
        let gone = old.usage().err().ok_or("the disk is still there")?;
        check!(gone.to_string().contains("detached"), "{gone}");
        // Nothing answers at its place, and nothing breaks.
        shell(&container, &format!("{DRIVER}; echo {place} > bind 2> /dev/null || true; test ! -e /sys/block/vda"))?;
        if n == 10 {
            rebuild(vm)?;
        }
        let serial = format!("disk-{n}");
        let disk = attach_disk(vm, 0, Disk::scratch(Size::mib(n)).serial(&serial))?;
        check_eq!(disk.usage()?.capacity, Size::mib(n));
        let script = format!(
            "{DRIVER}; echo {place} > bind; cat /sys/block/vda/serial; echo; head -c 65536 /dev/urandom > /run/data;
             dd if=/run/data of=/dev/vda bs=4k oflag=direct status=none; dd if=/dev/vda bs=64k count=1 iflag=direct status=none \
             | cmp - /run/data; blockdev --getsize64 /dev/vda"
        );
        check_eq!(shell(&container, &script)?, format!("{serial}\n{}", n << 20));
        check_eq!(vm.stats().devices.len(), devices);
        old = disk;
    }
    let open = open()?;
    check!(open <= before + 2, "{open} descriptors are open, and {before} were");
    let faults =
        std::iter::from_fn(|| events.try_next()).filter(|event| matches!(event.kind, EventKind::DeviceError { .. }));
    check_eq!(faults.count(), 0);
    Ok(())
}

/// Takes a disk away while its driver uses it: requests are lost, and all else goes on.
pub fn a_disk_in_use_can_be_detached() -> Outcome {
    let container = debian_container().disk(Disk::scratch(Size::mib(64)).serial("used")).start()?;
    let vm = container.vm();
    let writing = "while :; do dd if=/dev/zero of=/dev/vda bs=1M count=60 oflag=direct status=none || exit 7; done";
    let writer = container.exec(["sh", "-c", writing]).spawn()?;
    let deadline = Instant::now() + TEST_TIMEOUT;
    while !vm.stats().devices.iter().any(|it| it.device == DeviceId::Disk(0) && it.bytes_from_guest > 1 << 20) {
        check!(Instant::now() < deadline, "nothing was written: {:?}", vm.stats().devices);
        thread::sleep(Duration::from_millis(10));
    }
    detach_disk(vm, 0)?;
    let error = detach_disk(vm, 0).err().ok_or("it was detached twice")?;
    check_eq!(error.kind(), ErrorKind::NotFound);
    check!(vm.try_wait().is_none(), "{:?}", vm.try_wait());
    check_eq!(shell(&container, "echo alive")?, "alive");
    check!(writer.try_wait()?.is_none(), "what was asked for is lost");
    Ok(())
}
