//! Devices that are taken from and given to machines whose guests run.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam::event::{DeviceId, EventKind};
use cofferdam::internals::{attach_disk, attach_net, detach_disk, detach_net, rebuild};
use cofferdam::net::{Capture, Mac, Policy, PortForward};
use cofferdam::process::Stdio;
use cofferdam::{Container, Disk, ErrorKind, Net, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, alone, debian_container};
use crate::{check, check_eq};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn shell(container: &Container, script: &str) -> Result<String> {
    let output = container.exec(["sh", "-ec", script]).timeout(STEP_TIMEOUT).output()?;
    check!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Longer than any step of these tests takes in the lab. They end in time for the other tests even if a step waits in vain.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);

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

/// Sets up the card, as the shim does at the start, and gives one client on port 80 its line back.
const ECHO: &str = "use Socket; use IO::Socket::INET; $| = 1; socket S, AF_INET, SOCK_DGRAM, 0 or die;
    sub set { my $it = pack 'a16 S n a4 x8', 'eth0', AF_INET, 0, inet_aton $_[1]; ioctl S, $_[0], $it or die qq($_[1]: $!) }
    set 0x8916, '10.0.2.15'; set 0x891c, '255.255.255.0';
    my $up = pack 'a16 s x22', 'eth0', 0x41; ioctl S, 0x8914, $up or die qq(up: $!);
    my $l = IO::Socket::INET->new(LocalPort => 80, Listen => 1, ReuseAddr => 1) or die $@; print qq(ready\n);
    my $c = $l->accept; print $c scalar <$c>";

/// Takes the guest's network card away again and again and gives it another, with another address and another published port.
pub fn network_cards_are_replaced_while_the_guest_runs() -> Outcome {
    // It counts the descriptors of its process.
    if !alone("hotplug::network_cards_are_replaced_while_the_guest_runs")? {
        return Ok(());
    }
    let card = || Net::user(Policy::deny_all()).publish(PortForward::tcp(([127, 0, 0, 1], 0), 80));
    let container = debian_container().net(card()).start()?;
    let vm = container.vm();
    let place = shell(&container, "basename $(readlink -f /sys/class/net/eth0/device/..)")?;
    let open = || std::fs::read_dir("/proc/self/fd").map(Iterator::count);
    let mut old = vm.net(0)?;
    let (before, devices) = (open()?, vm.stats().devices.len());
    for n in 1..=4u8 {
        shell(&container, &format!("{DRIVER}; echo {place} > unbind"))?;
        detach_net(vm, 0)?;
        check_eq!(vm.stats().devices.len(), devices - 1);
        let gone = old.stats().err().ok_or("the card is still there")?;
        check!(gone.to_string().contains("detached"), "{gone}");
        let published = *old.published().first().ok_or("one port was published")?;
        check!(TcpStream::connect(published).is_err(), "{published} is still published");
        shell(
            &container,
            &format!("{DRIVER}; echo {place} > bind 2> /dev/null || true; test ! -e /sys/class/net/eth0"),
        )?;
        if n == 2 {
            rebuild(vm)?;
        }
        let mac = Mac([2, 0, 0, 0, 0, n]);
        let net = attach_net(vm, 0, card().mac(mac))?;
        check_eq!(attach_net(vm, 0, card()).err().map(|error| error.kind()), Some(ErrorKind::AlreadyExists));
        check_eq!(
            shell(&container, &format!("{DRIVER}; echo {place} > bind; cat /sys/class/net/eth0/address"))?,
            mac.to_string()
        );
        let echo = container.exec(["sh", "-c", "exec perl -e \"$0\" 2>&1", ECHO]).stdout(Stdio::piped());
        let mut echo = echo.timeout(STEP_TIMEOUT).spawn()?;
        let mut line = String::new();
        BufReader::new(echo.stdout.as_mut().ok_or("no output")?).read_line(&mut line)?;
        check_eq!(line, "ready\n");
        let mut stream = TcpStream::connect(net.published().first().ok_or("one port was published")?)?;
        stream.set_read_timeout(Some(STEP_TIMEOUT))?;
        writeln!(stream, "card {n}")?;
        let mut answer = String::new();
        if let Err(error) = stream.read_to_string(&mut answer) {
            let seen = shell(&container, "cat /proc/net/tcp /proc/net/arp /proc/net/route /proc/net/dev")?;
            return Err(format!("{error}: {:?} {:?}\n{seen}", vm.stats().devices, net.stats()).into());
        }
        check_eq!(answer, format!("card {n}\n"));
        check!(echo.wait()?.success(), "the server failed");
        check_eq!(vm.stats().devices.len(), devices);
        old = net;
    }
    let open = open()?;
    check!(open <= before + 2, "{open} descriptors are open, and {before} were");
    let captured = attach_net(vm, 1, Net::user(Policy::deny_all()).capture(Capture::writer(std::io::sink()))).map(drop);
    check_eq!(captured.map_err(|error| error.kind()), Err(ErrorKind::Unsupported));
    check_eq!(detach_net(vm, 1).map_err(|error| error.kind()), Err(ErrorKind::NotFound));
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
