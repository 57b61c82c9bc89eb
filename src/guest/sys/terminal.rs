//! Pseudo-terminals (pty(7), ioctl_tty(2)).

use super::{Fd, O_CLOEXEC, O_NONBLOCK, O_RDWR, Result, nr, open, syscall};
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
/// Where the last byte-sized half of `c_lflag` and the character `VEOF` are in it.
const LOCAL_FLAGS: usize = 12;
const VEOF: usize = 17 + 4;
const ICANON: u8 = 2;

/// Makes a terminal from the multiplexer of a `devpts` directory. Returns the controlling end, which does not block, and the program's.
pub fn open_terminal(devpts: &Fd, size: TerminalSize) -> Result<(Fd, Fd)> {
    let master = open(Some(devpts), c"ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK)?;
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

/// The character that ends the input of a program in the terminal. None where it reads characters as they come.
pub fn end_of_input(terminal: &Fd) -> Result<Option<u8>> {
    let mut termios = [0u8; TERMIOS_SIZE];
    // SAFETY: the kernel writes one struct termios.
    unsafe { call!(nr::IOCTL, terminal.arg(), TCGETS, termios.as_mut_ptr() as usize) }?;
    // 0 is no character there (`_POSIX_VDISABLE`).
    let is_set = |character: &u8| termios[LOCAL_FLAGS] & ICANON != 0 && *character != 0;
    Ok(Some(termios[VEOF]).filter(is_set))
}
