//! Pseudo-terminals (pty(7), ioctl_tty(2)).

use super::{
    Fd, O_CLOEXEC, O_NONBLOCK, O_RDWR, Result, dup_onto, exit, fork, keep_only, nr, pipe, read, syscall, text,
};
use crate::proto::TerminalSize;

const O_NOCTTY: usize = 0o400;
/// Linux, include/uapi/asm-generic/ioctls.h.
const TCGETS: usize = 0x5401;
const TIOCSCTTY: usize = 0x540e;
const TIOCSWINSZ: usize = 0x5414;
const TIOCGPTPEER: usize = 0x5441;
const TIOCSPTLCK: usize = 0x4004_5431;

/// struct termios of TCGETS: four flags, a line discipline, 19 control characters (asm-generic/termbits.h).
const TERMIOS_SIZE: usize = 36;
/// struct open_how and its `resolve` flags (openat2(2)): no other mount, no link.
const RESOLVE_NO_XDEV: u64 = 1;
const RESOLVE_NO_SYMLINKS: u64 = 4;

/// The offset of the character `VEOF`.
const VEOF: usize = 17 + 4;

/// Makes a terminal from the multiplexer of a `devpts` directory. Returns the controlling end, which does not block, and the program's.
pub fn open_terminal(devpts: &Fd, size: TerminalSize) -> Result<(Fd, Fd)> {
    // What a program has put in the multiplexer's place is not opened.
    let how = [(O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC) as u64, 0, RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS];
    // SAFETY: the path is a C string, and the kernel reads one struct open_how, which is three words.
    let master = unsafe { call!(nr::OPENAT2, devpts.arg(), text(c"ptmx"), how.as_ptr() as usize, size_of_val(&how)) }?;
    let master = Fd::new(master);
    let unlocked = 0i32;
    // SAFETY: the kernel reads one int.
    unsafe { call!(nr::IOCTL, master.arg(), TIOCSPTLCK, &raw const unlocked as usize) }?;
    set_size(&master, size)?;
    // SAFETY: takes plain numbers.
    let slave = unsafe { call!(nr::IOCTL, master.arg(), TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC) }?;
    Ok((master, Fd::new(slave)))
}

/// Sets the size of the window. The programs in it get SIGWINCH when it is another one.
pub fn set_size(terminal: &Fd, TerminalSize { rows, columns }: TerminalSize) -> Result<()> {
    // struct winsize; the size in pixels is unknown.
    let size = [rows, columns, 0, 0];
    // SAFETY: the kernel reads one struct winsize, which is four numbers of 16 bits.
    unsafe { call!(nr::IOCTL, terminal.arg(), TIOCSWINSZ, size.as_ptr() as usize) }.map(drop)
}

/// Makes standard input the controlling terminal of this session, whose leader this process is.
pub fn take_terminal() -> Result<()> {
    // SAFETY: takes plain numbers.
    unsafe { call!(nr::IOCTL, 0, TIOCSCTTY, 0) }.map(drop)
}

/// The character that ends the input of a program that reads lines. None where there is no such character.
pub fn end_of_input(terminal: &Fd) -> Result<Option<u8>> {
    let mut termios = [0u8; TERMIOS_SIZE];
    // SAFETY: the kernel writes one struct termios.
    unsafe { call!(nr::IOCTL, terminal.arg(), TCGETS, termios.as_mut_ptr() as usize) }?;
    // 0 is no character there (`_POSIX_VDISABLE`).
    Ok(Some(termios[VEOF]).filter(|character| *character != 0))
}

/// Hangs up a terminal by closing its controlling end, in a process of its own.
///
/// The last close waits for a program that reads from the terminal at that moment, and it can make its read last.
pub fn hang_up(master: Fd) {
    let Ok((reader, writer)) = pipe() else { return };
    // Without a process it is closed here.
    let _ = fork(None, || {
        if dup_onto(&master, 0).and_then(|()| dup_onto(&reader, 1)).is_err() {
            return 1;
        }
        keep_only(2);
        // Until the other process has closed its own.
        let standard_output = Fd::new(1);
        let _ = read(&standard_output, &mut [0]);
        exit(0)
    });
    drop(master);
    drop(writer);
}
