//! [`Policy`]: where a guest may go.
//!
//! Plain rules, made by the embedder; [`Enforcer`] applies them on the VM's event loop.

mod cidr;
mod enforce;
mod metadata;
mod name;

use std::ops::RangeInclusive;

pub use self::cidr::Cidr;
#[cfg(any(test, feature = "internals"))]
pub(crate) use self::cidr::special_purpose_range;
pub(crate) use self::enforce::{Admitted, Asking, Enforcer};
pub use self::enforce::{Denial, DenyReason};
pub(crate) use self::name::DomainName;

use std::fmt;

use crate::error::{Error, Result};

/// A protocol that a rule names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Echo requests of ICMP and ICMPv6.
    Ping,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Ping => "ping",
        })
    }
}

/// What a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
enum RuleTarget {
    /// Allowed: all public addresses. Denied: all addresses.
    Anywhere,
    Range(Cidr),
    Name(String),
}

/// One line of a [`Policy`]; a config value.
///
/// Without [`Rule::port`] or [`Rule::ports`] it is about all ports, without [`Rule::protocol`] about all protocols.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct Rule {
    allow: bool,
    target: RuleTarget,
    ports: Vec<RangeInclusive<u16>>,
    protocols: Vec<Protocol>,
}

impl Rule {
    fn new(allow: bool, target: RuleTarget) -> Self {
        Self { allow, target, ports: Vec::new(), protocols: Vec::new() }
    }

    /// Allows all public addresses and all names.
    ///
    /// Private, shared, link-local, loopback, multicast and reserved addresses are not among them, and need a rule of
    /// their range. The host's own addresses, and metadata services of clouds and clusters, need a rule of exactly
    /// their address.
    pub fn allow_public() -> Self {
        Self::new(true, RuleTarget::Anywhere)
    }

    /// Allows a range of addresses.
    ///
    /// An address that is not public is only allowed by a range that is wholly not public: `10.0.0.0/8` allows
    /// 10.1.2.3, `0.0.0.0/0` does not.
    ///
    /// The host's own addresses, however they were configured, need a rule of that address alone; only those of
    /// loopback do not. So do metadata services, as 169.254.169.254.
    pub fn allow_range(range: impl Into<Cidr>) -> Self {
        Self::new(true, RuleTarget::Range(range.into()))
    }

    /// Allows a name as `example.com`, or all names below one as `*.example.com`.
    ///
    /// The guest may ask for it, and go to the addresses of the answer for as long as that is valid. An address that is
    /// not public needs a rule of its range too.
    pub fn allow_name(name: impl Into<String>) -> Self {
        Self::new(true, RuleTarget::Name(name.into()))
    }

    /// Denies everything.
    pub fn deny_all() -> Self {
        Self::new(false, RuleTarget::Anywhere)
    }

    /// Denies a range of addresses.
    pub fn deny_range(range: impl Into<Cidr>) -> Self {
        Self::new(false, RuleTarget::Range(range.into()))
    }

    /// Refuses to resolve a name: `example.com`, or `*.example.com` for all below it.
    ///
    /// With ports or protocols the name is resolved, and they are denied on the addresses of the answer.
    ///
    /// This denies no address: a guest that has one from elsewhere goes there if another rule allows it. To keep it
    /// from a service, deny the service's range, or allow only what it needs.
    pub fn deny_name(name: impl Into<String>) -> Self {
        Self::new(false, RuleTarget::Name(name.into()))
    }

    /// Restricts the rule to this port. Call repeatedly to add ports.
    pub fn port(self, port: u16) -> Self {
        self.ports(port..=port)
    }

    /// Restricts the rule to these ports. Call repeatedly to add ports.
    pub fn ports(mut self, ports: RangeInclusive<u16>) -> Self {
        self.ports.push(ports);
        self
    }

    /// Restricts the rule to this protocol. Call repeatedly to add protocols.
    pub fn protocol(mut self, protocol: Protocol) -> Self {
        self.protocols.push(protocol);
        self
    }

