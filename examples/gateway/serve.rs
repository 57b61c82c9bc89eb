//! The listener: reads whom a connection is for, within bounds, and passes it on to that guest.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use cofferdam::ErrorKind;
use cofferdam::vsock::VsockStream;

use super::guests::{Guest, Guests, Visit};
use super::head::{Found, Kind, MAX_HEAD};

/// What callers may take.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Connections at once; more are closed. Each holds two threads and, until it is known whom it is for, 16 KiB.
    pub(crate) connections: usize,
    /// Until the head of a connection is there.
    pub(crate) head: Duration,
    /// Until the guest's server listens.
    pub(crate) server: Duration,
    /// A connection on which nothing moves is closed after this.
    pub(crate) idle_connection: Duration,
    /// A guest without connections is stopped after this.
    pub(crate) idle_guest: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            head: Duration::from_secs(10),
            server: Duration::from_secs(30),
            idle_connection: Duration::from_secs(300),
            idle_guest: Duration::from_secs(60),
        }
    }
}

/// Serves for ever.
pub(crate) fn run(listener: &TcpListener, guests: &Arc<Guests>, limits: &Limits) -> io::Result<()> {
    let janitor = Arc::downgrade(guests);
    let pause = (limits.idle_guest / 4).clamp(Duration::from_millis(50), Duration::from_secs(5));
    thread::Builder::new().name("janitor".into()).spawn(move || {
        while let Some(guests) = janitor.upgrade() {
            guests.stop_idle();
            drop(guests);
            thread::sleep(pause);
        }
    })?;
    let open = Arc::new(());
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            // No descriptors now, or gone again already.
            Err(_) => {
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if Arc::strong_count(&open) > limits.connections {
            continue;
        }
        let (one, guests, limits) = (open.clone(), guests.clone(), limits.clone());
        let served = thread::Builder::new().name("caller".into()).spawn(move || {
            // A caller may close its connection at any time; the gateway has not failed then.
            let _ = serve(stream, &guests, &limits);
            drop(one);
        });
        if let Err(error) = served {
            eprintln!("gateway: no thread for a caller: {error}");
        }
    }
    Ok(())
}

fn serve(mut caller: TcpStream, guests: &Guests, limits: &Limits) -> io::Result<()> {
    caller.set_nodelay(true)?;
    caller.set_write_timeout(Some(limits.idle_connection))?;
    let (kind, found, head) = read_head(&mut caller, Instant::now() + limits.head)?;
    let name = match found {
        Found::Name(name) => name,
        Found::More => return refuse(&mut caller, kind, Refusal::Slow),
        Found::Unnamed | Found::Bad => return refuse(&mut caller, kind, Refusal::Bad),
    };
    let Some(visit) = guests.visit(&name) else { return refuse(&mut caller, kind, Refusal::Unknown) };
    let port = if kind == Kind::Tls { 443 } else { 80 };
    let opened = visit.map_err(Into::into).and_then(|visit| Ok((connect(&visit.guest, port, limits.server)?, visit)));
    let (mut stream, visit): (VsockStream, Visit) = match opened as Result<_, Failure> {
        Ok(opened) => opened,
        Err(error) => {
            eprintln!("gateway: {name}: {error}");
            return refuse(&mut caller, kind, Refusal::Down);
        }
    };
    stream.write_all(&head)?;
    relay(&caller, &stream, limits.idle_connection)?;
    drop(visit);
    Ok(())
}

/// Reads until it is known whom it is for, or that it never will be.
fn read_head(caller: &mut TcpStream, deadline: Instant) -> io::Result<(Kind, Found, Vec<u8>)> {
    let (mut head, mut buffer) = (Vec::new(), [0; 4096]);
    let mut kind = Kind::Http;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok((kind, Found::More, head));
        }
        caller.set_read_timeout(Some(left))?;
        let room = buffer.len().min(MAX_HEAD - head.len());
        match caller.read(&mut buffer[..room]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => head.extend_from_slice(&buffer[..n]),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
            Err(e) => return Err(e),
        }
        kind = Kind::of(head[0]);
        let found = kind.find(&head);
        if found != Found::More {
            return Ok((kind, found, head));
        }
    }
}

type Failure = Box<dyn std::error::Error>;

/// Connects as soon as the guest's server listens.
fn connect(guest: &Guest, port: u16, timeout: Duration) -> Result<VsockStream, Failure> {
    let deadline = Instant::now() + timeout;
    loop {
        match guest.container.connect(port) {
            Err(error) if error.kind() == ErrorKind::NotFound && Instant::now() < deadline => {
                if let Some(status) = guest.server.try_wait()? {
                    return Err(format!("its server has ended: {status}").into());
                }
                thread::sleep(Duration::from_millis(20));
            }
            outcome => return Ok(outcome?),
        }
    }
}

/// Why a caller is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Bad,
    Slow,
    Unknown,
    Down,
}

fn refuse(caller: &mut TcpStream, kind: Kind, why: Refusal) -> io::Result<()> {
    if kind == Kind::Tls {
        // RFC 8446, 6: decode_error, unrecognized_name, internal_error, and user_canceled for one who never said it all.
        let alert = match why {
            Refusal::Bad => 50,
            Refusal::Slow => 90,
            Refusal::Unknown => 112,
            Refusal::Down => 80,
        };
        caller.write_all(&[21, 3, 3, 0, 2, 2, alert])?;
    } else {
        let status = match why {
            Refusal::Bad => "400 Bad Request",
            Refusal::Slow => "408 Request Timeout",
            Refusal::Unknown => "404 Not Found",
            Refusal::Down => "503 Service Unavailable",
        };
        write!(caller, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
    }
    // What was not read would turn the end into a reset, which may overtake the answer.
    caller.shutdown(Shutdown::Write)?;
    caller.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut rest = [0; 4096];
    for _ in 0..16 {
        if caller.read(&mut rest)? == 0 {
            break;
        }
    }
    Ok(())
}

/// Passes on what both say, until both have ended or nothing has moved for too long.
fn relay(caller: &TcpStream, guest: &VsockStream, idle: Duration) -> io::Result<()> {
    caller.set_read_timeout(Some(idle))?;
    guest.set_read_timeout(Some(idle)).and_then(|()| guest.set_write_timeout(Some(idle))).map_err(io::Error::other)?;
    let moved = Mutex::new(Instant::now());
    let quiet = || moved.lock().is_ok_and(|at| at.elapsed() >= idle);
    let give_up = || {
        let _ = caller.shutdown(Shutdown::Both);
        let _ = guest.shutdown(Shutdown::Both);
    };
    let stamp = || moved.lock().map(|mut at| *at = Instant::now()).unwrap_or_default();
    thread::scope(|scope| {
        scope.spawn(|| match pass_on(caller, guest, &quiet, &stamp) {
            Ok(()) => drop(guest.shutdown(Shutdown::Write)),
            Err(_) => give_up(),
        });
        match pass_on(guest, caller, &quiet, &stamp) {
            Ok(()) => drop(caller.shutdown(Shutdown::Write)),
            Err(_) => give_up(),
        }
    });
    Ok(())
}

fn pass_on(mut from: impl Read, mut to: impl Write, quiet: &impl Fn() -> bool, stamp: &impl Fn()) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            // The other direction may be the one that moves.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && !quiet() => continue,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        to.write_all(&buffer[..n])?;
        stamp();
    }
}
