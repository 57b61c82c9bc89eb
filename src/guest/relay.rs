//! Relays between a program's pipe and a stream to the host. Owned by the shim's one thread.
//!
//! Programs get pipes, because a socket cannot be opened again through `/dev/stdout`. The bytes move inside the kernel
//! (`splice`), so the shim buffers nothing. Each side waits when the other takes no more.

use super::sys::{self, Errno, Fd, POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, Poll};

/// What is moved in one call.
const PIECE: usize = 64 * 1024;
/// Calls in a row before it is another one's turn.
const MAX_CALLS: usize = 8;

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RelayDirection {
    /// From the host into the program.
    In,
    /// From the program to the host.
    Out,
}

/// Which side the relay waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum WaitsFor {
    ForPipe,
    ForSocket,
}

/// Whether there is more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RelayProgress {
    Going,
    /// Nothing more can flow; to be dropped, which closes both sides.
    Done,
}

#[derive(Debug)]
pub(super) struct Relay {
    /// The process id that the host chose.
    pub(super) owner: u32,
    flow: RelayDirection,
    pipe: Fd,
    socket: Fd,
    waiting: WaitsFor,
    /// What may still flow, once the program has exited: what was in the pipe at that moment.
    left: Option<u64>,
}

impl Relay {
    /// Both descriptors are to be non-blocking.
    pub(super) fn new(owner: u32, flow: RelayDirection, pipe: Fd, socket: Fd) -> Self {
        let waiting = match flow {
            RelayDirection::In => WaitsFor::ForSocket,
            RelayDirection::Out => WaitsFor::ForPipe,
        };
        Self { owner, flow, pipe, socket, waiting, left: None }
    }

    /// Returns what to wait for, pipe first. The other side's end matters too, where it differs from being full.
    pub(super) fn polls(&self) -> [Poll; 2] {
        let entry = |fd: &Fd, events| Poll { fd: fd.raw(), events, happened: 0 };
        // A pipe whose other end has gone says so forever, which must not wake the shim while the socket is awaited.
        let ignored = Poll { fd: -1, events: 0, happened: 0 };
        match (self.flow, self.waiting) {
            (RelayDirection::Out, WaitsFor::ForPipe) => [entry(&self.pipe, POLLIN), entry(&self.socket, POLLRDHUP)],
            (RelayDirection::Out, WaitsFor::ForSocket) => [ignored, entry(&self.socket, POLLOUT | POLLRDHUP)],
            (RelayDirection::In, WaitsFor::ForSocket) => [entry(&self.pipe, 0), entry(&self.socket, POLLIN)],
            (RelayDirection::In, WaitsFor::ForPipe) => [entry(&self.pipe, POLLOUT), ignored],
        }
    }

    /// Moves what can be moved, after one of [`Relay::polls`] happened.
    pub(super) fn advance(&mut self, [pipe, socket]: [i16; 2]) -> RelayProgress {
        let far_end_gone = match self.flow {
            // The host reads no more: the program shall see a broken pipe.
            RelayDirection::Out => socket & (POLLERR | POLLHUP | POLLRDHUP) != 0,
            // The program reads no more: the host shall see a closed stream.
            RelayDirection::In => pipe & POLLERR != 0,
        };
        if far_end_gone {
            return RelayProgress::Done;
        }
        if pipe == 0 && socket == 0 {
            return RelayProgress::Going;
        }
        self.pump()
    }

    /// The program itself has exited. Only what it has already written is still forwarded: what it left running may keep the pipe open for ever.
    pub(super) fn owner_exited(&mut self) -> RelayProgress {
        if self.flow == RelayDirection::In {
            return RelayProgress::Done;
        }
        let left = sys::readable_bytes(&self.pipe).unwrap_or(0);
        self.left = Some(left);
        if left == 0 { RelayProgress::Done } else { self.pump() }
    }

