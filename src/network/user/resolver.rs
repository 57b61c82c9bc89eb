//! [`Resolver`]: the gateway's resolver, which forwards the guest's questions to the host's resolvers.
//!
//! It forwards what the policy allows. Each question has a socket of its own, and so a port and a number that cannot be
//! guessed (RFC 5452). The kernel takes answers only from the resolver that was asked. Questions that came over TCP go
//! on over TCP.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use super::core::{Core, ROUTE_CALLS};
use super::generational::{GenerationalMap, Id, Owner};
use super::host::TimerEntry;
use crate::network::dns::{self, Code, Question, Servers};
use crate::network::policy::Asking;
use crate::network::wire::{self, AddressPair};
use crate::sys::{self, EventSet, Socket, SocketKind};

pub(super) const PORT: u16 = 53;

/// The most questions that may be pending.
const MAX_ASKED: usize = 256;
/// Until the next resolver is asked, and how often all of them are.
const RESOLVER_TIMEOUT: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;
/// Addresses of one answer that the guest gets. Each costs the loop a question to the kernel, and a place in the policy's table.
const MAX_ADDRESSES: usize = 32;
/// Wrong answers to one question before the next resolver is asked, from another port (RFC 5452, 9.2).
const MAX_WRONG: usize = 32;
/// The longest answer over UDP that is taken (larger ones say so themselves, RFC 6891, 6.2.5).
const MAX_ANSWER: usize = 4096;

/// Who wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Requester {
    Udp(AddressPair, u16),
    /// A connection's other end.
    Tcp(Id),
}

/// A question that a resolver of the host was asked.
#[derive(Debug)]
struct PendingQuery {
    requester: Requester,
    question: Question,
    query: Vec<u8>,
    id: u16,
    /// How many resolvers were asked before.
    tried: usize,
    /// Wrong answers from this one.
    wrong: usize,
    socket: Socket,
    /// Over TCP: what is still to be sent, and what has come.
    rest: Vec<u8>,
    answer: Vec<u8>,
    timer: TimerEntry,
}

/// The pending questions, and answers for those who asked over TCP.
#[derive(Debug)]
pub(super) struct Resolver {
    asked: GenerationalMap<PendingQuery>,
    pub servers: Servers,
    /// Answers for connections.
    pub answers: Vec<(Id, Vec<u8>)>,
}

impl Resolver {
    pub(super) fn new(given: Option<Vec<SocketAddr>>) -> Self {
        Self { asked: GenerationalMap::default(), servers: Servers::new(given), answers: Vec::new() }
    }

    /// Returns how many questions are pending.
    pub(super) fn len(&self) -> usize {
        self.asked.len()
    }

    /// Takes a query of the guest.
    pub(super) fn query(&mut self, core: &mut Core, requester: Requester, query: &[u8]) {
        core.stats.questions += 1;
        let question = match Question::parse(query) {
            Ok(question) => question,
            Err(Some(code)) => return self.answer(core, requester, &dns::reply(query, code)),
            Err(None) => {
                core.stats.malformed += 1;
                return;
            }
        };
        if let Some(answer) = core.config.switches.iter().find_map(|switch| switch.answer(query, &question)) {
            return self.answer(core, requester, &answer);
        }
        let now = core.host.now;
        match core.policy.asks(&question.name, question.kind, now) {
            Asking::Passed => {}
            Asking::Empty => {
                core.stats.denied_names += 1;
                return self.answer(core, requester, &dns::reply(query, Code::NoError));
            }
            Asking::Denied => {
                core.stats.denied_names += 1;
                return self.answer(core, requester, &dns::reply(query, Code::NxDomain));
            }
        }
        if self.asked.len() >= MAX_ASKED || !core.may_ask() {
            core.stats.limited += 1;
            return self.answer(core, requester, &dns::reply(query, Code::ServFail));
        }
        self.ask(core, requester, question, query.to_vec(), 0);
    }

