//! Runs one command in a container and exits as it did.
//!
//!     cargo run --release --example run -- --rootfs debian.tar -- sh -c 'cat /etc/os-release; exit 7'
//!
//! Like a shell: 126 and 127 when the command cannot be run or found, and 128 + n when signal n ended it. 125 when the
//! machine itself failed. The library never makes such numbers; a command-line program has nothing else.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a program may")]

use std::io::{self, copy, stderr, stdout};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use cofferdam::process::{ExitStatus, Stdio};
use cofferdam::{Container, ErrorKind, Image, Kernel, Size};

fn main() -> ExitCode {
    let args = match Args::parse() {
        Ok(args) => args,
        Err(error) => {
            eprintln!(
                "run: {error}\nusage: run --rootfs TAR_OR_DIRECTORY [--kernel FILE] [--memory MIB] [--timeout SECONDS] [--] COMMAND [ARG...]"
            );
            return ExitCode::from(2);
        }
    };
    match run(args) {
        Ok(ExitStatus::Exited { code }) => exit_code(code),
        Ok(ExitStatus::Signaled { signal }) => exit_code(128 + signal),
        Ok(other) => {
            eprintln!("run: {other}");
            ExitCode::from(125)
        }
        Err(error) => {
            eprintln!("run: {error}");
            ExitCode::from(match error.kind() {
                ErrorKind::NotFound => 127,
                ErrorKind::PermissionDenied | ErrorKind::Incompatible => 126,
                _ => 125,
            })
        }
    }
}

fn run(args: Args) -> cofferdam::Result<ExitStatus> {
    let mut container = Container::builder(Image::open(args.rootfs)?).memory(Size::mib(args.memory));
    if let Some(seconds) = args.timeout {
        container = container.start_timeout(Duration::from_secs(seconds));
    }
    if let Some(kernel) = args.kernel {
        container = container.kernel(Kernel::open(kernel)?);
    }
    let container = container.start()?;
    let mut process = container.exec(args.command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (out, err) = (process.stdout.take(), process.stderr.take());
    // Both streams are shown as they come.
    let shown: [io::Result<u64>; 2] = thread::scope(|scope| {
        let errors = scope.spawn(move || err.map_or(Ok(0), |mut err| copy(&mut err, &mut stderr())));
        let shown = out.map_or(Ok(0), |mut out| copy(&mut out, &mut stdout()));
        [shown, errors.join().unwrap_or(Ok(0))]
    });
    for result in shown {
        result?;
    }
    process.wait()
}

/// What a shell would exit with: the eight lowest bits.
fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1))
}

struct Args {
    rootfs: String,
    kernel: Option<String>,
    memory: u64,
    /// For the start, in seconds.
    timeout: Option<u64>,
    command: Vec<std::ffi::OsString>,
}

impl Args {
    fn parse() -> Result<Self, lexopt::Error> {
        let (mut rootfs, mut kernel, mut memory, mut timeout, mut command) = (None, None, 256, None, Vec::new());
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                lexopt::Arg::Long("rootfs") => rootfs = Some(parser.value()?.to_string_lossy().into_owned()),
                lexopt::Arg::Long("kernel") => kernel = Some(parser.value()?.to_string_lossy().into_owned()),
                lexopt::Arg::Long("memory") => memory = lexopt::ValueExt::parse(&parser.value()?)?,
                lexopt::Arg::Long("timeout") => timeout = Some(lexopt::ValueExt::parse(&parser.value()?)?),
                lexopt::Arg::Value(first) => {
                    command.push(first);
                    command.extend(parser.raw_args()?);
                }
                other => return Err(other.unexpected()),
            }
        }
        let rootfs = rootfs.ok_or("--rootfs is missing")?;
        if command.is_empty() {
            return Err("there is no command".into());
        }
        Ok(Self { rootfs, kernel, memory, timeout, command })
    }
}