    fn fits(&self, protocol: Protocol, port: u16) -> bool {
        // An echo has no port.
        let ports = self.ports.is_empty() || protocol != Protocol::Ping && self.ports.iter().any(|p| p.contains(&port));
        ports && (self.protocols.is_empty() || self.protocols.contains(&protocol))
    }

    fn check(&self) -> Result<(), String> {
        for ports in &self.ports {
            if *ports.start() == 0 {
                return Err("a port is 1 or higher, not 0".into());
            }
            if ports.is_empty() {
                return Err(format!("no port is in {}..={}: say the lower one first", ports.start(), ports.end()));
            }
        }
        if !self.ports.is_empty() && self.protocols == [Protocol::Ping] {
            return Err("an echo has no port, so that it can never match: leave the port or the protocol out".into());
        }
        match &self.target {
            RuleTarget::Name(name) => DomainName::parse_pattern(name).map(drop),
            _ => Ok(()),
        }
    }

    /// The name that it is about.
    fn name(&self) -> Option<DomainName> {
        match &self.target {
            RuleTarget::Name(name) => DomainName::parse_pattern(name).ok(),
            _ => None,
        }
    }

    /// Whether nothing is left for `later`. The names are those of both.
    fn covers(&self, later: &Self, names: [Option<&DomainName>; 2]) -> bool {
        let targets = match (&self.target, &later.target) {
            (RuleTarget::Anywhere, _) => !self.allow || later.target == RuleTarget::Anywhere && later.allow,
            (RuleTarget::Range(ours), RuleTarget::Range(theirs)) => {
                // A rule of one address allows what a range around it does not: the host's own, and metadata services.
                let alone = later.allow && theirs.is_one() && ours != theirs;
                ours.covers(*theirs) && (!self.allow || special_alike(*ours, *theirs) && !alone)
            }
            (RuleTarget::Name(_), RuleTarget::Name(_)) => {
                matches!(names, [Some(ours), Some(theirs)] if ours.covers(theirs))
            }
            _ => false,
        };
        let ports = |p: &RangeInclusive<u16>| self.ports.iter().any(|q| q.contains(p.start()) && q.contains(p.end()));
        let ports = self.ports.is_empty() || !later.ports.is_empty() && later.ports.iter().all(ports);
        let protocols = self.protocols.is_empty()
            || !later.protocols.is_empty() && later.protocols.iter().all(|p| self.protocols.contains(p));
        targets && ports && protocols
    }
}

/// Whether a rule that allows all of `ours` allows every address of `theirs`, which lies in it.
fn special_alike(ours: Cidr, theirs: Cidr) -> bool {
    ours == theirs || cidr::special_purpose_range(theirs.first()).is_none_or(|(range, _)| range.covers(ours))
}

/// The rules by which a guest may go to addresses and names; a config value.
///
/// The first rule that is about a destination decides. What no rule is about is denied. The policy of a running guest
/// can be changed; connections that are denied then are reset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[must_use = "a config value does nothing by itself"]
pub struct Policy {
    rules: Vec<Rule>,
    all_records: bool,
}

/// More rules than anybody can read.
const MAX_RULES: usize = 4096;

impl Policy {
    /// Denies all but the gateway itself. No name is answered.
    pub fn deny_all() -> Self {
        Self::default()
    }

    /// Allows everything that is public; see [`Rule::allow_public`].
    pub fn internet() -> Self {
        Self::default().rule(Rule::allow_public())
    }

    /// Sets whether questions for records of every type are answered, as MX, TXT and SRV.
    ///
    /// That is for every name that [`Rule::allow_public`] lets the guest ask for. The host's resolvers may know
    /// internal names, and the guest gets those records too.
    ///
    /// By default such names have addresses (A, AAAA) and aliases (CNAME) alone. Names of [`Rule::allow_name`] have
    /// records of every type. Addresses that the policy lets the guest reach have names (PTR).
    pub fn all_records(mut self, answer: bool) -> Self {
        self.all_records = answer;
        self
    }

