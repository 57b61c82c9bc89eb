//! Boots a kernel with an initramfs made here, and shows its console.
//!
//!     cargo run --release --example boot -- [--kernel VMLINUX] [--busybox STATIC_BUSYBOX]
//!
//! The guest is busybox: it says hello on its console and powers off.

#![allow(clippy::print_stdout, clippy::print_stderr, clippy::expect_used, reason = "a program may")]

use std::io::stdout;

use cofferdam::kernel::Initramfs;
use cofferdam::{Console, Exit, Kernel, Size, Vm};

const INIT: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
echo \"hello from $(/bin/busybox uname -sr), up since $(/bin/busybox cut -d ' ' -f 1 /proc/uptime) s\"
/bin/busybox reboot -f
";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut kernel, mut busybox) = (None, "/bin/busybox".to_owned());
    let mut args = lexopt::Parser::from_env();
    while let Some(arg) = args.next()? {
        match arg {
            lexopt::Arg::Long("kernel") => kernel = Some(args.value()?),
            lexopt::Arg::Long("busybox") => busybox = args.value()?.to_string_lossy().into_owned(),
            other => return Err(other.unexpected().into()),
        }
    }
    let kernel = match kernel {
        Some(path) => Kernel::open(path)?,
        None => Kernel::find()?,
    };
    let initramfs = Initramfs::new()
        .directory("/bin", 0o755)
        .directory("/proc", 0o755)
        .directory("/dev", 0o755)
        .character_device("/dev/console", 0o600, (5, 1))
        .file("/bin/busybox", 0o755, std::fs::read(busybox)?)
        .file("/init", 0o755, INIT);

    let vm = Vm::builder(kernel.cmdline("console=hvc0 quiet").initramfs(initramfs))
        .memory(Size::mib(128))
        .console(Console::writer(stdout()))
        .start()?;
    match vm.wait() {
        Exit::PowerOff { .. } | Exit::Reboot { .. } => Ok(()),
        exit => Err(exit.to_string().into()),
    }
}
