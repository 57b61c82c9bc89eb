//! The host-guest protocol: what the library and the shim say to each other, as bytes. No I/O, no threads, `core` + `alloc` only.
//!
//! The library compiles these files as its module, and the shim compiles the same files into itself. So both sides agree on the
//! layout. A shim from another build of the crate is met through [`negotiate`].
//!
//! # The conversation
//!
//! ```text
//!  before the start   host writes BootConfig into the initramfs, beside the shim
//!  control stream     guest connects to (HOST_CID, BootConfig::control_port)
//!      guest -> host  Hello{min, max} · Ready or Failed
//!      host -> guest  Hello{version}
//!      host -> guest  Spawn (stream = a new process id of the host's choice)
//!  stdio streams      guest connects to (HOST_CID, port) for every Stdio::Port, before the program starts
//!      guest -> host  the cookie of the Spawn; since version 3
//!      host -> guest  Resize, of a process in a terminal; since version 6
//!      guest -> host  OomKilled, while the program runs
//!      guest -> host  Spawned or SpawnFailed · later Exited or Signaled (same stream number)
//!      guest -> host  Ending, when all is over; the host hangs up
//!  to a service       host connects to (guest, CONNECT_PORT); since version 2
//!      host -> guest  Connect{port}
//!      guest -> host  Connected{errno}, then the service's bytes, both ways
//!  to files           host connects to (guest, FILES_PORT), once for every request; since version 8
//! ```
//! Bulk data never travels in control frames. A stdio stream carries bytes one way; its end is the connection's end of that direction.
//! A host that closes its end of an output stream makes the writer see a broken pipe. A service's stream ends each way by itself. When
//! the guest closes it whole before it has ended its own way, the service has reset it.
//!
//! # The layout
//!
//! Everything is little-endian. A frame is `payload length: u32`, `stream: u32`, `kind: u32`, payload. The payload, like
//! [`BootConfig`], is a list of fields `tag: u8`, `length: u32`, bytes. Unknown kinds and unknown tags are skipped, a missing optional
//! field has its default, a repeated field's last one counts. Stream 0 is the VM itself, all others are processes.
#![allow(dead_code, reason = "each side builds one half of the messages and parses the other")]
#![deny(clippy::indexing_slicing)]

extern crate alloc;

mod boot;
mod field;
mod files;
mod frame;
mod message;
mod spawn;
mod strings;

#[cfg(test)]
mod tests;

#[allow(unused_imports, reason = "each side names only what it uses")]
pub(crate) use {
    boot::{
        BootConfig, GROW_DISK, Mount, Mounts, Network, Networks, OPTIONAL, READ_ONLY_DISK, Root, RootDisk, Secret,
        Secrets,
    },
    field::Malformed,
    files::{
        COPY_DEPTH_MAX, ENTRY_NAME_MAX, ENTRY_PATH_MAX, EntryKind, FILES_FRAME_MAX, FileAction, FileEntry, FileRecord,
        is_entry_name,
    },
    frame::{Decoder, FrameError, HEADER_SIZE, MessageFrame},
    message::{End, FromGuest, FromHost, SpawnStep, Stage},
    spawn::{
        CPU_PERIOD_US, CPU_WEIGHTS, FILTER_INSTRUCTION, ProcessLimits, Rlimit, Rlimits, Spawn, Stdio, TerminalSize,
    },
    strings::{Nul, StringBuf, Strings},
};

/// CID of the host (Virtio 1.3, 5.10.4).
pub(crate) const HOST_CID: u32 = 2;

/// The vsock port of the host on which it awaits the shim's control stream.
pub(crate) const CONTROL_PORT: u32 = 1024;

/// The vsock port of the guest on which the shim awaits the host's connections to services.
pub(crate) const CONNECT_PORT: u32 = 1025;

/// The vsock port of the guest on which the shim awaits the host's requests for files.
pub(crate) const FILES_PORT: u32 = 1026;

/// The word on the kernel command line without which the shim does nothing: a shim started anywhere else would mount over a live system.
pub(crate) const MARKER: &str = "cofferdam.shim=1";

/// The file of the initramfs that holds the encoded [`BootConfig`].
pub(crate) const BOOT_CONFIG_PATH: &str = "/cofferdam.boot";

/// An encoded [`BootConfig`] is no longer than this.
pub(crate) const BOOT_CONFIG_MAX: usize = 1024 * 1024;

// How the machine shall end, as the shim tells the VMM. How the value gets there is the processor's matter; where the VMM takes none,
// `reboot(2)` ends the machine.

/// The guest has shut down and wants the power off.
pub(crate) const EXIT_POWER_OFF: u8 = 0x34;
/// The guest has shut down and wants to start again.
pub(crate) const EXIT_REBOOT: u8 = 0x35;
/// The guest has shut down and halts.
pub(crate) const EXIT_HALT: u8 = 0x36;
/// The shim itself failed; why is on the console, and where possible in a `Failed` message before.
pub(crate) const EXIT_FAULT: u8 = 0x37;

/// The oldest version of the protocol that this build speaks.
pub(crate) const VERSION_MIN: u32 = 1;
/// The newest version of the protocol that this build speaks.
pub(crate) const VERSION_MAX: u32 = 8;
/// The version since which the shim listens on [`CONNECT_PORT`].
pub(crate) const VERSION_CONNECT: u32 = 2;

/// The version since which stdio streams begin with the cookie of their `Spawn`.
pub(crate) const VERSION_COOKIE: u32 = 3;

/// The version since which the shim makes the kernel's random numbers new when it is asked to.
pub(crate) const VERSION_RESEED: u32 = 4;

/// The version since which programs run as other users, and working directories are made.
pub(crate) const VERSION_USER: u32 = 5;

/// The version since which programs have terminals, limits, added groups and fewer privileges.
pub(crate) const VERSION_PRIVILEGES: u32 = 6;

/// The version since which programs have filters of system calls, and the shim says which kernel it runs on.
pub(crate) const VERSION_SECCOMP: u32 = 7;
/// The version since which the shim listens on [`FILES_PORT`].
pub(crate) const VERSION_FILES: u32 = 8;

/// The length of what makes a kernel's random numbers new.
pub(crate) const SEED_SIZE: usize = 32;

/// The length of a cookie: too long to guess.
pub(crate) const COOKIE_SIZE: usize = 32;

/// The longest payload the host may send: argv and environment of the size that Linux takes fit (`ARG_MAX` and then some).
pub(crate) const FROM_HOST_MAX: usize = 4 * 1024 * 1024;
/// The longest payload the guest may send. Nothing that the guest writes may make the host grow.
pub(crate) const FROM_GUEST_MAX: usize = 4 * 1024;

/// The newest version that both this build and a peer who speaks `min..=max` know.
pub(crate) fn negotiate(min: u32, max: u32) -> Option<u32> {
    let version = max.min(VERSION_MAX);
    (version >= VERSION_MIN && version >= min).then_some(version)
}
