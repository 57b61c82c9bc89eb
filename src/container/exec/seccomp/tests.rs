//! Profiles against a naive model, and profiles that cannot be.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::interpreter::{Call, decode, run};
use super::*;
use crate::error::ErrorKind;

const KERNEL: KernelVersion = KernelVersion { major: 6, minor: 12 };
const EPERM: u32 = 0x0005_0001;
const ALLOW: u32 = 0x7fff_0000;
const KILL_THREAD: u32 = 0;

fn profile(json: &Value) -> SeccompProfile {
    SeccompProfile::from_json(json.to_string()).unwrap()
}

fn number(name: &str) -> u32 {
    match arch::known_call(name) {
        Some(arch::KnownCall::Here(number)) => number,
        other => panic!("{name} is {other:?}"),
    }
}

fn call(name: &str, first: &[u64]) -> Call {
    let mut arguments = [0; 6];
    arguments[..first.len()].copy_from_slice(first);
    Call { number: number(name), architecture: arch::AUDIT_ARCH, arguments }
}

/// What the filter says of a call by a program with these capabilities.
fn judged(profile: &SeccompProfile, capabilities: u64, call: Call) -> u32 {
    let filter = profile.filter(ProgramTraits { capabilities, kernel: KERNEL }).unwrap();
    run(&decode(&filter.program), call).unwrap()
}

#[test]
fn actions_are_those_of_the_kernel() {
    for (action, result) in [
        ("SCMP_ACT_KILL", 0),
        ("SCMP_ACT_KILL_THREAD", 0),
        ("SCMP_ACT_KILL_PROCESS", 0x8000_0000),
        ("SCMP_ACT_TRAP", 0x0003_0000),
        ("SCMP_ACT_ERRNO", EPERM),
        ("SCMP_ACT_LOG", 0x7ffc_0000),
        ("SCMP_ACT_ALLOW", ALLOW),
    ] {
        let all = profile(&json!({"defaultAction": action}));
        assert_eq!(judged(&all, 0, call("getpid", &[])), result, "{action}");
        let one =
            profile(&json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"name": "read", "action": action}]}));
        assert_eq!(judged(&one, 0, call("read", &[])), result, "{action}");
        assert_eq!(judged(&one, 0, call("write", &[])), ALLOW);
    }
    let numbers = json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}, {"names": ["write"], "action": "SCMP_ACT_ERRNO"}]});
    let numbers = profile(&numbers);
    let results = ["getpid", "read", "write"].map(|name| judged(&numbers, 0, call(name, &[])) & 0xffff);
    assert_eq!(results, [38, 13, 1]);
}

#[test]
fn programs_of_other_architectures_are_killed_whatever_is_listed() {
    let all = profile(
        &json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]}),
    );
    let good = call("getpid", &[]);
    assert_eq!(judged(&all, 0, good), ALLOW);
    for architecture in [0, arch::AUDIT_ARCH ^ 1, 0x4000_0003, u32::MAX] {
        assert_eq!(judged(&all, 0, Call { architecture, ..good }), KILL_THREAD);
    }
    if let Some(foreign) = arch::FOREIGN_CALLS {
        for number in [foreign, foreign + good.number, u32::MAX - 1] {
            assert_eq!(judged(&all, 0, Call { number, ..good }), KILL_THREAD);
        }
    }
    // A call that a tracer has taken out.
    assert_eq!(judged(&all, 0, Call { number: u32::MAX, ..good }), ALLOW);
}

/// As Docker's own in form, with names of many architectures and kernels.
fn dockers() -> SeccompProfile {
    profile(&json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 1,
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
            {"architecture": "SCMP_ARCH_LOONGARCH64", "subArchitectures": null},
            {"architecture": "SCMP_ARCH_S390X", "subArchitectures": ["SCMP_ARCH_S390"]},
        ],
        "syscalls": [
            {"names": ["accept4", "chown32", "clock_gettime64", "close", "execve", "exit_group", "fadvise64_64", "_llseek", "_newselect",
                "futex_waitv", "ipc", "landlock_restrict_self", "map_shadow_stack", "mmap2", "openat", "openat2", "recv", "read",
                "setxattrat", "sigreturn", "socketcall", "ugetrlimit", "waitpid", "write"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["process_vm_readv", "ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}},
            {"names": ["acct"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "6.13"}},
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 0xffff_ffff_u32, "op": "SCMP_CMP_EQ"}]},
            {"names": ["sync_file_range2", "swapcontext"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["ppc64le"]}},
            {"names": ["arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "set_tls"], "action": "SCMP_ACT_ALLOW",
                "includes": {"arches": ["arm", "arm64"]}},
            {"names": ["s390_pci_mmio_read", "s390_runtime_instr"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["s390", "s390x"]}},
            {"names": ["riscv_flush_icache"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["riscv64"]}},
            {"names": ["bpf", "clone", "clone3", "mount"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}, "excludes": {}},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "comment": "no namespaces",
                "args": [{"index": 0, "value": 2_114_060_288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
                "excludes": {"caps": ["CAP_SYS_ADMIN"], "arches": ["s390", "s390x"]}},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "excludes": {"caps": ["CAP_SYS_ADMIN"]}},
        ],
    }))
}

