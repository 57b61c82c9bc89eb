//! Descriptions of VMs, taken apart and put together.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::live::{Handover, LivePartKind};
use super::*;
use crate::boot::{Initramfs, Modules, tiny};
use crate::network::{Capture, ConnectionLimit, NicConfig, Policy, Protocol, Rule, SocketBackend, Switch};
use crate::rate::Rate;
use crate::size::Size;
use crate::virtio::blk::{CacheMode, DiskLimit, ErrorAction, ErrorClass, IoEngine};
use crate::virtio::net::NetLimit;
use crate::vm::disk::Disk;
use crate::vm::net::{Net, PortForward, UserNet};

fn split(builder: VmBuilder) -> (VmSpec, LiveParts) {
    builder.config.split()
}

/// A directory that goes away with its test.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("cofferdam-spec-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn kernel() -> Kernel {
    Kernel::from_bytes(&tiny::elf(b"\xf4")).unwrap().cmdline("console=hvc0")
}

fn builder() -> VmBuilder {
    crate::Vm::builder(kernel()).vcpus(2)
}

fn no_backend(_: NicConfig) -> std::io::Result<SocketBackend> {
    Err(std::io::Error::other("no backend"))
}

/// A policy with all that rules have.
fn policy() -> Policy {
    let range = |text: &str| text.parse::<crate::network::Cidr>().unwrap();
    Policy::deny_all()
        .all_records(true)
        .rule(Rule::deny_name("*.example.com"))
        .rule(Rule::allow_range(range("10.0.0.0/8")).port(80).ports(1000..=2000).protocol(Protocol::Tcp))
        .rule(Rule::deny_range(range("2001:db8::/32")).protocol(Protocol::Ping).protocol(Protocol::Udp))
        .rule(Rule::allow_public())
}

fn user_net() -> UserNet {
    let tcp =
        PortForward::tcp(([127, 0, 0, 1], 0), 80).allow_from("192.0.2.0/24".parse::<crate::network::Cidr>().unwrap());
    let limit = ConnectionLimit::new().open(9).new_connections(Rate::per_second(5).one_time_burst(7));
    Net::user(policy())
        .publish(tcp)
        .publish(PortForward::udp("[::1]:53".parse::<std::net::SocketAddr>().unwrap(), 53))
        .connection_limit(limit)
}

/// A description with every kind of everything, as many as fit into a machine.
fn everything(temp: &Temp) -> VmBuilder {
    let path = temp.0.join("file");
    fs::write(&path, [0; 4096]).unwrap();
    for list in ["modules.dep", "modules.builtin"] {
        fs::write(temp.0.join(list), "").unwrap();
    }
    let file = || File::open(&path).unwrap();
    let rate = || Rate::per_second(1 << 30).one_time_burst(3);
    let kernel = kernel()
        .pvh(true)
        .initramfs(Initramfs::new().file("/init", 0o755, "#!"))
        .modules(Modules::open(&temp.0).unwrap());
    let disks: Vec<Disk> = vec![
        Disk::file(&path).read_only(true).direct(true).lock(false).engine(IoEngine::Threads).into(),
        Disk::file(Path::new(std::ffi::OsStr::from_bytes(b"/no\xfftext"))).cache(CacheMode::Unsafe).into(),
        Disk::from_file(file()).read_only(true).serial("open").min_free_space(Size::mib(1)).into(),
        Disk::scratch(Size::gib(1)).scratch_dir("/var/tmp").reserve(Size::gib(2)).into(),
        Disk::memory(Size::mib(3))
            .queues(4)
            .limit(DiskLimit::none().read_bytes(rate()).write_operations(rate()))
            .into(),
        Disk::overlay("/base.img")
            .size(Size::gib(4))
            .max_size(Size::gib(1))
            .on_error(ErrorClass::Write, ErrorAction::Stop)
            .into(),
        #[cfg(feature = "qcow2")]
        Disk::qcow2("/image.qcow2").backing_dir("/images").into(),
    ];
    let switch = Switch::new();
    let nets: Vec<Net> = vec![
        user_net().mac([2, 0, 0, 0, 0, 1]).mtu(9000).limit(NetLimit::none().sent_bytes(rate())).into(),
        Net::tap("tap0").queues(2).capture(Capture::file("/capture.pcap").snap_len(64).max_size(Size::mib(1))).into(),
        Net::tap_files([file(), file()]).into(),
        Net::socket(UnixStream::pair().unwrap().0).into(),
        Net::switch(&switch, "guest").into(),
        Net::custom(no_backend).capture(Capture::writer(Vec::new())).into(),
    ];
    let mut vm = crate::Vm::builder(kernel)
        .vcpus(2)
        .cpu(CpuProfile::x86_64_v2().msr(0x10a, 1))
        .memory(Memory::hugetlb(Size::gib(1)).page_size(Size::gib(1)))
        .console(Console::writer(Vec::new()))
        .vsock(Vsock::new().listen(7).listen(9))
        .cgroup(Cgroup::under("/sys/fs/cgroup/x").cpus(0.5).weight(7).optional(true))
        .kick_signal(11)
        .descriptors(100);
    vm.config.parameters.push(("quiet".into(), String::new()));
    vm = disks.into_iter().fold(vm, VmBuilder::disk);
    nets.into_iter().fold(vm, VmBuilder::net)
}

