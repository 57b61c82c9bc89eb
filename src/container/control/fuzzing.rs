//! The control stream with a hostile shim, for fuzzing.
//!
//! The shim sends any messages in any order, at any time, while programs are asked for.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::client::{ControlClient, STREAM, TIMER, VM_ENDED};
use super::outbox::MAX_UNSENT;
use super::session::Session;
use super::stream::{ControlStream, READ_SIZE, ReadExtent};
use super::{KILL_MARGIN, SPAWN_TIMEOUT, START_TIMEOUT, StartRequest, handshake};
use crate::container::exec::PrivilegesRequest;
use crate::container::process::ProcessShared;
use crate::error::{Error, Result};
use crate::event_loop::{Handler, Interest, Reply};
use crate::proto::{End, FROM_GUEST_MAX, FromGuest, HEADER_SIZE, SpawnStep, Stage, StringBuf};
use crate::sys::Timer;
use crate::virtio::vsock::VsockStream;
use crate::vm::WeakVm;

/// Programs that are asked for at once, at most.
const PROGRAMS: usize = 16;

/// What the shim does, by bytes; zeros when there are no more.
struct Script<'a>(std::slice::Iter<'a, u8>);

impl Script<'_> {
    fn next(&mut self) -> u8 {
        self.0.next().copied().unwrap_or_default()
    }

    /// A message of the shim's, about any process.
    fn say(&mut self, out: &mut Vec<u8>) {
        let (process, value) = (u32::from(self.next() % 8), self.next());
        let text = [value; 5];
        let message = match self.next() % 11 {
            0 => FromGuest::Spawned { pid: value.into() },
            1 => FromGuest::SpawnFailed { step: SpawnStep::Exec, errno: value.into() },
            2 => FromGuest::Exited { code: value },
            3 => FromGuest::Signaled { signo: value, oom: value % 2 == 0 },
            4 => FromGuest::Hello { min: u32::from(value) % 4, max: value.into() },
            5 => FromGuest::Ready {
                user_space_ns: value.into(),
                ready_ns: u64::MAX - u64::from(value),
                kernel: value.into(),
            },
            6 => FromGuest::Ending { end: End::Halt },
            7 => FromGuest::Connected { errno: value.into() },
            8 => FromGuest::Reseeded { errno: value.into() },
            9 => FromGuest::OomKilled { count: value.into() },
            _ => FromGuest::Failed { stage: Stage::Other, errno: value.into(), text: &text },
        };
        // All messages of the guest fit.
        let _ = message.encode(process, out);
    }
}

/// A waiter for a program, and one for its start.
type PendingStart = (Arc<ProcessShared>, mpsc::Receiver<Result<u32>>);

fn ask(client: &mut ControlClient, script: &mut Script<'_>) -> Result<PendingStart> {
    let timeout = Some(script.next()).filter(|it| *it > 0).map(|it| Duration::from_secs(it.into()));
    // A caller that has as good as given up is one that this starts no program for.
    let limit = match script.next() % 8 {
        0 => KILL_MARGIN,
        _ => SPAWN_TIMEOUT,
    };
    let (request, state) = program(timeout)?;
    let (reply, answer) = Reply::detached(limit);
    client.start(&request, reply);
    Ok((state, answer))
}

/// A program without streams, whose time is over after `timeout`.
pub(super) fn program(timeout: Option<Duration>) -> Result<(StartRequest, Arc<ProcessShared>)> {
    let state = ProcessShared::new()?;
    let mut argv = StringBuf::new();
    argv.push(b"program").map_err(|_| Error::invalid("exec", "a NUL"))?;
    let deadline = timeout.and_then(crate::sys::deadline);
    let request = StartRequest {
        argv,
        env: StringBuf::new(),
        cwd: None,
        make_cwd: false,
        user: None,
        home: false,
        stop_signal: None,
        privileges: PrivilegesRequest::default(),
        terminal: None,
        ports: [None; 3],
        cookie: Vec::new(),
        deadline,
        state: state.clone(),
    };
    Ok((request, state))
}

/// The agent's part of a conversation after the handshake, and the shim's end of its stream.
pub(super) fn conversation() -> Result<(ControlClient, UnixStream)> {
    let (near, far, _tail) = VsockStream::pair()?;
    let stream = ControlStream::new(near, ReadExtent::Ahead)?;
    Ok((ControlClient::new(stream, Timer::new()?, WeakVm::dangling())?, far))
}

