//! [`ControlClient`]: what the agent's thread owns. It reads what the shim says, turn by turn, and never waits.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::StartRequest;
use super::outbox::Outbox;
use super::session::{Session, StartReply};
use super::stream::ControlStream;
use crate::container::process::ProcessShared;
use crate::error::{Context, Error, Result};
use crate::event_loop::{Handler, Interest, Reply, Sources};
use crate::proto::{FromHost, SEED_SIZE};
use crate::sys::Timer;
use crate::vm::{Exit, WeakVm};

/// Sources of the loop.
pub(super) const STREAM: u64 = 0;
pub(super) const TIMER: u64 = 1;
pub(super) const VM_ENDED: u64 = 2;
/// Reads in a row before others get their turn.
pub(super) const MAX_READS: usize = 16;

/// The control channel as its thread owns it.
pub(in crate::container) struct ControlClient {
    /// Beside the session, which acts on a message while the message borrows this.
    pub(super) stream: ControlStream,
    pub(super) session: Session,
}

impl ControlClient {
    /// Goes on where the handshake has ended.
    pub(super) fn new(stream: ControlStream, timer: Timer, vm: WeakVm) -> Result<Self> {
        let [to_end, to_write] = [stream.connection().try_clone()?, stream.connection().try_clone()?];
        let mut session = Session::new(to_end, Outbox::new(to_write), timer, vm);
        if stream.has_undecoded() {
            // What came together with the handshake's last message. The loop gets no event for it.
            session.more();
            session.arm_timer();
        }
        Ok(Self { stream, session })
    }

    /// Has the loop look at its descriptors.
    pub(super) fn watch(&self, sources: &Sources) -> Result<()> {
        let edges = Interest::IN | Interest::OUT | Interest::READ_HANG_UP | Interest::EDGE_TRIGGERED;
        sources
            .watch(self.stream.as_fd(), STREAM, edges)
            .and_then(|()| sources.watch(self.session.timer(), TIMER, Interest::IN))
            .doing(|| "watching the control stream")
    }

    /// Asks for a program. `reply` gets its number when it runs.
    pub(super) fn start(&mut self, request: &StartRequest, reply: StartReply) {
        self.session.start(request, reply);
        self.session.arm_timer();
    }

    /// Asks the guest's kernel for new random numbers, made from `seed`. `reply` gets the guest's answer.
    pub(super) fn reseed(&mut self, seed: &[u8; SEED_SIZE], reply: Reply<Result<()>>) {
        self.session.reseed(seed, reply);
        self.session.arm_timer();
    }

    /// Kills the process that has this state, if there is one: its caller has given up.
    pub(super) fn disown(&mut self, state: &Arc<ProcessShared>) {
        self.session.disown(state);
        self.session.arm_timer();
    }

    /// Kills a process and all that it started. It has ended soon after, whatever the guest does.
    pub(in crate::container) fn kill(&mut self, process: u32) -> Result<()> {
        let outcome = self.session.kill(process);
        self.session.arm_timer();
        outcome
    }

    /// Says something to the shim; process 0 is the VM.
    pub(in crate::container) fn send(&mut self, process: u32, message: &FromHost<'_>) -> Result<()> {
        let outcome = self.session.send(process, message);
        self.session.arm_timer();
        outcome
    }

    /// Notifies all waiters that the VM has ended.
    pub(super) fn vm_has_ended(&mut self, exit: &Exit) {
        self.session.finish_all(exit);
        self.session.arm_timer();
    }

    /// Handles what the shim has said, as much as one turn may.
    pub(super) fn listen(&mut self) {
        let mut reads = MAX_READS;
        while !self.session.has_ended() {
            let outcome = match self.stream.next(&mut reads) {
                Ok(None) if reads == 0 => return self.session.more(),
                Ok(None) => return,
                Ok(Some(received)) => match received.message {
                    Some(message) => self.session.handle_message(received.process, &message),
                    None => Ok(()),
                },
                Err(error) => Err(Error::from(error)),
            };
            if let Err(error) = outcome {
                return self.session.end(&error.to_string());
            }
        }
    }

    /// The VM has ended. What the shim said before is in the stream, which has ended with it.
    fn drain(&mut self) {
        let Some(exit) = self.session.exit() else { return };
        // Each turn takes something out of a stream that gets nothing more.
        while !self.session.has_ended() {
            self.session.take_more();
            self.listen();
            if !self.session.take_more() {
                break;
            }
        }
        self.session.finish_all(&exit);
    }
}

impl Handler for ControlClient {
    fn ready(&mut self, token: u64, _: Interest) {
        match token {
            VM_ENDED => self.drain(),
            _ => {
                if token == TIMER {
                    self.session.timer_is_due();
                }
                self.session.flush();
                self.listen();
            }
        }
        self.session.arm_timer();
    }
}
