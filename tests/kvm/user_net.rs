//! The user-mode network: its latency, and what a policy that is withdrawn stops.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use cofferdam::Net;
use cofferdam::net::{Cidr, Policy, PortForward, Rule};
use cofferdam::process::Stdio;

use crate::fixture::{Outcome, TEST_TIMEOUT, debian_container, host};
use crate::net::host_address;
use crate::{check, check_eq};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const ROUNDS: usize = 120;
/// Connections are hasty at first (quick acknowledgements), so that these tell nothing.
const HASTY: usize = 30;
/// Less than a request waits that meets a delayed acknowledgement (Linux's `TCP_DELACK_MIN` is 40 ms).
const STALL: Duration = Duration::from_millis(30);

/// How much longer than a request in one write (each second one) takes one in two, however slow this machine is: of each the
/// quarter that was faster.
fn excess(times: &[Duration]) -> Result<Duration> {
    let faster = |two: usize| {
        let mut times: Vec<_> = times.iter().enumerate().skip(HASTY).filter(|(n, _)| n % 2 == two).collect();
        times.sort_by_key(|(_, time)| **time);
        times.get(times.len() / 4).map(|(_, time)| **time).ok_or("too few round trips")
    };
    Ok(faster(1)?.saturating_sub(faster(0)?))
}

/// Requests in one write and in two, as HTTP's head and body often are.
fn ask(mut writer: impl Write, mut reader: impl Read) -> Result<Duration> {
    let mut times = Vec::new();
    for n in 0..ROUNDS {
        let begin = Instant::now();
        for part in b"a head, a body. ".chunks(16 >> (n % 2)) {
            writer.write_all(part)?;
        }
        let mut answer = [0; 16];
        reader.read_exact(&mut answer)?;
        check_eq!(&answer, b"a head, a body. ");
        times.push(begin.elapsed());
    }
    excess(&times)
}

/// Gives requests of 16 bytes back, on port 80 of all addresses.
const SERVICE: &str = "use IO::Socket::IP; $| = 1; my $l = IO::Socket::IP->new(LocalHost => '::', LocalPort => 80, Listen => 5, V6Only => 0) or die $@;
    print qq(ready\\n); while (my $c = $l->accept) { while (read $c, my $b, 16) { syswrite $c, $b } }";

/// The same of its own streams, answers in two writes.
const FILTER: &str = "$| = 1; while (read STDIN, my $b, 16) { print substr $b, 0, 8; print substr $b, 8 }";

pub fn network_is_up_at_start_and_round_trips_have_no_delay() -> Outcome {
    host("ip addr replace fd00:c0ff:ee::1/128 dev lo")?;
    let outside = TcpListener::bind("[fd00:c0ff:ee::1]:0")?;
    let policy = Policy::deny_all().rule(Rule::allow_range("fd00:c0ff:ee::1".parse::<Cidr>()?));
    let network = Net::user(policy).publish(PortForward::tcp(([127, 0, 0, 1], 0), 80));
    // From one complete request to the next, there and back again, with whatever the guest's client adds.
    let port = outside.local_addr()?.port();
    let served = std::thread::spawn(move || -> std::result::Result<Vec<Duration>, String> {
        let (mut stream, _) = outside.accept().map_err(|e| e.to_string())?;
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        let (mut times, mut request, mut before) = (Vec::new(), [0; 16], Instant::now());
        while stream.read_exact(&mut request).is_ok() {
            times.push(std::mem::replace(&mut before, Instant::now()).elapsed());
            stream
                .write_all(&request[..8])
                .and_then(|()| stream.write_all(&request[8..]))
                .map_err(|e| e.to_string())?;
        }
        Ok(times)
    });
    let container = debian_container().net(network).start()?;
    // The first thing that it does: an address that is not usable yet would leave this without an answer for two minutes.
    let client = format!(
        "use IO::Socket::IP; use Socket; my $s = IO::Socket::IP->new(PeerHost => 'fd00:c0ff:ee::1', PeerPort => {port}, Timeout => 30) or die $@;
        setsockopt $s, IPPROTO_TCP, TCP_NODELAY, 1; print $s->sockhost;
        for my $n (0 .. {ROUNDS}) {{ $n % 2 ? (syswrite($s, 'a head, '), syswrite($s, 'a body. ')) : syswrite($s, 'a head, a body. ');
            read $s, my $b, 16 or die }}"
    );
    let output = container.exec(["perl", "-e", &client]).timeout(TEST_TIMEOUT).output()?;
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    check!(output.status.success() && text.starts_with("fd63:6f66:6665:"), "{} {text}", output.status);
    let times = served.join().map_err(|_| "the server panicked")??;
    let mut all = vec![("outwards", excess(&times)?)];
    let mut service = container.exec(["perl", "-e", SERVICE]).stdout(Stdio::piped()).spawn()?;
    service.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0; 6])?;
    let stream = container.connect(80)?;
    all.push(("connect", ask(&stream, &stream)?));
    drop(stream);
    let published = *container.vm().net(0)?.published().first().ok_or("one port was published")?;
    let stream = TcpStream::connect(published)?;
    stream.set_nodelay(true)?;
    all.push(("a published port", ask(&stream, &stream)?));
    let mut filter = container.exec(["perl", "-e", FILTER]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (input, output) = (filter.stdin.take().ok_or("no input")?, filter.stdout.take().ok_or("no output")?);
    all.push(("standard streams", ask(input, output)?));
    for (what, time) in &all {
        check!(*time < STALL, "{what}: a second write waits for {time:?}: {all:?}");
    }
    Ok(())
}

