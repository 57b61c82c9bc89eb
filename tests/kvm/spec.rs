//! A VM from its description as text: what is kept of it, and sent to other processes.

use cofferdam::disk::DiskLimit;
use cofferdam::internals::{VmSpec, join, split};
use cofferdam::net::{Policy, Rule};
use cofferdam::{Cgroup, Disk, Net, Rate, Size};

use crate::fixture::{Outcome, Temp, guest, run};
use crate::{check, check_eq};

/// Looks at everything that the description says, and writes to the disk.
const SCRIPT: &str = "echo cpus $(nproc); echo sectors $(cat /sys/block/vda/size)
    cat /sys/block/vda/serial; echo; printf 'from the guest' | dd of=/dev/vda conv=fsync 2>/dev/null
    cat /sys/class/net/eth0/address; ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
    ping -c 1 -W 20 10.0.2.2 >/dev/null && echo gateway answers
    reboot -f";

pub fn vm_from_text_has_disk_network_and_console() -> Outcome {
    let temp = Temp::new()?;
    let image = temp.path("disk.img");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let open = std::fs::File::options().read(true).write(true).open(&image)?;
    let limit = DiskLimit::none().write_bytes(Rate::per_second(64 << 20));
    let net = Net::user(Policy::deny_all().rule(Rule::allow_public())).mac([2, 0, 0, 0, 0, 7]).mtu(1400);
    let builder = guest(SCRIPT)
        .vcpus(2)
        .disk(Disk::from_file(open).serial("kept").limit(limit))
        .disk(Disk::scratch(Size::mib(1)).scratch_dir(temp.path(".")))
        .net(net)
        .cgroup(Cgroup::new().optional(true));
    // `run` sets the console, whose writer goes this way too: `start` takes each description apart.
    let (spec, live) = split(builder)?;
    let text = serde_json::to_string(&spec)?;
    check!(text.len() < 8 << 10, "{} bytes: {text}", text.len());
    let loaded: VmSpec = serde_json::from_str(&text)?;
    check_eq!(loaded, spec);
    let (exit, printed) = run(join(loaded, live)?)?;
    for expected in ["cpus 2", "sectors 2048", "kept", "02:00:00:00:00:07", "gateway answers"] {
        check!(printed.contains(expected), "{expected} is not in {printed}, {exit:?}");
    }
    check!(std::fs::read(&image)?.starts_with(b"from the guest"));
    Ok(())
}