#[test]
fn profiles_of_dockers_form_are_decided_by_capabilities_and_kernel() {
    let (dockers, admin) = (dockers(), 1 << 21);
    let newuser = 0x1000_0000;
    for (call, without, with) in [
        (call("read", &[]), ALLOW, ALLOW),
        (call("execve", &[]), ALLOW, ALLOW),
        (call("reboot", &[]), EPERM, EPERM),
        (call("ptrace", &[]), ALLOW, ALLOW),
        (call("acct", &[]), EPERM, EPERM),
        (call("mount", &[]), EPERM, ALLOW),
        (call("clone", &[17]), ALLOW, ALLOW),
        (call("clone", &[17 | newuser]), EPERM, ALLOW),
        (call("clone3", &[]), 0x0005_0026, ALLOW),
        (call("socket", &[2]), ALLOW, ALLOW),
        (call("socket", &[40]), EPERM, EPERM),
        (call("socket", &[40 | 1 << 32]), ALLOW, ALLOW),
        (call("personality", &[0]), ALLOW, ALLOW),
        (call("personality", &[0xffff_ffff]), ALLOW, ALLOW),
        (call("personality", &[u64::MAX]), EPERM, EPERM),
        (call("personality", &[8]), EPERM, EPERM),
    ] {
        assert_eq!((judged(&dockers, !admin, call), judged(&dockers, admin, call)), (without, with), "{call:?}");
    }
}

#[test]
fn the_strictest_rule_that_matches_decides() {
    let kill = json!({"name": "read", "action": "SCMP_ACT_KILL_PROCESS", "args": [{"index": 0, "value": 7, "op": "SCMP_CMP_EQ"}]});
    let (deny, allow) =
        (json!({"name": "read", "action": "SCMP_ACT_ERRNO"}), json!({"name": "read", "action": "SCMP_ACT_ALLOW"}));
    for rules in [json!([kill, deny, allow]), json!([allow, deny, kill]), json!([deny, kill, allow])] {
        let profile = profile(&json!({"defaultAction": "SCMP_ACT_LOG", "syscalls": rules}));
        assert_eq!(judged(&profile, 0, call("read", &[7])), 0x8000_0000);
        assert_eq!(judged(&profile, 0, call("read", &[8])), EPERM);
    }
}

