//! Connections to services in containers, without any network.

use std::io::{BufRead, BufReader, ErrorKind as IoKind, Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use cofferdam::net::Policy;
use cofferdam::process::Stdio;
use cofferdam::{Container, ErrorKind, Net, Process};

use crate::fixture::{Outcome, TEST_TIMEOUT, container, debian_container, soaking};
use crate::{check, check_eq};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Servers of all kinds: an address, a port, what to do with callers.
const SERVER: &str = r#"
    use IO::Socket::IP; use Socket; $| = 1; my ($address, $port, $what) = @ARGV; my @held;
    my $listener = IO::Socket::IP->new(LocalHost => $address, LocalPort => $port, Listen => 1024, ReuseAddr => 1) or die $@;
    print "ready\n";
    while (my $caller = $listener->accept) {
        if ($what eq 'echo') {
            while (sysread($caller, my $bytes, 65536)) {
                for (my $at = 0; $at < length $bytes;) { $at += syswrite($caller, $bytes, length($bytes) - $at, $at) || last; }
            }
        } elsif ($what eq 'count') { local $/; my $all = <$caller>; print $caller length $all; }
        elsif ($what eq 'greet') { syswrite $caller, 'hello'; shutdown $caller, 1; local $/; my $all = <$caller>; print "$all\n"; }
        elsif ($what eq 'reset') {
            sysread $caller, my $bytes, 3; syswrite $caller, 'partial';
            setsockopt $caller, SOL_SOCKET, SO_LINGER, pack 'ii', 1, 0;
        } else { push @held, $caller; next; }
        close $caller;
    }
"#;

/// A server that listens, and what it prints from then on.
fn serve(container: &Container, address: &str, port: u16, what: &str) -> Result<(Process, impl BufRead + use<>)> {
    let port = port.to_string();
    let server = container.exec(["perl", "-e", SERVER, address, &port, what]).stdout(Stdio::piped());
    let mut server = server.stderr(Stdio::piped()).spawn()?;
    let mut printed = BufReader::new(server.stdout.take().ok_or("no output")?);
    let mut line = String::new();
    printed.read_line(&mut line)?;
    check!(line == "ready\n", "{address}: {:?}", std::io::read_to_string(server.stderr.take().ok_or("no errors")?));
    Ok((server, printed))
}

/// Descriptors of this process.
fn descriptors() -> Result<usize> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count())
}

pub fn connects_to_services_on_any_guest_address() -> Outcome {
    let alone = container()?;
    let with_card = debian_container().net(Net::user(Policy::deny_all())).start()?;
    let places =
        [(&alone, "127.0.0.1"), (&alone, "::1"), (&alone, "0.0.0.0"), (&with_card, "10.0.2.15"), (&with_card, "::")];
    for (port, (container, address)) in (80..).zip(places) {
        let error = container.connect(port).map(drop).expect_err("no service listens yet");
        check!(error.kind() == ErrorKind::NotFound, "{error}");
        check!(
            error.to_string().contains(&format!("port {port} of the container: no service listens there")),
            "{error}"
        );
        let _server = serve(container, address, port, "echo")?;
        let mut stream = container.connect(port).map_err(|e| format!("{address}: {e}"))?;
        stream.write_all(address.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        check_eq!(std::io::read_to_string(stream)?, address);
    }
    check_eq!(alone.connect(0).map(drop).map_err(|e| e.kind()), Err(ErrorKind::InvalidConfig));
    alone.kill();
    alone.wait();
    check_eq!(alone.connect(80).map(drop).map_err(|e| e.kind()), Err(ErrorKind::InvalidState));
    Ok(())
}

pub fn connects_as_soon_as_a_service_listens() -> Outcome {
    let container = container()?;
    let none = container.connect_within(80, Duration::from_millis(300)).map(drop).expect_err("no service listens");
    check!(none.kind() == ErrorKind::TimedOut && none.to_string().contains("port 80"), "{none}");
    let late = ["sh", "-c", "sleep 1; exec perl -e \"$0\" 127.0.0.1 80 echo", SERVER];
    let _server = container.exec(late).spawn()?;
    let mut stream = container.connect_within(80, TEST_TIMEOUT)?;
    stream.write_all(b"late")?;
    stream.shutdown(Shutdown::Write)?;
    check_eq!(std::io::read_to_string(stream)?, "late");
    // One that ends meanwhile is not waited for.
    let other = container.clone();
    let waiting = std::thread::spawn(move || other.connect_within(81, 10 * TEST_TIMEOUT).map(drop));
    std::thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    container.kill();
    let ended = waiting.join().map_err(|_| "the caller panicked")?;
    check_eq!(ended.map_err(|error| error.kind()), Err(ErrorKind::InvalidState));
    check!(begin.elapsed() < TEST_TIMEOUT, "{:?}", begin.elapsed());
    Ok(())
}

pub fn each_direction_shuts_down_independently() -> Outcome {
    let container = container()?;
    let _count = serve(&container, "127.0.0.1", 80, "count")?;
    let mut stream = container.connect(80)?;
    stream.write_all(&[7; 100_000])?;
    stream.shutdown(Shutdown::Write)?;
    check_eq!(std::io::read_to_string(stream)?, "100000");
    let (_greet, mut printed) = serve(&container, "127.0.0.1", 81, "greet")?;
    let mut stream = container.connect(81)?;
    let mut greeting = String::new();
    stream.read_to_string(&mut greeting)?;
    stream.write_all(b"still here\n")?;
    drop(stream);
    let mut line = String::new();
    printed.read_line(&mut line)?;
    check_eq!((greeting.as_str(), line.as_str()), ("hello", "still here\n"));
    Ok(())
}

pub fn resets_and_the_end_of_the_container_are_reported() -> Outcome {
    let container = container()?;
    let _reset = serve(&container, "127.0.0.1", 80, "reset")?;
    let mut stream = container.connect(80)?;
    stream.write_all(b"GET")?;
    let mut all = Vec::new();
    let error = stream.read_to_end(&mut all).expect_err("it was reset");
    check!(error.kind() == IoKind::ConnectionReset && b"partial".starts_with(&all), "{error} {all:?}");
    let _hold = serve(&container, "127.0.0.1", 81, "hold")?;
    let mut stream = container.connect(81)?;
    container.kill();
    check_eq!(stream.read(&mut [0]).map_err(|e| e.kind()), Err(IoKind::ConnectionReset));
    Ok(())
}

pub fn slow_reader_blocks_the_writer_without_losing_data() -> Outcome {
    const LEN: usize = 6_000_000;
    let container = container()?;
    // The guest's kernel would take some megabytes by itself.
    let small = "cd /proc/sys/net/ipv4; for n in tcp_rmem tcp_wmem; do echo 4096 65536 131072 > $n; done";
    check!(container.exec(["sh", "-c", small]).timeout(TEST_TIMEOUT).status()?.success());
    let _echo = serve(&container, "127.0.0.1", 80, "echo")?;
    let stream = container.connect(80)?;
    let sent: Vec<u8> = (0..LEN as u32).map(|n| (n ^ n >> 9) as u8).collect();
    let (mut writing, expected) = (stream.try_clone()?, sent.clone());
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent)?;
        writing.shutdown(Shutdown::Write).map_err(std::io::Error::other)
    });
    // The service does not read yet, so the buffers between host and service fill up and the writer blocks.
    std::thread::sleep(Duration::from_millis(700));
    check!(!writer.is_finished(), "6 MB went somewhere");
    let (mut reading, mut came) = (stream, Vec::new());
    reading.read_to_end(&mut came)?;
    writer.join().map_err(|_| "the writer panicked")??;
    check!(came == expected, "{} bytes came, and not the right ones", came.len());
    Ok(())
}

