//! Carries ssh into a container that has no network: starts it, and connects standard input and output to a port in it.
//!
//!     ssh -o ProxyCommand='proxy_command --rootfs ROOTFS_TAR -- sh -c "mkdir -p /run/sshd ~/.ssh
//!         echo ssh-ed25519 AAAA... > ~/.ssh/authorized_keys; exec /usr/sbin/sshd -D"' root@any-name
//!
//! The root file system has openssh-server, for example that of `guest/rootfs network`; the container lives as long as the
//! connection. The same carries sftp, scp, rsync, git and the remote modes of editors; `--port` connects to something else.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a program may")]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, copy};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use cofferdam::process::Stdio;
use cofferdam::vsock::VsockStream;
use cofferdam::{Container, ErrorKind, Image};

/// How long the service may take until it listens.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn main() -> ExitCode {
    match arguments().map_err(Into::into).and_then(|(rootfs, port, command)| proxy(rootfs, port, command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("proxy_command: {error}");
            ExitCode::FAILURE
        }
    }
}

fn proxy(rootfs: OsString, port: u16, command: Vec<OsString>) -> Result<(), Box<dyn std::error::Error>> {
    let container = Container::builder(Image::open(rootfs)?).start()?;
    // Standard error of the service goes to the user's terminal; standard output carries the connection.
    let mut service = container.exec(command).stderr(Stdio::piped()).spawn()?;
    if let Some(mut said) = service.stderr.take() {
        thread::spawn(move || copy(&mut said, &mut io::stderr()));
    }
    let stream = connect(&container, port)?;
    let mut to_guest = stream.try_clone()?;
    thread::spawn(move || {
        let _ = copy(&mut io::stdin().lock(), &mut to_guest);
        // Standard input is passed on completely; output of the service still comes back.
        let _ = to_guest.shutdown(Shutdown::Write);
    });
    // Not the buffered one, which would keep what has no end of line.
    copy(&mut &stream, &mut File::from(io::stdout().as_fd().try_clone_to_owned()?))?;
    Ok(())
}

/// Connects as soon as the service listens.
fn connect(container: &Container, port: u16) -> cofferdam::Result<VsockStream> {
    let deadline = Instant::now() + SERVICE_TIMEOUT;
    loop {
        match container.connect(port) {
            Err(error) if error.kind() == ErrorKind::NotFound && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(20));
            }
            outcome => return outcome,
        }
    }
}

fn arguments() -> Result<(OsString, u16, Vec<OsString>), lexopt::Error> {
    let (mut rootfs, mut port, mut command) = (None, 22, Vec::new());
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            lexopt::Arg::Long("rootfs") => rootfs = Some(parser.value()?),
            lexopt::Arg::Long("port") => port = lexopt::ValueExt::parse(&parser.value()?)?,
            lexopt::Arg::Value(first) => {
                command.push(first);
                command.extend(parser.raw_args()?);
            }
            other => return Err(other.unexpected()),
        }
    }
    let rootfs = rootfs.ok_or("--rootfs is missing")?;
    if command.is_empty() {
        return Err("there is no command that starts the service".into());
    }
    Ok((rootfs, port, command))
}
