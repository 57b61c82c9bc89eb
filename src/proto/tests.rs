//! Round trips, any split, garbage: the properties that both sides rely on. Runs on the host, without KVM.

use std::ffi::CString;

use proptest::collection::vec;
use proptest::prelude::*;

use super::frame::append;
use super::*;

/// A frame that owns its payload.
#[derive(Debug, Clone, PartialEq)]
struct Owned {
    stream: u32,
    kind: u32,
    payload: Vec<u8>,
}

impl From<MessageFrame<'_>> for Owned {
    fn from(frame: MessageFrame<'_>) -> Self {
        Self { stream: frame.stream, kind: frame.kind, payload: frame.payload.to_vec() }
    }
}

/// Everything in `bytes`, fed in pieces of the given lengths, then the rest at once.
fn decode(decoder: &mut Decoder, mut bytes: &[u8], pieces: &[usize]) -> Result<Vec<Owned>, FrameError> {
    let mut frames = Vec::new();
    for &piece in pieces.iter().chain([&usize::MAX]) {
        let (mut now, later) = bytes.split_at(piece.min(bytes.len()));
        while let Some(frame) = decoder.next(&mut now)? {
            frames.push(frame.into());
        }
        assert!(now.is_empty(), "an incomplete frame takes all there is");
        bytes = later;
    }
    Ok(frames)
}

fn only_frame(bytes: &[u8]) -> Owned {
    let mut frames = decode(&mut Decoder::new(FROM_HOST_MAX), bytes, &[]).unwrap();
    assert_eq!(frames.len(), 1);
    frames.remove(0)
}

fn view(frame: &Owned) -> MessageFrame<'_> {
    MessageFrame { stream: frame.stream, kind: frame.kind, payload: &frame.payload }
}

fn list(strings: &[Vec<u8>]) -> StringBuf {
    let mut list = StringBuf::new();
    for string in strings {
        list.push(string).unwrap();
    }
    list
}

fn text() -> impl Strategy<Value = Vec<u8>> {
    vec(1..=u8::MAX, 0..40)
}

fn stdio() -> impl Strategy<Value = Stdio> {
    prop_oneof![Just(Stdio::Null), any::<u32>().prop_map(Stdio::Port)]
}

fn any_frame() -> impl Strategy<Value = Owned> {
    (any::<u32>(), any::<u32>(), vec(any::<u8>(), 0..300)).prop_map(|(stream, kind, payload)| Owned {
        stream,
        kind,
        payload,
    })
}