    /// Asks the next resolver that can be asked.
    fn ask(&mut self, core: &mut Core, requester: Requester, question: Question, query: Vec<u8>, mut tried: usize) {
        let servers = self.servers.all(core.host.now).to_vec();
        while tried < servers.len() * ROUNDS {
            let Some(server) = servers.get(tried % servers.len().max(1)).copied() else { break };
            tried += 1;
            match self.ask_one(core, requester, &question, &query, tried, server) {
                Ok(()) => return,
                Err(error) => log::debug!("a resolver of the host cannot be asked: {error}"),
            }
        }
        core.stats.unanswered += 1;
        self.answer(core, requester, &dns::reply(&query, Code::ServFail));
    }

    fn ask_one(
        &mut self,
        core: &mut Core,
        requester: Requester,
        question: &Question,
        query: &[u8],
        tried: usize,
        server: SocketAddr,
    ) -> io::Result<()> {
        let stream = matches!(requester, Requester::Tcp(_));
        let kind = if stream { SocketKind::Stream } else { SocketKind::Datagram };
        let socket = core.host.connect(&core.policy.resolver(kind, server))?;
        let mut number = [0; 2];
        sys::fill_random(&mut number)?;
        let id = u16::from_ne_bytes(number);
        let mut message = query.to_vec();
        dns::set_id(&mut message, id);
        let mut rest = Vec::new();
        if stream {
            // RFC 1035, 4.2.2.
            rest.extend((message.len() as u16).to_be_bytes());
            rest.extend(message);
        } else {
            socket.send(&message)?;
        }
        let (until, question) = (core.host.now + RESOLVER_TIMEOUT, question.clone());
        let query = query.to_vec();
        let timer = TimerEntry::default();
        let asked =
            PendingQuery { requester, question, query, id, tried, wrong: 0, socket, rest, answer: Vec::new(), timer };
        let it = self.asked.insert(asked);
        let Some(asked) = self.asked.get_mut(it) else { return Ok(()) };
        if let Err(error) = core.host.watch(asked.socket.as_fd(), Owner::Resolver(it)) {
            self.asked.remove(it);
            return Err(error);
        }
        core.host.set_timer(&mut asked.timer, Owner::Resolver(it), Some(until));
        Ok(())
    }

    /// Something has happened to a question's socket.
    pub(super) fn ready(&mut self, core: &mut Core, id: Id, events: EventSet) {
        let Some(asked) = self.asked.get_mut(id) else { return };
        let came = if matches!(asked.requester, Requester::Tcp(_)) { asked.over_tcp(events) } else { asked.over_udp() };
        match came {
            Ok(None) => {}
            Ok(Some(answer)) => self.came(core, id, answer),
            Err(error) => {
                log::debug!("a resolver of the host does not answer: {error}");
                self.next(core, id);
            }
        }
    }

    /// Goes on to the next try, as no answer has come in time.
    pub(super) fn on_timer(&mut self, core: &mut Core, id: Id) {
        if let Some(asked) = self.asked.get_mut(id) {
            asked.timer.fired();
            self.next(core, id);
        }
    }

    fn remove(&mut self, core: &mut Core, id: Id) -> Option<PendingQuery> {
        let mut asked = self.asked.remove(id)?;
        core.host.cancel_timer(&mut asked.timer, Owner::Resolver(id));
        Some(asked)
    }

    fn next(&mut self, core: &mut Core, id: Id) {
        if let Some(asked) = self.remove(core, id) {
            self.ask(core, asked.requester, asked.question, asked.query, asked.tried);
        }
    }

