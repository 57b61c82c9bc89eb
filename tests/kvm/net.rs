//! Network cards: on taps of the host, and on sockets of processes that want a guest's frames.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use cofferdam::event::EventKind;
use cofferdam::net::{Cidr, Policy, PortForward, Rule};
use cofferdam::process::Stdio;
use cofferdam::{Container, ErrorKind, Net, Process, Size, VmBuilder};

use crate::fixture::{Outcome, Printed, TEST_TIMEOUT, Temp, debian_container, guest, host, run, soak};
use crate::{check, check_eq};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A tap of the host, with an address of a network that is used nowhere else.
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

pub fn tap_connects_guest_and_host() -> Outcome {
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

/// A network namespace with an address, and a bridge between it and a tap.
struct Far {
    _tap: Tap,
}

impl Far {
    const ADDRESS: &str = "192.0.2.49";

    fn new() -> Result<Self> {
        let tap = Tap::new("cd-line", "")?;
        let it = Self { _tap: tap };
        host("ip netns add cd-far")?;
        host("ip link add cd-bridge type bridge")?;
        host("ip link add cd-near type veth peer name cd-peer netns cd-far")?;
        for name in ["cd-line", "cd-near"] {
            host(&format!("ip link set {name} master cd-bridge up"))?;
        }
        host("ip link set cd-bridge up")?;
        host(&format!("ip -n cd-far addr add {}/28 dev cd-peer", Self::ADDRESS))?;
        host("ip -n cd-far link set cd-peer up")?;
        Ok(it)
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        // Servers that no guest has called.
        for pid in host("ip netns pids cd-far").unwrap_or_default().split_whitespace() {
            let _ = host(&format!("kill {pid}"));
        }
        let _ = host("ip link del cd-bridge");
        let _ = host("ip netns del cd-far");
    }
}

pub fn tcp_keeps_every_byte_over_a_lossy_link() -> Outcome {
    let _far = Far::new()?;
    for name in ["cd-line", "cd-near"] {
        host(&format!("tc qdisc add dev {name} root netem delay 50ms 10ms loss 5% duplicate 2% reorder 10% 50%"))?;
    }
    let (temp, bytes) = (Temp::new()?, soak().map_or(100_000, |n| n * 1_000_000));
    let [sent, came] = ["sent", "came"].map(|name| temp.path(name).display().to_string());
    let far = format!(
        "head -c {bytes} /dev/urandom > {sent}; ip netns exec cd-far busybox nc -l -p 7777 -e dd of={came} status=none && \
         ip netns exec cd-far busybox nc -l -p 7778 -e cat {sent}"
    );
    let mut far = Command::new("sh").args(["-c", &far]).spawn()?;
    let script = format!(
        "ifconfig eth0 192.0.2.50 netmask 255.255.255.240 up; ping -c 20 -W 30 {0} | grep received
        head -c {bytes} /dev/urandom > /data; nc {0} 7777 < /data; md5sum < /data
        until nc {0} 7778 > /came && [ -s /came ]; do sleep 1; done; md5sum < /came\nreboot -f",
        Far::ADDRESS
    );
    let (exit, printed) = run(guest(&script).memory(Size::mib(512)).net(Net::tap("cd-line")))?;
    check!(far.wait()?.success(), "{exit} {printed}");
    for file in [sent, came] {
        let bytes = std::fs::read(&file)?;
        check!(!bytes.is_empty() && printed.contains(&md5(&bytes)?), "{file}: {} bytes: {exit} {printed}", bytes.len());
    }
    check!(!printed.contains(" 0 packets received"), "{printed}");
    Ok(())
}

/// IPv6 has no links of less than 1280 bytes (RFC 8200, 5).
pub fn container_with_a_small_mtu_runs_on_ipv4() -> Outcome {
    let container = debian_container().net(Net::user(Policy::deny_all()).mtu(1000)).start()?;
    let output =
        container.exec(["cat", "/sys/class/net/eth0/mtu", "/proc/net/route", "/proc/net/if_inet6"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    check!(text.starts_with("1000\n") && text.contains("eth0\t00000000\t0202000A"), "{text}");
    check!(!text.contains("fd63"), "{text}");
    Ok(())
}

pub fn multiple_queues_carry_traffic() -> Outcome {
    let _tap = Tap::new("cd-queues", " multi_queue")?;
    host("ip addr add 192.0.2.17/28 dev cd-queues")?;
    let script = "ifconfig eth0 192.0.2.18 netmask 255.255.255.240 up; ls -d /sys/class/net/eth0/queues/tx-* | wc -l
        ping -c 3 -W 30 192.0.2.17 | grep received\nreboot -f";
    let (exit, printed) = run(guest(script).vcpus(2).net(Net::tap("cd-queues").queues(2)))?;
    check!(printed.starts_with('2') && printed.contains("3 packets received"), "{exit} {printed}");
    Ok(())
}

pub fn unusable_tap_is_named() -> Outcome {
    let _tap = Tap::new("cd-busy", "")?;
    let vm = guest("sleep 1000").net(Net::tap("cd-busy")).start()?;
    let refused = |builder: VmBuilder| builder.start().map(drop).expect_err("it cannot start");
    let error = refused(guest("").net(Net::tap("cd-busy")));
    check_eq!(error.kind(), ErrorKind::ResourceBusy);
    check!(
        error.to_string().contains("attaching network 0: opening tap cd-busy: another process has it open"),
        "{error}"
    );
    check_eq!(refused(guest("").net(Net::tap("cd-none"))).kind(), ErrorKind::NotFound);
    drop(vm);
    let error = refused(guest("").vcpus(2).net(Net::tap("cd-busy").queues(2)));
    check!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("multi_queue"), "{error}");
    Ok(())
}

pub fn socket_carries_frames_and_link_goes_down_with_it() -> Outcome {
    let (near, mut far) = UnixStream::pair()?;
    let printed = Printed::default();
    let script = "ifconfig eth0 198.51.100.2 up; ping -c 1 -W 1 198.51.100.1 > /dev/null
        echo asked; while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done; echo unplugged
        while [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done; echo in again
        while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done; echo gone\nreboot -f";
    let vm = guest(script).net(Net::socket(near)).console(printed.console()).start()?;
    let events = vm.events()?;
    // Its first question is who has the address (RFC 826).
    far.set_read_timeout(Some(TEST_TIMEOUT))?;
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
    let kinds: Vec<_> = events.map(|event| event.kind).collect();
    let lost = |kind: &EventKind| matches!(kind, EventKind::Degraded { what } if what.contains("net0: the other end"));
    check!(kinds.iter().any(lost), "{kinds:?}");
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
pub fn host_address() -> Result<&'static str> {
    host("ip addr replace 192.0.2.33/32 dev lo")?;
    Ok("192.0.2.33")
}

pub fn policy_limits_where_the_guest_connects() -> Outcome {
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
    vm.wait_timeout(TEST_TIMEOUT).ok_or("it never ended")?;
    let text = printed.text();
    let digests: Vec<&str> = text.lines().filter(|line| line.trim().ends_with("  -")).map(str::trim).collect();
    check!(digests.len() == 2 && digests[0] == digests[1], "{text}");
    check!(!text.contains("reached") && text.contains("1 packets received"), "{text}");
    let denials: Vec<_> = events.filter(|event| matches!(event.kind, EventKind::Denied { .. })).collect();
    check!(denials.len() == 1, "{denials:?}");
    Ok(())
}

pub fn container_has_address_route_and_resolver() -> Outcome {
    let ip = host_address()?;
    let server = echo(ip)?;
    let container = debian_container().net(Net::user(only(server)?)).start()?;
    let shell = |command: String| -> Result<String> {
        let output = container.exec(["bash", "-c", &command]).timeout(TEST_TIMEOUT).output()?;
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

pub fn published_ports_reach_the_guest() -> Outcome {
    let ports = [80, 81].map(|port| PortForward::tcp(([127, 0, 0, 1], 0), port));
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
    let deadline = std::time::Instant::now() + TEST_TIMEOUT;
    while !call(open).is_ok_and(|text| text == "from the guest\n") {
        check!(std::time::Instant::now() < deadline, "{}", printed.text());
    }
    check!(call(closed).is_err(), "no program listens there");
    let port = net.publish(PortForward::tcp(([127, 0, 0, 1], 0), 80))?;
    port.close()?;
    check!(call(&port.address()).is_err());
    net.set_policy(Policy::internet())?;
    Ok(())
}

/// A program that listens and gives back what it gets, over TCP or UDP, on one address.
const ECHO: &str = r#"
    use IO::Socket::IP; $| = 1; my ($protocol, $address, $port) = @ARGV; my $tcp = $protocol eq 'tcp';
    my $socket = IO::Socket::IP->new(Proto => $protocol, LocalHost => $address, LocalPort => $port, $tcp ? (Listen => 64) : (),
        ReuseAddr => 1, V6Only => 1) or die $@;
    print "ready\n";
    while ($tcp) { my $caller = $socket->accept or next; while (sysread $caller, my $bytes, 65536) { syswrite $caller, $bytes } }
    while (1) { my $from = recv $socket, my $bytes, 65536, 0; send $socket, $bytes, 0, $from }
"#;

/// Such a program in a container, which listens already.
fn echo_inside(container: &Container, protocol: &str, address: &str, port: u16) -> Result<Process> {
    let echo = container.exec(["perl", "-e", ECHO, protocol, address, &port.to_string()]);
    let mut echo = echo.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut line = [0; 6];
    if let Err(error) = echo.stdout.as_mut().ok_or("no output")?.read_exact(&mut line) {
        return Err(format!("{address}: {error} {:?}", echo.stderr.map(std::io::read_to_string)).into());
    }
    Ok(echo)
}

/// What comes back from there.
fn call(at: std::net::SocketAddr) -> std::io::Result<String> {
    let mut stream = std::net::TcpStream::connect(at)?;
    stream.set_read_timeout(Some(TEST_TIMEOUT))?;
    stream.write_all(b"hello")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    std::io::read_to_string(stream)
}

pub fn published_ports_reach_services_on_any_guest_address() -> Outcome {
    let hosts = ["127.0.0.1:0", "[::1]:0", "127.0.0.1:0", "[::1]:0"].map(|host| host.parse::<std::net::SocketAddr>());
    let mut network = Net::user(Policy::deny_all());
    for (host, guest) in hosts.into_iter().zip(80..) {
        network = network.publish(PortForward::tcp(host?, guest));
    }
    let container = debian_container().net(network).start()?;
    let net = container.vm().net(0)?;
    // A reset, before or after what the caller says.
    let refused = |at| {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
        call(at).is_err_and(|e| [BrokenPipe, ConnectionReset, NotConnected].contains(&e.kind()))
    };
    let before = net.stats()?.unconnected;
    for at in net.published() {
        check!(refused(*at), "no program listens yet");
    }
    check_eq!(net.stats()?.unconnected, before + 4);
    // Flags 80: permanent, and not tentative.
    let address = "grep '^fd.* 00 80 *eth0' /proc/net/if_inet6 | cut -c 1-32 | sed 's/..../&:/g; s/:$//'";
    let output = container.exec(["sh", "-c", address]).timeout(TEST_TIMEOUT).output()?;
    let own = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // A datagram from this address makes the gateway know it.
    let greet = format!(
        "use IO::Socket::IP; IO::Socket::IP->new(Proto => 'udp', LocalHost => '{own}', PeerHost => 'fd63:6f66:6665::2', PeerPort => 9)->send('x') or die"
    );
    let output = container.exec(["perl", "-e", &greet]).timeout(TEST_TIMEOUT).output()?;
    check!(output.status.success(), "{own}: {}", String::from_utf8_lossy(&output.stderr));
    // Only this card, and whatever else the guest's administrator likes.
    let switches = "cd /proc/sys/net/ipv4/conf; cat eth0/route_localnet all/route_localnet default/route_localnet lo/route_localnet
        for n in all eth0; do echo 1 > $n/rp_filter; done";
    let output = container.exec(["sh", "-c", switches]).timeout(TEST_TIMEOUT).output()?;
    check_eq!(String::from_utf8_lossy(&output.stdout), "1\n0\n0\n0\n");
    let places = ["127.0.0.1", "10.0.2.15", own.as_str(), "::1"];
    let mut services = Vec::new();
    for (port, address) in (80..).zip(places) {
        services.push(echo_inside(&container, "tcp", address, port)?);
    }
    for (place, at) in places.into_iter().zip(net.published()).take(3) {
        for _ in 0..3 {
            check_eq!(call(*at).map_err(|e| format!("{place}: {e}"))?, "hello");
        }
    }
    // What it cannot reach, `connect` does.
    check!(net.published().get(3).is_some_and(|at| refused(*at)), "::1 of a guest is reached by the guest alone");
    check!(container.connect(83).is_ok());
    // A service that moves is found again.
    let mut moved = services.remove(0);
    moved.kill()?;
    moved.wait()?;
    services.push(echo_inside(&container, "tcp", "10.0.2.15", 80)?);
    check_eq!(call(net.published()[0])?, "hello");
    check_eq!(net.stats()?.spoofed, 0);
    Ok(())
}

pub fn published_udp_ports_are_answered_from_any_guest_address() -> Outcome {
    let host = |ip: &str| format!("{ip}:0").parse::<std::net::SocketAddr>();
    let mut network = Net::user(Policy::deny_all());
    for (ip, guest) in [("127.0.0.1", 80), ("[::1]", 80), ("127.0.0.1", 81)] {
        network = network.publish(PortForward::udp(host(ip)?, guest));
    }
    let container = debian_container().net(network).start()?;
    let _everywhere = echo_inside(&container, "udp", "0.0.0.0", 80)?;
    let _alone = echo_inside(&container, "udp", "127.0.0.1", 81)?;
    let net = container.vm().net(0)?;
    for at in net.published() {
        let caller = std::net::UdpSocket::bind((at.ip(), 0))?;
        caller.set_read_timeout(Some(TEST_TIMEOUT))?;
        // The last goes in fragments, both ways.
        for data in [b"one".to_vec(), b"two".to_vec(), (0..20_000).map(|n| (n % 251) as u8).collect()] {
            caller.send_to(&data, at)?;
            let mut buffer = vec![0; 65_536];
            let (n, from) = caller.recv_from(&mut buffer)?;
            check!(buffer[..n] == data && from == *at, "{n} bytes of {} from {from}, not {at}", data.len());
        }
    }
    let stats = net.stats()?;
    check_eq!((stats.unconnected, stats.spoofed, stats.fragments), (0, 0, 0));
    Ok(())
}

pub fn fragmented_datagrams_are_intact_both_ways() -> Outcome {
    let ip = host_address()?;
    let socket = std::net::UdpSocket::bind((ip, 0))?;
    let server = socket.local_addr()?;
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((n, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..n], from);
        }
    });
    let container = debian_container().net(Net::user(only(server)?)).start()?;
    let ask = format!(
        "use IO::Socket::IP; my $s = IO::Socket::IP->new(Proto => 'udp', PeerHost => '{ip}', PeerPort => {}) or die $@;
        for my $n (1472, 1473, 9000, 65507) {{ my $sent = join '', map {{ chr(($_ * 7) % 256) }} 1 .. $n; defined $s->send($sent) or die $!;
            $s->recv(my $came, 65536); print $came eq $sent ? 'whole ' : length($came) . ' ' }}",
        server.port()
    );
    let output = container.exec(["perl", "-e", &ask]).timeout(TEST_TIMEOUT).output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    check_eq!(text, "whole whole whole whole ");
    Ok(())
}

pub fn ipv6_and_ping_reach_the_host() -> Outcome {
    // The lab is this test's own machine, so the test allows ping there. On another machine its administrator decides.
    let lab = std::env::var_os("COFFERDAM_IN_LAB").is_some_and(|lab| lab == "1");
    if lab {
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    }
    let groups = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range")?;
    let mut groups = groups.split_whitespace().map(str::parse::<u32>);
    let pings = matches!((groups.next(), groups.next()), (Some(Ok(first)), Some(Ok(last))) if first <= last);
    host("ip addr replace fd00:c0ff:ee::1/128 dev lo")?;
    let four = host_address()?;
    let server = echo("fd00:c0ff:ee::1")?;
    let policy = Policy::deny_all()
        .rule(Rule::allow_range("fd00:c0ff:ee::1".parse::<Cidr>()?))
        .rule(Rule::allow_range(four.parse::<Cidr>()?));
    let script = format!(
        "{CONFIGURED}for n in $(seq 300); do ip -6 route | grep -q default && ip -6 addr show dev eth0 | grep -v tentative | grep -q 'inet6 fd' && break
        sleep 0.1; done; head -c 1000000 /dev/urandom > /data; md5sum < /data; nc fd00:c0ff:ee::1 {} < /data | md5sum
        ping -6 -c 1 -W 20 fd63:6f66:6665::2 | grep received; ping -6 -c 1 -W 20 -s 4000 fd63:6f66:6665::2 | grep received
        ping -c 2 -W 20 -s 30000 10.0.2.2 | grep received
        ping -c 2 -W 20 -s 5000 {four} | grep received; ping -6 -c 2 -W 20 -s 1000 fd00:c0ff:ee::1 | grep received; reboot -f",
        server.port()
    );
    let (exit, text) = run(guest(&script).net(Net::user(policy)))?;
    let digests: Vec<&str> = text.lines().filter(|line| line.trim().ends_with("  -")).map(str::trim).collect();
    check!(digests.len() == 2 && digests[0] == digests[1], "{exit} {text}");
    let received = |n: u32| text.matches(&format!("{n} packets received")).count();
    check!(received(1) == 2 && received(2) == if pings { 3 } else { 1 } && (pings || !lab), "{exit} {text}");
    Ok(())
}