pub fn sequential_connections_leak_nothing() -> Outcome {
    if !crate::fixture::alone("connect::sequential_connections_leak_nothing")? {
        return Ok(());
    }
    let count = soaking(3000, 100);
    let container = container()?;
    let _echo = serve(&container, "127.0.0.1", 80, "echo")?;
    let left = || -> Result<(usize, String)> {
        // All sockets, of vsock too.
        let command = "head -n 1 /proc/net/sockstat | cut -d ' ' -f 3";
        let output = container.exec(["sh", "-c", command]).timeout(TEST_TIMEOUT).output()?;
        Ok((descriptors()?, String::from_utf8_lossy(&output.stdout).into_owned()))
    };
    let once = || -> Result<()> {
        let mut stream = container.connect(80)?;
        stream.write_all(b"ping")?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        check_eq!(&answer, b"ping");
        Ok(())
    };
    for _ in 0..20 {
        once()?;
    }
    let (before, begin) = (left()?, Instant::now());
    for n in 0..count {
        once().map_err(|e| format!("connection {n}: {e}"))?;
    }
    let each = begin.elapsed().as_micros() / u128::from(count);
    let deadline = Instant::now() + TEST_TIMEOUT;
    // The last ones are still being closed.
    let number = |text: &str| text.trim().parse::<usize>().map_err(|_| format!("no number: {text}"));
    let most = (before.0 + 2, number(&before.1)? + 4);
    let mut after = left()?;
    while (after.0 > most.0 || number(&after.1)? > most.1) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        after = left()?;
    }
    writeln!(std::io::stderr(), "connect: {count} one after the other, {each} µs each, {before:?} and then {after:?}")?;
    check!(after.0 <= most.0 && number(&after.1)? <= most.1, "{before:?} has become {after:?}");
    Ok(())
}

pub fn concurrent_connections_are_limited() -> Outcome {
    let container = container()?;
    let _hold = serve(&container, "127.0.0.1", 80, "hold")?;
    let mut held = Vec::new();
    let error = loop {
        match container.connect(80) {
            Ok(stream) => held.push(stream),
            Err(error) => break error,
        }
        check!(held.len() <= 512, "there is no bound");
    };
    check_eq!((error.kind(), held.len()), (ErrorKind::ResourceExhausted, 512));
    // Programs are started all the same.
    check!(container.exec(["true"]).timeout(TEST_TIMEOUT).status()?.success());
    drop(held);
    let deadline = Instant::now() + TEST_TIMEOUT;
    while let Err(error) = container.connect(80) {
        check!(error.kind() == ErrorKind::ResourceExhausted && Instant::now() < deadline, "{error}");
    }
    let stopped = Instant::now();
    container.stop(Duration::from_secs(5))?;
    check!(stopped.elapsed() < Duration::from_secs(20), "open connections hold the end up: {:?}", stopped.elapsed());
    Ok(())
}
