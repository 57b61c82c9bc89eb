//! The terminal of a program: its controlling end, and its streams to the host. Owned by the shim's one thread.
//!
//! What the host sends is typed, what the program prints is sent to the host. Each side waits when the other takes no more.

use super::sys::{self, Errno, Fd, POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, Poll};
use crate::proto::TerminalSize;

/// What is moved in one call: as much as Linux gives of a terminal at once.
const PIECE: usize = 4096;
/// What a terminal holds of a program's output at most, and then some (Linux, drivers/tty/pty.c and n_tty.c).
const MAX_HELD: usize = 64 * 1024;
/// Calls in a row before it is another one's turn.
const MAX_CALLS: usize = 16;

/// Bytes on their way in one direction.
#[derive(Debug)]
struct Piece {
    bytes: [u8; PIECE],
    from: usize,
    to: usize,
}

impl Piece {
    const fn new() -> Self {
        Self { bytes: [0; PIECE], from: 0, to: 0 }
    }

    fn is_empty(&self) -> bool {
        self.from == self.to
    }

    /// Takes what there is to read, in place of what it had. 0: the source has ended.
    fn fill(&mut self, source: &Fd) -> Result<usize, Errno> {
        let n = sys::read(source, &mut self.bytes)?;
        (self.from, self.to) = (0, n.min(PIECE));
        Ok(n)
    }

    /// Gives what is taken. True when nothing is left.
    fn drain(&mut self, to: &Fd) -> Result<bool, Errno> {
        while !self.is_empty() {
            match sys::write(to, self.bytes.get(self.from..self.to).unwrap_or_default()) {
                Ok(n) => self.from = (self.from + n).min(self.to),
                Err(Errno::EAGAIN) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(true)
    }
}

/// Whether a direction of a terminal goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Going,
    Ended,
}

/// The terminal of one program.
#[derive(Debug)]
pub(super) struct Terminal {
    /// The process id that the host chose.
    pub(super) owner: u32,
    /// Always there until it is dropped.
    master: Option<Fd>,
    /// The program's end, held until the program exits: a moment in which no program has it open is no end.
    slave: Option<Fd>,
    /// From the host; `None` when it types nothing more.
    input: Option<Fd>,
    /// To the host, or to `/dev/null`; `None` when no program has the terminal open any more.
    output: Option<Fd>,
    typed: Piece,
    /// What was typed ends with a whole line, or there was nothing.
    line_ended: bool,
    printed: Piece,
    /// What may still be sent, once the program itself has exited.
    left: Option<usize>,
}

/// What happened to the three descriptors of [`Terminal::polls`].
pub(super) type Happened = [i16; 3];

impl Terminal {
    /// All descriptors are to be non-blocking.
    pub(super) fn new(owner: u32, (master, slave): (Fd, Fd), input: Option<Fd>, output: Fd) -> Self {
        let (typed, printed) = (Piece::new(), Piece::new());
        let (master, slave, output) = (Some(master), Some(slave), Some(output));
        Self { owner, master, slave, input, output, typed, line_ended: true, printed, left: None }
    }

    pub(super) fn resize(&self, size: TerminalSize) -> Result<(), Errno> {
        self.master.as_ref().map_or(Ok(()), |master| sys::set_size(master, size))
    }

    /// Returns what to wait for: the terminal, the input, the output.
    pub(super) fn polls(&self) -> [Poll; 3] {
        let entry = |fd: &Fd, events| Poll { fd: fd.raw(), events, happened: 0 };
        let ignored = Poll { fd: -1, events: 0, happened: 0 };
        let reads = self.output.is_some() && self.printed.is_empty();
        // A terminal that no program has open says so forever, which must not wake the shim while something else is awaited.
        let master = match (&self.master, reads, !self.typed.is_empty()) {
            (None, ..) | (_, false, false) => ignored,
            (Some(master), reads, writes) => {
                entry(master, if reads { POLLIN } else { 0 } | if writes { POLLOUT } else { 0 })
            }
        };
        let input = self.input.as_ref().filter(|_| self.typed.is_empty()).map_or(ignored, |fd| entry(fd, POLLIN));
        let sends = if self.printed.is_empty() { 0 } else { POLLOUT };
        [master, input, self.output.as_ref().map_or(ignored, |fd| entry(fd, sends | POLLRDHUP))]
    }

