//! The control stream with a hostile shim, for fuzzing.
//!
//! The shim sends any messages in any order, at any time, while programs are asked for.

use std::os::unix::net::UnixStream;

use super::*;
use crate::container::handshake;
use crate::proto::{Stage, Stdio, StringBuf, Strings};

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
        let message = match self.next() % 9 {
            0 => FromGuest::Spawned { pid: value.into() },
            1 => FromGuest::SpawnFailed { step: SpawnStep::Exec, errno: value.into() },
            2 => FromGuest::Exited { code: value },
            3 => FromGuest::Signaled { signo: value, oom: value % 2 == 0 },
            4 => FromGuest::Hello { min: u32::from(value) % 4, max: value.into() },
            5 => FromGuest::Ready { user_space_ns: value.into(), ready_ns: u64::MAX - u64::from(value) },
            6 => FromGuest::Ending { end: End::Halt },
            7 => FromGuest::Connected { errno: value.into() },
            _ => FromGuest::Failed { stage: Stage::Other, errno: value.into(), text: &text },
        };
        // All messages of the guest fit.
        let _ = message.encode(process, out);
    }
}

/// A waiter for a program, and one for its start.
type PendingStart = (Arc<ProcessShared>, mpsc::Receiver<Result<()>>);

fn ask(client: &mut ControlClient, script: &mut Script<'_>) -> Result<PendingStart> {
    let state = ProcessShared::new()?;
    let (started, answer) = mpsc::sync_channel(1);
    let mut argv = StringBuf::new();
    argv.push(b"program").map_err(|e| protocol_error(&e))?;
    let (env, stdio) = (Strings::default(), [Stdio::Null; 3]);
    let spawn = Spawn { argv: argv.as_strings(), env, cwd: None, stdio, cookie: &[] };
    let timeout = Some(script.next()).filter(|it| *it > 0).map(|it| Instant::now() + Duration::from_secs(it.into()));
    client.spawn(&spawn, state.clone(), timeout, started);
    Ok((state, answer))
}

/// Plays the script against the agent. Whatever it says: every turn ends, nothing grows without bound, and in the end
/// every waiter has an answer.
pub(crate) fn control_stream(data: &[u8]) {
    if let Err(error) = play(data) {
        log::debug!("the host has no more descriptors: {error}");
    }
}

fn play(data: &[u8]) -> Result<()> {
    let (stream, mut shim, _tail) = VsockStream::pair()?;
    stream.set_nonblocking(true)?;
    shim.set_nonblocking(true)?;
    greeted(data, &stream, &shim);
    let (stream, theirs, _tail) = VsockStream::pair()?;
    stream.set_nonblocking(true)?;
    shim = theirs;
    let mut client = ControlClient::new(stream, Decoder::new(FROM_GUEST_MAX), Timer::new()?, WeakVm::dangling());
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
            5 => client.ready(TIMER_OR_STREAM[usize::from(script.next() % 2)], Interest::IN),
            _ => {
                let mut said = Vec::new();
                for _ in 0..=script.next() % 64 {
                    script.say(&mut said);
                }
                let _ = (&shim).write(&said);
                client.ready(STREAM, Interest::IN);
            }
        }
        assert!(client.processes.len() <= PROGRAMS, "only the host makes processes");
        assert!(client.unsent.len() - client.sent <= MAX_UNSENT + 4096, "what the shim does not read is bounded");
    }
    // A process whose guest never answers has ended for the host by then.
    for _ in 0..2 {
        pass(&mut client, START_TIMEOUT + Duration::from_secs(256));
    }
    assert!(client.processes.values().all(|it| it.state.has_ended() || it.deadline.is_none()), "time-outs are kept");
    drop(client);
    // A waiter that got a refusal waits for nothing.
    let refused = |answer: &mpsc::Receiver<Result<()>>| matches!(answer.try_recv(), Ok(Err(_)));
    assert!(waiting.iter().all(|(state, answer)| state.has_ended() || refused(answer)), "nobody waits for ever");
    Ok(())
}

const TIMER_OR_STREAM: [u64; 2] = [STREAM, VM_ENDED];

/// All that is due until `time` from now happens at once.
fn pass(client: &mut ControlClient, time: Duration) {
    let ago = |at: Instant| at.checked_sub(time).unwrap_or(at);
    for entry in client.processes.values_mut() {
        entry.due = entry.due.map(ago);
        entry.deadline = entry.deadline.map(ago);
    }
    client.expire();
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
