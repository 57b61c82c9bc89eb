//! Network backends: switches and custom backends, with limits and captures.

use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam::backend::{Frame, NetBackend, Received, RxBuffer};
use cofferdam::event::{DeviceId, EventKind, Throttled};
use cofferdam::net::{Capture, ConnectionLimit, Mac, NetLimit, Policy, PortForward, Switch};
use cofferdam::process::ExitStatus;
use cofferdam::{Container, ErrorKind, Exit, Net, Rate, Vm};

use crate::fixture::{
    Outcome, Printed, TEST_TIMEOUT, Temp, container, debian_container, guest, network_container, run,
};
use crate::{check, check_eq};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn shell(container: &Container, command: &str) -> Result<String> {
    let output = container.exec(["bash", "-c", command]).timeout(TEST_TIMEOUT).output()?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned())
}

/// Prints the digest of what the first caller says.
const SERVER: &str = "perl -MIO::Socket::IP -e '
    my $l = IO::Socket::IP->new(LocalHost => \"::\", LocalPort => 7000, Listen => 5) or die;
    my $c = $l->accept; open(my $m, \"|-\", \"md5sum\"); while (read $c, my $b, 65536) { print $m $b }'";

pub fn containers_on_a_switch_connect_by_name() -> Outcome {
    let switch = Switch::new();
    let server = debian_container().net(Net::switch(&switch, "server")).start()?;
    let outside = Net::user(Policy::deny_all());
    let client = debian_container().net(outside).net(Net::switch(&switch, "Client")).start()?;
    check_eq!(switch.names(), ["client", "server"]);
    check_eq!(shell(&server, "cat /etc/resolv.conf")?, "nameserver 10.0.3.1");
    check_eq!(shell(&client, "cat /etc/resolv.conf")?, "nameserver 10.0.2.2");
    check_eq!(shell(&server, "getent ahostsv4 client | head -1 | cut -d\" \" -f1")?, "10.0.3.3");
    check_eq!(shell(&client, "getent ahostsv4 server | head -1 | cut -d\" \" -f1")?, "10.0.3.2");
    check_eq!(shell(&client, "getent hosts nobody; echo code $?")?, "code 2");
    let serving = server.exec(["bash", "-c", SERVER]).stdout(cofferdam::process::Stdio::piped()).spawn()?;
    // By IPv6, which the switch advertises; the name has an address of both kinds.
    let six = shell(&client, "getent ahostsv6 server | head -1 | cut -d\" \" -f1")?;
    check!(six.starts_with("fd63:6f66:6666:3:"), "{six}");
    let talk = "head -c 5000000 /dev/urandom > /data; md5sum < /data
        until cat /data > /dev/tcp/server/7000; do sleep 0.1; done 2> /dev/null";
    let digest = shell(&client, talk)?;
    let came = serving.wait_with_output()?.stdout;
    check_eq!(String::from_utf8_lossy(&came).trim(), digest);
    let serving = server.exec(["bash", "-c", SERVER]).stdout(cofferdam::process::Stdio::piped()).spawn()?;
    let digest = shell(&client, &talk.replace("tcp/server", &format!("tcp/{six}")))?;
    check_eq!(String::from_utf8_lossy(&serving.wait_with_output()?.stdout).trim(), digest);
    // In fragments, of both families.
    let echo = "use IO::Socket::IP; my $s = IO::Socket::IP->new(Proto => 'udp', LocalHost => '::', LocalPort => 7001) or die; $| = 1;
        print 'ready'; while (1) { my $from = recv $s, my $b, 65536, 0; send $s, $b, 0, $from }";
    let mut serving = server.exec(["perl", "-e", echo]).stdout(cofferdam::process::Stdio::piped()).spawn()?;
    serving.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0; 5])?;
    for address in ["10.0.3.2", &six] {
        let ask = format!(
            "perl -MIO::Socket::IP -e 'my $s = IO::Socket::IP->new(Proto => udp, PeerHost => \"{address}\", PeerPort => 7001) or die;
            my $sent = join \"\", 1 .. 3000; $s->send($sent); $s->recv(my $came, 65536); print $came eq $sent ? whole : length $came'"
        );
        check_eq!(shell(&client, &ask)?, "whole");
    }
    let stats = server.vm().net(0)?.stats()?;
    check!(stats.received_bytes > 10_000_000 && stats.spoofed == 0 && stats.malformed == 0, "{stats:?}");
    // Nothing leads out of a switch, nor through one of its guests.
    check_eq!(shell(&server, "(echo > /dev/tcp/10.0.2.2/53) 2> /dev/null; echo code $?")?, "code 1");
    // A name is taken as long as its guest runs, and then free at once, as is its address.
    let again = || guest("").net(Net::switch(&switch, "SERVER"));
    let taken = again().start().map(drop).expect_err("the name is taken");
    check_eq!(taken.kind(), ErrorKind::AlreadyExists);
    server.kill();
    server.wait();
    let next = again().start()?;
    check_eq!(switch.address("server"), Some([10, 0, 3, 2].into()));
    drop(next);
    check_eq!(switch.names(), ["client"]);
    let clash = guest("").net(Net::switch(&switch, "a")).net(Net::switch(&Switch::new(), "b"));
    check_eq!(clash.start().map(drop).expect_err("both are on 10.0.3.0/24").kind(), ErrorKind::InvalidConfig);
    Ok(())
}