    /// Adds a rule after those that there are.
    pub fn rule(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    /// # Errors
    /// `InvalidConfig` for a rule that says nothing, or can never decide anything; the message says which and what to do.
    pub(crate) fn check(&self) -> Result<()> {
        if self.rules.len() > MAX_RULES {
            return Err(Error::invalid("Policy::rule", format!("there are more than {MAX_RULES} rules")));
        }
        // Each rule is compared with each, so that names are parsed once.
        let names: Vec<_> = self.rules.iter().map(Rule::name).collect();
        for (n, (rule, name)) in self.rules.iter().zip(&names).enumerate() {
            rule.check().map_err(|problem| Error::invalid("Policy::rule", format!("rule {n}: {problem}")))?;
            let mut earlier = self.rules.iter().zip(&names).take(n);
            if let Some(first) = earlier.position(|(it, its)| it.covers(rule, [its.as_ref(), name.as_ref()])) {
                let problem = format!("rule {n} can never match, as rule {first} decides all of it: swap or drop one");
                return Err(Error::invalid("Policy::rule", problem));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn empty_rules_are_rejected_with_a_remedy() {
        for (rule, word) in [
            (Rule::allow_public().port(0), "not 0"),
            (Rule::allow_public().ports(RangeInclusive::new(9, 3)), "lower one first"),
            (Rule::allow_public().port(80).protocol(Protocol::Ping), "no port"),
            (Rule::allow_name("*"), "allow_public"),
            (Rule::allow_name("a.*.com"), "*."),
            (Rule::allow_name("10.0.0.1"), "range"),
            (Rule::allow_name("a..b"), "empty"),
            (Rule::allow_name("münchen.de"), "xn--"),
            (Rule::allow_name(""), "empty"),
            (Rule::allow_name("a".repeat(64)), "63"),
            (Rule::allow_name("https://packages.example.org/simple"), "say \"packages.example.org\""),
            (Rule::allow_name("packages.example.org:443"), "Rule::port(443)"),
            (Rule::allow_name("packages.example.org/simple"), "path"),
            (Rule::deny_name("user@example.org"), "'@'"),
            (Rule::allow_name("example.org,example.com"), "','"),
            (Rule::allow_name(" example.org"), "' '"),
        ] {
            let error = Policy::default().rule(rule).check().unwrap_err();
            assert!(error.to_string().contains(word), "{error} lacks {word}");
        }
    }

    #[test]
    fn rules_that_can_never_match_are_refused() {
        for (first, second) in [
            (Rule::deny_all(), Rule::allow_public()),
            (Rule::allow_range(range("10.0.0.0/8")), Rule::deny_range(range("10.1.0.0/16"))),
            (Rule::deny_range(range("10.0.0.0/8")), Rule::allow_range(range("10.1.0.0/16")).port(80)),
            (Rule::allow_name("*.example.com"), Rule::deny_name("www.example.com")),
            (Rule::allow_public().ports(1..=1000), Rule::allow_public().port(80)),
        ] {
            let policy = Policy::default().rule(first).rule(second);
            assert!(policy.check().unwrap_err().to_string().contains("never match"), "{policy:?}");
        }
        for (first, second) in [
            (Rule::allow_range(range("10.0.0.0/8")).port(80), Rule::deny_range(range("10.1.0.0/16"))),
            (Rule::allow_range(range("0.0.0.0/0")), Rule::allow_range(range("10.1.0.0/16"))),
            (Rule::allow_name("example.com"), Rule::deny_name("www.example.com")),
            (Rule::allow_public(), Rule::allow_range(range("10.0.0.0/8"))),
            (Rule::allow_range(range("10.0.0.0/8")), Rule::allow_range(range("10.9.9.9/32"))),
            (Rule::allow_public().protocol(Protocol::Tcp), Rule::allow_public()),
        ] {
            Policy::default().rule(first).rule(second).check().unwrap();
        }
        assert!(Policy::deny_all().check().is_ok() && Policy::internet().check().is_ok());
    }
}