/// Datagrams and a connection, both without end, and again when something ends.
const FLOOD: &str = r#"
    use Socket; my ($ip, $udp, $tcp) = @ARGV; my $to = pack_sockaddr_in($udp, inet_aton $ip);
    $SIG{PIPE} = 'IGNORE';
    if (fork) { socket(my $s, PF_INET, SOCK_DGRAM, 0); for (;;) { send $s, 'x' x 100, 0, $to; } }
    for (;;) {
        socket(my $s, PF_INET, SOCK_STREAM, 0); connect $s, pack_sockaddr_in($tcp, inet_aton $ip) or next;
        while (syswrite $s, 'x' x 10_000) { }
    }
"#;

pub fn withdrawn_policy_stops_all_traffic() -> Outcome {
    let ip = host_address()?;
    let (datagrams, listener) = (UdpSocket::bind((ip, 0))?, TcpListener::bind((ip, 0))?);
    let ports = [datagrams.local_addr()?.port(), listener.local_addr()?.port()];
    let allowed = Policy::deny_all().rule(Rule::allow_range(ip.parse::<Cidr>()?));
    let container = debian_container().net(Net::user(allowed.clone())).start()?;
    let net = container.vm().net(0)?;
    let [udp, tcp] = ports.map(|port| port.to_string());
    let _flood = container.exec(["perl", "-e", FLOOD, ip, &udp, &tcp]).spawn()?;
    datagrams.set_read_timeout(Some(TEST_TIMEOUT))?;
    let mut buffer = [0; 65_536];
    for round in 0..2 {
        // Both come.
        let (mut stream, _) = listener.accept()?;
        let read = Arc::new(AtomicU64::new(0));
        let counted = read.clone();
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 65_536];
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => return None,
                    Ok(n) => counted.fetch_add(n as u64, Ordering::Relaxed),
                    Err(error) => return Some(error.kind()),
                };
            }
        });
        datagrams.set_nonblocking(false)?;
        for _ in 0..50 {
            datagrams.recv(&mut buffer)?;
        }
        let begin = Instant::now();
        while read.load(Ordering::Relaxed) < 100_000 {
            check!(begin.elapsed() < TEST_TIMEOUT, "round {round}: the connection carries nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        net.set_policy(Policy::deny_all())?;
        // The loopback delivers as it is sent to: all that has left is in the socket, and ends here.
        datagrams.set_nonblocking(true)?;
        while datagrams.recv(&mut buffer).is_ok() {}
        listener.set_nonblocking(true)?;
        while listener.accept().is_ok() {}
        let before = net.stats()?.denied;
        std::thread::sleep(Duration::from_secs(1));
        check!(datagrams.recv(&mut buffer).is_err(), "round {round}: a datagram came later");
        check!(listener.accept().is_err(), "round {round}: a connection came later");
        // The guest has not become silent, and the connection was cut.
        check!(net.stats()?.denied > before, "round {round}: the guest sends nothing any more");
        check!(reader.is_finished(), "round {round}: the connection is there still");
        check_eq!(reader.join().map_err(|_| "the reader panicked")?, Some(std::io::ErrorKind::ConnectionReset));
        listener.set_nonblocking(false)?;
        net.set_policy(allowed.clone())?;
    }
    Ok(())
}
