//! One table of calls: whatever the public handles offer, of a guest that is mute, that babbles, and whose devices' loop is busy.

mod hang;
mod list;
mod watch;

use std::collections::BTreeSet;
use std::error::Error;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cofferdam::disk::{DiskHandle, DiskLimit};
use cofferdam::event::DeviceId;
use cofferdam::files::{CopyIn, CopyOut, Files};
use cofferdam::net::{Capture, Cidr, ConnectionLimit, NetHandle, NetLimit, Policy, PortForward, Rule, Switch};
use cofferdam::process::{ExitStatus, Stdio};
use cofferdam::tokio::Async;
use cofferdam::vsock::VsockStream;
use cofferdam::{Console, Container, ErrorKind, Exit, Net, Process, Size};

use self::hang::{Hang, OpenAtEnd, Stuck};
use self::watch::{Answer, Callers, Watch, lock, slack};
use crate::fixture::{Outcome, TEST_TIMEOUT, debian_container, guest};
use crate::{check, check_eq};

const SECOND: Duration = Duration::from_secs(1);
/// How long what runs in the guest may run, from before the guest is disturbed.
const TIME: Duration = Duration::from_secs(10);

/// Why a call may have to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Guest {
    /// It is paused, and says nothing.
    Mute,
    /// It floods: connections, its network, its console and its disk at once.
    Babbling,
    /// The loop that owns its devices hangs in a network backend of the embedder's, and so do the embedder's writers.
    Busy,
}

/// What the guest still did before it was disturbed.
struct Begun {
    timed: Process,
    awaited: Process,
    printing: Process,
    killed: Process,
    signaled: Process,
    input: VsockStream,
    output: VsockStream,
}

fn begin(container: &Container, watch: &Watch) -> Result<Begun, Box<dyn Error>> {
    let sleeper = || container.exec(["sleep", "1000"]);
    let mut cat = container.exec(["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (input, output) = (cat.stdin.take().ok_or("no input")?, cat.stdout.take().ok_or("no output")?);
    Ok(Begun {
        killed: sleeper().spawn()?,
        signaled: sleeper().pty(24, 80).stdin(Stdio::null()).stdout(Stdio::null()).spawn()?,
        input: watch.at_once("ProcessWriter::into_stream", || input.into_stream()),
        output: watch.at_once("ProcessReader::into_stream", || output.into_stream()),
        printing: sleeper().stdout(Stdio::piped()).timeout(TIME).spawn()?,
        timed: sleeper().timeout(TIME).spawn()?,
        awaited: sleeper().timeout(TIME).spawn()?,
    })
}

/// Programs that make the guest say too much.
fn babble(container: &Container) -> Result<Vec<Process>, Box<dyn Error>> {
    let storm = "for (;;) { for my $port (1024 .. 1100) { socket(my $s, 40, 1, 0) or next;
        connect($s, pack('SSLLx4', 40, 0, $port, 2)) and syswrite($s, 'x' x 4000); } }";
    let datagrams = "socket(my $s, 2, 2, 0); my $to = pack('SnC4x8', 2, 9, 10, 0, 2, 2);
        for (;;) { send($s, 'x' x 1000, 0, $to); }";
    let programs = [
        vec!["perl", "-e", storm],
        vec!["perl", "-e", datagrams],
        vec!["sh", "-c", "while :; do yes; done > /dev/hvc0"],
        vec!["sh", "-c", "while :; do dd if=/dev/zero of=/junk bs=1M count=16 conv=fsync; done"],
    ];
    Ok(programs.into_iter().map(|program| container.exec(program).spawn()).collect::<cofferdam::Result<_>>()?)
}

/// Where the loop hangs, a call to it fails with `TimedOut`; elsewhere it returns what was asked for.
fn fine<T>(guest: Guest, answer: cofferdam::Result<T>) -> Answer {
    match answer {
        Ok(_) => Ok(()),
        Err(error) if guest == Guest::Busy && error.kind() == ErrorKind::TimedOut => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits for a future on a runtime of its own.
fn block_on<T>(future: impl Future<Output = T>) -> io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(future))
}