proptest! {
    #[test]
    fn frames_survive_any_split(frames in vec(any_frame(), 0..8), pieces in vec(0usize..50, 0..60)) {
        let mut bytes = Vec::new();
        for frame in &frames {
            append(&mut bytes, frame.stream, frame.kind, 300, |out| out.extend_from_slice(&frame.payload)).unwrap();
        }
        let mut decoder = Decoder::new(300);
        prop_assert_eq!(decode(&mut decoder, &bytes, &pieces).unwrap(), frames);
        prop_assert!(!decoder.is_inside());
    }

    #[test]
    fn garbage_never_panics_or_accumulates(bytes in vec(any::<u8>(), 0..4000), pieces in vec(0usize..100, 0..40)) {
        let mut decoder = Decoder::new(FROM_GUEST_MAX);
        if let Ok(frames) = decode(&mut decoder, &bytes, &pieces) {
            for frame in &frames {
                prop_assert!(frame.payload.len() <= FROM_GUEST_MAX);
            }
        }
    }

    #[test]
    fn garbage_in_known_kinds_never_panics(kind in 0u32..16, guest in any::<bool>(), payload in vec(any::<u8>(), 0..200)) {
        let frame = MessageFrame { stream: 1, kind: kind | if guest { 0x100 } else { 0 }, payload: &payload };
        let _ = FromHost::parse(&frame);
        let _ = FromGuest::parse(&frame);
        let _ = BootConfig::parse(&payload);
    }

    /// Tags and lengths that fit, so that the search gets behind the list of fields.
    #[test]
    fn plausible_fields_never_panic(kind in 0u32..16, guest in any::<bool>(), fields in vec((0u8..24, vec(any::<u8>(), 0..9)), 0..8)) {
        let mut payload = Vec::new();
        for (tag, value) in &fields {
            payload.push(*tag);
            payload.extend_from_slice(&u32::try_from(value.len()).unwrap().to_le_bytes());
            payload.extend_from_slice(value);
        }
        let frame = MessageFrame { stream: 1, kind: kind | if guest { 0x100 } else { 0 }, payload: &payload };
        if let Ok(Some(message)) = FromHost::parse(&frame) {
            let mut again = Vec::new();
            message.encode(1, &mut again).unwrap();
            let frame = only_frame(&again);
            prop_assert_eq!(FromHost::parse(&view(&frame)).unwrap(), Some(message));
        }
        if let Ok(Some(message)) = FromGuest::parse(&frame) {
            let mut again = Vec::new();
            message.encode(1, &mut again).unwrap();
            let frame = only_frame(&again);
            prop_assert_eq!(FromGuest::parse(&view(&frame)).unwrap(), Some(message));
        }
    }

    #[test]
    fn spawn_round_trips(
        stream in any::<u32>(), argv in vec(text(), 1..6), env in vec(text(), 0..6),
        cwd in proptest::option::of(text()), stdio in [stdio(), stdio(), stdio()],
        cookie in vec(any::<u8>(), 0..=COOKIE_SIZE), user in proptest::option::of(text()), home in any::<bool>(), make_cwd in any::<bool>(), stop_signal in proptest::option::of(1..=64u8),
        terminal in proptest::option::of(any::<[u16; 2]>()), groups in vec(text(), 0..3),
        limits in any::<(Option<u64>, Option<u32>, Option<u64>)>(), cpu_weight in proptest::option::of(CPU_WEIGHTS),
        rlimits in vec((0..16u8, any::<[u64; 2]>()), 0..4), no_new_privs in any::<bool>(), seal in any::<bool>(), capabilities in any::<Option<u64>>(),
        filter in vec(any::<[u8; 8]>(), 0..4), flags in any::<u32>(),
    ) {
        let (argv_list, env_list) = (list(&argv), list(&env));
        let groups = list(&groups);
        let (memory, pids, cpu_quota_us) = limits;
        let terminal = terminal.map(|[rows, columns]| TerminalSize { rows, columns });
        let mut packed = Vec::new();
        let rlimits = rlimits.into_iter().map(|(resource, [a, b])| Rlimit { resource, soft: a.min(b), hard: a.max(b) });
        let rlimits: Vec<_> = rlimits.collect();
        rlimits.iter().for_each(|rlimit| rlimit.push(&mut packed));
        prop_assert!(Rlimits(&packed).iter().eq(rlimits));
        let [cwd, user] = [cwd, user].map(|text| text.map(|text| CString::new(text).unwrap()));
        let spawn = FromHost::Spawn(Spawn {
            argv: argv_list.as_strings(), env: env_list.as_strings(), cwd: cwd.as_deref(), stdio, cookie: &cookie,
            user: user.as_deref(), home, make_cwd, stop_signal, terminal, groups: groups.as_strings(),
            limits: ProcessLimits { memory, pids, cpu_weight, cpu_quota_us }, rlimits: Rlimits(&packed), no_new_privs, capabilities, seal,
            filter: filter.as_flattened(), filter_flags: if filter.is_empty() { 0 } else { flags },
        });
        let mut bytes = Vec::new();
        spawn.encode(stream, &mut bytes).unwrap();
        let frame = only_frame(&bytes);
        prop_assert_eq!(frame.stream, stream);
        prop_assert_eq!(FromHost::parse(&view(&frame)).unwrap(), Some(spawn));
        let strings: Vec<_> = argv_list.as_strings().iter().map(|arg| arg.to_bytes().to_vec()).collect();
        prop_assert_eq!(strings, argv);
    }

    #[test]
    fn boot_config_round_trips(hostname in text(), control_port in any::<u32>(), kind in 0..3, read_only in any::<bool>(), names in [text(), text(), text(), text()], modules in vec(text(), 0..6), pairs in vec([text(), text()], 0..3), secret in vec(any::<u8>(), 0..50)) {
        let names = names.map(|mut name| { name.push(b'x'); name });
        let [a, b, c, d] = names.each_ref().map(|name| name.as_slice());
        let root = match kind {
            0 => Root::Initramfs,
            1 => Root::Device { source: RootDisk { device: a, fs: b }, read_only },
            _ => Root::Overlay { lower: RootDisk { device: a, fs: b }, upper: RootDisk { device: c, fs: d }, grow: !read_only, read_only },
        };
        let modules = list(&modules);
        let mut networks = Vec::new();
        let made: Vec<_> = (0..(control_port % 4) as u8).map(|card| Network {
            card,
            address4: control_port.to_be_bytes(),
            prefix4: (control_port % 33) as u8,
            gateway4: [1, 2, 3, 4],
            address6: [card; 16],
            gateway6: [control_port as u8; 16],
        }).collect();
        made.iter().for_each(|network| network.push(&mut networks));
        let pairs = list(&pairs.concat());
        let fours = list(&[a, b, a, b].map(<[u8]>::to_vec));
        let (mounts, sysctls) = (Mounts(fours.as_strings()), pairs.as_strings());
        let mut secrets = Vec::new();
        let both = [Secret { name: b"one", content: &secret }, Secret { name: a, content: b"" }];
        let both: Vec<_> = both.into_iter().filter(|secret| !secret.name.contains(&b'/')).collect();
        both.iter().for_each(|secret| secret.push(&mut secrets));
        let secrets = Secrets(&secrets);
        prop_assert!(secrets.iter().eq(both));
        let networks = Networks(&networks);
        prop_assert!(networks.iter().eq(made));
        let modules = modules.as_strings();
        let config = BootConfig { hostname: &hostname, control_port, root, modules, networks, resolv_conf: a, hosts: b, mounts, sysctls, secrets };
        let file = config.encode().unwrap();
        prop_assert_eq!(BootConfig::parse(&file), Ok(config));
        // Whatever is cut off, the rest is refused or is another valid file, never a panic.
        for end in 0..file.len() {
            let _ = BootConfig::parse(&file[..end]);
        }
    }
}

