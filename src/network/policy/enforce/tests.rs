//! Policies at work.

use super::*;
use proptest::prelude::*;

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
fn first_matching_rule_decides_and_default_is_deny() {
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
        "[fd00:ec2::253]:53",
        "[fd00:ec2::123]:123",
        "[fd00:ec2::23]:80",
        "[fd00:c1::a9fe:a9fe]:80",
        "[fd00:a9fe:a9fe::1]:80",
        "[fd00:100::100:200]:80",
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
    // An address of unknown route counts as the host's own.
    let mut it = Enforcer::new(wide);
    it.routes = None;
    assert_eq!(it.decide(Protocol::Tcp, to("9.9.9.8:80"), None), Err(DenyReason::Host));
    assert_eq!(it.decide(Protocol::Tcp, to("10.9.9.8:80"), None), Err(DenyReason::Host));
}

#[test]
fn host_addresses_are_recognized_however_configured() {
    // In a network namespace of its own, where this process may make one.
    const CHILD: &str = "COFFERDAM_TEST_NAMESPACE";
    if std::env::var_os(CHILD).is_none() {
        let name = "network::policy::enforce::tests::host_addresses_are_recognized_however_configured";
        let set_up = "ip link set lo up && ip addr add 9.9.9.9/32 dev lo && ip addr add 10.9.9.9/32 dev lo && \
            ip -6 addr add 2606::9/128 dev lo nodad && ip route add local 8.8.0.0/16 dev lo && \
            ip route add 7.0.0.0/8 dev lo && ip route add 10.0.0.0/8 dev lo && { echo 1 >/proc/sys/net/ipv4/ip_nonlocal_bind || true; }";
        let script = format!("({set_up}) || exit 77; exec \"$0\" --exact {name}");
        let mut child = std::process::Command::new("unshare");
        child.args(["-n", "sh", "-c", &script]).arg(std::env::current_exe().unwrap()).env(CHILD, "1");
        match child.output() {
            Ok(child) if child.status.success() => {
                assert!(String::from_utf8_lossy(&child.stdout).contains(" 1 passed"), "no such test: {name}");
            }
            Ok(child) if !matches!(child.status.code(), Some(1 | 77)) || child.stdout.starts_with(b"\nrunning") => {
                panic!("{}", String::from_utf8_lossy(&child.stdout));
            }
            // Users may be forbidden to make one; root, as whom all tests run before a change lands, is not.
            refused => assert!(!is_root(), "no network namespace can be made: {refused:?}"),
        }
        return;
    }
    let wide = ["7.0.0.0/8", "10.0.0.0/8"].map(|text| Rule::allow_range(range(text)));
    let policy = wide.into_iter().fold(Policy::internet(), Policy::rule);
    for own in ["9.9.9.9:80", "10.9.9.9:22", "[2606::9]:80", "8.8.8.8:53", "8.8.1.2:53"] {
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
        let name = "network::policy::enforce::tests::without_descriptors_nothing_more_is_admitted";
        let child = std::process::Command::new(this).args(["--exact", name]).env(CHILD, "1").output().unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains(" 1 passed"), "{said}");
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
fn names_with_private_addresses_need_a_range_rule_too() {
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
    // To look through all of it makes room for many.
    it.forget(now);
    assert!(it.bound <= MAX_BOUND * 7 / 8, "{}", it.bound);
}

#[test]
fn denials_are_reported_at_a_limited_rate() {
    let (mut it, now) = (Enforcer::new(Policy::internet()), Instant::now());
    for _ in 0..1000 {
        assert!(it.admit(Protocol::Tcp, to("10.0.0.1:80"), now).is_none());
    }
    assert_eq!(it.denials.len(), MAX_REPORTS as usize);
    // Those that are not taken do not add up.
    let later = now + Duration::from_secs(2);
    assert!(it.admit(Protocol::Udp, to("169.254.169.254:80"), later).is_none());
    assert_eq!(it.take_denials().count(), MAX_REPORTS as usize);
    assert!(it.admit(Protocol::Udp, to("169.254.169.254:80"), later).is_none());
    let last = it.take_denials().next_back().unwrap();
    assert_eq!(
        (last.reason, last.suppressed),
        (DenyReason::SpecialRange { name: "metadata" }, 1001 - u64::from(MAX_REPORTS))
    );
    assert_eq!(last.protocol, Some(Protocol::Udp));
}

proptest! {
    /// Whatever the rules are, an address that no range names is admitted only if it is public.
    #[test]
    fn special_purpose_addresses_are_never_admitted_by_wide_rules(address in any::<[u8; 4]>(), port in 1u16.., bits in 0u8..8) {
        let wide = Cidr::new(IpAddr::from([0; 4]), 0).unwrap();
        let part = Cidr::new(IpAddr::from((u32::from_be_bytes(address) & !(u32::MAX >> bits)).to_be_bytes()), bits);
        let policy = Policy::internet().rule(Rule::allow_range(wide)).rule(Rule::allow_range(part.unwrap_or(wide)));
        let (address, mut it) = (IpAddr::from(address), Enforcer::new(policy));
        it.resolved("x.y", &[address], Duration::from_secs(9), Instant::now());
        let admitted = it.admit(Protocol::Tcp, SocketAddr::new(address, port), Instant::now()).is_some();
        prop_assert!(!admitted || special_purpose_range(address).is_none() || matches!(address, IpAddr::V4(a) if a.octets()[0] == 0 || a.octets()[0] >= 224));
    }
}

fn is_root() -> bool {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0
}
