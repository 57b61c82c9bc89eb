//! The shim: PID 1 of the guest. One static program without libc and crates, one thread around one poll loop.
//!
//! ```text
//!  preflight  refuses unless it is PID 1 of a machine that asked for it
//!  runtime    what libc would be            sys       raw system calls       files         small files whole
//!  modules    the kernel's drivers          network   cards and their routes poweroff      how the machine ends
//!  control    the stream to the host        mount     the workloads' root    reaper        their PID 1
//!  serve      the loop                      process   one program            spawn, relay  its start, its streams
//!  cgroup     the programs' groups          connect   the host's connections to services
//!  shutdown   the order of the machine's end          user      users and groups of programs
//!  terminal   a program's terminal                      seal      files of the kernel, for hardened programs
//!  file_server, file_worker, file_copy   the host's requests for files, each in a process of its own
//! ```
//! `build.rs` compiles this file alone into the program that the library embeds; as a module of the library it is compiled for tests only.
#![cfg_attr(guest_bin, no_std, no_main)]
#![cfg_attr(not(guest_bin), allow(dead_code, reason = "tests run the parts, only the shim runs the whole"))]

extern crate alloc;

#[cfg(guest_bin)]
#[path = "../proto/mod.rs"]
mod proto;

mod cgroup;
mod connect;
mod control;
mod file_copy;
mod file_server;
mod file_worker;
mod files;
mod modules;
mod mount;
mod network;
mod oom;
mod poweroff;
mod preflight;
mod process;
mod reaper;
mod relay;
#[cfg(guest_bin)]
mod runtime;
mod seal;
mod serve;
mod shutdown;
mod spawn;
mod sys;
mod terminal;
mod user;

use alloc::vec::Vec;

use cgroup::Cgroups;
use control::{Control, Failure};
use mount::Writable;
use serve::{Outcome, Shim};
use sys::{Errno, Fd};

use crate::proto::{BOOT_CONFIG_MAX, BootConfig, End, FromGuest, Stage};

/// Files a program may open, and how far it may raise that: what most expect, and what systemd gives.
const FILES: (u64, u64) = (1024, 524_288);

/// Everything, from the first instruction to the end of the machine.
fn run() -> ! {
    let user_space_ns = sys::now_ns();
    preflight::check();
    let signals = match setup_pid1() {
        Ok(signals) => signals,
        Err(failure) => fail_to_console(&failure),
    };
    let file = match read_config() {
        Ok(file) => file,
        Err(failure) => fail_to_console(&failure),
    };
    let config = match BootConfig::parse(&file) {
        Ok(config) => config,
        Err(malformed) => {
            let text: [&[u8]; 2] = [b"reading the boot configuration: bad ", malformed.0.as_bytes()];
            fail_to_console(&Failure::new(Stage::BootConfig, Errno::EPROTO, &text))
        }
    };
    let modules = insert_modules(&config);
    // Early, so that failures from here on reach the host.
    let control = match (Control::dial(config.control_port), modules) {
        (Ok(control), Ok(())) => control,
        (Ok(control), Err(failure)) => control.fail(&failure),
        (Err(_), Err(failure)) => fail_to_console(&failure),
        (Err(errno), Ok(())) => {
            fail_to_console(&Failure::new(Stage::Control, errno, &[b"connecting to the host over vsock"]))
        }
    };
    let writable = match mount_all(&config) {
        Ok(writable) => writable,
        Err(failure) => control.fail(&failure),
    };
    let mut shim = match isolate(control, signals, &config) {
        Ok(shim) => shim,
        Err((control, failure)) => control.fail(&failure),
    };
    drop(file);
    shim.control.say(0, &FromGuest::Ready { user_space_ns, ready_ns: sys::now_ns(), kernel: sys::kernel_version() });
    let outcome = shim.serve();
    finish(shim, writable, outcome)
}

/// Serves one request for files, for tests of the host's half.
#[cfg(test)]
pub(crate) fn serve_files(connection: std::os::fd::OwnedFd) -> i32 {
    file_worker::serve(&connection.into())
}

/// Reports a failure on the console alone, as the host cannot be reached.
fn fail_to_console(failure: &Failure) -> ! {
    control::log_failure(failure);
    poweroff::fault()
}