/// No program listens at the port. Only a guest that answers can refuse the connection; other calls time out.
fn silent(guest: Guest, connected: cofferdam::Result<VsockStream>) -> Answer {
    let kind = connected.err().map(|error| error.kind());
    check!(kind.is_some() && (guest == Guest::Babbling || kind == Some(ErrorKind::TimedOut)), "{kind:?}");
    Ok(())
}

fn drive(guest: Guest) -> Outcome {
    let watch = Arc::new(Watch::default());
    let hang = Hang::default();
    let _open = OpenAtEnd(hang.clone());
    let switch = Switch::new();
    let allowed = Policy::deny_all().rule(Rule::allow_range("127.0.0.0/8".parse::<Cidr>()?));
    let outside = Net::user(allowed.clone()).capture(Capture::writer(Stuck(hang.clone())));
    let builder = debian_container().net(outside).net(Net::switch(&switch, "one")).net(hang.net());
    let container = builder.console(Console::writer(Stuck(hang.clone()))).start()?;
    let (disk, net) = (container.vm().disk(1)?, container.vm().net(0)?);
    let capacity = disk.usage()?.capacity;
    let port = net.publish(PortForward::tcp(([127, 0, 0, 1], 0), 80))?;
    let listen = |port| container.vm().listen_vsock(port);
    let listeners = [listen(9996)?, listen(9998)?, listen(9999)?];
    let events = [container.vm().events()?, container.vm().events()?, container.vm().events()?];
    let Begun { mut timed, mut awaited, printing, killed, signaled, mut input, mut output } =
        begin(&container, &watch)?;
    let opened = container.files().open("/etc/passwd")?;
    let mut noise = Vec::new();
    match guest {
        Guest::Mute => container.vm().pause()?,
        Guest::Babbling => noise = babble(&container)?,
        Guest::Busy => hang.close()?,
    }
    // How long the host alone may be busy.
    let host = if guest == Guest::Mute { SECOND } else { 10 * SECOND };
    // `Exec` asks more than once, for what the loop has to do with it.
    let piped = if guest == Guest::Busy { 10 * SECOND } else { Duration::ZERO };
    let mut until_end = Callers::new(&watch);
    let ended = Arc::new(Mutex::new(None::<Instant>));
    let mut callers = Callers::new(&watch);
    macro_rules! with {
        ($callers:ident, $what:literal, |$watch:ident, $vm:ident| $calls:expr) => {
            let container = container.clone();
            $callers.spawn($what, move |$watch| {
                let $vm = container.vm();
                $calls
            });
        };
    }

    // What waits for the machine's end is asked first, and comes back last.
    let [awaiting, accepting, accepted] = listeners;
    let [awaited_events, all_events, events] = events;
    let at_end = ended.clone();
    let reported_end = move |watch: &Watch, name: &'static str| {
        let end = *lock(&at_end);
        lock(&watch.made).insert(name);
        match end {
            Some(end) => watch.took(name, end.elapsed(), SECOND),
            None => lock(&watch.wrong).push(format!("{name} came back before the end")),
        }
    };
    let tell = reported_end.clone();
    let mut acceptor = Callers::new(&watch);
    acceptor.spawn("accept", move |watch| {
        let accepted = accepting.accept();
        tell(watch, "VsockListener::accept");
        check!(accepted.as_ref().is_err_and(|e| e.kind() == ErrorKind::InvalidState), "{accepted:?}");
        Ok(())
    });
    let tell = reported_end.clone();
    acceptor.spawn("accept on a runtime", move |watch| {
        let accepted = block_on(async { Async::new(awaiting)?.accept().await })?;
        tell(watch, "Async::accept");
        check!(accepted.as_ref().is_err_and(|e| e.kind() == ErrorKind::InvalidState), "{accepted:?}");
        Ok(())
    });
    let tell = reported_end.clone();
    until_end.spawn("events on a runtime", move |watch| {
        block_on(async {
            let events = watch.at_once("Async::new", || Async::new(awaited_events))?;
            while events.next().await?.is_some() {}
            tell(watch, "Async::next");
            check!(watch.at_once("Async::get_ref", || events.get_ref()).try_next().is_none());
            watch.at_once("Async::into_inner", || events.into_inner())?;
            Ok(())
        })?
    });
    let tell = reported_end.clone();
    with!(until_end, "Vm::wait_async", |watch, vm| {
        block_on(vm.wait_async())??;
        tell(watch, "Vm::wait_async");
        Ok(())
    });
    let tell = reported_end.clone();
    let waiting = container.clone();
    until_end.spawn("Container::wait_async", move |watch| {
        block_on(waiting.wait_async())??;
        tell(watch, "Container::wait_async");
        Ok(())
    });
    let tell = reported_end.clone();
    with!(until_end, "Vm::wait", |watch, vm| {
        vm.wait();
        tell(watch, "Vm::wait");
        Ok(())
    });
    let tell = reported_end.clone();
    let waiting = container.clone();
    until_end.spawn("Container::wait", move |watch| {
        waiting.wait();
        tell(watch, "Container::wait");
        Ok(())
    });
    until_end.spawn("events", move |_| {
        check!(all_events.last().is_some());
        Ok(())
    });

    // What does not wait.
    let (itself, its_net, its_switch) = (container.clone(), net.clone(), switch.clone());
    callers.spawn("what does not wait", move |watch| {
        let vm = watch.at_once("Container::vm", || itself.vm());
        watch.at_once("Container::startup", || itself.startup());
        watch.at_once("Container::exec", || drop(itself.exec(["true"])));
        watch.at_once("Container::command", || drop(itself.command()));
        watch.at_once("Container::stats", || itself.stats());
        watch.at_once("Container::report", || itself.report());
        watch.at_once("Container::labels", || itself.labels().len());
        watch.at_once("Container::timeline", || itself.timeline());
        watch.at_once("Container::events", || itself.events())?;
        check!(watch.at_once("Container::disk", || itself.disk(0)).is_err(), "it was given none");
        check_eq!(watch.at_once("NetHandle::id", || itself.net(0).map(|net| net.id()))?, DeviceId::Net(0));
        watch.at_once("Container::net", || itself.net(0))?;
        check!(watch.at_once("Container::try_wait", || itself.try_wait()).is_none());
        watch.at_once("Vm::stats", || vm.stats());
        watch.at_once("Vm::report", || vm.report());
        watch.at_once("Vm::timeline", || vm.timeline());
        watch.at_once("Vm::events", || vm.events())?;
        let layer = watch.at_once("Vm::disk", || vm.disk(1))?;
        check_eq!(watch.at_once("DiskHandle::id", || layer.id()), DeviceId::Disk(1));
        watch.at_once("Vm::net", || vm.net(0))?;
        check!(watch.at_once("Vm::try_wait", || vm.try_wait()).is_none());
        check!(watch.at_once("Events::try_next", || events.try_next()).is_some());
        check_eq!(watch.at_once("Switch::names", || its_switch.names()), ["one"]);
        check!(watch.at_once("Switch::address", || its_switch.address("one")).is_some());
        check!(watch.at_once("NetHandle::published", || its_net.published().is_empty()));
        check!(watch.at_once("NetHandle::capture_stats", || its_net.capture_stats()).is_some());
        // Of those there are, as many as it likes to tell.
        while events.try_next().is_some() {}
        watch.call("Events::next_timeout", SECOND, || events.next_timeout(SECOND));
        check!(watch.call("Vm::wait_timeout", SECOND, || vm.wait_timeout(SECOND)).is_none());
        check!(watch.call("Container::wait_timeout", SECOND, || itself.wait_timeout(SECOND)).is_none());
        Ok(())
    });

    // Programs.
    let itself = container.clone();
    callers.spawn("output", move |watch| {
        let exec = itself.exec(["echo", "x"]).timeout(SECOND);
        match watch.call("Exec::output", 5 * SECOND + piped, || exec.output()) {
            Ok(output) => check!(
                matches!(output.status, ExitStatus::TimedOut) || guest == Guest::Babbling && output.stdout == b"x\n",
                "{output:?}"
            ),
            error => fine(guest, error)?,
        }
        Ok(())
    });
    let itself = container.clone();
    callers.spawn("status", move |watch| {
        let exec = itself.exec(["sleep", "1000"]).timeout(SECOND);
        let status = watch.call("Exec::status", 5 * SECOND, || exec.status())?;
        check!(matches!(status, ExitStatus::TimedOut), "{status}");
        Ok(())
    });
    let itself = container.clone();
    callers.spawn("spawn", move |watch| {
        let exec = itself.exec(["sleep", "1000"]).timeout(SECOND);
        watch.call("Exec::spawn", 3 * SECOND, || exec.spawn())?;
        Ok(())
    });
    callers.spawn("wait", move |watch| {
        check!(watch.at_once("Process::try_wait", || timed.try_wait())?.is_none());
        watch.at_once("Process::oom_kills", || timed.oom_kills());
        let status = watch.call("Process::wait", TIME + 4 * SECOND, || timed.wait())?;
        check!(matches!(status, ExitStatus::TimedOut), "{status}");
        Ok(())
    });
    callers.spawn("wait on a runtime", move |watch| {
        let status = watch.call("Process::wait_async", TIME + 2 * SECOND, || block_on(awaited.wait_async()))??;
        check!(matches!(status, ExitStatus::TimedOut), "{status}");
        Ok(())
    });
    callers.spawn("wait_with_output", move |watch| {
        let bound = TIME + 14 * SECOND;
        let output = watch.call("Process::wait_with_output", bound, || printing.wait_with_output())?;
        check!(matches!(output.status, ExitStatus::TimedOut), "{output:?}");
        Ok(())
    });
    callers.spawn("kill", move |watch| {
        watch.call("Process::kill", host, || killed.kill())?;
        let status = watch.call("Process::wait_timeout", 2 * SECOND, || killed.wait_timeout(TEST_TIMEOUT))?;
        check_eq!(status.and_then(|status| status.signal()), Some(9));
        Ok(())
    });
    callers.spawn("signal", move |watch| {
        watch.call("Process::resize", host, || signaled.resize(30, 100))?;
        Ok(watch.call("Process::signal", host, || signaled.signal(15))?)
    });

    // Connections.
    let itself = container.clone();
    callers.spawn("connect", move |watch| {
        let connected = watch.call("Container::connect", 20 * SECOND + host / 10, || itself.connect(80));
        silent(guest, connected)
    });
    let itself = container.clone();
    callers.spawn("connect_within", move |watch| {
        let connected =
            watch.call("Container::connect_within", 21 * SECOND + host / 10, || itself.connect_within(80, SECOND));
        silent(guest, connected)
    });
    with!(callers, "Vm::connect_vsock", |watch, vm| {
        let connected = watch.call("Vm::connect_vsock", 10 * SECOND + host, || vm.connect_vsock(80));
        silent(guest, connected)
    });
    let files = watch.at_once("Container::files", || container.files()).timeout(2 * SECOND);
    let out = std::env::temp_dir().join(format!("cofferdam-calls-{}", std::process::id()));
    let copy_in = watch.at_once("Files::copy_in", || files.copy_in("/proc/self/comm", "/tmp/comm"));
    let copy_out = watch.at_once("Files::copy_out", || files.copy_out("/etc/passwd", &out));
    watch.at_once("FileReader::metadata", || opened.metadata().size);
    drop(opened);
    macro_rules! files {
        ($($handle:ident $name:literal $call:expr;)*) => {$({
            let handle = $handle.clone();
            callers.spawn($name, move |watch| {
                let call: &dyn Fn(_) -> cofferdam::Result<()> = &$call;
                // Connecting, then the time that it may take.
                let answer = watch.call($name, 12 * SECOND + host, || call(&handle));
                let kind = answer.err().map(|error| error.kind());
                check!(guest == Guest::Babbling || kind == Some(ErrorKind::TimedOut), "{kind:?}");
                Ok(())
            });
        })*};
    }
    files! {
        files "Files::read" |files: &Files| files.read("/etc/passwd").map(drop);
        files "Files::open" |files: &Files| files.open("/etc/passwd").map(drop);
        files "Files::write" |files: &Files| files.write("/tmp/written", "x");
        files "Files::list" |files: &Files| files.list("/etc").map(drop);
        files "Files::stat" |files: &Files| files.stat("/etc").map(drop);
        files "Files::create_dir" |files: &Files| files.create_dir("/tmp/made");
        copy_in "CopyIn::run" |copy: &CopyIn| copy.run().map(drop);
        copy_out "CopyOut::run" |copy: &CopyOut| copy.run().map(drop);
    }
    // They keep the container.
    drop((files, copy_in, copy_out));
    with!(callers, "listen", |watch, vm| fine(guest, watch.call("Vm::listen_vsock", host, || vm.listen_vsock(9997))));
    callers.spawn("accept_timeout", move |watch| {
        check_eq!(watch.at_once("VsockListener::port", || accepted.port()), 9999);
        let none = watch.call("VsockListener::accept_timeout", SECOND, || accepted.accept_timeout(SECOND));
        check!(none?.is_none());
        let none = watch.at_once("VsockListener::try_accept", || accepted.try_accept());
        check!(none?.is_none());
        Ok(())
    });
    callers.spawn("streams", move |watch| {
        watch.at_once("VsockStream::set_nonblocking", || input.set_nonblocking(true))?;
        // A guest that reads on does so for ever.
        for _ in 0..64 {
            if input.write(&[b'x'; 65_536]).is_err() {
                break;
            }
        }
        input.set_nonblocking(false)?;
        let mut again = watch.at_once("VsockStream::try_clone", || input.try_clone())?;
        let timed = |watch: &Watch, how, call: &mut dyn FnMut() -> io::Result<usize>| {
            let begin = Instant::now();
            let answer = call();
            watch.took(how, begin.elapsed(), SECOND);
            check!(
                guest == Guest::Babbling
                    || answer.is_ok()
                    || answer.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock),
                "{how}: {answer:?}"
            );
            Ok::<_, Box<dyn Error + Send + Sync>>(())
        };
        watch.at_once("VsockStream::set_write_timeout", || again.set_write_timeout(Some(SECOND)))?;
        timed(watch, "a write", &mut || again.write(&[b'x'; 65_536]))?;
        watch.at_once("VsockStream::set_read_timeout", || output.set_read_timeout(Some(SECOND)))?;
        timed(watch, "a read", &mut || output.read(&mut [0; 65_536]))?;
        watch.at_once("VsockStream::shutdown", || input.shutdown(Shutdown::Both))?;
        Ok(())
    });

    // Devices.
    with!(callers, "memory_stats", |watch, vm| {
        fine(guest, watch.call("Vm::memory_stats", host + SECOND, || vm.memory_stats()))
    });
    let itself = container.clone();
    callers.spawn("memory_stats of a container", move |watch| {
        fine(guest, watch.call("Container::memory_stats", host + SECOND, || itself.memory_stats()))
    });
    with!(callers, "memory_fd", |watch, vm| fine(guest, watch.call("Vm::memory_fd", host, || vm.memory_fd())));
    with!(callers, "set_balloon", |watch, vm| {
        fine(guest, watch.call("Vm::set_balloon", host, || vm.set_balloon(Size::mib(1))))
    });
    macro_rules! each {
        ($handle:ident: $($name:literal $call:expr;)*) => {$({
            let handle = $handle.clone();
            callers.spawn($name, move |watch| {
                let call: &dyn Fn(_) -> _ = &$call;
                fine(guest, watch.call($name, host, || call(&handle)))
            });
        })*};
    }
    each! { disk:
        "DiskHandle::usage" |disk: &DiskHandle| disk.usage();
        "DiskHandle::grow" |disk: &DiskHandle| disk.grow(capacity);
        "DiskHandle::set_limit" |disk: &DiskHandle| disk.set_limit(DiskLimit::none());
    }
    each! { net:
        "NetHandle::stats" |net: &NetHandle| net.stats();
        "NetHandle::set_policy" |net: &NetHandle| net.set_policy(Policy::internet());
        "NetHandle::set_limit" |net: &NetHandle| net.set_limit(NetLimit::none());
        "NetHandle::set_connection_limit" |net: &NetHandle| net.set_connection_limit(ConnectionLimit::new());
        "NetHandle::set_link" |net: &NetHandle| net.set_link(true);
        "NetHandle::dropped" |net: &NetHandle| net.dropped();
        "NetHandle::publish" |net: &NetHandle| net.publish(PortForward::tcp(([127, 0, 0, 1], 0), 81));
    }
    callers.spawn("a published port", move |watch| {
        check!(watch.at_once("PublishedPort::address", || port.address()).port() > 0);
        fine(guest, watch.call("PublishedPort::close", host, || port.close()))
    });
    callers.join()?;

    // One after the other, as they undo each other.
    with!(callers, "pause and resume", |watch, vm| {
        let paused = watch.call("Vm::pause", host + SECOND, || vm.pause());
        check!(guest != Guest::Busy || paused.is_err(), "nothing stands still while a loop hangs");
        fine(guest, paused)?;
        watch.call("Vm::resume", host + SECOND, || vm.resume())?;
        Ok(())
    });
    callers.join()?;
    let itself = container.clone();
    callers.spawn("pause and resume of a container", move |watch| {
        fine(guest, watch.call("Container::pause", host + SECOND, || itself.pause()))?;
        watch.call("Container::resume", host + SECOND, || itself.resume())?;
        if guest == Guest::Mute { Ok(itself.pause()?) } else { Ok(()) }
    });
    callers.join()?;

    // What hangs is waited for, and left behind.
    let hanging = if guest == Guest::Busy { 15 * SECOND } else { Duration::ZERO };
    let (itself, end) = (container.clone(), ended.clone());
    callers.spawn("stop", move |watch| {
        *lock(&end) = Some(Instant::now() + 3 * SECOND + hanging);
        let exit = watch.call("Container::stop", 3 * SECOND + hanging, || itself.stop(SECOND))?;
        check!(matches!(exit, Exit::Killed { .. }) || guest != Guest::Mute, "{exit}");
        Ok(())
    });
    if guest == Guest::Mute {
        callers.join()?;
    }
    with!(callers, "shutdown", |watch, vm| {
        watch.call("Vm::stop", SECOND + hanging, || vm.stop(SECOND))?;
        Ok(())
    });
    callers.join()?;
    watch.at_once("Container::kill", || container.kill());
    watch.at_once("Vm::kill", || container.vm().kill());
    until_end.join_within(SECOND)?;
    drop(noise);
    let begin = Instant::now();
    drop(container);
    watch.took("drop", begin.elapsed(), SECOND + hanging);
    // Devices that were left behind end when what hangs goes on.
    if guest == Guest::Busy {
        *lock(&ended) = Some(Instant::now());
        hang.open();
    }
    acceptor.join_within(SECOND)?;
    let _ = std::fs::remove_file(out);
    let wrong = lock(&watch.wrong);
    check!(wrong.is_empty(), "{guest:?}: {}", wrong.join("\n"));
    let all: BTreeSet<_> = list::WAITING.iter().chain(list::AT_ONCE).copied().collect();
    let made = lock(&watch.made);
    check!(*made == all, "{guest:?}: not called: {:?}", all.difference(&made).collect::<Vec<_>>());
    Ok(())
}

pub fn every_call_returns_with_a_silent_guest() -> Outcome {
    drive(Guest::Mute)
}

pub fn every_call_returns_with_a_flooding_guest() -> Outcome {
    drive(Guest::Babbling)
}

pub fn every_call_returns_with_a_busy_device_loop() -> Outcome {
    drive(Guest::Busy)
}

/// Each of them once had a second of its own.
pub fn blocked_capture_writers_share_one_timeout() -> Outcome {
    let hang = Hang::default();
    let _open = OpenAtEnd(hang.clone());
    hang.close_writers();
    let card = |socket| Net::socket(socket).capture(Capture::writer(Stuck(hang.clone())));
    let mut builder = guest("sleep 1000");
    for _ in 0..12 {
        builder = builder.net(card(UnixStream::pair()?.0));
    }
    let vm = builder.start()?;
    let begin = Instant::now();
    vm.kill();
    vm.wait_timeout(TEST_TIMEOUT).ok_or("it never ended")?;
    check!(begin.elapsed() < 2 * SECOND + slack(), "{:?}", begin.elapsed());
    Ok(())
}
