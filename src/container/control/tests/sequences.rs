//! Any sequence of messages in any pieces: each waiter gets an answer, and bounds hold.

use proptest::prelude::*;

use super::*;
use crate::container::control::client::STREAM;
use crate::container::control::fuzzing::{assert_bounded, is_answered};
use crate::container::control::stream::{ControlStream, ReadExtent};
use crate::event_loop::{Handler, Interest};
use crate::proto::{End, Stage};

/// What happens to a channel.
#[derive(Debug, Clone)]
enum Step {
    /// Starts a program with a time-out in seconds; 0 for none.
    Start(u64),
    /// A caller gives up.
    GiveUp(usize),
    Kill(u32),
    Signal(u32),
    /// The shim sends these messages, in pieces of this length.
    Say(Vec<(u32, Said)>, usize),
    /// The shim sends bytes that are no message.
    Raw(Vec<u8>),
    /// Time passes, in seconds.
    Pass(u64),
    /// The shim reads what it was sent.
    Read,
    Close,
}

#[derive(Debug, Clone, Copy)]
enum Said {
    Spawned,
    SpawnFailed,
    Exited(u8),
    Signaled(bool),
    Hello,
    Ready,
    Ending,
    Connected,
    Failed,
}

impl Said {
    fn message(self) -> FromGuest<'static> {
        match self {
            Self::Spawned => FromGuest::Spawned { pid: 3 },
            Self::SpawnFailed => FromGuest::SpawnFailed { step: SpawnStep::Exec, errno: libc::ENOENT },
            Self::Exited(code) => FromGuest::Exited { code },
            Self::Signaled(oom) => FromGuest::Signaled { signo: 15, oom },
            Self::Hello => FromGuest::Hello { min: 1, max: 3 },
            Self::Ready => FromGuest::Ready { user_space_ns: 2, ready_ns: 1, kernel: 0 },
            Self::Ending => FromGuest::Ending { end: End::Halt },
            Self::Connected => FromGuest::Connected { errno: 5 },
            Self::Failed => FromGuest::Failed { stage: Stage::Other, errno: 1, text: b"\n\x1b" },
        }
    }
}

fn said() -> impl Strategy<Value = Said> {
    prop_oneof![
        4 => Just(Said::Spawned),
        2 => Just(Said::SpawnFailed),
        2 => any::<u8>().prop_map(Said::Exited),
        2 => any::<bool>().prop_map(Said::Signaled),
        1 => Just(Said::Hello),
        1 => Just(Said::Ready),
        1 => Just(Said::Ending),
        1 => Just(Said::Connected),
        1 => Just(Said::Failed),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let process = || prop_oneof![8 => 0..6u32, 1 => any::<u32>()];
    prop_oneof![
        4 => (0..90u64).prop_map(Step::Start),
        1 => (0..8usize).prop_map(Step::GiveUp),
        1 => process().prop_map(Step::Kill),
        1 => process().prop_map(Step::Signal),
        8 => (prop::collection::vec((process(), said()), 1..6), 1..40usize).prop_map(|(all, n)| Step::Say(all, n)),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Raw),
        2 => (0..90u64).prop_map(Step::Pass),
        1 => Just(Step::Read),
        1 => Just(Step::Close),
    ]
}

/// One caller that waits for a program: its state, its answer, and what it has learned of the start.
struct Caller {
    state: Arc<ProcessShared>,
    answer: Option<mpsc::Receiver<Result<u32>>>,
}