/// The same as text and back, where the feature is there.
fn through_text(spec: VmSpec) -> VmSpec {
    #[cfg(feature = "serde")]
    let spec = {
        let text = serde_json::to_string(&spec).unwrap();
        let back: VmSpec = serde_json::from_str(&text).unwrap();
        assert_eq!(back, spec, "{text}");
        back
    };
    spec
}

#[test]
fn every_kind_is_the_same_after_a_split_and_a_join() {
    let temp = Temp::new("every-kind");
    let builder = everything(&temp);
    // Descriptors and all values are in it.
    let before = format!("{builder:?}");
    let (spec, live) = split(builder);
    let again = join(through_text(spec.clone()), live).unwrap();
    assert_eq!(format!("{again:?}"), before);
    let (same, live) = split(again);
    assert_eq!(same, spec);
    let kinds = live.kinds();
    let missing: Vec<_> = LivePartKind::ALL.iter().filter(|kind| !kinds.contains(kind)).collect();
    assert!(missing.is_empty(), "{missing:?} are in no description");
}

#[test]
fn live_parts_are_shared_and_not_copied() {
    let loaded = kernel();
    let (shared, file) = (loaded.loaded.clone(), Arc::new(File::open("/dev/null").unwrap()));
    let mut disk: Disk = Disk::from_file(File::open("/dev/null").unwrap()).into();
    disk.source = DiskSource::File(file.clone());
    let (spec, live) = split(crate::Vm::builder(loaded).disk(disk));
    let config = join(through_text(spec), live).unwrap().config;
    assert!(Arc::ptr_eq(&config.kernel.loaded, &shared));
    assert!(matches!(&config.disks[0].source, DiskSource::File(same) if Arc::ptr_eq(same, &file)));
}

#[test]
fn settled_description_has_the_addresses_of_all_cards() {
    let vm = builder().net(Net::socket(UnixStream::pair().unwrap().0)).net(user_net().mac([2, 0, 0, 0, 0, 1]));
    let (spec, _) = vm.config.settle().unwrap().split();
    let [chosen, set] = [0, 1].map(|n| spec.nets[n].mac.unwrap());
    assert!(chosen.is_unicast() && chosen != set);
    assert_eq!(set, [2, 0, 0, 0, 0, 1].into());
    let wrong = builder().net(user_net().mac([1, 0, 0, 0, 0, 1]));
    let error = wrong.config.settle().unwrap_err();
    assert!(error.to_string().starts_with("attaching network 0: mac: "), "{error}");
}