pub fn net_rate_limit_holds_and_can_be_changed() -> Outcome {
    let script = "ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up; route add default gw 10.0.2.2; echo ready
        while true; do head -c 200000 /dev/zero | nc -l -p 80; done";
    let printed = Printed::default();
    let limit = NetLimit::none().sent_bytes(Rate::per_second(50_000));
    let net = Net::user(Policy::deny_all()).publish(PortForward::tcp(([127, 0, 0, 1], 0), 80)).limit(limit);
    let vm = guest(script).net(net).console(printed.console()).start()?;
    printed.wait_for("ready")?;
    let (net, events) = (vm.net(0)?, vm.events()?);
    let address = *net.published().first().ok_or("a port was published")?;
    let fetch = || -> Result<Duration> {
        let (start, deadline) = (Instant::now(), Instant::now() + TEST_TIMEOUT);
        loop {
            let mut bytes = Vec::new();
            let begin = Instant::now();
            let came =
                std::net::TcpStream::connect(address).and_then(|mut s| std::io::Read::read_to_end(&mut s, &mut bytes));
            if came.is_ok() && bytes.len() == 200_000 {
                return Ok(begin.elapsed());
            }
            check!(Instant::now() < deadline, "{} bytes after {:?}", bytes.len(), start.elapsed());
            std::thread::sleep(Duration::from_millis(50));
        }
    };
    let throttled = || {
        let card = vm.stats().devices.into_iter().find(|device| device.device == DeviceId::Net(0));
        card.map(|card| (card.throttled, card.throttled_time)).ok_or("there is a card")
    };
    // Four seconds are due, but for what the last frame may have beyond its share.
    let slow = fetch()?;
    check!(slow > Duration::from_secs(2), "{slow:?}");
    let (times, time) = throttled()?;
    check!(times > 0 && time > Duration::from_secs(1), "{times} {time:?}");
    net.set_limit(NetLimit::none())?;
    // The connection's own end may still have waited.
    let (times, _) = throttled()?;
    let fast = fetch()?;
    check!(throttled()?.0 == times, "{fast:?} after {slow:?}");
    let none = net.set_connection_limit(ConnectionLimit::new().open(0));
    check_eq!(none.expect_err("no connection at all").kind(), ErrorKind::InvalidConfig);
    vm.kill();
    let told =
        events.filter(|event| event.kind == EventKind::Throttled { what: Throttled::Device(DeviceId::Net(0)) }).count();
    check!((1..10).contains(&told), "{told}");
    Ok(())
}

