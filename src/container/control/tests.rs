//! The agent against shims that say nothing, too much, or the wrong thing.

mod hostile;
mod reseed;
mod round_trips;
mod sequences;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use std::time::Instant;

use super::client::{ControlClient, MAX_READS};
use super::entry::{KILL_MARGIN, START_TIMEOUT, UNANSWERED_KILL};
use super::fuzzing::{conversation, pass, program};
use super::stream::READ_SIZE;
use super::{SPAWN_TIMEOUT, signal_process, start_program};
use crate::container::process::{ExitStatus, ProcessShared};
use crate::error::{ErrorKind, Result};
use crate::event_loop::{Loop, Reply};
use crate::proto::{Decoder, FromGuest, FromHost, SpawnStep};
use crate::virtio::vsock::VsockStream;

/// The agent's part, and a shim that blocks.
fn client() -> (ControlClient, UnixStream) {
    let (client, far) = conversation().unwrap();
    far.set_nonblocking(false).unwrap();
    (client, far)
}

/// Asks for a program whose time is over after `timeout`.
fn spawn(
    client: &mut ControlClient,
    timeout: Option<Duration>,
) -> (u32, Arc<ProcessShared>, mpsc::Receiver<Result<u32>>) {
    let (request, state) = program(timeout).unwrap();
    let (reply, answer) = Reply::detached(SPAWN_TIMEOUT);
    client.start(&request, reply);
    let number = client.session.processes.iter().find(|(_, it)| Arc::ptr_eq(&it.state, &state));
    (*number.unwrap().0, state, answer)
}

/// What the shim sends as one frame.
fn frame(process: u32, message: &FromGuest<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(process, &mut bytes).unwrap();
    bytes
}

/// How many requests to kill `process` are among what the host has sent.
fn kills(sent: &[u8], process: u32) -> usize {
    let mut decoder = Decoder::new(crate::proto::FROM_HOST_MAX);
    let (mut input, mut kills) = (sent, 0);
    while let Some(frame) = decoder.next(&mut input).unwrap() {
        kills += usize::from(frame.stream == process && FromHost::parse(&frame).unwrap() == Some(FromHost::Kill));
    }
    kills
}

/// All that the host has sent, once it has hung up.
fn sent_to(mut far: &UnixStream) -> Vec<u8> {
    let mut sent = Vec::new();
    far.read_to_end(&mut sent).unwrap();
    sent
}

fn now(state: &ProcessShared) -> Option<ExitStatus> {
    state.wait(Some(Instant::now())).unwrap()
}

#[test]
fn spawn_failed_after_spawned_closes_the_session_and_wakes_all_waiters() {
    let (mut client, _far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    client.session.handle_message(number, &FromGuest::Spawned { pid: 5 }).unwrap();
    answer.recv().unwrap().unwrap();
    let outcome = client.session.handle_message(number, &FromGuest::SpawnFailed { step: SpawnStep::Other, errno: 1 });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::GuestFailed);
    assert!(state.has_ended(), "whoever waits is told");
}

#[test]
fn ignored_kill_does_not_delay_the_timeout() {
    let (mut client, _far) = client();
    let (number, state, answer) = spawn(&mut client, Some(Duration::from_secs(5)));
    client.session.handle_message(number, &FromGuest::Spawned { pid: 5 }).unwrap();
    answer.recv().unwrap().unwrap();
    let (near, _theirs, _) = VsockStream::pair().unwrap();
    state.keep(&near);
    pass(&mut client, Duration::from_secs(5));
    assert!(now(&state).is_none(), "the guest may still say so");
    pass(&mut client, KILL_MARGIN);
    assert!(matches!(now(&state), Some(ExitStatus::TimedOut)));
    assert_eq!((&near).read(&mut [0; 8]).unwrap(), 0, "its streams have ended");
    // The guest owes the answer for so long, and then is ended, if it still exists.
    assert_eq!(client.session.processes.len(), 1);
    client.session.handle_message(number, &FromGuest::Exited { code: 0 }).unwrap();
    assert!(client.session.processes.is_empty() && matches!(now(&state), Some(ExitStatus::TimedOut)));
}

#[test]
fn exit_status_after_a_kill_counts_if_it_arrives_in_time() {
    for (kill, expected) in [(true, ExitStatus::Signaled { signal: 9 }), (false, ExitStatus::TimedOut)] {
        let (mut client, _far) = client();
        let (number, state, _answer) = spawn(&mut client, Some(Duration::from_secs(5)));
        client.session.handle_message(number, &FromGuest::Spawned { pid: 5 }).unwrap();
        match kill {
            true => client.kill(number).unwrap(),
            false => pass(&mut client, Duration::from_secs(5)),
        }
        client.session.handle_message(number, &FromGuest::Signaled { signo: 9, oom: false }).unwrap();
        assert_eq!(now(&state).unwrap().to_string(), expected.to_string());
    }
}