#[test]
fn wrong_live_parts_are_refused() {
    let file = || Disk::from_file(File::open("/dev/null").unwrap());
    let refused = |change: fn(&mut VmSpec, &mut LiveParts)| {
        let (mut spec, mut live) = split(builder().disk(file()).console(Console::writer(Vec::new())));
        change(&mut spec, &mut live);
        let error = join(spec, live).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        error.to_string()
    };
    let (image, disk) = (0, 1);
    assert_eq!((LivePartId::nth(image), LivePartId::nth(disk)), {
        let (spec, _) = split(builder().disk(file()));
        let DiskSource::File(disk) = spec.disks[0].source else { panic!("a file") };
        (spec.kernel.image, disk)
    });
    for (text, expected) in [
        (refused(|spec, _| spec.kernel.image = LivePartId::nth(9)), "there is none"),
        (refused(|spec, _| spec.disks[0].source = DiskSource::File(LivePartId::nth(2))), "it is a ConsoleWriter"),
        (refused(|spec, _| spec.disks.push(spec.disks[0].clone())), "it is named twice"),
        (refused(|spec, _| spec.disks.clear()), "a DiskFile: the spec does not name it"),
        (refused(|_, live| *live = LiveParts::default()), "live part 0, a KernelImage: there is none"),
    ] {
        assert!(text.contains(expected), "{text} lacks {expected}");
    }
}

type Change = fn(&mut VmSpec);

#[test]
fn loaded_specs_are_checked_as_builders_are() {
    let refused = |change: Change| {
        let (mut spec, live) = split(builder().disk(Disk::memory(Size::mib(1))).net(user_net()));
        change(&mut spec);
        join(spec, live).map(drop).unwrap_err()
    };
    fn user(spec: &mut VmSpec) -> &mut UserSource {
        match &mut spec.nets[0].source {
            net::NetSourceSpec::User(user) => user,
            other => panic!("{other:?}"),
        }
    }
    let cases: &[(Change, &str)] = &[
        (|spec| spec.vcpus = 0, "vcpus"),
        (|spec| spec.vcpus = 255, "vcpus"),
        (|spec| spec.memory = Size::bytes(1).into(), "memory"),
        (|spec| spec.descriptors = Some(15), "descriptors"),
        (|spec| spec.cgroup = Some(Cgroup::new().weight(0)), "Cgroup::weight"),
        (|spec| spec.cgroup = Some(Cgroup::new().cpus(f64::NAN)), "Cgroup::cpus"),
        (|spec| spec.disks[0].settings.serial = Some("a disk".into()), "attaching disk 0: serial"),
        (|spec| spec.disks[0].settings.queues = 65, "attaching disk 0: queues"),
        (|spec| spec.disks[0].settings.limit = DiskLimit::none().read_bytes(Rate::per_second(0)), "read_bytes"),
        (|spec| spec.disks = vec![spec.disks[0].clone(); 1 << 20], "disk or net"),
        (
            |spec| {
                spec.disks.push(DiskSpec {
                    settings: DiskSettings { serial: Some("disk0".into()), ..DiskSettings::new() },
                    source: DiskSource::Memory(Size::mib(1)),
                })
            },
            "serial",
        ),
        (|spec| spec.nets[0].mtu = 575, "attaching network 0: mtu"),
        (|spec| spec.nets[0].queues = 2, "attaching network 0: queues"),
        (|spec| spec.nets[0].mac = Some([1, 0, 0, 0, 0, 1].into()), "attaching network 0: mac"),
        (|spec| spec.nets.push(spec.nets[0].clone()), "two cards are on 10.0.2.0/24"),
        (|spec| user(spec).connection_limit = ConnectionLimit::new().open(0), "connection_limit: open"),
        (|spec| user(spec).policy = Policy::deny_all().rule(Rule::allow_public().port(0)), "Policy::rule"),
        (
            |spec| user(spec).policy = (0..5000).fold(Policy::deny_all(), |policy, _| policy.rule(Rule::deny_all())),
            "Policy::rule",
        ),
        (|spec| user(spec).ports = vec![PortForward::tcp(([127, 0, 0, 1], 80), 80); 2], "publish"),
        (|spec| spec.parameters = vec![("a".into(), "b c=d".into())], "Kernel::cmdline"),
        (|spec| spec.parameters = vec![("a\0".into(), String::new())], "Kernel::cmdline"),
    ];
    for (change, method) in cases {
        let error = refused(*change);
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
        assert!(error.to_string().contains(method), "{error} lacks {method}");
    }
}

