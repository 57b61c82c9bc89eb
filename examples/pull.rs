//! Pulls an image from its registry, runs a command in a container of it, and exits as the command did.
//!
//!     cargo run --release --features registry --example pull -- debian:12 cat /etc/os-release
//!
//! As by `docker run`, arguments take the place of the image's command, behind its entrypoint. `--list` lists what was pulled, and `--remove`
//! removes a name. What no name needs any more goes when its space is needed.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program may")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{stderr, stdout};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use cofferdam::image::{ImageStore, LayerPhase, LayerProgress, Registry};
use cofferdam::process::ExitStatus;
use cofferdam::{Container, Image, Kernel, Size};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

const USAGE: &str = "usage: pull [--plain-http HOST] [--mirror HOST] [--ca FILE] [--cache DIRECTORY] [--kernel FILE] [--memory MIB] \
                     IMAGE [ARG...]\n       pull [--cache DIRECTORY] --list | --remove IMAGE";

fn main() -> ExitCode {
    let args = match Args::parse() {
        Ok(args) => args,
        Err(error) => {
            eprintln!("pull: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match args.run() {
        Ok(Some(ExitStatus::Exited { code })) => exit_code(code),
        Ok(Some(ExitStatus::Signaled { signal })) => exit_code(128 + signal),
        Ok(Some(other)) => {
            eprintln!("pull: {other}");
            ExitCode::from(125)
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pull: {error}");
            ExitCode::from(125)
        }
    }
}

/// A bar for each layer, below each other.
struct Bars {
    all: MultiProgress,
    layers: Mutex<BTreeMap<usize, ProgressBar>>,
}

impl Bars {
    fn new() -> Self {
        Self { all: MultiProgress::new(), layers: Mutex::default() }
    }

    fn show(&self, layer: &LayerProgress) {
        let Ok(mut bars) = self.layers.lock() else { return };
        let bar = bars.entry(layer.layer).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::new(layer.size));
            if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {bytes:>10}/{total_bytes:<10} {msg}") {
                bar.set_style(style);
            }
            bar.set_prefix(layer.digest.hex().chars().take(12).collect::<String>());
            bar
        });
        bar.set_position(layer.received);
        match layer.phase {
            LayerPhase::Present => bar.finish_with_message("is there"),
            LayerPhase::Done => bar.finish_with_message("done"),
            _ => {}
        }
    }
}

struct Args {
    registry: Registry,
    store: ImageStore,
    action: Action,
    kernel: Option<PathBuf>,
    memory: u64,
}

enum Action {
    List,
    Remove(String),
    Run { image: String, arguments: Vec<OsString> },
}

impl Args {
    fn parse() -> Result<Self, lexopt::Error> {
        use lexopt::ValueExt;
        let (mut registry, mut store, mut action) = (Registry::new(), ImageStore::new(), None);
        let (mut kernel, mut memory) = (None, 256);
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                lexopt::Arg::Long("plain-http") => registry = registry.plain_http(&parser.value()?.string()?),
                lexopt::Arg::Long("mirror") => registry = registry.mirror("docker.io", parser.value()?.string()?),
                lexopt::Arg::Long("ca") => {
                    let pem = std::fs::read(parser.value()?).map_err(|error| format!("--ca: {error}"))?;
                    registry = registry.ca_certificates(pem);
                }
                lexopt::Arg::Long("cache") => {
                    let dir = PathBuf::from(parser.value()?);
                    (registry, store) = (registry.cache_dir(&dir), ImageStore::at(dir));
                }
                lexopt::Arg::Long("kernel") => kernel = Some(parser.value()?.into()),
                lexopt::Arg::Long("memory") => memory = parser.value()?.parse()?,
                lexopt::Arg::Long("list") => action = Some(Action::List),
                lexopt::Arg::Long("remove") => action = Some(Action::Remove(parser.value()?.string()?)),
                lexopt::Arg::Value(image) => {
                    let (image, arguments) = (image.string()?, parser.raw_args()?.collect());
                    action = Some(Action::Run { image, arguments });
                }
                other => return Err(other.unexpected()),
            }
        }
        Ok(Self { registry, store, action: action.ok_or("no image is named")?, kernel, memory })
    }

    fn run(self) -> cofferdam::Result<Option<ExitStatus>> {
        match self.action {
            Action::List => {
                for image in self.store.list()? {
                    println!("{}  {}  {}", image.reference, image.digest, image.size);
                }
                println!("{} in all", self.store.disk_usage()?);
                Ok(None)
            }
            Action::Remove(name) => {
                self.store.remove(name)?;
                let collected = self.store.gc(Size::bytes(u64::MAX))?;
                println!("{} freed", collected.freed);
                Ok(None)
            }
            Action::Run { image, arguments } => {
                let bars = Bars::new();
                let image = self.registry.progress(move |layer| bars.show(layer)).pull(image)?;
                run(image, arguments, self.kernel, Size::mib(self.memory)).map(Some)
            }
        }
    }
}

fn run(image: Image, arguments: Vec<OsString>, kernel: Option<PathBuf>, memory: Size) -> cofferdam::Result<ExitStatus> {
    let entrypoint = image.config()?.entrypoint.into_iter().map(OsString::from);
    let mut container = Container::builder(image).memory(memory);
    if let Some(kernel) = kernel {
        container = container.kernel(Kernel::open(kernel)?);
    }
    let container = container.start()?;
    let program = match arguments.is_empty() {
        true => container.command(),
        false => container.exec(entrypoint.chain(arguments)),
    };
    // Both streams are this program's own.
    let (out, err) = (stdout().as_fd().try_clone_to_owned()?, stderr().as_fd().try_clone_to_owned()?);
    program.stdout(out).stderr(err).status()
}

/// What a shell would exit with: the eight lowest bits.
fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1))
}