    /// Moves what can be moved. False when the host has hung up, or everything is over: dropping it hangs up the program's terminal.
    pub(super) fn advance(&mut self, [master, input, output]: Happened) -> bool {
        if output & (POLLERR | POLLHUP | POLLRDHUP) != 0 {
            return false;
        }
        if input != 0 || (master != 0 && !self.typed.is_empty()) {
            self.carry_input();
            if master & POLLHUP != 0 && !self.typed.is_empty() {
                // No program will read it, and the terminal would say so forever.
                (self.typed, self.input) = (Piece::new(), None);
            }
        }
        if master == 0 && output == 0 { true } else { self.carry_output() }
    }

    /// The program itself has exited. Only what it has already printed is still forwarded.
    pub(super) fn owner_exited(&mut self) -> bool {
        (self.left, self.input, self.slave) = (Some(MAX_HELD), None, None);
        self.typed = Piece::new();
        self.carry_output()
    }

    fn carry_input(&mut self) {
        for _ in 0..MAX_CALLS {
            let Some(master) = &self.master else { return };
            match self.typed.drain(master) {
                Ok(true) => {}
                Ok(false) => return,
                // What is typed goes nowhere.
                Err(_) => return (self.typed, self.input) = (Piece::new(), None),
            }
            let Some(source) = &self.input else { return };
            match self.typed.fill(source) {
                Ok(0) => self.end_input(),
                Ok(n) => self.line_ended = self.typed.bytes.get(n - 1) == Some(&b'\n'),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => self.input = None,
            }
        }
    }

    /// The host types nothing more. A program that reads lines learns of it as of a key (termios(3), VEOF). Where a line has begun, the
    /// first such key gives that to the program, and a second one ends the input.
    fn end_input(&mut self) {
        self.input = None;
        let Some(master) = &self.master else { return };
        if let Ok(Some(key)) = sys::end_of_input(master) {
            [self.typed.bytes[0], self.typed.bytes[1]] = [key; 2];
            (self.typed.from, self.typed.to) = (0, if self.line_ended { 1 } else { 2 });
        }
    }

    /// False when nothing more will come.
    fn carry_output(&mut self) -> bool {
        for _ in 0..MAX_CALLS {
            let Some(to) = &self.output else { return self.left.is_none() };
            match self.printed.drain(to) {
                Ok(true) => {}
                Ok(false) => return true,
                Err(_) => return false,
            }
            if self.left == Some(0) {
                return false;
            }
            match self.read_master() {
                Ok(Flow::Going) => {}
                Ok(Flow::Ended) => self.output = None,
                Err(Errno::EAGAIN) => return self.left.is_none(),
                Err(_) => {}
            }
        }
        true
    }

