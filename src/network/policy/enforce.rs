//! [`Enforcer`]: applies a policy. It knows what names were resolved to, and reports denials. Of one network.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Cidr, DomainName, Policy, Protocol, Rule, RuleTarget, cidr::special_purpose_range};
use crate::network::dns;
use crate::sys::{Route, Routes, SocketKind};

/// Where a socket may go.
///
/// Only [`Enforcer::admit`] makes one, and [`Enforcer::resolver`] for the resolvers that the host is configured with.
#[derive(Debug)]
pub(crate) struct Admitted {
    kind: SocketKind,
    address: SocketAddr,
}

impl Admitted {
    pub(crate) fn kind(&self) -> SocketKind {
        self.kind
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Why a destination was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DenyReason {
    /// No rule is about it.
    NoRule,
    /// The rule of this number, from zero, denies it.
    Rule(usize),
    /// It is not public, and no rule allows its range: `"private"`, `"metadata"`, `"loopback"` and so on.
    SpecialRange {
        /// What the addresses of the range are.
        name: &'static str,
    },
    /// It is the host's own address, which only a rule of that address alone allows.
    Host,
    /// It is allowed, but the process has no descriptors left for guests: see
    /// [`set_descriptor_reserve`](crate::host::set_descriptor_reserve).
    Descriptors,
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRule => f.write_str("no rule allows it"),
            Self::Rule(n) => write!(f, "rule {n} denies it"),
            Self::SpecialRange { name } => write!(f, "the address is {name}, and no rule allows its range"),
            Self::Host => f.write_str("the address is the host's own, and no rule names it alone"),
            Self::Descriptors => f.write_str("the process has no descriptors left for guests"),
        }
    }
}

/// The guest wanted to go where it may not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Denial {
    /// What it wanted to speak there; `None` when it only asked for a name.
    pub protocol: Option<Protocol>,
    /// Where to.
    pub destination: Option<SocketAddr>,
    /// The name that it asked for, or the last one that resolved to the destination.
    pub name: Option<String>,
    /// Why not.
    pub reason: DenyReason,
    /// How many denials before this one were suppressed. There were too many in a short time.
    pub suppressed: u64,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.destination, &self.name) {
            (Some(to), Some(name)) => write!(f, "{to} ({name}): {}", self.reason),
            (Some(to), None) => write!(f, "{to}: {}", self.reason),
            (None, Some(name)) => write!(f, "{name}: {}", self.reason),
            (None, None) => write!(f, "{}", self.reason),
        }
    }
}

/// Denials that are reported at once, and in each second.
const MAX_REPORTS: u32 = 64;

/// What becomes of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asking {
    /// The host's resolver is asked.
    Passed,
    /// The name may have other records, but the answer has none of this type.
    Empty,
    /// There is no such name.
    Denied,
}

/// Names of addresses that are remembered.
const MAX_BOUND: usize = 4096;
/// An answer that is valid for no time at all is good for one connection, which takes this long to make.
const MIN_VALID: Duration = Duration::from_secs(10);
/// Nothing is valid for longer (RFC 8767, 4).
const MAX_VALID: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug)]
struct ResolvedName {
    name: Arc<str>,
    until: Instant,
}

/// A rule that is ready to be used.
#[derive(Debug)]
struct Ready {
    rule: Rule,
    name: Option<DomainName>,
}

/// A policy at work.
pub(crate) struct Enforcer {
    rules: Vec<Ready>,
    all_records: bool,
    /// What our resolver has answered.
    names: HashMap<IpAddr, Vec<ResolvedName>>,
    bound: usize,
    /// Denials that were not taken yet, at most [`MAX_REPORTS`].
    denials: Vec<Denial>,
    reports: u32,
    reports_since: Option<Instant>,
    suppressed: u64,
    /// `None` until the process has a descriptor for it; then everything is taken for the host's own.
    routes: Option<Routes>,
    /// What is said instead of what the kernel says.
    #[cfg(test)]
    pretended: Option<fn(IpAddr) -> Route>,
}