/// The frames of a capture with times in nanoseconds.
fn frames(pcap: &[u8]) -> Result<Vec<&[u8]>> {
    let (header, mut rest) = pcap.split_at_checked(24).ok_or("no header")?;
    check_eq!(header.get(..4), Some(&0xa1b2_3c4d_u32.to_ne_bytes()[..]));
    let mut frames = Vec::new();
    while let Some((record, after)) = rest.split_at_checked(16) {
        let kept = u32::from_ne_bytes(record[8..12].try_into()?) as usize;
        let (frame, after) = after.split_at_checked(kept).ok_or("it was cut off")?;
        frames.push(frame);
        rest = after;
    }
    check!(rest.is_empty(), "{} bytes too many", rest.len());
    Ok(frames)
}

pub fn capture_records_guest_frames() -> Outcome {
    let temp = Temp::new()?;
    let path = temp.path("net0.pcap");
    let script = "ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up
        ping -c 2 -W 30 -p 5a -s 300 10.0.2.2 | grep received\nreboot -f";
    let net = Net::user(Policy::deny_all()).mac([2, 0, 0, 0, 0, 9]).capture(Capture::file(&path).snap_len(200));
    let printed = Printed::default();
    let vm = guest(script).net(net).console(printed.console()).start()?;
    let card = vm.net(0)?;
    vm.wait_timeout(TEST_TIMEOUT).ok_or("it never ended")?;
    check!(printed.text().contains("2 packets received"), "{}", printed.text());
    // All is written when the VM has ended.
    let bytes = std::fs::read(&path)?;
    let frames = frames(&bytes)?;
    let capture_stats = card.capture_stats().ok_or("its frames are capture_stats")?;
    check_eq!((capture_stats.frames, capture_stats.lost), (frames.len() as u64, 0));
    let count = |kind: u8, from_guest: bool| {
        let mine = |frame: &&&[u8]| (frame.get(6..12) == Some(&[2, 0, 0, 0, 0, 9])) == from_guest;
        let echo = |frame: &&&[u8]| frame.get(12..14) == Some(&[8, 0]) && frame.get(34) == Some(&kind);
        frames
            .iter()
            .filter(mine)
            .filter(echo)
            .filter(|frame| frame.len() == 200 && frame.ends_with(&[0x5a; 100]))
            .count()
    };
    check_eq!([count(8, true), count(0, false)], [2, 2]);
    check!(frames.iter().any(|frame| frame.get(12..14) == Some(&[8, 6])), "the guest sent no ARP request");
    Ok(())
}

/// Answers for every address: ARP (RFC 826) and pings (RFC 792). It loses every third ping.
struct Responder {
    mac: Mac,
    pings: u32,
    answers: VecDeque<Vec<u8>>,
    never: (UnixStream, UnixStream),
}

impl NetBackend for Responder {
    fn fd(&self) -> BorrowedFd<'_> {
        self.never.0.as_fd()
    }

    fn poll(&mut self) {}

    fn send(&mut self, frame: Frame<'_>) -> std::io::Result<()> {
        let mut bytes = frame.to_vec();
        let ours = [2, 0xee, 0, 0, 0, 1];
        match (bytes.get(12..14), bytes.get(20..24), bytes.get(34).copied()) {
            (Some([8, 6]), Some([_, 1, ..]), _) => {
                bytes.copy_within(22..32, 32);
                let asked = frame.to_vec()[38..42].to_vec();
                bytes[21] = 2;
                bytes[22..28].copy_from_slice(&ours);
                bytes[28..32].copy_from_slice(&asked);
            }
            (Some([8, 0]), _, Some(8)) => {
                self.pings += 1;
                if self.pings.is_multiple_of(3) {
                    return Ok(());
                }
                let (from, to) = (bytes[26..30].to_vec(), bytes[30..34].to_vec());
                bytes[26..30].copy_from_slice(&to);
                bytes[30..34].copy_from_slice(&from);
                // An answer's type is eight less, so its checksum is as much more.
                bytes[34] = 0;
                let check = u16::from_be_bytes([bytes[36], bytes[37]]);
                let (check, over) = check.overflowing_add(0x800);
                bytes[36..38].copy_from_slice(&(check + u16::from(over)).to_be_bytes());
            }
            _ => return Ok(()),
        }
        bytes[..6].copy_from_slice(&self.mac.0);
        bytes[6..12].copy_from_slice(&ours);
        self.answers.push_back(bytes);
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        self.answers.front().map(Vec::len)
    }

    fn receive(&mut self, buffer: &mut RxBuffer<'_>) -> std::io::Result<Option<Received>> {
        Ok(self.answers.pop_front().and_then(|frame| buffer.copy_from(&frame)))
    }
}