#[test]
fn profiles_that_cannot_be_are_refused_by_name() {
    let of_rule = |rule: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}).to_string();
    let argument = |argument: Value| of_rule(json!({"name": "read", "action": "SCMP_ACT_ALLOW", "args": [argument]}));
    let invalid = [
        (String::new(), "EOF"),
        ("[]".into(), "from_json"),
        ("{}".into(), "defaultAction"),
        (json!({"defaultAction": "ALLOW"}).to_string(), "\"ALLOW\" is no action"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "syscall": []}).to_string(), "syscall"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}).to_string(), "takes no error number"),
        (json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 4096}).to_string(), "4096"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["X86"]}).to_string(), "\"X86\" is no architecture"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["FAST"]}).to_string(), "\"FAST\" is no flag"),
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_ARM"], "archMap": [{"architecture": "SCMP_ARCH_ARM"}]}).to_string(), "archMap"),
        (of_rule(json!({"name": "raed", "action": "SCMP_ACT_ALLOW"})), "no system call \"raed\""),
        (of_rule(json!({"names": ["read", ""], "action": "SCMP_ACT_ALLOW"})), "no system call \"\""),
        (of_rule(json!({"action": "SCMP_ACT_ALLOW"})), "\"name\" or \"names\""),
        (of_rule(json!({"name": "read", "names": ["write"], "action": "SCMP_ACT_ALLOW"})), "\"name\" or \"names\""),
        (of_rule(json!({"name": "read", "action": "SCMP_ACT_FORBID"})), "\"SCMP_ACT_FORBID\" is no action"),
        (of_rule(json!({"name": "read", "action": "SCMP_ACT_ALLOW", "include": {}})), "include"),
        (of_rule(json!({"name": "read", "action": "SCMP_ACT_KILL", "errnoRet": 1})), "takes no error number"),
        (of_rule(json!({"name": "read", "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["FLY"]}})), "\"FLY\" is no capability"),
        (of_rule(json!({"name": "read", "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "new"}})), "minKernel"),
        (of_rule(json!({"name": "read", "action": "SCMP_ACT_ALLOW", "excludes": {"minKernel": "4.+8"}})), "minKernel"),
        (argument(json!({"index": 6, "value": 0, "op": "SCMP_CMP_EQ"})), "argument 6"),
        (argument(json!({"index": 0, "value": -1, "op": "SCMP_CMP_EQ"})), "-1"),
        (argument(json!({"index": 0, "value": 0, "op": "EQ"})), "\"EQ\" is no comparison"),
        (" ".repeat(json::MAX_PROFILE + 1), "at most 1048576"),
        ("[".repeat(100_000), "from_json"),
    ];
    for (text, word) in invalid {
        let error = SeccompProfile::from_json(&text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        assert!(error.to_string().contains(word) && error.to_string().len() < 400, "{error}");
    }
    for unsupported in [
        json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"name": "read", "action": "SCMP_ACT_TRACE", "errnoRet": 1}]}),
        json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/listener"}),
        json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}),
    ] {
        let error = SeccompProfile::from_json(unsupported.to_string()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn filters_longer_than_linux_takes_are_refused() {
    let rules = |count: u64| {
        let rule = |n| json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 1, "value": n << 32 | n, "op": "SCMP_CMP_EQ"}]});
        profile(&json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": (0..count).map(rule).collect::<Vec<_>>()}))
    };
    let program = ProgramTraits { capabilities: 0, kernel: KERNEL };
    let long = rules(800);
    assert!(long.filter(program).unwrap().program.len() > 32_000);
    assert_eq!(judged(&long, 0, call("read", &[0, 799 << 32 | 799])), EPERM);
    assert_eq!(judged(&long, 0, call("read", &[0, 799])), ALLOW);
    assert_eq!(judged(&long, 0, call("write", &[0, 799 << 32 | 799])), ALLOW);
    for count in [900, 5000] {
        let error = rules(count).filter(program).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidConfig && error.to_string().contains("4096"), "{error}");
    }
    // Many names with many conditions each: it ends at once.
    let args: Vec<_> = (0..5000).map(|n| json!({"index": 0, "value": n, "op": "SCMP_CMP_EQ"})).collect();
    let names: Vec<_> = (0..300).filter_map(|n| Some(syscalls::Sysno::new(n)?.name())).collect();
    let wide = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": names, "action": "SCMP_ACT_ERRNO", "args": args}]});
    assert!(profile(&wide).filter(program).is_err());
}

