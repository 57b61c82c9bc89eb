//! [`Enforcer`]: a policy at work: what it admits, what names were resolved to, and who hears of denials. Of one network.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Cidr, Name, Policy, Protocol, Rule, Target, cidr::special};
use crate::net::dns;
use crate::sys::{Route, Routes, SocketKind};

/// Where a socket may go. Only [`Enforcer::admit`] makes one, so whoever has it was admitted.
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
pub enum Why {
    /// No rule is about it.
    NoRule,
    /// The rule of this number, from zero, denies it.
    Rule(usize),
    /// It is not public, and no rule allows its range: `"private"`, `"metadata"`, `"loopback"` and so on.
    Special(&'static str),
    /// It is the host's own address, which only a rule of that address alone allows.
    Host,
    /// It is allowed, but the process has no descriptors left for guests: see
    /// [`set_descriptor_reserve`](crate::set_descriptor_reserve).
    Descriptors,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRule => f.write_str("no rule allows it"),
            Self::Rule(n) => write!(f, "rule {n} denies it"),
            Self::Special(name) => write!(f, "the address is {name}, and no rule allows its range"),
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
    pub why: Why,
    /// How many denials before this one were not told, as there were too many in a short time.
    pub untold: u64,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.destination, &self.name) {
            (Some(to), Some(name)) => write!(f, "{to} ({name}): {}", self.why),
            (Some(to), None) => write!(f, "{to}: {}", self.why),
            (None, Some(name)) => write!(f, "{name}: {}", self.why),
            (None, None) => write!(f, "{}", self.why),
        }
    }
}

/// Hears of denials, on the VM's event loop: must not block.
pub(crate) type Reporter = Box<dyn FnMut(Denial) + Send>;

/// Denials that are told at once, and in each second.
const TOLD: u32 = 64;

/// What becomes of a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asking {
    /// The host's resolver is asked.
    Passed,
    /// The name may have other records, but none of this type is told.
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
struct Bound {
    name: Arc<str>,
    until: Instant,
}

/// A rule that is ready to be used.
#[derive(Debug)]
struct Ready {
    rule: Rule,
    name: Option<Name>,
}