pub fn custom_backend_carries_frames() -> Outcome {
    let net = Net::custom(|card| {
        Ok(Responder { mac: card.mac, pings: 0, answers: VecDeque::new(), never: UnixStream::pair()? })
    });
    let script =
        "ifconfig eth0 192.0.2.2 netmask 255.255.255.0 up; ping -c 6 -i 0.2 -W 3 192.0.2.77 | grep received\nreboot -f";
    let builder = guest(script).net(net);
    // A config value is used any number of times, and each VM has its own.
    for _ in 0..2 {
        let (exit, printed) = run(builder.clone())?;
        check!(printed.contains("4 packets received"), "{exit} {printed}");
    }
    let failing = Net::custom(|_| -> std::io::Result<Responder> { Err(std::io::ErrorKind::PermissionDenied.into()) });
    let error = guest("").net(failing).start().map(drop).expect_err("it has no backend");
    check_eq!(error.kind(), ErrorKind::PermissionDenied);
    check!(error.to_string().contains("attaching network 0: making a custom backend: "), "{error}");
    Ok(())
}

/// Does something once, when the guest sends its first frame.
struct Once<F> {
    act: Option<F>,
    never: (UnixStream, UnixStream),
}

impl<F: FnOnce() + Send> NetBackend for Once<F> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.never.0.as_fd()
    }

    fn poll(&mut self) {}

    fn send(&mut self, _: Frame<'_>) -> std::io::Result<()> {
        if let Some(act) = self.act.take() {
            act();
        }
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        None
    }

    fn receive(&mut self, _: &mut RxBuffer<'_>) -> std::io::Result<Option<Received>> {
        Ok(None)
    }
}

const TALK: &str = "ifconfig eth0 192.0.2.2 netmask 255.255.255.0 up; ping -c 1 -W 3 192.0.2.77; sleep 1000";

/// A machine whose backend does this at the guest's first frame.
fn acting(act: impl Fn() + Clone + Send + Sync + 'static) -> cofferdam::Result<Vm> {
    let net = Net::custom(move |_| Ok(Once { act: Some(act.clone()), never: UnixStream::pair()? }));
    guest(TALK).net(net).start()
}

pub fn panicking_backend_ends_only_its_own_vm() -> Outcome {
    let neighbour = container()?;
    // Without the panic hook, which reads all of the symbols to print where it was.
    let vm = acting(|| std::panic::resume_unwind(Box::new("a mistake of the embedder's")))?;
    let exit = vm.wait_timeout(TEST_TIMEOUT).ok_or("it has not ended")?;
    check!(matches!(&exit, Exit::DeviceFault { device: DeviceId::Net(0), .. }), "{exit}");
    check!(neighbour.exec(["true"]).timeout(TEST_TIMEOUT).status()?.success());
    Ok(())
}

/// Its drop waits until the peer of its socket goes.
struct HangsAtDrop(UnixStream);

impl Drop for HangsAtDrop {
    fn drop(&mut self) {
        let _ = self.0.read(&mut [0]);
    }
}