#[test]
fn what_is_opened_by_its_name_is_refused_without_authority() {
    let temp = Temp::new("authority");
    let (whole, _) = split(everything(&temp));
    let mut opened = 0;
    let mut refused = |change: &dyn Fn(&mut VmSpec), named: Option<&str>| {
        let (mut spec, _) = split(builder());
        change(&mut spec);
        match (spec.check_opens_nothing(), named) {
            (Ok(()), None) => {}
            (Err(error), Some(named)) => {
                opened += 1;
                assert_eq!(error.kind(), ErrorKind::PermissionDenied);
                assert!(error.to_string().contains(named), "{error} lacks {named}");
            }
            (outcome, named) => panic!("{outcome:?}, not {named:?}"),
        }
    };
    for disk in &whole.disks {
        let named = match &disk.source {
            DiskSource::File(_) | DiskSource::Memory(_) | DiskSource::Pieces(_) => None,
            DiskSource::Scratch(_) => Some("directory"),
            _ => Some("disk 0: /"),
        };
        refused(&|spec| spec.disks = vec![disk.clone()], named);
    }
    for net in &whole.nets {
        let named = matches!(net.source, net::NetSourceSpec::Tap(_)).then_some("network 0: tap tap0");
        refused(&|spec| spec.nets = vec![net.clone()], named);
        let file =
            net::CaptureSpec { sink: net::CaptureSinkSpec::File(HostPath::new("/a.pcap")), snap: 1, max: Size::mib(1) };
        refused(
            &|spec| spec.nets = vec![NetSpec { capture: Some(file.clone()), ..net.clone() }],
            named.or(Some("/a.pcap")),
        );
    }
    refused(&|spec| spec.cgroup = whole.cgroup.clone(), Some("cgroup"));
    refused(&|spec| spec.kernel = whole.kernel.clone(), Some("kernel"));
    assert!(opened > 10, "{opened}");
}

#[test]
fn table_of_live_parts_is_that_of_the_architecture() {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let row = |kind: &LivePartKind| {
        let handover = match kind.handover() {
            Handover::Descriptor => "descriptor",
            Handover::Pump => "pump",
            Handover::Stays => "stays",
        };
        format!("| `{kind:?}` | {handover} | {} |\n", kind.how())
    };
    let rows: String = LivePartKind::ALL.iter().map(row).collect();
    assert!(page.contains(&rows), "ARCHITECTURE.md needs this:\n{rows}");
    assert_eq!(
        page.matches(" | descriptor | ").count()
            + page.matches(" | pump | ").count()
            + page.matches(" | stays | ").count(),
        LivePartKind::ALL.len()
    );
}

#[cfg(feature = "serde")]
mod text {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    #[test]
    fn specs_of_another_version_or_with_other_fields_are_refused() {
        let temp = Temp::new("fields");
        let (spec, _) = split(everything(&temp));
        let whole = serde_json::to_value(&spec).unwrap();
        let mut objects = 0;
        each_object(&whole, &mut Vec::new(), &mut |path| {
            objects += 1;
            let keys: Vec<String> = at(&mut whole.clone(), path).as_object().unwrap().keys().cloned().collect();
            let mut more = whole.clone();
            at(&mut more, path).as_object_mut().unwrap().insert("unknown".into(), Value::Null);
            assert!(serde_json::from_value::<VmSpec>(more).is_err(), "one more at {path:?}");
            for key in keys {
                let mut fewer = whole.clone();
                let removed = at(&mut fewer, path).as_object_mut().unwrap().remove(&key);
                // An option may be left out, and a profile's grants, which older texts of profiles lack.
                if let Ok(loaded) = serde_json::from_value::<VmSpec>(fewer) {
                    let mut nothing = whole.clone();
                    at(&mut nothing, path).as_object_mut().unwrap().insert(key.clone(), Value::Null);
                    let optional = removed.unwrap().is_null()
                        || serde_json::from_value::<VmSpec>(nothing).is_ok_and(|none| none == loaded)
                        || key == "grants"
                        || path.last().is_some_and(|last| last == "grants");
                    assert!(optional, "{key} is missing at {path:?}");
                }
            }
        });
        assert!(objects > 30, "{objects}");
        crate::version::assert_versioned(&spec);
        let text = serde_json::to_string(&spec).unwrap();
        for end in (0..text.len()).filter(|end| text.is_char_boundary(*end)) {
            assert!(serde_json::from_str::<VmSpec>(&text[..end]).is_err());
        }
    }

