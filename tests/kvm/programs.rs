//! Real programs on both sides of a guest's network.
//!
//! `COFFERDAM_SOAK` makes them as long as wanted: seconds of traffic, and short connections by the thousand.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use cofferdam::net::{Cidr, Policy, PortForward, Rule, Switch, UserNet};
use cofferdam::{Container, Net, Process, Size};

use crate::fixture::{Outcome, TEST_TIMEOUT, Temp, cache, host, host_words, network_container, soak, soaking};
use crate::{check, check_eq, gateway};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// In the environment of this program when it shall be ssh's ProxyCommand.
pub const PROXY: &str = "COFFERDAM_TEST_PROXY";

/// A key of ssh's, and its public half.
fn key(temp: &Temp) -> Result<String> {
    let path = temp.path("key");
    host_words(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", &path.to_string_lossy()])?;
    Ok(std::fs::read_to_string(path.with_extension("pub"))?.trim().to_owned())
}

/// Starts sshd for clients with the key, on 127.0.0.1 alone.
fn sshd(key: &str) -> String {
    format!(
        "mkdir -p /run/sshd ~/.ssh; echo {key} > ~/.ssh/authorized_keys; exec /usr/sbin/sshd -D -o ListenAddress=127.0.0.1"
    )
}

/// The options of every client of ssh: the key, and no check of the host's key.
fn client(temp: &Temp) -> Vec<String> {
    let key = format!("IdentityFile={}", temp.path("key").display());
    let options = [
        key.as_str(),
        "IdentitiesOnly=yes",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        // An emulator has instructions for it.
        "Ciphers=aes128-gcm@openssh.com",
    ];
    options.into_iter().flat_map(|option| ["-o".to_owned(), option.to_owned()]).collect()
}

/// A digest of a file of the host's.
fn digest(path: &Path) -> Result<String> {
    let line = host(&format!("sha256sum {}", path.display()))?;
    Ok(line.split(' ').next().unwrap_or_default().to_owned())
}

pub fn ssh_proxy_command_reaches_a_guest_without_network() -> Outcome {
    let temp = Temp::new()?;
    let script = sshd(&key(&temp)?);
    let rootfs = cache().join("images/debian-12-network.tar");
    let this = std::env::current_exe()?;
    let proxy = format!("ProxyCommand={} --rootfs {} -- sh -c '{script}'", this.display(), rootfs.display());
    let mut ssh = Command::new("ssh");
    ssh.args(client(&temp)).args(["-o", &proxy, "root@any-name"]).env(PROXY, "1");
    let mut ssh = ssh.arg("ls /sys/class/net; cat > /copy; sha256sum /copy; exit 7");
    ssh = ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ssh.spawn()?;
    let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n ^ n >> 5) as u8).collect();
    let path = temp.path("bytes");
    std::fs::write(&path, &bytes)?;
    child.stdin.take().ok_or("no input")?.write_all(&bytes)?;
    let output = child.wait_with_output()?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    check!(output.status.code() == Some(7), "{} {text} {errors}", output.status);
    check!(!text.contains("eth") && text.contains(&digest(&path)?), "{text} {errors}");
    Ok(())
}

