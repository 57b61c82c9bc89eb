//! What a guest gets of its network, and what of the host's processors that takes: a user-mode network beside QEMU's own (slirp)
//! and beside passt, a socket to passt and a tap beside QEMU's, with the same guest, in the same run; and what a network and
//! its connections keep of this process's heap.
//!
//! Runs in the lab's virtual time, where a microsecond is a thousand instructions (benches/README.md). The guest's program is
//! this one, too. `cargo bench --bench net -- tap` measures the tap alone, and so on: `user`, `tap`, `passt`.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a bench prints, and fails loudly")]

mod common;
#[path = "common/heap.rs"]
mod heap;

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cofferdam::kernel::Initramfs;
use cofferdam::net::{Cidr, Policy, Rule};
use cofferdam::{Console, Kernel, Net, Size, Vm};
use common::{Running, figure, kernel, microvm};
use heap::heap;
use serde_json::Value;

/// What iperf3 is asked to do in the guest, for a second each.
const JOBS: [(&str, &[&str]); 4] = [
    ("guest to host", &[]),
    ("host to guest", &["-R"]),
    ("guest to host, 8 connections", &["-P", "8"]),
    ("guest to host, datagrams", &["-u", "-b", "0", "-l", "1400"]),
];
const TRIPS: usize = 200;
const CONNECTIONS: usize = 200;
/// Connections that stay, and do nothing.
const IDLE: usize = 128;
/// Until what was begun is done.
const REST: Duration = Duration::from_millis(100);
/// Longer than anything takes that ends at all.
const WAIT_TIMEOUT: Duration = Duration::from_secs(20);

/// An address of the host's, on a tap of its own; the guest there.
const HOST: &str = "192.0.2.1";
const TAP: &str = "cd-bench";
/// Where its server waits.
const IPERF_PORT: &str = "5201";

fn connect(host: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&host, WAIT_TIMEOUT)?;
    patient(&stream)?;
    Ok(stream)
}

fn patient(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(WAIT_TIMEOUT))?;
    stream.set_write_timeout(Some(WAIT_TIMEOUT))?;
    stream.set_nodelay(true)
}

/// One byte: "now".
fn say(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(&[1])
}

fn hear(stream: &mut TcpStream) -> io::Result<()> {
    stream.read_exact(&mut [0])
}

/// The guest's part of all that `serve` measures.
fn guest(host: SocketAddr) -> io::Result<()> {
    let mut stream = connect(host)?;
    for (_, options) in JOBS {
        hear(&mut stream)?;
        let mut iperf3 = Command::new("/usr/bin/iperf3");
        iperf3.args(["-c", HOST, "-p", IPERF_PORT, "-t", "1"]).args(options).stdout(Stdio::null());
        if !iperf3.status()?.success() {
            return Err(io::Error::other("iperf3 failed"));
        }
        say(&mut stream)?;
    }
    for _ in 0..TRIPS {
        hear(&mut stream)?;
        say(&mut stream)?;
    }
    hear(&mut stream)?;
    let idle = (0..IDLE).map(|_| connect(host)).collect::<io::Result<Vec<_>>>()?;
    say(&mut stream)?;
    hear(&mut stream)?;
    drop(idle);
    hear(&mut stream)?;
    for _ in 0..CONNECTIONS {
        connect(host)?.read_to_end(&mut Vec::new())?;
    }
    Ok(())
}

/// Processor time that these processes have used, all their threads that live but this one, which is who the guest talks to.
fn used(processes: &[u32]) -> Duration {
    // The kernel counts a thread's time when it switches; on the lab's one processor all others are counted.
    std::thread::yield_now();
    let this = fs::read_link("/proc/thread-self").expect("this thread").file_name().map(OsStr::to_owned);
    let threads = processes.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok()).flatten().flatten();
    let others = threads.filter(|thread| Some(thread.file_name()) != this);
    let times = others.filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok());
    Duration::from_nanos(times.filter_map(|line| line.split(' ').next()?.parse::<u64>().ok()).sum())
}

/// How much there was in a second, and in a second of the processors that the machine had.
#[derive(Debug, Clone, Copy)]
struct Rate {
    time: f64,
    cpu: f64,
}

impl Rate {
    fn new(amount: f64, seconds: f64, cpu: Duration) -> Self {
        Self { time: amount / seconds, cpu: amount / cpu.as_secs_f64() }
    }
}

/// What a guest got of one network.
#[derive(Debug)]
struct Outcome {
    /// Of each job, in megabytes; datagrams that have arrived.
    transfers: Vec<Rate>,
    /// Microseconds, in order.
    trips: Vec<f64>,
    connections: Rate,
    /// This process's heap when guest and host rest after that, and what each connection adds to it that stays.
    heap: usize,
    idle: f64,
}