impl fmt::Debug for Enforcer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enforcer").field("rules", &self.rules).field("bound", &self.bound).finish_non_exhaustive()
    }
}

impl Enforcer {
    /// `policy` was checked.
    pub(crate) fn new(policy: Policy) -> Self {
        let mut it = Self {
            rules: Vec::new(),
            all_records: false,
            names: HashMap::new(),
            bound: 0,
            denials: Vec::new(),
            reports: 0,
            reports_since: None,
            suppressed: 0,
            routes: routes(),
            #[cfg(test)]
            pretended: None,
        };
        it.change(policy);
        it
    }

    /// Another policy from now on. Names stay resolved.
    pub(crate) fn change(&mut self, policy: Policy) {
        let ready = |rule: Rule| {
            let name = match &rule.target {
                RuleTarget::Name(text) => DomainName::parse_pattern(text).ok(),
                _ => None,
            };
            Ready { rule, name }
        };
        self.all_records = policy.all_records;
        self.rules = policy.rules.into_iter().map(ready).collect();
    }

    /// Takes the denials since this was last called. Of a flood some are only counted.
    pub(crate) fn take_denials(&mut self) -> std::vec::Drain<'_, Denial> {
        self.denials.drain(..)
    }

    /// Lets a socket go to `to`, or tells of the denial.
    pub(crate) fn admit(&mut self, protocol: Protocol, to: SocketAddr, now: Instant) -> Option<Admitted> {
        let kind = match protocol {
            Protocol::Tcp => SocketKind::Stream,
            Protocol::Udp => SocketKind::Datagram,
            Protocol::Ping => SocketKind::Ping,
        };
        self.routes = self.routes.take().or_else(routes);
        match self.decide(protocol, to, Some(now)) {
            Ok(()) => Some(Admitted { kind, address: to }),
            Err(reason) => {
                let name = self.names.get(&to.ip()).and_then(|all| all.last()).map(|bound| bound.name.to_string());
                self.report(
                    Denial { protocol: Some(protocol), destination: Some(to), name, reason, suppressed: 0 },
                    now,
                );
                None
            }
        }
    }

    /// Tells that the host has nothing left for what was admitted.
    pub(crate) fn refused(&mut self, protocol: Protocol, to: SocketAddr, now: Instant) {
        let denial = Denial {
            protocol: Some(protocol),
            destination: Some(to),
            name: None,
            reason: DenyReason::Descriptors,
            suppressed: 0,
        };
        self.report(denial, now);
    }

    /// Whether what was admitted still would be. Names may have expired since.
    pub(crate) fn allows(&self, protocol: Protocol, to: SocketAddr) -> bool {
        self.decide(protocol, to, None).is_ok()
    }

    fn decide(&self, protocol: Protocol, to: SocketAddr, now: Option<Instant>) -> Result<(), DenyReason> {
        let (address, special) = (to.ip(), special_purpose_range(to.ip()));
        // What is not public must be named by a range that is not public either.
        let names = |range: Cidr| range.contains(address) && special.is_none_or(|(block, _)| block.covers(range));
        let mut denied = DenyReason::NoRule;
        for (n, Ready { rule, name }) in self.rules.iter().enumerate() {
            if !rule.fits(protocol, to.port()) {
                continue;
            }
            let (hit, public) = match (&rule.target, name) {
                (RuleTarget::Anywhere, _) => (true, true),
                (RuleTarget::Range(range), _) => (range.contains(address), !names(*range)),
                (RuleTarget::Name(_), Some(name)) => (self.is_bound(address, name, now), true),
                (RuleTarget::Name(_), None) => (false, true),
            };
            match (hit, rule.allow, special) {
                (false, ..) => {}
                (true, false, _) => return Err(DenyReason::Rule(n)),
                (true, true, Some((_, what))) if public && !self.range_allows(names, protocol, to.port(), rule) => {
                    denied = DenyReason::SpecialRange { name: what };
                }
                // Loopback addresses are nothing but the host: a range of them says so.
                (true, true, block)
                    if block.is_none_or(|(_, what)| what != "loopback")
                        && !self.range_allows(names_own(address), protocol, to.port(), rule)
                        && self.is_own(address) =>
                {
                    denied = DenyReason::Host;
                }
                (true, true, _) => return Ok(()),
            }
        }
        Err(denied)
    }

    /// Whether `rule` is of a name, and another one allows the range that the name leads into; or it is such itself.
    fn range_allows(&self, names: impl Fn(Cidr) -> bool, protocol: Protocol, port: u16, rule: &Rule) -> bool {
        let range = |rule: &Rule| match rule.target {
            RuleTarget::Range(range) => rule.allow && names(range),
            _ => false,
        };
        match rule.target {
            RuleTarget::Name(_) => self.rules.iter().any(|r| range(&r.rule) && r.rule.fits(protocol, port)),
            _ => range(rule),
        }
    }

    /// Returns whether a packet to `address` would stay on the host. Its services would be reached as if from itself.
    /// An address of unknown route counts as the host's own.
    fn is_own(&self, address: IpAddr) -> bool {
        self.route(address).is_none_or(|route| route == Route::Own)
    }

    /// Whether packets to `address` go anywhere.
    pub(crate) fn is_routed(&self, address: IpAddr) -> bool {
        self.route(address).is_none_or(|route| route != Route::None)
    }

    fn route(&self, address: IpAddr) -> Option<Route> {
        #[cfg(test)]
        if let Some(pretended) = self.pretended {
            return Some(pretended(address));
        }
        self.routes.as_ref()?.lookup(address).inspect_err(|e| log::debug!("the route to {address}: {e}")).ok()
    }

    #[cfg(test)]
    pub(crate) fn pretend(&mut self, routes: fn(IpAddr) -> Route) {
        self.pretended = Some(routes);
    }

    fn is_bound(&self, address: IpAddr, name: &DomainName, now: Option<Instant>) -> bool {
        let valid = |bound: &&ResolvedName| now.is_none_or(|now| bound.until > now);
        self.names.get(&address).is_some_and(|all| all.iter().filter(valid).any(|bound| name.matches(&bound.name)))
    }

    /// Returns whether the guest may ask for records of type `kind` of `name`, and reports a denial. The name is in
    /// lower case without its last dot.
    pub(crate) fn asks(&mut self, name: &str, kind: u16, now: Instant) -> Asking {
        let named =
            |ready: &Ready| ready.rule.allow && ready.name.as_ref().is_some_and(|pattern| pattern.matches(name));
        if kind == dns::PTR
            && let Some(address) = dns::reverse(name).filter(|_| !self.rules.iter().any(named))
        {
            return if self.reaches(address) { Asking::Passed } else { self.denied(name, DenyReason::NoRule, now) };
        }
        if !self.may_ask(name, now) {
            return Asking::Denied;
        }
        let plain = matches!(kind, dns::A | dns::AAAA | dns::CNAME);
        if plain || self.all_records || self.rules.iter().any(named) { Asking::Passed } else { Asking::Empty }
    }

    fn denied(&mut self, name: &str, reason: DenyReason, now: Instant) -> Asking {
        self.report(Denial { protocol: None, destination: None, name: Some(name.into()), reason, suppressed: 0 }, now);
        Asking::Denied
    }

    /// Whether some rule lets the guest go to `address`, by some protocol.
    fn reaches(&self, address: IpAddr) -> bool {
        let ports = |rule: &Rule| rule.ports.first().map_or(1, |ports| *ports.start());
        let protocol = |rule: &Rule| rule.protocols.first().copied().unwrap_or(Protocol::Tcp);
        self.rules
            .iter()
            .map(|ready| &ready.rule)
            .filter(|rule| rule.allow)
            .any(|rule| self.decide(protocol(rule), SocketAddr::new(address, ports(rule)), None).is_ok())
    }

    /// Whether the guest may ask for `name`, which is in lower case and has no last dot; tells of the denial.
    pub(crate) fn may_ask(&mut self, name: &str, now: Instant) -> bool {
        let decision = self.rules.iter().enumerate().find_map(|(n, Ready { rule, name: pattern })| match rule.target {
            RuleTarget::Anywhere if rule.allow || rule.ports.is_empty() && rule.protocols.is_empty() => {
                Some((n, rule.allow))
            }
            RuleTarget::Name(_) if pattern.as_ref().is_some_and(|p| p.matches(name)) => {
                // Denying a port of a name does not deny the name.
                (rule.allow || rule.ports.is_empty() && rule.protocols.is_empty()).then_some((n, rule.allow))
            }
            _ => None,
        });
        let reason = match decision {
            Some((_, true)) => return true,
            Some((n, false)) => DenyReason::Rule(n),
            None => DenyReason::NoRule,
        };
        self.report(Denial { protocol: None, destination: None, name: Some(name.into()), reason, suppressed: 0 }, now);
        false
    }

    /// Whether the guest may learn that `name` leads to `address`: not inside, where no rule allows the range (DNS rebinding).
    pub(crate) fn may_lead(&mut self, name: &str, address: IpAddr, now: Instant) -> bool {
        let Some((block, what)) = special_purpose_range(address) else { return true };
        let named = |ready: &Ready| match ready.rule.target {
            RuleTarget::Range(range) => ready.rule.allow && range.contains(address) && block.covers(range),
            _ => false,
        };
        if self.rules.iter().any(named) {
            return true;
        }
        let (name, reason) = (Some(name.into()), DenyReason::SpecialRange { name: what });
        let destination = Some(SocketAddr::new(address, 0));
        self.report(Denial { protocol: None, destination, name, reason, suppressed: 0 }, now);
        false
    }

    /// The host's own resolver, which the guest never talks to itself.
    pub(crate) fn resolver(&self, kind: SocketKind, address: SocketAddr) -> Admitted {
        Admitted { kind, address }
    }

    /// `name` was resolved to `addresses`, for so long.
    pub(crate) fn resolved(&mut self, name: &str, addresses: &[IpAddr], valid: Duration, now: Instant) {
        let (name, until): (Arc<str>, _) = (name.into(), now + valid.clamp(MIN_VALID, MAX_VALID));
        for address in addresses {
            if self.bound >= MAX_BOUND {
                self.forget(now);
            }
            let all = self.names.entry(*address).or_default();
            match all.iter().position(|bound| bound.name == name) {
                Some(at) => drop(all.remove(at)),
                None => self.bound += 1,
            }
            all.push(ResolvedName { name: name.clone(), until });
        }
    }

    /// Makes room: what is not valid any more goes, and the eighth that is valid for the shortest time.
    fn forget(&mut self, now: Instant) {
        let mut addrs: Vec<Instant> = self.names.values().flatten().map(|bound| bound.until).collect();
        let eighth = addrs.len() / 8;
        let limit = if addrs.is_empty() { now } else { (*addrs.select_nth_unstable(eighth).1).max(now) };
        self.names.retain(|_, all| {
            all.retain(|bound| bound.until > limit);
            !all.is_empty()
        });
        self.bound = self.names.values().map(Vec::len).sum();
    }

    fn report(&mut self, denial: Denial, now: Instant) {
        if self.reports_since.is_none_or(|since| now.saturating_duration_since(since) >= Duration::from_secs(1)) {
            (self.reports, self.reports_since) = (0, Some(now));
        }
        if self.reports >= MAX_REPORTS || self.denials.len() >= MAX_REPORTS as usize {
            self.suppressed += 1;
            return;
        }
        self.reports += 1;
        log::debug!("a guest may not go there: {denial}");
        self.denials.push(Denial { suppressed: std::mem::take(&mut self.suppressed), ..denial });
    }
}

/// A range that is one address alone, which is how the host's own are named.
fn names_own(address: IpAddr) -> impl Fn(Cidr) -> bool {
    move |range| range == Cidr::from(address)
}

fn routes() -> Option<Routes> {
    Routes::new()
        .inspect_err(|e| log::warn!("the host's routes cannot be read, so every address counts as the host's own: {e}"))
        .ok()
}

#[cfg(test)]
mod tests;