    fn pump(&mut self) -> RelayProgress {
        for _ in 0..MAX_CALLS {
            let max = self.left.map_or(PIECE, |left| usize::try_from(left).unwrap_or(PIECE).min(PIECE));
            let moved = match self.flow {
                RelayDirection::Out => sys::splice(&self.pipe, &self.socket, max),
                RelayDirection::In => sys::splice(&self.socket, &self.pipe, max),
            };
            match moved {
                Ok(0) => return RelayProgress::Done,
                Ok(moved) => {
                    if let Some(left) = &mut self.left {
                        *left = left.saturating_sub(moved as u64);
                        if *left == 0 {
                            return RelayProgress::Done;
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.waiting = self.obstacle();
                    return RelayProgress::Going;
                }
                Err(_) => return RelayProgress::Done,
            }
        }
        RelayProgress::Going
    }

    /// Which side it was that had nothing or took nothing.
    fn obstacle(&self) -> WaitsFor {
        match self.flow {
            RelayDirection::Out if sys::readable_bytes(&self.pipe).unwrap_or(0) > 0 => WaitsFor::ForSocket,
            RelayDirection::Out => WaitsFor::ForPipe,
            RelayDirection::In => {
                let mut polls = [Poll { fd: self.pipe.raw(), events: POLLOUT, happened: 0 }];
                match sys::poll(&mut polls, Some(0)) {
                    Ok(0) => WaitsFor::ForPipe,
                    _ => WaitsFor::ForSocket,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A socket that std made.
    fn adopt(socket: UnixStream) -> Fd {
        socket.set_nonblocking(true).unwrap();
        Fd::from(OwnedFd::from(socket))
    }

    fn file(fd: Fd) -> std::fs::File {
        std::fs::File::from(OwnedFd::from(fd))
    }

    /// A relay, the program's end of its pipe, the host's end of its stream.
    fn relay(flow: RelayDirection) -> (Relay, std::fs::File, UnixStream) {
        let (reader, writer) = sys::pipe().unwrap();
        let (guest, host) = UnixStream::pair().unwrap();
        let (mine, theirs) = if flow == RelayDirection::Out { (reader, writer) } else { (writer, reader) };
        sys::set_nonblocking(&mine).unwrap();
        (Relay::new(1, flow, mine, adopt(guest)), file(theirs), host)
    }

    /// One turn of the loop, which must find something to do.
    fn turn(relay: &mut Relay) -> RelayProgress {
        let mut polls = relay.polls();
        assert!(sys::poll(&mut polls, Some(sys::now_ns() + 2_000_000_000)).unwrap() > 0, "nothing happened");
        relay.advance(polls.map(|poll| poll.happened))
    }

    fn is_idle(relay: &Relay) -> bool {
        sys::poll(&mut relay.polls(), Some(0)).unwrap() == 0
    }

    #[test]
    fn output_flows_until_the_program_closes_it() {
        let (mut relay, mut program, mut host) = relay(RelayDirection::Out);
        assert!(is_idle(&relay));
        program.write_all(b"hello").unwrap();
        assert_eq!(turn(&mut relay), RelayProgress::Going);
        assert!(is_idle(&relay));
        drop(program);
        assert_eq!(turn(&mut relay), RelayProgress::Done);
        drop(relay);
        let mut all = String::new();
        host.read_to_string(&mut all).unwrap();
        assert_eq!(all, "hello");
    }

    #[test]
    fn a_host_that_does_not_read_is_waited_for_and_nothing_is_lost() {
        let (mut relay, mut program, mut host) = relay(RelayDirection::Out);
        let data: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        let sent = data.clone();
        let writer = std::thread::spawn(move || program.write_all(&sent).unwrap());
        while relay.waiting == WaitsFor::ForPipe {
            turn(&mut relay);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        turn_if_ready(&mut relay);
        assert!(is_idle(&relay), "a full host is not polled in a circle");
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            host.read_to_end(&mut all).unwrap();
            all
        });
        while turn(&mut relay) == RelayProgress::Going {}
        drop(relay);
        writer.join().unwrap();
        assert!(reader.join().unwrap() == data);
    }

    fn turn_if_ready(relay: &mut Relay) {
        while !is_idle(relay) {
            turn(relay);
        }
    }

    #[test]
    fn after_the_exit_only_what_was_written_before_is_forwarded() {
        let (mut relay, mut program, mut host) = relay(RelayDirection::Out);
        program.write_all(b"last words").unwrap();
        // The program's end stays open, as a background process keeps it.
        assert_eq!(relay.owner_exited(), RelayProgress::Done);
        drop(relay);
        let mut all = String::new();
        host.read_to_string(&mut all).unwrap();
        assert_eq!(all, "last words");
        assert!(program.write_all(b"more").is_err());
    }

    #[test]
    fn after_the_exit_a_slow_host_still_gets_everything() {
        let (mut relay, mut program, mut host) = relay(RelayDirection::Out);
        let filler = vec![b'x'; 60_000];
        let mut sent = 0;
        while relay.waiting == WaitsFor::ForPipe {
            program.write_all(&filler).unwrap();
            sent += filler.len();
            turn_if_ready(&mut relay);
        }
        assert_eq!(relay.owner_exited(), RelayProgress::Going);
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            host.read_to_end(&mut all).unwrap();
            all.len()
        });
        while turn(&mut relay) == RelayProgress::Going {}
        drop(relay);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn a_host_that_hangs_up_breaks_the_pipe() {
        let (mut relay, mut program, host) = relay(RelayDirection::Out);
        drop(host);
        assert_eq!(turn(&mut relay), RelayProgress::Done);
        drop(relay);
        assert_eq!(program.write_all(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn input_flows_until_the_host_ends_it() {
        let (mut relay, mut program, mut host) = relay(RelayDirection::In);
        host.write_all(b"to sort").unwrap();
        assert_eq!(turn(&mut relay), RelayProgress::Going);
        host.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(turn(&mut relay), RelayProgress::Done);
        drop(relay);
        let mut all = String::new();
        program.read_to_string(&mut all).unwrap();
        assert_eq!(all, "to sort");
    }

    #[test]
    fn a_program_that_does_not_read_is_waited_for() {
        let (mut relay, mut program, mut host) = relay(RelayDirection::In);
        let data: Vec<u8> = (0..500_000u32).flat_map(u32::to_le_bytes).collect();
        let sent = data.clone();
        let writer = std::thread::spawn(move || host.write_all(&sent).unwrap());
        while relay.waiting == WaitsFor::ForSocket {
            turn(&mut relay);
        }
        assert!(is_idle(&relay), "a full pipe is not polled in a circle");
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            program.read_to_end(&mut all).unwrap();
            all
        });
        while turn(&mut relay) == RelayProgress::Going {}
        drop(relay);
        writer.join().unwrap();
        assert!(reader.join().unwrap() == data);
    }

    #[test]
    fn a_program_that_closes_its_input_closes_the_stream() {
        let (mut relay, program, mut host) = relay(RelayDirection::In);
        drop(program);
        assert_eq!(turn(&mut relay), RelayProgress::Done);
        drop(relay);
        assert_eq!(host.write_all(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    }
}