/// One of iperf3's jobs, by what its server received or sent.
fn transfer(stream: &mut TcpStream, processes: &[u32]) -> io::Result<Rate> {
    let mut server = Command::new("iperf3");
    server.args(["-s", "-1", "-J", "-B", HOST, "-p", IPERF_PORT]).stdout(Stdio::piped());
    let mut server = Running(server.spawn()?);
    // Until it listens.
    std::thread::sleep(REST);
    let before = used(processes);
    say(stream)?;
    hear(stream)?;
    let cpu = used(processes).saturating_sub(before);
    let report: Value = serde_json::from_reader(server.0.stdout.take().expect("a pipe"))?;
    // It sends where it does not receive.
    let sums = ["sum_received", "sum_sent"].map(|sum| &report["end"][sum]);
    let moved = sums.into_iter().find(|sum| sum["bytes"].as_f64().is_some_and(|bytes| bytes > 0.0));
    let (bytes, seconds) = moved.map_or((None, None), |sum| (sum["bytes"].as_f64(), sum["seconds"].as_f64()));
    let (bytes, seconds) = bytes.zip(seconds).ok_or_else(|| io::Error::other(format!("iperf3: {report}")))?;
    Ok(Rate::new(bytes / 1e6, seconds, cpu))
}

/// Where the guest connects to; accepting times out.
fn listen() -> io::Result<TcpListener> {
    let listener = TcpListener::bind((HOST, 0))?;
    // An option of sockets, which only streams have a method for.
    TcpStream::from(OwnedFd::from(listener.try_clone()?)).set_read_timeout(Some(WAIT_TIMEOUT))?;
    Ok(listener)
}

/// The host's part; `processes` are the machine's.
fn serve(listener: &TcpListener, processes: &[u32]) -> io::Result<Outcome> {
    let (mut stream, _) = listener.accept()?;
    patient(&stream)?;
    let transfers = JOBS.iter().map(|_| transfer(&mut stream, processes)).collect::<io::Result<_>>()?;
    let mut trips = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let start = Instant::now();
        say(&mut stream)?;
        hear(&mut stream)?;
        trips.push(start.elapsed().as_secs_f64() * 1e6);
    }
    trips.sort_by(f64::total_cmp);
    std::thread::sleep(REST);
    let kept = heap();
    say(&mut stream)?;
    let idle = (0..IDLE).map(|_| listener.accept()).collect::<io::Result<Vec<_>>>()?;
    hear(&mut stream)?;
    let with_idle = heap();
    drop(idle);
    say(&mut stream)?;
    std::thread::sleep(REST);
    let (before, start) = (used(processes), Instant::now());
    say(&mut stream)?;
    (0..CONNECTIONS).try_for_each(|_| listener.accept().map(drop))?;
    let (time, cpu) = (start.elapsed().as_secs_f64(), used(processes).saturating_sub(before));
    let connections = Rate::new(CONNECTIONS as f64, time, cpu);
    Ok(Outcome { transfers, trips, connections, heap: kept, idle: (with_idle - kept) as f64 / IDLE as f64 })
}