/// A policy at work.
pub(crate) struct Enforcer {
    rules: Vec<Ready>,
    all_records: bool,
    /// What our resolver has answered.
    names: HashMap<IpAddr, Vec<Bound>>,
    bound: usize,
    reporter: Option<Reporter>,
    told: u32,
    told_since: Option<Instant>,
    untold: u64,
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
            reporter: None,
            told: 0,
            told_since: None,
            untold: 0,
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
                Target::Name(text) => Name::parse_pattern(text).ok(),
                _ => None,
            };
            Ready { rule, name }
        };
        self.all_records = policy.all_records;
        self.rules = policy.rules.into_iter().map(ready).collect();
    }

    pub(crate) fn report_to(&mut self, reporter: Reporter) {
        self.reporter = Some(reporter);
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
            Err(why) => {
                let name = self.names.get(&to.ip()).and_then(|all| all.last()).map(|bound| bound.name.to_string());
                self.report(Denial { protocol: Some(protocol), destination: Some(to), name, why, untold: 0 }, now);
                None
            }
        }
    }

    /// Tells that the host has nothing left for what was admitted.
    pub(crate) fn refused(&mut self, protocol: Protocol, to: SocketAddr, now: Instant) {
        let denial =
            Denial { protocol: Some(protocol), destination: Some(to), name: None, why: Why::Descriptors, untold: 0 };
        self.report(denial, now);
    }

    /// Whether what was admitted still would be. Names may have expired since.
    pub(crate) fn allows(&self, protocol: Protocol, to: SocketAddr) -> bool {
        self.decide(protocol, to, None).is_ok()
    }

    fn decide(&self, protocol: Protocol, to: SocketAddr, now: Option<Instant>) -> Result<(), Why> {
        let (address, special) = (to.ip(), special(to.ip()));
        // What is not public must be named by a range that is not public either.
        let names = |range: Cidr| range.contains(address) && special.is_none_or(|(block, _)| block.covers(range));
        let mut denied = Why::NoRule;
        for (n, Ready { rule, name }) in self.rules.iter().enumerate() {
            if !rule.fits(protocol, to.port()) {
                continue;
            }
            let (hit, public) = match (&rule.target, name) {
                (Target::Anywhere, _) => (true, true),
                (Target::Range(range), _) => (range.contains(address), !names(*range)),
                (Target::Name(_), Some(name)) => (self.is_bound(address, name, now), true),
                (Target::Name(_), None) => (false, true),
            };
            match (hit, rule.allow, special) {
                (false, ..) => {}
                (true, false, _) => return Err(Why::Rule(n)),
                (true, true, Some((_, what))) if public && !self.range_allows(names, protocol, to.port(), rule) => {
                    denied = Why::Special(what);
                }
                // Loopback addresses are nothing but the host: a range of them says so.
                (true, true, block)
                    if block.is_none_or(|(_, what)| what != "loopback")
                        && !self.range_allows(names_own(address), protocol, to.port(), rule)
                        && self.is_own(address) =>
                {
                    denied = Why::Host;
                }
                (true, true, _) => return Ok(()),
            }
        }
        Err(denied)
    }

    /// Whether `rule` is of a name, and another one allows the range that the name leads into; or it is such itself.
    fn range_allows(&self, names: impl Fn(Cidr) -> bool, protocol: Protocol, port: u16, rule: &Rule) -> bool {
        let range = |rule: &Rule| match rule.target {
            Target::Range(range) => rule.allow && names(range),
            _ => false,
        };
        match rule.target {
            Target::Name(_) => self.rules.iter().any(|r| range(&r.rule) && r.rule.fits(protocol, port)),
            _ => range(rule),
        }
    }

    /// Whether a packet to `address` would stay on the host: its services would be reached as if from itself. What cannot be
    /// told is the host's own.
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

    fn is_bound(&self, address: IpAddr, name: &Name, now: Option<Instant>) -> bool {
        let valid = |bound: &&Bound| now.is_none_or(|now| bound.until > now);
        self.names.get(&address).is_some_and(|all| all.iter().filter(valid).any(|bound| name.matches(&bound.name)))
    }

    /// Whether the guest may ask for records of type `kind` of `name`, which is in lower case and has no last dot; tells of the
    /// denial.
    pub(crate) fn asks(&mut self, name: &str, kind: u16, now: Instant) -> Asking {
        let named =
            |ready: &Ready| ready.rule.allow && ready.name.as_ref().is_some_and(|pattern| pattern.matches(name));
        if kind == dns::PTR {
            if let Some(address) = dns::reverse(name).filter(|_| !self.rules.iter().any(named)) {
                return if self.reaches(address) { Asking::Passed } else { self.denied(name, Why::NoRule, now) };
            }
        }
        if !self.may_ask(name, now) {
            return Asking::Denied;
        }
        let plain = matches!(kind, dns::A | dns::AAAA | dns::CNAME);
        if plain || self.all_records || self.rules.iter().any(named) { Asking::Passed } else { Asking::Empty }
    }

    fn denied(&mut self, name: &str, why: Why, now: Instant) -> Asking {
        self.report(Denial { protocol: None, destination: None, name: Some(name.into()), why, untold: 0 }, now);
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
            Target::Anywhere if rule.allow || rule.ports.is_empty() && rule.protocols.is_empty() => {
                Some((n, rule.allow))
            }
            Target::Name(_) if pattern.as_ref().is_some_and(|p| p.matches(name)) => {
                // Denying a port of a name does not deny the name.
                (rule.allow || rule.ports.is_empty() && rule.protocols.is_empty()).then_some((n, rule.allow))
            }
            _ => None,
        });
        let why = match decision {
            Some((_, true)) => return true,
            Some((n, false)) => Why::Rule(n),
            None => Why::NoRule,
        };
        self.report(Denial { protocol: None, destination: None, name: Some(name.into()), why, untold: 0 }, now);
        false
    }

    /// Whether the guest may learn that `name` leads to `address`: not inside, where no rule allows the range (DNS rebinding).
    pub(crate) fn may_lead(&mut self, name: &str, address: IpAddr, now: Instant) -> bool {
        let Some((block, what)) = special(address) else { return true };
        let named = |ready: &Ready| match ready.rule.target {
            Target::Range(range) => ready.rule.allow && range.contains(address) && block.covers(range),
            _ => false,
        };
        if self.rules.iter().any(named) {
            return true;
        }
        let (name, why) = (Some(name.into()), Why::Special(what));
        let destination = Some(SocketAddr::new(address, 0));
        self.report(Denial { protocol: None, destination, name, why, untold: 0 }, now);
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
            all.push(Bound { name: name.clone(), until });
        }
    }

    /// Makes room: what is not valid any more goes, or else what is valid for the shortest time.
    fn forget(&mut self, now: Instant) {
        let first = self.names.values().flatten().map(|bound| bound.until).min();
        let limit = first.map_or(now, |first| first.max(now));
        self.names.retain(|_, all| {
            all.retain(|bound| bound.until > limit);
            !all.is_empty()
        });
        self.bound = self.names.values().map(Vec::len).sum();
    }

    fn report(&mut self, denial: Denial, now: Instant) {
        if self.told_since.is_none_or(|since| now.saturating_duration_since(since) >= Duration::from_secs(1)) {
            (self.told, self.told_since) = (0, Some(now));
        }
        if self.told >= TOLD {
            self.untold += 1;
            return;
        }
        self.told += 1;
        log::debug!("a guest may not go there: {denial}");
        if let Some(reporter) = &mut self.reporter {
            reporter(Denial { untold: std::mem::take(&mut self.untold), ..denial });
        }
    }
}

