//! Shims that break the protocol, flood, or fall silent in the middle.

use super::*;
use crate::container::control::outbox::{MAX_UNSENT, Outbox, Urgency};
use crate::container::control::stream::{ControlStream, ReadExtent, StreamError};
use crate::event_loop::Handler;
use crate::event_loop::Interest;
use crate::proto::{End, FROM_GUEST_MAX, HEADER_SIZE, Stage};

/// Has the client handle what the shim sends.
fn receive(client: &mut ControlClient, mut far: &UnixStream, bytes: &[u8]) {
    far.write_all(bytes).unwrap();
    client.ready(super::super::client::STREAM, Interest::IN);
}

#[test]
fn answers_to_no_request_are_dropped_and_counted() {
    let (mut client, far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    let unknown = [
        FromGuest::Spawned { pid: 1 },
        FromGuest::SpawnFailed { step: SpawnStep::Exec, errno: 2 },
        FromGuest::Exited { code: 0 },
        FromGuest::Signaled { signo: 9, oom: true },
    ];
    for message in &unknown {
        for process in [0, number + 1, u32::MAX] {
            receive(&mut client, &far, &frame(process, message));
        }
    }
    // Said before this conversation, or on another connection.
    let misplaced = [
        FromGuest::Hello { min: 1, max: 3 },
        FromGuest::Ready { user_space_ns: 1, ready_ns: 2, kernel: 0 },
        FromGuest::Connected { errno: 0 },
    ];
    misplaced.iter().for_each(|message| receive(&mut client, &far, &frame(number, message)));
    assert_eq!(client.session.dropped.count, 15);
    assert!(!client.session.has_ended() && client.session.processes.len() == 1);
    assert!(answer.try_recv().is_err() && !state.has_ended(), "the process of ours is not touched");
    // What a newer shim may say is no such answer, nor is its last word.
    receive(&mut client, &far, &[[0u8; 8], [0xff, 0xff, 0, 0, 0, 0, 0, 0]].concat()[..HEADER_SIZE]);
    receive(&mut client, &far, &frame(0, &FromGuest::Ending { end: End::PowerOff }));
    assert_eq!(client.session.dropped.count, 15);
    receive(&mut client, &far, &frame(number, &FromGuest::Spawned { pid: 1 }));
    assert_eq!(answer.recv().unwrap().unwrap(), number);
}

#[test]
fn the_first_end_of_a_process_counts() {
    let (mut client, far) = client();
    let (number, state, _answer) = spawn(&mut client, None);
    receive(&mut client, &far, &frame(number, &FromGuest::Spawned { pid: 1 }));
    for code in [3, 4, 5] {
        receive(&mut client, &far, &frame(number, &FromGuest::Exited { code }));
    }
    assert_eq!(now(&state).unwrap().code(), Some(3));
    assert!(client.session.processes.is_empty() && client.session.dropped.count == 2);
}

#[test]
fn an_end_without_a_start_answers_both_waiters() {
    let (mut client, far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    receive(&mut client, &far, &frame(number, &FromGuest::Exited { code: 1 }));
    assert_eq!(answer.recv().unwrap().unwrap(), number);
    assert_eq!(now(&state).unwrap().code(), Some(1));
}

#[test]
fn spawned_after_spawn_failed_is_dropped() {
    let (mut client, far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    receive(&mut client, &far, &frame(number, &FromGuest::SpawnFailed { step: SpawnStep::Exec, errno: libc::ENOENT }));
    receive(&mut client, &far, &frame(number, &FromGuest::Spawned { pid: 1 }));
    assert_eq!(answer.recv().unwrap().unwrap_err().kind(), ErrorKind::NotFound);
    assert!(state.has_ended() && client.session.processes.is_empty() && client.session.dropped.count == 1);
    assert!(!client.session.has_ended());
}

#[test]
fn a_second_start_of_the_same_process_ends_the_conversation() {
    let (mut client, far) = client();
    let (number, state, _answer) = spawn(&mut client, None);
    let (_, others, other) = spawn(&mut client, None);
    receive(&mut client, &far, &frame(number, &FromGuest::Spawned { pid: 1 }).repeat(2));
    let (by, why) = client.session.gone.clone().unwrap();
    assert!(why.contains("second answer") && by > Instant::now(), "{why}");
    assert!(!state.has_ended() && !others.has_ended(), "the machine's end, which is near, tells of theirs");
    // Requests from now on are refused at once, and the waiters are those of the channel alone.
    assert_eq!(client.kill(number).unwrap_err().kind(), ErrorKind::InvalidState);
    drop(client);
    assert!(state.has_ended() && others.has_ended() && other.recv().is_err());
}

#[test]
fn a_process_that_starts_after_its_host_gave_it_up_answers_no_request() {
    let (mut client, far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    pass(&mut client, START_TIMEOUT);
    pass(&mut client, KILL_MARGIN);
    assert_eq!(answer.recv().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(state.has_ended());
    receive(&mut client, &far, &frame(number, &FromGuest::Spawned { pid: 1 }));
    assert_eq!(client.session.dropped.count, 1);
    // The answer to the kill, which was sent at the time-out.
    receive(&mut client, &far, &frame(number, &FromGuest::Signaled { signo: 9, oom: false }));
    assert!(client.session.processes.is_empty() && !client.session.has_ended());
    drop(client);
    assert_eq!(kills(&sent_to(&far), number), 1);
}

/// Sends large requests, as long as they are taken.
fn fill(mut send: impl FnMut(&FromHost<'_>) -> Result<()>) {
    let (mut request, _state) = program(None).unwrap();
    request.argv.push(&[b'x'; 512 * 1024]).unwrap();
    while send(&request.message()).is_ok() {}
}

#[test]
fn a_shim_that_does_not_read_gets_a_bounded_amount_and_all_kills() {
    let (mut client, far) = client();
    let (number, state, _answer) = spawn(&mut client, Some(Duration::from_secs(5)));
    receive(&mut client, &far, &frame(number, &FromGuest::Spawned { pid: 1 }));
    let signal = FromHost::Signal { signo: 1, group: false };
    fill(|message| client.send(number, message));
    let refused = loop {
        if let Err(error) = client.send(number, &signal) {
            break error;
        }
        assert!(client.session.outbox.len() <= MAX_UNSENT);
    };
    assert_eq!(refused.kind(), ErrorKind::ResourceExhausted);
    let full = client.session.outbox.len();
    assert!(full > MAX_UNSENT - 100 && client.send(number, &signal).is_err());
    // The first kill of a process finds room, and is sent when the shim reads. Further ones do not.
    client.kill(number).unwrap();
    assert_eq!(client.kill(number).unwrap_err().kind(), ErrorKind::ResourceExhausted);
    let full = full + HEADER_SIZE;
    assert_eq!(client.session.outbox.len(), full);
    // No caller gets more in. A new one is refused at once, and its process is none.
    let (request, others) = program(None).unwrap();
    let (reply, answer) = Reply::detached(SPAWN_TIMEOUT);
    client.start(&request, reply);
    assert_eq!(answer.recv().unwrap().unwrap_err().kind(), ErrorKind::ResourceExhausted);
    assert!(!others.has_ended() && client.session.processes.len() == 1);
    // The process has ended for the host all the same.
    pass(&mut client, KILL_MARGIN);
    assert_eq!(now(&state).unwrap().signal(), Some(9));
    assert_eq!(client.session.outbox.len(), full);
}

#[test]
fn kills_of_given_up_programs_go_beyond_the_bound() {
    let (mut client, far) = client();
    let (number, _state, _answer) = spawn(&mut client, None);
    fill(|message| client.send(number, message));
    while client.send(number, &FromHost::Signal { signo: 1, group: false }).is_ok() {}
    let full = client.session.outbox.len();
    pass(&mut client, START_TIMEOUT);
    assert_eq!(client.session.outbox.len(), full + HEADER_SIZE);
    // The shim reads at last.
    let reader = std::thread::spawn(move || sent_to(&far));
    while client.session.outbox.len() > 0 {
        client.session.flush();
    }
    drop(client);
    assert_eq!(kills(&reader.join().unwrap(), number), 1);
}

#[test]
fn half_a_frame_and_silence_leave_time_outs_in_force() {
    let whole = frame(1, &FromGuest::Spawned { pid: 1 });
    for half in 1..whole.len() {
        let (mut client, far) = client();
        let (_, state, answer) = spawn(&mut client, None);
        receive(&mut client, &far, &whole[..half]);
        assert!(answer.try_recv().is_err() && !client.session.has_ended());
        pass(&mut client, START_TIMEOUT);
        pass(&mut client, KILL_MARGIN);
        assert_eq!(answer.recv().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(state.has_ended());
    }
}

#[test]
fn the_end_of_the_stream_in_a_frame_ends_the_conversation() {
    let (mut client, far) = client();
    let (number, _state, _answer) = spawn(&mut client, None);
    receive(&mut client, &far, &frame(number, &FromGuest::Spawned { pid: 1 })[..HEADER_SIZE + 1]);
    far.shutdown(std::net::Shutdown::Write).unwrap();
    client.listen();
    assert!(client.session.gone.as_ref().unwrap().1.contains("in the middle of a message"));
}

#[test]
fn frames_that_are_too_long_or_malformed_end_the_conversation() {
    let too_long = [(FROM_GUEST_MAX as u32 + 1).to_le_bytes(), [1, 0, 0, 0], [4, 1, 0, 0]].concat();
    // A field that is longer than its payload.
    let malformed = [&[5, 0, 0, 0], &[1, 0, 0, 0], &[4, 1, 0, 0][..], &[1, 0xff, 0, 0, 0]].concat();
    for bytes in [too_long, vec![0xff; 64], malformed] {
        let (mut client, far) = client();
        let (_, _state, _answer) = spawn(&mut client, None);
        receive(&mut client, &far, &bytes);
        let why = client.session.gone.clone().unwrap().1;
        assert!(why.contains("breaks the protocol"), "{why}");
        // What comes behind is not looked at.
        let _ = (&far).write_all(&frame(1, &FromGuest::Exited { code: 0 }));
        client.listen();
        assert_eq!(client.session.dropped.count, 0);
    }
}

#[test]
fn all_words_of_a_shim_that_fails_arrive_behind_its_ready() {
    use crate::container::control::handshake::{StartDeadline, converse};
    let (near, far, _tail) = VsockStream::pair().unwrap();
    let said = [
        frame(0, &FromGuest::Hello { min: 1, max: 3 }),
        frame(0, &FromGuest::Ready { user_space_ns: 1, ready_ns: 2, kernel: 0 }),
        frame(0, &FromGuest::Failed { stage: Stage::Reaper, errno: 0, text: b"gone" }),
    ];
    (&far).write_all(&said.concat()).unwrap();
    let start_deadline = StartDeadline { deadline: Some(Instant::now() + Duration::from_secs(10)), cancel: None };
    let ready = converse(near, Instant::now(), &start_deadline).unwrap();
    assert!(ready.stream.has_undecoded());
    let timer = crate::sys::Timer::new().unwrap();
    let mut client = ControlClient::new(ready.stream, timer, crate::vm::WeakVm::dangling()).unwrap();
    // Nothing more arrives. The timer is due at once.
    assert!(crate::sys::wait_any(&[client.session.timer()], Some(Duration::from_secs(10))).unwrap());
    client.ready(super::super::client::TIMER, Interest::IN);
    assert!(client.session.gone.as_ref().unwrap().1.contains("it failed: gone"));
}

#[test]
fn an_outbox_keeps_less_than_twice_its_bound() {
    let (near, far, _tail) = VsockStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let mut outbox = Outbox::new(near);
    let (request, _state) = program(None).unwrap();
    let signal = FromHost::Signal { signo: 1, group: false };
    let mut buffer = vec![0; 1 << 16];
    for _ in 0..4 {
        fill(|message| outbox.push(1, message, Urgency::Ordinary));
        while outbox.push(1, &signal, Urgency::Ordinary).is_ok() {}
        assert!(outbox.push(1, &request.message(), Urgency::Ordinary).is_err());
        let before = outbox.len();
        for _ in 0..64 {
            let _ = (&far).read(&mut buffer);
            assert!(outbox.flush(1) || outbox.len() <= before);
        }
        assert!(outbox.len() < before && outbox.kept() <= 2 * MAX_UNSENT, "{} kept", outbox.kept());
    }
    // The shim hangs up: nothing is kept for it.
    drop(far);
    outbox.flush(2);
    assert_eq!((outbox.len(), outbox.kept()), (0, 0));
}

#[test]
fn a_stream_reads_no_more_often_than_it_may() {
    let (near, far, _tail) = VsockStream::pair().unwrap();
    let mut stream = ControlStream::new(near, ReadExtent::Ahead).unwrap();
    let one = frame(1, &FromGuest::Exited { code: 0 });
    (&far).write_all(&one.repeat(2 * READ_SIZE / one.len())).unwrap();
    let (mut reads, mut messages) = (1, 0);
    while stream.next(&mut reads).unwrap().is_some() {
        messages += 1;
    }
    assert_eq!((reads, messages), (0, READ_SIZE / one.len()));
    // Without another read there is nothing, and the end is seen by a read alone.
    assert!(stream.next(&mut 0).unwrap().is_none());
    drop(far);
    let mut reads = 10;
    let end = loop {
        match stream.next(&mut reads) {
            Ok(it) => assert!(it.is_some()),
            Err(error) => break error,
        }
    };
    assert!(matches!(end, StreamError::Closed { cut_off: _ }), "{end:?}");
}