/// What PID 1 owes itself: standard descriptors, blocked signals, a place out of the OOM killer's reach.
fn setup_pid1() -> Result<Fd, Failure> {
    let failure = |errno, what: &[u8]| Failure::new(Stage::Isolation, errno, &[what]);
    let set = sys::signal_set(&serve::SIGNALS);
    // SIGPIPE and all others too; those without a waiter stay pending forever, as ignored ones do for PID 1.
    sys::block_signals(u64::MAX).map_err(|errno| failure(errno, b"blocking signals"))?;
    let signals = sys::signal_fd(set).map_err(|errno| failure(errno, b"making a signal descriptor"))?;
    // What is made has the mode that is asked for.
    sys::umask(0);
    let _ = sys::reboot(sys::RB_CTRL_ALT_DEL_TO_INIT);
    let _ = files::write(None, c"/proc/self/oom_score_adj", b"-1000");
    // The streams and pipes of a thousand programs.
    let _ = sys::set_rlimit(spawn::RLIMIT_NOFILE, 65_536, FILES.1);
    Ok(signals)
}

fn read_config() -> Result<Vec<u8>, Failure> {
    let file = files::read(None, c"/cofferdam.boot", BOOT_CONFIG_MAX + 1);
    // The initramfs may be the workloads' root; none of this is theirs.
    let _ = sys::unlink(c"/cofferdam.boot");
    let _ = sys::unlink(c"/init");
    file.map_err(|errno| Failure::new(Stage::BootConfig, errno, &[b"reading /cofferdam.boot"]))
}

/// The drivers that the kernel does not have built in. The console's may be among them.
fn insert_modules(config: &BootConfig<'_>) -> Result<(), Failure> {
    if config.modules.is_empty() {
        return Ok(());
    }
    let outcome = modules::insert_all(config.modules);
    let _ = sys::rmdir(None, c"/cofferdam.modules");
    preflight::open_console();
    outcome
}

fn mount_all(config: &BootConfig<'_>) -> Result<Writable, Failure> {
    let plan = mount::plan(config);
    let (before, after) = mount::split(&plan);
    mount::carry_out(before)?;
    let mut writable = Writable::find(&config.root);
    network::set_switches(config);
    // This one shows the shim's pid namespace; the workloads get their own.
    let _ = sys::unmount(c"/proc");
    mount::carry_out(after)?;
    writable.find_rest(config);
    if !config.hostname.is_empty() {
        let _ = sys::set_hostname(config.hostname);
    }
    network::set_up(config)?;
    Ok(writable)
}

/// Makes everything that the workloads need around them.
fn isolate(control: Control, signals: Fd, config: &BootConfig<'_>) -> Result<Shim, (Control, Failure)> {
    // Before the workloads' pid namespace. A guest without it runs programs all the same.
    let _ = file_server::start();
    let reaper = match reaper::start() {
        Ok(reaper) => reaper,
        Err(failure) => return Err((control, failure)),
    };
    if let Err(failure) = set_parameters(&reaper.proc, config) {
        return Err((control, failure));
    }
    let null = match sys::open(None, c"/dev/null", sys::O_RDWR) {
        Ok(null) => null,
        Err(errno) => {
            return Err((control, Failure::new(Stage::Isolation, errno, &[b"opening /dev/null"])));
        }
    };
    // A kernel without cgroups runs programs all the same.
    let cgroups = Cgroups::new(cgroup::threads_max(&reaper.proc)).ok();
    // A kernel without terminals runs programs all the same.
    let devpts = sys::open(None, c"/dev/pts", sys::O_PATH | sys::O_DIRECTORY).ok();
    let ground = spawn::SpawnEnv { null, proc: reaper.proc, devpts, files: FILES };
    Ok(Shim::new(control, signals, reaper.pid, ground, cgroups))
}

/// Sets the parameters of the kernel that the embedder wants.
fn set_parameters(proc: &Fd, config: &BootConfig<'_>) -> Result<(), Failure> {
    let mut texts = config.sysctls.iter();
    while let (Some(name), Some(value)) = (texts.next(), texts.next()) {
        let path = alloc::ffi::CString::new([b"sys/", name.to_bytes()].concat()).unwrap_or_default();
        files::write(Some(proc), &path, value.to_bytes())
            .map_err(|errno| Failure::new(Stage::Sysctl, errno, &[b"setting ", name.to_bytes()]))?;
    }
    Ok(())
}

fn finish(shim: Shim, writable: Writable, outcome: Outcome) -> ! {
    let Shim { mut control, .. } = shim;
    // Also what came into being since.
    let _ = sys::kill(-1, sys::SIGKILL);
    match outcome {
        Outcome::End(end) => {
            writable.settle();
            control.say(0, &FromGuest::Ending { end });
            control.close();
            poweroff::end(end)
        }
        Outcome::HostGone => {
            writable.settle();
            poweroff::end(End::PowerOff)
        }
        Outcome::Failed(failure) => {
            writable.settle();
            control.fail(&failure)
        }
    }
}
