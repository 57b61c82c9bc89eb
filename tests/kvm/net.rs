//! Network cards: on taps of the host, and on sockets of whoever wants a guest's frames.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use cofferdam::{Cidr, ErrorKind, EventKind, Net, Policy, Port, Rule, VmBuilder};

use crate::fixture::{Outcome, PATIENCE, Printed, debian_container, guest, host, run};
use crate::{check, check_eq};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A tap of the host, with an address of a network that nobody else has.
struct Tap(String);

impl Tap {
    fn new(name: &str, how: &str) -> Result<Self> {
        host(&format!("ip tuntap add dev {name} mode tap vnet_hdr{how}"))?;
        let tap = Self(name.into());
        host(&format!("ip link set {name} up"))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = host(&format!("ip link del {}", self.0));
    }
}

pub fn a_guest_and_its_host_talk_over_a_tap() -> Outcome {
    let tap = Tap::new("cd-talk", "")?;
    host("ip addr add 192.0.2.1/28 dev cd-talk")?;
    let script = "ifconfig eth0 192.0.2.2 netmask 255.255.255.240 up; cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu
        ping -c 3 -W 30 192.0.2.1 | grep received; ping -c 2 -W 30 -s 20000 192.0.2.1 | grep received
        head -c 5000000 /dev/urandom > /data; nc 192.0.2.1 7777 < /data; md5sum < /data; nc 192.0.2.1 7778 | md5sum\nreboot -f";
    let (upload, download) =
        (std::net::TcpListener::bind("192.0.2.1:7777")?, std::net::TcpListener::bind("192.0.2.1:7778")?);
    let sent: Vec<u8> = (0..5_000_000u32).map(|n| (n ^ n >> 7) as u8).collect();
    let expected = sent.clone();
    let received = std::thread::spawn(move || {
        let mut came = Vec::new();
        upload.accept()?.0.read_to_end(&mut came)?;
        download.accept()?.0.write_all(&sent)?;
        Ok::<_, std::io::Error>(came)
    });
    let card = Net::tap("cd-talk").mac([2, 0, 0, 0, 0, 7]).mtu(1400);
    let (exit, printed) = run(guest(script).net(card))?;
    check!(printed.contains("02:00:00:00:00:07") && printed.contains("1400"), "{exit} {printed}");
    check!(printed.contains("3 packets received") && printed.contains("2 packets received"), "{printed}");
    let came = received.join().map_err(|_| "the host's part has failed")??;
    check_eq!(came.len(), 5_000_000);
    let digests = [&came, &expected].map(|bytes| md5(bytes));
    for digest in digests {
        let digest = digest?;
        check!(printed.contains(&digest), "{digest} {printed}");
    }
    drop(tap);
    Ok(())
}

fn md5(bytes: &[u8]) -> Result<String> {
    let mut child =
        Command::new("md5sum").stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn()?;
    child.stdin.take().ok_or("no input")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    Ok(String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap_or_default().to_owned())
}

pub fn several_queues_are_used() -> Outcome {
    let _tap = Tap::new("cd-queues", " multi_queue")?;
    host("ip addr add 192.0.2.17/28 dev cd-queues")?;
    let script = "ifconfig eth0 192.0.2.18 netmask 255.255.255.240 up; ls -d /sys/class/net/eth0/queues/tx-* | wc -l
        ping -c 3 -W 30 192.0.2.17 | grep received\nreboot -f";
    let (exit, printed) = run(guest(script).vcpus(2).net(Net::tap("cd-queues").queues(2)))?;
    check!(printed.starts_with('2') && printed.contains("3 packets received"), "{exit} {printed}");
    Ok(())
}

pub fn a_tap_that_is_busy_or_missing_or_made_otherwise_is_named() -> Outcome {
    let _tap = Tap::new("cd-busy", "")?;
    let vm = guest("sleep 1000").net(Net::tap("cd-busy")).start()?;
    let refused = |builder: VmBuilder| builder.start().map(drop).expect_err("it cannot start");
    let error = refused(guest("").net(Net::tap("cd-busy")));
    check_eq!(error.kind(), ErrorKind::ResourceExhausted);
    check!(error.to_string().contains("attaching network 0: opening tap cd-busy: somebody has it open"), "{error}");
    check_eq!(refused(guest("").net(Net::tap("cd-none"))).kind(), ErrorKind::NotFound);
    drop(vm);
    let error = refused(guest("").vcpus(2).net(Net::tap("cd-busy").queues(2)));
    check!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("multi_queue"), "{error}");
    Ok(())
}