fn shell(dir: &Path, script: &str) -> bool {
    let mut sh = Command::new("sh");
    sh.args(["-ec", script]).current_dir(dir).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

/// Addresses of the guest on a network: its own, the way out; and its largest packet.
type Place = (&'static str, &'static str, u32);

const USER: Place = ("10.0.2.15", "10.0.2.2", 1500);
/// As passt wants it of those who ask its DHCP server: its frames go one by one.
const PASST: Place = ("10.0.2.15", "10.0.2.2", 65520);
const ON_TAP: Place = ("192.0.2.2", HOST, 1500);

/// Everything that the machines share, in a directory that goes with it.
struct Bench {
    dir: PathBuf,
    kernel: Kernel,
}

impl Drop for Bench {
    fn drop(&mut self) {
        shell(&self.dir, &format!("ip link del {TAP}"));
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Bench {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("cofferdam-net-bench-{}", std::process::id()));
        fs::create_dir_all(dir.join("root/bin")).expect("a directory");
        let script = "#!/bin/busybox sh\n/bin/busybox mount -t devtmpfs dev /dev\n/bin/busybox ifconfig eth0 $GUEST netmask 255.255.255.0 mtu $MTU up\n\
             /bin/busybox route add default gw $GATEWAY\n[ -z \"$BENCH_HOST\" ] || /bin/net\necho idle\n\
             [ -n \"$BENCH_HOST\" ] || /bin/busybox sleep 1000\n/bin/busybox reboot -f\n";
        fs::write(dir.join("root/init"), script).expect("the script");
        let program = std::env::current_exe().expect("this program");
        let archive = format!(
            "chmod 755 root/init; mkdir root/dev root/tmp; mknod root/dev/console c 5 1; cp /bin/busybox root/bin/
             strip -o root/bin/net {program}
             cp -L --parents /usr/bin/iperf3 $(ldd {program} /usr/bin/iperf3 | grep -o '[[:space:]]/[^ ]*' | sort -u) root
             cd root; find . | cpio -o -H newc > ../initrd",
            program = program.display()
        );
        assert!(shell(&dir, &archive), "busybox-static, binutils, cpio and iperf3: run `lab/need iperf3`");
        // passt looks for a way out, and there is none in the lab.
        let tap = format!(
            "ip tuntap add dev {TAP} mode tap vnet_hdr; ip addr add {HOST}/24 dev {TAP}; ip link set {TAP} up
             ip route add default via 192.0.2.2 dev {TAP} metric 1000000"
        );
        let bench = Self { dir, kernel: Kernel::open(kernel()).expect("a kernel: run `make setup`") };
        assert!(shell(&bench.dir, &tap), "a tap of the name {TAP}, which takes root and /dev/net/tun");
        bench
    }

    /// The kernel's command line. What the kernel does not know, it gives to the guest's script.
    fn cmdline(&self, place: Place, host: Option<SocketAddr>) -> String {
        let (guest, gateway, mtu) = place;
        let host = host.map(|host| format!(" BENCH_HOST={host}")).unwrap_or_default();
        format!("console=hvc0 quiet reboot=t panic=-1 GUEST={guest} GATEWAY={gateway} MTU={mtu}{host}")
    }

    fn start(&self, net: Option<Net>, cmdline: &str, console: Console) -> Vm {
        let initramfs = Initramfs::open(self.dir.join("initrd")).expect("the initramfs");
        let kernel = self.kernel.clone().cmdline(cmdline).initramfs(initramfs);
        let vm = Vm::builder(kernel).memory(Size::mib(128)).console(console);
        net.into_iter().fold(vm, |vm, net| vm.net(net)).start().expect("the guest starts")
    }

    fn ours(&self, net: impl FnOnce(SocketAddr) -> Net, place: Place, helper: Option<&Running>) -> io::Result<Outcome> {
        let listener = listen()?;
        let host = listener.local_addr()?;
        let vm = self.start(Some(net(host)), &self.cmdline(place, Some(host)), Console::writer(io::stderr()));
        let mut processes = vec![std::process::id()];
        processes.extend(helper.map(|helper| helper.0.id()));
        let outcome = serve(&listener, &processes);
        vm.wait_timeout(WAIT_TIMEOUT).expect("the guest's end");
        outcome
    }

    /// `None` where QEMU is not installed, or knows no such network.
    fn qemu(&self, netdev: &str, place: Place, helper: Option<&Running>) -> Option<Outcome> {
        let listener = listen().ok()?;
        let host = listener.local_addr().ok()?;
        let child = microvm(128, &kernel(), &self.cmdline(place, Some(host)))
            .args(["-chardev", "stdio,id=console", "-device", "virtio-serial-device"])
            .args(["-device", "virtconsole,chardev=console", "-global", "virtio-mmio.force-legacy=false"])
            .args(["-netdev", &format!("{netdev},id=net"), "-device", "virtio-net-device,netdev=net"])
            .arg("-initrd")
            .arg(self.dir.join("initrd"))
            .stdout(io::stderr())
            .spawn()
            .ok()?;
        let machine = Running(child);
        let mut processes = vec![machine.0.id()];
        processes.extend(helper.map(|helper| helper.0.id()));
        serve(&listener, &processes).inspect_err(|error| eprintln!("QEMU with {netdev}: {error}")).ok()
    }

    /// passt, and the socket on which it waits for a machine. `None` where it is not installed.
    fn passt(&self) -> Option<(Running, PathBuf)> {
        // passt switches to an unprivileged user, who may not write to our directory.
        let path = std::env::temp_dir().join(format!("cofferdam-passt-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        let child = Command::new("passt")
            .args(["-f", "-q", "-4", "-i", TAP, "-a", PASST.0, "-n", "24", "-g", PASST.1, "-D", HOST, "-s"])
            .arg(&path)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let passt = Running(child);
        let ready = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            path.exists()
        });
        ready.then_some((passt, path))
    }

    /// The user-mode network, and what this process's heap has grown by.
    fn user(&self) -> (Outcome, usize) {
        let user = |host: SocketAddr| {
            let there = Cidr::new(host.ip(), 32).expect("one address");
            Net::user(Policy::deny_all().rule(Rule::allow_range(there))).into()
        };
        let before = heap();
        let ours = self.ours(user, USER, None).expect("a user-mode network");
        let kept = ours.heap - before;
        (ours, kept)
    }

    /// QEMU with passt, ours with a socket to passt, and the user-mode network beside it.
    fn beside_passt(&self, user: &Outcome) {
        let through = |run: &dyn Fn(&Running, &Path) -> Option<Outcome>| {
            let (passt, socket) = self.passt()?;
            let outcome = run(&passt, &socket);
            let _ = fs::remove_file(socket);
            outcome
        };
        let passt = through(&|passt, socket| {
            let netdev = format!("stream,server=off,addr.type=unix,addr.path={}", socket.display());
            self.qemu(&netdev, PASST, Some(passt))
        });
        compare("user-mode (QEMU: passt)", user, passt.as_ref());
        let socket = through(&|passt, socket| {
            let socket = UnixStream::connect(socket).ok()?;
            let net = |_| Net::socket(socket).mtu(PASST.2).into();
            self.ours(net, PASST, Some(passt)).inspect_err(|error| eprintln!("Net::socket: {error}")).ok()
        });
        if let Some(socket) = socket {
            compare("socket to passt (QEMU: the same)", &socket, passt.as_ref());
        }
    }

    /// The heap that a machine without a network keeps, its guest idle.
    fn heap_without(&self) -> usize {
        let (to, from) = mpsc::channel();
        let before = heap();
        let vm = self.start(None, &self.cmdline(USER, None), Console::writer(PrintedTo(to)));
        let mut text = Vec::new();
        while !text.windows(4).any(|word| word == b"idle") {
            text.extend(from.recv_timeout(WAIT_TIMEOUT).expect("the guest says that it is idle"));
        }
        std::thread::sleep(REST);
        let kept = heap() - before;
        vm.kill();
        kept
    }
}

/// A console that sends what the guest prints.
struct PrintedTo(mpsc::Sender<Vec<u8>>);

impl Write for PrintedTo {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// All figures of a network, and of its peer.
fn compare(what: &str, ours: &Outcome, peer: Option<&Outcome>) {
    let more = |name: &str, unit: &str, of: &dyn Fn(&Outcome) -> f64| {
        let (value, peer) = (of(ours), peer.map(of));
        figure(&format!("{what}: {name}"), value, unit, peer);
    };
    let both = |name: &str, unit: &str, of: &dyn Fn(&Outcome) -> Rate| {
        more(name, unit, &|o| of(o).time);
        more(&format!("{name}, for each second of the host's processor"), unit, &|o| of(o).cpu);
    };
    for (n, (name, _)) in JOBS.iter().enumerate() {
        both(name, "MB/s", &|o| o.transfers[n]);
    }
    both("new connections", "1/s", &|o| o.connections);
    for (name, at) in [("p50", TRIPS / 2), ("p99", TRIPS * 99 / 100)] {
        let (value, peer) = (ours.trips[at], peer.map(|peer| peer.trips[at]));
        figure(&format!("{what}: one byte there and back, {name}"), value, "us", peer);
    }
}

fn main() {
    if let Ok(host) = std::env::var("BENCH_HOST") {
        return guest(host.parse().expect("an address")).expect("the guest's part");
    }
    // cargo says `--bench`.
    let asked: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| asked.is_empty() || asked.iter().any(|word| word == name);
    let bench = Bench::new();
    let ours = (wanted("user") || wanted("passt")).then(|| bench.user());
    if let Some((ours, kept)) = ours.as_ref().filter(|_| wanted("user")) {
        compare("user-mode (QEMU: slirp)", ours, bench.qemu("user", USER, None).as_ref());
        let kept = kept.saturating_sub(bench.heap_without()) as f64 / 1024.0;
        figure("user-mode: heap of an idle network", kept, "KiB", None);
        figure("user-mode: heap of an idle connection", ours.idle / 1024.0, "KiB", None);
    }
    if wanted("tap") {
        let tap = bench.ours(|_| Net::tap(TAP).into(), ON_TAP, None).expect("a tap");
        let netdev = format!("tap,ifname={TAP},script=no,downscript=no,vhost=off");
        compare("tap (QEMU: tap)", &tap, bench.qemu(&netdev, ON_TAP, None).as_ref());
    }
    // Last, as passt now and then waits for seconds, and virtual time is long.
    if let Some((ours, _)) = ours.filter(|_| wanted("passt")) {
        bench.beside_passt(&ours);
    }
}