#[test]
fn unanswered_kill_still_ends_the_process() {
    let (mut client, _far) = client();
    let (number, state, _answer) = spawn(&mut client, None);
    client.session.handle_message(number, &FromGuest::Spawned { pid: 5 }).unwrap();
    client.kill(number).unwrap();
    pass(&mut client, KILL_MARGIN);
    assert_eq!(now(&state).unwrap().signal(), Some(9));
    // Its VM has no handle any more here; nothing is left to wait for.
    pass(&mut client, UNANSWERED_KILL);
    assert!(client.session.processes.is_empty());
}

#[test]
fn timeout_before_the_start_is_timed_out() {
    // The guest refuses it then, has killed it meanwhile, or says nothing.
    let refused = FromGuest::SpawnFailed { step: SpawnStep::Request, errno: libc::ECANCELED };
    for said in [Some(refused), Some(FromGuest::Signaled { signo: 9, oom: false }), None] {
        let (mut client, _far) = client();
        let (number, state, answer) = spawn(&mut client, Some(Duration::from_millis(1)));
        pass(&mut client, Duration::from_millis(1));
        assert!(answer.try_recv().is_err() && now(&state).is_none());
        match said {
            Some(message) => client.session.handle_message(number, &message).unwrap(),
            None => pass(&mut client, KILL_MARGIN),
        }
        answer.recv().unwrap().unwrap();
        assert!(matches!(now(&state), Some(ExitStatus::TimedOut)));
    }
}

#[test]
fn a_program_that_starts_late_is_killed() {
    let (mut client, far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    pass(&mut client, START_TIMEOUT);
    client.session.handle_message(number, &FromGuest::Spawned { pid: 5 }).unwrap();
    pass(&mut client, KILL_MARGIN);
    assert_eq!(answer.recv().unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
    assert!(now(&state).is_some());
    drop(client);
    assert_eq!(kills(&sent_to(&far), number), 1);
}

#[test]
fn program_without_a_waiter_is_killed() {
    let (mut client, far) = client();
    let (number, state, answer) = spawn(&mut client, None);
    drop(answer);
    client.session.handle_message(number, &FromGuest::Spawned { pid: 5 }).unwrap();
    pass(&mut client, KILL_MARGIN);
    assert_eq!(now(&state).unwrap().signal(), Some(9));
    drop(client);
    assert_eq!(kills(&sent_to(&far), number), 1);
}

#[test]
fn shim_failure_is_reported_once() {
    let (mut client, far) = client();
    let failed = frame(0, &FromGuest::Failed { stage: crate::proto::Stage::Loop, errno: 0, text: b"x" });
    (&far).write_all(&failed.repeat(10)).unwrap();
    client.listen();
    assert!(client.session.has_ended() && client.session.gone.as_ref().unwrap().1.contains("it failed: x"));
}

#[test]
fn requests_are_served_during_a_message_flood() {
    let (client, far) = client();
    let looped = Loop::start("agent", |sources| {
        client.watch(&sources).unwrap();
        client
    })
    .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let theirs = stop.clone();
    let flood = std::thread::spawn(move || {
        // Frames of an unknown kind without payload.
        let frame = [0u32.to_le_bytes(), 1u32.to_le_bytes(), 0xffffu32.to_le_bytes()].concat();
        let block = frame.repeat(5000);
        while !theirs.load(Ordering::Relaxed) {
            (&far).write_all(&block).unwrap();
        }
    });
    // All that one turn may do, so that there is always more: what others ask comes between the turns.
    for _ in 0..20 {
        looped.remote().with(|client| client.session.has_ended()).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    flood.join().unwrap();
}

#[test]
fn one_turn_reads_a_bounded_amount() {
    let (mut client, far) = client();
    far.set_nonblocking(true).unwrap();
    let frame = [0u32.to_le_bytes(), 1u32.to_le_bytes(), 0xffffu32.to_le_bytes()].concat();
    let block = frame.repeat(100);
    let mut sent = 0;
    while let Ok(n) = (&far).write(&block) {
        sent += n;
    }
    assert!(sent > MAX_READS * READ_SIZE, "the socket holds more than one turn takes: {sent}");
    client.listen();
    let mut turns = 1;
    while client.session.take_more() {
        client.listen();
        turns += 1;
    }
    assert!(turns > 1, "there is more, and others come first");
    assert!(turns * MAX_READS * READ_SIZE >= sent, "{turns} turns for {sent} bytes");
}
