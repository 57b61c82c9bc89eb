//! Whatever can be asked of a guest that runs is asked of bad guests too (`tests/kvm/calls.rs`), and its bound is in the documentation.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

#[path = "kvm/calls/list.rs"]
mod list;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Handles of what runs.
const HANDLES: &[&str] = &[
    "Async",
    "Container",
    "CopyIn",
    "CopyOut",
    "DiskHandle",
    "Events",
    "Exec",
    "FileReader",
    "Files",
    "NetHandle",
    "Process",
    "ProcessReader",
    "ProcessWriter",
    "PublishedPort",
    "Switch",
    "Vm",
    "VsockListener",
    "VsockStream",
];

/// What describes a guest that is to be made, or is data, or works on files of the host: no guest has part in it.
const APART: &[&str] = &[
    "BaseImage",
    "CancelToken",
    "Capabilities",
    "Capture",
    "CertificateIdentity",
    "Cgroup",
    "Cidr",
    "ConnectionLimit",
    "Console",
    "Credentials",
    "ContainerBuilder",
    "CpuProfile",
    "CpuidBits",
    "CpuidRegister",
    "Csum",
    "CustomNet",
    "Digest",
    "Disk",
    "DiskLimit",
    "Error",
    "Exit",
    "ExitReport",
    "ExitStatus",
    "Exposure",
    "FetchRequest",
    "FetchResponse",
    "FileDisk",
    "Frame",
    "Gso",
    "Host",
    "Image",
    "ImageLimits",
    "ImageStore",
    "Initramfs",
    "Kernel",
    "Mac",
    "Memory",
    "Modules",
    "NamedVolume",
    "Net",
    "NetLimit",
    "Offload",
    "Offloads",
    "Overlay",
    "OverlayDisk",
    "Platform",
    "Policy",
    "PortForward",
    "PublicKey",
    "Qcow2Disk",
    "ProcessLimits",
    "Rate",
    "Received",
    "Reference",
    "Registry",
    "Rule",
    "RxBuffer",
    "ScratchDisk",
    "SeccompProfile",
    "SignaturePolicy",
    "Size",
    "Stats",
    "Stdio",
    "Tmpfs",
    "TrustRoot",
    "UserNet",
    "VmBuilder",
    "Vsock",
    "Volume",
    "VolumeStore",
    "Vulnerability",
    "WritableLayer",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The names that the crate's root and its modules give to their users.
fn exported() -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("lib.rs")).unwrap();
    let uses = text.split("pub use ").skip(1).map(|rest| rest.split(';').next().unwrap());
    let words = uses.flat_map(|list| list.split(|c: char| !c.is_alphanumeric() && c != '_'));
    words.filter(|word| word.starts_with(char::is_uppercase)).map(str::to_owned).collect()
}

/// The public methods of each such type that do more than set something up: those that give back no `Self`.
fn methods(exported: &BTreeSet<String>) -> BTreeMap<String, BTreeSet<String>> {
    let (mut found, mut directories) = (BTreeMap::<String, BTreeSet<String>>::new(), vec![root()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let mut of = None;
            let mut lines = text.lines();
            while let Some(line) = lines.next() {
                if let Some(head) = line.strip_prefix("impl") {
                    // `impl<T> Type<T> {`, and not of a trait.
                    let head = head.split_once("> ").map_or(head, |(generics, rest)| match generics.starts_with('<') {
                        true => rest,
                        false => head,
                    });
                    let name: String = head.trim().chars().take_while(|c| c.is_alphanumeric()).collect();
                    of = (!line.contains(" for ") && exported.contains(&name)).then_some(name);
                }
                if line == "}" {
                    of = None;
                }
                let words = ["    pub fn ", "    pub const fn ", "    pub async fn "];
                let function = words.iter().find_map(|words| line.strip_prefix(words));
                let (Some(of), Some(function)) = (&of, function) else { continue };
                let name: String = function.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let mut signature = function.to_owned();
                while !signature.contains('{') {
                    signature += lines.next().unwrap();
                }
                let sets = signature.contains("-> Self {") || signature.contains("Builder {");
                let methods = found.entry(of.clone()).or_default();
                if !sets {
                    methods.insert(name);
                }
            }
        }
    }
    found
}

#[test]
fn each_public_call_is_in_the_list_and_each_of_the_list_is_there() {
    let found = methods(&exported());
    let known: BTreeSet<&str> = HANDLES.iter().chain(APART).copied().collect();
    let new: Vec<_> = found.keys().filter(|name| !known.contains(name.as_str())).collect();
    assert!(new.is_empty(), "is it a handle of what runs, or apart? {new:?}");
    let there: BTreeSet<String> =
        HANDLES.iter().flat_map(|of| found[*of].iter().map(move |method| format!("{of}::{method}"))).collect();
    let listed: BTreeSet<String> = list::WAITING.iter().chain(list::AT_ONCE).map(|name| (*name).to_owned()).collect();
    let missing: Vec<_> = there.difference(&listed).collect();
    assert!(missing.is_empty(), "bad guests do not know of {missing:?}: add them to tests/kvm/calls.rs and its list");
    let gone: Vec<_> = listed.difference(&there).collect();
    assert!(gone.is_empty(), "there is no {gone:?} any more");
    assert!(there.len() > 50, "{there:?}");
}

#[test]
fn each_call_that_waits_has_a_bound_in_the_table() {
    let text = fs::read_to_string(root().join("lib.rs")).unwrap();
    let table = text.split("//! # How long calls wait").nth(1).unwrap().split("//! # ").next().unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("//! | ")?.split(" | ").next());
    // The name of a link, without where it leads.
    let name = |calls: &str| {
        let mut parts = calls.split("](");
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |all, part| all + part.split_once(')').map_or(part, |(_, rest)| rest))
    };
    let rows: Vec<String> = rows.map(|calls| name(calls).replace(['`', '[', ']'], "")).collect();
    assert!(rows.len() > 20, "{rows:?}");
    let named = |name: &str| rows.iter().any(|row| row.split([',', ' ']).any(|word| word == name));
    for name in list::WAITING {
        let (of, method) = name.split_once("::").unwrap();
        let all_of = rows.iter().any(|row| row.contains("methods of ") && row.split([',', ' ']).any(|word| word == of));
        assert!(named(name) || all_of || method.ends_with("_timeout"), "{name} is not in the table");
    }
    // And no row is about what is not there.
    let found = methods(&exported());
    for word in rows.iter().flat_map(|row| row.split([',', ' '])) {
        if let Some((of, method)) = word.split_once("::") {
            assert!(found.get(of).is_some_and(|all| all.contains(method)), "there is no {word}");
        }
    }
}