    /// An answer to the question has come.
    fn came(&mut self, core: &mut Core, id: Id, mut answer: Vec<u8>) {
        let Some(asked) = self.asked.get_mut(id) else { return };
        let found = dns::answers(&asked.question, &answer);
        let failed = |code| code == Code::ServFail as u8 || code == Code::Refused as u8 || code == Code::NotImp as u8;
        // Within a record: all of it comes over TCP, and another resolver would cut it off too.
        let cut_off = found.is_none() && dns::is_truncated(&answer) && matches!(asked.requester, Requester::Udp(..));
        let found = found.filter(|found| !failed(found.code));
        if found.is_none() && !cut_off {
            return self.next(core, id);
        }
        let Some(asked) = self.remove(core, id) else { return };
        let Some(found) = found else { return self.answer(core, asked.requester, &dns::truncated(&asked.query)) };
        if found.code == Code::FormErr as u8 {
            // The resolver may not have repeated the question. A client that asked with EDNS asks without it then.
            return self.answer(core, asked.requester, &dns::reply(&asked.query, Code::FormErr));
        }
        let (now, name) = (core.host.now, &asked.question.name);
        let (all, way_out) = (found.addresses.len(), self.servers.way_out(now));
        let mut allowed = found.addresses;
        allowed.truncate(MAX_ADDRESSES);
        allowed.retain(|address| core.policy.may_lead(name, *address, now));
        core.stats.denied_names += u64::from(allowed.len() < all.min(MAX_ADDRESSES));
        // Each by its own route: some hosts reach private ranges alone by one of the families.
        core.host.syscalls += if way_out { allowed.len() * ROUTE_CALLS } else { 0 };
        allowed.retain(|address| !way_out || core.policy.is_routed(*address));
        core.policy.resolved(name, &allowed, found.valid, now);
        if allowed.len() < all {
            // The name is there, whatever is withheld of it: "no such name" would end the search for the other family.
            let ttl = u32::try_from(found.valid.as_secs()).unwrap_or(u32::MAX);
            answer = dns::found(&asked.query, &asked.question, allowed, ttl);
        } else if dns::strip(&asked.question, &mut answer) {
            dns::set_id(&mut answer, asked.question.id);
        } else {
            answer = dns::reply(&asked.query, Code::ServFail);
        }
        let room = usize::from(core.config.mtu) - 40 - wire::UDP_HEADER;
        if matches!(asked.requester, Requester::Udp(..)) && answer.len() > room {
            answer = dns::truncated(&asked.query);
        }
        self.answer(core, asked.requester, &answer);
    }

    fn answer(&mut self, core: &mut Core, requester: Requester, answer: &[u8]) {
        match requester {
            Requester::Udp(addrs, port) => {
                core.send_udp(
                    AddressPair { src: addrs.dst, dst: addrs.src },
                    wire::UdpPorts { src: PORT, dst: port },
                    answer,
                );
            }
            Requester::Tcp(id) => self.answers.push((id, answer.to_vec())),
        }
    }
}

impl PendingQuery {
    fn over_udp(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut buffer = [0; MAX_ANSWER];
        loop {
            match self.socket.receive(&mut buffer) {
                Ok(n) => {
                    let answer = buffer.get(..n).unwrap_or_default();
                    if self.question.is_answered(&self.query, self.id, answer) {
                        return Ok(Some(answer.to_vec()));
                    }
                    // A guess is no answer, and the right one may still come. After many of them another port is safer.
                    self.wrong += 1;
                    if self.wrong >= MAX_WRONG {
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn over_tcp(&mut self, events: EventSet) -> io::Result<Option<Vec<u8>>> {
        if let Some(error) = self.socket.error() {
            return Err(error);
        }
        if events.contains(EventSet::OUT) && !self.rest.is_empty() {
            let n = self.socket.send(&self.rest)?;
            self.rest.drain(..n);
        }
        let mut buffer = [0; MAX_ANSWER];
        loop {
            match self.socket.receive(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.answer.extend_from_slice(buffer.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
            let Some((len, message)) = self.answer.split_first_chunk::<2>() else { continue };
            if let Some(message) = message.get(..usize::from(u16::from_be_bytes(*len))) {
                let right = self.question.is_answered(&self.query, self.id, message);
                return if right { Ok(Some(message.to_vec())) } else { Err(io::ErrorKind::InvalidData.into()) };
            }
        }
    }
}
