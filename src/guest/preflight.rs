//! Checks that the shim runs in its own machine. Anywhere else it would mount over a living system. So it makes sure
//! before it touches anything.
//!
//! Runs first, on the shim's one thread.

use super::{files, poweroff, sys};
use crate::proto::MARKER;

/// Returns only to PID 1 of a machine whose kernel command line has the marker; ends the process otherwise. Leaves descriptors 0 to 2 open.
pub(super) fn check() {
    if sys::getpid() != 1 {
        poweroff::say(&[b"this program runs only as PID 1 of a Cofferdam microVM"]);
        sys::exit(1);
    }
    if !is_wanted() {
        poweroff::say(&[b"the kernel command line has no ", MARKER.as_bytes(), b"; nothing was touched"]);
        sys::exit(1);
    }
    open_standard_descriptors();
}

/// PID 1 of a container is not PID 1 of a machine: there /proc is mounted, and its command line is the host's.
fn is_wanted() -> bool {
    let cmdline = match files::read(None, c"/proc/cmdline", 65_536) {
        Ok(cmdline) => cmdline,
        // Only the very first process of a machine finds no /proc at all.
        Err(_) => {
            let _ = sys::mkdir(None, c"/proc", 0o555);
            let flags = sys::MS_NOSUID | sys::MS_NODEV | sys::MS_NOEXEC;
            let _ = sys::mount(c"proc", c"/proc", Some(c"proc"), flags, None);
            files::read(None, c"/proc/cmdline", 65_536).unwrap_or_default()
        }
    };
    has_marker(&cmdline)
}

fn has_marker(cmdline: &[u8]) -> bool {
    cmdline.split(|byte| byte.is_ascii_whitespace()).any(|word| word == MARKER.as_bytes())
}

/// The kernel opens the console for PID 1 if the initramfs has the device. Where it has not, the numbers 0 to 2 must not become those of
/// something else, because they are what is given to programs.
fn open_standard_descriptors() {
    if (0..3).all(sys::is_open) {
        return;
    }
    let _ = sys::mkdir(None, c"/dev", 0o755);
    let _ = sys::mount(c"devtmpfs", c"/dev", Some(c"devtmpfs"), sys::MS_NOSUID, None);
    for number in 0..3 {
        if sys::is_open(number) {
            continue;
        }
        let console = sys::open(None, c"/dev/console", sys::O_RDWR);
        if let Ok(fd) = console.or_else(|_| sys::open(None, c"/", sys::O_RDONLY)) {
            // The lowest free number is the wanted one; it has no owner, so it stays open.
            fd.keep();
        }
    }
}

/// Makes the console standard input, output and error, where the kernel had no driver for it before.
pub(super) fn open_console() {
    if let Ok(console) = sys::open(None, c"/dev/console", sys::O_RDWR) {
        for number in 0..3 {
            let _ = sys::dup_onto(&console, number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marker_matches_a_whole_word_only() {
        assert!(has_marker(b"console=hvc0 cofferdam.shim=1\n"));
        assert!(!has_marker(b"console=hvc0 cofferdam.shim=10\n"));
        assert!(!has_marker(b"xcofferdam.shim=1"));
        assert!(!has_marker(b""));
    }
}