proptest! {
    #[test]
    fn every_waiter_gets_an_answer_or_a_time_out(steps in prop::collection::vec(step(), 1..40)) {
        let (mut client, mut far) = conversation().unwrap();
        let mut callers = Vec::<Caller>::new();
        for step in steps {
            match step {
                Step::Start(seconds) => {
                    let timeout = Some(seconds).filter(|it| *it > 0).map(Duration::from_secs);
                    let (request, state) = program(timeout).unwrap();
                    let (reply, answer) = Reply::detached(SPAWN_TIMEOUT);
                    client.start(&request, reply);
                    callers.push(Caller { state, answer: Some(answer) });
                }
                Step::GiveUp(n) => {
                    if let Some(caller) = callers.get_mut(n) {
                        caller.answer = None;
                        client.disown(&caller.state);
                    }
                }
                Step::Kill(process) => drop(client.kill(process)),
                Step::Signal(process) => drop(client.send(process, &FromHost::Signal { signo: 1, group: true })),
                Step::Say(all, piece) => {
                    let bytes: Vec<u8> = all.iter().flat_map(|(n, it)| frame(*n, &it.message())).collect();
                    for piece in bytes.chunks(piece) {
                        // One whose conversation is over cannot write.
                        let _ = far.write(piece);
                        client.ready(STREAM, Interest::IN);
                    }
                }
                Step::Raw(bytes) => {
                    let _ = far.write(&bytes);
                    client.ready(STREAM, Interest::IN);
                }
                Step::Pass(seconds) => pass(&mut client, Duration::from_secs(seconds)),
                Step::Read => drop(far.read(&mut [0; 4096])),
                Step::Close => {
                    drop(far.shutdown(std::net::Shutdown::Both));
                    client.ready(STREAM, Interest::IN);
                }
            }
            assert_bounded(&client, callers.len());
        }
        // The guest says nothing more. Each start is answered in its time, and so is the end of all that has a time-out.
        let open = |client: &ControlClient| client.session.processes.values().any(|it| it.deadline.is_some());
        for _ in 0..2 {
            pass(&mut client, START_TIMEOUT + Duration::from_secs(100));
        }
        for caller in &callers {
            let started = caller.answer.as_ref().is_none_or(|it| !matches!(it.try_recv(), Err(mpsc::TryRecvError::Empty)));
            prop_assert!(started, "a caller waits for a start");
            prop_assert!(caller.answer.is_some() || caller.state.has_ended() || !knows(&client, &caller.state));
        }
        pass(&mut client, UNANSWERED_KILL);
        prop_assert!(!open(&client) || client.session.has_ended(), "no process outlives its time");
        drop(client);
        for Caller { state, answer } in &callers {
            prop_assert!(answer.as_ref().is_none_or(|it| is_answered(state, it)));
        }
    }

    #[test]
    fn messages_are_the_same_however_they_are_cut(
        all in prop::collection::vec((any::<u32>(), said()), 0..40),
        cuts in prop::collection::vec(1..200usize, 1..40),
        ahead in any::<bool>(),
        behind in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let (near, mut far, _tail) = VsockStream::pair().unwrap();
        let extent = if ahead { ReadExtent::Ahead } else { ReadExtent::Message };
        let mut stream = ControlStream::new(near, extent).unwrap();
        let bytes: Vec<u8> = all.iter().flat_map(|(n, it)| frame(*n, &it.message())).collect();
        let (mut rest, mut cuts, mut received) = (&bytes[..], cuts.iter().cycle(), Vec::new());
        while !rest.is_empty() {
            let (piece, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            far.write_all(piece).unwrap();
            rest = later;
            if rest.is_empty() && !ahead {
                far.write_all(&behind).unwrap();
            }
            // As many reads as there are bytes are enough to read them all, one message at a time.
            let mut reads = if ahead { 2 } else { usize::MAX };
            while received.len() < all.len() && let Some(it) = stream.next(&mut reads).unwrap() {
                received.push((it.process, format!("{:?}", it.message.unwrap())));
            }
        }
        let expected: Vec<_> = all.iter().map(|(n, it)| (*n, format!("{:?}", it.message()))).collect();
        prop_assert_eq!(received, expected);
        if !ahead && !all.is_empty() {
            // What is behind the messages is still in the connection.
            let mut left = vec![0; behind.len()];
            stream.into_connection().unwrap().read_exact(&mut left).unwrap();
            prop_assert_eq!(left, behind);
        }
    }
}

fn knows(client: &ControlClient, state: &Arc<ProcessShared>) -> bool {
    client.session.processes.values().any(|it| Arc::ptr_eq(&it.state, state))
}