/// A range that is one address alone, which is how the host's own are named.
fn names_own(address: IpAddr) -> impl Fn(Cidr) -> bool {
    move |range| range == Cidr::from(address)
}

fn routes() -> Option<Routes> {
    Routes::new().inspect_err(|e| log::warn!("no address can be told from the host's own: {e}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    fn to(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn range(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    fn allowed(policy: &Policy, protocol: Protocol, address: &str) -> bool {
        policy.check().unwrap();
        Enforcer::new(policy.clone()).admit(protocol, to(address), Instant::now()).is_some()
    }

    #[test]
    fn the_first_rule_decides_and_none_denies() {
        let policy = Policy::default()
            .rule(Rule::deny_range(range("9.9.0.0/16")).port(25))
            .rule(Rule::allow_range(range("9.0.0.0/8")).ports(20..=30).protocol(Protocol::Tcp));
        assert!(allowed(&policy, Protocol::Tcp, "9.9.9.9:22"));
        assert!(!allowed(&policy, Protocol::Tcp, "9.9.9.9:25"));
        assert!(allowed(&policy, Protocol::Tcp, "9.8.9.9:25"));
        assert!(!allowed(&policy, Protocol::Udp, "9.8.9.9:25"));
        assert!(!allowed(&policy, Protocol::Tcp, "9.8.9.9:31"));
        assert!(!allowed(&Policy::deny_all(), Protocol::Tcp, "9.9.9.9:22"));
    }

    #[test]
    fn special_ranges_are_denied_unless_named() {
        let all = Policy::internet();
        let wide = Policy::default().rule(Rule::allow_range(range("0.0.0.0/0"))).rule(Rule::allow_range(range("::/0")));
        for address in [
            "10.0.0.1:80",
            "127.0.0.1:80",
            "169.254.169.254:80",
            "[::1]:80",
            "[fd00:ec2::254]:80",
            "224.0.0.1:80",
            "[::ffff:127.0.0.1]:80",
            "[64:ff9b::7f00:1]:80",
            "100.64.0.1:80",
            "0.0.0.0:80",
            "[fe80::1]:80",
            "168.63.129.16:80",
            "168.63.129.16:32526",
            "169.254.170.2:80",
            "169.254.170.23:80",
            "100.100.100.200:80",
            "192.0.0.192:80",
            "169.254.42.42:80",
            "169.254.0.23:80",
            "169.254.20.10:53",
            "161.26.0.10:53",
            "166.9.1.1:443",
            "[fd00:42::42]:80",
            "[fd20:ce::254]:80",
            "[fe80::a9fe:a9fe]:80",
        ] {
            assert!(!allowed(&all, Protocol::Tcp, address), "{address}");
            assert!(!allowed(&wide, Protocol::Tcp, address), "{address}");
        }
        assert!(allowed(&all, Protocol::Udp, "8.8.8.8:53") && allowed(&wide, Protocol::Ping, "[2606::1]:0"));
        let local =
            all.clone().rule(Rule::allow_range(range("169.254.0.0/16"))).rule(Rule::allow_range(range("127.0.0.1/32")));
        assert!(allowed(&local, Protocol::Tcp, "127.0.0.1:80") && allowed(&local, Protocol::Tcp, "169.254.1.1:80"));
        assert!(!allowed(&local, Protocol::Tcp, "127.0.0.2:80"));
        assert!(!allowed(&local, Protocol::Tcp, "169.254.169.254:80"));
        let metadata = Policy::default().rule(Rule::allow_range(range("169.254.169.254/32")));
        assert!(allowed(&metadata, Protocol::Tcp, "169.254.169.254:80"));
    }

    #[test]
    fn own_addresses_are_denied_unless_named_alone() {
        fn routes(address: IpAddr) -> Route {
            match address.to_string().as_str() {
                "9.9.9.9" | "10.9.9.9" | "fd00::9" | "2606::9" => Route::Own,
                _ => Route::Other,
            }
        }
        let admits = |policy: &Policy, address: &str| {
            let mut it = Enforcer::new(policy.clone());
            it.pretend(routes);
            it.admit(Protocol::Tcp, to(address), Instant::now()).is_some()
        };
        let ranges = ["0.0.0.0/0", "9.9.9.0/24", "10.0.0.0/8", "10.9.9.8/31", "fd00::/8", "::/0", "2606::/16"];
        let wide = ranges.iter().fold(Policy::internet(), |policy, text| policy.rule(Rule::allow_range(range(text))));
        for own in ["9.9.9.9:80", "10.9.9.9:22", "[fd00::9]:22", "[2606::9]:22"] {
            assert!(!admits(&wide, own), "{own}");
            let alone = wide.clone().rule(Rule::allow_range(to(own).ip()));
            assert!(admits(&alone, own), "{own}");
        }
        for other in ["9.9.9.8:80", "10.9.9.8:22", "[fd00::8]:22", "[2606::8]:22"] {
            assert!(admits(&wide, other), "{other}");
        }
        // What cannot be told is the host's own.
        let mut it = Enforcer::new(wide);
        it.routes = None;
        assert_eq!(it.decide(Protocol::Tcp, to("9.9.9.8:80"), None), Err(Why::Host));
        assert_eq!(it.decide(Protocol::Tcp, to("10.9.9.8:80"), None), Err(Why::Host));
    }

    #[test]
    fn own_addresses_are_own_however_they_were_configured() {
        // In a network namespace of its own, where this process may make one.
        const CHILD: &str = "COFFERDAM_TEST_NAMESPACE";
        if std::env::var_os(CHILD).is_none() {
            let name = "net::policy::enforce::tests::own_addresses_are_own_however_they_were_configured";
            let set_up = "ip link set lo up && ip addr add 9.9.9.9/32 dev lo && ip addr add 10.9.9.9/8 dev lo && \
                ip -6 addr add 2606::9/128 dev lo nodad && ip route add local 8.8.0.0/16 dev lo && \
                ip route add 7.0.0.0/8 dev lo && { echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind || true; }";
            let script = format!("({set_up}) || exit 77; exec \"$0\" --exact {name}");
            let mut child = std::process::Command::new("unshare");
            child.args(["-n", "sh", "-c", &script]).arg(std::env::current_exe().unwrap()).env(CHILD, "1");
            match child.output() {
                Ok(child) if child.status.success() => {}
                Ok(child) if !matches!(child.status.code(), Some(1 | 77)) || child.stdout.starts_with(b"\nrunning") => {
                    panic!("{}", String::from_utf8_lossy(&child.stdout));
                }
                refused => eprintln!("skipped: no network namespace can be made: {refused:?}"),
            }
            return;
        }
        let wide = ["7.0.0.0/8", "10.0.0.0/8"].map(|text| Rule::allow_range(range(text)));
        let policy = wide.into_iter().fold(Policy::internet(), Policy::rule);
        for own in ["9.9.9.9:80", "10.9.9.9:22", "[2606::9]:80", "8.8.8.8:53", "8.8.1.2:53", "10.255.255.255:9"] {
            assert!(!allowed(&policy, Protocol::Tcp, own), "{own}");
        }
        let alone = policy.clone().rule(Rule::allow_range(range("10.9.9.9/32")));
        assert!(allowed(&alone, Protocol::Tcp, "10.9.9.9:22"));
        for other in ["7.1.1.1:80", "10.9.9.8:22", "8.9.1.1:80"] {
            assert!(allowed(&policy, Protocol::Tcp, other), "{other}");
        }
    }

    #[test]
    fn without_descriptors_nothing_more_is_admitted() {
        // In a process of its own, so that others keep theirs.
        const CHILD: &str = "COFFERDAM_TEST_DESCRIPTORS";
        if std::env::var_os(CHILD).is_none() {
            let this = std::env::current_exe().unwrap();
            let name = "net::policy::enforce::tests::without_descriptors_nothing_more_is_admitted";
            let child = std::process::Command::new(this).args(["--exact", name]).env(CHILD, "1").output().unwrap();
            assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stdout));
            return;
        }
        let own = range("127.0.0.0/8");
        let mut before = Enforcer::new(Policy::internet().rule(Rule::allow_range(own)));
        let mut files = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            files.push(file);
        }
        // One that was there before knows all the same; a new one knows nothing.
        assert!(!before.is_own("192.0.2.77".parse().unwrap()) && before.is_own("127.0.0.2".parse().unwrap()));
        assert!(before.admit(Protocol::Tcp, to("8.8.8.8:80"), Instant::now()).is_some());
        let mut late = Enforcer::new(Policy::internet());
        assert!(late.admit(Protocol::Tcp, to("8.8.8.8:80"), Instant::now()).is_none());
        files.clear();
        assert!(late.admit(Protocol::Tcp, to("8.8.8.8:80"), Instant::now()).is_some());
    }

    #[test]
    fn names_admit_what_they_were_resolved_to_for_as_long_as_it_is_valid() {
        let policy = Policy::default().rule(Rule::allow_name("*.example.com").port(443));
        let (mut it, now) = (Enforcer::new(policy), Instant::now());
        assert!(it.may_ask("www.example.com", now) && !it.may_ask("example.org", now));
        let (there, minute) = (to("9.9.9.9:443"), Duration::from_secs(60));
        assert!(it.admit(Protocol::Tcp, there, now).is_none());
        it.resolved("www.example.com", &[there.ip()], minute, now);
        it.resolved("example.org", &[there.ip()], minute * 2, now);
        assert!(it.admit(Protocol::Tcp, there, now).is_some());
        assert!(it.admit(Protocol::Tcp, to("9.9.9.9:80"), now).is_none());
        assert!(it.admit(Protocol::Tcp, there, now + minute).is_none());
        assert!(it.allows(Protocol::Tcp, there));
        it.change(Policy::deny_all());
        assert!(!it.allows(Protocol::Tcp, there));
    }

    #[test]
    fn names_that_lead_inside_need_the_range_as_well() {
        let names = Policy::default().rule(Rule::allow_name("rebind.example.com"));
        let (now, valid, inside) = (Instant::now(), Duration::from_secs(60), to("127.0.0.1:80"));
        let mut it = Enforcer::new(names.clone());
        it.resolved("rebind.example.com", &[inside.ip()], valid, now);
        assert!(it.admit(Protocol::Tcp, inside, now).is_none());
        it.change(names.clone().rule(Rule::allow_range(range("10.0.0.0/8"))));
        assert!(it.admit(Protocol::Tcp, inside, now).is_none());
        it.change(names.rule(Rule::allow_range(range("127.0.0.0/8"))));
        assert!(it.admit(Protocol::Tcp, inside, now).is_some());
    }

    #[test]
    fn the_table_of_names_is_bounded() {
        let (mut it, now) = (Enforcer::new(Policy::deny_all()), Instant::now());
        for n in 0..20_000u32 {
            let address = IpAddr::from(n.to_be_bytes());
            it.resolved("a.example", &[address], Duration::from_secs(60 + u64::from(n)), now);
        }
        assert!(it.bound <= MAX_BOUND && it.names.len() <= MAX_BOUND);
        assert!(it.names.contains_key(&IpAddr::from(19_999u32.to_be_bytes())));
    }

    #[test]
    fn denials_are_told_but_not_too_many() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let (mut it, now, tell) = (Enforcer::new(Policy::internet()), Instant::now(), told.clone());
        it.report_to(Box::new(move |denial| tell.lock().unwrap().push(denial)));
        for _ in 0..1000 {
            assert!(it.admit(Protocol::Tcp, to("10.0.0.1:80"), now).is_none());
        }
        assert_eq!(told.lock().unwrap().len(), TOLD as usize);
        assert!(it.admit(Protocol::Udp, to("169.254.169.254:80"), now + Duration::from_secs(2)).is_none());
        let last = told.lock().unwrap().pop().unwrap();
        assert_eq!((last.why, last.untold), (Why::Special("metadata"), 1000 - u64::from(TOLD)));
        assert_eq!(last.protocol, Some(Protocol::Udp));
    }

    proptest! {
        /// Whatever the rules are, an address that no range names is admitted only if it is public.
        #[test]
        fn inside_is_never_reached_by_accident(address in any::<[u8; 4]>(), port in 1u16.., bits in 0u8..8) {
            let wide = Cidr::new(IpAddr::from([0; 4]), 0).unwrap();
            let part = Cidr::new(IpAddr::from((u32::from_be_bytes(address) & !(u32::MAX >> bits)).to_be_bytes()), bits);
            let policy = Policy::internet().rule(Rule::allow_range(wide)).rule(Rule::allow_range(part.unwrap_or(wide)));
            let (address, mut it) = (IpAddr::from(address), Enforcer::new(policy));
            it.resolved("x.y", &[address], Duration::from_secs(9), Instant::now());
            let admitted = it.admit(Protocol::Tcp, SocketAddr::new(address, port), Instant::now()).is_some();
            prop_assert!(!admitted || special(address).is_none() || matches!(address, IpAddr::V4(a) if a.octets()[0] == 0 || a.octets()[0] >= 224));
        }
    }
}