impl NetBackend for HangsAtDrop {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn poll(&mut self) {}

    fn send(&mut self, _: Frame<'_>) -> std::io::Result<()> {
        Ok(())
    }

    fn next_len(&mut self) -> Option<usize> {
        None
    }

    fn receive(&mut self, _: &mut RxBuffer<'_>) -> std::io::Result<Option<Received>> {
        Ok(None)
    }
}

pub fn backend_whose_drop_hangs_does_not_delay_its_vm() -> Outcome {
    let (peer, socket) = UnixStream::pair()?;
    let vm = guest("sleep 1000").net(Net::custom(move |_| Ok(HangsAtDrop(socket.try_clone()?)))).start()?;
    vm.kill();
    check!(vm.wait_timeout(TEST_TIMEOUT).is_some());
    let begin = Instant::now();
    drop(vm);
    // As documented.
    check!(begin.elapsed() < Duration::from_secs(26), "{:?}", begin.elapsed());
    drop(peer);
    Ok(())
}

pub fn backend_may_own_its_vm() -> Outcome {
    let held = Arc::new(Mutex::new(None::<Vm>));
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let slot = held.clone();
    let vm = acting(move || {
        // The test has put it there by then.
        let vm = loop {
            match slot.lock().ok().and_then(|mut slot| slot.take()) {
                Some(vm) => break vm,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        // Its own loop cannot answer: it says so at once instead of waiting for itself.
        let begin = Instant::now();
        let refused = vm.net(0).and_then(|net| net.stats()).map(drop).map_err(|error| error.kind());
        let paused = vm.pause().map_err(|error| error.kind());
        let took = begin.elapsed();
        // And the last handle goes on the machine's own thread.
        drop(vm);
        let _ = tell.send((refused, paused, took));
    })?;
    let events = vm.events()?;
    *held.lock().map_err(|_| "poisoned")? = Some(vm);
    let (refused, paused, took) = told.recv_timeout(TEST_TIMEOUT)?;
    check_eq!((refused, paused), (Err(ErrorKind::InvalidState), Err(ErrorKind::InvalidState)));
    check!(took < TEST_TIMEOUT / 2, "{took:?}");
    let ended = std::iter::from_fn(|| events.next_timeout(TEST_TIMEOUT)).last().map(|event| event.kind);
    check!(matches!(ended, Some(EventKind::Ended { exit: Exit::Killed { .. } })), "{ended:?}");
    Ok(())
}

pub fn backend_may_own_its_container() -> Outcome {
    let held = Arc::new(Mutex::new(None::<Container>));
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let slot = held.clone();
    let act = move || {
        let begin = Instant::now();
        let last = slot.lock().ok().and_then(|mut slot| slot.take());
        let was_there = last.is_some();
        drop(last);
        let _ = tell.send((was_there, begin.elapsed()));
    };
    let net = Net::custom(move |_| Ok(Once { act: Some(act.clone()), never: UnixStream::pair()? }));
    let container = network_container().net(net).start()?;
    let events = container.events()?;
    // By then no other handle is left.
    let exec =
        container.exec(["sh", "-c", "sleep 2; ip addr add 192.0.2.2/24 dev eth0; ip link set eth0 up; sleep 1000"]);
    *held.lock().map_err(|_| "poisoned")? = Some(container);
    let mut process = exec.spawn()?;
    let (was_there, took) = told.recv_timeout(TEST_TIMEOUT)?;
    check!(was_there && took < Duration::from_secs(10), "{was_there} {took:?}");
    let status = process.wait()?;
    check!(matches!(&status, ExitStatus::VmEnded { exit: Exit::Killed { .. } }), "{status}");
    let ended = std::iter::from_fn(|| events.next_timeout(TEST_TIMEOUT)).last().map(|event| event.kind);
    check!(matches!(ended, Some(EventKind::Ended { exit: Exit::Killed { .. } })), "{ended:?}");
    Ok(())
}