#[test]
fn every_other_message_round_trips() {
    let mut host = vec![
        FromHost::Hello { version: 7 },
        FromHost::Signal { signo: 15, group: true },
        FromHost::Signal { signo: 64, group: false },
        FromHost::Kill,
        FromHost::Connect { port: 65535 },
        FromHost::Reseed { seed: &[7; SEED_SIZE] },
    ];
    host.extend(End::ALL.iter().map(|&end| FromHost::Shutdown { grace_ms: 2000, end }));
    for message in host {
        let mut bytes = Vec::new();
        message.encode(3, &mut bytes).unwrap();
        assert_eq!(FromHost::parse(&view(&only_frame(&bytes))), Ok(Some(message)));
    }
    let mut guest = vec![
        FromGuest::Hello { min: 1, max: u32::MAX },
        FromGuest::Ready { user_space_ns: u64::MAX, ready_ns: 1, kernel: 6 << 16 | 12 },
        FromGuest::Spawned { pid: 2 },
        FromGuest::Exited { code: 255 },
        FromGuest::Signaled { signo: 9, oom: true },
        FromGuest::Connected { errno: 111 },
        FromGuest::Reseeded { errno: 1 },
        FromGuest::OomKilled { count: 70_000 },
    ];
    guest.extend(End::ALL.iter().map(|&end| FromGuest::Ending { end }));
    guest.extend(Stage::ALL.iter().map(|&stage| FromGuest::Failed { stage, errno: -1, text: b"/dev/vda" }));
    guest.extend(SpawnStep::ALL.iter().map(|&step| FromGuest::SpawnFailed { step, errno: 2 }));
    for message in guest {
        let mut bytes = Vec::new();
        message.encode(3, &mut bytes).unwrap();
        assert_eq!(FromGuest::parse(&view(&only_frame(&bytes))), Ok(Some(message)));
    }
}

#[test]
fn announced_length_allocates_nothing() {
    let mut decoder = Decoder::new(FROM_HOST_MAX);
    let header = [u32::try_from(FROM_HOST_MAX).unwrap().to_le_bytes(), [0; 4], [0; 4]];
    assert_eq!(decode(&mut decoder, header.as_flattened(), &[]), Ok(vec![]));
    assert!(decoder.is_inside());
    assert!(format!("{decoder:?}").len() < 300);
}

