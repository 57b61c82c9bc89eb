//! One port for many guests of one process: HTTP by its Host, TLS by its server name, each to the guest of that name.
//!
//!     cargo run --release --example gateway -- --listen 127.0.0.1:8080 --rootfs ROOTFS_TAR --name alice.example.test \
//!         --name bob.example.test -- sh -c 'echo "I am $NAME" > /var/www/html/index.html; exec nginx -g "daemon off;"'
//!     curl --resolve alice.example.test:8080:127.0.0.1 http://alice.example.test:8080/
//!
//! The first caller of a name starts its guest, and callers at the same time share that one start. A guest without
//! connections for a while is stopped. TLS is passed on unchanged: the guest has the certificate. Guests need no network.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a program may")]

pub(crate) mod guests;
pub(crate) mod head;
pub(crate) mod serve;

use std::ffi::OsString;
use std::net::TcpListener;
use std::sync::Arc;

use cofferdam::{Container, Image};

use guests::{Guest, Guests};
use serve::Limits;

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut listen, mut rootfs, mut names, mut command) = ("127.0.0.1:8080".to_owned(), None, Vec::new(), Vec::new());
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            lexopt::Arg::Long("listen") => listen = parser.value()?.to_string_lossy().into_owned(),
            lexopt::Arg::Long("rootfs") => rootfs = Some(parser.value()?),
            lexopt::Arg::Long("name") => names.push(parser.value()?.to_string_lossy().into_owned()),
            lexopt::Arg::Value(first) => {
                command.push(first);
                command.extend(parser.raw_args()?);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    let image = Image::open(rootfs.ok_or("--rootfs is missing")?)?;
    let listener = TcpListener::bind(&listen)?;
    eprintln!("gateway: listening on {}", listener.local_addr()?);
    let limits = Limits::default();
    let start = move |name: &str| start(Container::builder(image.clone()), name, &command);
    serve::run(&listener, &Arc::new(Guests::new(names, limits.idle_guest, start)), &limits)?;
    Ok(())
}

/// A container in which the command runs, which finds its name in its environment.
pub(crate) fn start(
    builder: cofferdam::ContainerBuilder,
    name: &str,
    command: &[OsString],
) -> cofferdam::Result<Guest> {
    let container = builder.hostname(name.get(..64).unwrap_or(name)).start()?;
    let server = container.exec(command.iter().cloned()).env("NAME", name).spawn()?;
    Ok(Guest { container, server })
}