const NAMES: [&str; 9] = ["read", "write", "close", "ioctl", "clone", "socket", "openat", "clone3", "chown32"];
const OPS: [&str; 7] =
    ["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];
const ACTIONS: [(&str, u32); 7] = [
    ("SCMP_ACT_KILL_PROCESS", 0x8000_0000),
    ("SCMP_ACT_KILL", 0),
    ("SCMP_ACT_TRAP", 0x3_0000),
    ("SCMP_ACT_ERRNO", EPERM),
    ("SCMP_ACT_ERRNO", EPERM),
    ("SCMP_ACT_LOG", 0x7ffc_0000),
    ("SCMP_ACT_ALLOW", ALLOW),
];

/// Numbers that meet each other in each half and across.
fn value() -> impl Strategy<Value = u64> {
    let half = || {
        prop_oneof![Just(0u32), Just(1), Just(2), Just(0x7fff_ffff), Just(0x8000_0000), Just(u32::MAX), any::<u32>()]
    };
    (half(), half()).prop_map(|(high, low)| u64::from(high) << 32 | u64::from(low))
}

#[derive(Debug, Clone)]
struct ModelRule {
    names: Vec<usize>,
    action: usize,
    args: Vec<(u8, usize, u64, u64)>,
    needs: Option<u8>,
    not_with: Option<u8>,
}

fn model_rule() -> impl Strategy<Value = ModelRule> {
    use proptest::collection::vec;
    use proptest::option::of;
    let argument = (0..3u8, 0..OPS.len(), value(), value());
    (vec(0..NAMES.len(), 1..4), 0..ACTIONS.len(), vec(argument, 0..4), of(0..3u8), of(0..3u8))
        .prop_map(|(names, action, args, needs, not_with)| ModelRule { names, action, args, needs, not_with })
}

impl ModelRule {
    fn json(&self) -> Value {
        let args = self
            .args
            .iter()
            .map(|(index, op, value, two)| json!({"index": index, "op": OPS[*op], "value": value, "valueTwo": two}));
        let args: Vec<_> = args.collect();
        let caps = |number: Option<u8>| {
            number.map(|n| ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH"][usize::from(n)])
        };
        json!({
            "names": self.names.iter().map(|n| NAMES[*n]).collect::<Vec<_>>(), "action": ACTIONS[self.action].0, "args": args,
            "includes": {"caps": caps(self.needs).into_iter().collect::<Vec<_>>()},
            "excludes": {"caps": caps(self.not_with).into_iter().collect::<Vec<_>>()},
        })
    }

    fn matches(&self, name: usize, capabilities: u64, arguments: &[u64; 6]) -> bool {
        let has = |number: u8| capabilities >> number & 1 == 1;
        let holds = |(index, op, value, two): &(u8, usize, u64, u64)| {
            let argument = arguments[usize::from(*index)];
            match *op {
                0 => argument != *value,
                1 => argument < *value,
                2 => argument <= *value,
                3 => argument == *value,
                4 => argument >= *value,
                5 => argument > *value,
                _ => argument & value == two & value,
            }
        };
        let mut indices: Vec<_> = self.args.iter().map(|it| it.0).collect();
        indices.sort_unstable();
        let twice = indices.windows(2).any(|pair| pair[0] == pair[1]);
        self.names.contains(&name)
            && self.needs.is_none_or(has)
            && !self.not_with.is_some_and(has)
            && if twice { self.args.iter().any(holds) } else { self.args.iter().all(holds) }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn filters_decide_as_a_naive_model(
        rules in proptest::collection::vec(model_rule(), 0..12), default in 0..ACTIONS.len(), capabilities in 0..8u64,
        calls in proptest::collection::vec((0..NAMES.len(), [value(), value(), value()]), 1..40), picks in proptest::collection::vec(any::<(u8, u8)>(), 40),
    ) {
        let json = json!({"defaultAction": ACTIONS[default].0, "syscalls": rules.iter().map(ModelRule::json).collect::<Vec<_>>()});
        let filter = profile(&json).filter(ProgramTraits { capabilities, kernel: KERNEL }).unwrap();
        let program = decode(&filter.program);
        for ((name, [a, b, c]), (rule, at)) in calls.into_iter().zip(picks) {
            let mut arguments = [a, b, c, 0, 0, 0];
            // Half of the calls have a value of a rule's.
            let args = rules.get(usize::from(rule) % 12).map(|it| it.args.as_slice()).unwrap_or_default();
            if let Some((index, _, value, _)) = args.get(usize::from(at) % 4) {
                arguments[usize::from(*index)] = *value;
            }
            let matching = rules.iter().filter(|it| it.matches(name, capabilities, &arguments)).map(|it| it.action).min();
            let expected = ACTIONS[matching.unwrap_or(default)].1;
            let Some(arch::KnownCall::Here(number)) = arch::known_call(NAMES[name]) else { continue };
            let seen = run(&program, Call { number, architecture: arch::AUDIT_ARCH, arguments });
            prop_assert_eq!(seen, Some(expected), "{} {:?} of {}", NAMES[name], arguments, json);
        }
        for number in [number("getpid"), 599, 0x3fff_ffff] {
            let seen = run(&program, Call { number, architecture: arch::AUDIT_ARCH, arguments: [0; 6] });
            prop_assert_eq!(seen, Some(ACTIONS[default].1));
        }
    }

    #[test]
    fn damaged_profiles_never_panic(at in any::<prop::sample::Index>(), byte in any::<u8>(), choice in any::<[u8; 8]>()) {
        let mut text = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read", "socket"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_NE"}], "includes": {"caps": ["KILL"], "minKernel": "4.8"}}]}).to_string().into_bytes();
        let at = at.index(text.len());
        text[at] = byte;
        super::interpreter::fuzz(&[choice.as_slice(), &text].concat());
    }
}
