//! What machines and containers say that never come to life.

use std::ffi::OsString;
use std::process::Command;
use std::time::Duration;

use cofferdam::{Container, ErrorKind, Host, Kernel, Vm};

use crate::fixture::{Outcome, Temp, debian, debian_container, kernel, tiny_kernel};
use crate::{check, check_eq};

/// Asks this program, run again, for a report on a kernel's path instead of tests.
pub const REPORT: &str = "COFFERDAM_TEST_REPORT";

/// Prints what stands in the way of booting the kernel at `path`: the probe's words, then those of starting it.
#[allow(clippy::print_stdout, reason = "the test that runs this program again reads it")]
pub fn report(path: OsString) {
    let report_text = |outcome: cofferdam::Result<()>| match outcome {
        Ok(()) => "nothing".to_owned(),
        Err(error) => format!("{:?}: {error}", error.kind()),
    };
    println!("{}", report_text(Host::probe().ready()));
    println!("{}", report_text(Kernel::open(path).and_then(|kernel| Vm::builder(kernel).start().map(drop))));
}

/// The report of this program where `preparation` has changed what is mounted, without any capability.
fn reported(temp: &Temp, preparation: &str, kernel: &str) -> Result<String, Box<dyn std::error::Error>> {
    let script = format!("{preparation} && exec setpriv --bounding-set=-all --inh-caps=-all \"$0\"");
    let output = Command::new("unshare")
        .args(["-r", "-m", "sh", "-c", &script])
        .arg(std::env::current_exe()?)
        .current_dir(temp.path(""))
        .env(REPORT, temp.path(kernel))
        .output()?;
    check!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

pub fn missing_kvm_error_names_the_remedy() -> Outcome {
    let temp = Temp::new()?;
    let _written = tiny_kernel(&temp, &[0xf4])?;
    let forbidden = reported(&temp, "touch kvm && chmod 0 kvm && mount --bind kvm /dev/kvm", "kernel")?;
    check!(forbidden.lines().all(|line| line.starts_with("PermissionDenied: ")), "{forbidden}");
    check_eq!(forbidden.matches("usermod -aG kvm").count(), 2);
    let absent = reported(&temp, "mount -t tmpfs none /dev", "kernel")?;
    check!(absent.lines().all(|line| line.starts_with("NotFound: ")), "{absent}");
    check_eq!(absent.matches("load the module kvm_intel or kvm_amd").count(), 2);
    Ok(())
}

pub fn unreadable_file_is_named() -> Outcome {
    let temp = Temp::new()?;
    let report_text = reported(&temp, "touch secret && chmod 0 secret", "secret")?;
    let expected = format!("PermissionDenied: opening kernel {}: Permission denied", temp.path("secret").display());
    check!(report_text.contains(&expected), "{report_text}");
    Ok(())
}

pub fn start_timeout_names_the_boot_stage() -> Outcome {
    let temp = Temp::new()?;
    // jmp .
    let spinning = tiny_kernel(&temp, &[0xeb, 0xfe])?;
    let error = Container::builder(debian()).kernel(spinning).start_timeout(Duration::from_millis(500)).start();
    let error = error.map(drop).expect_err("it spins");
    check_eq!(error.kind(), ErrorKind::TimedOut);
    check!(error.to_string().contains("last stage: first vCPU running"), "{error}");
    Ok(())
}

pub fn guest_exit_before_ready_is_reported() -> Outcome {
    let temp = Temp::new()?;
    let dying = tiny_kernel(&temp, &[0x0f, 0x0b])?;
    let error = debian_container().kernel(dying).start().map(drop).expect_err("a triple fault");
    check_eq!(error.kind(), ErrorKind::GuestFailed);
    check!(error.to_string().contains("triple fault"), "{error}");
    Ok(())
}

pub fn shim_failure_is_reported() -> Outcome {
    // A root device that is not there, as the kernel has no driver called up for it.
    let kernel = kernel().cmdline("virtio_blk.dummy=1 initcall_blacklist=virtio_blk_init,init");
    let error = debian_container().kernel(kernel).start_timeout(Duration::from_secs(60)).start();
    let error = error.map(drop).expect_err("no disk");
    check!(error.to_string().contains("/dev/vda"), "{error}");
    check_eq!(error.kind(), ErrorKind::GuestFailed);
    Ok(())
}