/// Plays the script against the agent. Whatever it says: every turn ends, nothing grows without bound, and in the end
/// every waiter has an answer.
pub(crate) fn control_stream(data: &[u8]) {
    if let Err(error) = play(data) {
        log::debug!("the host has no more descriptors: {error}");
    }
}

fn play(data: &[u8]) -> Result<()> {
    let (near, far, _tail) = VsockStream::pair()?;
    greeted(data, &near, &far);
    let (mut client, shim) = conversation()?;
    let (mut script, mut waiting) = (Script(data.iter()), Vec::<PendingStart>::new());
    while script.0.len() > 0 {
        match script.next() % 8 {
            0 if waiting.len() < PROGRAMS => waiting.push(ask(&mut client, &mut script)?),
            1 => {
                // One that the conversation's end has taken already, or that never was.
                let _ = client.kill(u32::from(script.next() % 8));
            }
            2 => pass(&mut client, Duration::from_secs(script.next().into())),
            3 => {
                let raw: Vec<u8> = (0..script.next() % 64).map(|_| script.next()).collect();
                // A shim whose stream is not read any more cannot write.
                let _ = (&shim).write(&raw);
            }
            4 => drop((&shim).read(&mut [0; 4096])),
            5 => client.ready(SOURCES[usize::from(script.next() % 3)], Interest::IN),
            _ => {
                let mut said = Vec::new();
                for _ in 0..=script.next() % 64 {
                    script.say(&mut said);
                }
                let _ = (&shim).write(&said);
                client.ready(STREAM, Interest::IN);
            }
        }
        assert_bounded(&client, PROGRAMS);
    }
    // A process whose guest never answers has ended for the host by then.
    for _ in 0..2 {
        pass(&mut client, START_TIMEOUT + Duration::from_secs(256));
    }
    assert!(
        client.session.processes.values().all(|it| it.state.has_ended() || it.deadline.is_none()),
        "time-outs are kept"
    );
    drop(client);
    assert!(waiting.iter().all(|(state, answer)| is_answered(state, answer)), "every waiter has an answer");
    Ok(())
}

/// Whatever the shim says: what the host keeps for it has bounds.
pub(super) fn assert_bounded(client: &ControlClient, programs: usize) {
    let Session { processes, outbox, .. } = &client.session;
    assert!(processes.len() <= programs, "only the host makes processes");
    // What cleans up is a message of a header for each process.
    assert!(outbox.len() <= MAX_UNSENT + programs * HEADER_SIZE, "what the shim does not read is bounded");
    assert!(client.stream.undecoded() <= READ_SIZE + FROM_GUEST_MAX + HEADER_SIZE, "what was read is bounded");
}

/// Whether the two waiters for a program wait no more: that for its start, and that for its end.
pub(super) fn is_answered(state: &ProcessShared, answer: &mpsc::Receiver<Result<u32>>) -> bool {
    // One whose start was refused, or given up, waits for no end.
    match answer.try_recv() {
        Ok(Ok(_)) => state.has_ended(),
        Ok(Err(_)) | Err(mpsc::TryRecvError::Disconnected) => true,
        Err(mpsc::TryRecvError::Empty) => false,
    }
}

const SOURCES: [u64; 3] = [STREAM, TIMER, VM_ENDED];

/// All that is due until `time` from now happens at once.
pub(super) fn pass(client: &mut ControlClient, time: Duration) {
    let ago = |at: Instant| at.checked_sub(time).unwrap_or(at);
    for entry in client.session.processes.values_mut() {
        entry.due = entry.due.map(ago);
        entry.deadline = entry.deadline.map(ago);
    }
    client.session.expire();
}

/// The same bytes as the first words of a shim.
fn greeted(data: &[u8], stream: &VsockStream, mut shim: &UnixStream) {
    let mut script = Script(data.iter());
    let mut said = Vec::new();
    for _ in 0..=script.next() % 80 {
        script.say(&mut said);
    }
    said.extend_from_slice(script.0.as_slice());
    let _ = shim.write(&said).and_then(|_| shim.shutdown(std::net::Shutdown::Write));
    if let Ok(stream) = stream.try_clone() {
        handshake::converse_with(stream);
    }
}