    #[test]
    fn ranges_that_no_program_can_write_are_refused() {
        let (spec, _) = split(builder().net(user_net()));
        let text = serde_json::to_string(&spec).unwrap();
        for range in ["10.0.0.0/33", "10.1.2.3/8", "::/129", "x"] {
            let wrong = text.replace("10.0.0.0/8", range);
            assert_ne!(wrong, text);
            assert!(serde_json::from_str::<VmSpec>(&wrong).is_err(), "{range}");
        }
    }

    #[test]
    fn secrets_and_contents_are_not_in_the_text() {
        let kernel = kernel().initramfs(Initramfs::new().file("/key", 0o600, "a secret of the guest"));
        let (spec, _) = split(crate::Vm::builder(kernel));
        assert!(!serde_json::to_string(&spec).unwrap().contains("secret"));
    }

    /// Calls `visit` with the way to each object.
    fn each_object(value: &Value, path: &mut Vec<String>, visit: &mut dyn FnMut(&[String])) {
        let children: Vec<(String, &Value)> = match value {
            Value::Object(fields) => {
                visit(path);
                fields.iter().map(|(key, value)| (key.clone(), value)).collect()
            }
            Value::Array(items) => items.iter().enumerate().map(|(n, value)| (n.to_string(), value)).collect(),
            _ => Vec::new(),
        };
        for (key, value) in children {
            path.push(key);
            each_object(value, path, visit);
            path.pop();
        }
    }