    fn read_master(&mut self) -> Result<Flow, Errno> {
        let Some(master) = &self.master else { return Ok(Flow::Ended) };
        match self.printed.fill(master) {
            // EIO: no program has it open.
            Ok(0) | Err(Errno::EIO) => Ok(Flow::Ended),
            Ok(n) => {
                if let Some(left) = &mut self.left {
                    *left = left.saturating_sub(n);
                }
                Ok(Flow::Going)
            }
            Err(errno @ (Errno::EAGAIN | Errno::EINTR)) => Err(errno),
            Err(_) => Ok(Flow::Ended),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(master) = self.master.take() {
            sys::hang_up(master);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    const SIZE: TerminalSize = TerminalSize { rows: 24, columns: 80 };

    /// A terminal, the program's end of it, and the host's ends of both streams.
    struct Typed {
        terminal: Option<Terminal>,
        program: Option<File>,
        keys: Option<UnixStream>,
        screen: UnixStream,
    }

    fn adopt(socket: UnixStream) -> Fd {
        socket.set_nonblocking(true).unwrap();
        Fd::from(OwnedFd::from(socket))
    }

    fn typed() -> Typed {
        let dev = sys::open(None, c"/dev", sys::O_PATH).unwrap();
        let (master, slave) = sys::open_terminal(&dev, SIZE).unwrap();
        let ((keys, input), (screen, output)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let program = Some(File::from(OwnedFd::from(sys::duplicate(&slave).unwrap())));
        let terminal = Some(Terminal::new(1, (master, slave), Some(adopt(input)), adopt(output)));
        Typed { terminal, program, keys: Some(keys), screen }
    }

    impl Typed {
        /// Turns of the loop until nothing happens.
        fn run(&mut self) {
            while let Some(terminal) = &mut self.terminal {
                let mut polls = terminal.polls();
                if sys::poll(&mut polls, Some(sys::now_ns() + 50_000_000)).unwrap() == 0 {
                    return;
                }
                if !terminal.advance(polls.map(|poll| poll.happened)) {
                    self.terminal = None;
                }
            }
        }

        /// What the host has been sent, after the terminal is gone.
        fn all(mut self) -> String {
            self.terminal = None;
            let mut all = String::new();
            self.screen.read_to_string(&mut all).unwrap();
            all
        }

        /// A line, as the program reads it.
        fn read(&mut self) -> String {
            let mut line = [0; 100];
            let n = self.program.as_mut().unwrap().read(&mut line).unwrap();
            String::from_utf8_lossy(&line[..n]).into_owned()
        }
    }

    #[test]
    fn typed_lines_are_echoed_and_read_and_printed_ones_have_carriage_returns() {
        let mut it = typed();
        it.keys.as_mut().unwrap().write_all(b"hello\n").unwrap();
        it.run();
        assert_eq!(it.read(), "hello\n");
        it.program.as_mut().unwrap().write_all(b"world\n").unwrap();
        it.run();
        assert_eq!(it.all(), "hello\r\nworld\r\n");
    }

    #[test]
    fn end_of_the_hosts_input_ends_what_a_program_reads() {
        for (typed_text, read) in [("", vec![""]), ("line\n", vec!["line\n", ""]), ("part", vec!["part", ""])] {
            let mut it = typed();
            it.keys.take().unwrap().write_all(typed_text.as_bytes()).unwrap();
            it.run();
            assert_eq!(read.iter().map(|_| it.read()).collect::<Vec<_>>(), read, "{typed_text:?}");
        }
    }

    #[test]
    fn host_that_reads_no_more_hangs_up() {
        let mut it = typed();
        let (mine, _) = UnixStream::pair().unwrap();
        drop(std::mem::replace(&mut it.screen, mine));
        it.run();
        assert!(it.terminal.is_none());
        // At its end, or on the way there.
        assert!(!matches!(it.program.unwrap().read(&mut [0]), Ok(1..)));
    }

    #[test]
    fn output_of_an_exited_program_is_forwarded_whole_to_a_slow_host() {
        let mut it = typed();
        let mut program = it.program.take().unwrap();
        let writer = std::thread::spawn(move || (0..20_000).for_each(|n| writeln!(program, "{n}").unwrap()));
        let mut screen = it.screen.try_clone().unwrap();
        let reader = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            let mut all = String::new();
            screen.read_to_string(&mut all).unwrap();
            all
        });
        while !writer.is_finished() {
            it.run();
        }
        writer.join().unwrap();
        if !it.terminal.as_mut().unwrap().owner_exited() {
            it.terminal = None;
        }
        it.run();
        assert!(it.terminal.is_none(), "it waits for more");
        let expected: String = (0..20_000).map(|n| format!("{n}\r\n")).collect();
        assert!(reader.join().unwrap() == expected);
    }

    #[test]
    fn terminal_that_no_program_has_open_is_not_polled_in_a_circle_and_can_be_opened_again() {
        let mut it = typed();
        let again = std::fs::read_link(format!("/proc/self/fd/{}", it.program.as_ref().unwrap().as_raw_fd())).unwrap();
        // In raw mode the terminal keeps all that is typed until it is full.
        assert!(
            std::process::Command::new("stty")
                .args(["raw", "-echo"])
                .stdin(it.program.take().unwrap())
                .status()
                .unwrap()
                .success()
        );
        it.run();
        let mut keys = it.keys.take().unwrap();
        keys.set_nonblocking(true).unwrap();
        while keys.write(&[b'x'; 1000]).is_ok() {
            it.run();
        }
        let terminal = it.terminal.as_ref().unwrap();
        assert_eq!(sys::poll(&mut terminal.polls(), Some(0)), Ok(0));
        assert!(terminal.resize(TerminalSize { rows: 1, columns: u16::MAX }).is_ok());
        it.program = Some(File::options().read(true).write(true).open(again).unwrap());
        it.program.as_mut().unwrap().write_all(b"back").unwrap();
        it.run();
        assert_eq!(it.all(), "back");
    }

    #[test]
    fn output_after_the_exit_is_bounded_beside_a_process_that_prints_for_ever() {
        let mut it = typed();
        let mut program = it.program.take().unwrap();
        let writer = std::thread::spawn(move || while program.write_all(&[b'x'; 4000]).is_ok() {});
        let mut screen = it.screen.try_clone().unwrap();
        let reader = std::thread::spawn(move || std::io::copy(&mut screen, &mut std::io::sink()).unwrap());
        if !it.terminal.as_mut().unwrap().owner_exited() {
            it.terminal = None;
        }
        it.run();
        assert!(it.terminal.is_none());
        assert!(reader.join().unwrap() <= (MAX_HELD + 2 * PIECE) as u64);
        // The hang-up ends it.
        writer.join().unwrap();
    }
}