#[test]
fn reading_the_missing_bytes_ends_at_the_frame() {
    let mut bytes = Vec::new();
    FromGuest::Connected { errno: 7 }.encode(0, &mut bytes).unwrap();
    let len = bytes.len();
    bytes.extend_from_slice(b"SSH-2.0");
    let (mut decoder, mut taken) = (Decoder::new(FROM_GUEST_MAX), 0);
    while decoder.missing() > 0 {
        let piece = decoder.missing().div_ceil(2);
        let mut input = &bytes[taken..taken + piece];
        taken += piece;
        if let Some(frame) = decoder.next(&mut input).unwrap() {
            assert_eq!(FromGuest::parse(&frame), Ok(Some(FromGuest::Connected { errno: 7 })));
            break;
        }
    }
    assert_eq!(taken, len);
    assert_eq!(decoder.missing(), HEADER_SIZE, "the next frame has not begun");
}

#[test]
fn port_0_is_rejected() {
    for port in [0u32, 65536] {
        let mut bytes = Vec::new();
        append(&mut bytes, 0, 6, 100, |out| field::Writer(out).u32(1, port)).unwrap();
        assert_eq!(FromHost::parse(&view(&only_frame(&bytes))), Err(Malformed("port")));
    }
}

#[test]
fn a_frame_beyond_the_limit_ends_the_stream() {
    let mut decoder = Decoder::new(10);
    let header = [11u32.to_le_bytes(), [0; 4], [0; 4]];
    assert_eq!(decode(&mut decoder, header.as_flattened(), &[]), Err(FrameError::TooLong(11)));
    assert_eq!(decoder.next(&mut &[][..]), Err(FrameError::TooLong(11)));
}

#[test]
fn unknown_kinds_and_fields_are_skipped() {
    assert_eq!(FromHost::parse(&MessageFrame { stream: 0, kind: 99, payload: &[] }), Ok(None));
    assert_eq!(FromGuest::parse(&MessageFrame { stream: 0, kind: 1, payload: &[] }), Ok(None));
    let mut bytes = Vec::new();
    append(&mut bytes, 0, 1, 100, |out| {
        let mut fields = field::Writer(out);
        fields.bytes(200, b"from the future");
        fields.u32(1, 1);
    })
    .unwrap();
    assert_eq!(FromHost::parse(&view(&only_frame(&bytes))), Ok(Some(FromHost::Hello { version: 1 })));
}

#[test]
fn a_request_too_long_leaves_the_buffer_as_it_was() {
    let mut argv = StringBuf::new();
    argv.push(&vec![b'x'; FROM_HOST_MAX]).unwrap();
    let spawn = Spawn { argv: argv.as_strings(), ..Spawn::default() };
    let mut bytes = vec![1, 2, 3];
    assert!(matches!(FromHost::Spawn(spawn).encode(1, &mut bytes), Err(FrameError::TooLong(_))));
    assert_eq!(bytes, [1, 2, 3]);
}

#[test]
fn a_long_failure_text_is_cut() {
    let mut bytes = Vec::new();
    FromGuest::Failed { stage: Stage::Mount, errno: 0, text: &[b'x'; 9000] }.encode(0, &mut bytes).unwrap();
    assert!(bytes.len() <= FROM_GUEST_MAX + HEADER_SIZE);
}

#[test]
fn filters_that_linux_would_not_take_are_refused() {
    let argv = list(&[b"true".to_vec()]);
    for (len, fine) in [(0, true), (8, true), (9, false), (4096 * 8, true), (4097 * 8, false)] {
        let filter = vec![0; len];
        let spawn = FromHost::Spawn(Spawn { argv: argv.as_strings(), filter: &filter, ..Spawn::default() });
        let mut bytes = Vec::new();
        spawn.encode(1, &mut bytes).unwrap();
        assert_eq!(FromHost::parse(&view(&only_frame(&bytes))).is_ok(), fine, "{len}");
    }
}

#[test]
fn strings_with_a_nul_are_refused() {
    assert_eq!(StringBuf::new().push(b"a\0b"), Err(Nul));
    let mut empty = StringBuf::new();
    empty.push(b"").unwrap();
    assert_eq!(empty.as_strings().iter().count(), 1);
}

#[test]
fn the_newest_common_version_is_chosen() {
    assert_eq!(negotiate(1, 1), Some(1));
    assert_eq!(negotiate(1, 9), Some(VERSION_MAX));
    assert_eq!(negotiate(VERSION_MAX + 1, 9), None);
    assert_eq!(negotiate(0, 0), None);
    assert_eq!(negotiate(3, 1), None);
}