pub fn frames_on_a_socket_and_a_link_that_goes_down() -> Outcome {
    let (near, mut far) = UnixStream::pair()?;
    let printed = Printed::default();
    let script = "ifconfig eth0 198.51.100.2 up; ping -c 1 -W 1 198.51.100.1 > /dev/null
        echo asked; while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done; echo unplugged
        while [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done; echo in again
        while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done; echo gone\nreboot -f";
    let vm = guest(script).net(Net::fd(near)).console(printed.console()).start()?;
    let events = vm.events()?;
    // Its first question is who has the address (RFC 826).
    far.set_read_timeout(Some(PATIENCE))?;
    let frame = loop {
        let mut length = [0; 4];
        far.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        far.read_exact(&mut frame)?;
        if frame.get(12..14) == Some(&[8, 6]) {
            break frame;
        }
    };
    check_eq!(frame.get(38..42), Some(&[198, 51, 100, 1][..]));
    printed.wait_for("asked")?;
    vm.net(0)?.set_link(false)?;
    printed.wait_for("unplugged")?;
    vm.net(0)?.set_link(true)?;
    printed.wait_for("in again")?;
    drop(far);
    printed.wait_for("gone")?;
    let told: Vec<_> = events.map(|event| event.kind).collect();
    let lost = |kind: &EventKind| matches!(kind, EventKind::Degraded { what } if what.contains("net0: the other end"));
    check!(told.iter().any(lost), "{told:?}");
    Ok(())
}

/// A server of the host that gives back what it gets until the end, then says how much that was.
fn echo(ip: &str) -> Result<std::net::SocketAddr> {
    let listener = std::net::TcpListener::bind((ip, 0))?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                let _ = stream.read_to_end(&mut bytes);
                let _ = stream.write_all(&bytes);
            });
        }
    });
    Ok(address)
}

/// Only this port of the host's loopback.
fn only(address: std::net::SocketAddr) -> Result<Policy> {
    let there = Cidr::new(address.ip(), 32)?;
    Ok(Policy::deny_all().rule(Rule::allow_range(there).port(address.port())))
}

const CONFIGURED: &str = "ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up; route add default gw 10.0.2.2\n";

/// An address of the host's that no guest has itself.
fn host_address() -> Result<&'static str> {
    host("ip addr replace 192.0.2.33/32 dev lo")?;
    Ok("192.0.2.33")
}

pub fn a_guest_goes_where_its_policy_lets_it_and_nowhere_else() -> Outcome {
    let ip = host_address()?;
    let (allowed, denied) = (echo(ip)?, echo(ip)?);
    let script = format!(
        "{CONFIGURED}head -c 3000000 /dev/urandom > /data; md5sum < /data; nc {ip} {} < /data | md5sum
        nc -w 30 {ip} {} < /data && echo reached; ping -c 1 -W 20 10.0.2.2 | grep received\nreboot -f",
        allowed.port(),
        denied.port(),
    );
    let printed = Printed::default();
    let vm = guest(&script).net(Net::user(only(allowed)?)).console(printed.console()).start()?;
    let events = vm.events()?;
    vm.wait_timeout(PATIENCE)?.ok_or("it never ended")?;
    let text = printed.text();
    let digests: Vec<&str> = text.lines().filter(|line| line.trim().ends_with("  -")).map(str::trim).collect();
    check!(digests.len() == 2 && digests[0] == digests[1], "{text}");
    check!(!text.contains("reached") && text.contains("1 packets received"), "{text}");
    let denials: Vec<_> = events.filter(|event| matches!(event.kind, EventKind::Denied(_))).collect();
    check!(denials.len() == 1, "{denials:?}");
    Ok(())
}

pub fn a_container_has_address_route_and_names() -> Outcome {
    let ip = host_address()?;
    let server = echo(ip)?;
    let container = debian_container().net(Net::user(only(server)?)).start()?;
    let shell = |command: String| -> Result<String> {
        let output = container.exec(["bash", "-c", &command]).timeout(PATIENCE).output()?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
    };
    check_eq!(shell("cat /etc/resolv.conf".into())?, "nameserver 10.0.2.2");
    let asked = format!("exec 3<>/dev/tcp/{ip}/{}; echo hello >&3; head -c 0 <&3; echo sent", server.port());
    check_eq!(shell(asked)?, "sent");
    let denied = shell("getent hosts example.com; echo code $?".into())?;
    check_eq!(denied, "code 2");
    check!(container.vm().net(0)?.stats()?.denied_names > 0);
    Ok(())
}

pub fn published_ports_lead_into_the_guest() -> Outcome {
    let ports = [80, 81].map(|port| Port::tcp(([127, 0, 0, 1], 0), port));
    let [open, closed] = ports;
    let script = format!("{CONFIGURED}echo ready; nc -l -p 80 -e echo from the guest; echo served; sleep 1000");
    let printed = Printed::default();
    let network = Net::user(Policy::deny_all()).publish(open).publish(closed);
    let vm = guest(&script).net(network).console(printed.console()).start()?;
    printed.wait_for("ready")?;
    let net = vm.net(0)?;
    let [open, closed] = net.published() else { return Err("two ports were published".into()) };
    let call = |address: &std::net::SocketAddr| -> std::io::Result<String> {
        let mut text = String::new();
        std::net::TcpStream::connect(address)?.read_to_string(&mut text)?;
        Ok(text)
    };
    let deadline = std::time::Instant::now() + PATIENCE;
    while !call(open).is_ok_and(|text| text == "from the guest\n") {
        check!(std::time::Instant::now() < deadline, "{}", printed.text());
    }
    check!(call(closed).is_err(), "nobody listens there");
    let port = net.publish(Port::tcp(([127, 0, 0, 1], 0), 80))?;
    port.close()?;
    check!(call(&port.address()).is_err());
    net.set_policy(Policy::internet())?;
    Ok(())
}