    fn at<'a>(value: &'a mut Value, path: &[String]) -> &'a mut Value {
        path.iter().fold(value, |value, key| match value {
            Value::Array(items) => &mut items[key.parse::<usize>().unwrap()],
            other => &mut other[key],
        })
    }

    fn rates() -> impl Strategy<Value = Rate> {
        (1u64.., any::<u64>()).prop_map(|(n, burst)| Rate::per_second(n).one_time_burst(burst))
    }

    fn paths() -> impl Strategy<Value = PathBuf> {
        proptest::collection::vec(1u8.., 0..12).prop_map(|bytes| std::ffi::OsStr::from_bytes(&bytes).into())
    }

    fn disks() -> impl Strategy<Value = Disk> {
        let sizes = any::<u64>().prop_map(Size::bytes);
        (0..7, paths(), proptest::option::of(paths()), sizes, any::<[bool; 3]>(), ".{0,8}", rates(), 0u32..9).prop_map(
            |(kind, path, dir, size, [one, two, three], serial, rate, queues)| {
                let limit = DiskLimit::none().read_operations(rate).write_bytes(rate);
                let mut disk: Disk = match kind {
                    0 => Disk::file(path).read_only(one).lock(two).direct(three).into(),
                    1 => Disk::from_file(File::open("/dev/null").unwrap()).read_only(one).into(),
                    2 => dir.into_iter().fold(Disk::scratch(size), |disk, dir| disk.scratch_dir(dir)).into(),
                    3 => Disk::memory(size).into(),
                    4 => Disk::overlay(path).max_size(size).into(),
                    #[cfg(feature = "container")]
                    5 => {
                        let file = Arc::new(File::open("/dev/null").unwrap());
                        let piece = |offset| DiskPiece { file: file.clone(), offset, len: size.as_bytes() };
                        Disk::of_pieces(vec![piece(0), piece(7)], "pieces")
                    }
                    _ => {
                        dir.into_iter().fold(Disk::overlay(path), |disk, dir| disk.persist_at(dir)).reserve(size).into()
                    }
                };
                (disk.settings.limit, disk.settings.queues) = (limit, queues);
                disk.settings.serial = one.then_some(serial);
                disk
            },
        )
    }

    fn nets() -> impl Strategy<Value = Net> {
        let rules = (any::<[bool; 3]>(), any::<std::net::IpAddr>(), any::<[u16; 2]>()).prop_map(
            |([allow, one, two], address, ports)| {
                let rule = if allow { Rule::allow_range(address) } else { Rule::deny_name("a.example") };
                let rule = if one { rule.ports(ports[0]..=ports[1]) } else { rule };
                if two { rule.protocol(Protocol::Udp) } else { rule }
            },
        );
        let policies = (proptest::collection::vec(rules, 0..5), any::<bool>())
            .prop_map(|(rules, records)| rules.into_iter().fold(Policy::deny_all().all_records(records), Policy::rule));
        (0..4, policies, any::<(std::net::IpAddr, u16, u16)>(), any::<[u8; 6]>(), 560u32..70_000, paths(), rates())
            .prop_map(|(kind, policy, (host, port, guest), mac, mtu, path, rate)| match kind {
                0 => Net::user(policy).publish(PortForward::udp((host, port), guest)).mac(mac).mtu(mtu).into(),
                1 => {
                    Net::tap(format!("tap{mtu}")).capture(Capture::file(path).max_size(Size::bytes(mtu.into()))).into()
                }
                2 => Net::switch(&Switch::new(), "name").limit(NetLimit::none().received_packets(rate)).into(),
                _ => Net::custom(no_backend).capture(Capture::writer(Vec::new())).into(),
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn arbitrary_descriptions_are_the_same_after_text(
            disks in proptest::collection::vec(disks(), 0..4),
            nets in proptest::collection::vec(nets(), 0..4),
            numbers in (1u32..9, 1u64..1 << 12, any::<u8>(), proptest::option::of(10u32..)),
            cpus in proptest::option::of(0u32..100),
            ports in proptest::collection::vec(any::<u32>(), 0..4),
            text in ".*",
        ) {
            let (vcpus, memory, signal, descriptors) = numbers;
            let mut vm = crate::Vm::builder(kernel().cmdline(text.as_str())).vcpus(vcpus).memory(Size::mib(memory)).kick_signal(signal);
            vm = cpus.into_iter().fold(vm, |vm, cpus| vm.cgroup(Cgroup::new().cpus(f64::from(cpus) / 8.0)));
            vm.config.descriptors = descriptors;
            vm.config.parameters.push((text, String::new()));
            vm = vm.vsock(ports.into_iter().fold(Vsock::new(), Vsock::listen));
            vm = nets.into_iter().fold(disks.into_iter().fold(vm, VmBuilder::disk), VmBuilder::net);
            let before = format!("{vm:?}");
            let (spec, live) = split(vm);
            // What a builder refuses is refused; all else is as it was.
            if let Ok(again) = join(through_text(spec), live) {
                prop_assert_eq!(format!("{again:?}"), before);
            }
        }

        /// Text of a peer: whatever is in it, it is refused or a description.
        #[test]
        fn arbitrary_changes_of_the_text_are_survived(place in any::<proptest::sample::Index>(), number in any::<u64>(), kind in 0..5) {
            let (spec, live) = split(builder().disk(Disk::memory(Size::mib(1))).net(user_net()).console(Console::writer(Vec::new())));
            let mut value = serde_json::to_value(&spec).unwrap();
            let mut leaves = Vec::new();
            each_leaf(&value, String::new(), &mut leaves);
            let leaf = value.pointer_mut(&leaves[place.index(leaves.len())]).unwrap();
            *leaf = match kind {
                0 => number.into(),
                1 => (number % 300).into(),
                2 => Value::Null,
                3 => format!("{number}/8").into(),
                _ => vec![number; 3].into(),
            };
            if let Ok(spec) = serde_json::from_value::<VmSpec>(value) {
                let _ = join(spec, live);
            }
        }
    }

    fn each_leaf(value: &Value, path: String, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(key, value)| each_leaf(value, format!("{path}/{key}"), found))
            }
            Value::Array(items) => {
                items.iter().enumerate().for_each(|(n, value)| each_leaf(value, format!("{path}/{n}"), found))
            }
            _ => found.push(path),
        }
    }
}