/// Waits until a program in the container listens there.
fn wait_for(container: &Container, port: u16) -> Outcome {
    let deadline = Instant::now() + TEST_TIMEOUT;
    while let Err(error) = container.connect(port) {
        check!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// What a shell in the container prints, which must succeed.
fn shell(container: &Container, command: &str) -> Result<String> {
    let limit = 2 * TEST_TIMEOUT + Duration::from_secs(soak().unwrap_or(0));
    let output = container.exec(["bash", "-c", command]).timeout(limit).output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned();
    check!(output.status.success(), "{command}: {} {text}", output.status);
    Ok(text)
}

pub fn scp_sftp_and_git_work_through_a_published_port() -> Outcome {
    let temp = Temp::new()?;
    let script = sshd(&key(&temp)?);
    let network = Net::user(Policy::deny_all()).publish(PortForward::tcp(([127, 0, 0, 1], 0), 22));
    let container = network_container().memory(Size::mib(192)).net(network).start()?;
    let _sshd = container.exec(["sh", "-c", &script]).spawn()?;
    wait_for(&container, 22)?;
    let net = container.vm().net(0)?;
    let port = net.published().first().ok_or("nothing was published")?.port().to_string();
    let path = |name: &str| temp.path(name).display().to_string();
    std::fs::File::create(temp.path("sent"))?;
    host(&format!("dd if=/dev/urandom of={} bs=1M count={} status=none", path("sent"), soak().unwrap_or(3)))?;
    std::fs::write(temp.path("batch"), format!("put {} /sftp\nget /scp {}\n", path("sent"), path("came")))?;
    let run = |program: &str, port_flag: &str, rest: &[&str]| -> Result<String> {
        let options = client(&temp);
        let words: Vec<&str> =
            [program, port_flag, &port].into_iter().chain(options.iter().map(String::as_str)).collect();
        host_words(&[&words, rest].concat())
    };
    run("scp", "-P", &["-q", &path("sent"), "root@127.0.0.1:/scp"])?;
    run("sftp", "-P", &["-q", "-b", &path("batch"), "root@127.0.0.1"])?;
    let sent = digest(&temp.path("sent"))?;
    check_eq!(digest(&temp.path("came"))?, sent);
    let inside = run("ssh", "-p", &["root@127.0.0.1", "sha256sum < /scp; sha256sum < /sftp"])?;
    check_eq!(inside.matches(&sent).count(), 2);
    // Of what is cloned git holds much in memory.
    let make = "git init -q /repo && cd /repo && head -c 3145728 /scp > part && git add part && git -c user.name=x -c user.email=x@y commit -qm one";
    shell(&container, make)?;
    let options = client(&temp).join(" ");
    let clone = format!("ssh://root@127.0.0.1:{port}/repo");
    let words = ["git", "-c", &format!("core.sshCommand=ssh {options}"), "clone", "-q", &clone, &path("clone")];
    host_words(&words)?;
    host(&format!("cmp -n 3145728 {} {}", path("sent"), path("clone/part")))?;
    check_eq!(std::fs::metadata(temp.path("clone/part"))?.len(), 3_145_728);
    Ok(())
}

/// Servers in a guest, at an address of the host's that no other test has, so that another guest may call them.
struct Servers {
    container: Container,
    ip: Ipv4Addr,
    /// Of the file that is served.
    digest: String,
    _running: Vec<Process>,
}

/// Files to serve: something large, a repository of git's, and one of apt's with a package.
const FILES: &str = r#"
    set -e; mkdir -p /srv/www /tmp/p/DEBIAN /tmp/p/usr/share /srv/www/apt; cd /srv/www
    head -c "$1" /dev/urandom > big
    git init -q /tmp/work; cd /tmp/work; echo cloned > file; git add file; git -c user.name=x -c user.email=x@y commit -qm one
    git clone -q --bare /tmp/work /srv/www/repo.git; git -C /srv/www/repo.git update-server-info
    printf 'Package: greeting\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n' > /tmp/p/DEBIAN/control
    echo installed > /tmp/p/usr/share/greeting; cd /srv/www/apt; dpkg-deb -b /tmp/p greeting.deb > /dev/null
    (dpkg-deb -f greeting.deb; echo Filename: ./greeting.deb; echo Size: $(stat -c %s greeting.deb)
     echo SHA256: $(sha256sum < greeting.deb | cut -d ' ' -f 1)) > Packages
    chmod -R a+rX /srv; sha256sum < /srv/www/big
"#;

/// A server of websockets that gives back what it gets, and one for names that knows one answer.
const PYTHON: &str = r#"
import asyncio, websockets
class Names(asyncio.DatagramProtocol):
    def connection_made(self, transport): self.transport = transport
    def datagram_received(self, query, caller):
        end = query.index(0, 12) + 5
        answer = query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:end] + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4\xc6\x33\x64\x07"
        self.transport.sendto(answer, caller)
async def echo(socket):
    async for message in socket: await socket.send(message)
async def main():
    await asyncio.get_running_loop().create_datagram_endpoint(Names, ("0.0.0.0", 53))
    async with websockets.serve(echo, "127.0.0.1", 8765, max_size=None): await asyncio.Future()
asyncio.run(main())
"#;

const WEBSOCKET: &str = r#"
import asyncio, time, websockets
async def main():
    end = time.monotonic() + SECONDS
    async with websockets.connect("ws://SERVERS:8765", max_size=None, open_timeout=60) as socket:
        while True:
            for n in (10, 70000, 1000000):
                message = "x" * n
                await socket.send(message)
                assert await socket.recv() == message
            if time.monotonic() >= end: break
            await asyncio.sleep(0.5)
    print("echoed")
asyncio.run(main())
"#;

impl Servers {
    /// Starts those that listen on these TCP ports, with a file of this size among what they serve.
    fn start(listening: &[u16], size: Option<u64>) -> Result<Self> {
        static LAST: AtomicU8 = AtomicU8::new(33);
        let ip = Ipv4Addr::new(192, 0, 2, LAST.fetch_add(1, Ordering::Relaxed) + 1);
        host(&format!("ip addr replace {ip}/32 dev lo"))?;
        let ports = [80, 443, 5201, 8765].map(|port| PortForward::tcp((ip, port), port));
        let ports = ports.into_iter().chain([5201, 53].map(|port| PortForward::udp((ip, port), port)));
        let network = ports.fold(Net::user(Policy::deny_all()), UserNet::publish);
        let container = network_container().memory(Size::mib(384)).net(network).start()?;
        let files = size.map(|size| shell(&container, &format!("set -- {size}; {FILES}"))).transpose()?;
        let programs: [(u16, &[&str]); 3] =
            [(80, &["sh", "-c", gateway::SERVER]), (5201, &["iperf3", "-s"]), (8765, &["python3", "-c", PYTHON])];
        let mut running = Vec::new();
        for (_, program) in programs.into_iter().filter(|(port, _)| listening.contains(port)) {
            running.push(container.exec(program.iter().copied()).env("NAME", "servers.example.test").spawn()?);
        }
        for port in listening {
            wait_for(&container, *port).map_err(|e| format!("port {port}: {e}"))?;
        }
        Ok(Self { container, ip, digest: files.unwrap_or_default(), _running: running })
    }

    /// A guest that may go to these servers and nowhere else.
    fn client(&self) -> Result<Container> {
        let policy = Policy::deny_all().rule(Rule::allow_range(Cidr::new(self.ip.into(), 32)?));
        Ok(network_container().net(Net::user(policy)).start()?)
    }
}

pub fn http_clients_and_git_in_two_guests_work() -> Outcome {
    let servers = Servers::start(&[80, 443], Some(soak().unwrap_or(1).min(16) << 20))?;
    let (client, ip, digest) = (servers.client()?, servers.ip, servers.digest.as_str());
    for get in ["curl -sS http:", "curl -sSk https:", "wget -qO- http:", "wget -qO- --no-check-certificate https:"] {
        let came = shell(&client, &format!("{get}//{ip}/big | sha256sum"));
        check_eq!(came.map_err(|e| format!("{get} {e}"))?, digest);
    }
    let clone = format!("git clone -q http://{ip}/repo.git /tmp/clone && cat /tmp/clone/file");
    check_eq!(shell(&client, &clone)?, "cloned");
    Ok(())
}

pub fn apt_and_dns_in_two_guests_work() -> Outcome {
    let servers = Servers::start(&[80, 8765], Some(1 << 10))?;
    let (client, ip) = (servers.client()?, servers.ip);
    let apt = format!(
        "rm -rf /etc/apt/sources.list.d/*; echo 'deb [trusted=yes] http://{ip}/apt ./' > /etc/apt/sources.list
        apt-get -qq update && apt-get -qq install greeting > /tmp/log 2>&1 || cat /tmp/log; cat /usr/share/greeting"
    );
    check_eq!(shell(&client, &apt)?.lines().last(), Some("installed"));
    check_eq!(shell(&client, &format!("dig +short +timeout=30 @{ip} any.example.test"))?, "198.51.100.7");
    Ok(())
}

pub fn websockets_work_and_other_addresses_are_refused() -> Outcome {
    let servers = Servers::start(&[8765], None)?;
    let (client, ip) = (servers.client()?, servers.ip);
    let seconds = soak().unwrap_or(0).to_string();
    let websocket = WEBSOCKET.replace("SERVERS", &ip.to_string()).replace("SECONDS", &seconds);
    check_eq!(shell(&client, &format!("python3 -c '{websocket}'"))?, "echoed");
    let elsewhere = shell(&client, "curl -sS --max-time 60 http://192.0.2.1/ 2>&1; echo code $?")?;
    check!(elsewhere.contains("code 7"), "{elsewhere}");
    Ok(())
}

pub fn databases_are_reached_by_name_over_a_switch() -> Outcome {
    let (switch, requests) = (Switch::new(), soaking(20_000, 300));
    let on = |name: &str| network_container().memory(Size::mib(384)).net(Net::switch(&switch, name)).start();
    let (data, client) = (on("data")?, on("client")?);
    let redis = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    let _redis = data.exec(redis).stdout(cofferdam::process::Stdio::null()).spawn()?;
    let postgres = "cd /etc/postgresql/*/main && echo \"listen_addresses = '*'\" >> postgresql.conf && \
                    echo 'host all all all trust' >> pg_hba.conf && pg_ctlcluster $(basename $(dirname $PWD)) main start";
    shell(&data, postgres)?;
    [6379, 5432].into_iter().try_for_each(|port| wait_for(&data, port))?;
    let report = shell(&client, &format!("redis-benchmark -h data -n {requests} -c 10 -q -t set,get"))?;
    check_eq!(report.matches("requests per second").count(), 2);
    let sql = format!("create table t as select generate_series(1, {requests}) n; select sum(n) from t");
    let sum = shell(&client, &format!("psql -h data -U postgres -Atqc '{sql}'"))?;
    check_eq!(sum, (requests * (requests + 1) / 2).to_string());
    Ok(())
}

pub fn iperf3_runs_in_all_modes() -> Outcome {
    let servers = Servers::start(&[5201], None)?;
    let (client, ip, seconds) = (servers.client()?, servers.ip, soak().unwrap_or(1));
    for how in ["", "-R", "-P 8", "-u -b 5M -l 1200", "-u -R -b 5M -l 1200"] {
        let end = if how.contains("-P") { "SUM.*receiver" } else { "receiver" };
        let line =
            shell(&client, &format!("iperf3 -c {ip} -t {seconds} -f m {how} 2>&1 | tee /dev/stderr | grep '{end}'"));
        let text = line.map_err(|e| format!("iperf3 {how}: {e}"))?;
        let line = text.lines().next().unwrap_or_default();
        // "[  5]   0.00-1.04   sec  5.00 MBytes  42.0 Mbits/sec ... receiver"
        let words: Vec<&str> = line.split_whitespace().collect();
        let rate =
            words.iter().position(|word| *word == "Mbits/sec").and_then(|n| words.get(n - 1)?.parse::<f64>().ok());
        check!(rate.is_some_and(|rate| rate > 0.1), "iperf3 {how}: {text}");
        writeln!(std::io::stderr(), "iperf3 {how}: {line}")?;
    }
    Ok(())
}

pub fn hundred_concurrent_short_connections_are_served() -> Outcome {
    let servers = Servers::start(&[80], None)?;
    let (all, at) = (soak().map_or(200, |n| n * 1000), SocketAddr::from((servers.ip, 80)));
    let get = move || -> std::io::Result<()> {
        let mut stream = TcpStream::connect(at)?;
        stream.set_read_timeout(Some(TEST_TIMEOUT))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let served = text.ends_with("I am servers.example.test\n");
        if served { Ok(()) } else { Err(std::io::Error::other(text)) }
    };
    let begin = Instant::now();
    let threads: Vec<_> =
        (0..100).map(|_| std::thread::spawn(move || (0..all / 100).try_for_each(|_| get()))).collect();
    for thread in threads {
        thread.join().map_err(|_| "a caller panicked")??;
    }
    let stats = servers.container.vm().net(0)?.stats()?;
    writeln!(std::io::stderr(), "{all} short connections in {:?}: {stats:?}", begin.elapsed())?;
    check!(stats.connected >= all && stats.limited == 0, "{stats:?}");
    Ok(())
}
